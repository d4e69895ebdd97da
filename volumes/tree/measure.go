package tree

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"
)

// Usage is what a tree takes of its filesystem.
type Usage struct {
	// Bytes of the blocks that are allocated: holes take none.
	Bytes  uint64
	Inodes uint64
	// Bound, if not nil, is why the tree could not be measured. The figures are
	// a bound from above then: all that is used on the filesystem.
	Bound error
}

// Plus is the sum of two.
func (u Usage) Plus(o Usage) Usage {
	return Usage{Bytes: u.Bytes + o.Bytes, Inodes: u.Inodes + o.Inodes, Bound: errors.Join(u.Bound, o.Bound)}
}

// measureTries is how often a tree is walked whose directories are moved about
// at a depth at which no program but a hostile one moves them.
const measureTries = 3

// maxLinked is how many files with several names are remembered: 24 bytes each.
const maxLinked = 1 << 16

// Measure adds up the directory root and everything below it. A file with
// several names counts once. A tree that defies being measured, by its depth or
// because it is moved about, takes as much as its filesystem has in use: what is
// not known must not pass for little. pace may be nil.
func Measure(ctx context.Context, root int, pace Stepper) (Usage, error) {
	var u Usage
	var err error
	for range measureTries {
		if u, err = measureOnce(ctx, root, pace); !errors.Is(err, ErrMoved) {
			break
		}
	}
	if !errors.Is(err, ErrMoved) && !errors.Is(err, ErrDeep) {
		return u, err
	}
	var st unix.Statfs_t
	if serr := unix.Fstatfs(root, &st); serr != nil {
		return Usage{}, errors.Join(err, serr)
	}
	return Usage{Bytes: (st.Blocks - st.Bfree) * uint64(st.Frsize), Inodes: st.Files - st.Ffree, Bound: err}, nil
}

func measureOnce(ctx context.Context, root int, pace Stepper) (Usage, error) {
	s := sum{linked: map[inode]struct{}{}}
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return Usage{}, err
	}
	s.add(&st)
	err := Walk(ctx, root, pace, func(e *Entry) error { s.add(&e.Stat); return nil })
	return s.Usage, err
}

type inode struct{ dev, ino uint64 }

type sum struct {
	Usage
	linked map[inode]struct{}
}

func (s *sum) add(st *unix.Stat_t) {
	blocks := uint64(st.Blocks)
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		id := inode{st.Dev, st.Ino}
		if _, seen := s.linked[id]; seen {
			return
		}
		if len(s.linked) < maxLinked {
			s.linked[id] = struct{}{}
		} else {
			blocks /= uint64(st.Nlink) // each name its share
		}
	}
	s.Bytes += blocks * 512
	s.Inodes++
}
