// Package stats tells what the node, its pods and their containers use: the
// kubelet's summary API, and the metrics made of it. Figures are read from the
// kernel when they are asked for; what would take a walk over files is taken
// from those who measure it in the background.
package stats

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"github.com/podd-runtime/podd/cri"
	"github.com/podd-runtime/podd/kubelet/pods/spec"
)

// Pods is the pod table. *pods.Table is it.
type Pods interface{ List() []*v1.Pod }

// Runtime is what is needed of the runtime. *cri.Service is it.
type Runtime interface {
	ListPodSandboxStats(context.Context, *runtimeapi.ListPodSandboxStatsRequest) (*runtimeapi.ListPodSandboxStatsResponse, error)
	ImageFsInfo(context.Context, *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error)
	Metrics(ctx context.Context, emit cri.EmitMetric)
	DiskAtRest(ctx context.Context, uid string) map[string]cri.AtRest
}

// Volumes knows what was measured of pods' volumes. *volumes.Volumes is it.
type Volumes interface {
	Stats(uid types.UID) []statsapi.VolumeStats
}

// Config of a Provider.
type Config struct {
	NodeName string
	// RootDir is where pods' directories are; its file system is the node's.
	RootDir string
	// PodLogsDir is where containers' logs are.
	PodLogsDir string
	// PodsGroup is the cgroup that holds all pods', below the mount points.
	PodsGroup string
	Pods      Pods
	Runtime   Runtime
	Volumes   Volumes
}

// Provider of statistics.
type Provider struct {
	cfg  Config
	boot time.Time

	mu    sync.Mutex
	rates map[string]sample // of groups that the runtime does not know
}

// New returns a Provider.
func New(cfg Config) *Provider {
	p := &Provider{cfg: cfg, boot: bootTime(), rates: map[string]sample{}}
	p.nodeGroup("/") // the first sample: rates are there from the first question on
	return p
}

// Summary of the node and its pods. Who wants CPU and memory only is spared
// the rest.
func (p *Provider) Summary(ctx context.Context, only bool) (*statsapi.Summary, error) {
	pods, err := p.pods(ctx, only)
	if err != nil {
		return nil, fmt.Errorf("failed to list pod stats: %w", err) //nolint:staticcheck // upstream's words
	}
	node, err := p.node(ctx, only)
	if err != nil {
		return nil, err
	}
	return &statsapi.Summary{Node: *node, Pods: pods}, nil
}

func (p *Provider) pods(ctx context.Context, only bool) ([]statsapi.PodStats, error) {
	list, err := p.cfg.Runtime.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
	if err != nil {
		return nil, err
	}
	known := map[types.UID]*v1.Pod{}
	for _, pod := range p.cfg.Pods.List() {
		known[pod.UID] = pod
	}
	// Of a pod with several sandboxes the newest counts.
	newest := map[string]*runtimeapi.PodSandboxStats{}
	for _, st := range list.GetStats() {
		m := st.GetAttributes().GetMetadata()
		if old := newest[m.GetUid()]; old == nil || m.GetAttempt() > old.GetAttributes().GetMetadata().GetAttempt() {
			newest[m.GetUid()] = st
		}
	}
	var rest map[string]cri.AtRest
	if !only {
		rest = p.cfg.Runtime.DiskAtRest(ctx, "")
	}
	out := make([]statsapi.PodStats, 0, len(newest))
	for uid, st := range newest {
		m := st.GetAttributes().GetMetadata()
		ps := statsapi.PodStats{PodRef: statsapi.PodReference{Name: m.GetName(), Namespace: m.GetNamespace(), UID: uid}, Containers: []statsapi.ContainerStats{}}
		pod := known[types.UID(uid)]
		if pod != nil {
			ps.StartTime = pod.CreationTimestamp
			if pod.Status.StartTime != nil {
				ps.StartTime = *pod.Status.StartTime
			}
		}
		p.fill(&ps, st, pod, rest[uid], only)
		out = append(out, ps)
	}
	slices.SortFunc(out, func(a, b statsapi.PodStats) int {
		return cmp.Or(cmp.Compare(a.PodRef.Namespace, b.PodRef.Namespace), cmp.Compare(a.PodRef.Name, b.PodRef.Name))
	})
	return out, nil
}

// Storage is what a pod that runs takes of the node's own storage: the layers
// and logs of its containers, its volumes, and the sum of those that live and
// die with it. errdefs.ErrNotFound: it has no sandbox.
func (p *Provider) Storage(ctx context.Context, pod *v1.Pod) (*statsapi.PodStats, error) {
	list, err := p.cfg.Runtime.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{
		LabelSelector: map[string]string{spec.LabelPodUID: string(pod.UID)},
	}})
	if err != nil {
		return nil, err
	}
	var newest *runtimeapi.PodSandboxStats
	for _, st := range list.GetStats() {
		if newest == nil || st.GetAttributes().GetMetadata().GetAttempt() > newest.GetAttributes().GetMetadata().GetAttempt() {
			newest = st
		}
	}
	if newest == nil {
		return nil, fmt.Errorf("sandbox of pod %s/%s: %w", pod.Namespace, pod.Name, errdefs.ErrNotFound)
	}
	ps := &statsapi.PodStats{PodRef: statsapi.PodReference{Name: pod.Name, Namespace: pod.Namespace, UID: string(pod.UID)}}
	p.fill(ps, newest, pod, p.cfg.Runtime.DiskAtRest(ctx, string(pod.UID))[string(pod.UID)], false)
	return ps, nil
}

