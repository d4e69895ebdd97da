// Package metrics makes the kubelet's Prometheus metrics, under upstream's
// names and labels: what the agent does (/metrics), what pods and containers
// use (/metrics/resource, /metrics/cadvisor), and how probes went
// (/metrics/probes).
//
// Nothing here runs by itself but a watch on the pod table, which times the
// starts of pods. All else is counted where it happens, or read when it is
// scraped; labels come from sets that do not grow with time.
package metrics

import (
	"crypto/tls"
	"net/http"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	v1 "k8s.io/api/core/v1"
	"k8s.io/component-base/metrics/legacyregistry"

	"github.com/podd-runtime/podd/kubelet/server/kubeletapi"
	"github.com/podd-runtime/podd/probes"
)

const subsystem = "kubelet"

// Pods is the pod table. *pods.Table is it.
type Pods interface {
	List() []*v1.Pod
}

// Metrics of the agent.
type Metrics struct {
	registry, probes *prometheus.Registry

	requests         *prometheus.CounterVec
	requestSeconds   *prometheus.HistogramVec
	operations       *prometheus.CounterVec
	operationSeconds *prometheus.HistogramVec
	operationErrors  *prometheus.CounterVec
	sandboxSeconds   *prometheus.HistogramVec
	sandboxErrors    *prometheus.CounterVec
	podsStarted      prometheus.Counter
	podErrors        prometheus.Counter
	usernsStarted    prometheus.Counter
	usernsErrors     prometheus.Counter
	started          *prometheus.CounterVec
	startErrors      *prometheus.CounterVec
	terminated       *prometheus.CounterVec
	imagesRemoved    *prometheus.CounterVec
	healed           *prometheus.CounterVec
	worker           *prometheus.HistogramVec
	podStart         prometheus.Histogram
	podStartSLI      prometheus.Histogram
	podStartTotal    prometheus.Histogram
	containersPerPod prometheus.Histogram
	probeTotal       *prometheus.CounterVec
	probeSeconds     *prometheus.HistogramVec
	starts           *starts
}

// podStartBuckets are upstream's.
var podStartBuckets = []float64{0.5, 1, 2, 3, 4, 5, 6, 8, 10, 20, 30, 45, 60, 120, 180, 240, 300, 360, 480, 600, 900, 1200, 1800, 2700, 3600}

