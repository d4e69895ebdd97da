package cri

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cgroups"
)

// MetricFamily is one of the families that cAdvisor made before (KEP-2371),
// under its names and labels, which dashboards know.
type MetricFamily struct {
	Name, Help string
	Counter    bool // else a gauge
	// Labels that it has beyond BaseLabels.
	Labels []string
}

// BaseLabels are the labels of every family, in the order of their values.
var BaseLabels = []string{"id", "name", "image", "container", "pod", "namespace"}

// EmitMetric takes one value; labels are those of BaseLabels, then the family's.
type EmitMetric func(f *MetricFamily, at time.Time, value float64, labels []string)

// subject of metrics: a container's group or a pod's.
type subject struct {
	*cgroups.Details
	started  int64 // ns; 0: unknown
	tasks    tasks
	fs       *runtimeapi.FilesystemUsage // of a container's writable layer
	isolated bool                        // is a container
}

// metric is a family of which each subject has one value at most.
type metric struct {
	MetricFamily
	value func(s *subject) (float64, bool)
}

func num(f func(*subject) *uint64) func(*subject) (float64, bool) {
	return func(s *subject) (float64, bool) {
		if v := f(s); v != nil {
			return float64(*v), true
		}
		return 0, false
	}
}

func secs(f func(*subject) *time.Duration) func(*subject) (float64, bool) {
	return func(s *subject) (float64, bool) {
		if v := f(s); v != nil {
			return v.Seconds(), true
		}
		return 0, false
	}
}

// limit is 0 where there is none, as cAdvisor shows it.
func limit(f func(*subject) *uint64) func(*subject) (float64, bool) {
	return func(s *subject) (float64, bool) {
		if v := f(s); v != nil {
			return float64(*v), true
		}
		return 0, true
	}
}

func stalled(f func(*subject) *cgroups.Pressure, full bool) func(*subject) (float64, bool) {
	return func(s *subject) (float64, bool) {
		p := f(s)
		switch {
		case p == nil:
			return 0, false
		case full:
			return p.Full.Total.Seconds(), true
		}
		return p.Some.Total.Seconds(), true
	}
}

func counter(name, help string, value func(*subject) (float64, bool)) metric {
	return metric{MetricFamily{Name: name, Help: help, Counter: true}, value}
}

func gauge(name, help string, value func(*subject) (float64, bool)) metric {
	return metric{MetricFamily{Name: name, Help: help}, value}
}

