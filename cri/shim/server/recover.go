package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

// What a new shim takes up, and what it assumes:
//
//  1. A record without "making" describes something that was created whole. One
//     with it is undone: its creator is gone and init has ended itself.
//  2. A process is the recorded one when pid and start time agree, or when its
//     pidfd comes from the descriptor store.
//  3. Descriptors come from the shim that replaced itself (handed), else from
//     the pod's store, else from the named FIFOs.
//  4. Records are ahead of the event log by at most one event, which is added.
//  5. A broken record is in quarantine by now; a container of libcontainer's
//     without a record is killed, because nobody knows it any more.
func (s *Server) recover(handed []stored) error {
	boxes, err := s.sandboxes.load()
	if err != nil {
		return fmt.Errorf("read sandboxes: %w", err)
	}
	containers, err := s.containers.load()
	if err != nil {
		return fmt.Errorf("read containers: %w", err)
	}
	known := map[string]*record{}
	for _, r := range containers {
		known[r.Process.ID] = r
	}
	given := map[string]map[string]int{} // container → name → descriptor
	give := func(all []stored) {
		for _, f := range all {
			if given[f.id] == nil {
				given[f.id] = map[string]int{}
			}
			if old, ok := given[f.id][f.name]; ok {
				unix.Close(f.fd) // the earlier source is the better one
				_ = old
				continue
			}
			given[f.id][f.name] = f.fd
		}
	}
	give(handed)
	for _, r := range boxes {
		b, err := s.recoverSandbox(r)
		if err != nil {
			s.log.Error("take up sandbox", "id", r.Process.ID, "error", err)
		}
		if b == nil || b.fds == nil {
			continue
		}
		all, err := b.fds.load()
		if err != nil {
			s.log.Error("read descriptor store", "id", r.Process.ID, "error", err)
		}
		own := all[:0]
		for _, f := range all {
			// A container that may trace its pod's pause can put anything there.
			if c := known[f.id]; c == nil || c.Process.SandboxID != r.Process.ID || !s.genuine(c, f) {
				s.log.Warn("descriptor in a pod's store is not what it should be", "sandbox", r.Process.ID, "id", f.id, "name", f.name)
				unix.Close(f.fd)
				continue
			}
			own = append(own, f)
		}
		give(own)
	}
	for _, r := range containers {
		fds := given[r.Process.ID]
		delete(given, r.Process.ID)
		if err := s.recoverContainer(r, fds); err != nil {
			s.log.Error("take up container", "id", r.Process.ID, "error", err)
		}
	}
	for _, fds := range given { // of containers that are no more
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
	s.sweepStrays()
	s.thawLeft()
	return nil
}

// identified opens a pidfd of the recorded process; -1 when it is gone.
func identified(pid int, start uint64) int {
	if pid <= 0 {
		return -1
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1
	}
	if start == 0 || startTime(pid) != start {
		unix.Close(fd)
		return -1
	}
	return fd
}

// genuine says whether a stored descriptor is what a shim has put there under
// that name: of the kind that is read and written without surprises, the very
// FIFO of the container, the very process.
func (s *Server) genuine(r *record, f stored) bool {
	var st unix.Stat_t
	if unix.Fstat(f.fd, &st) != nil {
		return false
	}
	fifo := st.Mode&unix.S_IFMT == unix.S_IFIFO
	switch f.name {
	case "pidfd":
		return pidfdOf(r, f.fd, st.Ino)
	case "tty":
		return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(5, 2) // a ptmx
	case "stdin", "spill", "start":
		return fifo
	}
	var own unix.Stat_t
	err := unix.Lstat(filepath.Join(s.containers.dir(r.Process.ID), f.name), &own)
	return fifo && slices.Contains(streamNames[:], f.name) && err == nil && own.Dev == st.Dev && own.Ino == st.Ino
}

// pidfdOf: fd refers to the recorded process. While that lives its number and
// start time tell; afterwards its inode does, which Linux gives once (pidfs, 6.9).
func pidfdOf(r *record, fd int, ino uint64) bool {
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(info)) {
		text, ok := strings.CutPrefix(line, "Pid:")
		if !ok {
			continue
		}
		pid, err := strconv.Atoi(strings.TrimSpace(text))
		if pid > 0 {
			return pid == r.Process.PID && startTime(pid) == r.ProcStart
		}
		return err == nil && r.Pidfd != 0 && r.Pidfd == ino
	}
	return false
}

