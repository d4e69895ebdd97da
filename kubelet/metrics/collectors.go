package metrics

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"github.com/podd-runtime/podd/cri"
)

// Runtime is what is counted when it is scraped. *cri.Service is it.
type Runtime interface {
	ListPodSandbox(context.Context, *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error)
	ListContainers(context.Context, *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error)
}

// Stats of the node. *stats.Provider is it.
type Stats interface {
	Summary(ctx context.Context, onlyCPUAndMemory bool) (*statsapi.Summary, error)
	// Containers emits what the runtime and the node's own groups use.
	Containers(ctx context.Context, emit cri.EmitMetric)
	EachVolume(f func(namespace, claim string, fs *statsapi.FsStats))
}

// scrapeTime bounds the collection of one endpoint.
const scrapeTime = 30 * time.Second

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// configSource is upstream's annotation of where a pod came from.
const configSource = "kubernetes.io/config.source"

// podCounts are the pods and containers there are.
type podCounts struct {
	pods    Pods
	runtime Runtime
}

var (
	runningPods       = desc("kubelet_running_pods", "Number of pods that have a running pod sandbox")
	runningContainers = desc("kubelet_running_containers", "Number of containers currently running", "container_state")
	desiredPods       = desc("kubelet_desired_pods", "The number of pods the kubelet is being instructed to run. static is true if the pod is not from the apiserver.", "static")
	activePods        = desc("kubelet_active_pods", "The number of pods the kubelet considers active and which are being considered when admitting new pods. static is true if the pod is not from the apiserver.", "static")
	ephemeral         = desc("kubelet_managed_ephemeral_containers", "Current number of ephemeral containers in pods managed by this kubelet.")
)

func (p *podCounts) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{runningPods, runningContainers, desiredPods, activePods, ephemeral} {
		ch <- d
	}
}

func (p *podCounts) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTime)
	defer cancel()
	gauge := func(d *prometheus.Desc, n int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(n), labels...)
	}
	if list, err := p.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{}); err == nil {
		n := 0
		for _, s := range list.GetItems() {
			if s.GetState() == runtimeapi.PodSandboxState_SANDBOX_READY {
				n++
			}
		}
		gauge(runningPods, n)
	}
	if list, err := p.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{}); err == nil {
		states := map[runtimeapi.ContainerState]int{runtimeapi.ContainerState_CONTAINER_RUNNING: 0, runtimeapi.ContainerState_CONTAINER_EXITED: 0, runtimeapi.ContainerState_CONTAINER_CREATED: 0}
		for _, c := range list.GetContainers() {
			states[c.GetState()]++
		}
		for state, n := range states {
			gauge(runningContainers, n, strings.ToLower(strings.TrimPrefix(state.String(), "CONTAINER_")))
		}
	}
	desired, active, temporary := map[string]int{"true": 0, "": 0}, map[string]int{"true": 0, "": 0}, 0
	for _, pod := range p.pods.List() {
		static := ""
		if pod.Annotations[configSource] != "api" {
			static = "true"
		}
		desired[static]++
		if pod.Status.Phase != v1.PodFailed && pod.Status.Phase != v1.PodSucceeded {
			active[static]++
		}
		temporary += len(pod.Spec.EphemeralContainers)
	}
	for static := range desired {
		gauge(desiredPods, desired[static], static)
		gauge(activePods, active[static], static)
	}
	gauge(ephemeral, temporary)
}

// volumeStats are how full claims' volumes are.
type volumeStats struct{ Stats }

var (
	volumeLabels = []string{"namespace", "persistentvolumeclaim"}
	volumeDescs  = []struct {
		*prometheus.Desc
		value func(*statsapi.FsStats) *uint64
	}{
		{desc("kubelet_volume_stats_capacity_bytes", "Capacity in bytes of the volume", volumeLabels...), func(f *statsapi.FsStats) *uint64 { return f.CapacityBytes }},
		{desc("kubelet_volume_stats_available_bytes", "Number of available bytes in the volume", volumeLabels...), func(f *statsapi.FsStats) *uint64 { return f.AvailableBytes }},
		{desc("kubelet_volume_stats_used_bytes", "Number of used bytes in the volume", volumeLabels...), func(f *statsapi.FsStats) *uint64 { return f.UsedBytes }},
		{desc("kubelet_volume_stats_inodes", "Maximum number of inodes in the volume", volumeLabels...), func(f *statsapi.FsStats) *uint64 { return f.Inodes }},
		{desc("kubelet_volume_stats_inodes_free", "Number of free inodes in the volume", volumeLabels...), func(f *statsapi.FsStats) *uint64 { return f.InodesFree }},
		{desc("kubelet_volume_stats_inodes_used", "Number of used inodes in the volume", volumeLabels...), func(f *statsapi.FsStats) *uint64 { return f.InodesUsed }},
	}
)

