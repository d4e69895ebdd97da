package cri

import (
	"cmp"
	"context"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups/systemd"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cgroups"
)

// rateWindow is the least time between the samples of a CPU rate. Clients that
// ask more often get the last rate: over less time it is mostly noise.
const rateWindow = time.Second

// maxRateAge is when a sample is too old to say anything about now.
const maxRateAge = 2 * time.Minute

// cpuRates turns cumulated CPU time into cores used now, from the samples that
// clients' own requests make: nothing runs in the background.
type cpuRates struct {
	mu sync.Mutex
	m  map[string]cpuSample
}

type cpuSample struct {
	at    time.Time
	usage time.Duration
	rate  uint64 // nanocores
	valid bool
}

// add notes a sample and returns the rate in nanocores, when there is one.
func (r *cpuRates) add(id string, at time.Time, usage time.Duration) (uint64, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.m == nil {
		r.m = make(map[string]cpuSample)
	}
	old, ok := r.m[id]
	dt := at.Sub(old.at)
	switch {
	case !ok || dt > maxRateAge || usage < old.usage:
		r.m[id] = cpuSample{at: at, usage: usage}
		return 0, false
	case dt < rateWindow:
		return old.rate, old.valid
	}
	rate := uint64(float64(usage-old.usage) / float64(dt) * 1e9)
	r.m[id] = cpuSample{at: at, usage: usage, rate: rate, valid: true}
	return rate, true
}

// keep forgets all ids but those that live says.
func (r *cpuRates) keep(live func(id string) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id := range r.m {
		if !live(id) {
			delete(r.m, id)
		}
	}
}

// groupOf is the place of a container's cgroup below the mount points.
func (s *Service) groupOf(sb *sandbox, id string) (string, error) {
	parent, err := s.podGroup(sb)
	if err != nil {
		return "", err
	}
	if s.cfg.SystemdCgroup {
		return path.Join(parent, "podd-"+id+".scope"), nil
	}
	return path.Join(parent, id), nil
}

// podGroup is the pod's own cgroup, which the client made.
func (s *Service) podGroup(sb *sandbox) (string, error) {
	parent := s.cgroupParent(sb.config)
	if s.cfg.SystemdCgroup {
		return systemd.ExpandSlice(path.Base(parent))
	}
	return path.Join("/", parent), nil
}

// ContainerStats returns one container's statistics, from its cgroup's files
// and the image store's cache: nothing is scanned.
func (s *Service) ContainerStats(ctx context.Context, r *runtimeapi.ContainerStatsRequest) (*runtimeapi.ContainerStatsResponse, error) {
	c, err := s.objects.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	st, err := s.containerStats(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("statistics of container %s: %w", c.id, err)
	}
	return &runtimeapi.ContainerStatsResponse{Stats: st}, nil
}

// ListContainerStats returns the statistics of the running containers that
// match the filter. One that ends meanwhile is left out.
func (s *Service) ListContainerStats(ctx context.Context, r *runtimeapi.ListContainerStatsRequest) (*runtimeapi.ListContainerStatsResponse, error) {
	return &runtimeapi.ListContainerStatsResponse{Stats: s.listContainerStats(ctx, r.GetFilter())}, nil
}

func (s *Service) listContainerStats(ctx context.Context, f *runtimeapi.ContainerStatsFilter) []*runtimeapi.ContainerStats {
	s.usage.keep(func(id string) bool {
		_, cerr := s.objects.container(id)
		_, serr := s.objects.sandbox(id)
		return cerr == nil || serr == nil
	})
	var out []*runtimeapi.ContainerStats
	for _, c := range s.objects.allContainers() {
		if !strings.HasPrefix(c.id, f.GetId()) || !strings.HasPrefix(c.sandboxID, f.GetPodSandboxId()) || !matches(f.GetLabelSelector(), c.config.GetLabels()) {
			continue
		}
		if c.current() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			continue
		}
		if st, err := s.containerStats(ctx, c); err == nil {
			out = append(out, st)
		}
	}
	slices.SortFunc(out, func(a, b *runtimeapi.ContainerStats) int {
		return cmp.Compare(a.GetAttributes().GetId(), b.GetAttributes().GetId())
	})
	return out
}

