//go:build cgo && seccomp

package server

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"

	libseccomp "github.com/seccomp/libseccomp-golang"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// seccompBuiltIn says that this binary was built with libseccomp.
const seccompBuiltIn = true

// compile turns a profile into a BPF program as runc would: unknown system
// call names are ignored, the default errno is EPERM, and numbers above the
// highest the profile knows give ENOSYS instead of a default action that denies.
func compile(p *specs.LinuxSeccomp) ([]byte, error) {
	def, err := scmpAction(p.DefaultAction, p.DefaultErrnoRet)
	if err != nil {
		return nil, fmt.Errorf("default action: %w", err)
	}
	filter, err := libseccomp.NewFilter(def)
	if err != nil {
		return nil, fmt.Errorf("new filter: %w", err)
	}
	defer filter.Release()
	arches := []libseccomp.ScmpArch{}
	native, err := libseccomp.GetNativeArch()
	if err != nil {
		return nil, fmt.Errorf("native architecture: %w", err)
	}
	arches = append(arches, native)
	for _, a := range p.Architectures {
		arch, err := libseccomp.GetArchFromString(scmpArchName(a))
		if err != nil {
			return nil, fmt.Errorf("architecture %q: %w: %w", a, err, errdefs.ErrInvalidArgument)
		}
		if err := filter.AddArch(arch); err != nil {
			return nil, fmt.Errorf("add architecture %q: %w", a, err)
		}
		if arch != native {
			arches = append(arches, arch)
		}
	}
	count := 0
	for _, s := range p.Syscalls {
		count += len(s.Names)
	}
	if count > 32 {
		_ = filter.SetOptimize(2) // binary tree; older libraries lack it
	}
	if err := filter.SetNoNewPrivsBit(false); err != nil {
		return nil, fmt.Errorf("no_new_privs attribute: %w", err)
	}
	for _, s := range p.Syscalls {
		action, err := scmpAction(s.Action, s.ErrnoRet)
		if err != nil {
			return nil, fmt.Errorf("action of %v: %w", s.Names, err)
		}
		if action == def {
			continue // libseccomp refuses rules that repeat the default
		}
		for _, name := range s.Names {
			nr, err := libseccomp.GetSyscallFromName(name)
			if err != nil {
				continue // not of this architecture, or newer than the library
			}
			if err := addRules(filter, nr, action, s.Args); err != nil {
				return nil, fmt.Errorf("rule for %s: %w", name, err)
			}
		}
	}
	raw, err := export(filter)
	if err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	var prog []unix.SockFilter
	for r := raw; len(r) >= 8; r = r[8:] {
		prog = append(prog, unix.SockFilter{Code: binary.NativeEndian.Uint16(r), Jt: r[2], Jf: r[3], K: binary.NativeEndian.Uint32(r[4:])})
	}
	if !permits(p.DefaultAction) && p.DefaultAction != specs.ActTrace {
		// Where unknown calls are allowed anyway the kernel answers them.
		prog = append(enosysStub(highest(p, arches)), prog...)
	}
	if len(prog) > 4096 {
		return nil, fmt.Errorf("seccomp program has %d instructions, the kernel takes 4096: %w", len(prog), errdefs.ErrInvalidArgument)
	}
	var buf bytes.Buffer
	if err := binary.Write(&buf, binary.NativeEndian, prog); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// export returns the program. libseccomp before 2.6 writes it only to a file.
func export(filter *libseccomp.ScmpFilter) ([]byte, error) {
	fd, err := unix.MemfdCreate("bpf", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "bpf")
	defer f.Close()
	if err := filter.ExportBPF(f); err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return io.ReadAll(f)
}

// addRules adds one rule of all conditions; conditions that repeat an argument
// become rules of their own, as runc has it.
func addRules(filter *libseccomp.ScmpFilter, nr libseccomp.ScmpSyscall, action libseccomp.ScmpAction, args []specs.LinuxSeccompArg) error {
	if len(args) == 0 {
		return filter.AddRule(nr, action)
	}
	var seen [6]bool
	repeated := false
	var conds []libseccomp.ScmpCondition
	for _, a := range args {
		if a.Index > 5 {
			return fmt.Errorf("argument index %d: %w", a.Index, errdefs.ErrInvalidArgument)
		}
		repeated = repeated || seen[a.Index]
		seen[a.Index] = true
		op, ok := scmpOps[a.Op]
		if !ok {
			return fmt.Errorf("operator %q: %w", a.Op, errdefs.ErrInvalidArgument)
		}
		c, err := libseccomp.MakeCondition(a.Index, op, a.Value, a.ValueTwo)
		if err != nil {
			return err
		}
		conds = append(conds, c)
	}
	if !repeated {
		return filter.AddRuleConditional(nr, action, conds)
	}
	for _, c := range conds {
		if err := filter.AddRuleConditional(nr, action, []libseccomp.ScmpCondition{c}); err != nil {
			return err
		}
	}
	return nil
}

var scmpOps = map[specs.LinuxSeccompOperator]libseccomp.ScmpCompareOp{
	specs.OpNotEqual:     libseccomp.CompareNotEqual,
	specs.OpLessThan:     libseccomp.CompareLess,
	specs.OpLessEqual:    libseccomp.CompareLessOrEqual,
	specs.OpEqualTo:      libseccomp.CompareEqual,
	specs.OpGreaterEqual: libseccomp.CompareGreaterEqual,
	specs.OpGreaterThan:  libseccomp.CompareGreater,
	specs.OpMaskedEqual:  libseccomp.CompareMaskedEqual,
}

func scmpAction(a specs.LinuxSeccompAction, errno *uint) (libseccomp.ScmpAction, error) {
	code := int16(unix.EPERM)
	if errno != nil {
		code = int16(*errno)
	}
	switch a {
	case specs.ActKill, specs.ActKillThread:
		return libseccomp.ActKillThread, nil
	case specs.ActKillProcess:
		return libseccomp.ActKillProcess, nil
	case specs.ActTrap:
		return libseccomp.ActTrap, nil
	case specs.ActErrno:
		return libseccomp.ActErrno.SetReturnCode(code), nil
	case specs.ActTrace:
		return libseccomp.ActTrace.SetReturnCode(code), nil
	case specs.ActAllow:
		return libseccomp.ActAllow, nil
	case specs.ActLog:
		return libseccomp.ActLog, nil
	}
	return libseccomp.ActInvalid, fmt.Errorf("action %q: %w", a, errdefs.ErrInvalidArgument)
}

// scmpArchName maps SCMP_ARCH_X86_64 to libseccomp's amd64 and so on.
func scmpArchName(a specs.Arch) string {
	names := map[specs.Arch]string{
		specs.ArchX86: "x86", specs.ArchX86_64: "amd64", specs.ArchX32: "x32",
		specs.ArchARM: "arm", specs.ArchAARCH64: "arm64",
		specs.ArchMIPS: "mips", specs.ArchMIPS64: "mips64", specs.ArchMIPS64N32: "mips64n32",
		specs.ArchMIPSEL: "mipsel", specs.ArchMIPSEL64: "mipsel64", specs.ArchMIPSEL64N32: "mipsel64n32",
		specs.ArchPPC: "ppc", specs.ArchPPC64: "ppc64", specs.ArchPPC64LE: "ppc64le",
		specs.ArchS390: "s390", specs.ArchS390X: "s390x", specs.ArchRISCV64: "riscv64",
		specs.ArchLOONGARCH64: "loong64",
	}
	return names[a]
}

// highest finds the largest system call number that the profile names, for
// each of the kernel's architectures; x32 shares x86-64's and is told apart by
// a bit of the number.
func highest(p *specs.LinuxSeccomp, arches []libseccomp.ScmpArch) []archLimit {
	var limits []archLimit
	for _, arch := range arches {
		audit, x32, ok := auditArch(arch)
		if !ok {
			continue
		}
		var top uint32
		for _, s := range p.Syscalls {
			for _, name := range s.Names {
				if nr, err := libseccomp.GetSyscallFromNameByArch(name, arch); err == nil && nr >= 0 {
					top = max(top, uint32(nr)&^x32Bit)
				}
			}
		}
		if top > 0 {
			limits = append(limits, archLimit{audit: audit, x32: x32, top: top})
		}
	}
	return limits
}

func auditArch(a libseccomp.ScmpArch) (audit uint32, x32, ok bool) {
	switch a {
	case libseccomp.ArchX86:
		return unix.AUDIT_ARCH_I386, false, true
	case libseccomp.ArchAMD64:
		return unix.AUDIT_ARCH_X86_64, false, true
	case libseccomp.ArchX32:
		return unix.AUDIT_ARCH_X86_64, true, true
	case libseccomp.ArchARM:
		return unix.AUDIT_ARCH_ARM, false, true
	case libseccomp.ArchARM64:
		return unix.AUDIT_ARCH_AARCH64, false, true
	}
	return 0, false, false
}
