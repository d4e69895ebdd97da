// Package server is podd-shim: parent and reaper of every container of the
// node, on libcontainer. See package shim for the protocol.
//
// Locks: a container's or sandbox's op lock serialises what changes its life
// (create, start, delete, update); mu guards its record for a few instructions
// and is never held over a system call that may block; Server.mu guards the
// maps alone. There is no lock that two starts share.
package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"sort"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/cri/shim/internal/program"
	"github.com/podd-runtime/podd/cri/shim/internal/wire"
)

// maxCalls bounds the calls served at once, sessions aside, see sessions. Who
// comes when there are so many waits to be accepted: no call is refused.
const maxCalls = 4096

// Config of a Server.
type Config struct {
	RunDir string
	Pause  []byte // the program cmd/pause
	Enter  []byte // the program cmd/enter
	Lock   int    // descriptor that holds the instance lock
	Log    *slog.Logger
}

// Server is the shim's state.
type Server struct {
	dir     string // RunDir/shim
	log     *slog.Logger
	started time.Time
	build   string

	loop    *loop
	reaper  *reaper
	events  *eventLog
	filters *filters
	host    *host
	pause   *program.Program
	enter   *program.Program // of execs
	empty   *os.File         // root directory of pause processes

	containers store
	sandboxes  store

	mu    sync.RWMutex
	byID  map[string]*container
	boxes map[string]*sandbox

	familyMu sync.Mutex
	families map[string]*family // by counter file

	listener *net.UnixListener
	lock     int // descriptor of the instance lock
	gate     gate
	calls    chan struct{} // has an entry for each that is served
	sessions *sessions
	open     openCalls
	idle     *time.Timer   // gives memory back after a burst
	failed   atomic.Bool   // a creation or deletion, since that was done last
	stop     chan struct{} // closed by Shutdown
	stopOnce sync.Once
}

// New prepares the directories and takes up what an earlier shim left.
func New(cfg Config) (*Server, error) {
	dir := shim.Dir(cfg.RunDir)
	s := &Server{
		dir: dir, lock: cfg.Lock, log: cfg.Log, started: time.Now(),
		byID: map[string]*container{}, boxes: map[string]*sandbox{}, families: map[string]*family{},
		stop: make(chan struct{}), calls: make(chan struct{}, maxCalls), sessions: newSessions(),
	}
	for _, d := range []string{dir, s.path("containers"), s.path("sandboxes"), s.path("quarantine"), s.path("seccomp"), s.path("lc")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	// Container inits with user namespaces reach their exec fifo through a
	// descriptor; nobody else has business here.
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, err
	}
	s.containers = store{root: s.path("containers"), quarantine: s.path("quarantine"), log: s.log}
	s.sandboxes = store{root: s.path("sandboxes"), quarantine: s.path("quarantine"), log: s.log}
	s.filters = newFilters(s.path("seccomp"))
	s.idle = time.AfterFunc(idleAfter, func() {
		s.failed.Store(false)
		debug.FreeOSMemory()
	})
	var err error
	if s.build, err = shim.BuildID("/proc/self/exe"); err != nil {
		return nil, err
	}
	if s.host, err = probeHost(); err != nil {
		return nil, err
	}
	if s.pause, err = program.New("pause", cfg.Pause); err != nil {
		return nil, err
	}
	if s.enter, err = program.New("enter", cfg.Enter); err != nil {
		return nil, err
	}
	if s.empty, err = emptyRoot(); err != nil {
		return nil, err
	}
	if s.events, err = openEvents(s.path("events"), s.log); err != nil {
		return nil, err
	}
	if s.loop, err = newLoop(); err != nil {
		return nil, err
	}
	s.reaper = newReaper(s.loop, s.log)
	// Orphans of containers without a PID namespace become ours.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("become subreaper: %w", err)
	}
	return s, nil
}

func (s *Server) path(name string) string { return filepath.Join(s.dir, name) }

// emptyRoot returns the root of an empty, read-only mount that is attached
// nowhere: nothing is above it.
func emptyRoot() (*os.File, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("empty root for pause: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("empty root for pause: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("empty root for pause: %w", err)
	}
	return os.NewFile(uintptr(fd), "empty root"), nil
}

// Listen opens the socket, or takes over the one that fd refers to.
func (s *Server) Listen(inherited *os.File) error {
	path := s.path("shim.sock")
	if inherited != nil {
		l, err := net.FileListener(inherited)
		if err != nil {
			return fmt.Errorf("take over listener: %w", err)
		}
		inherited.Close()
		s.listener = l.(*net.UnixListener)
		s.listener.SetUnlinkOnClose(false)
		return nil
	}
	addr, release, err := wire.SocketPath(path)
	if err != nil {
		return err
	}
	defer release()
	for told := false; ; time.Sleep(retryListen) {
		err := s.bind(path, addr)
		if !full(err) {
			return err
		}
		if !told { // containers are served meanwhile
			told = true
			s.log.Error("no room for the socket, waiting for it", "error", err)
		}
	}
}

