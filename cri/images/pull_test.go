package images

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	gremote "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// hooks change a registry's answers; each may be nil or return false to let
// the request through.
type hook func(w http.ResponseWriter, r *http.Request) (handled bool)

// hooked is a registry whose hook can be changed while it runs.
type hooked struct {
	host string
	mu   sync.Mutex
	hook hook
	blob map[string]int // GETs of each blob
}

func newHooked(t testing.TB) *hooked {
	h := &hooked{blob: map[string]int{}}
	h.host = registryServer(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h.mu.Lock()
			f := h.hook
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
				h.blob[r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]]++
			}
			h.mu.Unlock()
			if f == nil || !f(w, r) {
				next.ServeHTTP(w, r)
			}
		})
	})
	return h
}

func (h *hooked) set(f hook) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hook = f
}

func (h *hooked) gets(d v1.Hash) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.blob[d.String()]
}

func isBlob(r *http.Request, d v1.Hash) bool {
	return r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/blobs/"+d.String())
}

func layerDigest(t testing.TB, l v1.Layer) v1.Hash {
	t.Helper()
	d, err := l.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestPullErrorsSayWhatWhereAndWhy(t *testing.T) {
	answer := func(status int, body string) hook {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == "/v2/" {
				return false
			}
			w.WriteHeader(status)
			io.WriteString(w, body)
			return true
		}
	}
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	deadHost := dead.Addr().String()
	dead.Close()
	h := newHooked(t)
	layer := layerOf(t, file("a", noise(1000)))
	push(t, h.host+"/team/app:v1", imageOf(t, layer))
	tests := []struct {
		name, ref string
		hook      hook
		is        func(error) bool
		says      []string
	}{
		{"no such tag", h.host + "/team/app:v2", nil, errdefs.IsNotFound, []string{"team/app:v2", h.host, "404", "MANIFEST_UNKNOWN", "check its spelling"}},
		{"unauthorized", h.host + "/team/app:v1", answer(401, `{"errors":[{"code":"UNAUTHORIZED","message":"who are you"}]}`), errdefs.IsUnauthorized, []string{"imagePullSecrets", "401", "UNAUTHORIZED who are you", h.host}},
		{"forbidden", h.host + "/team/app:v1", answer(403, `{"errors":[{"code":"DENIED","message":"not for you"}]}`), errdefs.IsPermissionDenied, []string{"403", "DENIED not for you"}},
		{"rate limit", h.host + "/team/app:v1", answer(429, `{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}`), errdefs.IsResourceExhausted, []string{"429"}},
		{"registry is ill", h.host + "/team/app:v1", answer(500, `oops`), errdefs.IsUnavailable, []string{"500"}},
		{"unreachable", deadHost + "/team/app:v1", nil, errdefs.IsUnavailable, []string{deadHost, "not reachable", "refused"}},
		{"no such blob", h.host + "/team/app:v1", func(w http.ResponseWriter, r *http.Request) bool {
			if !isBlob(r, layerDigest(t, layer)) {
				return false
			}
			http.NotFound(w, r)
			return true
		}, errdefs.IsNotFound, []string{"404"}},
		{"wrong content", h.host + "/team/app:v1", func(w http.ResponseWriter, r *http.Request) bool {
			if !isBlob(r, layerDigest(t, layer)) {
				return false
			}
			size, _ := layer.Size()
			w.Write(bytes.Repeat([]byte("x"), int(size)))
			return true
		}, errdefs.IsDataLoss, []string{"registry sent something else", layerDigest(t, layer).String()}},
		{"too short", h.host + "/team/app:v1", func(w http.ResponseWriter, r *http.Request) bool {
			if !isBlob(r, layerDigest(t, layer)) {
				return false
			}
			w.Write([]byte("x"))
			return true
		}, errdefs.IsUnavailable, []string{"ended at byte"}},
		{"bad reference", "a b", nil, errdefs.IsInvalidArgument, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := openStore(t, t.TempDir(), nil)
			h.set(tt.hook)
			defer h.set(nil)
			_, err := s.Pull(t.Context(), tt.ref, nil, nil)
			if !tt.is(err) {
				t.Fatalf("kind of: %v", err)
			}
			for _, want := range tt.says {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error does not say %q: %v", want, err)
				}
			}
		})
	}
}

