package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim/internal/wire"
)

// Unknown is the exit code of a process that nobody could reap.
const Unknown = 255

// retryFor bounds how long a call waits for a shim that is restarting or
// upgrading itself (a few milliseconds) before it reports Unavailable.
const retryFor = 5 * time.Second

// Dir is the shim's directory below podd's run directory.
func Dir(runDir string) string { return filepath.Join(runDir, "shim") }

func socketPath(runDir string) string { return filepath.Join(Dir(runDir), "shim.sock") }

// Client talks to the podd-shim of a run directory. It holds no connection
// between calls and is safe for concurrent use. Every call may be repeated;
// while the shim restarts or upgrades itself calls wait for up to 5 s.
// Errors are errdefs' (ErrNotFound, ErrFailedPrecondition, ErrUnavailable …).
type Client struct {
	path string
}

// New returns a client of the shim in runDir. It does not connect.
func New(runDir string) *Client { return &Client{path: socketPath(runDir)} }

// connect dials until the shim answers, ctx ends or retryFor has passed.
func (c *Client) connect(ctx context.Context) (*wire.Conn, error) {
	deadline := time.Now().Add(retryFor)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		conn, err := wire.Dial(ctx, c.path)
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if !transient(err) || time.Now().After(deadline) {
			return nil, fmt.Errorf("connect to podd-shim at %s: %w: %w", c.path, err, errdefs.ErrUnavailable)
		}
		if err := sleep(ctx, pause); err != nil {
			return nil, err
		}
	}
}

// transient: the listener is being replaced, or its backlog is full.
func transient(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.ENOENT)
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// lost reports that the connection broke without an answer: the shim was
// killed or is replacing itself. Repeating is safe for every call but Exec.
func lost(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// open sends the request and returns its first answer with the connection.
func (c *Client) open(ctx context.Context, kind wire.Kind, body []byte, fds []*os.File, repeat bool) (*wire.Conn, *wire.Frame, error) {
	var deadline time.Time // from the first failure: a call may have lasted until then
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		conn, err := c.connect(ctx)
		if err != nil {
			return nil, nil, err
		}
		frame, err := roundTrip(ctx, conn, kind, body, fds)
		if err == nil {
			return conn, frame, nil
		}
		conn.Close()
		if ctx.Err() != nil {
			return nil, nil, ctx.Err()
		}
		if deadline.IsZero() {
			deadline = time.Now().Add(retryFor)
		}
		if lost(err) && !repeat {
			return nil, nil, fmt.Errorf("podd-shim went away during the call: %w", errdefs.ErrUnavailable)
		}
		if !(lost(err) || errors.Is(err, errRefused)) || time.Now().After(deadline) {
			if lost(err) {
				err = fmt.Errorf("podd-shim went away during the call: %w", errdefs.ErrUnavailable)
			}
			return nil, nil, err
		}
		if err := sleep(ctx, pause); err != nil {
			return nil, nil, err
		}
	}
}

// errRefused marks an Unavailable that the shim itself answered: it did
// nothing yet, so even an exec may be repeated.
var errRefused = errors.New("refused")

func roundTrip(ctx context.Context, conn *wire.Conn, kind wire.Kind, body []byte, fds []*os.File) (*wire.Frame, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := conn.SendRaw(kind, body, fds...); err != nil {
		return nil, err
	}
	frame, err := conn.Recv()
	if err != nil {
		return nil, err
	}
	if frame.Kind == wire.Failure {
		err := failure(frame)
		if errors.Is(err, errdefs.ErrUnavailable) {
			err = errors.Join(err, errRefused)
		}
		return nil, err
	}
	return frame, nil
}

func failure(f *wire.Frame) error {
	var e wire.Error
	if err := f.Decode(&e); err != nil {
		return err
	}
	return e.Err()
}

// call is a request with one answer.
func (c *Client) call(ctx context.Context, kind wire.Kind, req, result any, fds ...*os.File) error {
	body, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("encode request: %w", err)
	}
	conn, frame, err := c.open(ctx, kind, body, fds, true)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer frame.CloseFds()
	if result == nil {
		return nil
	}
	return frame.Decode(result)
}

