package volumes

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// openVolume opens the directory that a volume is.
func openVolume(p string) (*dir, error) {
	fd, err := unix.Open(p, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOTDIR) {
		return nil, fmt.Errorf("volume %s is not a directory: %w", p, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: p, Err: err}
	}
	return &dir{fd: fd, name: p}, nil
}

// openBeneath resolves a path inside an open directory. Links inside are
// followed as long as they stay inside; the kernel refuses all that leave it,
// at the moment of the look-up, so there is nothing to exchange afterwards
// (CVE-2017-1002101, CVE-2021-25741).
func openBeneath(root *dir, p string, flags uint64) (int, error) {
	for try := 0; ; try++ {
		fd, err := unix.Openat2(root.fd, p, &unix.OpenHow{
			Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS,
		})
		// EAGAIN: something on the way was renamed meanwhile, and the kernel
		// cannot tell whether the path stayed inside.
		if (errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)) && try < 128 {
			continue
		}
		return fd, err
	}
}

// bindSubPath binds sub of the volume root on target, which does not exist yet.
// A subPath that is missing becomes a directory.
func bindSubPath(root *dir, sub, target string) error {
	sub = path.Clean(sub)
	fd, err := openBeneath(root, sub, unix.O_PATH)
	if errors.Is(err, unix.ENOENT) {
		if err := makeBeneath(root, sub); err != nil {
			return err
		}
		fd, err = openBeneath(root, sub, unix.O_PATH)
	}
	if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.ELOOP) {
		return fmt.Errorf("leads out of the volume: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("look up in the volume: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}

	up, err := openDir(path.Dir(target))
	if err != nil {
		return err
	}
	defer up.close()
	name := path.Base(target)
	place := unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = unix.Mkdirat(up.fd, name, 0o750)
		place |= unix.O_DIRECTORY
	} else {
		err = unix.Mknodat(up.fd, name, unix.S_IFREG|0o640, 0)
	}
	if err != nil {
		return &os.PathError{Op: "create", Path: target, Err: err}
	}
	at, err := unix.Openat(up.fd, name, place, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: target, Err: err}
	}
	defer unix.Close(at)
	// Bind what was found, by its descriptor, on the place, by its descriptor:
	// no path is looked up again.
	tree, err := unix.OpenTree(fd, "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return &os.PathError{Op: "bind", Path: target, Err: err}
	}
	defer unix.Close(tree)
	if err := unix.MoveMount(tree, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "bind", Path: target, Err: err}
	}
	return nil
}

// makeBeneath makes the directories of a path inside an open directory, with
// the mode of the volume's root, whatever the umask, as upstream does.
func makeBeneath(root *dir, sub string) error {
	var st unix.Stat_t
	if err := unix.Fstat(root.fd, &st); err != nil {
		return err
	}
	at, err := openBeneath(root, ".", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer func() { unix.Close(at) }()
	done := ""
	for part := range strings.SplitSeq(sub, "/") {
		done = path.Join(done, part)
		next, err := openBeneath(root, done, unix.O_PATH|unix.O_DIRECTORY)
		if errors.Is(err, unix.ENOENT) {
			// mkdirat does not follow a link in the last place, and the parent
			// is a descriptor that is known to be inside.
			if err := unix.Mkdirat(at, part, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
				return &os.PathError{Op: "mkdir", Path: done, Err: err}
			} else if err == nil {
				if err := setMode(at, part, st.Mode&0o7777); err != nil {
					return &os.PathError{Op: "chmod", Path: done, Err: err}
				}
			}
			next, err = openBeneath(root, done, unix.O_PATH|unix.O_DIRECTORY)
		}
		if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.ELOOP) {
			return fmt.Errorf("leads out of the volume: %w", errdefs.ErrFailedPrecondition)
		}
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			return fmt.Errorf("%s in the volume is not a directory: %w", done, errdefs.ErrFailedPrecondition)
		}
		if err != nil {
			return &os.PathError{Op: "open", Path: done, Err: err}
		}
		unix.Close(at)
		at = next
	}
	return nil
}

// setMode sets the mode of a directory that was just made.
func setMode(parent int, name string, mode uint32) error {
	fd, err := unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fchmod(fd, mode)
}
