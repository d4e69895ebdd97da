package auth

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
)

// cluster answers reviews from tables and counts the questions.
type cluster struct {
	mu      sync.Mutex
	tokens  map[string]string // token to user
	rights  map[string]bool   // "user verb subresource"
	err     error
	asked   []string
	waiting chan struct{} // holds answers back; nil: not
}

func (c *cluster) TokenReview(_ context.Context, r *authenticationv1.TokenReview) (*authenticationv1.TokenReview, error) {
	if c.waiting != nil {
		<-c.waiting
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = append(c.asked, "token "+r.Spec.Token)
	if user, ok := c.tokens[r.Spec.Token]; ok && c.err == nil {
		r.Status = authenticationv1.TokenReviewStatus{Authenticated: true, User: User{Username: user, Groups: []string{"g"}}}
	}
	return r, c.err
}

func (c *cluster) SubjectAccessReview(_ context.Context, r *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReview, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := r.Spec.ResourceAttributes
	if a.Resource != "nodes" || a.Name != "node1" || a.Version != "v1" || a.Group != "" {
		return nil, fmt.Errorf("asked about %+v", a)
	}
	key := r.Spec.User + " " + a.Verb + " " + a.Subresource
	c.asked = append(c.asked, key)
	r.Status.Allowed = c.rights[key]
	return r, c.err
}

func (c *cluster) questions() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.asked
	c.asked = nil
	return out
}

func TestSubresources(t *testing.T) {
	for path, want := range map[string][]string{
		"/pods": {"pods", "proxy"}, "/pods/": {"pods", "proxy"}, "/runningpods/": {"pods", "proxy"}, "/podsx": {"proxy"},
		"/healthz": {"healthz", "proxy"}, "/healthz/syncloop": {"healthz", "proxy"}, "/configz": {"configz", "proxy"},
		"/flagz": {"configz"}, "/statusz": {"statusz"}, "/stats/summary": {"stats"}, "/metrics": {"metrics"}, "/metrics/cadvisor": {"metrics"},
		"/logs/": {"log"}, "/logs/syslog": {"log"}, "/checkpoint/a/b/c": {"checkpoint"}, "/exec/a/b/c": {"proxy"}, "/run/a/b/c": {"proxy"},
		"/debug/pprof/": {"proxy"}, "/containerLogs/a/b/c": {"proxy"}, "/": {"proxy"}, "": {"proxy"},
		// What looks like a lesser right must not be one.
		"/metrics/../exec/a/b/c": {"proxy"}, "/stats//../run/a/b/c": {"proxy"}, "//metrics": {"proxy"},
	} {
		if got := Subresources(path); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", path, got, want)
		}
	}
}

func TestVerbs(t *testing.T) {
	for request, want := range map[string]string{
		"GET /pods": "get", "POST /run/a/b/c": "create", "PUT /debug/flags/v": "update", "DELETE /pods": "delete", "PATCH /pods": "patch",
		"HEAD /pods": "", "OPTIONS /pods": "",
		"GET /exec/a/b/c": "create", "GET /attach/a/b/c": "create", "GET /portForward/a/b": "create", "GET /containerLogs/a/b/c": "get",
	} {
		var method, path string
		fmt.Sscanf(request, "%s %s", &method, &path)
		if got := verb(httptest.NewRequest(method, path, nil)); got != want {
			t.Errorf("%s: %q, want %q", request, got, want)
		}
	}
}

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

func (a *authority) sign(t *testing.T, user string, until time.Time, usage x509.ExtKeyUsage, groups ...string) *x509.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: user, Organization: groups},
		NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: until, ExtKeyUsage: []x509.ExtKeyUsage{usage}}, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func with(certs ...*x509.Certificate) *http.Request {
	r := httptest.NewRequest("GET", "/pods", nil)
	r.TLS = &tls.ConnectionState{PeerCertificates: certs}
	return r
}

