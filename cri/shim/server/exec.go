package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/cri/shim/internal/confine"
	"github.com/podd-runtime/podd/cri/shim/internal/enter"
	"github.com/podd-runtime/podd/cri/shim/internal/wire"
)

// execution is a further process in a container.
type execution struct {
	c     *container
	pid   int
	pidfd int
	w     *watch
	done  chan struct{}
	exit  shim.Exit

	mu   sync.Mutex
	conn *wire.Conn // where the exit is awaited
}

// exec starts a process, answers Started and stays until the process has
// ended or the client has left, which ends the process.
func (s *Server) exec(conn *wire.Conn, frame *wire.Frame, leave func()) error {
	var req wire.ExecRequest
	if err := frame.Decode(&req); err != nil {
		return err
	}
	if req.Process == nil {
		return fmt.Errorf("process is missing: %w", errdefs.ErrInvalidArgument)
	}
	c, err := s.container(req.ID)
	if err != nil {
		return err
	}
	if err := c.running(); err != nil {
		return err
	}
	end, err := s.sessions.enter(ofContainer(req.ID), maxOfContainer)
	if err != nil {
		return err
	}
	defer end()
	in, outs, err := takeStreams(req.Streams, frame)
	if err != nil {
		return err
	}
	defer closeFiles(in, outs[0], outs[1])
	if clientLeft(conn) {
		return nil // while this shim was stopped: nobody wants it begun any more
	}
	if req.Process.Terminal && req.Streams != 0 {
		return fmt.Errorf("a terminal replaces the standard streams: %w", errdefs.ErrInvalidArgument)
	}
	e, tty, err := c.exec(&req, [3]*os.File{in, outs[0], outs[1]}, conn)
	if err != nil {
		return err
	}
	// The process has its own copies: the client shall see their end with it.
	closeFiles(in, outs[0], outs[1])
	in, outs = nil, [2]*os.File{}
	// The client alone holds the terminal: when it closes it, it hangs up.
	var fds []*os.File
	if tty != nil {
		defer tty.Close()
		fds = append(fds, tty)
	}
	if err := conn.Send(wire.Started, wire.Call{PID: e.pid}, fds...); err != nil {
		e.kill()
		c.forgetExec(e)
		return nil
	}
	e.mu.Lock()
	e.conn = conn
	e.mu.Unlock()
	leave()
	closeFiles(tty)
	return e.serve(conn)
}

// clientLeft says that the peer has closed its connection.
func clientLeft(conn *wire.Conn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return true
	}
	p := []unix.PollFd{{Events: unix.POLLRDHUP}}
	if err := raw.Control(func(fd uintptr) {
		p[0].Fd = int32(fd)
		_, err = unix.Poll(p, 0)
	}); err != nil {
		return true
	}
	return p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP) != 0
}

// serve stays with a running exec until its end or the client's.
func (e *execution) serve(conn *wire.Conn) error {
	defer e.c.forgetExec(e)
	e.mu.Lock()
	e.conn = conn
	e.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	received := make(chan struct{})
	go func() {
		defer close(received)
		defer cancel()
		for {
			f, err := conn.Recv()
			if err != nil {
				return
			}
			f.CloseFds()
			var call wire.Call
			if f.Decode(&call) != nil {
				return
			}
			if f.Kind == wire.Signal {
				_ = unix.PidfdSendSignal(e.pidfd, unix.Signal(call.Signal), nil, 0)
			}
		}
	}()
	defer func() { conn.Close(); <-received }()
	select {
	case <-e.done:
	case <-ctx.Done():
		select {
		case <-e.done: // by itself, at the same time
		default:
			// Said first, because to kill it may take long: without this word
			// the client could not tell a process that was ended for its time
			// from a shim that died.
			_ = conn.Send(wire.Failure, wire.EncodeError(fmt.Errorf("killed when its client hung up: %w", context.Canceled)))
			e.kill()
			return nil
		}
	}
	return conn.Send(wire.Exit, e.exit)
}

// exec starts the process and watches it.
func (c *container) exec(req *wire.ExecRequest, files [3]*os.File, conn *wire.Conn) (_ *execution, tty *os.File, err error) {
	process, err := newProcess(req.Process)
	if err != nil {
		return nil, nil, err
	}
	c.hold.wait()
	end := c.s.reaper.begin()
	defer end()
	var started *enter.Process
	if req.Libcontainer {
		err = errAsked
	} else {
		started, err = c.enter(process, req.Process.Terminal, files, conn)
	}
	var unable *enter.Unable
	if errors.As(err, &unable) {
		c.s.log.Debug("exec by libcontainer", "id", c.rec.Process.ID, "because", unable.Error())
		started, err = c.execByLibcontainer(process, req.Process.Terminal, files, unable)
	}
	if err != nil {
		return nil, nil, err
	}
	tty = started.Terminal
	e := &execution{c: c, pid: started.PID, done: make(chan struct{})}
	if e.pidfd, err = unix.PidfdOpen(e.pid, 0); err != nil {
		discard(e.pid)
		closeFiles(tty)
		return nil, nil, fmt.Errorf("pidfd of exec: %w", err)
	}
	if e.w, err = c.s.reaper.watch(e.pid, e.pidfd, e.onExit); err != nil {
		discard(e.pid)
		unix.Close(e.pidfd)
		closeFiles(tty)
		return nil, nil, err
	}
	c.mu.Lock()
	c.execs[e] = struct{}{}
	c.mu.Unlock()
	return e, tty, nil
}

