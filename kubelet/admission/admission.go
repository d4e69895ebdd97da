// Package admission decides whether a node takes a pod that was bound to it,
// as upstream's kubelet does (pkg/kubelet/lifecycle, preemption): pure
// functions of the node, the pod and those that are there already.
package admission

import (
	"cmp"
	"fmt"
	"runtime"
	"slices"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	resourcehelper "k8s.io/component-helpers/resource"
	"k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"k8s.io/klog/v2"
	v1helper "k8s.io/kubernetes/pkg/apis/core/v1/helper"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
	"k8s.io/kubernetes/pkg/apis/scheduling"
)

// Verdict on a pod.
type Verdict struct {
	// Reason and Message of the rejected pod's status; "": it is admitted.
	Reason, Message string
	// Preempt are pods that have to go to make room for it.
	Preempt []types.UID
}

// Reasons of upstream's.
const (
	OutOfCPU              = "OutOfcpu"
	OutOfMemory           = "OutOfmemory"
	OutOfEphemeralStorage = "OutOfephemeral-storage"
	OutOfPods             = "OutOfpods"
	NodeAffinity          = "NodeAffinity"
	NodeName              = "NodeName"
	NodePorts             = "NodePorts"
	TaintToleration       = "TaintToleration"
	PodOSNotSupported     = "PodOSNotSupported"
	PodOSLabel            = "PodOSSelectorNodeLabelDoesNotMatch"
	SupplementalGroups    = "SupplementalGroupsPolicyNotSupported"
	UnexpectedError       = "UnexpectedAdmissionError"
)

// Admit a pod to the node, where others are: all that are not over.
func Admit(node *v1.Node, pod *v1.Pod, static bool, others []*v1.Pod) Verdict {
	if os, ok := pod.Labels[v1.LabelOSStable]; ok && os != runtime.GOOS {
		return Verdict{Reason: PodOSLabel, Message: "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label"}
	}
	if pod.Spec.OS != nil && string(pod.Spec.OS.Name) != runtime.GOOS {
		return Verdict{Reason: PodOSNotSupported, Message: "Failed to admit pod as the OS field doesn't match node OS"}
	}
	if sc := pod.Spec.SecurityContext; sc != nil && sc.SupplementalGroupsPolicy != nil && *sc.SupplementalGroupsPolicy == v1.SupplementalGroupsPolicyStrict {
		if f := node.Status.Features; f == nil || f.SupplementalGroupsPolicy == nil || !*f.SupplementalGroupsPolicy {
			return Verdict{Reason: SupplementalGroups, Message: "SupplementalGroupsPolicy=Strict is not supported in this node"}
		}
	}
	short := lacking(node, pod, others)
	other := mismatch(node, pod, static, others)
	critical := Critical(pod)
	switch {
	case len(short) > 0 && !critical:
		return short[0].verdict()
	case other.Reason != "":
		return other
	case len(short) > 0:
		victims, err := preempt(pod, others, short)
		if err != nil {
			return Verdict{Reason: UnexpectedError, Message: fmt.Sprintf("Unexpected error while attempting to recover from admission failure: %v", err)}
		}
		return Verdict{Preempt: victims}
	}
	return Verdict{}
}

// mismatch of what preemption does not help against.
func mismatch(node *v1.Node, pod *v1.Pod, static bool, others []*v1.Pod) Verdict {
	predicate := func(name, why string) Verdict {
		return Verdict{Reason: name, Message: fmt.Sprintf("Predicate %s failed: %s", name, why)}
	}
	if match, err := nodeaffinity.GetRequiredNodeAffinity(pod).Match(node); err != nil || !match {
		return predicate(NodeAffinity, "node(s) didn't match Pod's node affinity/selector")
	}
	if pod.Spec.NodeName != "" && pod.Spec.NodeName != node.Name {
		return predicate(NodeName, "node(s) didn't match the requested node name")
	}
	if portsTaken(pod, others) {
		return predicate(NodePorts, "node(s) didn't have free ports for the requested pod ports")
	}
	// Pods of the apiserver are evicted by its taint manager; static ones are
	// the node's own affair.
	if static {
		_, untolerated := corev1.FindMatchingUntoleratedTaint(klog.Background(), node.Spec.Taints, pod.Spec.Tolerations,
			func(t *v1.Taint) bool { return t.Effect == v1.TaintEffectNoExecute }, true)
		if untolerated {
			return predicate(TaintToleration, "node(s) had taints that the pod didn't tolerate")
		}
	}
	return Verdict{}
}

