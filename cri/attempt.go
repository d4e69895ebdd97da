package cri

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// attempts joins requests that create the same thing. A client that lost its
// patience and asks again gets the result of the work that is already going
// on. The work is cancelled, and undone, when nobody waits for it any more; who
// asks during the undoing starts afresh after it.
type attempts struct {
	mu sync.Mutex
	m  map[string]*attempt
}

// attempt is one running creation.
type attempt struct {
	name    string
	started time.Time
	at      atomic.Pointer[string] // the stage it is in
	cancel  context.CancelFunc
	waiters int  // under attempts.mu
	dropped bool // cancelled for lack of waiters; under attempts.mu
	done    chan struct{}
	id      string
	err     error
}

// stage says what the attempt does next; errors carry it.
func (a *attempt) stage(s string) { a.at.Store(&s) }

func (a *attempt) where() string {
	if s := a.at.Load(); s != nil {
		return *s
	}
	return "start"
}

// wrap adds the stage and the age to an error.
func (a *attempt) wrap(err error) error {
	return fmt.Errorf("%s (after %s): %w", a.where(), time.Since(a.started).Round(time.Millisecond), err)
}

// do runs fn for name, or waits for the one that runs.
func (s *attempts) do(ctx context.Context, name string, fn func(context.Context, *attempt) (string, error)) (string, error) {
	for {
		a := s.join(ctx, name, fn)
		select {
		case <-a.done:
			if a.dropped {
				if err := ctx.Err(); err != nil {
					return "", err
				}
				continue
			}
			return a.id, a.err
		case <-ctx.Done():
			if s.leave(a) {
				a.awaitUndo()
			}
			return "", a.wrap(context.Cause(ctx))
		}
	}
}

// undoPatience is how long the last one who waited is kept until what there was
// has been undone: who then takes away what it stood on, a pod's cgroup for
// one, finds nothing in it any more. Clients give a call up after 5 s and more.
const undoPatience = 3 * time.Second

func (a *attempt) awaitUndo() {
	select {
	case <-a.done:
	case <-time.After(undoPatience):
	}
}

func (s *attempts) join(ctx context.Context, name string, fn func(context.Context, *attempt) (string, error)) *attempt {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a, ok := s.m[name]; ok {
		if !a.dropped {
			a.waiters++
		}
		return a
	}
	runCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	a := &attempt{name: name, started: time.Now(), cancel: cancel, waiters: 1, done: make(chan struct{})}
	if s.m == nil {
		s.m = make(map[string]*attempt)
	}
	s.m[name] = a
	go s.run(runCtx, a, fn)
	return a
}

func (s *attempts) run(ctx context.Context, a *attempt, fn func(context.Context, *attempt) (string, error)) {
	defer a.cancel()
	id, err := fn(ctx, a)
	if err != nil {
		err = a.wrap(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	a.id, a.err = id, err
	if err == nil {
		// It succeeded although its last waiter had just gone: whoever
		// asks next may have it.
		a.dropped = false
	}
	delete(s.m, a.name)
	close(a.done)
}

// leave says whether the attempt has been cancelled, for lack of waiters.
func (s *attempts) leave(a *attempt) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-a.done:
		return false
	default:
	}
	if a.dropped {
		return true
	}
	a.waiters--
	if a.waiters == 0 {
		a.dropped = true
		a.cancel()
	}
	return a.dropped
}

// wait blocks until all attempts have ended; for a clean stop.
func (s *attempts) wait(ctx context.Context) error {
	for {
		s.mu.Lock()
		var a *attempt
		for _, a = range s.m {
			break
		}
		s.mu.Unlock()
		if a == nil {
			return nil
		}
		select {
		case <-a.done:
		case <-ctx.Done():
			return fmt.Errorf("%s is still in %s: %w", a.name, a.where(), ctx.Err())
		}
	}
}

// gate orders the slow operations on one object (start, stop, remove) and can
// be given up by a context, unlike a mutex.
type gate chan struct{}

func newGate() gate { return make(gate, 1) }

func (g gate) enter(ctx context.Context) error {
	select {
	case g <- struct{}{}:
		return nil
	default:
	}
	select {
	case g <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (g gate) leave() { <-g }
