package server

import (
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Sessions are execs, attached clients and event streams: they last as long as
// their clients like. So they have a budget of their own, and a container has a
// part of it: whoever may open them for one pod cannot keep the node from being
// asked, nor other pods from theirs.
const (
	maxSessions = 4096
	// sessionFiles is what one holds at most: its connection, three streams, a
	// pidfd or a second stdin, a terminal, and what it needs while it begins.
	// All have half of the descriptors that this process may have.
	sessionFiles = 8
	// maxOfContainer is the part of one container.
	maxOfContainer = 256
	// maxAttached clients copy a container's output. Each may lag behind by
	// sinkRoom of memory for each stream.
	maxAttached = 16
	// maxStreams of events: podd has one.
	maxStreams = 64
)

// sessions counts those that are open.
type sessions struct {
	max int

	mu  sync.Mutex
	all int
	of  map[string]int // by what they are of
}

func newSessions() *sessions {
	limit := maxSessions
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil && files.Cur/2/sessionFiles < maxSessions {
		limit = int(files.Cur / 2 / sessionFiles)
	}
	return &sessions{max: limit, of: map[string]int{}}
}

// enter counts a session of what, of which there may be most; leave ends it.
func (s *sessions) enter(what string, most int) (leave func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.all >= s.max:
		return nil, fmt.Errorf("%d execs and attached clients are open on this node, and no more may be: %w", s.all, errdefs.ErrResourceExhausted)
	case s.of[what] >= most:
		return nil, fmt.Errorf("%d of %s are open, and no more may be: %w", most, what, errdefs.ErrResourceExhausted)
	}
	return s.count(what), nil
}

// resume counts one that was let in before.
func (s *sessions) resume(what string) (leave func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.count(what)
}

func (s *sessions) count(what string) (leave func()) {
	s.all++
	s.of[what]++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.all--
		if s.of[what]--; s.of[what] == 0 {
			delete(s.of, what)
		}
	})
}

// ofContainer names the sessions of a container.
func ofContainer(id string) string { return "the sessions of container " + id }
