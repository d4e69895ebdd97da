package pods

import (
	"context"
	"fmt"

	v1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"

	"github.com/podd-runtime/podd/cgroups"
)

// ensureCgroup makes the pod's group, or gives it new limits.
func (w *worker) ensureCgroup(l *life) {
	pod, was := l.d.Pod, l.podActual
	l.o.Cgroup = StepUnknown
	w.async(l, Action{Kind: EnsureCgroup}, w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		limits := cgroups.ResourceConfigForPod(pod, w.t.cfg.Node.Resources)
		if was != nil { // a resize is on its way, which narrows it at its end
			limits = cgroups.Widest(limits, cgroups.ResourceConfigForPod(was, w.t.cfg.Node.Resources))
		}
		err := w.t.deps.Cgroups.Ensure(ctx, pod.UID, qos.GetPodQOS(pod), limits)
		if err != nil {
			w.t.deps.Events.Eventf(ref(pod), v1.EventTypeWarning, "FailedCreatePodContainer", "unable to ensure pod container exists: %v", err)
			return nil, fmt.Errorf("make the cgroup of pod %s: %w", pod.Name, err)
		}
		w.t.deps.Cgroups.Name(pod.UID, qos.GetPodQOS(pod), pod.Namespace+"/"+pod.Name)
		return func() { l.o.Cgroup = StepDone }, nil
	})
}

// removeCgroup kills what is left in the pod's group and removes it.
func (w *worker) removeCgroup(l *life) {
	pod := l.d.Pod
	l.o.Cgroup = StepUnknown
	w.async(l, Action{Kind: RemoveCgroup}, w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		if err := w.t.deps.Cgroups.Remove(ctx, pod.UID); err != nil {
			w.log.Warn("cgroup is not removed", "uid", pod.UID, "error", err)
			return nil, err
		}
		return func() { l.o.Cgroup = StepAbsent }, nil
	})
}
