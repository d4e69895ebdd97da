package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/cri/shim/internal/wire"
)

const (
	// sinkRoom is what an attached client may lag behind: a batch.
	sinkRoom = chunk
	// sinkPatience is how long all full clients together may hold a batch of
	// the container's up.
	sinkPatience = 5 * time.Second
)

// sink copies one stream of a container to an attached client. Clients that do
// not read hold the container up for at most sinkPatience, however many they
// are, then they are disconnected: nothing is left out silently.
type sink struct {
	stream int
	f      *os.File
	failed func() // called once when the client is gone or too slow

	mu     sync.Mutex
	queue  [][]byte
	room   int
	ended  bool
	broken bool
	data   chan struct{} // signals the writer, capacity 1
	space  chan struct{} // signals push, capacity 1
	done   chan struct{} // the writer has returned
}

func newSink(stream int, f *os.File, failed func()) *sink {
	k := &sink{stream: stream, f: f, failed: failed, room: sinkRoom,
		data: make(chan struct{}, 1), space: make(chan struct{}, 1), done: make(chan struct{})}
	go k.run()
	return k
}

func poke(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// push queues a copy of p, by the deadline; false when the client is gone, or
// was too slow.
func (k *sink) push(p []byte, deadline *deadline) bool {
	for {
		k.mu.Lock()
		if k.broken || k.ended {
			k.mu.Unlock()
			return false
		}
		if k.room >= len(p) || k.room == sinkRoom {
			k.queue = append(k.queue, append([]byte(nil), p...))
			k.room -= len(p)
			k.mu.Unlock()
			poke(k.data)
			return true
		}
		k.mu.Unlock()
		select {
		case <-k.space:
		case <-deadline.passed():
			k.fail()
			return false
		}
	}
}

// deadline of all pushes of a batch: sinkPatience after the first that had to wait.
type deadline struct {
	after chan struct{}
	timer *time.Timer
}

func (d *deadline) passed() <-chan struct{} {
	if d.timer == nil {
		d.after = make(chan struct{})
		d.timer = time.AfterFunc(sinkPatience, func() { close(d.after) })
	}
	return d.after
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
	}
}

func (k *sink) fail() {
	k.mu.Lock()
	first := !k.broken
	k.broken = true
	k.mu.Unlock()
	// Wakes a writer that is blocked in Write.
	_ = k.f.SetWriteDeadline(time.Now())
	poke(k.data)
	poke(k.space)
	if first {
		k.failed()
	}
}

// end lets the writer finish what is queued and return.
func (k *sink) end() {
	k.mu.Lock()
	k.ended = true
	k.mu.Unlock()
	poke(k.data)
}

func (k *sink) run() {
	defer close(k.done)
	defer k.f.Close()
	for {
		k.mu.Lock()
		queue, stop := k.queue, k.broken || k.ended && len(k.queue) == 0
		k.queue = nil
		k.mu.Unlock()
		if stop {
			return
		}
		if len(queue) == 0 {
			<-k.data
			continue
		}
		for _, p := range queue {
			if _, err := k.f.Write(p); err != nil {
				k.fail()
				return
			}
			k.mu.Lock()
			k.room += len(p)
			k.mu.Unlock()
			poke(k.space)
		}
	}
}

// pollable makes f non-blocking, so that deadlines and Close end its calls.
func pollable(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	_ = f.Close()
	_ = unix.SetNonblock(fd, true)
	return os.NewFile(uintptr(fd), "attached"), nil
}

