package cri

import "sync"

// hangs remembers host paths whose look-up hangs, so that a client's retries do
// not add a stuck thread each.
type hangs struct {
	mu   sync.Mutex
	n    map[string]int
	hang map[string]bool
}

// enter says whether a look-up of p may begin.
func (h *hangs) enter(p string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.hang[p] {
		return false
	}
	if h.n == nil {
		h.n, h.hang = make(map[string]int), make(map[string]bool)
	}
	h.n[p]++
	return true
}

// hung notes that somebody gave up waiting for p.
func (h *hangs) hung(p string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.n[p] > 0 {
		h.hang[p] = true
	}
}

// leave ends a look-up; the path answers again.
func (h *hangs) leave(p string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.n[p]--; h.n[p] == 0 {
		delete(h.n, p)
		delete(h.hang, p)
	}
}
