package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/volumes/tree"
)

// removeTree removes name in d and all below it.
func removeTree(ctx context.Context, d *dir, name string) error {
	if err := tree.Remove(ctx, d.fd, name); err != nil {
		return fmt.Errorf("%s: %w", d.name, err)
	}
	return nil
}

// Teardown unmounts all that is mounted in a pod's directory, proves by the
// mount table that it is gone, and deletes the directory. It may be called
// without Setup, and again. It never deletes anything on another mount: when
// one cannot be taken away the directory stays and the error names it.
func (v *Volumes) Teardown(ctx context.Context, uid types.UID) error {
	unlock, err := v.lock(ctx, uid)
	if err != nil {
		return err
	}
	defer unlock()
	if err := checkUID(uid); err != nil {
		return err
	}
	v.forgetTokens(uid)
	base, err := openDir(filepath.Join(v.cfg.RootDir, "pods"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer base.close()
	pod, err := base.openDir(string(uid))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("directory of pod %s: %w", uid, err)
	}
	err = v.unmountBelow(ctx, pod)
	pod.close()
	if err != nil {
		return fmt.Errorf("volumes of pod %s: %w", uid, err)
	}
	if err := removeTree(ctx, base, string(uid)); err != nil {
		return fmt.Errorf("directory of pod %s: %w", uid, err)
	}
	return nil
}

// Abort ends what waits for filesystems that do not answer among a pod's own
// mounts: processes that were killed and still wait for one can end then. What
// they had not written yet is lost, and so it is for other pods that have the
// same export mounted: for the last resort alone. The mounts stay.
func (v *Volumes) Abort(ctx context.Context, uid types.UID) error {
	if err := checkUID(uid); err != nil {
		return err
	}
	real, err := filepath.EvalSymlinks(filepath.Join(v.cfg.RootDir, "pods"))
	if err != nil {
		return err
	}
	table, err := readMounts()
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range table.below(filepath.Join(real, string(uid))) {
		if !foreignType(m.fstype) || !v.isSilent(m.device) {
			continue
		}
		v.log.Warn("what waits for a filesystem that does not answer is ended", "uid", uid, "filesystem", m.String())
		// Without MNT_DETACH a mount in use stays: it is busy.
		err := v.helper(ctx, unmountTimeout, request{Op: opUnmount, Path: m.point, Flags: unix.MNT_FORCE | unix.UMOUNT_NOFOLLOW})
		if err != nil && !errdefs.IsFailedPrecondition(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// maxPasses bounds how often the mount table is read: stacked mounts show up
// one after the other.
const maxPasses = 8

// unmountBelow takes away every mount below d.
func (v *Volumes) unmountBelow(ctx context.Context, d *dir) error {
	// The mount table has real paths.
	real, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(d.fd))
	if err != nil {
		return err
	}
	var last error
	for pass := range maxPasses {
		table, err := readMounts()
		if err != nil {
			return err
		}
		found := table.below(real)
		if len(found) == 0 {
			return nil
		}
		for _, m := range found {
			if err := ctx.Err(); err != nil {
				return err
			}
			// What does not go politely is detached: it disappears from the
			// tree at once and from the kernel with its last user.
			if err := v.unmount(ctx, d, table, m, real, pass > 0); err != nil {
				last = err
				v.log.Debug("unmount", "path", m.point, "fstype", m.fstype, "error", err)
			}
		}
	}
	table, err := readMounts()
	if err != nil {
		return err
	}
	if left := table.below(real); len(left) > 0 {
		return fmt.Errorf("%s (%s of %s, mount %d) cannot be unmounted: %w", left[0].point, left[0].fstype, left[0].source, left[0].id, last)
	}
	return nil
}

// unmount takes one mount away. Its parent directory is opened without following
// any link, so that nothing a container put into a volume leads elsewhere.
func (v *Volumes) unmount(ctx context.Context, d *dir, table *mountTable, m mountEntry, real string, detach bool) error {
	if foreignType(m.fstype) || table.foreignPath(filepath.Dir(m.point)) {
		return v.unmountForeign(ctx, m, detach)
	}
	flags := unix.UMOUNT_NOFOLLOW
	if detach {
		flags |= unix.MNT_DETACH
	}
	return unmountPoint(d.fd, m.point[len(real)+1:], flags)
}

// unmountPoint unmounts a path below an open directory, or an absolute one
// with AT_FDCWD. No link on the way is followed.
func unmountPoint(fd int, rel string, flags int) error {
	up, name := filepath.Split(rel)
	parent := fd
	if up != "" {
		how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS}
		if fd != unix.AT_FDCWD {
			how.Resolve |= unix.RESOLVE_BENEATH
		}
		p, err := retry(func() (int, error) { return unix.Openat2(fd, filepath.Clean(up), how) })
		if err != nil {
			return &os.PathError{Op: "open", Path: up, Err: err}
		}
		defer unix.Close(p)
		parent = p
	}
	if err := unix.Unmount("/proc/self/fd/"+strconv.Itoa(parent)+"/"+name, flags); err != nil {
		err = &os.PathError{Op: "unmount", Path: rel, Err: err}
		if errors.Is(err, unix.EBUSY) {
			err = errors.Join(err, errdefs.ErrFailedPrecondition)
		}
		return err
	}
	return nil
}
