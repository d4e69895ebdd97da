package images

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// registry talks to the hosts that serve one reference, for the length of one
// pull.
type registry struct {
	resolver remotes.Resolver
	hosts    docker.RegistryHosts

	ref          target
	creds        credentials
	stall        time.Duration
	rate         int64
	manifestSize int64

	mu       sync.Mutex
	known    map[string][]docker.RegistryHost // by host of a reference: one log-in for all that is asked
	idle     []func()                         // closes of the transports
	failed   []failure
	loggedIn bool // see logIn
}

// failure is one answer of a registry that was no success.
type failure struct {
	host, method, message string
	status                int // 0: none came
	err                   error
	// ask repeats a HEAD, whose answer has no room for a message, as GET.
	ask func(context.Context) (*http.Response, error)
}

func (s *Store) registry(ctx context.Context, ref target, auth *runtimeapi.AuthConfig) (*registry, error) {
	creds, err := newCredentials(ref, auth, s.cfg.CredentialsFile)
	if err != nil {
		return nil, err
	}
	r := &registry{
		ref: ref, creds: creds, stall: s.cfg.StallTimeout, rate: s.cfg.MinRate, manifestSize: s.cfg.Limits.ManifestSize,
		known: map[string][]docker.RegistryHost{},
	}
	opts := config.HostOptions{UpdateClient: r.client}
	if s.cfg.RegistryConfigPath != "" {
		opts.HostDir = hostDir(s.cfg.RegistryConfigPath)
	}
	configured := config.ConfigureHosts(ctx, opts)
	r.hosts = func(host string) ([]docker.RegistryHost, error) { return r.bound(host, configured) }
	r.resolver = docker.NewResolver(docker.ResolverOptions{Hosts: r.hosts, Headers: userAgent()})
	return r, nil
}

// bound returns the hosts of a reference's host, each with its account.
func (r *registry) bound(host string, configured docker.RegistryHosts) ([]docker.RegistryHost, error) {
	r.mu.Lock()
	known, ok := r.known[host]
	r.mu.Unlock()
	if ok {
		return slices.Clone(known), nil
	}
	all, err := configured(host)
	if err != nil {
		return nil, err
	}
	for i := range all {
		all[i] = r.bind(all[i])
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if known, ok := r.known[host]; ok {
		return slices.Clone(known), nil
	}
	r.known[host] = all
	return slices.Clone(all), nil
}

// able returns the hosts that may serve content, in the order in which they
// are asked. The library's fetcher itself does not look at capabilities.
func (r *registry) able(host string) ([]docker.RegistryHost, error) {
	all, err := r.hosts(host)
	return slices.DeleteFunc(all, func(h docker.RegistryHost) bool { return !h.Capabilities.Has(docker.HostCapabilityPull) }), err
}

// pullHosts is how many hosts may serve content.
func (r *registry) pullHosts() (int, error) {
	hosts, err := r.able(r.ref.host)
	return len(hosts), err
}

// fetcher of content from all hosts but the first skip.
func (r *registry) fetcher(ctx context.Context, skip int) (remotes.Fetcher, error) {
	resolver := docker.NewResolver(docker.ResolverOptions{Headers: userAgent(), Hosts: func(host string) ([]docker.RegistryHost, error) {
		able, err := r.able(host)
		return able[min(skip, len(able)):], err
	}})
	f, err := resolver.Fetcher(ctx, r.ref.String())
	if err != nil {
		return nil, &remoteError{err}
	}
	return f, nil
}

func userAgent() http.Header { return http.Header{"User-Agent": {"podd"}} }

// hostDir finds the directory of a host below certs.d, and refuses a hosts.toml
// that cannot be read: passing over it, as the library does, could send a pull
// to a registry that the file was written to avoid.
func hostDir(root string) func(string) (string, error) {
	find := config.HostDirFromRoot(root)
	return func(host string) (string, error) {
		dir, err := find(host)
		if err != nil {
			return "", err
		}
		file := filepath.Join(dir, "hosts.toml")
		data, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			return dir, nil
		}
		if err != nil {
			return "", fmt.Errorf("registry configuration: %w", err)
		}
		var any map[string]any
		if err := toml.Unmarshal(data, &any); err != nil {
			return "", fmt.Errorf("registry configuration %s: %v: %w", file, err, errdefs.ErrInvalidArgument)
		}
		return dir, nil
	}
}