// TestPullResumes: the first attempt breaks in the middle; the next one, of a
// new process, asks for the rest only.
func TestPullResumes(t *testing.T) {
	h := newHooked(t)
	layer := layerOf(t, file("a", noise(1<<20)))
	d := layerDigest(t, layer)
	push(t, h.host+"/team/app:v1", imageOf(t, layer))
	size, _ := layer.Size()
	dirname := t.TempDir()

	var broken atomic.Int32
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlob(r, d) {
			return false
		}
		if broken.Add(1) > 1 {
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		rc, _ := layer.Compressed()
		defer rc.Close()
		w.Header().Set("Content-Length", fmt.Sprint(size))
		io.CopyN(w, rc, 400<<10)
		panic(http.ErrAbortHandler)
	})
	s := openStore(t, dirname, nil)
	if _, err := s.Pull(t.Context(), h.host+"/team/app:v1", nil, nil); !errdefs.IsPermissionDenied(err) {
		t.Fatalf("first pull: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	var ranges []string
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlob(r, d) {
			return false
		}
		ranges = append(ranges, r.Header.Get("Range"))
		rc, _ := layer.Compressed()
		defer rc.Close()
		raw, _ := io.ReadAll(rc)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(raw))
		return true
	})
	s = openStore(t, dirname, nil)
	img := mustPull(t, s, h.host+"/team/app:v1")
	if len(ranges) != 1 || !strings.HasPrefix(ranges[0], "bytes=") || ranges[0] == "bytes=0-" {
		t.Errorf("asked for %q, want one request for the rest", ranges)
	}
	if got := len(read(t, filepath.Join(mountOf(t, s, "c", img.ID), "a"))); got != 1<<20 {
		t.Errorf("file has %d bytes", got)
	}
}

// TestPullDropsDamagedPartial: what was kept of an earlier attempt is garbage.
func TestPullDropsDamagedPartial(t *testing.T) {
	h := newHooked(t)
	layer := layerOf(t, file("a", noise(1<<20)))
	d := layerDigest(t, layer)
	push(t, h.host+"/team/app:v1", imageOf(t, layer))
	size, _ := layer.Size()
	s := openStore(t, t.TempDir(), nil)
	var tries atomic.Int32
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlob(r, d) {
			return false
		}
		if tries.Add(1) == 1 {
			w.Header().Set("Content-Length", fmt.Sprint(size))
			w.Write(make([]byte, 300<<10)) // zeros, not the layer
			panic(http.ErrAbortHandler)
		}
		w.WriteHeader(http.StatusForbidden)
		return true
	})
	if _, err := s.Pull(t.Context(), h.host+"/team/app:v1", nil, nil); err == nil {
		t.Fatal("broken pull succeeded")
	}
	h.set(nil)
	mustPull(t, s, h.host+"/team/app:v1")
}

func TestStalledTransferIsGivenUp(t *testing.T) {
	h := newHooked(t)
	layer := layerOf(t, file("a", noise(1<<20)))
	push(t, h.host+"/team/app:v1", imageOf(t, layer))
	s := openStore(t, t.TempDir(), func(c *Config) { c.StallTimeout = 100 * time.Millisecond })
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlob(r, layerDigest(t, layer)) {
			return false
		}
		// A slow drip: a byte now and then defeats timeouts between reads.
		for {
			if _, err := w.Write([]byte{0}); err != nil {
				return true
			}
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
				return true
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
	_, err := s.Pull(t.Context(), h.host+"/team/app:v1", nil, nil)
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "slow") {
		t.Fatalf("err = %v", err)
	}
}