func (s *Service) containerStats(ctx context.Context, c *container) (*runtimeapi.ContainerStats, error) {
	out := &runtimeapi.ContainerStats{Attributes: &runtimeapi.ContainerAttributes{
		Id: c.id, Metadata: c.config.GetMetadata(), Labels: c.config.GetLabels(), Annotations: c.config.GetAnnotations(),
	}}
	if u, err := s.writable(ctx, c); err == nil {
		out.WritableLayer = &runtimeapi.FilesystemUsage{
			Timestamp: now(), FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: s.mountpoint(ctx)},
			UsedBytes: wrap(u.Bytes), InodesUsed: wrap(u.Inodes),
		}
	} else if ctx.Err() == nil && !errdefs.IsNotFound(err) {
		s.log.Warn("what a container has on disk is not known", "container", c.id, "error", err)
	}
	if c.current() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return out, nil // an ended container has files and no cgroup
	}
	sb, err := s.objects.sandbox(c.sandboxID)
	if err != nil {
		return nil, err
	}
	group, err := s.groupOf(sb, c.id)
	if err != nil {
		return nil, err
	}
	st, err := cgroups.ReadStats(group)
	if err != nil {
		return nil, err
	}
	out.Cpu, out.Memory, out.Swap, out.Io = s.criStats(c.id, st)
	return out, nil
}

// mountpoint is where the writable layers are.
func (s *Service) mountpoint(ctx context.Context) string {
	if u, err := s.images.FsInfo(ctx); err == nil {
		return u.GetFsId().GetMountpoint()
	}
	return ""
}

func wrap(v uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: v} }

func wrapp(v *uint64) *runtimeapi.UInt64Value {
	if v == nil {
		return nil
	}
	return wrap(*v)
}

// criStats is a group's statistics as the CRI shows them.
func (s *Service) criStats(id string, st *cgroups.Stats) (*runtimeapi.CpuUsage, *runtimeapi.MemoryUsage, *runtimeapi.SwapUsage, *runtimeapi.IoUsage) {
	at := st.At.UnixNano()
	cpu := &runtimeapi.CpuUsage{Timestamp: at, Psi: psi(st.CPU)}
	if st.CPUUsage != nil {
		cpu.UsageCoreNanoSeconds = wrap(uint64(*st.CPUUsage))
		if rate, ok := s.usage.add(id, st.At, *st.CPUUsage); ok {
			cpu.UsageNanoCores = wrap(rate)
		}
	}
	mem := &runtimeapi.MemoryUsage{
		Timestamp: at, Psi: psi(st.Memory), UsageBytes: wrapp(st.MemoryUsage), WorkingSetBytes: wrapp(st.MemoryWorkingSet),
		RssBytes: wrapp(st.MemoryRSS), PageFaults: wrapp(st.PageFaults), MajorPageFaults: wrapp(st.MajorPageFaults),
	}
	if st.MemoryLimit != nil && st.MemoryWorkingSet != nil {
		mem.AvailableBytes = wrap(*st.MemoryLimit - min(*st.MemoryLimit, *st.MemoryWorkingSet))
	}
	var swap *runtimeapi.SwapUsage
	if st.SwapUsage != nil {
		swap = &runtimeapi.SwapUsage{Timestamp: at, SwapUsageBytes: wrapp(st.SwapUsage)}
	}
	return cpu, mem, swap, &runtimeapi.IoUsage{Timestamp: at, Psi: psi(st.IO)}
}

func psi(p *cgroups.Pressure) *runtimeapi.PsiStats {
	if p == nil {
		return nil
	}
	line := func(l cgroups.PressureLine) *runtimeapi.PsiData {
		return &runtimeapi.PsiData{Total: uint64(l.Total), Avg10: l.Avg10, Avg60: l.Avg60, Avg300: l.Avg300}
	}
	return &runtimeapi.PsiStats{Full: line(p.Full), Some: line(p.Some)}
}

