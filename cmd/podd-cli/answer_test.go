package main

import (
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/podd-runtime/podd/kubelet/server/api"
)

// deaf is a daemon that takes connections and answers only what hears says.
func deaf(t *testing.T, hears func(path string) bool) *daemon {
	t.Helper()
	d := &daemon{dir: t.TempDir()}
	l, err := api.Listen(filepath.Join(d.dir, api.SocketName))
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !hears(r.URL.Path) {
			select {
			case <-over:
			case <-r.Context().Done():
			}
		}
	})}
	go srv.Serve(l)
	t.Cleanup(func() { close(over); srv.Close() })
	return d
}

// impatient makes clients give up soon.
func impatient(t *testing.T) {
	answer, stop, look := answerTime, stoppedTime, lookEvery
	answerTime, stoppedTime, lookEvery = 300*time.Millisecond, 50*time.Millisecond, 50*time.Millisecond
	t.Cleanup(func() { answerTime, stoppedTime, lookEvery = answer, stop, look })
}

var everyVerb = [][]string{
	{"get", "pods"}, {"describe", "pod", "web"}, {"logs", "-f", "web"}, {"exec", "web", "--", "true"}, {"attach", "web"},
	{"port-forward", "web", ":80"}, {"events"}, {"why"}, {"why", "web"}, {"stop", "web"}, {"stop", "--all"}, {"start", "web"},
	{"restart", "web"}, {"images"}, {"status"}, {"version"},
}

// TestNoClientWaitsForADaemonThatDoesNotAnswer: each says whom it waits for, and
// comes to an end.
func TestNoClientWaitsForADaemonThatDoesNotAnswer(t *testing.T) {
	impatient(t)
	d := deaf(t, func(string) bool { return false })
	for _, args := range everyVerb {
		var said buffer
		begin := time.Now()
		err := d.run(t.Context(), strings.NewReader(""), io.Discard, &said, args...)
		if err == nil || !strings.Contains(err.Error(), "does not answer at "+d.dir) {
			t.Errorf("podd %s: %v", strings.Join(args, " "), err)
		}
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("podd %s took %v", strings.Join(args, " "), took)
		}
		if !strings.HasPrefix(said.String(), "waiting for the podd daemon, process ") || strings.Count(said.String(), "\n") != 1 {
			t.Errorf("podd %s said: %q", strings.Join(args, " "), said.String())
		}
	}
}

// A daemon may go deaf with a request in its hands: that one ends too, and one
// that only takes long does not.
func TestARequestEndsWhenItsDaemonAnswersNobody(t *testing.T) {
	impatient(t)
	c := &client{}
	serve := func(hears func(string) bool) {
		c.runDir = deaf(t, hears).dir
	}
	first := true
	serve(func(path string) bool {
		was := first
		first = false
		return was && path == "/healthz"
	})
	if err := c.reach(t.Context()); err != nil {
		t.Fatal(err)
	}
	var e *silent
	if err := c.do(t.Context(), "POST", "/stop", nil, nil, nil); !errors.As(err, &e) {
		t.Errorf("the daemon is deaf: %v", err)
	}
	begin := time.Now()
	serve(func(path string) bool { return path == "/healthz" || time.Since(begin) > time.Second })
	ended := make(chan error, 1)
	go func() { ended <- c.do(t.Context(), "POST", "/stop", nil, nil, nil) }()
	select {
	case err := <-ended:
		t.Errorf("a daemon that takes long: %v", err)
	case <-time.After(2 * answerTime):
	}
}

func TestADaemonWithAFullBacklogDoesNotAnswer(t *testing.T) {
	impatient(t)
	c := &client{runDir: t.TempDir()}
	l, err := net.Listen("unix", filepath.Join(c.runDir, api.SocketName))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // which accepts nobody
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	for range 1 << 16 { // net.core.somaxconn bounds it
		conn, err := net.DialTimeout("unix", l.Addr().String(), 100*time.Millisecond)
		if err != nil {
			break
		}
		conns = append(conns, conn)
	}
	var e *silent
	if err := c.reach(t.Context()); !errors.As(err, &e) {
		t.Errorf("got %v", err)
	}
}

func TestStatusCountsWhatIsWrongAmongPods(t *testing.T) {
	st := &api.Status{Pods: map[string]int{"Running": 12, "Pending": 1, "Succeeded": 2},
		Troubled: map[string]map[string]int{"Running": {"NotReady": 1, "CrashLoopBackOff": 2}, "Pending": {"ImagePullBackOff": 1}}}
	if got := podCounts(st); got != "1 Pending (1 ImagePullBackOff), 12 Running (1 NotReady, 2 CrashLoopBackOff), 2 Succeeded" {
		t.Errorf("got %q", got)
	}
	if got := podCounts(&api.Status{}); got != "none" {
		t.Errorf("got %q", got)
	}
}
