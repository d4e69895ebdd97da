package main

import (
	"context"
	"log/slog"
	"strconv"
	"sync/atomic"

	"k8s.io/klog/v2"
)

// forwardKlog sends what Kubernetes' libraries log to l instead of standard
// error, up to klog's verbosity v, which the function returned changes. Their
// logger is a variable of the library.
func forwardKlog(l *slog.Logger, v uint32) (set func(v uint32)) {
	verbosity := &atomic.Uint32{}
	klog.SetSlogLogger(slog.New(libraryHandler{l.With("part", "library").Handler(), verbosity}))
	set = func(v uint32) {
		verbosity.Store(v)
		var level klog.Level
		_ = level.Set(strconv.FormatUint(uint64(v), 10)) // a number is never refused
	}
	set(v)
	return set
}

// libraryHandler finds the level that a library's message has here. What a
// library calls an error is one client's trouble (it went away, it sent
// nonsense) and comes back to us as an error where it is ours: a warning.
// All that is less than Info is Debug, klog's levels 5 to 10 too: those that are
// asked for by its verbosity, which loggers out of a context do not heed.
type libraryHandler struct {
	slog.Handler
	verbosity *atomic.Uint32
}

func libraryLevel(l slog.Level) slog.Level {
	switch {
	case l > slog.LevelWarn:
		return slog.LevelWarn
	case l < slog.LevelInfo:
		return slog.LevelDebug
	}
	return l
}

func (h libraryHandler) Enabled(ctx context.Context, l slog.Level) bool {
	return -int64(l) <= int64(h.verbosity.Load()) && h.Handler.Enabled(ctx, libraryLevel(l))
}

func (h libraryHandler) Handle(ctx context.Context, r slog.Record) error {
	r.Level = libraryLevel(r.Level)
	return h.Handler.Handle(ctx, r)
}

func (h libraryHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return libraryHandler{h.Handler.WithAttrs(attrs), h.verbosity}
}

func (h libraryHandler) WithGroup(name string) slog.Handler {
	return libraryHandler{h.Handler.WithGroup(name), h.verbosity}
}