// attach serves one attached client until the container ends or the client leaves.
func (s *Server) attach(ctx context.Context, conn *wire.Conn, call wire.Call, frame *wire.Frame) error {
	c, err := s.container(call.ID)
	if err != nil {
		return err
	}
	if st := c.state(); st != shim.Running && st != shim.Created {
		return fmt.Errorf("container is %s: %w", st, errdefs.ErrFailedPrecondition)
	}
	end, err := s.sessions.enter(ofContainer(call.ID), maxOfContainer)
	if err != nil {
		return err
	}
	defer end()
	in, outs, err := takeStreams(call.Streams, frame)
	if err != nil {
		return err
	}
	defer closeFiles(in, outs[0], outs[1])
	if outs[0] != nil || outs[1] != nil {
		end, err := s.sessions.enter("the clients attached to the output of container "+call.ID, maxAttached)
		if err != nil {
			return err
		}
		defer end()
	}
	if c.rec.Terminal && outs[1] != nil {
		outs[1].Close() // a terminal has one output
		outs[1] = nil
	}
	if in != nil && c.stdin() == nil {
		return fmt.Errorf("container has no open stdin: %w", errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var sinks []*sink
	for i, f := range outs {
		if f == nil {
			continue
		}
		p, err := pollable(f)
		if err != nil {
			return err
		}
		outs[i] = nil
		k := newSink(i, p, cancel)
		sinks = append(sinks, k)
		defer func() {
			c.out.detach(k)
			k.end()
			// What is queued still goes out, if the client takes it.
			select {
			case <-k.done:
			case <-time.After(sinkPatience):
				k.fail()
				<-k.done
			}
		}()
		if !c.out.attach(k) {
			return fmt.Errorf("container has ended: %w", errdefs.ErrFailedPrecondition)
		}
	}
	if err := conn.Send(wire.Started, wire.Call{}); err != nil {
		return err
	}
	if in != nil {
		stop, err := c.feed(in)
		if err != nil {
			return err
		}
		in = nil
		defer stop()
	}
	requests := make(chan struct{})
	go func() {
		defer close(requests)
		for {
			f, err := conn.Recv()
			if err != nil {
				cancel()
				return
			}
			f.CloseFds()
			var call wire.Call
			if f.Kind == wire.Resize && f.Decode(&call) == nil {
				_ = c.resize(call.Width, call.Height)
			}
		}
	}()
	defer func() { conn.CloseRead(); <-requests }()
	select {
	case <-c.exited:
		exit := c.snapshot().Exit
		return conn.Send(wire.Exit, exit)
	case <-ctx.Done():
		for _, k := range sinks {
			k.mu.Lock()
			broken := k.broken
			k.mu.Unlock()
			if broken {
				return fmt.Errorf("attached client is gone or too slow: %w", errdefs.ErrResourceExhausted)
			}
		}
		return nil
	}
}

// feed copies from to the container's stdin, until its end or stop. The copy has
// a descriptor of its own of stdin: a container that does not read holds up
// whoever writes, and stop ends that one alone.
func (c *container) feed(from *os.File) (stop func(), err error) {
	p, err := pollable(from)
	if err != nil {
		return nil, err
	}
	to, err := c.ownStdin()
	if err != nil {
		p.Close()
		return nil, err
	}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		_, _ = io.Copy(onlyWriter{to}, p)
		c.dropStdin(to)
		// Its end or the client's: once means the first client's.
		if c.rec.StdinOnce && !c.rec.Terminal {
			c.closeStdin()
		}
	}()
	return func() {
		p.Close()
		c.dropStdin(to)
		<-copied
	}, nil
}

// ownStdin is a further descriptor of stdin, which closeStdin closes too.
func (c *container) ownStdin() (*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.in == nil {
		return nil, fmt.Errorf("container has no open stdin: %w", errdefs.ErrFailedPrecondition)
	}
	raw, err := c.in.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	if cerr := raw.Control(func(in uintptr) {
		fd, err = unix.FcntlInt(in, unix.F_DUPFD_CLOEXEC, 0)
	}); cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, fmt.Errorf("stdin for a client: %w", err)
	}
	f := os.NewFile(uintptr(fd), "stdin of a client") // non-blocking as the other
	if c.feeds == nil {
		c.feeds = map[*os.File]struct{}{}
	}
	c.feeds[f] = struct{}{}
	return f, nil
}

func (c *container) dropStdin(f *os.File) {
	c.mu.Lock()
	delete(c.feeds, f)
	c.mu.Unlock()
	f.Close()
}

// onlyWriter hides os.File's ReadFrom, whose splice would not notice Close.
type onlyWriter struct{ io.Writer }

// takeStreams picks stdin, stdout and stderr out of the frame.
func takeStreams(mask uint8, frame *wire.Frame) (in *os.File, outs [2]*os.File, err error) {
	var all [3]*os.File
	next := 0
	for i := range all {
		if mask&(1<<i) == 0 {
			continue
		}
		if next >= len(frame.Fds) {
			return nil, outs, fmt.Errorf("a stream has no descriptor: %w", errdefs.ErrInvalidArgument)
		}
		all[i], frame.Fds[next] = frame.Fds[next], nil
		next++
	}
	return all[0], [2]*os.File{all[1], all[2]}, nil
}

func closeFiles(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close()
		}
	}
}

var errNoTTY = errors.New("container has no terminal")
