package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Pin keeps the network namespace of process pid alive under path, which is
// created with its directory: a bind mount of the namespace's file. Whatever
// was at path before is replaced when it is a pinned namespace, and an error
// when it is anything else. errdefs.ErrNotFound: there is no such process.
func Pin(pid int, path string) (err error) {
	src, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		err = errdefs.ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("network namespace of process %d: %w", pid, err)
	}
	defer unix.Close(src)
	if err := Unpin(path); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("pin network namespace: %w", err)
	}
	dst, err := unix.Open(path, unix.O_RDONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o444)
	if err != nil {
		return fmt.Errorf("pin network namespace at %s: %w", path, err)
	}
	defer unix.Close(dst)
	if err := unix.Mount(fdPath(src), fdPath(dst), "", unix.MS_BIND, ""); err != nil {
		_ = unix.Unlink(path)
		return fmt.Errorf("pin network namespace at %s: %w", path, err)
	}
	return nil
}

// Unpin drops what Pin made. It succeeds when there is nothing. It never
// unmounts or removes anything but a namespace's file or the empty file below
// it.
func Unpin(path string) error {
	for {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unpin network namespace at %s: %w", path, err)
		}
		var fs unix.Statfs_t
		var st unix.Stat_t
		err = errors.Join(unix.Fstatfs(fd, &fs), unix.Fstat(fd, &st))
		unix.Close(fd)
		switch {
		case err != nil:
			return fmt.Errorf("unpin network namespace at %s: %w", path, err)
		case fs.Type == unix.NSFS_MAGIC:
			// Lazy: somebody inside keeps the namespace, not the mount.
			err = unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("unpin network namespace at %s: %w", path, err)
			}
			continue // several may be stacked
		case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != 0:
			return fmt.Errorf("unpin network namespace: %s is not one: %w", path, errdefs.ErrFailedPrecondition)
		}
		if err := unix.Unlink(path); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unpin network namespace at %s: %w", path, err)
		}
		return nil
	}
}

// Create makes a new network namespace and pins it at path, for pods whose
// network must be ready before their first process.
func Create(path string) error {
	errc := make(chan error, 1)
	go func() {
		// The thread is never unlocked: it dies with the goroutine, and with
		// it the last tie to the new namespace but the pin.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			errc <- fmt.Errorf("new network namespace: %w", err)
			return
		}
		errc <- pinThread(path)
	}()
	return <-errc
}

func pinThread(path string) error { return Pin(unix.Gettid(), path) }

// Do runs fn with its OS thread inside the network namespace at path (a pinned
// file or /proc/PID/ns/net). fn must not start goroutines that are meant to be
// in there. errdefs.ErrNotFound: there is no such namespace.
func Do(path string, fn func() error) error {
	fd, err := open(path)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return doFD(fd, fn)
}

// open opens a namespace's file and makes sure that it is one: an unpinned
// file is empty, and setns on it a puzzling EINVAL.
func open(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOENT) {
		return -1, fmt.Errorf("network namespace %s: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return -1, fmt.Errorf("network namespace %s: %w", path, err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil || fs.Type != unix.NSFS_MAGIC {
		unix.Close(fd)
		return -1, fmt.Errorf("network namespace %s: it is no namespace's file any more: %w", path, errdefs.ErrNotFound)
	}
	return fd, nil
}

// doFD is Do by descriptor. A thread that cannot be brought back is given up:
// Go ends a locked thread with its goroutine.
func doFD(fd int, fn func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			errc <- fmt.Errorf("own network namespace: %w", err)
			return
		}
		defer unix.Close(home)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			errc <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		err = errEnded
		defer func() { // also when fn ends the goroutine
			if unix.Setns(home, unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
			errc <- err
		}()
		err = fn()
	}()
	return <-errc
}

var errEnded = errors.New("work in the network namespace ended its goroutine")

func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }
