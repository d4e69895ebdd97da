package images

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func sum(b []byte) [32]byte { return sha256.Sum256(b) }

func mountsBelow(t testing.TB, dir string) int {
	t.Helper()
	n := 0
	for l := range strings.Lines(read(t, "/proc/self/mountinfo")) {
		if f := strings.Fields(l); strings.HasPrefix(f[4], dir) {
			n++
		}
	}
	return n
}

func TestMountIsIdempotentAndSurvivesReboot(t *testing.T) {
	host := registryServer(t, nil)
	push(t, host+"/x/y:1", imageOf(t, layerOf(t, file("a", "image"))))
	store, targets := t.TempDir(), t.TempDir()
	s := openStore(t, store, nil)
	mustPull(t, s, host+"/x/y:1")
	target := filepath.Join(targets, "deep/er/rootfs")
	mount := func() {
		t.Helper()
		if err := s.MountRootfs(t.Context(), "c1", host+"/x/y:1", target, nil, nil); err != nil {
			t.Fatal(err)
		}
		if n := mountsBelow(t, targets); n != 1 {
			t.Fatalf("%d mounts", n)
		}
	}
	t.Cleanup(func() { unmount(target) })
	mount()
	mount()
	if err := os.WriteFile(filepath.Join(target, "a"), []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}

	// The daemon is restarted: the mount is still there.
	s.Close()
	s = openStore(t, store, nil)
	mount()
	if got := read(t, filepath.Join(target, "a")); got != "mine" {
		t.Errorf("after restart: %q", got)
	}

	// The node is rebooted: mounts are gone, even the image is; the snapshot is not.
	if err := s.Remove(t.Context(), host+"/x/y:1"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if err := unmount(target); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, store, nil)
	if err := s.GarbageCollect(t.Context()); err != nil {
		t.Fatal(err)
	}
	mount()
	if got := read(t, filepath.Join(target, "a")); got != "mine" {
		t.Errorf("after reboot: %q", got)
	}
	if keys, _ := s.Snapshots(t.Context()); len(keys) != 1 || keys[0] != "c1" {
		t.Errorf("snapshots: %v", keys)
	}

	// The image comes again while the snapshot has its layers.
	mustPull(t, s, host+"/x/y:1")
	for range 2 {
		if err := s.UnmountRootfs(t.Context(), "c1", target); err != nil {
			t.Fatal(err)
		}
	}
	if n := mountsBelow(t, targets); n != 0 {
		t.Errorf("%d mounts left", n)
	}
	if root := mountOf(t, s, "c2", host+"/x/y:1"); read(t, filepath.Join(root, "a")) != "image" {
		t.Error("the image was changed by a container")
	}
}

func TestMountErrors(t *testing.T) {
	s := openStore(t, t.TempDir(), nil)
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	img := loadOne(t, s, imageOf(t, layerOf(t, file("a", ""))))
	before := files(t, s.cfg.Dir)
	full := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(full, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, key, image, target string
		uid, gid                 []specs.LinuxIDMapping
		is                       func(error) bool
	}{
		{"no such image", "k", "nope:1", "/nowhere", nil, nil, errdefs.IsNotFound},
		{"bad key", "../k", img, "/nowhere", nil, nil, errdefs.IsInvalidArgument},
		{"hidden key", ".k", img, "/nowhere", nil, nil, errdefs.IsInvalidArgument},
		{"relative target", "k", img, "rootfs", nil, nil, errdefs.IsInvalidArgument},
		{"target is a file", "k", img, full, nil, nil, func(err error) bool { return err != nil }},
		{"half of a mapping", "k", img, "/nowhere", ids, nil, errdefs.IsInvalidArgument},
		{"root not mapped", "k", img, "/nowhere", []specs.LinuxIDMapping{{ContainerID: 1, HostID: 1, Size: 1}}, ids, errdefs.IsInvalidArgument},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := s.MountRootfs(t.Context(), tt.key, tt.image, tt.target, tt.uid, tt.gid)
			if !tt.is(err) {
				t.Fatalf("err = %v", err)
			}
		})
	}
	if err := s.GarbageCollect(t.Context()); err != nil {
		t.Fatal(err)
	}
	for f := range files(t, s.cfg.Dir) {
		if !before[f] {
			t.Errorf("left behind: %s", f)
		}
	}
	if len(s.snapshots)+len(s.keys) != 0 {
		t.Error("failed mounts are remembered")
	}
}

func loadOne(t testing.TB, s *Store, img v1.Image) string {
	t.Helper()
	host := registryServer(t, nil)
	push(t, host+"/x/y:1", img)
	return mustPull(t, s, host+"/x/y:1").ID
}

