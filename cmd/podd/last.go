package main

import (
	"log/slog"
	"os"

	"github.com/podd-runtime/podd/kubelet/server/api"
)

// remember records how this daemon was started, for `podd stop --all` when it
// is down. Without the record that command only says that nobody answers.
func remember(runDir string, args []string, log *slog.Logger) {
	err := os.MkdirAll(runDir, 0o700)
	last := api.Last{Args: args}
	if err == nil {
		last.Program, err = os.Executable()
	}
	if err == nil {
		last.Dir, err = os.Getwd()
	}
	if err == nil {
		err = last.Save(runDir)
	}
	if err != nil {
		log.Warn("start is not recorded, so podd stop --all needs a running daemon", "error", err)
	}
}
