//go:build cgo && seccomp

package server

import (
	"encoding/binary"
	"testing"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// evaluate runs a seccomp program on one system call.
func evaluate(t *testing.T, raw []byte, arch uint32, nr uint32, args ...uint64) uint32 {
	t.Helper()
	var prog []unix.SockFilter
	for r := raw; len(r) >= 8; r = r[8:] {
		prog = append(prog, unix.SockFilter{Code: binary.NativeEndian.Uint16(r), Jt: r[2], Jf: r[3], K: binary.NativeEndian.Uint32(r[4:])})
	}
	data := make([]byte, 64)
	binary.NativeEndian.PutUint32(data, nr)
	binary.NativeEndian.PutUint32(data[4:], arch)
	for i, a := range args {
		binary.NativeEndian.PutUint64(data[16+8*i:], a)
	}
	var a, x uint32
	var mem [16]uint32
	for pc := 0; pc < len(prog); pc++ {
		in := prog[pc]
		jump := func(cond bool) {
			if cond {
				pc += int(in.Jt)
			} else {
				pc += int(in.Jf)
			}
		}
		switch in.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			a = binary.NativeEndian.Uint32(data[in.K:])
		case unix.BPF_LD | unix.BPF_IMM:
			a = in.K
		case unix.BPF_LD | unix.BPF_MEM:
			a = mem[in.K]
		case unix.BPF_ST:
			mem[in.K] = a
		case unix.BPF_MISC | unix.BPF_TAX:
			x = a
		case unix.BPF_MISC | unix.BPF_TXA:
			a = x
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			a &= in.K
		case unix.BPF_JMP | unix.BPF_JA:
			pc += int(in.K)
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			jump(a == in.K)
		case unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K:
			jump(a > in.K)
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			jump(a >= in.K)
		case unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			jump(a&in.K != 0)
		case unix.BPF_RET | unix.BPF_K:
			return in.K
		default:
			t.Fatalf("instruction %d: unknown code %#x", pc, in.Code)
		}
	}
	t.Fatal("program has no end")
	return 0
}

// runtimeDefault is containerd's default profile for these capabilities.
func runtimeDefault(caps ...string) *specs.LinuxSeccomp {
	return seccomp.DefaultProfile(&specs.Spec{
		Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: caps}},
		Linux:   &specs.Linux{},
	})
}

func TestCompileRuntimeDefault(t *testing.T) {
	p := runtimeDefault()
	if native(p) {
		for _, name := range initSyscalls {
			if !alwaysAllowed(p, name) {
				t.Errorf("%s is not always allowed", name)
			}
		}
		t.Fatalf("the default profile would fall back to libcontainer's own way (forks allowed: %v)", forksAllowed(p))
	}
	prog, err := compile(p)
	if err != nil {
		t.Fatal(err)
	}
	const (
		allow  = 0x7fff0000
		eperm  = 0x00050000 | uint32(unix.EPERM)
		enosys = 0x00050000 | uint32(unix.ENOSYS)
		x86_64 = unix.AUDIT_ARCH_X86_64
		i386   = unix.AUDIT_ARCH_I386
	)
	for _, c := range []struct {
		name string
		arch uint32
		nr   uint32
		args []uint64
		want uint32
	}{
		{"read", x86_64, unix.SYS_READ, nil, allow},
		{"openat", x86_64, unix.SYS_OPENAT, nil, allow},
		{"mount", x86_64, unix.SYS_MOUNT, nil, eperm},
		{"keyctl", x86_64, unix.SYS_KEYCTL, nil, eperm},
		{"clone of a thread", x86_64, unix.SYS_CLONE, []uint64{threadFlags}, allow},
		{"clone of a user namespace", x86_64, unix.SYS_CLONE, []uint64{unix.CLONE_NEWUSER}, eperm},
		{"clone3", x86_64, unix.SYS_CLONE3, nil, enosys},
		{"personality 0", x86_64, unix.SYS_PERSONALITY, []uint64{0}, allow},
		{"personality other", x86_64, unix.SYS_PERSONALITY, []uint64{1}, eperm},
		{"a system call of the future", x86_64, 600, nil, enosys},
		{"… of i386", i386, 600, nil, enosys},
		{"… of x32", x86_64, x32Bit | 600, nil, enosys},
		{"i386 write", i386, 4, nil, allow},
		{"i386 mount", i386, 21, nil, eperm},
		{"x32 read", x86_64, x32Bit, nil, allow}, // read is number 0
	} {
		if got := evaluate(t, prog, c.arch, c.nr, c.args...); got != c.want {
			t.Errorf("%s: %#x, want %#x", c.name, got, c.want)
		}
	}
	t.Logf("%d instructions", len(prog)/8)
}

func TestCompileDenyList(t *testing.T) {
	prog, err := compile(&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mount"}, Action: specs.ActErrno}}})
	if err != nil {
		t.Fatal(err)
	}
	for nr, want := range map[uint32]uint32{unix.SYS_READ: 0x7fff0000, unix.SYS_OPENAT: 0x7fff0000, 600: 0x7fff0000, unix.SYS_MOUNT: 0x00050000 | uint32(unix.EPERM)} {
		if got := evaluate(t, prog, unix.AUDIT_ARCH_X86_64, nr); got != want {
			t.Errorf("system call %d: %#x, want %#x", nr, got, want)
		}
	}
}

func TestNativeFallback(t *testing.T) {
	nothing := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno}
	all := &specs.LinuxSeccomp{DefaultAction: specs.ActAllow}
	enosys := uint(unix.ENOSYS)
	without := func(name string) *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{name}, Action: specs.ActErrno, ErrnoRet: &enosys}}}
	}
	for _, c := range []struct {
		name string
		p    *specs.LinuxSeccomp
		want bool
	}{
		{"empty", nothing, true},
		{"everything", all, false},
		{"without mount", without("mount"), false},
		{"without futex", without("futex"), true},
		{"clone3 answers ENOSYS", without("clone3"), false},
		{"without clone", without("clone"), true},
		{"notify", &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: specs.ActNotify}}}, true},
		{"open_tree kills", &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"open_tree"}, Action: specs.ActKillProcess}}}, true},
		{"unnamed calls kill", &specs.LinuxSeccomp{DefaultAction: specs.ActKillProcess, Syscalls: []specs.LinuxSyscall{{Names: append([]string{"clone", "clone3"}, initSyscalls...), Action: specs.ActAllow}}}, true},
		{"unnamed calls fail", &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: append([]string{"clone", "clone3"}, initSyscalls...), Action: specs.ActAllow}}}, false},
		{"write to one descriptor only", &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"write"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 5, Op: specs.OpEqualTo}}}}}, true},
	} {
		if got := native(c.p); got != c.want {
			t.Errorf("%s: native %v, want %v", c.name, got, c.want)
		}
	}
}

func BenchmarkCompile(b *testing.B) {
	p := runtimeDefault()
	for b.Loop() {
		if _, err := compile(p); err != nil {
			b.Fatal(err)
		}
	}
}
