package pods

import (
	"maps"
	"os"
	"path/filepath"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
	"github.com/podd-runtime/podd/probes"
)

// set takes a pod of this name from a source.
func (w *worker) set(source string, pod *v1.Pod) {
	l := w.last()
	if l != nil && l.d.Pod.UID == pod.UID && pod.DeletionTimestamp != nil {
		w.delete(l, source, pod)
		return
	}
	if l != nil && l.d.Pod.UID == pod.UID {
		w.takeBack(l)
	}
	if l == nil || l.d.Pod.UID != pod.UID || l.leaving() || !l.bare && qos.ComputePodQOS(l.d.Pod) != qos.ComputePodQOS(pod) {
		// Another pod, or the same one after it was told to go, or in another
		// place of the cgroup tree: when all before it is gone.
		w.next = &pending{source: source, pod: pod}
		if l != nil && !l.leaving() {
			w.leave(l, "")
		}
		return
	}
	w.next = nil
	l.source, l.word = source, pod
	l.d.Held = false
	if l.unseen {
		l.heard = &pending{source: source, pod: pod}
		return
	}
	if l.bare {
		w.recognize(l, pod)
	}
	was := l.d.Pod
	// Its resources are what it has been allocated, until the node has agreed
	// to others.
	l.asked = pod
	pod = withResources(pod, was)
	if sameRevision(was, pod) || !differ(&was.Spec, &pod.Spec, l.lenient) {
		l.d.Pod = pod
		if l.lenient {
			w.reprobe(l)
		}
	} else {
		w.change(l, pod)
	}
	l.lenient = false
	if !maps.Equal(was.Labels, pod.Labels) || !maps.Equal(was.Annotations, pod.Annotations) {
		w.refreshVolumes(l) // of the downward API
	}
	w.allocate(l)
	if fromAPI(pod) && status.Over(pod.Status.Phase) && !l.final() {
		w.finish(l, &pod.Status)
	}
}

// takeBack the order to go, when an apiserver has the pod after all: it was
// restored from a backup, or its list came from a cache that was behind. One that
// is over by now goes, and comes back as one that is over.
func (w *worker) takeBack(l *life) {
	if !l.leaving() || !fromAPI(l.d.Pod) || l.final() || w.t.held.Load() {
		return
	}
	w.log.Info("pod is there again before it was gone", "uid", l.d.Pod.UID)
	l.d.Stop = nil
	w.revive(l)
}

// final says that nothing of the pod is started any more: an apiserver's pods
// never leave a terminal phase, whoever said it first, since others have taken
// their place by then.
func (l *life) final() bool {
	return fromAPI(l.d.Pod) && (status.Over(l.status.Phase) || l.failed != nil)
}

// finish a pod that its apiserver says is over.
func (w *worker) finish(l *life, st *v1.PodStatus) {
	w.log.Info("pod is over by its apiserver's word", "uid", l.d.Pod.UID, "phase", st.Phase, "reason", st.Reason)
	if st.Phase == v1.PodFailed { // told when nothing of it can run any more
		l.failed = &status.Cause{Reason: st.Reason, Message: st.Message}
		l.o.Completed = true
		w.t.admitted.leaves(l.d.Pod.UID)
	} else {
		w.conclude(l, st)
	}
	w.stop(l, Stop{Grace: podGrace(l.d.Pod), Reason: st.Reason, Message: st.Message, Failed: true})
}

// recognize a pod that is known by what the runtime says alone: it is what its
// source says, but for containers of another image. All else of what the runtime
// tells is no spec to compare with.
func (w *worker) recognize(l *life, pod *v1.Pod) {
	l.inherit(pod)
	for i := range l.o.Containers {
		name := l.o.Containers[i].Name
		was, is := spec.Container(l.d.Pod, name), spec.Container(pod, name)
		if was == nil || is == nil || was.Image == "" || was.Image == is.Image {
			continue
		}
		made := *is
		made.Image = was.Image
		l.applied[name] = &made
		if n := l.o.newest(name); !fromAPI(pod) || n.State != status.Exited {
			l.o.Changed[name] = true
		}
	}
	if l.d.Pod = pod; fromAPI(pod) {
		l.d.Pod = asReported(pod)
	}
	if !l.o.Completed {
		w.t.admitted.keeps(l.counted())
	}
	w.fill(l)
}

