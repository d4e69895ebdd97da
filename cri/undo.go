package cri

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// cleanupTimeout bounds what an undo stack may take in all. Tearing down a
// pod's network by external CNI plugins is the slowest thing in it.
const cleanupTimeout = 30 * time.Second

// undo is a stack of what gives back what has been acquired. Each acquire is
// followed at once by its push; release at the end keeps everything.
type undo struct {
	steps []undoStep
}

type undoStep struct {
	what string
	fn   func(context.Context) error
}

func (u *undo) push(what string, fn func(context.Context) error) {
	u.steps = append(u.steps, undoStep{what, fn})
}

func (u *undo) release() { u.steps = nil }

// run undoes everything, newest first, with a deadline of its own: the request
// it belongs to may have been cancelled. What fails is logged and returned, in
// the order in which it is to be tried again.
func (u *undo) run(ctx context.Context, log *slog.Logger) (failed []undoStep) {
	if len(u.steps) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	for i := len(u.steps) - 1; i >= 0; i-- {
		if err := u.steps[i].fn(ctx); err != nil {
			log.Warn("undo incomplete, tried again", "step", u.steps[i].what, "error", err)
			failed = append(failed, u.steps[i])
		}
	}
	u.steps = nil
	return failed
}

// leftovers are the steps of undo stacks that failed: podd-shim was away, a CNI
// plugin refused. Nobody can name what they are about, so nobody else would ask
// for it again before the sweep of the next start.
type leftovers struct {
	mu    sync.Mutex
	steps []undoStep
	woken chan struct{} // nil: none has failed yet
}

const (
	// maxLeftovers bounds the steps that wait: what is beyond is the sweep's. It
	// is some hundred failed pods.
	maxLeftovers = 1024
	// leftoversFirst and leftoversLatest are how long after a failure the next
	// attempt comes: twice as long after each.
	leftoversFirst  = time.Second
	leftoversLatest = 5 * time.Minute
)

func (l *leftovers) add(steps []undoStep) {
	if len(steps) == 0 {
		return
	}
	l.mu.Lock()
	l.steps = append(l.steps, steps[:min(len(steps), max(0, maxLeftovers-len(l.steps)))]...)
	l.mu.Unlock()
	select {
	case l.wake() <- struct{}{}:
	default:
	}
}

func (l *leftovers) wake() chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.woken == nil {
		l.woken = make(chan struct{}, 1)
	}
	return l.woken
}

// retry tries until ctx ends; with nothing to do it sleeps.
func (l *leftovers) retry(ctx context.Context, log *slog.Logger) {
	wait := leftoversFirst
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.wake():
			wait = leftoversFirst
		case <-timer.C:
			if l.round(ctx, log) == 0 {
				continue
			}
			wait = min(2*wait, leftoversLatest)
		}
		timer.Reset(wait)
	}
}

// round tries each step once and tells how many are left.
func (l *leftovers) round(ctx context.Context, log *slog.Logger) int {
	l.mu.Lock()
	steps := l.steps
	l.steps = nil
	l.mu.Unlock()
	var failed []undoStep
	for _, s := range steps {
		ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
		err := s.fn(ctx)
		cancel()
		if err != nil {
			log.Debug("undo still incomplete", "step", s.what, "error", err)
			failed = append(failed, s)
		} else {
			log.Info("undo completed", "step", s.what)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.steps = append(failed, l.steps...)
	return len(l.steps)
}
