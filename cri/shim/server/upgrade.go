package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/opencontainers/runc/libcontainer/exeseal"
	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/cri/shim/internal/wire"
)

// An upgrade executes the new program in the shim's place: same process, same
// children, same listener. Everything but descriptors is in the records and
// cursors, as after a crash; the descriptors are named in a memfd whose number
// is in handoverEnv. When execve fails, the old program goes on.
const handoverEnv = "PODD_SHIM_HANDOVER"

const handoverVersion = 1

// handover is what one program tells the next.
type handover struct {
	Version  int          `json:"version"`
	Listener int          `json:"listener"`
	Lock     int          `json:"lock"`
	Fds      []handedFD   `json:"fds,omitempty"`
	Execs    []handedExec `json:"execs,omitempty"`
}

type handedFD struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	FD   int    `json:"fd"`
}

// handedExec is a running exec with the connection its exit is awaited on.
type handedExec struct {
	ID    string `json:"id"`
	PID   int    `json:"pid"`
	PIDFD int    `json:"pidfd"`
	Conn  int    `json:"conn"`
}

// inherited reads the handover of the program that executed this one.
func inherited() (*handover, error) {
	text := os.Getenv(handoverEnv)
	if text == "" {
		return nil, nil
	}
	os.Unsetenv(handoverEnv)
	fd, err := strconv.Atoi(text)
	if err != nil {
		return nil, fmt.Errorf("%s=%q: %w", handoverEnv, text, err)
	}
	f := os.NewFile(uintptr(fd), "handover")
	defer f.Close()
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	h := new(handover)
	if err := json.NewDecoder(f).Decode(h); err != nil {
		return nil, fmt.Errorf("read handover: %w", err)
	}
	if h.Version != handoverVersion {
		// Another release's: go on as after a crash, but with our children.
		fmt.Fprintf(os.Stderr, "handover has version %d, this shim knows %d: taking up from the records\n", h.Version, handoverVersion)
		closeAll(h.all())
		return nil, nil
	}
	for _, fd := range h.all() {
		unix.CloseOnExec(fd)
	}
	return h, nil
}

// all lists the descriptors that are handed over.
func (h *handover) all() []int {
	fds := []int{h.Listener, h.Lock}
	for _, f := range h.Fds {
		fds = append(fds, f.FD)
	}
	for _, e := range h.Execs {
		fds = append(fds, e.PIDFD, e.Conn)
	}
	return fds
}

func (h *handover) stored() []stored {
	if h == nil {
		return nil
	}
	var all []stored
	for _, f := range h.Fds {
		all = append(all, stored{id: f.ID, name: f.Name, fd: f.FD})
	}
	return all
}

// execs lists the processes that were exec'd.
func (h *handover) execs() (pids []int) {
	if h == nil {
		return nil
	}
	for _, e := range h.Execs {
		pids = append(pids, e.PID)
	}
	return pids
}

func (h *handover) listener() *os.File {
	if h == nil {
		return nil
	}
	return os.NewFile(uintptr(h.Listener), "listener")
}

// quietTimeout bounds the wait for requests that are under way.
const quietTimeout = 60 * time.Second

// upgrade executes the program in the frame. It returns only on failure, or
// when this is that program already.
func (s *Server) upgrade(frame *wire.Frame) error {
	if len(frame.Fds) != 1 {
		return fmt.Errorf("the new program is missing: %w", errdefs.ErrInvalidArgument)
	}
	st, err := frame.Fds[0].Stat()
	if err != nil {
		return err
	}
	program, err := exeseal.CloneBinary(io.NewSectionReader(frame.Fds[0], 0, st.Size()), st.Size(), "podd-shim", "/")
	if err != nil {
		return fmt.Errorf("seal new program: %w", err)
	}
	defer program.Close()
	path := "/proc/self/fd/" + strconv.Itoa(int(program.Fd()))
	build, err := shim.BuildID(path)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if build == s.build {
		return nil // the call is repeated to the new program when it has begun
	}
	if err := s.gate.close(quietTimeout); err != nil {
		return err
	}
	defer s.gate.open()
	s.log.Info("replacing this program", "from", s.build)
	return s.execute(path)
}

// execute hands everything over and calls execve.
func (s *Server) execute(path string) error {
	h := &handover{Version: handoverVersion, Listener: -1, Lock: s.lock}
	l, err := s.listener.File() // a copy
	if err != nil {
		return err
	}
	defer l.Close()
	h.Listener = rawFD(l)
	s.mu.RLock()
	containers := make([]*container, 0, len(s.byID))
	for _, c := range s.byID {
		containers = append(containers, c)
	}
	s.mu.RUnlock()
	// Copies, made while their owners hold them still: a container that ends now
	// closes its own, whose numbers may be others' by the time of the execve.
	var copies []int
	defer func() { closeAll(copies) }()
	for _, c := range containers {
		h.Fds = append(h.Fds, c.descriptors(&copies)...)
		c.mu.Lock()
		for e := range c.execs {
			if x, ok := e.hand(&copies); ok {
				h.Execs = append(h.Execs, x)
			}
		}
		c.mu.Unlock()
	}
	fd, err := unix.MemfdCreate("podd-shim-handover", 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "handover")
	defer f.Close()
	if err := json.NewEncoder(f).Encode(h); err != nil {
		return err
	}
	// From here to execve no other program may be started: the gate is closed,
	// and the compressors of logs start none.
	inherit := func(on bool) {
		for _, fd := range h.all() {
			flag := unix.FD_CLOEXEC
			if on {
				flag = 0
			}
			_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFD, flag)
		}
	}
	inherit(true)
	env := append(os.Environ(), handoverEnv+"="+strconv.Itoa(fd))
	err = unix.Exec(path, os.Args, env)
	inherit(false)
	return fmt.Errorf("execute new program: %w", err)
}

