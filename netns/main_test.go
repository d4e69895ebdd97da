package netns

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestMain runs the tests in a network and mount namespace of their own: the
// host's rules, bridges and addresses are not touched. "lo" is up and nothing
// else is there.
func TestMain(m *testing.M) {
	if os.Getenv("CNI_COMMAND") != "" {
		fakePlugin()
		return
	}
	const inside = "PODD_TEST_NETNS"
	if os.Getuid() != 0 || os.Getenv(inside) != "" {
		if os.Getenv(inside) != "" {
			if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "lo: %v: %s\n", err, out)
				os.Exit(1)
			}
		}
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Unshareflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, // Go makes / private
		Pdeathsig:    syscall.SIGKILL,
	}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(exit.ExitCode())
	case err != nil:
		fmt.Fprintln(os.Stderr, "network namespace for tests:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: network namespaces")
	}
}

// lockDir of all instances of a test: they share a host. It goes with the lock.
var lockDir = filepath.Join(os.TempDir(), fmt.Sprint("podd-netns-", os.Getpid()))

// world is one instance with its directories.
type world struct {
	t    testing.TB
	cfg  Config
	net  *Network
	pods int
}

func newWorld(t testing.TB, change ...func(*Config)) *world {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	w := &world{t: t, cfg: Config{
		ConfDir: filepath.Join(dir, "net.d"), RunDir: filepath.Join(dir, "run"), DataDir: filepath.Join(dir, "data"),
		LockDir:  lockDir,
		Instance: dir, // its own bridge and table
		Log:      slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}}
	for _, f := range change {
		f(&w.cfg)
	}
	w.open()
	t.Cleanup(func() {
		if err := w.net.Sweep(context.Background(), nil); err != nil {
			t.Error(err)
		}
		// Those attached just now, which Sweep spares.
		w.net.mu.Lock()
		var left []*attachment
		for _, e := range w.net.attached {
			if e.CNI == nil {
				left = append(left, e.attachment)
			}
		}
		w.net.mu.Unlock()
		for _, a := range left {
			if err := w.net.undo(a); err != nil {
				t.Error(err)
			}
		}
		if err := w.net.Close(); err != nil {
			t.Error(err)
		}
		if out := ip(t, false, "link") + nft(t, "list", "tables"); strings.Contains(out, w.net.builtin.bridge) {
			t.Errorf("left on the host: %s", out)
		}
	})
	return w
}

func (w *world) open() {
	w.t.Helper()
	n, err := New(w.cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.net = n
}

// restart is what kill -9 and a new start come to: nothing is closed in order.
func (w *world) restart() {
	w.t.Helper()
	w.net.mu.Lock()
	w.net.closed = true
	w.net.mu.Unlock()
	w.open()
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// pod makes a namespace; it is not attached yet.
func (w *world) pod(ports ...*runtimeapi.PortMapping) *Pod {
	w.t.Helper()
	w.pods++
	name := fmt.Sprintf("p%d", w.pods)
	p := &Pod{
		SandboxID: fmt.Sprintf("%064x", w.pods), Name: name, Namespace: "default", UID: "uid-" + name,
		NetnsPath: filepath.Join(w.cfg.RunDir, "ns", name), Ports: ports,
	}
	if err := Create(p.NetnsPath); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := Unpin(p.NetnsPath); err != nil {
			w.t.Error(err)
		}
	})
	return p
}

func (w *world) attach(p *Pod) *Result {
	w.t.Helper()
	r, err := w.net.Attach(context.Background(), p)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

func (w *world) detach(p *Pod) {
	w.t.Helper()
	if err := w.net.Detach(context.Background(), p); err != nil {
		w.t.Fatal(err)
	}
	if err := Unpin(p.NetnsPath); err != nil {
		w.t.Fatal(err)
	}
}

// ip runs iproute2, which knows nothing of our code.
func ip(t testing.TB, mayFail bool, args ...string) string {
	t.Helper()
	out, err := exec.Command("ip", args...).CombinedOutput()
	if err != nil && !mayFail {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// serve answers name on every TCP connection inside the pod, and on every UDP
// packet; with nil it serves on the host.
func serve(t testing.TB, p *Pod, name string, port int) {
	t.Helper()
	in(t, p, func() error {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr())
				c.Close()
			}
		}()
		u, err := net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		t.Cleanup(func() { u.Close() })
		go func() {
			b := make([]byte, 100)
			for {
				_, from, err := u.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = u.WriteTo([]byte(name+" "+from.String()+"\n"), from)
			}
		}()
		return nil
	})
}

// in runs f inside the pod, or on the host for nil. Sockets stay where they
// were made.
func in(t testing.TB, p *Pod, f func() error) {
	t.Helper()
	var err error
	if p == nil {
		err = f()
	} else {
		err = Do(p.NetnsPath, f)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// ask connects from the pod (or host) and returns the server's name and what
// address it saw.
func ask(t testing.TB, from *Pod, network, addr string) (name, peer string, err error) {
	t.Helper()
	f := func() error {
		// A dialer's own goroutines would leave the namespace: plain
		// addresses of one family need none.
		d := net.Dialer{Timeout: 2 * time.Second, FallbackDelay: -1}
		c, err := d.Dial(network, addr)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		if strings.HasPrefix(network, "udp") {
			if _, err := c.Write([]byte("?")); err != nil {
				return err
			}
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		name, peer, _ = strings.Cut(strings.TrimSpace(line), " ")
		if h, _, err := net.SplitHostPort(peer); err == nil {
			peer = strings.TrimPrefix(h, "::ffff:")
		}
		return nil
	}
	if from == nil {
		err = f()
	} else {
		err = Do(from.NetnsPath, f)
	}
	return name, peer, err
}

// eventually waits for a condition of the kernel's, which has no other way to
// tell.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 5 s: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func udp(t testing.TB, c net.Conn) string {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(3 * time.Second))
	b := make([]byte, 100)
	for range 5 {
		if _, err := c.Write([]byte("?")); err != nil {
			continue // an ICMP error of the packet before
		}
		if n, err := c.Read(b); err == nil {
			name, _, _ := strings.Cut(string(b[:n]), " ")
			return name
		}
	}
	return ""
}

func nft(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command("nft", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// netnsName gives iproute2 a process in the pod's namespace.
func (w *world) netnsName(p *Pod) string {
	w.t.Helper()
	var cmd *exec.Cmd
	in(w.t, p, func() error {
		cmd = exec.Command("sleep", "600")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: 0}
		return cmd.Start()
	})
	w.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return fmt.Sprint(cmd.Process.Pid)
}

func (w *world) link(sandbox string) string { return linkName(w.cfg.Instance, sandbox) }
