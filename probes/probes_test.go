package probes

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func TestThresholds(t *testing.T) {
	for _, tc := range []struct {
		name          string
		success, fail int32
		in            string // + and -
		want          string // what counts: the outcome, or . for not yet
	}{
		{"one of each", 1, 1, "+-+", "+-+"},
		{"three failures", 1, 3, "+--+---", "+..+..-"},
		{"two successes", 2, 1, "+-++", ".-.+"},
		{"zero is one", 0, 0, "+-", "+-"},
		{"beyond the threshold it goes on counting", 1, 2, "----", ".---"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var r run
			got := ""
			for _, c := range tc.in {
				var enough bool
				r, enough = r.next(c == '+', tc.success, tc.fail)
				if enough {
					got += string(c)
				} else {
					got += "."
				}
			}
			if got != tc.want {
				t.Errorf("%s, want %s", got, tc.want)
			}
		})
	}
}

// fake runs commands: fn decides.
type fake struct {
	fn     func(ctx context.Context, id, cmd string) (int32, error)
	active atomic.Int32
	peak   atomic.Int32
	calls  atomic.Int32
}

func (f *fake) Exec(ctx context.Context, id string, cmd []string, _ time.Duration) ([]byte, int32, error) {
	f.calls.Add(1)
	n := f.active.Add(1)
	defer f.active.Add(-1)
	for {
		p := f.peak.Load()
		if n <= p || f.peak.CompareAndSwap(p, n) {
			break
		}
	}
	code, err := f.fn(ctx, id, strings.Join(cmd, " "))
	return []byte("out"), code, err
}

type sink struct {
	mu      sync.Mutex
	results []string
	events  []string
	start   time.Time
	slow    time.Duration // that an event takes
}

func (s *sink) report(r Result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.results = append(s.results, fmt.Sprintf("%s %s %v at %s", r.ID, r.Kind, r.OK, time.Since(s.start)))
}

func (s *sink) Eventf(_ *v1.ObjectReference, _, reason, format string, args ...any) {
	time.Sleep(s.slow)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, reason+": "+fmt.Sprintf(format, args...))
}

func execProbe(cmd string, period, delay, fails int32) *v1.Probe {
	return &v1.Probe{ProbeHandler: v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{cmd}}}, PeriodSeconds: period, InitialDelaySeconds: delay, TimeoutSeconds: 1, SuccessThreshold: 1, FailureThreshold: fails}
}

func bubble(t *testing.T, fn func(ctx context.Context, id, cmd string) (int32, error), f func(t *testing.T, s *Scheduler, k *sink, x *fake)) {
	synctest.Test(t, func(t *testing.T) {
		x := &fake{fn: fn}
		k := &sink{start: time.Now()}
		s := New(Config{Exec: x, Events: k, Report: k.report, ParallelExec: 4})
		s.jitter = func() float64 { return 0.5 }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.Run(ctx) }()
		defer func() { cancel(); <-done }()
		f(t, s, k, x)
	})
}

func (k *sink) want(t *testing.T, want ...string) {
	t.Helper()
	synctest.Wait()
	k.mu.Lock()
	defer k.mu.Unlock()
	if fmt.Sprint(k.results) != fmt.Sprint(want) {
		t.Errorf("results %q\nwant    %q", k.results, want)
	}
}

func TestStartupThenTheOthers(t *testing.T) {
	var up atomic.Bool
	bubble(t, func(_ context.Context, _, cmd string) (int32, error) {
		if cmd == "start" && !up.Load() {
			return 1, nil
		}
		return 0, nil
	}, func(t *testing.T, s *Scheduler, k *sink, _ *fake) {
		s.Add(Target{ID: "c", Container: &v1.Container{StartupProbe: execProbe("start", 2, 1, 10), LivenessProbe: execProbe("live", 5, 0, 3), ReadinessProbe: execProbe("ready", 5, 0, 3)}, Started: time.Now()})
		time.Sleep(4 * time.Second)
		k.want(t)
		up.Store(true)
		time.Sleep(10 * time.Second)
		k.want(t, "c Startup true at 5s", "c Readiness true at 5s")
	})
}

