// Package systemd is what podd says to the service manager that started it.
// Without one every function does nothing.
package systemd

import (
	"log/slog"

	"github.com/coreos/go-systemd/v22/daemon"
)

// Ready says that pods are taken and the sockets answer (sd_notify(3)).
func Ready(log *slog.Logger) { notify(log, daemon.SdNotifyReady) }

// Stopping says that the daemon ends; its containers go on.
func Stopping(log *slog.Logger) { notify(log, daemon.SdNotifyStopping) }

// Status sets the line that `systemctl status` shows.
func Status(log *slog.Logger, text string) { notify(log, "STATUS="+text) }

func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("service manager not told", "state", state, "error", err)
	}
}
