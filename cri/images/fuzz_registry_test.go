package images

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// wire is a registry without a network: it answers requests by a function.
// Whatever a registry sends us to, no packet leaves.
type wire func(*http.Request) *http.Response

func (f wire) RoundTrip(r *http.Request) (*http.Response, error) {
	resp := f(r)
	resp.Request, resp.ProtoMajor, resp.Proto = r, 1, "HTTP/1.1"
	if resp.Header == nil {
		resp.Header = http.Header{}
	}
	if resp.Body == nil {
		resp.Body = http.NoBody
	}
	return resp, nil
}

func answer(status int, body []byte, header ...string) *http.Response {
	resp := &http.Response{StatusCode: status, Body: io.NopCloser(bytes.NewReader(body)), ContentLength: int64(len(body)), Header: http.Header{}}
	for i := 0; i+1 < len(header); i += 2 {
		resp.Header[http.CanonicalHeaderKey(header[i])] = []string{header[i+1]}
	}
	return resp
}

// wired is the registry of a reference, as a pull has it, at the other end of w.
func wired(t testing.TB, s *Store, ref string, auth *runtimeapi.AuthConfig, w wire) *registry {
	t.Helper()
	target, err := parseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	reg, err := s.registry(t.Context(), target, auth)
	if err != nil {
		t.Fatal(err)
	}
	h := docker.RegistryHost{
		Client: &http.Client{Transport: &watched{next: w, r: reg}}, Scheme: "https", Host: target.host, Path: "/v2",
		Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve,
	}
	reg.known[target.host] = []docker.RegistryHost{reg.bind(h)}
	return reg
}

// fuzzStore is in memory where there is such a file system: the content library
// syncs every blob.
func fuzzStore(f *testing.F) *Store {
	f.Helper()
	needRoot(f)
	top, err := os.MkdirTemp(memory(f), "podd-fuzz-")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { os.RemoveAll(top) })
	s := openStore(f, filepath.Join(top, "store"), func(c *Config) {
		c.NoSync = true
		c.StallTimeout = 5 * time.Second
		c.Limits = Limits{UnpackedSize: 1 << 20, StreamSize: 4 << 20, Entries: 1000, ManifestSize: 64 << 10, ConfigSize: 64 << 10, ArchiveSize: 4 << 20}
	})
	// What runs in the background would be taken for news of an input. collect
	// does it where it can be seen.
	s.cancel()
	s.wg.Wait()
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// memory is a directory of a file system in memory, where there is one.
func memory(t testing.TB) string {
	const shm = "/dev/shm"
	if unix.Access(shm, unix.W_OK) == nil {
		return shm
	}
	return t.TempDir()
}

// collect leaves the store as it was.
func collect(t *testing.T, s *Store) {
	t.Helper()
	if err := s.GarbageCollect(t.Context()); err != nil {
		t.Error(err)
	}
	blobs, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "content/*/sha256/*"))
	layers, _ := os.ReadDir(s.layersDir)
	if len(blobs) != 0 || len(layers) != 2 || len(s.leases)+len(s.imports)+len(s.fetches)+len(s.unpackings) != 0 {
		t.Errorf("left: %v, %v", blobs, layers)
	}
}

// told checks what is told of input from strangers: a line of bounded length
// without control characters.
func told(t *testing.T, err error) {
	t.Helper()
	if err == nil {
		return
	}
	text := err.Error()
	if len(text) > 64<<10 {
		t.Errorf("an error of %d bytes: %s", len(text), clip(text))
	}
	var not *LoadError // of several lines, one for each image
	if errors.As(err, &not) {
		for _, u := range not.Images {
			told(t, u.Err)
		}
	} else if strings.ContainsFunc(text, unicode.IsControl) {
		t.Errorf("control characters in %q", text)
	}
}

