package main

import (
	"context"
	"log/slog"
	"strconv"

	"k8s.io/klog/v2"
)

// forwardKlog sends what Kubernetes' libraries log to l instead of standard
// error, up to klog's verbosity v. Their logger is a variable of the library.
func forwardKlog(l *slog.Logger, v uint32) {
	klog.SetSlogLogger(slog.New(libraryHandler{l.With("part", "library").Handler()}))
	var level klog.Level
	_ = level.Set(strconv.FormatUint(uint64(v), 10)) // a number is never refused
}

// libraryHandler finds the level that a library's message has here. What a
// library calls an error is one client's trouble (it went away, it sent
// nonsense) and comes back to us as an error where it is ours: a warning.
// All that is less than Info is Debug, klog's levels 5 to 10 too.
type libraryHandler struct{ slog.Handler }

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
	return h.Handler.Enabled(ctx, libraryLevel(l))
}

func (h libraryHandler) Handle(ctx context.Context, r slog.Record) error {
	r.Level = libraryLevel(r.Level)
	return h.Handler.Handle(ctx, r)
}

func (h libraryHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return libraryHandler{h.Handler.WithAttrs(attrs)}
}

func (h libraryHandler) WithGroup(name string) slog.Handler {
	return libraryHandler{h.Handler.WithGroup(name)}
}
