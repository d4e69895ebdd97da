package integration

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/node"
	"github.com/podd-runtime/podd/kubelet/server/api"
)

// volumesManifest is a pod with a volume of every local kind, and the objects
// that it takes them from.
const volumesManifest = `apiVersion: v1
kind: ConfigMap
metadata: {name: conf}
data: {color: blue, motd: hello}
---
apiVersion: v1
kind: Secret
metadata: {name: sec}
stringData: {password: s3cret}
---
apiVersion: v1
kind: Pod
metadata:
  name: vols
  labels: {app: vols}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {fsGroup: 4711}
  containers:
  - name: main
    image: ` + busybox + `
    command: [sleep, "10000"]
    env:
    - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: COLOR, valueFrom: {configMapKeyRef: {name: conf, key: color}}}
    volumeMounts:
    - {name: conf, mountPath: /conf}
    - {name: conf, mountPath: /one/motd, subPath: motd}
    - {name: sec, mountPath: /sec, readOnly: true}
    - {name: info, mountPath: /info}
    - {name: scratch, mountPath: /scratch}
    - {name: scratch, mountPath: /mine, subPathExpr: logs/$(POD)}
    - {name: mem, mountPath: /mem}
    - {name: host, mountPath: /host}
  volumes:
  - name: conf
    configMap: {name: conf}
  - name: sec
    secret: {secretName: sec, defaultMode: 0400}
  - name: info
    projected:
      sources:
      - downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}
      - configMap: {name: conf, items: [{key: color, path: deep/color}]}
  - name: scratch
    emptyDir: {}
  - name: mem
    emptyDir: {medium: Memory, sizeLimit: 8Mi}
  - name: host
    hostPath: {path: HOSTPATH, type: DirectoryOrCreate}
`

func TestVolumesOfEveryLocalKind(t *testing.T) {
	n := start(t)
	before := settled(n)
	host := filepath.Join(t.TempDir(), "made", "here")
	manifest := strings.Replace(volumesManifest, "HOSTPATH", host, 1)
	n.Write("vols.yaml", manifest)
	p := n.WaitPod("vols", "running", 30*second, node.Running)

	exec := func(cmd string) string {
		return strings.TrimSpace(n.OK("exec", node.PodName("vols"), "--", "sh", "-c", cmd))
	}
	for cmd, want := range map[string]string{
		"cat /conf/color /conf/motd":                                        "bluehello",
		"cat /one/motd":                                                     "hello",
		"cat /sec/password":                                                 "s3cret",
		"stat -c %a:%g /conf/..data/color":                                  "644:4711",
		"stat -L -c %a:%g /sec/password":                                    "440:4711",
		"cat /info/labels":                                                  `app="vols"`,
		"cat /info/deep/color":                                              "blue",
		"echo $COLOR":                                                       "blue",
		"stat -c %a:%g /scratch":                                            "2777:4711",
		"echo x > /mine/f; ls /scratch/logs/$POD":                           "f",
		"df -k /mem | tail -1 | awk '{print $2}'":                           "8192",
		"touch /conf/x 2>&1 | grep -o Read-only":                            "Read-only",
		"touch /one/motd 2>&1 | grep -o Read-only":                          "Read-only",
		"echo kept > /host/data; cat /host/data":                            "kept",
		"grep -c ' /sec ' /proc/mounts":                                     "1",
		"dd if=/dev/zero of=/mem/f bs=1M count=9 2>&1 | grep -o 'No space'": "No space",
	} {
		if got := exec(cmd); got != want {
			t.Errorf("%s: %q, want %q", cmd, got, want)
		}
	}

	// A change of the ConfigMap reaches the running container; the pod stays.
	n.Write("vols.yaml", strings.Replace(manifest, "color: blue", "color: red", 1))
	node.Await(t, "the change in the volume", 10*second, func() bool { return exec("cat /conf/color /info/deep/color") == "redred" })
	if now, err := n.Pod("vols"); err != nil || now.UID != p.UID || status(now).ContainerID != status(p).ContainerID {
		t.Errorf("the pod was touched: %v", err)
	}

	n.Remove("vols.yaml")
	n.WaitGone(15 * second)
	if data, err := os.ReadFile(host + "/data"); err != nil || strings.TrimSpace(string(data)) != "kept" {
		t.Errorf("data of the host: %q, %v", data, err)
	}
	n.NoLeaks(t, before, 15*second)
}

func TestMissingConfigMapIsWaitedFor(t *testing.T) {
	n := start(t)
	n.Write("late.yaml", strings.Replace(pod("late", "volumes:\n- name: v\n  configMap: {name: later}\n", "pause"),
		"    args:", "    volumeMounts: [{name: v, mountPath: /v}]\n    args:", 1))
	node.Await(t, "the event", 10*second, func() bool { return strings.Contains(n.OK("events"), "configMap default/later") })
	n.Write("later.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: later}\ndata: {a: b}\n")
	n.WaitPod("late", "running", 10*second, func(p *v1.Pod) bool { return node.Running(p) })
}

