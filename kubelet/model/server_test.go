package model

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/podd-runtime/podd/kubelet/status"
)

const (
	nodeName         = "n1"
	mirrorAnnotation = "kubernetes.io/config.mirror"
)

// server is an apiserver with one resource, pods, as far as a node can tell it
// from a real one: versions, watches with a history that ends, graceful
// deletion, preconditions, strategic merge patches.
type server struct {
	w *world

	mu      sync.Mutex
	rv      uint64
	pods    map[string]*stored // by name; all are in one namespace
	history []change
	oldest  uint64 // version before the first of history
	watches map[*watcher]bool
	backups []backup
	// restores of backups so far.
	restores int64
	uids     int
	// born is when each pod was made, the last time.
	born map[types.UID]time.Time
	// again are those that were made more than once.
	again map[types.UID]bool
	// away until then: nobody answers.
	away time.Time
	// lists only: it sends no initial events, as before 1.34.
	listsOnly bool
}

// stored is one version of a pod. It does not change.
type stored struct {
	pod *v1.Pod
	raw []byte
}

type change struct {
	rv      uint64
	was, is *stored // nil: there was none, or is none any more
}

// backup of the database.
type backup struct {
	rv   uint64
	pods map[string]*stored
}

func newServer(w *world) *server {
	return &server{w: w, rv: 1, pods: map[string]*stored{}, watches: map[*watcher]bool{}, born: map[types.UID]time.Time{}, again: map[types.UID]bool{}}
}

func here(s *stored) bool { return s != nil && s.pod.Spec.NodeName == nodeName }

// put a pod's next version; s.mu is held. The pod must not change any more.
func (s *server) put(pod *v1.Pod) *stored {
	s.rv++
	pod.Kind, pod.APIVersion = "Pod", "v1"
	pod.ResourceVersion = strconv.FormatUint(s.rv, 10)
	raw, err := json.Marshal(pod)
	if err != nil {
		panic(err)
	}
	is := &stored{pod, raw}
	was := s.pods[pod.Name]
	s.pods[pod.Name] = is
	s.tell(change{s.rv, was, is})
	return is
}

// drop a pod from the database; s.mu is held.
func (s *server) drop(name string) *stored {
	s.rv++
	was := s.pods[name]
	delete(s.pods, name)
	gone := was.pod.DeepCopy()
	gone.ResourceVersion = strconv.FormatUint(s.rv, 10)
	raw, _ := json.Marshal(gone)
	last := &stored{gone, raw}
	s.tell(change{s.rv, last, nil})
	s.w.note("apiserver: %s (%s) is gone at %d", name, gone.UID, s.rv)
	return last
}

func (s *server) tell(c change) {
	s.history = append(s.history, c)
	for w := range s.watches {
		w.add(c)
	}
}

// event of a change for those who see the node's pods alone; "" none.
func (c change) event() (watch.EventType, *stored) {
	switch {
	case here(c.is) && here(c.was):
		return watch.Modified, c.is
	case here(c.is):
		return watch.Added, c.is
	case here(c.was):
		return watch.Deleted, c.was
	}
	return "", nil
}

// change a pod by f, as a user or controller does; nil: there is none. spec says
// that f changes what it should be.
func (s *server) change(name string, spec bool, f func(*v1.Pod)) *v1.Pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	have := s.pods[name]
	if have == nil {
		return nil
	}
	pod := have.pod.DeepCopy()
	f(pod)
	if spec {
		pod.Generation++
	}
	return s.put(pod).pod
}

// create a pod; uid "" is a new one. It fails when there is one of that name.
func (s *server) create(pod *v1.Pod, uid types.UID) (*stored, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pods[pod.Name] != nil {
		return nil, apierrors.NewAlreadyExists(v1.Resource("pods"), pod.Name)
	}
	if uid == "" {
		s.uids++
		uid = types.UID(fmt.Sprintf("%s-%d", pod.Name, s.uids))
	}
	s.w.untold(uid)
	_, again := s.born[uid]
	s.born[uid], s.again[uid] = time.Now(), again
	pod.UID, pod.Generation, pod.CreationTimestamp = uid, 1, metav1.Now()
	pod.Status = v1.PodStatus{Phase: v1.PodPending, QOSClass: v1.PodQOSBurstable}
	return s.put(pod), nil
}

// remove a pod gracefully; grace nil is the pod's own.
func (s *server) remove(name string, grace *int64, uid types.UID) (*stored, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	have := s.pods[name]
	if have == nil {
		return nil, apierrors.NewNotFound(v1.Resource("pods"), name)
	}
	if uid != "" && have.pod.UID != uid {
		return nil, apierrors.NewConflict(v1.Resource("pods"), name, fmt.Errorf("precondition failed: UID in precondition: %s, UID in object meta: %s", uid, have.pod.UID))
	}
	seconds := int64(30)
	if g := have.pod.Spec.TerminationGracePeriodSeconds; g != nil {
		seconds = *g
	}
	if grace != nil {
		seconds = *grace
	}
	if have.pod.Spec.NodeName == "" || status.Over(have.pod.Status.Phase) {
		seconds = 0
	}
	return s.depart(have, seconds), nil
}

