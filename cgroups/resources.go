package cgroups

import (
	"os"
	"strconv"
	"strings"

	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	v1 "k8s.io/api/core/v1"
	resourcehelper "k8s.io/component-helpers/resource"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	v1helper "k8s.io/kubernetes/pkg/apis/core/v1/helper"
	v1qos "k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
	"k8s.io/kubernetes/pkg/apis/scheduling"
)

const (
	// MinShares and MaxShares are the kernel's bounds of cpu.shares
	// (kernel/sched/sched.h).
	MinShares, MaxShares = 2, 262144
	// DefaultQuotaPeriod is the kubelet's cpuCFSQuotaPeriod in microseconds.
	DefaultQuotaPeriod = 100000
	// minQuota is the smallest cpu.cfs_quota_us the kernel takes
	// (min_cfs_quota_period, kernel/sched/core.c), in microseconds.
	minQuota = 1000

	guaranteedOOMScoreAdj = -997
	bestEffortOOMScoreAdj = 1000
)

// MilliCPUToShares converts thousandths of a CPU to cpu.shares. Zero means
// that nothing was asked for, which is the smallest weight.
func MilliCPUToShares(milliCPU int64) uint64 {
	return uint64(min(max(milliCPU*1024/1000, MinShares), MaxShares))
}

// MilliCPUToQuota converts thousandths of a CPU to cpu.cfs_quota_us for a
// period in microseconds, at least 1 ms. Zero stays zero: no limit.
func MilliCPUToQuota(milliCPU, period int64) int64 {
	if milliCPU == 0 {
		return 0
	}
	return max(milliCPU*period/1000, minQuota)
}

// SharesToWeight converts cpu.shares to cgroup v2's cpu.weight for the QoS and
// pod groups with the kubelet's linear formula of KEP-2254. Containers' groups
// are the runtime library's affair, which since 2025 fits a curve through the
// defaults (1024 → 100); the two never weigh against each other as siblings.
func SharesToWeight(shares uint64) uint64 {
	switch {
	case shares == 0:
		return 0
	case shares <= MinShares:
		return 1
	case shares >= MaxShares:
		return 10000
	}
	return 1 + (shares-2)*9999/262142
}

// weightToShares is the inverse of SharesToWeight.
func weightToShares(weight uint64) uint64 { return (weight-min(weight, 1))*262142/9999 + MinShares }

// QOSClass of a pod: its status' class when set, computed otherwise.
func QOSClass(pod *v1.Pod) v1.PodQOSClass { return v1qos.GetPodQOS(pod) }

// PodOptions are the node's settings that shape pod and container limits.
type PodOptions struct {
	// NoCPUQuota is the negation of the kubelet's cpuCFSQuota: CPU limits are
	// then not enforced.
	NoCPUQuota bool
	// QuotaPeriod is cpuCFSQuotaPeriod in microseconds; 0: 100 ms.
	QuotaPeriod uint64
	// PIDs is podPidsLimit; 0 or less: none.
	PIDs int64
	// MemoryCapacity is the node's memory in bytes, for oom_score_adj.
	MemoryCapacity int64
	// GroupOOM is the negation of singleProcessOOMKill: on cgroup v2 an
	// out-of-memory kill then takes the whole container (memory.oom.group).
	GroupOOM bool
	// Swap is what containers may have of it.
	Swap Swap
	// MemoryQoS sets memory.high of containers on cgroup v2, nil: not.
	MemoryQoS *MemoryQoS
}

// Swap of the node (KEP-2400).
type Swap struct {
	// Unified: cgroup v2. Controlled: the kernel accounts swap by group; where
	// it does not, nothing is set.
	Unified, Controlled bool
	// Limited gives containers of burstable pods their share of Capacity
	// bytes, by their memory request; otherwise containers have none
	// (memorySwap.swapBehavior LimitedSwap and NoSwap).
	Limited  bool
	Capacity int64
}

// MemoryQoS throttles containers near their memory limit (KEP-2570).
type MemoryQoS struct {
	// Factor between request, 0, and limit, 1: memoryThrottlingFactor.
	Factor float64
	// Allocatable stands for the limit that a container does not have, bytes.
	Allocatable int64
	// Reserve protects what is requested (memoryReservationPolicy
	// TieredReservation): memory.min of guaranteed, memory.low of burstable
	// pods' containers.
	Reserve bool
}

func (o PodOptions) period() uint64 {
	if o.QuotaPeriod == 0 {
		return DefaultQuotaPeriod
	}
	return o.QuotaPeriod
}

