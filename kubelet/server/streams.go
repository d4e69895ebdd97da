package server

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

// Streams serves exec, attach and port-forward over SPDY and WebSocket,
// straight onto the runtime. Who may, and which container is meant, is its
// caller's business: the local API and the kubelet's API share it.
type Streams struct {
	Containers Containers
	Log        *slog.Logger
}

// Exec runs cmd in a container and streams until it ends.
func (s Streams) Exec(w http.ResponseWriter, r *http.Request, containerID string, cmd []string, o *remotecommand.Options) {
	w, r, done := untilDisconnect(w, r)
	defer done()
	remotecommand.ServeExec(w, r, executor(s), "", "", containerID, cmd, o,
		streamIdleTimeout, remotecommand.DefaultStreamCreationTimeout, remotecommand.SupportedStreamingProtocols)
}

// Attach streams a container's own input and output until it ends or the client goes.
func (s Streams) Attach(w http.ResponseWriter, r *http.Request, containerID string, o *remotecommand.Options) {
	w, r, done := untilDisconnect(w, r)
	defer done()
	remotecommand.ServeAttach(w, r, executor(s), "", "", containerID, o,
		streamIdleTimeout, remotecommand.DefaultStreamCreationTimeout, remotecommand.SupportedStreamingProtocols)
}

// PortForward carries connections to ports of a sandbox. ports are those that
// a WebSocket client asks for; SPDY clients name theirs with each stream.
func (s Streams) PortForward(w http.ResponseWriter, r *http.Request, sandboxID string, ports []int32) {
	w, r, done := untilDisconnect(w, r)
	defer done()
	portforward.ServePortForward(w, r, executor(s), sandboxID, "", &portforward.V4Options{Ports: ports},
		streamIdleTimeout, remotecommand.DefaultStreamCreationTimeout, portforward.SupportedProtocols)
}

// executor fits the runtime to the stream handlers' interfaces.
type executor Streams

func (e executor) ExecInContainer(ctx context.Context, _, _, container string, cmd []string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize, timeout time.Duration) error {
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	return e.Containers.ExecStream(ctx, container, cmd, in, out, err, tty, resize)
}

func (e executor) AttachContainer(ctx context.Context, _, _, container string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return e.Containers.AttachStream(ctx, container, in, out, err, tty, resize)
}

func (e executor) PortForward(ctx context.Context, sandbox, _ string, port int32, stream io.ReadWriteCloser) error {
	return e.Containers.PortForwardStream(ctx, sandbox, port, stream)
}

// untilDisconnect gives r a context that ends when its connection does.
// net/http only sees to that for as long as the connection is its own, which
// ends with the upgrade to a stream protocol.
func untilDisconnect(w http.ResponseWriter, r *http.Request) (http.ResponseWriter, *http.Request, func()) {
	ctx, cancel := context.WithCancel(r.Context())
	return &hijackWatcher{ResponseWriter: w, gone: cancel}, r.WithContext(ctx), cancel
}

type hijackWatcher struct {
	http.ResponseWriter
	gone func()
}

func (h *hijackWatcher) Flush() {
	if f, ok := h.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}

// Hijack hands out the connection so that its end is noticed. The stream
// protocols read all the time, so they notice at once.
func (h *hijackWatcher) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	// What net/http has read already comes first; its own reader would go on
	// with the connection behind our back.
	early, _ := rw.Reader.Peek(rw.Reader.Buffered())
	watched := &watchedConn{Conn: conn, early: bytes.NewReader(bytes.Clone(early)), gone: h.gone}
	return watched, bufio.NewReadWriter(bufio.NewReader(watched), bufio.NewWriter(watched)), nil
}

type watchedConn struct {
	net.Conn
	early *bytes.Reader
	once  sync.Once
	gone  func()
}

func (c *watchedConn) Read(b []byte) (int, error) {
	if c.early.Len() > 0 {
		return c.early.Read(b)
	}
	n, err := c.Conn.Read(b)
	if err != nil {
		c.once.Do(c.gone)
	}
	return n, err
}

func (c *watchedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err != nil {
		c.once.Do(c.gone)
	}
	return n, err
}

func (c *watchedConn) Close() error {
	c.once.Do(c.gone)
	return c.Conn.Close()
}
