package server_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

// shimBinary is built once for all tests of this package. PODD_SHIM names
// another program to test, such as one that runs under strace.
var shimBinary = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("PODD_SHIM"); path != "" {
		return path, nil
	}
	dir, err := os.MkdirTemp("", "podd-shim-test-")
	if err != nil {
		return "", err
	}
	builtIn = dir
	out := filepath.Join(dir, "podd-shim")
	text, err := exec.Command("../../../cmd/podd-shim/build.sh", out).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build podd-shim: %w\n%s", err, text)
	}
	return out, nil
})

var builtIn string // directory of the built program

// probeBinary is the payload that does what busybox cannot, racerBinary one that
// attacks.
var (
	probeBinary = sync.OnceValues(func() ([]byte, error) { return compiled("probe") })
	racerBinary = sync.OnceValues(func() ([]byte, error) { return compiled("racer") })
)

// compiled is a program of testdata; $PODD_TEST_PROGRAMS has them where there is
// no compiler.
func compiled(name string) ([]byte, error) {
	if dir := os.Getenv("PODD_TEST_PROGRAMS"); dir != "" {
		return os.ReadFile(filepath.Join(dir, name))
	}
	out := filepath.Join(os.TempDir(), fmt.Sprintf("podd-%s-%d", name, os.Getpid()))
	defer os.Remove(out)
	if text, err := exec.Command("cc", "-O2", "-Wall", "-static", "-o", out, "testdata/"+name+".c").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build %s: %w\n%s", name, err, text)
	}
	return os.ReadFile(out)
}

func TestMain(m *testing.M) {
	// Killed shims leave their children to us.
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	code := m.Run()
	if builtIn != "" {
		os.RemoveAll(builtIn)
	}
	os.Exit(code)
}

// node is a shim with its directories.
type node struct {
	*shim.Client
	t      testing.TB
	dir    string
	rootfs string
	cgroup string
	events <-chan shim.Event
	serial int
	// serialMu is held to make specifications in several goroutines.
	serialMu sync.Mutex
}

// newNode starts a shim; prepare may change its run directory before that.
func newNode(t testing.TB, prepare ...func(dir string)) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: starts containers")
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("needs busybox-static for the containers' root file system")
	}
	binary, err := shimBinary()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	// A tmpfs, as /run is.
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	n := &node{t: t, dir: dir, rootfs: filepath.Join(dir, "rootfs"),
		cgroup: fmt.Sprintf("/podd-test-%d-%d", os.Getpid(), time.Now().UnixNano()%1e6)}
	for _, d := range []string{"bin", "proc", "sys", "dev", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(n.rootfs, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	os.Chmod(filepath.Join(n.rootfs, "tmp"), 0o777)
	data, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(n.rootfs, "bin/busybox"), data, 0o755); err != nil {
		t.Fatal(err)
	}
	probe, err := probeBinary()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(n.rootfs, "bin/probe"), probe, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"sh", "sleep", "cat", "echo", "id", "seq", "true", "kill", "ls", "hostname", "ps", "head", "stty", "chmod", "mkdir", "yes", "wc", "grep", "dd", "date"} {
		if err := os.Symlink("busybox", filepath.Join(n.rootfs, "bin", a)); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range prepare {
		p(dir)
	}
	ctx := n.ctx()
	n.Client, err = shim.Ensure(ctx, dir, binary, nil)
	if err != nil {
		start, _ := os.ReadFile(filepath.Join(dir, "shim/start.log"))
		t.Fatalf("%v\n%s", err, start)
	}
	n.events, err = n.Events(t.Context(), 0) // as long as the test
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.cleanup)
	return n
}

func (n *node) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	n.t.Cleanup(cancel)
	return ctx
}

func (n *node) cleanup() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	// A test that failed may have left no shim.
	if binary, err := shimBinary(); err == nil {
		if _, err := shim.Ensure(ctx, n.dir, binary, nil); err != nil {
			n.t.Error(err)
		}
	}
	list, err := n.List(ctx)
	if err != nil {
		n.t.Error(err)
	}
	for _, sandboxes := range []bool{false, true} {
		for _, p := range list {
			var err error
			if p.SandboxID != "" && !sandboxes {
				err = n.Delete(ctx, p.ID)
			} else if p.SandboxID == "" && sandboxes {
				err = n.DeleteSandbox(ctx, p.ID)
			}
			if err != nil {
				n.t.Error(err)
			}
		}
	}
	if err := n.Shutdown(ctx); err != nil {
		n.t.Error(err)
	}
	if n.t.Failed() {
		log, _ := os.ReadFile(filepath.Join(n.dir, "shim/shim.log"))
		n.t.Logf("shim.log:\n%s", log)
	}
	roots, _ := filepath.Glob("/sys/fs/cgroup/*" + n.cgroup)
	for _, r := range roots {
		left, _ := filepath.Glob(r + "/*/cgroup.procs")
		if len(left) > 0 {
			n.t.Errorf("cgroups are left: %v", left)
		}
		os.Remove(r)
	}
}