// errAsked: the caller wants the other way, to compare the two.
var errAsked = &enter.Unable{What: "be used", Err: errors.New("the caller says so")}

// execByLibcontainer starts what package enter does not cover.
func (c *container) execByLibcontainer(process *libcontainer.Process, terminal bool, files [3]*os.File, because *enter.Unable) (_ *enter.Process, err error) {
	s, id := c.s, c.rec.Process.ID
	// A loaded object of its own: libcontainer holds an object's lock for the
	// whole start, and a second exec shall not wait for the first.
	lc, err := libcontainer.Load(s.path("lc"), id)
	if err != nil {
		return nil, lcError(err)
	}
	config := lc.Config()
	if because != errAsked {
		if err := c.refuseTraced(&config, because); err != nil {
			return nil, err
		}
	}
	f, err := s.filters.named(c.rec.Filter)
	if err != nil {
		return nil, err // never without the filter the container has
	}
	label := process.Label
	if label == "" {
		label = config.ProcessLabel
	}
	orderFile, err := order(id, &config, label, f, confine.AtOnce).File()
	if err != nil {
		return nil, err
	}
	defer orderFile.Close()
	process.ExtraFiles = []*os.File{orderFile}
	var socket *os.File
	if terminal {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("console socket: %w", err)
		}
		socket = os.NewFile(uintptr(pair[0]), "console")
		process.ConsoleSocket = os.NewFile(uintptr(pair[1]), "console-init")
		defer closeFiles(socket, process.ConsoleSocket)
	} else {
		if files[0] != nil {
			process.Stdin = files[0]
		}
		if files[1] != nil {
			process.Stdout = files[1]
		}
		if files[2] != nil {
			process.Stderr = files[2]
		}
	}
	if err := lc.Start(process); err != nil {
		return nil, lcError(err)
	}
	started := new(enter.Process)
	if started.PID, err = process.Pid(); err != nil {
		return nil, err
	}
	if terminal {
		if started.Terminal, err = receiveTTY(socket); err != nil {
			killChild(started.PID)
			return nil, err
		}
	}
	return started, nil
}

// killChild kills a child that has not been waited for: the number is its own.
func killChild(pid int) {
	if fd, err := unix.PidfdOpen(pid, 0); err == nil {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		unix.Close(fd)
	}
}

func (e *execution) onExit(exit shim.Exit) {
	if exit.Signal == int(unix.SIGKILL) {
		e.c.oom.check()
	}
	e.exit = exit
	close(e.done)
}

// forgetExec releases the descriptors when the process has ended.
func (c *container) forgetExec(e *execution) {
	<-e.done
	c.mu.Lock()
	delete(c.execs, e)
	c.mu.Unlock()
	e.mu.Lock()
	e.conn = nil
	e.mu.Unlock()
	e.w.remove()
	unix.Close(e.pidfd)
}

// kill ends the process with everything that descends from it or shares its
// session (init makes it a session leader), and waits for it. Processes that
// left both, as a daemon does, belong to the container.
func (e *execution) kill() {
	for pause := 2 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		for _, pid := range e.family() {
			e.c.killMember(pid)
		}
		_ = unix.PidfdSendSignal(e.pidfd, unix.SIGKILL, nil, 0)
		if len(e.family()) == 0 {
			break
		}
		select {
		case <-e.c.exited:
			return
		case <-time.After(pause):
		}
	}
	select {
	case <-e.done:
	case <-e.c.exited:
	}
}

// killMember kills a process of the container. The pidfd comes first: the number
// may be another process' by now, and then it is in another cgroup.
func (c *container) killMember(pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if m, err := c.cgroup(); err == nil && m != nil && inCgroup(m, pid) {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
}

// family lists the live processes of the exec, its own included.
func (e *execution) family() []int {
	m, err := e.c.cgroup()
	if err != nil || m == nil {
		return nil
	}
	pids, err := m.GetAllPids()
	if err != nil {
		return nil
	}
	type proc struct{ ppid, session int }
	procs := map[int]proc{}
	for _, pid := range pids {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil {
			continue
		}
		state, fields, ok := statFields(string(stat))
		if !ok || state == "Z" || state == "X" {
			continue
		}
		ppid, _ := strconv.Atoi(fields[0])
		session, _ := strconv.Atoi(fields[2])
		procs[pid] = proc{ppid, session}
	}
	// The pid is ours only while the exec'd process has not been reaped; its
	// session keeps the number from being reused as long as it has members.
	var family []int
	for pid, p := range procs {
		member := p.session == e.pid
		for up := pid; !member && up > 1; {
			if up == e.pid {
				member = true
				break
			}
			parent, ok := procs[up]
			if !ok {
				break
			}
			up = parent.ppid
		}
		if member {
			family = append(family, pid)
		}
	}
	return family
}
