package server

import (
	"fmt"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/podd-runtime/podd/cri/shim/internal/wire"
)

// gate lets requests through until the shim is about to replace itself by
// execve. What is under way then ends first; new ones are told Unavailable and
// come back. Event streams and attached clients do not count, they are ended;
// an exec counts until its process runs, and is then handed over.
type gate struct {
	mu     sync.Mutex
	inside int
	closed chan struct{} // non-nil while closed; closed again when reopened
	shut   chan struct{} // closed when the gate closes
	empty  chan struct{} // closed when the last one has left
}

func (g *gate) enter(k wire.Kind) (leave func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed != nil {
		return nil, fmt.Errorf("podd-shim is replacing itself: %w", errdefs.ErrUnavailable)
	}
	if k == wire.Events || k == wire.Attach || k == wire.Upgrade {
		return func() {}, nil
	}
	g.inside++
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.inside--; g.inside == 0 && g.empty != nil {
			close(g.empty)
			g.empty = nil
		}
	}), nil
}

// closing is closed when sessions shall end.
func (g *gate) closing() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut == nil {
		g.shut = make(chan struct{})
	}
	return g.shut
}
