// Package tree walks, measures and removes directory trees that somebody else
// has written: containers, images. Such a tree may be of any depth and width,
// change under the walk, and hold links and mounts. All work goes from
// descriptor to descriptor, follows no link and crosses no mount; what a walk
// takes of memory and descriptors is bounded and does not depend on the tree.
package tree

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxDepth is how many directories deep a tree is walked: eight times what a
// path can name (PATH_MAX is 4096 bytes, two of them a level). Each level takes
// 56 bytes of the walk's memory. Tests lower it.
var maxDepth = 1 << 14

var (
	// ErrDeep is returned for a tree that is nested deeper than a walk goes.
	ErrDeep = fmt.Errorf("directories are nested deeper than %d: %w", maxDepth, errdefs.ErrResourceExhausted)
	// ErrMoved is returned when directories were moved away while the walk was
	// below them.
	ErrMoved = errors.New("directories were moved while they were walked")
	// ErrMount is returned for what cannot be removed because something is
	// mounted there.
	ErrMount = fmt.Errorf("is a mount point, not removed: %w", errdefs.ErrFailedPrecondition)
)

// open opens what name itself is, link or not, unless that is the root of
// another mount: then it is EXDEV, and nobody has asked that filesystem
// anything.
func open(dir int, name string, flags uint64) (int, error) {
	for {
		fd, err := unix.Openat2(dir, name, &unix.OpenHow{
			Flags: flags | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_MAGICLINKS,
		})
		if err != unix.EINTR {
			return fd, err
		}
	}
}
