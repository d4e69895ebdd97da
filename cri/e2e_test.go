package cri

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/images"
	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/netns"
)

// node is a service on the real shim, image store and network.
type node struct {
	*Service
	dir     string
	cfg     Config
	shimCmd *exec.Cmd
	store   *images.Store
	network *netns.Network
	cgroup  string
}

// newNode starts a shim of its own. PODD_SHIM names a built podd-shim;
// without it the test builds one.
func newNode(t testing.TB) *node {
	t.Helper()
	needRoot(t)
	if testing.Short() {
		t.Skip("needs podd-shim: left out with -short")
	}
	bin := os.Getenv("PODD_SHIM")
	if bin == "" {
		bin = filepath.Join(t.TempDir(), "podd-shim")
		if out, err := exec.Command("sh", "../cmd/podd-shim/build.sh", bin).CombinedOutput(); err != nil {
			t.Skipf("podd-shim cannot be built here (libseccomp-dev and a C compiler are needed): %v\n%s", err, out)
		}
	}
	// The shim is our child; what it leaves must be reaped by somebody.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "podd-cri-")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{dir: dir, cgroup: "/" + "podd-test-" + filepath.Base(dir)}
	level := slog.LevelWarn
	if testing.Verbose() {
		level = slog.LevelInfo
	}
	log := slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: level}))
	n.cfg = Config{DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"), CgroupParent: n.cgroup, Log: log}
	if err := os.MkdirAll(n.cfg.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// As on a node, where it is below /run.
	if err := unix.Mount("tmpfs", n.cfg.RunDir, "tmpfs", 0, "mode=700"); err != nil {
		t.Fatal(err)
	}
	n.shimCmd = exec.Command(bin, "--run-dir", n.cfg.RunDir, "--log-stderr")
	n.shimCmd.Stderr = testWriter{t}
	if err := n.shimCmd.Start(); err != nil {
		t.Fatal(err)
	}
	if n.store, err = images.Open(ctx, images.Config{Dir: filepath.Join(dir, "images"), NoSync: true, Log: log}); err != nil {
		t.Fatal(err)
	}
	if n.network, err = netns.New(netns.Config{
		RunDir: filepath.Join(dir, "run", "network"), DataDir: filepath.Join(dir, "data", "network"), Instance: filepath.Base(dir), Log: log,
	}); err != nil {
		t.Fatal(err)
	}
	n.open(t)
	t.Cleanup(func() { n.cleanUp(t) })
	return n
}

func (n *node) open(t testing.TB) {
	t.Helper()
	s, err := New(n.cfg, shim.New(n.cfg.RunDir), n.store, n.network)
	if err != nil {
		t.Fatal(err)
	}
	n.Service = s
}

func (n *node) cleanUp(t testing.TB) {
	for _, sb := range n.objects.allSandboxes() {
		if _, err := n.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: sb.id}); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	}
	if err := n.Service.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if err := n.network.TearDown(ctx); err != nil {
		t.Errorf("tear down the network: %v", err)
	}
	_ = n.network.Close()
	if err := n.store.Close(); err != nil {
		t.Errorf("close store: %v", err)
	}
	_ = n.shimCmd.Process.Signal(unix.SIGTERM)
	done := make(chan struct{})
	go func() { _ = n.shimCmd.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		_ = n.shimCmd.Process.Kill()
		<-done
	}
	_ = unix.Unmount(n.cfg.RunDir, 0)
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for l := range strings.Lines(string(mounts)) {
		if at := strings.Fields(l)[4]; strings.HasPrefix(at, n.dir) {
			t.Errorf("mount left: %s", at)
			_ = unix.Unmount(at, unix.MNT_DETACH)
		}
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*" + n.cgroup)
	groups = append(groups, "/sys/fs/cgroup"+n.cgroup)
	for _, g := range groups {
		if sub, _ := filepath.Glob(g + "/*/"); len(sub) > 0 {
			t.Errorf("cgroups left: %v", sub)
		}
		_ = unix.Rmdir(g)
	}
	if err := os.RemoveAll(n.dir); err != nil {
		t.Errorf("clean-up: %v", err)
	}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Helper()
	defer func() { _ = recover() }() // after the end of the test
	w.t.Logf("%s", bytes.TrimRight(p, "\n"))
	return len(p), nil
}

