package volumes

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func TestMain(m *testing.M) {
	HelperMain()
	os.Exit(m.Run())
}

func needRoot(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("needs root: mounts")
	}
}

// fakeObjects are the objects of a node.
type fakeObjects struct {
	mu      sync.Mutex
	maps    map[string]*v1.ConfigMap
	secrets map[string]*v1.Secret
}

func (f *fakeObjects) ConfigMap(namespace, name string) (*v1.ConfigMap, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.maps[namespace+"/"+name]; m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("configMap %s/%s: %w", namespace, name, errdefs.ErrNotFound)
}

func (f *fakeObjects) Secret(namespace, name string) (*v1.Secret, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.secrets[namespace+"/"+name]; s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("secret %s/%s: %w", namespace, name, errdefs.ErrNotFound)
}

func (f *fakeObjects) set(m *v1.ConfigMap) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.maps[m.Namespace+"/"+m.Name] = m
}

func objects() *fakeObjects {
	return &fakeObjects{
		maps: map[string]*v1.ConfigMap{"ns/conf": {
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "conf"},
			Data:       map[string]string{"a": "A", "b": "B"}, BinaryData: map[string][]byte{"bin": {0, 1}},
		}},
		secrets: map[string]*v1.Secret{"ns/sec": {
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "sec"}, Data: map[string][]byte{"p": []byte("secret")},
		}},
	}
}

// testVolumes works below a temporary directory and leaves no mount behind.
func testVolumes(tb testing.TB) (*Volumes, *fakeObjects) {
	tb.Helper()
	obj := objects()
	v := New(Config{RootDir: tb.TempDir(), Objects: obj, Log: slog.New(slog.DiscardHandler)})
	tb.Cleanup(func() {
		uids, err := v.Pods()
		if err != nil {
			tb.Error(err)
		}
		for _, uid := range uids {
			if err := v.Teardown(context.Background(), uid); err != nil {
				tb.Error(err)
			}
		}
		table, err := readMounts()
		if err != nil {
			tb.Fatal(err)
		}
		if left := table.below(v.cfg.RootDir); len(left) > 0 {
			tb.Errorf("mounts left behind: %v", left)
			for _, m := range left {
				unix.Unmount(m.point, unix.MNT_DETACH)
			}
		}
	})
	return v, obj
}

// pod makes a pod that mounts every one of its volumes.
func pod(uid string, vols ...v1.Volume) *v1.Pod {
	p := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "pod", UID: types.UID(uid), Labels: map[string]string{"app": "web"}},
		Spec:       v1.PodSpec{Containers: []v1.Container{{Name: "main"}}, Volumes: vols},
	}
	for _, vol := range vols {
		p.Spec.Containers[0].VolumeMounts = append(p.Spec.Containers[0].VolumeMounts,
			v1.VolumeMount{Name: vol.Name, MountPath: "/" + vol.Name})
	}
	return p
}

func configMapVolume(name string, items ...v1.KeyToPath) v1.Volume {
	return v1.Volume{Name: name, VolumeSource: v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{
		LocalObjectReference: v1.LocalObjectReference{Name: "conf"}, Items: items}}}
}

func emptyDirVolume(name string, medium v1.StorageMedium) v1.Volume {
	return v1.Volume{Name: name, VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{Medium: medium}}}
}

func setup(tb testing.TB, v *Volumes, p *v1.Pod) {
	tb.Helper()
	if err := v.Setup(context.Background(), p); err != nil {
		tb.Fatal(err)
	}
}

// hostPaths returns where each mount of the first container is on the host.
func hostPaths(tb testing.TB, v *Volumes, p *v1.Pod) []string {
	tb.Helper()
	mounts, _, err := v.Mounts(context.Background(), p, &p.Spec.Containers[0], nil)
	if err != nil {
		tb.Fatal(err)
	}
	var paths []string
	for _, m := range mounts {
		paths = append(paths, m.HostPath)
	}
	return paths
}

