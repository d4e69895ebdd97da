package integration

import (
	"os"
	"path/filepath"
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

// TestOrderOfALife: init containers, sidecars with their startup probes, regular
// containers and hooks begin and end in upstream's order.
func TestOrderOfALife(t *testing.T) {
	n := start(t)
	dir := t.TempDir()
	say := func(name string) string {
		return "echo " + name + " begins >>/log/life; trap 'echo " + name + " ends >>/log/life; exit 0' TERM"
	}
	n.Write("life.yaml", strings.NewReplacer("DIR", dir, "IMAGE", busybox).Replace(`
apiVersion: v1
kind: Pod
metadata: {name: life}
spec:
  terminationGracePeriodSeconds: 20
  volumes: [{name: log, hostPath: {path: DIR}}]
  initContainers:
  - {name: init1, image: IMAGE, command: [sh, -c, "echo init1 begins >>/log/life; sleep 0.3; echo init1 ends >>/log/life"], volumeMounts: &log [{name: log, mountPath: /log}]}
  - name: side1
    image: IMAGE
    restartPolicy: Always
    command: [sh, -c, "`+say("side1")+`; sleep 0.3; echo side1 started >>/log/life; touch /up; while :; do sleep 0.1; done"]
    startupProbe: {exec: {command: [test, -f, /up]}, periodSeconds: 1, failureThreshold: 30}
    volumeMounts: *log
  - name: side2
    image: IMAGE
    restartPolicy: Always
    command: [sh, -c, "`+say("side2")+`; while :; do sleep 0.1; done"]
    volumeMounts: *log
  - {name: init2, image: IMAGE, command: [sh, -c, "echo init2 begins >>/log/life"], volumeMounts: *log}
  containers:
  - name: first
    image: IMAGE
    command: [sh, -c, "`+say("first")+`; while :; do sleep 0.1; done"]
    lifecycle:
      postStart: {exec: {command: [sh, -c, "sleep 0.5; echo first hooked >>/log/life"]}}
      preStop: {exec: {command: [sh, -c, "echo first told >>/log/life"]}}
    volumeMounts: *log
  - name: second
    image: IMAGE
    command: [sh, -c, "`+say("second")+`; while :; do sleep 0.1; done"]
    volumeMounts: *log
`))
	n.WaitPod("life", "ready", 60*second, func(p *v1.Pod) bool { return podutil.IsPodReady(p) })
	n.Remove("life.yaml")
	n.WaitGone(30 * second)
	data, err := os.ReadFile(filepath.Join(dir, "life"))
	if err != nil {
		t.Fatal(err)
	}
	out := string(data)
	at := func(what string) int {
		i := strings.Index(out, what+"\n")
		if i < 0 {
			t.Errorf("%q never happened: %q", what, out)
		}
		return i
	}
	for _, order := range [][]string{
		{"init1 begins", "init1 ends", "side1 begins", "side1 started", "side2 begins"},
		{"side1 started", "init2 begins", "first begins", "first hooked", "second begins"},
		{"second begins", "first told", "first ends", "side2 ends", "side1 ends"},
		{"second ends", "side2 ends"},
	} {
		for i := 1; i < len(order); i++ {
			if at(order[i-1]) > at(order[i]) {
				t.Errorf("%q comes before %q: %q", order[i], order[i-1], out)
			}
		}
	}
	if strings.Count(out, "begins") != 6 {
		t.Errorf("something began twice: %q", out)
	}
}

func TestProbesOfEveryKind(t *testing.T) {
	n := start(t)
	probe := func(kind, handler string) string {
		return "    " + kind + ": {" + handler + ", periodSeconds: 1, failureThreshold: 2, timeoutSeconds: 5}\n"
	}
	boxed := strings.NewReplacer(testserver, busybox, "    args: []\n", "    command: [sh, -c, \"touch /live; rm -f /ready; exec sleep 1000\"]\n")
	n.Write("http.yaml", pod("http", "", "serve")+probe("livenessProbe", "httpGet: {path: /, port: 8080}")+probe("readinessProbe", "tcpSocket: {port: 8080}"))
	n.Write("exec.yaml", boxed.Replace(pod("exec", ""))+probe("livenessProbe", "exec: {command: [test, -f, /live]}")+probe("readinessProbe", "exec: {command: [test, -f, /ready]}"))
	n.Write("closed.yaml", pod("closed", "", "pause")+probe("readinessProbe", "grpc: {port: 4711}"))
	n.Write("startup.yaml", pod("startup", "", "pause")+probe("startupProbe", "httpGet: {path: /, port: 8080}")+probe("livenessProbe", "exec: {command: [/false]}"))
	n.WaitPod("http", "ready by its probes", 30*second, podutil.IsPodReady)
	n.WaitPod("exec", "running, not ready", 30*second, func(p *v1.Pod) bool {
		s := status(p)
		return s.State.Running != nil && s.Started != nil && *s.Started && !s.Ready && p.Status.Phase == v1.PodRunning
	})
	n.OK("exec", node.PodName("exec"), "--", "touch", "/ready")
	n.WaitPod("exec", "ready", 30*second, podutil.IsPodReady)
	n.OK("exec", node.PodName("exec"), "--", "rm", "/live")
	p := n.WaitPod("exec", "restarted by its liveness probe", 40*second, func(p *v1.Pod) bool { return status(p).RestartCount == 1 && status(p).State.Running != nil })
	if last := status(p).LastTerminationState.Terminated; last == nil || last.ExitCode == 0 {
		t.Errorf("last state: %+v", last)
	}
	p = n.WaitPod("startup", "restarted by its startup probe", 40*second, func(p *v1.Pod) bool { return status(p).RestartCount >= 1 })
	if s := status(p); s.Ready || s.Started != nil && *s.Started {
		t.Errorf("it counts as started: %+v", s)
	}
	if p, err := n.Pod("closed"); err != nil || podutil.IsPodReady(p) || status(p).RestartCount != 0 {
		t.Errorf("a readiness probe that fails: %v, %+v", err, p)
	}
	out := n.OK("get", "events")
	for _, want := range []string{"Liveness probe failed", "Readiness probe failed", "Startup probe failed", "failed liveness probe, will be restarted"} {
		if !strings.Contains(out, want) {
			t.Errorf("no event %q", want)
		}
	}
}

// TestManyEditsWithinTheGracePeriod: a static pod that is edited again and again
// while its first version ends is the last version then, and no other.
func TestManyEditsWithinTheGracePeriod(t *testing.T) {
	n := start(t)
	manifest := func(version string) string {
		return strings.NewReplacer("    args: [\"stubborn\"]\n", "    args: [stubborn]\n    env: [{name: V, value: \""+version+"\"}]\n",
			"terminationGracePeriodSeconds: 1", "terminationGracePeriodSeconds: 4").Replace(pod("edited", "", "stubborn"))
	}
	n.Write("edited.yaml", manifest("0"))
	n.WaitRunning("edited")
	first, err := n.Pod("edited")
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []string{"1", "2", "3"} {
		n.Write("edited.yaml", manifest(v))
		node.Await(t, "the edit is read", 10*second, func() bool {
			p, err := n.Pod("edited")
			return err == nil && (p.DeletionTimestamp != nil || p.UID != first.UID)
		})
	}
	n.WaitPod("edited", "the last version", 40*second, func(p *v1.Pod) bool {
		return p.UID != first.UID && p.Spec.Containers[0].Env[0].Value == "3" && node.Running(p)
	})
	if c := strings.Count(n.OK("get", "events"), "Container started"); c > 3 {
		t.Errorf("%d containers were started for four versions", c)
	}
}

func TestEnvironmentFromAFile(t *testing.T) {
	n := start(t)
	n.Write("env.yaml", strings.ReplaceAll(`
apiVersion: v1
kind: Pod
metadata: {name: env}
spec:
  restartPolicy: Never
  volumes: [{name: config, emptyDir: {}}]
  initContainers:
  - {name: write, image: IMAGE, command: [sh, -c, "echo CONFIG_1=\\'value1\\' >/data/config.env; echo CONFIG_2=\\'value2\\' >>/data/config.env"], volumeMounts: [{name: config, mountPath: /data}]}
  containers:
  - name: main
    image: IMAGE
    command: [sh, -c, "echo $CONFIG_1 $CONFIG_2 ${NONE-unset}"]
    env:
    - {name: CONFIG_1, valueFrom: {fileKeyRef: {volumeName: config, path: config.env, key: CONFIG_1}}}
    - {name: CONFIG_2, valueFrom: {fileKeyRef: {volumeName: config, path: config.env, key: CONFIG_2}}}
    - {name: NONE, valueFrom: {fileKeyRef: {volumeName: config, path: config.env, key: NONE, optional: true}}}
`, "IMAGE", busybox))
	n.WaitPod("env", "done", 30*second, func(p *v1.Pod) bool { return p.Status.Phase == v1.PodSucceeded })
	if out := n.OK("logs", node.PodName("env")); out != "value1 value2 unset\n" {
		t.Errorf("environment: %q", out)
	}
}