func TestPullsOfOneRefJoin(t *testing.T) {
	h := newHooked(t)
	layer := layerOf(t, file("a", noise(100<<10)))
	push(t, h.host+"/team/app:v1", imageOf(t, layer))
	push(t, h.host+"/team/other:v1", imageOf(t, layer, layerOf(t, file("b", "b"))))
	s := openStore(t, t.TempDir(), nil)
	gate := make(chan struct{})
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if isBlob(r, layerDigest(t, layer)) {
			<-gate
		}
		return false
	})
	var wg sync.WaitGroup
	var started atomic.Int32
	for i := range 10 {
		ref := h.host + "/team/app:v1"
		if i%2 == 1 {
			ref = h.host + "/team/other:v1" // another image, the same layer
		}
		wg.Go(func() {
			var once sync.Once
			if _, err := s.Pull(t.Context(), ref, nil, func(Progress) { once.Do(func() { started.Add(1) }) }); err != nil {
				t.Error(err)
			}
		})
	}
	waitFor(t, func() bool { return started.Load() == 10 && len(s.Pulling()) == 2 })
	close(gate)
	wg.Wait()
	if n := h.gets(layerDigest(t, layer)); n != 1 {
		t.Errorf("layer was fetched %d times", n)
	}
	if n := len(s.Pulling()); n != 0 {
		t.Errorf("%d pulls still listed", n)
	}
}

func waitFor(t testing.TB, f func() bool) {
	t.Helper()
	if !eventually(f) {
		t.Fatal("condition did not come true within 10 s")
	}
}

func eventually(f func() bool) bool {
	for deadline := time.Now().Add(10 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// TestCancelledPullLeavesNothing: one of two waiters leaves and the pull goes
// on; the other leaves and it ends; collected, nothing of it is left.
func TestCancelledPullLeavesNothing(t *testing.T) {
	h := newHooked(t)
	layer := layerOf(t, file("a", noise(1<<20)))
	push(t, h.host+"/team/app:v1", imageOf(t, layer, layerOf(t, file("b", "b"))))
	s := openStore(t, t.TempDir(), nil)
	before := files(t, s.cfg.Dir)
	goroutines := runtime.NumGoroutine()
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlob(r, layerDigest(t, layer)) {
			return false
		}
		size, _ := layer.Size()
		w.Header().Set("Content-Length", fmt.Sprint(size))
		w.Write(make([]byte, 200<<10))
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	})
	ctx1, cancel1 := context.WithCancel(t.Context())
	ctx2, cancel2 := context.WithCancel(t.Context())
	errs := make(chan error, 2)
	var bytes atomic.Int64
	for _, ctx := range []context.Context{ctx1, ctx2} {
		go func() {
			_, err := s.Pull(ctx, h.host+"/team/app:v1", nil, func(p Progress) { bytes.Store(p.Bytes) })
			errs <- err
		}()
	}
	waitFor(t, func() bool { return len(s.Pulling()) == 1 && s.Pulling()[0].Bytes >= 100<<10 })
	cancel1()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("first waiter: %v", err)
	}
	if n := len(s.Pulling()); n != 1 {
		t.Errorf("pull ended with its first waiter, %d left", n)
	}
	cancel2()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("second waiter: %v", err)
	}
	if err := s.GarbageCollect(t.Context()); err != nil {
		t.Fatal(err)
	}
	for f := range files(t, s.cfg.Dir) {
		if !before[f] {
			t.Errorf("left behind: %s", f)
		}
	}
	waitFor(t, func() bool { return runtime.NumGoroutine() <= goroutines+2 }) // the registry's own connections
	if len(s.leases)+len(s.fetches)+len(s.pulls)+len(s.unpackings)+len(s.keys) != 0 {
		t.Error("maps are not empty")
	}
}

