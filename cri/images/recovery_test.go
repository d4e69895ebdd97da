package images

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
)

func TestOneProcessAtATime(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, nil)
	if _, err := Open(t.Context(), Config{Dir: dir}); !errdefs.IsUnavailable(err) {
		t.Errorf("second Open: %v", err)
	}
	s.Close()
	openStore(t, dir, nil)
}

func TestProbeOfAKilledOpenGoes(t *testing.T) {
	dir := t.TempDir()
	openStore(t, dir, nil).Close()
	left := filepath.Join(dir, "content", ".fsverity-check-1")
	if err := os.MkdirAll(filepath.Join(left, "supported"), 0o700); err != nil {
		t.Fatal(err)
	}
	openStore(t, dir, nil)
	if _, err := os.Lstat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
}

func overwrite(t testing.TB, path string, data []byte) {
	t.Helper()
	os.Chmod(path, 0o600)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestDamage: whatever is broken in the store's directory, it opens, says so,
// and pulling the image again makes it whole; other images are not touched.
func TestDamage(t *testing.T) {
	h := newHooked(t)
	layers := []v1.Layer{layerOf(t, file("a", noise(10000))), layerOf(t, file("b", "2"))}
	push(t, h.host+"/x/y:1", imageOf(t, layers...))
	push(t, h.host+"/x/good:1", imageOf(t, layerOf(t, file("good", "good"))))
	tests := []struct {
		name   string
		damage func(s *Store, r *record) // after Close
		kept   bool                      // the image is there after Open
	}{
		{"record empty", func(s *Store, r *record) { overwrite(t, s.recordPath(r.ID), nil) }, false},
		{"record torn", func(s *Store, r *record) {
			overwrite(t, s.recordPath(r.ID), []byte(read(t, s.recordPath(r.ID))[:200]))
		}, false},
		{"record of zeros", func(s *Store, r *record) { overwrite(t, s.recordPath(r.ID), make([]byte, 500)) }, false},
		{"record of the future", func(s *Store, r *record) {
			overwrite(t, s.recordPath(r.ID), []byte(strings.Replace(read(t, s.recordPath(r.ID)), `"version":1`, `"version":99`, 1)))
		}, false},
		{"record under another name", func(s *Store, r *record) {
			os.Rename(s.recordPath(r.ID), s.recordPath(digest.FromString("x")))
		}, false},
		{"config blob gone", func(s *Store, r *record) { os.Remove(s.blobPath(r.ID)) }, false},
		{"config blob damaged", func(s *Store, r *record) { overwrite(t, s.blobPath(r.ID), []byte("{}")) }, false},
		{"layer blob gone", func(s *Store, r *record) { os.Remove(s.blobPath(r.Layers[0].Blob)) }, false},
		{"layer gone", func(s *Store, r *record) { os.RemoveAll(s.layerPath(r.Layers[0].Chain)) }, true},
		{"all layers gone", func(s *Store, r *record) { os.RemoveAll(s.layersDir) }, true},
		{"layer gone and its blob damaged", func(s *Store, r *record) {
			os.RemoveAll(s.layerPath(r.Layers[0].Chain))
			overwrite(t, s.blobPath(r.Layers[0].Blob), []byte("x"))
		}, false},
		{"half a layer left", func(s *Store, r *record) { os.MkdirAll(filepath.Join(s.layersDir, ".new-1/x"), 0o700) }, true},
		{"half a snapshot left", func(s *Store, r *record) { os.MkdirAll(filepath.Join(s.snapshotsDir, "c9/fs"), 0o700) }, true},
		{"half a record left", func(s *Store, r *record) { overwrite(t, s.recordPath(r.ID)+".tmp", []byte("{")) }, true},
		{"torn ingest left", func(s *Store, r *record) {
			os.MkdirAll(filepath.Join(s.cfg.Dir, "content/ingest/abc"), 0o700)
		}, true},
		{"odd blob left", func(s *Store, r *record) { overwrite(t, s.blobPath(digest.FromString("x")), []byte("y")) }, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			s := openStore(t, dir, nil)
			id := mustPull(t, s, h.host+"/x/y:1").ID
			mustPull(t, s, h.host+"/x/good:1")
			r := s.images[digest.Digest(id)]
			s.Close()
			whole := files(t, dir)
			tt.damage(s, r)

			s = openStore(t, dir, nil)
			_, err := s.Get(t.Context(), h.host+"/x/y:1")
			if tt.kept && err != nil || !tt.kept && !errdefs.IsNotFound(err) {
				t.Errorf("Get after Open: %v", err)
			}
			if _, err := s.Get(t.Context(), h.host+"/x/good:1"); err != nil {
				t.Errorf("the other image: %v", err)
			}
			mustPull(t, s, h.host+"/x/y:1")
			root := mountOf(t, s, "c", id)
			if read(t, root+"/b") != "2" || len(read(t, root+"/a")) != 10000 {
				t.Error("image is not whole")
			}
			if err := s.UnmountRootfs(t.Context(), "c", root); err != nil {
				t.Fatal(err)
			}
			if p, err := s.Verify(t.Context()); err != nil || len(p) != 0 {
				t.Errorf("Verify: %v, %v", p, err)
			}
			if err := s.GarbageCollect(t.Context()); err != nil {
				t.Fatal(err)
			}
			for f := range files(t, dir) {
				if !whole[f] && !strings.HasPrefix(f, "quarantine/") {
					t.Errorf("left behind: %s", f)
				}
			}
			for f := range whole {
				if _, err := os.Lstat(filepath.Join(dir, f)); err != nil {
					t.Errorf("missing: %s", f)
				}
			}
		})
	}
}