// New returns the metrics of a node. version is podd's, git the Kubernetes
// version that it stands for.
func New(node, version, git string) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry(), probes: prometheus.NewRegistry()}
	opts := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Subsystem: subsystem, Name: name, Help: help}
	}
	hist := func(name, help string, buckets []float64) prometheus.HistogramOpts {
		return prometheus.HistogramOpts{Subsystem: subsystem, Name: name, Help: help, Buckets: buckets}
	}
	operation := prometheus.ExponentialBuckets(.005, 2.5, 14)
	request := []string{"method", "path", "server_type", "long_running"}
	m.requests = prometheus.NewCounterVec(opts("http_requests_total", "Number of the http requests received since the server started"), request)
	m.requestSeconds = prometheus.NewHistogramVec(hist("http_requests_duration_seconds", "Duration in seconds to serve http requests", prometheus.DefBuckets), request)
	m.operations = prometheus.NewCounterVec(opts("runtime_operations_total", "Cumulative number of runtime operations by operation type."), []string{"operation_type"})
	m.operationSeconds = prometheus.NewHistogramVec(hist("runtime_operations_duration_seconds", "Duration in seconds of runtime operations. Broken down by operation type.", operation), []string{"operation_type"})
	m.operationErrors = prometheus.NewCounterVec(opts("runtime_operations_errors_total", "Cumulative number of runtime operation errors by operation type."), []string{"operation_type"})
	m.sandboxSeconds = prometheus.NewHistogramVec(hist("run_podsandbox_duration_seconds", "Duration in seconds of the run_podsandbox operations. Broken down by RuntimeClass.Handler.", prometheus.DefBuckets), []string{"runtime_handler"})
	m.sandboxErrors = prometheus.NewCounterVec(opts("run_podsandbox_errors_total", "Cumulative number of the run_podsandbox operation errors by RuntimeClass.Handler."), []string{"runtime_handler"})
	m.podsStarted = prometheus.NewCounter(opts("started_pods_total", "Cumulative number of pods started"))
	m.podErrors = prometheus.NewCounter(opts("started_pods_errors_total", "Cumulative number of errors when starting pods"))
	m.usernsStarted = prometheus.NewCounter(opts("started_user_namespaced_pods_total", "Cumulative number of pods with user namespaces started"))
	m.usernsErrors = prometheus.NewCounter(opts("started_user_namespaced_pods_errors_total", "Cumulative number of errors when starting pods with user namespaces"))
	m.started = prometheus.NewCounterVec(opts("started_containers_total", "Cumulative number of containers started"), []string{"container_type"})
	m.startErrors = prometheus.NewCounterVec(opts("started_containers_errors_total", "Cumulative number of errors when starting containers"), []string{"container_type", "code"})
	m.terminated = prometheus.NewCounterVec(opts("terminated_containers_total", "Cumulative number of container terminations."), []string{"container_type", "exit_code", "reason"})
	m.imagesRemoved = prometheus.NewCounterVec(opts("image_garbage_collected_total", "Total number of images garbage collected by the kubelet, whether through disk usage or image age."), []string{"reason"})
	m.healed = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "podd_audit_healed_total", Help: "Disagreements that the audit of pods has found and put right, each a fault of podd's, by what disagreed: source, runtime or place."}, []string{"what"})
	for _, what := range []string{"source", "runtime", "place"} {
		m.healed.WithLabelValues(what) // so that none is told as none
	}
	m.worker = prometheus.NewHistogramVec(hist("pod_worker_duration_seconds", "Duration in seconds to sync a single pod. Broken down by operation type: create, update, or sync", prometheus.DefBuckets), []string{"operation_type"})
	m.podStart = prometheus.NewHistogram(hist("pod_start_duration_seconds", "Duration in seconds from kubelet seeing a pod for the first time to the pod starting to run", podStartBuckets))
	m.podStartSLI = prometheus.NewHistogram(hist("pod_start_sli_duration_seconds", "Duration in seconds to start a pod, excluding time to pull images and run init containers, measured from pod creation timestamp to when all its containers are reported as started", podStartBuckets))
	m.podStartTotal = prometheus.NewHistogram(hist("pod_start_total_duration_seconds", "Duration in seconds to start a pod since creation, including time to pull images and run init containers, measured from pod creation timestamp to when all its containers are reported as started", podStartBuckets))
	m.containersPerPod = prometheus.NewHistogram(hist("containers_per_pod_count", "The number of containers per pod.", prometheus.ExponentialBuckets(1, 2, 5)))
	m.registry.MustRegister(m.requests, m.requestSeconds, m.operations, m.operationSeconds, m.operationErrors, m.sandboxSeconds, m.sandboxErrors,
		m.podsStarted, m.podErrors, m.usernsStarted, m.usernsErrors, m.started, m.startErrors, m.terminated, m.imagesRemoved, m.healed, m.worker, m.podStart, m.podStartSLI, m.podStartTotal, m.containersPerPod)

	m.constant(subsystem+"_node_name", "The node's name. The count is always 1.", prometheus.Labels{"node": node})
	m.constant("kubernetes_build_info", "A metric with a constant '1' value labeled by the version of Kubernetes that the node stands for.",
		prometheus.Labels{"major": "1", "minor": "36", "git_version": git, "go_version": runtime.Version(), "compiler": runtime.Compiler, "platform": runtime.GOOS + "/" + runtime.GOARCH})
	m.constant("podd_build_info", "A metric with a constant '1' value labeled by podd's version.", prometheus.Labels{"version": version})

	// Upstream has these two without a prefix of their own.
	m.probeTotal = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "prober_probe_total", Help: "Cumulative number of a liveness, readiness or startup probe for a container by result."},
		[]string{"probe_type", "result", "container", "pod", "namespace", "pod_uid"})
	m.probeSeconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "prober_probe_duration_seconds", Help: "Duration in seconds for a probe response.", Buckets: prometheus.DefBuckets},
		[]string{"probe_type", "container", "pod", "namespace"})
	m.probes.MustRegister(m.probeTotal, m.probeSeconds)
	m.starts = newStarts(m)
	return m
}