func TestCredentials(t *testing.T) {
	const user, password = "robot", "s3cret"
	h := newHooked(t)
	push(t, h.host+"/team/app:v1", imageOf(t, layerOf(t, file("a", "a"))))
	basic := func(w http.ResponseWriter, r *http.Request) bool {
		u, p, _ := r.BasicAuth()
		if u == user && p == password || r.Header.Get("Authorization") == "Bearer token" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
		io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","message":"log in"}]}`)
		return true
	}
	h.set(basic)
	enc := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
	config := filepath.Join(t.TempDir(), "config.json")
	doc, _ := json.Marshal(map[string]any{"auths": map[string]any{"http://" + h.host + "/v1/": map[string]string{"auth": enc}}})
	if err := os.WriteFile(config, doc, 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		auth *runtimeapi.AuthConfig
		file string
		is   func(error) bool
	}{
		{"none", nil, "", errdefs.IsUnauthorized},
		{"user and password", &runtimeapi.AuthConfig{Username: user, Password: password}, "", nil},
		{"wrong password", &runtimeapi.AuthConfig{Username: user, Password: "x"}, "", errdefs.IsUnauthorized},
		{"auth", &runtimeapi.AuthConfig{Auth: enc}, "", nil},
		{"bad auth", &runtimeapi.AuthConfig{Auth: "%%"}, "", errdefs.IsInvalidArgument},
		{"registry token", &runtimeapi.AuthConfig{RegistryToken: "token"}, "", nil},
		{"of this server", &runtimeapi.AuthConfig{Username: user, Password: password, ServerAddress: "http://" + h.host + "/v2/"}, "", nil},
		{"of another server", &runtimeapi.AuthConfig{Username: user, Password: password, ServerAddress: "example.com"}, "", errdefs.IsUnauthorized},
		{"docker config", nil, config, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := openStore(t, t.TempDir(), func(c *Config) { c.CredentialsFile = tt.file })
			_, err := s.Pull(t.Context(), h.host+"/team/app:v1", tt.auth, nil)
			if tt.is == nil && err != nil || tt.is != nil && !tt.is(err) {
				t.Fatalf("err = %v", err)
			}
			if err != nil && strings.Contains(err.Error(), password) {
				t.Errorf("error gives the password away: %v", err)
			}
		})
	}
}

