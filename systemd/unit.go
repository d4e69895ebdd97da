package systemd

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/coreos/go-systemd/v22/dbus"
)

// Start has the service manager start a unit and returns when it has started,
// or at once when it runs. errdefs.ErrUnavailable: it did not start, or no
// systemd answers on this machine.
func Start(ctx context.Context, unit string) error {
	conn, err := dbus.NewWithContext(ctx)
	if err != nil {
		return fmt.Errorf("start unit %s: systemd does not answer: %w: %w", unit, err, errdefs.ErrUnavailable)
	}
	defer conn.Close()
	done := make(chan string, 1)
	if _, err := conn.StartUnitContext(ctx, unit, "replace", done); err != nil {
		return fmt.Errorf("start unit %s: %w: %w", unit, err, errdefs.ErrUnavailable)
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("start unit %s: %s, see systemctl status %s: %w", unit, result, unit, errdefs.ErrUnavailable)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("start unit %s: %w", unit, ctx.Err())
	}
}