// listing lists files with mode and content as a reader sees them.
func listing(tb testing.TB, root string) map[string]string {
	tb.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(root+"/", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		if strings.HasPrefix(rel, "..") {
			return nil
		}
		st, err := os.Stat(p)
		if err != nil {
			return err
		}
		if st.Mode().IsRegular() {
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			out[rel] = fmt.Sprintf("%o %s", st.Mode().Perm(), data)
		}
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

func same(tb testing.TB, what string, got, want map[string]string) {
	tb.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		tb.Errorf("%s:\n got %v\nwant %v", what, got, want)
	}
}

func TestConfigMapLife(t *testing.T) {
	v, obj := testVolumes(t)
	m := int32(0o600)
	p := pod("u1", configMapVolume("all"), configMapVolume("some", v1.KeyToPath{Key: "a", Path: "sub/dir/x", Mode: &m}))
	setup(t, v, p)
	paths := hostPaths(t, v, p)
	if want := filepath.Join(v.cfg.RootDir, "pods/u1/volumes/kubernetes.io~configmap/all"); paths[0] != want {
		t.Errorf("volume is at %s, upstream has it at %s", paths[0], want)
	}
	same(t, "all keys", listing(t, paths[0]), map[string]string{"a": "644 A", "b": "644 B", "bin": "644 \x00\x01"})
	got, err := os.ReadFile(paths[1] + "/sub/dir/x")
	if err != nil || string(got) != "A" {
		t.Errorf("item: %q, %v", got, err)
	}
	data, err := os.Readlink(paths[0] + "/..data")
	if err != nil || !strings.HasPrefix(data, "..2") {
		t.Errorf("..data -> %q, %v", data, err)
	}
	if link, _ := os.Readlink(paths[0] + "/a"); link != "..data/a" {
		t.Errorf("a -> %q", link)
	}

	// No change: not a byte is touched.
	if err := v.Refresh(context.Background(), p); err != nil {
		t.Fatal(err)
	}
	setup(t, v, p)
	if now, _ := os.Readlink(paths[0] + "/..data"); now != data {
		t.Error("unchanged content was written anew")
	}

	obj.set(&v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "conf"}, Data: map[string]string{"a": "A2", "c": "C"}})
	if err := v.Refresh(context.Background(), p); err != nil {
		t.Fatal(err)
	}
	same(t, "after the change", listing(t, paths[0]), map[string]string{"a": "644 A2", "c": "644 C"})
	entries, _ := os.ReadDir(paths[0])
	if len(entries) != 4 { // ..data, one generation, a, c
		t.Errorf("left in the volume: %v", entries)
	}
	// The key that items name is gone: an error, and the old content stays.
	obj.set(&v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "conf"}, Data: map[string]string{"c": "C"}})
	err = v.Refresh(context.Background(), p)
	if err == nil || !strings.Contains(err.Error(), `volume "some"`) || !errdefs.IsNotFound(err) {
		t.Errorf("missing key: %v", err)
	}
	if got, _ := os.ReadFile(paths[1] + "/sub/dir/x"); string(got) != "A2" {
		t.Errorf("old content: %q", got)
	}

	if err := v.Teardown(context.Background(), "u1"); err != nil {
		t.Fatal(err)
	}
	if uids, _ := v.Pods(); len(uids) != 0 {
		t.Errorf("left: %v", uids)
	}
	if err := v.Teardown(context.Background(), "u1"); err != nil {
		t.Errorf("second teardown: %v", err)
	}
}

// A key mounted by subPath keeps its content while the container lives; the next
// start sees the new one (k/k#68211).
func TestConfigMapSubPath(t *testing.T) {
	needRoot(t)
	v, obj := testVolumes(t)
	p := pod("u1", configMapVolume("conf"))
	p.Spec.Containers[0].VolumeMounts[0].SubPath = "a"
	setup(t, v, p)
	read := func() string {
		mounts, _, err := v.Mounts(context.Background(), p, &p.Spec.Containers[0], nil)
		if err != nil {
			t.Fatal(err)
		}
		if !mounts[0].Readonly {
			t.Error("configMap is mounted writable")
		}
		data, err := os.ReadFile(mounts[0].HostPath)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	if got := read(); got != "A" {
		t.Errorf("got %q", got)
	}
	held := filepath.Join(v.podDir("u1"), "volume-subpaths/conf/main/0")
	obj.set(&v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "conf"}, Data: map[string]string{"a": "new"}})
	if err := v.Refresh(context.Background(), p); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(held); err != nil || string(data) != "A" {
		t.Errorf("the running container's file: %q %v", data, err)
	}
	if got := read(); got != "new" {
		t.Errorf("after a restart: %q", got)
	}
}

func TestOptionalAndMissing(t *testing.T) {
	v, _ := testVolumes(t)
	yes := true
	vol := configMapVolume("x")
	vol.ConfigMap.Name = "missing"
	p := pod("u1", vol)
	err := v.Setup(context.Background(), p)
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `volume "x"`) || !strings.Contains(err.Error(), "ns/missing") {
		t.Errorf("missing configMap: %v", err)
	}
	p.Spec.Volumes[0].ConfigMap.Optional = &yes
	setup(t, v, p)
	same(t, "optional", listing(t, hostPaths(t, v, p)[0]), map[string]string{})
}

