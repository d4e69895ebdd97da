// Package auth decides who may use the kubelet's HTTPS API: client certificates
// and bearer tokens say who calls, upstream's node subresources say what is
// asked for, and the cluster's reviews or a fixed mode say whether it is
// allowed. Whatever cannot be decided is refused.
package auth

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
)

// User is who calls, as TokenReview and SubjectAccessReview have it.
type User = authenticationv1.UserInfo

// Names that Kubernetes gives by itself.
const (
	anonymousUser        = "system:anonymous"
	groupAuthenticated   = "system:authenticated"
	groupUnauthenticated = "system:unauthenticated"
)

// Reviews asks the cluster; a create of the object of the same name.
type Reviews interface {
	TokenReview(ctx context.Context, r *authenticationv1.TokenReview) (*authenticationv1.TokenReview, error)
	SubjectAccessReview(ctx context.Context, r *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReview, error)
}

// Modes of authorization, as the KubeletConfiguration names them.
const (
	AlwaysAllow = "AlwaysAllow"
	Webhook     = "Webhook"
)

// Config of a Gate.
type Config struct {
	NodeName string
	// ClientCAFile holds the CAs of client certificates; read again when it
	// changes. "": certificates prove nothing.
	ClientCAFile string
	// Anonymous lets callers without credentials in as system:anonymous.
	Anonymous bool
	// Tokens has bearer tokens reviewed, and each verdict kept for TokenTTL.
	Tokens   bool
	TokenTTL time.Duration
	// Mode is AlwaysAllow or Webhook; of the latter, verdicts are kept for
	// AllowedTTL and DeniedTTL.
	Mode                  string
	AllowedTTL, DeniedTTL time.Duration
	// Reviews is required by Tokens and by mode Webhook; without it the former
	// know nobody and the latter allows nothing.
	Reviews Reviews
	Log     *slog.Logger
}

// Gate stands before the API.
type Gate struct {
	cfg    Config
	ca     *clientCA
	tokens *tokens
	access *access
}

// New returns a Gate. An unreadable client CA is an error.
func New(cfg Config) (*Gate, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	g := &Gate{cfg: cfg}
	if cfg.ClientCAFile != "" {
		ca, err := openClientCA(cfg.ClientCAFile, cfg.Log)
		if err != nil {
			return nil, err
		}
		g.ca = ca
	}
	if cfg.Tokens && cfg.Reviews != nil {
		g.tokens = newTokens(cfg.Reviews, cfg.TokenTTL)
	}
	switch cfg.Mode {
	case AlwaysAllow:
	case Webhook:
		if cfg.Reviews != nil {
			g.access = newAccess(cfg.Reviews, cfg.AllowedTTL, cfg.DeniedTTL)
		}
	default:
		return nil, fmt.Errorf("authorization.mode (--authorization-mode): %q: want %s or %s", cfg.Mode, AlwaysAllow, Webhook)
	}
	return g, nil
}

// ClientCertificates says whether clients should be asked for one.
func (g *Gate) ClientCertificates() bool { return g.ca != nil }

// reviewTime bounds a question to the apiserver: the client waits meanwhile.
const reviewTime = 10 * time.Second

// Authenticate says who calls; ok is false for nobody that is known. An error
// is for the log.
func (g *Gate) Authenticate(r *http.Request) (u *User, ok bool, err error) {
	var errs []error
	if g.ca != nil && r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		u, err := g.ca.user(r.TLS.PeerCertificates)
		if err == nil {
			return authenticated(u), true, nil
		}
		errs = append(errs, err)
	}
	// Whoever shows something that is not believed is not anonymous either.
	shown := len(errs) > 0 || r.Header.Get("Authorization") != ""
	if token, has := bearer(r); has {
		shown = true
		if g.tokens != nil {
			ctx, cancel := context.WithTimeout(r.Context(), reviewTime)
			defer cancel()
			u, err := g.tokens.user(ctx, token)
			if err == nil && u != nil {
				return authenticated(u), true, nil
			}
			errs = append(errs, err)
		}
	}
	if g.cfg.Anonymous && !shown {
		return &User{Username: anonymousUser, Groups: []string{groupUnauthenticated}}, true, nil
	}
	return nil, false, errors.Join(errs...)
}

// authenticated adds the group of all who have logged in.
func authenticated(u *User) *User {
	for _, g := range u.Groups {
		if g == groupAuthenticated || g == groupUnauthenticated {
			return u
		}
	}
	out := *u
	out.Groups = append(append(make([]string, 0, len(u.Groups)+1), u.Groups...), groupAuthenticated)
	return &out
}

// Authorize says whether u may make the request: one of the subresources that
// stand for its path must be allowed. An error is that of the question.
func (g *Gate) Authorize(ctx context.Context, u *User, verb, path string) (bool, error) {
	if g.cfg.Mode == AlwaysAllow {
		return true, nil
	}
	if g.access == nil {
		return false, nil
	}
	ctx, cancel := context.WithTimeout(ctx, reviewTime)
	defer cancel()
	for _, sub := range Subresources(path) {
		ok, err := g.access.allowed(ctx, u, &authorizationv1.ResourceAttributes{
			Verb: verb, Version: "v1", Resource: "nodes", Subresource: sub, Name: g.cfg.NodeName,
		})
		if err != nil || ok {
			return ok, err
		}
	}
	return false, nil
}

// Handler passes on what is allowed. The caller's identity is in the context.
func (g *Gate) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u, ok, err := g.Authenticate(r)
		if !ok {
			g.cfg.Log.Debug("request without a known identity", "from", r.RemoteAddr, "method", r.Method, "path", r.URL.Path, "error", err)
			http.Error(w, "Unauthorized", http.StatusUnauthorized)
			return
		}
		verb := verb(r)
		ok, err = g.Authorize(r.Context(), u, verb, r.URL.Path)
		if err != nil {
			g.cfg.Log.Warn("authorization could not be decided", "user", u.Username, "method", r.Method, "path", r.URL.Path, "error", err)
			http.Error(w, fmt.Sprintf("Authorization error (user=%s, verb=%s, resource=nodes, subresource(s)=%v)", u.Username, verb, Subresources(r.URL.Path)), http.StatusInternalServerError)
			return
		}
		if !ok {
			g.cfg.Log.Debug("request refused", "user", u.Username, "from", r.RemoteAddr, "method", r.Method, "path", r.URL.Path)
			http.Error(w, fmt.Sprintf("Forbidden (user=%s, verb=%s, resource=nodes, subresource(s)=%v)", u.Username, verb, Subresources(r.URL.Path)), http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), userKey{}, u)))
	})
}

type userKey struct{}

// From is the caller of a request that came through a Gate; nil: through none.
func From(ctx context.Context) *User {
	u, _ := ctx.Value(userKey{}).(*User)
	return u
}
