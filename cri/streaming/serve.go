package streaming

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/websocket"
	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream/wsstream"
	utilexec "k8s.io/utils/exec"
)

// ServeExec runs a command for one HTTP request and returns when it is over, or
// when nothing was carried for as long as idle.
func ServeExec(w http.ResponseWriter, r *http.Request, runtime Runtime, containerID string, cmd []string, opts *remotecommand.Options, idle time.Duration) {
	w, r, done := watch(w, r)
	defer done()
	if wsstream.IsWebSocketRequestWithStreamCloseProtocol(r) {
		serveV5(w, r, opts, idle, func(ctx context.Context, s *streams) error {
			return runtime.Exec(ctx, containerID, cmd, s.in, s.out, s.err, opts.TTY, s.resize)
		})
		return
	}
	remotecommand.ServeExec(w, r, adapter{runtime}, "", "", containerID, cmd, opts,
		idle, remotecommand.DefaultStreamCreationTimeout, remotecommand.SupportedStreamingProtocols)
}

// ServeAttach joins a container's streams for one HTTP request.
func ServeAttach(w http.ResponseWriter, r *http.Request, runtime Runtime, containerID string, opts *remotecommand.Options, idle time.Duration) {
	w, r, done := watch(w, r)
	defer done()
	if wsstream.IsWebSocketRequestWithStreamCloseProtocol(r) {
		serveV5(w, r, opts, idle, func(ctx context.Context, s *streams) error {
			return runtime.Attach(ctx, containerID, s.in, s.out, s.err, opts.TTY, s.resize)
		})
		return
	}
	remotecommand.ServeAttach(w, r, adapter{runtime}, "", "", containerID, opts,
		idle, remotecommand.DefaultStreamCreationTimeout, remotecommand.SupportedStreamingProtocols)
}

// ServePortForward forwards ports of a pod for one HTTP request: SPDY, SPDY in
// WebSocket, or the older WebSocket protocol with its ports in opts (nil: none).
func ServePortForward(w http.ResponseWriter, r *http.Request, runtime Runtime, sandboxID string, opts *portforward.V4Options, idle time.Duration) {
	w, r, done := watch(w, r)
	defer done()
	serve := func(w http.ResponseWriter, r *http.Request) {
		portforward.ServePortForward(w, r, adapter{runtime}, sandboxID, "", opts,
			idle, remotecommand.DefaultStreamCreationTimeout, portforward.SupportedProtocols)
	}
	if wantsTunnel(r) {
		tunnel(w, r, serve)
		return
	}
	serve(w, r)
}

// adapter is Runtime as upstream's packages call it.
type adapter struct{ Runtime }

func (a adapter) ExecInContainer(ctx context.Context, _, _, container string, cmd []string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	return a.Exec(ctx, container, cmd, in, out, err, tty, resize)
}

func (a adapter) AttachContainer(ctx context.Context, _, _, container string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return a.Attach(ctx, container, in, out, err, tty, resize)
}

func (a adapter) PortForward(ctx context.Context, pod, _ string, port int32, stream io.ReadWriteCloser) error {
	return a.Runtime.PortForward(ctx, pod, port, stream)
}

// watch gives a request a context that ends when its client disconnects. After
// a connection has been taken over for streaming net/http no longer looks at
// it, so that an attach to a silent container would stay for ever.
func watch(w http.ResponseWriter, r *http.Request) (http.ResponseWriter, *http.Request, func()) {
	ctx, cancel := context.WithCancel(r.Context())
	return watched{w, ctx, cancel}, r.WithContext(ctx), cancel
}

type watched struct {
	http.ResponseWriter
	ctx    context.Context // ends with the request
	cancel func()
}

// Hijack implements http.Hijacker.
func (w watched) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	c := &watchedConn{Conn: conn, cancel: w.cancel}
	go c.heed(w.ctx)
	// What the client has sent already is in the reader's buffer.
	var early io.Reader
	if n := rw.Reader.Buffered(); n > 0 {
		b, _ := rw.Reader.Peek(n)
		early = strings.NewReader(string(b))
	}
	if early != nil {
		rw.Reader.Reset(io.MultiReader(early, c))
	} else {
		rw.Reader.Reset(c)
	}
	rw.Writer.Reset(c)
	return c, rw, nil
}

// Unwrap lets http.ResponseController through.
func (w watched) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Flush implements http.Flusher.
func (w watched) Flush() { _ = http.NewResponseController(w.ResponseWriter).Flush() }

type watchedConn struct {
	net.Conn
	cancel func()
	reads  atomic.Int64
}

// lookAfter is how often a connection is looked at whether its client has gone.
const lookAfter = time.Second

// heed notes the end of a connection that nobody reads: what the client has sent
// last may lie in front of it for ever where the process takes no input.
func (c *watchedConn) heed(ctx context.Context) {
	tick := time.NewTicker(lookAfter)
	defer tick.Stop()
	for seen := c.reads.Load(); ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		now := c.reads.Load()
		if now == seen && hungUp(c.Conn) {
			c.cancel()
			return
		}
		seen = now
	}
}

// hungUp says that the peer sends nothing more, whatever is still to be read.
func hungUp(conn net.Conn) bool {
	for { // TLS, a limit
		above, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		conn = above.NetConn()
	}
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return false // a tunnel: its own connection is watched
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	up := false
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		up = err == nil && n > 0 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
	})
	return up || err != nil
}

// Read notes the end of the connection.
func (c *watchedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.reads.Add(1)
	if err != nil {
		c.cancel()
	}
	return n, err
}

// Close ends the context as well.
func (c *watchedConn) Close() error {
	c.cancel()
	return c.Conn.Close()
}