// ResourceConfigForPod computes the limits of the pod's group as the kubelet
// does (pkg/kubelet/cm, ResourceConfigForPod): requests become shares; a limit
// holds for the pod only when every container has one, or the pod itself.
func ResourceConfigForPod(pod *v1.Pod, o PodOptions) *specs.LinuxResources {
	reqs := resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{})
	cpuLimited, memoryLimited := true, true
	limits := resourcehelper.PodLimits(pod, resourcehelper.PodResourcesOptions{
		ContainerFn: func(l v1.ResourceList, _ resourcehelper.ContainerType) {
			cpuLimited = cpuLimited && !l.Cpu().IsZero()
			memoryLimited = memoryLimited && !l.Memory().IsZero()
		},
	})
	if resourcehelper.IsPodLevelResourcesSet(pod) {
		cpuLimited = cpuLimited || !pod.Spec.Resources.Limits.Cpu().IsZero()
		memoryLimited = memoryLimited || !pod.Spec.Resources.Limits.Memory().IsZero()
	}

	qos := v1qos.GetPodQOS(pod)
	shares := MilliCPUToShares(reqs.Cpu().MilliValue())
	if qos == v1.PodQOSBestEffort {
		shares = MinShares
	}
	r := &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &shares}}
	if qos == v1.PodQOSGuaranteed || qos == v1.PodQOSBurstable && cpuLimited {
		period := o.period()
		quota := MilliCPUToQuota(limits.Cpu().MilliValue(), int64(period))
		if o.NoCPUQuota {
			quota = -1
		}
		r.CPU.Quota, r.CPU.Period = &quota, &period
	}
	if qos == v1.PodQOSGuaranteed || qos == v1.PodQOSBurstable && memoryLimited {
		if m := limits.Memory().Value(); m > 0 {
			r.Memory = &specs.LinuxMemory{Limit: &m}
		}
	}
	if o.PIDs > 0 {
		pids := o.PIDs
		r.Pids = &specs.LinuxPids{Limit: &pids}
	}
	r.HugepageLimits = podHugepages(reqs)
	return r
}

// Widest gives as much of each of CPU and memory as either of two limits does,
// and of all else what a does: what a group needs while its containers change
// from one to the other.
func Widest(a, b *specs.LinuxResources) *specs.LinuxResources {
	out := *a
	cpu := specs.LinuxCPU{}
	if a.CPU != nil {
		cpu = *a.CPU
	}
	if b.CPU != nil {
		if s := b.CPU.Shares; s != nil && (cpu.Shares == nil || *cpu.Shares < *s) {
			cpu.Shares = s
		}
		if cpu.Quota != nil && (b.CPU.Quota == nil || *b.CPU.Quota <= 0 || *cpu.Quota > 0 && *b.CPU.Quota > *cpu.Quota) {
			cpu.Quota, cpu.Period = b.CPU.Quota, b.CPU.Period
		}
	}
	out.CPU = &cpu
	switch {
	case a.Memory == nil || b.Memory == nil || b.Memory.Limit == nil:
		out.Memory = nil
	case a.Memory.Limit != nil && *a.Memory.Limit < *b.Memory.Limit:
		out.Memory = b.Memory
	}
	return &out
}

// ForCRI is what the CRI says of a group's limits.
func ForCRI(r *specs.LinuxResources) *runtimeapi.LinuxContainerResources {
	out := &runtimeapi.LinuxContainerResources{}
	if r.CPU != nil {
		if r.CPU.Shares != nil {
			out.CpuShares = int64(*r.CPU.Shares)
		}
		if r.CPU.Quota != nil {
			out.CpuQuota = *r.CPU.Quota
		}
		if r.CPU.Period != nil {
			out.CpuPeriod = int64(*r.CPU.Period)
		}
	}
	if r.Memory != nil && r.Memory.Limit != nil {
		out.MemoryLimitInBytes = *r.Memory.Limit
	}
	return out
}

// podHugepages limits every page size of this kernel: to what is requested, or
// to nothing.
func podHugepages(reqs v1.ResourceList) []specs.LinuxHugepageLimit {
	sizes := hugePageSizes()
	if len(sizes) == 0 {
		return nil
	}
	wanted := map[int64]int64{}
	for name, q := range reqs {
		if v1helper.IsHugePageResourceName(name) {
			if size, err := v1helper.HugePageSizeFromResourceName(name); err == nil {
				wanted[size.Value()] += q.Value()
			}
		}
	}
	out := make([]specs.LinuxHugepageLimit, 0, len(sizes))
	for _, s := range sizes {
		out = append(out, specs.LinuxHugepageLimit{Pagesize: s.name, Limit: uint64(wanted[s.bytes])})
	}
	return out
}

