package tree

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

// Entry is what a walk has come to.
type Entry struct {
	Name string
	// FD is an O_PATH descriptor of what Name is, for the time of the visit.
	FD   int
	Stat unix.Stat_t
}

// Dir says whether the entry is a directory.
func (e *Entry) Dir() bool { return e.Stat.Mode&unix.S_IFMT == unix.S_IFDIR }

// Stepper paces a walk: it is told of each entry before it is looked at. *Turn
// is one.
type Stepper interface {
	Step(ctx context.Context) error
}

const (
	// keptOpen is how many levels from the root on stay open while a walk is
	// below them. Programs that move directories about while they are walked do
	// so near the root.
	keptOpen = 32
	// readSize of a directory: some 60 names.
	readSize = 4 << 10
)

// Walk visits everything below the directory root, a directory before what is
// in it. An error of visit ends the walk and is returned; fs.SkipDir spares what
// is in the directory just visited. What vanishes meanwhile, and what another
// filesystem is mounted on, is left out. pace may be nil. The offset of root is
// not touched.
//
// Of a level deeper than keptOpen only its identity and the place in it are
// kept: the way back leads by "..", and is believed when it leads to the same
// directory.
func Walk(ctx context.Context, root int, pace Stepper, visit func(*Entry) error) error {
	w := walk{ctx: ctx, pace: pace, visit: visit}
	defer w.close()
	fd, err := open(root, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	if err := w.push(fd); err != nil {
		return err
	}
	for len(w.levels) > 0 {
		if err := w.step(); err != nil {
			return err
		}
	}
	return nil
}

// level is a directory that the walk is in.
type level struct {
	fd       int // -1: closed
	dev, ino uint64
	next     int64  // where reading goes on
	rest     []byte // read and not looked at yet
}

type walk struct {
	ctx    context.Context
	pace   Stepper
	visit  func(*Entry) error
	levels []level
	buf    [readSize]byte
}

func (w *walk) close() {
	for i := range w.levels {
		if w.levels[i].fd >= 0 {
			unix.Close(w.levels[i].fd)
		}
	}
}

// push enters an open directory, which is the walk's from now on.
func (w *walk) push(fd int) error {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil && len(w.levels) >= maxDepth {
		err = ErrDeep
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	if n := len(w.levels); n > 0 {
		up := &w.levels[n-1]
		if n > keptOpen {
			unix.Close(up.fd)
			up.fd, up.rest = -1, nil
		} else {
			up.rest = bytes.Clone(up.rest) // buf is for the new level
		}
	}
	w.levels = append(w.levels, level{fd: fd, dev: st.Dev, ino: st.Ino})
	return nil
}

// step looks at one entry of the deepest level, or leaves it.
func (w *walk) step() error {
	l := &w.levels[len(w.levels)-1]
	name, err := w.name(l)
	if err != nil {
		return err
	}
	if name == "" {
		return w.pop()
	}
	if w.pace != nil {
		err = w.pace.Step(w.ctx)
	} else {
		err = w.ctx.Err()
	}
	if err != nil {
		return err
	}
	sub, err := w.one(l.fd, name)
	if err != nil || sub < 0 {
		return err
	}
	return w.push(sub)
}

// one visits an entry, and returns the directory to go on in, -1 if it is none.
func (w *walk) one(dir int, name string) (sub int, err error) {
	fd, err := open(dir, name, unix.O_PATH)
	if passed(err) {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("open %q: %w", name, err)
	}
	defer unix.Close(fd)
	e := Entry{Name: name, FD: fd}
	if err := unix.Fstat(fd, &e.Stat); err != nil {
		return -1, fmt.Errorf("stat %q: %w", name, err)
	}
	if err := w.visit(&e); errors.Is(err, fs.SkipDir) {
		return -1, nil
	} else if err != nil {
		return -1, err
	}
	if !e.Dir() {
		return -1, nil
	}
	// Of the descriptor, not of the name: it is what was visited.
	sub, err = open(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if passed(err) {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("open %q: %w", name, err)
	}
	return sub, nil
}

// passed says that an entry is gone meanwhile, or another mount's.
func passed(err error) bool {
	return err == unix.ENOENT || err == unix.ESTALE || err == unix.EXDEV
}

// pop leaves the deepest level.
func (w *walk) pop() error {
	n := len(w.levels) - 1
	child := w.levels[n].fd
	w.levels = w.levels[:n]
	defer unix.Close(child)
	if n == 0 || w.levels[n-1].fd >= 0 {
		return nil
	}
	up := &w.levels[n-1]
	fd, err := open(child, "..", unix.O_RDONLY|unix.O_DIRECTORY)
	if passed(err) {
		return ErrMoved
	}
	if err != nil {
		return fmt.Errorf("way back from a directory: %w", err)
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && (st.Dev != up.dev || st.Ino != up.ino) {
		err = ErrMoved
	}
	if err == nil {
		_, err = unix.Seek(fd, up.next, unix.SEEK_SET)
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	up.fd = fd
	return nil
}

// name is the next entry of a level, "" at its end.
func (w *walk) name(l *level) (string, error) {
	for {
		if len(l.rest) == 0 {
			n, err := unix.ReadDirent(l.fd, w.buf[:])
			if err == unix.EINTR {
				continue
			}
			if err == unix.ENOENT || err == nil && n == 0 { // ENOENT: it was removed
				return "", nil
			}
			if err != nil {
				return "", fmt.Errorf("read directory: %w", err)
			}
			l.rest = w.buf[:n]
		}
		var name string
		name, l.next, l.rest = dirent(l.rest)
		if name != "." && name != ".." && name != "" {
			return name, nil
		}
	}
}

// dirent takes the first struct linux_dirent64 off a buffer: its name, and the
// offset of the entry behind it. The kernel writes whole ones.
func dirent(buf []byte) (name string, next int64, rest []byte) {
	const head = 19 // u64 d_ino, s64 d_off, u16 d_reclen, u8 d_type
	if len(buf) < head {
		return "", 0, nil
	}
	size := int(binary.NativeEndian.Uint16(buf[16:]))
	if size < head || size > len(buf) {
		return "", 0, nil
	}
	text := buf[head:size]
	if i := bytes.IndexByte(text, 0); i >= 0 {
		text = text[:i]
	}
	return string(text), int64(binary.NativeEndian.Uint64(buf[8:])), buf[size:]
}