func (p *Provider) fill(ps *statsapi.PodStats, st *runtimeapi.PodSandboxStats, pod *v1.Pod, rest cri.AtRest, only bool) {
	linux := st.GetLinux()
	ps.CPU, ps.Memory = cpuStats(linux.GetCpu()), memoryStats(linux.GetMemory())
	var swap *statsapi.SwapStats
	for _, c := range linux.GetContainers() {
		cs := statsapi.ContainerStats{
			Name: c.GetAttributes().GetMetadata().GetName(), StartTime: started(pod, c.GetAttributes()),
			CPU: cpuStats(c.GetCpu()), Memory: memoryStats(c.GetMemory()), Swap: swapStats(c.GetSwap()),
		}
		swap = addSwap(swap, cs.Swap)
		if !only {
			cs.IO = ioStats(c.GetIo())
			cs.Rootfs = p.writable(c.GetWritableLayer())
			cs.Logs = p.logs(ps.PodRef, cs.Name)
		}
		ps.Containers = append(ps.Containers, cs)
	}
	ps.Swap = swap
	if only {
		return
	}
	ps.IO, ps.Network = ioStats(linux.GetIo()), networkStats(linux.GetNetwork())
	if n := linux.GetProcess().GetProcessCount(); n != nil {
		ps.ProcessStats = &statsapi.ProcessStats{ProcessCount: value(n)}
	}
	if pod != nil {
		ps.VolumeStats = p.cfg.Volumes.Stats(pod.UID)
	}
	ps.EphemeralStorage = p.ephemeral(ps, pod, rest)
}

// started is when a container's instance began: what the pod's status says of
// it.
func started(pod *v1.Pod, a *runtimeapi.ContainerAttributes) metav1.Time {
	if pod == nil {
		return metav1.Time{}
	}
	for _, list := range [][]v1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses, pod.Status.EphemeralContainerStatuses} {
		for i := range list {
			if list[i].Name == a.GetMetadata().GetName() && list[i].State.Running != nil {
				return list[i].State.Running.StartedAt
			}
		}
	}
	return metav1.Time{}
}

func at(ns int64) metav1.Time { return metav1.NewTime(time.Unix(0, ns)) }

func value(v *runtimeapi.UInt64Value) *uint64 {
	if v == nil {
		return nil
	}
	return &v.Value
}

func cpuStats(u *runtimeapi.CpuUsage) *statsapi.CPUStats {
	if u == nil {
		return nil
	}
	return &statsapi.CPUStats{Time: at(u.GetTimestamp()), UsageNanoCores: value(u.GetUsageNanoCores()), UsageCoreNanoSeconds: value(u.GetUsageCoreNanoSeconds()), PSI: psi(u.GetPsi())}
}

func memoryStats(u *runtimeapi.MemoryUsage) *statsapi.MemoryStats {
	if u == nil {
		return nil
	}
	return &statsapi.MemoryStats{
		Time: at(u.GetTimestamp()), AvailableBytes: value(u.GetAvailableBytes()), UsageBytes: value(u.GetUsageBytes()), WorkingSetBytes: value(u.GetWorkingSetBytes()),
		RSSBytes: value(u.GetRssBytes()), PageFaults: value(u.GetPageFaults()), MajorPageFaults: value(u.GetMajorPageFaults()), PSI: psi(u.GetPsi()),
	}
}

func swapStats(u *runtimeapi.SwapUsage) *statsapi.SwapStats {
	if u == nil {
		return nil
	}
	return &statsapi.SwapStats{Time: at(u.GetTimestamp()), SwapUsageBytes: value(u.GetSwapUsageBytes()), SwapAvailableBytes: value(u.GetSwapAvailableBytes())}
}

// addSwap sums up the containers': the runtime does not tell a pod's.
func addSwap(sum, s *statsapi.SwapStats) *statsapi.SwapStats {
	if s == nil || s.SwapUsageBytes == nil {
		return sum
	}
	if sum == nil {
		sum = &statsapi.SwapStats{Time: s.Time, SwapUsageBytes: new(uint64)}
	}
	*sum.SwapUsageBytes += *s.SwapUsageBytes
	return sum
}

func ioStats(u *runtimeapi.IoUsage) *statsapi.IOStats {
	if u == nil || u.GetPsi() == nil {
		return nil
	}
	return &statsapi.IOStats{Time: at(u.GetTimestamp()), PSI: psi(u.GetPsi())}
}

func psi(p *runtimeapi.PsiStats) *statsapi.PSIStats {
	if p == nil {
		return nil
	}
	data := func(d *runtimeapi.PsiData) statsapi.PSIData {
		return statsapi.PSIData{Total: d.GetTotal(), Avg10: d.GetAvg10(), Avg60: d.GetAvg60(), Avg300: d.GetAvg300()}
	}
	return &statsapi.PSIStats{Full: data(p.GetFull()), Some: data(p.GetSome())}
}

func networkStats(u *runtimeapi.NetworkUsage) *statsapi.NetworkStats {
	if u == nil {
		return nil
	}
	one := func(i *runtimeapi.NetworkInterfaceUsage) statsapi.InterfaceStats {
		return statsapi.InterfaceStats{Name: i.GetName(), RxBytes: value(i.GetRxBytes()), RxErrors: value(i.GetRxErrors()), TxBytes: value(i.GetTxBytes()), TxErrors: value(i.GetTxErrors())}
	}
	out := &statsapi.NetworkStats{Time: at(u.GetTimestamp())}
	if u.GetDefaultInterface() != nil {
		out.InterfaceStats = one(u.GetDefaultInterface())
	}
	for _, i := range u.GetInterfaces() {
		out.Interfaces = append(out.Interfaces, one(i))
	}
	return out
}