// client gives an HTTP client that the library has made our eyes and limits.
func (r *registry) client(c *http.Client) error {
	if t, ok := c.Transport.(*http.Transport); ok {
		t.ResponseHeaderTimeout = r.stall
		t.MaxIdleConnsPerHost = 4
		t.MaxResponseHeaderBytes = maxHeader
		r.mu.Lock()
		r.idle = append(r.idle, t.CloseIdleConnections)
		r.mu.Unlock()
	}
	c.Transport = &watched{next: c.Transport, r: r}
	return nil
}

// close drops the connections.
func (r *registry) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range r.idle {
		f()
	}
}

// watched notes what went wrong, bounds what comes, and ends transfers that
// stall.
type watched struct {
	next http.RoundTripper
	r    *registry
}

func (w *watched) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	ours := req.Clone(ctx)
	if ours.Header.Get("Accept-Encoding") != "" { // the library would take zstd with any window
		ours.Header.Set("Accept-Encoding", "identity")
	}
	resp, err := w.next.RoundTrip(ours)
	if err != nil {
		cancel(nil)
		var notTLS tls.RecordHeaderError // plain HTTP on localhost is tried next
		if req.Context().Err() == nil && !errors.As(err, &notTLS) {
			w.r.note(failure{host: req.URL.Host, method: req.Method, err: err})
		}
		return nil, err // as it is: the fallback to HTTP looks at its type
	}
	if resp.StatusCode >= 400 {
		f := failure{host: req.URL.Host, method: req.Method, status: resp.StatusCode}
		if req.Method != http.MethodHead {
			head, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
			f.message = registryMessage(head)
			resp.Body = struct {
				io.Reader
				io.Closer
			}{io.MultiReader(strings.NewReader(string(head)), resp.Body), resp.Body}
		} else {
			f.ask = func(ctx context.Context) (*http.Response, error) {
				get := req.Clone(ctx)
				get.Method = http.MethodGet
				return w.next.RoundTrip(get)
			}
		}
		w.r.note(f)
	}
	resp.Body = newPaced(resp.Body, cancel, w.r.stall, w.r.rate)
	if err := w.r.checkAnswer(req, resp); err != nil {
		resp.Body.Close()
		return nil, err
	}
	return resp, nil
}

// reason asks the registry for the message that goes with its refusal. None
// is no loss.
func (f failure) reason(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	resp, err := f.ask(ctx)
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	if resp.StatusCode != f.status {
		return ""
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return registryMessage(body)
}

func (r *registry) note(f failure) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.failed) < 16 {
		r.failed = append(r.failed, f)
	}
}

// errStalled ends a transfer that is slower than the minimum.
var errStalled = fmt.Errorf("transfer stalled: %w", errdefs.ErrUnavailable)

// paced is a response body that must move: in every window at least rate
// bytes per second.
type paced struct {
	io.ReadCloser
	cancel context.CancelCauseFunc
	window time.Duration
	rate   int64

	mu      sync.Mutex
	timer   *time.Timer
	n       int64 // in this window
	stalled bool
	reading bool
}

func newPaced(body io.ReadCloser, cancel context.CancelCauseFunc, window time.Duration, rate int64) *paced {
	p := &paced{ReadCloser: body, cancel: cancel, window: window, rate: rate}
	p.timer = time.AfterFunc(window, p.look)
	return p
}

func (p *paced) look() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.timer == nil {
		return
	}
	// Time in which nobody wanted to read is not the registry's.
	if p.reading && p.n < int64(p.window.Seconds()*float64(p.rate)) {
		p.stalled = true
		p.cancel(errStalled)
		return
	}
	p.n = 0
	p.timer.Reset(p.window)
}

func (p *paced) Read(b []byte) (int, error) {
	p.mu.Lock()
	p.reading = true
	p.mu.Unlock()
	n, err := p.ReadCloser.Read(b)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reading = false
	p.n += int64(n)
	if p.stalled && err != nil {
		err = fmt.Errorf("fewer than %d bytes/s over %s: %w", p.rate, p.window, errStalled)
	}
	return n, err
}

func (p *paced) Close() error {
	p.mu.Lock()
	if p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
	p.mu.Unlock()
	err := p.ReadCloser.Close()
	p.cancel(nil)
	return err
}

