package why

import (
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podd-runtime/podd/kubelet/server/api"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local)

func before(d time.Duration) metav1.Time { return metav1.NewTime(now.Add(-d)) }

func podWith(s v1.ContainerStatus, change ...func(*v1.Pod)) *v1.Pod {
	s.Name = "main"
	p := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
		Spec:       v1.PodSpec{RestartPolicy: v1.RestartPolicyAlways, Containers: []v1.Container{{Name: "main", Image: "app:1"}}},
		Status: v1.PodStatus{Phase: v1.PodRunning, ContainerStatuses: []v1.ContainerStatus{s}, Conditions: []v1.PodCondition{
			{Type: v1.PodReadyToStartContainers, Status: v1.ConditionTrue}, {Type: v1.PodReady, Status: v1.ConditionFalse},
		}},
	}
	for _, c := range change {
		c(p)
	}
	return p
}

func waiting(reason, message string) v1.ContainerStatus {
	return v1.ContainerStatus{State: v1.ContainerState{Waiting: &v1.ContainerStateWaiting{Reason: reason, Message: message}}}
}

func ended(reason string, code int32) v1.ContainerStatus {
	return v1.ContainerStatus{State: v1.ContainerState{Terminated: &v1.ContainerStateTerminated{ContainerID: "podd://it", Reason: reason, ExitCode: code, StartedAt: before(time.Minute), FinishedAt: before(30 * time.Second)}}}
}

// limited gives the container a limit.
func limited(name v1.ResourceName, amount string) func(*v1.Pod) {
	return func(p *v1.Pod) {
		p.Spec.Containers[0].Resources.Limits = v1.ResourceList{name: resource.MustParse(amount)}
	}
}

func noSandbox(p *v1.Pod) { p.Status.Conditions[0].Status = v1.ConditionFalse }

func event(reason, message string) v1.Event {
	return v1.Event{Reason: reason, Message: message, FirstTimestamp: before(time.Minute), LastTimestamp: before(time.Second), Count: 3,
		InvolvedObject: v1.ObjectReference{FieldPath: "spec.containers{main}"}}
}

