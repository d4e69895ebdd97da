package images

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"
)

// maxDepth of directories that are held open at once while a tree is walked.
const maxDepth = 128

// remover deletes trees by descriptor. It follows no link and crosses no
// mount, reads directories in pieces, and holds at most maxDepth descriptors:
// what lies deeper is moved up to flat first.
type remover struct {
	ctx  context.Context
	flat int // where to move what is too deep; -1: nowhere
	name func() string
}

// clear empties the directory.
func (r *remover) clear(dir, depth int) error {
	buf := make([]byte, 4<<10)
	for {
		// From the start each time: what is read while entries go may lack some.
		if _, err := unix.Seek(dir, 0, unix.SEEK_SET); err != nil {
			return err
		}
		found := false
		for {
			if r.ctx.Err() != nil {
				return context.Cause(r.ctx)
			}
			names, err := someNames(dir, buf)
			if err != nil {
				return err
			}
			if len(names) == 0 {
				break
			}
			found = true
			for _, n := range names {
				if err := r.remove(dir, n, depth); err != nil && !errors.Is(err, unix.ENOENT) {
					return err
				}
			}
		}
		if !found {
			return nil
		}
	}
}

func (r *remover) remove(dir int, name string, depth int) error {
	err := unix.Unlinkat(dir, name, 0)
	if !errors.Is(err, unix.EISDIR) {
		return err
	}
	if err := unix.Unlinkat(dir, name, unix.AT_REMOVEDIR); !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
		return err
	}
	if depth >= maxDepth && r.flat >= 0 {
		return unix.Renameat(dir, name, r.flat, r.name())
	}
	fd, err := openBeneath(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	err = r.clear(fd, depth+1)
	unix.Close(fd)
	if err != nil {
		return err
	}
	return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
}

// removeAt deletes name and everything below it.
func removeAt(dir int, name string) error {
	r := remover{ctx: context.Background(), flat: -1}
	return r.remove(dir, name, 0)
}

// someNames reads the next entries of a directory, none at its end.
func someNames(dir int, buf []byte) ([]string, error) {
	for {
		n, err := unix.ReadDirent(dir, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return nil, err
		}
		if _, _, names := unix.ParseDirent(buf[:n], -1, nil); len(names) > 0 {
			return names, nil
		} // only "." and "..": on
	}
}
