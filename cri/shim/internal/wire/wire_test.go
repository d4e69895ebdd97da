package wire

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func pair(t *testing.T) (a, b *Conn) {
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
		t.Cleanup(func() { c.Close() })
		return &Conn{UnixConn: c.(*net.UnixConn)}
	}
	return conn(fds[0]), conn(fds[1])
}

func TestFrames(t *testing.T) {
	a, b := pair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 1<<20) // above any socket buffer
	go func() {
		a.Send(Exec, Call{ID: "one"}, r, w)
		a.Send(Create, Call{ID: long})
		a.Send(List, Call{})
		a.Close()
	}()
	f, err := b.Recv()
	if err != nil || f.Kind != Exec || len(f.Fds) != 2 {
		t.Fatalf("first: %+v %v", f, err)
	}
	io.WriteString(f.Fds[1], "hello")
	buf := make([]byte, 5)
	if _, err := io.ReadFull(f.Fds[0], buf); err != nil || string(buf) != "hello" {
		t.Errorf("descriptors: %q %v", buf, err)
	}
	f.CloseFds()
	var call Call
	if f, err = b.Recv(); err != nil || f.Decode(&call) != nil || call.ID != long || len(f.Fds) != 0 {
		t.Fatalf("second: %v", err)
	}
	if f, err = b.Recv(); err != nil || f.Kind != List {
		t.Fatalf("third: %v", err)
	}
	if _, err = b.Recv(); err != io.EOF {
		t.Fatalf("end: %v", err)
	}
}

func TestMalformedFrames(t *testing.T) {
	header := func(length uint32, nfds uint16) []byte {
		h := make([]byte, headerLen)
		binary.BigEndian.PutUint32(h, length)
		binary.BigEndian.PutUint16(h[4:], uint16(List))
		binary.BigEndian.PutUint16(h[6:], nfds)
		return h
	}
	for name, data := range map[string][]byte{
		"too long":            header(MaxBody+1, 0),
		"missing descriptors": append(header(2, 1), "{}"...),
		"cut off":             append(header(10, 0), "{}"...),
		"half a header":       header(2, 0)[:3],
	} {
		a, b := pair(t)
		a.Write(data)
		a.Close()
		if f, err := b.Recv(); err == nil || err == io.EOF {
			t.Errorf("%s: %+v %v", name, f, err)
		}
	}
	a, _ := pair(t)
	if err := a.SendRaw(List, make([]byte, MaxBody+1)); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("sending too much: %v", err)
	}
	f := Frame{Body: []byte("{")}
	if err := f.Decode(&Call{}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("decode: %v", err)
	}
}

func TestErrors(t *testing.T) {
	for _, want := range []error{errdefs.ErrNotFound, errdefs.ErrFailedPrecondition, errdefs.ErrUnavailable, context.Canceled, context.DeadlineExceeded} {
		err := fmt.Errorf("container x: %w", want)
		got := EncodeError(err).Err()
		if !errors.Is(got, want) || got.Error() != err.Error() {
			t.Errorf("%v became %v", err, got)
		}
	}
	if got := EncodeError(errors.New("odd")).Err(); !errors.Is(got, errdefs.ErrInternal) || got.Error() != "odd" {
		t.Errorf("odd became %v", got)
	}
}

func TestLongSocketPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	addr, release, err := SocketPath(path)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", addr)
	release()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}
