package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/podd-runtime/podd/kubelet/server/api"
)

// How long clients wait for a daemon that takes connections and says nothing.
// What they ask for may last as long as it likes, as long as the daemon answers
// others meanwhile.
var (
	// answerTime is what a daemon may take to answer on a machine that is
	// overloaded; one that is stopped gets stoppedTime.
	answerTime  = 15 * time.Second
	stoppedTime = 2 * time.Second
	// lookEvery is how often a request that waits has the daemon looked at.
	lookEvery = 5 * time.Second
)

// silent is the error of a daemon that does not answer.
type silent struct {
	socket string
	pid    int // 0: not known
	waited time.Duration
}

func (e *silent) Error() string {
	who := "the podd daemon"
	if e.pid > 0 {
		who = fmt.Sprintf("the podd daemon, process %d,", e.pid)
	}
	if stopped(e.pid) {
		return fmt.Sprintf("%s is stopped and does not answer at %s; kill -CONT %d lets it go on\nPods go on without it, but nobody restarts or probes their containers", who, e.socket, e.pid)
	}
	return fmt.Sprintf("%s does not answer at %s, waited %v: it hangs, or the machine is overloaded; its log may tell\nPods go on without it", who, e.socket, e.waited.Round(100*time.Millisecond))
}

// stopped says whether a process is (proc_pid_stat(5), states T and t).
func stopped(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if pid <= 0 || err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(text[strings.LastIndexByte(string(text), ')')+1:]), " ")
	return strings.HasPrefix(rest, "T") || strings.HasPrefix(rest, "t")
}

// limit of one question whether the daemon answers: --request-timeout, where
// that is shorter.
func (c *client) limit() time.Duration {
	if d, err := clientcmd.ParseTimeout(c.timeout); err == nil && d > 0 {
		return min(d, answerTime)
	}
	return answerTime
}

// ping the daemon. After stoppedTime it says on say whom it waits for. The error
// is a *silent when somebody is there who does not answer.
func (c *client) ping(ctx context.Context, say io.Writer) error {
	begin := time.Now()
	dead := begin.Add(c.limit())
	dctx, cancel := context.WithDeadline(ctx, dead)
	defer cancel()
	conn, err := api.Dial(dctx, c.socket())
	var timeout net.Error
	if errors.Is(err, syscall.EAGAIN) || errors.As(err, &timeout) && timeout.Timeout() {
		return &silent{socket: c.socket(), waited: time.Since(begin)} // its backlog is full
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	e := &silent{socket: c.socket(), pid: peer(conn)}
	if _, err := io.WriteString(conn, "GET /healthz HTTP/1.0\r\n\r\n"); err != nil {
		return err
	}
	for until := begin.Add(min(stoppedTime, c.limit())); ; until = dead {
		_ = conn.SetReadDeadline(until)
		_, err := conn.Read(make([]byte, 1))
		e.waited = time.Since(begin)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Errorf("ask the daemon at %s: %w", c.socket(), err)
		case until.Equal(dead), stopped(e.pid):
			return e
		}
		if say != nil {
			fmt.Fprintf(say, "waiting for the podd daemon, process %d, to answer at %s\n", e.pid, e.socket)
		}
	}
}

// peer is the process that listens, as the kernel says it; 0: not known.
func peer(conn net.Conn) (pid int) {
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}

// asking gives up a request whose first answer does not come when the daemon
// answers nobody.
type asking struct {
	next http.RoundTripper
	c    *client
}

func (a *asking) WrappedRoundTripper() http.RoundTripper { return a.next }

func (a *asking) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	answered := make(chan struct{})
	go func() {
		tick := time.NewTicker(lookEvery)
		defer tick.Stop()
		for {
			select {
			case <-answered:
				return
			case <-ctx.Done():
				return
			case <-tick.C:
				var e *silent
				if err := a.c.ping(ctx, nil); errors.As(err, &e) {
					cancel(e)
					return
				}
			}
		}
	}()
	resp, err := a.next.RoundTrip(req.WithContext(ctx))
	close(answered)
	if err != nil {
		var e *silent
		if errors.As(context.Cause(ctx), &e) {
			err = e
		}
		cancel(nil)
		return nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols { // whose body is the connection
		resp.Body = &cancelling{resp.Body, cancel}
	}
	return resp, nil
}

// cancelling ends a request's context with its body.
type cancelling struct {
	io.ReadCloser
	cancel context.CancelCauseFunc
}

func (b *cancelling) Close() error {
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}

// slow is after how long a command that waits says for what.
const slow = time.Second

// slowly does f, and has tell tell when it takes long.
func slowly(f func() error, tell func()) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	late := time.NewTimer(slow)
	defer late.Stop()
	select {
	case err := <-done:
		return err
	case <-late.C:
		tell()
	}
	return <-done
}
