package pods

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/podd-runtime/podd/kubelet/admission"
)

// placed is a bubble whose node decides on pods as one of a cluster does; it has
// four CPUs.
func placed(t *testing.T, f func(t *testing.T, n *node)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		is := &v1.Node{Status: v1.NodeStatus{Allocatable: v1.ResourceList{v1.ResourceCPU: resource.MustParse("4"), v1.ResourceMemory: resource.MustParse("8Gi"), v1.ResourcePods: resource.MustParse("110")}}}
		n.admit = func(pod *v1.Pod, others []*v1.Pod) admission.Verdict { return admission.Admit(is, pod, false, others) }
		n.start()
		defer n.invariants()
		defer func() { n.stop() }()
		f(t, n)
	})
}

func (n *node) reason(name string) string {
	n.t.Helper()
	return n.get(name).Status.Reason
}

// What a resize has given back is there for the next pod, and not before: what
// it has taken is not. A restart changes nothing of that.
func TestAdmissionCountsWhatPodsHaveAfterAResize(t *testing.T) {
	placed(t, func(t *testing.T, n *node) {
		big := mkpod("big", "u1", ofAPI, sized("3", "64Mi"))
		n.set(big)
		after(time.Second)
		n.rt.setFault(func(_ context.Context, call, _ string) error {
			if call == "UpdateContainerResources" {
				return errors.New("not now")
			}
			return nil
		})
		small := resized(big, "500m", "64Mi")
		n.table.SetPod("file", small)
		after(time.Second)
		n.table.SetPod("file", mkpod("early", "u2", ofAPI, sized("3", "64Mi")))
		after(time.Second)
		if r := n.reason("early"); r != admission.OutOfCPU {
			t.Fatalf("a pod got CPUs that another one has still: %q", r)
		}
		n.rt.setFault(nil)
		after(2 * time.Minute)
		n.table.SetPod("file", mkpod("next", "u3", ofAPI, sized("3", "64Mi")))
		after(5 * time.Second)
		if !n.ready("next") {
			t.Fatalf("rejected beside a pod that was made small: %+v", n.get("next").Status)
		}
		grown := resized(small, "1", "64Mi")
		n.table.SetPod("file", grown)
		after(5 * time.Second)
		for range 2 {
			n.table.SetPod("file", mkpod("late", "u4", ofAPI, sized("500m", "64Mi")))
			after(time.Second)
			if r := n.reason("late"); r != admission.OutOfCPU {
				t.Fatalf("a pod got CPUs that a resize has taken: %q", r)
			}
			n.table.RemovePod("file", "u4")
			after(time.Minute)
			n.stop()
			n.start()
			n.table.SetPod("file", grown)
			n.table.SetPod("file", mkpod("next", "u3", ofAPI, sized("3", "64Mi")))
			n.table.Synced("file")
			after(5 * time.Second)
		}
	})
}

// Of resizes that come together only those are allocated that fit together.
func TestResizesTogetherDoNotOvercommit(t *testing.T) {
	for range 20 {
		placed(t, func(t *testing.T, n *node) {
			a, b := mkpod("a", "u1", ofAPI, sized("1", "64Mi")), mkpod("b", "u2", ofAPI, sized("1", "64Mi"))
			n.set(a)
			n.set(b)
			after(5 * time.Second)
			n.table.SetPod("file", resized(a, "3", "64Mi"))
			n.table.SetPod("file", resized(b, "3", "64Mi"))
			after(5 * time.Second)
			sum := resource.Quantity{}
			for _, name := range []string{"a", "b"} {
				sum.Add(*containerStatusOf(n.get(name), "a").AllocatedResources.Cpu())
			}
			if sum.Cmp(resource.MustParse("4")) != 0 {
				t.Fatalf("allocated %s of 4 CPUs", sum.String())
			}
		})
	}
}

// A resize that waits gets what any other pod leaves: one that completes, that
// fails, that is made smaller.
func TestDeferredResizeGetsWhatOthersLeave(t *testing.T) {
	for how, leave := range map[string]func(n *node, other *v1.Pod){
		"completes": func(n *node, _ *v1.Pod) { n.rt.exit(n.rt.live("default/other")["a"].id, 0) },
		"is evicted": func(n *node, other *v1.Pod) {
			n.table.Evict(other.UID, "too much")
		},
		"shrinks": func(n *node, other *v1.Pod) { n.table.SetPod("file", resized(other, "100m", "64Mi")) },
		"is killed by its deadline": func(n *node, other *v1.Pod) {
			p := other.DeepCopy()
			p.Generation++
			p.Spec.ActiveDeadlineSeconds = new(int64(1))
			n.table.SetPod("file", p)
		},
	} {
		t.Run(how, func(t *testing.T) {
			placed(t, func(t *testing.T, n *node) {
				web, other := mkpod("web", "u1", ofAPI, sized("1", "64Mi")), mkpod("other", "u2", ofAPI, onFailure, sized("2", "64Mi"))
				n.set(web)
				n.set(other)
				after(5 * time.Second)
				n.table.SetPod("file", resized(web, "3", "64Mi"))
				after(5 * time.Second)
				if c := condition(n.get("web"), v1.PodResizePending); c == nil || c.Reason != v1.PodReasonDeferred {
					t.Fatalf("condition %+v", c)
				}
				leave(n, other)
				after(20 * time.Second)
				if c := condition(n.get("web"), v1.PodResizePending); c != nil {
					t.Fatalf("it still waits: %+v", c)
				}
				n.table.admitted.mu.Lock()
				defer n.table.admitted.mu.Unlock()
				if len(n.table.admitted.deferred) != 0 {
					t.Error("the table waits for a resize that is allocated")
				}
			})
		})
	}
}

// Pods whose records are lost have their places all the same, with what they had
// and not with what could never be given to them.
func TestPodsWithoutRecordsHaveTheirPlaces(t *testing.T) {
	placed(t, func(t *testing.T, n *node) {
		n.set(mkpod("web", "u1", ofAPI, sized("2", "64Mi")))
		after(5 * time.Second)
		greedy := resized(n.get("web"), "100", "64Mi")
		n.set(greedy)
		after(5 * time.Second)
		st := n.get("web").Status
		n.crash()
		n.wipeRecords()
		n.start()
		greedy = greedy.DeepCopy()
		ofAPI(greedy)
		greedy.Status = st
		n.set(greedy)
		after(5 * time.Second)
		if c := condition(n.get("web"), v1.PodResizePending); c == nil || c.Reason != v1.PodReasonInfeasible || n.rt.starts("default/web/a") != 1 {
			t.Errorf("condition %+v", c)
		}
		n.table.SetPod("file", mkpod("small", "u2", ofAPI, sized("2", "64Mi")))
		n.table.SetPod("file", mkpod("big", "u3", ofAPI, sized("3", "64Mi")))
		after(5 * time.Second)
		if !n.ready("small") || n.reason("big") != admission.OutOfCPU {
			t.Errorf("small: %+v, big: %q", n.get("small").Status, n.reason("big"))
		}
	})
}
