// Package program holds small programs in sealed memfds and names them for a
// fork and exec, so that no container can change what runs next
// (CVE-2019-5736) and nothing on disk is needed.
package program

import (
	"fmt"
	"os"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Program is an executable in a sealed memfd.
type Program struct{ file *os.File }

// New seals data as a program; name is what the kernel shows of it.
func New(name string, data []byte) (*Program, error) {
	if len(data) == 0 {
		return nil, fmt.Errorf("program %s is missing in this build; use cmd/podd-shim/build.sh: %w", name, errdefs.ErrFailedPrecondition)
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if err == unix.EINVAL { // before Linux 6.3
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd for %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.Write(data); err != nil {
		f.Close()
		return nil, err
	}
	if err := unix.Fchmod(fd, 0o555); err != nil {
		f.Close()
		return nil, fmt.Errorf("mode of %s: %w", name, err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		f.Close()
		return nil, fmt.Errorf("seal %s: %w", name, err)
	}
	return &Program{f}, nil
}

// Close gives the memfd back.
func (p *Program) Close() error { return p.file.Close() }

// Descriptor returns a descriptor of the program for one fork that hands on the
// files numbered, all of them; Path names it and the caller closes it
// afterwards.
//
// Before the child executes anything, Go's runtime moves files out of the way
// of others, to numbers right above the highest of files: a program that had
// such a number would be overwritten in the child, and what is executed in its
// place would be a pipe (EACCES). So this one is put above all that can be
// reached.
func (p *Program) Descriptor(files ...uintptr) (int, error) {
	least := len(files)
	for _, f := range files {
		least = max(least, int(f)+1)
	}
	least += len(files) + 2 // each may be moved, and the runtime's own pipe
	fd, err := unix.FcntlInt(p.file.Fd(), unix.F_DUPFD_CLOEXEC, least)
	if err != nil {
		return -1, fmt.Errorf("descriptor of %s: %w", p.file.Name(), err)
	}
	return fd, nil
}

// Path is the name of a descriptor of the process that opens it.
func Path(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }
