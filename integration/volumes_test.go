package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

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