// TestRecordLostUnderAContainer: the layers that a container runs on stay,
// though no record knows them.
func TestRecordLostUnderAContainer(t *testing.T) {
	host := registryServer(t, nil)
	push(t, host+"/x/y:1", imageOf(t, layerOf(t, file("a", "1"))))
	dir := t.TempDir()
	s := openStore(t, dir, nil)
	img := mustPull(t, s, host+"/x/y:1")
	target := filepath.Join(t.TempDir(), "rootfs")
	if err := s.MountRootfs(t.Context(), "c", img.ID, target, nil, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unmount(target) })
	s.Close()
	overwrite(t, s.recordPath(digest.Digest(img.ID)), []byte("junk"))
	s = openStore(t, dir, nil)
	if err := s.GarbageCollect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := read(t, target+"/a"); got != "1" {
		t.Errorf("a = %q", got)
	}
	if err := s.UnmountRootfs(t.Context(), "c", target); err != nil {
		t.Fatal(err)
	}
	if err := s.GarbageCollect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(s.layersDir); len(left) != 2 {
		t.Errorf("layers left: %v", left)
	}
}

func TestVerifyFindsDamage(t *testing.T) {
	host := registryServer(t, nil)
	push(t, host+"/x/y:1", imageOf(t, layerOf(t, file("a", "1"), file("b", "2"))))
	s := openStore(t, t.TempDir(), nil)
	img := mustPull(t, s, host+"/x/y:1")
	r := s.images[digest.Digest(img.ID)]
	if p, err := s.Verify(t.Context()); err != nil || len(p) != 0 {
		t.Fatalf("whole image: %v, %v", p, err)
	}
	check := func(what string, kind func(error) bool) {
		t.Helper()
		p, err := s.Verify(t.Context())
		if err != nil || len(p) != 1 || p[0].ID != img.ID || !kind(p[0].Err) || p[0].Names[0] != host+"/x/y:1" {
			t.Errorf("%s: %+v, %v", what, p, err)
		}
	}
	os.Remove(filepath.Join(s.layerPath(r.Layers[0].Chain), "b"))
	check("layer lacks a file", errdefs.IsDataLoss)
	os.Rename(s.layerPath(r.Layers[0].Chain), filepath.Join(s.layersDir, ".gone"))
	check("layer is gone", errdefs.IsNotFound)
	os.Rename(filepath.Join(s.layersDir, ".gone"), s.layerPath(r.Layers[0].Chain))
	overwrite(t, filepath.Join(s.layerPath(r.Layers[0].Chain), "b"), []byte("2"))
	blob := s.blobPath(r.Layers[0].Blob)
	raw := []byte(read(t, blob))
	raw[len(raw)/2] ^= 1
	overwrite(t, blob, raw)
	check("one bit of a blob", errdefs.IsDataLoss)
}