func TestProjectedAndDownward(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	mode := int32(0o400)
	group := int64(4711)
	p := pod("u1",
		v1.Volume{Name: "p", VolumeSource: v1.VolumeSource{Projected: &v1.ProjectedVolumeSource{DefaultMode: &mode, Sources: []v1.VolumeProjection{
			{ConfigMap: &v1.ConfigMapProjection{LocalObjectReference: v1.LocalObjectReference{Name: "conf"}, Items: []v1.KeyToPath{{Key: "a", Path: "conf/a"}}}},
			{Secret: &v1.SecretProjection{LocalObjectReference: v1.LocalObjectReference{Name: "sec"}}},
			{DownwardAPI: &v1.DownwardAPIProjection{Items: []v1.DownwardAPIVolumeFile{{Path: "labels", FieldRef: &v1.ObjectFieldSelector{FieldPath: "metadata.labels"}}}}},
		}}}},
		v1.Volume{Name: "d", VolumeSource: v1.VolumeSource{DownwardAPI: &v1.DownwardAPIVolumeSource{Items: []v1.DownwardAPIVolumeFile{
			{Path: "cpu", ResourceFieldRef: &v1.ResourceFieldSelector{ContainerName: "main", Resource: "limits.cpu", Divisor: resource.MustParse("1m")}},
		}}}},
		v1.Volume{Name: "s", VolumeSource: v1.VolumeSource{Secret: &v1.SecretVolumeSource{SecretName: "sec"}}},
	)
	p.Spec.Containers[0].Resources.Limits = v1.ResourceList{v1.ResourceCPU: resource.MustParse("250m")}
	p.Spec.SecurityContext = &v1.PodSecurityContext{FSGroup: &group}
	setup(t, v, p)
	paths := hostPaths(t, v, p)
	data, err := os.ReadFile(paths[0] + "/conf/a")
	if err != nil || string(data) != "A" {
		t.Errorf("%q %v", data, err)
	}
	same(t, "projected", listing(t, paths[0]), map[string]string{"labels": `440 app="web"`, "p": "440 secret"})
	same(t, "downward", listing(t, paths[1]), map[string]string{"cpu": "644 250"})
	var st unix.Stat_t
	if err := unix.Stat(paths[2]+"/p", &st); err != nil || st.Gid != 4711 {
		t.Errorf("fsGroup of a secret's file: %d, %v", st.Gid, err)
	}
	// Secrets never reach the disk.
	var f unix.Statfs_t
	if err := unix.Statfs(paths[2], &f); err != nil || f.Type != unix.TMPFS_MAGIC {
		t.Errorf("secret is on filesystem %x, %v", f.Type, err)
	}
}