func (v *volumeStats) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range volumeDescs {
		ch <- d.Desc
	}
}

func (v *volumeStats) Collect(ch chan<- prometheus.Metric) {
	seen := map[[2]string]bool{} // pods share claims
	v.EachVolume(func(namespace, claim string, fs *statsapi.FsStats) {
		if key := [2]string{namespace, claim}; !seen[key] {
			seen[key] = true
			for _, d := range volumeDescs {
				if n := d.value(fs); n != nil {
					ch <- prometheus.MustNewConstMetric(d.Desc, prometheus.GaugeValue, float64(*n), namespace, claim)
				}
			}
		}
	})
}

// resource is /metrics/resource, of which metrics-server and the horizontal
// autoscaler live. Values carry the time of their measurement.
type resource struct{ Stats }

var (
	containerLabels = []string{"container", "pod", "namespace"}
	podLabels       = []string{"pod", "namespace"}

	nodeCPU         = desc("node_cpu_usage_seconds_total", "Cumulative cpu time consumed by the node in core-seconds")
	nodeMemory      = desc("node_memory_working_set_bytes", "Current working set of the node in bytes")
	nodeSwap        = desc("node_swap_usage_bytes", "Current swap usage of the node in bytes. Reported only on non-windows systems")
	containerCPU    = desc("container_cpu_usage_seconds_total", "Cumulative cpu time consumed by the container in core-seconds", containerLabels...)
	containerMemory = desc("container_memory_working_set_bytes", "Current working set of the container in bytes", containerLabels...)
	containerSwap   = desc("container_swap_usage_bytes", "Current amount of the container swap usage in bytes. Reported only on non-windows systems", containerLabels...)
	containerStart  = desc("container_start_time_seconds", "Start time of the container since unix epoch in seconds", containerLabels...)
	podCPU          = desc("pod_cpu_usage_seconds_total", "Cumulative cpu time consumed by the pod in core-seconds", podLabels...)
	podMemory       = desc("pod_memory_working_set_bytes", "Current working set of the pod in bytes", podLabels...)
	podSwap         = desc("pod_swap_usage_bytes", "Current amount of the pod swap usage in bytes. Reported only on non-windows systems", podLabels...)
	resourceError   = desc("resource_scrape_error", "1 if there was an error while getting container metrics, 0 otherwise")
)

func (r *resource) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{nodeCPU, nodeMemory, nodeSwap, containerCPU, containerMemory, containerSwap, containerStart, podCPU, podMemory, podSwap, resourceError} {
		ch <- d
	}
}

func (r *resource) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTime)
	defer cancel()
	sum, err := r.Summary(ctx, true)
	if err != nil {
		ch <- prometheus.MustNewConstMetric(resourceError, prometheus.GaugeValue, 1)
		return
	}
	ch <- prometheus.MustNewConstMetric(resourceError, prometheus.GaugeValue, 0)
	put := func(d *prometheus.Desc, kind prometheus.ValueType, at time.Time, v *uint64, unit float64, labels ...string) {
		if v != nil {
			ch <- prometheus.NewMetricWithTimestamp(at, prometheus.MustNewConstMetric(d, kind, float64(*v)/unit, labels...))
		}
	}
	usage := func(cpu *statsapi.CPUStats, mem *statsapi.MemoryStats, swap *statsapi.SwapStats, descs [3]*prometheus.Desc, labels ...string) {
		if cpu != nil {
			put(descs[0], prometheus.CounterValue, cpu.Time.Time, cpu.UsageCoreNanoSeconds, 1e9, labels...)
		}
		if mem != nil {
			put(descs[1], prometheus.GaugeValue, mem.Time.Time, mem.WorkingSetBytes, 1, labels...)
		}
		if swap != nil {
			put(descs[2], prometheus.GaugeValue, swap.Time.Time, swap.SwapUsageBytes, 1, labels...)
		}
	}
	usage(sum.Node.CPU, sum.Node.Memory, sum.Node.Swap, [3]*prometheus.Desc{nodeCPU, nodeMemory, nodeSwap})
	for _, pod := range sum.Pods {
		name, namespace := pod.PodRef.Name, pod.PodRef.Namespace
		for _, c := range pod.Containers {
			if c.StartTime.Unix() > 0 {
				ch <- prometheus.MustNewConstMetric(containerStart, prometheus.GaugeValue, float64(c.StartTime.UnixNano())/1e9, c.Name, name, namespace)
			}
			usage(c.CPU, c.Memory, c.Swap, [3]*prometheus.Desc{containerCPU, containerMemory, containerSwap}, c.Name, name, namespace)
		}
		usage(pod.CPU, pod.Memory, pod.Swap, [3]*prometheus.Desc{podCPU, podMemory, podSwap}, name, namespace)
	}
}

