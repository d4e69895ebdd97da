package server_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

const showConfinement = `grep -E '^(Uid|NoNewPrivs|Seccomp|CapEff):' /proc/self/status; probe call 248; probe call 600; probe call 165; ls /proc/$$/fd; true`

func field(t *testing.T, text, name string) string {
	t.Helper()
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.Join(strings.Fields(v), " ")
		}
	}
	t.Fatalf("no %s in %q", name, text)
	return ""
}

// TestSeccomp checks what a payload and an exec see, for each way a filter is
// installed.
func TestSeccomp(t *testing.T) {
	n := newNode(t)
	enosys := uint(unix.ENOSYS)
	strict := &specs.LinuxSeccomp{ // needs libcontainer's own way: no futex
		DefaultAction: specs.ActAllow,
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"sched_rr_get_interval", "add_key", "mount"}, Action: specs.ActErrno},
			{Names: []string{"fanotify_mark"}, Action: specs.ActErrno, ErrnoRet: &enosys},
			{Names: []string{"clone3"}, Action: specs.ActErrno}, // EPERM: no threads by glibc's choice
		},
	}
	denyList := &specs.LinuxSeccomp{DefaultAction: specs.ActAllow,
		Syscalls: []specs.LinuxSyscall{{Names: []string{"add_key", "mount"}, Action: specs.ActErrno}}}
	userns := func(s *shim.SandboxSpec) {
		s.Namespaces = append(s.Namespaces, specs.UserNamespace)
		s.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
		s.GIDMappings = s.UIDMappings
	}
	for _, c := range []struct {
		name    string
		nnp     bool
		uid     uint32
		profile string
		userns  bool
	}{
		{"default", false, 0, "default", false},
		{"default, no_new_privs", true, 0, "default", false},
		{"default, user", false, 1000, "default", false},
		{"default, user, no_new_privs", true, 1000, "default", false},
		{"default, user namespace", false, 0, "default", true},
		{"default, user in user namespace", false, 1000, "default", true},
		{"deny list", false, 0, "deny", false},
		{"none", false, 0, "", false},
		{"strict", false, 0, "strict", false},
		{"strict, no_new_privs", true, 1000, "strict", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var box *shim.Process
			if c.userns {
				box = n.sandbox(userns)
			} else {
				box = n.sandbox()
			}
			spec := n.containerSpec(box, showConfinement+"; sleep 1000")
			spec.Spec.Process.NoNewPrivileges = c.nnp
			spec.Spec.Process.User.UID, spec.Spec.Process.User.GID = c.uid, c.uid
			if c.userns {
				spec.Spec.Linux.Namespaces = append(spec.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace, Path: fmt.Sprintf("/proc/%d/ns/user", box.PID)})
			}
			switch c.profile {
			case "default":
				spec.Spec.Linux.Seccomp = seccomp.DefaultProfile(spec.Spec)
			case "deny":
				spec.Spec.Linux.Seccomp = denyList
			case "strict":
				spec.Spec.Linux.Seccomp = strict
			}
			n.run(spec)
			n.waitLog(spec.LogPath, "F 2\n")
			out, _ := logged(t, spec.LogPath)
			r := &specs.Process{Args: []string{"/bin/sh", "-c", showConfinement}, Cwd: "/", Env: []string{"PATH=/bin"},
				NoNewPrivileges: c.nnp, User: specs.User{UID: c.uid, GID: c.uid}, Capabilities: spec.Spec.Process.Capabilities}
			execOut, exit := n.execProcess(spec.ID, r)
			if exit.Code != 0 {
				t.Errorf("exec: %+v %s", exit, execOut)
			}
			for who, out := range map[string]string{"init": out, "exec": execOut} {
				wantMode, wantNNP := "2", "0"
				if c.profile == "" {
					wantMode = "0"
				}
				if c.nnp {
					wantNNP = "1"
				}
				if got := field(t, out, "Seccomp"); got != wantMode {
					t.Errorf("%s: Seccomp %s, want %s", who, got, wantMode)
				}
				if got := field(t, out, "NoNewPrivs"); got != wantNNP {
					t.Errorf("%s: NoNewPrivs %s, want %s", who, got, wantNNP)
				}
				if got, want := field(t, out, "Uid"), fmt.Sprintf("%[1]d %[1]d %[1]d %[1]d", c.uid); got != want {
					t.Errorf("%s: Uid %s, want %s", who, got, want)
				}
				if caps := field(t, out, "CapEff"); (caps == "0000000000000000") != (c.uid != 0) {
					t.Errorf("%s: CapEff %s with uid %d", who, caps, c.uid)
				}
				// add_key, a call of the future, mount
				rest := out[strings.Index(out, "Seccomp:"):]
				rest = rest[strings.Index(rest, "\n")+1:]
				if c.profile != "" && !strings.HasPrefix(rest, "EPERM\nENOSYS\nEPERM\n") {
					t.Errorf("%s: forbidden calls: %q", who, rest)
				}
				if c.profile == "" && strings.HasPrefix(rest, "EPERM") {
					t.Errorf("%s: unconfined, but add_key is forbidden: %q", who, rest)
				}
				if !strings.HasSuffix(out, "\n0\n1\n2\n") {
					t.Errorf("%s: descriptors: %q", who, rest)
				}
			}
		})
	}
}

func TestSeccompNotifyNeedsAgent(t *testing.T) {
	n := newNode(t)
	spec := n.containerSpec(n.sandbox(), "true")
	spec.Spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow,
		Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: specs.ActNotify}}}
	if _, err := n.Create(n.ctx(), spec); err == nil {
		t.Fatal("a notifying profile without an agent was accepted")
	}
	if _, err := n.State(n.ctx(), spec.ID); err == nil {
		t.Fatal("the failed container is still there")
	}
}

func (n *node) execProcess(id string, p *specs.Process) (string, *shim.Exit) {
	n.t.Helper()
	return n.execSpec(&shim.ExecSpec{ContainerID: id, Process: p})
}
