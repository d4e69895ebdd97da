package server

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"github.com/podd-runtime/podd/cri/streaming"
)

// Streams serves exec, attach and port-forward over SPDY and WebSocket,
// straight onto the runtime. Who may, and which container is meant, is its
// caller's business: the local API and the kubelet's API share it.
type Streams struct {
	Containers Containers
	// Idle ends a stream that carried nothing for so long; 0: upstream's 4 h.
	Idle time.Duration
	Log  *slog.Logger
}

func (s Streams) idle() time.Duration {
	if s.Idle == 0 {
		return streaming.IdleTimeout
	}
	return s.Idle
}

// Exec runs cmd in a container and streams until it ends.
func (s Streams) Exec(w http.ResponseWriter, r *http.Request, containerID string, cmd []string, o *remotecommand.Options) {
	streaming.ServeExec(w, r, executor(s), containerID, cmd, o, s.idle())
}

// Attach streams a container's own input and output until it ends or the client goes.
func (s Streams) Attach(w http.ResponseWriter, r *http.Request, containerID string, o *remotecommand.Options) {
	streaming.ServeAttach(w, r, executor(s), containerID, o, s.idle())
}

// PortForward carries connections to ports of a sandbox. ports are those that
// a WebSocket client asks for; SPDY clients name theirs with each stream.
func (s Streams) PortForward(w http.ResponseWriter, r *http.Request, sandboxID string, ports []int32) {
	streaming.ServePortForward(w, r, executor(s), sandboxID, &portforward.V4Options{Ports: ports}, s.idle())
}

// executor fits the runtime to the stream handlers' interface.
type executor Streams

func (e executor) Exec(ctx context.Context, container string, cmd []string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return e.Containers.ExecStream(ctx, container, cmd, in, out, err, tty, resize)
}

func (e executor) Attach(ctx context.Context, container string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return e.Containers.AttachStream(ctx, container, in, out, err, tty, resize)
}

func (e executor) PortForward(ctx context.Context, sandbox string, port int32, stream io.ReadWriteCloser) error {
	return e.Containers.PortForwardStream(ctx, sandbox, port, stream)
}
