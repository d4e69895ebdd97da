// Package wire frames the messages between podd and podd-shim: one header,
// one JSON body and possibly descriptors, on a stream unix socket.
//
//	0        4      6      8
//	+--------+------+------+----------------------+
//	| length | kind | nfds | body: JSON, length B |
//	+--------+------+------+----------------------+
//
// All integers are big endian. Descriptors travel with the header (SCM_RIGHTS).
// A connection carries one call: the request, then its answers. Closing the
// connection cancels the call. Follow-up frames exist for sessions (exec,
// attach: Resize, Signal) and for the event stream.
package wire

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Protocol is the version both sides must share. It is raised when an old
// peer would misunderstand a frame; new optional JSON fields do not raise it.
const Protocol = 1

const (
	// MaxBody bounds a frame: an OCI specification with a long seccomp profile
	// and a thousand mounts stays below 1 MiB.
	MaxBody = 8 << 20
	// MaxFDs bounds the descriptors of one frame.
	MaxFDs    = 8
	headerLen = 8
)

// Kind says what the body of a frame is.
type Kind uint16

// Requests.
const (
	CreateSandbox Kind = iota + 1 // shim.SandboxSpec → shim.Process
	DeleteSandbox                 // Call
	Create                        // shim.ContainerSpec → shim.Process
	Start                         // Call → shim.Process
	Signal                        // Call; also within a session
	Delete                        // Call
	State                         // Call → shim.Process
	List                          // Call → []shim.Process
	Update                        // Call
	Exec                          // shim.ExecSpec and three descriptors → Started, then Exit
	Attach                        // Call and descriptors → Started, then Exit
	Resize                        // Call; also within a session
	ReopenLog                     // Call
	Events                        // Call → Event frames without end
	Info                          // Call → shim.Info
	Upgrade                       // Call and the new program's descriptor
	Shutdown                      // Call
)

// Answers.
const (
	OK      Kind = iota + 64 // the result
	Failure                  // Error
	Started                  // Call with PID; the pty master if there is one
	Exit                     // shim.Exit
	Event                    // []shim.Event
)

// Call is the body of every request that is not a specification.
type Call struct {
	ID        string                `json:"id,omitempty"`
	Signal    int                   `json:"signal,omitempty"`
	All       bool                  `json:"all,omitempty"`
	After     uint64                `json:"after,omitempty"`
	PID       int                   `json:"pid,omitempty"`
	Width     uint16                `json:"width,omitempty"`
	Height    uint16                `json:"height,omitempty"`
	Resources *specs.LinuxResources `json:"resources,omitempty"`
	// Streams says which standard streams have a descriptor in the frame, in
	// this order: bit 0 stdin, 1 stdout, 2 stderr.
	Streams uint8 `json:"streams,omitempty"`
	// Timeout of the caller, zero: none. The server bounds its own work by it.
	Timeout time.Duration `json:"timeout,omitempty"`
}

// ExecRequest is the body of Exec.
type ExecRequest struct {
	Call
	Process *specs.Process `json:"process"`
	// Libcontainer is shim.ExecSpec's.
	Libcontainer bool `json:"libcontainer,omitempty"`
}

// Error is a failure on the wire.
type Error struct {
	Kind    string `json:"kind"`
	Message string `json:"message"`
}

var kinds = []struct {
	name string
	err  error
}{
	{"not-found", errdefs.ErrNotFound},
	{"already-exists", errdefs.ErrAlreadyExists},
	{"invalid-argument", errdefs.ErrInvalidArgument},
	{"failed-precondition", errdefs.ErrFailedPrecondition},
	{"permission-denied", errdefs.ErrPermissionDenied},
	{"resource-exhausted", errdefs.ErrResourceExhausted},
	{"out-of-range", errdefs.ErrOutOfRange},
	{"not-implemented", errdefs.ErrNotImplemented},
	{"unavailable", errdefs.ErrUnavailable},
	{"canceled", context.Canceled},
	{"deadline", context.DeadlineExceeded},
}

// remoteError keeps the message as the other side wrote it and the sentinel
// for errors.Is.
type remoteError struct {
	msg  string
	kind error
}

func (e *remoteError) Error() string { return e.msg }
func (e *remoteError) Unwrap() error { return e.kind }

// EncodeError makes err fit for the wire.
func EncodeError(err error) Error {
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			return Error{Kind: k.name, Message: err.Error()}
		}
	}
	return Error{Kind: "internal", Message: err.Error()}
}

// Err turns a wire error back into one that errors.Is understands.
func (e Error) Err() error {
	for _, k := range kinds {
		if e.Kind == k.name {
			return &remoteError{e.Message, k.err}
		}
	}
	return &remoteError{e.Message, errdefs.ErrInternal}
}

