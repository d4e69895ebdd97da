package node

import (
	"slices"
	"testing"

	v1 "k8s.io/api/core/v1"
)

func TestChanges(t *testing.T) {
	status := func(boot string, ready, disk v1.ConditionStatus) *v1.NodeStatus {
		return &v1.NodeStatus{NodeInfo: v1.NodeSystemInfo{BootID: boot}, Conditions: []v1.NodeCondition{
			{Type: v1.NodeReady, Status: ready}, {Type: v1.NodeDiskPressure, Status: disk}, {Type: "podd.dev/Else", Status: v1.ConditionTrue},
		}}
	}
	const yes, no = v1.ConditionTrue, v1.ConditionFalse
	for _, test := range []struct {
		name    string
		was, is *v1.NodeStatus
		want    []string
	}{
		{"registered", nil, status("a", yes, no), []string{"NodeReady", "NodeHasNoDiskPressure"}},
		{"the same", status("a", yes, no), status("a", yes, no), nil},
		{"no longer ready", status("a", yes, no), status("a", no, yes), []string{"NodeNotReady", "NodeHasDiskPressure"}},
		{"lost and found", status("a", v1.ConditionUnknown, v1.ConditionUnknown), status("a", yes, no), []string{"NodeReady", "NodeHasNoDiskPressure"}},
		{"another boot", status("a", yes, no), status("b", yes, no), []string{"Rebooted"}},
	} {
		var got []string
		for _, c := range changes("n", test.was, test.is) {
			got = append(got, c.reason)
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}
