package apiserver

import (
	"encoding/json"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
)

// What the apiserver makes of a patch is the status that the node shows, with
// what others have set.
func TestStatusPatchIsCarriedOut(t *testing.T) {
	then := metav1.NewTime(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))
	limits := func(cpu, memory string) *v1.ResourceRequirements {
		list := v1.ResourceList{}
		for name, q := range map[v1.ResourceName]string{v1.ResourceCPU: cpu, v1.ResourceMemory: memory} {
			if q != "" {
				list[name] = resource.MustParse(q)
			}
		}
		return &v1.ResourceRequirements{Limits: list}
	}
	base := v1.PodStatus{
		Phase: v1.PodRunning, Message: "once", QOSClass: v1.PodQOSGuaranteed, StartTime: &then,
		Conditions: []v1.PodCondition{
			{Type: v1.PodReady, Status: v1.ConditionFalse, Reason: "ContainersNotReady", Message: "containers with unready status: [c]", LastTransitionTime: then},
			{Type: v1.PodResizeInProgress, Status: v1.ConditionTrue, LastTransitionTime: then},
			{Type: "example.com/gate", Status: v1.ConditionTrue, LastTransitionTime: then},
		},
		PodIP: "10.0.0.1", PodIPs: []v1.PodIP{{IP: "10.0.0.1"}, {IP: "fd00::1"}},
		Resources:         limits("1", "1Gi"),
		ContainerStatuses: []v1.ContainerStatus{{Name: "c", Resources: limits("1", "1Gi"), LastTerminationState: v1.ContainerState{Terminated: &v1.ContainerStateTerminated{ExitCode: 1}}}},
	}
	shown := v1.PodStatus{
		Phase: v1.PodRunning, QOSClass: v1.PodQOSGuaranteed, StartTime: &then,
		Conditions:        []v1.PodCondition{{Type: v1.PodReady, Status: v1.ConditionTrue, LastTransitionTime: metav1.NewTime(then.Add(time.Minute))}},
		PodIP:             "10.0.0.2",
		PodIPs:            []v1.PodIP{{IP: "10.0.0.2"}},
		Resources:         limits("2", ""),
		ContainerStatuses: []v1.ContainerStatus{{Name: "c", Ready: true, Resources: limits("2", "")}},
	}
	want := shown
	want.Conditions = append(want.Conditions[:1:1], base.Conditions[2])

	was := &v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u"}, Status: base}
	patch, err := statusPatch(was, &v1.Pod{Status: shown})
	if err != nil {
		t.Fatal(err)
	}
	old, err := json.Marshal(was)
	if err != nil {
		t.Fatal(err)
	}
	merged, err := strategicpatch.StrategicMergePatch(old, patch, v1.Pod{})
	if err != nil {
		t.Fatalf("%v\n%s", err, patch)
	}
	got := &v1.Pod{}
	if err := json.Unmarshal(merged, got); err != nil {
		t.Fatal(err)
	}
	if !equality.Semantic.DeepEqual(got.Status, want) {
		t.Errorf("patch %s\nmakes %+v\nwant  %+v", patch, got.Status, want)
	}
	if again, err := statusPatch(got, &v1.Pod{Status: shown}); err != nil || again != nil {
		t.Errorf("patched again: %s, %v", again, err)
	}
}
