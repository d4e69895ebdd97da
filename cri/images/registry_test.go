package images

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// listener notes every secret that it is sent, and answers with next.
type listener struct {
	*httptest.Server
	mu    sync.Mutex
	heard []string
}

func listen(t testing.TB, secrets []string, next http.HandlerFunc) *listener {
	l := &listener{}
	l.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		for k, values := range r.Header {
			for _, s := range secrets {
				if v := strings.Join(values, " "); strings.Contains(v, s) || strings.Contains(v, base64.StdEncoding.EncodeToString([]byte("robot:"+s))) {
					l.hear(r.Method + " " + r.URL.Path + " " + k + ": " + v)
				}
			}
		}
		for _, s := range secrets {
			if strings.Contains(string(body), s) {
				l.hear(r.Method + " " + r.URL.Path + " body")
			}
		}
		next(w, r)
	}))
	t.Cleanup(l.Close)
	return l
}

func (l *listener) hear(s string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.heard = append(l.heard, s)
}

// TestCredentialsStayAtTheirPort: a registry sends us on to another port of
// the same host. What was for the registry does not go along, whatever form it
// has, and not when the other side asks for it either.
func TestCredentialsStayAtTheirPort(t *testing.T) {
	const user, password, token, header = "robot", "s3cret", "t0ken", "h3ader"
	l := layerOf(t, file("a", noise(1000)))
	blob, _ := io.ReadAll(must(l.Compressed()))
	serve := func(w http.ResponseWriter, r *http.Request) { w.Write(blob) }
	demand := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
	}
	for _, tt := range []struct {
		name  string
		auth  *runtimeapi.AuthConfig
		other http.HandlerFunc
		fails bool
	}{
		{"user and password", &runtimeapi.AuthConfig{Username: user, Password: password}, serve, false},
		{"registry token", &runtimeapi.AuthConfig{RegistryToken: token}, serve, false},
		{"asked for", &runtimeapi.AuthConfig{Username: user, Password: password}, demand, true},
		{"a header of hosts.toml", nil, serve, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			other := listen(t, []string{password, token, header}, tt.other)
			h := newHooked(t)
			push(t, h.host+"/x/y:1", imageOf(t, l))
			h.set(func(w http.ResponseWriter, r *http.Request) bool {
				u, p, _ := r.BasicAuth()
				if !(u == user && p == password || r.Header.Get("Authorization") == "Bearer "+token || r.Header.Get("X-Key") == header) {
					demand(w, r)
					return true
				}
				if isBlob(r, layerDigest(t, l)) {
					http.Redirect(w, r, other.URL+"/data", http.StatusTemporaryRedirect)
					return true
				}
				return false
			})
			certs := t.TempDir()
			if tt.auth == nil {
				writeHosts(t, certs, strings.Replace(h.host, ":", "_", 1)+"_", fmt.Sprintf("server = %q\n[host.%q]\n[host.%q.header]\nX-Key = %q\n", "http://"+h.host, "http://"+h.host, "http://"+h.host, header))
			}
			s := openStore(t, t.TempDir(), func(c *Config) { c.RegistryConfigPath = certs })
			_, err := s.Pull(t.Context(), h.host+"/x/y:1", tt.auth, nil)
			if (err != nil) != tt.fails {
				t.Errorf("err = %v", err)
			}
			if len(other.heard) != 0 {
				t.Errorf("the other port heard %q", other.heard)
			}
		})
	}
}

