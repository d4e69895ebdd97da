package streaming

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	client "k8s.io/client-go/tools/remotecommand"
	clientspdy "k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/cert"
	utilexec "k8s.io/client-go/util/exec"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	serverexec "k8s.io/utils/exec"
)

// echo is a Runtime: what comes in goes out, after the command.
type echo struct {
	ended chan error // an attach reports how its context ended
}

func (e echo) Exec(ctx context.Context, id string, cmd []string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	fmt.Fprintf(out, "%s %s\n", id, strings.Join(cmd, " "))
	if resize != nil {
		// A WebSocket carries input and sizes in one sequence, and its client
		// sends them in either order: take the input while waiting for the size.
		if in != nil {
			r, w := io.Pipe()
			defer r.Close()
			go func(from io.Reader) {
				b, err := io.ReadAll(from)
				if err == nil {
					_, err = w.Write(b)
				}
				w.CloseWithError(err)
			}(in)
			in = r
		}
		size := <-resize
		fmt.Fprintf(out, "%dx%d\n", size.Width, size.Height)
	}
	if in != nil {
		if _, err := io.Copy(out, in); err != nil {
			return err
		}
	}
	if errOut != nil {
		fmt.Fprint(errOut, "err\n")
	}
	switch cmd[0] {
	case "three":
		return serverexec.CodeExitError{Err: errors.New("exit"), Code: 3}
	case "boom":
		return errors.New("boom")
	}
	return nil
}

func (e echo) Attach(ctx context.Context, id string, in io.Reader, out, errOut io.WriteCloser, tty bool, _ <-chan remotecommand.TerminalSize) error {
	fmt.Fprint(out, "attached\n")
	<-ctx.Done()
	e.ended <- ctx.Err()
	return nil
}

func (e echo) PortForward(ctx context.Context, id string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	b := make([]byte, 4)
	if _, err := io.ReadFull(stream, b); err != nil {
		return err
	}
	_, err := fmt.Fprintf(stream, "%s %d %s", id, port, b)
	return err
}

func newServer(t *testing.T) (*Server, echo) {
	e := echo{ended: make(chan error, 1)}
	s := New("127.0.0.1:0", KeyPair{}, e)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, e
}

func executor(t *testing.T, transport, raw string) client.Executor {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	var e client.Executor
	if transport == "websocket" {
		e, err = client.NewWebSocketExecutor(&rest.Config{Host: u.Host}, "GET", raw)
	} else {
		e, err = client.NewSPDYExecutor(&rest.Config{Host: u.Host}, "POST", u)
	}
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestExec(t *testing.T) {
	for _, transport := range []string{"spdy", "websocket"} {
		t.Run(transport, func(t *testing.T) {
			s, _ := newServer(t)
			run := func(cmd string, stdin io.Reader, tty bool, size client.TerminalSizeQueue) (string, string, error) {
				r, err := s.Exec(&runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{cmd}, Stdin: stdin != nil, Stdout: true, Stderr: !tty, Tty: tty})
				if err != nil {
					t.Fatal(err)
				}
				var out, errOut bytes.Buffer
				o := client.StreamOptions{Stdin: stdin, Stdout: &out, Tty: tty, TerminalSizeQueue: size}
				if !tty {
					o.Stderr = &errOut
				}
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				err = executor(t, transport, r.Url).StreamWithContext(ctx, o)
				return out.String(), errOut.String(), err
			}
			// The input ends and the output goes on: half-closed.
			big := strings.Repeat("x", 1<<20)
			if out, errOut, err := run("zero", strings.NewReader(big), false, nil); err != nil || out != "c1 zero\n"+big || errOut != "err\n" {
				t.Errorf("%d bytes, %q, %v", len(out), errOut, err)
			}
			var code utilexec.CodeExitError
			if _, _, err := run("three", nil, false, nil); !errors.As(err, &code) || code.Code != 3 {
				t.Errorf("exit code: %v", err)
			}
			if _, _, err := run("boom", nil, false, nil); err == nil || !strings.Contains(err.Error(), "boom") {
				t.Errorf("failure: %v", err)
			}
			if out, _, err := run("tty", strings.NewReader("in"), true, once{Width: 91, Height: 33}.queue()); err != nil || out != "c1 tty\n91x33\nin" {
				t.Errorf("terminal: %q, %v", out, err)
			}
		})
	}
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	pair := KeyPair{CertFile: filepath.Join(dir, "crt.pem"), KeyFile: filepath.Join(dir, "key.pem")}
	if err := pair.Check(); err == nil || !strings.Contains(err.Error(), pair.CertFile) {
		t.Errorf("absent files: %v", err)
	}
	if err := (KeyPair{CertFile: pair.CertFile}).Check(); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no key: %v", err)
	}
	s := New("127.0.0.1:0", pair, echo{})
	defer s.Close()
	for _, host := range []string{"before.test", "renewed.test"} {
		pemCert, pemKey, err := cert.GenerateSelfSignedCertKey(host, []net.IP{net.IPv4(127, 0, 0, 1)}, nil)
		if err != nil {
			t.Fatal(err)
		}
		for path, b := range map[string][]byte{pair.CertFile: pemCert, pair.KeyFile: pemKey} {
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := pair.Check(); err != nil {
			t.Fatal(err)
		}
		// A client that trusts this certificate alone.
		config := func(u *url.URL) *rest.Config {
			return &rest.Config{Host: "https://" + u.Host, TLSClientConfig: rest.TLSClientConfig{CAData: pemCert, ServerName: host}}
		}
		for _, transport := range []string{"spdy", "websocket"} {
			r, err := s.Exec(&runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"tls"}, Stdout: true})
			if err != nil {
				t.Fatal(err)
			}
			u, err := url.Parse(r.Url)
			if err != nil || u.Scheme != "https" {
				t.Fatalf("%s: %v", r.Url, err)
			}
			var e client.Executor
			if transport == "websocket" {
				e, err = client.NewWebSocketExecutor(config(u), "GET", r.Url)
			} else {
				e, err = client.NewSPDYExecutor(config(u), "POST", u)
			}
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			if err := e.StreamWithContext(t.Context(), client.StreamOptions{Stdout: &out}); err != nil || out.String() != "c1 tls\n" {
				t.Errorf("%s, %s: %q, %v", host, transport, &out, err)
			}
		}
	}
}