// FuzzRegistryAnswers: whatever a registry says an image is, the pull ends, and
// an image that it takes has what its manifest says.
func FuzzRegistryAnswers(f *testing.F) {
	s := fuzzStore(f)
	layer := archiveOf(f, dir("./"), file("a", "a"))
	config := fmt.Sprintf(`{"created":"","os":"linux","config":{"User":"1:2","Env":["A=b"]},"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, sum(layer))
	manifest := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:%x","size":%d},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:%x","size":%d}]}`, sum([]byte(config)), len(config), sum(layer), len(layer))
	index := fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:%x","size":%d,"platform":{"os":"linux","architecture":"amd64"}}]}`, sum([]byte(manifest)), len(manifest))
	f.Add([]byte(manifest), []byte(config), layer, "application/vnd.oci.image.manifest.v1+json", "", 200)
	f.Add([]byte(index), []byte(manifest), []byte(config), "application/vnd.oci.image.index.v1+json", "", 200)
	f.Add([]byte(manifest), []byte(config), layer, "text/plain", "gzip", 200)
	f.Add([]byte("<html>"), []byte{}, []byte{}, "text/html", "", 200)
	f.Add([]byte(`{"errors":[{"code":"DENIED","message":"no\u0000"}]}`), []byte{}, []byte{}, "", "", 403)
	f.Add([]byte(`{"schemaVersion":1,"fsLayers":[]}`), []byte{}, []byte{}, "application/vnd.docker.distribution.manifest.v1+prettyjws", "", 200)
	f.Fuzz(func(t *testing.T, first, second, third []byte, media, encoding string, status int) {
		blobs := map[string][]byte{}
		for _, b := range [][]byte{first, second, third} {
			blobs[digest.FromBytes(b).String()] = b
		}
		reg := wired(t, s, "registry.example/x/y:1", nil, func(r *http.Request) *http.Response {
			name := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
			b, ok := blobs[name]
			switch {
			case name == "1":
				return answer(100+(status&0x7fff)%500, first, "Content-Type", media, "Content-Encoding", encoding, "Docker-Content-Digest", digest.FromBytes(first).String())
			case !ok:
				return answer(404, nil)
			}
			return answer(200, b, "Content-Type", media, "Content-Encoding", encoding)
		})
		defer collect(t, s)
		r, err := s.pullFrom(t.Context(), reg, nil, &pull{watchers: map[int]func(Progress){}})
		told(t, err)
		if err != nil {
			return
		}
		if r.ID != digest.FromBytes(blobs[r.ID.String()]) || len(r.Layers) != len(r.config.RootFS.DiffIDs) {
			t.Errorf("record %+v", r)
		}
		if err := s.Remove(t.Context(), r.ID.String()); err != nil {
			t.Error(err)
		}
	})
}

// FuzzChallenge: whatever a registry asks for, and whatever its token server
// answers, the password goes to the registry itself or to a token server over
// TLS, and an answer is bounded.
func FuzzChallenge(f *testing.F) {
	s := fuzzStore(f)
	f.Add(`Bearer realm="https://tokens.example/token",service="x",scope="repository:x/y:pull"`, []byte(`{"token":"t","expires_in":300}`), 200, "")
	f.Add(`Bearer realm="http://tokens.example/token"`, []byte(`{"access_token":"t"}`), 200, "")
	f.Add(`Basic realm="x"`, []byte("<html>"), 200, "")
	f.Add(`Bearer realm="https://tokens.example/token",error="insufficient_scope"`, []byte{}, 307, "https://other.example/")
	f.Add(`Bearer realm="https://registry.example/v2/x/manifests/blobs/"`, bytes.Repeat([]byte(" "), 1<<10), 200, "http://registry.example:81/")
	f.Add(`bEARER realm=https://x,a="\"", b`, []byte(`{"token":""}`), 401, "//x")
	f.Fuzz(func(t *testing.T, challenge string, token []byte, status int, location string) {
		const password = "s3cret-of-the-test"
		var reg *registry
		requests := 0
		reg = wired(t, s, "registry.example/x/y:1", &runtimeapi.AuthConfig{Username: "robot", Password: password}, func(r *http.Request) *http.Response {
			if requests++; requests > 200 {
				t.Fatalf("%d requests", requests)
			}
			secret := false
			if _, p, ok := r.BasicAuth(); ok && p == password {
				secret = true
			}
			if r.Body != nil {
				b, _ := io.ReadAll(r.Body)
				secret = secret || strings.Contains(string(b), password)
			}
			at := placeOf(r.URL)
			if secret && at.scheme != "https" && !docker.IsLocalhost(r.URL.Host) {
				t.Errorf("the password went to %s", r.URL)
			}
			if strings.HasPrefix(r.URL.Path, "/v2/x/y/manifests/") && r.URL.Host == "registry.example" {
				if location != "" && r.Header.Get("Authorization") != "" {
					return answer(307, nil, "Location", location)
				}
				return answer(401, nil, "WWW-Authenticate", challenge)
			}
			if secret && r.Method != http.MethodPost && !strings.Contains(challenge, r.URL.Host) && r.URL.Host != "registry.example" {
				t.Errorf("the password followed to %s", r.URL)
			}
			return answer(100+(status&0x7fff)%500, token, "Location", location, "WWW-Authenticate", challenge)
		})
		_, _, err := reg.resolve(t.Context())
		if err == nil {
			return
		}
		told(t, forPeople(reg.explain(t.Context(), "resolve", &remoteError{err})))
		if strings.Contains(reg.explain(t.Context(), "resolve", &remoteError{err}).Error(), password) {
			t.Errorf("the password is told: %v", err)
		}
	})
}

