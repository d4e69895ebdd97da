package probes

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpchealth "google.golang.org/grpc/health/grpc_health_v1"
	grpcstatus "google.golang.org/grpc/status"
	"k8s.io/kubernetes/pkg/probe"
	httpprobe "k8s.io/kubernetes/pkg/probe/http"
)

// late is how far past its timeout a failure may come and still be the
// target's. The timer of a probe is the node's: when it fires later than this,
// podd was stopped or starved, and an answer may have waited unread.
const late = time.Second

// Unasked says that err is the node's own: it had no descriptor, memory, port
// or way for the connection, or its name server did not answer. The question
// never reached whom it was for, so that nothing is known of him.
func Unasked(err error) bool {
	for _, e := range []syscall.Errno{
		syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS, // socket(2)
		syscall.EADDRNOTAVAIL, syscall.EAGAIN, // connect(2): no local port is free
		syscall.ENETUNREACH, syscall.ENETDOWN, // no route here
		syscall.EPERM, syscall.EACCES, // a packet filter of this host, or its full connection table
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	var dns *net.DNSError
	return errors.As(err, &dns) && !dns.IsNotFound
}

// network makes httpGet, tcpSocket and grpc probes as upstream's probers do,
// which take every error for the target's.
type network struct {
	client http.RoundTripper
	dial   dialer
}

type dialer func(ctx context.Context, network, addr string) (net.Conn, error)

func newNetwork(dial dialer) network {
	return network{dial: dial, client: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true, Proxy: http.ProxyURL(nil),
		DisableCompression: true, ForceAttemptHTTP2: true, TLSHandshakeTimeout: 10 * time.Second,
		DialContext: dial,
	}}
}

// asker keeps the error of a request.
type asker struct {
	http.Client
	err error
}

// Do implements httpprobe.GetHTTPInterface.
func (a *asker) Do(r *http.Request) (*http.Response, error) {
	resp, err := a.Client.Do(r)
	a.err = err
	return resp, err
}

func (n *network) get(req *http.Request, timeout time.Duration) (probe.Result, string, error) {
	begin := time.Now()
	a := &asker{Client: http.Client{Timeout: timeout, Transport: n.client, CheckRedirect: httpprobe.RedirectChecker(false)}}
	r, out, err := httpprobe.DoHTTPProbe(req, a)
	if err != nil || a.err == nil {
		return r, out, err
	}
	return judged(a.err, begin, timeout, out)
}

func (n *network) connect(addr string, timeout time.Duration) (probe.Result, string, error) {
	begin := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	conn, err := n.dial(ctx, "tcp", addr)
	if err != nil {
		return judged(err, begin, timeout, err.Error())
	}
	conn.Close()
	return probe.Success, "", nil
}

// judged is what an error says of the target: a failure with its text, or
// nothing.
func judged(err error, begin time.Time, timeout time.Duration, text string) (probe.Result, string, error) {
	switch took := time.Since(begin); {
	case Unasked(err):
		return probe.Unknown, "", fmt.Errorf("the node could not ask: %w", err)
	case took > timeout+late:
		return probe.Unknown, "", fmt.Errorf("the node was %v late to look for an answer: %w", (took - timeout).Round(time.Millisecond), err)
	}
	return probe.Failure, text, nil
}

// health asks by grpc.health.v1. The words are upstream's.
func (n *network) health(addr, service string, timeout time.Duration) (probe.Result, string, error) {
	begin := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var own atomic.Pointer[error] // of the last dial
	var connected atomic.Bool
	conn, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithUserAgent("kube-probe/"+version), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			c, err := n.dial(ctx, "tcp", addr)
			own.Store(&err)
			switch {
			case err == nil:
				connected.Store(true)
			case Unasked(err):
				cancel() // grpc would try until the time is over
			}
			return c, err
		}))
	if err != nil {
		return probe.Unknown, "", fmt.Errorf("grpc client for %s: %w", addr, err)
	}
	defer conn.Close()
	resp, err := grpchealth.NewHealthClient(conn).Check(ctx, &grpchealth.HealthCheckRequest{Service: service}, grpc.WaitForReady(true))
	switch {
	case err == nil && resp.GetStatus() == grpchealth.HealthCheckResponse_SERVING:
		return probe.Success, "service healthy", nil
	case err == nil:
		return probe.Failure, fmt.Sprintf("service unhealthy (responded with %q)", resp.GetStatus().String()), nil
	}
	if e := own.Load(); e != nil && *e != nil && !connected.Load() && Unasked(*e) {
		err = *e
	}
	text := fmt.Sprintf("error: health rpc probe failed: %+v", err)
	switch code := grpcstatus.Code(err); {
	case code == codes.Unimplemented:
		text = fmt.Sprintf("error: this server does not implement the grpc health protocol (grpc.health.v1.Health): %s", grpcstatus.Convert(err).Message())
	case code == codes.DeadlineExceeded && connected.Load():
		text = fmt.Sprintf("timeout: health rpc did not complete within %v", timeout)
	case code == codes.DeadlineExceeded:
		text = fmt.Sprintf("timeout: failed to connect service %q within %v: %+v", addr, timeout, context.DeadlineExceeded)
	}
	return judged(err, begin, timeout, text)
}
