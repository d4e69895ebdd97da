package server

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// reserve gives f blocks for size bytes from off on, so that no later write
// there, through a mapping or not, can fail for lack of room. Blocks that are
// there keep their content; the file grows to hold the rest. Where the file
// system has no fallocate(2) the bytes are written as they are read.
func reserve(f *os.File, off, size int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), 0, off, size)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			return fill(f, off, size)
		default:
			return fmt.Errorf("reserve %d bytes of %s: %w", size, f.Name(), err)
		}
	}
}

// fill writes the bytes of the range as they are, holes as zeros.
func fill(f *os.File, off, size int64) error {
	buf := make([]byte, size)
	if _, err := f.ReadAt(buf, off); err != nil && err != io.EOF {
		return fmt.Errorf("reserve %d bytes of %s: %w", size, f.Name(), err)
	}
	if _, err := f.WriteAt(buf, off); err != nil {
		return fmt.Errorf("reserve %d bytes of %s: %w", size, f.Name(), err)
	}
	return nil
}

// full says that a write failed for lack of room, which may be there later.
func full(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}