func TestLivenessFailsOnceAndRests(t *testing.T) {
	bubble(t, func(context.Context, string, string) (int32, error) { return 1, nil }, func(t *testing.T, s *Scheduler, k *sink, x *fake) {
		s.Add(Target{ID: "c", Container: &v1.Container{LivenessProbe: execProbe("live", 1, 2, 3)}, Started: time.Now()})
		time.Sleep(time.Minute)
		k.want(t, "c Liveness false at 4s")
		if n := x.calls.Load(); n != 3 {
			t.Errorf("%d probes, want none after the verdict", n)
		}
		if k.events[0] != "Unhealthy: Liveness probe failed: out" {
			t.Errorf("events %q", k.events)
		}
	})
}

func TestErrorsAreNotOutcomes(t *testing.T) {
	bubble(t, func(context.Context, string, string) (int32, error) { return 0, errors.New("no shim") }, func(t *testing.T, s *Scheduler, k *sink, x *fake) {
		s.Add(Target{ID: "c", Container: &v1.Container{LivenessProbe: execProbe("live", 1, 0, 1)}, Started: time.Now()})
		time.Sleep(10500 * time.Millisecond)
		k.want(t)
		if n := x.calls.Load(); n != 11*retries {
			t.Errorf("%d tries", n)
		}
	})
}

func TestTimeoutIsAFailure(t *testing.T) {
	bubble(t, func(context.Context, string, string) (int32, error) {
		return 0, grpcstatus.Error(codes.DeadlineExceeded, "killed")
	}, func(t *testing.T, s *Scheduler, k *sink, _ *fake) {
		s.Add(Target{ID: "c", Container: &v1.Container{LivenessProbe: execProbe("live", 1, 0, 1)}, Started: time.Now()})
		time.Sleep(time.Second / 2)
		k.want(t, "c Liveness false at 0s")
		if want := `Unhealthy: Liveness probe failed: command timed out: ["live"] timed out after 1s`; k.events[0] != want {
			t.Errorf("event %q", k.events[0])
		}
	})
}

func TestRestoredStateSaysNothingNew(t *testing.T) {
	bubble(t, func(context.Context, string, string) (int32, error) { return 0, nil }, func(t *testing.T, s *Scheduler, k *sink, x *fake) {
		s.Add(Target{ID: "c", Container: &v1.Container{StartupProbe: execProbe("start", 1, 0, 1), ReadinessProbe: execProbe("ready", 10, 30, 1)},
			Started: time.Now().Add(-time.Hour), Restored: &State{Started: true, Ready: true}})
		time.Sleep(600 * time.Millisecond)
		synctest.Wait()
		if x.calls.Load() != 1 {
			t.Errorf("%d probes within a second", x.calls.Load())
		}
		time.Sleep(time.Minute)
		k.want(t)
	})
}

func TestRemovedIsNotReported(t *testing.T) {
	bubble(t, func(ctx context.Context, _, _ string) (int32, error) {
		time.Sleep(500 * time.Millisecond)
		return 1, nil
	}, func(t *testing.T, s *Scheduler, k *sink, x *fake) {
		s.Add(Target{ID: "c", Container: &v1.Container{LivenessProbe: execProbe("live", 1, 0, 1)}, Started: time.Now()})
		time.Sleep(100 * time.Millisecond)
		s.Remove("c")
		time.Sleep(time.Minute)
		k.want(t)
		if x.calls.Load() != 1 || len(s.targets) != 0 || len(s.queue) != 0 {
			t.Errorf("%d calls, %d targets, %d queued", x.calls.Load(), len(s.targets), len(s.queue))
		}
	})
}

// On a busy node it may take longer than a period to tell an outcome: the next
// one is not told before.
func TestOutcomesAreToldInOrder(t *testing.T) {
	calls := 0
	bubble(t, func(context.Context, string, string) (int32, error) {
		calls++
		if calls == 2 {
			return 1, nil
		}
		return 0, nil
	}, func(t *testing.T, s *Scheduler, k *sink, x *fake) {
		k.slow = 2500 * time.Millisecond
		s.Add(Target{ID: "c", Container: &v1.Container{ReadinessProbe: execProbe("ready", 1, 0, 1)}, Started: time.Now()})
		time.Sleep(time.Minute)
		k.want(t, "c Readiness true at 0s", "c Readiness false at 3.5s", "c Readiness true at 4.5s")
	})
}