// FuzzLoad: whatever the files of an archive, a load ends, what it takes can be
// had, and nothing stays of what it does not take. The archive has both formats'
// documents, and each of the other files under a name and as a blob.
func FuzzLoad(f *testing.F) {
	s := fuzzStore(f)
	layer := archiveOf(f, file("a", "a"))[:1536]
	config := fmt.Sprintf(`{"os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, sum(layer))
	manifest := fmt.Sprintf(`{"config":{"digest":"sha256:%x","size":%d},"layers":[{"digest":"sha256:%x","size":%d}]}`, sum([]byte(config)), len(config), sum(layer), len(layer))
	index := fmt.Sprintf(`{"manifests":[{"digest":"sha256:%x","size":%d,"annotations":{"io.containerd.image.name":"a.io/a:1"}},{"digest":"sha256:%x","size":1,"platform":{"os":"linux","architecture":"s390x"}}]}`, sum([]byte(manifest)), len(manifest), sum([]byte("x")))
	f.Add([]byte(index), []byte(nil), []byte(config), []byte(manifest), layer, "x", "y", false)
	f.Add([]byte(nil), []byte(`[{"Config":"c.json","RepoTags":["a.io/a:1","b"],"Layers":["a/layer.tar"]}]`), []byte(config), []byte(nil), layer, "c.json", "a/layer.tar", true)
	f.Add([]byte(`{"manifests":[{"annotations":{"vnd.docker.reference.type":"attestation-manifest"}}]}`), []byte(`[{}]`), []byte("{}"), []byte("<"), []byte("\x1f\x8b"), "../x", "blobs/sha256/x", false)
	f.Fuzz(func(t *testing.T, index, docker, one, two, three []byte, name1, name3 string, compressed bool) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		put := func(name string, body []byte) {
			if body == nil || w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: int64(len(body)), Mode: 0o644}) != nil {
				return
			}
			w.Write(body)
		}
		if len(index) > 0 {
			put("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
			put("index.json", index)
		}
		for _, body := range [][]byte{one, two, three} {
			put("blobs/sha256/"+digest.FromBytes(body).Encoded(), body)
		}
		put(name1, one)
		put(name3, three)
		if len(docker) > 0 {
			put("manifest.json", docker)
		}
		w.Close()
		raw := b.Bytes()
		if compressed {
			raw = gzippedTar(t, raw)
		}
		defer collect(t, s)
		list, err := s.Load(t.Context(), bytes.NewReader(raw), LoadOptions{})
		told(t, err)
		for _, i := range distinctImages(list) {
			got, err := s.Get(t.Context(), i.ID)
			if err != nil {
				t.Fatalf("loaded and not there: %v", err)
			}
			if _, err := json.Marshal(got.Config); err != nil {
				t.Error(err)
			}
			if err := s.Remove(t.Context(), i.ID); err != nil {
				t.Error(err)
			}
		}
		if left, _ := os.ReadDir(s.cfg.Dir); len(left) != 8 {
			t.Errorf("the store's directory has %v", left)
		}
		if up, _ := filepath.Glob(filepath.Join(filepath.Dir(s.cfg.Dir), "*")); len(up) != 1 {
			t.Errorf("beside the store: %v", up)
		}
	})
}

func distinctImages(list []*Image) map[string]*Image {
	m := map[string]*Image{}
	for _, i := range list {
		m[i.ID] = i
	}
	return m
}
