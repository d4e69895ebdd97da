package images

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"golang.org/x/sys/unix"
)

// TestLoadTakesWhatItCan: of an archive's images those that can be used are
// loaded, whatever the others are; each of these is listed with its reason.
func TestLoadTakesWhatItCan(t *testing.T) {
	const name = "io.containerd.image.name"
	dirname := t.TempDir()
	p, err := layout.Write(dirname, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	appendImage := func(img v1.Image, ref string, opts ...layout.Option) {
		t.Helper()
		annotations := map[string]string{}
		if ref != "" {
			annotations[name] = ref
		}
		if err := p.AppendImage(img, append(opts, layout.WithAnnotations(annotations))...); err != nil {
			t.Fatal(err)
		}
	}
	good, last := imageOf(t, layerOf(t, file("good", "1"))), imageOf(t, layerOf(t, file("last", "1")))
	lost := layerOf(t, file("lost", noise(1000)))
	bent := layerOf(t, file("bent", noise(1000)))
	appendImage(imageOf(t, layerOf(t, file("arm", "1"))), "a.io/foreign:1", layout.WithPlatform(v1.Platform{OS: "linux", Architecture: "s390x"}))
	appendImage(imageOf(t, lost), "a.io/lacking:1")
	appendImage(imageOf(t, bent), "a.io/damaged:1")
	appendImage(imageOf(t, layerOf(t, file("../evil", "1"))), "a.io/evil:1")
	appendImage(imageOf(t, layerOf(t, file("x", "1"))), "not a name")
	appendImage(good, "a.io/good:1")
	appendImage(mutate.ConfigMediaType(imageOf(t), "application/vnd.cncf.helm.config.v1+json"), "a.io/chart:1")
	appendImage(last, "a.io/last:1")
	// What BuildKit says about the good one.
	payload := []byte(`{"_type":"https://in-toto.io/Statement/v0.1"}`)
	attestation := imageOf(t, rawLayer{payload, payload, "application/vnd.in-toto+json"})
	if err := p.AppendImage(attestation, layout.WithPlatform(v1.Platform{OS: "unknown", Architecture: "unknown"}), layout.WithAnnotations(map[string]string{
		"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": must(good.Digest()).String(),
	})); err != nil {
		t.Fatal(err)
	}
	for _, l := range []v1.Layer{lost, bent} {
		blob := filepath.Join(dirname, "blobs/sha256", layerDigest(t, l).Hex)
		if err := os.Remove(blob); err != nil {
			t.Fatal(err)
		}
		if l == bent {
			overwrite(t, blob, []byte(`{"x":1}`))
		}
	}
	s := openStore(t, t.TempDir(), nil)
	list, err := s.Load(t.Context(), bytes.NewReader(tarDir(t, dirname)), LoadOptions{})
	var not *LoadError
	if !errors.As(err, &not) {
		t.Fatalf("err = %v", err)
	}
	var loaded []string
	for _, i := range list {
		loaded = append(loaded, i.RepoTags...)
	}
	if fmt.Sprint(loaded) != "[a.io/good:1 a.io/last:1]" {
		t.Errorf("loaded %v", loaded)
	}
	reasons := map[string]string{
		"a.io/foreign:1": "s390x", "a.io/lacking:1": "lacks blob", "a.io/damaged:1": "has digest", "a.io/evil:1": "../evil",
		"sha256:": "is invalid", "a.io/chart:1": "not a container image",
	}
	for _, u := range not.Images {
		key := u.Name
		if strings.HasPrefix(key, "sha256:") {
			key = "sha256:"
		}
		if want, ok := reasons[key]; !ok || !strings.Contains(u.Err.Error(), want) {
			t.Errorf("%s: %v", u.Name, u.Err)
		}
		delete(reasons, key)
	}
	if len(reasons) > 0 {
		t.Errorf("not told: %v", reasons)
	}
	if !errdefs.IsDataLoss(err) || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("kinds are lost: %v", err)
	}
}