func (s *Server) recoverSandbox(r *record) (*sandbox, error) {
	id := r.Process.ID
	if r.Making {
		s.log.Info("undoing half-made sandbox", "id", id)
		if err := s.undoSandbox(r); err != nil {
			s.undoSandboxOn(r)
			return nil, err
		}
		return nil, nil
	}
	b := newSandbox(s, *r)
	s.mu.Lock()
	s.boxes[id] = b
	s.mu.Unlock()
	if !s.events.has(id, shim.EventStarted) {
		s.events.append(shim.Event{Kind: shim.EventStarted, ID: id, Sandbox: true, PID: r.Process.PID, At: r.Process.StartedAt})
	}
	if r.Process.State == shim.Exited {
		if !s.events.has(id, shim.EventExited) {
			s.events.append(shim.Event{Kind: shim.EventExited, ID: id, Sandbox: true, PID: r.Process.PID, At: r.Process.Exit.At, Exit: r.Process.Exit})
		}
		close(b.exited)
		return b, nil
	}
	if b.pidfd = identified(r.Process.PID, r.ProcStart); b.pidfd < 0 {
		b.onExit(shim.Exit{Code: shim.Unknown, At: time.Now()})
		return b, nil
	}
	b.fds = newFDStore(b.pidfd)
	var err error
	b.mu.Lock()
	defer b.mu.Unlock()
	b.w, err = s.reaper.watch(r.Process.PID, b.pidfd, b.onExit)
	return b, err
}

func (s *Server) undoSandbox(r *record) error {
	if err := removeCgroup(r.Cgroup, r.SystemdCgroup, r.CgroupPaths); err != nil {
		return err
	}
	return s.sandboxes.remove(r.Process.ID)
}

// undoSandboxOn is undoOn of a sandbox.
func (s *Server) undoSandboxOn(r *record) {
	b := newSandbox(s, *r)
	b.op <- struct{}{} // nobody else has it
	s.mu.Lock()
	s.boxes[r.Process.ID] = b
	s.mu.Unlock()
	go func() {
		defer b.op.unlock()
		for pause := undoAgain; ; pause = min(2*pause, undoSlowest) {
			time.Sleep(pause)
			err := s.undoSandbox(r)
			if err == nil {
				break
			}
			s.log.Warn("undo half-made sandbox", "id", r.Process.ID, "error", err)
		}
		s.mu.Lock()
		delete(s.boxes, r.Process.ID)
		s.mu.Unlock()
	}()
}

