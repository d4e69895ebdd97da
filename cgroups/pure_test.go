package cgroups

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"
)

// Names as the kubelet's cgroup manager gives them (pkg/kubelet/cm).
func TestNames(t *testing.T) {
	const uid = types.UID("1234-abcd")
	for _, c := range []struct {
		root    string
		systemd bool
		qos     v1.PodQOSClass
		path    string
		parent  string
	}{
		{"", false, v1.PodQOSGuaranteed, "/kubepods/pod1234-abcd", "/kubepods/pod1234-abcd"},
		{"/", false, v1.PodQOSBurstable, "/kubepods/burstable/pod1234-abcd", "/kubepods/burstable/pod1234-abcd"},
		{"/a/b", false, v1.PodQOSBestEffort, "/a/b/kubepods/besteffort/pod1234-abcd", "/a/b/kubepods/besteffort/pod1234-abcd"},
		{"", true, v1.PodQOSGuaranteed, "/kubepods.slice/kubepods-pod1234_abcd.slice", "kubepods-pod1234_abcd.slice"},
		{"/", true, v1.PodQOSBurstable, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1234_abcd.slice", "kubepods-burstable-pod1234_abcd.slice"},
		{"", true, v1.PodQOSBestEffort, "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1234_abcd.slice", "kubepods-besteffort-pod1234_abcd.slice"},
		{"/x-y", true, v1.PodQOSBurstable, "/x_y.slice/x_y-kubepods.slice/x_y-kubepods-burstable.slice/x_y-kubepods-burstable-pod1234_abcd.slice", "x_y-kubepods-burstable-pod1234_abcd.slice"},
		{"a.slice/a-b.slice", true, v1.PodQOSGuaranteed, "/a.slice/a-b.slice/a-b-kubepods.slice/a-b-kubepods-pod1234_abcd.slice", "a-b-kubepods-pod1234_abcd.slice"},
		{"-.slice", true, v1.PodQOSGuaranteed, "/kubepods.slice/kubepods-pod1234_abcd.slice", "kubepods-pod1234_abcd.slice"},
	} {
		tree := &Tree{names: newNamer(c.root, c.systemd), systemd: c.systemd}
		if got := tree.Path(uid, c.qos); got != c.path {
			t.Errorf("root %q systemd %v: path %s, want %s", c.root, c.systemd, got, c.path)
		}
		if got := tree.Parent(uid, c.qos); got != c.parent {
			t.Errorf("root %q systemd %v: parent %s, want %s", c.root, c.systemd, got, c.parent)
		}
		if got, ok := tree.names.podUID(filepath.Base(c.path)); !ok || got != uid {
			t.Errorf("uid of %s: %s, %v", c.path, got, ok)
		}
	}
	for base, systemd := range map[string]bool{"burstable": false, "pods": false, "pod": false, "kubepods-burstable.slice": true, "kubepods-podx": true, "x.service": true} {
		if uid, ok := newNamer("", systemd).podUID(base); ok {
			t.Errorf("%s is no pod, got %s", base, uid)
		}
	}
	tree := &Tree{names: newNamer("", false)}
	if p := tree.Path("../../../etc", v1.PodQOSBurstable); strings.Contains(p, "/../") || !strings.HasPrefix(p, "/kubepods/burstable/pod") {
		t.Errorf("a uid leads to %s", p)
	}
}

func TestShares(t *testing.T) {
	for milli, want := range map[int64]uint64{0: 2, 1: 2, 2: 2, 10: 10, 100: 102, 250: 256, 1000: 1024, 1500: 1536, 256000: 262144, 1 << 40: 262144} {
		if got := MilliCPUToShares(milli); got != want {
			t.Errorf("%d m: %d shares, want %d", milli, got, want)
		}
	}
	for _, c := range [][3]int64{{0, 100000, 0}, {1, 100000, 1000}, {9, 100000, 1000}, {10, 100000, 1000}, {100, 100000, 10000}, {1500, 100000, 150000}, {200, 50000, 10000}, {1000, 5000, 5000}} {
		if got := MilliCPUToQuota(c[0], c[1]); got != c[2] {
			t.Errorf("%d m of %d µs: %d, want %d", c[0], c[1], got, c[2])
		}
	}
	for shares, want := range map[uint64]uint64{0: 0, 1: 1, 2: 1, 102: 4, 1024: 39, 2048: 79, 262143: 9999, 262144: 10000, 1 << 40: 10000} {
		if got := SharesToWeight(shares); got != want {
			t.Errorf("%d shares: weight %d, want %d", shares, got, want)
		}
	}
}

type ctr struct{ cpuReq, cpuLim, memReq, memLim string }

func (c ctr) container(name string) v1.Container {
	list := func(cpu, mem string) v1.ResourceList {
		l := v1.ResourceList{}
		if cpu != "" {
			l[v1.ResourceCPU] = resource.MustParse(cpu)
		}
		if mem != "" {
			l[v1.ResourceMemory] = resource.MustParse(mem)
		}
		return l
	}
	return v1.Container{Name: name, Resources: v1.ResourceRequirements{Requests: list(c.cpuReq, c.memReq), Limits: list(c.cpuLim, c.memLim)}}
}

func podOf(cs ...ctr) *v1.Pod {
	p := &v1.Pod{}
	for i, c := range cs {
		p.Spec.Containers = append(p.Spec.Containers, c.container(fmt.Sprintf("c%d", i)))
	}
	return p
}

// Expectations computed by hand from upstream's ResourceConfigForPod.
func TestResourceConfigForPod(t *testing.T) {
	sidecar := podOf(ctr{"100m", "100m", "64Mi", "64Mi"})
	always := v1.ContainerRestartPolicyAlways
	side := ctr{"50m", "50m", "16Mi", "16Mi"}.container("side")
	side.RestartPolicy = &always
	sidecar.Spec.InitContainers = []v1.Container{side, ctr{"1", "1", "32Mi", "32Mi"}.container("init")}

	podLevel := podOf(ctr{}, ctr{})
	podLevel.Spec.Resources = &v1.ResourceRequirements{
		Requests: v1.ResourceList{v1.ResourceCPU: resource.MustParse("500m")},
		Limits:   v1.ResourceList{v1.ResourceCPU: resource.MustParse("1"), v1.ResourceMemory: resource.MustParse("128Mi")},
	}
	overhead := podOf(ctr{"100m", "100m", "64Mi", "64Mi"})
	overhead.Spec.Overhead = v1.ResourceList{v1.ResourceCPU: resource.MustParse("100m"), v1.ResourceMemory: resource.MustParse("64Mi")}

	for _, c := range []struct {
		name    string
		pod     *v1.Pod
		options PodOptions
		qos     v1.PodQOSClass
		shares  uint64
		quota   int64 // 0: not set
		memory  int64
	}{
		{"best effort", podOf(ctr{}, ctr{}), PodOptions{}, v1.PodQOSBestEffort, 2, 0, 0},
		{"guaranteed", podOf(ctr{"100m", "100m", "200Mi", "200Mi"}), PodOptions{}, v1.PodQOSGuaranteed, 102, 10000, 200 << 20},
		{"guaranteed, two containers", podOf(ctr{"100m", "100m", "200Mi", "200Mi"}, ctr{"400m", "400m", "1Mi", "1Mi"}), PodOptions{}, v1.PodQOSGuaranteed, 512, 50000, 201 << 20},
		{"guaranteed, quotas off", podOf(ctr{"100m", "100m", "200Mi", "200Mi"}), PodOptions{NoCPUQuota: true}, v1.PodQOSGuaranteed, 102, -1, 200 << 20},
		{"guaranteed, short period", podOf(ctr{"100m", "100m", "200Mi", "200Mi"}), PodOptions{QuotaPeriod: 20000}, v1.PodQOSGuaranteed, 102, 2000, 200 << 20},
		{"burstable by request", podOf(ctr{"100m", "", "100Mi", ""}), PodOptions{}, v1.PodQOSBurstable, 102, 0, 0},
		{"burstable with limits", podOf(ctr{"100m", "200m", "100Mi", "200Mi"}), PodOptions{}, v1.PodQOSBurstable, 102, 20000, 200 << 20},
		{"burstable, one container without a limit", podOf(ctr{"100m", "200m", "100Mi", "200Mi"}, ctr{"100m", "", "", ""}), PodOptions{}, v1.PodQOSBurstable, 204, 0, 0},
		{"burstable, memory limited only", podOf(ctr{"100m", "", "100Mi", "200Mi"}), PodOptions{}, v1.PodQOSBurstable, 102, 0, 200 << 20},
		{"sidecar and init", sidecar, PodOptions{}, v1.PodQOSGuaranteed, 1075, 105000, 80 << 20},
		{"pod level", podLevel, PodOptions{}, v1.PodQOSBurstable, 512, 100000, 128 << 20},
		{"overhead", overhead, PodOptions{}, v1.PodQOSGuaranteed, 204, 20000, 128 << 20},
	} {
		if got := QOSClass(c.pod); got != c.qos {
			t.Errorf("%s: class %s, want %s", c.name, got, c.qos)
		}
		r := ResourceConfigForPod(c.pod, c.options)
		quota, memory := int64(0), int64(0)
		if r.CPU.Quota != nil {
			quota = *r.CPU.Quota
			if want := c.options.period(); *r.CPU.Period != want {
				t.Errorf("%s: period %d, want %d", c.name, *r.CPU.Period, want)
			}
		}
		if r.Memory != nil {
			memory = *r.Memory.Limit
		}
		if *r.CPU.Shares != c.shares || quota != c.quota || memory != c.memory {
			t.Errorf("%s: shares %d quota %d memory %d; want %d %d %d", c.name, *r.CPU.Shares, quota, memory, c.shares, c.quota, c.memory)
		}
	}
	if r := ResourceConfigForPod(podOf(ctr{}), PodOptions{PIDs: 100}); r.Pids == nil || *r.Pids.Limit != 100 {
		t.Error("pids limit not set")
	}
	for _, h := range ResourceConfigForPod(podOf(ctr{}), PodOptions{}).HugepageLimits {
		if h.Limit != 0 {
			t.Errorf("huge pages %s: %d, want none", h.Pagesize, h.Limit)
		}
	}
	if sizes := hugePageSizes(); len(sizes) > 0 {
		p := podOf(ctr{"1", "1", "1Gi", "1Gi"})
		name := v1.ResourceName(v1.ResourceHugePagesPrefix + resource.NewQuantity(sizes[0].bytes, resource.BinarySI).String())
		q := *resource.NewQuantity(4*sizes[0].bytes, resource.BinarySI)
		p.Spec.Containers[0].Resources.Limits[name], p.Spec.Containers[0].Resources.Requests[name] = q, q
		r := ResourceConfigForPod(p, PodOptions{}).HugepageLimits
		if i := slices.IndexFunc(r, func(h specs.LinuxHugepageLimit) bool { return h.Pagesize == sizes[0].name }); i < 0 || r[i].Limit != uint64(4*sizes[0].bytes) {
			t.Errorf("huge pages %v", r)
		}
		c := ResourceConfigForContainer(p, &p.Spec.Containers[0], PodOptions{}).HugepageLimits
		if len(c) != len(sizes) || c[0].Limit != uint64(4*sizes[0].bytes) {
			t.Errorf("container's huge pages %v", c)
		}
	}
}

func TestResourceConfigForContainer(t *testing.T) {
	for _, c := range []struct {
		name                          string
		ctr                           ctr
		options                       PodOptions
		shares, quota, period, memory int64
	}{
		{"nothing", ctr{}, PodOptions{}, 2, 0, 100000, 0},
		{"requests", ctr{"100m", "", "64Mi", ""}, PodOptions{}, 102, 0, 100000, 0},
		{"limits", ctr{"100m", "200m", "64Mi", "128Mi"}, PodOptions{}, 102, 20000, 100000, 128 << 20},
		{"limit stands for the request", ctr{"", "200m", "", "128Mi"}, PodOptions{}, 204, 20000, 100000, 128 << 20},
		{"request of zero is a request", ctr{"0", "200m", "", ""}, PodOptions{}, 2, 20000, 100000, 0},
		{"smallest quota", ctr{"1m", "1m", "", ""}, PodOptions{}, 2, 1000, 100000, 0},
		{"no quotas", ctr{"100m", "200m", "", ""}, PodOptions{NoCPUQuota: true}, 102, 0, 0, 0},
		{"period", ctr{"100m", "200m", "", ""}, PodOptions{QuotaPeriod: 5000}, 102, 1000, 5000, 0},
	} {
		p := podOf(c.ctr)
		r := ResourceConfigForContainer(p, &p.Spec.Containers[0], c.options)
		if r.CpuShares != c.shares || r.CpuQuota != c.quota || r.CpuPeriod != c.period || r.MemoryLimitInBytes != c.memory {
			t.Errorf("%s: %v; want shares %d quota %d period %d memory %d", c.name, r, c.shares, c.quota, c.period, c.memory)
		}
	}
	p := podOf(ctr{"100m", "", "", ""})
	p.Spec.Resources = &v1.ResourceRequirements{Limits: v1.ResourceList{v1.ResourceCPU: resource.MustParse("1"), v1.ResourceMemory: resource.MustParse("1Gi")}}
	if r := ResourceConfigForContainer(p, &p.Spec.Containers[0], PodOptions{GroupOOM: true}); r.CpuQuota != 100000 || r.MemoryLimitInBytes != 1<<30 || r.Unified["memory.oom.group"] != "1" {
		t.Errorf("pod's limits as the container's: %v", r)
	}
}

// Upstream's table, pkg/kubelet/qos/policy_test.go, in our words.
func TestOOMScoreAdj(t *testing.T) {
	const capacity = 4000000000
	critical := podOf(ctr{})
	critical.Spec.PriorityClassName = "system-node-critical"
	critical.Annotations = map[string]string{"kubernetes.io/config.source": "file"}
	named := podOf(ctr{"100m", "", "", ""})
	named.Spec.PriorityClassName = "system-node-critical" // from the API, of low priority
	named.Annotations = map[string]string{"kubernetes.io/config.source": "api"}
	always := v1.ContainerRestartPolicyAlways
	withSidecar := podOf(ctr{"", "", "2G", ""})
	side := ctr{"", "", "1G", ""}.container("side")
	side.RestartPolicy = &always
	withSidecar.Spec.InitContainers = []v1.Container{side}
	podLevel := podOf(ctr{"", "", "1G", ""}, ctr{})
	podLevel.Spec.Resources = &v1.ResourceRequirements{Requests: v1.ResourceList{v1.ResourceMemory: resource.MustParse("3G")}}
	for _, c := range []struct {
		name string
		pod  *v1.Pod
		ctr  *v1.Container
		want int
	}{
		{"best effort", podOf(ctr{}), nil, 1000},
		{"guaranteed", podOf(ctr{"1", "1", "1G", "1G"}), nil, -997},
		{"burstable without memory request", podOf(ctr{"100m", "", "", ""}), nil, 999},
		{"burstable by limit only", podOf(ctr{"", "100m", "", "1G"}), nil, 999},
		{"half of the node", podOf(ctr{"", "", "2G", ""}), nil, 500},
		{"all of the node", podOf(ctr{"", "", "4G", ""}), nil, 3},
		{"more than the node", podOf(ctr{"", "", "8G", ""}), nil, 3},
		{"node critical", critical, nil, -997},
		{"only named so", named, nil, 999},
		{"sidecar lives as long as the rest", withSidecar, &withSidecar.Spec.InitContainers[0], 500},
		{"share of the pod's request", podLevel, nil, 500},
		{"share alone", podLevel, &podLevel.Spec.Containers[1], 750},
	} {
		if c.ctr == nil {
			c.ctr = &c.pod.Spec.Containers[0]
		}
		if got := OOMScoreAdj(c.pod, c.ctr, capacity); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
	p := podOf(ctr{"100m", "", "1G", ""})
	if got := OOMScoreAdj(p, &p.Spec.Containers[0], 0); got != 999 {
		t.Errorf("unknown capacity: %d, want 999", got)
	}
}

func TestParseMounts(t *testing.T) {
	f, err := os.Open("testdata/mountinfo-hybrid")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := parseMounts(f)
	if err != nil {
		t.Fatal(err)
	}
	for controller, want := range map[string]string{
		"cpu": "/sys/fs/cgroup/cpu,cpuacct", "cpuacct": "/sys/fs/cgroup/cpu,cpuacct", "memory": "/sys/fs/cgroup/memory",
		"name=systemd": "/sys/fs/cgroup/systemd", "": "/sys/fs/cgroup/unified", "cpuset": "/sys/fs/cgroup/cpuset",
		"name=podd-x": "", "hugetlb": "",
	} {
		if got := l.of(controller); got != want {
			t.Errorf("%q is at %q, want %q", controller, got, want)
		}
	}
	if p := l.paths("/kubepods")["cpuacct"]; p != "/sys/fs/cgroup/cpu,cpuacct/kubepods" {
		t.Errorf("paths: %s", p)
	}
}

func u(v uint64) *uint64 { return &v }

func TestStatsV2(t *testing.T) {
	s, err := statsV2("testdata/v2")
	if err != nil {
		t.Fatal(err)
	}
	if time.Since(s.At) > time.Minute {
		t.Errorf("taken at %s", s.At)
	}
	s.At = time.Time{}
	cpu := 1234567 * time.Microsecond
	want := &Stats{
		CPUUsage: &cpu, MemoryUsage: u(104857600), MemoryWorkingSet: u(104857600 - 4194304), MemoryRSS: u(52428800),
		MemoryLimit: u(268435456), SwapUsage: u(8192), PageFaults: u(1000), MajorPageFaults: u(7), PIDs: u(12),
		IOReadBytes: u(90000 + 4096), IOWriteBytes: u(180000), OOMKills: u(2),
		CPU:    &Pressure{Some: PressureLine{1.5, 0.25, 0.01, 25 * time.Millisecond}},
		Memory: &Pressure{Some: PressureLine{0, 0, 0, 10 * time.Microsecond}, Full: PressureLine{2, 1, 0.5, 9 * time.Microsecond}},
	}
	a, _ := json.Marshal(s)
	b, _ := json.Marshal(want)
	if string(a) != string(b) {
		t.Errorf("got  %s\nwant %s", a, b)
	}
	if _, err := statsV2("testdata/none"); !errdefs.IsNotFound(err) {
		t.Errorf("no group: %v, want not found", err)
	}
}

// A group of which nothing is known but that it exists, as without delegated
// controllers.
func TestStatsV2Bare(t *testing.T) {
	s, err := statsV2(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	s.At = time.Time{}
	if b, _ := json.Marshal(s); string(b) != mustJSON(&Stats{}) {
		t.Errorf("got %s, want nothing", b)
	}
	// "max" is no limit; usage below inactive_file is not negative.
	d := t.TempDir()
	for name, content := range map[string]string{"memory.max": "max\n", "memory.current": "10\n", "memory.stat": "anon 1\ninactive_file 20\n", "pids.current": "junk\n"} {
		if err := os.WriteFile(filepath.Join(d, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err = statsV2(d)
	if err != nil || s.MemoryLimit != nil || *s.MemoryWorkingSet != 0 || s.PIDs != nil {
		t.Errorf("%+v, %v", s, err)
	}
}

func mustJSON(v any) string { b, _ := json.Marshal(v); return string(b) }

// A v1 tree out of files.
func TestStatsV1(t *testing.T) {
	d := t.TempDir()
	l := layout{hierarchies: []hierarchy{
		{filepath.Join(d, "cpu"), []string{"cpu", "cpuacct"}}, {filepath.Join(d, "mem"), []string{"memory"}},
		{filepath.Join(d, "blk"), []string{"blkio"}}, {filepath.Join(d, "pids"), []string{"pids"}},
	}}
	for name, content := range map[string]string{
		"cpu/g/cpuacct.usage":         "5000000000\n",
		"mem/g/memory.usage_in_bytes": "1000\n", "mem/g/memory.limit_in_bytes": "9223372036854771712\n",
		"mem/g/memory.stat":                               "rss 1\ntotal_rss 500\ntotal_inactive_file 300\ntotal_pgfault 8\ntotal_pgmajfault 2\ntotal_swap 0\n",
		"mem/g/memory.oom_control":                        "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
		"blk/g/blkio.throttle.io_service_bytes_recursive": "8:0 Read 100\n8:0 Write 20\n8:0 Sync 1\n8:16 Read 1\n8:16 Total 1\nTotal 121\n",
		"pids/g/pids.current":                             "4\n",
	} {
		p := filepath.Join(d, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err := l.stats("g")
	if err != nil {
		t.Fatal(err)
	}
	s.At = time.Time{}
	cpu := 5 * time.Second
	want := &Stats{CPUUsage: &cpu, MemoryUsage: u(1000), MemoryWorkingSet: u(700), MemoryRSS: u(500), SwapUsage: u(0), PageFaults: u(8),
		MajorPageFaults: u(2), PIDs: u(4), IOReadBytes: u(101), IOWriteBytes: u(20), OOMKills: u(3)}
	if a, b := mustJSON(s), mustJSON(want); a != b {
		t.Errorf("got  %s\nwant %s", a, b)
	}
	if _, err := l.stats("/none"); !errdefs.IsNotFound(err) {
		t.Errorf("no group: %v", err)
	}
	if _, err := l.stats("/../../../etc"); !errdefs.IsNotFound(err) {
		t.Errorf("a path out of the tree: %v", err)
	}
}

func TestUnknownDriver(t *testing.T) {
	if _, err := New(Config{Driver: "cgmanager"}); !errdefs.IsInvalidArgument(err) && !strings.Contains(fmt.Sprint(err), "cgroup file system") {
		t.Errorf("%v, want invalid argument", err)
	}
}

func TestWarmer(t *testing.T) {
	var w Warmer
	var dones []func()
	for range 3 {
		dones = append(dones, w.Warm())
	}
	for _, d := range dones {
		d()
		d() // calling twice counts once
	}
	running := func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.users != 0 {
			t.Fatalf("%d users left", w.users)
		}
		return w.running
	}
	stops := func() {
		for deadline := time.Now().Add(5 * time.Second); running(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("still warming without users")
			}
		}
	}
	stops()
	w.Warm()()
	stops()
	if w.off {
		t.Skip("our own cgroup cannot be written here")
	}
	start := time.Now()
	w.WarmFor(40 * time.Millisecond)
	w.WarmFor(time.Millisecond) // does not shorten it
	stops()
	if d := time.Since(start); d < 40*time.Millisecond {
		t.Errorf("warmed for %s, want 40 ms", d)
	}
}