func TestExplain(t *testing.T) {
	for _, tt := range []struct {
		name   string
		e      Evidence
		reason string
		want   []string
	}{
		{"no name server", Evidence{Pod: podWith(waiting("ErrImagePull", `pull image "r.test/a:1": pull r.test/a:1: resolve: r.test: dial tcp: lookup r.test on 10.0.0.1:53: no such host; the registry is not reachable: unavailable`))},
			"ImageRegistryUnknown", []string{"r.test/a:1 cannot be pulled", "name cannot be resolved", "no such host"}},
		{"of a volume", Evidence{Pod: podWith(waiting("ErrImagePull", `pull r.test/volume:1: fetch: index sha256:x has no image for linux/amd64, only for linux/arm64: failed precondition`))}, "ImagePlatform", []string{"r.test/volume:1", "architecture"}},
		{"rate limit", Evidence{Pod: podWith(waiting("ErrImagePull", `pull image "a:1": 429 Too Many Requests`))}, "ImageRateLimit", []string{"limits"}},
		{"other platform", Evidence{Pod: podWith(waiting("ErrImagePull", `pull image "a:1": no match for platform linux/amd64: not found`))}, "ImagePlatform", []string{"architecture"}},
		{"oom", Evidence{Pod: podWith(ended("OOMKilled", 137), func(p *v1.Pod) {
			p.Spec.Containers[0].Resources.Limits = v1.ResourceList{v1.ResourceMemory: resource.MustParse("64Mi")}
		}), Containers: map[string]Container{"main": {MemoryPeak: 64 << 20}}, Ends: map[string]End{"it": {Signal: 9}}}, "OOMKilled", []string{"was killed because", "limit is 64Mi", "at its peak it used 64Mi", "30 s ago"}},
		{"status lost", Evidence{Pod: podWith(ended("Unknown", 255))}, "Unknown", []string{"its exit code is not known"}},
		{"signal", Evidence{Pod: podWith(ended("Error", 134)), Ends: map[string]End{"it": {Signal: 6}}}, "Error", []string{"SIGABRT (exit code 134)", "gave up by itself"}},
		{"code like a signal's", Evidence{Pod: podWith(ended("Error", 137))}, "Error", []string{"exited with code 137", "By convention of shells: a command that it ran was ended by SIGKILL"}},
		{"code like no signal's", Evidence{Pod: podWith(ended("Error", 255))}, "Error", []string{"exited with code 255"}},
		{"oom below an exit by itself", Evidence{Pod: podWith(ended("OOMKilled", 0)), Ends: map[string]End{"it": {OOMKills: 1}}}, "OOMKilled", []string{"exited with code 0 after a process of it had been killed"}},
		{"code 0 of a server", Evidence{Pod: podWith(ended("Completed", 0))}, "Completed", []string{"must not end", "restartPolicy"}},
		{"command not found by a shell", Evidence{Pod: podWith(ended("Error", 127))}, "Error", []string{"a command was not found"}},
		{"port in use", Evidence{Pod: podWith(ended("Error", 1), func(p *v1.Pod) { p.Spec.HostNetwork = true }),
			Containers: map[string]Container{"main": {Log: []string{"listen tcp :8080: bind: address already in use"}}},
			Listeners:  []Listener{{Port: 8080, Protocol: v1.ProtocolTCP, PID: 7, Program: "nginx", Pod: "default/other"}}},
			"PortInUse", []string{"port 8080 of the host, which process 7 (nginx) of pod default/other has"}},
		{"no processes left", Evidence{Pod: podWith(ended("Error", 1)), Containers: map[string]Container{"main": {Log: []string{"sh: can't fork: Resource temporarily unavailable"}}}},
			"TooManyProcesses", []string{"limit of processes"}},
		{"disk full", Evidence{Pod: podWith(ended("Error", 1)), Containers: map[string]Container{"main": {Log: []string{"write: no space left on device"}}}, Disks: []Disk{{"/var", 99, 10, nil}}},
			"NoSpace", []string{"/var is 99 % full"}},
		{"nfs silent", Evidence{Pod: podWith(waiting("ContainerCreating", ""), noSandbox), Events: []v1.Event{event("FailedMount", `MountVolume.SetUp failed for volume "share" : nfs 10.1.2.3:/export: 10.1.2.3 version 4.2: connection timed out`)}},
			"VolumeServer", []string{"Volume share", "10.1.2.3 (path /export) does not answer"}},
		{"nfs refused", Evidence{Pod: podWith(waiting("ContainerCreating", ""), noSandbox), Events: []v1.Event{event("FailedMount", `MountVolume.SetUp failed for volume "share" : nfs srv:/e: srv version 3: permission denied`)}},
			"VolumeServer", []string{"does not let this node mount it"}},
		{"cgroup", Evidence{Pod: podWith(waiting("ContainerCreating", ""), noSandbox), Events: []v1.Event{event("FailedCreatePodContainer", "unable to ensure pod container exists: mkdir /sys/fs/cgroup/x: read-only file system")}},
			"Cgroup", []string{"cgroup cannot be made", "read-only file system"}},
		{"network", Evidence{Pod: podWith(waiting("ContainerCreating", ""), noSandbox), Waits: Waits{Sandbox: now.Add(20 * time.Second)},
			Events: []v1.Event{event("FailedCreatePodSandBox", "Failed to create pod sandbox: run pod sandbox web_default_1_0: attach network (after 12ms): CNI plugin bridge: no such file")}},
			"CNI", []string{"CNI", "in 20 s"}},
		{"pulling", Evidence{Pod: podWith(waiting("ContainerCreating", "")), Events: []v1.Event{event("Pulling", "x")}, Pulls: []api.Progress{{Ref: "docker.io/library/app:1", Stage: "downloading", Bytes: 1 << 20, Total: 4 << 20, Layers: 3}}},
			"Pulling", []string{"1Mi of 4Mi"}},
		{"gate closed", Evidence{Pod: podWith(v1.ContainerStatus{Ready: true, State: v1.ContainerState{Running: &v1.ContainerStateRunning{StartedAt: before(time.Hour)}}}, func(p *v1.Pod) {
			p.Spec.ReadinessGates = []v1.PodReadinessGate{{ConditionType: "x/y"}}
			p.Status.Conditions = append(p.Status.Conditions, v1.PodCondition{Type: "x/y", Status: v1.ConditionFalse, Message: "not balanced"})
		})}, "ReadinessGate", []string{"x/y of its readiness gate is False: not balanced"}},
		{"evicted", Evidence{Pod: podWith(waiting("ContainerCreating", ""), func(p *v1.Pod) {
			p.Status.Phase, p.Status.Reason, p.Status.Message = v1.PodFailed, "SysctlForbidden", "forbidden sysctl"
		})}, "SysctlForbidden", []string{"forbidden sysctl"}},
		{"fraction of a byte of memory", Evidence{Pod: podWith(waiting("ContainerCreating", ""), noSandbox, limited("memory", "128m")), Waits: Waits{Sandbox: now.Add(20 * time.Second)},
			Events: []v1.Event{event("FailedCreatePodSandBox", `Failed to create pod sandbox: start pause: make cgroup "/x": mkdir /sys/fs/cgroup/memory/x: cannot allocate memory`)}},
			"LimitTooSmall", []string{"memory limit (128m) is too small even to start a process: it is a fraction of a byte", "spec.containers[0].resources.limits[memory]", "Mi for mebibytes", "in 20 s"}},
		{"no memory for the program that begins", Evidence{Pod: podWith(waiting("ContainerCreating", ""), noSandbox, limited("memory", "64Ki")),
			Events: []v1.Event{event("FailedCreatePodSandBox", "Failed to create pod sandbox: start pause: fork/exec /proc/self/fd/9: cannot allocate memory")}},
			"LimitTooSmall", []string{"(64Ki) is too small even to start a process", "some 4Mi are needed"}},
		{"killed between create and start", Evidence{Pod: podWith(v1.ContainerStatus{State: v1.ContainerState{Terminated: &v1.ContainerStateTerminated{Reason: "StartError", ExitCode: 128,
			Message: "start container 2b8: init has ended before it was started: failed precondition"}}}, limited("memory", "3Mi"))},
			"LimitTooSmall", []string{"(3Mi) is too small"}},
		{"no memory on the node", Evidence{Pod: podWith(waiting("ContainerCreating", ""), noSandbox, limited("memory", "128Mi")),
			Events: []v1.Event{event("FailedCreatePodSandBox", "Failed to create pod sandbox: start pause: cannot allocate memory")}},
			"Sandbox", []string{"cannot allocate memory"}},
		{"fraction of a byte of storage", Evidence{Pod: podWith(ended("Error", 137), limited("ephemeral-storage", "500m"), func(p *v1.Pod) {
			p.Status.Phase, p.Status.Reason, p.Status.Message = v1.PodFailed, "Evicted", "Pod ephemeral local storage usage exceeds the total limit of containers 500m. "
		})}, "Evicted", []string{"exceeds the total limit of containers 500m", `spec.containers[0].resources.limits[ephemeral-storage]: fractional byte value "500m"`, "Mi for mebibytes"}},
		{"warnings come last", Evidence{Pod: podWith(ended("Error", 1)), Problems: []api.Problem{{File: "/m/web.yaml", Line: 7, Field: "spec.x", Message: "is odd", Warning: true}}},
			"Error", []string{"The manifest has a warning: /m/web.yaml:7, field spec.x: is odd."}},
		{"unmounting", Evidence{Pod: podWith(ended("Completed", 0), func(p *v1.Pod) { at := before(0); p.DeletionTimestamp = &at }), Waits: Waits{Doing: []string{"unmount"}}},
			"Terminating", []string{"its volumes to be unmounted"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.e.Now = now
			d := Explain(&tt.e)
			if len(d.Findings) == 0 {
				t.Fatal("no finding")
			}
			text := d.Text("")
			if d.Fine || d.Findings[0].Reason != tt.reason {
				t.Errorf("fine %v, reason %s, want %s:\n%s", d.Fine, d.Findings[0].Reason, tt.reason, text)
			}
			for _, w := range tt.want {
				if !strings.Contains(text, w) {
					t.Errorf("%q is not said:\n%s", w, text)
				}
			}
		})
	}
}