// A node that could not ask knows nothing: such probes change no one's state.
func TestProbesThatCouldNotBeMadeAreUnknown(t *testing.T) {
	for name, fn := range map[string]func(ctx context.Context, id, cmd string) (int32, error){
		"the runtime is not there": func(context.Context, string, string) (int32, error) {
			return 0, fmt.Errorf("connect: %w", errdefs.ErrUnavailable)
		},
		"the runtime does not answer": func(ctx context.Context, _, _ string) (int32, error) { <-ctx.Done(); return 0, ctx.Err() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, fn, func(t *testing.T, s *Scheduler, k *sink, x *fake) {
				c := &v1.Container{LivenessProbe: execProbe("live", 1, 0, 1), ReadinessProbe: execProbe("ready", 1, 0, 1)}
				s.Add(Target{ID: "c", Container: c, Started: time.Now(), Restored: &State{Started: true, Ready: true}})
				time.Sleep(5 * time.Minute)
				k.want(t)
			})
		})
	}
}

func TestNetworkProbesThatTheNodeCouldNotMakeAreUnknown(t *testing.T) {
	c := &v1.Container{}
	handlers := map[string]v1.ProbeHandler{
		"http": {HTTPGet: &v1.HTTPGetAction{Port: intstr.FromInt(80), Scheme: v1.URISchemeHTTP}},
		"tcp":  {TCPSocket: &v1.TCPSocketAction{Port: intstr.FromInt(80)}},
		"grpc": {GRPC: &v1.GRPCAction{Port: 80}},
	}
	for what, tc := range map[string]struct {
		err error
		own bool
	}{
		"no descriptor":          {os.NewSyscallError("socket", syscall.EMFILE), true},
		"no buffer":              {os.NewSyscallError("socket", syscall.ENOBUFS), true},
		"no local port":          {os.NewSyscallError("connect", syscall.EADDRNOTAVAIL), true},
		"no route":               {os.NewSyscallError("connect", syscall.ENETUNREACH), true},
		"a dead name server":     {&net.DNSError{Err: "server misbehaving", IsTemporary: true}, true},
		"refused":                {os.NewSyscallError("connect", syscall.ECONNREFUSED), false},
		"nobody has the address": {os.NewSyscallError("connect", syscall.EHOSTUNREACH), false},
	} {
		for kind, h := range handlers {
			t.Run(kind+" "+what, func(t *testing.T) {
				t.Parallel() // grpc tries for the whole timeout
				p := probers{net: newNetwork(func(context.Context, string, string) (net.Conn, error) {
					return nil, &net.OpError{Op: "dial", Net: "tcp", Err: tc.err}
				})}
				ok, out, err := p.run(t.Context(), &entry{t: &target{Target: Target{Container: c, PodIP: "127.0.0.1"}}, spec: &v1.Probe{ProbeHandler: h, TimeoutSeconds: 1}})
				if ok || (err != nil) != tc.own {
					t.Errorf("%v %q %v", ok, out, err)
				}
			})
		}
	}
}

// An overloaded node probes late and fails nothing.
func TestOverloadDelays(t *testing.T) {
	bubble(t, func(context.Context, string, string) (int32, error) {
		time.Sleep(900 * time.Millisecond)
		return 0, nil
	}, func(t *testing.T, s *Scheduler, k *sink, x *fake) {
		for i := range 40 {
			s.Add(Target{ID: fmt.Sprint("c", i), Container: &v1.Container{LivenessProbe: execProbe("live", 1, 0, 1)}, Started: time.Now()})
		}
		time.Sleep(time.Minute)
		k.want(t)
		if p := x.peak.Load(); p != 4 {
			t.Errorf("%d at once, want 4", p)
		}
		if n := x.calls.Load(); n < 4*60 {
			t.Errorf("%d probes, the slots were not used", n)
		}
	})
}

func TestEndingContainersAreAskedForReadinessAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ready := atomic.Bool{}
		ready.Store(true)
		var liveness, readiness atomic.Int32
		x := &fake{fn: func(_ context.Context, _, cmd string) (int32, error) {
			if cmd == "live" {
				liveness.Add(1)
				return 0, nil
			}
			readiness.Add(1)
			if !ready.Load() {
				return 1, nil
			}
			return 0, nil
		}}
		var last atomic.Pointer[Result]
		s := New(Config{Exec: x, Events: &sink{}, Report: func(r Result) { last.Store(&r) }})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { s.Run(ctx); close(done) }()
		defer func() { cancel(); <-done }()
		probe := func(cmd string) *v1.Probe {
			return &v1.Probe{ProbeHandler: v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{cmd}}}, PeriodSeconds: 1, TimeoutSeconds: 1, FailureThreshold: 1, SuccessThreshold: 1}
		}
		s.Add(Target{ID: "a", Container: &v1.Container{LivenessProbe: probe("live"), ReadinessProbe: probe("ready")}, Started: time.Now()})
		time.Sleep(9500 * time.Millisecond) // between two probes
		s.Ending("a")
		was := liveness.Load()
		if was < 9 || readiness.Load() < 9 {
			t.Fatalf("%d and %d probes", was, readiness.Load())
		}
		ready.Store(false)
		time.Sleep(10 * time.Second)
		if liveness.Load() != was || readiness.Load() < 18 {
			t.Errorf("%d liveness probes of an ending container, %d for readiness", liveness.Load()-was, readiness.Load())
		}
		if r := last.Load(); r == nil || r.Kind != Readiness || r.OK {
			t.Errorf("last result %+v", r)
		}
	})
}

func TestRequestsSayWhoAsks(t *testing.T) {
	action := &v1.HTTPGetAction{Path: "/x?y=1", Port: intstr.FromInt(80), Host: "example.test"}
	for _, tc := range []struct {
		headers []v1.HTTPHeader
		agent   string
		set     bool
	}{
		{nil, "kube-probe/1.36", true},
		{[]v1.HTTPHeader{{Name: "user-agent", Value: "mine"}}, "mine", true},
		{[]v1.HTTPHeader{{Name: "User-Agent", Value: ""}}, "", true},
	} {
		action.HTTPHeaders = tc.headers
		req, err := Request(action, &v1.Container{}, "10.0.0.1", "probe")
		if err != nil {
			t.Fatal(err)
		}
		if got, set := req.Header["User-Agent"]; set != tc.set || got[0] != tc.agent || req.URL.String() != "http://example.test:80/x?y=1" || req.Header.Get("Accept") != "*/*" {
			t.Errorf("%v: %v to %s", tc.headers, req.Header, req.URL)
		}
	}
}