// conclude that a pod is over, as that status says.
func (w *worker) conclude(l *life, st *v1.PodStatus) {
	l.status.Phase, l.status.Reason, l.status.Message = st.Phase, st.Reason, st.Message
	l.o.Completed = true
	w.t.admitted.leaves(l.d.Pod.UID)
}

// inherit what its apiserver knows of a pod that has no record here: it is where
// its status goes on from.
func (l *life) inherit(pod *v1.Pod) {
	if l.bare && fromAPI(pod) && pod.Status.Phase != "" {
		l.status = *pod.Status.DeepCopy()
	}
	l.bare = false
}

// fill in what only the source's spec tells of containers without a record:
// their postStart hooks may not have been run.
func (w *worker) fill(l *life) {
	for i := range l.o.Containers {
		c := &l.o.Containers[i]
		if cs := spec.Container(l.d.Pod, c.Name); cs != nil && c.State == status.Running && hasPostStart(cs) {
			c.Starting = true
		}
	}
}

func hasPostStart(c *v1.Container) bool { return c.Lifecycle != nil && c.Lifecycle.PostStart != nil }

// delete ends a pod whose source has set its deletionTimestamp, within the
// deletionGracePeriodSeconds from now. What else it says does not matter any
// more: nothing is started for a pod that goes.
func (w *worker) delete(l *life, source string, pod *v1.Pod) {
	w.next = nil
	has := l.d.Pod
	if l.bare {
		has = pod
	}
	l.inherit(pod)
	l.source, l.word = source, pod
	l.asked, l.d.Pod = pod, withResources(pod, has) // it keeps what it has to the end
	l.d.Held, l.heard = false, nil
	if fromAPI(pod) && status.Over(pod.Status.Phase) && !l.final() {
		w.conclude(l, &pod.Status)
	}
	if s := l.d.Stop; s != nil && s.Forget && !time.Now().Add(podGrace(pod)).Before(s.deadline()) {
		return // told once more
	}
	w.stop(l, Stop{Grace: podGrace(pod), Forget: true})
}

// last is the pod that was begun last.
func (w *worker) last() *life {
	if len(w.lives) == 0 {
		return nil
	}
	return w.lives[len(w.lives)-1]
}

// leaving says that the pod has been told to go for good.
func (l *life) leaving() bool { return l.d.Stop != nil && l.d.Stop.Forget }

// remove the pod of that UID.
func (w *worker) remove(source string, uid types.UID) {
	if w.next != nil && w.next.pod.UID == uid && w.next.source == source {
		w.next = nil
	}
	for _, l := range w.lives {
		if l.d.Pod.UID == uid && l.source == source && !l.leaving() {
			w.leave(l, "")
		}
	}
}

// disclaim lets go of what no source has spoken for.
func (w *worker) disclaim() {
	for _, l := range w.lives {
		if l.d.Held && !l.leaving() {
			w.log.Info("pod is of no source, it will be removed", "uid", l.d.Pod.UID)
			w.leave(l, "")
		}
	}
}

// leave ends a pod gracefully and for good.
func (w *worker) leave(l *life, reason string) {
	l.d.Held, l.heard = false, nil
	w.stop(l, Stop{Grace: podGrace(l.d.Pod), Forget: true, Reason: reason})
}

// stop makes the order stand; a later one can only shorten and add to it.
func (w *worker) stop(l *life, s Stop) {
	s.Since = time.Now()
	if have := l.d.Stop; have != nil {
		s.Forget = s.Forget || have.Forget
		s.Failed = s.Failed || have.Failed
		if s.Reason == "" {
			s.Reason, s.Message = have.Reason, have.Message
		}
		if !s.deadline().Before(have.deadline()) {
			s.Since, s.Grace = have.Since, have.Grace
		}
	}
	l.d.Stop = &s
	for id := range l.probed {
		w.t.probes.Ending(id)
	}
	w.log.Info("pod stops", "uid", l.d.Pod.UID, "grace", s.Grace, "forget", s.Forget, "reason", s.Reason)
}

// forget the pod: nothing of it is left but its logs and its record.
func (w *worker) forget(l *life) {
	pod := l.d.Pod
	w.t.removeLogs(pod.Namespace, pod.Name, pod.UID)
	w.t.records.save(pod.UID, nil)
	w.lives = w.lives[1:]
	w.before = former{uid: pod.UID, attempts: l.attempts}
	if l.final() {
		w.before.over = l.status
	}
	if have := w.published.Load(); have != nil && have.UID == pod.UID {
		w.t.gone(w, have)
	}
	w.t.admitted.leaves(pod.UID)
	w.t.release(pod.UID)
	w.log.Info("pod is gone", "uid", pod.UID)
}

