package pods

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
)

// recover finds the pods of the last run: what the runtime has of them, and
// what their records say besides. They are held as they are until a source
// speaks for them or all sources have spoken.
func (t *Table) recover(ctx context.Context) error {
	recs, err := t.records.load()
	if err != nil {
		return err
	}
	sandboxes, containers, err := t.list(ctx)
	if err != nil {
		return err
	}
	dirs, err := t.deps.Volumes.Pods()
	if err != nil {
		// Without them user ids that are in use would be given away once more.
		return fmt.Errorf("see which pods have a directory: %w", err)
	}
	for _, problem := range t.userns.recover(dirs) {
		t.log.Error("pod's user ids are not known", "error", problem)
	}
	mine := map[types.UID][]*runtimeapi.PodSandbox{}
	for _, s := range sandboxes {
		uid := types.UID(s.Labels[spec.LabelPodUID])
		if _, ours := s.Annotations[annManaged]; ours && uid != "" {
			mine[uid] = append(mine[uid], s)
		}
	}
	within := map[string][]*runtimeapi.Container{}
	for _, c := range containers {
		within[c.PodSandboxId] = append(within[c.PodSandboxId], c)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for uid, list := range mine {
		var in []*runtimeapi.Container
		for _, s := range list {
			in = append(in, within[s.Id]...)
		}
		t.recoverPod(uid, recs[uid], list, in)
		delete(recs, uid)
	}
	for uid, r := range recs {
		if r.again() {
			t.records.save(uid, nil)
			continue
		}
		t.recoverPod(uid, r, nil, nil)
	}
	for _, w := range t.index.workers {
		// What is to be gone goes first; of the rest the one begun last stays.
		// Clocks are set back, so that a start alone tells little.
		slices.SortStableFunc(w.lives, func(a, b *life) int {
			return cmp.Or(-cmp.Compare(truth(a.leaving()), truth(b.leaving())), a.o.Started.Compare(b.o.Started))
		})
		for _, l := range w.lives[:len(w.lives)-1] {
			l.d.Held = false
			if !l.leaving() {
				l.d.Stop = &Stop{Since: time.Now(), Grace: podGrace(l.d.Pod), Forget: true}
			}
		}
	}
	return nil
}

func truth(b bool) int {
	if b {
		return 1
	}
	return 0
}

// list all that the runtime has, as long as it takes: without it nothing that
// runs already would be known, and everything would be started once more.
func (t *Table) list(ctx context.Context) ([]*runtimeapi.PodSandbox, []*runtimeapi.Container, error) {
	for n := 1; ; n++ {
		s, c, err := t.listOnce(ctx)
		if err == nil {
			return s, c, nil
		}
		t.log.Warn("the runtime cannot say what runs, trying again", "error", err)
		select {
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-time.After(retryDelay(n)):
		}
	}
}

func (t *Table) listOnce(ctx context.Context) ([]*runtimeapi.PodSandbox, []*runtimeapi.Container, error) {
	ctx, cancel := context.WithTimeout(ctx, t.cfg.CallTimeout)
	defer cancel()
	sandboxes, err := t.deps.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, nil, fmt.Errorf("list sandboxes: %w", err)
	}
	containers, err := t.deps.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, nil, fmt.Errorf("list containers: %w", err)
	}
	return sandboxes.Items, containers.Containers, nil
}

// recoverPod makes the life of one pod anew; t.mu is held. Its worker asks
// for the details, all pods' side by side.
func (t *Table) recoverPod(uid types.UID, r *record, sandboxes []*runtimeapi.PodSandbox, containers []*runtimeapi.Container) {
	bare := r == nil
	lenient := r == nil || r.Build != t.cfg.Build
	if r == nil {
		r = t.skeleton(uid, sandboxes[0], containers)
	}
	r.rebase(time.Now())
	key := types.NamespacedName{Namespace: r.Pod.Namespace, Name: r.Pod.Name}
	w := t.index.workers[key]
	if w == nil {
		w = t.newWorker(key)
	}
	t.index.uids[uid] = w
	for _, s := range sandboxes {
		t.index.ids[s.Id] = w
	}
	for _, c := range containers {
		t.index.ids[c.Id] = w
	}
	l := newLife(r.Source, r.Pod)
	l.d.Held, l.o.Stale, l.unseen, l.lenient = true, true, true, lenient
	l.d.Stop = r.Stop
	l.o.Started, l.o.Completed, l.stopped = r.Started, r.Completed, r.Stopped
	l.status = r.Status
	l.o.Completed = l.o.Completed || l.final()
	if l.d.Stop != nil && !l.d.Stop.Forget && !l.stopped && !l.o.Completed {
		// StopAll and Terminate last until the daemon starts again, or until the
		// shutdown that it starts in is called off.
		l.awaits = true
		w.revive(l)
	}
	l.o.Cgroup, l.o.Volumes = StepUnknown, StepUnknown
	maps.Copy(l.attempts, r.Attempts)
	maps.Copy(l.o.Backoffs, r.Backoffs)
	maps.Copy(l.o.Ended, r.Ended)
	maps.Copy(l.restored, r.Probes)
	l.starting, l.bare = r.Starting, bare
	maps.Copy(l.applied, r.Applied)
	l.sandboxPod = r.SandboxPod
	if r.PodActual != nil || len(r.Actual) > 0 {
		l.o.Resize, l.podActual = StepUnknown, r.PodActual
		maps.Copy(l.o.Actual, r.Actual)
		if _, c := podutil.GetPodCondition(&r.Status, v1.PodResizeInProgress); c != nil {
			l.progress = &status.Resize{Reason: c.Reason, Message: c.Message, Generation: c.ObservedGeneration}
		}
	}
	w.lives = append(w.lives, l)
	if !l.o.Completed {
		t.admitted.keeps(l.counted())
	}
}

