package cri

import (
	"context"
	"log/slog"
	"time"
)

// cleanupTimeout bounds what an undo stack may take in all. Tearing down a
// pod's network by external CNI plugins is the slowest thing in it.
const cleanupTimeout = 30 * time.Second

// undo is a stack of what gives back what has been acquired. Each acquire is
// followed at once by its push; release at the end keeps everything.
type undo struct {
	steps []undoStep
}

type undoStep struct {
	what string
	fn   func(context.Context) error
}

func (u *undo) push(what string, fn func(context.Context) error) {
	u.steps = append(u.steps, undoStep{what, fn})
}

func (u *undo) release() { u.steps = nil }

// run undoes everything, newest first, with a deadline of its own: the request
// it belongs to may have been cancelled. What fails is logged; the sweep at the
// next start finishes it.
func (u *undo) run(ctx context.Context, log *slog.Logger) {
	if len(u.steps) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	for i := len(u.steps) - 1; i >= 0; i-- {
		if err := u.steps[i].fn(ctx); err != nil {
			log.Warn("undo incomplete", "step", u.steps[i].what, "error", err)
		}
	}
	u.steps = nil
}