// TestUnrecordedLayersAreNotTrusted: what a power cut has torn is not named by
// a record, and what no record names is hashed or made anew.
func TestUnrecordedLayersAreNotTrusted(t *testing.T) {
	host := registryServer(t, nil)
	layer := layerOf(t, file("a", "1"))
	push(t, host+"/x/y:1", imageOf(t, layer))
	dir := t.TempDir()
	s := openStore(t, dir, nil)
	img := mustPull(t, s, host+"/x/y:1")
	r := s.images[digest.Digest(img.ID)]
	s.Close()
	// As after a cut before the record: layer and blobs have their final names,
	// and hold what never reached the disk.
	os.Remove(s.recordPath(r.ID))
	os.Truncate(filepath.Join(s.layerPath(r.Layers[0].Chain), "a"), 0)
	raw := []byte(read(t, s.blobPath(r.Layers[0].Blob)))
	overwrite(t, s.blobPath(r.Layers[0].Blob), make([]byte, len(raw)))

	s = openStore(t, dir, nil)
	mustPull(t, s, host+"/x/y:1")
	if got := read(t, mountOf(t, s, "c", img.ID)+"/a"); got != "1" {
		t.Errorf("a = %q", got)
	}
}

func TestPartialPullIsKeptForAWhile(t *testing.T) {
	h := newHooked(t)
	a, b := layerOf(t, file("a", noise(100<<10))), layerOf(t, file("b", noise(1000)))
	push(t, h.host+"/x/y:1", imageOf(t, a, b))
	push(t, h.host+"/x/z:1", imageOf(t, layerOf(t, file("z", "z"))))
	dir := t.TempDir()
	s := openStore(t, dir, nil)
	first := make(chan struct{})
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if isBlob(r, layerDigest(t, b)) {
			<-first
			w.WriteHeader(403)
			return true
		}
		return false
	})
	go func() {
		defer close(first)
		deadline := time.Now().Add(10 * time.Second)
		for time.Now().Before(deadline) {
			if _, err := os.Stat(s.blobPath(digest.Digest(layerDigest(t, a).String()))); err == nil {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	if _, err := s.Pull(t.Context(), h.host+"/x/y:1", nil, nil); !errdefs.IsPermissionDenied(err) {
		t.Fatal(err)
	}
	h.set(nil)
	// Another image comes and goes, the collector runs, the daemon restarts.
	mustPull(t, s, h.host+"/x/z:1")
	if err := s.Remove(t.Context(), h.host+"/x/z:1"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.collect(t.Context(), time.Hour); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = openStore(t, dir, nil)
	if _, err := s.collect(t.Context(), time.Hour); err != nil {
		t.Fatal(err)
	}
	before := h.gets(layerDigest(t, a))
	mustPull(t, s, h.host+"/x/y:1")
	if n := h.gets(layerDigest(t, a)); n != before {
		t.Errorf("layer was fetched again")
	}
}

func TestRemovedImageIsFreedSoon(t *testing.T) {
	host := registryServer(t, nil)
	push(t, host+"/x/y:1", imageOf(t, layerOf(t, file("a", "1"))))
	s := openStore(t, t.TempDir(), nil)
	img := mustPull(t, s, host+"/x/y:1")
	if err := s.Remove(t.Context(), img.ID); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool {
		blobs, _ := os.ReadDir(filepath.Join(s.cfg.Dir, "content/blobs/sha256"))
		layers, _ := os.ReadDir(s.layersDir)
		trash, _ := os.ReadDir(s.trashDir)
		return len(blobs) == 0 && len(layers) == 2 && len(trash) == 0
	})
}

func TestTags(t *testing.T) {
	host := registryServer(t, nil)
	one, two := imageOf(t, layerOf(t, file("one", "1"))), imageOf(t, layerOf(t, file("two", "2")))
	push(t, host+"/x/y:1", one)
	push(t, host+"/x/y:latest", one)
	dir := t.TempDir()
	s := openStore(t, dir, func(c *Config) { c.Pinned = []string{host + "/x/y:latest"} })
	a := mustPull(t, s, host+"/x/y:1")
	if a.Pinned {
		t.Error("pinned without the pinned name")
	}
	a = mustPull(t, s, host+"/x/y")
	if !a.Pinned || len(a.RepoTags) != 2 || len(a.RepoDigests) != 1 {
		t.Errorf("two tags: %+v", a)
	}
	// The tag moves on to another image; the old one stays, by its digest.
	push(t, host+"/x/y:latest", two)
	b := mustPull(t, s, host+"/x/y:latest")
	s.Close()
	s = openStore(t, dir, nil) // from the records
	list, _ := s.List(t.Context())
	if len(list) != 2 {
		t.Fatalf("%d images", len(list))
	}
	if a, _ = s.Get(t.Context(), a.ID); fmt.Sprint(a.RepoTags) != fmt.Sprintf("[%s/x/y:1]", host) {
		t.Errorf("old image: %v", a.RepoTags)
	}
	if got, _ := s.Get(t.Context(), host+"/x/y:latest"); got.ID != b.ID {
		t.Error("tag does not lead to the new image")
	}
	// One of two names goes: the image stays. By id: all go.
	push(t, host+"/x/other:1", one)
	mustPull(t, s, host+"/x/other:1")
	if err := s.Remove(t.Context(), host+"/x/y:1"); err != nil {
		t.Fatal(err)
	}
	got, err := s.Get(t.Context(), a.ID)
	if err != nil || len(got.RepoTags) != 1 || len(got.RepoDigests) != 1 || !strings.Contains(got.RepoDigests[0], "/x/other@") {
		t.Errorf("after Remove of one name: %+v, %v", got, err)
	}
	if err := s.Remove(t.Context(), a.ID[7:19]); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), host+"/x/other:1"); !errdefs.IsNotFound(err) {
		t.Errorf("after Remove of the id: %v", err)
	}
	if err := s.Remove(t.Context(), host+"/x/other:1"); !errdefs.IsNotFound(err) {
		t.Errorf("Remove of what is not there: %v", err)
	}
}

