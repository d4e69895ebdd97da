package tree

import (
	"context"
	"errors"
	"io/fs"
	"strconv"

	"golang.org/x/sys/unix"
)

// maxNested is how many directories are held open at once while a tree is
// removed: what lies deeper is moved up first.
const maxNested = 128

// Remove deletes name in dir and everything below it. It is fine when there is
// nothing. What cannot be deleted does not keep the rest; the error, an
// *fs.PathError, names one such path below dir. ErrMount: something is mounted
// there.
func Remove(ctx context.Context, dir int, name string) error {
	err := unlink(dir, name)
	if !errors.Is(err, unix.EISDIR) {
		return pathError("remove", name, err)
	}
	if err := rmdir(dir, name); !notEmpty(err) {
		return pathError("remove", name, err)
	}
	fd, err := open(dir, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return pathError("open", name, err)
	}
	err = Clear(ctx, fd)
	unix.Close(fd)
	if err != nil {
		return below(name, err)
	}
	return pathError("remove", name, rmdir(dir, name))
}

// Clear deletes everything below an open directory, as Remove does. Nothing
// called deep-<number> may be moved into it meanwhile.
func Clear(ctx context.Context, dir int) error {
	r := remover{ctx: ctx, top: dir}
	return r.clear(dir, 0)
}

// remover holds at most maxNested descriptors and reads directories in pieces.
type remover struct {
	ctx   context.Context
	top   int // where what is too deep is moved
	moved int
}

// clear empties the directory, in passes: what is read while entries go may
// lack some. It gives up when a pass has changed nothing.
func (r *remover) clear(dir, depth int) error {
	for {
		if _, err := unix.Seek(dir, 0, unix.SEEK_SET); err != nil {
			return err
		}
		gone, failed, err := r.pass(dir, depth)
		if err != nil {
			return err
		}
		if gone == 0 {
			return failed
		}
	}
}

// pass removes what it can of a directory; failed is why something stays.
func (r *remover) pass(dir, depth int) (gone int, failed, err error) {
	buf := make([]byte, readSize)
	for {
		if r.ctx.Err() != nil {
			return gone, failed, context.Cause(r.ctx)
		}
		names, err := someNames(dir, buf)
		if err != nil || len(names) == 0 {
			return gone, failed, err
		}
		for _, n := range names {
			err := r.remove(dir, n, depth)
			if r.ctx.Err() != nil {
				return gone, failed, err
			}
			if err != nil {
				failed = err
			} else {
				gone++
			}
		}
	}
}

func (r *remover) remove(dir int, name string, depth int) error {
	err := unlink(dir, name)
	if !errors.Is(err, unix.EISDIR) {
		return pathError("remove", name, err)
	}
	if err := rmdir(dir, name); !notEmpty(err) {
		return pathError("remove", name, err)
	}
	if depth >= maxNested {
		return pathError("move", name, r.moveUp(dir, name))
	}
	fd, err := open(dir, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return pathError("open", name, err)
	}
	err = r.clear(fd, depth+1)
	unix.Close(fd)
	if err != nil {
		return below(name, err)
	}
	return pathError("remove", name, rmdir(dir, name))
}

// moveUp moves a directory to the top, where a later pass finds it.
func (r *remover) moveUp(dir int, name string) error {
	for {
		err := unix.Renameat(dir, name, r.top, "deep-"+strconv.Itoa(r.moved))
		r.moved++
		if !notEmpty(err) && !errors.Is(err, unix.ENOTDIR) { // another one has that name
			return err
		}
	}
}

func unlink(dir int, name string) error {
	err := unix.Unlinkat(dir, name, 0)
	if err == unix.ENOENT {
		return nil
	}
	return err
}

func rmdir(dir int, name string) error {
	err := unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
	if err == unix.ENOENT {
		return nil
	}
	return err
}

func notEmpty(err error) bool {
	return errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST)
}

// pathError is nil when err is; an operation that a mount prevents says so.
func pathError(op, path string, err error) error {
	switch {
	case err == nil || errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EXDEV) && op == "open":
		err = ErrMount
	}
	return &fs.PathError{Op: op, Path: path, Err: err}
}

// below puts the name of a directory before the path of an error.
func below(name string, err error) error {
	var path *fs.PathError
	if errors.As(err, &path) && len(path.Path) < unix.PathMax {
		path.Path = name + "/" + path.Path
	}
	return err
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
