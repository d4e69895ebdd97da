package status

import (
	"reflect"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
)

var t0 = time.Unix(1_000_000, 0)

func pod(mods ...func(*v1.Pod)) *v1.Pod {
	p := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "default", UID: "u", Generation: 3},
		Spec:       v1.PodSpec{RestartPolicy: v1.RestartPolicyAlways, Containers: []v1.Container{{Name: "a", Image: "img"}}},
	}
	for _, m := range mods {
		m(p)
	}
	return p
}

func policy(rp v1.RestartPolicy) func(*v1.Pod) {
	return func(p *v1.Pod) { p.Spec.RestartPolicy = rp }
}
func two(p *v1.Pod) { p.Spec.Containers = append(p.Spec.Containers, v1.Container{Name: "b"}) }
func withInit(p *v1.Pod) {
	p.Spec.InitContainers = append(p.Spec.InitContainers, v1.Container{Name: "i"})
}
func withSide(p *v1.Pod) {
	always := v1.ContainerRestartPolicyAlways
	p.Spec.InitContainers = append(p.Spec.InitContainers, v1.Container{Name: "s", RestartPolicy: &always})
}

func inst(name string, state State, code int32) Container {
	c := Container{ID: name + "1", Name: name, State: state, ExitCode: code, StartedAt: t0, Image: "img", ImageRef: "sha"}
	switch {
	case state == Running:
		c.Started, c.Ready = true, true
	case state == Exited && code == 0:
		c.Reason, c.FinishedAt = "Completed", t0
	case state == Exited:
		c.Reason, c.FinishedAt = "Error", t0
	}
	return c
}

func observed(cs ...Container) *Observed {
	return &Observed{Containers: cs, SandboxReady: true, PodIPs: []string{"10.0.0.1"}, HostIPs: []string{"192.0.2.1"}, StartTime: t0}
}

func TestPhase(t *testing.T) {
	never, onFailure := policy(v1.RestartPolicyNever), policy(v1.RestartPolicyOnFailure)
	crash := func(o *Observed) *Observed {
		o.Waiting = map[string]v1.ContainerStateWaiting{"a": {Reason: "CrashLoopBackOff"}}
		return o
	}
	terminal := func(o *Observed) *Observed { o.Terminal = true; return o }
	for _, tc := range []struct {
		name string
		pod  *v1.Pod
		o    *Observed
		want v1.PodPhase
	}{
		{"nothing yet", pod(), observed(), v1.PodPending},
		{"running", pod(), observed(inst("a", Running, 0)), v1.PodRunning},
		{"one of two", pod(two), observed(inst("a", Running, 0)), v1.PodPending},
		{"exited, to be restarted", pod(), observed(inst("a", Exited, 1)), v1.PodRunning},
		{"crash loop", pod(), crash(observed(inst("a", Exited, 1))), v1.PodRunning},
		{"always, done, about to restart", pod(), observed(inst("a", Exited, 0)), v1.PodRunning},
		{"on failure, done", pod(onFailure), observed(inst("a", Exited, 0)), v1.PodSucceeded},
		{"on failure, failed", pod(onFailure), observed(inst("a", Exited, 1)), v1.PodRunning},
		{"never, failed", pod(never), observed(inst("a", Exited, 1)), v1.PodFailed},
		{"never, half done", pod(never, two), observed(inst("a", Exited, 0), inst("b", Running, 0)), v1.PodRunning},
		{"never, half failed", pod(never, two), observed(inst("a", Exited, 0), inst("b", Exited, 1)), v1.PodFailed},
		{"stopped", pod(), terminal(observed(inst("a", Exited, 143))), v1.PodFailed},
		{"stopped well", pod(), terminal(observed(inst("a", Exited, 0))), v1.PodSucceeded},
		{"stopped before it began", pod(), terminal(observed()), v1.PodFailed},
		{"initialising", pod(withInit), observed(inst("i", Running, 0)), v1.PodPending},
		{"init failed, tried again", pod(withInit), observed(inst("i", Exited, 1)), v1.PodPending},
		{"init failed for good", pod(withInit, never), observed(inst("i", Exited, 1)), v1.PodFailed},
		{"initialised", pod(withInit), observed(inst("i", Exited, 0)), v1.PodPending},
		{"initialised and running", pod(withInit), observed(inst("i", Exited, 0), inst("a", Running, 0)), v1.PodRunning},
		{"init collected", pod(withInit), observed(inst("a", Running, 0)), v1.PodRunning},
		{"sidecar not started", pod(withSide), observed(func() Container { c := inst("s", Running, 0); c.Started = false; return c }()), v1.PodPending},
		{"sidecar restarts beside", pod(withSide), observed(inst("s", Exited, 1), inst("a", Running, 0)), v1.PodRunning},
		{"job done, sidecar still ending", pod(withSide, never), observed(inst("s", Running, 0), inst("a", Exited, 0)), v1.PodRunning},
		{"job and sidecar done", pod(withSide, never), observed(inst("s", Exited, 143), inst("a", Exited, 0)), v1.PodSucceeded},
		{"deadline", pod(), func() *Observed {
			o := observed(inst("a", Running, 0))
			o.Failed = &Cause{"DeadlineExceeded", "m"}
			return o
		}(), v1.PodFailed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := Compute(tc.pod, tc.o, nil, t0).Phase; got != tc.want {
				t.Errorf("phase %s, want %s", got, tc.want)
			}
		})
	}
}

func TestTerminalPhaseStays(t *testing.T) {
	p := pod(policy(v1.RestartPolicyNever))
	old := Compute(p, observed(inst("a", Exited, 1)), nil, t0)
	old.Reason, old.Message = "DeadlineExceeded", "m"
	s := Compute(p, observed(inst("a", Running, 0)), &old, t0)
	if s.Phase != v1.PodFailed || s.Reason != "DeadlineExceeded" {
		t.Fatalf("%s %s", s.Phase, s.Reason)
	}
}

func condition(s *v1.PodStatus, typ v1.PodConditionType) *v1.PodCondition {
	_, c := podutil.GetPodCondition(s, typ)
	return c
}

func TestConditions(t *testing.T) {
	gate := func(p *v1.Pod) { p.Spec.ReadinessGates = []v1.PodReadinessGate{{ConditionType: "x/y"}} }
	unready := inst("a", Running, 0)
	unready.Ready = false
	for _, tc := range []struct {
		name                           string
		pod                            *v1.Pod
		o                              *Observed
		sandbox, init, contained, open v1.ConditionStatus
		message                        string
	}{
		{"nothing yet", pod(withInit), &Observed{}, "False", "False", "False", "False", "containers with unready status: [a]"},
		{"sandbox", pod(), observed(), "True", "True", "False", "False", "containers with unready status: [a]"},
		{"running", pod(), observed(inst("a", Running, 0)), "True", "True", "True", "True", ""},
		{"not ready", pod(two), observed(unready, inst("b", Running, 0)), "True", "True", "False", "False", "containers with unready status: [a]"},
		{"sidecar not ready", pod(withSide), observed(func() Container { c := inst("s", Running, 0); c.Ready = false; return c }(), inst("a", Running, 0)), "True", "True", "False", "False", "containers with unready status: [s]"},
		{"gate", pod(gate), observed(inst("a", Running, 0)), "True", "True", "True", "False", `corresponding condition of pod readiness gate "x/y" does not exist.`},
		{"done", pod(policy(v1.RestartPolicyNever)), observed(inst("a", Exited, 0)), "True", "True", "False", "False", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := Compute(tc.pod, tc.o, nil, t0)
			for typ, want := range map[v1.PodConditionType]v1.ConditionStatus{
				v1.PodReadyToStartContainers: tc.sandbox, v1.PodInitialized: tc.init, v1.ContainersReady: tc.contained, v1.PodReady: tc.open, v1.PodScheduled: "True",
			} {
				c := condition(&s, typ)
				if c == nil || c.Status != want || c.ObservedGeneration != 3 {
					t.Errorf("%s is %+v, want %s", typ, c, want)
				}
			}
			if c := condition(&s, v1.PodReady); c.Message != tc.message {
				t.Errorf("message %q, want %q", c.Message, tc.message)
			}
		})
	}
}

func TestTransitionTimes(t *testing.T) {
	p := pod()
	s1 := Compute(p, observed(), nil, t0)
	s2 := Compute(p, observed(inst("a", Running, 0)), &s1, t0.Add(time.Minute))
	s3 := Compute(p, observed(inst("a", Running, 0)), &s2, t0.Add(time.Hour))
	if !reflect.DeepEqual(s2, s3) {
		t.Errorf("the same state is another status later:\n%+v\n%+v", s2, s3)
	}
	if got := condition(&s3, v1.PodReady).LastTransitionTime; !got.Time.Equal(t0.Add(time.Minute)) {
		t.Errorf("Ready since %s", got)
	}
	if got := condition(&s3, v1.PodReadyToStartContainers).LastTransitionTime; !got.Time.Equal(t0) {
		t.Errorf("sandbox since %s", got)
	}
	// A condition of someone else's is kept.
	s3.Conditions = append(s3.Conditions, v1.PodCondition{Type: "x/y", Status: "True"})
	s4 := Compute(p, observed(inst("a", Running, 0)), &s3, t0)
	if condition(&s4, "x/y") == nil {
		t.Error("a foreign condition is lost")
	}
}

