package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// FuzzRecv: whatever the peer sends, a frame is what was sent, or an error; no
// descriptor is left open, and no more is taken than a frame may have.
func FuzzRecv(f *testing.F) {
	frame := func(kind Kind, nfds int, body string) []byte {
		b := make([]byte, headerLen)
		binary.BigEndian.PutUint32(b, uint32(len(body)))
		binary.BigEndian.PutUint16(b[4:], uint16(kind))
		binary.BigEndian.PutUint16(b[6:], uint16(nfds))
		return append(b, body...)
	}
	f.Add(frame(State, 0, `{"id":"a"}`), uint8(0))
	f.Add(append(frame(Exec, 3, `{"id":"a","process":{"args":["x"]},"streams":7}`), frame(Resize, 0, `{"width":1}`)...), uint8(3))
	f.Add(frame(Failure, 0, `{"kind":"not-found","message":"x"}`), uint8(1))
	f.Add(frame(Event, 0, `[{"seq":1}]`)[:12], uint8(0))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 1, 0, 0}, uint8(MaxFDs))
	f.Fuzz(func(t *testing.T, data []byte, nfds uint8) {
		a, b := sockets(t)
		defer b.Close()
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		var oob []byte
		if n := int(nfds) % (MaxFDs + 3); n > 0 {
			fds := make([]int, n)
			for i := range fds {
				fds[i] = int(null.Fd())
			}
			oob = unix.UnixRights(fds...)
		}
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			defer a.Close()
			if len(data) > 0 {
				if n, _, err := a.WriteMsgUnix(data, oob, nil); err == nil && n < len(data) {
					a.Write(data[n:])
				}
			}
		}()
		before := descriptors(t)
		at := 0
		for {
			got, err := b.Recv()
			if err != nil {
				if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && at != len(data) {
					t.Fatalf("end after %d of %d bytes", at, len(data))
				}
				break
			}
			if len(got.Fds) > MaxFDs || len(got.Body) > MaxBody {
				t.Fatalf("%d descriptors, %d bytes", len(got.Fds), len(got.Body))
			}
			at += headerLen
			if string(got.Body) != string(data[at:at+len(got.Body)]) {
				t.Fatalf("body %q", got.Body)
			}
			at += len(got.Body)
			for _, v := range []any{&Call{}, &ExecRequest{}, &Error{}, &specs.Spec{}} {
				if err := got.Decode(v); err == nil {
					if e, ok := v.(*Error); ok && e.Err() == nil {
						t.Fatal("an error that is none")
					}
				}
			}
			got.CloseFds()
		}
		b.Close()
		<-sent
		if after := descriptors(t); after > before {
			t.Fatalf("%d descriptors, %d before", after, before)
		}
	})
}

// FuzzError: an error keeps its kind and message over the wire.
func FuzzError(f *testing.F) {
	for _, k := range kinds {
		f.Add(k.name, "x")
	}
	f.Add("internal", "")
	f.Fuzz(func(t *testing.T, kind, message string) {
		raw, err := json.Marshal(Error{Kind: kind, Message: message})
		if err != nil {
			t.Skip()
		}
		var e Error
		if err := json.Unmarshal(raw, &e); err != nil {
			t.Fatal(err)
		}
		got := e.Err()
		if again := EncodeError(got); again.Message != got.Error() || (again.Kind != kind && again.Kind != "internal") {
			t.Fatalf("%q became %q", kind, again.Kind)
		}
	})
}

func sockets(t *testing.T) (a, b *Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn := func(fd int) *Conn {
		f := os.NewFile(uintptr(fd), "pair")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		return &Conn{UnixConn: c.(*net.UnixConn)}
	}
	return conn(fds[0]), conn(fds[1])
}

// descriptors that are open on /dev/null: those that a message brought.
func descriptors(t *testing.T) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && to == os.DevNull {
			n++
		}
	}
	return n
}
