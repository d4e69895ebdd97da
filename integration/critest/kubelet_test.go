package critest

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/isolated"
	"github.com/podd-runtime/podd/integration/node"
)

// upstreamConfig is a standalone kubelet's; the paths and names come by Sprintf.
const upstreamConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
staticPodPath: %s
containerRuntimeEndpoint: %s
cgroupRoot: %s
podLogsDir: %s
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupsPerQOS: true
enforceNodeAllocatable: []
port: 10250
address: 127.0.0.1
healthzPort: 10248
readOnlyPort: 10255
failSwapOn: false
fileCheckFrequency: 1s
imageGCHighThresholdPercent: 100
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
evictionHard: {memory.available: "1Mi", nodefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.available: "0%%", imagefs.inodesFree: "0%%"}
`

// upstreamPod is like the examples: two containers that share a volume, one of
// them with probes, limits, a hook and a port of the host, after one that ends.
const upstreamPod = `apiVersion: v1
kind: Pod
metadata:
  name: web
  labels: {app: web}
spec:
  terminationGracePeriodSeconds: 2
  initContainers:
  - name: prepare
    image: ` + busyboxImage + `
    command: [sh, -c, 'echo prepared > /data/state; echo done']
    volumeMounts: [{name: data, mountPath: /data}]
  containers:
  - name: nginx
    image: ` + nginxImage + `
    ports: [{containerPort: 80, hostPort: 18080}]
    env:
    - name: MY_IP
      valueFrom: {fieldRef: {fieldPath: status.podIP}}
    resources:
      requests: {cpu: 50m, memory: 16Mi}
      limits: {cpu: 500m, memory: 64Mi}
    startupProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1, failureThreshold: 30}
    readinessProbe: {exec: {command: [grep, -q, prepared, /data/state]}, periodSeconds: 1}
    livenessProbe: {tcpSocket: {port: 80}, periodSeconds: 1}
    lifecycle: {postStart: {exec: {command: [sh, -c, 'echo $MY_IP > /data/ip']}}}
    volumeMounts: [{name: data, mountPath: /data}]
  - name: lines
    image: ` + busyboxImage + `
    command: [sh, -c, 'while [ ! -s /data/ip ]; do sleep 0.1; done; echo "ip $(cat /data/ip)"; exit 3']
    volumeMounts: [{name: data, mountPath: /data, readOnly: true}]
  volumes: [{name: data, emptyDir: {}}]
