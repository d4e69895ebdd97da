package cri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

// buffer is a stream that may be read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) Close() error { return nil }

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestNodeFeatures runs what the messages can express on the true parts.
func TestNodeFeatures(t *testing.T) {
	n := newNode(t)
	n.load(t, busybox, v1.Config{Env: []string{"PATH=/bin"}})
	pod := n.pod(t, "web", func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}
	})
	id := n.run(t, pod, "app")

	t.Run("sysctl", func(t *testing.T) {
		if got := n.exec(t, id, "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"); got != "0" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("shared memory", func(t *testing.T) {
		if got := n.exec(t, id, "grep", " /dev/shm ", "/proc/mounts"); !strings.Contains(got, "size=65536k") {
			t.Errorf("%s", got)
		}
	})
	t.Run("pid namespaces", func(t *testing.T) {
		if got := n.exec(t, id, "cat", "/proc/1/cmdline"); !strings.HasPrefix(got, "sleep") {
			t.Errorf("own: pid 1 is %q", got)
		}
		target := n.run(t, pod, "target", func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: id}
			c.Command = []string{"sleep", "2000"}
		})
		if got := n.exec(t, target, "cat", "/proc/1/cmdline"); !strings.Contains(got, "1000") {
			t.Errorf("target: pid 1 is %q", got)
		}
	})
	t.Run("mounts", func(t *testing.T) { n.testMounts(t, pod) })
	t.Run("files of the pod", func(t *testing.T) { n.testEtcIsNotInMemory(t, id) })
	t.Run("image volume", func(t *testing.T) { n.testImageVolume(t, pod) })
	t.Run("exec streams", func(t *testing.T) { n.testExecStreams(t, id) })
	t.Run("attach", func(t *testing.T) { n.testAttach(t, pod) })
	t.Run("port-forward", func(t *testing.T) { n.testPortForward(t, pod) })
	t.Run("statistics", func(t *testing.T) { n.testStats(t, pod, id) })
	t.Run("update", func(t *testing.T) { n.testUpdate(t, pod, id) })
	t.Run("big output", func(t *testing.T) {
		r, err := n.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", "yes | head -c 20000000; echo end >&2"}, Timeout: 60})
		if err != nil || len(r.Stdout) != maxExecOutput || string(r.Stderr) != "end\n" || r.ExitCode != 0 {
			t.Errorf("%d bytes, stderr %q, %v", len(r.GetStdout()), r.GetStderr(), err)
		}
	})
	t.Run("background process", func(t *testing.T) {
		start := time.Now()
		if got := n.exec(t, id, "sh", "-c", "sleep 30 & echo started"); got != "started" || time.Since(start) > 10*time.Second {
			t.Errorf("%q after %v", got, time.Since(start))
		}
	})
	t.Run("user namespace", func(t *testing.T) { n.testUserns(t) })
	t.Run("node's namespaces", func(t *testing.T) { n.testHostNamespaces(t) })
}

// A container may write to its resolv.conf, and without end. That must not fill
// the run directory, which is memory that the node and all pods share.
func (n *node) testEtcIsNotInMemory(t *testing.T, id string) {
	n.exec(t, id, "sh", "-c", "echo x >> /etc/resolv.conf && echo x >> /etc/hosts && echo x >> /etc/hostname")
	var run unix.Statfs_t
	if err := unix.Statfs(n.cfg.RunDir, &run); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"resolv.conf", "hosts", "hostname"} {
		var at unix.Statfs_t
		if err := unix.Statfs(fmt.Sprintf("/proc/%d/root/etc/%s", n.pidOf(t, id), f), &at); err != nil {
			t.Fatal(err)
		}
		if at.Fsid == run.Fsid {
			t.Errorf("/etc/%s is in the run directory", f)
		}
	}
}

func (n *node) pidOf(t *testing.T, id string) int {
	c, err := n.objects.container(id)
	if err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.status.PID
}