// A manifest that somebody broke while podd was down does not stop its pod, nor
// do volumes and their content change hands with the daemon.
func TestRestartKeepsVolumesAndPodsOfBrokenManifests(t *testing.T) {
	n := start(t)
	host := t.TempDir()
	manifest := strings.Replace(volumesManifest, "HOSTPATH", host, 1)
	n.Write("vols.yaml", manifest)
	p := n.WaitPod("vols", "running", 30*second, node.Running)
	exec := func(cmd string) string {
		return strings.TrimSpace(n.OK("exec", node.PodName("vols"), "--", "sh", "-c", cmd))
	}
	exec("echo a > /scratch/f; echo b > /mem/f; echo c > /mine/f")
	n.Signal(syscall.SIGKILL)
	n.Write("vols.yaml", strings.Replace(manifest, "containers:", "containerz:", 1))
	n.Start()
	var problems api.Problems
	node.Await(t, "the problem told", 10*second, func() bool {
		return n.Get(api.Prefix+"/problems", &problems) == nil && len(problems.Items) == 1 && problems.Items[0].Kept
	})
	now := n.WaitPod("vols", "running", 10*second, node.Running)
	if now.UID != p.UID || status(now).ContainerID != status(p).ContainerID || status(now).RestartCount != 0 {
		t.Errorf("the container was disturbed: %+v", status(now))
	}
	if got := exec("cat /scratch/f /mem/f /mine/f"); got != "a\nb\nc" {
		t.Errorf("content: %q", got)
	}
	n.Write("vols.yaml", strings.Replace(manifest, "color: blue", "color: red", 1))
	node.Await(t, "the change in the volume", 10*second, func() bool { return exec("cat /conf/color") == "red" })
	n.Remove("vols.yaml")
	n.WaitGone(15 * second)
}