func TestClientCertificates(t *testing.T) {
	ours, foreign := newAuthority(t), newAuthority(t)
	file := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(file, ours.pem, 0o600); err != nil {
		t.Fatal(err)
	}
	g, err := New(Config{ClientCAFile: file, Mode: AlwaysAllow, Anonymous: true})
	if err != nil {
		t.Fatal(err)
	}
	later := time.Now().Add(time.Hour)
	good := ours.sign(t, "jane", later, x509.ExtKeyUsageClientAuth, "dev", "ops")
	u, ok, err := g.Authenticate(with(good))
	if !ok || u.Username != "jane" || !slices.Equal(u.Groups, []string{"dev", "ops", groupAuthenticated}) {
		t.Fatalf("%+v, %v, %v", u, ok, err)
	}
	for what, cert := range map[string]*x509.Certificate{
		"foreign": foreign.sign(t, "jane", later, x509.ExtKeyUsageClientAuth), "expired": ours.sign(t, "jane", time.Now().Add(-time.Minute), x509.ExtKeyUsageClientAuth),
		"a server's": ours.sign(t, "jane", later, x509.ExtKeyUsageServerAuth), "nameless": ours.sign(t, "", later, x509.ExtKeyUsageClientAuth),
	} {
		if u, ok, _ := g.Authenticate(with(cert)); ok { // not as anonymous either
			t.Errorf("%s certificate is let in as %+v", what, u)
		}
	}
	// The CA is replaced: at once it is the other that counts. A broken file
	// changes nothing.
	for _, content := range [][]byte{foreign.pem, []byte("nonsense")} {
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
		g.ca.mu.Lock()
		g.ca.looked = time.Time{}
		g.ca.mu.Unlock()
		if _, ok, _ := g.Authenticate(with(good)); ok {
			t.Error("the old CA still counts")
		}
		if _, ok, err := g.Authenticate(with(foreign.sign(t, "joe", later, x509.ExtKeyUsageClientAuth))); !ok {
			t.Errorf("the new CA does not count: %v", err)
		}
	}
	if _, err := New(Config{ClientCAFile: file, Mode: AlwaysAllow}); err == nil {
		t.Error("a file without a certificate is accepted at the start")
	}
}

func token(s string) *http.Request {
	r := httptest.NewRequest("GET", "/pods", nil)
	r.Header.Set("Authorization", "Bearer "+s)
	return r
}

func TestTokens(t *testing.T) {
	c := &cluster{tokens: map[string]string{"good": "jane"}}
	g, err := New(Config{Tokens: true, TokenTTL: time.Minute, Mode: AlwaysAllow, Reviews: c, Anonymous: true})
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	g.tokens.cache.now = func() time.Time { return now }
	for range 3 {
		if u, ok, err := g.Authenticate(token("good")); !ok || u.Username != "jane" || !slices.Contains(u.Groups, groupAuthenticated) {
			t.Fatalf("%+v %v %v", u, ok, err)
		}
		if u, ok, _ := g.Authenticate(token("bad")); ok {
			t.Fatalf("let in as %+v", u)
		}
	}
	if q := c.questions(); !slices.Equal(q, []string{"token good", "token bad"}) {
		t.Errorf("asked %v", q)
	}
	now = now.Add(time.Minute)
	g.Authenticate(token("good"))
	if q := c.questions(); len(q) != 1 {
		t.Errorf("after its time a verdict is not asked for again: %v", q)
	}
	// Nothing is known while the cluster does not answer, and nothing kept.
	c.err = errors.New("down")
	now = now.Add(time.Minute)
	if _, ok, err := g.Authenticate(token("good")); ok || err == nil {
		t.Errorf("%v, %v", ok, err)
	}
	c.err = nil
	if _, ok, _ := g.Authenticate(token("good")); !ok {
		t.Error("an error was kept")
	}
	// Basic authentication is not anonymity.
	r := httptest.NewRequest("GET", "/", nil)
	r.SetBasicAuth("jane", "secret")
	if _, ok, _ := g.Authenticate(r); ok {
		t.Error("basic authentication is let in")
	}
	if u, ok, _ := g.Authenticate(httptest.NewRequest("GET", "/", nil)); !ok || u.Username != anonymousUser {
		t.Errorf("%+v %v", u, ok)
	}
	// A browser's WebSocket, whose token must not be echoed.
	r = httptest.NewRequest("GET", "/", nil)
	r.Header.Set("Upgrade", "websocket")
	r.Header.Set("Sec-WebSocket-Protocol", "base64url.bearer.authorization.k8s.io."+base64.RawURLEncoding.EncodeToString([]byte("good"))+", v5.channel.k8s.io")
	if u, ok, _ := g.Authenticate(r); !ok || u.Username != "jane" || r.Header.Get("Sec-WebSocket-Protocol") != "v5.channel.k8s.io" {
		t.Errorf("%+v %v %q", u, ok, r.Header.Get("Sec-WebSocket-Protocol"))
	}
}