// meet is the first look at a pod of the last run.
func (w *worker) meet(l *life) {
	l.unseen = false
	if len(l.applied) > 0 || l.sandboxPod != nil {
		w.compare(l, l.d.Pod, l.lenient)
	}
	if heard := l.heard; heard != nil {
		l.heard = nil
		w.set(heard.source, heard.pod)
	}
}

// skeleton is what the runtime alone can tell of a pod whose record is lost:
// enough to show it, and to end it well.
func (t *Table) skeleton(uid types.UID, s *runtimeapi.PodSandbox, containers []*runtimeapi.Container) *record {
	pod := &v1.Pod{ObjectMeta: metav1.ObjectMeta{
		Name: s.GetMetadata().GetName(), Namespace: s.GetMetadata().GetNamespace(), UID: uid,
		Annotations: s.Annotations, Labels: map[string]string{},
	}}
	for k, v := range s.Labels {
		if k != spec.LabelPodName && k != spec.LabelPodNamespace && k != spec.LabelPodUID {
			pod.Labels[k] = v
		}
	}
	seen := map[string]bool{}
	for _, c := range containers {
		name := c.Labels[spec.LabelContainerName]
		if seen[name] || name == "" {
			continue
		}
		seen[name] = true
		vc := v1.Container{Name: name, Image: c.GetImage().GetUserSpecifiedImage(),
			TerminationMessagePath:   c.Annotations[spec.AnnTerminationMessagePath],
			TerminationMessagePolicy: v1.TerminationMessagePolicy(c.Annotations[spec.AnnTerminationMessagePolicy])}
		if raw := c.Annotations[spec.AnnPreStopHandler]; raw != "" {
			h := &v1.LifecycleHandler{}
			if json.Unmarshal([]byte(raw), h) == nil {
				vc.Lifecycle = &v1.Lifecycle{PreStop: h}
			}
		}
		_ = json.Unmarshal([]byte(c.Annotations[spec.AnnPorts]), &vc.Ports)
		if g, err := strconv.ParseInt(c.Annotations[spec.AnnTerminationGracePeriod], 10, 64); err == nil {
			pod.Spec.TerminationGracePeriodSeconds = &g
		}
		pod.Spec.Containers = append(pod.Spec.Containers, vc)
	}
	if len(pod.Spec.Containers) == 0 {
		pod.Spec.Containers = []v1.Container{{Name: "unknown"}}
	}
	t.log.Warn("pod has no record, it is known by what the runtime says", "pod", pod.Namespace+"/"+pod.Name, "uid", uid)
	return &record{Version: recordVersion, Source: s.Annotations[annManaged], Pod: pod, Started: time.Unix(0, s.CreatedAt)}
}

// sweep removes what is left of pods that nobody knows: directories with their
// logs, cgroups and log links. Logs alone may be those of somebody else who
// shares the log directory; whoever shares the root directory is a mistake.
func (t *Table) sweep() {
	ctx, cancel := context.WithTimeout(t.ctx, 5*t.cfg.CallTimeout)
	defer cancel()
	if dirs, err := t.deps.Volumes.Pods(); err == nil {
		t.sweepUIDs(dirs, "directory", func(uid types.UID) error {
			t.sweepLogs(uid)
			err := t.deps.Volumes.Teardown(ctx, uid)
			if err == nil {
				t.userns.release(uid)
			}
			return err
		})
	}
	if groups, err := t.deps.Cgroups.List(); err == nil {
		t.sweepUIDs(groups, "cgroup", func(uid types.UID) error { return t.deps.Cgroups.Remove(ctx, uid) })
	}
	t.sweepLinks()
}

func (t *Table) sweepUIDs(uids []types.UID, what string, remove func(types.UID) error) {
	for _, uid := range uids {
		t.whileFree(uid, func() {
			if err := remove(uid); err != nil {
				t.log.Warn(what+" of an unknown pod is not removed", "uid", uid, "error", err)
			} else {
				t.log.Info(what+" of an unknown pod removed", "uid", uid)
			}
		})
	}
}

// whileFree does f when no pod has the UID, and keeps pods from taking it
// until f is done.
func (t *Table) whileFree(uid types.UID, f func()) {
	t.mu.Lock()
	taken := t.index.uids[uid] != nil
	if !taken {
		t.index.uids[uid] = t.sweeper
	}
	t.mu.Unlock()
	if !taken {
		defer t.release(uid)
		f()
	}
}

// sweepLogs removes the logs of a pod of which only the UID is known.
func (t *Table) sweepLogs(uid types.UID) {
	entries, err := os.ReadDir(t.cfg.Node.PodLogsDir)
	if err != nil {
		return
	}
	for _, e := range entries {
		// No part of it has an underscore: names are DNS labels.
		if p := strings.Split(e.Name(), "_"); len(p) == 3 && p[2] == string(uid) {
			t.removeLogs(p[0], p[1], uid)
		}
	}
}

// sweepLinks removes log links that lead nowhere.
func (t *Table) sweepLinks() {
	links, _ := filepath.Glob(filepath.Join(filepath.Dir(t.cfg.Node.PodLogsDir), "containers", "*.log"))
	for _, l := range links {
		if _, err := os.Stat(l); os.IsNotExist(err) {
			os.Remove(l)
		}
	}
}
