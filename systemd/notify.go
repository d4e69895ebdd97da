// Package systemd is how podd gets along with the service manager that started
// it: readiness, watchdog, status, sockets, journal, units, and logind. Without
// one, what only informs does nothing, and what is asked for says so.
package systemd

import (
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// Managed says that somebody listens to what is notified (sd_notify(3)).
func Managed() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// Ready says that pods are taken and the sockets answer.
func Ready(log *slog.Logger) { notify(log, daemon.SdNotifyReady) }

// Reloading says that the program begins anew in this process; Ready ends it.
func Reloading(log *slog.Logger) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		log.Warn("no monotonic clock", "error", err)
	}
	notify(log, fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000))
}

// Stopping says that the daemon ends; its containers go on.
func Stopping(log *slog.Logger) { notify(log, daemon.SdNotifyStopping) }

// Status sets the line that `systemctl status` shows.
func Status(log *slog.Logger, text string) { notify(log, "STATUS="+text) }

// Extend asks for so much more time from now on before a start, reload or stop
// that is under way counts as failed (TimeoutStartSec=, TimeoutStopSec=).
func Extend(log *slog.Logger, more time.Duration) {
	notify(log, fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", more.Microseconds()))
}

// WatchdogTime is how long the service manager goes without Alive before it
// ends this process (WatchdogSec=); 0: it does not look.
func WatchdogTime() (time.Duration, error) { return daemon.SdWatchdogEnabled(false) }

// Alive feeds the watchdog.
func Alive(log *slog.Logger) { notify(log, daemon.SdNotifyWatchdog) }

func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("service manager not told", "state", state, "error", err)
	}
}
