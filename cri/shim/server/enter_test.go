package server_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

// volatile is what differs between two runs of the same program: numbers of
// processes, pipes and terminals, memory, pending signals' bound, switches.
var volatile = []*regexp.Regexp{
	regexp.MustCompile(`(?m)^/proc/self/status: (Pid|Tgid|NStgid|NSpid|NSpgid|NSsid|Vm\w+|Rss\w+|SigQ|\w+voluntary_ctxt_switches|voluntary_ctxt_switches):.*\n`),
	regexp.MustCompile(`\[\d+\]`),
	regexp.MustCompile(`/dev/pts/\d+`),
	regexp.MustCompile(`(?m)^/proc/self/fdinfo/\d+: (ino|pos|mnt_id):.*\n`),
	regexp.MustCompile(`(?m)^/proc/self/fd/\d+: /proc/\d+/fd\n`),
	regexp.MustCompile(`(?m)^window.*\n`),
}

func steady(text string) string {
	for _, v := range volatile {
		text = v.ReplaceAllString(text, "")
	}
	return text
}

// bothWays runs the process by enter and by libcontainer and compares what
// they print, or why they do not run.
func (n *node) bothWays(t *testing.T, id string, p *specs.Process) string {
	t.Helper()
	run := func(libcontainer bool) string {
		e := &shim.ExecSpec{ContainerID: id, Process: p, Libcontainer: libcontainer}
		var out io.ReadCloser
		if !p.Terminal {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			defer r.Close()
			out, e.Stdout, e.Stderr = r, w, w
		}
		s, err := n.Exec(n.ctx(), e)
		if err != nil {
			return "error: " + err.Error()
		}
		defer s.Close()
		if p.Terminal {
			out = s.TTY()
		} else {
			e.Stdout.Close()
		}
		text, err := io.ReadAll(out)
		if err != nil && !errors.Is(err, unix.EIO) { // a terminal's end
			t.Fatal(err)
		}
		exit, err := s.Wait(n.ctx())
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%s\nexit code %d", text, exit.Code)
	}
	ours, theirs := run(false), run(true)
	a, b := strings.Split(steady(ours), "\n"), strings.Split(steady(theirs), "\n")
	if strings.HasPrefix(ours, "error: ") {
		// The reason must be the same, the words around it need not be.
		why := func(s string) string { return s[strings.LastIndex(s, ": ")+1:] }
		if why(ours) != why(theirs) {
			t.Errorf("enter: %s\nlibcontainer: %s", ours, theirs)
		}
		return ours
	}
	for i := range max(len(a), len(b)) {
		x, y := "(nothing)", "(nothing)"
		if i < len(a) {
			x = a[i]
		}
		if i < len(b) {
			y = b[i]
		}
		if x != y {
			t.Errorf("enter:        %s\nlibcontainer: %s", x, y)
		}
	}
	return ours
}

