package netns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// defaultLockDir is none of an instance's own directories: instances with
// different ones share the host's network namespace. /run is root's alone.
const defaultLockDir = "/run/podd-netns"

const (
	// lockWait is how long others may hold the lock: setting the network up
	// takes some 15 ms.
	lockWait = 10 * time.Second
	lockPoll = 10 * time.Millisecond
)

// hostLock serialises what instances of podd do with one network namespace: a
// lock on a file that is named after the namespace, in a directory that only
// root has. The namespace's own file can be locked by everybody who is in it.
//
// The file goes with the lock. Who waits for it holds one that is no longer
// there then, and begins anew.
type hostLock struct{ dir string }

// lock waits for at most lockWait. errdefs.ErrUnavailable: somebody else has it.
func (l hostLock) lock(ctx context.Context) (unlock func(), err error) {
	var ns unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &ns); err != nil {
		return nil, fmt.Errorf("network namespace of the host: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	name := strconv.FormatUint(ns.Ino, 10)
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for {
		unlock, err := l.try(name)
		if err != nil || unlock != nil {
			return unlock, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("another podd of this host has held %s for long: see what it waits for: %w: %w", filepath.Join(l.dir, name), context.Cause(ctx), errdefs.ErrUnavailable)
		case <-tick.C:
		}
	}
}

// try to take the lock; nil without an error: somebody has it.
func (l hostLock) try(name string) (unlock func(), err error) {
	dir, err := l.open()
	if errors.Is(err, unix.ENOENT) {
		return nil, nil // the directory has just gone with another's lock
	}
	if err != nil {
		return nil, err
	}
	fd, err := unix.Openat(dir, name, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		unix.Close(dir)
		if errors.Is(err, unix.ENOENT) {
			return nil, nil // as above
		}
		return nil, &os.PathError{Op: "open", Path: filepath.Join(l.dir, name), Err: err}
	}
	release := func() { unix.Close(fd); unix.Close(dir) }
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		release()
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, unix.EINTR) {
			return nil, nil
		}
		return nil, fmt.Errorf("lock %s: %w", filepath.Join(l.dir, name), err)
	}
	var mine, there unix.Stat_t
	if unix.Fstat(fd, &mine) != nil || unix.Fstatat(dir, name, &there, unix.AT_SYMLINK_NOFOLLOW) != nil || mine.Ino != there.Ino || mine.Dev != there.Dev {
		release()
		return nil, nil
	}
	return func() {
		_ = unix.Unlinkat(dir, name, 0)
		_ = unix.Rmdir(l.dir) // the last one's
		release()
	}, nil
}

// open the directory, made if it is not there. errdefs.ErrFailedPrecondition:
// it is not root's alone.
func (l hostLock) open() (int, error) {
	if _, err := os.Stat(filepath.Dir(l.dir)); err != nil {
		return -1, fmt.Errorf("directory of the lock %s: %v: %w", l.dir, err, errdefs.ErrFailedPrecondition)
	}
	if err := unix.Mkdir(l.dir, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, &os.PathError{Op: "mkdir", Path: l.dir, Err: err}
	}
	fd, err := unix.Open(l.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: l.dir, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, &os.PathError{Op: "stat", Path: l.dir, Err: err}
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		unix.Close(fd)
		return -1, fmt.Errorf("%s is owned by %d with mode %o, want podd's own with 700: remove it: %w", l.dir, st.Uid, st.Mode&0o7777, errdefs.ErrFailedPrecondition)
	}
	return fd, nil
}