func TestContainerStates(t *testing.T) {
	restarted := inst("a", Running, 0)
	restarted.ID, restarted.Attempt = "a2", 1
	starting := inst("a", Running, 0)
	starting.Starting = true
	waiting := func(o *Observed, reason string) *Observed {
		o.Waiting = map[string]v1.ContainerStateWaiting{"a": {Reason: reason, Message: "m"}}
		return o
	}
	oom := inst("a", Exited, 137)
	oom.Reason = "OOMKilled"
	for _, tc := range []struct {
		name string
		pod  *v1.Pod
		o    *Observed
		want string // state last restarts started ready
	}{
		{"nothing yet", pod(), observed(), "waiting ContainerCreating, -, 0"},
		{"nothing yet, with init", pod(withInit), observed(), "waiting PodInitializing, -, 0"},
		{"pull", pod(), waiting(observed(), "ErrImagePull"), "waiting ErrImagePull, -, 0"},
		{"running", pod(), observed(inst("a", Running, 0)), "running, -, 0, started, ready"},
		{"in its postStart hook", pod(), observed(starting), "waiting ContainerCreating, -, 0"},
		{"restarted", pod(), observed(restarted, inst("a", Exited, 1)), "running, terminated Error 1, 1, started, ready"},
		{"exited", pod(), observed(inst("a", Exited, 0)), "terminated Completed 0, -, 0"},
		{"oom", pod(), observed(oom), "terminated OOMKilled 137, -, 0"},
		{"crash loop", pod(), waiting(observed(inst("a", Exited, 1)), "CrashLoopBackOff"), "waiting CrashLoopBackOff, terminated Error 1, 0"},
		{"a wait does not hide a running one", pod(), waiting(observed(inst("a", Running, 0)), "RunContainerError"), "running, -, 0, started, ready"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := Compute(tc.pod, tc.o, nil, t0).ContainerStatuses[0]
			if got := short(&s); got != tc.want {
				t.Errorf("%s\nwant %s", got, tc.want)
			}
		})
	}
}

// TestEndThatIsNotForGood: a container that will be started against its policy
// never shows an end that the API would hold it to.
func TestEndThatIsNotForGood(t *testing.T) {
	for _, rp := range []v1.RestartPolicy{v1.RestartPolicyNever, v1.RestartPolicyOnFailure, v1.RestartPolicyAlways} {
		o := observed(inst("a", Exited, 0))
		o.Returning = map[string]bool{"a": true}
		s := Compute(pod(policy(rp)), o, &v1.PodStatus{}, time.Unix(1000, 0))
		c := s.ContainerStatuses[0]
		end := c.State.Terminated
		if rp != v1.RestartPolicyAlways {
			if c.State.Waiting == nil || c.State.Waiting.Reason != ContainerCreating {
				t.Errorf("%s: %+v", rp, c.State)
			}
			end = c.LastTerminationState.Terminated
		}
		if end == nil || s.Phase != v1.PodRunning {
			t.Errorf("%s: phase %s, %+v", rp, s.Phase, c)
		}
	}
}

func short(s *v1.ContainerStatus) string {
	state := func(c v1.ContainerState) string {
		switch {
		case c.Running != nil:
			return "running"
		case c.Waiting != nil:
			return "waiting " + c.Waiting.Reason
		case c.Terminated != nil:
			return "terminated " + c.Terminated.Reason + " " + itoa(c.Terminated.ExitCode)
		}
		return "-"
	}
	parts := []string{state(s.State), state(s.LastTerminationState), itoa(s.RestartCount)}
	if s.Started != nil && *s.Started {
		parts = append(parts, "started")
	}
	if s.Ready {
		parts = append(parts, "ready")
	}
	return strings.Join(parts, ", ")
}

func itoa(n int32) string {
	if n == 0 {
		return "0"
	}
	s := ""
	for ; n > 0; n /= 10 {
		s = string(rune('0'+n%10)) + s
	}
	return s
}

func TestLostContainer(t *testing.T) {
	p := pod()
	old := Compute(p, observed(inst("a", Running, 0)), nil, t0)
	s := Compute(p, observed(), &old, t0)
	if got := short(&s.ContainerStatuses[0]); got != "waiting ContainerCreating, terminated ContainerStatusUnknown 137, 1" {
		t.Fatal(got)
	}
	again := Compute(p, observed(), &s, t0)
	if again.ContainerStatuses[0].RestartCount != 1 {
		t.Fatal("counted twice")
	}
}

func TestCountsAndLastStateOutliveInstances(t *testing.T) {
	p := pod()
	crashed := inst("a", Exited, 7)
	crashed.Attempt = 4
	old := Compute(p, observed(crashed), nil, t0)
	next := inst("a", Running, 0)
	next.ID, next.Attempt = "a5", 5
	s := Compute(p, observed(next), &old, t0).ContainerStatuses[0]
	if got := short(&s); got != "running, terminated Error 7, 5, started, ready" {
		t.Fatal(got)
	}
}

func TestAddresses(t *testing.T) {
	o := observed(inst("a", Running, 0))
	o.PodIPs = []string{"10.0.0.1", "fd00::1"}
	s := Compute(pod(), o, nil, t0)
	if s.PodIP != "10.0.0.1" || len(s.PodIPs) != 2 || s.HostIP != "192.0.2.1" {
		t.Errorf("%+v", s)
	}
	o.PodIPs = nil
	s = Compute(pod(func(p *v1.Pod) { p.Spec.HostNetwork = true }), o, nil, t0)
	if s.PodIP != "192.0.2.1" {
		t.Errorf("host network pod has %q", s.PodIP)
	}
	if s.QOSClass != v1.PodQOSBestEffort || s.ObservedGeneration != 3 || !s.StartTime.Time.Equal(t0) {
		t.Errorf("%+v", s)
	}
}
