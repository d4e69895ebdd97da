package pods

import (
	"sync"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/kubelet/admission"
	"github.com/podd-runtime/podd/kubelet/status"
)

// admitted are the pods that have a place on the node. Which pods there are
// and whether one more fits is decided for one pod after the other: mu is held
// over the decision, which is a computation and waits for nobody.
type admitted struct {
	mu sync.Mutex
	// pods as they are counted: with what they have been allocated or, while a
	// resize is under way, with the greater of that and what they still have.
	pods map[types.UID]*v1.Pod
	// deferred are resizes that wait for what others leave.
	deferred map[types.UID]*worker
}

// place decides on a pod that begins; a reason says why there is no place for
// it. Once it has a place it is never asked about again: a daemon that restarts
// finds it among its records.
func (w *worker) place(l *life) (reason, message string) {
	v := w.t.decide(l.d.Pod)
	for _, uid := range v.Preempt {
		if o := w.t.holder(uid); o != nil {
			o.post(func() { o.preempt(uid) })
		}
	}
	return v.Reason, v.Message
}

// decide on a pod, and give it its place if it gets one.
func (t *Table) decide(pod *v1.Pod) (v admission.Verdict) {
	a := &t.admitted
	a.mu.Lock()
	defer a.mu.Unlock()
	if t.deps.Admit != nil {
		others := make([]*v1.Pod, 0, len(a.pods))
		for _, o := range a.pods {
			others = append(others, o)
		}
		if v = t.deps.Admit(pod, others); v.Reason != "" {
			return admission.Verdict{Reason: v.Reason, Message: v.Message}
		}
		for _, uid := range v.Preempt {
			delete(a.pods, uid)
		}
	}
	a.pods[pod.UID] = pod
	return v
}

// leaves gives the place of a pod to others; resizes that wait for one are tried
// again.
func (a *admitted) leaves(uid types.UID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.deferred, uid)
	delete(a.pods, uid)
	a.retry()
}

// settled says that a pod has no resize that waits.
func (a *admitted) settled(uid types.UID) {
	a.mu.Lock()
	delete(a.deferred, uid)
	a.mu.Unlock()
}

// keeps the place of a pod that was there before, and counts it as pod from now
// on.
func (a *admitted) keeps(pod *v1.Pod) {
	a.mu.Lock()
	defer a.mu.Unlock()
	was := a.pods[pod.UID]
	a.pods[pod.UID] = pod
	if was != nil && was != pod {
		a.retry() // it may need less
	}
}

// retry the resizes that wait; a.mu is held.
func (a *admitted) retry() {
	for uid, w := range a.deferred {
		w.post(func() { w.reallocate(uid) })
	}
}

// resize the place of a pod to what it will have, if the node has that beside
// the others; counted is what it takes until it has. One resize after the other
// is decided on, as pods are that begin.
func (a *admitted) resize(w *worker, pod, counted *v1.Pod, allocatable v1.ResourceList) (reason, message string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	reason, message = fits(pod, a.pods, allocatable)
	switch reason {
	case "":
		a.pods[pod.UID] = counted
		delete(a.deferred, pod.UID)
	case v1.PodReasonDeferred:
		a.deferred[pod.UID] = w
	default:
		delete(a.deferred, pod.UID)
	}
	return reason, message
}

// preempt a pod for one that must run.
func (w *worker) preempt(uid types.UID) {
	const reason, message = "Preempting", "Preempted in order to admit critical pod"
	for _, l := range w.lives {
		if l.d.Pod.UID == uid && !l.leaving() && !status.Over(l.status.Phase) {
			w.event(l, "", v1.EventTypeWarning, reason, message)
			w.fail(l, reason, message, podGrace(l.d.Pod))
		}
	}
}