func (n *node) id(prefix string) string {
	n.serial++
	return fmt.Sprintf("%s-%d", prefix, n.serial)
}

// sandboxSpec has the namespaces of an ordinary pod.
func (n *node) sandboxSpec() *shim.SandboxSpec {
	id := n.id("box")
	return &shim.SandboxSpec{
		ID: id, CgroupPath: n.cgroup + "/" + id, Hostname: "pod-1", OOMScoreAdj: -998,
		Namespaces: []specs.LinuxNamespaceType{specs.NetworkNamespace, specs.UTSNamespace, specs.IPCNamespace},
	}
}

func (n *node) sandbox(change ...func(*shim.SandboxSpec)) *shim.Process {
	n.t.Helper()
	s := n.sandboxSpec()
	for _, c := range change {
		c(s)
	}
	p, err := n.CreateSandbox(n.ctx(), s)
	if err != nil {
		n.t.Fatal(err)
	}
	return p
}

// containerSpec runs sh -c script in the sandbox.
func (n *node) containerSpec(box *shim.Process, script string) *shim.ContainerSpec {
	id := n.id("ctr")
	root := filepath.Join(n.dir, "roots", id)
	if err := os.MkdirAll(root, 0o755); err != nil {
		n.t.Fatal(err)
	}
	if err := unix.Mount(n.rootfs, root, "", unix.MS_BIND, ""); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { unix.Unmount(root, unix.MNT_DETACH) })
	ns := func(t specs.LinuxNamespaceType, name string) specs.LinuxNamespace {
		return specs.LinuxNamespace{Type: t, Path: fmt.Sprintf("/proc/%d/ns/%s", box.PID, name)}
	}
	caps := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE"}
	adj := 100
	return &shim.ContainerSpec{
		ID: id, SandboxID: box.ID, LogPath: filepath.Join(n.dir, id+".log"),
		Spec: &specs.Spec{
			Version: specs.Version,
			Root:    &specs.Root{Path: root},
			Process: &specs.Process{
				Args: []string{"/bin/sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/bin"},
				Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
				OOMScoreAdj:  &adj,
			},
			Mounts: []specs.Mount{
				{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
				{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
				{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
				{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			},
			Linux: &specs.Linux{
				CgroupsPath: n.cgroup + "/" + id,
				Namespaces: []specs.LinuxNamespace{
					{Type: specs.MountNamespace}, {Type: specs.PIDNamespace},
					ns(specs.NetworkNamespace, "net"), ns(specs.UTSNamespace, "uts"), ns(specs.IPCNamespace, "ipc"),
				},
				MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"},
			},
		},
	}
}

// run creates and starts.
func (n *node) run(spec *shim.ContainerSpec) *shim.Process {
	n.t.Helper()
	if _, err := n.Create(n.ctx(), spec); err != nil {
		n.t.Fatal(err)
	}
	p, err := n.Start(n.ctx(), spec.ID)
	if err != nil {
		n.t.Fatal(err)
	}
	return p
}

// until returns the next event of that kind and id.
func (n *node) until(kind shim.EventKind, id string) shim.Event {
	n.t.Helper()
	return n.untilWithin(kind, id, 30*time.Second)
}

func (n *node) untilWithin(kind shim.EventKind, id string, patience time.Duration) shim.Event {
	n.t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case e, ok := <-n.events:
			if !ok {
				n.t.Fatal("event stream ended")
			}
			if e.Kind == kind && e.ID == id {
				return e
			}
		case <-deadline:
			n.t.Fatalf("no event %s of %s", kind, id)
		}
	}
}

// logged returns the container's log text by stream, joined from its records.
func logged(t testing.TB, path string) (out, err string) {
	t.Helper()
	f, e := os.Open(path)
	if e != nil {
		t.Fatal(e)
	}
	defer f.Close()
	var text [2]strings.Builder
	r := bufio.NewReader(f)
	for {
		line, e := r.ReadString('\n')
		if e == io.EOF {
			if line != "" {
				t.Errorf("torn record %q", line)
			}
			return text[0].String(), text[1].String()
		}
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(parts) != 4 {
			t.Fatalf("malformed record %q", line)
		}
		if _, e := time.Parse(time.RFC3339Nano, parts[0]); e != nil {
			t.Fatal(e)
		}
		i := 0
		if parts[1] == "stderr" {
			i = 1
		}
		text[i].WriteString(parts[3])
		if parts[2] == "F" {
			text[i].WriteByte('\n')
		}
	}
}

// TestShortProgramsAreStarted: a program that has ended when its start is
// answered was started all the same.
func TestShortProgramsAreStarted(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	var all sync.WaitGroup
	for range 8 { // more than there are CPUs, so that the shim comes late
		all.Go(func() {
			for range 12 {
				n.serialMu.Lock()
				s := n.containerSpec(box, "")
				n.serialMu.Unlock()
				s.Spec.Process.Args = []string{"/bin/true"}
				if _, err := n.Create(n.ctx(), s); err != nil {
					t.Error(err)
					return
				}
				if _, err := n.Start(n.ctx(), s.ID); err != nil {
					t.Error(err)
				}
				if err := n.Delete(n.ctx(), s.ID); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}

func TestLife(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	spec := n.containerSpec(box, "echo hello; echo oops >&2; hostname; ls /proc/self/fd; exit 7")
	created, err := n.Create(n.ctx(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if created.State != shim.Created || created.PID == 0 {
		t.Fatalf("created: %+v", created)
	}
	again, err := n.Create(n.ctx(), spec)
	if err != nil || again.PID != created.PID {
		t.Fatalf("repeated create: %+v, %v", again, err)
	}
	other := *spec
	other.LogPath += "x"
	if _, err := n.Create(n.ctx(), &other); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Fatalf("create with another spec: %v", err)
	}
	if _, err := n.Start(n.ctx(), spec.ID); err != nil {
		t.Fatal(err)
	}
	n.until(shim.EventCreated, spec.ID)
	n.until(shim.EventStarted, spec.ID)
	exit := n.until(shim.EventExited, spec.ID).Exit
	if !exit.Known || exit.Code != 7 || exit.OOMKilled {
		t.Fatalf("exit: %+v", exit)
	}
	out, errText := logged(t, spec.LogPath)
	// ls has a descriptor of its own: the directory it lists.
	if want := "hello\npod-1\n0\n1\n2\n3\n"; out != want || errText != "oops\n" {
		t.Fatalf("log: %q %q", out, errText)
	}
	if p, err := n.Start(n.ctx(), spec.ID); err != nil || p.Exit == nil || p.Exit.Code != 7 {
		t.Fatalf("a start that is repeated when the container has ended: %+v %v", p, err)
	}
	if err := n.Delete(n.ctx(), spec.ID); err != nil {
		t.Fatal(err)
	}
	if err := n.Delete(n.ctx(), spec.ID); err != nil {
		t.Fatal("repeated delete:", err)
	}
	n.until(shim.EventDeleted, spec.ID)
	if _, err := n.State(n.ctx(), spec.ID); !errors.Is(err, errdefs.ErrNotFound) {
		t.Fatalf("state of a deleted container: %v", err)
	}
}

// ignore a signal that os/signal does not reach.
func ignore(t *testing.T, sig uintptr) {
	act, old := [4]uint64{1}, [4]uint64{} // struct sigaction with SIG_IGN
	if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&act)), uintptr(unsafe.Pointer(&old)), 8, 0, 0); errno != 0 {
		t.Fatal(errno)
	}
	t.Cleanup(func() {
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&old)), 0, 8, 0, 0)
	})
}

