package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// inode identifies a hard-linked file so that it is counted once.
type inode struct{ dev, ino uint64 }

// diskUsage adds up the blocks and inodes below the directory, without
// following links or crossing mounts. It yields to ctx.
func diskUsage(ctx context.Context, root int) (bytes, inodes int64, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return 0, 0, err
	}
	if _, err := unix.Seek(root, 0, unix.SEEK_SET); err != nil {
		return 0, 0, err
	}
	u := usage{dev: st.Dev, bytes: st.Blocks * 512, inodes: 1}
	if err := u.add(ctx, root, 0); err != nil {
		return 0, 0, err
	}
	return u.bytes, u.inodes, nil
}

type usage struct {
	dev           uint64
	bytes, inodes int64
	linked        map[inode]struct{}
}

const (
	maxUsageDepth = 1000    // deeper is not counted: each level holds a descriptor
	maxLinked     = 1 << 16 // files with several names that are remembered
)

func (u *usage) add(ctx context.Context, dir, depth int) error {
	buf := make([]byte, 4<<10)
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		names, err := someNames(dir, buf)
		if err != nil {
			return err
		}
		if len(names) == 0 {
			return nil
		}
		for _, name := range names {
			if err := u.one(ctx, dir, name, depth); err != nil {
				return err
			}
		}
	}
}

func (u *usage) one(ctx context.Context, dir int, name string, depth int) error {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if err == unix.ENOENT {
			return nil // a running container's
		}
		return err
	}
	if st.Dev != u.dev {
		return nil
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if st.Nlink > 1 && !isDir {
		if _, ok := u.linked[inode{st.Dev, st.Ino}]; ok {
			return nil
		}
		if u.linked == nil {
			u.linked = map[inode]struct{}{}
		}
		if len(u.linked) < maxLinked {
			u.linked[inode{st.Dev, st.Ino}] = struct{}{}
		} else {
			st.Blocks /= int64(st.Nlink) // each name its share
		}
	}
	u.bytes += st.Blocks * 512
	u.inodes++
	if !isDir || depth >= maxUsageDepth {
		return nil
	}
	fd, err := openBeneath(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		if err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP || err == unix.EXDEV {
			return nil
		}
		return err
	}
	defer unix.Close(fd)
	return u.add(ctx, fd, depth+1)
}

// usageCache holds what snapshots were last measured at.
type usageCache struct {
	mu   sync.Mutex
	want chan struct{}
	keys map[string]*measured
}

type measured struct {
	bytes, inodes uint64
	at            time.Time     // when; zero: never yet
	took          time.Duration // the next one waits a multiple of it
	asked         bool          // since
	first         chan struct{} // closed when there is a figure, or none will be
	closed        bool
}

// settle lets those go on who wait for the first figure. The caller holds
// usageCache.mu.
func (m *measured) settle() {
	if !m.closed {
		m.closed = true
		close(m.first)
	}
}

const (
	usageFresh = 10 * time.Second // a figure younger than this is not renewed
	usageShare = 50               // measuring takes at most one part in so many of the time
)

func (u *usageCache) init() {
	u.want = make(chan struct{}, 1)
	u.keys = map[string]*measured{}
}

func (u *usageCache) forget(key string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if m := u.keys[key]; m != nil {
		m.settle()
	}
	delete(u.keys, key)
}

