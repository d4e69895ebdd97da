package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// ociTar is an OCI layout of the images, each with its annotations.
func ociTar(t testing.TB, images []v1.Image, annotations []map[string]string) []byte {
	t.Helper()
	dir := t.TempDir()
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for i, img := range images {
		var opts []layout.Option
		if annotations != nil {
			opts = append(opts, layout.WithAnnotations(annotations[i]))
		}
		if err := p.AppendImage(img, opts...); err != nil {
			t.Fatal(err)
		}
	}
	return tarDir(t, dir)
}

func tarDir(t testing.TB, dir string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzippedTar(t testing.TB, raw []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(raw)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func dockerTar(t testing.TB, ref string, img v1.Image) []byte {
	t.Helper()
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := tarball.Write(tag, img, &b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// oldDockerTar is what docker save wrote before version 25: plain layers in
// directories, a link where two are the same.
func oldDockerTar(t testing.TB, tags string) []byte {
	t.Helper()
	layer := archiveOf(t, file("one", "1"))
	config := fmt.Sprintf(`{"os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:%x","sha256:%x"]}}`, sum(layer), sum(layer))
	manifest := fmt.Sprintf(`[{"Config":"c.json","RepoTags":%s,"Layers":["a/layer.tar","b/layer.tar"]}]`, tags)
	return archiveOf(t, dir("a/"), file("a/VERSION", "1.0"), file("a/json", "{}"), file("a/layer.tar", string(layer)),
		dir("b/"), symlink("b/layer.tar", "../a/layer.tar"), file("c.json", config), file("manifest.json", manifest), file("repositories", "{}"))
}

func TestLoad(t *testing.T) {
	one, two := imageOf(t, layerOf(t, file("one", "1"))), imageOf(t, layerOf(t, file("two", "2")))
	oneDigest, _ := one.Digest()
	ann := func(kv ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	both := func() []byte { // as docker save does since version 25
		dir := t.TempDir()
		p, err := layout.Write(dir, empty.Index)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.AppendImage(one); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "manifest.json"), []byte(`[{"Config":"x","RepoTags":["example.com/both:1"],"Layers":["y"]}]`), 0o600); err != nil {
			t.Fatal(err)
		}
		return tarDir(t, dir)
	}()
	const refName, imageName = "org.opencontainers.image.ref.name", "io.containerd.image.name"
	tests := []struct {
		name    string
		raw     []byte
		option  string
		tags    [][]string
		digests int
	}{
		{name: "docker", raw: dockerTar(t, "example.com/xx:1", one), tags: [][]string{{"example.com/xx:1"}}},
		{name: "docker, short name", raw: dockerTar(t, "busybox", one), tags: [][]string{{"docker.io/library/busybox:latest"}}},
		{name: "docker, old format", raw: oldDockerTar(t, `["example.com/old:1"]`), tags: [][]string{{"example.com/old:1"}}},
		{name: "docker, no tag", raw: oldDockerTar(t, `null`), tags: [][]string{nil}},
		{name: "docker, name given", raw: oldDockerTar(t, `null`), option: "example.com/given", tags: [][]string{{"example.com/given:latest"}}},
		{name: "docker, both formats", raw: both, tags: [][]string{{"example.com/both:1"}}, digests: 1},
		{name: "docker, gzip", raw: gzippedTar(t, dockerTar(t, "example.com/xx:1", one)), tags: [][]string{{"example.com/xx:1"}}},
		{name: "oci without names", raw: ociTar(t, []v1.Image{one}, nil), tags: [][]string{nil}},
		{name: "oci, name given", raw: ociTar(t, []v1.Image{one}, nil), option: "example.com/y:2", tags: [][]string{{"example.com/y:2"}}, digests: 1},
		{name: "oci, tag", raw: ociTar(t, []v1.Image{one}, []map[string]string{ann(refName, "v3")}), option: "example.com/y", tags: [][]string{{"example.com/y:v3"}}, digests: 1},
		{name: "oci, tag without name", raw: ociTar(t, []v1.Image{one}, []map[string]string{ann(refName, "v3")}), tags: [][]string{nil}},
		{name: "oci, reference", raw: ociTar(t, []v1.Image{one}, []map[string]string{ann(refName, "example.com/z:4")}), tags: [][]string{{"example.com/z:4"}}, digests: 1},
		{name: "oci, containerd's name", raw: gzippedTar(t, ociTar(t, []v1.Image{one}, []map[string]string{ann(refName, "4", imageName, "example.com/c:4")})), tags: [][]string{{"example.com/c:4"}}, digests: 1},
		{name: "two images", raw: ociTar(t, []v1.Image{one, two}, []map[string]string{ann(imageName, "a.io/a:1"), ann(imageName, "b.io/b:2")}), tags: [][]string{{"a.io/a:1"}, {"b.io/b:2"}}, digests: 1},
		{name: "one image, two names", raw: ociTar(t, []v1.Image{one, one}, []map[string]string{ann(imageName, "a.io/a:1"), ann(imageName, "b.io/b:2")}), tags: [][]string{{"a.io/a:1"}, {"a.io/a:1", "b.io/b:2"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := openStore(t, t.TempDir(), nil)
			list, err := s.Load(t.Context(), bytes.NewReader(tt.raw), LoadOptions{Name: tt.option})
			if err != nil {
				t.Fatal(err)
			}
			if len(list) != len(tt.tags) {
				t.Fatalf("%d images, want %d", len(list), len(tt.tags))
			}
			for i, img := range list {
				if fmt.Sprint(img.RepoTags) != fmt.Sprint(tt.tags[i]) {
					t.Errorf("image %d has tags %v, want %v", i, img.RepoTags, tt.tags[i])
				}
			}
			if tt.digests > 0 && (len(list[0].RepoDigests) != tt.digests || !strings.HasSuffix(list[0].RepoDigests[0], "@"+oneDigest.String())) {
				t.Errorf("digests %v", list[0].RepoDigests)
			}
			if got := read(t, filepath.Join(mountOf(t, s, "c", list[0].ID), "one")); got != "1" {
				t.Errorf("one = %q", got)
			}
			// What the archive had besides the images goes.
			if err := s.GarbageCollect(t.Context()); err != nil {
				t.Fatal(err)
			}
			blobs, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "content/blobs/sha256/*"))
			want := map[string]bool{}
			for _, r := range s.images {
				for d := range r.blobs {
					want[d.Encoded()] = true
				}
			}
			if len(blobs) != len(want) {
				t.Errorf("%d blobs, want %d", len(blobs), len(want))
			}
		})
	}
}

func TestLoadRefuses(t *testing.T) {
	one := imageOf(t, layerOf(t, file("one", "1")))
	whole := ociTar(t, []v1.Image{one}, nil)
	lacking := func() []byte {
		dir := t.TempDir()
		p, err := layout.Write(dir, empty.Index)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.AppendImage(one); err != nil {
			t.Fatal(err)
		}
		l, _ := one.Layers()
		if err := os.Remove(filepath.Join(dir, "blobs/sha256", layerDigest(t, l[0]).Hex)); err != nil {
			t.Fatal(err)
		}
		return tarDir(t, dir)
	}()
	both, _ := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []any{}, "layers": []any{}, "config": map[string]any{}})
	evil := layerOf(t, file("../evil", "x"))
	tests := []struct {
		name   string
		raw    []byte
		limits Limits
		option string
		is     func(error) bool
		says   string
	}{
		{name: "text", raw: []byte(strings.Repeat("not a tar ", 200)), is: errdefs.IsInvalidArgument},
		{name: "nothing", raw: nil, is: errdefs.IsInvalidArgument},
		{name: "a tar of something else", raw: archiveOf(t, file("a", "b")), is: errdefs.IsInvalidArgument, says: "not an OCI layout or docker archive"},
		{name: "cut off", raw: whole[:len(whole)/2], is: errdefs.IsInvalidArgument},
		{name: "lacks a layer", raw: lacking, is: errdefs.IsInvalidArgument, says: "lacks blob"},
		{name: "two documents in one", raw: archiveOf(t, file("oci-layout", `{"imageLayoutVersion":"1.0.0"}`), file("index.json", fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:%x","size":%d}]}`, sum(both), len(both))), file(fmt.Sprintf("blobs/sha256/%x", sum(both)), string(both))), is: errdefs.IsInvalidArgument, says: "both an index and a manifest"},
		{name: "hostile layer", raw: ociTar(t, []v1.Image{imageOf(t, evil)}, nil), is: errdefs.IsInvalidArgument, says: "../evil"},
		{name: "larger than allowed", raw: whole, limits: Limits{ArchiveSize: 2048}, is: errdefs.IsInvalidArgument, says: "larger than allowed"},
		{name: "bad name", raw: whole, option: "a b", is: errdefs.IsInvalidArgument},
		{name: "bad name within", raw: ociTar(t, []v1.Image{one}, []map[string]string{{"io.containerd.image.name": "../../x"}}), is: errdefs.IsInvalidArgument},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := openStore(t, t.TempDir(), func(c *Config) { c.Limits = tt.limits })
			before := files(t, s.cfg.Dir)
			_, err := s.Load(t.Context(), bytes.NewReader(tt.raw), LoadOptions{Name: tt.option})
			if !tt.is(err) || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("err = %v, want %q", err, tt.says)
			}
			if err := s.GarbageCollect(t.Context()); err != nil {
				t.Fatal(err)
			}
			for f := range files(t, s.cfg.Dir) {
				if !before[f] {
					t.Errorf("left behind: %s", f)
				}
			}
		})
	}
}

// TestLoadedImageSatisfiesDigest: the same content pulled and loaded is one
// image.
func TestLoadedImageSatisfiesDigest(t *testing.T) {
	host := registryServer(t, nil)
	img := imageOf(t, layerOf(t, file("one", "1")))
	push(t, host+"/x/y:1", img)
	s := openStore(t, t.TempDir(), nil)
	pulled := mustPull(t, s, host+"/x/y:1")
	list, err := s.Load(t.Context(), io.MultiReader(bytes.NewReader(ociTar(t, []v1.Image{img}, nil))), LoadOptions{Name: "other.io/z:1"})
	if err != nil {
		t.Fatal(err)
	}
	if list[0].ID != pulled.ID || len(list[0].RepoTags) != 2 || len(list[0].RepoDigests) != 2 {
		t.Errorf("loaded %+v, pulled %+v", list[0], pulled)
	}
}