// streams of a v5 connection.
type streams struct {
	in       io.Reader
	out, err io.WriteCloser
	resize   <-chan remotecommand.TerminalSize
}

// serveV5 speaks v5.channel.k8s.io: each message begins with its channel's
// number; 255 closes the channel named by the next byte.
func serveV5(w http.ResponseWriter, r *http.Request, opts *remotecommand.Options, idle time.Duration, run func(context.Context, *streams) error) {
	channels := make([]wsstream.ChannelType, 5)
	channels[remotecommand.StreamStdIn] = when(opts.Stdin, wsstream.ReadChannel)
	channels[remotecommand.StreamStdOut] = when(opts.Stdout, wsstream.WriteChannel)
	channels[remotecommand.StreamStdErr] = when(opts.Stderr, wsstream.WriteChannel)
	channels[remotecommand.StreamErr] = wsstream.WriteChannel
	channels[remotecommand.StreamResize] = wsstream.ReadChannel
	conn := wsstream.NewConn(map[string]wsstream.ChannelProtocolConfig{
		remotecommand.StreamProtocolV5Name: {Binary: true, Channels: channels},
	})
	conn.SetIdleTimeout(idle)
	_, ch, err := conn.Open(w, r)
	if err != nil {
		return // the client has been told by the handshake
	}
	defer conn.Close()
	var s streams
	if opts.Stdin {
		s.in = ch[remotecommand.StreamStdIn]
	}
	if opts.Stdout {
		s.out = ch[remotecommand.StreamStdOut]
		_, _ = s.out.Write(nil) // tells the client that the streams are there
	}
	if opts.Stderr {
		s.err = ch[remotecommand.StreamStdErr]
	}
	if opts.TTY {
		s.resize = sizes(r.Context(), ch[remotecommand.StreamResize])
	}
	status := statusOf(run(r.Context(), &s))
	if b, err := json.Marshal(status); err == nil {
		_, _ = ch[remotecommand.StreamErr].Write(b)
	}
}

func when(want bool, t wsstream.ChannelType) wsstream.ChannelType {
	if want {
		return t
	}
	return wsstream.IgnoreChannel
}

// sizes decodes window sizes until the stream or the context ends.
func sizes(ctx context.Context, from io.Reader) <-chan remotecommand.TerminalSize {
	out := make(chan remotecommand.TerminalSize)
	go func() {
		defer close(out)
		for d := json.NewDecoder(from); ; {
			var size remotecommand.TerminalSize
			if d.Decode(&size) != nil {
				return
			}
			select {
			case out <- size:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// statusOf is how a stream ended, as the error channel carries it.
func statusOf(err error) *metav1.Status {
	var exit utilexec.ExitError
	switch {
	case err == nil:
		return &metav1.Status{Status: metav1.StatusSuccess}
	case errors.As(err, &exit) && exit.Exited():
		return &metav1.Status{
			Status: metav1.StatusFailure, Reason: remotecommand.NonZeroExitCodeReason,
			Details: &metav1.StatusDetails{Causes: []metav1.StatusCause{{
				Type: remotecommand.ExitCodeCauseType, Message: fmt.Sprint(exit.ExitStatus()),
			}}},
			Message: fmt.Sprintf("command terminated with non-zero exit code: %v", exit),
		}
	}
	return &metav1.Status{
		Status: metav1.StatusFailure, Reason: metav1.StatusReasonInternalError, Code: http.StatusInternalServerError,
		Message: fmt.Sprintf("Internal error occurred: %v", err),
	}
}

// tunnelProtocol is SPDY's port-forward inside one WebSocket.
const tunnelProtocol = "SPDY/3.1+" + portforward.ProtocolV1Name

func wantsTunnel(r *http.Request) bool {
	if !wsstream.IsWebSocketRequest(r) {
		return false
	}
	for _, h := range r.Header.Values("Sec-WebSocket-Protocol") {
		for p := range strings.SplitSeq(h, ",") {
			if strings.TrimSpace(p) == tunnelProtocol {
				return true
			}
		}
	}
	return false
}

// tunnel takes the WebSocket for a plain connection and serves on it what a
// SPDY client would have asked for.
func tunnel(w http.ResponseWriter, r *http.Request, serve http.HandlerFunc) {
	websocket.Server{
		Handshake: func(c *websocket.Config, _ *http.Request) error {
			c.Protocol = []string{tunnelProtocol}
			return nil
		},
		Handler: func(ws *websocket.Conn) {
			ws.PayloadType = websocket.BinaryFrame
			inner := r.Clone(r.Context())
			inner.Method = http.MethodPost
			inner.Header = http.Header{
				"Connection": {"Upgrade"}, "Upgrade": {"SPDY/3.1"},
				"X-Stream-Protocol-Version": {portforward.ProtocolV1Name},
			}
			serve(&tunnelled{conn: ws, header: make(http.Header)}, inner)
		},
	}.ServeHTTP(w, r)
}

// tunnelled answers an upgrade that has happened outside: its headers go
// nowhere, and the connection is the WebSocket.
type tunnelled struct {
	conn   *websocket.Conn
	header http.Header
	once   sync.Once
}

func (t *tunnelled) Header() http.Header         { return t.header }
func (t *tunnelled) Write(p []byte) (int, error) { return len(p), nil }

// WriteHeader ends the connection where the upgrade was refused.
func (t *tunnelled) WriteHeader(code int) {
	if code != http.StatusSwitchingProtocols {
		t.once.Do(func() { _ = t.conn.Close() })
	}
}

// Hijack implements http.Hijacker.
func (t *tunnelled) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return t.conn, bufio.NewReadWriter(bufio.NewReader(t.conn), bufio.NewWriter(t.conn)), nil
}