// ResourceConfigForContainer computes what CRI's LinuxContainerResources say
// for one container, as the kubelet does (pkg/kubelet/kuberuntime).
func ResourceConfigForContainer(pod *v1.Pod, c *v1.Container, o PodOptions) *runtimeapi.LinuxContainerResources {
	limits := c.Resources.Limits
	cpuLimit, memoryLimit := limits.Cpu(), limits.Memory()
	if resourcehelper.IsPodLevelResourcesSet(pod) {
		// Without a limit of its own the container may use the pod's.
		if cpuLimit.IsZero() {
			cpuLimit = pod.Spec.Resources.Limits.Cpu()
		}
		if memoryLimit.IsZero() {
			memoryLimit = pod.Spec.Resources.Limits.Memory()
		}
	}
	request := c.Resources.Requests.Cpu()
	if _, asked := c.Resources.Requests[v1.ResourceCPU]; !asked {
		request = cpuLimit
	}
	r := &runtimeapi.LinuxContainerResources{
		CpuShares:          int64(MilliCPUToShares(request.MilliValue())),
		MemoryLimitInBytes: memoryLimit.Value(),
		OomScoreAdj:        int64(OOMScoreAdj(pod, c, o.MemoryCapacity)),
	}
	if !o.NoCPUQuota {
		r.CpuPeriod = int64(o.period())
		r.CpuQuota = MilliCPUToQuota(cpuLimit.MilliValue(), r.CpuPeriod)
	}
	if o.GroupOOM {
		r.Unified = map[string]string{"memory.oom.group": "1"}
	}
	r.HugepageLimits = containerHugepages(pod, c)
	o.Swap.apply(r, pod, c, o.MemoryCapacity)
	o.MemoryQoS.apply(r, pod, c)
	return r
}

// apply the container's swap limit.
func (s Swap) apply(r *runtimeapi.LinuxContainerResources, pod *v1.Pod, c *v1.Container, memory int64) {
	switch {
	case !s.Controlled:
	case !s.Unified:
		r.MemorySwapLimitInBytes = r.MemoryLimitInBytes // memory and swap together
	default:
		unified(r)["memory.swap.max"] = strconv.FormatInt(s.share(pod, c, memory), 10)
	}
}

// share of the node's swap, in bytes: of what a container of a burstable pod
// requests of the node's memory, if it does not request its limit.
func (s Swap) share(pod *v1.Pod, c *v1.Container, memory int64) int64 {
	request, limit := c.Resources.Requests.Memory(), c.Resources.Limits.Memory()
	if !s.Limited || critical(pod) || v1qos.GetPodQOS(pod) != v1.PodQOSBurstable || request.Cmp(*limit) == 0 ||
		memory <= 0 || request.Value() > memory {
		return 0
	}
	return int64(float64(request.Value()) / float64(memory) * float64(s.Capacity))
}

// critical pods are static pods, mirror pods and those of critical priority.
func critical(pod *v1.Pod) bool {
	if src, ok := pod.Annotations["kubernetes.io/config.source"]; ok && src != "api" {
		return true
	}
	if _, ok := pod.Annotations[v1.MirrorPodAnnotationKey]; ok {
		return true
	}
	return pod.Spec.Priority != nil && *pod.Spec.Priority >= scheduling.SystemCriticalPriority
}

// apply memory.high, and memory.min or memory.low.
func (q *MemoryQoS) apply(r *runtimeapi.LinuxContainerResources, pod *v1.Pod, c *v1.Container) {
	if q == nil {
		return
	}
	u := unified(r)
	request, limit := c.Resources.Requests.Memory().Value(), c.Resources.Limits.Memory().Value()
	u["memory.min"], u["memory.low"] = "0", "0"
	if q.Reserve && request != 0 {
		kept := "memory.low"
		if v1qos.GetPodQOS(pod) == v1.PodQOSGuaranteed {
			kept = "memory.min"
		}
		delete(u, "memory.min")
		delete(u, "memory.low")
		u[kept] = strconv.FormatInt(request, 10)
	}
	if request == limit {
		return // guaranteed, as far as memory goes
	}
	if limit == 0 {
		limit = q.Allocatable
	}
	page := int64(os.Getpagesize())
	high := int64(float64(request)+float64(limit-request)*q.Factor) / page * page
	if high > request {
		u["memory.high"] = strconv.FormatInt(high, 10)
	}
}

func unified(r *runtimeapi.LinuxContainerResources) map[string]string {
	if r.Unified == nil {
		r.Unified = map[string]string{}
	}
	return r.Unified
}