// Critical says that a pod of the node's or the cluster's must run, if others
// have to go for it (upstream: types.IsCriticalPod).
func Critical(pod *v1.Pod) bool {
	if source, have := pod.Annotations["kubernetes.io/config.source"]; have && source != "api" {
		return true
	}
	return pod.Spec.Priority != nil && *pod.Spec.Priority >= scheduling.SystemCriticalPriority
}

// shortage of a resource.
type shortage struct {
	name                      v1.ResourceName
	requested, used, capacity int64
}

func (s shortage) verdict() Verdict {
	reason := "OutOf" + string(s.name)
	return Verdict{Reason: reason, Message: fmt.Sprintf("Node didn't have enough resource: %s, requested: %d, used: %d, capacity: %d",
		s.name, s.requested, s.used, s.capacity)}
}

// requests of a pod, CPU in milli-units.
func requests(pod *v1.Pod) map[v1.ResourceName]int64 {
	out := map[v1.ResourceName]int64{}
	for name, q := range resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{}) {
		if name == v1.ResourceCPU {
			out[name] = q.MilliValue()
		} else {
			out[name] = q.Value()
		}
	}
	return out
}

// lacking are the resources that do not suffice, pods first and then by name.
// Extended resources that the node does not have are the cluster's.
func lacking(node *v1.Node, pod *v1.Pod, others []*v1.Pod) (short []shortage) {
	if most, ok := node.Status.Allocatable[v1.ResourcePods]; ok && int64(len(others))+1 > most.Value() {
		short = append(short, shortage{v1.ResourcePods, 1, int64(len(others)), most.Value()})
	}
	want := requests(pod)
	used := map[v1.ResourceName]int64{}
	for _, o := range others {
		for name, v := range requests(o) {
			used[name] += v
		}
	}
	names := make([]v1.ResourceName, 0, len(want))
	for name := range want {
		names = append(names, name)
	}
	order := []v1.ResourceName{v1.ResourceCPU, v1.ResourceMemory, v1.ResourceEphemeralStorage}
	rank := func(n v1.ResourceName) int {
		if i := slices.Index(order, n); i >= 0 {
			return i
		}
		return len(order)
	}
	slices.SortFunc(names, func(a, b v1.ResourceName) int { return cmp.Or(rank(a)-rank(b), cmp.Compare(a, b)) })
	for _, name := range names {
		q, have := node.Status.Allocatable[name]
		if want[name] == 0 || !have && v1helper.IsExtendedResourceName(name) {
			continue
		}
		capacity := q.Value()
		if name == v1.ResourceCPU {
			capacity = q.MilliValue()
		}
		if want[name] > capacity-used[name] {
			short = append(short, shortage{name, want[name], used[name], capacity})
		}
	}
	return short
}

