package images

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Registry is a registry in memory on an address of this machine.
type Registry struct {
	// Addr is host:port.
	Addr               string
	Username, Password string

	srv *http.Server
	// Requests counts those that were let in, Refused the others.
	Requests, Refused atomic.Int64

	delay atomic.Int64 // nanoseconds
}

// Delay makes every answer to a read wait, as the network's distance would.
func (r *Registry) Delay(d time.Duration) { r.delay.Store(int64(d)) }

// Serve starts a registry on addr ("127.0.0.1:0": any port). With a username
// it lets nobody else in.
func Serve(addr, username, password string) (*Registry, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	r := &Registry{Addr: l.Addr().String(), Username: username, Password: password}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	r.srv = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if username != "" {
			u, p, _ := req.BasicAuth()
			if subtle.ConstantTimeCompare([]byte(u+":"+p), []byte(username+":"+password)) != 1 {
				r.Refused.Add(1)
				w.Header().Set("WWW-Authenticate", `Basic realm="podd tests"`)
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(http.StatusUnauthorized)
				io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
				return
			}
		}
		r.Requests.Add(1)
		if d := r.delay.Load(); d > 0 && (req.Method == http.MethodGet || req.Method == http.MethodHead) {
			time.Sleep(time.Duration(d))
		}
		inner.ServeHTTP(w, req)
	})}
	go r.srv.Serve(l) // until Close
	return r, nil
}

// Close ends the registry and forgets its images.
func (r *Registry) Close() error {
	if err := r.srv.Close(); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Push stores img as repository:tag, such as "web/nginx:1".
func (r *Registry) Push(ctx context.Context, repoTag string, img v1.Image) (digest string, err error) {
	ref, err := name.ParseReference(r.Addr+"/"+repoTag, name.Insecure)
	if err != nil {
		return "", err
	}
	opts := []remote.Option{remote.WithContext(ctx)}
	if r.Username != "" {
		opts = append(opts, remote.WithAuth(&authn.Basic{Username: r.Username, Password: r.Password}))
	}
	if err := remote.Write(ref, img, opts...); err != nil {
		return "", fmt.Errorf("push %s: %w", repoTag, err)
	}
	h, err := img.Digest()
	return h.String(), err
}
