package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/node"
)

// unfinishedPod writes a part of a line whenever it is asked to.
const unfinishedPod = `apiVersion: v1
kind: Pod
metadata: {name: part}
spec:
  terminationGracePeriodSeconds: 1
  volumes: [{name: v, hostPath: {path: %s}}]
  containers:
  - name: main
    image: podd.test/busybox:1
    command: [sh, -c, "until [ -e /v/go ]; do sleep 0.05; done; printf abc; until [ -e /v/end ]; do sleep 0.05; done; echo def; sleep 1000"]
    volumeMounts: [{name: v, mountPath: /v}]
`

// TestFullRunDirectoryEndsNobody: without any room below the run directory pods,
// podd-shim and podd go on, also when both were killed, and what waits for room
// has it once there is some.
func TestFullRunDirectoryEndsNobody(t *testing.T) {
	n := node.New(t)
	n.TinyRunDir(2 << 20)
	mirror(t, n, "testserver", "busybox")
	n.Start()
	dir := t.TempDir()
	n.Write("part.yaml", strings.Replace(unfinishedPod, "%s", dir, 1))
	n.WaitRunning("part")
	pids, shim := n.Processes("until [ -e /v/go ]"), n.ShimPID()
	signal := func(name string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	says := func(text string) {
		t.Helper()
		node.Await(t, "the log saying "+text, 10*second, func() bool {
			return strings.Contains(n.OK("logs", node.PodName("part")), text)
		})
	}
	empty := n.FillRunDir()
	signal("go")
	says("abc")
	if now := n.ShimPID(); now != shim {
		t.Fatalf("podd-shim was %d and is %d", shim, now)
	}
	n.Signal(syscall.SIGKILL)
	if err := syscall.Kill(shim, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	empty = n.FillRunDir()
	n.Start()
	n.WaitRunning("part")
	signal("end")
	says("abcdef")
	n.Write("more.yaml", pod("more", "", "pause"))
	n.WaitPod("more", "told why it waits", 10*second, func(p *v1.Pod) bool {
		out, _, _ := n.Podd("why", node.PodName("more"))
		return strings.Contains(out, "no space left")
	})
	for pid := range n.Processes("until [ -e /v/go ]") {
		if !pids[pid] {
			t.Errorf("process %d was started; before: %v", pid, pids)
		}
	}
	empty()
	n.WaitRunning("more", "part")
}

// TestPoddWithoutShimSaysSo: while podd-shim cannot be started podd stays, says
// so to everybody who asks, and takes the pods up when it can.
func TestPoddWithoutShimSaysSo(t *testing.T) {
	n := start(t)
	n.Write("a.yaml", pod("a", "", "pause"))
	n.WaitRunning("a")
	pids, shim := n.Processes("/testserver pause"), n.ShimPID()
	node.Await(t, "the program", 10*second, func() bool { pids = n.Processes("/testserver pause"); return len(pids) == 1 })
	n.Signal(syscall.SIGKILL)
	if err := syscall.Kill(shim, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(filepath.Join(n.RunDir(), "shim", "instance.lock"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	node.Await(t, "the dead shim's lock", 10*second, func() bool {
		return syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil
	})
	n.Launch()
	for _, verb := range [][]string{{"status"}, {"why", node.PodName("a")}, {"stop", node.PodName("a")}} {
		var said string
		node.Await(t, "podd "+verb[0]+" telling why", 20*second, func() bool {
			out, errText, err := n.Podd(verb...)
			said = out + errText
			return err != nil && strings.Contains(said, "podd waits for podd-shim") && strings.Contains(said, "another podd-shim runs")
		}, func() string { return said })
	}
	lock.Close()
	n.WaitAnswers()
	n.WaitRunning("a")
	if now := n.Processes("/testserver pause"); len(now) != len(pids) {
		t.Errorf("processes %v, before %v", now, pids)
	} else {
		for pid := range now {
			if !pids[pid] {
				t.Errorf("processes %v, before %v", now, pids)
			}
		}
	}
}
