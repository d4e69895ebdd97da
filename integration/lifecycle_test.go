package integration

import (
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/integration/node"
)

// statusOf a container of any kind.
func statusOf(p *v1.Pod, name string) v1.ContainerStatus {
	for _, list := range [][]v1.ContainerStatus{p.Status.ContainerStatuses, p.Status.InitContainerStatuses} {
		for _, s := range list {
			if s.Name == name {
				return s
			}
		}
	}
	return v1.ContainerStatus{}
}

func TestOneContainerRestartsAll(t *testing.T) {
	n := start(t)
	n.Write("all.yaml", `
apiVersion: v1
kind: Pod
metadata: {name: all}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  volumes: [{name: v, emptyDir: {}}]
  initContainers:
  - {name: init, image: podd.test/busybox:1, command: [sh, -c, "echo init >>/v/log"], volumeMounts: [{name: v, mountPath: /v}]}
  - {name: side, image: podd.test/busybox:1, restartPolicy: Always, command: [sh, -c, "echo side >>/v/log; trap 'exit 0' TERM; sleep 1000 & wait"], volumeMounts: [{name: v, mountPath: /v}]}
  containers:
  - name: source
    image: podd.test/busybox:1
    command: [sh, -c, "echo source >>/v/log; [ -f /v/once ] && sleep 1000; touch /v/once; until grep -q regular /v/log; do sleep 0.1; done; exit 42"]
    restartPolicy: Never
    restartPolicyRules: [{action: RestartAllContainers, exitCodes: {operator: In, values: [42]}}]
    volumeMounts: [{name: v, mountPath: /v}]
  - name: regular
    image: podd.test/busybox:1
    command: [sh, -c, "echo regular >>/v/log; trap 'exit 0' TERM; sleep 1000 & wait"]
    volumeMounts: [{name: v, mountPath: /v}]
`)
	names := []string{"init", "side", "source", "regular"}
	p := n.WaitPod("all", "all restarted", 60*second, func(p *v1.Pod) bool {
		for _, name := range names[1:] {
			if s := statusOf(p, name); s.RestartCount != 1 || s.State.Running == nil {
				return false
			}
		}
		return podutil.IsPodReady(p)
	})
	for _, name := range names {
		if s := statusOf(p, name); s.RestartCount != 1 || s.LastTerminationState.Terminated == nil ||
			s.LastTerminationState.Terminated.Reason != "RestartingAllContainers" {
			t.Errorf("%s: %+v", name, s)
		}
	}
	if _, c := podutil.GetPodCondition(&p.Status, v1.AllContainersRestarting); c == nil || c.Status != v1.ConditionFalse {
		t.Errorf("condition: %+v", c)
	}
	out := n.OK("exec", node.PodName("all"), "-c", "regular", "--", "cat", "/v/log")
	for _, name := range names {
		if strings.Count(out, name+"\n") != 2 {
			t.Errorf("%s did not start twice: %q", name, out)
		}
	}
	if again := strings.LastIndex(out, "init\n"); again < strings.Index(out, "source\n") || again > strings.LastIndex(out, "side\n") {
		t.Errorf("order of starts: %q", out)
	}
}

func TestUsersOfAPodAreNotTheHosts(t *testing.T) {
	n := start(t)
	manifest := func(name string) string {
		return strings.ReplaceAll(`
apiVersion: v1
kind: ConfigMap
metadata: {name: NAME}
data: {k: v}
---
apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec:
  hostUsers: false
  terminationGracePeriodSeconds: 1
  volumes:
  - {name: e, emptyDir: {}}
  - {name: c, configMap: {name: NAME}}
  - {name: i, image: {reference: "podd.test/busybox:1"}}
  containers:
  - name: main
    image: podd.test/busybox:1
    command: [sh, -c, "id -u; cat /proc/self/uid_map; cat /c/k; touch /e/mine /root/mine && stat -c %u:%g /e/mine /c/k /i/bin /bin; echo done >/dev/termination-log; echo ready; sleep 1000"]
    volumeMounts: [{name: e, mountPath: /e}, {name: c, mountPath: /c}, {name: i, mountPath: /i, readOnly: true}]
`, "NAME", name)
	}
	n.Write("one.yaml", manifest("one"))
	n.Write("two.yaml", manifest("two"))
	n.WaitRunning("one", "two")
	maps := map[string]bool{}
	for _, name := range []string{"one", "two"} {
		var out string
		node.Await(t, "its output", 20*second, func() bool {
			out = n.OK("logs", node.PodName(name))
			return strings.Contains(out, "ready")
		})
		if strings.Count(out, "0:0\n") != 4 {
			t.Errorf("%s: owners: %q", name, out)
		}
		lines := strings.Split(out, "\n")
		f := strings.Fields(lines[1])
		if lines[0] != "0" || len(f) != 3 || f[0] != "0" || f[1] == "0" || f[2] != "65536" {
			t.Errorf("%s: %q", name, out)
		}
		maps[lines[1]] = true
	}
	if len(maps) != 2 {
		t.Errorf("the pods share their ids: %v", maps)
	}
	// The ids outlive the daemon: a container that restarts gets the same.
	n.Signal(9)
	n.Start()
	n.OK("restart", node.PodName("one"))
	node.Await(t, "restarted", 20*second, func() bool {
		out, _, err := n.Podd("logs", node.PodName("one"))
		lines := strings.Split(out, "\n")
		return err == nil && len(lines) > 1 && statusOfPod(n, "one").RestartCount == 1 && maps[lines[1]]
	})
}