func TestEmptyDir(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	size := resource.MustParse("64Mi")
	p := pod("u1", emptyDirVolume("disk", ""), emptyDirVolume("mem", v1.StorageMediumMemory))
	p.Spec.Volumes[1].EmptyDir.SizeLimit = &size
	group := int64(99)
	p.Spec.SecurityContext = &v1.PodSecurityContext{FSGroup: &group}
	setup(t, v, p)
	paths := hostPaths(t, v, p)
	for i, dir := range paths {
		var st unix.Stat_t
		mode := []uint32{0o2777, 0o3777}[i] // a tmpfs is sticky by itself
		if err := unix.Stat(dir, &st); err != nil || st.Mode&0o7777 != mode || st.Gid != 99 {
			t.Errorf("%s: mode %o gid %d: %v", dir, st.Mode, st.Gid, err)
		}
	}
	var f unix.Statfs_t
	if err := unix.Statfs(paths[1], &f); err != nil || f.Type != unix.TMPFS_MAGIC || int64(f.Blocks)*f.Bsize != size.Value() {
		t.Errorf("memory volume: %+v %v", f, err)
	}
	for _, dir := range paths {
		if err := os.WriteFile(dir+"/data", []byte("kept"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(paths[0], 0o700); err != nil { // the pod may do that
		t.Fatal(err)
	}
	setup(t, v, p)
	for _, dir := range paths {
		if data, err := os.ReadFile(dir + "/data"); err != nil || string(data) != "kept" {
			t.Errorf("second Setup: %q %v", data, err)
		}
	}
	if st, _ := os.Stat(paths[0]); st.Mode().Perm() != 0o700 {
		t.Errorf("second Setup changed the pod's mode to %v", st.Mode())
	}
}

func TestHostPathTypes(t *testing.T) {
	v, _ := testVolumes(t)
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/file", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir, dir+"/link"); err != nil {
		t.Fatal(err)
	}
	sock, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(sock)
	if err := unix.Bind(sock, &unix.SockaddrUnix{Name: dir + "/sock"}); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		path string
		kind v1.HostPathType
		ok   func(error) bool
	}{
		{"/none", v1.HostPathUnset, nil},
		{"/none", v1.HostPathDirectory, errdefs.IsNotFound},
		{"/none", v1.HostPathFile, errdefs.IsNotFound},
		{"/none", v1.HostPathSocket, errdefs.IsNotFound},
		{"/link", v1.HostPathDirectory, nil},
		{"/file", v1.HostPathDirectory, errdefs.IsFailedPrecondition},
		{"/file", v1.HostPathDirectoryOrCreate, errdefs.IsFailedPrecondition},
		{"/file", v1.HostPathFile, nil},
		{"", v1.HostPathFile, errdefs.IsFailedPrecondition},
		{"/new/deep", v1.HostPathDirectoryOrCreate, nil},
		{"/newfile", v1.HostPathFileOrCreate, nil},
		{"/no/newfile", v1.HostPathFileOrCreate, func(err error) bool { return err != nil }},
		{"/sock", v1.HostPathSocket, nil},
		{"/file", v1.HostPathSocket, errdefs.IsFailedPrecondition},
		{"/file", v1.HostPathBlockDev, errdefs.IsFailedPrecondition},
		{"/file", v1.HostPathCharDev, errdefs.IsFailedPrecondition},
		{"/file", "Other", errdefs.IsInvalidArgument},
	} {
		p := pod(fmt.Sprintf("u%d", i), v1.Volume{Name: "h", VolumeSource: v1.VolumeSource{HostPath: &v1.HostPathVolumeSource{Path: dir + c.path, Type: &c.kind}}})
		err := v.Setup(context.Background(), p)
		if (c.ok == nil) != (err == nil) || (c.ok != nil && !c.ok(err)) {
			t.Errorf("%q as %q: %v", c.path, c.kind, err)
		}
		if err != nil && !strings.Contains(err.Error(), dir+c.path) {
			t.Errorf("error does not name the path: %v", err)
		}
	}
	if st, err := os.Stat(dir + "/newfile"); err != nil || !st.Mode().IsRegular() {
		t.Errorf("FileOrCreate: %v", err)
	}
	// The helper's way is the same function in another process.
	if err := v.helper(context.Background(), foreignTimeout, request{Op: opHostPath, Path: dir + "/file", Type: "Directory"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("through the helper: %v", err)
	}
}

func TestUnsupportedNamesKindAndRemedy(t *testing.T) {
	v, _ := testVolumes(t)
	p := pod("u1", claimVolume("c", "x"))
	for want, source := range map[string]v1.VolumeSource{
		`failed to process volumes=[c]: error processing PVC ns/x: this node knows no claims`: claimVolume("c", "x").VolumeSource,
		`volume "c" : csi`: {CSI: &v1.CSIVolumeSource{Driver: "d"}},
	} {
		p.Spec.Volumes[0].VolumeSource = source
		err := v.Setup(context.Background(), p)
		if !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v", err)
		}
	}
	// A volume that nobody mounts is not made.
	p.Spec.Containers[0].VolumeMounts = nil
	setup(t, v, p)
}

// TestALimitThatHoldsNothingIsRefused: the smallest volume in memory has a page.
func TestALimitThatHoldsNothingIsRefused(t *testing.T) {
	needRoot(t)
	for limit, says := range map[string]string{
		"500m": "write 500M or 500Mi", "1": "raise it or leave it out", "4095": "raise it or leave it out",
		"0": "", "4Ki": "", "64Mi": "", "5000000m": "", // 5000 bytes
	} {
		v, _ := testVolumes(t)
		p := pod("u1", emptyDirVolume("cache", v1.StorageMediumMemory))
		q := resource.MustParse(limit)
		p.Spec.Volumes[0].EmptyDir.SizeLimit = &q
		err := v.Setup(context.Background(), p)
		switch {
		case says == "" && err != nil:
			t.Errorf("%s: %v", limit, err)
		case says != "" && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), `"cache"`) || !strings.Contains(err.Error(), "emptyDir.sizeLimit "+limit)):
			t.Errorf("%s: %v", limit, err)
		case says == "":
			if err := os.WriteFile(v.path(p, &p.Spec.Volumes[0])+"/f", make([]byte, 4096), 0o600); err != nil {
				t.Errorf("%s: %v", limit, err)
			}
		}
	}
}
