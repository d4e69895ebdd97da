// Package kubeletapi is the kubelet's HTTP API as clusters know it, on port
// 10250: what kube-apiserver's log, exec, attach, port-forward and proxy
// requests, metrics-server and Prometheus talk to. Paths, answers and switches
// are upstream's.
//
// The same routes make up three servers: the one with authentication, the
// read-only one (readOnlyPort), which has neither authentication nor anything
// that changes or enters a container, and the one for health alone
// (healthzPort).
package kubeletapi

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	kubeletv1beta1 "k8s.io/kubelet/config/v1beta1"
	statsv1alpha1 "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"github.com/podd-runtime/podd/cri/streaming"
	"github.com/podd-runtime/podd/kubelet/server"
	"github.com/podd-runtime/podd/kubelet/server/auth"
)

// Pods is the pod table. *pods.Table is it.
type Pods interface {
	List() []*v1.Pod
	Get(namespace, name string) (*v1.Pod, bool)
}

// Runtime is what the API needs of the runtime. *cri.Service is it.
type Runtime interface {
	server.Containers
	ExecSync(context.Context, *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error)
	ListContainers(context.Context, *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error)
	CheckpointContainer(context.Context, *runtimeapi.CheckpointContainerRequest) (*runtimeapi.CheckpointContainerResponse, error)
}

// Stats makes the summary of the node and its pods. *stats.Provider is it.
type Stats interface {
	Summary(ctx context.Context, onlyCPUAndMemory bool) (*statsv1alpha1.Summary, error)
}

// Check is one part of the node's health.
type Check struct {
	Name  string
	Check func(ctx context.Context) error
}

// Config of a Server. Pods, Runtime and Stats are required.
type Config struct {
	// Kubelet is what /configz shows, and holds the switches of the API:
	// enableDebuggingHandlers and its like.
	Kubelet *kubeletv1beta1.KubeletConfiguration
	// Flags are what /flagz shows: those that were given.
	Flags   map[string]string
	Version string
	Pods    Pods
	Runtime Runtime
	Stats   Stats
	// Metrics serve /metrics and, by their names, what lies below it:
	// "cadvisor", "resource", "probes", "slis".
	Metrics map[string]http.Handler
	// Observe hears of each request that was answered; nil: nobody does.
	Observe func(Request)
	Checks  []Check
	// SystemLogs is the directory that /logs/ shows. Default /var/log.
	SystemLogs string
	// SetVerbosity changes the level of the log; nil: it cannot be changed.
	SetVerbosity func(level string) error
	Log          *slog.Logger
}

// Request that was answered, in labels of few values.
type Request struct {
	Method, Path, ServerType string
	LongRunning              bool
	Duration                 time.Duration
}

// Server of the API.
type Server struct {
	cfg     Config
	started time.Time
	streams server.Streams
}

// Limits, upstream's where it has them.
const (
	maxConnections  = 2048
	maxHeader       = 64 << 10
	headerTimeout   = 10 * time.Second // of the TLS handshake, too
	idleTimeout     = 90 * time.Second
	shutdownTimeout = 3 * time.Second
	requestTimeout  = time.Minute // of what is answered at once
)

// New returns a server.
func New(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.SystemLogs == "" {
		cfg.SystemLogs = "/var/log"
	}
	return &Server{cfg: cfg, started: time.Now(), streams: server.Streams{
		Containers: cfg.Runtime, Idle: cfg.Kubelet.StreamingConnectionIdleTimeout.Duration, Log: cfg.Log,
	}}
}

// Secure is the whole API behind a gate.
func (s *Server) Secure(gate *auth.Gate) http.Handler {
	m := http.NewServeMux()
	s.healthRoutes(m)
	s.readRoutes(m)
	if s.cfg.Kubelet.EnableDebuggingHandlers == nil || *s.cfg.Kubelet.EnableDebuggingHandlers {
		s.systemLogRoutes(m)
		s.debugRoutes(m)
		s.containerRoutes(m)
		s.zpageRoutes(m)
	} else {
		for _, path := range []string{"/run/", "/exec/", "/attach/", "/portForward/", "/containerLogs/", "/runningpods/", "/debug/pprof/", "/logs/"} {
			m.HandleFunc(path, disabled("Debug endpoints are disabled."))
		}
	}
	return s.observed("readwrite", gate.Handler(m))
}

// ReadOnly is what upstream's read-only port shows: it asks nobody who he is.
func (s *Server) ReadOnly() http.Handler {
	m := http.NewServeMux()
	s.healthRoutes(m)
	s.readRoutes(m)
	return s.observed("readonly", m)
}

// Health is the node's health and nothing else.
func (s *Server) Health() http.Handler {
	m := http.NewServeMux()
	s.healthRoutes(m)
	return m
}

func disabled(message string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { http.Error(w, message, http.StatusMethodNotAllowed) }
}

// Serve answers on l until ctx ends; requests under way are cancelled then.
// A nil TLS configuration is plain HTTP.
func Serve(ctx context.Context, l net.Listener, h http.Handler, secure *tls.Config, log *slog.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	srv := &http.Server{
		Handler: h, TLSConfig: secure,
		ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		<-ctx.Done()
		stop, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
		defer cancel()
		if err := srv.Shutdown(stop); err != nil {
			srv.Close()
		}
	}()
	l = streaming.LimitListener(l, maxConnections)
	var err error
	if secure != nil {
		err = srv.ServeTLS(l, "", "")
	} else {
		err = srv.Serve(l)
	}
	cancel()
	<-ended
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// fail answers with the error as upstream does: as text, which kube-apiserver
// puts into its own.
func fail(w http.ResponseWriter, err error) {
	s := server.StatusOf(err)
	http.Error(w, s.Message, int(s.Code))
}

// answer wraps a handler whose error has not been told yet. Those that are not
// about streams are bounded in time.
func answer(h func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			fail(w, err)
		}
	}
}

func short(h func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		answer(h)(w, r.WithContext(ctx))
	}
}
