package server

import "golang.org/x/sys/unix"

// x32Bit marks x32 system calls in the number.
const x32Bit = 1 << 30

// archLimit is the highest number a profile names for an architecture.
type archLimit struct {
	audit uint32
	x32   bool
	top   uint32
}

// enosysStub is put before a compiled filter: numbers above the limit of their
// architecture answer ENOSYS, so that programs built for newer kernels fall
// back instead of failing with the profile's EPERM; all else goes on to the
// filter.
//
//	load arch
//	for each architecture: jne audit, next
//	    load nr
//	    for each mode: (x86-64) jset x32 …; jgt top → ret ENOSYS; ja filter
//	…
func enosysStub(limits []archLimit) []unix.SockFilter {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		jeq   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		jgt   = unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K
		jset  = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		ja    = unix.BPF_JMP | unix.BPF_JA
		ret   = unix.BPF_RET | unix.BPF_K
		arch  = 4 // offsetof(struct seccomp_data, arch)
		nr    = 0
		errno = 0x00050000 | uint32(unix.ENOSYS) // SECCOMP_RET_ERRNO
	)
	byArch := map[uint32][]archLimit{}
	var order []uint32
	for _, l := range limits {
		if len(byArch[l.audit]) == 0 {
			order = append(order, l.audit)
		}
		byArch[l.audit] = append(byArch[l.audit], l)
	}
	// Sections first; jumps to the filter are filled in when its place is known.
	prog := []unix.SockFilter{{Code: load, K: arch}}
	var toFilter []int
	for _, audit := range order {
		section := []unix.SockFilter{{Code: load, K: nr}}
		var jumps []int
		for _, l := range byArch[audit] {
			top := l.top
			if audit == unix.AUDIT_ARCH_X86_64 {
				// Skip the next three when the call is of the other mode.
				if l.x32 {
					section = append(section, unix.SockFilter{Code: jset, K: x32Bit, Jf: 3})
					top |= x32Bit
				} else {
					section = append(section, unix.SockFilter{Code: jset, K: x32Bit, Jt: 3})
				}
			}
			section = append(section,
				unix.SockFilter{Code: jgt, K: top, Jf: 1},
				unix.SockFilter{Code: ret, K: errno},
				unix.SockFilter{Code: ja})
			jumps = append(jumps, len(section)-1)
		}
		section = append(section, unix.SockFilter{Code: ja})
		jumps = append(jumps, len(section)-1)
		prog = append(prog, unix.SockFilter{Code: jeq, K: audit, Jf: uint8(len(section))})
		for _, j := range jumps {
			toFilter = append(toFilter, len(prog)+j)
		}
		prog = append(prog, section...)
	}
	for _, i := range toFilter {
		prog[i].K = uint32(len(prog) - i - 1)
	}
	return prog
}
