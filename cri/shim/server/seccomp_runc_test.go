//go:build cgo && seccomp

package server

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"unsafe"

	"github.com/opencontainers/runc/libcontainer/seccomp"
	"github.com/opencontainers/runc/libcontainer/specconv"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestMain of the external package does not run here; the child is recognised
// by its environment.
const installEnv = "PODD_TEST_INSTALL_PROFILE"

func init() {
	if os.Getenv(installEnv) == "" {
		return
	}
	runtime.LockOSThread()
	p := new(specs.LinuxSeccomp)
	if err := json.NewDecoder(os.Stdin).Decode(p); err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	config, err := specconv.SetupSeccomp(p)
	if err == nil {
		_, err = seccomp.InitSeccomp(config)
	}
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	fmt.Println("ready", unix.Gettid())
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

const ptraceSeccompGetFilter = 0x420c

// runcFilter lets libcontainer install the profile in a child and reads the
// program back from the kernel.
func runcFilter(t *testing.T, p *specs.LinuxSeccomp) []byte {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), installEnv+"=1")
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	if err := json.NewEncoder(in).Encode(p); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	var tid int
	if _, err := fmt.Sscanf(line, "ready %d", &tid); err != nil {
		t.Fatalf("child said %q", line)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.PtraceSeize(tid); err != nil {
		t.Skip("cannot trace a child:", err)
	}
	defer unix.PtraceDetach(tid)
	if err := unix.PtraceInterrupt(tid); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Wait4(tid, nil, unix.WALL, nil); err != nil {
		t.Fatal(err)
	}
	n, _, errno := unix.Syscall6(unix.SYS_PTRACE, ptraceSeccompGetFilter, uintptr(tid), 0, 0, 0, 0)
	if errno != 0 {
		t.Skip("cannot read filters on this kernel:", errno)
	}
	prog := make([]unix.SockFilter, n)
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, ptraceSeccompGetFilter, uintptr(tid), 0, uintptr(unsafe.Pointer(&prog[0])), 0, 0); errno != 0 {
		t.Fatal(errno)
	}
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&prog[0])), 8*len(prog))
	return append([]byte(nil), raw...)
}

// TestSameAsRunc compares our programs with what libcontainer installs: each
// system call number of each architecture, with arguments that profiles look at.
func TestSameAsRunc(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: installs filters without no_new_privs and traces")
	}
	eacces := uint(unix.EACCES)
	for name, p := range map[string]*specs.LinuxSeccomp{
		"default":            runtimeDefault(),
		"default, admin":     runtimeDefault("CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_BPF"),
		"deny list":          {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mount", "add_key"}, Action: specs.ActErrno}}},
		"errno and arches":   {DefaultAction: specs.ActErrno, DefaultErrnoRet: &eacces, Architectures: []specs.Arch{specs.ArchX86}, Syscalls: []specs.LinuxSyscall{{Names: []string{"read", "write", "no_such_call"}, Action: specs.ActAllow}}},
		"repeated arguments": {DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"personality", "socket"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 1, Op: specs.OpEqualTo}, {Index: 0, Value: 8, Op: specs.OpEqualTo}}}, {Names: []string{"write", "read", "exit_group", "futex"}, Action: specs.ActAllow}}},
		"masked":             {DefaultAction: specs.ActKillProcess, Syscalls: []specs.LinuxSyscall{{Names: []string{"clone"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 0x7e020000, ValueTwo: 0, Op: specs.OpMaskedEqual}}}, {Names: []string{"read"}, Action: specs.ActLog}, {Names: []string{"exit_group", "exit", "futex", "write", "nanosleep", "rt_sigreturn", "mmap", "epoll_pwait", "gettid", "sigaltstack", "rt_sigprocmask", "sched_yield", "madvise", "munmap", "tgkill", "getpid", "fcntl"}, Action: specs.ActAllow}}},
		"log by default":     {DefaultAction: specs.ActLog, Syscalls: []specs.LinuxSyscall{{Names: []string{"kexec_load"}, Action: specs.ActKillThread}}},
		"trace by default":   {DefaultAction: specs.ActTrace, Syscalls: []specs.LinuxSyscall{{Names: []string{"exit_group", "write", "read", "gettid", "futex", "exit", "nanosleep", "epoll_pwait", "rt_sigprocmask", "sigaltstack"}, Action: specs.ActAllow}}},
	} {
		t.Run(name, func(t *testing.T) {
			ours, err := compile(p)
			if err != nil {
				t.Fatal(err)
			}
			theirs := runcFilter(t, p)
			args := []uint64{0, 1, 8, 40, 0x20000, unix.CLONE_NEWUSER, threadFlags, ^uint64(0)}
			differ := 0
			for _, arch := range []uint32{unix.AUDIT_ARCH_X86_64, unix.AUDIT_ARCH_I386, unix.AUDIT_ARCH_AARCH64} {
				for _, mode := range []uint32{0, x32Bit} {
					for nr := range uint32(700) {
						for _, a := range args {
							o, r := evaluate(t, ours, arch, mode|nr, a, a), evaluate(t, theirs, arch, mode|nr, a, a)
							if o != r && differ < 10 {
								differ++
								t.Errorf("arch %#x call %#x argument %#x: ours %#x, runc's %#x", arch, mode|nr, a, o, r)
							}
						}
					}
				}
			}
		})
	}
}
