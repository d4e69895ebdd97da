package spec

import (
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

func TestOverheadIsTheSandboxs(t *testing.T) {
	n := node()
	cfg, err := n.Sandbox(pod(func(p *v1.Pod) {
		p.Spec.Overhead = v1.ResourceList{v1.ResourceCPU: resource.MustParse("500m"), v1.ResourceMemory: resource.MustParse("64Mi")}
		p.Spec.Containers[0].Resources.Limits = v1.ResourceList{v1.ResourceCPU: resource.MustParse("1"), v1.ResourceMemory: resource.MustParse("64Mi")}
		p.Spec.Containers[0].Resources.Requests = p.Spec.Containers[0].Resources.Limits
	}), 0, "", func(string, string) {})
	if err != nil {
		t.Fatal(err)
	}
	if o := cfg.Linux.Overhead; o.MemoryLimitInBytes != 64<<20 || o.CpuShares != 512 {
		t.Errorf("overhead: %+v", o)
	}
	if r := cfg.Linux.Resources; r.MemoryLimitInBytes != 128<<20 || r.CpuQuota != 150000 {
		t.Errorf("the pod's limits, overhead included: %+v", r)
	}
}
