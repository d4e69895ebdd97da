package integration

import (
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/node"
)

func TestRestartPolicies(t *testing.T) {
	n := start(t)
	n.Write("never.yaml", pod("never", "restartPolicy: Never", "exit", "1"))
	n.Write("failure-ok.yaml", pod("failure-ok", "restartPolicy: OnFailure", "exit", "0"))
	n.Write("failure.yaml", pod("failure", "restartPolicy: OnFailure", "exit", "2"))
	n.Write("always.yaml", pod("always", "", "exit", "0"))
	p := n.WaitPod("never", "failed", 30*second, func(p *v1.Pod) bool { return p.Status.Phase == v1.PodFailed })
	if st := terminated(p); st == nil || st.ExitCode != 1 || status(p).RestartCount != 0 {
		t.Errorf("never: %+v", status(p))
	}
	p = n.WaitPod("failure-ok", "succeeded", 30*second, func(p *v1.Pod) bool { return p.Status.Phase == v1.PodSucceeded })
	if st := terminated(p); st == nil || st.Reason != "Completed" || status(p).RestartCount != 0 {
		t.Errorf("failure-ok: %+v", status(p))
	}
	// The first restart comes at once, the second after 10 s (upstream's back-off).
	for _, name := range []string{"failure", "always"} {
		p = n.WaitPod(name, "backing off", 30*second, func(p *v1.Pod) bool {
			w := status(p).State.Waiting
			return w != nil && w.Reason == "CrashLoopBackOff" && status(p).RestartCount >= 1
		})
		if !strings.Contains(status(p).State.Waiting.Message, "back-off 10s") {
			t.Errorf("%s: %q", name, status(p).State.Waiting.Message)
		}
	}
	begin := time.Now()
	n.WaitPod("failure", "restarted again", 30*second, func(p *v1.Pod) bool { return status(p).RestartCount >= 2 })
	if waited := time.Since(begin); waited > 10*second+node.Scale(2*second) {
		t.Errorf("second restart after %v", waited)
	}
	if got := n.OK("logs", "-p", node.PodName("failure")); got != "exiting with 2\n" {
		t.Errorf("logs of the previous container: %q", got)
	}
}

func TestMemoryLimitKillsAndSaysSo(t *testing.T) {
	n := start(t)
	n.Write("hog.yaml", pod("hog", "restartPolicy: Never", "hog", "200")+"    resources: {limits: {memory: 32Mi}}\n")
	p := n.WaitPod("hog", "killed", 30*second, func(p *v1.Pod) bool { return terminated(p) != nil })
	if st := terminated(p); st.Reason != "OOMKilled" || st.ExitCode != 137 {
		t.Errorf("got %+v", st)
	}
}

func TestGracePeriodEndsTheStubborn(t *testing.T) {
	n := start(t)
	n.Write("stubborn.yaml", strings.Replace(pod("stubborn", "", "stubborn"), "terminationGracePeriodSeconds: 1", "terminationGracePeriodSeconds: 2", 1))
	n.WaitRunning("stubborn")
	node.Await(t, "SIGTERM ignored", 10*second, func() bool {
		out, _, _ := n.Podd("logs", node.PodName("stubborn"))
		return strings.Contains(out, "ignoring")
	})
	begin := time.Now()
	n.Remove("stubborn.yaml")
	n.WaitGone(15 * second)
	if took := time.Since(begin); took < 1900*time.Millisecond || took > node.Scale(8*second) {
		t.Errorf("ended after %v, want about 2 s", took)
	}
}

func TestMissingImageIsTold(t *testing.T) {
	n := start(t)
	n.Write("none.yaml", strings.Replace(pod("none", "", "pause"), testserver, "podd.test/no-such-image:1", 1))
	p := n.WaitPod("none", "waiting for its image", 30*second, func(p *v1.Pod) bool {
		w := status(p).State.Waiting
		return w != nil && (w.Reason == "ErrImagePull" || w.Reason == "ImagePullBackOff")
	})
	if m := status(p).State.Waiting.Message; !strings.Contains(m, "podd.test/no-such-image:1") {
		t.Errorf("message: %q", m)
	}
	if out, errOut, err := n.Podd("logs", node.PodName("none")); err == nil || !strings.Contains(errOut, "failing to pull image") {
		t.Errorf("logs: %v, %q %q", err, out, errOut)
	}
}
