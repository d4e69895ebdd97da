package server_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/podd-runtime/podd/cri/shim"
)

// racerSeconds is how long each attack runs: a minute in the long form.
func racerSeconds() int {
	if os.Getenv("PODD_TEST_ALL") != "" {
		return 60
	}
	return 4
}

var racerBinary = sync.OnceValues(func() ([]byte, error) {
	out := filepath.Join(os.TempDir(), fmt.Sprintf("podd-racer-%d", os.Getpid()))
	defer os.Remove(out)
	if text, err := exec.Command("cc", "-O2", "-Wall", "-static", "-o", out, "testdata/racer.c").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build racer: %w\n%s", err, text)
	}
	return os.ReadFile(out)
})

// tracerSpec is a container that may trace, and nothing else, under the default
// filter; it attacks whatever comes into its PID namespace.
func (n *node) tracerSpec(box *shim.Process, seconds int) *shim.ContainerSpec {
	n.t.Helper()
	racer, err := racerBinary()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(n.rootfs, "bin/racer"), racer, 0o755); err != nil {
		n.t.Fatal(err)
	}
	s := n.containerSpec(box, "")
	s.Spec.Process.Args = []string{"/bin/racer", strconv.Itoa(seconds)}
	caps := []string{"CAP_SYS_PTRACE"}
	s.Spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	s.Spec.Linux.Seccomp = seccomp.DefaultProfile(s.Spec)
	return s
}

var racerVerdict = regexp.MustCompile(`caught (\d+), reached (\d+)`)

// attack runs beside again and again while the tracer runs, and fails when it
// got hold of more than a container has.
func (n *node) attack(t *testing.T, tracer *shim.ContainerSpec, beside func() error) {
	t.Helper()
	n.run(tracer)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		n.until(shim.EventExited, tracer.ID)
	}()
	rounds := 0
	for running := true; running; rounds++ {
		if err := beside(); err != nil {
			select {
			case <-ended: // the container went away under it
			case <-time.After(10 * time.Second):
				t.Fatal(err)
			}
		}
		select {
		case <-ended:
			running = false
		default:
		}
	}
	out, stderr := logged(t, tracer.LogPath)
	m := racerVerdict.FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("the racer gave no verdict:\n%s%s", out, stderr)
	}
	t.Logf("%d times beside it: %s", rounds, m[0])
	if m[2] != "0" {
		t.Errorf("the tracer reached the runtime:\n%s", out[:min(len(out), 3000)])
	}
}

func userNamespace(s *shim.SandboxSpec) {
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	s.Namespaces = append(s.Namespaces, specs.UserNamespace)
	s.UIDMappings, s.GIDMappings = ids, ids
}

// inUserNamespace puts the container into its pod's.
func inUserNamespace(s *shim.ContainerSpec, box *shim.Process) {
	s.Spec.Linux.Namespaces = append(s.Spec.Linux.Namespaces,
		specs.LinuxNamespace{Type: specs.UserNamespace, Path: fmt.Sprintf("/proc/%d/ns/user", box.PID)})
}

// inPodPIDNamespace shares the pod's PID namespace.
func inPodPIDNamespace(s *shim.ContainerSpec, box *shim.Process) {
	for i, ns := range s.Spec.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace {
			s.Spec.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/ns/pid", box.PID)
		}
	}
}

// TestTracerReachesNoExec: with CAP_SYS_PTRACE a container may trace an exec'd
// process from its birth on, and then has nothing that it had not before:
// neither capabilities, nor a process without the filter, nor descriptors.
func TestTracerReachesNoExec(t *testing.T) {
	n := newNode(t)
	for _, c := range []struct {
		name     string
		box      func(*shim.SandboxSpec)
		change   func(*shim.ContainerSpec, *shim.Process)
		terminal bool
		user     uint32
	}{
		{name: "plain"},
		{name: "no_new_privs", change: func(s *shim.ContainerSpec, _ *shim.Process) { s.Spec.Process.NoNewPrivileges = true }},
		{name: "terminal", terminal: true},
		{name: "other user", user: 1000},
		{name: "user namespace", box: userNamespace, change: inUserNamespace},
		{name: "shared PID namespace", box: func(s *shim.SandboxSpec) { s.Namespaces = append(s.Namespaces, specs.PIDNamespace) }, change: inPodPIDNamespace},
	} {
		t.Run(c.name, func(t *testing.T) {
			n.t = t
			var box *shim.Process
			if c.box == nil {
				c.box = func(*shim.SandboxSpec) {}
			}
			box = n.sandbox(c.box)
			s := n.tracerSpec(box, racerSeconds())
			if c.change != nil {
				c.change(s, box)
			}
			p := *s.Spec.Process
			p.Args, p.Terminal, p.User = []string{"/bin/true"}, c.terminal, specs.User{UID: c.user, GID: c.user}
			n.attack(t, s, func() error {
				e, err := n.Exec(n.ctx(), &shim.ExecSpec{ContainerID: s.ID, Process: &p})
				if err != nil {
					return err
				}
				defer e.Close()
				_, err = e.Wait(n.ctx())
				return err
			})
		})
	}
}

// TestTracerReachesNoStart: nor is there more to be had of a container that is
// created and started in the tracer's PID namespace.
func TestTracerReachesNoStart(t *testing.T) {
	n := newNode(t)
	for _, c := range []struct {
		name   string
		userns bool
		target bool
		wait   time.Duration // between create and start
	}{
		{name: "shared PID namespace"},
		{name: "shared PID namespace, created long before the start", wait: 300 * time.Millisecond},
		{name: "user namespace", userns: true},
		{name: "the tracer's own PID namespace", target: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			n.t = t
			box := n.sandbox(func(s *shim.SandboxSpec) {
				s.Namespaces = append(s.Namespaces, specs.PIDNamespace)
				if c.userns {
					userNamespace(s)
				}
			})
			tracer := n.tracerSpec(box, racerSeconds())
			if c.userns {
				inUserNamespace(tracer, box)
			}
			if !c.target {
				inPodPIDNamespace(tracer, box)
			}
			n.attack(t, tracer, func() error {
				s := n.containerSpec(box, "")
				s.Spec.Process.Args = []string{"/bin/true"}
				// Nothing of what is looked for: the tracer has the smaller set.
				s.Spec.Process.Capabilities = tracer.Spec.Process.Capabilities
				s.Spec.Linux.Seccomp = tracer.Spec.Linux.Seccomp
				ns := box
				if c.target {
					ns = n.process(tracer.ID)
				}
				inPodPIDNamespace(s, ns)
				if c.userns {
					inUserNamespace(s, box)
				}
				if _, err := n.Create(n.ctx(), s); err != nil {
					return err
				}
				time.Sleep(c.wait)
				if _, err := n.Start(n.ctx(), s.ID); err != nil {
					return err
				}
				return n.Delete(n.ctx(), s.ID)
			})
		})
	}
}

// process is what the shim tells of it.
func (n *node) process(id string) *shim.Process {
	n.t.Helper()
	list, err := n.List(n.ctx())
	if err != nil {
		n.t.Fatal(err)
	}
	for i := range list {
		if list[i].ID == id {
			return &list[i]
		}
	}
	n.t.Fatalf("no process %s among %s", id, strings.TrimSpace(fmt.Sprint(list)))
	return nil
}