func containerHugepages(pod *v1.Pod, c *v1.Container) []*runtimeapi.HugepageLimit {
	sizes := hugePageSizes()
	if len(sizes) == 0 {
		return nil
	}
	wanted := map[int64]uint64{}
	read := func(l v1.ResourceList) {
		for name, q := range l {
			if v1helper.IsHugePageResourceName(name) {
				if size, err := v1helper.HugePageSizeFromResourceName(name); err == nil {
					wanted[size.Value()] = uint64(q.Value())
				}
			}
		}
	}
	if resourcehelper.IsPodLevelResourcesSet(pod) {
		read(pod.Spec.Resources.Limits)
	}
	read(c.Resources.Limits)
	out := make([]*runtimeapi.HugepageLimit, 0, len(sizes))
	for _, s := range sizes {
		out = append(out, &runtimeapi.HugepageLimit{PageSize: s.name, Limit: wanted[s.bytes]})
	}
	return out
}

// OOMScoreAdj is oom_score_adj of a container's processes (pkg/kubelet/qos):
// −997 for guaranteed and node-critical pods, 1000 for best effort, and for
// burstable ones in between, less the more memory was requested of the node's
// capacity in bytes.
func OOMScoreAdj(pod *v1.Pod, c *v1.Container, capacity int64) int {
	if nodeCritical(pod) {
		return guaranteedOOMScoreAdj
	}
	switch v1qos.GetPodQOS(pod) {
	case v1.PodQOSGuaranteed:
		return guaranteedOOMScoreAdj
	case v1.PodQOSBestEffort:
		return bestEffortOOMScoreAdj
	}
	if capacity <= 0 {
		return bestEffortOOMScoreAdj - 1
	}
	score := func(request int64) int { return int(1000 - 1000*request/capacity) }
	var share int64 // of what the pod requests beyond its containers' sum
	if resourcehelper.IsPodLevelRequestsSet(pod) && !pod.Spec.Resources.Requests.Memory().IsZero() {
		sum := resourcehelper.AggregateContainerRequests(pod, resourcehelper.PodResourcesOptions{})
		rest := pod.Spec.Resources.Requests.Memory().Value() - sum.Memory().Value()
		share = rest / int64(len(pod.Spec.Containers)+len(pod.Spec.InitContainers))
	}
	adj := score(c.Resources.Requests.Memory().Value() + share)
	if sidecar(pod, c) && len(pod.Spec.Containers) > 0 {
		// A sidecar must not die before what it serves.
		least := pod.Spec.Containers[0].Resources.Requests.Memory().Value()
		for _, o := range pod.Spec.Containers[1:] {
			least = min(least, o.Resources.Requests.Memory().Value())
		}
		adj = min(adj, score(least+share))
	}
	return min(max(adj, 1000+guaranteedOOMScoreAdj), bestEffortOOMScoreAdj-1)
}

func sidecar(pod *v1.Pod, c *v1.Container) bool {
	if c.RestartPolicy == nil || *c.RestartPolicy != v1.ContainerRestartPolicyAlways {
		return false
	}
	for i := range pod.Spec.InitContainers {
		if pod.Spec.InitContainers[i].Name == c.Name {
			return true
		}
	}
	return false
}

// nodeCritical follows the kubelet: the class system-node-critical on a static
// pod, a mirror pod, or one of critical priority.
func nodeCritical(pod *v1.Pod) bool {
	if pod.Spec.PriorityClassName != scheduling.SystemNodeCritical {
		return false
	}
	if src, ok := pod.Annotations["kubernetes.io/config.source"]; ok && src != "api" {
		return true
	}
	if _, ok := pod.Annotations[v1.MirrorPodAnnotationKey]; ok {
		return true
	}
	return pod.Spec.Priority != nil && *pod.Spec.Priority >= scheduling.SystemCriticalPriority
}

// NodeAllocatable is the limit of kubepods for what the node leaves to pods:
// memory in bytes, CPU as weight only, PIDs. Zero: no limit.
func NodeAllocatable(milliCPU, memory, pids int64) *specs.LinuxResources {
	r := &specs.LinuxResources{}
	if milliCPU > 0 {
		s := MilliCPUToShares(milliCPU)
		r.CPU = &specs.LinuxCPU{Shares: &s}
	}
	if memory > 0 {
		r.Memory = &specs.LinuxMemory{Limit: &memory}
	}
	if pids > 0 {
		r.Pids = &specs.LinuxPids{Limit: &pids}
	}
	return r
}

type pageSize struct {
	name  string // "2MB"
	bytes int64
}

// hugePageSizes of this kernel; the library reads them once.
func hugePageSizes() []pageSize {
	names := cgroups.HugePageSizes()
	out := make([]pageSize, 0, len(names))
	for _, n := range names {
		for unit, factor := range map[string]int64{"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30} {
			if v, err := strconv.ParseInt(strings.TrimSuffix(n, unit), 10, 64); err == nil {
				out = append(out, pageSize{n, v * factor})
			}
		}
	}
	return out
}