// copyTo copies fd for the next program; -1 when it cannot.
func copyTo(copies *[]int, fd int) int {
	if fd < 0 {
		return -1
	}
	copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	*copies = append(*copies, copied)
	return copied
}

// descriptors are copies of what the next program needs of a container. What
// cannot be copied it takes from the pod's store.
func (c *container) descriptors(copies *[]int) []handedFD {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.out.closed {
		return nil
	}
	id := c.rec.Process.ID
	var fds []handedFD
	add := func(name string, fd int) {
		if fd = copyTo(copies, fd); fd >= 0 {
			fds = append(fds, handedFD{id, name, fd})
		}
	}
	add("pidfd", c.pidfd)
	add("spill", c.out.spill)
	for n, st := range c.out.streams {
		switch {
		case st == nil:
		case st.tty:
			add("tty", st.fd)
		default:
			add(streamNames[n], st.fd)
		}
	}
	if c.in != nil && c.in != c.tty {
		add("stdin", rawFD(c.in))
	}
	return fds
}

// rawFD is the number of f without making it blocking.
func rawFD(f *os.File) int {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1
	}
	n := -1
	_ = raw.Control(func(fd uintptr) { n = int(fd) })
	return n
}

// hand describes a running exec, with copies of its descriptors.
func (e *execution) hand(copies *[]int) (handedExec, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.conn == nil {
		return handedExec{}, false
	}
	select {
	case <-e.done:
		return handedExec{}, false // its exit is being told
	default:
	}
	conn, err := e.conn.SyscallConn()
	if err != nil {
		return handedExec{}, false
	}
	h := handedExec{ID: e.c.rec.Process.ID, PID: e.pid, PIDFD: copyTo(copies, e.pidfd), Conn: -1}
	_ = conn.Control(func(fd uintptr) { h.Conn = copyTo(copies, int(fd)) })
	return h, h.PIDFD >= 0 && h.Conn >= 0
}

// resumeExecs goes on waiting for execs of before the upgrade.
func (s *Server) resumeExecs(h *handover) {
	if h == nil {
		return
	}
	for _, x := range h.Execs {
		if err := s.resumeExec(x); err != nil {
			s.log.Error("take up exec", "id", x.ID, "pid", x.PID, "error", err)
		}
	}
}

func (s *Server) resumeExec(x handedExec) error {
	f := os.NewFile(uintptr(x.Conn), "conn")
	nc, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return err
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		nc.Close()
		return errors.New("not a unix connection")
	}
	conn := &wire.Conn{UnixConn: uc}
	c, err := s.container(x.ID)
	if err != nil {
		conn.Close()
		unix.Close(x.PIDFD)
		return err
	}
	e := &execution{c: c, pid: x.PID, pidfd: x.PIDFD, done: make(chan struct{})}
	if e.w, err = s.reaper.watch(x.PID, x.PIDFD, e.onExit); err != nil {
		conn.Close()
		unix.Close(x.PIDFD)
		return err
	}
	c.mu.Lock()
	c.execs[e] = struct{}{}
	c.mu.Unlock()
	end := s.sessions.resume(ofContainer(x.ID))
	go func() {
		defer end()
		defer conn.Close()
		if err := e.serve(conn); err != nil {
			s.log.Debug("exec", "error", err)
		}
	}()
	return nil
}

// close shuts the gate and waits until all requests have left.
func (g *gate) close(patience time.Duration) error {
	g.mu.Lock()
	if g.closed != nil {
		g.mu.Unlock()
		return fmt.Errorf("another upgrade is under way: %w", errdefs.ErrUnavailable)
	}
	g.closed = make(chan struct{})
	if g.shut == nil {
		g.shut = make(chan struct{})
	}
	close(g.shut)
	var empty chan struct{}
	if g.inside > 0 {
		empty = make(chan struct{})
		g.empty = empty
	}
	g.mu.Unlock()
	if empty == nil {
		return nil
	}
	select {
	case <-empty:
		return nil
	case <-time.After(patience):
		g.open()
		return fmt.Errorf("requests under way do not end: %w", errdefs.ErrUnavailable)
	}
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed != nil {
		close(g.closed)
	}
	g.closed, g.shut, g.empty = nil, nil, nil
}