// TestPasswordDoesNotFollowTheTokenServersRedirect: 307 repeats the request
// with its body.
func TestPasswordDoesNotFollowTheTokenServersRedirect(t *testing.T) {
	other := listen(t, []string{"s3cret"}, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, `{"token":"x","access_token":"x"}`) })
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, other.URL+"/token", http.StatusTemporaryRedirect)
	}))
	defer tokens.Close()
	h := newHooked(t)
	push(t, h.host+"/x/y:1", imageOf(t, layerOf(t, file("a", "a"))))
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="x"`, tokens.URL))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	s := openStore(t, t.TempDir(), nil)
	if _, err := s.Pull(t.Context(), h.host+"/x/y:1", &runtimeapi.AuthConfig{Username: "robot", Password: "s3cret"}, nil); err == nil || !strings.Contains(err.Error(), "not sent there") {
		t.Errorf("err = %v", err)
	}
	if len(other.heard) != 0 {
		t.Errorf("heard %q", other.heard)
	}
}

// TestPasswordIsNotSentInTheClear: a registry with TLS names a token server
// without.
func TestPasswordIsNotSentInTheClear(t *testing.T) {
	var sent atomic.Int32
	tr := &tokenServer{next: roundTrip(func(r *http.Request) (*http.Response, error) {
		sent.Add(1)
		return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader("{}")), Request: r}, nil
	}), from: place{"https", "registry.example:443"}}
	for url, ok := range map[string]bool{"http://tokens.example/token": false, "https://tokens.example/token": true} {
		sent.Store(0)
		r, _ := http.NewRequest(http.MethodPost, url, strings.NewReader("password=x"))
		_, err := tr.RoundTrip(r)
		if (err == nil) != ok || (sent.Load() == 1) != ok {
			t.Errorf("%s: %v, sent %d", url, err, sent.Load())
		}
		r, _ = http.NewRequest(http.MethodGet, url, nil) // without a secret it may go anywhere
		if _, err := tr.RoundTrip(r); err != nil {
			t.Errorf("%s: %v", url, err)
		}
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// endless sends until the client has had enough; sent is how much that was.
func endless(w http.ResponseWriter, r *http.Request, sent *atomic.Int64) {
	if r.Method == http.MethodHead {
		return
	}
	b := []byte(strings.Repeat(" ", 64<<10))
	for {
		n, err := w.Write(b)
		if sent.Add(int64(n)); err != nil || sent.Load() > 1<<30 {
			return
		}
	}
}

// TestEndlessAnswersEnd: whatever has no end is read to its bound only.
func TestEndlessAnswersEnd(t *testing.T) {
	var sent atomic.Int64
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { endless(w, r, &sent) }))
	defer tokens.Close()
	isManifest := func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/") }
	for name, answer := range map[string]hook{
		"manifest without a digest": func(w http.ResponseWriter, r *http.Request) bool {
			if isManifest(r) && r.Method == http.MethodGet {
				endless(w, r, &sent)
			}
			return isManifest(r)
		},
		"manifest that is said to be small": func(w http.ResponseWriter, r *http.Request) bool {
			if !isManifest(r) {
				return false
			}
			if r.Method == http.MethodHead {
				w.Header().Set("Docker-Content-Digest", "sha256:"+strings.Repeat("a", 64))
				w.Header().Set("Content-Length", "100")
				return true
			}
			endless(w, r, &sent)
			return true
		},
		"token": func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="x"`, tokens.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return true
		},
		"refusal": func(w http.ResponseWriter, r *http.Request) bool {
			w.WriteHeader(http.StatusForbidden)
			endless(w, r, &sent)
			return true
		},
		"page": func(w http.ResponseWriter, r *http.Request) bool {
			io.WriteString(w, "<!doctype html>")
			endless(w, r, &sent)
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			sent.Store(0)
			h := newHooked(t)
			h.set(answer)
			s := openStore(t, t.TempDir(), nil)
			if _, err := s.Pull(t.Context(), h.host+"/x/y:1", nil, nil); err == nil {
				t.Fatal("pulled")
			}
			// Some requests are repeated, and the kernel's buffers take some.
			if n := sent.Load(); n > 64<<20 {
				t.Errorf("%d bytes were taken", n)
			}
		})
	}
}

// claimed is a layer of which the manifest says another size.
type claimed struct {
	v1.Layer
	size int64
}

func (c claimed) Size() (int64, error) { return c.size, nil }

