package shim

import (
	"net"
	"os"
	"testing"
	"time"

	"github.com/podd-runtime/podd/cri/shim/internal/wire"
)

// TestLongCallIsRepeated: a call that had lasted longer than calls wait for a
// shim that restarts is repeated all the same when the connection breaks, as an
// upgrade's does on a slow machine.
func TestLongCallIsRepeated(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(Dir(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socketPath(dir), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		served <- func() error {
			for call := range 2 {
				c, err := l.AcceptUnix()
				if err != nil {
					return err
				}
				conn := &wire.Conn{UnixConn: c}
				if _, err := conn.Recv(); err != nil {
					return err
				}
				if call == 0 {
					time.Sleep(retryFor + 100*time.Millisecond) // what this test is about
				} else if err := conn.Send(wire.OK, Info{PID: 7}); err != nil {
					return err
				}
				conn.Close()
			}
			return nil
		}()
	}()
	info, err := New(dir).Info(t.Context())
	if err != nil || info.PID != 7 {
		t.Errorf("got %+v, %v", info, err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}
