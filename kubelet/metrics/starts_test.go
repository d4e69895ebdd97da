package metrics

import (
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestEndsOfContainersAreCountedOnce by upstream's kubelet_terminated_containers_total,
// however often a status shows them, and those too that a status shows as the
// last state only.
func TestEndsOfContainersAreCountedOnce(t *testing.T) {
	m := New("node", "v1", "")
	ended := func(id string, code int32, reason string, at time.Time) *v1.ContainerStateTerminated {
		return &v1.ContainerStateTerminated{ContainerID: id, ExitCode: code, Reason: reason, FinishedAt: metav1.NewTime(at)}
	}
	pod := &v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u"}, Status: v1.PodStatus{Phase: v1.PodPending}}
	now := time.Now()
	pod.Status.InitContainerStatuses = []v1.ContainerStatus{{Name: "init", State: v1.ContainerState{Terminated: ended("i1", 0, "Completed", now)}}}
	pod.Status.ContainerStatuses = []v1.ContainerStatus{{Name: "a", State: v1.ContainerState{Terminated: ended("a1", 3, "Error", now)}}}
	m.starts.look(pod, now)
	m.starts.look(pod, now)
	pod.Status.ContainerStatuses[0] = v1.ContainerStatus{Name: "a", LastTerminationState: v1.ContainerState{Terminated: ended("a2", 3, "Error", now)}}
	m.starts.look(pod, now)
	old := &v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "old"}, Status: v1.PodStatus{Phase: v1.PodRunning}}
	old.Status.ContainerStatuses = []v1.ContainerStatus{{Name: "b", State: v1.ContainerState{Terminated: ended("b1", 3, "Error", now.Add(-time.Hour))}}}
	m.starts.look(old, now) // of the daemon before
	for what, tt := range map[string]struct {
		labels []string
		want   float64
	}{
		"init": {[]string{"init_container", "0", "Completed"}, 1},
		"main": {[]string{"container", "3", "Error"}, 2},
	} {
		var got dto.Metric
		if err := m.terminated.WithLabelValues(tt.labels...).Write(&got); err != nil || got.GetCounter().GetValue() != tt.want {
			t.Errorf("%s: %v, want %v (%v)", what, got.GetCounter().GetValue(), tt.want, err)
		}
	}
}
