package service

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/podd-runtime/podd/integration/node"
)

// notes is where pods write down what becomes of them.
const notes = "/var/lib/podd-test-notes"

// noted is a pod that writes into notes when it begins and ends, and so does its
// preStop hook, which takes two seconds.
func noted(name, spec string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 20
%s  volumes: [{name: notes, hostPath: {path: %s}}]
  containers:
  - name: main
    image: podd.test/testserver:1
    args: [noted, /notes/order, %s]
    volumeMounts: [{name: notes, mountPath: /notes}]
    lifecycle: {preStop: {exec: {command: [/testserver, note, /notes/order, %s hook, 2s]}}}
`, name, spec, notes, name, name)
}

func startNoted(t *testing.T) (begun []string) {
	t.Helper()
	if err := os.MkdirAll(notes, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(notes, "order")); err != nil {
		t.Fatal(err)
	}
	write(t, "critical", noted("critical", "  priorityClassName: system-node-critical\n"))
	write(t, "ordinary", noted("ordinary", ""))
	waitReady(t, 60*second, "critical", "ordinary")
	node.Await(t, "both begun", 30*second, func() bool { begun = written(); return len(begun) == 2 })
	return begun
}

// written is what the pods wrote.
func written() []string {
	b, err := os.ReadFile(filepath.Join(notes, "order"))
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

// endedInOrder: each pod's hook ran, then the pod ended by itself; the critical
// one after the other.
func endedInOrder(t *testing.T, begun []string) {
	t.Helper()
	want := append(slices.Clone(begun),
		"ordinary hook begins", "ordinary hook ends", "ordinary ends", "critical hook begins", "critical hook ends", "critical ends")
	if got := written(); !slices.Equal(got[:min(len(got), len(want))], want) {
		t.Errorf("the pods wrote\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

// TestBeforeReboot leaves pods for TestAfterReboot; the machine is rebooted by
// systemctl in between.
func TestBeforeReboot(t *testing.T) {
	installed(t)
	sh(t, "mkdir -p /var/log/journal && journalctl --flush")
	keep(t, "begun", startNoted(t))
	write(t, "web", web("web", 18080, ""))
	keep(t, "uid", string(waitReady(t, 60*second, "web")["web"].UID))
	keep(t, "shutdown", time.Now().Unix())
}

// TestAfterReboot: the node's own systemd has started podd, all pods are Ready
// again, and they had ended in order before.
func TestAfterReboot(t *testing.T) {
	disposable(t)
	var begun []string
	var uid string
	recall(t, "begun", &begun)
	recall(t, "uid", &uid)
	var shutdown int64 // what tests before it did to podd is not meant
	recall(t, "shutdown", &shutdown)
	all := waitReady(t, 120*second, "web", "critical", "ordinary")
	b, err := os.ReadFile("/proc/uptime")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("all Ready %s s after the kernel's start", strings.Fields(string(b))[0])
	endedInOrder(t, begun)
	if got, want := written(), len(begun)+6+2; len(got) != want {
		t.Errorf("the pods wrote %d lines, want %d, the last two that each has begun once more:\n  %s", len(got), want, strings.Join(got, "\n  "))
	}
	if got := string(all["web"].UID); got != uid {
		t.Errorf("web's UID was %s, is %s", uid, got)
	}
	if n := len(programs("/testserver serve")); n != 1 {
		t.Errorf("%d programs of web run", n)
	}
	if _, err := try("curl -sf http://127.0.0.1:18080/healthz"); err != nil {
		t.Errorf("web does not answer: %v", err)
	}
	// Nothing was killed for being late, and nothing has failed.
	last := sh(t, fmt.Sprintf("journalctl -b -1 --since @%d --no-pager -o cat -t systemd -u podd -u podd-shim", shutdown))
	for _, bad := range []string{"timed out", "SIGKILL", "Failed with result"} {
		if strings.Contains(last, bad) {
			t.Errorf("%q of podd at the shutdown:\n%s", bad, last)
		}
	}
	if failed := sh(t, "systemctl list-units --failed --plain --no-legend"); strings.Contains(failed, "podd") {
		t.Errorf("failed units: %s", failed)
	}
	if out := sh(t, "journalctl -b --no-pager -o cat POD_NAME=web-node POD_NAMESPACE=default | head -3"); out == "" {
		t.Error("journalctl POD_NAME=web-node knows nothing")
	}
	remove(t, "web", "critical", "ordinary")
	nothingLeft(t)
}

// crowd is how many pods begin while the power goes: 50, of which a test machine
// with two emulated cores has its hands full.
func crowd() int {
	if long() {
		return 50
	}
	return 12
}

func crowded(i int) string { return "crowd" + strconv.Itoa(i) }

// TestPowerCut ends with the machine's power, in the middle of pods that start
// on an image that is being stored.
func TestPowerCut(t *testing.T) {
	installed(t)
	sh(t, "podd rmi --force podd.test/busybox:1 podd.test/testserver:1")
	for i := range crowd() {
		write(t, crowded(i), fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: "podd.test/testserver:1", args: [serve, ":8080"], readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}}
`, crowded(i)))
	}
	node.Await(t, "all pods taken", 60*second, func() bool { return len(pods()) == crowd() })
	sh(t, "sync") // the manifests are the administrator's, who had them on disk
	sh(t, "podd load /payload/images/testserver.tar")
	// The pods try again when their back-off of ten seconds or more is over.
	running := func(n int) func() bool {
		return func() bool { return len(programs("/testserver serve")) >= n }
	}
	node.Await(t, "the first of the pods running", 120*second, running(1))
	go try("podd load /payload/images/busybox.tar")
	node.Await(t, "some of the pods running", 120*second, running(crowd()/4))
	if n := len(programs("/testserver serve")); n == crowd() {
		t.Fatalf("all %d pods run already", n)
	}
	fmt.Println("\nvm: cut the power")
	select {} // it does not come back from here
}

// TestAfterPowerCut: nothing is lost, half-made or doubled.
func TestAfterPowerCut(t *testing.T) {
	disposable(t)
	var names []string
	for i := range crowd() {
		names = append(names, crowded(i))
	}
	all := waitReady(t, 300*second, names...)
	if len(all) != crowd() {
		t.Errorf("%d pods, want %d", len(all), crowd())
	}
	addresses := map[string]string{}
	for name, p := range all {
		if other, taken := addresses[p.Status.PodIP]; taken {
			t.Errorf("%s and %s have address %s", name, other, p.Status.PodIP)
		}
		addresses[p.Status.PodIP] = name
	}
	if n := len(programs("/testserver serve")); n != crowd() {
		t.Errorf("%d programs run, want %d", n, crowd())
	}
	if n := len(podGroups()); n != crowd() {
		t.Errorf("%d cgroups of pods, want %d:\n%s", n, crowd(), strings.Join(podGroups(), "\n"))
	}
	if out, err := try("podd images --verify"); err != nil {
		t.Errorf("the image store: %v\n%s", err, out)
	}
	t.Logf("quarantined: %q", sh(t, "find /var/lib/podd -path '*quarantine*'"))
	if failed := sh(t, "systemctl list-units --failed --plain --no-legend"); strings.Contains(failed, "podd") {
		t.Errorf("failed units: %s", failed)
	}
	// What the store had not finished is stored as if it had never begun.
	sh(t, "podd load /payload/images/busybox.tar")
	remove(t, names...)
	nothingLeft(t)
}