`

// TestUpstreamKubelet has upstream's kubelet run a static pod on podd's socket.
func TestUpstreamKubelet(t *testing.T) {
	if !full() {
		t.Skip("builds upstream's kubelet: set PODD_TEST_ALL=1")
	}
	n := node.New(t)
	prepared(t)
	all, err := builder().Critest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n.Mirror(serve(t, all).Addr)
	n.Start()
	before := n.Count()

	at := func(p string) string {
		dir := filepath.Join(n.Dir, "upstream", p)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	manifest := filepath.Join(at("manifests"), "web.yaml")
	config := filepath.Join(at(""), "kubelet.yaml")
	root := n.Cgroup() + "-upstream"
	makeCgroup(t, root)
	for path, text := range map[string]string{
		config:   fmt.Sprintf(upstreamConfig, at("manifests"), socket(n), root, at("logs")),
		manifest: upstreamPod,
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	startKubelet(t, n, config, at("root"), at("pki"))

	pod := awaitPod(t, "running and ready, one container restarted", func(p *v1.Pod) bool {
		if p == nil || len(p.Status.ContainerStatuses) != 2 {
			return false
		}
		nginx, lines := p.Status.ContainerStatuses[1], p.Status.ContainerStatuses[0]
		return nginx.Name == "nginx" && nginx.Ready && nginx.State.Running != nil &&
			lines.RestartCount > 0 && lines.LastTerminationState.Terminated != nil
	})
	if st := pod.Status.ContainerStatuses[0].LastTerminationState.Terminated; st.ExitCode != 3 || st.Reason != "Error" {
		t.Errorf("container lines ended with %+v, want exit code 3", st)
	}
	if st := pod.Status.InitContainerStatuses; len(st) != 1 || st[0].State.Terminated == nil || st[0].State.Terminated.Reason != "Completed" {
		t.Errorf("init container: %+v", st)
	}
	if got := page("http://127.0.0.1:18080"); !strings.Contains(got, "It works") {
		t.Errorf("page on the host's port: %q", got)
	}
	if got := page("http://" + pod.Status.PodIP); !strings.Contains(got, "It works") {
		t.Errorf("page on the pod's address %q: %q", pod.Status.PodIP, got)
	}
	logs, _ := filepath.Glob(filepath.Join(at("logs"), "default_web-*", "lines", "*.log"))
	if len(logs) == 0 {
		t.Error("container lines has no log")
	} else if b, err := os.ReadFile(logs[0]); err != nil || !strings.Contains(string(b), " stdout F ip "+pod.Status.PodIP+"\n") {
		t.Errorf("log of container lines: %q %v, want the pod's address %s", b, err, pod.Status.PodIP)
	}
	var summary struct {
		Pods []struct {
			PodRef     struct{ Name string }
			Containers []struct {
				Name   string
				Memory struct{ WorkingSetBytes int64 }
			}
		}
	}
	node.Await(t, "in upstream's statistics", 60*time.Second, func() bool {
		if json.Unmarshal([]byte(page("http://127.0.0.1:10255/stats/summary")), &summary) != nil {
			return false
		}
		for _, p := range summary.Pods {
			for _, c := range p.Containers {
				if c.Name == "nginx" && c.Memory.WorkingSetBytes > 0 {
					return true
				}
			}
		}
		return false
	})

	if err := os.Remove(manifest); err != nil {
		t.Fatal(err)
	}
	awaitPod(t, "gone", func(p *v1.Pod) bool { return p == nil })
	c := crictl{t, n}
	// It leaves exited sandboxes to its own collection; what is left must not run.
	node.Await(t, "stopped on the socket", 30*time.Second, func() bool {
		return c.ok("ps", "-q")+c.ok("pods", "-q", "--state", "ready") == ""
	})
	if ids := strings.Fields(c.ok("pods", "-q")); len(ids) > 0 {
		c.ok(append([]string{"rmp", "-f"}, ids...)...)
	}
	var leaks []string
	for _, l := range n.Count().Links {
		if !strings.Contains(strings.Join(before.Links, " "), l) {
			leaks = append(leaks, l)
		}
	}
	if len(leaks) > 0 {
		t.Errorf("links left behind: %v", leaks)
	}
}

// startKubelet starts upstream's kubelet, to be ended with the test, and waits
// until it is healthy.
func startKubelet(t *testing.T, n *node.Node, config, root, pki string) {
	t.Helper()
	logPath := filepath.Join(n.Dir, "upstream", "kubelet.log")
	log, err := os.Create(logPath)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(peers(), "kubelet"), "--config", config, "--root-dir", root, "--cert-dir", pki,
		"--hostname-override", "upstream", "--node-ip", isolated.NodeIP)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { cmd.Wait(); close(done) }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			cmd.Process.Kill()
			<-done
		}
		if t.Failed() {
			b, _ := os.ReadFile(logPath)
			t.Logf("last of upstream's log:\n%s", b[max(0, len(b)-8000):])
		}
	})
	node.Await(t, "healthy, upstream's kubelet", 60*time.Second, func() bool {
		select {
		case <-done:
			t.Fatal("upstream's kubelet ended")
		default:
		}
		return page("http://127.0.0.1:10248/healthz") == "ok"
	})
}

// awaitPod follows the pod as upstream's kubelet tells of it; nil is none.
func awaitPod(t *testing.T, what string, cond func(*v1.Pod) bool) *v1.Pod {
	t.Helper()
	var last *v1.Pod
	deadline := time.Now().Add(90 * time.Second)
	for tick := time.NewTicker(100 * time.Millisecond); ; <-tick.C {
		var list v1.PodList
		text := page("http://127.0.0.1:10255/pods")
		if text != "" && json.Unmarshal([]byte(text), &list) == nil {
			last = nil
			for i := range list.Items {
				last = &list.Items[i]
			}
			if cond(last) {
				tick.Stop()
				return last
			}
		}
		if time.Now().After(deadline) {
			b, _ := json.MarshalIndent(last, "", " ")
			t.Fatalf("the pod is not %s: %s", what, b)
		}
	}
}

// makeCgroup makes an empty group in every hierarchy, which upstream's kubelet
// wants to exist, to be removed with the test.
func makeCgroup(t *testing.T, name string) {
	t.Helper()
	tops := []string{"/sys/fs/cgroup"}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		all, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
		tops = tops[:0]
		for _, p := range all {
			tops = append(tops, filepath.Dir(p))
		}
	}
	for _, top := range tops {
		dir := filepath.Join(top, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} { // v1 begins with none
			if b, err := os.ReadFile(filepath.Join(top, f)); err == nil {
				os.WriteFile(filepath.Join(dir, f), b, 0o644)
			}
		}
		t.Cleanup(func() {
			var dirs []string
			filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
				if err == nil && e.IsDir() {
					dirs = append(dirs, p)
				}
				return nil
			})
			for i := len(dirs) - 1; i >= 0; i-- { // the innermost first
				os.Remove(dirs[i])
			}
		})
	}
}