// user is a pod with one volume at /data that runs a shell command.
func user(name, volume, mount, script string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: %s
    command: [sh, -c, %q]
    volumeMounts:
    - {name: data, mountPath: /data%s}
  volumes:
  - {name: data, %s}
`, name, busybox, script, mount, volume)
}

// TestStorageLimits is upstream's LocalStorageCapacityIsolationEviction: pods
// that take more of the node's storage than they may are evicted, others stay.
func TestStorageLimits(t *testing.T) {
	n := start(t)
	const over, under = "dd if=/dev/zero of=%s/f bs=1M count=11; exec sleep 10000", "dd if=/dev/zero of=%s/f bs=1M count=9; exec sleep 10000"
	const limit = "limits: {ephemeral-storage: 10Mi}"
	manifest := func(name, volume, resources, script, more string) {
		dir := "/data"
		if volume == "" {
			volume, dir = "emptyDir: {}", "/tmp"
		}
		text := user(name, volume, "", fmt.Sprintf(script, dir))
		text = strings.Replace(text, "    volumeMounts:", "    resources: {"+resources+"}\n    volumeMounts:", 1)
		n.Write(name+".yaml", strings.Replace(text, "spec:\n", "spec:\n"+more, 1))
	}
	evicted := map[string]string{
		"volume":    `Usage of EmptyDir volume "data" exceeds the limit "10Mi". `,
		"layer":     `Pod ephemeral local storage usage exceeds the total limit of containers 10Mi. `,
		"container": `Container main exceeded its local ephemeral storage limit "10Mi". `,
		"byvolume":  `Pod ephemeral local storage usage exceeds the total limit of containers 10Mi. `,
	}
	// Files that podd puts into every container count as all else (CVE-2020-8557).
	for name, path := range map[string]string{"hosts": "/etc/hosts", "hostname": "/etc/hostname", "resolv": "/etc/resolv.conf", "message": "/dev/termination-log"} {
		evicted[name] = evicted["layer"]
		manifest(name, "", limit, "dd if=/dev/zero of="+path+" bs=1M count=11; exec sleep 10000 #%s", "")
	}
	manifest("volume", "emptyDir: {sizeLimit: 10Mi}", "", over, "")
	manifest("layer", "", limit, over, "")
	manifest("byvolume", "emptyDir: {}", limit, over, "")
	manifest("container", "", limit, over, "")
	b, err := os.ReadFile(filepath.Join(n.Dir, "manifests", "container.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	n.Write("container.yaml", strings.Replace(string(b), "  volumes:", "  - name: other\n    image: "+busybox+"\n    command: [sleep, \"10000\"]\n    resources: {limits: {ephemeral-storage: 1Gi}}\n  volumes:", 1))
	manifest("memory", "emptyDir: {medium: Memory, sizeLimit: 10Mi}", "", over, "")
	manifest("fits", "emptyDir: {sizeLimit: 10Mi}", "", under, "")
	manifest("fitstoo", "", limit, under, "")
	manifest("critical", "emptyDir: {sizeLimit: 10Mi}", "", over, "  priorityClassName: system-node-critical\n")
	for name, message := range evicted {
		p := n.WaitPod(name, "evicted", 90*second, func(p *v1.Pod) bool { return p.Status.Phase == v1.PodFailed })
		if p.Status.Reason != "Evicted" || p.Status.Message != message {
			t.Errorf("%s: %s: %q, want %q", name, p.Status.Reason, p.Status.Message, message)
		}
	}
	events := n.OK("events")
	for name, message := range evicted {
		if !strings.Contains(events, "Evicted") || !strings.Contains(events, strings.TrimSpace(message)) {
			t.Errorf("%s: no event: %s", name, events)
		}
	}
	for _, name := range []string{"memory", "fits", "fitstoo", "critical"} {
		if p := n.WaitPod(name, "running", 60*second, node.Running); status(p).RestartCount != 0 {
			t.Errorf("%s: %+v", name, p.Status)
		}
	}
}

// TestMountPropagation is upstream's test of that name: who sees the mounts that
// a container, and the host, make in a hostPath.
func TestMountPropagation(t *testing.T) {
	n := start(t)
	host := t.TempDir()
	if err := syscall.Mount("tmpfs", host, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(host, syscall.MNT_DETACH) })
	if err := syscall.Mount("", host, "", syscall.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	sees := map[string]string{"master": "host master", "slave": "host master slave", "private": "private", "default": "default"}
	propagation := map[string]string{
		"master": ", mountPropagation: Bidirectional", "slave": ", mountPropagation: HostToContainer", "private": ", mountPropagation: None", "default": "",
	}
	for _, name := range append(slices.Sorted(maps.Keys(sees)), "host") {
		if err := os.Mkdir(filepath.Join(host, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name := range sees {
		text := user(name, "hostPath: {path: "+host+"}", propagation[name], "exec sleep 10000")
		n.Write(name+".yaml", strings.Replace(text, "    volumeMounts:", "    securityContext: {privileged: true}\n    volumeMounts:", 1))
	}
	n.WaitRunning(slices.Sorted(maps.Keys(sees))...)
	exec := func(name, cmd string) string {
		return strings.TrimSpace(n.OK("exec", node.PodName(name), "--", "sh", "-c", cmd))
	}
	if err := syscall.Mount("tmpfs", host+"/host", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(host+"/host/file", []byte("host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name := range sees {
		exec(name, fmt.Sprintf("mount -t tmpfs tmpfs /data/%[1]s && echo %[1]s > /data/%[1]s/file", name))
	}
	for name, want := range sees {
		if got := strings.Join(strings.Fields(exec(name, "cat /data/*/file")), " "); got != want {
			t.Errorf("%s sees %q, want %q", name, got, want)
		}
	}
	found, err := filepath.Glob(host + "/*/file")
	if err != nil || len(found) != 2 || found[1] != host+"/master/file" {
		t.Errorf("the host sees %v, %v", found, err)
	}
	// What a container mounted for all is gone with the test's own mount only.
	if err := syscall.Unmount(host+"/master", syscall.MNT_DETACH); err != nil {
		t.Error(err)
	}
	syscall.Unmount(host+"/host", syscall.MNT_DETACH)
}

// TestRestrictionsOfAMountHold: what the host has mounted nosuid or noexec is so
// in containers, by every way into them.
func TestRestrictionsOfAMountHold(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := os.Mkdir(dir+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	n := start(t)
	volume, script := "hostPath: {path: "+dir+"}", "exec sleep 10000"
	ways := map[string]string{"rw": "", "ro": ", readOnly: true", "rro": ", readOnly: true, recursiveReadOnly: Enabled", "sub": ", subPath: sub", "subro": ", subPath: sub, readOnly: true"}
	for name, mount := range ways {
		n.Write(name+".yaml", user(name, volume, mount, script))
	}
	n.WaitRunning(slices.Collect(maps.Keys(ways))...)
	for name, mount := range ways {
		line := n.OK("exec", node.PodName(name), "--", "grep", " /data ", "/proc/mounts")
		options := strings.Split(strings.Fields(line)[3], ",")
		if slices.Contains(options, "ro") != strings.Contains(mount, "readOnly") || !slices.Contains(options, "nosuid") || !slices.Contains(options, "noexec") {
			t.Errorf("%s: %s", name, line)
		}
	}
}
