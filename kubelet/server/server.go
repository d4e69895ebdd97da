// Package server is podd's local API: the part of the Kubernetes API that
// kubectl's commands use, and podd's own below /podd/v1, as HTTP on a unix
// socket that only its owner may open. It reads everything from the parts that
// own it and keeps nothing of its own.
package server

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/watch"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"github.com/podd-runtime/podd/cri/images"
	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/cri/streaming"
	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/server/api"
)

// Pods is the pod table. *pods.Table is it. The pods carry their status and a
// resourceVersion that grows with every change in the table.
type Pods interface {
	List() []*v1.Pod
	Get(namespace, name string) (*v1.Pod, bool)
	// ResourceVersion is that of the last change.
	ResourceVersion() string
	// Watch delivers every change after resourceVersion until ctx ends. One
	// that is too old ends it with an ERROR event.
	Watch(ctx context.Context, resourceVersion string) <-chan watch.Event
	// Container returns the id of a container that runs or ran last; "" names
	// the default one.
	Container(namespace, name, container string) (string, error)
	// Stop returns when the pod has stopped. A nil grace is the pod's own.
	Stop(ctx context.Context, namespace, name string, grace *int64) error
	StopAll(ctx context.Context, grace *int64) error
	// Restart starts a container anew without back-off; "": all of the pod,
	// also one that was stopped.
	Restart(ctx context.Context, namespace, name, container string) error
}

// Events is the event store. *events.Store is it.
type Events interface {
	List(namespace string) []v1.Event
	Watch(ctx context.Context) <-chan watch.Event
}

// Objects are the ConfigMaps and Secrets of the node. *manifests.Source is it.
type Objects interface {
	ConfigMaps() []*v1.ConfigMap
	Secrets() []*v1.Secret
}

// Containers is the runtime. *cri.Service is it.
type Containers interface {
	ContainerStatus(context.Context, *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error)
	ListPodSandbox(context.Context, *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error)
	// Subscribe delivers every event from now on until ctx ends.
	Subscribe(ctx context.Context) <-chan *runtimeapi.ContainerEventResponse
	// ExecStream returns a utilexec.ExitError when the command fails.
	ExecStream(ctx context.Context, containerID string, cmd []string, stdin io.Reader, stdout, stderr io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error
	AttachStream(ctx context.Context, containerID string, stdin io.Reader, stdout, stderr io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error
	PortForwardStream(ctx context.Context, sandboxID string, port int32, stream io.ReadWriteCloser) error
}

// Images is the image store. *images.Store is it.
type Images interface {
	Pull(ctx context.Context, ref string, auth *runtimeapi.AuthConfig, progress func(images.Progress)) (*images.Image, error)
	Get(ctx context.Context, ref string) (*images.Image, error)
	List(ctx context.Context) ([]*images.Image, error)
	Remove(ctx context.Context, ref string) error
	// Load imports an OCI layout or docker-archive tar, compressed or not.
	Load(ctx context.Context, tar io.Reader, o images.LoadOptions) ([]*images.Image, error)
	// Verify reads all content and tells what is not as it was stored.
	Verify(ctx context.Context) ([]images.Problem, error)
	// Pulls tells the pulls that are under way.
	Pulling() []images.Progress
}

// Config of a Server. Pods, Events, Containers and Images are required.
type Config struct {
	NodeName   string
	Version    string
	Pods       Pods
	Events     Events
	Objects    Objects // nil: none
	Containers Containers
	Images     Images
	// Problems tells the manifests that are not in force; nil: none.
	Problems func() []manifests.Problem
	// Disk that holds the images; nil: not told.
	Disk func(ctx context.Context) *api.Disk
	// Explain a pod; nil: not supported.
	Explain Explainer
	// Shim asks podd-shim about itself; nil: unknown. The error is for people.
	Shim func(ctx context.Context) (*shim.Info, error)
	// Cluster is the node's connection with one; nil, or nil from it: none.
	Cluster func() *api.Cluster
	// Troubles of the node itself; nil: not told.
	Troubles func(ctx context.Context) []api.Finding
	// Node is the node object; nil: one with name and addresses only.
	Node func() *v1.Node
	// Shutdown ends the daemon and leaves the pods alone.
	Shutdown func()
	Log      *slog.Logger
}

// Limits that keep one client from costing the daemon more than it should.
const (
	maxConnections  = 512
	maxHeader       = 64 << 10
	headerTimeout   = 10 * time.Second
	idleTimeout     = 2 * time.Minute
	shutdownTimeout = 3 * time.Second
	maxBody         = 1 << 20 // of every request but an image upload
	requestTimeout  = time.Minute
	maxWatch        = time.Hour // as kube-apiserver, which ends watches after 30 to 60 min
)

// Server of the local API.
type Server struct {
	cfg     Config
	started time.Time
	streams Streams
	kinds   []*kind
	handler http.Handler
}

// New returns a server; Serve runs it.
func New(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, started: time.Now()}
	s.streams = Streams{Containers: cfg.Containers, Log: cfg.Log}
	s.kinds = s.resources()
	s.handler = s.routes()
	return s
}

// Handler is the API without its socket.
func (s *Server) Handler() http.Handler { return s.handler }

// Serve answers on l until ctx ends; what is under way then is cancelled.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	srv := &http.Server{
		Handler:           s.handler,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		<-ctx.Done()
		// Requests see their context end; give them a moment to leave.
		stop, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
		defer cancel()
		if err := srv.Shutdown(stop); err != nil {
			srv.Close()
		}
	}()
	err := srv.Serve(streaming.LimitListener(l, maxConnections))
	cancel()
	<-ended
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func (s *Server) routes() http.Handler {
	m := http.NewServeMux()
	s.discoveryRoutes(m)
	s.resourceRoutes(m)
	s.podRoutes(m)
	s.ownRoutes(m)
	m.HandleFunc("GET /healthz", s.ok)
	m.HandleFunc("GET /readyz", s.ok)
	m.HandleFunc("GET /livez", s.ok)
	m.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet {
			writeError(w, apierrors.NewGenericServerResponse(http.StatusMethodNotAllowed, r.Method, resource(r.URL.Path), "", "the local API does not change that", 0, false))
			return
		}
		writeError(w, errNoPath(r.URL.Path))
	})
	return m
}

func (s *Server) ok(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ok") }

// short wraps a handler that answers at once: bounded in time and body.
func short(h func(w http.ResponseWriter, r *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		if err := h(w, r.WithContext(ctx)); err != nil {
			writeError(w, err)
		}
	}
}

// long wraps a handler that takes as long as its client wants.
func long(h func(w http.ResponseWriter, r *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			writeError(w, err)
		}
	}
}

// KubernetesVersion of the API that is spoken here: the one of the libraries.
const KubernetesVersion = "v1.36.3"

var kubernetesVersion = struct{ major, minor, git string }{"1", "36", KubernetesVersion}

func problems(in []manifests.Problem) []api.Problem {
	out := make([]api.Problem, 0, len(in))
	for _, p := range in {
		out = append(out, api.Problem(p))
	}
	return out
}