// removeLogs of a pod. The directory is the agent's: nothing in it is
// mounted, and containers do not see it.
func (t *Table) removeLogs(namespace, name string, uid types.UID) {
	dir := t.cfg.Node.LogDir(namespace, name, uid)
	links, _ := filepath.Glob(t.cfg.Node.LogLink(namespace, name, "*", "*"))
	for _, l := range links {
		os.Remove(l)
	}
	root, err := os.OpenRoot(t.cfg.Node.PodLogsDir)
	if err != nil {
		return
	}
	defer root.Close()
	if err := root.RemoveAll(filepath.Base(dir)); err != nil {
		t.log.Warn("logs are not removed", "path", dir, "error", err)
	}
}

// change brings a pod of the same UID to another spec: containers that differ
// are replaced, and all of them when the sandbox does.
func (w *worker) change(l *life, pod *v1.Pod) {
	old := l.d.Pod
	l.d.Pod = pod
	w.compare(l, old, l.lenient)
	w.replaceImages(l, old)
	if l.d.Stop != nil || l.o.Completed {
		if fromAPI(pod) && l.o.Completed {
			return // it has run to its end, for whoever counts on it
		}
		w.revive(l)
	}
	l.o.Cgroup = unsure(l.o.Cgroup)
	l.o.Volumes = unsure(l.o.Volumes)
	clear(l.o.Retry)
	clear(l.fails)
	w.reprobe(l)
	w.log.Info("pod changed", "uid", pod.UID)
}

// reprobe begins the probes of running containers anew: they may have changed.
// What the old ones said holds until the new ones say otherwise.
func (w *worker) reprobe(l *life) {
	for i := range l.o.Containers {
		c := &l.o.Containers[i]
		if l.probed[c.ID] && c.State == status.Running && !l.o.Changed[c.Name] {
			w.t.probes.Remove(c.ID)
			delete(l.probed, c.ID)
			l.restored[c.ID] = probes.State{Started: c.Started, Ready: c.Ready}
		}
	}
}

func unsure(s Step) Step {
	if s == StepDone {
		return StepUnknown
	}
	return s
}

// compare what runs with what is desired now.
func (w *worker) compare(l *life, before *v1.Pod, lenient bool) {
	made := l.sandboxPod
	if made == nil {
		made = before
	}
	if len(l.o.Sandboxes) > 0 {
		l.o.SandboxChanged = differ(sandboxView(made), sandboxView(l.d.Pod), lenient)
		l.sandboxPod = made
	}
	changed := map[string]bool{}
	for i := range l.o.Containers {
		name := l.o.Containers[i].Name
		want := spec.Container(l.d.Pod, name)
		was := l.applied[name]
		if was == nil {
			was = spec.Container(before, name)
		}
		if want == nil || was == nil {
			continue
		}
		l.applied[name] = was
		if differ(containerView(was), containerView(want), lenient) {
			// One of an apiserver that has ended is not started for it.
			if n := l.o.newest(name); !fromAPI(l.d.Pod) || n.State != status.Exited || l.o.Changed[name] {
				changed[name] = true
			}
			delete(l.o.Backoffs, name)
			delete(l.o.Images, name)
			delete(l.failures, name)
		}
	}
	l.o.Changed = changed
}

// fail the pod for good, for a reason of the node's.
func (w *worker) fail(l *life, reason, message string, grace time.Duration) {
	l.failed = &status.Cause{Reason: reason, Message: message}
	l.o.Completed = true
	w.t.admitted.leaves(l.d.Pod.UID)
	w.stop(l, Stop{Grace: grace, Reason: reason, Message: message, Failed: true})
}

// revive a pod that was down, unless it is over for good or has to wait.
func (w *worker) revive(l *life) {
	if l.leaving() || l.final() || w.t.held.Load() {
		return
	}
	l.undisrupt()
	w.t.admitted.keeps(l.counted())
	l.d.Stop, l.stopped, l.o.Completed, l.failed, l.awaits = nil, false, false, nil, false
	l.status.Phase, l.status.Reason, l.status.Message = v1.PodPending, "", ""
	clear(l.o.Kills)
	clear(l.o.Retry)
	clear(l.fails)
	clear(l.probed)
}