func (n *node) testMounts(t *testing.T, pod string) {
	dir := filepath.Join(n.dir, "vol")
	sock := filepath.Join(n.dir, "a.sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	id := n.run(t, pod, "mounts", func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.ReadonlyRootfs = true
		c.Mounts = []*runtimeapi.Mount{
			{ContainerPath: "/vol", HostPath: dir},
			{ContainerPath: "/ro", HostPath: dir, Readonly: true},
			{ContainerPath: "/rro", HostPath: dir, Readonly: true, RecursiveReadOnly: true},
			{ContainerPath: "/run/a.sock", HostPath: sock},
		}
	})
	n.exec(t, id, "sh", "-c", "echo x > /vol/f && test -S /run/a.sock || exit 1")
	for _, p := range []string{"/ro/g", "/rro/g", "/g"} {
		r, err := n.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"touch", p}})
		if err != nil || !strings.Contains(string(r.Stderr), "Read-only file system") {
			t.Errorf("%s is writable: %v, %v", p, r, err)
		}
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "f")); string(b) != "x\n" {
		t.Errorf("on the node: %q", b)
	}
}

func (n *node) testImageVolume(t *testing.T, pod string) {
	img := &runtimeapi.ImageSpec{Image: busybox}
	id := n.run(t, pod, "image-volume", func(c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{
			{ContainerPath: "/whole", Image: img, Readonly: true},
			{ContainerPath: "/part", Image: img, ImageSubPath: "data", Readonly: true},
		}
	})
	if got := n.exec(t, id, "cat", "/whole/data/seed", "/part/seed"); got != "from the image\nfrom the image" {
		t.Errorf("%q", got)
	}
	_, err := n.tryRun(pod, "no-sub-path", func(c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/part", Image: img, ImageSubPath: "nowhere", Readonly: true}}
	})
	if err == nil || !strings.Contains(err.Error(), "ImageVolumeMountFailed") {
		t.Errorf("missing sub-path: %v", err)
	}
	if _, err := n.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		t.Error(err)
	}
}

func (n *node) testExecStreams(t *testing.T, id string) {
	var out, errOut buffer
	err := n.ExecStream(ctx, id, []string{"sh", "-c", "cat; echo done >&2; exit 7"}, strings.NewReader("to stdin\n"), &out, &errOut, false, nil)
	var exit utilexec.CodeExitError
	if !errors.As(err, &exit) || exit.Code != 7 || out.String() != "to stdin\n" || errOut.String() != "done\n" {
		t.Errorf("%v, out %q, err %q", err, out.String(), errOut.String())
	}
	big := strings.Repeat("0123456789abcdef", 1<<18) // 4 MiB each way
	out = buffer{}
	if err := n.ExecStream(ctx, id, []string{"cat"}, strings.NewReader(big), &out, nil, false, nil); err != nil || out.String() != big {
		t.Errorf("large transfer: %v, %d bytes", err, len(out.String()))
	}
	sizes := make(chan remotecommand.TerminalSize, 1)
	sizes <- remotecommand.TerminalSize{Width: 91, Height: 33}
	out = buffer{}
	in, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- n.ExecStream(ctx, id, []string{"sh"}, in, &out, nil, true, sizes) }()
	fmt.Fprintln(w, "while ! stty size 2>/dev/null | grep -q '33 91'; do sleep 0.1; done; tty && echo size-ok; exit 0")
	select {
	case err := <-done:
		// stty and tty may not be in the image: then only the end counts.
		if err != nil {
			t.Errorf("terminal: %v, %q", err, out.String())
		}
	case <-time.After(5 * time.Second):
		fmt.Fprint(w, "\x03exit\n")
		if err := <-done; err != nil {
			t.Logf("terminal: %v", err)
		}
	}
	_ = w.Close()
	if !strings.Contains(out.String(), "while") {
		t.Errorf("the terminal did not echo: %q", out.String())
	}

	// A client that goes away takes its command with it.
	cctx, cancel := context.WithCancel(ctx)
	go func() { done <- n.ExecStream(cctx, id, []string{"sleep", "54321"}, nil, &out, nil, false, nil) }()
	eventually(t, "the command runs", func() bool { return strings.Contains(n.exec(t, id, "sh", "-c", "cat /proc/[0-9]*/cmdline"), "54321") })
	cancel()
	if err := <-done; err == nil {
		t.Error("a cancelled exec succeeded")
	}
	eventually(t, "the command is gone", func() bool {
		return !strings.Contains(n.exec(t, id, "sh", "-c", "cat /proc/[0-9]*/cmdline"), "54321")
	})
}