// TestEnterIsLibcontainer: a process started by enter has what one started by
// libcontainer has, in containers of all kinds.
func TestEnterIsLibcontainer(t *testing.T) {
	n := newNode(t)
	etc := filepath.Join(n.rootfs, "etc")
	if err := os.WriteFile(filepath.Join(etc, "passwd"), []byte("root:x:0:0:root:/root:/bin/sh\n\n  user:x:1000:1000::/home/user:/bin/sh  \nshort:x:1001\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for dir, mode := range map[string]os.FileMode{"private": 0o700, "open": 0o755} {
		if err := os.Mkdir(filepath.Join(n.rootfs, dir), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(filepath.Join(n.rootfs, dir), 1000, 1000); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(n.rootfs, "bin/notme"), []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(n.rootfs, "bin/noexec"), []byte("no program"), 0o644); err != nil {
		t.Fatal(err)
	}
	type spec = shim.ContainerSpec
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	own := func(box *shim.Process, typ specs.LinuxNamespaceType, name string) specs.LinuxNamespace {
		return specs.LinuxNamespace{Type: typ, Path: fmt.Sprintf("/proc/%d/ns/%s", box.PID, name)}
	}
	without := func(s *spec, typ specs.LinuxNamespaceType) {
		var left []specs.LinuxNamespace
		for _, ns := range s.Spec.Linux.Namespaces {
			if ns.Type != typ {
				left = append(left, ns)
			}
		}
		s.Spec.Linux.Namespaces = left
	}
	umask, memory := uint32(0o27), int64(64<<20)
	every := []string{}
	for _, c := range strings.Fields("CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP NET_ADMIN NET_RAW IPC_LOCK SYS_MODULE SYS_CHROOT SYS_PTRACE SYS_ADMIN SYS_NICE MKNOD AUDIT_WRITE SETFCAP CHECKPOINT_RESTORE") {
		every = append(every, "CAP_"+c)
	}
	containers := []struct {
		name   string
		box    func(*shim.SandboxSpec)
		change func(*spec, *shim.Process)
	}{
		{"plain", nil, func(*spec, *shim.Process) {}},
		{"seccomp", nil, func(s *spec, _ *shim.Process) { s.Spec.Linux.Seccomp = seccomp.DefaultProfile(s.Spec) }},
		{"all of it", nil, func(s *spec, _ *shim.Process) {
			p := s.Spec.Process
			p.User = specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{5, 7}, Umask: &umask}
			p.NoNewPrivileges = true
			p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 100, Hard: 200}, {Type: "RLIMIT_CORE"}, {Type: "RLIMIT_NPROC", Soft: 500, Hard: 500}}
			p.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 6}
			p.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch, Nice: 5}
			p.ExecCPUAffinity = &specs.CPUAffinity{Initial: "0", Final: "0"}
			s.Spec.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32}
			s.Spec.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &memory}}
			s.Spec.Linux.Seccomp = seccomp.DefaultProfile(s.Spec)
		}},
		{"privileged", nil, func(s *spec, _ *shim.Process) {
			c := s.Spec.Process.Capabilities
			c.Bounding, c.Effective, c.Permitted, c.Inheritable, c.Ambient = every, every, every, every[:3], every[:2]
			s.Spec.Linux.MaskedPaths, s.Spec.Linux.ReadonlyPaths = nil, nil
		}},
		{"user namespace", func(s *shim.SandboxSpec) {
			s.Namespaces = append(s.Namespaces, specs.UserNamespace)
			s.UIDMappings, s.GIDMappings = ids, ids
		}, func(s *spec, box *shim.Process) {
			s.Spec.Linux.Namespaces = append(s.Spec.Linux.Namespaces, own(box, specs.UserNamespace, "user"))
			s.Spec.Linux.Seccomp = seccomp.DefaultProfile(s.Spec)
		}},
		{"shared PID namespace", func(s *shim.SandboxSpec) { s.Namespaces = append(s.Namespaces, specs.PIDNamespace) }, func(s *spec, box *shim.Process) {
			without(s, specs.PIDNamespace)
			s.Spec.Linux.Namespaces = append(s.Spec.Linux.Namespaces, own(box, specs.PIDNamespace, "pid"))
		}},
		{"the node's PID, network and IPC namespaces", nil, func(s *spec, _ *shim.Process) {
			without(s, specs.PIDNamespace)
			without(s, specs.NetworkNamespace)
			without(s, specs.IPCNamespace)
		}},
		{"cgroup namespace, read-only root", nil, func(s *spec, _ *shim.Process) {
			s.Spec.Linux.Namespaces = append(s.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
			s.Spec.Root.Readonly = true
		}},
	}
	processes := []struct {
		name   string
		want   string
		change func(*specs.Process)
	}{
		{"as the container", "", func(*specs.Process) {}},
		{"on a terminal", "", func(p *specs.Process) { p.Terminal, p.ConsoleSize = true, &specs.Box{Width: 91, Height: 37} }},
		{"of a user in its own directory", "", func(p *specs.Process) {
			p.User, p.Cwd = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{9}}, "/open"
			p.Env = append(p.Env, "HOME=", "A=1", "A=2", "PATH=/nowhere::/bin/")
			p.Args = []string{"probe", "self"}
		}},
		{"of a user on a terminal", "", func(p *specs.Process) {
			p.User, p.Terminal, p.NoNewPrivileges = specs.User{UID: 1001, GID: 0}, true, true
		}},
		{"without capabilities", "", func(p *specs.Process) { p.Capabilities = &specs.LinuxCapabilities{} }},
		{"as another user says", "", func(p *specs.Process) { p.User, p.Capabilities = specs.User{UID: 4711, GID: 4712}, nil }},
		{"not in PATH", `exec: "nothing": executable file not found in $PATH`, func(p *specs.Process) { p.Args = []string{"nothing"} }},
		{"not there", `exec: "/no/thing": stat /no/thing: no such file or directory`, func(p *specs.Process) { p.Args = []string{"/no/thing"} }},
		{"a directory", `exec: "/bin": is a directory`, func(p *specs.Process) { p.Args = []string{"/bin"} }},
		{"not executable", `exec: "/bin/noexec": permission denied`, func(p *specs.Process) { p.Args = []string{"/bin/noexec"} }},
		{"in a relative directory", "", func(p *specs.Process) {
			p.Args, p.Env, p.Cwd = []string{"probe", "self"}, []string{"PATH=bin"}, "/"
		}},
		{"without PATH", `exec: "probe": executable file not found in $PATH`, func(p *specs.Process) { p.Args, p.Env = []string{"probe"}, nil }},
		{"not a program", "exec /bin/notme: exec format error\n\nexit code 255", func(p *specs.Process) { p.Args = []string{"notme"} }},
		{"in no directory", "no such file or directory", func(p *specs.Process) { p.Cwd = "/no/dir" }},
	}
	for _, c := range containers {
		t.Run(c.name, func(t *testing.T) {
			n.t = t
			var box *shim.Process
			if c.box != nil {
				box = n.sandbox(c.box)
			} else {
				box = n.sandbox()
			}
			s := n.containerSpec(box, "exec sleep 1000")
			c.change(s, box)
			n.run(s)
			for i, p := range processes {
				if i > 3 && (testing.Short() || os.Getenv("PODD_TEST_ALL") == "") && c.name != "plain" && c.name != "user namespace" {
					break
				}
				process := *s.Spec.Process
				process.Args = []string{"/bin/probe", "self"}
				p.change(&process)
				t.Run(p.name, func(t *testing.T) {
					text := n.bothWays(t, s.ID, &process)
					if !strings.Contains(text, p.want) {
						t.Errorf("%s\nwant %s", text, p.want)
					}
					if p.want == "" && p.name != "in a relative directory" && !strings.Contains(text, "exit code 0") {
						t.Error(text)
					}
				})
			}
		})
	}
	n.t = t
}

// TestExecInEndedContainer: an exec that meets a container's end says so.
func TestExecInEndedContainer(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	for range 10 {
		s := n.containerSpec(box, "exec sleep 1000")
		p := n.run(s)
		done := make(chan error)
		for range 4 {
			go func() {
				for {
					e, err := n.Exec(n.ctx(), &shim.ExecSpec{ContainerID: s.ID, Process: &specs.Process{Args: []string{"/bin/true"}, Cwd: "/", Env: []string{"PATH=/bin"}}})
					if err != nil {
						done <- err
						return
					}
					if _, err := e.Wait(n.ctx()); err != nil {
						done <- err
						return
					}
					e.Close()
				}
			}()
		}
		if err := unix.Kill(p.PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for range 4 {
			if err := <-done; !errors.Is(err, errdefs.ErrFailedPrecondition) {
				t.Errorf("exec in a container that ended: %v", err)
			}
		}
		if err := n.Delete(n.ctx(), s.ID); err != nil {
			t.Fatal(err)
		}
	}
}
