package tree

import (
	"context"
	"time"
)

// batch is how many entries are looked at in one turn: well below a millisecond
// of work when all is in memory.
const batch = 128

// Turns let walks share a part of one CPU, and of the disk's time: one walk
// works at a time, for a batch of entries, rests in proportion, and goes to the
// end of the queue. So a tree of a million files makes each of the others wait
// for one batch, not for all of it.
type Turns struct {
	share float64
	// turn is taken by who is in turn. Those who wait for a channel get it in
	// the order in which they came.
	turn  chan struct{}
	walks chan struct{} // who is under way
}

// NewTurns with the share of the time that is work, 0 < share ≤ 1, and how many
// walks may be under way.
func NewTurns(share float64, walks int) *Turns {
	return &Turns{share: share, turn: make(chan struct{}, 1), walks: make(chan struct{}, walks)}
}

// Turn is the part of one walk. It is no other goroutine's.
type Turn struct {
	turns   *Turns
	walking bool
	held    bool
	entries int
	begun   time.Time
	worked  time.Duration
}

// Begin waits for a turn. End has to be called unless there is an error.
func (t *Turns) Begin(ctx context.Context) (*Turn, error) {
	select {
	case t.walks <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	out := &Turn{turns: t, walking: true}
	if err := out.take(ctx); err != nil {
		out.End()
		return nil, err
	}
	return out, nil
}

func (t *Turn) take(ctx context.Context) error {
	select {
	case t.turns.turn <- struct{}{}:
		t.held, t.begun = true, time.Now()
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (t *Turn) give() {
	if t.held {
		t.held = false
		<-t.turns.turn
	}
}

// Step counts an entry, and after a batch of them lets the others go on.
func (t *Turn) Step(ctx context.Context) error {
	if t.entries++; t.entries%batch != 0 {
		return ctx.Err()
	}
	work := time.Since(t.begun)
	t.worked += work
	// The rest is part of the turn: together, walks take no more than the share.
	rest := time.NewTimer(time.Duration(float64(work) * (1 - t.turns.share) / t.turns.share))
	defer rest.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-rest.C:
	}
	t.give()
	return t.take(ctx)
}

// End gives the turn up for good and tells how long it was worked, without the
// waits.
func (t *Turn) End() time.Duration {
	if t.held {
		t.worked += time.Since(t.begun)
	}
	t.give()
	if t.walking {
		t.walking = false
		<-t.turns.walks
	}
	return t.worked
}