// load puts an image with a static busybox into the store.
func (n *node) load(t testing.TB, tag string, cfg v1.Config) {
	t.Helper()
	bb, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs a static /bin/busybox (Debian: busybox-static)")
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	add := func(name string, mode int64, typ byte, body string, link string) {
		h := &tar.Header{Name: name, Mode: mode, Typeflag: typ, Size: int64(len(body)), Linkname: link}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"bin/", "etc/", "proc/", "sys/", "dev/", "data/", "home/"} {
		add(d, 0o755, tar.TypeDir, "", "")
	}
	add("tmp/", 0o1777, tar.TypeDir, "", "")
	add("bin/busybox", 0o755, tar.TypeReg, string(bb), "")
	for _, applet := range []string{"sh", "sleep", "cat", "echo", "id", "ls", "true", "false", "mount", "touch", "chmod", "nc", "grep", "hostname", "kill", "stat", "head", "yes", "wc"} {
		add("bin/"+applet, 0o777, tar.TypeSymlink, "", "busybox")
	}
	add("etc/passwd", 0o644, tar.TypeReg, "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:app:/home:/bin/sh\n", "")
	add("etc/group", 0o644, tar.TypeReg, "root:x:0:\nappgroup:x:1001:\nextra:x:2000:app\n", "")
	add("data/seed", 0o644, tar.TypeReg, "from the image\n", "")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		t.Fatal(err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Config = "linux", "amd64", cfg
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	ref, err := name.NewTag(tag)
	if err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := tarball.Write(ref, img, &archive); err != nil {
		t.Fatal(err)
	}
	if _, err := n.store.Load(ctx, &archive, images.LoadOptions{}); err != nil {
		t.Fatal(err)
	}
}

const busybox = "example.com/busybox:1"

func (n *node) pod(t testing.TB, name string, change ...func(*runtimeapi.PodSandboxConfig)) string {
	t.Helper()
	c := podConfig(name)
	c.LogDirectory = filepath.Join(n.dir, "logs", name)
	c.Linux = &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}}}
	for _, f := range change {
		f(c)
	}
	r, err := n.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: c})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetPodSandboxId()
}

func (n *node) tryRun(pod, name string, change ...func(*runtimeapi.ContainerConfig)) (string, error) {
	sb, err := n.objects.sandbox(pod)
	if err != nil {
		return "", err
	}
	c := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name}, Image: &runtimeapi.ImageSpec{Image: busybox},
		Command: []string{"sleep", "1000"}, LogPath: name + ".log",
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources:       &runtimeapi.LinuxContainerResources{OomScoreAdj: 1000},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}},
		},
	}
	for _, f := range change {
		f(c)
	}
	r, err := n.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: c, SandboxConfig: sb.config})
	if err != nil {
		return "", err
	}
	_, err = n.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: r.GetContainerId()})
	return r.GetContainerId(), err
}

func (n *node) run(t testing.TB, pod, name string, change ...func(*runtimeapi.ContainerConfig)) string {
	t.Helper()
	id, err := n.tryRun(pod, name, change...)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func (n *node) exec(t testing.TB, id string, cmd ...string) string {
	t.Helper()
	r, err := n.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: cmd, Timeout: 20})
	if err != nil {
		t.Fatal(err)
	}
	if r.ExitCode != 0 {
		t.Errorf("%v: exit code %d, stderr %s", cmd, r.ExitCode, r.Stderr)
	}
	return strings.TrimSpace(string(r.Stdout))
}

func (n *node) status(t testing.TB, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	r, err := n.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetStatus()
}

func (n *node) ended(t testing.TB, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	var s *runtimeapi.ContainerStatus
	eventually(t, "the container ends", func() bool {
		s = n.status(t, id)
		return s.State == runtimeapi.ContainerState_CONTAINER_EXITED
	})
	return s
}