func statusOfPod(n *node.Node, name string) v1.ContainerStatus {
	p, err := n.Pod(name)
	if err != nil {
		return v1.ContainerStatus{}
	}
	return status(p)
}

// TestResizeInPlace: a manifest with a UID of its own changes the pod that runs.
func TestResizeInPlace(t *testing.T) {
	n := start(t)
	manifest := func(cpu, memory string) string {
		return strings.NewReplacer("CPU", cpu, "MEM", memory).Replace(`
apiVersion: v1
kind: Pod
metadata: {name: sized, uid: sized-1}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: podd.test/busybox:1
    command: [sleep, "1000"]
    resources: {limits: {cpu: CPU, memory: MEM}}
  - name: other
    image: podd.test/busybox:1
    command: [sleep, "1000"]
    resources: {limits: {cpu: 100m, memory: 32Mi}}
    resizePolicy: [{resourceName: memory, restartPolicy: RestartContainer}]
`)
	}
	n.Write("sized.yaml", manifest("200m", "64Mi"))
	n.WaitRunning("sized")
	inside := func(want string) func(*v1.Pod) bool {
		return func(*v1.Pod) bool {
			out, _, err := n.Podd("exec", node.PodName("sized"), "-c", "main", "--", "sh", "-c",
				"cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null || cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max")
			return err == nil && strings.HasPrefix(out, want)
		}
	}
	n.WaitPod("sized", "as it was made", 20*second, inside("67108864\n20000"))
	for _, to := range []struct{ cpu, memory, want string }{
		{"400m", "96Mi", "100663296\n40000"}, {"100m", "32Mi", "33554432\n10000"},
	} {
		n.Write("sized.yaml", manifest(to.cpu, to.memory))
		n.WaitPod("sized", "resized to "+to.memory, 20*second, inside(to.want))
		n.WaitPod("sized", "said to be resized", 20*second, func(p *v1.Pod) bool {
			s := statusOf(p, "main")
			_, c := podutil.GetPodCondition(&p.Status, v1.PodResizeInProgress)
			return c == nil && s.Resources.Limits.Memory().String() == to.memory && s.RestartCount == 0
		})
	}
	n.Write("sized.yaml", strings.Replace(manifest("100m", "32Mi"), "cpu: 100m, memory: 32Mi}}\n    resizePolicy", "cpu: 100m, memory: 48Mi}}\n    resizePolicy", 1))
	n.WaitPod("sized", "restarted with more memory", 30*second, func(p *v1.Pod) bool {
		s := statusOf(p, "other")
		return s.RestartCount == 1 && s.State.Running != nil && s.Resources.Limits.Memory().String() == "48Mi" && statusOf(p, "main").RestartCount == 0
	})
	n.Write("sized.yaml", manifest("1000", "32Mi"))
	n.WaitPod("sized", "refused", 20*second, func(p *v1.Pod) bool {
		_, c := podutil.GetPodCondition(&p.Status, v1.PodResizePending)
		return c != nil && c.Reason == v1.PodReasonInfeasible && statusOf(p, "main").Resources.Limits.Cpu().String() == "100m"
	})
}

func TestSysctlsThatAreNotAllowed(t *testing.T) {
	n := start(t, "--allowed-unsafe-sysctls=net.core.*")
	manifest := func(name, sysctl string) string {
		return strings.NewReplacer(testserver, busybox, "    args: []\n", "    command: [sh, -c, \"cat /proc/sys/"+strings.ReplaceAll(sysctl, ".", "/")+"; sleep 1000\"]\n").Replace(
			pod(name, "securityContext: {sysctls: [{name: "+sysctl+", value: \"77\"}]}"))
	}
	n.Write("unsafe.yaml", manifest("unsafe", "kernel.msgmax"))
	n.Write("allowed.yaml", manifest("allowed", "net.core.somaxconn"))
	n.WaitRunning("allowed")
	node.Await(t, "its value", 20*second, func() bool { return n.OK("logs", node.PodName("allowed")) == "77\n" })
	p := n.WaitPod("unsafe", "rejected", 20*second, func(p *v1.Pod) bool { return p.Status.Phase == v1.PodFailed })
	if p.Status.Reason != "SysctlForbidden" || !strings.Contains(p.Status.Message, `"kernel.msgmax" not allowlisted`) {
		t.Errorf("status: %+v", p.Status)
	}
	if out := n.OK("get", "pods"); !strings.Contains(out, "SysctlForbidden") && !strings.Contains(out, "ContainerCreating") {
		t.Errorf("it is shown as %s", out)
	}
}