var metrics = []metric{
	counter("container_cpu_user_seconds_total", "Cumulative user cpu time consumed in seconds.", secs(func(s *subject) *time.Duration { return s.CPUUser })),
	counter("container_cpu_system_seconds_total", "Cumulative system cpu time consumed in seconds.", secs(func(s *subject) *time.Duration { return s.CPUSystem })),
	counter("container_cpu_cfs_periods_total", "Number of elapsed enforcement period intervals.", quota(num(func(s *subject) *uint64 { return s.Periods }))),
	counter("container_cpu_cfs_throttled_periods_total", "Number of throttled period intervals.", quota(num(func(s *subject) *uint64 { return s.Throttled }))),
	counter("container_cpu_cfs_throttled_seconds_total", "Total time duration the container has been throttled.", quota(secs(func(s *subject) *time.Duration { return s.ThrottledTime }))),
	gauge("container_spec_cpu_period", "CPU period of the container.", num(func(s *subject) *uint64 { return s.CPUPeriod })),
	gauge("container_spec_cpu_quota", "CPU quota of the container.", num(func(s *subject) *uint64 { return s.CPUQuota })),
	gauge("container_spec_cpu_shares", "CPU share of the container.", func(s *subject) (float64, bool) {
		if s.CPUShares == nil || !s.isolated {
			return 0, false
		}
		return float64(*s.CPUShares), true
	}),
	gauge("container_memory_usage_bytes", "Current memory usage in bytes, including all memory regardless of when it was accessed", num(func(s *subject) *uint64 { return s.MemoryUsage })),
	gauge("container_memory_working_set_bytes", "Current working set in bytes.", num(func(s *subject) *uint64 { return s.MemoryWorkingSet })),
	gauge("container_memory_rss", "Size of RSS in bytes.", num(func(s *subject) *uint64 { return s.MemoryRSS })),
	gauge("container_memory_cache", "Number of bytes of page cache memory.", num(func(s *subject) *uint64 { return s.Cache })),
	gauge("container_memory_swap", "Container swap usage in bytes.", num(func(s *subject) *uint64 { return s.SwapUsage })),
	gauge("container_memory_mapped_file", "Size of memory mapped files in bytes.", num(func(s *subject) *uint64 { return s.MappedFile })),
	gauge("container_memory_kernel_usage", "Size of kernel memory allocated in bytes.", num(func(s *subject) *uint64 { return s.Kernel })),
	gauge("container_memory_total_active_file_bytes", "Current total active file in bytes.", num(func(s *subject) *uint64 { return s.ActiveFile })),
	gauge("container_memory_total_inactive_file_bytes", "Current total inactive file in bytes.", num(func(s *subject) *uint64 { return s.InactiveFile })),
	gauge("container_memory_max_usage_bytes", "Maximum memory usage recorded in bytes", num(func(s *subject) *uint64 { return s.MemoryPeak })),
	// A counter, but a counter's name ends in _total, and this is the known one.
	gauge("container_memory_failcnt", "Number of memory usage hits limits", num(func(s *subject) *uint64 { return s.MemoryFailures })),
	gauge("container_spec_memory_limit_bytes", "Memory limit for the container.", limit(func(s *subject) *uint64 { return s.MemoryLimit })),
	gauge("container_spec_memory_swap_limit_bytes", "Memory swap limit for the container.", limit(func(s *subject) *uint64 { return s.SwapLimit })),
	gauge("container_spec_memory_reservation_limit_bytes", "Memory reservation limit for the container.", limit(func(s *subject) *uint64 { return s.MemoryReservation })),
	counter("container_oom_events_total", "Count of out of memory events observed for the container", num(func(s *subject) *uint64 { return s.OOMKills })),
	gauge("container_processes", "Number of processes running inside the container.", func(s *subject) (float64, bool) { return float64(len(s.Processes)), s.isolated }),
	gauge("container_threads", "Number of threads running inside the container", num(func(s *subject) *uint64 { return s.PIDs })),
	gauge("container_threads_max", "Maximum number of threads allowed inside the container, infinity if value is zero", limit(func(s *subject) *uint64 { return s.PIDsLimit })),
	gauge("container_file_descriptors", "Number of open file descriptors for the container.", func(s *subject) (float64, bool) { return float64(s.tasks.files), s.tasks.known }),
	gauge("container_sockets", "Number of open sockets for the container.", func(s *subject) (float64, bool) { return float64(s.tasks.sockets), s.tasks.known }),
	gauge("container_start_time_seconds", "Start time of the container since unix epoch in seconds.", func(s *subject) (float64, bool) { return float64(s.started) / 1e9, s.started > 0 }),
	gauge("container_last_seen", "Last time a container was seen by the exporter", func(s *subject) (float64, bool) { return float64(s.At.Unix()), true }),
	counter("container_pressure_cpu_waiting_seconds_total", "Total time duration tasks in the container have waited due to CPU congestion.", stalled(func(s *subject) *cgroups.Pressure { return s.CPU }, false)),
	counter("container_pressure_cpu_stalled_seconds_total", "Total time duration no tasks in the container could make progress due to CPU congestion.", stalled(func(s *subject) *cgroups.Pressure { return s.CPU }, true)),
	counter("container_pressure_memory_waiting_seconds_total", "Total time duration tasks in the container have waited due to memory congestion.", stalled(func(s *subject) *cgroups.Pressure { return s.Memory }, false)),
	counter("container_pressure_memory_stalled_seconds_total", "Total time duration no tasks in the container could make progress due to memory congestion.", stalled(func(s *subject) *cgroups.Pressure { return s.Memory }, true)),
	counter("container_pressure_io_waiting_seconds_total", "Total time duration tasks in the container have waited due to IO congestion.", stalled(func(s *subject) *cgroups.Pressure { return s.IO }, false)),
	counter("container_pressure_io_stalled_seconds_total", "Total time duration no tasks in the container could make progress due to IO congestion.", stalled(func(s *subject) *cgroups.Pressure { return s.IO }, true)),
}