// TestSignalDispositions: containers ignore nothing, whatever the shim's
// starter ignored, and the shim's end by a signal leaves them alone.
func TestSignalDispositions(t *testing.T) {
	signal.Ignore(unix.SIGHUP, unix.SIGQUIT)
	defer signal.Reset(unix.SIGHUP, unix.SIGQUIT)
	ignore(t, 32)
	n := newNode(t)
	spec := n.containerSpec(n.sandbox(), "exec sleep 1000")
	p := n.run(spec)
	out, _ := n.execOut(spec.ID, "/bin/grep", "SigIgn", "/proc/self/status", "/proc/1/status")
	if strings.Count(out, "0000000000000000") != 2 {
		t.Errorf("ignored signals: %s", out)
	}
	info, err := n.Info(n.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(info.PID, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	adopt(p.PID)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		binary, _ := shimBinary()
		c, err := shim.Ensure(n.ctx(), n.dir, binary, nil)
		if err == nil {
			if after, err := c.Info(n.ctx()); err == nil && after.PID != info.PID {
				break
			}
		}
		if time.Now().After(deadline) {
			t.Fatal("the shim does not end on SIGTERM")
		}
	}
	if q, err := n.State(n.ctx(), spec.ID); err != nil || q.State != shim.Running || q.PID != p.PID {
		t.Errorf("after the signal: %+v %v", q, err)
	}
}

func TestSignalAndDelete(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	spec := n.containerSpec(box, "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done")
	n.run(spec)
	n.waitLog(spec.LogPath, "ready")
	if err := n.Signal(n.ctx(), spec.ID, int(unix.SIGTERM), false); err != nil {
		t.Fatal(err)
	}
	if exit := n.until(shim.EventExited, spec.ID).Exit; exit.Code != 3 {
		t.Fatalf("exit: %+v", exit)
	}
	killed := n.containerSpec(box, "sleep 1000")
	n.run(killed)
	if err := n.Delete(n.ctx(), killed.ID); err != nil {
		t.Fatal(err)
	}
	if exit := n.until(shim.EventExited, killed.ID).Exit; exit.Code != 137 || exit.Signal != 9 {
		t.Fatalf("exit: %+v", exit)
	}
}

func (n *node) waitLog(path, text string) {
	n.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		data, _ := os.ReadFile(path)
		if strings.Contains(string(data), text) {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("%q does not appear in the log: %s", text, data)
		}
	}
}

