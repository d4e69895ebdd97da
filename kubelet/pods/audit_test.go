package pods

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// inside does f as the pod's worker.
func (n *node) inside(name string, f func(w *worker, l *life)) {
	n.t.Helper()
	w := n.table.worker("default", name)
	if w == nil {
		n.t.Fatalf("nobody looks after %s", name)
	}
	w.post(func() { f(w, w.last()) })
	synctest.Wait()
}

// TestAuditHealsWhatWasLost: whatever a worker missed of what its source said,
// the audit finds, puts right and counts, once.
func TestAuditHealsWhatWasLost(t *testing.T) {
	for name, tc := range map[string]struct {
		lose func(n *node, pod *v1.Pod)
		want func(n *node) bool
		what string
	}{
		"a new spec": {
			func(n *node, pod *v1.Pod) {
				n.inside("web", func(w *worker, l *life) {
					next := pod.DeepCopy()
					next.Spec.Containers[0].Image = "img:2"
					n.table.mu.Lock()
					n.table.words[w.key] = pending{source: "file", pod: next}
					n.table.mu.Unlock()
				})
			},
			func(n *node) bool { return n.ready("web") && n.rt.starts("default/web/a") == 2 }, "source",
		},
		"its removal": {
			func(n *node, pod *v1.Pod) {
				n.table.mu.Lock()
				n.table.unsay("file", pod.UID)
				n.table.mu.Unlock()
			},
			func(n *node) bool { return len(n.table.List()) == 0 }, "source",
		},
		"that it was told at all": {
			func(n *node, pod *v1.Pod) {
				n.inside("web", func(w *worker, l *life) { l.d.Held = true; l.word = nil })
			},
			func(n *node) (ok bool) {
				n.inside("web", func(_ *worker, l *life) { ok = !l.d.Held })
				return ok && n.ready("web")
			}, "source",
		},
		"that it is there again": {
			func(n *node, pod *v1.Pod) {
				n.inside("web", func(w *worker, l *life) { w.leave(l, "") })
			},
			func(n *node) bool { return n.ready("web") }, "source",
		},
		"its deletion": {
			func(n *node, pod *v1.Pod) {
				n.inside("web", func(w *worker, l *life) {
					n.table.mu.Lock()
					n.table.words[w.key] = pending{source: "file", pod: deleted(pod, 1)}
					n.table.mu.Unlock()
				})
			},
			func(n *node) bool { return len(n.table.List()) == 0 }, "source",
		},
		"who is to follow it": {
			func(n *node, pod *v1.Pod) {
				n.inside("web", func(w *worker, l *life) {
					n.table.mu.Lock()
					n.table.words[w.key] = pending{source: "file", pod: mkpod("web", "u2")}
					n.table.mu.Unlock()
				})
			},
			func(n *node) bool { return n.ready("web") && n.get("web").UID == "u2" }, "source",
		},
		"a place that nobody has": {
			func(n *node, pod *v1.Pod) { n.table.admitted.keeps(mkpod("ghost", "u9")) },
			func(n *node) bool {
				n.table.admitted.mu.Lock()
				defer n.table.admitted.mu.Unlock()
				return n.table.admitted.pods[types.UID("u9")] == nil
			}, "place",
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				pod := mkpod("web", "u1")
				n.set(pod)
				after(70 * time.Second) // past the first audit
				tc.lose(n, pod)
				after(3 * time.Minute)
				if !tc.want(n) {
					t.Errorf("not healed: %+v", n.table.List())
				}
				if what := n.audit.take(); what != tc.what {
					t.Errorf("counted %q, want %q", what, tc.what)
				}
			})
		})
	}
}

// TestEventsThatEndAreAskedForAgain: the runtime may drop a subscriber that is
// too slow; nothing that happens from then on is lost.
func TestEventsThatEndAreAskedForAgain(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.set(mkpod("web", "u1"))
		after(time.Second)
		n.rt.mu.Lock()
		for _, s := range n.rt.subs {
			close(s)
		}
		n.rt.subs = nil
		n.rt.mu.Unlock()
		n.rt.exit(n.rt.live("default/web")["a"].id, 1) // while nobody listens
		after(5 * time.Second)
		if n.rt.starts("default/web/a") != 2 {
			t.Fatal("what happened meanwhile is not noticed")
		}
		n.rt.exit(n.rt.live("default/web")["a"].id, 1)
		after(15 * time.Second)
		if n.rt.starts("default/web/a") != 3 {
			t.Fatal("events are not followed any more")
		}
	})
}

// TestAuditSeesPodsThatAreBusy: a hook or a pull that takes for ever hides nothing.
func TestAuditSeesPodsThatAreBusy(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.rt.setFault(hangs("PullImage"))
		pod := mkpod("web", "u1")
		pod.Spec.Containers = append(pod.Spec.Containers, container("b"))
		pod.Spec.Containers[1].Image = "slow:1"
		n.set(pod)
		after(5 * time.Second)
		n.rt.mu.Lock()
		subs := n.rt.subs
		n.rt.subs = nil
		n.rt.mu.Unlock()
		n.rt.exit(n.rt.live("default/web")["a"].id, 1)
		n.rt.mu.Lock()
		n.rt.subs = subs
		n.rt.mu.Unlock()
		after(2 * time.Minute)
		if n.rt.starts("default/web/a") != 2 || n.audit.take() != "runtime" {
			t.Fatalf("%d starts", n.rt.starts("default/web/a"))
		}
	})
}

// hangs makes a call take until it is cancelled.
func hangs(call string) func(context.Context, string, string) error {
	return func(ctx context.Context, what, _ string) error {
		if what != call {
			return nil
		}
		<-ctx.Done()
		return ctx.Err()
	}
}