func TestUsageAndFsInfo(t *testing.T) {
	host := registryServer(t, nil)
	push(t, host+"/x/y:1", imageOf(t, layerOf(t, file("a", noise(100<<10)))))
	s := openStore(t, t.TempDir(), nil)
	img := mustPull(t, s, host+"/x/y:1")
	if img.Size < 200<<10 || img.Size > 300<<10 {
		t.Errorf("size %d", img.Size)
	}
	root := mountOf(t, s, "c", img.ID)
	if err := os.WriteFile(root+"/w", []byte(noise(64<<10)), 0o644); err != nil {
		t.Fatal(err)
	}
	bytes, inodes, err := s.Usage(t.Context(), "c")
	if err != nil || bytes < 64<<10 || bytes > 100<<10 || inodes != 2 {
		t.Errorf("usage %d bytes, %d inodes, %v", bytes, inodes, err)
	}
	if _, _, err := s.Usage(t.Context(), "none"); !errdefs.IsNotFound(err) {
		t.Errorf("unknown key: %v", err)
	}
	fs, err := s.FsInfo(t.Context())
	if err != nil || fs.GetUsedBytes().GetValue() < 250<<10 || fs.GetInodesUsed().GetValue() < 5 || fs.GetFsId().GetMountpoint() != s.cfg.Dir {
		t.Errorf("fs info %v, %v", fs, err)
	}
}

