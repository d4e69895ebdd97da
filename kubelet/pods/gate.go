package pods

import (
	"context"
	"time"
)

// gate lets a number of starts run at once, so that many pods do not slow
// each other down. A start that takes longer than patience gives its place
// away and goes on: a few that hang must not keep the others from starting.
type gate struct {
	places   chan struct{}
	patience time.Duration
}

func newGate(n int) *gate { return &gate{places: make(chan struct{}, n), patience: time.Second} }

// enter waits for a place. leave may be called once.
func (g *gate) enter(ctx context.Context) (leave func(), err error) {
	select {
	case g.places <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	free := func() { <-g.places }
	t := time.AfterFunc(g.patience, free)
	return func() {
		if t.Stop() {
			free()
		}
	}, nil
}
