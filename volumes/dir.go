package volumes

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// dir is an open directory. All work in pods' directories goes from descriptor
// to descriptor, one component at a time, and never through a link.
type dir struct {
	fd   int
	name string
}

// openDir opens a path of the administrator's, links included.
func openDir(path string) (*dir, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return &dir{fd: fd, name: path}, nil
}

func (d *dir) close() {
	if d != nil && d.fd >= 0 {
		unix.Close(d.fd)
		d.fd = -1
	}
}

// openDir opens a directory that name itself is, not a link to one.
func (d *dir) openDir(name string) (*dir, error) {
	fd, err := retry(func() (int, error) {
		return unix.Openat(d.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: d.name + "/" + name, Err: err}
	}
	return &dir{fd: fd, name: d.name + "/" + name}, nil
}

// makeDir opens a directory and makes it if it is not there.
func (d *dir) makeDir(name string, mode uint32) (*dir, error) {
	sub, err := d.openDir(name)
	if !errors.Is(err, os.ErrNotExist) {
		return sub, err
	}
	if err := unix.Mkdirat(d.fd, name, mode); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, &os.PathError{Op: "mkdir", Path: d.name + "/" + name, Err: err}
	}
	return d.openDir(name)
}

// walk opens a directory some levels down.
func (d *dir) walk(names ...string) (*dir, error) {
	at := d
	for _, name := range names {
		next, err := at.openDir(name)
		if at != d {
			at.close()
		}
		if err != nil {
			return nil, err
		}
		at = next
	}
	return at, nil
}

// maxNames of a directory that podd alone writes into: a ConfigMap has a
// megabyte at most, so no volume has as many keys.
const maxNames = 1 << 16

// names lists a directory of podd's own from its start.
func (d *dir) names() ([]string, error) {
	// A fresh description, so that the offset is nobody else's.
	fd, err := unix.Openat(d.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: d.name, Err: err}
	}
	f := os.NewFile(uintptr(fd), d.name)
	defer f.Close()
	names, err := f.Readdirnames(maxNames)
	if errors.Is(err, io.EOF) {
		err = nil // it is empty
	}
	if err == nil && len(names) == maxNames {
		err = fmt.Errorf("%s: more than %d names in a directory that podd writes: %w", d.name, maxNames-1, errdefs.ErrFailedPrecondition)
	}
	return names, err
}

// retry repeats a call that a signal interrupted.
func retry[T any](f func() (T, error)) (T, error) {
	for {
		r, err := f()
		if err != unix.EINTR {
			return r, err
		}
	}
}