// CreateSandbox starts the pause process that holds a pod's namespaces.
func (c *Client) CreateSandbox(ctx context.Context, s *SandboxSpec) (*Process, error) {
	p := new(Process)
	if err := c.call(ctx, wire.CreateSandbox, s, p); err != nil {
		return nil, fmt.Errorf("create sandbox %s: %w", s.ID, err)
	}
	return p, nil
}

// DeleteSandbox kills the pause process and forgets it. Unknown ids succeed.
func (c *Client) DeleteSandbox(ctx context.Context, id string) error {
	if err := c.call(ctx, wire.DeleteSandbox, wire.Call{ID: id}, nil); err != nil {
		return fmt.Errorf("delete sandbox %s: %w", id, err)
	}
	return nil
}

// Create sets the container up; its init waits for Start.
func (c *Client) Create(ctx context.Context, s *ContainerSpec) (*Process, error) {
	p := new(Process)
	if err := c.call(ctx, wire.Create, s, p); err != nil {
		return nil, fmt.Errorf("create container %s: %w", s.ID, err)
	}
	return p, nil
}

// Start lets a created container run its program.
func (c *Client) Start(ctx context.Context, id string) (*Process, error) {
	p := new(Process)
	if err := c.call(ctx, wire.Start, wire.Call{ID: id}, p); err != nil {
		return nil, fmt.Errorf("start container %s: %w", id, err)
	}
	return p, nil
}

// Signal sends to the container's init, or to each of its processes with all.
// A container that has ended already is no error.
func (c *Client) Signal(ctx context.Context, id string, signal int, all bool) error {
	if err := c.call(ctx, wire.Signal, wire.Call{ID: id, Signal: signal, All: all}, nil); err != nil {
		return fmt.Errorf("signal container %s: %w", id, err)
	}
	return nil
}

// Delete kills what is left of the container, drains its log and forgets it.
// Unknown ids succeed.
func (c *Client) Delete(ctx context.Context, id string) error {
	if err := c.call(ctx, wire.Delete, wire.Call{ID: id}, nil); err != nil {
		return fmt.Errorf("delete container %s: %w", id, err)
	}
	return nil
}

// State of one container or sandbox.
func (c *Client) State(ctx context.Context, id string) (*Process, error) {
	p := new(Process)
	if err := c.call(ctx, wire.State, wire.Call{ID: id}, p); err != nil {
		return nil, fmt.Errorf("state of %s: %w", id, err)
	}
	return p, nil
}

// List returns all sandboxes and containers, ordered by creation.
func (c *Client) List(ctx context.Context) ([]Process, error) {
	var list []Process
	if err := c.call(ctx, wire.List, wire.Call{}, &list); err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	return list, nil
}

// Update changes the cgroup limits of a container; what r leaves out stays.
func (c *Client) Update(ctx context.Context, id string, r *specs.LinuxResources) error {
	if err := c.call(ctx, wire.Update, wire.Call{ID: id, Resources: r}, nil); err != nil {
		return fmt.Errorf("update container %s: %w", id, err)
	}
	return nil
}

// ResizeTTY sets the window of a container's own terminal.
func (c *Client) ResizeTTY(ctx context.Context, id string, width, height uint16) error {
	if err := c.call(ctx, wire.Resize, wire.Call{ID: id, Width: width, Height: height}, nil); err != nil {
		return fmt.Errorf("resize terminal of %s: %w", id, err)
	}
	return nil
}

// ReopenLog makes the shim open the log path anew after somebody rotated it.
func (c *Client) ReopenLog(ctx context.Context, id string) error {
	if err := c.call(ctx, wire.ReopenLog, wire.Call{ID: id}, nil); err != nil {
		return fmt.Errorf("reopen log of %s: %w", id, err)
	}
	return nil
}

// Info says who the shim is.
func (c *Client) Info(ctx context.Context) (*Info, error) {
	i := new(Info)
	if err := c.call(ctx, wire.Info, wire.Call{}, i); err != nil {
		return nil, fmt.Errorf("podd-shim info: %w", err)
	}
	return i, nil
}

// Exec starts a further process in a running container. The descriptors of e
// remain the caller's: close your copies when Exec has returned.
func (c *Client) Exec(ctx context.Context, e *ExecSpec) (Session, error) {
	req := wire.ExecRequest{Call: wire.Call{ID: e.ContainerID}, Process: e.Process, Libcontainer: e.Libcontainer}
	fds := streams(&req.Call, e.Stdin, e.Stdout, e.Stderr)
	body, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("encode exec: %w", err)
	}
	conn, frame, err := c.open(ctx, wire.Exec, body, fds, false)
	if err != nil {
		return nil, fmt.Errorf("exec in %s: %w", e.ContainerID, err)
	}
	return newSession(conn, frame)
}

// Attach streams a running container. Output that appears from now on is
// copied to out and err; in is copied to its stdin, and its end closes the
// container's stdin when StdinOnce is set. With a terminal all output is out's.
// A reader that stays behind for more than a few seconds is disconnected.
func (c *Client) Attach(ctx context.Context, id string, in, out, err *os.File) (Session, error) {
	req := wire.Call{ID: id}
	fds := streams(&req, in, out, err)
	body, merr := json.Marshal(req)
	if merr != nil {
		return nil, fmt.Errorf("encode attach: %w", merr)
	}
	conn, frame, oerr := c.open(ctx, wire.Attach, body, fds, false)
	if oerr != nil {
		return nil, fmt.Errorf("attach to %s: %w", id, oerr)
	}
	return newSession(conn, frame)
}

func streams(call *wire.Call, files ...*os.File) []*os.File {
	var fds []*os.File
	for i, f := range files {
		if f != nil {
			call.Streams |= 1 << i
			fds = append(fds, f)
		}
	}
	return fds
}

// session is a connection on which the end of a process will be told.
type session struct {
	conn *wire.Conn
	pid  int
	tty  *os.File

	send sync.Mutex
	done chan struct{} // closed when the fields below are set
	exit *Exit
	err  error
	// killed: the shim has said that it kills the process because we hung up.
	killed bool
}

func newSession(conn *wire.Conn, started *wire.Frame) (*session, error) {
	var call wire.Call
	if err := started.Decode(&call); err != nil || started.Kind != wire.Started {
		started.CloseFds()
		conn.Close()
		return nil, fmt.Errorf("unexpected answer %d to exec: %w", started.Kind, errdefs.ErrInternal)
	}
	s := &session{conn: conn, pid: call.PID, done: make(chan struct{})}
	var err error
	if len(started.Fds) > 0 {
		s.tty, err = pollable(started.Fds[0])
	}
	started.CloseFds()
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("terminal of exec: %w", err)
	}
	go s.receive()
	return s, nil
}

// pollable copies f into a file whose reads Close ends.
func pollable(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

func (s *session) receive() {
	defer close(s.done)
	frame, err := s.conn.Recv()
	if err == nil && frame.Kind == wire.Failure && errors.Is(failure(frame), context.Canceled) {
		// The process ran when we hung up and is being killed. The connection
		// ends when it is gone.
		s.killed = true
		_, err = s.conn.Recv()
	}
	switch {
	case err != nil && lost(err) || errors.Is(err, net.ErrClosed):
		// The shim died; the process runs on or has ended, nobody can tell.
		s.err = fmt.Errorf("podd-shim went away, exit status lost: %w", errdefs.ErrUnavailable)
	case err != nil:
		s.err = err
	case frame.Kind == wire.Failure:
		s.err = failure(frame)
	case frame.Kind == wire.Exit:
		s.exit = new(Exit)
		s.err = frame.Decode(s.exit)
	default:
		s.err = fmt.Errorf("unexpected message %d in a session: %w", frame.Kind, errdefs.ErrInternal)
	}
	s.conn.Close()
}

func (s *session) TTY() *os.File { return s.tty }
func (s *session) PID() int      { return s.pid }

func (s *session) tell(kind wire.Kind, call wire.Call) error {
	s.send.Lock()
	defer s.send.Unlock()
	select {
	case <-s.done:
		return fmt.Errorf("session has ended: %w", errdefs.ErrNotFound)
	default:
	}
	return s.conn.Send(kind, call)
}

func (s *session) Resize(width, height uint16) error {
	if s.tty != nil {
		raw, err := s.tty.SyscallConn()
		if err != nil {
			return err
		}
		var ioerr error
		err = raw.Control(func(fd uintptr) {
			ioerr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: height, Col: width})
		})
		return errors.Join(err, ioerr)
	}
	return s.tell(wire.Resize, wire.Call{Width: width, Height: height})
}

