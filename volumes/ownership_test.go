package volumes

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
)

// gid and mode of a path itself.
func owner(tb testing.TB, path string) (uint32, uint32) {
	tb.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		tb.Fatal(err)
	}
	return st.Gid, st.Mode & 0o7777
}

func TestApplyGroup(t *testing.T) {
	needRoot(t)
	vol, outside := t.TempDir(), t.TempDir()
	for _, d := range []string{vol + "/sub/deep", vol + "/mnt", outside + "/dir"} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{vol + "/f", vol + "/sub/deep/f", outside + "/dir/f"} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{"link": outside + "/dir/f", "linkdir": outside + "/dir", "dangling": "/no/such"} {
		if err := os.Symlink(target, filepath.Join(vol, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(vol+"/fifo", 0o600); err != nil { // must not block
		t.Fatal(err)
	}
	if err := unix.Mount(outside, vol+"/mnt", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(vol+"/mnt", unix.MNT_DETACH) })
	root, err := openDir(vol)
	if err != nil {
		t.Fatal(err)
	}
	defer root.close()

	if err := applyGroup(context.Background(), root, 4711, v1.FSGroupChangeOnRootMismatch); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]uint32{"": 0o2770, "/f": 0o660, "/sub": 0o2770, "/sub/deep": 0o2770, "/sub/deep/f": 0o660, "/fifo": 0o660} {
		gid, mode := owner(t, vol+path)
		if path == "" {
			mode |= 0o700 // of the temporary directory
			want |= mode & 0o007
		}
		if gid != 4711 || mode != want {
			t.Errorf("%s: gid %d mode %o, want %o", path, gid, mode, want)
		}
	}
	if gid, _ := owner(t, vol+"/link"); gid != 4711 {
		t.Errorf("the link itself: gid %d", gid)
	}
	for _, path := range []string{"", "/dir", "/dir/f"} {
		if gid, _ := owner(t, outside+path); gid == 4711 {
			t.Errorf("%s outside the volume changed hands", path)
		}
	}

	// OnRootMismatch: root is right, nothing is touched; Always: all is.
	if err := os.WriteFile(vol+"/new", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(vol+"/new", 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := applyGroup(context.Background(), root, 4711, v1.FSGroupChangeOnRootMismatch); err != nil {
		t.Fatal(err)
	}
	if gid, _ := owner(t, vol+"/new"); gid != 0 {
		t.Error("OnRootMismatch walked a volume whose root is right")
	}
	if err := applyGroup(context.Background(), root, 4711, v1.FSGroupChangeAlways); err != nil {
		t.Fatal(err)
	}
	if gid, mode := owner(t, vol+"/new"); gid != 4711 || mode != 0o660 {
		t.Errorf("Always: gid %d mode %o", gid, mode)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := applyGroup(ctx, root, 1, v1.FSGroupChangeAlways); err == nil {
		t.Error("a cancelled walk went on")
	}
}

// A pod that is updated in place may get another group; its data stays.
func TestEmptyDirChangesGroup(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	p := pod("u1", emptyDirVolume("d", ""))
	setup(t, v, p)
	dir := hostPaths(t, v, p)[0]
	if err := os.WriteFile(dir+"/f", []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	group := int64(77)
	p.Spec.SecurityContext = &v1.PodSecurityContext{FSGroup: &group}
	setup(t, v, p)
	if gid, mode := owner(t, dir+"/f"); gid != 77 || mode != 0o660 {
		t.Errorf("gid %d mode %o", gid, mode)
	}
	if gid, mode := owner(t, dir); gid != 77 || mode != 0o2777 {
		t.Errorf("root: gid %d mode %o", gid, mode)
	}
}