// TestTooLargeIsRefusedBeforeTheFirstByte: what cannot fit is not begun.
func TestTooLargeIsRefusedBeforeTheFirstByte(t *testing.T) {
	needRoot(t)
	l := layerOf(t, file("a", noise(1000)))
	for _, tt := range []struct {
		name  string
		sizes []int64
		is    func(error) bool
		says  string
	}{
		{"a TiB", []int64{1 << 40}, errdefs.IsInvalidArgument, "layers of more than"},
		{"more than numbers go", []int64{1<<63 - 1, 1<<63 - 1}, errdefs.IsInvalidArgument, "layers of more than"},
		{"more than is free", []int64{30 << 20}, errdefs.IsResourceExhausted, "free space"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHooked(t)
			var layers []string
			for _, n := range tt.sizes {
				layers = append(layers, fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":%q,"size":%d}`, layerDigest(t, l), n))
			}
			config := `{"os":"linux","rootfs":{"type":"layers","diff_ids":[` + strings.TrimSuffix(strings.Repeat(fmt.Sprintf("%q,", must(l.DiffID())), len(layers)), ",") + `]}}`
			manifest := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:%x","size":%d},"layers":[%s]}`, sum([]byte(config)), len(config), strings.Join(layers, ","))
			h.set(func(w http.ResponseWriter, r *http.Request) bool {
				switch {
				case strings.Contains(r.URL.Path, "/manifests/"):
					io.WriteString(w, manifest)
				case strings.HasSuffix(r.URL.Path, fmt.Sprintf("%x", sum([]byte(config)))):
					io.WriteString(w, config)
				default:
					return false
				}
				return true
			})
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
			_, err := s.Pull(t.Context(), h.host+"/x/y:1", nil, nil)
			if !tt.is(err) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("err = %v", err)
			}
			if n := h.gets(layerDigest(t, l)); n != 0 {
				t.Errorf("the layer was asked for %d times", n)
			}
		})
	}
}

