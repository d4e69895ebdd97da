package pods

import (
	"context"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/admission"
	"github.com/podd-runtime/podd/kubelet/status"
)

// TestTerminate: a pod that ends because the node goes down says so, stays
// down as no other begins, and is back with the next daemon, or when the
// shutdown is called off.
func TestTerminate(t *testing.T) {
	for _, how := range []string{"next boot", "called off"} {
		bubble(t, func(t *testing.T, n *node) {
			n.set(mkpod("web", "u1"))
			after(5 * time.Second)
			n.table.Hold(context.Background(), true)
			cause := status.Cause{Reason: "Terminated", Message: "going down"}
			if err := n.table.Terminate(t.Context(), "default", "web", time.Second, cause); err != nil {
				t.Fatal(err)
			}
			if len(n.rt.live("default/web")) != 0 {
				t.Fatal("still running")
			}
			st := n.get("web").Status
			if st.Phase != v1.PodFailed || st.Reason != "Terminated" || st.Message != "going down" || !disrupted(&st) {
				t.Errorf("status %+v", st)
			}
			n.table.SetPod("file", mkpod("late", "u2"))
			after(time.Minute)
			if len(n.rt.live("default/web"))+len(n.rt.live("default/late")) != 0 {
				t.Fatal("pods began while the node goes down")
			}
			if how == "called off" {
				n.table.Hold(context.Background(), false)
			} else {
				n.stop()
				n.start()
				n.set(mkpod("web", "u1"))
				n.table.SetPod("file", mkpod("late", "u2"))
			}
			after(5 * time.Second)
			if !n.ready("web") || !n.ready("late") {
				t.Fatalf("%s: %+v", how, n.get("web").Status)
			}
			if st := n.get("web").Status; st.Reason != "" || disrupted(&st) {
				t.Errorf("%s: status still says why it ended: %+v", how, st)
			}
		})
	}
}

func disrupted(st *v1.PodStatus) bool {
	for _, c := range st.Conditions {
		if c.Type == v1.DisruptionTarget && c.Status == v1.ConditionTrue {
			return c.Reason == v1.PodReasonTerminationByKubelet
		}
	}
	return false
}

// TestStopAllKeepsOrder: critical pods end when all others have.
func TestStopAllKeepsOrder(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		dns := mkpod("dns", "u1")
		dns.Spec.PriorityClassName = "system-node-critical"
		n.set(dns)
		n.table.SetPod("file", mkpod("web", "u2"))
		after(time.Second)
		n.rt.onTerm = func(c *runtimeapi.ContainerConfig) time.Duration { return time.Second }
		stopped := make(chan error, 1)
		go func() { stopped <- n.table.StopAll(t.Context(), nil) }()
		after(500 * time.Millisecond)
		if len(n.rt.live("default/web")) != 1 || len(n.rt.stops) != 1 {
			t.Fatalf("stopped first: %v", n.rt.stops)
		}
		after(time.Second)
		if len(n.rt.live("default/web")) != 0 || len(n.rt.live("default/dns")) != 1 || len(n.rt.stops) != 2 {
			t.Fatalf("stopped: %v", n.rt.stops)
		}
		if err := <-stopped; err != nil {
			t.Fatal(err)
		}
		if len(n.rt.live("default/dns")) != 0 {
			t.Fatal("still running")
		}
	})
}

// TestHoldMissesNoPod: what has begun is listed when Hold returns, though it
// began a moment ago, or podd did.
func TestHoldMissesNoPod(t *testing.T) {
	listed := func(t *testing.T, n *node) {
		t.Helper()
		n.table.Hold(t.Context(), true)
		if len(n.table.Pods()) != 1 {
			t.Errorf("listed: %v", n.table.Pods())
		}
	}
	placed(t, func(t *testing.T, n *node) { // between its turn and its first status
		decide := n.admit
		n.admit = func(pod *v1.Pod, others []*v1.Pod) admission.Verdict {
			time.Sleep(time.Second)
			return decide(pod, others)
		}
		n.set(mkpod("web", "u1"))
		time.Sleep(500 * time.Millisecond)
		listed(t, n)
	})
	bubble(t, func(t *testing.T, n *node) { // while the runtime is asked what runs
		n.set(mkpod("web", "u1"))
		after(5 * time.Second)
		n.stop()
		n.rt.setFault(func(_ context.Context, call, _ string) error {
			if call == "ListPodSandbox" {
				time.Sleep(3 * time.Second)
			}
			return nil
		})
		n.start()
		listed(t, n)
	})
}