func TestNodePlainLife(t *testing.T) {
	n := newNode(t)
	n.load(t, busybox, v1.Config{Env: []string{"PATH=/bin"}})
	pod := n.pod(t, "web")
	st, err := n.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil {
		t.Fatal(err)
	}
	if ip := net.ParseIP(st.GetStatus().GetNetwork().GetIp()); ip == nil {
		t.Errorf("pod address %q", st.GetStatus().GetNetwork().GetIp())
	}
	id := n.run(t, pod, "app")
	if got := n.exec(t, id, "hostname"); got != "web" {
		t.Errorf("hostname %q", got)
	}
	if got := n.exec(t, id, "cat", "/etc/resolv.conf"); !strings.Contains(got, "nameserver 10.0.0.10") {
		t.Errorf("resolv.conf %q", got)
	}
	r, err := n.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", "echo out; echo err >&2; exit 3"}})
	if err != nil || string(r.Stdout) != "out\n" || string(r.Stderr) != "err\n" || r.ExitCode != 3 {
		t.Errorf("exec: %v, %v", r, err)
	}
	start := time.Now()
	if _, err := n.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sleep", "100"}, Timeout: 1}); err == nil || time.Since(start) > 5*time.Second {
		t.Errorf("exec timeout: %v after %v", err, time.Since(start))
	}
	says := n.run(t, pod, "says", func(c *runtimeapi.ContainerConfig) {
		c.Command = []string{"sh", "-c", "echo hello; echo world >&2; exit 5"}
	})
	if s := n.ended(t, says); s.ExitCode != 5 || s.Reason != "Error" {
		t.Errorf("exited: %v", s)
	}
	eventually(t, "the log is written", func() bool {
		b, _ := os.ReadFile(filepath.Join(n.dir, "logs", "web", "says.log"))
		return strings.Contains(string(b), "stdout F hello\n") && strings.Contains(string(b), "stderr F world\n")
	})
	if _, err := n.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 1}); err != nil {
		t.Fatal(err)
	}
	if s := n.status(t, id); s.ExitCode != 137 && s.ExitCode != 143 {
		t.Errorf("stopped: %v", s)
	}
	if _, err := n.tryRun(pod, "bad", func(c *runtimeapi.ContainerConfig) { c.Command = []string{"/no/such/program"} }); err == nil {
		t.Error("a missing program started")
	}
	for range 2 {
		if _, err := n.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := shim.New(n.cfg.RunDir).List(ctx); err != nil || len(left) > 0 {
		t.Errorf("processes left: %v, %v", left, err)
	}
}

func TestNodeRestartKeepsContainers(t *testing.T) {
	n := newNode(t)
	n.load(t, busybox, v1.Config{Env: []string{"PATH=/bin"}})
	pod := n.pod(t, "web")
	stays := n.run(t, pod, "stays")
	ends := n.run(t, pod, "ends", func(c *runtimeapi.ContainerConfig) {
		c.Command = []string{"sh", "-c", "cat /tmp/go; exit 9"}
		c.Stdin = true
	})
	_ = ends
	if err := n.Service.Close(); err != nil {
		t.Fatal(err)
	}
	n.open(t)
	if s := n.status(t, stays); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after a restart: %v", s)
	}
	if s := n.ended(t, ends); s.ExitCode != 9 {
		t.Errorf("the exit that podd did not see: %v", s)
	}
	if got := n.exec(t, stays, "echo", "alive"); got != "alive" {
		t.Errorf("exec after a restart: %q", got)
	}
	if _, err := n.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}
	if s := n.status(t, stays); s.State != runtimeapi.ContainerState_CONTAINER_EXITED {
		t.Errorf("after the stop: %v", s)
	}
}

func TestNodeUser(t *testing.T) {
	n := newNode(t)
	n.load(t, busybox, v1.Config{Env: []string{"PATH=/bin"}, User: "app", WorkingDir: "/made/by/runtime", Volumes: map[string]struct{}{"/data": {}}})
	pod := n.pod(t, "web")
	id := n.run(t, pod, "image-user")
	if got := n.exec(t, id, "id"); got != "uid=1000(app) gid=1001(appgroup) groups=1001(appgroup),2000(extra)" {
		t.Errorf("id: %s", got)
	}
	if u := n.status(t, id).User.Linux; u.Uid != 1000 || u.Gid != 1001 || fmt.Sprint(u.SupplementalGroups) != "[1001 2000]" {
		t.Errorf("status user %v", u)
	}
	if got := n.exec(t, id, "sh", "-c", "pwd; cat /data/seed"); got != "/made/by/runtime\nfrom the image" {
		t.Errorf("working directory and VOLUME: %q", got)
	}
	strict := n.run(t, pod, "strict", func(c *runtimeapi.ContainerConfig) {
		sc := c.Linux.SecurityContext
		sc.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
		sc.SupplementalGroups = []int64{3000}
		sc.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
		sc.RunAsGroup = &runtimeapi.Int64Value{Value: 4000}
	})
	if got := n.exec(t, strict, "id", "-G"); got != "4000 3000" {
		t.Errorf("strict groups: %s", got)
	}
	_, err := n.tryRun(pod, "nobody", func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.RunAsUsername = "stranger" })
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "stranger") {
		t.Errorf("unknown user: %v", err)
	}
}