// containers are the families that cAdvisor made before.
type containers struct{ Stats }

// familyDescs are made once; the families are fixed.
var familyDescs = func() map[*cri.MetricFamily]*prometheus.Desc {
	out := map[*cri.MetricFamily]*prometheus.Desc{}
	for _, f := range cri.MetricFamilies() {
		out[f] = desc(f.Name, f.Help, slices.Concat(cri.BaseLabels, f.Labels)...)
	}
	return out
}()

var scrapeError = desc("container_scrape_error", "1 if there was an error while getting container metrics, 0 otherwise")

func (c *containers) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range familyDescs {
		ch <- d
	}
	ch <- scrapeError
}

func (c *containers) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTime)
	defer cancel()
	c.Containers(ctx, func(f *cri.MetricFamily, at time.Time, v float64, labels []string) {
		kind := prometheus.GaugeValue
		if f.Counter {
			kind = prometheus.CounterValue
		}
		if m, err := prometheus.NewConstMetric(familyDescs[f], kind, v, labels...); err == nil {
			ch <- prometheus.NewMetricWithTimestamp(at, m)
		}
	})
	failed := 0.0
	if ctx.Err() != nil {
		failed = 1
	}
	ch <- prometheus.MustNewConstMetric(scrapeError, prometheus.GaugeValue, failed)
}

// machine describes the node's hardware.
type machine struct {
	labels []string
}

var (
	machineLabels = []string{"machine_id", "system_uuid", "boot_id"}
	machineCores  = desc("machine_cpu_cores", "Number of logical CPU cores.", machineLabels...)
	machinePhys   = desc("machine_cpu_physical_cores", "Number of physical CPU cores.", machineLabels...)
	machineSocks  = desc("machine_cpu_sockets", "Number of CPU sockets.", machineLabels...)
	machineMemory = desc("machine_memory_bytes", "Amount of memory installed on the machine.", machineLabels...)
	machineSwap   = desc("machine_swap_bytes", "Amount of swap memory available on the machine.", machineLabels...)
	machineError  = desc("machine_scrape_error", "1 if there was an error while getting machine metrics, 0 otherwise.")
)

func newMachine() *machine {
	read := func(names ...string) string {
		for _, name := range names {
			if b, err := os.ReadFile(name); err == nil && len(bytes.TrimSpace(b)) > 0 {
				return string(bytes.TrimSpace(b))
			}
		}
		return ""
	}
	return &machine{[]string{
		read("/etc/machine-id", "/var/lib/dbus/machine-id"),
		read("/sys/class/dmi/id/product_uuid", "/etc/machine-id"), read("/proc/sys/kernel/random/boot_id"),
	}}
}

func (m *machine) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{machineCores, machinePhys, machineSocks, machineMemory, machineSwap, machineError} {
		ch <- d
	}
}

func (m *machine) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, m.labels...)
	}
	cpus, _ := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/topology")
	sockets, cores := map[string]bool{}, map[string]bool{}
	for _, dir := range cpus {
		socket, _ := os.ReadFile(dir + "/physical_package_id")
		core, _ := os.ReadFile(dir + "/core_id")
		sockets[string(socket)] = true
		cores[string(socket)+"/"+string(core)] = true
	}
	gauge(machineCores, float64(len(cpus)))
	gauge(machinePhys, float64(len(cores)))
	gauge(machineSocks, float64(len(sockets)))
	var info unix.Sysinfo_t
	failed := 0.0
	if err := unix.Sysinfo(&info); err != nil {
		failed = 1
	} else {
		gauge(machineMemory, float64(uint64(info.Totalram)*uint64(info.Unit)))
		gauge(machineSwap, float64(uint64(info.Totalswap)*uint64(info.Unit)))
	}
	ch <- prometheus.MustNewConstMetric(machineError, prometheus.GaugeValue, failed)
}
