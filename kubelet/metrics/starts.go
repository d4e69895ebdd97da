package metrics

import (
	"context"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

// Watcher is the pod table, as changes are followed there.
type Watcher interface {
	Watch(ctx context.Context, resourceVersion string) <-chan watch.Event
}

// starts times the starts of pods that begin while the daemon runs.
type starts struct {
	m   *Metrics
	mu  sync.Mutex
	all map[types.UID]*start
}

type start struct {
	seen, pullBegan, pullEnded time.Time
	over                       bool // runs, or has run
}

func newStarts(m *Metrics) *starts { return &starts{m: m, all: map[types.UID]*start{}} }

func (s *starts) pulled(uid string, begin, end time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.all[types.UID(uid)]
	if st == nil || st.over {
		return
	}
	if st.pullBegan.IsZero() || begin.Before(st.pullBegan) {
		st.pullBegan = begin
	}
	if end.After(st.pullEnded) {
		st.pullEnded = end
	}
}

// Watch times starts until ctx ends.
func (m *Metrics) Watch(ctx context.Context, table Watcher) error {
	for ctx.Err() == nil {
		for ev := range table.Watch(ctx, "") {
			pod, ok := ev.Object.(*v1.Pod)
			if !ok {
				break // too slow: begin again
			}
			if ev.Type == watch.Deleted {
				m.starts.forget(pod.UID)
				m.forget(pod)
			} else {
				m.starts.look(pod, time.Now())
			}
		}
	}
	return nil
}

func (s *starts) forget(uid types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, uid)
}

func (s *starts) look(pod *v1.Pod, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.all[pod.UID]
	if st == nil {
		st = &start{seen: now, over: pod.Status.Phase != v1.PodPending && pod.Status.Phase != ""}
		s.all[pod.UID] = st
		s.m.containersPerPod.Observe(float64(len(pod.Spec.Containers)))
	}
	if st.over || !allStarted(pod) {
		return
	}
	st.over = true
	created := pod.CreationTimestamp.Time
	if created.IsZero() || created.After(now) {
		created = st.seen
	}
	// Creation times are whole seconds: a pod cannot have been seen before.
	total := now.Sub(created)
	apart := st.pullEnded.Sub(st.pullBegan) + initTime(pod)
	s.m.podStart.Observe(now.Sub(st.seen).Seconds())
	s.m.podStartTotal.Observe(total.Seconds())
	s.m.podStartSLI.Observe(max(total-apart, 0).Seconds())
}

// allStarted says whether every container has run.
func allStarted(pod *v1.Pod) bool {
	if len(pod.Status.ContainerStatuses) < len(pod.Spec.Containers) {
		return false
	}
	for _, c := range pod.Status.ContainerStatuses {
		if c.State.Running == nil && c.State.Terminated == nil {
			return false
		}
	}
	return true
}

// initTime is how long init containers took, from the first start to the last
// end.
func initTime(pod *v1.Pod) time.Duration {
	var first, last time.Time
	for _, c := range pod.Status.InitContainerStatuses {
		if t := c.State.Terminated; t != nil {
			if first.IsZero() || t.StartedAt.Time.Before(first) {
				first = t.StartedAt.Time
			}
			if t.FinishedAt.Time.After(last) {
				last = t.FinishedAt.Time
			}
		}
	}
	return last.Sub(first)
}
