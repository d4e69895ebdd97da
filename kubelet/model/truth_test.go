package model

import (
	"fmt"
	"maps"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
)

// truth is what has really happened on the node, as nobody in it knows; guarded
// by world.mu.
type truth struct {
	// instances of containers that there ever were, by id.
	instances map[string]*instance
	// starts of each numbered instance of a container, in the pod's present life.
	starts map[start]string
	// over are pods of the API whose end was told the apiserver.
	over map[types.UID]v1.PodPhase
	// lives that the pod of a UID has had.
	lives map[types.UID]int
	// past are pods of which nothing is left.
	past map[types.UID]bool
	// told last of each container.
	told map[subject]v1.ContainerStatus
}

// subject is one of a pod at the apiserver.
type subject struct {
	uid  types.UID
	name string
}

type instance struct {
	uid            types.UID
	name           string
	attempt        int32
	life           int // of the pod's
	started, ended time.Time
	code           int32
	removed        bool // the runtime has it no more
}

type start struct {
	uid     types.UID
	name    string
	attempt int32
}

func newTruth() truth {
	return truth{instances: map[string]*instance{}, starts: map[start]string{}, over: map[types.UID]v1.PodPhase{}, past: map[types.UID]bool{}, lives: map[types.UID]int{}, told: map[subject]v1.ContainerStatus{}}
}

// created is a new instance of a container.
func (w *world) created(id string, uid types.UID, name string, attempt int32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.truth.past, uid)
	w.truth.instances[id] = &instance{uid: uid, name: name, attempt: attempt, life: w.truth.lives[uid]}
}

// started: no numbered instance starts twice, and none of a pod that is over.
func (w *world) started(id string) {
	w.mu.Lock()
	i := w.truth.instances[id]
	i.started = time.Now()
	key := start{i.uid, i.name, i.attempt}
	before, twice := w.truth.starts[key]
	w.truth.starts[key] = id
	phase, over := w.truth.over[i.uid]
	w.mu.Unlock()
	if twice {
		w.breach("container %s of %s starts twice as number %d: as %s and as %s", i.name, i.uid, i.attempt, before, id)
	}
	if over {
		w.breach("container %s of %s starts as %s, and the pod has been told to be %s", i.name, i.uid, id, phase)
	}
}

func (w *world) removed(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.truth.instances[id].removed = true
}

func (w *world) ended(id string, code int32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	i := w.truth.instances[id]
	i.ended, i.code = time.Now(), code
}

// forgotten: nothing of the pod is left. What begins under its UID from now on
// is another life, of which nobody has to know what was before.
func (w *world) forgotten(uid types.UID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.DeleteFunc(w.truth.starts, func(s start, _ string) bool { return s.uid == uid })
	delete(w.truth.over, uid)
	w.truth.lives[uid]++
	w.truth.past[uid] = true
	maps.DeleteFunc(w.truth.told, func(s subject, _ v1.ContainerStatus) bool { return s.uid == uid })
}

// unknowing: podd has begun anew. Of the pods with a record, or that the
// apiserver has as over, it knows so; of those that the runtime has, what began.
func (w *world) unknowing(recorded, over, there func(types.UID) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.DeleteFunc(w.truth.over, func(uid types.UID, _ v1.PodPhase) bool { return !recorded(uid) && !over(uid) })
	maps.DeleteFunc(w.truth.starts, func(s start, _ string) bool { return !recorded(s.uid) && !there(s.uid) })
}

