package images

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mapLayers mounts the layers' directory a second time, read-only and with ids
// mapped, for the length of one overlay mount: overlayfs keeps private clones
// of its lower mounts. It returns the path relative to the store.
func (s *Store) mapLayers(key string, uid, gid []specs.LinuxIDMapping) (base string, undo func(), err error) {
	users, err := mount.GetUsernsFD(mappings(uid), mappings(gid))
	if err != nil {
		return "", nil, fmt.Errorf("id mappings: user namespace: %w", err)
	}
	defer users.Close()
	at := filepath.Join(s.idmapDir, key)
	if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", nil, fmt.Errorf("id mappings: %w", err)
	}
	undo = func() {
		if err := errors.Join(unmount(at), os.Remove(at)); err != nil {
			s.log.Warn("id-mapped layers stay mounted", "path", at, "error", err)
		}
	}
	if err := mount.IDMapMountWithAttrs(s.layersDir, at, int(users.Fd()), unix.MOUNT_ATTR_RDONLY, 0); err != nil {
		undo()
		return "", nil, fmt.Errorf("id mappings: %v: user namespaces need id-mapped mounts on the image store's file system (ext4 since Linux 5.12, overlayfs on top since 5.19): %w", err, errdefs.ErrFailedPrecondition)
	}
	return "idmap/" + key + "/", undo, nil
}

// dropMapped unmounts what a process that was killed in mapLayers has left.
func (s *Store) dropMapped() error {
	entries, err := os.ReadDir(s.idmapDir)
	if err != nil {
		return fmt.Errorf("id mappings: %w", err)
	}
	for _, e := range entries {
		at := filepath.Join(s.idmapDir, e.Name())
		if err := errors.Join(unmount(at), os.Remove(at)); err != nil {
			return fmt.Errorf("id mappings of an earlier run: %w", err)
		}
	}
	return nil
}

// mappings in the form "container:host:size,…".
func mappings(m []specs.LinuxIDMapping) string {
	parts := make([]string, len(m))
	for i, e := range m {
		parts[i] = fmt.Sprintf("%d:%d:%d", e.ContainerID, e.HostID, e.Size)
	}
	return strings.Join(parts, ",")
}
