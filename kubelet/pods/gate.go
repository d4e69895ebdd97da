package pods

import (
	"context"
	"slices"
	"sync"
	"time"
)

// gate lets a number of starts or pulls run at once, so that many pods do not
// slow each other down; those that are urgent before the others. One that takes
// longer than patience gives its place away and goes on: a few that hang, or a
// registry that sends drop by drop, must not keep the others from beginning.
type gate struct {
	patience time.Duration

	mu     sync.Mutex
	free   int
	urgent []chan struct{} // closed when its place is given
	usual  []chan struct{}
}

const (
	startPatience = time.Second
	// pullPatience is long for a pull that moves, and bearable for those that
	// wait behind ones that do not.
	pullPatience = 10 * time.Second
)

func newGate(n int, patience time.Duration) *gate { return &gate{free: n, patience: patience} }

// enter waits for a place. leave may be called once.
func (g *gate) enter(ctx context.Context, urgent bool) (leave func(), err error) {
	if err := g.wait(ctx, urgent); err != nil {
		return nil, err
	}
	t := time.AfterFunc(g.patience, g.give)
	return func() {
		if t.Stop() {
			g.give()
		}
	}, nil
}

func (g *gate) wait(ctx context.Context, urgent bool) error {
	g.mu.Lock()
	if g.free > 0 {
		g.free--
		g.mu.Unlock()
		return nil
	}
	mine := make(chan struct{})
	queue := &g.usual
	if urgent {
		queue = &g.urgent
	}
	*queue = append(*queue, mine)
	g.mu.Unlock()
	select {
	case <-mine:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	at := slices.Index(*queue, mine)
	if at >= 0 {
		*queue = slices.Delete(*queue, at, at+1)
	}
	g.mu.Unlock()
	if at < 0 {
		g.give() // it came at the same moment
	}
	return ctx.Err()
}

// give a place to who waits for it.
func (g *gate) give() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, queue := range []*[]chan struct{}{&g.urgent, &g.usual} {
		if len(*queue) > 0 {
			close((*queue)[0])
			*queue = (*queue)[1:]
			return
		}
	}
	g.free++
}