// retryListen is the time between two tries to make the socket in a full file system.
const retryListen = 100 * time.Millisecond

func (s *Server) bind(path, addr string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	old := syscall.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: addr, Net: "unix"})
	syscall.Umask(old)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	s.listener = l
	return nil
}

// Serve answers calls until Shutdown.
func (s *Server) Serve() error {
	go func() {
		<-s.stop
		s.listener.Close()
	}()
	for {
		c, err := s.listener.AcceptUnix()
		if err != nil {
			select {
			case <-s.stop:
				return nil
			default:
			}
			s.log.Error("accept", "error", err)
			time.Sleep(50 * time.Millisecond) // out of descriptors, most likely
			continue
		}
		select {
		case s.calls <- struct{}{}:
		case <-s.stop:
			c.Close()
			continue
		}
		done := sync.OnceFunc(func() { <-s.calls })
		conn := &wire.Conn{UnixConn: c}
		call := s.open.begin(conn)
		go func() {
			defer done()
			defer s.open.over(conn)
			s.serve(conn, call, done)
		}()
	}
}

// requestTimeout is how long a connected peer may take to send its request.
const requestTimeout = 30 * time.Second

// serve answers one connection; done says that it counts no more as a call.
func (s *Server) serve(conn *wire.Conn, call *openCall, done func()) {
	defer conn.Close()
	if err := checkPeer(conn.UnixConn); err != nil {
		s.log.Warn("refused a connection", "error", err)
		return
	}
	_ = conn.SetReadDeadline(time.Now().Add(requestTimeout))
	frame, err := conn.Recv()
	if err != nil {
		if err != io.EOF {
			s.log.Debug("receive request", "error", err)
		}
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	defer frame.CloseFds()
	call.kind.Store(uint32(frame.Kind))
	switch frame.Kind {
	case wire.Exec, wire.Attach, wire.Events: // they make nothing that stays
		s.open.over(conn)
		done()
	}
	leave, err := s.gate.enter(frame.Kind)
	if err == nil {
		defer leave()
		err = s.handle(conn, frame, leave)
	}
	if err != nil {
		_ = conn.Send(wire.Failure, wire.EncodeError(err))
	}
}

// checkPeer lets in root and the shim's own user. The socket's mode says the
// same; this holds when a directory was opened to others by mistake.
func checkPeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if cerr != nil {
		return cerr
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("peer %d has uid %d: %w", cred.Pid, cred.Uid, errdefs.ErrPermissionDenied)
	}
	return nil
}

// handle runs one request; a panic fails it alone.
func (s *Server) handle(conn *wire.Conn, frame *wire.Frame, leave func()) (err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("panic in a request", "kind", frame.Kind, "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("podd-shim panicked (see its log): %v: %w", p, errdefs.ErrInternal)
		}
	}()
	// Sessions read their connection themselves.
	switch frame.Kind {
	case wire.Exec:
		return s.exec(conn, frame, leave)
	case wire.Attach:
		var call wire.Call
		if err := frame.Decode(&call); err != nil {
			return err
		}
		return s.attach(context.Background(), conn, call, frame)
	case wire.Events:
		return s.follow(conn, frame)
	}
	// For all others the end of the connection cancels.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		var b [1]byte
		_, _ = conn.Read(b[:])
		cancel()
	}()
	defer func() {
		_ = conn.SetReadDeadline(time.Now())
		<-gone
	}()
	result, err := s.call(ctx, frame)
	if err != nil {
		return err
	}
	if result == nil {
		result = struct{}{}
	}
	return conn.Send(wire.OK, result)
}

// idleAfter is how long after the last creation or deletion the memory that
// it needed goes back to the system: the shim is small when nothing happens.
const idleAfter = 5 * time.Second

// failedAfter is the same after one that failed: libcontainer leaves descriptors
// of such to the garbage collector.
const failedAfter = 200 * time.Millisecond

// tidyLater gives memory back after a while without creations and deletions.
func (s *Server) tidyLater(failed bool) {
	if failed {
		s.failed.Store(true)
	}
	after := idleAfter
	if s.failed.Load() {
		after = failedAfter
	}
	s.idle.Reset(after)
}

