package cgroups

import (
	"maps"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

func withMemory(request, limit string, annotations map[string]string) *v1.Pod {
	list := func(s string) v1.ResourceList {
		if s == "" {
			return nil
		}
		return v1.ResourceList{v1.ResourceCPU: resource.MustParse("1"), v1.ResourceMemory: resource.MustParse(s)}
	}
	p := &v1.Pod{Spec: v1.PodSpec{Containers: []v1.Container{{Name: "c", Resources: v1.ResourceRequirements{Requests: list(request), Limits: list(limit)}}}}}
	p.Annotations = annotations
	return p
}

func TestSwapOfContainers(t *testing.T) {
	static := map[string]string{"kubernetes.io/config.source": "file"}
	const gib = 1 << 30
	limited := Swap{Unified: true, Controlled: true, Limited: true, Capacity: 8 * gib}
	for _, tc := range []struct {
		name string
		swap Swap
		pod  *v1.Pod
		want string // memory.swap.max
		v1   int64  // memory and swap together
	}{
		{"a burstable container's share", limited, withMemory("1Gi", "2Gi", nil), "2147483648", 0},
		{"request without limit", limited, withMemory("1Gi", "", nil), "2147483648", 0},
		{"guaranteed", limited, withMemory("1Gi", "1Gi", nil), "0", 0},
		{"best effort", limited, withMemory("", "", nil), "0", 0},
		{"a static pod is critical", limited, withMemory("1Gi", "2Gi", static), "0", 0},
		{"more than the node has", limited, withMemory("5Gi", "6Gi", nil), "0", 0},
		{"no swap", Swap{Unified: true, Controlled: true, Capacity: 8 * gib}, withMemory("1Gi", "2Gi", nil), "0", 0},
		{"not accounted", Swap{Unified: true, Limited: true, Capacity: 8 * gib}, withMemory("1Gi", "2Gi", nil), "", 0},
		{"cgroup v1 has none", Swap{Controlled: true, Limited: true, Capacity: 8 * gib}, withMemory("1Gi", "2Gi", nil), "", 2 * gib},
	} {
		r := ResourceConfigForContainer(tc.pod, &tc.pod.Spec.Containers[0], PodOptions{Swap: tc.swap, MemoryCapacity: 4 * gib})
		if r.Unified["memory.swap.max"] != tc.want || r.MemorySwapLimitInBytes != tc.v1 {
			t.Errorf("%s: memory.swap.max %q, memory and swap %d", tc.name, r.Unified["memory.swap.max"], r.MemorySwapLimitInBytes)
		}
	}
}

func TestMemoryQoSOfContainers(t *testing.T) {
	q := func(reserve bool) *MemoryQoS { return &MemoryQoS{Factor: 0.9, Allocatable: 4 << 30, Reserve: reserve} }
	for _, tc := range []struct {
		name string
		qos  *MemoryQoS
		pod  *v1.Pod
		want map[string]string
	}{
		{"off", nil, withMemory("1Gi", "2Gi", nil), nil},
		{"between request and limit", q(false), withMemory("1Gi", "2Gi", nil), map[string]string{"memory.min": "0", "memory.low": "0", "memory.high": "2040107008"}},
		{"the node instead of a limit", q(false), withMemory("1Gi", "", nil), map[string]string{"memory.min": "0", "memory.low": "0", "memory.high": "3972841472"}},
		{"guaranteed is not throttled", q(false), withMemory("1Gi", "1Gi", nil), map[string]string{"memory.min": "0", "memory.low": "0"}},
		{"guaranteed is protected", q(true), withMemory("1Gi", "1Gi", nil), map[string]string{"memory.min": "1073741824"}},
		{"burstable is preferred", q(true), withMemory("1Gi", "2Gi", nil), map[string]string{"memory.low": "1073741824", "memory.high": "2040107008"}},
	} {
		r := ResourceConfigForContainer(tc.pod, &tc.pod.Spec.Containers[0], PodOptions{MemoryQoS: tc.qos, MemoryCapacity: 4 << 30})
		if !maps.Equal(r.Unified, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, r.Unified, tc.want)
		}
	}
}
