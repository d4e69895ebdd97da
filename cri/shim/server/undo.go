package server

import "log/slog"

// undoStack gives back what was acquired, last first.
type undoStack []undoStep

type undoStep struct {
	what string
	do   func() error
}

func (u *undoStack) add(what string, do func() error) { *u = append(*u, undoStep{what, do}) }

func (u *undoStack) run(log *slog.Logger) {
	for i := len(*u) - 1; i >= 0; i-- {
		if err := (*u)[i].do(); err != nil {
			log.Error("undo", "what", (*u)[i].what, "error", err)
		}
	}
	*u = nil
}