func TestRealProbers(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/local":
			http.Redirect(w, r, "/no", http.StatusFound)
		case r.URL.Path == "/away":
			http.Redirect(w, r, "http://192.0.2.1/no", http.StatusFound)
		case r.URL.Path != "/ok" || r.Header.Get("X-A") != "b":
			w.WriteHeader(500)
		}
	}))
	defer srv.Close()
	host, port, _ := net.SplitHostPort(srv.Listener.Addr().String())
	n, _ := strconv.Atoi(port)
	get := func(path string) *v1.HTTPGetAction {
		return &v1.HTTPGetAction{Path: path, Port: intstr.FromString("web"), Scheme: v1.URISchemeHTTP, HTTPHeaders: []v1.HTTPHeader{{Name: "X-A", Value: "b"}}}
	}
	c := &v1.Container{Ports: []v1.ContainerPort{{Name: "web", ContainerPort: int32(n)}}}
	p := newProbers(&fake{fn: func(_ context.Context, _, cmd string) (int32, error) {
		if cmd != "x v $(NO)" {
			return 1, nil
		}
		return 0, nil
	}})
	c.Env = []v1.EnvVar{{Name: "V", Value: "v"}}
	free, _ := net.Listen("tcp", "127.0.0.1:0")
	closed := free.Addr().(*net.TCPAddr).Port
	free.Close()
	for _, tc := range []struct {
		name string
		h    v1.ProbeHandler
		ok   bool
	}{
		{"http", v1.ProbeHandler{HTTPGet: get("/ok")}, true},
		{"a redirect to this host is followed", v1.ProbeHandler{HTTPGet: get("/local")}, false},
		{"one to another is not", v1.ProbeHandler{HTTPGet: get("/away")}, true},
		{"http 500", v1.ProbeHandler{HTTPGet: get("/no")}, false},
		{"tcp", v1.ProbeHandler{TCPSocket: &v1.TCPSocketAction{Port: intstr.FromString("web")}}, true},
		{"tcp refused", v1.ProbeHandler{TCPSocket: &v1.TCPSocketAction{Port: intstr.FromInt(closed)}}, false},
		{"grpc to something else", v1.ProbeHandler{GRPC: &v1.GRPCAction{Port: int32(closed)}}, false},
		{"exec, with plain variables", v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{"x", "$(V)", "$(NO)"}}}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := &entry{t: &target{Target: Target{Container: c, PodIP: host}}, spec: &v1.Probe{ProbeHandler: tc.h, TimeoutSeconds: 1}}
			ok, out, err := p.run(t.Context(), e)
			if err != nil || ok != tc.ok {
				t.Errorf("%v %q %v", ok, out, err)
			}
		})
	}
}

// BenchmarkThousandProbes is the cost of 1,000 TCP probes at one a second, the
// part of the server that answers them included.
func BenchmarkThousandProbes(b *testing.B) {
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer srv.Close()
	_, port, _ := net.SplitHostPort(srv.Listener.Addr().String())
	n, _ := strconv.Atoi(port)
	k := &sink{}
	s := New(Config{Exec: &fake{}, Events: k, Report: func(Result) {}})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go s.Run(ctx)
	probe := &v1.Probe{ProbeHandler: v1.ProbeHandler{TCPSocket: &v1.TCPSocketAction{Port: intstr.FromInt(n)}}, PeriodSeconds: 1, TimeoutSeconds: 1, FailureThreshold: 3, SuccessThreshold: 1}
	for i := range 1000 {
		s.Add(Target{ID: fmt.Sprint(i), Container: &v1.Container{LivenessProbe: probe}, PodIP: "127.0.0.1", Started: time.Now(), Restored: &State{}})
	}
	time.Sleep(2 * time.Second) // spread
	cpu := func() time.Duration {
		var u syscall.Rusage
		syscall.Getrusage(syscall.RUSAGE_SELF, &u)
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	for b.Loop() {
		before := cpu()
		time.Sleep(time.Second)
		b.ReportMetric(float64((cpu() - before).Milliseconds()), "cpu-ms/s")
	}
}

// A clock that is set, back or forth, after a container has started stops no
// probe of it or of any other, and makes none come later than its delay.
func TestClockThatIsSetStopsNoProbe(t *testing.T) {
	for _, by := range []time.Duration{-24 * time.Hour, -time.Second, time.Second, 24 * time.Hour} {
		bubble(t, func(context.Context, string, string) (int32, error) { return 0, nil }, func(t *testing.T, s *Scheduler, k *sink, _ *fake) {
			s.Add(Target{ID: "c", Container: &v1.Container{ReadinessProbe: execProbe("ready", 5, 3, 3)}, Started: time.Now().Add(-by).Round(0)})
			s.Add(Target{ID: "d", Container: &v1.Container{ReadinessProbe: execProbe("ready", 5, 10, 3)}, Started: time.Now()})
			time.Sleep(4 * time.Second)
			synctest.Wait()
			k.mu.Lock()
			if len(k.results) != 1 {
				t.Errorf("set by %s: %v", by, k.results)
			}
			k.mu.Unlock()
			time.Sleep(8 * time.Second)
			synctest.Wait()
			k.mu.Lock()
			defer k.mu.Unlock()
			if len(k.results) != 2 || k.results[1] != "d Readiness true at 10s" {
				t.Errorf("set by %s: %v", by, k.results)
			}
		})
	}
}
