package stats

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"github.com/podd-runtime/podd/cgroups"
)

// sample of a group's CPU time, and the rate since the one before.
type sample struct {
	at    time.Time
	usage time.Duration
	rate  *uint64 // nanocores
}

// rateWindow is the least time between two samples of a rate; over less, it
// is mostly noise.
const rateWindow = time.Second

// rate of a group in nanocores since the sample before; nil: there is none.
func (p *Provider) rate(group string, now time.Time, usage time.Duration) *uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	old, ok := p.rates[group]
	d := now.Sub(old.at)
	switch {
	case ok && usage >= old.usage && d < rateWindow:
		return old.rate
	case ok && usage >= old.usage:
		v := uint64(float64(usage-old.usage) / float64(d) * 1e9)
		p.rates[group] = sample{now, usage, &v}
		return &v
	}
	p.rates[group] = sample{at: now, usage: usage}
	return nil
}

// nodeGroup reads a group that is no pod's.
func (p *Provider) nodeGroup(group string) (*statsapi.CPUStats, *statsapi.MemoryStats, *statsapi.SwapStats, *cgroups.Stats, error) {
	st, err := cgroups.ReadStats(group)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	now := metav1.NewTime(st.At)
	cpu := &statsapi.CPUStats{Time: now, PSI: pressure(st.CPU)}
	if st.CPUUsage != nil {
		ns := uint64(*st.CPUUsage)
		cpu.UsageCoreNanoSeconds, cpu.UsageNanoCores = &ns, p.rate(group, st.At, *st.CPUUsage)
	}
	mem := &statsapi.MemoryStats{
		Time: now, UsageBytes: st.MemoryUsage, WorkingSetBytes: st.MemoryWorkingSet, RSSBytes: st.MemoryRSS,
		PageFaults: st.PageFaults, MajorPageFaults: st.MajorPageFaults, PSI: pressure(st.Memory),
	}
	var swap *statsapi.SwapStats
	if st.SwapUsage != nil {
		swap = &statsapi.SwapStats{Time: now, SwapUsageBytes: st.SwapUsage}
	}
	return cpu, mem, swap, st, nil
}

func pressure(p *cgroups.Pressure) *statsapi.PSIStats {
	if p == nil {
		return nil
	}
	data := func(l cgroups.PressureLine) statsapi.PSIData {
		return statsapi.PSIData{Total: uint64(l.Total), Avg10: l.Avg10, Avg60: l.Avg60, Avg300: l.Avg300}
	}
	return &statsapi.PSIStats{Some: data(p.Some), Full: data(p.Full)}
}

func (p *Provider) node(ctx context.Context, only bool) (*statsapi.NodeStats, error) {
	cpu, mem, _, st, err := p.nodeGroup("/")
	if err != nil {
		return nil, fmt.Errorf("failed to get root cgroup stats: %w", err) //nolint:staticcheck // upstream's words
	}
	info := readMeminfo()
	if mem.UsageBytes == nil { // cgroup v2's root does not count its memory
		used := info["MemTotal"] - min(info["MemTotal"], info["MemFree"])
		working := used - min(used, info["Inactive(file)"])
		rss := info["AnonPages"]
		mem.UsageBytes, mem.WorkingSetBytes, mem.RSSBytes = &used, &working, &rss
	}
	if mem.WorkingSetBytes != nil {
		available := info["MemTotal"] - min(info["MemTotal"], *mem.WorkingSetBytes)
		mem.AvailableBytes = &available
	}
	used, free := info["SwapTotal"]-min(info["SwapTotal"], info["SwapFree"]), info["SwapFree"]
	swap := &statsapi.SwapStats{Time: mem.Time, SwapUsageBytes: &used, SwapAvailableBytes: &free}
	n := &statsapi.NodeStats{NodeName: p.cfg.NodeName, StartTime: metav1.NewTime(p.boot), CPU: cpu, Memory: mem, Swap: swap, SystemContainers: p.systemContainers()}
	if only {
		return n, nil
	}
	if st.IO != nil {
		n.IO = &statsapi.IOStats{Time: mem.Time, PSI: pressure(st.IO)}
	}
	if n.Fs, err = fsStats(p.cfg.RootDir); err != nil {
		return nil, fmt.Errorf("failed to get rootFs stats: %w", err) //nolint:staticcheck // upstream's words
	}
	n.Runtime = p.imageFs(ctx)
	n.Network = hostNetwork()
	n.Rlimit = rlimit()
	return n, nil
}

