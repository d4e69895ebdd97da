package tree

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// meterFresh: a figure that is younger is not renewed.
	meterFresh = 10 * time.Second
	// meterShare: measuring one tree takes at most one part in so many of the
	// time, all trees together meterWork of one CPU.
	meterShare = 50
	meterWork  = 0.25
	// meterWalks is how many trees are measured at once, in turns.
	meterWalks = 16
)

// Meter measures trees in the background when somebody asks, and keeps the
// figures. Nothing asked, nothing done. Trees are known by keys.
type Meter struct {
	measure func(ctx context.Context, key string, pace Stepper) (Usage, error)
	log     *slog.Logger
	turns   *Turns
	want    chan struct{}
	closed  chan struct{}

	mu   sync.Mutex
	keys map[string]*metered
}

type metered struct {
	usage   Usage
	err     error         // there is no figure, for this reason
	at      time.Time     // when; zero: never yet
	worked  time.Duration // on it; the next one waits a multiple
	asked   bool          // since
	busy    bool          // it is being measured
	first   chan struct{} // closed when there is a figure, or none will be
	settled bool
}

// settle lets those go on who wait for the first figure. The caller holds
// Meter.mu.
func (m *metered) settle() {
	if !m.settled {
		m.settled = true
		close(m.first)
	}
}

// NewMeter returns a Meter of trees that measure measures. What does not exist
// (os.ErrNotExist) any more has no figure.
func NewMeter(log *slog.Logger, measure func(ctx context.Context, key string, pace Stepper) (Usage, error)) *Meter {
	return &Meter{
		measure: measure, log: log, turns: NewTurns(meterWork, meterWalks),
		want: make(chan struct{}, 1), closed: make(chan struct{}), keys: map[string]*metered{},
	}
}

// Usage of a tree as it was measured last. Only the very first question waits,
// and no longer than ctx. errdefs.ErrNotFound: the tree is gone.
func (m *Meter) Usage(ctx context.Context, key string) (Usage, error) {
	m.mu.Lock()
	k := m.keys[key]
	if k == nil {
		k = &metered{first: make(chan struct{})}
		m.keys[key] = k
	}
	k.asked = true
	known, usage, err := !k.at.IsZero(), k.usage, k.err
	m.mu.Unlock()
	m.wake()
	if known {
		return usage, err
	}
	select {
	case <-k.first:
	case <-ctx.Done():
		return Usage{}, fmt.Errorf("usage of %s: not measured yet: %w", key, context.Cause(ctx))
	case <-m.closed:
		return Usage{}, fmt.Errorf("usage of %s: nothing is measured any more: %w", key, errdefs.ErrUnavailable)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if k.at.IsZero() {
		return Usage{}, fmt.Errorf("%s is gone: %w", key, errdefs.ErrNotFound)
	}
	return k.usage, k.err
}

// Total of all figures.
func (m *Meter) Total() (u Usage) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, k := range m.keys {
		u.Bytes += k.usage.Bytes
		u.Inodes += k.usage.Inodes
	}
	return u
}

// Forget a tree that is gone.
func (m *Meter) Forget(key string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if k := m.keys[key]; k != nil {
		k.settle()
	}
	delete(m.keys, key)
}

func (m *Meter) wake() {
	select {
	case m.want <- struct{}{}:
	default:
	}
}

// Run measures what was asked for and is old enough until ctx ends.
func (m *Meter) Run(ctx context.Context) {
	var group sync.WaitGroup
	defer group.Wait()
	defer close(m.closed)
	timer := time.NewTimer(0)
	<-timer.C
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.want:
		case <-timer.C:
		}
		due, wait := m.due(time.Now())
		for _, key := range due {
			group.Go(func() { m.one(ctx, key) })
		}
		if wait > 0 {
			timer.Reset(wait)
		}
	}
}

// due are the trees to be measured now, which are busy from here on, and how
// long it is until the next one (0: nobody has asked).
func (m *Meter) due(now time.Time) (keys []string, wait time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for key, k := range m.keys {
		if !k.asked || k.busy {
			continue
		}
		left := k.at.Add(max(meterFresh, meterShare*k.worked)).Sub(now)
		if k.at.IsZero() || left <= 0 {
			k.busy = true
			keys = append(keys, key)
		} else if wait == 0 || left < wait {
			wait = left
		}
	}
	return keys, wait
}

func (m *Meter) one(ctx context.Context, key string) {
	turn, err := m.turns.Begin(ctx)
	if err != nil {
		return
	}
	m.mu.Lock()
	k := m.keys[key]
	if k != nil {
		k.asked = false // who asks from now on asks for the next figure
	}
	m.mu.Unlock()
	var u Usage
	if k != nil {
		u, err = m.measure(ctx, key, turn)
	}
	worked := turn.End()
	if k == nil {
		return
	}
	m.mu.Lock()
	bounded := k.usage.Bound != nil
	if err == nil {
		k.usage, k.err = u, nil
	} else if k.at.IsZero() {
		k.err = fmt.Errorf("usage of %s: %w", key, err)
	}
	k.at, k.worked, k.busy = time.Now(), worked, false
	k.settle()
	if errors.Is(err, os.ErrNotExist) && m.keys[key] == k {
		delete(m.keys, key) // asked for after it was forgotten
	}
	m.mu.Unlock()
	m.wake()
	switch {
	case ctx.Err() != nil || errors.Is(err, os.ErrNotExist):
	case err != nil:
		m.log.Warn("usage is not known", "of", key, "error", err)
	case u.Bound != nil && !bounded:
		m.log.Warn("tree cannot be measured, it counts as all that its filesystem has in use", "of", key, "error", u.Bound)
	}
}