// depart: a pod goes in so many seconds; with none at once, unless somebody has
// a finalizer on it. s.mu is held.
func (s *server) depart(have *stored, seconds int64) *stored {
	if seconds == 0 && len(have.pod.Finalizers) == 0 {
		return s.drop(have.pod.Name)
	}
	if g := have.pod.DeletionGracePeriodSeconds; g != nil && *g <= seconds {
		return have // it goes sooner
	}
	pod := have.pod.DeepCopy()
	if pod.DeletionTimestamp == nil {
		pod.Generation++
	}
	at := metav1.NewTime(s.w.disk.wall().Add(time.Duration(seconds) * time.Second).Truncate(time.Second))
	pod.DeletionTimestamp, pod.DeletionGracePeriodSeconds = &at, &seconds
	return s.put(pod)
}

// release a pod of its finalizers; one whose deletion has come to its end goes.
func (s *server) release(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	have := s.pods[name]
	if have == nil || len(have.pod.Finalizers) == 0 {
		return
	}
	pod := have.pod.DeepCopy()
	pod.Finalizers = nil
	is := s.put(pod)
	if g := pod.DeletionGracePeriodSeconds; g != nil && *g == 0 {
		s.drop(is.pod.Name)
	}
}

// patchStatus is what podd tells of a pod. What it asked for before the pod was
// made, again with its UID, is of the one before, and so may be what it tells at
// first; and who has not listed since a
// backup was restored makes its patches of what is no more.
func (s *server) patchStatus(name string, patch []byte, asked time.Time, listed bool) (*stored, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	have := s.pods[name]
	if have == nil {
		return nil, apierrors.NewNotFound(v1.Resource("pods"), name)
	}
	raw, err := strategicpatch.StrategicMergePatch(have.raw, patch, v1.Pod{})
	if err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	var to v1.Pod
	if err := json.Unmarshal(raw, &to); err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	if to.UID != have.pod.UID {
		return nil, apierrors.NewConflict(v1.Resource("pods"), name, fmt.Errorf("precondition failed: UID in precondition: %s, UID in object meta: %s", to.UID, have.pod.UID))
	}
	pod := have.pod.DeepCopy()
	pod.Status = to.Status
	s.w.note("podd tells of %s (%s): %s", name, pod.UID, brief{&pod.Status})
	if listed && !asked.Before(s.born[pod.UID]) && (!s.again[pod.UID] || time.Since(s.born[pod.UID]) > time.Minute) {
		s.w.reported(pod, &have.pod.Status, &pod.Status)
	}
	return s.put(pod), nil
}

// back up the database.
func (s *server) backUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.backups = append(s.backups, backup{s.rv, maps.Clone(s.pods)})
}

// restore a backup: versions go back, watches end, nobody knows what was before.
func (s *server) restore(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.backups[n]
	s.w.note("apiserver: restored from version %d to %d", s.rv, b.rv)
	s.rv, s.pods, s.history, s.oldest = b.rv, maps.Clone(b.pods), nil, b.rv
	s.backups = s.backups[:n+1]
	s.restores++
	s.w.untold("")
	s.cut()
}

func (s *server) restored() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.restores
}

// compact forgets the history: watches that come from before end with 410.
func (s *server) compact() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.history, s.oldest = nil, s.rv
}

// cut all watches; s.mu is held.
func (s *server) cut() {
	for w := range s.watches {
		w.end()
	}
	clear(s.watches)
}

func (s *server) cutWatches() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cut()
}

// goAway: nobody answers for so long.
func (s *server) goAway(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = time.Now().Add(d)
	s.cut()
}

func (s *server) isAway() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.away)
}

// list what is there, by name.
func (s *server) list() []*v1.Pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sorted()
}

func (s *server) sorted() []*v1.Pod {
	out := make([]*v1.Pod, 0, len(s.pods))
	for _, name := range slices.Sorted(maps.Keys(s.pods)) {
		out = append(out, s.pods[name].pod)
	}
	return out
}

func (s *server) get(name string) *v1.Pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.pods[name]; p != nil {
		return p.pod
	}
	return nil
}

// byUID is the pod of that UID; nil: there is none.
func (s *server) byUID(uid types.UID) *v1.Pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.pods {
		if p.pod.UID == uid {
			return p.pod
		}
	}
	return nil
}

// brief is a status in a line.
type brief struct{ *v1.PodStatus }

func (b brief) String() string {
	out := string(b.Phase)
	if b.Reason != "" {
		out += "/" + b.Reason
	}
	for _, list := range [][]v1.ContainerStatus{b.InitContainerStatuses, b.ContainerStatuses, b.EphemeralContainerStatuses} {
		for i := range list {
			c := &list[i]
			out += fmt.Sprintf(" %s[%s r%d", c.Name, c.ContainerID, c.RestartCount)
			switch {
			case c.State.Running != nil:
				out += " runs"
			case c.State.Terminated != nil:
				out += fmt.Sprintf(" ended %d %s", c.State.Terminated.ExitCode, c.State.Terminated.Reason)
			case c.State.Waiting != nil:
				out += " waits " + c.State.Waiting.Reason
			}
			if t := c.LastTerminationState.Terminated; t != nil {
				out += fmt.Sprintf(" before %s %d", t.ContainerID, t.ExitCode)
			}
			if c.Ready {
				out += " ready"
			}
			out += "]"
		}
	}
	return out
}
