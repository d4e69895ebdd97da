package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxSocketPath is sun_path's size less its terminating zero (unix(7)).
const maxSocketPath = 107

// Listen opens the unix socket at path with mode 0600 and takes the place of a
// dead one. It is errdefs.ErrAlreadyExists when somebody answers there.
func Listen(path string) (net.Listener, error) {
	if c, err := Dial(context.Background(), path); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on %s: another daemon answers there; give this one its own --run-dir: %w", path, errdefs.ErrAlreadyExists)
	}
	if st, err := os.Lstat(path); err == nil {
		if st.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("listen on %s: in the way of the socket is a %s: %w", path, st.Mode().Type(), errdefs.ErrAlreadyExists)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("replace dead socket: %w", err)
		}
	}
	short, done, err := shortPath(path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	defer done()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// The inode takes its mode from the socket at bind(2): at no time can
		// others connect, and the process' umask is left alone.
		var err error
		if cerr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); cerr != nil {
			return cerr
		}
		return err
	}}
	l, err := lc.Listen(context.Background(), "unix", short)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if short != path {
		// The name given to bind is gone when this function returns.
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		return &unlinkListener{l, path}, nil
	}
	return l, nil
}

type unlinkListener struct {
	net.Listener
	path string
}

func (l *unlinkListener) Close() error {
	err := os.Remove(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(l.Listener.Close(), err)
}

// Dial connects to the socket at path, however long the path is.
func Dial(ctx context.Context, path string) (net.Conn, error) {
	short, done, err := shortPath(path)
	if err != nil {
		return nil, err
	}
	defer done()
	d := net.Dialer{Timeout: 5 * time.Second}
	return d.DialContext(ctx, "unix", short)
}

// shortPath names path within what a socket address holds; the name is good
// until done.
func shortPath(path string) (short string, done func(), err error) {
	if len(path) <= maxSocketPath {
		return path, func() {}, nil
	}
	fd, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, &os.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", fd, filepath.Base(path)), func() { unix.Close(fd) }, nil
}
