package images

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/volumes/tree"
)

// diskUsage adds up the blocks and inodes of the directory and what is below,
// without following links or crossing mounts.
func diskUsage(ctx context.Context, root int) (bytes, inodes int64, err error) {
	u, err := tree.Measure(ctx, root, nil)
	if err == nil {
		err = u.Bound
	}
	return int64(u.Bytes), int64(u.Inodes), err
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
	u, err := s.usage.Usage(ctx, key)
	return u.Bytes, u.Inodes, err
}

func (s *Store) measureSnapshot(ctx context.Context, key string, pace tree.Stepper) (tree.Usage, error) {
	fd, err := unix.Open(filepath.Join(s.snapshotsDir, key, "fs"), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return tree.Usage{}, err
	}
	defer unix.Close(fd)
	return tree.Measure(ctx, fd, pace)
}

// pending bytes: of downloads and loads, under way or left, that are no image's
// yet.
func (s *Store) pending() (bytes int64) {
	s.mu.RLock()
	blobs := map[digest.Digest]struct{}{}
	for d := range s.orphans {
		blobs[d] = struct{}{}
	}
	for l := range s.leases {
		for d := range l.blobs {
			blobs[d] = struct{}{}
		}
	}
	for _, r := range s.images {
		for d := range r.blobs {
			delete(blobs, d)
		}
	}
	s.mu.RUnlock()
	add := func(path string) {
		var st unix.Stat_t
		if unix.Lstat(path, &st) == nil { // else it has come to its end
			bytes += st.Blocks * 512
		}
	}
	for d := range blobs {
		add(s.blobPath(d))
	}
	entries, _ := os.ReadDir(s.ingestDir())
	for _, e := range entries {
		add(filepath.Join(s.ingestDir(), e.Name(), "data"))
	}
	return bytes + s.unfinished.Load()
}

// FsInfo of the store: the bytes and inodes that its images and snapshots
// take, as far as they are known without looking, and what downloads and loads
// have brought.
func (s *Store) FsInfo(ctx context.Context) (*runtimeapi.FilesystemUsage, error) {
	bytes, inodes := uint64(s.pending()), uint64(0)
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
	snapshots := s.usage.Total()
	bytes += snapshots.Bytes
	inodes += snapshots.Inodes
	return &runtimeapi.FilesystemUsage{
		Timestamp:  time.Now().UnixNano(),
		FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: s.cfg.Dir},
		UsedBytes:  &runtimeapi.UInt64Value{Value: bytes},
		InodesUsed: &runtimeapi.UInt64Value{Value: inodes},
	}, nil
}