func (s *session) Signal(signal int) error {
	return s.tell(wire.Signal, wire.Call{Signal: signal})
}

// killWait bounds the wait for a killed process, which may hang in the kernel.
const killWait = 5 * time.Second

func (s *session) Wait(ctx context.Context) (*Exit, error) {
	select {
	case <-s.done:
		return s.exit, s.err
	case <-ctx.Done():
		// The shim kills the process and its descendants, and closes its side
		// when they are gone: who is told of a time-out finds none of them.
		_ = s.conn.CloseWrite()
		late := time.NewTimer(killWait)
		defer late.Stop()
		select {
		case <-s.done:
		case <-late.C:
			s.conn.Close()
			<-s.done
		}
		switch {
		case s.exit != nil:
			return s.exit, nil
		case s.killed:
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("podd-shim does not say how it ended (%w): %w", s.err, errdefs.ErrUnavailable)
	}
}

func (s *session) Close() error {
	s.conn.Close()
	<-s.done
	if s.tty != nil {
		s.tty.Close()
	}
	return nil
}

// Events delivers every event with Seq > after that the shim still keeps, then
// those to come, in order. When podd was away for longer than the shim's log
// reaches back (4096 events) the first Seq is above after+1: List then tells
// what is. The channel closes when ctx ends.
func (c *Client) Events(ctx context.Context, after uint64) (<-chan Event, error) {
	conn, after, err := c.subscribe(ctx, after)
	if err != nil {
		return nil, fmt.Errorf("subscribe to events: %w", err)
	}
	out := make(chan Event)
	go func() {
		defer close(out)
		for {
			after = c.follow(ctx, conn, after, out)
			for conn = nil; conn == nil; {
				if ctx.Err() != nil {
					return
				}
				if conn, after, err = c.subscribe(ctx, after); err != nil {
					_ = sleep(ctx, 100*time.Millisecond)
				}
			}
		}
	}()
	return out, nil
}

// subscribe also returns from where the stream really begins: from the start
// when the shim never gave out the number, as after a reboot.
func (c *Client) subscribe(ctx context.Context, after uint64) (*wire.Conn, uint64, error) {
	body, err := json.Marshal(wire.Call{After: after})
	if err != nil {
		return nil, after, err
	}
	conn, frame, err := c.open(ctx, wire.Events, body, nil, true)
	if err != nil {
		return nil, after, err
	}
	var from wire.Call
	if err := frame.Decode(&from); err != nil {
		conn.Close()
		return nil, after, err
	}
	return conn, from.After, nil
}

// follow hands events on until the connection ends and returns the last Seq.
func (c *Client) follow(ctx context.Context, conn *wire.Conn, after uint64, out chan<- Event) uint64 {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	for {
		frame, err := conn.Recv()
		if err != nil || frame.Kind != wire.Event {
			return after
		}
		var batch []Event
		if frame.Decode(&batch) != nil {
			return after
		}
		for _, e := range batch {
			if e.Seq <= after {
				continue
			}
			select {
			case out <- e:
				after = e.Seq
			case <-ctx.Done():
				return after
			}
		}
	}
}
