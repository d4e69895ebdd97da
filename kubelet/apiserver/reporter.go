package apiserver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/podd-runtime/podd/kubelet/manifests"
)

// calm is how long a status that says no more than that a pod is being started
// waits for one that says more: most pods run before that, and a request each
// is saved when many start at once.
const calm = time.Second

// report is one pod of the table on its way to the apiserver; guarded by
// Pods.mu.
type report struct {
	shown *v1.Pod // as the table has it
	gone  bool    // nothing of it is left on the node
	// dirty: something has changed since the last look. busy: a goroutine looks.
	dirty, busy bool
	news        chan struct{} // a token: something has changed
	failures    int
}

// report follows the table until ctx ends.
func (p *Pods) report(ctx context.Context) {
	for ev := range p.cfg.Table.Watch(ctx, "") {
		pod, ok := ev.Object.(*v1.Pod)
		if !ok {
			continue
		}
		p.mu.Lock()
		r := p.reports[pod.UID]
		if r == nil {
			r = &report{news: make(chan struct{}, 1)}
			p.reports[pod.UID] = r
		}
		r.shown, r.gone = pod, ev.Type == watch.Deleted
		back := false
		if f := p.known[pod.UID]; f != nil {
			back = f.ended && !r.gone
			f.ended = r.gone
		}
		gone := r.gone
		p.mu.Unlock()
		switch {
		case gone:
			p.forgetUses(pod.UID)
		case back:
			p.use(pod.UID)
			p.tell(pod.UID) // that it is being deleted may have been kept from it
		}
		p.kick(ctx, pod.UID)
	}
}

// kick has the pod looked at, soon. It does not wait.
func (p *Pods) kick(ctx context.Context, uid types.UID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.reports[uid]
	if r == nil || ctx.Err() != nil {
		return
	}
	r.dirty = true
	select {
	case r.news <- struct{}{}:
	default:
	}
	if r.busy {
		return
	}
	r.busy = true
	p.work.Go(func() { p.settle(ctx, uid, r) })
}

// kickStatic has all static pods looked at, and mirror pods without one.
func (p *Pods) kickStatic(ctx context.Context) {
	p.mu.Lock()
	var all []types.UID
	for uid, r := range p.reports {
		if r.shown != nil && r.shown.Annotations[manifests.ConfigSourceAnnotation] != SourceName {
			all = append(all, uid)
		}
	}
	mirrors := slices.Collect(maps.Values(p.mirrors))
	p.mu.Unlock()
	for _, uid := range all {
		p.kick(ctx, uid)
	}
	for _, m := range mirrors {
		p.checkOrphan(ctx, m)
	}
}

// checkOrphan has a mirror pod deleted that stands for no static pod, as often
// as it takes.
func (p *Pods) checkOrphan(ctx context.Context, mirror *v1.Pod) {
	if !isMirror(mirror) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.orphans[mirror.UID] || !p.orphan(mirror) || ctx.Err() != nil {
		return
	}
	p.orphans[mirror.UID] = true
	p.work.Go(func() {
		for failures := 1; ; failures++ {
			p.mu.Lock()
			if f := p.known[mirror.UID]; f == nil || !p.orphan(f.pod) || ctx.Err() != nil {
				delete(p.orphans, mirror.UID)
				p.mu.Unlock()
				return
			}
			p.mu.Unlock()
			if err := p.removeMirror(ctx, mirror); err != nil && ctx.Err() == nil && (failures == 1 || failures%10 == 0) {
				p.log.Warn("mirror pod of no static pod is not deleted", "pod", name(mirror).String(), "failures", failures, "error", err)
			}
			sleep(ctx, Backoff(failures, 200*time.Millisecond, 10*time.Second))
		}
	})
}

// orphan says that a mirror pod stands for no static pod, nor for one that the
// table still shows. p.mu is held.
func (p *Pods) orphan(mirror *v1.Pod) bool {
	if !p.synced || !p.staticSynced {
		return false
	}
	if _, have := p.static[name(mirror)]; have {
		return false
	}
	for _, r := range p.reports {
		if r.shown != nil && !r.gone && name(r.shown) == name(mirror) && r.shown.Annotations[manifests.ConfigSourceAnnotation] != SourceName {
			return false
		}
	}
	return true
}

// settle brings the apiserver to what the table shows, until it agrees.
func (p *Pods) settle(ctx context.Context, uid types.UID, r *report) {
	for {
		p.mu.Lock()
		if !r.dirty || ctx.Err() != nil {
			r.busy = false
			p.spent(uid)
			p.mu.Unlock()
			return
		}
		if !r.gone && r.failures == 0 && starting(r.shown) && p.unreported(uid) {
			p.mu.Unlock()
			p.await(ctx, r)
			p.mu.Lock()
		}
		r.dirty = false
		shown, gone := r.shown, r.gone
		p.mu.Unlock()

		err := p.bring(ctx, shown, gone)
		p.mu.Lock()
		if err == nil {
			r.failures = 0
			p.mu.Unlock()
			continue
		}
		r.failures++
		r.dirty = true
		failures := r.failures
		p.mu.Unlock()
		if failures == 1 && !early(err) || failures%10 == 0 {
			p.log.Warn("pod is not reported to the apiserver", "pod", name(shown).String(), "failures", failures, "error", err)
		}
		sleep(ctx, Backoff(failures, 200*time.Millisecond, 10*time.Second))
	}
}