// BenchmarkNode measures the calls of a pod's life one after the other.
func BenchmarkNode(b *testing.B) {
	n := newNode(b)
	n.load(b, busybox, v1.Config{Env: []string{"PATH=/bin"}})
	profile := &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	if os.Getenv("PODD_BENCH_UNCONFINED") != "" {
		profile = nil
	}
	spent := map[string][]time.Duration{}
	step := func(name string, fn func() error) {
		t := time.Now()
		if err := fn(); err != nil {
			b.Fatal(name, err)
		}
		spent[name] = append(spent[name], time.Since(t))
	}
	ctx := context.Background()
	i := 0
	for b.Loop() {
		i++
		c := podConfig(fmt.Sprint("pod", i))
		c.LogDirectory = filepath.Join(n.dir, "logs", fmt.Sprint(i))
		var pod, id string
		step("1 RunPodSandbox", func() error {
			r, err := n.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: c})
			pod = r.GetPodSandboxId()
			return err
		})
		cc := &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "app"}, Image: &runtimeapi.ImageSpec{Image: busybox}, Command: []string{"sleep", "1000"}, LogPath: "0.log",
			Linux: &runtimeapi.LinuxContainerConfig{
				Resources:       &runtimeapi.LinuxContainerResources{OomScoreAdj: 1000, MemoryLimitInBytes: 64 << 20},
				SecurityContext: &runtimeapi.LinuxContainerSecurityContext{Seccomp: profile, NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}},
			},
		}
		step("2 CreateContainer", func() error {
			r, err := n.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: cc, SandboxConfig: c})
			id = r.GetContainerId()
			return err
		})
		step("3 StartContainer", func() error {
			_, err := n.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
			return err
		})
		step("4 ExecSync", func() error {
			_, err := n.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}})
			return err
		})
		step("5 StopContainer", func() error {
			_, err := n.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id})
			return err
		})
		step("6 RemoveContainer", func() error {
			_, err := n.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
			return err
		})
		step("7 StopPodSandbox", func() error {
			_, err := n.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod})
			return err
		})
		step("8 RemovePodSandbox", func() error {
			_, err := n.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
			return err
		})
	}
	report(b, spent)
}

func report(b *testing.B, spent map[string][]time.Duration) {
	for _, name := range slices.Sorted(maps.Keys(spent)) {
		d := spent[name]
		b.Logf("%-18s p50 %6.2f ms  p95 %6.2f ms", name, ms(quantile(d, 0.5)), ms(quantile(d, 0.95)))
	}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func quantile(d []time.Duration, q float64) time.Duration {
	s := slices.Sorted(slices.Values(d))
	return s[int(float64(len(s)-1)*q)]
}

func TestNodeSeccomp(t *testing.T) {
	n := newNode(t)
	n.load(t, busybox, v1.Config{Env: []string{"PATH=/bin"}})
	profile := filepath.Join(n.dir, "block-chmod.json")
	if err := os.WriteFile(profile, []byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["chmod","fchmodat"],"action":"SCMP_ACT_ERRNO"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	pod := n.pod(t, "web")
	for name, p := range map[string]*runtimeapi.SecurityProfile{
		"default":   {},
		"localhost": {ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: profile},
	} {
		id, err := n.tryRun(pod, name, func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.Seccomp = p })
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := n.exec(t, id, "grep", "Seccomp:", "/proc/self/status"); got != "Seccomp:\t2" {
			t.Errorf("%s: %q", name, got)
		}
		if got := n.exec(t, id, "grep", "Seccomp:", "/proc/1/status"); got != "Seccomp:\t2" {
			t.Errorf("%s: %q", name, got)
		}
		r, err := n.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"chmod", "400", "/tmp"}})
		if err != nil {
			t.Fatal(err)
		}
		if blocked := strings.Contains(string(r.Stderr), "Operation not permitted"); blocked != (name == "localhost") {
			t.Errorf("%s: chmod: %s", name, r.Stderr)
		}
	}
}

// BenchmarkNodeBurst starts 100 pods at once, each with one container.
func BenchmarkNodeBurst(b *testing.B) {
	n := newNode(b)
	n.load(b, busybox, v1.Config{Env: []string{"PATH=/bin"}})
	const pods = 100
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	for i := 0; b.Loop(); i++ {
		before, start := heap(), time.Now()
		ids := make([]string, pods)
		var wg sync.WaitGroup
		for k := range pods {
			wg.Go(func() {
				ids[k] = n.pod(b, fmt.Sprintf("burst-%d-%d", i, k))
				n.run(b, ids[k], "app", func(c *runtimeapi.ContainerConfig) {
					c.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{}
				})
			})
		}
		wg.Wait()
		b.ReportMetric(float64(time.Since(start).Milliseconds()), "ms/100-pods")
		b.ReportMetric(float64(int64(heap()-before))/pods/1024, "heap-KiB/pod")
		b.StopTimer()
		for _, id := range ids {
			wg.Go(func() {
				if _, err := n.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
					b.Error(err)
				}
			})
		}
		wg.Wait()
		b.StartTimer()
	}
}