// quota is a value that only a group with a CPU limit has.
func quota(f func(*subject) (float64, bool)) func(*subject) (float64, bool) {
	return func(s *subject) (float64, bool) {
		if s.CPUQuota == nil {
			return 0, false
		}
		return f(s)
	}
}

// Families with labels of their own.
var (
	cpuUsage       = MetricFamily{"container_cpu_usage_seconds_total", "Cumulative cpu time consumed in seconds.", true, []string{"cpu"}}
	memoryFailures = MetricFamily{"container_memory_failures_total", "Cumulative count of memory allocation failures.", true, []string{"failure_type", "scope"}}
	fsUsage        = MetricFamily{"container_fs_usage_bytes", "Number of bytes that are consumed by the container on this filesystem.", false, []string{"device"}}
	fsInodes       = MetricFamily{"container_fs_inodes_used", "Number of inodes that are consumed by the container on this filesystem.", false, []string{"device"}}
	fsReadBytes    = MetricFamily{"container_fs_reads_bytes_total", "Cumulative count of bytes read", true, []string{"device"}}
	fsReads        = MetricFamily{"container_fs_reads_total", "Cumulative count of reads completed", true, []string{"device"}}
	fsWriteBytes   = MetricFamily{"container_fs_writes_bytes_total", "Cumulative count of bytes written", true, []string{"device"}}
	fsWrites       = MetricFamily{"container_fs_writes_total", "Cumulative count of writes completed", true, []string{"device"}}
	blkioUsage     = MetricFamily{"container_blkio_device_usage_total", "Blkio Device bytes usage", true, []string{"device", "major", "minor", "operation"}}

	labelled = []*MetricFamily{&cpuUsage, &memoryFailures, &fsUsage, &fsInodes, &fsReadBytes, &fsReads, &fsWriteBytes, &fsWrites, &blkioUsage}
)

// netMetric is a family of the counters of a pod's interfaces, by its column in
// /proc/net/dev.
type netMetric struct {
	MetricFamily
	column int
}

func network(name, help string, column int) netMetric {
	return netMetric{MetricFamily{"container_network_" + name + "_total", "Cumulative count of " + help, true, []string{"interface"}}, column}
}

var netMetrics = []netMetric{
	network("receive_bytes", "bytes received", 0), network("receive_packets", "packets received", 1),
	network("receive_errors", "errors encountered while receiving", 2), network("receive_packets_dropped", "packets dropped while receiving", 3),
	network("transmit_bytes", "bytes transmitted", 8), network("transmit_packets", "packets transmitted", 9),
	network("transmit_errors", "errors encountered while transmitting", 10), network("transmit_packets_dropped", "packets dropped while transmitting", 11),
}

// MetricFamilies are all that Metrics may emit.
func MetricFamilies() []*MetricFamily {
	out := append([]*MetricFamily(nil), labelled...)
	for i := range metrics {
		out = append(out, &metrics[i].MetricFamily)
	}
	for i := range netMetrics {
		out = append(out, &netMetrics[i].MetricFamily)
	}
	return out
}

// Metrics emits those of all ready sandboxes and running containers, read from
// the kernel now. sandbox and container say whose the next ones are.
func (s *Service) Metrics(ctx context.Context, emit EmitMetric) {
	for _, sb := range s.objects.allSandboxes() {
		if ctx.Err() != nil {
			return
		}
		s.sandboxMetrics(ctx, sb, emit, func(string) EmitMetric { return emit })
	}
}

// sandboxMetrics emits a sandbox's own metrics, and each container's to what
// container gives for its id.
func (s *Service) sandboxMetrics(ctx context.Context, sb *sandbox, emit EmitMetric, container func(id string) EmitMetric) {
	pid, ready := sb.isReady()
	if !ready {
		return
	}
	m := sb.config.GetMetadata()
	labels := func(id, name, image, container string) []string {
		return []string{id, name, image, container, m.GetName(), m.GetNamespace()}
	}
	group, err := s.podGroup(sb)
	if err != nil {
		return
	}
	if d, err := cgroups.ReadDetails(group); err == nil {
		emitGroup(&subject{Details: d, started: sb.createdAt}, emit, labels(group, "", "", ""))
	}
	if !sb.hostNetwork() {
		at := time.Now()
		for _, i := range readNetDev(pid) {
			for n := range netMetrics {
				f := &netMetrics[n]
				emit(&f.MetricFamily, at, float64(i.counters[f.column]), append(labels(group, sb.id, "", ""), i.name))
			}
		}
	}
	for _, c := range s.objects.containersOf(sb.id) {
		if c.current() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			continue
		}
		group, err := s.groupOf(sb, c.id)
		if err != nil {
			continue
		}
		d, err := cgroups.ReadDetails(group)
		if err != nil {
			continue // it has just ended
		}
		sub := &subject{Details: d, started: c.startTime(), tasks: readTasks(d.Processes), isolated: true}
		if u, err := s.writable(ctx, c); err == nil {
			sub.fs = &runtimeapi.FilesystemUsage{FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: s.mountpoint(ctx)}, UsedBytes: wrap(u.Bytes), InodesUsed: wrap(u.Inodes)}
		}
		emitGroup(sub, container(c.id), labels(group, c.id, c.imageSpec().GetImage(), c.config.GetMetadata().GetName()))
	}
}

func (c *container) startTime() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.status.StartedAt
}

func emitGroup(s *subject, emit EmitMetric, labels []string) {
	more := func(values ...string) []string { return append(labels[:len(labels):len(labels)], values...) }
	for i := range metrics {
		if v, ok := metrics[i].value(s); ok {
			emit(&metrics[i].MetricFamily, s.At, v, labels)
		}
	}
	if s.CPUUsage != nil {
		emit(&cpuUsage, s.At, s.CPUUsage.Seconds(), more("total"))
	}
	for kind, v := range map[string]*uint64{"pgfault": s.PageFaults, "pgmajfault": s.MajorPageFaults} {
		if v != nil {
			emit(&memoryFailures, s.At, float64(*v), more(kind, "hierarchy"))
		}
	}
	if s.fs != nil {
		device := s.fs.GetFsId().GetMountpoint()
		emit(&fsUsage, s.At, float64(s.fs.GetUsedBytes().GetValue()), more(device))
		emit(&fsInodes, s.At, float64(s.fs.GetInodesUsed().GetValue()), more(device))
	}
	for _, d := range s.Devices {
		major, minor := strconv.FormatUint(d.Major, 10), strconv.FormatUint(d.Minor, 10)
		device := deviceName(major, minor)
		emit(&fsReadBytes, s.At, float64(d.ReadBytes), more(device))
		emit(&fsReads, s.At, float64(d.Reads), more(device))
		emit(&fsWriteBytes, s.At, float64(d.WriteBytes), more(device))
		emit(&fsWrites, s.At, float64(d.Writes), more(device))
		emit(&blkioUsage, s.At, float64(d.ReadBytes), more(device, major, minor, "Read"))
		emit(&blkioUsage, s.At, float64(d.WriteBytes), more(device, major, minor, "Write"))
	}
}

// deviceName is the device file of a block device, or its number when it has
// none.
func deviceName(major, minor string) string {
	b, err := os.ReadFile("/sys/dev/block/" + major + ":" + minor + "/uevent")
	if err == nil {
		for line := range strings.Lines(string(b)) {
			if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
				return "/dev/" + name
			}
		}
	}
	return major + ":" + minor
}

// maxTasks is how many processes of a container are looked at for their open
// files: beyond, nothing is told rather than something wrong.
const maxTasks = 128

// tasks is what the processes of a container have open.
type tasks struct {
	files, sockets int
	known          bool
}