// once is a terminal that has one size.
type once client.TerminalSize

func (o once) queue() *sizeQueue { return &sizeQueue{size: client.TerminalSize(o)} }

type sizeQueue struct {
	size client.TerminalSize
	done bool
}

func (q *sizeQueue) Next() *client.TerminalSize {
	if q.done {
		return nil
	}
	q.done = true
	return &q.size
}

func TestDisconnectEndsTheStream(t *testing.T) {
	for _, transport := range []string{"spdy", "websocket"} {
		t.Run(transport, func(t *testing.T) {
			s, e := newServer(t)
			r, err := s.Attach(&runtimeapi.AttachRequest{ContainerId: "c1", Stdout: true})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			seen, w := io.Pipe()
			go func() {
				_, _ = io.ReadFull(seen, make([]byte, len("attached\n")))
				cancel()
			}()
			_ = executor(t, transport, r.Url).StreamWithContext(ctx, client.StreamOptions{Stdout: w})
			select {
			case err := <-e.ended:
				if !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			case <-time.After(10 * time.Second):
				t.Error("the stream goes on without its client")
			}
		})
	}
}

func TestPortForward(t *testing.T) {
	for _, transport := range []string{"spdy", "websocket"} {
		t.Run(transport, func(t *testing.T) {
			s, _ := newServer(t)
			r, err := s.PortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "p1"})
			if err != nil {
				t.Fatal(err)
			}
			u, _ := url.Parse(r.Url)
			cfg := &rest.Config{Host: u.Host}
			tr, up, err := clientspdy.RoundTripperFor(cfg)
			if err != nil {
				t.Fatal(err)
			}
			dialer := clientspdy.NewDialer(up, &http.Client{Transport: tr}, "POST", u)
			if transport == "websocket" {
				if dialer, err = portforward.NewSPDYOverWebsocketDialer(u, cfg); err != nil {
					t.Fatal(err)
				}
			}
			conn, _, err := dialer.Dial(portforward.PortForwardProtocolV1Name)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			for _, port := range []string{"80", "8080"} {
				h := http.Header{}
				h.Set(corev1.StreamType, corev1.StreamTypeError)
				h.Set(corev1.PortHeader, port)
				h.Set(corev1.PortForwardRequestIDHeader, port)
				errStream, err := conn.CreateStream(h)
				if err != nil {
					t.Fatal(err)
				}
				_ = errStream.Close()
				h.Set(corev1.StreamType, corev1.StreamTypeData)
				data, err := conn.CreateStream(h)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.WriteString(data, "ping"); err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(data)
				if err != nil || string(got) != "p1 "+port+" ping" {
					t.Errorf("%q, %v", got, err)
				}
				if msg, _ := io.ReadAll(errStream); len(msg) > 0 {
					t.Errorf("error stream: %s", msg)
				}
			}
		})
	}
}

func TestTokensAreForOneClient(t *testing.T) {
	s, _ := newServer(t)
	r, err := s.Exec(&runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"x"}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	get := func(u string) int {
		resp, err := http.Get(u)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	// A token of one method is none of another.
	if code := get(strings.Replace(r.Url, "/exec/", "/attach/", 1)); code != http.StatusNotFound {
		t.Errorf("as an attach: %d", code)
	}
	if code := get(r.Url); code == http.StatusNotFound { // no upgrade, but known
		t.Errorf("first: %d", code)
	}
	if code := get(r.Url); code != http.StatusNotFound {
		t.Errorf("second: %d", code)
	}
	if r, err = s.Exec(&runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"x"}, Stdout: true}); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	for k, w := range s.waiting {
		w.expires = time.Now().Add(-time.Second)
		s.waiting[k] = w
	}
	s.mu.Unlock()
	if code := get(r.Url); code != http.StatusNotFound {
		t.Errorf("expired: %d", code)
	}
}

func TestWaitingURLsAreBounded(t *testing.T) {
	s, _ := newServer(t)
	req := &runtimeapi.AttachRequest{ContainerId: "c1", Stdout: true}
	for range maxTokens {
		if _, err := s.Attach(req); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Attach(req); !errdefs.IsResourceExhausted(err) {
		t.Errorf("one more: %v", err)
	}
	s.mu.Lock()
	for k, w := range s.waiting {
		w.expires = time.Now().Add(-time.Second)
		s.waiting[k] = w
	}
	s.mu.Unlock()
	if _, err := s.Attach(req); err != nil {
		t.Errorf("after they expired: %v", err)
	}
}

func TestSenselessRequests(t *testing.T) {
	s, _ := newServer(t)
	if _, err := s.Exec(&runtimeapi.ExecRequest{Stdout: true, Stderr: true, Tty: true}); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if _, err := s.Attach(&runtimeapi.AttachRequest{}); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Attach(&runtimeapi.AttachRequest{Stdout: true}); !errdefs.IsUnavailable(err) {
		t.Errorf("after Close: %v", err)
	}
}