// registryMessage reads the error document of the distribution specification.
func registryMessage(body []byte) string {
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
		Details string `json:"details"` // token servers
		Message string `json:"message"`
	}
	if json.Unmarshal(body, &doc) != nil {
		return ""
	}
	var parts []string
	for _, e := range doc.Errors[:min(len(doc.Errors), 3)] {
		parts = append(parts, strings.TrimSpace(e.Code+" "+e.Message))
	}
	for _, m := range []string{doc.Details, doc.Message} {
		if m != "" {
			parts = append(parts, m)
		}
	}
	m := strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f {
			return ' '
		}
		return r
	}, strings.Join(parts, "; "))
	return clip(m)
}

// explain turns what the library says into an error of a kind that says what
// to do: what, where, the registry's answer, the remedy.
func (r *registry) explain(ctx context.Context, what string, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("pull %s: %s: %w", r.ref, what, context.Cause(ctx))
	}
	var far *remoteError
	if !errors.As(err, &far) || errors.Is(err, ErrHostile) || errors.Is(err, errNotSent) || errdefs.IsDataLoss(err) || errdefs.IsInvalidArgument(err) || errdefs.IsFailedPrecondition(err) {
		return fmt.Errorf("pull %s: %s: %w", r.ref, what, diskFull(err))
	}
	kind, remedy := error(nil), ""
	var status remoteerrors.ErrUnexpectedStatus
	code := 0
	if errors.As(err, &status) {
		code = status.StatusCode
	}
	r.mu.Lock()
	failed := r.failed
	r.mu.Unlock()
	if code == 0 && len(failed) > 0 && !errors.Is(err, errStalled) && !errors.Is(err, errBroken) {
		code = failed[len(failed)-1].status
	}
	var netErr net.Error
	switch {
	case errors.Is(err, errStalled):
		kind, remedy = errdefs.ErrUnavailable, "the registry or the way to it is too slow; what came is kept for the next attempt"
	case errors.Is(err, docker.ErrInvalidAuthorization), code == http.StatusUnauthorized:
		kind, remedy = errdefs.ErrUnauthenticated, "the image needs credentials, or those given are wrong: check imagePullSecrets; or it does not exist"
	case code == http.StatusForbidden:
		kind, remedy = errdefs.ErrPermissionDenied, "the registry refuses these credentials access to it"
	case errdefs.IsNotFound(err), code == http.StatusNotFound:
		kind, remedy = errdefs.ErrNotFound, "no such image or tag there: check its spelling"
	case code == http.StatusTooManyRequests:
		kind, remedy = errdefs.ErrResourceExhausted, "the registry's rate limit: wait, or pull with credentials"
	case code >= 500:
		kind, remedy = errdefs.ErrUnavailable, "the registry has a problem: try again later"
	case errors.Is(err, errBroken):
		kind, remedy = errdefs.ErrUnavailable, "the transfer broke off; what came is kept for the next attempt"
	case errors.As(err, &netErr), code == 0:
		kind, remedy = errdefs.ErrUnavailable, "the registry is not reachable: check its name, the network, proxy and certs.d settings"
	default:
		kind = errdefs.ErrUnknown
	}
	if n := len(failed); n > 0 && failed[n-1].ask != nil && !errors.Is(err, errBroken) && !errors.Is(err, errStalled) {
		failed = slices.Clone(failed)
		failed[n-1].message = failed[n-1].reason(ctx)
	}
	var answers []string
	for _, f := range failed {
		a := f.host + ": "
		switch {
		case f.err != nil:
			a += f.err.Error()
		default:
			a += fmt.Sprintf("%d %s", f.status, http.StatusText(f.status))
		}
		if f.message != "" {
			a += " (" + f.message + ")"
		}
		if len(answers) == 0 || answers[len(answers)-1] != a {
			answers = append(answers, a)
		}
	}
	said := strings.Join(answers, ", ")
	if said == "" || errors.Is(err, errBroken) || errors.Is(err, errStalled) {
		said = strings.TrimPrefix(said+", ", ", ") + r.ref.host + ": " + far.Error()
	}
	if remedy != "" {
		remedy = "; " + remedy
	}
	return fmt.Errorf("pull %s: %s: %s%s: %w", r.ref, what, said, remedy, kind)
}