// systemContainers are the groups that users ask for besides pods: that of all
// pods, and podd's own under the name of the kubelet.
func (p *Provider) systemContainers() []statsapi.ContainerStats {
	var out []statsapi.ContainerStats
	add := func(name, group string) {
		if group == "" || group == "/" {
			return // shared with everything
		}
		cpu, mem, swap, _, err := p.nodeGroup(group)
		if err != nil {
			return
		}
		out = append(out, statsapi.ContainerStats{Name: name, StartTime: metav1.NewTime(p.boot), CPU: cpu, Memory: mem, Swap: swap})
	}
	add(statsapi.SystemContainerKubelet, ownGroup())
	add(statsapi.SystemContainerPods, p.cfg.PodsGroup)
	return out
}

// ownGroup is this process's cgroup, "" when its controllers disagree.
func ownGroup() string {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return ""
	}
	group := ""
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		for c := range strings.SplitSeq(f[1], ",") {
			if c != "" && c != "memory" && c != "cpuacct" {
				continue
			}
			if group != "" && group != f[2] && c != "" {
				return ""
			}
			if group == "" || c != "" {
				group = f[2]
			}
		}
	}
	return group
}

// readMeminfo reads /proc/meminfo, in bytes.
func readMeminfo() map[string]uint64 {
	out := map[string]uint64{}
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return out
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		name, rest, _ := strings.Cut(sc.Text(), ":")
		fields := strings.Fields(rest)
		if len(fields) == 0 {
			continue
		}
		if v, err := strconv.ParseUint(fields[0], 10, 64); err == nil {
			out[name] = v << 10
		}
	}
	return out
}

// bootTime is the btime of /proc/stat.
func bootTime() time.Time {
	b, _ := os.ReadFile("/proc/stat")
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "btime "); ok {
			if s, err := strconv.ParseInt(strings.TrimSpace(rest), 10, 64); err == nil {
				return time.Unix(s, 0)
			}
		}
	}
	return time.Time{}
}

func rlimit() *statsapi.RlimitStats {
	out := &statsapi.RlimitStats{Time: metav1.Now()}
	for _, name := range []string{"/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"} {
		b, _ := os.ReadFile(name)
		if v, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && (out.MaxPID == nil || v < *out.MaxPID) {
			out.MaxPID = &v
		}
	}
	b, _ := os.ReadFile("/proc/loadavg") // "0.1 0.2 0.3 2/345 6789"
	if f := strings.Fields(string(b)); len(f) >= 4 {
		_, all, _ := strings.Cut(f[3], "/")
		if v, err := strconv.ParseInt(all, 10, 64); err == nil {
			out.NumOfRunningProcesses = &v
		}
	}
	return out
}

// hostNetwork is what the node's own interfaces carried, the one with the
// default route first. Ends of pods' links are the pods'.
func hostNetwork() *statsapi.NetworkStats {
	f, err := os.Open("/proc/net/dev")
	if err != nil {
		return nil
	}
	defer f.Close()
	out := &statsapi.NetworkStats{Time: metav1.Now()}
	main := defaultInterface()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		name, rest, ok := strings.Cut(sc.Text(), ":")
		name = strings.TrimSpace(name)
		fields := strings.Fields(rest)
		if !ok || len(fields) < 16 || name == "lo" || strings.HasPrefix(name, "veth") {
			continue
		}
		number := func(i int) *uint64 {
			v, err := strconv.ParseUint(fields[i], 10, 64)
			if err != nil {
				return nil
			}
			return &v
		}
		i := statsapi.InterfaceStats{Name: name, RxBytes: number(0), RxErrors: number(2), TxBytes: number(8), TxErrors: number(10)}
		out.Interfaces = append(out.Interfaces, i)
		if name == main || out.Name == "" {
			out.InterfaceStats = i
		}
	}
	return out
}

func defaultInterface() string {
	b, _ := os.ReadFile("/proc/net/route")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[1] == "00000000" {
			return f[0]
		}
	}
	return ""
}