func (s *Server) recoverContainer(r *record, fds map[string]int) (err error) {
	id := r.Process.ID
	take := func(name string) int {
		if fd, ok := fds[name]; ok {
			delete(fds, name)
			return fd
		}
		return -1
	}
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	if r.Making {
		if err := s.undoMaking(r); err != nil {
			s.undoOn(r)
			return err
		}
		return nil
	}
	c := newContainer(s, *r)
	s.mu.Lock()
	s.byID[id] = c
	s.mu.Unlock()
	if !s.events.has(id, shim.EventCreated) {
		s.events.append(shim.Event{Kind: shim.EventCreated, ID: id, PID: r.Process.PID, At: r.Process.CreatedAt})
	}
	if err := c.recoverOutput(take); err != nil {
		s.log.Error("take up output", "id", id, "error", err)
	}
	if r.Process.State == shim.Exited {
		c.out.drain()
		c.out.close()
		if !s.events.has(id, shim.EventExited) {
			s.events.append(shim.Event{Kind: shim.EventExited, ID: id, PID: r.Process.PID, At: r.Process.Exit.At, Exit: r.Process.Exit})
		}
		close(c.exited)
		return nil
	}
	if c.pidfd = take("pidfd"); c.pidfd < 0 {
		c.pidfd = identified(r.Process.PID, r.ProcStart)
	}
	released := take("start")
	if released >= 0 {
		defer unix.Close(released)
	}
	c.oom = s.watchOOM(c, s.events.has(id, shim.EventOOM))
	c.oom.check() // kills while no shim was there
	if r.Process.State == shim.Created && (c.hasStarted() || released >= 0 && c.over()) {
		// The last shim died between init's release and noting it. From the
		// release on, which keeps the fifo open, nothing keeps the program from
		// running: what has ended since has run.
		_ = os.Remove(filepath.Join(s.path("lc"), id, execFifo))
		c.rec.Process.State, c.rec.Process.StartedAt = shim.Running, time.Now()
		if err := s.containers.save(&c.rec); err != nil {
			s.log.Error("save container", "id", id, "error", err) // found out anew next time
		}
	}
	if c.rec.Process.State != shim.Created && !s.events.has(id, shim.EventStarted) {
		s.events.append(shim.Event{Kind: shim.EventStarted, ID: id, PID: r.Process.PID, At: c.rec.Process.StartedAt})
	}
	if err := c.out.start(); err != nil {
		s.log.Error("take up output", "id", id, "error", err)
	}
	if c.pidfd < 0 {
		c.onExit(shim.Exit{Code: shim.Unknown, At: time.Now()})
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.w, err = s.reaper.watch(r.Process.PID, c.pidfd, c.onExit)
	return err
}

// recoverOutput reopens the log and takes the pipes and the terminal back.
func (c *container) recoverOutput(take func(string) int) error {
	r := &c.rec
	c.out.spill = take("spill")
	err := c.out.open(filepath.Join(c.s.containers.dir(r.Process.ID), "cursor"), r.LogPath, r.LogMaxSize, r.LogMaxFiles)
	if err != nil {
		err = fmt.Errorf("log: %w", err) // go on without: the container must not block
	} else if e := c.out.resume(); e != nil {
		err = fmt.Errorf("finish the last batch: %w", e)
	}
	if fd := take("tty"); fd >= 0 {
		return errors.Join(err, c.useTTY(os.NewFile(uintptr(fd), "ptmx")))
	}
	if r.Terminal {
		return err
	}
	for n, name := range streamNames {
		fd := take(name)
		if fd < 0 && r.Process.State != shim.Exited {
			fd, _ = unix.Open(filepath.Join(c.s.containers.dir(r.Process.ID), name), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		}
		if fd >= 0 {
			if e := c.out.addStream(n, fd, false); e != nil {
				err = errors.Join(err, e)
			}
		}
	}
	if fd := take("stdin"); fd >= 0 {
		_ = unix.SetNonblock(fd, true)
		c.in = os.NewFile(uintptr(fd), "stdin")
	}
	return err
}

// initComm is the name of libcontainer's init before it executes the program.
const initComm = "runc:[2:INIT]"

// hasStarted says whether a container recorded as created runs its program.
func (c *container) hasStarted() bool {
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", c.rec.Process.PID))
	if err != nil {
		return false
	}
	return strings.TrimSpace(string(comm)) != initComm
}

// over says whether the recorded process has ended.
func (c *container) over() bool { return c.pidfd < 0 || ended(c.pidfd, 0) }

// undoMaking removes what a creation left that was cut off.
func (s *Server) undoMaking(r *record) error {
	id := r.Process.ID
	s.log.Info("undoing half-made container", "id", id)
	if err := s.destroyStray(id); err != nil {
		return err
	}
	cg, err := newCgroup(id, r.Cgroup, r.SystemdCgroup, nil)
	if err == nil {
		err = removeCgroup(r.Cgroup, r.SystemdCgroup, cg.GetPaths())
	}
	if err != nil {
		return fmt.Errorf("cgroup: %w", err)
	}
	return s.containers.remove(id)
}

// undoAgain is the pause between tries to undo a creation, and its longest.
const (
	undoAgain   = 50 * time.Millisecond
	undoSlowest = 10 * time.Second
)

// undoOn tries on until the creation is undone: what was killed may take a while
// to end. Its id is taken until then, and operations on it wait.
func (s *Server) undoOn(r *record) {
	c := newContainer(s, *r)
	c.op <- struct{}{} // nobody else has it
	s.mu.Lock()
	s.byID[r.Process.ID] = c
	s.mu.Unlock()
	go func() {
		defer c.op.unlock()
		for pause := undoAgain; ; pause = min(2*pause, undoSlowest) {
			time.Sleep(pause)
			err := s.undoMaking(r)
			if err == nil {
				break
			}
			s.log.Warn("undo half-made container", "id", r.Process.ID, "error", err)
		}
		s.mu.Lock()
		delete(s.byID, r.Process.ID)
		s.mu.Unlock()
	}()
}

// destroyStray ends a container that only libcontainer knows.
func (s *Server) destroyStray(id string) error {
	dir := filepath.Join(s.path("lc"), id)
	lc, err := libcontainer.Load(s.path("lc"), id)
	if err != nil {
		return os.RemoveAll(dir) // never got as far as a state file
	}
	st, err := lc.State()
	if err != nil {
		return err
	}
	if fd := identified(st.InitProcessPid, st.InitProcessStartTime); fd >= 0 {
		defer unix.Close(fd)
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		_, _ = unix.Poll(fds, int(killPatience.Milliseconds()))
		reap(st.InitProcessPid, fd)
	}
	if err := lc.Destroy(); err != nil {
		return fmt.Errorf("destroy stray container %s: %w", id, err)
	}
	return nil
}

// sweepStrays removes libcontainer's state of containers without a record.
func (s *Server) sweepStrays() {
	entries, err := os.ReadDir(s.path("lc"))
	if err != nil {
		s.log.Error("list containers", "error", err)
		return
	}
	for _, e := range entries {
		if _, err := s.container(e.Name()); err == nil {
			continue
		}
		s.log.Info("removing stray container", "id", e.Name())
		if err := s.destroyStray(e.Name()); err != nil {
			s.log.Error("remove stray container", "id", e.Name(), "error", err)
		}
	}
}
