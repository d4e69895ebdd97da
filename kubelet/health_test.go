package kubelet

import (
	"testing"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestStatusLine(t *testing.T) {
	pod := func(phase v1.PodPhase, ready v1.ConditionStatus) *v1.Pod {
		return &v1.Pod{Status: v1.PodStatus{Phase: phase, Conditions: []v1.PodCondition{{Type: v1.PodReady, Status: ready}}}}
	}
	going := pod(v1.PodRunning, v1.ConditionTrue)
	going.DeletionTimestamp = &metav1.Time{}
	for _, tt := range []struct {
		pods     []*v1.Pod
		problems int
		ill      string
		want     string
	}{
		{nil, 0, "", "0 pods: 0 running, 0 failed"},
		{[]*v1.Pod{pod(v1.PodRunning, v1.ConditionTrue), pod(v1.PodPending, ""), pod(v1.PodFailed, "")}, 0, "", "3 pods: 1 running, 1 starting, 1 failed"},
		{[]*v1.Pod{pod(v1.PodRunning, v1.ConditionFalse), pod(v1.PodSucceeded, ""), going}, 0, "", "3 pods: 0 running, 1 not ready, 0 failed, 1 completed, 1 stopping"},
		{nil, 2, "write /var/lib/podd/.alive: no space left on device", "0 pods: 0 running, 0 failed; 2 manifests not in force, see podd status; ill: write /var/lib/podd/.alive: no space left on device"},
	} {
		if got := statusLine(tt.pods, tt.problems, tt.ill); got != tt.want {
			t.Errorf("got  %s\nwant %s", got, tt.want)
		}
	}
}
