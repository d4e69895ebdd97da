package pods

import (
	"context"
	"time"

	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
)

// audits compare the runtime with what the workers believe, now and then: two
// calls for the whole node. Events make this unnecessary; it is for the one
// that got lost.
func (t *Table) audits(ctx context.Context) {
	tick := time.NewTicker(t.cfg.Audit)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			t.audit(ctx)
		}
	}
}

func (t *Table) audit(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*t.cfg.CallTimeout)
	defer cancel()
	sandboxes, containers, err := t.listOnce(ctx)
	if err != nil {
		t.log.Warn("audit: the runtime does not answer", "error", err)
		return
	}
	ready := map[string]bool{}
	for _, s := range sandboxes {
		ready[s.Id] = s.State == runtimeapi.PodSandboxState_SANDBOX_READY
	}
	running := map[string]bool{}
	for _, c := range containers {
		running[c.Id] = c.State == runtimeapi.ContainerState_CONTAINER_RUNNING
	}
	for _, w := range t.all() {
		w.post(func() { w.check(ready, running) })
	}
	if t.settled() {
		t.orphans(ctx, sandboxes)
		t.sweep()
	}
}

// settled says that all sources have spoken: what nobody knows is an orphan.
func (t *Table) settled() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.complete()
}

// orphans are sandboxes of ours that no worker knows, because a call that was
// given up came through in the end. Those of pods that are there are looked
// at by their workers, the others end here.
func (t *Table) orphans(ctx context.Context, sandboxes []*runtimeapi.PodSandbox) {
	for _, s := range sandboxes {
		if _, ours := s.Annotations[annManaged]; !ours || t.owner(s.Id) != nil {
			continue
		}
		uid := types.UID(s.Labels[spec.LabelPodUID])
		if w := t.holder(uid); w != nil {
			w.post(w.doubt)
			continue
		}
		t.whileFree(uid, func() { t.removeOrphan(ctx, s.Id) })
	}
}

func (t *Table) removeOrphan(ctx context.Context, id string) {
	t.log.Warn("sandbox of no pod is removed", "sandbox", id)
	if _, err := t.deps.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil && !notFound(err) {
		t.log.Warn("sandbox of no pod is not stopped", "sandbox", id, "error", err)
		return
	}
	if _, err := t.deps.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil && !notFound(err) {
		t.log.Warn("sandbox of no pod is not removed", "sandbox", id, "error", err)
	}
}

// doubt what is known, unless something under way explains it.
func (w *worker) doubt() {
	if len(w.lives) > 0 && len(w.lives[0].ops) == 0 {
		w.lives[0].o.Stale = true
	}
}

// check marks a pod to be looked at when the runtime disagrees. What is being
// worked on is left for the next time.
func (w *worker) check(ready, running map[string]bool) {
	if len(w.lives) == 0 || len(w.lives[0].ops) > 0 {
		return
	}
	l := w.lives[0]
	for i := range l.o.Sandboxes {
		s := &l.o.Sandboxes[i]
		if is, there := ready[s.ID]; !there || is != s.Ready {
			l.o.Stale = true
		}
	}
	for i := range l.o.Containers {
		c := &l.o.Containers[i]
		if is, there := running[c.ID]; !there || is != (c.State == status.Running) {
			l.o.Stale = true
		}
	}
	if l.o.Stale {
		w.log.Warn("the runtime disagrees, looking again")
	}
}