// preempt chooses the pods to go: of lower priority, best effort before
// burstable before guaranteed, and of those the ones whose requests are next
// to what is needed.
func preempt(pod *v1.Pod, others []*v1.Pod, short []shortage) ([]types.UID, error) {
	need := map[v1.ResourceName]int64{}
	for _, s := range short {
		need[s.name] = s.requested + s.used - s.capacity
	}
	rank := map[v1.PodQOSClass]int{v1.PodQOSBestEffort: 0, v1.PodQOSBurstable: 1, v1.PodQOSGuaranteed: 2}
	var candidates []*v1.Pod
	for _, o := range others {
		if preemptable(pod, o) {
			candidates = append(candidates, o)
		}
	}
	var chosen []*v1.Pod
	for len(need) > 0 {
		best, distance := -1, 0.0
		for i, c := range candidates {
			d := far(c, need)
			if d >= float64(len(need)) {
				continue // it would give nothing
			}
			if best < 0 || rank[qos.GetPodQOS(c)] < rank[qos.GetPodQOS(candidates[best])] ||
				rank[qos.GetPodQOS(c)] == rank[qos.GetPodQOS(candidates[best])] && d < distance {
				best, distance = i, d
			}
		}
		if best < 0 {
			return nil, fmt.Errorf("preemption: no set of running pods found to reclaim resources: %v", need)
		}
		chosen = append(chosen, candidates[best])
		need = subtract(need, candidates[best])
		candidates = slices.Delete(candidates, best, best+1)
	}
	// What a later, larger one has made needless stays.
	for i := 0; i < len(chosen); i++ {
		left := map[v1.ResourceName]int64{}
		for _, s := range short {
			left[s.name] = s.requested + s.used - s.capacity
		}
		for j, c := range chosen {
			if j != i {
				left = subtract(left, c)
			}
		}
		if len(left) == 0 {
			chosen = slices.Delete(chosen, i, i+1)
			i--
		}
	}
	uids := make([]types.UID, len(chosen))
	for i, c := range chosen {
		uids[i] = c.UID
	}
	return uids, nil
}

// preemptable says whether victim may go for pod (upstream: types.Preemptable).
func preemptable(pod, victim *v1.Pod) bool {
	if Critical(pod) && !Critical(victim) {
		return true
	}
	return pod.Spec.Priority != nil && victim.Spec.Priority != nil && *pod.Spec.Priority > *victim.Spec.Priority
}

func given(pod *v1.Pod, name v1.ResourceName) int64 {
	if name == v1.ResourcePods {
		return 1
	}
	return requests(pod)[name]
}

// far is the distance of a pod's requests from what is needed: each resource
// counts from 0, all of it, to 1, none.
func far(pod *v1.Pod, need map[v1.ResourceName]int64) (d float64) {
	for name, n := range need {
		left := float64(n-given(pod, name)) / float64(n)
		if left > 0 {
			d += left * left
		}
	}
	return d
}

func subtract(need map[v1.ResourceName]int64, pod *v1.Pod) map[v1.ResourceName]int64 {
	out := map[v1.ResourceName]int64{}
	for name, n := range need {
		if left := n - given(pod, name); left > 0 {
			out[name] = left
		}
	}
	return out
}

// portsTaken says whether a port of the host that the pod wants is another's.
func portsTaken(pod *v1.Pod, others []*v1.Pod) bool {
	want := hostPorts(pod)
	if len(want) == 0 {
		return false
	}
	for _, o := range others {
		for _, have := range hostPorts(o) {
			for _, w := range want {
				if w.port == have.port && w.protocol == have.protocol && (w.ip == have.ip || w.ip == "0.0.0.0" || have.ip == "0.0.0.0") {
					return true
				}
			}
		}
	}
	return false
}

type hostPort struct {
	ip       string
	protocol v1.Protocol
	port     int32
}

func hostPorts(pod *v1.Pod) (out []hostPort) {
	add := func(c *v1.Container) {
		for _, p := range c.Ports {
			if p.HostPort > 0 {
				out = append(out, hostPort{cmp.Or(p.HostIP, "0.0.0.0"), cmp.Or(p.Protocol, v1.ProtocolTCP), p.HostPort})
			}
		}
	}
	for i := range pod.Spec.Containers {
		add(&pod.Spec.Containers[i])
	}
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; c.RestartPolicy != nil && *c.RestartPolicy == v1.ContainerRestartPolicyAlways {
			add(c)
		}
	}
	return out
}