// call dispatches the requests that have one answer.
func (s *Server) call(ctx context.Context, frame *wire.Frame) (_ any, err error) {
	switch frame.Kind {
	case wire.Create, wire.CreateSandbox, wire.Delete, wire.DeleteSandbox:
		defer func() { s.tidyLater(err != nil) }()
	}
	switch frame.Kind {
	case wire.CreateSandbox:
		spec := new(shim.SandboxSpec)
		if err := frame.Decode(spec); err != nil {
			return nil, err
		}
		return s.createSandbox(ctx, spec, digest(frame.Body))
	case wire.Create:
		spec := new(shim.ContainerSpec)
		if err := frame.Decode(spec); err != nil {
			return nil, err
		}
		return s.create(ctx, spec, digest(frame.Body))
	}
	var call wire.Call
	if err := frame.Decode(&call); err != nil {
		return nil, err
	}
	switch frame.Kind {
	case wire.DeleteSandbox:
		if _, err := s.sandbox(call.ID); err != nil {
			s.awaitOrphans(ctx) // it may be what one of them is about to make
		}
		return nil, s.deleteSandbox(ctx, call.ID)
	case wire.Start:
		return s.start(ctx, call.ID)
	case wire.Signal:
		return nil, s.signal(ctx, call.ID, unix.Signal(call.Signal), call.All)
	case wire.Delete:
		if _, err := s.container(call.ID); err != nil {
			s.awaitOrphans(ctx)
		}
		return nil, s.delete(ctx, call.ID)
	case wire.State:
		return s.state(call.ID)
	case wire.List:
		s.awaitOrphans(ctx)
		return s.list(), nil
	case wire.Update:
		return nil, s.update(ctx, call.ID, call.Resources)
	case wire.Resize:
		c, err := s.container(call.ID)
		if err != nil {
			return nil, err
		}
		return nil, c.resize(call.Width, call.Height)
	case wire.ReopenLog:
		c, err := s.container(call.ID)
		if err != nil {
			return nil, err
		}
		return nil, c.out.reopen()
	case wire.Info:
		return s.info(), nil
	case wire.Upgrade:
		return nil, s.upgrade(frame)
	case wire.Shutdown:
		return nil, s.shutdown()
	}
	return nil, fmt.Errorf("unknown request %d (this shim speaks protocol %d): %w", frame.Kind, wire.Protocol, errdefs.ErrNotImplemented)
}

func digest(body []byte) string {
	sum := sha256.Sum256(body)
	return hex.EncodeToString(sum[:])
}

func (s *Server) container(id string) (*container, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if c := s.byID[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
}

func (s *Server) sandbox(id string) (*sandbox, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if b := s.boxes[id]; b != nil {
		return b, nil
	}
	return nil, fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
}

func (s *Server) state(id string) (*shim.Process, error) {
	if c, err := s.container(id); err == nil {
		p := c.snapshot()
		if p.State == "" {
			return nil, fmt.Errorf("container %s is being created: %w", id, errdefs.ErrNotFound)
		}
		return &p, nil
	}
	b, err := s.sandbox(id)
	if err != nil {
		return nil, err
	}
	p := b.snapshot()
	if p.State == "" {
		return nil, fmt.Errorf("sandbox %s is being created: %w", id, errdefs.ErrNotFound)
	}
	return &p, nil
}

func (s *Server) list() []shim.Process {
	s.mu.RLock()
	all := make([]shim.Process, 0, len(s.boxes)+len(s.byID))
	for _, b := range s.boxes {
		if p := b.snapshot(); p.State != "" {
			all = append(all, p)
		}
	}
	for _, c := range s.byID {
		if p := c.snapshot(); p.State != "" {
			all = append(all, p)
		}
	}
	s.mu.RUnlock()
	sort.Slice(all, func(i, j int) bool { return all[i].CreatedAt.Before(all[j].CreatedAt) })
	return all
}

func (s *Server) info() *shim.Info {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return &shim.Info{
		PID: os.Getpid(), BuildID: s.build, Protocol: wire.Protocol, StartedAt: s.started,
		Containers: len(s.byID), Sandboxes: len(s.boxes),
	}
}

// follow streams events until the peer leaves or the shim is replaced.
func (s *Server) follow(conn *wire.Conn, frame *wire.Frame) error {
	end, err := s.sessions.enter("the event streams", maxStreams)
	if err != nil {
		return err
	}
	defer end()
	var call wire.Call
	if err := frame.Decode(&call); err != nil {
		return err
	}
	after := call.After
	if last := s.events.lastSeq(); after > last {
		after = 0 // numbers of another life of this run directory
	}
	if err := conn.Send(wire.OK, wire.Call{After: after}); err != nil {
		return nil
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		var b [1]byte
		_, _ = conn.Read(b[:])
	}()
	defer func() { conn.Close(); <-gone }()
	for {
		batch, more := s.events.since(after)
		for len(batch) > 0 {
			n := min(len(batch), 256)
			body, err := json.Marshal(batch[:n])
			if err != nil {
				return err
			}
			// A reader that does not read loses the stream, not the events.
			_ = conn.SetWriteDeadline(time.Now().Add(requestTimeout))
			if err := conn.SendRaw(wire.Event, body); err != nil {
				return nil
			}
			after, batch = batch[n-1].Seq, batch[n:]
		}
		select {
		case <-more:
		case <-gone:
			return nil
		case <-s.gate.closing():
			return nil
		}
	}
}

// shutdown ends the shim when nothing depends on it.
func (s *Server) shutdown() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if n := len(s.byID) + len(s.boxes); n > 0 {
		return fmt.Errorf("%d containers and sandboxes are left: %w", n, errdefs.ErrFailedPrecondition)
	}
	s.stopOnce.Do(func() { close(s.stop) })
	return nil
}