// A copy of the pod's manifest is told, and the pod is fine all the same.
func TestCopyOfTheManifestIsANotice(t *testing.T) {
	copied := api.Problem{File: "/m/web-copy.yaml", Line: 4, Field: "metadata.name", Object: "Pod default/web",
		Message: "Pod default/web is already defined in /m/web.yaml, which is in force", Remedy: "remove or rename one of the two"}
	pod := podWith(v1.ContainerStatus{Ready: true, State: v1.ContainerState{Running: &v1.ContainerStateRunning{StartedAt: before(time.Hour)}}})
	d := Explain(&Evidence{Now: now, Pod: pod, Problems: []api.Problem{copied}})
	text := d.Text("")
	if !d.Fine || !strings.Contains(text, "/m/web-copy.yaml:4") || !strings.Contains(text, "/m/web.yaml, which is in force") {
		t.Errorf("fine %v:\n%s", d.Fine, text)
	}
	copied.Kept = true // a change of the object in force is refused
	if d := Explain(&Evidence{Now: now, Pod: pod, Problems: []api.Problem{copied}}); d.Fine {
		t.Error("a refused change is no trouble")
	}
}

// An exit code says nothing of signals: who ended a container is told only where
// the kernel has said it.
func TestNoSignalIsToldThatTheKernelDidNotTell(t *testing.T) {
	for _, code := range []int32{130, 137, 143} {
		e := Evidence{Now: now, Pod: podWith(ended("Error", code)), Ends: map[string]End{"it": {}}}
		d := Explain(&e)
		text := d.Text("")
		if strings.Contains(text, "was ended by SIG") && !strings.Contains(text, "a command that it ran was ended by SIG") || strings.Contains(text, "somebody") {
			t.Errorf("%d: %s", code, text)
		}
	}
}

