package volumes

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podd-runtime/podd/volumes/tree"
)

// subPathPod has an emptyDir that its container mounts by subPath.
func subPathPod(sub string) *v1.Pod {
	p := pod("u1", emptyDirVolume("data", ""))
	p.Spec.Containers[0].VolumeMounts[0].SubPath = sub
	return p
}

func TestSubPath(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	p := subPathPod("a/b")
	setup(t, v, p)
	root := v.path(p, &p.Spec.Volumes[0])
	bound := hostPaths(t, v, p)[0]
	if want := filepath.Join(v.podDir("u1"), "volume-subpaths/data/main/0"); bound != want {
		t.Errorf("bound at %s, want %s", bound, want)
	}
	if st, err := os.Stat(root + "/a/b"); err != nil || st.Mode().Perm() != 0o777 {
		t.Errorf("missing subPath: %v, %v", st, err)
	}
	if err := os.WriteFile(bound+"/x", []byte("1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(root + "/a/b/x"); err != nil {
		t.Errorf("not the same directory: %v", err)
	}
	// Again, as for a restart of the container, now with a file.
	p.Spec.Containers[0].VolumeMounts[0].SubPath = "a/b/x"
	mounts, cleanup, err := v.Mounts(context.Background(), p, &p.Spec.Containers[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(mounts[0].HostPath); err != nil || string(data) != "1" {
		t.Errorf("bound file: %q %v", data, err)
	}
	cleanup()
	if _, err := os.Lstat(bound); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("cleanup left the bind: %v", err)
	}
}

func TestSubPathExpr(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	p := subPathPod("")
	setup(t, v, p)
	m := &p.Spec.Containers[0].VolumeMounts[0]
	env := func(name string) string { return map[string]string{"POD": "web-0", "UP": "../x"}[name] }
	for expr, want := range map[string]string{
		"$(POD)/log": "web-0/log", "a-$$(POD)": "a-$(POD)", "plain": "plain", "$(NONE)/x": "", "$(UP)": "", "x/$(NONE)": "",
	} {
		m.SubPathExpr = expr
		_, cleanup, err := v.Mounts(context.Background(), p, &p.Spec.Containers[0], env)
		cleanup()
		if (err == nil) != (want != "") {
			t.Errorf("%q: %v", expr, err)
			continue
		}
		if want != "" {
			if st, err := os.Stat(filepath.Join(v.path(p, &p.Spec.Volumes[0]), want)); err != nil || !st.IsDir() {
				t.Errorf("%q: %v", expr, err)
			}
		}
	}
}

func TestSubPathLinks(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	p := subPathPod("x")
	setup(t, v, p)
	root := v.path(p, &p.Spec.Volumes[0])
	outside := t.TempDir()
	for _, d := range []string{"/in", "/deep/er"} {
		if err := os.MkdirAll(root+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{
		"abs": outside, "up": "../../../../..", "proc": "/proc/self/root", "inside": "in", "dangling": outside + "/not-there", "deep/er/back": "../../in",
	} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	for sub, ok := range map[string]bool{
		"abs": false, "abs/x": false, "up": false, "up/etc": false, "proc": false, "dangling": false, "dangling/new": false,
		"../x": false, "in/../../x": false, "/etc": false, "inside": true, "inside/new": true, "deep/er/back": true, "in": true,
	} {
		p.Spec.Containers[0].VolumeMounts[0].SubPath = sub
		_, cleanup, err := v.Mounts(context.Background(), p, &p.Spec.Containers[0], nil)
		cleanup()
		if (err == nil) != ok {
			t.Errorf("subPath %q: %v", sub, err)
		}
		if err != nil && !strings.Contains(err.Error(), `container "main": volume "data"`) {
			t.Errorf("error does not name container and volume: %v", err)
		}
	}
	if entries, _ := os.ReadDir(outside); len(entries) != 0 {
		t.Errorf("something was made outside: %v", entries)
	}
}

// exchange swaps two paths as fast as it can until stop is called, as a
// container would that tries to win a race.
func exchange(a, b string) (stop func()) {
	end, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-end:
				return
			default:
				unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
			}
		}
	}()
	return func() { close(end); <-done }
}

// contested repeats f while an attacker races it.
func contested(f func()) {
	for end := time.Now().Add(500 * time.Millisecond); time.Now().Before(end); {
		f()
	}
}

// CVE-2017-1002101, CVE-2021-25741: a container exchanges its subPath for a link
// while it is being resolved. Whatever is bound must be inside the volume.
func TestSubPathExchange(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	p := subPathPod("a/b")
	setup(t, v, p)
	root := v.path(p, &p.Spec.Volumes[0])
	outside := t.TempDir()
	if err := os.MkdirAll(outside+"/b", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(outside+"/b/host", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(root+"/a/b", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, root+"/evil"); err != nil {
		t.Fatal(err)
	}
	stop := exchange(root+"/a", root+"/evil")
	good, refused := 0, 0
	contested(func() {
		mounts, cleanup, err := v.Mounts(context.Background(), p, &p.Spec.Containers[0], nil)
		if err != nil {
			refused++
			return
		}
		if _, err := os.Stat(mounts[0].HostPath + "/host"); err == nil {
			t.Error("a directory of the host was bound into the container")
		}
		good++
		cleanup()
	})
	stop()
	t.Logf("%d bound, %d refused", good, refused)
	if good+refused == 0 {
		t.Error("nothing was tried")
	}
	if entries, _ := os.ReadDir(outside); len(entries) != 1 {
		t.Errorf("something was made outside: %v", entries)
	}
}

// CVE-2017-1002102 and its kin: nothing outside is deleted, be it behind a link
// or behind a mount.
func TestTeardownStaysInside(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	outside := t.TempDir()
	if err := os.WriteFile(outside+"/precious", []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := pod("u1", emptyDirVolume("data", ""), emptyDirVolume("mem", v1.StorageMediumMemory))
	setup(t, v, p)
	root := v.path(p, &p.Spec.Volumes[0])
	if err := os.Symlink(outside, root+"/link"); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"/bind", "/stack", "/with space"} {
		if err := os.Mkdir(root+d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(outside, root+d, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("tmpfs", root+"/stack", "tmpfs", 0, ""); err != nil { // on top of the first
		t.Fatal(err)
	}
	held, err := os.Open(v.path(p, &p.Spec.Volumes[1])) // busy: must be detached
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := v.Teardown(context.Background(), "u1"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(outside + "/precious"); err != nil {
		t.Fatalf("teardown deleted through a link or mount: %v", err)
	}
	if _, err := os.Stat(v.podDir("u1")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("directory is left: %v", err)
	}
}

// CVE-2017-1002102: what a container puts in place of the links and directories
// of a configMap's volume leads neither writing nor deletion outside.
func TestContentThatPointsOutside(t *testing.T) {
	for name, attack := range map[string]func(root, gen, outside string) error{
		"the link to the content": func(root, _, outside string) error {
			return errors.Join(os.Remove(root+"/..data"), os.Symlink(outside, root+"/..data"))
		},
		"the link, by a relative path": func(root, _, outside string) error {
			rel, err := filepath.Rel(root, outside)
			return errors.Join(err, os.Remove(root+"/..data"), os.Symlink(rel, root+"/..data"))
		},
		"the content": func(root, gen, outside string) error {
			return errors.Join(os.RemoveAll(gen), os.Symlink(outside, gen))
		},
		"a file": func(_, gen, outside string) error {
			return errors.Join(os.Remove(gen+"/a"), os.Symlink(outside+"/precious", gen+"/a"))
		},
		"an old content": func(root, _, outside string) error { return os.Symlink(outside, root+"/..2001_01_01") },
		"the next link":  func(root, _, outside string) error { return os.Symlink(outside, root+"/..data_tmp") },
		"the link as a directory": func(root, _, _ string) error {
			return errors.Join(os.Remove(root+"/..data"), os.MkdirAll(root+"/..data/a", 0o755))
		},
	} {
		t.Run(name, func(t *testing.T) {
			v, obj := testVolumes(t)
			outside := t.TempDir()
			if err := os.WriteFile(outside+"/precious", []byte("x"), 0o644); err != nil {
				t.Fatal(err)
			}
			p := pod("u1", configMapVolume("c"))
			setup(t, v, p)
			root := v.path(p, &p.Spec.Volumes[0])
			gen, err := filepath.EvalSymlinks(root + "/..data")
			if err != nil {
				t.Fatal(err)
			}
			if err := attack(root, gen, outside); err != nil {
				t.Fatal(err)
			}
			obj.set(&v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "conf"}, Data: map[string]string{"a": "new"}})
			err = v.Refresh(context.Background(), p)
			if data, rerr := os.ReadFile(root + "/a"); err == nil && string(data) != "new" {
				t.Errorf("content after the refresh: %q, %v", data, rerr)
			}
			if err := v.Teardown(context.Background(), "u1"); err != nil {
				t.Error(err)
			}
			entries, err := os.ReadDir(outside)
			if err != nil || len(entries) != 1 || entries[0].Name() != "precious" {
				t.Errorf("outside: %v, %v", entries, err)
			}
			if data, err := os.ReadFile(outside + "/precious"); err != nil || string(data) != "x" {
				t.Errorf("file outside: %q, %v", data, err)
			}
		})
	}
}

// What is checked, made, handed over or deleted is never what an attacker puts
// in its place meanwhile.
func TestExchangeWhileWalking(t *testing.T) {
	needRoot(t)
	base, outside := t.TempDir(), t.TempDir()
	if err := os.WriteFile(outside+"/precious", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	make := func() { // nobody races it
		if err := errors.Join(os.RemoveAll(base+"/vol"), os.MkdirAll(base+"/vol/dir/deep", 0o755)); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(base+"/vol/dir/precious", nil, 0o600); err != nil {
			t.Fatal(err)
		}
		os.Symlink(outside, base+"/vol/evil")
	}
	safe := func(what string) {
		gid, mode := owner(t, outside+"/precious") // fails when it is gone
		dirGid, _ := owner(t, outside)
		if gid == 4711 || mode != 0o600 || dirGid == 4711 {
			t.Errorf("%s outside the volume: gid %d and %d, mode %o", what, gid, dirGid, mode)
		}
	}
	make()
	stop := exchange(base+"/vol/dir", base+"/vol/evil")
	root, err := openDir(base + "/vol")
	if err != nil {
		t.Fatal(err)
	}
	defer root.close()
	contested(func() {
		// It may fail on what is exchanged, but not leave the volume.
		_ = applyGroup(context.Background(), root, 4711, v1.FSGroupChangeAlways)
	})
	stop()
	safe("fsGroup")

	d, err := openDir(base)
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	contested(func() {
		make()
		stop := exchange(base+"/vol/dir", base+"/vol/evil")
		_ = removeTree(context.Background(), d, "vol")
		stop()
	})
	safe("removal")
}

// A hostPath of a type that makes what is missing makes it there, or nowhere.
func TestHostPathExchange(t *testing.T) {
	base, outside := t.TempDir(), t.TempDir()
	if err := os.Symlink(outside+"/made", base+"/evil"); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []v1.HostPathType{v1.HostPathFileOrCreate, v1.HostPathDirectoryOrCreate} {
		end, done := make(chan struct{}), make(chan struct{})
		go func() { // the path is now missing, now a link to something missing
			defer close(done)
			for {
				select {
				case <-end:
					return
				default:
					os.Rename(base+"/evil", base+"/path")
					os.Rename(base+"/path", base+"/evil")
				}
			}
		}()
		contested(func() {
			_ = checkHostPath(base+"/path", kind)
			if _, err := os.Lstat(outside + "/made"); err == nil {
				t.Errorf("%s: made where a link led", kind)
				os.Remove(outside + "/made")
			}
			os.Remove(base + "/path")
			os.Symlink(outside+"/made", base+"/evil")
		})
		close(end)
		<-done
	}
}

// Removal itself does not rely on the unmounting before it.
func TestRemoveTreeStopsAtMount(t *testing.T) {
	needRoot(t)
	base, outside := t.TempDir(), t.TempDir()
	if err := os.WriteFile(outside+"/precious", []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(base+"/tree/a/b", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(outside, base+"/tree/a/b", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(base+"/tree/a/b", unix.MNT_DETACH)
	d, err := openDir(base)
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	if err := removeTree(context.Background(), d, "tree"); !errors.Is(err, tree.ErrMount) || !strings.Contains(err.Error(), "tree/a/b") {
		t.Errorf("error: %v", err)
	}
	if _, err := os.Stat(outside + "/precious"); err != nil {
		t.Fatalf("removal crossed a mount: %v", err)
	}
}

func TestTeardownOfBadUIDs(t *testing.T) {
	v, _ := testVolumes(t)
	for _, uid := range []string{"", ".", "..", "a/b", "../x"} {
		p := pod(uid)
		if err := v.Teardown(context.Background(), p.UID); !errdefs.IsInvalidArgument(err) {
			t.Errorf("uid %q: %v", uid, err)
		}
		if err := v.Setup(context.Background(), p); !errdefs.IsInvalidArgument(err) {
			t.Errorf("uid %q: %v", uid, err)
		}
	}
	// A link in place of the directory is not followed.
	outside := t.TempDir()
	if err := os.WriteFile(outside+"/precious", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(v.cfg.RootDir+"/pods", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, v.cfg.RootDir+"/pods/u9"); err != nil {
		t.Fatal(err)
	}
	if err := v.Teardown(context.Background(), "u9"); err == nil {
		t.Error("a link was taken for a pod's directory")
	}
	if _, err := os.Stat(outside + "/precious"); err != nil {
		t.Error("deleted through a link")
	}
}

// CVE-class: names of projected files that leave the volume.
func TestContentPaths(t *testing.T) {
	for p, ok := range map[string]bool{
		"a": true, "a/b": true, "a/./b": true, ".hidden": true, "a..b": true,
		"..": false, "../a": false, "a/../../b": false, "..data": false, "/a": false, "": false, "a\x00b": false, strings.Repeat("x", 300): false,
	} {
		if err := checkPaths(files{p: {}}); (err == nil) != ok {
			t.Errorf("%q: %v", p, err)
		}
	}
	if err := checkPaths(files{"a": {}, "a/b": {}}); err == nil {
		t.Error("a file below a file")
	}
}
