package systemd

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/godbus/dbus/v5"
)

// Logind is a connection to systemd-logind, which holds a shutdown up for those
// who ask for that (systemd.io/INHIBITOR_LOCKS).
type Logind struct {
	conn *dbus.Conn
	// DropInDir is where SetDelayMax puts its file; it does not outlive a boot.
	DropInDir string
}

const (
	logindName    = "org.freedesktop.login1"
	logindPath    = "/org/freedesktop/login1"
	logindManager = logindName + ".Manager"
)

// OpenLogind connects over the system's bus ($DBUS_SYSTEM_BUS_ADDRESS).
// errdefs.ErrUnavailable: there is no bus.
func OpenLogind(ctx context.Context) (*Logind, error) {
	conn, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("connect to D-Bus: %w: %w", err, errdefs.ErrUnavailable)
	}
	return &Logind{conn: conn, DropInDir: "/run/systemd/logind.conf.d"}, nil
}

// Close ends the connection; locks stay with their descriptors.
func (l *Logind) Close() error { return l.conn.Close() }

func (l *Logind) manager() dbus.BusObject { return l.conn.Object(logindName, logindPath) }

// DelayMax is the longest that logind waits (InhibitDelayMaxSec=).
func (l *Logind) DelayMax(ctx context.Context) (time.Duration, error) {
	usec, err := property[uint64](ctx, l, "InhibitDelayMaxUSec")
	return time.Duration(usec) * time.Microsecond, err
}

// Preparing says whether the machine is about to go down now: a signal that was
// sent while nobody listened is not sent again.
func (l *Logind) Preparing(ctx context.Context) (bool, error) {
	return property[bool](ctx, l, "PreparingForShutdown")
}

// property of logind's manager.
func property[T any](ctx context.Context, l *Logind, name string) (value T, err error) {
	var v dbus.Variant
	call := l.manager().CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, logindManager, name)
	if err := call.Store(&v); err != nil {
		return value, fmt.Errorf("ask logind for %s: %w", name, err)
	}
	value, ok := v.Value().(T)
	if !ok {
		return value, fmt.Errorf("logind's %s is a %T: %w", name, v.Value(), errdefs.ErrInternal)
	}
	return value, nil
}

// SetDelayMax has logind wait that long at most, by a drop-in of its
// configuration that a reboot forgets, and returns when it does.
func (l *Logind) SetDelayMax(ctx context.Context, d time.Duration) error {
	if err := os.MkdirAll(l.DropInDir, 0o755); err != nil {
		return fmt.Errorf("raise logind's InhibitDelayMaxSec: %w", err)
	}
	text := fmt.Sprintf("# podd holds a shutdown up that long, at most, while pods end.\n[Login]\nInhibitDelayMaxSec=%dms\n", d.Milliseconds())
	if err := os.WriteFile(filepath.Join(l.DropInDir, "99-podd.conf"), []byte(text), 0o644); err != nil {
		return fmt.Errorf("raise logind's InhibitDelayMaxSec: %w", err)
	}
	systemd := l.conn.Object("org.freedesktop.systemd1", "/org/freedesktop/systemd1")
	const hangup = int32(1) // logind reads its configuration at SIGHUP
	if err := systemd.CallWithContext(ctx, "org.freedesktop.systemd1.Manager.KillUnit", 0, "systemd-logind.service", "all", hangup).Err; err != nil {
		return fmt.Errorf("have logind read its configuration: %w", err)
	}
	for {
		have, err := l.DelayMax(ctx)
		if err != nil || have >= d {
			return err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("logind goes on with InhibitDelayMaxSec=%s, not %s: another drop-in wins over %s: %w", have, d, l.DropInDir, ctx.Err())
		}
	}
}

// Delay holds a shutdown up until what is returned is closed, for DelayMax at
// most.
func (l *Logind) Delay(ctx context.Context, why string) (io.Closer, error) {
	var fd dbus.UnixFD
	if err := l.manager().CallWithContext(ctx, logindManager+".Inhibit", 0, "shutdown", "podd", why, "delay").Store(&fd); err != nil {
		return nil, fmt.Errorf("ask logind to hold shutdowns up: %w", err)
	}
	return os.NewFile(uintptr(fd), "inhibitor"), nil
}

// isLogind says whether a sender is logind: anybody may send a signal to one
// connection, whatever that subscribed to.
func (l *Logind) isLogind(ctx context.Context, sender string) bool {
	var owner string
	err := l.conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.GetNameOwner", 0, logindName).Store(&owner)
	return err == nil && owner == sender
}

// Shutdowns tells true when the machine is about to go down and false when that
// was called off, of changes that nobody has taken yet the last one alone. The
// channel closes when the connection or ctx ends.
func (l *Logind) Shutdowns(ctx context.Context) (<-chan bool, error) {
	const member = "PrepareForShutdown"
	match := []dbus.MatchOption{dbus.WithMatchSender(logindName), dbus.WithMatchInterface(logindManager), dbus.WithMatchMember(member), dbus.WithMatchObjectPath(logindPath)}
	if err := l.conn.AddMatchSignalContext(ctx, match...); err != nil {
		return nil, fmt.Errorf("subscribe to logind's %s: %w", member, err)
	}
	signals := make(chan *dbus.Signal, 8)
	l.conn.Signal(signals)
	out := make(chan bool)
	go func() {
		defer close(out)
		defer l.conn.RemoveSignal(signals)
		var news chan<- bool // out while there is something to tell
		var last bool
		for {
			select {
			case s, ok := <-signals:
				if !ok {
					return
				}
				var down bool
				if s.Name == logindManager+"."+member && dbus.Store(s.Body, &down) == nil && l.isLogind(ctx, s.Sender) {
					news, last = out, down
				}
			case news <- last:
				news = nil
			case <-l.conn.Context().Done():
				return
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}