// PodSandboxStats returns a pod's statistics with those of its containers.
func (s *Service) PodSandboxStats(ctx context.Context, r *runtimeapi.PodSandboxStatsRequest) (*runtimeapi.PodSandboxStatsResponse, error) {
	sb, err := s.objects.sandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	st, err := s.sandboxStats(ctx, sb)
	if err != nil {
		return nil, fmt.Errorf("statistics of sandbox %s: %w", sb.id, err)
	}
	return &runtimeapi.PodSandboxStatsResponse{Stats: st}, nil
}

// ListPodSandboxStats returns the statistics of the ready sandboxes that match.
func (s *Service) ListPodSandboxStats(ctx context.Context, r *runtimeapi.ListPodSandboxStatsRequest) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	return &runtimeapi.ListPodSandboxStatsResponse{Stats: s.listSandboxStats(ctx, r.GetFilter())}, nil
}

func (s *Service) listSandboxStats(ctx context.Context, f *runtimeapi.PodSandboxStatsFilter) []*runtimeapi.PodSandboxStats {
	var out []*runtimeapi.PodSandboxStats
	for _, sb := range s.objects.allSandboxes() {
		if !strings.HasPrefix(sb.id, f.GetId()) || !matches(f.GetLabelSelector(), sb.config.GetLabels()) {
			continue
		}
		if _, ready := sb.isReady(); !ready {
			continue
		}
		if st, err := s.sandboxStats(ctx, sb); err == nil {
			out = append(out, st)
		}
	}
	slices.SortFunc(out, func(a, b *runtimeapi.PodSandboxStats) int {
		return cmp.Compare(a.GetAttributes().GetId(), b.GetAttributes().GetId())
	})
	return out
}

func (s *Service) sandboxStats(ctx context.Context, sb *sandbox) (*runtimeapi.PodSandboxStats, error) {
	linux := &runtimeapi.LinuxPodSandboxStats{}
	out := &runtimeapi.PodSandboxStats{Linux: linux, Attributes: &runtimeapi.PodSandboxAttributes{
		Id: sb.id, Metadata: sb.config.GetMetadata(), Labels: sb.config.GetLabels(), Annotations: sb.config.GetAnnotations(),
	}}
	linux.Containers = s.listContainerStats(ctx, &runtimeapi.ContainerStatsFilter{PodSandboxId: sb.id})
	pid, ready := sb.isReady()
	if !ready {
		return out, nil
	}
	group, err := s.podGroup(sb)
	if err != nil {
		return nil, err
	}
	if sb.config.GetLinux().GetCgroupParent() == "" {
		// Nobody made a group for the pod: the pause's is all there is of it.
		if group, err = s.groupOf(sb, sb.id); err != nil {
			return nil, err
		}
	}
	st, err := cgroups.ReadStats(group)
	if err != nil {
		return nil, err
	}
	linux.Cpu, linux.Memory, _, linux.Io = s.criStats(sb.id, st)
	linux.Process = &runtimeapi.ProcessUsage{Timestamp: st.At.UnixNano(), ProcessCount: wrapp(st.PIDs)}
	if !sb.hostNetwork() {
		linux.Network = networkUsage(pid)
	}
	return out, nil
}

// defaultInterface of every CNI pod.
const defaultInterface = "eth0"

// networkUsage is what a pod's interfaces have carried.
func networkUsage(pid int) *runtimeapi.NetworkUsage {
	u := &runtimeapi.NetworkUsage{Timestamp: now()}
	for _, d := range readNetDev(pid) {
		i := &runtimeapi.NetworkInterfaceUsage{
			Name: d.name, RxBytes: wrap(d.counters[0]), RxErrors: wrap(d.counters[2]), TxBytes: wrap(d.counters[8]), TxErrors: wrap(d.counters[10]),
		}
		if d.name == defaultInterface {
			u.DefaultInterface = i
		} else {
			u.Interfaces = append(u.Interfaces, i)
		}
	}
	if u.DefaultInterface != nil {
		u.Interfaces = append([]*runtimeapi.NetworkInterfaceUsage{u.DefaultInterface}, u.Interfaces...)
	}
	return u
}
