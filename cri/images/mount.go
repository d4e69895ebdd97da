package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// snapshot is a container's writable layer, or the use of an image by an
// image volume.
type snapshot struct {
	image  digest.Digest
	lowers []string // directories of the layers, uppermost first
	// readOnly snapshots have nothing of their own.
	readOnly bool
}

// emptyLayer and voidLayer are empty: overlayfs needs a lower directory, and
// two different ones where there is no upper.
const (
	emptyLayer = "empty"
	voidLayer  = "void"
)

// overlayPage is what mount(2) takes as options, less some room.
const overlayPage = 4096 - 64

// snapshotXattr of a snapshot's directory names its image and the layers it is
// on, so that it lives on when the image is removed or its record is lost:
// "1 sha256:… layer:layer:…". It is set last, in one call, and so marks the
// directory as whole; a file would cost another inode on the way of a start.
const snapshotXattr = "trusted.podd.snapshot"

// unfinished begins the names of layers that are not whole yet.
const unfinished = ".new-"

var layerPattern = regexp.MustCompile(`^[A-Za-z0-9_-]{20}$|^` + emptyLayer + `$`)

var keyPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$`)

// keyLock serialises the calls on one key.
type keyLock struct {
	held chan struct{}
	n    int // holders and waiters; guarded by Store.mu
}

func (s *Store) lockKey(ctx context.Context, key string) (unlock func(), err error) {
	if !keyPattern.MatchString(key) {
		return nil, fmt.Errorf("snapshot key %q: only letters, digits, '_', '.', '-' are allowed, 200 at most: %w", clip(key), errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	k := s.keys[key]
	if k == nil {
		k = &keyLock{held: make(chan struct{}, 1)}
		s.keys[key] = k
	}
	k.n++
	s.mu.Unlock()
	drop := func() {
		s.mu.Lock()
		if k.n--; k.n == 0 {
			delete(s.keys, key)
		}
		s.mu.Unlock()
	}
	select {
	case k.held <- struct{}{}:
		return func() { <-k.held; drop() }, nil
	case <-ctx.Done():
		drop()
		return nil, context.Cause(ctx)
	}
}

// MountRootfs makes the writable snapshot named key on the image, unless it is
// there, and mounts it at target, unless it is mounted. Target is made if it is
// missing. After a reboot the same call mounts the same snapshot again.
//
// With id mappings (both or none), the image's files appear owned by the
// mapped ids: the layers below are id-mapped mounts, what the container writes
// is stored under the host's ids. That takes Linux 5.19
// (errdefs.ErrFailedPrecondition).
//
// Nothing is synced to disk, and no lock is held across calls of the kernel
// but that of the key.
func (s *Store) MountRootfs(ctx context.Context, key, image, target string, uid, gid []specs.LinuxIDMapping) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("mount image %s at %s for %s: %w", image, target, key, err)
		}
	}()
	if (len(uid) == 0) != (len(gid) == 0) {
		return fmt.Errorf("id mappings must be given for both users and groups: %w", errdefs.ErrInvalidArgument)
	}
	unlock, err := s.lockKey(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	sn, fresh, err := s.takeSnapshot(key, image, false)
	if err != nil {
		return err
	}
	dir := filepath.Join(s.snapshotsDir, key)
	if fresh {
		defer func() {
			if err != nil {
				err = errors.Join(err, s.dropSnapshot(key))
			}
		}()
		if err := s.makeSnapshot(dir, sn, uid, gid); err != nil {
			return err
		}
	}
	if done, err := s.prepareTarget(target); done || err != nil {
		return err
	}
	return s.mountOverlay(key, sn.lowers, target, 0, "snapshots/"+key, uid, gid)
}

// MountImage mounts the image's tree read-only at target; key holds the image
// until UnmountRootfs. Programs and device nodes in it cannot be used through
// this mount, as the CRI has it for image volumes. With uid and gid its files
// have mapped ids, as with MountRootfs.
func (s *Store) MountImage(ctx context.Context, key, image, target string, uid, gid []specs.LinuxIDMapping) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("mount image %s read-only at %s for %s: %w", image, target, key, err)
		}
	}()
	unlock, err := s.lockKey(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	sn, fresh, err := s.takeSnapshot(key, image, true)
	if err != nil {
		return err
	}
	if fresh {
		defer func() {
			if err != nil {
				err = errors.Join(err, s.dropSnapshot(key))
			}
		}()
		if err := s.makeSnapshot(filepath.Join(s.snapshotsDir, key), sn, nil, nil); err != nil {
			return err
		}
	}
	if done, err := s.prepareTarget(target); done || err != nil {
		return err
	}
	return s.mountOverlay(key, sn.lowers, target, unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "", uid, gid)
}

// UnmountRootfs unmounts target and drops the snapshot. It succeeds when there
// is nothing left of either.
func (s *Store) UnmountRootfs(ctx context.Context, key, target string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("unmount %s of %s: %w", target, key, err)
		}
	}()
	unlock, err := s.lockKey(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	if target != "" {
		if err := unmount(target); err != nil {
			return err
		}
	}
	return s.dropSnapshot(key)
}

// Snapshots returns the keys of all snapshots, to find those that nobody
// owns any more.
func (s *Store) Snapshots(ctx context.Context) ([]string, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	keys := make([]string, 0, len(s.snapshots))
	for k := range s.snapshots {
		keys = append(keys, k)
	}
	return keys, nil
}

// takeSnapshot enters the snapshot, or finds it; from then on the image's
// layers stay. A snapshot that is there is on its image, whatever image says
// now: a tag may have moved on since.
func (s *Store) takeSnapshot(key, image string, readOnly bool) (_ snapshot, fresh bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sn, ok := s.snapshots[key]; ok {
		if sn.readOnly != readOnly {
			return snapshot{}, false, fmt.Errorf("snapshot %s exists and is of the other kind (writable or read-only): %w", key, errdefs.ErrAlreadyExists)
		}
		return sn, false, nil
	}
	r, err := s.lookup(image)
	if err != nil {
		return snapshot{}, false, err
	}
	sn := snapshot{image: r.ID, lowers: r.lowers, readOnly: readOnly}
	s.snapshots[key] = sn
	return sn, true, nil
}

// makeSnapshot makes the directory; mappings tell who owns the container's
// root.
func (s *Store) makeSnapshot(dir string, sn snapshot, uid, gid []specs.LinuxIDMapping) error {
	if err := unix.Mkdir(dir, 0o700); err != nil {
		return &os.PathError{Op: "mkdir", Path: dir, Err: err}
	}
	if !sn.readOnly {
		if err := s.makeUpper(dir+"/fs", top(sn.lowers), uid, gid); err != nil {
			return err
		}
		if err := unix.Mkdir(dir+"/work", 0o711); err != nil {
			return &os.PathError{Op: "mkdir", Path: dir + "/work", Err: err}
		}
	}
	mark := "1 " + sn.image.String() + " " + strings.Join(sn.lowers, ":")
	if err := unix.Setxattr(dir, snapshotXattr, []byte(mark), unix.XATTR_CREATE); err != nil {
		return &os.PathError{Op: "setxattr " + snapshotXattr, Path: dir, Err: err}
	}
	return nil
}

// makeUpper makes the container's root directory, with the owner and mode that
// the image's has: overlayfs shows the uppermost one's.
func (s *Store) makeUpper(fs, lower string, uid, gid []specs.LinuxIDMapping) error {
	var root unix.Stat_t
	if err := unix.Lstat(filepath.Join(s.layersDir, lower), &root); err != nil {
		return &os.PathError{Op: "stat", Path: filepath.Join(s.layersDir, lower), Err: err}
	}
	u, err := hostID("user", root.Uid, uid)
	if err != nil {
		return err
	}
	g, err := hostID("group", root.Gid, gid)
	if err != nil {
		return err
	}
	if err := unix.Mkdir(fs, 0o700); err != nil {
		return &os.PathError{Op: "mkdir", Path: fs, Err: err}
	}
	if u != 0 || g != 0 {
		if err := os.Lchown(fs, u, g); err != nil {
			return err
		}
	}
	if err := unix.Chmod(fs, root.Mode&0o7777); err != nil {
		return &os.PathError{Op: "chmod", Path: fs, Err: err}
	}
	return nil
}

// top is the uppermost layer.
func top(lowers []string) string {
	if len(lowers) == 0 {
		return emptyLayer
	}
	return lowers[0]
}

// hostID is an id of the container's as the host has it. One that the mapping
// does not reach becomes the container's root.
func hostID(kind string, id uint32, m []specs.LinuxIDMapping) (int, error) {
	if len(m) == 0 {
		return int(id), nil
	}
	for _, want := range []uint32{id, 0} {
		for _, e := range m {
			if want >= e.ContainerID && uint64(want)-uint64(e.ContainerID) < uint64(e.Size) {
				return int(e.HostID + want - e.ContainerID), nil
			}
		}
	}
	return 0, fmt.Errorf("%s id mappings do not map 0: %w", kind, errdefs.ErrInvalidArgument)
}

// dropSnapshot forgets the snapshot and has its directory deleted in the
// background: a container may have left millions of files.
func (s *Store) dropSnapshot(key string) error {
	err := os.Rename(filepath.Join(s.snapshotsDir, key), s.trash(key))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	s.mu.Lock()
	_, had := s.snapshots[key]
	delete(s.snapshots, key)
	s.mu.Unlock()
	s.usage.Forget(key)
	if had || err == nil {
		s.kickGC()
	}
	return nil
}

// loadSnapshots reads the directories at Open.
func (s *Store) loadSnapshots() error {
	entries, err := os.ReadDir(s.snapshotsDir)
	if err != nil {
		return fmt.Errorf("snapshots: %w", err)
	}
	for _, e := range entries {
		dir := filepath.Join(s.snapshotsDir, e.Name())
		sn, err := s.readSnapshot(dir)
		if err != nil {
			s.log.Info("unfinished snapshot dropped", "snapshot", dir, "error", err)
			if err := os.Rename(dir, s.trash(e.Name())); err != nil {
				return fmt.Errorf("snapshots: %w", err)
			}
			continue
		}
		s.snapshots[e.Name()] = sn
	}
	return nil
}

func (s *Store) readSnapshot(dir string) (sn snapshot, err error) {
	var buf [4096]byte
	n, err := unix.Lgetxattr(dir, snapshotXattr, buf[:])
	if err != nil {
		return sn, err
	}
	version, rest, _ := strings.Cut(string(buf[:n]), " ")
	if version != "1" {
		return sn, fmt.Errorf("%s has version %q, 1 is known", snapshotXattr, clip(version))
	}
	id, lowers, _ := strings.Cut(rest, " ")
	sn.image = digest.Digest(id)
	if err := sn.image.Validate(); err != nil {
		return sn, err
	}
	if r := s.images[sn.image]; r != nil && strings.Join(r.lowers, ":") == lowers {
		sn.lowers = r.lowers // one copy for all
	} else if lowers != "" {
		sn.lowers = strings.Split(lowers, ":")
	}
	for _, l := range sn.lowers {
		if !layerPattern.MatchString(l) {
			return sn, fmt.Errorf("layer %q is no layer's name", clip(l))
		}
	}
	_, err = os.Lstat(filepath.Join(dir, "fs"))
	sn.readOnly = errors.Is(err, os.ErrNotExist)
	return sn, nil
}

// prepareTarget makes the directory and tells whether an overlay is mounted
// there already.
func (s *Store) prepareTarget(target string) (mounted bool, err error) {
	if !filepath.IsAbs(target) {
		return false, fmt.Errorf("target %q is not absolute: %w", target, errdefs.ErrInvalidArgument)
	}
	err = os.Mkdir(target, 0o755)
	if errors.Is(err, os.ErrNotExist) {
		err = os.MkdirAll(target, 0o755)
	} else if errors.Is(err, os.ErrExist) {
		return isOverlayMount(target)
	}
	return false, err
}

// isOverlayMount tells whether target is the root of an overlay mount.
func isOverlayMount(target string) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, target, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_TYPE, &st); err != nil {
		return false, &os.PathError{Op: "statx", Path: target, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return false, &os.PathError{Op: "mount", Path: target, Err: unix.ENOTDIR}
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return false, nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(target, &fs); err != nil {
		return false, &os.PathError{Op: "statfs", Path: target, Err: err}
	}
	return fs.Type == unix.OVERLAYFS_SUPER_MAGIC, nil
}

// mountOverlay mounts the image's layers, with the writable directory
// (relative to the store) on top if there is one.
func (s *Store) mountOverlay(key string, lowers []string, target string, flags uintptr, upper string, uid, gid []specs.LinuxIDMapping) error {
	if len(lowers) == 0 {
		lowers = []string{emptyLayer}
	}
	if len(lowers) == 1 && upper == "" {
		lowers = append(slices.Clone(lowers), voidLayer)
	}
	base := "layers/"
	if len(uid) > 0 {
		mapped, undo, err := s.mapLayers(key, uid, gid)
		if err != nil {
			return err
		}
		defer undo()
		base = mapped
	}
	// Absolute paths need no change of directory, and that needs a thread of
	// its own; but they may not fit, or contain what overlayfs takes apart.
	abs := s.cfg.Dir + "/"
	data := overlayData(abs, base, lowers, upper)
	if len(data) <= overlayPage && !strings.ContainsAny(s.cfg.Dir, ":,\\") {
		return mountErr(unix.Mount("overlay", target, "overlay", flags, data))
	}
	if data = overlayData("", base, lowers, upper); len(data) <= overlayPage {
		return mountErr(mountIn(s.cfg.Dir, target, flags, data))
	}
	// Relative to the layers: of each only its name is left.
	if upper != "" {
		upper = strings.Repeat("../", strings.Count(base, "/")) + upper
	}
	data = overlayData("", "", lowers, upper)
	if len(data) > overlayPage {
		return fmt.Errorf("%d layers are more than one mount takes: %w", len(lowers), errdefs.ErrFailedPrecondition)
	}
	return mountErr(mountIn(filepath.Join(s.cfg.Dir, base), target, flags, data))
}

func overlayData(prefix, base string, lowers []string, upper string) string {
	var b strings.Builder
	b.WriteString("index=off,lowerdir=")
	for i, l := range lowers {
		if i > 0 {
			b.WriteByte(':')
		}
		b.WriteString(prefix + base + l)
	}
	if upper != "" {
		b.WriteString(",upperdir=" + prefix + upper + "/fs,workdir=" + prefix + upper + "/work")
	}
	return b.String()
}

// mountIn mounts with relative paths: on a thread that has a working directory
// of its own and ends with the call.
func mountIn(dir, target string, flags uintptr, data string) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: Go ends the thread
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			done <- err
			return
		}
		if err := unix.Chdir(dir); err != nil {
			done <- err
			return
		}
		done <- unix.Mount("overlay", target, "overlay", flags, data)
	}()
	return <-done
}

func mountErr(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("overlay: %w: mounting needs root: %w", err, errdefs.ErrPermissionDenied)
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("overlay: %w: this kernel has no overlayfs: %w", err, errdefs.ErrFailedPrecondition)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("overlay: %w: the store's file system cannot be the upper layer of an overlay (use ext4, xfs with ftype=1 or btrfs), or see the kernel's log: %w", err, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("overlay: %w", err)
}

// unmount takes off every mount at target. A busy one is detached: it goes
// with its last user.
func unmount(target string) error {
	for range 16 {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		switch {
		case err == nil:
			continue
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT): // no mount point, or not there
			return nil
		default:
			return &os.PathError{Op: "unmount", Path: target, Err: err}
		}
	}
	return fmt.Errorf("%s is mounted over more than 16 times: %w", target, errdefs.ErrFailedPrecondition)
}
