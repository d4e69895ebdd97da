package shutdown

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"reflect"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	kubeletv1beta1 "k8s.io/kubelet/config/v1beta1"

	"github.com/podd-runtime/podd/kubelet/status"
)

func pod(name string, mods ...func(*v1.Pod)) *v1.Pod {
	p := &v1.Pod{}
	p.Name, p.Namespace, p.Status.Phase = name, "default", v1.PodRunning
	for _, m := range mods {
		m(p)
	}
	return p
}

func priority(n int32) func(*v1.Pod)  { return func(p *v1.Pod) { p.Spec.Priority = &n } }
func class(name string) func(*v1.Pod) { return func(p *v1.Pod) { p.Spec.PriorityClassName = name } }
func grace(n int64) func(*v1.Pod) {
	return func(p *v1.Pod) { p.Spec.TerminationGracePeriodSeconds = &n }
}
func phase(s v1.PodPhase) func(*v1.Pod) { return func(p *v1.Pod) { p.Status.Phase = s } }

func TestSteps(t *testing.T) {
	by := []kubeletv1beta1.ShutdownGracePeriodByPodPriority{{Priority: 1000, ShutdownGracePeriodSeconds: 5}, {Priority: -10, ShutdownGracePeriodSeconds: 7}, {Priority: 0, ShutdownGracePeriodSeconds: 1}}
	for _, tt := range []struct {
		total, critical time.Duration
		by              []kubeletv1beta1.ShutdownGracePeriodByPodPriority
		want            []Step
	}{
		{0, 0, nil, nil},
		{30 * time.Second, 10 * time.Second, nil, []Step{{0, 20 * time.Second}, {2_000_000_000, 10 * time.Second}}},
		{30 * time.Second, 0, nil, []Step{{0, 30 * time.Second}, {2_000_000_000, 0}}},
		{10 * time.Second, 30 * time.Second, nil, nil},
		{0, 0, by, []Step{{-10, 7 * time.Second}, {0, time.Second}, {1000, 5 * time.Second}}},
	} {
		if got := Steps(tt.total, tt.critical, tt.by); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("Steps(%s, %s, %v) = %v, want %v", tt.total, tt.critical, tt.by, got, tt.want)
		}
	}
}

func TestGroup(t *testing.T) {
	steps := []Step{{-10, 0}, {0, 0}, {1000, 0}, {2_000_000_000, 0}}
	list := []*v1.Pod{
		pod("none"), pod("zero", priority(0)), pod("below", priority(-500)), pod("low", priority(-1)),
		pod("between", priority(999)), pod("at", priority(1000)), pod("above", priority(2_100_000_000)),
		pod("node", class("system-node-critical")), pod("cluster", class("system-cluster-critical")),
		pod("over", phase(v1.PodSucceeded)), pod("failed", phase(v1.PodFailed)), pod("pending", phase(v1.PodPending)),
	}
	want := [][]string{{"below", "low"}, {"none", "zero", "between", "pending"}, {"at"}, {"above", "node", "cluster"}}
	for i, g := range Group(steps, list) {
		var names []string
		for _, p := range g {
			names = append(names, p.Name)
		}
		if !slices.Equal(names, want[i]) {
			t.Errorf("step %d: %v, want %v", i, names, want[i])
		}
	}
	if g := Group(nil, list); len(g) != 0 {
		t.Errorf("without steps: %v", g)
	}
}

// node records what happens to its pods.
type node struct {
	list []*v1.Pod
	hang string // a pod that does not end

	mu   sync.Mutex
	said []string
}

func (n *node) say(format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.said = append(n.said, fmt.Sprintf(format, args...))
}

