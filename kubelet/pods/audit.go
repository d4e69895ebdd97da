package pods

import (
	"context"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
)

// audits compare now and then what each part believes: the sources and the
// workers, the workers and the runtime, the places on the node and who has them.
// It costs two calls for the whole node. Events and orders make it unnecessary; it
// is for what got lost, and what it finds is counted, since that is a fault.
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
	settled := t.settled()
	if settled {
		t.auditSources()
		t.auditPlaces()
	}
	sandboxes, suspects, err := t.auditRuntime(ctx)
	if err == nil && suspects {
		select {
		case <-ctx.Done():
			return
		case <-time.After(confirmAfter):
		}
		sandboxes, _, err = t.auditRuntime(ctx)
	}
	if err != nil {
		t.log.Warn("audit: the runtime does not answer", "error", err)
		return
	}
	if settled {
		t.orphans(ctx, sandboxes)
		t.sweep()
	}
}

// confirmAfter is how long an event may be on its way: only who disagrees for
// longer has lost one.
const confirmAfter = 5 * time.Second

// auditRuntime has each worker compare what it knows with what the runtime has.
// suspects: one of them disagrees, perhaps not for long.
func (t *Table) auditRuntime(ctx context.Context) (sandboxes []*runtimeapi.PodSandbox, suspects bool, err error) {
	sandboxes, containers, err := t.listOnce(ctx)
	if err != nil {
		return nil, false, err
	}
	ready := map[string]bool{}
	for _, s := range sandboxes {
		ready[s.Id] = s.State == runtimeapi.PodSandboxState_SANDBOX_READY
	}
	running := map[string]bool{}
	for _, c := range containers {
		running[c.Id] = c.State == runtimeapi.ContainerState_CONTAINER_RUNNING
	}
	all := t.all()
	answers := make([]chan bool, len(all))
	for i, w := range all {
		answers[i] = make(chan bool, 1)
		w.post(func() { answers[i] <- w.check(ready, running) })
	}
	for i, w := range all {
		select {
		case s := <-answers[i]:
			suspects = suspects || s
		case <-w.ended:
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
	}
	return sandboxes, suspects, nil
}

// auditSources has each worker compare what was said last under its name with
// what its pod was told. Orders and this question come by the same way, so that
// one follows the other.
func (t *Table) auditSources() {
	t.mu.Lock()
	for key, w := range t.index.workers {
		said, have := t.words[key]
		w.post(func() { w.compareWord(said, have) })
	}
	var lost []pending
	for key, said := range t.words {
		if t.index.workers[key] == nil && said.pod.DeletionTimestamp == nil {
			lost = append(lost, said)
		}
	}
	t.mu.Unlock()
	for _, said := range lost {
		t.log.Error("audit: nobody looks after a pod that a source has, it is told again", "uid", said.pod.UID, "source", said.source)
		t.healed("source")
		t.SetPod(said.source, said.pod)
	}
}

// auditPlaces takes back places on the node of pods that are not there.
func (t *Table) auditPlaces() {
	t.admitted.mu.Lock()
	var uids []types.UID
	for uid := range t.admitted.pods {
		uids = append(uids, uid)
	}
	t.admitted.mu.Unlock()
	for _, uid := range uids {
		if t.holder(uid) == nil {
			t.log.Error("audit: a place on the node is nobody's, it is given back", "uid", uid)
			t.healed("place")
			t.admitted.leaves(uid)
		}
	}
}

func (t *Table) healed(what string) {
	if t.cfg.Observer != nil {
		t.cfg.Observer.Healed(what)
	}
}

// compareWord of the source with what was told; without a word there is to be no
// pod.
func (w *worker) compareWord(said pending, have bool) {
	l := w.last()
	switch {
	case have && !w.heard(said.pod):
		w.log.Error("audit: what the source said was lost, it is told again", "uid", said.pod.UID, "source", said.source)
		w.t.healed("source")
		w.set(said.source, said.pod)
	case have:
	case w.next != nil:
		w.log.Error("audit: a pod waits that its source has no more", "uid", w.next.pod.UID, "source", w.next.source)
		w.t.healed("source")
		w.next = nil
	case l != nil && !l.leaving():
		w.log.Error("audit: a pod is of no source any more, it is removed", "uid", l.d.Pod.UID, "source", l.source)
		w.t.healed("source")
		w.leave(l, "")
	}
}

// heard says that what was said last of a pod is what it was told, or will be
// when its turn comes, or is over with.
func (w *worker) heard(pod *v1.Pod) bool {
	if w.next != nil {
		return w.next.pod == pod
	}
	going := pod.DeletionTimestamp != nil
	l := w.last()
	if l == nil || l.d.Pod.UID != pod.UID {
		return going
	}
	return l.word == pod && !l.d.Held && l.leaving() == going
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
	if len(w.lives) > 0 && !w.lives[0].doing("sandbox", "observe") {
		w.lives[0].o.Stale = true
	}
}

// doing says that one of these is under way.
func (l *life) doing(keys ...string) bool {
	return slices.ContainsFunc(keys, func(key string) bool { return l.ops[key] != nil })
}

// check has a pod looked at about which the runtime disagrees for the second
// time, and says whether it disagrees at all. What is being worked on is left for
// the next time.
func (w *worker) check(ready, running map[string]bool) bool {
	if len(w.lives) == 0 || w.lives[0].doing("observe") {
		return false
	}
	l := w.lives[0]
	suspects := map[string]bool{}
	for i := range l.o.Sandboxes {
		s := &l.o.Sandboxes[i]
		if is, there := ready[s.ID]; (!there || is != s.Ready) && !l.doing("sandbox", "remove/"+s.ID) {
			suspects[s.ID] = true
		}
	}
	for i := range l.o.Containers {
		c := &l.o.Containers[i]
		if is, there := running[c.ID]; (!there || is != (c.State == status.Running)) &&
			!l.doing("start/"+c.Name, "stop/"+c.ID, "remove/"+c.ID, "refresh/"+c.ID, "remove/"+c.Sandbox) {
			suspects[c.ID] = true
		}
	}
	for id := range suspects {
		if l.suspects[id] {
			w.log.Error("audit: the runtime disagrees, looking again", "id", id)
			w.t.healed("runtime")
			l.o.Stale = true
			suspects = nil
			break
		}
	}
	l.suspects = suspects
	return len(suspects) > 0
}