func (m *Metrics) constant(name, help string, labels prometheus.Labels) {
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels})
	g.Set(1)
	m.registry.MustRegister(g)
}

// ImageRemoved counts an image that was removed for its age or for space.
func (m *Metrics) ImageRemoved(reason string) { m.imagesRemoved.WithLabelValues(reason).Inc() }

// Register adds a collector to /metrics.
func (m *Metrics) Register(c prometheus.Collector) { m.registry.MustRegister(c) }

// ServerCertificate shows how long the serving certificate is good for.
func (m *Metrics) ServerCertificate(get kubeletapi.Certificate) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Subsystem: subsystem, Name: "certificate_manager_server_ttl_seconds",
		Help: "Gauge of the shortest TTL (time-to-live) of the Kubelet's serving certificate. The value is in seconds until certificate expiry (negative if already expired).",
	}, func() float64 {
		cert, err := get(&tls.ClientHelloInfo{})
		if err != nil || cert.Leaf == nil {
			return 0
		}
		return time.Until(cert.Leaf.NotAfter).Seconds()
	}))
}

// Request counts one of the kubelet API's.
func (m *Metrics) Request(r kubeletapi.Request) {
	long := "false"
	if r.LongRunning {
		long = "true"
	}
	m.requests.WithLabelValues(r.Method, r.Path, r.ServerType, long).Inc()
	m.requestSeconds.WithLabelValues(r.Method, r.Path, r.ServerType, long).Observe(r.Duration.Seconds())
}

// Worked counts one look of a pod's worker at its pod.
func (m *Metrics) Worked(operation string, d time.Duration) {
	m.worker.WithLabelValues(operation).Observe(d.Seconds())
}

// Healed counts what the audit of pods has put right.
func (m *Metrics) Healed(what string) { m.healed.WithLabelValues(what).Inc() }

// Probed counts one probe.
func (m *Metrics) Probed(t probes.Target, k probes.Kind, result string, d time.Duration) {
	m.probeTotal.WithLabelValues(k.String(), result, t.Container.Name, t.Pod.Name, t.Pod.Namespace, string(t.Pod.UID)).Inc()
	if result != "unknown" {
		m.probeSeconds.WithLabelValues(k.String(), t.Container.Name, t.Pod.Name, t.Pod.Namespace).Observe(d.Seconds())
	}
}

// forget what was counted of a pod: there is no end of pods.
func (m *Metrics) forget(pod *v1.Pod) {
	labels := prometheus.Labels{"pod": pod.Name, "namespace": pod.Namespace}
	m.probeSeconds.DeletePartialMatch(labels)
	m.probeTotal.DeletePartialMatch(labels)
}

// Handlers of the metrics endpoints by name, as kubeletapi.Config has them.
func (m *Metrics) Handlers(pods Pods, runtime Runtime, stats Stats) map[string]http.Handler {
	m.registry.MustRegister(&podCounts{pods: pods, runtime: runtime}, &volumeStats{stats})
	of := func(collectors ...prometheus.Collector) http.Handler {
		r := prometheus.NewRegistry()
		r.MustRegister(collectors...)
		return handler(r)
	}
	return map[string]http.Handler{
		// The libraries' own: go_*, process_*, rest_client_*, feature gates.
		"":         handler(prometheus.Gatherers{m.registry, legacyregistry.DefaultGatherer}),
		"resource": of(&resource{stats}),
		"cadvisor": of(&containers{stats}, newMachine()),
		"probes":   handler(m.probes),
		"slis":     handler(prometheus.NewRegistry()),
	}
}

func handler(g prometheus.Gatherer) http.Handler {
	return promhttp.HandlerFor(g, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: 8})
}