// diskFull gives the error of a full disk its kind and remedy.
func diskFull(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: free space on the image store's file system: %w", err, errdefs.ErrResourceExhausted)
	}
	return err
}

// credentials of one pull.
type credentials struct {
	host         string // of the reference
	server       string // the only host that user and secret are for; "": host
	user, secret string
	token        string // registry token: a ready bearer
	file         map[string][2]string
}

// newCredentials reads the CRI's AuthConfig and the credentials file.
//
// What came with the pull goes to the reference's own registry (or the one
// that serverAddress names) and to nobody else: a mirror gets what the file has
// for the mirror.
func newCredentials(ref target, auth *runtimeapi.AuthConfig, file string) (credentials, error) {
	c := credentials{host: ref.host}
	if file != "" {
		var err error
		if c.file, err = readDockerConfig(file); err != nil {
			return c, err
		}
	}
	if auth == nil {
		return c, nil
	}
	c.server = serverHost(auth.GetServerAddress())
	switch {
	case auth.GetUsername() != "":
		c.user, c.secret = auth.GetUsername(), auth.GetPassword()
	case auth.GetIdentityToken() != "":
		c.secret = auth.GetIdentityToken()
	case auth.GetAuth() != "":
		var err error
		if c.user, c.secret, err = decodeAuth(auth.GetAuth()); err != nil {
			return c, fmt.Errorf("credentials for %s: auth: %w", ref, err)
		}
	case auth.GetRegistryToken() != "":
		c.token = auth.GetRegistryToken()
	}
	return c, nil
}

// mine tells whether the pull's own credentials are for host.
func (c credentials) mine(host string) bool {
	want := c.host
	if c.server != "" {
		want = c.server
	}
	return canonicalHost(host) == canonicalHost(want)
}

// lookup is what the resolver asks: user and secret, or "" and a refresh token.
func (c credentials) lookup(host string) (string, string, error) {
	if c.secret != "" && c.mine(host) {
		return c.user, c.secret, nil
	}
	return c.fromFile(host)
}

func (c credentials) fromFile(host string) (string, string, error) {
	up := c.file[canonicalHost(host)]
	return up[0], up[1], nil
}

// canonicalHost: Docker Hub goes by three names.
func canonicalHost(h string) string {
	switch h {
	case "registry-1.docker.io", "index.docker.io", "docker.io":
		return "docker.io"
	}
	return h
}

// serverHost takes "https://host/v1/", "host/path" or "host".
func serverHost(s string) string {
	s = strings.TrimPrefix(strings.TrimPrefix(s, "https://"), "http://")
	s, _, _ = strings.Cut(s, "/")
	return s
}

func decodeAuth(a string) (user, secret string, err error) {
	raw, err := base64.StdEncoding.DecodeString(a)
	if err != nil {
		return "", "", fmt.Errorf("not base64 of user:password: %w", errdefs.ErrInvalidArgument)
	}
	user, secret, ok := strings.Cut(string(raw), ":")
	if !ok {
		return "", "", fmt.Errorf("not base64 of user:password: %w", errdefs.ErrInvalidArgument)
	}
	return user, strings.Trim(secret, "\x00"), nil
}

// readDockerConfig reads the "auths" of a docker config.json by host.
// Credential helpers are programs and not run.
func readDockerConfig(path string) (map[string][2]string, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("credentials file: %w", err)
	}
	var doc struct {
		Auths map[string]struct {
			Auth          string `json:"auth"`
			Username      string `json:"username"`
			Password      string `json:"password"`
			IdentityToken string `json:"identitytoken"`
		} `json:"auths"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("credentials file %s is not a docker config.json (%v): %w", path, err, errdefs.ErrInvalidArgument)
	}
	m := map[string][2]string{}
	for server, a := range doc.Auths {
		user, secret := a.Username, a.Password
		if a.Auth != "" {
			if user, secret, err = decodeAuth(a.Auth); err != nil {
				return nil, fmt.Errorf("credentials file %s: auths %q: %w", path, server, err)
			}
		}
		if a.IdentityToken != "" {
			user, secret = "", a.IdentityToken
		}
		m[canonicalHost(serverHost(server))] = [2]string{user, secret}
	}
	return m, nil
}
