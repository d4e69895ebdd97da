package integration

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/podd-runtime/podd/integration/node"
)

// manager is a service manager that is notified (sd_notify(3)).
type manager struct {
	mu   sync.Mutex
	said []string
}

func newManager(t *testing.T) *manager {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	m := &manager{}
	go func() {
		for buf := make([]byte, 4096); ; {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			m.mu.Lock()
			m.said = append(m.said, string(buf[:n]))
			m.mu.Unlock()
		}
	}()
	return m
}

// count of what was said since position from that holds text.
func (m *manager) count(from int, text string) (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.said[from:] {
		if strings.Contains(s, text) {
			n++
		}
	}
	return n
}

func (m *manager) length() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.said)
}

// TestServiceManagerIsTold: readiness, status and watchdog; a reload is the
// same process with the same containers, and is refused with a configuration
// that cannot be; a podd-shim that hangs starves the watchdog.
func TestServiceManagerIsTold(t *testing.T) {
	m := newManager(t)
	t.Setenv("WATCHDOG_USEC", "6000000")
	config := filepath.Join(t.TempDir(), "podd.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(config, []byte("apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n"+text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	n := start(t, "--config", config)
	said := func(from int, text string) {
		t.Helper()
		node.Await(t, text+" is notified", 60*second, func() bool { return m.count(from, text) > 0 })
	}
	said(0, "READY=1")
	said(0, "WATCHDOG=1")
	n.Write("web.yaml", pod("web", "", "serve", ":8080"))
	n.WaitRunning("web")
	said(0, "STATUS=1 pods: 1 running, 0 failed")
	before := executing(t, n)

	// Refused: podd goes on.
	log := func() string {
		b, _ := os.ReadFile(filepath.Join(n.Dir, "podd.log"))
		return string(b)
	}
	write("nonsense: 1\n")
	n.Signal(syscall.SIGHUP)
	node.Await(t, "the configuration is refused", 30*second, func() bool { return strings.Contains(log(), "configuration is refused") })

	// Taken: in the same process.
	at := m.length()
	write("logging: {verbosity: 4}\n")
	n.Signal(syscall.SIGHUP)
	said(at, "RELOADING=1")
	said(at, "READY=1")
	if m.count(0, "STOPPING=1") > 0 {
		t.Error("a reload is told as an end")
	}
	node.Await(t, "the new configuration is in force", 30*second, func() bool { return strings.Contains(log(), "level=DEBUG") })
	if err := syscall.Kill(n.PID(), 0); err != nil {
		t.Errorf("process %d is gone: %v", n.PID(), err)
	}
	if after := n.Processes("serve :8080"); len(before) == 0 || fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("containers' processes were %v, are %v", before, after)
	}

	shim := n.ShimPID()
	if err := syscall.Kill(shim, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(shim, syscall.SIGCONT)
	node.Await(t, "the health check fails", 60*second, func() bool { return strings.Contains(log(), "health check failed") })
	at = m.length()
	if err := syscall.Kill(shim, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	said(at, "WATCHDOG=1")
}

// executing are the processes of the pod's server: a container is started a
// moment before its program executes.
func executing(t *testing.T, n *node.Node) (pids map[int]bool) {
	t.Helper()
	node.Await(t, "the container's program", 30*second, func() bool {
		pids = n.Processes("serve :8080")
		return len(pids) > 0
	})
	return pids
}

// TestPoddWaitsForASlowShim: a podd-shim that takes its time, as on a machine
// under load, is waited for, and everybody is told; a wait can be ended.
func TestPoddWaitsForASlowShim(t *testing.T) {
	m := newManager(t)
	n := start(t)
	n.Write("web.yaml", pod("web", "", "serve", ":8080"))
	n.WaitRunning("web")
	before := executing(t, n)
	shim := n.ShimPID()
	if err := syscall.Kill(shim, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(shim, syscall.SIGCONT)
	n.Signal(syscall.SIGKILL)
	waits := func(from int) {
		t.Helper()
		node.Await(t, "podd waits", 60*second, func() bool {
			return m.count(from, "STATUS=waiting for podd-shim") > 0 && m.count(from, "EXTEND_TIMEOUT_USEC=60000000") > 0
		})
	}
	at := m.length()
	n.Launch()
	waits(at)
	if status := n.Signal(syscall.SIGTERM); status != 0 {
		t.Errorf("podd that waits ends on SIGTERM with %d", status)
	}
	at = m.length()
	n.Launch()
	waits(at)
	if m.count(at, "READY=1") > 0 {
		t.Error("podd is ready without podd-shim")
	}
	if err := syscall.Kill(shim, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	n.WaitAnswers()
	node.Await(t, "READY=1 is notified", 60*second, func() bool { return m.count(at, "READY=1") > 0 })
	n.WaitRunning("web")
	if after := n.Processes("serve :8080"); len(before) == 0 || fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("containers' processes were %v, are %v", before, after)
	}
	if log, err := os.ReadFile(filepath.Join(n.Dir, "podd.log")); err != nil || !strings.Contains(string(log), "podd-shim does not answer yet") {
		t.Errorf("the log does not tell (%v)", err)
	}
}
