package volumes

import (
	"os"

	"golang.org/x/sys/unix"
)

// fsUsage is how full a volume is, in bytes and inodes.
type fsUsage struct {
	Capacity, Available, Used      uint64
	Inodes, InodesFree, InodesUsed uint64
}

// statfs of a whole filesystem.
func statfs(path string) (*fsUsage, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return usageOf(&st), nil
}

func usageOf(st *unix.Statfs_t) *fsUsage {
	size := uint64(st.Frsize)
	return &fsUsage{
		Capacity: st.Blocks * size, Available: st.Bavail * size, Used: (st.Blocks - st.Bfree) * size,
		Inodes: st.Files, InodesFree: st.Ffree, InodesUsed: st.Files - st.Ffree,
	}
}
