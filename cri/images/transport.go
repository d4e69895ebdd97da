package images

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"

	cimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
)

const (
	// maxAnswer bounds what is read of answers that are no content: tokens,
	// challenges. Tokens are a few kilobytes.
	maxAnswer = 1 << 20
	// maxHeader bounds the header of an answer; Go's own bound is 10 MiB.
	maxHeader = 256 << 10
	// maxRedirects is Go's own bound.
	maxRedirects = 10
	// maxOrigins bounds the places that one registry may send us on to and
	// that ask for a login of their own.
	maxOrigins = 8
)

// errWebPage is a page for people where a program asked.
var errWebPage = fmt.Errorf("the answer is a web page: this is no registry, or a proxy or a login page is on the way: %w", errdefs.ErrFailedPrecondition)

// errNotSent keeps credentials from where they are not for.
var errNotSent = fmt.Errorf("credentials are not sent there: %w", errdefs.ErrPermissionDenied)

// place is where credentials are for: scheme, host and port.
type place struct{ scheme, host string }

func placeOf(u *url.URL) place {
	host, port := strings.ToLower(u.Hostname()), u.Port()
	scheme := strings.ToLower(u.Scheme)
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[scheme]
	}
	return place{scheme, host + ":" + port}
}

// is tells whether u is the same place. On this machine itself the scheme does
// not matter: such registries are tried by HTTPS, then by HTTP.
func (p place) is(u *url.URL) bool {
	q := placeOf(u)
	return p == q || p.host == q.host && docker.IsLocalhost(u.Host)
}

// private tells whether nobody on the way can read what is sent there.
func (p place) private() bool { return p.scheme == "https" || docker.IsLocalhost(p.host) }

// account is the log-in at one host of a registry and at the places to which
// it redirects. Credentials of the host go to that host, by that scheme and
// port, and to the token server that it names.
type account struct {
	r      *registry
	host   docker.RegistryHost
	home   place
	client *http.Client // for token servers

	mu sync.Mutex
	by map[place]docker.Authorizer
}

// bind gives the host an account, and redirects that do not carry its
// credentials away.
func (r *registry) bind(h docker.RegistryHost) docker.RegistryHost {
	a := &account{r: r, host: h, by: map[place]docker.Authorizer{}}
	a.home = placeOf(&url.URL{Scheme: h.Scheme, Host: h.Host})
	client, tokens := *h.Client, *h.Client
	client.CheckRedirect = a.redirected
	tokens.CheckRedirect = a.tokenRedirected
	tokens.Transport = &tokenServer{next: h.Client.Transport, from: a.home}
	a.client = &tokens
	h.Client, h.Authorizer = &client, a
	return h
}

// Authorize implements docker.Authorizer.
func (a *account) Authorize(ctx context.Context, req *http.Request) error {
	at := placeOf(req.URL)
	if a.home.is(req.URL) {
		at = a.home
		if tok := a.r.creds.token; tok != "" && a.r.creds.mine(a.host.Host) {
			req.Header.Set("Authorization", "Bearer "+tok)
			return nil
		}
	}
	a.mu.Lock()
	auth := a.by[at]
	a.mu.Unlock()
	if auth == nil {
		return nil
	}
	return auth.Authorize(ctx, req)
}

// AddResponses implements docker.Authorizer.
func (a *account) AddResponses(ctx context.Context, responses []*http.Response) error {
	u := responses[len(responses)-1].Request.URL
	at := placeOf(u)
	if a.home.is(u) {
		at = a.home
	}
	a.mu.Lock()
	auth := a.by[at]
	if auth == nil && len(a.by) < maxOrigins {
		opts := []docker.AuthorizerOpt{docker.WithAuthClient(a.client), docker.WithAuthCreds(a.credentials(at)), docker.WithAuthHeader(userAgent())}
		if at == a.home && len(a.host.Header) > 0 {
			opts = append(opts, docker.WithAuthHeader(a.host.Header))
		}
		auth = docker.NewDockerAuthorizer(opts...)
		a.by[at] = auth
	}
	a.mu.Unlock()
	if auth == nil {
		return fmt.Errorf("%s: too many places ask for a login: %w", u.Host, errdefs.ErrNotImplemented)
	}
	return auth.AddResponses(ctx, responses)
}

// challenged tells whether the host has asked for a log-in.
func (a *account) challenged() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.by[a.home] != nil
}

// credentials for one place. Elsewhere than at the host itself only those of
// the credentials file count, and they are not sent where others can read them.
func (a *account) credentials(at place) func(string) (string, string, error) {
	return func(host string) (string, string, error) {
		if at == a.home {
			return a.r.creds.lookup(a.host.Host)
		}
		if !at.private() {
			return "", "", nil
		}
		return a.r.creds.fromFile(host)
	}
}

// redirected prepares the request that follows a redirect: what was for the
// host alone stays behind when it leads elsewhere. net/http would send it to
// every port of the host.
func (a *account) redirected(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return fmt.Errorf("stopped after %d redirects", maxRedirects)
	}
	req.Header.Del("Authorization")
	if !a.home.is(req.URL) {
		onlyHarmless(req.Header)
	} else if said := a.host.Header.Get("Authorization"); said != "" {
		req.Header.Set("Authorization", said)
	}
	return a.Authorize(req.Context(), req)
}

