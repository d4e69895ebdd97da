package systemd

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/godbus/dbus/v5/prop"
)

// bus starts a private message bus that OpenLogind finds.
func bus(t *testing.T) {
	t.Helper()
	program, err := exec.LookPath("dbus-daemon")
	if err != nil {
		t.Skip("no dbus-daemon (Debian: dbus)")
	}
	dir := t.TempDir()
	config := filepath.Join(dir, "bus.conf")
	text := `<busconfig><listen>unix:path=` + dir + `/bus</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>`
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "--config-file="+config, "--nofork", "--nopidfile", "--nosyslog", "--print-address")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the bus does not begin: %v", err)
	}
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", strings.TrimSpace(address))
}

// logind is systemd-logind and systemd as far as we use them.
type logind struct {
	t     *testing.T
	conn  *dbus.Conn
	props *prop.Properties
	// dropIns is where it reads its configuration.
	dropIns string
	locks   chan *os.File // the ends that show whether a lock is held
	asked   chan []string
}

func (l *logind) Inhibit(what, who, why, mode string) (dbus.UnixFD, *dbus.Error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, dbus.MakeFailedError(err)
	}
	l.locks <- r
	l.asked <- []string{what, who, why, mode}
	fd, err := syscall.Dup(int(w.Fd()))
	w.Close()
	if err != nil {
		return 0, dbus.MakeFailedError(err)
	}
	// godbus sends a copy; ours goes a moment later.
	time.AfterFunc(time.Second, func() { syscall.Close(fd) })
	return dbus.UnixFD(fd), nil
}

// KillUnit is systemd's: SIGHUP has logind read its configuration.
func (l *logind) KillUnit(unit, who string, signal int32) *dbus.Error {
	raw, err := os.ReadFile(filepath.Join(l.dropIns, "99-podd.conf"))
	if err != nil || unit != "systemd-logind.service" || signal != 1 {
		return dbus.MakeFailedError(err)
	}
	_, value, _ := strings.Cut(string(raw), "InhibitDelayMaxSec=")
	d, err := time.ParseDuration(strings.TrimSpace(value))
	if err != nil {
		return dbus.MakeFailedError(err)
	}
	l.props.SetMust(logindManager, "InhibitDelayMaxUSec", uint64(d.Microseconds()))
	return nil
}

func (l *logind) prepare(down bool) {
	l.t.Helper()
	if err := l.conn.Emit(logindPath, logindManager+".PrepareForShutdown", down); err != nil {
		l.t.Fatal(err)
	}
}

func newLogind(t *testing.T, dropIns string) *logind {
	t.Helper()
	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	l := &logind{t: t, conn: conn, dropIns: dropIns, locks: make(chan *os.File, 8), asked: make(chan []string, 8)}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(conn.Export(l, logindPath, logindManager))
	check(conn.Export(l, "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"))
	l.props, err = prop.Export(conn, logindPath, prop.Map{logindManager: {"InhibitDelayMaxUSec": {Value: uint64(5_000_000)}, "PreparingForShutdown": {Value: false}}})
	check(err)
	for _, name := range []string{logindName, "org.freedesktop.systemd1"} {
		_, err := conn.RequestName(name, dbus.NameFlagDoNotQueue)
		check(err)
	}
	return l
}

func TestLogind(t *testing.T) {
	bus(t)
	dropIns := filepath.Join(t.TempDir(), "logind.conf.d")
	fake := newLogind(t, dropIns)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	l, err := OpenLogind(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.DropInDir = dropIns

	if d, err := l.DelayMax(ctx); err != nil || d != 5*time.Second {
		t.Fatalf("DelayMax: %s, %v", d, err)
	}
	if err := l.SetDelayMax(ctx, 32500*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if d, err := l.DelayMax(ctx); err != nil || d != 32500*time.Millisecond {
		t.Fatalf("DelayMax afterwards: %s, %v", d, err)
	}

	for _, want := range []bool{false, true} {
		fake.props.SetMust(logindManager, "PreparingForShutdown", want)
		if got, err := l.Preparing(ctx); err != nil || got != want {
			t.Fatalf("Preparing: %v, %v", got, err)
		}
	}
	shutdowns, err := l.Shutdowns(ctx)
	if err != nil {
		t.Fatal(err)
	}
	lock, err := l.Delay(ctx, "because")
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(<-fake.asked, " "); got != "shutdown podd because delay" {
		t.Errorf("Inhibit %s", got)
	}
	// Nobody else can tell of a shutdown, not even straight to our connection.
	other, err := dbus.ConnectSystemBus()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	forged := &dbus.Message{Type: dbus.TypeSignal, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldPath: dbus.MakeVariant(dbus.ObjectPath(logindPath)), dbus.FieldInterface: dbus.MakeVariant(logindManager),
		dbus.FieldMember: dbus.MakeVariant("PrepareForShutdown"), dbus.FieldDestination: dbus.MakeVariant(l.conn.Names()[0]),
		dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf(true)),
	}, Body: []any{true}}
	for _, forge := range []func() error{
		func() error { return other.Emit(logindPath, logindManager+".PrepareForShutdown", true) },
		func() error { return other.Send(forged, nil).Err },
	} {
		if err := forge(); err != nil {
			t.Fatal(err)
		}
	}
	if err := other.BusObject().Call("org.freedesktop.DBus.GetId", 0).Err; err != nil { // both have been routed
		t.Fatal(err)
	}
	for _, want := range []bool{false, true, false} {
		fake.prepare(want)
		select {
		case got, ok := <-shutdowns:
			if !ok || got != want {
				t.Fatalf("told %v, %v; want %v", got, ok, want)
			}
		case <-ctx.Done():
			t.Fatal("not told")
		}
	}
	// What nobody takes in time is told as it is in the end.
	fake.prepare(true)
	fake.prepare(false)
	if err := l.conn.BusObject().Call("org.freedesktop.DBus.GetId", 0).Err; err != nil { // both have come
		t.Fatal(err)
	}
	for got := true; got; {
		select {
		case got = <-shutdowns:
		case <-ctx.Done():
			t.Fatal("not told that the shutdown was called off")
		}
	}
	// The lock ends with its descriptor: the other end reads end of file.
	lock.Close()
	end := <-fake.locks
	defer end.Close()
	if n, err := end.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("lock is still held: %d, %v", n, err)
	}
	// A lost connection ends the channel.
	l.Close()
	select {
	case _, ok := <-shutdowns:
		if ok {
			t.Error("told of a shutdown by nobody")
		}
	case <-ctx.Done():
		t.Error("the end of the connection is not told")
	}
}

func TestNoLogind(t *testing.T) {
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+filepath.Join(t.TempDir(), "none"))
	if _, err := OpenLogind(t.Context()); err == nil {
		t.Error("connected to nothing")
	}
}