func TestOOMKillsAreToldOfPodsThatAreFine(t *testing.T) {
	runs := v1.ContainerStatus{Ready: true, ContainerID: "podd://it", State: v1.ContainerState{Running: &v1.ContainerStateRunning{StartedAt: before(time.Hour)}}}
	started := true
	runs.Started = &started
	for name, pod := range map[string]*v1.Pod{
		"goes on": podWith(runs, func(p *v1.Pod) { p.Status.Conditions[1].Status = v1.ConditionTrue }),
		"exited with code 0": podWith(ended("Completed", 0), func(p *v1.Pod) {
			p.Spec.RestartPolicy, p.Status.Phase = v1.RestartPolicyNever, v1.PodSucceeded
		}),
	} {
		pod.Spec.Containers[0].Resources.Limits = v1.ResourceList{v1.ResourceMemory: resource.MustParse("64Mi")}
		d := Explain(&Evidence{Now: now, Pod: pod, Ends: map[string]End{"it": {OOMKills: 2, OOMKilled: now.Add(-time.Minute)}}})
		text := d.Text("")
		if !d.Fine || len(d.Findings) != 1 || d.Findings[0].Reason != "OOMKilled" || !strings.Contains(text, name) || !strings.Contains(text, "twice, last 60 s ago") || !strings.Contains(text, "limit is 64Mi") {
			t.Errorf("%s: %+v\n%s", name, d, text)
		}
	}
}

func TestPortIn(t *testing.T) {
	for line, want := range map[string]int32{
		"12:00:01 listen tcp :8080: bind: address already in use":                 8080,
		"nginx: [emerg] bind() to 0.0.0.0:80 failed (98: Address already in use)": 80,
		"Error: listen EADDRINUSE: address already in use :::3000":                3000,
		"testserver: listen tcp 127.0.0.1:44551: bind: address already in use":    44551,
		"nginx: [emerg] bind() to [::]:80 failed (98: Address already in use)":    80,
		"could not bind: address already in use":                                  0,
	} {
		if got := PortIn(line); got != want {
			t.Errorf("%q: %d, want %d", line, got, want)
		}
	}
}