// TestManyLayers: the option string of the mount is longer than a page with
// absolute paths, also when the store lies deep.
func TestManyLayers(t *testing.T) {
	var layers []v1.Layer
	for i := range 127 {
		layers = append(layers, layerOf(t, file(fmt.Sprint("f", i), fmt.Sprint(i)), file("last", fmt.Sprint(i))))
	}
	img := imageOf(t, layers...)
	for _, sub := range []string{"s", strings.Repeat("deep/", 60) + "s", "with:colon,and,comma"} {
		t.Run(sub[:1], func(t *testing.T) {
			s := openStore(t, filepath.Join(t.TempDir(), sub), nil)
			root := mountOf(t, s, strings.Repeat("k", 64), loadOne(t, s, img))
			if read(t, root+"/f0") != "0" || read(t, root+"/f126") != "126" || read(t, root+"/last") != "126" {
				t.Error("layers are not all there in order")
			}
			if err := os.WriteFile(root+"/new", []byte("x"), 0o644); err != nil {
				t.Error(err)
			}
			ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
			mapped := filepath.Join(t.TempDir(), "mapped")
			if err := s.MountRootfs(t.Context(), strings.Repeat("m", 64), img2id(t, s), mapped, ids, ids); err != nil && !errdefs.IsFailedPrecondition(err) {
				t.Fatal(err)
			} else if err == nil {
				if read(t, mapped+"/last") != "126" {
					t.Error("id-mapped mount")
				}
				if err := s.UnmountRootfs(t.Context(), strings.Repeat("m", 64), mapped); err != nil {
					t.Error(err)
				}
			}
			target := filepath.Join(t.TempDir(), "ro")
			if err := s.MountImage(t.Context(), "volume", img2id(t, s), target, nil, nil); err != nil {
				t.Fatal(err)
			}
			if read(t, target+"/last") != "126" {
				t.Error("read-only mount")
			}
			if err := s.UnmountRootfs(t.Context(), "volume", target); err != nil {
				t.Error(err)
			}
		})
	}
}

func img2id(t testing.TB, s *Store) string {
	list, err := s.List(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	return list[0].ID
}

func TestMountImage(t *testing.T) {
	s := openStore(t, t.TempDir(), nil)
	one := loadOne(t, s, imageOf(t, layerOf(t, file("a", "x"))))
	none := loadOne(t, s, imageOf(t))
	for i, img := range []string{one, none} {
		target := filepath.Join(t.TempDir(), "v")
		key := fmt.Sprint("v", i)
		for range 2 {
			if err := s.MountImage(t.Context(), key, img, target, nil, nil); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(target, "new"), nil, 0o644); err == nil {
			t.Error("image volume can be written")
		}
		var st unix.Statfs_t
		if err := unix.Statfs(target, &st); err != nil {
			t.Fatal(err)
		}
		if want := int64(unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC); st.Flags&want != want {
			t.Errorf("flags %x", st.Flags)
		}
		if err := s.MountRootfs(t.Context(), key, img, target, nil, nil); !errdefs.IsAlreadyExists(err) {
			t.Errorf("writable under the same key: %v", err)
		}
		if err := s.UnmountRootfs(t.Context(), key, target); err != nil {
			t.Fatal(err)
		}
	}
	// An image without layers has an empty, writable root.
	root := mountOf(t, s, "c", none)
	if err := os.WriteFile(filepath.Join(root, "new"), nil, 0o644); err != nil {
		t.Error(err)
	}
}

func TestIDMappedRootfs(t *testing.T) {
	s := openStore(t, t.TempDir(), nil)
	owned := file("owned", "x")
	owned.Uid, owned.Gid = 33, 44
	img := loadOne(t, s, imageOf(t, layerOf(t, owned, file("root", "y")), layerOf(t, dir("d/"), file("d/z", "z"))))
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
	targets := t.TempDir()
	target := filepath.Join(targets, "rootfs")
	err := s.MountRootfs(t.Context(), "c", img, target, ids, ids)
	if errdefs.IsFailedPrecondition(err) {
		t.Skipf("this kernel or file system has no id-mapped mounts: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.UnmountRootfs(context.Background(), "c", target) })
	for name, want := range map[string][2]uint32{"": {200000, 200000}, "owned": {200033, 200044}, "root": {200000, 200000}, "d/z": {200000, 200000}} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(target, name), &st); err != nil {
			t.Fatal(err)
		}
		if st.Uid != want[0] || st.Gid != want[1] {
			t.Errorf("%q belongs to %d:%d, want %v", name, st.Uid, st.Gid, want)
		}
	}
	if n := mountsBelow(t, s.cfg.Dir); n != 0 {
		t.Errorf("%d helper mounts left in the store", n)
	}
	if e, _ := os.ReadDir(s.idmapDir); len(e) != 0 {
		t.Errorf("left in idmap: %v", e)
	}
	// A process killed in between leaves the helper mount; the next one drops it.
	if _, _, err := s.mapLayers("left", ids, ids); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = openStore(t, s.cfg.Dir, nil)
	if n := mountsBelow(t, s.cfg.Dir); n != 0 {
		t.Errorf("%d helper mounts left after Open", n)
	}
	// The same image for another range, at once.
	other := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 300000, Size: 65536}}
	target2 := filepath.Join(targets, "rootfs2")
	if err := s.MountRootfs(t.Context(), "c2", img, target2, other, other); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.UnmountRootfs(context.Background(), "c2", target2) })
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(target2, "owned"), &st); err != nil || st.Uid != 300033 {
		t.Errorf("second range: %d, %v", st.Uid, err)
	}
}

