package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/netns"
)

const (
	// dialTimeout bounds a connection to a port of a pod: it is on this node.
	dialTimeout = 10 * time.Second
	// lingerTime is how long the other direction may be silent after the
	// client has closed its stream.
	lingerTime = time.Second
)

// PortForward returns the URL at which a client reaches ports of a pod.
func (s *Service) PortForward(_ context.Context, r *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	sb, err := s.objects.sandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if _, ready := sb.isReady(); !ready {
		return nil, fmt.Errorf("sandbox %s is not ready: %w", sb.id, errdefs.ErrFailedPrecondition)
	}
	for _, p := range r.GetPort() {
		if p < 1 || p > 65535 {
			return nil, invalid("port %d: out of range 1 to 65535", p)
		}
	}
	r.PodSandboxId = sb.id
	return s.stream.PortForward(r)
}

// PortForwardStream connects stream with a port on the pod's loopback, first
// IPv4 then IPv6, and returns when both directions have ended or ctx has. An
// error is of the port: nobody listens, or there is no pod. kubectl ends its
// whole forward for one, so that how a single connection broke, at either end,
// is none: its stream ends, and the others go on.
func (s *Service) PortForwardStream(ctx context.Context, sandboxID string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	sb, err := s.objects.sandbox(sandboxID)
	if err != nil {
		return err
	}
	if _, ready := sb.isReady(); !ready {
		return fmt.Errorf("sandbox %s is not ready: %w", sb.id, errdefs.ErrFailedPrecondition)
	}
	if port < 1 || port > 65535 {
		return invalid("port %d: out of range 1 to 65535", port)
	}
	conn, err := s.dialPod(ctx, sb, port)
	if err != nil {
		return fmt.Errorf("port-forward to port %d of sandbox %s: %w", port, sb.id, err)
	}
	defer conn.Close()
	if err := forward(ctx, conn, stream); err != nil {
		s.log.Debug("a forwarded connection broke", "sandbox", sb.id, "port", port, "error", err)
	}
	return nil
}

// forward copies both ways. When the pod closes, the stream is done; when the
// client does, the pod sees the end of the input and may still answer. A pod
// that takes no more may have answered before: that is delivered, too.
func forward(ctx context.Context, conn *net.TCPConn, stream io.ReadWriteCloser) error {
	fromPod, fromClient := make(chan error, 1), make(chan error, 1)
	answer := &lingering{TCPConn: conn}
	go func() {
		_, err := io.Copy(stream, answer)
		fromPod <- err
	}()
	go func() {
		_, err := io.Copy(conn, stream)
		_ = conn.CloseWrite()
		fromClient <- err
	}()
	select {
	case err := <-fromPod:
		return err
	case err := <-fromClient:
		if err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
			return err
		}
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	// The client has closed its side. What the pod still has to say is
	// delivered for as long as it keeps coming.
	answer.linger()
	select {
	case err := <-fromPod:
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// lingering is the pod's side of a connection. After linger each read waits for
// at most lingerTime; what the client takes to accept an answer does not count.
type lingering struct {
	*net.TCPConn
	last atomic.Bool
}

func (l *lingering) linger() {
	l.last.Store(true)
	_ = l.SetReadDeadline(time.Now().Add(lingerTime)) // of the read that waits now
}

// Read implements io.Reader.
func (l *lingering) Read(p []byte) (int, error) {
	if l.last.Load() {
		_ = l.SetReadDeadline(time.Now().Add(lingerTime))
	}
	return l.TCPConn.Read(p)
}

// WriteTo hides TCPConn's, which would not come by Read.
func (l *lingering) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, struct{ io.Reader }{l})
}

// dialPod connects to the pod's loopback.
func (s *Service) dialPod(ctx context.Context, sb *sandbox, port int32) (*net.TCPConn, error) {
	path := ""
	if !sb.hostNetwork() {
		path = s.netnsPath(sb.id)
	}
	var errs []error
	for _, host := range []string{"127.0.0.1", "::1"} {
		conn, err := dialIn(ctx, path, net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// dialIn connects inside a network namespace; "" is this process' own. The
// socket is made by a thread that is in the namespace and belongs to it from
// then on.
func dialIn(ctx context.Context, path, addr string) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var conn net.Conn
	dial := func() (err error) {
		// One literal address: the dialler makes its socket on this thread
		// and starts no other.
		d := net.Dialer{FallbackDelay: -1}
		conn, err = d.DialContext(ctx, "tcp", addr)
		return err
	}
	var err error
	if path == "" {
		err = dial()
	} else {
		err = netns.Do(path, dial)
	}
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}