// TestMain lets TestKilled run this binary as the process that is killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv("PODD_IMAGES_VICTIM"); dir != "" {
		victim(dir, os.Getenv("PODD_IMAGES_REF"))
		return
	}
	os.Exit(m.Run())
}

// victim pulls, mounts and removes until it is killed.
func victim(dir, ref string) {
	ctx := context.Background()
	s, err := Open(ctx, Config{Dir: dir})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	for i := 0; ; i++ {
		var err error
		if i%2 == 0 {
			_, err = s.Pull(ctx, ref, nil, nil)
		} else {
			var f *os.File
			if f, err = os.Open(filepath.Join(filepath.Dir(dir), "image.tar")); err == nil {
				_, err = s.Load(ctx, f, LoadOptions{Name: ref})
				f.Close()
			}
		}
		key := fmt.Sprint("c", i%3)
		target := filepath.Join(filepath.Dir(dir), "targets", key)
		if err == nil {
			err = s.MountRootfs(ctx, key, ref, target, nil, nil)
		}
		if err == nil {
			err = s.UnmountRootfs(ctx, key, target)
		}
		if err == nil {
			err = s.Remove(ctx, ref)
		}
		if err == nil && i%2 == 0 {
			err = s.GarbageCollect(ctx)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(3)
		}
	}
}

// TestKilled kills a process at random moments of its work; after Open and
// GarbageCollect there is nothing left of it but whole images.
func TestKilled(t *testing.T) {
	needRoot(t)
	host := registryServer(t, nil)
	ref := host + "/x/y:1"
	img := imageOf(t, layerOf(t, manyFiles(300, 500)...), layerOf(t, file("z", noise(1<<20))))
	push(t, ref, img)
	top := t.TempDir()
	overwrite(t, filepath.Join(top, "image.tar"), ociTar(t, []v1.Image{img}, nil))
	dir := filepath.Join(top, "store")
	s := openStore(t, dir, nil)
	s.Close()
	empty := files(t, dir)
	rounds := 25
	if testing.Short() {
		rounds = 3
	}
	for range rounds {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), "PODD_IMAGES_VICTIM="+dir, "PODD_IMAGES_REF="+ref)
		var out bytes.Buffer
		cmd.Stderr = &out
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(20+rand.IntN(150)) * time.Millisecond) // the moment is the point
		cmd.Process.Kill()
		var exit *exec.ExitError
		if err := cmd.Wait(); errors.As(err, &exit) && exit.ExitCode() == 3 {
			t.Fatalf("victim: %s", out.String())
		}
		s := openStore(t, dir, nil)
		if p, err := s.Verify(t.Context()); err != nil || len(p) != 0 {
			t.Fatalf("Verify: %v, %v", p, err)
		}

		for _, k := range []string{"c0", "c1", "c2"} {
			if err := s.UnmountRootfs(t.Context(), k, filepath.Join(top, "targets", k)); err != nil {
				t.Fatal(err)
			}
		}
		list, _ := s.List(t.Context())
		for _, img := range list {
			if got := len(read(t, mountOf(t, s, "check", img.ID)+"/z")); got != 1<<20 {
				t.Fatalf("z has %d bytes", got)
			}
			s.UnmountRootfs(t.Context(), "check", "")
			if err := s.Remove(t.Context(), img.ID); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.GarbageCollect(t.Context()); err != nil {
			t.Fatal(err)
		}
		for f := range files(t, dir) {
			if !empty[f] {
				t.Errorf("left behind: %s", f)
			}
		}
		s.Close()
	}
	if n := mountsBelow(t, top); n != 0 {
		t.Errorf("%d mounts left", n)
	}
}