func (n *node) testAttach(t *testing.T, pod string) {
	id := n.run(t, pod, "attached", func(c *runtimeapi.ContainerConfig) {
		c.Command = []string{"sh", "-c", "while read l; do echo got $l; done; echo bye >&2"}
		c.Stdin, c.StdinOnce = true, true
	})
	var out, errOut buffer
	in, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- n.AttachStream(ctx, id, in, &out, &errOut, false, nil) }()
	fmt.Fprintln(w, "one")
	eventually(t, "an answer", func() bool { return out.String() == "got one\n" })
	_ = w.Close()
	if err := <-done; err != nil || errOut.String() != "bye\n" {
		t.Errorf("attach: %v, stderr %q", err, errOut.String())
	}
	if s := n.ended(t, id); s.ExitCode != 0 {
		t.Errorf("%v", s)
	}

	silent := n.run(t, pod, "silent")
	before := runtime.NumGoroutine()
	cctx, cancel := context.WithCancel(ctx)
	go func() { done <- n.AttachStream(cctx, silent, nil, &out, &errOut, false, nil) }()
	cancel()
	<-done
	eventually(t, "the attach leaves no goroutine", func() bool { return runtime.NumGoroutine() <= before })
}

func (n *node) testPortForward(t *testing.T, pod string) {
	n.run(t, pod, "server", func(c *runtimeapi.ContainerConfig) {
		c.Command = []string{"nc", "-ll", "-p", "8080", "-e", "/bin/cat"}
	})
	var client net.Conn
	done := make(chan error, 1)
	eventually(t, "the server answers", func() bool {
		var server net.Conn
		client, server = net.Pipe()
		go func() { done <- n.PortForwardStream(ctx, pod, 8080, server) }()
		if _, err := io.WriteString(client, "ping"); err == nil {
			return true
		}
		<-done // it does not listen yet
		return false
	})
	b := make([]byte, 4)
	if _, err := io.ReadFull(client, b); err != nil || string(b) != "ping" {
		t.Errorf("echo %q, %v", b, err)
	}
	_ = client.Close()
	<-done
	_, server := net.Pipe()
	if err := n.PortForwardStream(ctx, pod, 9, server); err == nil || !strings.Contains(err.Error(), "port 9") {
		t.Errorf("closed port: %v", err)
	}
}

func (n *node) testStats(t *testing.T, pod, id string) {
	n.exec(t, id, "sh", "-c", "echo x > /tmp/written")
	r, err := n.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	st := r.Stats
	if st.Cpu.UsageCoreNanoSeconds.GetValue() == 0 || st.Memory.UsageBytes.GetValue() == 0 || st.Memory.WorkingSetBytes.GetValue() == 0 {
		t.Errorf("%v", st)
	}
	p, err := n.PodSandboxStats(ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: pod})
	if err != nil {
		t.Fatal(err)
	}
	if l := p.Stats.Linux; len(l.Containers) == 0 || l.Network.GetDefaultInterface().GetName() != "eth0" || l.Cpu.UsageCoreNanoSeconds.GetValue() == 0 {
		t.Errorf("%v", l)
	}
	m, err := n.ListPodSandboxMetrics(ctx, nil)
	if err != nil || len(m.PodMetrics) == 0 || len(m.PodMetrics[0].ContainerMetrics) == 0 {
		t.Errorf("metrics %v, %v", m, err)
	}
	d, _ := n.ListMetricDescriptors(ctx, nil)
	keys := map[string]int{}
	for _, d := range d.Descriptors {
		keys[d.Name] = len(d.LabelKeys)
	}
	for _, pm := range m.GetPodMetrics() {
		for _, x := range pm.Metrics {
			if len(x.LabelValues) != keys[x.Name] {
				t.Errorf("%s has %d labels, its descriptor %d", x.Name, len(x.LabelValues), keys[x.Name])
			}
		}
	}
}

func (n *node) testUpdate(t *testing.T, pod, id string) {
	if _, err := n.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuShares: 777}}); err != nil {
		t.Fatal(err)
	}
	r, err := n.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	if a := r.Stats.Memory.AvailableBytes.GetValue(); a == 0 || a > 64<<20 {
		t.Errorf("available %d after a limit of 64 MiB", a)
	}
	if got := n.status(t, id).Resources.Linux; got.MemoryLimitInBytes != 64<<20 || got.CpuShares != 777 || got.OomScoreAdj != 1000 {
		t.Errorf("status %v", got)
	}
	oom := n.run(t, pod, "oom", func(c *runtimeapi.ContainerConfig) {
		c.Linux.Resources.MemoryLimitInBytes = 16 << 20
		c.Command = []string{"sh", "-c", "x=$(yes | head -c 100000000); echo $x | wc -c"}
	})
	if s := n.ended(t, oom); s.Reason != "OOMKilled" || s.ExitCode != 137 {
		t.Errorf("out of memory: %v %d %s", s.State, s.ExitCode, s.Reason)
	}
}

