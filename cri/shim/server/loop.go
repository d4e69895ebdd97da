package server

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"golang.org/x/sys/unix"
)

// loop waits on all descriptors of the shim that no goroutine waits on: the
// containers' output, pidfds, OOM notifications. One thread serves all of
// them; an idle container costs a map entry. Handlers run on that thread and
// must not block: they hand work to a goroutine.
type loop struct {
	epfd int

	mu       sync.Mutex
	next     uint64
	handlers map[uint64]func(events uint32)
}

func newLoop() (*loop, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	return &loop{epfd: epfd, handlers: map[uint64]func(uint32){}}, nil
}

// watch identifies a descriptor in the loop.
type watch struct {
	l     *loop
	fd    int
	token uint64
}

func event(events uint32, token uint64) *unix.EpollEvent {
	return &unix.EpollEvent{Events: events, Fd: int32(uint32(token)), Pad: int32(uint32(token >> 32))}
}

// add calls handler once when fd is ready; rearm lets it be called again.
func (l *loop) add(fd int, events uint32, handler func(events uint32)) (*watch, error) {
	l.mu.Lock()
	l.next++
	w := &watch{l: l, fd: fd, token: l.next}
	l.handlers[w.token] = handler
	l.mu.Unlock()
	if err := unix.EpollCtl(l.epfd, unix.EPOLL_CTL_ADD, fd, event(events|unix.EPOLLONESHOT, w.token)); err != nil {
		l.mu.Lock()
		delete(l.handlers, w.token)
		l.mu.Unlock()
		return nil, fmt.Errorf("epoll add: %w", err)
	}
	return w, nil
}

func (w *watch) rearm(events uint32) error {
	return unix.EpollCtl(w.l.epfd, unix.EPOLL_CTL_MOD, w.fd, event(events|unix.EPOLLONESHOT, w.token))
}

// remove must come before fd is closed.
func (w *watch) remove() {
	if w == nil {
		return
	}
	w.l.mu.Lock()
	_, known := w.l.handlers[w.token]
	delete(w.l.handlers, w.token)
	w.l.mu.Unlock()
	if known {
		_ = unix.EpollCtl(w.l.epfd, unix.EPOLL_CTL_DEL, w.fd, nil)
	}
}

// run serves until the process ends.
func (l *loop) run(log *slog.Logger) {
	events := make([]unix.EpollEvent, 128)
	for {
		n, err := unix.EpollWait(l.epfd, events, -1)
		if err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			log.Error("epoll_wait", "error", err)
			return
		}
		for _, e := range events[:n] {
			token := uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32
			l.mu.Lock()
			handler := l.handlers[token]
			l.mu.Unlock()
			if handler != nil {
				handler(e.Events)
			}
		}
	}
}