// Frame is one received message.
type Frame struct {
	Kind Kind
	Body []byte
	Fds  []*os.File
}

// Decode unmarshals the body.
func (f *Frame) Decode(v any) error {
	if err := json.Unmarshal(f.Body, v); err != nil {
		return fmt.Errorf("decode message %d: %w: %w", f.Kind, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// CloseFds closes the descriptors that nobody took.
func (f *Frame) CloseFds() {
	for _, fd := range f.Fds {
		if fd != nil {
			fd.Close()
		}
	}
	f.Fds = nil
}

// Conn is one end. Send and Recv may run at the same time, each in one goroutine.
type Conn struct {
	*net.UnixConn
}

// Send writes one frame. The descriptors remain the caller's.
func (c *Conn) Send(kind Kind, v any, fds ...*os.File) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode message %d: %w", kind, err)
	}
	return c.SendRaw(kind, body, fds...)
}

// SendRaw writes a frame whose body is JSON already.
func (c *Conn) SendRaw(kind Kind, body []byte, fds ...*os.File) error {
	if len(body) > MaxBody {
		return fmt.Errorf("message %d of %d bytes is above the limit of %d: %w", kind, len(body), MaxBody, errdefs.ErrInvalidArgument)
	}
	buf := make([]byte, headerLen, headerLen+len(body))
	binary.BigEndian.PutUint32(buf, uint32(len(body)))
	binary.BigEndian.PutUint16(buf[4:], uint16(kind))
	binary.BigEndian.PutUint16(buf[6:], uint16(len(fds)))
	buf = append(buf, body...)
	var oob []byte
	if len(fds) > 0 {
		raw := make([]int, len(fds))
		for i, f := range fds {
			raw[i] = int(f.Fd())
		}
		oob = unix.UnixRights(raw...)
	}
	n, _, err := c.WriteMsgUnix(buf, oob, nil)
	if err == nil && n < len(buf) {
		_, err = c.Write(buf[n:])
	}
	return err
}

// Recv reads one frame; io.EOF when the peer has closed between frames.
func (c *Conn) Recv() (*Frame, error) {
	var header [headerLen]byte
	oob := make([]byte, unix.CmsgSpace(MaxFDs*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(header[:], oob)
	if errors.Is(err, io.EOF) {
		return nil, io.EOF
	}
	if err != nil {
		return nil, err
	}
	f := &Frame{}
	if oobn > 0 {
		if f.Fds, err = parseRights(oob[:oobn]); err != nil {
			return nil, err
		}
	}
	if n == 0 {
		f.CloseFds()
		return nil, io.EOF
	}
	if flags&unix.MSG_CTRUNC != 0 {
		f.CloseFds()
		return nil, fmt.Errorf("descriptors of a message were cut off (limit %d, or too many open files): %w", MaxFDs, errdefs.ErrResourceExhausted)
	}
	if n < headerLen {
		if _, err := io.ReadFull(c.UnixConn, header[n:]); err != nil {
			f.CloseFds()
			return nil, noEOF(err)
		}
	}
	length := binary.BigEndian.Uint32(header[:])
	f.Kind = Kind(binary.BigEndian.Uint16(header[4:]))
	if nfds := int(binary.BigEndian.Uint16(header[6:])); length > MaxBody || nfds != len(f.Fds) {
		f.CloseFds()
		return nil, fmt.Errorf("malformed message: %d bytes, %d descriptors announced, %d received: %w", length, nfds, len(f.Fds), errdefs.ErrInvalidArgument)
	}
	f.Body = make([]byte, length)
	if _, err := io.ReadFull(c.UnixConn, f.Body); err != nil {
		f.CloseFds()
		return nil, noEOF(err)
	}
	return f, nil
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func parseRights(oob []byte) ([]*os.File, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("parse control message: %w", err)
	}
	var files []*os.File
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, nil
}

// maxSocketPath is the size of sockaddr_un.sun_path less the closing NUL.
const maxSocketPath = 107

// SocketPath returns an address of path that fits sockaddr_un; release must be
// called after it was used. Long paths go through a descriptor of the directory.
func SocketPath(path string) (addr string, release func(), err error) {
	if len(path) <= maxSocketPath {
		return path, func() {}, nil
	}
	dir, err := os.OpenFile(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, err
	}
	return "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + filepath.Base(path), func() { dir.Close() }, nil
}

// Dial connects to the socket at path.
func Dial(ctx context.Context, path string) (*Conn, error) {
	addr, release, err := SocketPath(path)
	if err != nil {
		return nil, err
	}
	defer release()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", addr)
	if err != nil {
		return nil, err
	}
	return &Conn{UnixConn: c.(*net.UnixConn)}, nil
}
