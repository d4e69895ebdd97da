package integration

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	v1 "k8s.io/api/core/v1"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"github.com/podd-runtime/podd/cgroups"
	"github.com/podd-runtime/podd/integration/node"
)

// authority signs client certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test-ca"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key: key, file: filepath.Join(t.TempDir(), "ca.crt")}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(a.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *authority) client(t testing.TB, user string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: user},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// apiClient talks to a node's kubelet API.
type apiClient struct {
	base string
	http *http.Client
}

func newAPIClient(port int, certs ...tls.Certificate) *apiClient {
	return &apiClient{fmt.Sprintf("https://127.0.0.1:%d", port), &http.Client{
		Timeout:       node.Scale(30 * time.Second),
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		// Which certificate the server shows is looked at by the tests that care.
		Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: certs}},
	}}
}

func (c *apiClient) do(method, path string) (int, string, error) {
	req, err := http.NewRequest(method, c.base+path, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

func (c *apiClient) get(t testing.TB, path string) string {
	t.Helper()
	code, body, err := c.do("GET", path)
	if err != nil || code != http.StatusOK {
		t.Fatalf("GET %s: %d, %v: %s", path, code, err, body)
	}
	return body
}

// apiNode starts a standalone node whose kubelet API lets owners of a
// certificate of a do everything.
func apiNode(t testing.TB, a *authority, flags ...string) (*node.Node, *apiClient) {
	t.Helper()
	port := freePort(t)
	n := start(t, append([]string{
		"--address", "127.0.0.1", "--port", strconv.Itoa(port), "--client-ca-file", a.file,
		"--authentication-token-webhook=false", "--authorization-mode", "AlwaysAllow",
	}, flags...)...)
	return n, newAPIClient(port, a.client(t, "admin"))
}

// endpoints of the API, each with the method that it answers.
func endpoints(pod string) []string {
	return []string{
		"GET /", "GET /pods", "GET /pods/", "GET /runningpods/", "GET /healthz", "GET /healthz/ping", "GET /healthz/log", "GET /healthz/syncloop", "GET /configz",
		"GET /containerLogs/default/" + pod + "/main", "GET /containerLogs/default/" + pod + "/main?follow=true", "GET /exec/default/" + pod + "/main?command=id&output=1",
		"POST /exec/default/" + pod + "/main?command=id&output=1", "POST /exec/default/" + pod + "/uid/main?command=id&output=1", "POST /attach/default/" + pod + "/main?output=1",
		"GET /attach/default/" + pod + "/main", "POST /portForward/default/" + pod, "GET /portForward/default/" + pod + "/uid", "POST /run/default/" + pod + "/main?cmd=id", "POST /run/default/" + pod + "/uid/main?cmd=id",
		"GET /stats/summary", "POST /stats/summary", "GET /stats/summary?only_cpu_and_memory=true", "GET /metrics", "GET /metrics/cadvisor", "GET /metrics/resource", "GET /metrics/probes", "GET /metrics/slis",
		"GET /logs/", "GET /logs/../../etc/passwd", "GET /debug/pprof/", "GET /debug/pprof/heap", "GET /debug/pprof/profile?seconds=1", "PUT /debug/flags/v",
		"POST /checkpoint/default/" + pod + "/main", "GET /statusz", "GET /flagz", "GET /nosuch", "DELETE /pods", "PATCH /pods", "OPTIONS /pods", "HEAD /metrics",
	}
}

func TestKubeletAPIShowsNothingToStrangers(t *testing.T) {
	ours, foreign := newAuthority(t), newAuthority(t)
	n, admin := apiNode(t, ours)
	n.Write("web.yaml", pod("web", "", "serve", ":8080"))
	n.WaitRunning("web")
	name := node.PodName("web")
	port, _ := strconv.Atoi(admin.base[strings.LastIndexByte(admin.base, ':')+1:])
	for who, c := range map[string]*apiClient{"nobody": newAPIClient(port), "a foreign certificate": newAPIClient(port, foreign.client(t, "admin"))} {
		for _, e := range endpoints(name) {
			method, path, _ := strings.Cut(e, " ")
			code, body, err := c.do(method, path)
			if err != nil || code != http.StatusUnauthorized || method != "HEAD" && strings.TrimSpace(body) != "Unauthorized" {
				t.Errorf("%s by %s: %d %.100q, %v", e, who, code, body, err)
			}
		}
	}
	// A token is worth nothing where nobody reviews it.
	req, _ := http.NewRequest("GET", admin.base+"/pods", nil)
	req.Header.Set("Authorization", "Bearer abc")
	resp, err := newAPIClient(port).http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("a token: %s", resp.Status)
	}
	// The same by whoever may: what is there answers, and no path leads out.
	for path, want := range map[string]int{
		"GET /nosuch": 404, "DELETE /pods": 405, "GET /run/default/" + name + "/main": 405, "POST /checkpoint/default/" + name + "/main": 500,
		"GET /containerLogs/default/" + name + "/nosuch": 404, "GET /containerLogs/default/..%2f..%2fetc/passwd": 404, "GET /containerLogs/default/" + name + "/..%2f..%2f..%2fetc%2fpasswd": 404,
		"GET /containerLogs/%2e%2e/%2e%2e/main": 404, "GET /logs/..%2f..%2fetc%2fpasswd": 404, "GET /logs/%2e%2e/%2e%2e/etc/passwd": 404,
		"GET /containerLogs/default/" + name + "/main?tailLines=x": 400, "GET /exec/default/" + name + "/main?output=1": 400,
	} {
		method, p, _ := strings.Cut(path, " ")
		code, body, err := admin.do(method, p)
		if err != nil || code != want && !(want == 404 && (code == 301 || code == 307 || code == 400)) || strings.Contains(body, "root:") {
			t.Errorf("%s: %d %.100q, %v; want %d", path, code, body, err, want)
		}
	}
	var list v1.PodList
	if err := json.Unmarshal([]byte(admin.get(t, "/pods")), &list); err != nil || len(list.Items) != 1 || list.Items[0].Name != name || list.Kind != "PodList" {
		t.Errorf("/pods: %d pods, %v", len(list.Items), err)
	}
	list = v1.PodList{}
	if err := json.Unmarshal([]byte(admin.get(t, "/runningpods/")), &list); err != nil || len(list.Items) != 1 || list.Items[0].Spec.Containers[0].Name != "main" {
		t.Errorf("/runningpods: %+v, %v", list.Items, err)
	}
	if got := admin.get(t, "/healthz"); got != "ok" {
		t.Errorf("/healthz: %q", got)
	}
	if got := admin.get(t, "/configz"); !strings.Contains(got, `"authorization":{"mode":"AlwaysAllow"`) {
		t.Errorf("/configz: %s", got)
	}
	if code, body, err := admin.do("POST", "/run/default/"+name+"/main?cmd=/testserver+echo+hello"); err != nil || code == 404 || code == 405 {
		t.Errorf("/run: %d %q %v", code, body, err)
	}
}

// scrape parses what Prometheus would, and holds it to promlint.
func scrape(t testing.TB, c *apiClient, path string) map[string]*dto.MetricFamily {
	t.Helper()
	body := c.get(t, path)
	p := expfmt.NewTextParser(model.UTF8Validation)
	families, err := p.TextToMetricFamilies(strings.NewReader(body))
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	problems, err := promlint.New(strings.NewReader(body)).Lint()
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	for _, p := range problems {
		if !strings.HasPrefix(p.Metric, "go_") && !strings.HasPrefix(p.Metric, "process_") { // the library's own
			t.Errorf("%s: %s: %s", path, p.Metric, p.Text)
		}
	}
	return families
}

// sample of a family by some of its labels.
func sample(f *dto.MetricFamily, labels map[string]string) (*dto.Metric, bool) {
next:
	for _, m := range f.GetMetric() {
		have := map[string]string{}
		for _, l := range m.GetLabel() {
			have[l.GetName()] = l.GetValue()
		}
		for k, v := range labels {
			if have[k] != v {
				continue next
			}
		}
		return m, true
	}
	return nil, false
}

func metricValue(m *dto.Metric) float64 {
	switch {
	case m.GetGauge() != nil:
		return m.GetGauge().GetValue()
	case m.GetCounter() != nil:
		return m.GetCounter().GetValue()
	}
	return math.NaN()
}

func TestMetricsAgreeWithCgroups(t *testing.T) {
	n, admin := apiNode(t, newAuthority(t))
	n.Write("web.yaml", pod("web", "", "serve", ":8080")+"    resources: {limits: {cpu: 500m, memory: 64Mi}}\n    readinessProbe: {httpGet: {port: 8080, path: /hostname}, periodSeconds: 1}\n")
	p := n.WaitPod("web", "ready", 60*second, func(p *v1.Pod) bool {
		return len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].Ready
	})
	_, id, _ := strings.Cut(p.Status.ContainerStatuses[0].ContainerID, "://")
	group := containerGroup(t, n, id)
	labels := map[string]string{"container": "main", "pod": p.Name, "namespace": "default"}
	// Between two readings of the files the endpoints must lie.
	within := func(what string, got float64, read func(*cgroups.Stats) float64, before *cgroups.Stats) {
		t.Helper()
		after, err := cgroups.ReadStats(group)
		if err != nil {
			t.Fatal(err)
		}
		lo, hi := min(read(before), read(after)), max(read(before), read(after))
		slack := 0.1*hi + 1<<20 // memory goes up and down in between
		if strings.Contains(what, "cpu") {
			slack = 0
		}
		if got < lo-slack || got > hi+slack || hi == 0 {
			t.Errorf("%s: %v, but the files said %v, then %v", what, got, lo, hi)
		}
	}
	cpu := func(s *cgroups.Stats) float64 { return s.CPUUsage.Seconds() }
	memory := func(s *cgroups.Stats) float64 { return float64(*s.MemoryWorkingSet) }

	before, err := cgroups.ReadStats(group)
	if err != nil {
		t.Fatal(err)
	}
	families := scrape(t, admin, "/metrics/resource")
	for name, read := range map[string]func(*cgroups.Stats) float64{"container_cpu_usage_seconds_total": cpu, "container_memory_working_set_bytes": memory} {
		m, ok := sample(families[name], labels)
		if !ok {
			t.Fatalf("no %s of %v", name, labels)
		}
		within("resource: "+name, metricValue(m), read, before)
		if at := time.UnixMilli(m.GetTimestampMs()); time.Since(at) > node.Scale(time.Minute) || m.TimestampMs == nil {
			t.Errorf("%s is of %v", name, at)
		}
	}
	for _, name := range []string{"node_cpu_usage_seconds_total", "node_memory_working_set_bytes", "node_swap_usage_bytes", "pod_cpu_usage_seconds_total", "pod_memory_working_set_bytes", "container_start_time_seconds"} {
		if len(families[name].GetMetric()) == 0 {
			t.Errorf("/metrics/resource has no %s", name)
		}
	}
	if m, ok := sample(families["resource_scrape_error"], nil); !ok || metricValue(m) != 0 {
		t.Errorf("resource_scrape_error: %v", m)
	}

	before, _ = cgroups.ReadStats(group)
	families = scrape(t, admin, "/metrics/cadvisor")
	labels["id"], labels["image"] = group, testserver
	for name, read := range map[string]func(*cgroups.Stats) float64{"container_cpu_usage_seconds_total": cpu, "container_memory_working_set_bytes": memory} {
		if m, ok := sample(families[name], labels); ok {
			within("cadvisor: "+name, metricValue(m), read, before)
		} else {
			t.Errorf("no %s of %v", name, labels)
		}
	}
	for name, want := range map[string]float64{
		"container_spec_memory_limit_bytes": 64 << 20, "container_spec_cpu_quota": 50000, "container_spec_cpu_period": 100000, "container_processes": 1, "container_oom_events_total": 0,
	} {
		if m, ok := sample(families[name], labels); !ok || metricValue(m) != want {
			t.Errorf("%s: %v, want %v", name, m, want)
		}
	}
	for _, name := range []string{"container_cpu_cfs_periods_total", "container_cpu_cfs_throttled_seconds_total", "container_memory_rss", "container_memory_cache", "container_memory_usage_bytes",
		"container_threads", "container_file_descriptors", "container_sockets", "container_start_time_seconds", "container_last_seen", "container_fs_usage_bytes", "container_cpu_user_seconds_total"} {
		if _, ok := sample(families[name], labels); !ok {
			t.Errorf("/metrics/cadvisor has no %s of the container", name)
		}
	}
	if m, ok := sample(families["container_network_receive_bytes_total"], map[string]string{"pod": p.Name, "interface": "eth0"}); !ok || metricValue(m) == 0 {
		t.Errorf("network of the pod: %v", m)
	}
	for _, name := range []string{"machine_cpu_cores", "machine_memory_bytes"} {
		if m, ok := sample(families[name], nil); !ok || metricValue(m) <= 0 {
			t.Errorf("%s: %v", name, m)
		}
	}
	if _, ok := sample(families["container_memory_rss"], map[string]string{"id": "/"}); !ok {
		t.Error("the node's own group is missing")
	}

	families = scrape(t, admin, "/metrics/probes")
	if m, ok := sample(families["prober_probe_total"], map[string]string{"probe_type": "Readiness", "result": "successful", "pod": p.Name}); !ok || metricValue(m) < 1 {
		t.Errorf("prober_probe_total: %v", m)
	}
	families = scrape(t, admin, "/metrics")
	if m, ok := sample(families["kubelet_running_pods"], nil); !ok || metricValue(m) != 1 {
		t.Errorf("kubelet_running_pods: %v", m)
	}
	if m, ok := sample(families["kubelet_running_containers"], map[string]string{"container_state": "running"}); !ok || metricValue(m) != 1 {
		t.Errorf("kubelet_running_containers: %v", m)
	}
	if m, ok := sample(families["kubelet_pod_start_sli_duration_seconds"], nil); !ok || m.GetHistogram().GetSampleCount() != 1 {
		t.Errorf("kubelet_pod_start_sli_duration_seconds: %v", m)
	}
	for _, name := range []string{"kubelet_runtime_operations_total", "kubelet_pod_worker_duration_seconds", "kubelet_node_name", "kubernetes_build_info", "kubelet_http_requests_total",
		"process_resident_memory_bytes", "go_goroutines", "kubelet_started_containers_total", "kubelet_certificate_manager_server_ttl_seconds"} {
		if len(families[name].GetMetric()) == 0 {
			t.Errorf("/metrics has no %s", name)
		}
	}
	scrape(t, admin, "/metrics/slis")

	var sum statsapi.Summary
	if err := json.Unmarshal([]byte(admin.get(t, "/stats/summary")), &sum); err != nil {
		t.Fatal(err)
	}
	if sum.Node.NodeName != "node1" || sum.Node.Memory == nil || sum.Node.Fs == nil || sum.Node.Runtime == nil || sum.Node.Rlimit == nil || len(sum.Pods) != 1 {
		t.Fatalf("summary: %+v", sum)
	}
	ps := sum.Pods[0]
	if ps.PodRef.Name != p.Name || ps.PodRef.UID != string(p.UID) || ps.Network == nil || ps.EphemeralStorage == nil || len(ps.Containers) != 1 || ps.Containers[0].Logs == nil || ps.Containers[0].StartTime.IsZero() {
		t.Errorf("summary of the pod: %+v", ps)
	}
	// What was counted of a pod goes with it.
	n.Remove("web.yaml")
	n.WaitGone(20 * second)
	node.Await(t, "the pod's metrics gone", 10*second, func() bool {
		return !strings.Contains(admin.get(t, "/metrics/probes")+admin.get(t, "/metrics/cadvisor")+admin.get(t, "/metrics/resource"), p.Name)
	})
}

