package volumes

import (
	"context"
	"errors"
	"os"
	"time"

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

// pace bounds the share of one CPU, and of the disk's time, that walking trees
// may take: after each batch of entries it rests in proportion to the work.
type pace struct {
	// share of the time that is work, 0 < share ≤ 1.
	share   float64
	entries int
	begun   time.Time
}

// batch is how many entries are looked at between two rests: well below a
// millisecond of work, when all is in memory.
const batch = 128

func (p *pace) step(ctx context.Context) error {
	if p.entries++; p.entries%batch != 0 || p.share >= 1 {
		return ctx.Err()
	}
	now := time.Now()
	rest := time.Duration(float64(now.Sub(p.begun)) * (1 - p.share) / p.share)
	timer := time.NewTimer(rest)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
	p.begun = time.Now()
	return ctx.Err()
}

// treeUsage counts the blocks and inodes of a directory and all below on the
// same mount. A file with several names counts once.
func treeUsage(ctx context.Context, d *dir, p *pace) (bytes, inodes uint64, err error) {
	w := treeWalk{ctx: ctx, pace: p, linked: map[[2]uint64]struct{}{}}
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return 0, 0, err
	}
	w.count(&st)
	p.begun = time.Now()
	err = w.below(d)
	return w.bytes, w.inodes, err
}

type treeWalk struct {
	ctx           context.Context
	pace          *pace
	linked        map[[2]uint64]struct{}
	bytes, inodes uint64
}

func (w *treeWalk) count(st *unix.Stat_t) {
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		id := [2]uint64{st.Dev, st.Ino}
		if _, seen := w.linked[id]; seen {
			return
		}
		w.linked[id] = struct{}{}
	}
	w.bytes += uint64(st.Blocks) * 512
	w.inodes++
}

func (w *treeWalk) below(d *dir) error {
	names, err := d.names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := w.pace.step(w.ctx); err != nil {
			return err
		}
		fd, err := d.openHere(name, unix.O_PATH)
		if err != nil {
			continue // gone meanwhile, or another mount
		}
		var st unix.Stat_t
		err = unix.Fstat(fd, &st)
		unix.Close(fd)
		if err != nil {
			continue
		}
		w.count(&st)
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			continue
		}
		fd, err = d.openHere(name, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			continue
		}
		sub := &dir{fd: fd, name: d.name + "/" + name}
		err = w.below(sub)
		sub.close()
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