// tokenRedirected is the same for requests to token servers, whose body may be
// a password.
func (a *account) tokenRedirected(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return fmt.Errorf("stopped after %d redirects", maxRedirects)
	}
	if from := placeOf(via[0].URL); from == placeOf(req.URL) {
		return nil
	}
	if req.Method == http.MethodPost {
		return fmt.Errorf("token server %s redirects to %s: %w", via[0].URL.Host, req.URL.Host, errNotSent)
	}
	onlyHarmless(req.Header)
	return nil
}

// onlyHarmless drops all headers that could be secrets, also those that a
// hosts.toml has for its host.
func onlyHarmless(h http.Header) {
	for k := range h {
		if !slices.Contains([]string{"Accept", "Accept-Encoding", "Range", "User-Agent"}, k) {
			delete(h, k)
		}
	}
}

// tokenServer is the transport of requests for tokens.
type tokenServer struct {
	next http.RoundTripper
	from place // of the registry
}

func (t *tokenServer) RoundTrip(req *http.Request) (*http.Response, error) {
	secret := req.Method == http.MethodPost || req.Header.Get("Authorization") != ""
	if secret && t.from.private() && !placeOf(req.URL).private() {
		return nil, fmt.Errorf("registry %s names a token server without encryption, %s: %w", t.from.host, req.URL.Host, errNotSent)
	}
	resp, err := t.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	what := "answer of token server " + req.URL.Host
	resp.Body = &limited{ReadCloser: resp.Body, what: what, left: maxAnswer, limit: maxAnswer}
	if resp.StatusCode < 300 {
		err = noWebPage(resp)
	}
	if err != nil {
		resp.Body.Close()
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return resp, nil
}

// limited is a body that ends with an error when it is larger than it may be.
type limited struct {
	io.ReadCloser
	what        string
	left, limit int64
}

func (l *limited) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	n, err := l.ReadCloser.Read(p[:min(int64(len(p)), l.left+1)])
	if int64(n) > l.left {
		return int(l.left), fmt.Errorf("%s: more than %d bytes: %w", l.what, l.limit, ErrHostile)
	}
	l.left -= int64(n)
	return n, err
}

// noWebPage looks at the first bytes of an answer.
func noWebPage(resp *http.Response) error {
	br := bufio.NewReaderSize(resp.Body, 512)
	head, err := br.Peek(512)
	if err != nil && !errors.Is(err, io.EOF) && len(head) == 0 {
		return err
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{br, resp.Body}
	if isWebPage(head) {
		return errWebPage
	}
	return nil
}

func isWebPage(head []byte) bool {
	head = bytes.TrimLeft(bytes.TrimPrefix(head, []byte("\ufeff")), " \t\r\n")
	return len(head) > 0 && head[0] == '<'
}

// asked is the path of the request that a redirect, or several, began with.
func asked(req *http.Request) string {
	for req.Response != nil && req.Response.Request != nil {
		req = req.Response.Request
	}
	return req.URL.Path
}

// checkAnswer makes an answer with content what the library can be given:
// bounded, in no encoding that costs memory, no web page.
func (r *registry) checkAnswer(req *http.Request, resp *http.Response) error {
	manifest := strings.Contains(asked(req), "/manifests/")
	if manifest {
		limit := r.manifestSize
		if resp.StatusCode < 300 && resp.ContentLength > limit {
			return fmt.Errorf("manifest has %d bytes, at most %d are allowed: %w", resp.ContentLength, limit, ErrHostile)
		}
		resp.Body = &limited{ReadCloser: resp.Body, what: "manifest", left: limit, limit: limit}
		if t := resp.Header.Get("Content-Type"); strings.HasPrefix(t, "text/") || strings.HasPrefix(t, cimages.MediaTypeDockerSchema1Manifest) {
			// The library takes text/plain for Docker's schema 1, and has
			// nothing for that. What it is, its content tells.
			resp.Header.Set("Content-Type", "application/octet-stream")
		}
	}
	if req.Method == http.MethodHead || resp.StatusCode >= 300 {
		return nil
	}
	// It was not asked for. gzip and deflate take some kilobytes each; several,
	// or zstd, take as much memory as the other side likes.
	switch enc := strings.ToLower(strings.Trim(resp.Header.Get("Content-Encoding"), " \t")); {
	case len(resp.Header.Values("Content-Encoding")) > 1, enc != "" && enc != "identity" && enc != "gzip" && enc != "deflate":
		return fmt.Errorf("content encoding %q, which was not asked for: %w", clip(strings.Join(resp.Header.Values("Content-Encoding"), ", ")), ErrHostile)
	case enc != "" && enc != "identity":
		return nil // what it looks like is seen later
	}
	if manifest || strings.HasPrefix(resp.Header.Get("Content-Type"), "text/html") {
		return noWebPage(resp)
	}
	return nil
}
