package images

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// unpack writes an image's files to a directory.
func unpack(t *testing.T, img v1.Image) string {
	t.Helper()
	dir := t.TempDir()
	r := mutate.Extract(img)
	defer r.Close()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(to, 0o755)
		case tar.TypeSymlink:
			err = os.Symlink(h.Linkname, to)
		case tar.TypeReg:
			var f *os.File
			if f, err = os.OpenFile(to, os.O_CREATE|os.O_WRONLY, os.FileMode(h.Mode)); err == nil {
				_, err = io.Copy(f, tr)
				f.Close()
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestProgramsRun starts each image's program in its own files.
func TestProgramsRun(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("chroot needs root")
	}
	b := &Builder{Dir: t.TempDir()}
	for _, tt := range []struct {
		name  string
		build func(context.Context) (v1.Image, error)
		cmd   []string
	}{
		{"busybox", b.Busybox, []string{"/bin/sh", "-c", "ls / && true"}},
		{"nginx", b.Nginx, []string{"/usr/sbin/nginx", "-v"}},
		{"redis", b.Redis, []string{"/usr/bin/redis-server", "--version"}},
		{"redis-cli", b.Redis, []string{"/usr/bin/redis-cli", "--version"}},
		{"testserver", b.Testserver, []string{"/testserver", "env"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			img, err := tt.build(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if again, err := tt.build(t.Context()); err != nil {
				t.Fatal(err)
			} else if a, b := digest(t, img), digest(t, again); a != b {
				t.Errorf("not reproducible: %s and %s", a, b)
			}
			out, err := exec.Command("chroot", append([]string{unpack(t, img)}, tt.cmd...)...).CombinedOutput()
			if err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

func digest(t *testing.T, img v1.Image) string {
	t.Helper()
	h, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return h.String()
}

func TestRegistryAndTar(t *testing.T) {
	img, err := image(v1.Config{}, base())
	if err != nil {
		t.Fatal(err)
	}
	r, err := Serve("127.0.0.1:0", "user", "secret")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	want, err := r.Push(t.Context(), "some/base:1", img)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Get("http://" + r.Addr + "/v2/some/base/manifests/1")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized || resp.Header.Get("WWW-Authenticate") == "" {
		t.Errorf("without password: %s", resp.Status)
	}
	resp, err = http.Get("http://user:secret@" + r.Addr + "/v2/some/base/manifests/1")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if got := resp.Header.Get("Docker-Content-Digest"); got != want {
		t.Errorf("digest %q, want %q (%s)", got, want, resp.Status)
	}

	tar := filepath.Join(t.TempDir(), "image.tar")
	if err := WriteTar(tar, Tag{"example/base:2", img}); err != nil {
		t.Fatal(err)
	}
	tag, _ := name.NewTag("docker.io/example/base:2")
	if _, err := tarball.ImageFromPath(tar, &tag); err != nil {
		t.Error(err)
	}
}