// TestManyAtOnce mounts and unmounts many root file systems while images come
// and go, and counts afterwards.
func TestManyAtOnce(t *testing.T) {
	host := registryServer(t, nil)
	push(t, host+"/x/y:1", imageOf(t, layerOf(t, file("a", "1"))))
	push(t, host+"/x/z:1", imageOf(t, layerOf(t, file("a", "1")), layerOf(t, file("b", "2"))))
	s := openStore(t, t.TempDir(), nil)
	targets := t.TempDir()
	mustPull(t, s, host+"/x/y:1")
	if err := s.GarbageCollect(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := files(t, s.cfg.Dir)
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			key := fmt.Sprint("c", i)
			target := filepath.Join(targets, key)
			for range 3 {
				if err := s.MountRootfs(t.Context(), key, host+"/x/y:1", target, nil, nil); err != nil {
					t.Error(err)
				}
				if err := os.WriteFile(filepath.Join(target, "w"), []byte(key), 0o600); err != nil {
					t.Error(err)
				}
				if err := s.UnmountRootfs(t.Context(), key, target); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 4 {
		wg.Go(func() {
			for range 3 {
				if _, err := s.Pull(t.Context(), host+"/x/z:1", nil, nil); err != nil {
					t.Error(err)
				}
				if err := s.Remove(t.Context(), host+"/x/z:1"); err != nil && !errdefs.IsNotFound(err) {
					t.Error(err)
				}
				if err := s.GarbageCollect(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := s.Remove(t.Context(), host+"/x/z:1"); err != nil && !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if err := s.GarbageCollect(t.Context()); err != nil {
		t.Fatal(err)
	}
	for f := range files(t, s.cfg.Dir) {
		if !before[f] {
			t.Errorf("left behind: %s", f)
		}
	}
	if n := mountsBelow(t, targets); n != 0 {
		t.Errorf("%d mounts left", n)
	}
	if len(s.snapshots)+len(s.keys)+len(s.leases) != 0 {
		t.Error("maps are not empty")
	}
}

// TestSnapshotOfAnyShape: a container leaves a directory with very many
// entries and one that is very deep; it is measured and deleted all the same.
func TestSnapshotOfAnyShape(t *testing.T) {
	s := openStore(t, t.TempDir(), nil)
	img := loadOne(t, s, imageOf(t, layerOf(t, file("a", ""))))
	root := mountOf(t, s, "c", img)
	// Into the upper directory itself: chdir by chdir would take the process along.
	at, err := unix.Open(filepath.Join(s.snapshotsDir, "c/fs"), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range 3000 { // far beyond PATH_MAX
		if err := unix.Mkdirat(at, "dddddddd", 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(at, "dddddddd", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		unix.Close(at)
		if err != nil {
			t.Fatal(err)
		}
		at = next
	}
	unix.Close(at)
	if err := os.Symlink("/etc", root+"/link"); err != nil {
		t.Fatal(err)
	}
	if _, inodes, err := s.Usage(t.Context(), "c"); err != nil || inodes < 3000 {
		t.Errorf("usage: %d inodes, %v", inodes, err)
	}
	if err := s.UnmountRootfs(t.Context(), "c", root); err != nil {
		t.Fatal(err)
	}
	if err := s.GarbageCollect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(s.trashDir); len(left) != 0 {
		t.Errorf("left in trash: %d", len(left))
	}
	if _, err := os.Stat("/etc/passwd"); err != nil {
		t.Error(err)
	}
}

func TestDirectoriesAreSpread(t *testing.T) {
	s := openStore(t, t.TempDir(), nil)
	var fs unix.Statfs_t
	if err := unix.Statfs(s.layersDir, &fs); err != nil || fs.Type != unix.EXT4_SUPER_MAGIC {
		t.Skip("not on ext4")
	}
	for _, dir := range []string{s.layersDir, s.snapshotsDir} {
		fd, err := unix.Open(dir, unix.O_RDONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
		unix.Close(fd)
		if err != nil || flags&fsTopdir == 0 {
			t.Errorf("%s has flags %x, %v", dir, flags, err)
		}
	}
}
