package server

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim/internal/wire"
)

// openCalls are the connections whose call is not over yet. A caller that is
// killed leaves its calls behind: they run to their end, unheard. Who takes
// stock after such a death waits for them first, or what they still make would
// belong to nobody.
type openCalls struct {
	mu sync.Mutex
	m  map[*wire.Conn]*openCall
}

type openCall struct {
	kind atomic.Uint32 // wire.Kind; 0: not read yet
	done chan struct{} // closed when the call is over
}

// begin notes a connection, from its acceptance on.
func (o *openCalls) begin(c *wire.Conn) *openCall {
	call := &openCall{done: make(chan struct{})}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.m == nil {
		o.m = map[*wire.Conn]*openCall{}
	}
	o.m[c] = call
	return call
}

// over says that the connection's call makes nothing any more that stays. It
// may be said twice.
func (o *openCalls) over(c *wire.Conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if call := o.m[c]; call != nil {
		delete(o.m, c)
		close(call.done)
	}
}

// orphansTimeout bounds the wait for calls whose caller is gone: pause and init
// have ten seconds to show a sign of life.
const orphansTimeout = 20 * time.Second

// awaitOrphans returns when no call is left whose caller has gone, or ctx ends.
func (s *Server) awaitOrphans(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, orphansTimeout)
	defer cancel()
	for _, call := range s.open.orphans() {
		select {
		case <-call.done:
		case <-ctx.Done():
			s.log.Warn("call whose caller has gone does not end", "kind", call.kind.Load())
			return
		}
	}
}

// orphans are the calls whose caller has gone.
func (o *openCalls) orphans() (calls []*openCall) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for c, call := range o.m {
		if hungUp(c) {
			calls = append(calls, call)
		}
	}
	return calls
}

// hungUp says that the peer has closed its end, whatever is still to be read.
func hungUp(c *wire.Conn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false // closed: its call is as good as over
	}
	up := false
	_ = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}} // POLLHUP is always told
		n, err := unix.Poll(fds, 0)
		up = err == nil && n > 0 && fds[0].Revents&unix.POLLHUP != 0
	})
	return up
}
