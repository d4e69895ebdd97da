// Package streaming serves exec, attach and port-forward connections over SPDY
// and WebSocket, on upstream's k8s.io/cri-streaming. A CRI call returns a URL
// with a single-use token, and the client (the kubelet, crictl) connects to it;
// who has authorised a request by other means calls ServeExec, ServeAttach and
// ServePortForward directly.
//
// Beyond upstream's package these speak the WebSocket protocols of current
// clients: v5.channel.k8s.io with half-closed stdin, and SPDY tunnelled in
// WebSocket for port-forward. The context of a stream ends when its client
// disconnects.
package streaming

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

// Runtime runs the streams; any of in, out and err may be nil. An error with
// an exit code is k8s.io/utils/exec's. The context ends with the connection.
type Runtime interface {
	Exec(ctx context.Context, containerID string, cmd []string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error
	Attach(ctx context.Context, containerID string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error
	PortForward(ctx context.Context, sandboxID string, port int32, stream io.ReadWriteCloser) error
}

// Limits on connections and on URLs.
const (
	// IdleTimeout closes a stream that carried nothing for this long;
	// upstream's value.
	IdleTimeout = 4 * time.Hour
	// headerTimeout bounds how long a connection may take to say what it wants.
	headerTimeout = 10 * time.Second
	// tokenLife is how long a URL waits for its client; upstream's value.
	tokenLife = time.Minute
	// maxTokens bounds the URLs that wait; upstream's value.
	maxTokens = 1000
)

// Server hands out URLs and serves them. It listens from the first URL on: a
// node whose streams are all served in-process never opens the port.
type Server struct {
	addr    string
	cert    KeyPair
	runtime Runtime

	mu      sync.Mutex
	base    url.URL // after the first URL
	http    *http.Server
	closed  bool
	waiting map[string]ticket
}

// ticket is a request that waits for its client.
type ticket struct {
	serve   http.HandlerFunc
	expires time.Time
}

// KeyPair names the PEM files of a certificate and its key. They are read for
// each connection, which are few, so that renewed ones need no restart.
type KeyPair struct{ CertFile, KeyFile string }

// Check says what is wrong with the files; the empty KeyPair is right.
func (k KeyPair) Check() error {
	if k == (KeyPair{}) {
		return nil
	}
	if k.CertFile == "" || k.KeyFile == "" {
		return fmt.Errorf("TLS of the streaming server wants both a certificate (%q) and its key (%q): %w", k.CertFile, k.KeyFile, errdefs.ErrInvalidArgument)
	}
	_, err := k.load(nil)
	return err
}

func (k KeyPair) load(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c, err := tls.LoadX509KeyPair(k.CertFile, k.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("TLS of the streaming server, certificate %s with key %s: %w", k.CertFile, k.KeyFile, err)
	}
	return &c, nil
}

// New returns a server for addr, a host:port whose port may be 0. With a
// certificate it speaks TLS only.
func New(addr string, cert KeyPair, runtime Runtime) *Server {
	return &Server{addr: addr, cert: cert, runtime: runtime, waiting: make(map[string]ticket)}
}

// Exec returns the URL of an exec.
func (s *Server) Exec(r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	opts := &remotecommand.Options{Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), TTY: r.GetTty()}
	if err := check(opts); err != nil {
		return nil, err
	}
	u, err := s.issue("exec", func(w http.ResponseWriter, req *http.Request) {
		ServeExec(w, req, s.runtime, r.GetContainerId(), r.GetCmd(), opts, IdleTimeout)
	})
	return &runtimeapi.ExecResponse{Url: u}, err
}

// Attach returns the URL of an attach.
func (s *Server) Attach(r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	opts := &remotecommand.Options{Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), TTY: r.GetTty()}
	if err := check(opts); err != nil {
		return nil, err
	}
	u, err := s.issue("attach", func(w http.ResponseWriter, req *http.Request) {
		ServeAttach(w, req, s.runtime, r.GetContainerId(), opts, IdleTimeout)
	})
	return &runtimeapi.AttachResponse{Url: u}, err
}

// PortForward returns the URL of a port-forward.
func (s *Server) PortForward(r *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	opts, err := portforward.BuildV4Options(r.GetPort())
	if err != nil {
		return nil, fmt.Errorf("port: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	u, err := s.issue("portforward", func(w http.ResponseWriter, req *http.Request) {
		ServePortForward(w, req, s.runtime, r.GetPodSandboxId(), opts, IdleTimeout)
	})
	return &runtimeapi.PortForwardResponse{Url: u}, err
}

// check refuses combinations that mean nothing.
func check(o *remotecommand.Options) error {
	if o.TTY && o.Stderr {
		return fmt.Errorf("tty and stderr exclude each other: a terminal has one output: %w", errdefs.ErrInvalidArgument)
	}
	if !o.Stdin && !o.Stdout && !o.Stderr {
		return fmt.Errorf("one of stdin, stdout and stderr must be set: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// issue keeps a request for the client that shows its token, and listens.
func (s *Server) issue(method string, serve http.HandlerFunc) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.listen(); err != nil {
		return "", err
	}
	now := time.Now()
	for t, w := range s.waiting {
		if now.After(w.expires) {
			delete(s.waiting, t)
		}
	}
	if len(s.waiting) >= maxTokens {
		return "", fmt.Errorf("%d streaming URLs wait for their clients: %w", maxTokens, errdefs.ErrResourceExhausted)
	}
	token := rand.Text()
	s.waiting[method+"/"+token] = ticket{serve, now.Add(tokenLife)}
	return s.base.JoinPath(method, token).String(), nil
}

// listen starts serving, once; the caller holds s.mu.
func (s *Server) listen() error {
	if s.closed {
		return fmt.Errorf("the streaming server is stopped: %w", errdefs.ErrUnavailable)
	}
	if s.http != nil {
		return nil
	}
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", s.addr)
	if err != nil {
		return fmt.Errorf("streaming server: %w", err)
	}
	s.base = url.URL{Scheme: "http", Host: l.Addr().String(), Path: "/"}
	mux := http.NewServeMux()
	mux.HandleFunc("/{method}/{token}", s.claim)
	s.http = &http.Server{Handler: mux, ReadHeaderTimeout: headerTimeout}
	if s.cert != (KeyPair{}) {
		s.base.Scheme = "https"
		// Streams take HTTP/1.1 connections over; HTTP/2 has none to take.
		l = tls.NewListener(l, &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, GetCertificate: s.cert.load})
	}
	go func() { _ = s.http.Serve(l) }() // ends with Close
	return nil
}

// claim serves the request that a token stands for, the first time only.
func (s *Server) claim(w http.ResponseWriter, r *http.Request) {
	key := r.PathValue("method") + "/" + r.PathValue("token")
	s.mu.Lock()
	t, ok := s.waiting[key]
	delete(s.waiting, key)
	s.mu.Unlock()
	if !ok || time.Now().After(t.expires) {
		http.NotFound(w, r)
		return
	}
	t.serve(w, r)
}

// Close stops listening. Streams that run end with their connections.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	clear(s.waiting)
	if s.http == nil {
		return nil
	}
	return s.http.Close()
}
