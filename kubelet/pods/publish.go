package pods

import (
	"maps"
	"reflect"
	"strconv"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/status"
	"github.com/podd-runtime/podd/probes"
)

// publish the pod as it is now to readers, watchers and disk, when anything
// of it has changed.
func (w *worker) publish(l *life) {
	if l.unseen && l.bare {
		return // nobody has said anything of it yet
	}
	st := status.Compute(l.d.Pod, l.observed(w.t.cfg.Node.HostIPs), &l.status, time.Now())
	if l.unseen {
		st = l.status // as it was, until the runtime has told how it is
	}
	if l.status.Phase != "" && st.Phase != l.status.Phase {
		w.log.Info("pod phase changed", "phase", st.Phase, "reason", st.Reason)
	}
	have := w.published.Load()
	if have != nil && have.UID == l.d.Pod.UID && l.spec == l.told() && l.ended == l.end() && reflect.DeepEqual(st, l.status) {
		return
	}
	if l.status = st; l.final() && !l.o.Completed {
		l.o.Completed = true
		w.t.admitted.leaves(l.d.Pod.UID)
		w.post(func() {}) // it is wound down
	}
	l.spec, l.ended = l.told(), l.end()
	w.show(l, have)
	w.t.records.save(l.d.Pod.UID, l.record(w.t.cfg.Build))
}

// told is the pod as its source has told it.
func (l *life) told() *v1.Pod {
	if l.asked != nil {
		return l.asked
	}
	return l.d.Pod
}

// end is what else of a life is in its record and changes rarely.
func (l *life) end() ending {
	e := ending{completed: l.o.Completed, stopped: l.stopped, unseen: l.unseen}
	if l.d.Stop != nil {
		e.stop = *l.d.Stop
	}
	return e
}

type ending struct {
	completed, stopped, unseen bool
	stop                       Stop
}

// show the pod to readers and watchers.
func (w *worker) show(l *life, have *v1.Pod) {
	told := l.told()
	pod := &v1.Pod{TypeMeta: told.TypeMeta, ObjectMeta: told.ObjectMeta, Spec: told.Spec, Status: l.status}
	pod.Kind, pod.APIVersion = "Pod", "v1"
	if pod.CreationTimestamp.IsZero() {
		pod.CreationTimestamp = metav1.NewTime(l.o.Started.Truncate(time.Second))
	}
	if s := l.d.Stop; s != nil && s.Forget {
		t := metav1.NewTime(s.deadline().Truncate(time.Second))
		pod.DeletionTimestamp = &t
		grace := int64(s.Grace / time.Second)
		pod.DeletionGracePeriodSeconds = &grace
	}
	if l.unseen {
		pod.Annotations = maps.Clone(pod.Annotations)
		metav1.SetMetaDataAnnotation(&pod.ObjectMeta, manifests.UnseenAnnotation, "true")
	}
	if l.bare {
		// It is listed, for who looks for what runs; what is told of it is what
		// its source's pod is like.
		pod.ResourceVersion = "0"
		w.quiet.Store(true)
		w.published.Store(pod)
		return
	}
	typ := watch.Modified
	if w.quiet.Swap(false) {
		typ, have = watch.Added, nil
	} else if have == nil || have.UID != pod.UID {
		typ = watch.Added
		if have != nil {
			w.t.emit(w, watch.Deleted, have)
		}
	}
	w.t.emit(w, typ, pod)
}

// gone tells readers that the pod under the name is not there any more.
func (t *Table) gone(w *worker, pod *v1.Pod) {
	if w.quiet.Swap(false) {
		w.published.Store(nil)
		return
	}
	t.emit(w, watch.Deleted, pod)
}

// record of the life, a value that does not change any more.
func (l *life) record(build string) *record {
	r := &record{
		Version: recordVersion, Build: build, Source: l.source, Pod: l.d.Pod, Status: l.status, Started: l.o.Started,
		Completed: l.o.Completed, Stopped: l.stopped, Stop: l.d.Stop,
		Attempts: maps.Clone(l.attempts), Backoffs: maps.Clone(l.o.Backoffs), Ended: maps.Clone(l.o.Ended),
	}
	if l.o.Resize != StepAbsent {
		r.Actual, r.PodActual = maps.Clone(l.o.Actual), l.podActual
	}
	if l.sandboxPod != nil && l.sandboxPod != l.d.Pod {
		r.SandboxPod = l.sandboxPod
	}
	for name, c := range l.applied {
		if l.o.Changed[name] {
			if r.Applied == nil {
				r.Applied = map[string]*v1.Container{}
			}
			r.Applied[name] = c
		}
	}
	for i := range l.o.Containers {
		if c := &l.o.Containers[i]; c.State == status.Running {
			if r.Probes == nil {
				r.Probes = map[string]probes.State{}
			}
			r.Probes[c.ID] = probes.State{Started: c.Started, Ready: c.Ready}
			if c.Starting {
				r.Starting = append(r.Starting, c.ID)
			}
		}
	}
	return r
}

// emit gives the pod its next resource version and makes it what readers see.
func (t *Table) emit(w *worker, typ watch.EventType, pod *v1.Pod) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rv++
	if typ == watch.Deleted {
		gone := *pod
		pod = &gone
	}
	pod.ResourceVersion = strconv.FormatUint(t.rv, 10)
	if typ == watch.Deleted {
		w.published.Store(nil)
	} else {
		w.published.Store(pod)
	}
	ev := watch.Event{Type: typ, Object: pod}
	t.history.add(t.rv, w.key.String(), ev)
	t.feed.Publish(w.key.String(), ev)
}