// Many requests with one new token are one question.
func TestOneQuestionForMany(t *testing.T) {
	c := &cluster{tokens: map[string]string{"good": "jane"}, waiting: make(chan struct{})}
	g, err := New(Config{Tokens: true, TokenTTL: time.Minute, Mode: AlwaysAllow, Reviews: c})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if _, ok, err := g.Authenticate(token("good")); !ok {
				t.Error(err)
			}
		})
	}
	close(c.waiting)
	wg.Wait()
	if q := c.questions(); len(q) != 1 {
		t.Errorf("%d questions", len(q))
	}
}

func TestAuthorization(t *testing.T) {
	c := &cluster{rights: map[string]bool{"jane get proxy": true, "joe get pods": true}}
	g, err := New(Config{NodeName: "node1", Mode: Webhook, AllowedTTL: time.Minute, DeniedTTL: time.Second, Reviews: c})
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	g.access.cache.now = func() time.Time { return now }
	ask := func(user, verb, path string) bool {
		t.Helper()
		ok, err := g.Authorize(t.Context(), &User{Username: user}, verb, path)
		if err != nil {
			t.Fatal(err)
		}
		return ok
	}
	if !ask("jane", "get", "/pods") || !slices.Equal(c.questions(), []string{"jane get pods", "jane get proxy"}) {
		t.Error("the older right does not stand in for the finer one")
	}
	if !ask("joe", "get", "/pods") || ask("joe", "get", "/exec/a/b/c") || ask("joe", "create", "/pods") {
		t.Error("joe may not do what he may, or more")
	}
	c.questions()
	now = now.Add(2 * time.Second) // refusals are forgotten, permissions are not
	ask("joe", "get", "/pods")
	ask("joe", "get", "/exec/a/b/c")
	if q := c.questions(); !slices.Equal(q, []string{"joe get proxy"}) {
		t.Errorf("asked %v", q)
	}
	c.err = errors.New("down")
	if ok, err := g.Authorize(t.Context(), &User{Username: "new"}, "get", "/pods"); ok || err == nil {
		t.Errorf("%v %v", ok, err)
	}
	// Without a cluster the mode Webhook allows nothing.
	g, err = New(Config{Mode: Webhook})
	if err != nil {
		t.Fatal(err)
	}
	if ok, _ := g.Authorize(t.Context(), &User{Username: "jane", Groups: []string{"system:masters"}}, "get", "/pods"); ok {
		t.Error("allowed by nobody")
	}
	if _, err := New(Config{Mode: "RBAC"}); err == nil {
		t.Error("an unknown mode is accepted")
	}
}

func TestCacheIsBounded(t *testing.T) {
	c := newCache[bool]()
	for i := range 3 * maxVerdicts {
		c.keep(fmt.Sprint(i), true, time.Hour)
		c.keep(fmt.Sprint(i), true, time.Hour)
	}
	if len(c.kept) > maxVerdicts || len(c.order) != len(c.kept) {
		t.Errorf("%d kept, %d in order", len(c.kept), len(c.order))
	}
	if _, ok := c.find(fmt.Sprint(3*maxVerdicts - 1)); !ok {
		t.Error("the newest is not there")
	}
}

func TestHandler(t *testing.T) {
	c := &cluster{tokens: map[string]string{"good": "jane"}, rights: map[string]bool{"jane get metrics": true}}
	g, err := New(Config{NodeName: "node1", Mode: Webhook, Tokens: true, Reviews: c, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	reached := ""
	h := g.Handler(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { reached += From(r.Context()).Username }))
	for _, test := range []struct {
		token, path string
		code        int
	}{{"", "/metrics", 401}, {"bad", "/metrics", 401}, {"good", "/metrics", 200}, {"good", "/pods", 403}} {
		r := httptest.NewRequest("GET", test.path, nil)
		if test.token != "" {
			r.Header.Set("Authorization", "bearer "+test.token)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != test.code {
			t.Errorf("%+v: %d %s", test, w.Code, w.Body)
		}
	}
	if reached != "jane" {
		t.Errorf("reached by %q", reached)
	}
	c.err = errors.New("down")
	w := httptest.NewRecorder()
	r := httptest.NewRequest("GET", "/stats/summary", nil)
	r.Header.Set("Authorization", "Bearer good")
	h.ServeHTTP(w, r)
	if w.Code == http.StatusOK || reached != "jane" {
		t.Errorf("%d without an answer of the cluster", w.Code)
	}
}