// Usage returns what the snapshot itself takes, without its image. The figure
// comes from a cache that is renewed in the background when it has been asked
// for; only the very first question waits, and no longer than ctx.
func (s *Store) Usage(ctx context.Context, key string) (bytes, inodes uint64, err error) {
	s.mu.RLock()
	sn, ok := s.snapshots[key]
	s.mu.RUnlock()
	if !ok {
		return 0, 0, fmt.Errorf("snapshot %s: %w", clip(key), errdefs.ErrNotFound)
	}
	if sn.readOnly {
		return 0, 0, nil
	}
	u := &s.usage
	u.mu.Lock()
	m := u.keys[key]
	if m == nil {
		m = &measured{first: make(chan struct{})}
		u.keys[key] = m
	}
	m.asked = true
	known := !m.at.IsZero()
	bytes, inodes = m.bytes, m.inodes
	u.mu.Unlock()
	select {
	case u.want <- struct{}{}:
	default:
	}
	if known {
		return bytes, inodes, nil
	}
	select {
	case <-m.first:
	case <-ctx.Done():
		return 0, 0, fmt.Errorf("usage of snapshot %s: not measured yet: %w", key, context.Cause(ctx))
	case <-s.ctx.Done():
		return 0, 0, fmt.Errorf("usage of snapshot %s: image store is closed: %w", key, errdefs.ErrUnavailable)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if m.at.IsZero() {
		return 0, 0, fmt.Errorf("snapshot %s is gone: %w", key, errdefs.ErrNotFound)
	}
	return m.bytes, m.inodes, nil
}

// usageLoop measures what was asked for and is old enough. Nothing asked,
// nothing done.
func (s *Store) usageLoop() {
	timer := time.NewTimer(0)
	<-timer.C
	for {
		select {
		case <-s.ctx.Done():
			timer.Stop()
			return
		case <-s.usage.want:
		case <-timer.C:
		}
		if wait := s.measureDue(); wait > 0 {
			timer.Reset(wait)
		}
	}
}

// measureDue measures every snapshot that is due, and tells how long until the
// next one is (0: nobody has asked).
func (s *Store) measureDue() (wait time.Duration) {
	u := &s.usage
	for s.ctx.Err() == nil {
		now := time.Now()
		wait = 0
		var key string
		var due *measured
		u.mu.Lock()
		for k, m := range u.keys {
			if !m.asked {
				continue
			}
			left := m.at.Add(max(usageFresh, usageShare*m.took)).Sub(now)
			if m.at.IsZero() || left <= 0 {
				key, due = k, m
				break
			}
			if wait == 0 || left < wait {
				wait = left
			}
		}
		u.mu.Unlock()
		if due == nil {
			return wait
		}
		bytes, inodes, err := s.measureSnapshot(key)
		u.mu.Lock()
		if err == nil {
			due.bytes, due.inodes = uint64(bytes), uint64(inodes)
		}
		due.at, due.asked = time.Now(), false
		due.took = due.at.Sub(now)
		due.settle()
		u.mu.Unlock()
		if err != nil && !errors.Is(err, os.ErrNotExist) && s.ctx.Err() == nil {
			s.log.Warn("usage of snapshot is not known", "snapshot", key, "error", err)
		}
	}
	return 0
}

func (s *Store) measureSnapshot(key string) (bytes, inodes int64, err error) {
	fd, err := unix.Open(filepath.Join(s.snapshotsDir, key, "fs"), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return 0, 0, err
	}
	defer unix.Close(fd)
	return diskUsage(s.ctx, fd)
}

// FsInfo of the store: the bytes and inodes that its images and snapshots
// take, as far as they are known without looking.
func (s *Store) FsInfo(ctx context.Context) (*runtimeapi.FilesystemUsage, error) {
	var bytes, inodes uint64
	s.mu.RLock()
	blobs := map[digest.Digest]struct{}{} // those that images share count once
	for _, r := range s.images {
		bytes += uint64(r.Manifest.Size + r.Config)
		inodes += 2
		for _, l := range r.Layers {
			if _, ok := blobs[l.Blob]; !ok {
				blobs[l.Blob] = struct{}{}
				bytes += uint64(l.Size)
				inodes++
			}
		}
	}
	for _, l := range s.layers {
		bytes += uint64(l.Bytes)
		inodes += uint64(l.Inodes)
	}
	s.mu.RUnlock()
	s.usage.mu.Lock()
	for _, m := range s.usage.keys {
		bytes += m.bytes
		inodes += m.inodes
	}
	s.usage.mu.Unlock()
	return &runtimeapi.FilesystemUsage{
		Timestamp:  time.Now().UnixNano(),
		FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: s.cfg.Dir},
		UsedBytes:  &runtimeapi.UInt64Value{Value: bytes},
		InodesUsed: &runtimeapi.UInt64Value{Value: inodes},
	}, nil
}