// TestContentDecidesWhatAManifestIs: some registries say text/plain of
// everything.
func TestContentDecidesWhatAManifestIs(t *testing.T) {
	for _, media := range []string{"text/plain", "text/plain; charset=utf-8", "text/html", "application/json", "application/octet-stream", "application/vnd.docker.distribution.manifest.v1+prettyjws"} {
		for _, digests := range []bool{true, false} {
			t.Run(fmt.Sprint(media, digests), func(t *testing.T) {
				h := newHooked(t)
				img := imageOf(t, layerOf(t, file("a", "a")))
				push(t, h.host+"/x/y:1", img)
				raw, _ := img.RawManifest()
				h.set(func(w http.ResponseWriter, r *http.Request) bool {
					if !strings.Contains(r.URL.Path, "/manifests/") {
						return false
					}
					w.Header().Set("Content-Type", media)
					if digests {
						w.Header().Set("Docker-Content-Digest", must(img.Digest()).String())
					}
					w.Header().Set("Content-Length", fmt.Sprint(len(raw)))
					if r.Method == http.MethodGet {
						w.Write(raw)
					}
					return true
				})
				if _, err := openStore(t, t.TempDir(), nil).Pull(t.Context(), h.host+"/x/y:1", nil, nil); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestUnusualRegistries serve images all the same.
func TestUnusualRegistries(t *testing.T) {
	img := imageOf(t, layerOf(t, file("a", "a")))
	d := must(img.Digest()).String()
	auth := &runtimeapi.AuthConfig{Username: "robot", Password: "s3cret"}
	loggedIn := func(r *http.Request) bool { _, p, _ := r.BasicAuth(); return p == "s3cret" }
	for _, tt := range []struct {
		name, ref string
		auth      *runtimeapi.AuthConfig
		hook      hook
	}{
		{"asks for a login at /v2/ only", ":1", auth, func(w http.ResponseWriter, r *http.Request) bool {
			switch {
			case loggedIn(r):
				return false
			case r.URL.Path == "/v2/":
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				w.WriteHeader(http.StatusUnauthorized)
			default:
				http.NotFound(w, r)
			}
			return true
		}},
		{"asks for a login at /v2/ only, and has public manifests", ":1", auth, func(w http.ResponseWriter, r *http.Request) bool {
			switch {
			case loggedIn(r) || strings.Contains(r.URL.Path, "/manifests/"):
				return false
			case r.URL.Path == "/v2/":
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				w.WriteHeader(http.StatusUnauthorized)
			default:
				w.WriteHeader(http.StatusForbidden)
			}
			return true
		}},
		{"has no HEAD for digests", "@" + d, nil, func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodHead && strings.Contains(r.URL.Path, "sha256:") {
				http.NotFound(w, r)
				return true
			}
			return false
		}},
		{"has manifests by tag only", ":1", nil, func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, "/manifests/"+d) {
				http.NotFound(w, r)
				return true
			}
			return false
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHooked(t)
			push(t, h.host+"/x/y:1", img)
			h.set(tt.hook)
			s := openStore(t, t.TempDir(), nil)
			if _, err := s.Pull(t.Context(), h.host+"/x/y"+tt.ref, tt.auth, nil); err != nil {
				t.Error(err)
			}
			// What is not there is not there.
			if _, err := s.Pull(t.Context(), h.host+"/x/none:1", tt.auth, nil); !errdefs.IsNotFound(err) && !errdefs.IsPermissionDenied(err) {
				t.Errorf("missing: %v", err)
			}
		})
	}
}

// TestWhatIsNoImageIsSaid, in a sentence and once.
func TestWhatIsNoImageIsSaid(t *testing.T) {
	payload := []byte(`{"critical":{"identity":{"docker-reference":""},"image":{},"type":"cosign container image signature"},"optional":null}`)
	page := "<!DOCTYPE html>\n<html><body>Please log in</body></html>"
	config := func(img v1.Image) v1.Image { return img }
	for _, tt := range []struct {
		name string
		img  v1.Image
		hook hook
		says string
	}{
		{"cosign signature", config(imageOf(t, rawLayer{payload, payload, "application/vnd.dev.cosign.simplesigning.v1+json"})), nil, "signature"},
		{"document as a layer", imageOf(t, rawLayer{payload, payload, types.OCILayer}), nil, "is no tar archive"},
		{"another artifact", mutate.ConfigMediaType(imageOf(t), "application/vnd.cncf.helm.config.v1+json"), nil, "not a container image"},
		{"web page for everything", nil, func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, page)
			return true
		}, "web page"},
		{"web page without a type", nil, func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Type", "application/octet-stream")
			io.WriteString(w, page)
			return true
		}, "web page"},
		{"web page for a token", nil, func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == "/token" {
				io.WriteString(w, page)
				return true
			}
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="x"`, r.Host))
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}, "web page"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHooked(t)
			if tt.img != nil {
				push(t, h.host+"/x/y:1", tt.img)
			}
			h.set(tt.hook)
			_, err := openStore(t, t.TempDir(), nil).Pull(t.Context(), h.host+"/x/y:1", nil, nil)
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("err = %v", err)
			}
			for _, not := range []string{"unexpected EOF", "invalid character", "\n"} {
				if strings.Contains(err.Error(), not) {
					t.Errorf("%q in %v", not, err)
				}
			}
			if n := strings.Count(err.Error(), "pull "); n != 1 {
				t.Errorf("pull %d times: %v", n, err)
			}
		})
	}
}

func TestHugeWindowIsNotTaken(t *testing.T) {
	h := newHooked(t)
	l := layerOf(t, file("a", noise(1000)))
	push(t, h.host+"/x/y:1", imageOf(t, l))
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlob(r, layerDigest(t, l)) {
			return false
		}
		w.Header().Set("Content-Encoding", "zstd")
		io.CopyN(w, rand.Reader, 1000)
		return true
	})
	if _, err := openStore(t, t.TempDir(), nil).Pull(t.Context(), h.host+"/x/y:1", nil, nil); err == nil || !strings.Contains(err.Error(), "not asked for") {
		t.Errorf("err = %v", err)
	}
}
