package metrics

import (
	"context"
	"strconv"
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

	began time.Time
}

type start struct {
	seen, pullBegan, pullEnded time.Time
	over                       bool // runs, or has run
	// ended are the instances that the status showed as ended at the last look.
	ended map[string]bool
}

func newStarts(m *Metrics) *starts {
	return &starts{m: m, all: map[types.UID]*start{}, began: time.Now()}
}

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
	var fresh []end
	st.ended, fresh = newEnds(pod, st.ended)
	for _, e := range fresh {
		if e.FinishedAt.Time.Before(s.began) {
			continue // counted by the daemon before
		}
		s.m.terminated.WithLabelValues(e.kind, strconv.Itoa(int(e.ExitCode)), e.Reason).Inc()
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

// end of one instance of a container.
type end struct {
	kind string // container_type of metrics
	*v1.ContainerStateTerminated
}

// newEnds are those that the status tells of and known does not, and all that it
// tells of. One that was started again at once is shown as the last state only.
func newEnds(pod *v1.Pod, known map[string]bool) (all map[string]bool, fresh []end) {
	for kind, list := range map[string][]v1.ContainerStatus{
		"container": pod.Status.ContainerStatuses, "init_container": pod.Status.InitContainerStatuses, "ephemeral_container": pod.Status.EphemeralContainerStatuses,
	} {
		for i := range list {
			for _, t := range []*v1.ContainerStateTerminated{list[i].LastTerminationState.Terminated, list[i].State.Terminated} {
				if t == nil || t.ContainerID == "" || all[t.ContainerID] {
					continue
				}
				if all == nil {
					all = map[string]bool{}
				}
				all[t.ContainerID] = true
				if !known[t.ContainerID] {
					fresh = append(fresh, end{kind, t})
				}
			}
		}
	}
	return all, fresh
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