// recordLost: of what the runtime has no more, nobody knows what number it had.
func (w *world) recordLost(uid types.UID) {
	w.untold(uid)
	for name, p := range w.statics {
		if m := w.api.get(name); p.UID == uid && m != nil {
			w.untold(m.UID)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.DeleteFunc(w.truth.starts, func(s start, id string) bool { return s.uid == uid && w.truth.instances[id].removed })
}

// reported is a status that podd has told the apiserver; was is the one before.
func (w *world) reported(pod *v1.Pod, was, is *v1.PodStatus) {
	for _, problem := range w.untrue(pod, was, is) {
		w.breach("status of %s (%s): %s", pod.Name, pod.UID, problem)
	}
	if status.Over(is.Phase) && !status.Over(was.Phase) && pod.Annotations[mirrorAnnotation] == "" {
		w.mu.Lock()
		if !w.truth.past[pod.UID] {
			w.truth.over[pod.UID] = is.Phase
		}
		w.mu.Unlock()
	}
}

// untold: the apiserver knows no more what it was told last of a pod, or with
// no uid of any.
func (w *world) untold(uid types.UID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.DeleteFunc(w.truth.told, func(s subject, _ v1.ContainerStatus) bool { return uid == "" || s.uid == uid })
}

func (w *world) untrue(pod *v1.Pod, was, is *v1.PodStatus) (problems []string) {
	bad := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	if status.Over(was.Phase) && was.Phase != is.Phase && was.Reason != lostByOthers { // which it may not have heard
		bad("phase %s after %s", is.Phase, was.Phase)
	}
	owner := pod.UID
	if pod.Annotations[mirrorAnnotation] != "" {
		owner = "" // told by a pod of another UID
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, list := range [][]v1.ContainerStatus{is.ContainerStatuses, is.InitContainerStatuses, is.EphemeralContainerStatuses} {
		for i := range list {
			key := subject{pod.UID, list[i].Name}
			before := w.truth.told[key]
			w.truth.untrueContainer(owner, &before, &list[i], bad)
			if !w.truth.past[pod.UID] {
				w.truth.told[key] = list[i]
			}
		}
	}
	if !status.Over(is.Phase) || status.Over(was.Phase) || owner == "" {
		return problems
	}
	for id, i := range w.truth.instances {
		if i.uid == owner && spec.Container(pod, i.name) != nil && !i.started.IsZero() && i.ended.IsZero() {
			bad("phase %s, and container %s runs", is.Phase, id)
		}
	}
	return problems
}

func find(list []v1.ContainerStatus, name string) *v1.ContainerStatus {
	for i := range list {
		if list[i].Name == name {
			return &list[i]
		}
	}
	return &v1.ContainerStatus{}
}

const idPrefix = status.Scheme + "://"

// instance that a status names; nil: none. known false: there never was one.
func (t *truth) instance(id string) (i *instance, known bool) {
	if id == "" {
		return nil, true
	}
	i = t.instances[id[min(len(idPrefix), len(id)):]]
	return i, i != nil
}

// later says that an instance began after another one.
func (t *truth) later(id string, than *instance) bool {
	i, _ := t.instance(id)
	return i != nil && i.uid == than.uid && i.life == than.life && i.attempt > than.attempt && !i.started.IsZero()
}

func (t *truth) untrueContainer(owner types.UID, was, is *v1.ContainerStatus, bad func(string, ...any)) {
	i, known := t.instance(is.ContainerID)
	switch {
	case !known:
		bad("%s has the id %s, which is of nothing", is.Name, is.ContainerID)
		return
	case i != nil && (owner != "" && i.uid != owner || i.name != is.Name):
		bad("%s is said to be %s, which is %s of %s", is.Name, is.ContainerID, i.name, i.uid)
	case i != nil && t.later(was.ContainerID, i):
		bad("%s is %s after %s, which is later", is.Name, is.ContainerID, was.ContainerID)
	case is.RestartCount < was.RestartCount:
		bad("%s has been restarted %d times, and %d before", is.Name, is.RestartCount, was.RestartCount)
	}
	if r := is.State.Running; r != nil {
		switch {
		case i == nil || i.started.IsZero():
			bad("%s is said to run and never began", is.Name)
		case was.State.Terminated != nil && was.ContainerID == is.ContainerID:
			bad("%s runs again as %s", is.Name, is.ContainerID)
		}
	} else if is.Ready {
		// Init containers that are over are ready.
		if s := is.State.Terminated; s == nil || s.ExitCode != 0 {
			bad("%s is ready and does not run", is.Name)
		}
	}
	t.untrueEnd(is.Name, is.State.Terminated, bad)
	t.untrueEnd(is.Name, is.LastTerminationState.Terminated, bad)
}

func (t *truth) untrueEnd(name string, end *v1.ContainerStateTerminated, bad func(string, ...any)) {
	if end == nil || end.ContainerID == "" {
		return
	}
	i, known := t.instance(end.ContainerID)
	switch {
	case !known:
		bad("%s is said to have ended as %s, which is of nothing", name, end.ContainerID)
	case i.ended.IsZero():
		bad("%s is said to have ended as %s (%d, %s), and it has not", name, end.ContainerID, end.ExitCode, end.Reason)
	case i.removed && end.Reason == "ContainerStatusUnknown": // as upstream says of what is not there
	case i.code != end.ExitCode:
		bad("%s is said to have ended with %d, and it was %d", name, end.ExitCode, i.code)
	}
}