func (n *node) testUserns(t *testing.T) {
	ids := []*runtimeapi.IDMapping{{HostId: 200000, ContainerId: 0, Length: 65536}}
	users := &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: ids, Gids: ids}
	pod := n.pod(t, "userns", func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = users
	})
	vol := filepath.Join(n.dir, "userns-vol")
	if err := os.Mkdir(vol, 0o755); err != nil {
		t.Fatal(err)
	}
	id := n.run(t, pod, "app", func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = users
		c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/vol", HostPath: vol, UidMappings: ids, GidMappings: ids}}
	})
	if got := n.exec(t, id, "sh", "-c", "cat /proc/self/uid_map; id -u; stat -c %u /bin /vol /etc/resolv.conf; echo x > /vol/f; echo x > /root-wrote"); strings.Join(strings.Fields(got), " ") != "0 200000 65536 0 0 0 0" {
		t.Errorf("%q", got)
	}
	// An id-mapped volume stores what root in the pod writes as root.
	if st, err := os.Stat(filepath.Join(vol, "f")); err != nil || owner(st) != 0 {
		t.Errorf("owner on the node: %v, %v", st, err)
	}
	// VOLUMEs of the image are root's in the pod, filled or not.
	const volumes = "example.com/volumes:1"
	n.load(t, volumes, v1.Config{Volumes: map[string]struct{}{"/data": {}, "/fresh": {}}})
	id = n.run(t, pod, "volumes", func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = users
		c.Image.Image = volumes
	})
	if got := n.exec(t, id, "sh", "-c", "stat -c %u:%g /data /data/seed /fresh; echo x > /data/f; echo x > /fresh/f"); strings.Join(strings.Fields(got), " ") != "0:0 0:0 0:0" {
		t.Errorf("VOLUMEs: %q", got)
	}
	if _, err := n.tryRun(pod, "other-map"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "userns_options") {
		t.Errorf("a container in the node's user namespace: %v", err)
	}
}

func (n *node) testHostNamespaces(t *testing.T) {
	pod := n.pod(t, "host", func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Network: 2, Pid: 2, Ipc: 2}
	})
	id := n.run(t, pod, "app", func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Network: 2, Pid: 2, Ipc: 2}
	})
	for _, ns := range []string{"net", "pid", "ipc", "uts"} {
		want, _ := os.Readlink("/proc/self/ns/" + ns)
		if got := n.exec(t, id, "sh", "-c", "ls -l /proc/self/ns/"+ns); !strings.HasSuffix(got, want) {
			t.Errorf("%s: %s, the node's is %s", ns, got, want)
		}
	}
	st, err := n.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil || st.Status.Network.Ip != "" {
		t.Errorf("address of a pod on the node's network: %v, %v", st.GetStatus().GetNetwork(), err)
	}
	// A process left in the node's pid namespace ends with the container.
	n.exec(t, id, "sh", "-c", "sleep 65432 &")
	if _, err := n.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no process of the container is left", func() bool { return !runsOnNode("65432") })
}

func TestNodeNothingOutlivesItsContainer(t *testing.T) {
	n := newNode(t)
	n.load(t, busybox, v1.Config{Env: []string{"PATH=/bin"}})
	for name, mode := range map[string]runtimeapi.NamespaceMode{"pod": runtimeapi.NamespaceMode_POD, "node": runtimeapi.NamespaceMode_NODE} {
		pod := n.pod(t, name, func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: mode}
		})
		id := n.run(t, pod, "app", func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: mode}
			c.Command = []string{"sh", "-c", "sleep 76543 & exit 0"}
		})
		n.ended(t, id)
		eventually(t, name+": no process of the container is left", func() bool { return !runsOnNode("76543") })
	}
}

func runsOnNode(arg string) bool {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range all {
		if b, _ := os.ReadFile(p); bytes.Contains(b, []byte("sleep\x00"+arg)) {
			return true
		}
	}
	return false
}

func owner(st os.FileInfo) uint32 { return st.Sys().(*syscall.Stat_t).Uid }