// spent reports are those of what is gone here and there. While the apiserver
// has the pod, for somebody's finalizer, it may have to be deleted once more; and
// one of the apiserver's that ended before its first list is in that. p.mu is held.
func (p *Pods) spent(uid types.UID) {
	r := p.reports[uid]
	if r == nil || !r.gone || r.busy || p.known[uid] != nil {
		return
	}
	if p.synced || r.shown.Annotations[manifests.ConfigSourceAnnotation] != SourceName {
		delete(p.reports, uid)
	}
}

// over says that nothing of a pod is left here. p.mu is held.
func (p *Pods) over(uid types.UID) bool {
	r := p.reports[uid]
	return r != nil && r.gone
}

// unreported: the apiserver has the pod and knows no status of it. p.mu is held.
func (p *Pods) unreported(uid types.UID) bool {
	f := p.known[uid]
	return f != nil && f.pod.Status.StartTime == nil
}

// early says that the apiserver has only just begun and lacks what it makes
// itself in its first seconds: the priority classes of the system, and its
// namespaces. That is waited for without a word, until it has failed ten times.
func early(err error) bool {
	return apierrors.IsForbidden(err) && strings.Contains(err.Error(), "no PriorityClass with name") || errors.Is(err, errNoNamespace)
}

// await something that is worth a request, at most for calm.
func (p *Pods) await(ctx context.Context, r *report) {
	t := time.NewTimer(calm)
	defer t.Stop()
	for {
		p.mu.Lock()
		more := r.gone || !starting(r.shown)
		p.mu.Unlock()
		if more {
			return
		}
		select {
		case <-r.news:
		case <-t.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// starting says that the status says nothing but that the pod is begun.
func starting(pod *v1.Pod) bool {
	if pod.Status.Phase != v1.PodPending || pod.DeletionTimestamp != nil {
		return false
	}
	for _, list := range [][]v1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
		for i := range list {
			w := list[i].State.Waiting
			if w == nil || w.Reason != "" && w.Reason != "ContainerCreating" && w.Reason != "PodInitializing" {
				return false
			}
		}
	}
	return true
}

// bring one pod's state to the apiserver.
func (p *Pods) bring(ctx context.Context, shown *v1.Pod, gone bool) error {
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if unseen(shown) && !gone {
		return nil // it will be seen
	}
	if shown.Annotations[manifests.ConfigSourceAnnotation] != SourceName {
		return p.bringMirror(ctx, shown, gone)
	}
	base := p.version(shown.UID)
	if base == nil {
		return nil // the apiserver has it no more
	}
	if err := p.patch(ctx, base, shown); err != nil {
		return err
	}
	// The answer may have told that it is being deleted.
	if base = p.version(shown.UID); gone && base != nil && base.DeletionTimestamp != nil {
		return p.remove(ctx, base)
	}
	return nil
}

// version of a pod that the apiserver told last; nil without one.
func (p *Pods) version(uid types.UID) *v1.Pod {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f := p.known[uid]; f != nil {
		return f.pod
	}
	return nil
}

// unseen says that a status is from a record: what was told since may be ahead
// of it, and a status never goes back.
func unseen(shown *v1.Pod) bool { return shown.Annotations[manifests.UnseenAnnotation] != "" }

// patch the status of base with what shown says.
func (p *Pods) patch(ctx context.Context, base, shown *v1.Pod) error {
	if unseen(shown) {
		return nil
	}
	patch, err := statusPatch(base, shown)
	if err != nil || patch == nil {
		return err
	}
	err = p.write(ctx, func(is *v1.Pod) error {
		return p.cfg.Client.Patch(ctx, Ref{Resource: "pods", Namespace: base.Namespace, Name: base.Name, Subresource: "status"}, patch, is)
	})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // it is gone, or another one: the watch tells
	}
	if err != nil {
		return fmt.Errorf("patch status of pod %s: %w", name(base), err)
	}
	return nil
}

// remove a pod at the apiserver: nothing of it is left here.
func (p *Pods) remove(ctx context.Context, pod *v1.Pod) error {
	err := p.cfg.Client.Delete(ctx, Ref{Resource: "pods", Namespace: pod.Namespace, Name: pod.Name}, pod.UID)
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("delete pod %s: %w", name(pod), err)
	}
	return nil
}
