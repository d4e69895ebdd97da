package pods

import (
	"context"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/kubelet/status"
)

// Priorities of the classes that every cluster has, for static pods that name
// one: nobody resolves it for them (k8s.io/kubernetes/pkg/apis/scheduling).
const (
	systemCritical     = 2_000_000_000
	systemNodeCritical = systemCritical + 1000
)

// Priority of a pod: what it says, or what its class is worth everywhere.
func Priority(pod *v1.Pod) int32 {
	switch p := pod.Spec.Priority; {
	case p != nil:
		return *p
	case pod.Spec.PriorityClassName == "system-node-critical":
		return systemNodeCritical
	case pod.Spec.PriorityClassName == "system-cluster-critical":
		return systemCritical
	}
	return 0
}

// critical pods start before others where they compete.
func critical(pod *v1.Pod) bool { return Priority(pod) >= systemCritical }

// critical says whether a pod under the name is, as far as it is known.
func (w *worker) critical() bool {
	pod := w.published.Load()
	return pod != nil && critical(pod)
}

// Hold keeps pods from being begun, and those that were stopped by Terminate
// from beginning again, until it is told false: then all that should run runs.
// It returns when Pods shows all that have begun, those of the last run too, or
// when ctx ends.
func (t *Table) Hold(ctx context.Context, on bool) {
	t.held.Store(on)
	if on {
		select {
		case <-t.recovered:
			_ = t.Alive(ctx) // who was about to begin has begun
		case <-ctx.Done():
		}
		return
	}
	for _, w := range t.all() {
		w.post(func() {
			for _, l := range w.lives {
				if l.disrupted != nil || l.awaits && !l.stopped {
					w.revive(l)
				}
			}
		})
	}
}

// Terminate ends a pod that is in the way of the node's own plans and waits
// until it is down or ctx ends. Its status is Failed for the cause, with the
// condition DisruptionTarget (KEP-3329). A static pod stays down until the daemon
// starts the next time, or Hold ends; an apiserver's for good.
func (t *Table) Terminate(ctx context.Context, namespace, name string, grace time.Duration, cause status.Cause) error {
	w := t.worker(namespace, name)
	if w == nil {
		return nil // it went by itself
	}
	return w.await(ctx, func(l *life) {
		if !w.t.held.Load() {
			return // its turn comes when that is called off
		}
		if l.leaving() {
			w.stop(l, Stop{Grace: grace, Forget: true})
			return
		}
		if !l.o.Completed && !l.stopped {
			l.failed, l.disrupted = &cause, &cause
		}
		w.stop(l, Stop{Grace: grace, Reason: cause.Reason, Message: cause.Message, Failed: true})
	})
}

// undisrupt forgets why the node ended the pod.
func (l *life) undisrupt() {
	l.disrupted = nil
	l.status.Conditions = slices.DeleteFunc(slices.Clone(l.status.Conditions), func(c v1.PodCondition) bool {
		return c.Type == v1.DisruptionTarget && c.Reason == v1.PodReasonTerminationByKubelet
	})
}
