package pods

import (
	"context"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/kubelet/eviction"
	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
)

func ref(pod *v1.Pod) *v1.ObjectReference { return spec.Ref(pod, "") }

// setupVolumes makes all volumes of the pod.
func (w *worker) setupVolumes(l *life) {
	pod, news := l.d.Pod, l.news
	l.o.Volumes = StepUnknown
	// No deadline of its own: foreign file systems have theirs, inside.
	w.async(l, Action{Kind: SetupVolumes}, 2*w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		if err := w.t.deps.Volumes.Setup(ctx, pod); err != nil {
			if ctx.Err() == nil {
				w.t.deps.Events.Eventf(ref(pod), v1.EventTypeWarning, "FailedMount", "%v", err)
			}
			return nil, err
		}
		return func() {
			l.o.Volumes = StepDone
			l.refreshed(news)
		}, nil
	})
}

// teardownVolumes unmounts and deletes all of the pod's directory.
func (w *worker) teardownVolumes(l *life) {
	pod := l.d.Pod
	l.o.Volumes = StepUnknown
	w.async(l, Action{Kind: Teardown}, 2*w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		if err := w.t.deps.Volumes.Teardown(ctx, pod.UID); err != nil {
			w.log.Warn("volumes are not torn down", "uid", pod.UID, "error", err)
			return nil, err
		}
		w.t.userns.release(pod.UID)
		return func() { l.o.Volumes = StepAbsent }, nil
	})
}

// abortVolumes ends what waits for volumes that do not answer; again after a
// while, should it not have been enough.
func (w *worker) abortVolumes(l *life) {
	uid := l.d.Pod.UID
	a := Action{Kind: Abort}
	w.async(l, a, w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		if err := w.t.deps.Volumes.Abort(ctx, uid); err != nil {
			return nil, err
		}
		return func() { l.o.Retry[a.key()] = time.Now().Add(stuckAfter) }, nil
	})
}

// refreshVolumes has the pod's volumes brought to what it and its ConfigMaps and
// Secrets say now. It is kept in mind until that is done: volumes that are being
// made may have been made of what was before.
func (w *worker) refreshVolumes(l *life) {
	l.o.Outdated = true
	l.news++
	// What waits for its next try need not wait longer.
	delete(l.o.Retry, Action{Kind: SetupVolumes}.key())
	delete(l.o.Retry, Action{Kind: Refresh}.key())
}

// runRefresh brings the volumes to what is known now. There is one at a time, so
// that the last one wins, and one that fails is tried again.
func (w *worker) runRefresh(l *life) {
	pod, news := l.d.Pod, l.news
	w.async(l, Action{Kind: Refresh}, w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		if err := w.t.deps.Volumes.Refresh(ctx, pod); err != nil {
			if ctx.Err() == nil {
				w.t.deps.Events.Eventf(ref(pod), v1.EventTypeWarning, "FailedMount", "%v", err)
			}
			return nil, err
		}
		return func() { l.refreshed(news) }, nil
	})
}

// refreshed says that the volumes hold what was known at that news.
func (l *life) refreshed(news int) {
	if l.news == news {
		l.o.Outdated = false
	}
}

// Evict a pod that takes more of the node's storage than it may: it fails, with
// upstream's reason and status. Critical pods are left alone, as upstream does.
func (t *Table) Evict(uid types.UID, message string) {
	w := t.holder(uid)
	if w == nil {
		return
	}
	w.post(func() {
		for _, l := range w.lives {
			if l.d.Pod.UID != uid || l.leaving() || l.d.Stop != nil || status.Over(l.status.Phase) {
				continue
			}
			if critical(l.d.Pod) {
				w.log.Warn("a critical pod is not evicted", "uid", uid, "message", message)
				continue
			}
			w.event(l, "", v1.EventTypeWarning, eviction.Reason, "%s", message)
			w.log.Info("pod is evicted", "uid", uid, "message", message)
			w.fail(l, eviction.Reason, message, eviction.Grace)
		}
	})
}

// VolumesTroubled tells which volumes of a pod do not answer, in words; none:
// all do. It shows in the pod's conditions, and each change is an event.
func (t *Table) VolumesTroubled(uid types.UID, troubles []string) {
	for _, w := range t.all() {
		w.post(func() {
			for _, l := range w.lives {
				if l.d.Pod.UID == uid {
					w.volumesTroubled(l, troubles)
				}
			}
		})
	}
}

func (w *worker) volumesTroubled(l *life, troubles []string) {
	events := w.t.deps.Events
	for _, t := range troubles {
		if !slices.Contains(l.troubles, t) {
			events.Eventf(ref(l.d.Pod), v1.EventTypeWarning, "VolumeConditionAbnormal", "%s", t)
		}
	}
	if len(troubles) == 0 && len(l.troubles) > 0 {
		events.Eventf(ref(l.d.Pod), v1.EventTypeNormal, "VolumeConditionNormal", "all volumes answer again")
	}
	l.troubles = troubles
}
