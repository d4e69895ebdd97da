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
	mu   sync.Mutex
	pods map[types.UID]*v1.Pod
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

// leaves gives the place of a pod to others.
func (a *admitted) leaves(uid types.UID) {
	a.mu.Lock()
	delete(a.pods, uid)
	a.mu.Unlock()
}

// keeps the place of a pod that was there before.
func (a *admitted) keeps(pod *v1.Pod) {
	a.mu.Lock()
	a.pods[pod.UID] = pod
	a.mu.Unlock()
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