func (n *node) Pods() []*v1.Pod                 { return n.list }
func (n *node) Hold(_ context.Context, on bool) { n.say("hold %v", on) }
func (n *node) Terminate(ctx context.Context, _, name string, grace time.Duration, cause status.Cause) error {
	n.say("end %s %s %s", name, grace, cause.Reason)
	if name == n.hang {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

func TestDownGoesByPriority(t *testing.T) {
	n := &node{hang: "stuck", list: []*v1.Pod{
		pod("dns", class("system-cluster-critical"), grace(300)), pod("web", grace(1)), pod("stuck", priority(-1)),
	}}
	steps := []Step{{-100, 0}, {0, 20 * time.Second}, {500, time.Hour}, {2_000_000_000, 10 * time.Second}}
	Down(t.Context(), Config{Steps: steps, Pods: n, Log: slog.New(slog.DiscardHandler)})
	want := []string{"hold true", "end stuck 0s Terminated", "end web 1s Terminated", "end dns 10s Terminated"}
	if !slices.Equal(n.said, want) {
		t.Errorf("%q, want %q", n.said, want)
	}
}

// machine is a logind that shuts down when told to.
type machine struct {
	n         *node
	delay     time.Duration
	shutdowns chan bool
	// preparing is what it says when asked; noLock: it grants none.
	preparing, noLock bool
	mute              error // it does not say
}

type lock struct{ n *node }

func (l lock) Close() error { l.n.say("released"); return nil }

func (m *machine) DelayMax(context.Context) (time.Duration, error) { return m.delay, nil }
func (m *machine) SetDelayMax(_ context.Context, d time.Duration) error {
	m.n.say("delay %s", d)
	m.delay = d
	return nil
}
func (m *machine) Delay(context.Context, string) (io.Closer, error) {
	if m.preparing || m.noLock {
		return nil, errors.New("the operation inhibition has been requested for is already running")
	}
	m.n.say("locked")
	return lock{m.n}, nil
}
func (m *machine) Preparing(context.Context) (bool, error)        { return m.preparing, m.mute }
func (m *machine) Shutdowns(context.Context) (<-chan bool, error) { return m.shutdowns, nil }
func (m *machine) Close() error                                   { m.n.say("closed"); return nil }

// TestShutdownIsHeldUp: the lock is held until the pods have ended, taken again
// when the shutdown is called off, and taken anew after a lost connection.
func TestShutdownIsHeldUp(t *testing.T) {
	n := &node{list: []*v1.Pod{pod("web", grace(5))}}
	ctx, cancel := context.WithCancel(t.Context())
	connections := 0
	cfg := Config{
		Steps: Steps(30*time.Second, 10*time.Second, nil), Pods: n, Log: slog.New(slog.DiscardHandler),
		Event: func(reason, message string) { n.say("%s", reason) },
		Connect: func(context.Context) (Machine, error) {
			m := &machine{n: n, delay: 5 * time.Second, shutdowns: make(chan bool, 2)}
			if connections++; connections == 1 {
				m.shutdowns <- true
				m.shutdowns <- false
				close(m.shutdowns)
			} else {
				m.delay = time.Minute
				context.AfterFunc(ctx, func() { close(m.shutdowns) })
				cancel()
			}
			return m, nil
		},
	}
	if err := Run(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"delay 32s", "locked",
		"NodeShutdown", "hold true", "end web 5s Terminated", "released",
		"NodeShutdown", "hold false", "locked", "released", "closed",
		"locked", "released", "closed",
	}
	if !slices.Equal(n.said, want) {
		t.Errorf("%q\nwant %q", n.said, want)
	}
}

// A shutdown that is called off while nobody listens, or that begins then, is
// seen on the next connection; what logind does not say changes nothing.
func TestWhatHappensBetweenConnectionsIsSeen(t *testing.T) {
	lost := func(m *machine, told ...bool) *machine {
		m.shutdowns = make(chan bool, len(told))
		for _, d := range told {
			m.shutdowns <- d
		}
		close(m.shutdowns)
		return m
	}
	begun := []string{"NodeShutdown", "hold true", "end web 5s Terminated"}
	for name, tc := range map[string]struct {
		connections []*machine
		want        []string
	}{
		"called off while away": {
			[]*machine{lost(&machine{}, true), lost(&machine{})},
			append(append([]string{"locked"}, begun...), "released", "closed", "NodeShutdown", "hold false", "locked", "released", "closed"),
		},
		"called off, and no lock is granted": {
			[]*machine{lost(&machine{}, true), lost(&machine{noLock: true})},
			append(append([]string{"locked"}, begun...), "released", "closed", "NodeShutdown", "hold false", "closed"),
		},
		"going on": {
			[]*machine{lost(&machine{}, true), lost(&machine{preparing: true})},
			append(append(append([]string{"locked"}, begun...), "released", "closed"), append(begun, "closed")...),
		},
		"begun while away": {
			[]*machine{lost(&machine{}), lost(&machine{preparing: true})},
			append(append([]string{"locked", "released", "closed"}, begun...), "closed"),
		},
		"logind does not say": {
			[]*machine{lost(&machine{}, true), lost(&machine{mute: errors.New("no reply")}), lost(&machine{})},
			append(append([]string{"locked"}, begun...), "released", "closed", "closed", "NodeShutdown", "hold false", "locked", "released", "closed"),
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := &node{list: []*v1.Pod{pod("web", grace(5))}}
				ctx, cancel := context.WithCancel(t.Context())
				left := tc.connections
				err := Run(ctx, Config{
					Steps: Steps(30*time.Second, 10*time.Second, nil), Pods: n, Log: slog.New(slog.DiscardHandler),
					Event: func(reason, message string) { n.say("%s", reason) },
					Connect: func(context.Context) (Machine, error) {
						if len(left) == 0 {
							cancel()
							return nil, errors.New("the test ends")
						}
						m := left[0]
						left = left[1:]
						m.n, m.delay = n, time.Hour
						return m, nil
					},
				})
				if err != nil || !slices.Equal(n.said, tc.want) {
					t.Errorf("%v\n%q\nwant %q", err, n.said, tc.want)
				}
			})
		})
	}
}
