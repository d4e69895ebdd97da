package server_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

// racerSeconds is how long each attack runs: a minute in the long form.
func racerSeconds() int {
	if os.Getenv("PODD_TEST_ALL") != "" {
		return 60
	}
	return 1
}

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
		n.untilWithin(shim.EventExited, tracer.ID, time.Duration(racerSeconds()+30)*time.Second)
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

// TestHostileDescriptorStore: who traces pause may put descriptors into its
// pod's store. The next shim neither signals the process that a false pidfd
// names nor reads from what is no pipe of the container.
func TestHostileDescriptorStore(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	spec := n.containerSpec(box, "while :; do echo line; sleep 0.1; done")
	p := n.run(spec)
	victim := exec.Command("sleep", "1000")
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- victim.Wait() }()
	defer victim.Process.Kill()

	n.kill()
	false_, err := unix.PidfdOpen(victim.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(false_)
	passwd, err := os.Open("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	defer passwd.Close()
	pause, err := unix.PidfdOpen(box.PID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pause)
	store, err := unix.PidfdGetfd(pause, 4, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(store)
	body := fmt.Sprintf(`{"id":%q,"names":["pidfd","stdout","stderr","stdin","tty","spill"]}`, spec.ID)
	fd := int(passwd.Fd())
	if err := unix.Sendmsg(store, []byte(body), unix.UnixRights(false_, fd, fd, fd, fd, fd), nil, 0); err != nil {
		t.Fatal(err)
	}

	n.restart()
	if got := n.process(spec.ID); got.State != shim.Running || got.PID != p.PID {
		t.Fatalf("after the restart: %+v", got)
	}
	adopt(p.PID)
	before, _ := logged(t, spec.LogPath)
	eventually(t, "the log goes on", func() bool {
		out, _ := logged(t, spec.LogPath)
		return len(out) > len(before)
	})
	if out, _ := logged(t, spec.LogPath); strings.Contains(out, "root:") {
		t.Error("the log holds what the false descriptor named")
	}
	if err := n.Signal(n.ctx(), spec.ID, int(unix.SIGKILL), false); err != nil {
		t.Fatal(err)
	}
	n.until(shim.EventExited, spec.ID)
	select {
	case err := <-ended:
		t.Fatalf("the process of the false pidfd ended: %v", err)
	default:
	}
}

// TestKilledWhileTracersStandStill: a shim that dies between the creation and
// the start of a container in a shared PID namespace leaves the pod's tracers
// frozen and an init with privileges. The next one ends that and thaws them.
func TestKilledWhileTracersStandStill(t *testing.T) {
	n := newNode(t)
	box := n.sandbox(func(s *shim.SandboxSpec) { s.Namespaces = append(s.Namespaces, specs.PIDNamespace) })
	tracer := n.tracerSpec(box, 0)
	tracer.Spec.Process.Args = []string{"/bin/sh", "-c", "while :; do echo line; sleep 0.05; done"}
	inPodPIDNamespace(tracer, box)
	p := n.run(tracer)
	s := n.containerSpec(box, "sleep 1000")
	inPodPIDNamespace(s, box)
	created, err := n.Create(n.ctx(), s)
	if err != nil {
		t.Fatal(err)
	}
	still, _ := logged(t, tracer.LogPath)
	time.Sleep(300 * time.Millisecond)
	if out, _ := logged(t, tracer.LogPath); out != still {
		t.Error("the tracer runs while an init is there")
	}
	n.kill()
	adopt(p.PID)
	adopt(created.PID)
	n.restart()
	if got := n.process(s.ID); got.State != shim.Exited {
		t.Errorf("the container that was not started is %s", got.State)
	}
	eventually(t, "the tracer goes on", func() bool {
		out, _ := logged(t, tracer.LogPath)
		return len(out) > len(still)
	})
	// And all is as before.
	again := n.containerSpec(box, "exit 3")
	inPodPIDNamespace(again, box)
	n.run(again)
	if e := n.until(shim.EventExited, again.ID); e.Exit.Code != 3 {
		t.Errorf("exit %+v", e.Exit)
	}
}

// TestUnstartedContainerHoldsNobodyForEver: one that is deleted instead of
// started lets the tracers go on.
func TestUnstartedContainerHoldsNobodyForEver(t *testing.T) {
	n := newNode(t)
	box := n.sandbox(func(s *shim.SandboxSpec) { s.Namespaces = append(s.Namespaces, specs.PIDNamespace) })
	tracer := n.tracerSpec(box, 0)
	tracer.Spec.Process.Args = []string{"/bin/sleep", "1000"}
	inPodPIDNamespace(tracer, box)
	n.run(tracer)
	for range 3 {
		s := n.containerSpec(box, "sleep 1000")
		inPodPIDNamespace(s, box)
		if _, err := n.Create(n.ctx(), s); err != nil {
			t.Fatal(err)
		}
		if err := n.Delete(n.ctx(), s.ID); err != nil {
			t.Fatal(err)
		}
	}
	out, _ := n.execSpec(&shim.ExecSpec{ContainerID: tracer.ID,
		Process: &specs.Process{Args: []string{"/bin/echo", "here"}, Cwd: "/", Env: []string{"PATH=/bin"}}})
	if out != "here\n" {
		t.Errorf("exec in the tracer: %q", out)
	}
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not seen: %s", what)
		}
	}
}

// TestExecMeetsNoInit: once a container is told to be started its program runs,
// so that an exec, which may trace, finds nothing of the runtime in it.
func TestExecMeetsNoInit(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	for range 20 {
		s := n.containerSpec(box, "exec sleep 1000")
		p := n.run(s)
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.PID))
		if err != nil || strings.Contains(exe, "podd-shim") || strings.HasPrefix(exe, "/memfd:") {
			t.Errorf("right after the start the container runs %q, %v", exe, err)
		}
		if err := n.Delete(n.ctx(), s.ID); err != nil {
			t.Fatal(err)
		}
	}
}