// containerGroup is the cgroup of a container below the mount points.
func containerGroup(t testing.TB, n *node.Node, id string) string {
	t.Helper()
	for pid := range n.Processes("") {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if err != nil {
			continue
		}
		for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
			f := strings.SplitN(sc.Text(), ":", 3)
			if len(f) == 3 && strings.Contains(f[2], id) && (f[1] == "" || f[1] == "memory") {
				return f[2]
			}
		}
	}
	t.Fatalf("no process in the cgroup of container %s", id)
	return ""
}

func TestHealthAndReadOnlyPorts(t *testing.T) {
	health, read := freePort(t), freePort(t)
	n := start(t, "--healthz-port", strconv.Itoa(health), "--read-only-port", strconv.Itoa(read), "--address", "127.0.0.1")
	n.Write("web.yaml", pod("web", "", "serve", ":8080"))
	n.WaitRunning("web")
	url := fmt.Sprintf("http://127.0.0.1:%d", health)
	node.Await(t, "health", 10*second, func() bool { return fetch(url+"/healthz") == "ok" })
	if got := fetch(url + "/pods"); got != "" {
		t.Errorf("the health port shows pods: %.100s", got)
	}
	url = fmt.Sprintf("http://127.0.0.1:%d", read)
	if got := fetch(url + "/pods"); !strings.Contains(got, node.PodName("web")) {
		t.Errorf("/pods: %.100s", got)
	}
	for _, path := range []string{"/exec/default/web/main", "/configz", "/logs/", "/debug/pprof/", "/runningpods/", "/containerLogs/default/" + node.PodName("web") + "/main"} {
		if got := fetch(url + path); got != "" {
			t.Errorf("the read-only port answers %s", path)
		}
	}
}

// With nothing configured nobody could log in: no port is taken. What asks for
// a cluster where there is none is an error that says so.
func TestKubeletAPIWithoutAnyone(t *testing.T) {
	port := freePort(t)
	n := start(t, "--port", strconv.Itoa(port))
	if conn, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), time.Second); err == nil {
		conn.Close()
		t.Error("the port is open")
	}
	for _, flag := range []string{"--authorization-mode=Webhook", "--authentication-token-webhook=true"} {
		args := append([]string{"run"}, n.Args()...)
		args = append(args, flag, "--data-dir", t.TempDir(), "--run-dir", t.TempDir()+"/r")
		ctx, cancel := context.WithTimeout(t.Context(), node.Scale(30*time.Second))
		out, err := exec.CommandContext(ctx, filepath.Join(n.Bin, "podd"), args...).CombinedOutput()
		cancel()
		if err == nil || !strings.Contains(string(out), "there is no cluster to ask") {
			t.Errorf("%s: %s", flag, out)
		}
	}
}