// TestIdentityToken goes the OAuth way: the token is exchanged at the token
// server for a bearer.
func TestIdentityToken(t *testing.T) {
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost && r.FormValue("refresh_token") == "identity" {
			io.WriteString(w, `{"access_token":"bearer"}`)
			return
		}
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer tokens.Close()
	h := newHooked(t)
	push(t, h.host+"/team/app:v1", imageOf(t, layerOf(t, file("a", "a"))))
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == "Bearer bearer" {
			return false
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="reg",scope="repository:team/app:pull"`, tokens.URL))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	s := openStore(t, t.TempDir(), nil)
	if _, err := s.Pull(t.Context(), h.host+"/team/app:v1", &runtimeapi.AuthConfig{IdentityToken: "identity"}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pull(t.Context(), h.host+"/team/app:v1", &runtimeapi.AuthConfig{IdentityToken: "other"}, nil); !errdefs.IsUnauthorized(err) {
		t.Fatalf("wrong token: %v", err)
	}
}

func writeHosts(t testing.TB, certs, host, toml string) {
	t.Helper()
	dir := filepath.Join(certs, host)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(toml), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestMirrors(t *testing.T) {
	main, mirror := newHooked(t), newHooked(t)
	img := imageOf(t, layerOf(t, file("a", "a")))
	push(t, mirror.host+"/team/app:v1", img)
	certs := t.TempDir()
	open := func() *Store {
		return openStore(t, t.TempDir(), func(c *Config) { c.RegistryConfigPath = certs })
	}
	var mainAsked, leaked atomic.Int32
	main.set(func(w http.ResponseWriter, r *http.Request) bool { mainAsked.Add(1); return false })
	mirror.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") != "" {
			leaked.Add(1)
		}
		return false
	})

	t.Run("for a name that does not exist", func(t *testing.T) {
		writeHosts(t, certs, "registry.example.com", fmt.Sprintf("server = %q\n[host.%q]\n", "http://"+main.host, "http://"+mirror.host))
		got, err := open().Pull(t.Context(), "registry.example.com/team/app:v1", &runtimeapi.AuthConfig{Username: "u", Password: "p"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got.RepoTags[0] != "registry.example.com/team/app:v1" {
			t.Errorf("tags %v", got.RepoTags)
		}
		if leaked.Load() != 0 {
			t.Error("credentials went to the mirror")
		}
	})
	t.Run("falls back to the server", func(t *testing.T) {
		mainAsked.Store(0)
		push(t, main.host+"/team/new:v1", img)
		if _, err := open().Pull(t.Context(), "registry.example.com/team/new:v1", nil, nil); err != nil {
			t.Fatal(err)
		}
		if mainAsked.Load() == 0 {
			t.Error("server was not asked")
		}
	})
	t.Run("default for all", func(t *testing.T) {
		writeHosts(t, certs, "_default", fmt.Sprintf("[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", "http://"+mirror.host))
		push(t, mirror.host+"/library/nginx:latest", img)
		got, err := open().Pull(t.Context(), "nginx", nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got.RepoTags[0] != "docker.io/library/nginx:latest" {
			t.Errorf("tags %v", got.RepoTags)
		}
	})
	t.Run("capability resolve only", func(t *testing.T) {
		// The mirror may name the digest, the content comes from the server.
		only := imageOf(t, layerOf(t, file("only", "x")))
		push(t, mirror.host+"/team/only:v1", only)
		push(t, main.host+"/team/only:v1", only)
		writeHosts(t, certs, "resolve.example.com", fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"resolve\"]\n", "http://"+main.host, "http://"+mirror.host))
		mainAsked.Store(0)
		if _, err := open().Pull(t.Context(), "resolve.example.com/team/only:v1", nil, nil); err == nil && mainAsked.Load() == 0 {
			t.Error("content came from a host that may only resolve")
		}
	})
	for what, bad := range map[string]hook{
		"wrong blobs": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
				return false
			}
			w.Write(bytes.Repeat([]byte("x"), 1<<20))
			return true
		},
		"wrong manifests": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			w.Write(bytes.Repeat([]byte("x"), 1<<20))
			return true
		},
		"half a blob": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
				return false
			}
			w.Header().Set("Content-Length", "100")
			w.Write([]byte("x"))
			return true
		},
	} {
		t.Run("of two mirrors one serves "+what, func(t *testing.T) {
			liar := newHooked(t)
			two := imageOf(t, layerOf(t, file("one", noise(1000))), layerOf(t, file("two", noise(1000))))
			push(t, liar.host+"/team/two:v1", two)
			push(t, main.host+"/team/two:v1", two)
			liar.set(bad)
			mainAsked.Store(0)
			// The first mirror has nothing at all.
			writeHosts(t, certs, "liar.example.com", fmt.Sprintf("server = %q\n[host.%q]\n[host.%q]\n", "http://"+main.host, "http://"+mirror.host, "http://"+liar.host))
			got, err := open().Pull(t.Context(), "liar.example.com/team/two:v1", nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			if want, _ := two.ConfigName(); got.ID != want.String() {
				t.Errorf("image %s, want %s", got.ID, want)
			}
			if mainAsked.Load() == 0 {
				t.Error("the image came from a registry that does not have it")
			}
		})
	}
	t.Run("all serve wrong content", func(t *testing.T) {
		one := imageOf(t, layerOf(t, file("one", noise(1000))))
		push(t, mirror.host+"/team/wrong:v1", one)
		push(t, main.host+"/team/wrong:v1", one)
		var asked atomic.Int32
		wrong := func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
				return false
			}
			asked.Add(1)
			w.Write(bytes.Repeat([]byte("x"), 1<<20))
			return true
		}
		main.set(wrong)
		mirror.set(wrong)
		defer main.set(nil)
		defer mirror.set(nil)
		if _, err := open().Pull(t.Context(), "registry.example.com/team/wrong:v1", nil, nil); !errdefs.IsDataLoss(err) {
			t.Errorf("err = %v", err)
		}
		if n := asked.Load(); n != 2 {
			t.Errorf("asked %d times, want once each", n)
		}
	})
	t.Run("unreadable file", func(t *testing.T) {
		writeHosts(t, certs, "broken.example.com", "server = [oops")
		_, err := open().Pull(t.Context(), "broken.example.com/x:y", nil, nil)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "broken.example.com/hosts.toml") {
			t.Errorf("err = %v", err)
		}
	})
}

func TestHTTPSWithOwnCA(t *testing.T) {
	h := newHooked(t)
	push(t, h.host+"/team/app:v1", imageOf(t, layerOf(t, file("a", "a"))))
	front := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		req, _ := http.NewRequest(r.Method, "http://"+h.host+r.URL.Path, nil)
		req.Header = r.Header
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		for k, v := range resp.Header {
			w.Header()[k] = v
		}
		w.WriteHeader(resp.StatusCode)
		io.Copy(w, resp.Body)
	}))
	front.Config.ErrorLog = log.New(io.Discard, "", 0) // of the handshake that must fail
	front.StartTLS()
	defer front.Close()
	certs := t.TempDir()
	// httptest's certificate is for 127.0.0.1.
	writeHosts(t, certs, "secure.example.com", fmt.Sprintf("server = %q\n", front.URL))
	open := func() *Store {
		return openStore(t, t.TempDir(), func(c *Config) { c.RegistryConfigPath = certs })
	}
	if _, err := open().Pull(t.Context(), "secure.example.com/team/app:v1", nil, nil); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("unknown authority: %v", err)
	}
	ca := filepath.Join(certs, "secure.example.com", "ca.pem")
	if err := os.WriteFile(ca, pemOf(front.Certificate().Raw), 0o644); err != nil {
		t.Fatal(err)
	}
	writeHosts(t, certs, "secure.example.com", fmt.Sprintf("server = %q\nca = \"ca.pem\"\n", front.URL))
	if _, err := open().Pull(t.Context(), "secure.example.com/team/app:v1", nil, nil); err != nil {
		t.Error(err)
	}
}

func pemOf(der []byte) []byte {
	return []byte("-----BEGIN CERTIFICATE-----\n" + base64.StdEncoding.EncodeToString(der) + "\n-----END CERTIFICATE-----\n")
}

func TestPlatformsAndDigests(t *testing.T) {
	host := registryServer(t, nil)
	amd, arm := imageOf(t, layerOf(t, file("arch", "amd64"))), imageOf(t, layerOf(t, file("arch", "arm64")))
	idx := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: arm, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}},
		mutate.IndexAddendum{Add: amd, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}}},
	)
	ref, err := name.ParseReference(host + "/team/multi:v1")
	if err != nil {
		t.Fatal(err)
	}
	if err := gremote.WriteIndex(ref, idx); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, t.TempDir(), nil)
	img := mustPull(t, s, ref.String())
	if got := read(t, filepath.Join(mountOf(t, s, "c", img.ID), "arch")); got != "amd64" {
		t.Errorf("arch = %q", got)
	}
	top, _ := idx.Digest()
	one, _ := amd.Digest()
	if want := host + "/team/multi@" + top.String(); img.RepoDigests[0] != want {
		t.Errorf("digests %v, want %s", img.RepoDigests, want)
	}
	again := mustPull(t, s, host+"/team/multi@"+one.String())
	if again.ID != img.ID || len(again.RepoDigests) != 2 || len(again.RepoTags) != 1 {
		t.Errorf("by digest of the manifest: %+v", again)
	}
	only := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: arm, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}})
	ref, _ = name.ParseReference(host + "/team/foreign:v1")
	if err := gremote.WriteIndex(ref, only); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pull(t.Context(), ref.String(), nil, nil); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "s390x") {
		t.Errorf("foreign platform: %v", err)
	}
}

// raw is a layer with given bytes.
type rawLayer struct {
	compressed, plain []byte
	media             types.MediaType
}

func (l rawLayer) Digest() (v1.Hash, error) {
	return v1.NewHash(digest.FromBytes(l.compressed).String())
}
func (l rawLayer) DiffID() (v1.Hash, error) { return v1.NewHash(digest.FromBytes(l.plain).String()) }
func (l rawLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.compressed)), nil
}
func (l rawLayer) Uncompressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.plain)), nil
}
func (l rawLayer) Size() (int64, error)                { return int64(len(l.compressed)), nil }
func (l rawLayer) MediaType() (types.MediaType, error) { return l.media, nil }

func TestCompressions(t *testing.T) {
	host := registryServer(t, nil)
	plain := archiveOf(t, file("plain", "plain"))
	zplain := archiveOf(t, file("zstd", "zstd"))
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	push(t, host+"/x/y:z", imageOf(t,
		rawLayer{plain, plain, types.OCIUncompressedLayer},
		rawLayer{enc.EncodeAll(zplain, nil), zplain, types.OCILayerZStd},
		layerOf(t, file("gzip", "gzip")),
	))
	s := openStore(t, t.TempDir(), nil)
	root := mountOf(t, s, "c", mustPull(t, s, host+"/x/y:z").ID)
	for _, n := range []string{"plain", "zstd", "gzip"} {
		if got := read(t, filepath.Join(root, n)); got != n {
			t.Errorf("%s = %q", n, got)
		}
	}
}

func TestRefusedImages(t *testing.T) {
	host := registryServer(t, nil)
	var many []v1.Layer
	for i := range 130 {
		many = append(many, layerOf(t, file(fmt.Sprint(i), "")))
	}
	a, b := archiveOf(t, file("a", "a")), archiveOf(t, file("b", "b"))
	same := archiveOf(t, file("same", strings.Repeat("x", 260<<20)))
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	evil := layerOf(t, file("../evil", "x"))
	tests := []struct {
		name string
		img  v1.Image
		is   func(error) bool
		says string
	}{
		{"too many layers", imageOf(t, many...), errdefs.IsInvalidArgument, "130 layers"},
		{"wrong diff id", imageOf(t, rawLayer{a, b, types.OCIUncompressedLayer}), errdefs.IsDataLoss, "config says"},
		{"bomb", imageOf(t, liar{rawLayer{enc.EncodeAll(same, nil), nil, types.OCILayerZStd}, hashOf(same)}), errdefs.IsInvalidArgument, "times its size"},
		{"traversal", imageOf(t, evil), errdefs.IsInvalidArgument, layerDigest(t, evil).String()},
		{"no archive", imageOf(t, rawLayer{[]byte(strings.Repeat("garbage", 200)), []byte(strings.Repeat("garbage", 200)), types.OCIUncompressedLayer}), func(err error) bool { return err != nil }, "layer sha256:"},
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ref := fmt.Sprintf("%s/bad/image:%d", host, i)
			push(t, ref, tt.img)
			s := openStore(t, t.TempDir(), nil)
			before := files(t, s.cfg.Dir)
			_, err := s.Pull(t.Context(), ref, nil, nil)
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

// TestLocalTroubleIsNotTheRegistrys: the error of a node without space does
// not send the user to look at the registry.
func TestLocalTroubleIsNotTheRegistrys(t *testing.T) {
	host := registryServer(t, nil)
	push(t, host+"/x/y:1", imageOf(t, layerOf(t, file("big", noise(3<<20)))))
	small := filepath.Join(t.TempDir(), "disk")
	needRoot(t)
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=2m"); err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
	s := openStore(t, filepath.Join(small, "store"), nil)
	t.Cleanup(func() { s.Close() })
	_, err := s.Pull(t.Context(), host+"/x/y:1", nil, nil)
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "free space") || strings.Contains(err.Error(), "reachable") {
		t.Errorf("err = %v", err)
	}
}

// TestDownloadsAreBoundedAndReported: no more blobs at once than configured,
// and the progress adds up.
func TestDownloadsAreBoundedAndReported(t *testing.T) {
	h := newHooked(t)
	var layers []v1.Layer
	var total int64
	for i := range 6 {
		l := layerOf(t, file(fmt.Sprint(i), noise(200<<10)))
		n, _ := l.Size()
		total += n
		layers = append(layers, l)
	}
	push(t, h.host+"/x/y:1", imageOf(t, layers...))
	s := openStore(t, t.TempDir(), func(c *Config) { c.MaxConcurrentDownloads = 2 })
	var now, most atomic.Int32
	gate := make(chan struct{})
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		for _, l := range layers {
			if isBlob(r, layerDigest(t, l)) {
				n := now.Add(1)
				defer now.Add(-1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				select {
				case gate <- struct{}{}:
				case <-r.Context().Done():
				}
				rc, _ := l.Compressed()
				defer rc.Close()
				io.Copy(w, rc)
				return true
			}
		}
		return false
	})
	go func() {
		for left := len(layers); left > 0; left-- {
			if !eventually(func() bool { return int(now.Load()) >= min(2, left) }) {
				return // the pull stalls and reports it
			}
			<-gate
		}
	}()
	var seen []Progress
	if _, err := s.Pull(t.Context(), h.host+"/x/y:1", nil, func(p Progress) { seen = append(seen, p) }); err != nil {
		t.Fatal(err)
	}
	if most.Load() != 2 {
		t.Errorf("%d downloads at once, want 2", most.Load())
	}
	stages := map[string]bool{}
	for i, p := range seen {
		stages[p.Stage] = true
		if i > 0 && (p.Bytes < seen[i-1].Bytes || p.LayersDone < seen[i-1].LayersDone) {
			t.Errorf("progress goes back: %+v after %+v", p, seen[i-1])
		}
	}
	last := seen[len(seen)-1]
	if want := (Progress{Ref: h.host + "/x/y:1", Stage: stageDone, Layers: 6, LayersDone: 6, Bytes: total, Total: total}); last != want {
		t.Errorf("last progress %+v, want %+v", last, want)
	}
	for _, st := range []string{stageResolving, stageDownloading, stageUnpacking, stageDone} {
		if !stages[st] {
			t.Errorf("stage %s was not reported", st)
		}
	}
}

// TestCollectorSparesRunningPull: what a pull has fetched and unpacked so far
// is not taken from under it.
func TestCollectorSparesRunningPull(t *testing.T) {
	h := newHooked(t)
	a, b := layerOf(t, file("a", "a")), layerOf(t, file("b", "b"))
	push(t, h.host+"/x/y:1", imageOf(t, a, b))
	s := openStore(t, t.TempDir(), nil)
	gate := make(chan struct{})
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		if isBlob(r, layerDigest(t, b)) {
			<-gate
		}
		return false
	})
	done := make(chan error, 1)
	go func() {
		_, err := s.Pull(t.Context(), h.host+"/x/y:1", nil, nil)
		done <- err
	}()
	waitFor(t, func() bool {
		p := s.Pulling()
		return len(p) == 1 && p[0].LayersDone == 1
	})
	for range 3 {
		if err := s.GarbageCollect(t.Context()); err != nil {
			t.Error(err)
		}
	}
	close(gate)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n := h.gets(layerDigest(t, a)); n != 1 {
		t.Errorf("layer was fetched %d times", n)
	}
	root := mountOf(t, s, "c", h.host+"/x/y:1")
	if read(t, root+"/a")+read(t, root+"/b") != "ab" {
		t.Error("image is not whole")
	}
}

// TestInheritedDirectories: a layer that does not list the directories of its
// files shows those of the layers below as they were.
func TestInheritedDirectories(t *testing.T) {
	needRoot(t)
	special := dir("srv/")
	special.Mode, special.Uid, special.Gid = 0o1770, 5, 6
	below := dir("srv/data/")
	below.Mode, below.Uid = 0o700, 9
	s := openStore(t, t.TempDir(), nil)
	root := mountOf(t, s, "c", loadOne(t, s, imageOf(t,
		layerOf(t, special, below, file("srv/data/old", "")),
		layerOf(t, file("srv/x", "")),
		layerOf(t, file("srv/data/new", ""), file("fresh/dir/file", "")),
	)))
	for name, want := range map[string][3]uint32{"srv": {0o1770, 5, 6}, "srv/data": {0o700, 9, 0}, "fresh/dir": {0o755, 0, 0}} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, name), &st); err != nil {
			t.Fatal(err)
		}
		if got := [3]uint32{st.Mode & 0o7777, st.Uid, st.Gid}; got != want {
			t.Errorf("%s is %o, want %o", name, got, want)
		}
	}
	for _, f := range []string{"srv/data/old", "srv/data/new", "srv/x"} {
		if _, err := os.Stat(filepath.Join(root, f)); err != nil {
			t.Error(err)
		}
	}
}