// TestLoadTakesWhatItCanOfDockerArchives, where one image lacks its layer.
func TestLoadTakesWhatItCanOfDockerArchives(t *testing.T) {
	layer := archiveOf(t, file("one", "1"))
	config := fmt.Sprintf(`{"os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, sum(layer))
	manifest := `[{"Config":"c.json","RepoTags":["a.io/lacking:1"],"Layers":["none/layer.tar"]},{"Config":"odd.bin","RepoTags":["a.io/odd:1"],"Layers":["a/layer.tar"]},{"Config":"c.json","RepoTags":["a.io/good:1"],"Layers":["a/layer.tar"]}]`
	raw := archiveOf(t, file("a/layer.tar", string(layer)), file("c.json", config), file("odd.bin", "\x7fELF"), file("manifest.json", manifest))
	s := openStore(t, t.TempDir(), nil)
	list, err := s.Load(t.Context(), bytes.NewReader(raw), LoadOptions{})
	if len(list) != 1 || fmt.Sprint(list[0].RepoTags) != "[a.io/good:1]" {
		t.Errorf("loaded %v", list)
	}
	for _, want := range []string{"a.io/lacking:1: manifest.json names", "a.io/odd:1: the archive's \"odd.bin\" is of no use"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("err = %v, want %q", err, want)
		}
	}
}

// counted is a reader that tells how much was taken, and ends never.
type counted struct {
	head  io.Reader
	taken int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.head.Read(p)
	if errors.Is(err, io.EOF) {
		clear(p)
		n, err = len(p), nil
	}
	c.taken += int64(n)
	return n, err
}

// TestArchivesAreRefusedBeforeTheyFillTheDisk: what is announced and cannot fit
// is not begun, and what is of no use is not written.
func TestArchivesAreRefusedBeforeTheyFillTheDisk(t *testing.T) {
	needRoot(t)
	head := func(size int64) []byte {
		var b bytes.Buffer
		tar.NewWriter(&b).WriteHeader(&tar.Header{Name: "a/layer.tar", Typeflag: tar.TypeReg, Size: size, Mode: 0o644})
		return append(b.Bytes(), 0x1f, 0x8b)
	}
	for _, tt := range []struct {
		name string
		size int64
		is   func(error) bool
	}{
		{"more than is free", 100 << 20, errdefs.IsResourceExhausted},
		{"more than an image may have", 1 << 40, errdefs.IsInvalidArgument},
	} {
		t.Run(tt.name, func(t *testing.T) {
			small := filepath.Join(t.TempDir(), "disk")
			if err := os.Mkdir(small, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=20m"); err != nil {
				t.Skipf("no tmpfs: %v", err)
			}
			t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
			s := openStore(t, filepath.Join(small, "store"), nil)
			t.Cleanup(func() { s.Close() })
			in := &counted{head: bytes.NewReader(head(tt.size))}
			_, err := s.Load(t.Context(), in, LoadOptions{})
			if !tt.is(err) {
				t.Errorf("err = %v", err)
			}
			if in.taken > 1<<20 {
				t.Errorf("%d bytes were taken", in.taken)
			}
		})
	}
	t.Run("of something else", func(t *testing.T) {
		s := openStore(t, t.TempDir(), nil)
		_, err := s.Load(t.Context(), bytes.NewReader(archiveOf(t, file("bin/sh", "\x7fELF"+noise(8<<20)), file("disk.raw", strings.Repeat("\x00", 8<<20)))), LoadOptions{})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "not an OCI layout") {
			t.Errorf("err = %v", err)
		}
		if blobs, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "content/*/*/*")); len(blobs) != 0 {
			t.Errorf("written: %v", blobs)
		}
	})
}

// TestStuckLoadHoldsUpNobody: a client that stops in the middle of an archive
// keeps neither other loads nor the collector waiting.
func TestStuckLoadHoldsUpNobody(t *testing.T) {
	s := openStore(t, t.TempDir(), nil)
	whole := ociTar(t, []v1.Image{imageOf(t, layerOf(t, file("a", noise(100<<10))))}, nil)
	r, w := io.Pipe()
	stuck := make(chan error, 1)
	go func() {
		_, err := s.Load(t.Context(), r, LoadOptions{Name: "a.io/stuck:1"})
		stuck <- err
	}()
	if _, err := w.Write(whole[:len(whole)/2]); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load(t.Context(), bytes.NewReader(ociTar(t, []v1.Image{imageOf(t, layerOf(t, file("b", "1")))}, nil)), LoadOptions{Name: "a.io/b:1"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "a.io/b:1"); err != nil {
		t.Fatal(err)
	}
	if err := s.GarbageCollect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := len(s.layers); got != 0 {
		t.Errorf("%d layers are kept", got)
	}
	// What it has written so far is not taken from under it.
	go func() {
		w.Write(whole[len(whole)/2:])
		w.Close()
	}()
	if err := <-stuck; err != nil {
		t.Error(err)
	}
}
