package images

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

func used(t *testing.T, s *Store) int64 {
	t.Helper()
	info, err := s.FsInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return int64(info.UsedBytes.Value)
}

// TestPartialDownloadsAreTheStores: what a pull has brought so far counts as
// the store's, and goes soon after nobody wants it any more.
func TestPartialDownloadsAreTheStores(t *testing.T) {
	h := newHooked(t)
	whole, half := layerOf(t, file("a", noise(500<<10))), layerOf(t, file("b", noise(2<<20)))
	push(t, h.host+"/x/y:1", imageOf(t, whole, half))
	s := openStore(t, t.TempDir(), nil)
	s.givenUpTTL = 10 * time.Millisecond
	before := used(t, s)
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlob(r, layerDigest(t, half)) {
			return false
		}
		size, _ := half.Size()
		w.Header().Set("Content-Length", fmt.Sprint(size))
		w.Write(make([]byte, 1<<20))
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := s.Pull(ctx, h.host+"/x/y:1", nil, nil)
		done <- err
	}()
	waitFor(t, func() bool { return used(t, s)-before > 1500<<10 })
	cancel()
	<-done
	waitFor(t, func() bool {
		left, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "content/*/*"))
		blobs, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "content/blobs/sha256/*"))
		layers, _ := os.ReadDir(s.layersDir)
		return len(left) == 1 && len(blobs) == 0 && len(layers) == 2 && used(t, s) == before
	})
}

// TestFullDiskIsNotKeptFull: a pull that finds no room leaves nothing.
func TestFullDiskIsNotKeptFull(t *testing.T) {
	needRoot(t)
	h := newHooked(t)
	// Its blob fits, what it unpacks to does not.
	push(t, h.host+"/x/y:1", imageOf(t, layerOf(t, file("big", noise(3<<20)))))
	small := filepath.Join(t.TempDir(), "disk")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=5m"); err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
	s := openStore(t, filepath.Join(small, "store"), nil)
	t.Cleanup(func() { s.Close() })
	before := used(t, s)
	if _, err := s.Pull(t.Context(), h.host+"/x/y:1", nil, nil); !errdefs.IsResourceExhausted(err) {
		t.Fatalf("err = %v", err)
	}
	waitFor(t, func() bool {
		blobs, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "content/blobs/sha256/*"))
		return len(blobs) == 0 && used(t, s) == before
	})
}

// TestImageThatComesIsTold, by a pull and by a load.
func TestImageThatComesIsTold(t *testing.T) {
	h := newHooked(t)
	img := imageOf(t, layerOf(t, file("a", "1")))
	push(t, h.host+"/x/y:1", img)
	var told []string
	s := openStore(t, t.TempDir(), func(c *Config) { c.Present = func(names []string) { told = append(told, names...) } })
	pulled := mustPull(t, s, h.host+"/x/y:1")
	list, err := s.Load(t.Context(), bytes.NewReader(ociTar(t, []v1.Image{imageOf(t, layerOf(t, file("b", "1")))}, nil)), LoadOptions{Name: "a.io/b:1"})
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, i := range []*Image{pulled, list[0]} {
		want = append(append(append(want, i.RepoTags...), i.RepoDigests...), i.ID)
	}
	if !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
}
