package volumes

import "golang.org/x/sys/unix"

// statfsOf is the usage of the filesystem that an open directory is on.
func statfsOf(d *dir) (*fsUsage, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(d.fd, &st); err != nil {
		return nil, err
	}
	return usageOf(&st), nil
}
