// Package images makes the images of the examples and of the integration tests
// from Debian's packages and this module's test server, and serves them from a
// registry on the loopback interface. It needs no network but Debian's archive,
// and not that either where the packages are installed.
package images

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Builder makes images. What it downloads and compiles is kept in Dir.
type Builder struct {
	// Dir is the cache.
	Dir string
	// Go is the go command; "" is "go".
	Go string
}

// file of an image: bytes, or a copy of a file of this machine, or a link.
type file struct {
	mode int64
	data []byte
	from string
	link string
}

// tree is an image's files by absolute path. Directories come by themselves
// unless they need a mode of their own.
type tree map[string]file

func (t tree) dir(p string, mode int64) { t[p+"/"] = file{mode: mode} }

// layer packs the tree; the same files always give the same bytes, so the same
// digests.
func (t tree) layer() (v1.Layer, error) {
	all := maps.Clone(t)
	for p := range t {
		for d := path.Dir(strings.TrimSuffix(p, "/")); d != "/" && d != "."; d = path.Dir(d) {
			if _, ok := all[d+"/"]; !ok {
				all[d+"/"] = file{mode: 0o755}
			}
		}
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, p := range slices.Sorted(maps.Keys(all)) {
		f := all[p]
		h := &tar.Header{Name: strings.TrimPrefix(p, "/"), Mode: f.mode, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
		data := f.data
		switch {
		case strings.HasSuffix(p, "/"):
			h.Typeflag = tar.TypeDir
		case f.link != "":
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.link, 0o777
		default:
			if f.from != "" {
				var err error
				if data, err = os.ReadFile(f.from); err != nil {
					return nil, err
				}
			}
			h.Typeflag, h.Size = tar.TypeReg, int64(len(data))
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(data); err != nil {
				return nil, err
			}
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
}

func image(cfg v1.Config, trees ...tree) (v1.Image, error) {
	img := v1.Image(empty.Image)
	for _, t := range trees {
		l, err := t.layer()
		if err != nil {
			return nil, err
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			return nil, err
		}
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.Config, cf.OS, cf.Architecture = cfg, "linux", runtime.GOARCH
	cf.Created = v1.Time{Time: time.Unix(0, 0)}
	return mutate.ConfigFile(img, cf)
}

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// base are the files that programs expect everywhere.
func base() tree {
	t := tree{
		"/etc/passwd":        {mode: 0o644, data: []byte("root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/false\nredis:x:999:999:redis:/data:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n")},
		"/etc/group":         {mode: 0o644, data: []byte("root:x:0:\nwww-data:x:33:\nredis:x:999:\nnogroup:x:65534:\n")},
		"/etc/nsswitch.conf": {mode: 0o644, data: []byte("passwd: files\ngroup: files\nhosts: files dns\n")},
	}
	t.dir("/tmp", 0o1777)
	t.dir("/root", 0o700)
	return t
}

// Busybox is a shell and its tools, static.
func (b *Builder) Busybox(ctx context.Context) (v1.Image, error) {
	t, err := b.busybox(ctx)
	if err != nil {
		return nil, err
	}
	return image(v1.Config{Env: []string{defaultPath}, Cmd: []string{"sh"}}, base(), t)
}

func (b *Builder) busybox(ctx context.Context) (tree, error) {
	at, err := newDebian(ctx, b.Dir).file("/bin/busybox", "busybox-static")
	if err != nil {
		return nil, err
	}
	return applets(ctx, at)
}

// applets are a busybox and links to it by all its names.
func applets(ctx context.Context, at string) (tree, error) {
	// --list-full is absent from Debian's build; --list names them all.
	out, err := exec.CommandContext(ctx, at, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list busybox' applets: %w", err)
	}
	t := tree{"/bin/busybox": {mode: 0o755, from: at}}
	for _, applet := range strings.Fields(string(out)) {
		if applet != "busybox" {
			t["/bin/"+applet] = file{link: "busybox"}
		}
	}
	if len(t) < 2 {
		return nil, errNoApplets
	}
	return t, nil
}

// program adds a program of a package and the libraries it needs.
func (t tree) program(d *debian, to, from, pkg string) error {
	at, err := d.file(from, pkg)
	if err != nil {
		return err
	}
	t[to] = file{mode: 0o755, from: at}
	libs, err := d.libraries(at, pkg)
	if err != nil {
		return err
	}
	for p, from := range libs {
		t[p] = file{mode: 0o755, from: from}
	}
	return nil
}

const nginxConf = `# One worker, everything logged to the container's output.
user www-data;
worker_processes 1;
daemon off;
pid /run/nginx.pid;
error_log /dev/stderr notice;
events { worker_connections 512; }
http {
	include /etc/nginx/mime.types;
	default_type application/octet-stream;
	access_log /dev/stdout;
	server {
		listen 80 default_server;
		listen [::]:80 default_server;
		root /usr/share/nginx/html;
	}
}
`

// Nginx is Debian's nginx on port 80; pages are in /usr/share/nginx/html.
func (b *Builder) Nginx(ctx context.Context) (v1.Image, error) {
	d := newDebian(ctx, b.Dir)
	t := tree{
		"/etc/nginx/nginx.conf":            {mode: 0o644, data: []byte(nginxConf)},
		"/usr/share/nginx/html/index.html": {mode: 0o644, data: []byte("<!doctype html>\n<title>podd</title>\n<h1>nginx in a pod</h1>\n")},
	}
	if err := t.program(d, "/usr/sbin/nginx", "/usr/sbin/nginx", "nginx"); err != nil {
		return nil, err
	}
	mime, err := d.file("/etc/nginx/mime.types", "nginx-common")
	if err != nil {
		return nil, err
	}
	t["/etc/nginx/mime.types"] = file{mode: 0o644, from: mime}
	for _, p := range []string{"/run", "/var/log/nginx", "/var/lib/nginx"} {
		t.dir(p, 0o755)
	}
	shell, err := b.busybox(ctx)
	if err != nil {
		return nil, err
	}
	return image(v1.Config{
		Env: []string{defaultPath}, Entrypoint: []string{"nginx"}, StopSignal: "SIGQUIT",
		ExposedPorts: map[string]struct{}{"80/tcp": {}},
	}, base(), shell, t)
}

// Redis is Debian's redis-server and redis-cli, without persistence, as user 999.
func (b *Builder) Redis(ctx context.Context) (v1.Image, error) {
	d := newDebian(ctx, b.Dir)
	t := tree{}
	t.dir("/data", 0o1777)
	if err := t.program(d, "/usr/bin/redis-server", "/usr/bin/redis-server", "redis-server"); err != nil {
		// Debian's redis-server is a link into redis-tools.
		if err = d.get("redis-tools"); err == nil {
			err = t.program(d, "/usr/bin/redis-server", "/usr/bin/redis-check-rdb", "redis-tools")
		}
		if err != nil {
			return nil, err
		}
	}
	if err := t.program(d, "/usr/bin/redis-cli", "/usr/bin/redis-cli", "redis-tools"); err != nil {
		return nil, err
	}
	shell, err := b.busybox(ctx)
	if err != nil {
		return nil, err
	}
	return image(v1.Config{
		Env: []string{defaultPath}, User: "999:999", WorkingDir: "/data",
		Entrypoint:   []string{"redis-server"},
		Cmd:          []string{"--save", "", "--appendonly", "no", "--protected-mode", "no"},
		ExposedPorts: map[string]struct{}{"6379/tcp": {}},
	}, base(), shell, t)
}

// Testserver is the program of ./testserver and nothing else.
func (b *Builder) Testserver(ctx context.Context) (v1.Image, error) {
	bin, err := b.compile(ctx, "testserver")
	if err != nil {
		return nil, err
	}
	return image(v1.Config{Env: []string{defaultPath, "FROM_IMAGE=yes"}, Entrypoint: []string{"/testserver"}},
		base(), tree{"/testserver": {mode: 0o755, from: bin}})
}

// compile builds a program of a folder beside this file.
func (b *Builder) compile(ctx context.Context, program string) (path string, err error) {
	gocmd := b.Go
	if gocmd == "" {
		gocmd = "go"
	}
	if err := os.MkdirAll(b.Dir, 0o755); err != nil {
		return "", err
	}
	path = filepath.Join(b.Dir, program)
	cmd := exec.CommandContext(ctx, gocmd, "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "github.com/podd-runtime/podd/integration/images/"+program)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w: %s", program, err, out)
	}
	return path, nil
}

// Tag is an image and what it is called.
type Tag struct {
	Ref   string
	Image v1.Image
}

// WriteTar writes images as one docker-archive tar.
func WriteTar(to string, tags ...Tag) error {
	refs := map[name.Reference]v1.Image{}
	for _, t := range tags {
		ref, err := name.NewTag(t.Ref, name.WithDefaultRegistry("docker.io"))
		if err != nil {
			return err
		}
		refs[ref] = t.Image
	}
	return tarball.MultiRefWriteToFile(to, refs)
}
