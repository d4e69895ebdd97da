package kubelet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/kubelet/server/api"
)

// lockFile is in every directory that is podd's.
const lockFile = "podd.lock"

// lockPatience is waited for a lock: a podd that was killed just now may have
// left a child between fork and execve, which has its descriptors until then.
const lockPatience = 2 * time.Second

// lock makes dir, for root alone, and takes it for this process. The kernel
// gives it back when the process ends, however it ends.
func lock(dir string) (unlock func(), err error) {
	if err := makePrivate(dir); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, lockFile)
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	for deadline := time.Now().Add(lockPatience); err != nil && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
		err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		file.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s is in use by another podd: stop that one, or give this one directories of its own (--data-dir, --run-dir): %w", dir, errdefs.ErrAlreadyExists)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { file.Close() }, nil
}

// makePrivate leaves dir to root. Whatever a container does to its root file
// system (set-user-ID programs, say) must not be within reach of the node's
// users (CVE-2021-41103). A directory that is wider is narrowed if it is podd's
// or empty, as a new disk is; the rest is somebody else's.
func makePrivate(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	st, err := d.Stat()
	if err != nil {
		return err
	}
	if st.Mode()&(0o077|os.ModeSticky) == 0 {
		return nil
	}
	names, err := d.Readdirnames(16)
	if err != nil && len(names) > 0 {
		return err
	}
	for _, name := range names {
		switch name {
		case lockFile, "shim", api.LastName:
			return d.Chmod(0o700)
		}
	}
	for _, name := range names {
		if name != "lost+found" {
			return fmt.Errorf("%s holds files of others and has mode %v: podd's directories are for root alone, so give it one of its own (--data-dir, --run-dir): %w",
				dir, st.Mode().Perm(), errdefs.ErrFailedPrecondition)
		}
	}
	return d.Chmod(0o700)
}