func readTasks(pids []int) tasks {
	if len(pids) == 0 || len(pids) > maxTasks {
		return tasks{}
	}
	t := tasks{known: true}
	for _, pid := range pids {
		dir, err := os.Open(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			continue // ended
		}
		names, _ := dir.Readdirnames(-1)
		for _, name := range names {
			t.files++
			if to, err := os.Readlink(dir.Name() + "/" + name); err == nil && strings.HasPrefix(to, "socket:") {
				t.sockets++
			}
		}
		dir.Close()
	}
	return t
}

// netDev is one line of /proc/net/dev.
type netDev struct {
	name     string
	counters [16]uint64
}

// readNetDev reads the counters of a pod's interfaces through its pause.
func readNetDev(pid int) []netDev {
	f, err := os.Open(fmt.Sprintf("/proc/%d/net/dev", pid))
	if err != nil {
		return nil
	}
	defer f.Close()
	var out []netDev
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if d, ok := parseNetDev(sc.Text()); ok && d.name != "lo" {
			out = append(out, d)
		}
	}
	return out
}

// parseNetDev reads one line of /proc/net/dev: name, eight counters of what
// was received (bytes, packets, errors, …), eight of what was sent.
func parseNetDev(line string) (d netDev, ok bool) {
	name, rest, found := strings.Cut(line, ":")
	fields := strings.Fields(rest)
	if !found || len(fields) < len(d.counters) {
		return d, false
	}
	d.name = strings.TrimSpace(name)
	for i := range d.counters {
		n, err := strconv.ParseUint(fields[i], 10, 64)
		if err != nil {
			return d, false
		}
		d.counters[i] = n
	}
	return d, true
}

// ListMetricDescriptors names the metrics that ListPodSandboxMetrics gives.
func (s *Service) ListMetricDescriptors(context.Context, *runtimeapi.ListMetricDescriptorsRequest) (*runtimeapi.ListMetricDescriptorsResponse, error) {
	out := &runtimeapi.ListMetricDescriptorsResponse{}
	for _, f := range MetricFamilies() {
		out.Descriptors = append(out.Descriptors, &runtimeapi.MetricDescriptor{
			Name: f.Name, Help: f.Help, LabelKeys: append(append([]string(nil), BaseLabels...), f.Labels...),
		})
	}
	return out, nil
}

// ListPodSandboxMetrics returns the metrics of all ready sandboxes.
func (s *Service) ListPodSandboxMetrics(ctx context.Context, _ *runtimeapi.ListPodSandboxMetricsRequest) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	return &runtimeapi.ListPodSandboxMetricsResponse{PodMetrics: s.listMetrics(ctx)}, nil
}

// listMetrics is Metrics in the CRI's form. That has whole numbers only, so
// seconds are whole seconds, as other runtimes report them.
func (s *Service) listMetrics(ctx context.Context) []*runtimeapi.PodSandboxMetrics {
	var out []*runtimeapi.PodSandboxMetrics
	for _, sb := range s.objects.allSandboxes() {
		if ctx.Err() != nil {
			return out
		}
		if _, ready := sb.isReady(); !ready {
			continue
		}
		into := func(list *[]*runtimeapi.Metric) EmitMetric {
			return func(f *MetricFamily, at time.Time, value float64, labels []string) {
				kind := runtimeapi.MetricType_GAUGE
				if f.Counter {
					kind = runtimeapi.MetricType_COUNTER
				}
				*list = append(*list, &runtimeapi.Metric{Name: f.Name, Timestamp: at.UnixNano(), MetricType: kind, LabelValues: labels, Value: wrap(uint64(value))})
			}
		}
		m := &runtimeapi.PodSandboxMetrics{PodSandboxId: sb.id}
		s.sandboxMetrics(ctx, sb, into(&m.Metrics), func(id string) EmitMetric {
			c := &runtimeapi.ContainerMetrics{ContainerId: id}
			m.ContainerMetrics = append(m.ContainerMetrics, c)
			return into(&c.Metrics)
		})
		out = append(out, m)
	}
	return out
}

// EmitGroup emits the metrics of a group that is no sandbox's and no container's.
func EmitGroup(d *cgroups.Details, started time.Time, emit EmitMetric, id string) {
	emitGroup(&subject{Details: d, started: started.UnixNano()}, emit, []string{id, "", "", "", "", ""})
}
