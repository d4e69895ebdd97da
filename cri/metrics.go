package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cgroups"
)

// metric is one family of those that cAdvisor made before (KEP-2371).
type metric struct {
	name, help string
	kind       runtimeapi.MetricType
	value      func(*cgroups.Stats) *uint64
}

// metrics of a container or a pod's own group. The CRI has whole numbers only,
// so seconds are whole seconds, as other runtimes report them.
func metrics() []metric {
	const counter, gauge = runtimeapi.MetricType_COUNTER, runtimeapi.MetricType_GAUGE
	return []metric{
		{"container_cpu_usage_seconds_total", "Cumulative CPU time consumed, in seconds.", counter, func(s *cgroups.Stats) *uint64 {
			if s.CPUUsage == nil {
				return nil
			}
			v := uint64(s.CPUUsage.Seconds())
			return &v
		}},
		{"container_memory_usage_bytes", "Current memory usage in bytes, including page cache.", gauge, func(s *cgroups.Stats) *uint64 { return s.MemoryUsage }},
		{"container_memory_working_set_bytes", "Memory usage in bytes without inactive file pages.", gauge, func(s *cgroups.Stats) *uint64 { return s.MemoryWorkingSet }},
		{"container_memory_rss", "Size of anonymous memory in bytes.", gauge, func(s *cgroups.Stats) *uint64 { return s.MemoryRSS }},
		{"container_memory_swap", "Swap usage in bytes.", gauge, func(s *cgroups.Stats) *uint64 { return s.SwapUsage }},
		{"container_spec_memory_limit_bytes", "Memory limit in bytes.", gauge, func(s *cgroups.Stats) *uint64 { return s.MemoryLimit }},
		{"container_memory_page_faults_total", "Cumulative count of page faults.", counter, func(s *cgroups.Stats) *uint64 { return s.PageFaults }},
		{"container_memory_major_page_faults_total", "Cumulative count of major page faults.", counter, func(s *cgroups.Stats) *uint64 { return s.MajorPageFaults }},
		{"container_oom_events_total", "Count of processes killed for lack of memory.", counter, func(s *cgroups.Stats) *uint64 { return s.OOMKills }},
		{"container_processes", "Number of processes.", gauge, func(s *cgroups.Stats) *uint64 { return s.PIDs }},
		{"container_fs_reads_bytes_total", "Cumulative count of bytes read.", counter, func(s *cgroups.Stats) *uint64 { return s.IOReadBytes }},
		{"container_fs_writes_bytes_total", "Cumulative count of bytes written.", counter, func(s *cgroups.Stats) *uint64 { return s.IOWriteBytes }},
	}
}

// netMetric is one family of a pod's interface counters.
type netMetric struct {
	name, help string
	value      func(*runtimeapi.NetworkInterfaceUsage) uint64
}

func netMetrics() []netMetric {
	return []netMetric{
		{"container_network_receive_bytes_total", "Cumulative count of bytes received.", func(i *runtimeapi.NetworkInterfaceUsage) uint64 { return i.GetRxBytes().GetValue() }},
		{"container_network_receive_errors_total", "Cumulative count of errors while receiving.", func(i *runtimeapi.NetworkInterfaceUsage) uint64 { return i.GetRxErrors().GetValue() }},
		{"container_network_transmit_bytes_total", "Cumulative count of bytes sent.", func(i *runtimeapi.NetworkInterfaceUsage) uint64 { return i.GetTxBytes().GetValue() }},
		{"container_network_transmit_errors_total", "Cumulative count of errors while sending.", func(i *runtimeapi.NetworkInterfaceUsage) uint64 { return i.GetTxErrors().GetValue() }},
	}
}

// baseLabels are the labels of every metric, in the order of their values.
var baseLabels = []string{"id", "name", "image", "container", "pod", "namespace"}

// ListMetricDescriptors names the metrics that ListPodSandboxMetrics gives.
func (s *Service) ListMetricDescriptors(context.Context, *runtimeapi.ListMetricDescriptorsRequest) (*runtimeapi.ListMetricDescriptorsResponse, error) {
	out := &runtimeapi.ListMetricDescriptorsResponse{}
	for _, m := range metrics() {
		out.Descriptors = append(out.Descriptors, &runtimeapi.MetricDescriptor{Name: m.name, Help: m.help, LabelKeys: baseLabels})
	}
	for _, m := range netMetrics() {
		out.Descriptors = append(out.Descriptors, &runtimeapi.MetricDescriptor{Name: m.name, Help: m.help, LabelKeys: append(append([]string(nil), baseLabels...), "interface")})
	}
	return out, nil
}

// ListPodSandboxMetrics returns the metrics of all ready sandboxes.
func (s *Service) ListPodSandboxMetrics(ctx context.Context, _ *runtimeapi.ListPodSandboxMetricsRequest) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	return &runtimeapi.ListPodSandboxMetricsResponse{PodMetrics: s.listMetrics(ctx)}, nil
}

func (s *Service) listMetrics(ctx context.Context) []*runtimeapi.PodSandboxMetrics {
	var out []*runtimeapi.PodSandboxMetrics
	for _, sb := range s.objects.allSandboxes() {
		if ctx.Err() != nil {
			return out
		}
		pid, ready := sb.isReady()
		if !ready {
			continue
		}
		out = append(out, s.sandboxMetrics(sb, pid))
	}
	return out
}

func (s *Service) sandboxMetrics(sb *sandbox, pid int) *runtimeapi.PodSandboxMetrics {
	m := sb.config.GetMetadata()
	labels := func(id, image, container string) []string {
		return []string{id, id, image, container, m.GetName(), m.GetNamespace()}
	}
	out := &runtimeapi.PodSandboxMetrics{PodSandboxId: sb.id}
	if group, err := s.podGroup(sb); err == nil {
		out.Metrics = groupMetrics(group, labels(sb.id, "", ""))
	}
	if !sb.hostNetwork() {
		if u, err := networkUsage(pid); err == nil {
			for _, i := range u.GetInterfaces() {
				for _, n := range netMetrics() {
					out.Metrics = append(out.Metrics, &runtimeapi.Metric{
						Name: n.name, Timestamp: u.GetTimestamp(), MetricType: runtimeapi.MetricType_COUNTER,
						LabelValues: append(labels(sb.id, "", ""), i.GetName()), Value: wrap(n.value(i)),
					})
				}
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
		out.ContainerMetrics = append(out.ContainerMetrics, &runtimeapi.ContainerMetrics{
			ContainerId: c.id, Metrics: groupMetrics(group, labels(c.id, c.imageSpec().GetImage(), c.config.GetMetadata().GetName())),
		})
	}
	return out
}

// groupMetrics reads one group; one that has just gone gives none.
func groupMetrics(group string, labels []string) []*runtimeapi.Metric {
	st, err := cgroups.ReadStats(group)
	if err != nil {
		return nil
	}
	var out []*runtimeapi.Metric
	for _, m := range metrics() {
		if v := m.value(st); v != nil {
			out = append(out, &runtimeapi.Metric{Name: m.name, Timestamp: st.At.UnixNano(), MetricType: m.kind, LabelValues: labels, Value: wrap(*v)})
		}
	}
	return out
}
