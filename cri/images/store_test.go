package images

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

func TestLifeOfAnImage(t *testing.T) {
	host := registryServer(t, nil)
	ref := host + "/team/app:v1"
	push(t, ref, imageOf(t,
		layerOf(t, dir("etc/"), file("etc/a", "one"), file("etc/gone", "x"), dir("opt/"), file("opt/old", "x")),
		layerOf(t, file("etc/.wh.gone", ""), file("opt/.wh..wh..opq", ""), file("opt/new", "y"), hardlink("opt/hard", "opt/new")),
	))
	s := openStore(t, t.TempDir(), nil)
	before := files(t, s.cfg.Dir)

	img := mustPull(t, s, ref)
	if len(img.RepoTags) != 1 || img.RepoTags[0] != ref || len(img.RepoDigests) != 1 {
		t.Fatalf("names: %v %v", img.RepoTags, img.RepoDigests)
	}
	for _, r := range []string{img.ID, img.ID[len("sha256:"):], img.ID[len("sha256:"):][:12], ref, img.RepoDigests[0]} {
		got, err := s.Get(t.Context(), r)
		if err != nil || got.ID != img.ID {
			t.Errorf("Get(%s) = %v, %v", r, got, err)
		}
	}
	root := mountOf(t, s, "c1", ref)
	if got := read(t, root+"/etc/a"); got != "one" {
		t.Errorf("etc/a = %q", got)
	}
	for _, gone := range []string{"/etc/gone", "/opt/old"} {
		if _, err := os.Stat(root + gone); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", gone, err)
		}
	}
	if got := read(t, root+"/opt/hard"); got != "y" {
		t.Errorf("opt/hard = %q", got)
	}
	if err := os.WriteFile(root+"/etc/a", []byte("two"), 0o644); err != nil {
		t.Fatal(err)
	}

	// Removed while in use: gone from the list, alive below the container.
	if err := s.Remove(t.Context(), img.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.GarbageCollect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), ref); !errdefs.IsNotFound(err) {
		t.Errorf("Get after Remove: %v", err)
	}
	if got := read(t, root+"/opt/new"); got != "y" {
		t.Errorf("opt/new = %q", got)
	}
	if err := s.UnmountRootfs(t.Context(), "c1", root); err != nil {
		t.Fatal(err)
	}
	if err := s.GarbageCollect(t.Context()); err != nil {
		t.Fatal(err)
	}
	for f := range files(t, s.cfg.Dir) {
		if !before[f] {
			t.Errorf("left behind: %s", f)
		}
	}
}

func TestLoadDockerArchive(t *testing.T) {
	img := imageOf(t, layerOf(t, file("hello", "world")))
	tag, err := name.NewTag("example.com/x/y:1")
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := tarball.Write(tag, img, &b); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, t.TempDir(), nil)
	list, err := s.Load(t.Context(), &b, LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || len(list[0].RepoTags) != 1 || list[0].RepoTags[0] != "example.com/x/y:1" {
		t.Fatalf("loaded %+v", list)
	}
	root := mountOf(t, s, "c1", list[0].ID)
	if got := read(t, filepath.Join(root, "hello")); got != "world" {
		t.Errorf("hello = %q", got)
	}
}

// A node on which something is removed all the time is collected all the same.
func TestCollectionIsNotPutOffForEver(t *testing.T) {
	s := openStore(t, t.TempDir(), nil)
	left := s.trash("left")
	if err := os.Mkdir(left, 0o700); err != nil {
		t.Fatal(err)
	}
	again := time.NewTicker(gcDelay / 4)
	defer again.Stop()
	for deadline := time.Now().Add(10 * gcLatest); ; {
		s.kickGC()
		if _, err := os.Lstat(left); errors.Is(err, os.ErrNotExist) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is still there after %v of removals", left, 10*gcLatest)
		}
		<-again.C
	}
}
