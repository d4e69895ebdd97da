package admission

import (
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func list(cpu, memory string) v1.ResourceList {
	return v1.ResourceList{v1.ResourceCPU: resource.MustParse(cpu), v1.ResourceMemory: resource.MustParse(memory)}
}

func newPod(name string, cpu, memory string, change ...func(*v1.Pod)) *v1.Pod {
	p := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name), Annotations: map[string]string{"kubernetes.io/config.source": "api"}},
		Spec:       v1.PodSpec{Containers: []v1.Container{{Name: "c"}}},
	}
	if cpu != "" {
		p.Spec.Containers[0].Resources.Requests = list(cpu, memory)
	}
	for _, f := range change {
		f(p)
	}
	return p
}

func TestAdmit(t *testing.T) {
	critical := func(p *v1.Pod) { n := int32(2000001000); p.Spec.Priority = &n }
	port := func(ip string, n int32) func(*v1.Pod) {
		return func(p *v1.Pod) { p.Spec.Containers[0].Ports = []v1.ContainerPort{{HostPort: n, HostIP: ip}} }
	}
	node := &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", Labels: map[string]string{"zone": "a"}}}
	node.Spec.Taints = []v1.Taint{{Key: "k", Effect: v1.TaintEffectNoExecute}}
	node.Status.Allocatable = list("2", "1Gi")
	node.Status.Allocatable[v1.ResourcePods] = resource.MustParse("3")
	others := []*v1.Pod{newPod("big", "1500m", "100Mi", port("", 80)), newPod("small", "100m", "900Mi")}
	for _, c := range []struct {
		name    string
		pod     *v1.Pod
		static  bool
		others  []*v1.Pod
		reason  string
		message string
		preempt []types.UID
	}{
		{name: "fits", pod: newPod("p", "100m", "1Mi"), others: others},
		{name: "cpu", pod: newPod("p", "500m", "1Mi"), others: others, reason: OutOfCPU,
			message: "Node didn't have enough resource: cpu, requested: 500, used: 1600, capacity: 2000"},
		{name: "memory", pod: newPod("p", "1m", "100Mi"), others: others, reason: OutOfMemory},
		{name: "pods", pod: newPod("p", "", ""), others: append(others, newPod("third", "", "")), reason: OutOfPods},
		{name: "selector", pod: newPod("p", "", "", func(p *v1.Pod) { p.Spec.NodeSelector = map[string]string{"zone": "b"} }), reason: NodeAffinity,
			message: "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector"},
		{name: "port", pod: newPod("p", "", "", port("127.0.0.1", 80)), others: others, reason: NodePorts},
		{name: "port of another address", pod: newPod("p", "", "", port("127.0.0.1", 81)), others: []*v1.Pod{newPod("o", "", "", port("127.0.0.2", 81))}},
		{name: "os", pod: newPod("p", "", "", func(p *v1.Pod) { p.Spec.OS = &v1.PodOS{Name: v1.Windows} }), reason: PodOSNotSupported},
		{name: "taint of the cluster's", pod: newPod("p", "", "")},
		{name: "taint of a static pod", pod: newPod("p", "", ""), static: true, reason: TaintToleration},
		{name: "critical preempts", pod: newPod("p", "500m", "1Mi", critical), others: others, preempt: []types.UID{"big"}},
		{name: "critical preempts the other", pod: newPod("p", "1m", "200Mi", critical), others: others, preempt: []types.UID{"small"}},
		{name: "critical among critical", pod: newPod("p", "2", "1Mi", critical), others: []*v1.Pod{newPod("o", "1", "1Mi", critical)}, reason: UnexpectedError},
		{name: "critical but mismatched", pod: newPod("p", "2", "1Mi", critical, port("", 80)), others: others, reason: NodePorts},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := Admit(node, c.pod, c.static, c.others)
			if v.Reason != c.reason || c.message != "" && v.Message != c.message {
				t.Errorf("reason %q, message %q", v.Reason, v.Message)
			}
			if len(v.Preempt) != len(c.preempt) || len(c.preempt) > 0 && v.Preempt[0] != c.preempt[0] {
				t.Errorf("preempts %v, want %v", v.Preempt, c.preempt)
			}
		})
	}
}
