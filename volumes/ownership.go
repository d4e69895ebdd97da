package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/volumes/tree"
)

// fsGroup gives a volume to the pod's group, as upstream's
// volume.SetVolumeOwnership does: everything in it is owned by the group, which
// may read and write it, and directories hand the group on.

const (
	groupReadWrite = 0o660
	groupEnter     = unix.S_ISGID | 0o110
)

// applyGroup gives all below root, and root last, to a group. With the policy
// OnRootMismatch nothing is done when root is right: root is changed last, so
// then all below is. It goes from descriptor to descriptor and never through a
// link or into another mount; a link itself changes hands, not what it names.
func applyGroup(ctx context.Context, root *dir, group int, policy v1.PodFSGroupChangePolicy) error {
	var st unix.Stat_t
	if err := unix.Fstat(root.fd, &st); err != nil {
		return err
	}
	want := st.Mode | groupReadWrite | groupEnter
	if policy == v1.FSGroupChangeOnRootMismatch && int(st.Gid) == group && st.Mode == want {
		return nil
	}
	err := tree.Walk(ctx, root.fd, nil, func(e *tree.Entry) error {
		err := regroup(e.FD, &e.Stat, group)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("fsGroup %d: %w", group, err)
	}
	return regroup(root.fd, &st, group)
}

// regroup changes group and mode of one open file.
func regroup(fd int, st *unix.Stat_t, group int) error {
	if err := unix.Fchownat(fd, "", -1, group, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	mode := st.Mode&0o7777 | groupReadWrite
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		return nil // has no mode
	case unix.S_IFDIR:
		mode |= groupEnter
	}
	// After the chown, which clears the set-id bits. The descriptor may be one
	// that fchmod refuses (O_PATH); its link in /proc leads to it and nowhere
	// else.
	return unix.Chmod("/proc/self/fd/"+strconv.Itoa(fd), mode)
}

// groupPolicy is the pod's policy; Always is the default.
func groupPolicy(pod *v1.Pod) v1.PodFSGroupChangePolicy {
	if sc := pod.Spec.SecurityContext; sc != nil && sc.FSGroupChangePolicy != nil {
		return *sc.FSGroupChangePolicy
	}
	return v1.FSGroupChangeAlways
}
