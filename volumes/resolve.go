package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// Resolve follows the links of a host path that is to be mounted and returns
// where they lead, making a directory where there is nothing. The kernel does
// the following, so a link exchanged meanwhile cannot make the answer a
// mixture. Where the path leads through a foreign filesystem a helper looks. It
// also returns which of nosuid, nodev and noexec the mount has that it is on.
func (v *Volumes) Resolve(ctx context.Context, p string) (is string, flags []string, err error) {
	table, err := readMounts()
	if err != nil {
		return "", nil, err
	}
	switch {
	case !table.foreignPath(p):
		is, err = resolve(p)
	case table.at(p) != nil:
		// The root of a mount is a directory, and no name on the way to it is
		// a link: the mount table has real paths.
		is = p
	default:
		var res *response
		if res, err = v.ask(ctx, foreignTimeout, request{Op: opResolve, Path: p}); err == nil {
			is = res.Path
		}
	}
	if err != nil {
		return "", nil, err
	}
	return is, table.restrictions(is), nil
}

func resolve(p string) (string, error) {
	fd, err := unix.Open(p, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		if err := makeAll(p); err != nil {
			return "", err
		}
		fd, err = unix.Open(p, unix.O_PATH|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return "", &os.PathError{Op: "open", Path: p, Err: err}
	}
	defer unix.Close(fd)
	r, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", err
	}
	if !path.IsAbs(r) || strings.HasSuffix(r, " (deleted)") {
		// Not reachable by a path (a descriptor in /proc): the name given is
		// the only one that there is.
		return p, nil
	}
	return r, nil
}
