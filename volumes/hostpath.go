package volumes

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
)

// checkHostPath checks, and for the OrCreate types makes, what a hostPath volume
// names. Links are followed: the path is the administrator's.
func checkHostPath(path string, kind v1.HostPathType) error {
	stat := func() (uint32, error) {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return 0, fmt.Errorf("hostPath %s: %w", path, err)
		}
		return st.Mode & unix.S_IFMT, nil
	}
	mode, err := stat()
	if errors.Is(err, unix.ENOENT) {
		switch kind {
		case v1.HostPathDirectoryOrCreate:
			// One level at a time by descriptor, all with upstream's 0755.
			if err := makeAll(path); err != nil {
				return fmt.Errorf("hostPath %s: %w", path, err)
			}
		case v1.HostPathFileOrCreate:
			fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o644)
			if err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("hostPath %s: create file: %w (FileOrCreate does not create directories)", path, err)
			}
			if err == nil {
				unix.Close(fd)
			}
		}
		mode, err = stat()
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	missing := err != nil
	want := uint32(0)
	switch kind {
	case v1.HostPathUnset:
		return nil
	case v1.HostPathDirectory, v1.HostPathDirectoryOrCreate:
		want = unix.S_IFDIR
	case v1.HostPathFile, v1.HostPathFileOrCreate:
		want = unix.S_IFREG
	case v1.HostPathSocket:
		want = unix.S_IFSOCK
	case v1.HostPathCharDev:
		want = unix.S_IFCHR
	case v1.HostPathBlockDev:
		want = unix.S_IFBLK
	default:
		return fmt.Errorf("hostPath %s: unknown type %q: %w", path, kind, errdefs.ErrInvalidArgument)
	}
	// Upstream's words, and what is there instead.
	switch failed := "hostPath type check failed: " + path + " is not a " + upstreamName[want]; {
	case missing:
		return fmt.Errorf("%s: it does not exist: %w", failed, errdefs.ErrNotFound)
	case mode != want:
		return fmt.Errorf("%s: it is a %s: %w", failed, modeName(mode), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// upstreamName is how upstream's checks call a type of file.
var upstreamName = map[uint32]string{
	unix.S_IFDIR: "directory", unix.S_IFREG: "file", unix.S_IFSOCK: "socket file", unix.S_IFCHR: "character device", unix.S_IFBLK: "block device",
}

func modeName(mode uint32) string {
	switch mode {
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFREG:
		return "file"
	case unix.S_IFSOCK:
		return "socket"
	case unix.S_IFCHR:
		return "character device"
	case unix.S_IFBLK:
		return "block device"
	case unix.S_IFIFO:
		return "named pipe"
	}
	return fmt.Sprintf("file of mode %o", mode)
}

// makeAll makes a directory and those above it.
func makeAll(path string) error {
	if err := unix.Mkdir(path, 0o755); err == nil || errors.Is(err, unix.EEXIST) {
		return nil
	} else if !errors.Is(err, unix.ENOENT) {
		return err
	}
	up := parentOf(path)
	if up == path {
		return unix.ENOENT
	}
	if err := makeAll(up); err != nil {
		return err
	}
	if err := unix.Mkdir(path, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}