// execOut runs a command in the container and returns its output and exit.
func (n *node) execOut(id string, args ...string) (string, *shim.Exit) {
	n.t.Helper()
	return n.execSpec(&shim.ExecSpec{ContainerID: id, Process: &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}}})
}

// execSpec runs e with its output in a pipe.
func (n *node) execSpec(e *shim.ExecSpec) (string, *shim.Exit) {
	n.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		n.t.Fatal(err)
	}
	defer r.Close()
	e.Stdout, e.Stderr = w, w
	s, err := n.Exec(n.ctx(), e)
	w.Close()
	if err != nil {
		n.t.Fatal(err)
	}
	defer s.Close()
	text, err := io.ReadAll(r)
	if err != nil {
		n.t.Fatal(err)
	}
	exit, err := s.Wait(n.ctx())
	if err != nil {
		n.t.Fatal(err)
	}
	return string(text), exit
}

func TestExec(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	spec := n.containerSpec(box, "sleep 1000")
	n.run(spec)
	out, exit := n.execOut(spec.ID, "/bin/sh", "-c", "echo in; ls /proc/self/fd; exit 5")
	if out != "in\n0\n1\n2\n3\n" || exit.Code != 5 || !exit.Known {
		t.Fatalf("exec: %q %+v", out, exit)
	}
	if _, err := n.Exec(n.ctx(), &shim.ExecSpec{ContainerID: spec.ID, Process: &specs.Process{Args: []string{"/no/such"}, Cwd: "/"}}); err == nil {
		t.Fatal("exec of a missing program succeeded")
	}
	// Cancelling kills the process with its descendants and nothing else.
	ctx, cancel := context.WithCancel(n.ctx())
	s, err := n.Exec(ctx, &shim.ExecSpec{ContainerID: spec.ID, Process: &specs.Process{Args: []string{"/bin/sh", "-c", "sleep 999 & sleep 998"}, Cwd: "/", Env: []string{"PATH=/bin"}}})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := s.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled wait: %v", err)
	}
	// Not even as a zombie: who is told of the time-out looks at once.
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", s.PID())); !os.IsNotExist(err) {
		t.Errorf("the cancelled exec is still there: %v", err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		out, _ := n.execOut(spec.ID, "/bin/ps")
		if !strings.Contains(out, "sleep 99") {
			if !strings.Contains(out, "sleep 1000") {
				t.Fatalf("init is gone too:\n%s", out)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("descendants of the cancelled exec live on:\n%s", out)
		}
	}
}

// TestExecIsTimedOutOnlyByAShimThatSaysSo: whoever waits for the end of a
// process must not take a shim that is gone for a process that takes too long.
func TestExecIsTimedOutOnlyByAShimThatSaysSo(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	spec := n.containerSpec(box, "sleep 1000")
	adopt(n.run(spec).PID)
	adopt(box.PID)
	s, err := n.Exec(n.ctx(), &shim.ExecSpec{ContainerID: spec.ID, Process: &specs.Process{Args: []string{"/bin/sleep", "999"}, Cwd: "/", Env: []string{"PATH=/bin"}}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	adopt(s.PID())
	info, err := n.Info(n.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(info.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(n.ctx())
	ended := make(chan error, 1)
	go func() {
		_, err := s.Wait(ctx)
		ended <- err
	}()
	cancel() // its time is over
	if err := unix.Kill(info.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errdefs.IsUnavailable(err) || errors.Is(err, context.Canceled) {
		t.Errorf("the shim died: %v", err)
	}
	n.restart()
}
