package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/podd-runtime/podd/integration/node"
)

// TestSignalsEndClients: `timeout 30 podd exec …` must return. Clients are ended
// by the signal itself, so that shells see what ended them; those that kubectl
// catches it for exit with 1, as with kubectl.
func TestSignalsEndClients(t *testing.T) {
	n := start(t)
	n.Write("web.yaml", pod("web", "", "serve"))
	n.Write("box.yaml", box("box"))
	n.WaitRunning("web", "box")
	for _, tt := range []struct {
		args  []string
		ready string // what it prints when it is under way; "": the command of an exec runs
		sig   syscall.Signal
		code  int // of a client that catches the signal
	}{
		{[]string{"exec", node.PodName("box"), "--", "sleep", "4711"}, "", syscall.SIGTERM, 0},
		{[]string{"exec", node.PodName("box"), "--", "sleep", "4712"}, "", syscall.SIGINT, 0},
		{[]string{"exec", node.PodName("box"), "--", "sleep", "4713"}, "", syscall.SIGHUP, 0},
		{[]string{"attach", node.PodName("box")}, "If you don't see a command prompt", syscall.SIGTERM, 0},
		{[]string{"port-forward", node.PodName("web"), fmt.Sprintf("%d:8080", freePort(t))}, "Forwarding from", syscall.SIGTERM, 0},
		{[]string{"logs", "-f", node.PodName("web")}, "serving", syscall.SIGTERM, 1},
		{[]string{"get", "pods", "-w"}, node.PodName("web"), syscall.SIGTERM, 1},
	} {
		t.Run(tt.args[0]+" "+tt.sig.String(), func(t *testing.T) {
			if signal.Ignored(tt.sig) {
				t.Skip("it is ignored here, as under nohup, and so by what is started here")
			}
			cmd := exec.Command(filepath.Join(n.Bin, "podd"), append([]string{"--run-dir", n.RunDir()}, tt.args...)...)
			out := &lockedBuffer{}
			cmd.Stdout, cmd.Stderr = out, out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Process.Kill()
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			command := strings.Join(tt.args[min(3, len(tt.args)):], " ")
			node.Await(t, "under way", 20*second, func() bool {
				if tt.ready == "" {
					return len(n.Processes(command)) > 0
				}
				return strings.Contains(out.String(), tt.ready)
			}, out.String)
			if err := cmd.Process.Signal(tt.sig); err != nil {
				t.Fatal(err)
			}
			var exit *exec.ExitError
			node.Await(t, "ended", 20*second, func() bool {
				select {
				case err := <-ended:
					errors.As(err, &exit)
					return true
				default:
					return false
				}
			})
			if exit == nil {
				t.Fatalf("it ended well\n%s", out)
			}
			st := exit.Sys().(syscall.WaitStatus)
			// Kubectl's code begins to catch it a moment after its first words.
			byIt, caught := st.Signaled() && st.Signal() == tt.sig, tt.code != 0 && st.ExitStatus() == tt.code
			if !byIt && !caught {
				t.Errorf("it ended with %v\n%s", exit, out)
			}
			if tt.ready == "" {
				node.Await(t, "its command ended, too", 20*second, func() bool { return len(n.Processes(command)) == 0 })
			}
		})
	}
}

// TestASignalGivesTheTerminalBack: a shell must not stay in raw mode.
func TestASignalGivesTheTerminalBack(t *testing.T) {
	if _, err := exec.LookPath("script"); err != nil {
		t.Skip("script(1) is not installed")
	}
	n := start(t)
	n.Write("box.yaml", box("box"))
	n.WaitRunning("box")
	line := fmt.Sprintf("before=$(stty -g); timeout --foreground 2 %s/podd --run-dir %s exec -it %s -- sh -c 'stty size; sleep 4714'; echo ended with $?; test \"$before\" = \"$(stty -g)\" && echo as before",
		n.Bin, n.RunDir(), node.PodName("box"))
	out, err := exec.Command("script", "-qec", line, "/dev/null").CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("ended with 124")) || !bytes.Contains(out, []byte("as before")) {
		t.Errorf("%v: %q", err, out)
	}
}

// lockedBuffer is written by one goroutine and read by another.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
