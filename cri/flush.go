package cri

import (
	"sync"
	"time"
)

// flushDelay is how long a change of state may wait for its record. What
// changed is the shim's knowledge too (that something runs, or how it ended),
// so a podd that dies meanwhile learns it again; most containers that end are
// removed, or replaced, before their second write.
const flushDelay = 250 * time.Millisecond

// flusher writes records soon, once for several changes. It has no goroutine
// while nothing waits.
type flusher struct {
	mu    sync.Mutex
	dirty map[string]func()
	timer *time.Timer
}

// soon has save called after flushDelay; a later save of the same id replaces it.
func (f *flusher) soon(id string, save func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dirty == nil {
		f.dirty = make(map[string]func())
	}
	f.dirty[id] = save
	if f.timer == nil {
		f.timer = time.AfterFunc(flushDelay, f.flush)
	}
}

// forget drops what waits for id.
func (f *flusher) forget(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.dirty, id)
}

// flush writes all that waits.
func (f *flusher) flush() {
	f.mu.Lock()
	todo := f.dirty
	f.dirty = nil
	if f.timer != nil {
		f.timer.Stop()
		f.timer = nil
	}
	f.mu.Unlock()
	for _, save := range todo {
		save()
	}
}
