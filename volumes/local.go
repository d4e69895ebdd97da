package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
)

// setupLocalPV binds the directory of a local PersistentVolume into the pod's, as
// upstream does. What is bound already stays.
func (v *Volumes) setupLocalPV(ctx context.Context, pod *v1.Pod, p *dir, vol *volume) error {
	target, mounted, err := v.place(p, vol)
	if err != nil {
		return err
	}
	table, err := readMounts()
	if err != nil {
		return err
	}
	if !mounted {
		// The path is the administrator's, links included.
		req := request{Op: opBind, Path: vol.local, Target: target}
		if table.foreignPath(vol.local) {
			err = v.helper(ctx, foreignTimeout, req)
		} else {
			err = req.do()
		}
		if err != nil {
			return err
		}
	}
	group := podGroup(pod)
	if group < 0 || vol.readOnly {
		return nil
	}
	if table.foreignPath(vol.local) {
		return v.helper(ctx, foreignTimeout, request{Op: opGroup, Path: target, Group: group, Policy: string(groupPolicy(pod))})
	}
	root, err := openDir(target)
	if err != nil {
		return err
	}
	defer root.close()
	return applyGroup(ctx, root, group, groupPolicy(pod))
}

// place makes the mount point of a volume and says whether something is
// mounted there. It asks the mount table, not stat: that would ask the server.
func (v *Volumes) place(p *dir, vol *volume) (target string, mounted bool, err error) {
	all, err := p.makeDir(volumesDir, 0o750)
	if err != nil {
		return "", false, err
	}
	defer all.close()
	kind, err := all.makeDir(vol.plugin(), 0o750)
	if err != nil {
		return "", false, err
	}
	defer kind.close()
	if err := unix.Mkdirat(kind.fd, vol.dir, 0o750); err != nil && !errors.Is(err, unix.EEXIST) {
		return "", false, &os.PathError{Op: "mkdir", Path: vol.dir, Err: err}
	}
	real, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(kind.fd))
	if err != nil {
		return "", false, err
	}
	target = real + "/" + vol.dir
	table, err := readMounts()
	if err != nil {
		return "", false, err
	}
	return target, table.at(target) != nil, nil
}

// bindDirectory binds a directory on another, without what is mounted below.
func bindDirectory(source, target string) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("local volume %s does not exist: %w", source, errdefs.ErrNotFound)
	}
	if err != nil {
		return &os.PathError{Op: "bind", Path: source, Err: err}
	}
	defer unix.Close(tree)
	var st unix.Stat_t
	if err := unix.Fstat(tree, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fmt.Errorf("local volume %s is a %s, want a directory (mount a device on one): %w", source, modeName(st.Mode&unix.S_IFMT), errdefs.ErrFailedPrecondition)
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "bind", Path: target, Err: err}
	}
	return nil
}
