package server

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// lastSignal is the kernel's _NSIG.
const lastSignal = 64

// sigaction is the kernel's struct sigaction on 64-bit architectures
// (include/uapi/asm-generic/signal.h and x86's).
type sigaction struct {
	handler, flags, restorer uintptr
	mask                     uint64
}

const (
	sigDefault = 0
	sigIgnore  = 1
)

// heedSignals undoes what whoever started us ignores, because what is ignored
// stays so in every container. os/signal does not reach all of them: a program
// started by make, for one, ignores signal 32, which glibc's posix_spawn keeps
// for itself.
func heedSignals() {
	for sig := uintptr(1); sig <= lastSignal; sig++ {
		var act sigaction
		_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, 0, uintptr(unsafe.Pointer(&act)), 8, 0, 0)
		if errno != 0 || act.handler != sigIgnore {
			continue
		}
		act = sigaction{handler: sigDefault}
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&act)), 0, 8, 0, 0)
	}
}
