package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/cri/shim/internal/confine"
)

// container is one container, from the beginning of its creation to its
// deletion.
type container struct {
	s      *Server
	op     opLock
	out    *output
	exited chan struct{}            // closed after the exit was recorded
	shared atomic.Pointer[execBase] // set by the first exec

	mu    sync.Mutex
	rec   record
	pidfd int
	w     *watch
	in    *os.File              // write end of stdin, or the terminal's master
	feeds map[*os.File]struct{} // attached clients' own descriptors of it
	tty   *os.File
	oom   *oomWatch
	execs map[*execution]struct{}
	way   *passage // into a shared PID namespace, from creation to start
	// starting is closed when a start that has begun is noted or has failed.
	starting chan struct{}
	// helm is closed at its other end by init's execve; nil after a restart.
	helm *confine.Helm

	hold hold
}

func newContainer(s *Server, r record) *container {
	c := &container{s: s, op: newOpLock(), exited: make(chan struct{}), rec: r, pidfd: -1, execs: map[*execution]struct{}{}}
	c.out = newOutput(r.Process.ID, s.loop, s.log)
	c.out.onPipe = func(fd int) { c.keep(stored{name: "spill", fd: fd}) }
	return c
}

func (c *container) snapshot() shim.Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rec.Process
}

func (c *container) state() shim.State { return c.snapshot().State }

func (c *container) stdin() *os.File {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.in
}

// keep puts descriptors into the pod's store, so that they outlive the shim.
func (c *container) keep(fds ...stored) {
	b, err := c.s.sandbox(c.rec.Process.SandboxID)
	if err == nil && b.fds != nil {
		err = b.fds.put(c.rec.Process.ID, fds...)
	}
	if err != nil {
		// The container works; only the shim's own death would cost output.
		c.s.log.Warn("keep descriptors", "id", c.rec.Process.ID, "error", err)
	}
}

func (c *container) unkeep(name string) {
	b, err := c.s.sandbox(c.rec.Process.SandboxID)
	if err == nil && b.fds != nil {
		err = b.fds.drop(c.rec.Process.ID, name)
	}
	if err != nil && !errors.Is(err, errdefs.ErrNotFound) && !errors.Is(err, unix.ESRCH) {
		c.s.log.Warn("forget kept descriptors", "id", c.rec.Process.ID, "error", err)
	}
}

// closeStdin ends the container's input for good.
func (c *container) closeStdin() {
	c.mu.Lock()
	in := c.in
	if in != c.tty {
		c.in = nil
		for f := range c.feeds {
			f.Close()
		}
	}
	c.mu.Unlock()
	if in == nil || in == c.tty {
		return
	}
	in.Close()
	c.unkeep("stdin")
}

func (c *container) resize(width, height uint16) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tty == nil {
		return fmt.Errorf("%w: %w", errNoTTY, errdefs.ErrFailedPrecondition)
	}
	return resizeTTY(c.tty, width, height)
}

func resizeTTY(tty *os.File, width, height uint16) error {
	raw, err := tty.SyscallConn()
	if err != nil {
		return err
	}
	var ioerr error
	err = raw.Control(func(fd uintptr) {
		ioerr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: height, Col: width})
	})
	return errors.Join(err, ioerr)
}

// create makes a container whose init waits for start.
func (s *Server) create(ctx context.Context, spec *shim.ContainerSpec, digest string) (*shim.Process, error) {
	if !validID(spec.ID) {
		return nil, fmt.Errorf("container id %q: %w", spec.ID, errdefs.ErrInvalidArgument)
	}
	if spec.Spec == nil || spec.Spec.Process == nil || spec.Spec.Linux == nil || spec.Spec.Root == nil {
		return nil, fmt.Errorf("spec: process, root and linux are required: %w", errdefs.ErrInvalidArgument)
	}
	if _, err := s.sandbox(spec.SandboxID); err != nil {
		return nil, err
	}
	tracer := tracingSpec(spec.Spec.Process)
	c := newContainer(s, record{
		Digest: digest, Making: true, LogPath: spec.LogPath, LogMaxSize: spec.LogMaxSize, LogMaxFiles: spec.LogMaxFiles,
		Stdin: spec.Stdin, StdinOnce: spec.StdinOnce, Terminal: spec.Spec.Process.Terminal,
		Cgroup: spec.Spec.Linux.CgroupsPath, SystemdCgroup: spec.SystemdCgroup,
		OwnPIDNS: ownPIDNamespace(spec.Spec), SharesPIDs: sharesPIDs(spec.Spec), Tracer: &tracer, NoNewPrivs: spec.Spec.Process.NoNewPrivileges,
		Process: shim.Process{ID: spec.ID, SandboxID: spec.SandboxID},
	})
	if err := c.op.lock(ctx); err != nil {
		return nil, err
	}
	defer c.op.unlock()
	s.mu.Lock()
	old := s.byID[spec.ID]
	if old == nil && s.boxes[spec.ID] == nil {
		s.byID[spec.ID] = c
	}
	s.mu.Unlock()
	if old != nil {
		return old.again(ctx, digest)
	}
	if err := c.create(ctx, spec); err != nil {
		s.mu.Lock()
		delete(s.byID, spec.ID)
		s.mu.Unlock()
		return nil, err
	}
	p := c.snapshot()
	s.events.append(shim.Event{Kind: shim.EventCreated, ID: p.ID, PID: p.PID, At: p.CreatedAt})
	return &p, nil
}

func ownPIDNamespace(spec *specs.Spec) bool {
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace {
			return ns.Path == ""
		}
	}
	return false
}

// again answers a repeated create.
func (c *container) again(ctx context.Context, digest string) (*shim.Process, error) {
	if err := c.op.lock(ctx); err != nil {
		return nil, err
	}
	defer c.op.unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.rec.Process
	if p.State == "" {
		return nil, fmt.Errorf("an earlier create of it failed meanwhile: %w", errdefs.ErrUnavailable)
	}
	if c.rec.Digest != digest {
		return nil, fmt.Errorf("it exists with another specification: %w", errdefs.ErrAlreadyExists)
	}
	return &p, nil
}

// config translates the specification for libcontainer and takes the seccomp
// profile out of it when init shall get it compiled.
func (c *container) config(spec *shim.ContainerSpec) (*configs.Config, *filter, error) {
	s := c.s
	linux := *spec.Spec.Linux
	f, err := s.filters.get(linux.Seccomp)
	if err != nil {
		return nil, nil, err
	}
	if !f.Native {
		linux.Seccomp = nil
	}
	oci := *spec.Spec
	oci.Linux = &linux
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{
		CgroupName: spec.ID, UseSystemdCgroup: spec.SystemdCgroup, Spec: &oci,
		NoNewKeyring: true, // ours, see package confine
	})
	if err != nil {
		return nil, nil, fmt.Errorf("spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if r := config.Cgroups.Resources; spec.SystemdCgroup && r.PidsLimit == nil {
		// Or else systemd limits the scope by DefaultTasksMax, as nobody has asked.
		none := int64(-1)
		r.PidsLimit = &none
	}
	score := 0 // not ours, which would be inherited
	if config.OomScoreAdj != nil {
		score = *config.OomScoreAdj
	}
	score = s.host.oomScore(score)
	config.OomScoreAdj = &score
	return config, f, nil
}

// keyring permissions that libcontainer gives the session keyring: search for
// the owner, or for others where root is somebody else's id.
func keyringPerm(config *configs.Config) uint32 {
	if config.Namespaces.Contains(configs.NEWUSER) {
		return 0x8
	}
	return 0x80000
}

// order says what the init of this container has to do before libcontainer.
func order(id string, config *configs.Config, label string, f *filter, mode confine.Mode) *confine.Order {
	o := &confine.Order{Keyring: "_ses." + id, KeyLabel: label}
	if mode == confine.AtCommand {
		o.Container, o.KeyringPerm = true, keyringPerm(config)
	}
	if len(f.Program) > 0 {
		o.Mode, o.Flags, o.Filter = mode, f.Flags, f.Program
	}
	return o
}

// detachedRoot gives the init of a container with a user namespace its root file
// system by descriptor, see confine.RootTarget; nil for others.
func detachedRoot(config *configs.Config) (*os.File, error) {
	if !config.Namespaces.Contains(configs.NEWUSER) {
		return nil, nil
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, config.Rootfs, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return nil, fmt.Errorf("root file system %s: %w", config.Rootfs, err)
	}
	config.Rootfs = confine.RootTarget
	return os.NewFile(uintptr(fd), "rootfs"), nil
}

// create does the work; whatever it acquired it gives back on error.
func (c *container) create(ctx context.Context, spec *shim.ContainerSpec) (err error) {
	s, id := c.s, spec.ID
	var undo undoStack
	defer func() {
		if err != nil {
			undo.run(s.log)
		}
	}()
	config, f, err := c.config(spec)
	if err != nil {
		return err
	}
	c.rec.Filter = f.Name

	dir := s.containers.dir(id)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	undo.add("state", func() error { return s.containers.remove(id) })
	if err := s.containers.save(&c.rec); err != nil {
		return err
	}
	undo.add("output", func() error { c.out.close(); return nil })
	undo.add("descriptors", func() error {
		c.unkeep("")
		c.oom.close()
		c.closeStreams()
		return nil
	})
	if err := c.out.open(filepath.Join(dir, "cursor"), spec.LogPath, spec.LogMaxSize, spec.LogMaxFiles); err != nil {
		return err
	}
	io, err := c.makeStdio(config)
	if err != nil {
		return err
	}
	defer io.close()

	process, err := newProcess(spec.Spec.Process)
	if err != nil {
		return err
	}
	process.Init = true
	io.give(process)

	o := order(id, config, config.ProcessLabel, f, confine.AtCommand)
	root, err := detachedRoot(config)
	if err != nil {
		return err
	}
	defer closeFiles(root)
	o.Root = root != nil
	orderFile, err := o.File()
	if err != nil {
		return err
	}
	defer orderFile.Close()
	helm, helmInit, err := confine.NewHelm()
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.helm = helm
	c.mu.Unlock()
	defer helmInit.Close()
	process.ExtraFiles = []*os.File{orderFile, helmInit}
	if root != nil {
		process.ExtraFiles = append(process.ExtraFiles, root)
	}
	var way *passage
	if c.rec.SharesPIDs {
		if way, err = c.enterPassage(ctx); err != nil {
			return err
		}
		undo.add("passage", func() error { way.end(); return nil })
	}

	end := s.reaper.begin()
	defer end()
	lc, err := libcontainer.Create(s.path("lc"), id, config)
	if errors.Is(err, libcontainer.ErrExist) {
		// Remains of a container that the sweep could not read.
		if rerr := os.RemoveAll(filepath.Join(s.path("lc"), id)); rerr != nil {
			return rerr
		}
		lc, err = libcontainer.Create(s.path("lc"), id, config)
	}
	if err != nil {
		return lcError(err)
	}
	undo.add("container", func() error {
		if c.pidfd >= 0 {
			c.killInit()
			<-c.exited
		}
		return lc.Destroy()
	})
	if err := lc.Start(process); err != nil {
		return lcError(err)
	}
	helmInit.Close()
	pid, err := process.Pid()
	if err != nil {
		return err
	}
	if err := c.adopt(pid); err != nil {
		discard(pid)
		return err
	}
	if err := io.receive(c); err != nil {
		return err
	}
	if o.Mode == confine.AtCommand {
		if err := helm.Install(); err != nil {
			return fmt.Errorf("seccomp: %w", err)
		}
	}
	if st, err := lc.State(); err == nil {
		c.mu.Lock()
		c.rec.CgroupPaths = st.CgroupPaths
		c.mu.Unlock()
	}
	c.oom = s.watchOOM(c, false)
	c.keepAll()

	if err := c.out.start(); err != nil {
		return err
	}
	return c.made(pid, way) // last: what is made has an exit, and events
}

// made ends the creation.
func (c *container) made(pid int, way *passage) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if exit := c.rec.Process.Exit; exit != nil {
		return fmt.Errorf("init ended before it was started (exit %+v): %w", *exit, errdefs.ErrInternal)
	}
	r := c.rec
	r.Making = false
	r.ProcStart = startTime(pid)
	var st unix.Stat_t
	if unix.Fstat(c.pidfd, &st) == nil {
		r.Pidfd = st.Ino
	}
	r.Process.State, r.Process.PID, r.Process.CreatedAt = shim.Created, pid, time.Now()
	if err := c.s.containers.save(&r); err != nil {
		return err
	}
	c.rec = r
	if way != nil {
		c.way = way
		way.arm()
	}
	return nil
}

// lcError gives libcontainer's errors our sentinels.
func lcError(err error) error {
	switch {
	case errors.Is(err, libcontainer.ErrExist):
		return fmt.Errorf("%w: %w", err, errdefs.ErrAlreadyExists)
	case errors.Is(err, libcontainer.ErrNotExist):
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

// adopt watches the process for its end.
func (c *container) adopt(pid int) error {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("pidfd of init: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pidfd = pidfd
	if c.w, err = c.s.reaper.watch(pid, pidfd, c.onExit); err != nil {
		unix.Close(pidfd)
		c.pidfd = -1
	}
	return err
}

// start lets init execute the container's program.
func (s *Server) start(ctx context.Context, id string) (*shim.Process, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, err
	}
	if err := c.op.lock(ctx); err != nil {
		return nil, err
	}
	defer c.op.unlock()
	p := c.snapshot()
	switch p.State {
	case shim.Running, shim.Paused:
		return &p, nil
	case shim.Created:
	default:
		if !p.StartedAt.IsZero() {
			// It has run: who repeats a call that a shim took to its grave is
			// told so, and not that there was no start.
			return &p, nil
		}
		return nil, fmt.Errorf("container is %s: %w", p.State, errdefs.ErrFailedPrecondition)
	}
	noted := make(chan struct{})
	defer close(noted)
	c.mu.Lock()
	c.starting = noted
	c.mu.Unlock()
	if err := c.release(ctx); err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.rec.Process.StartedAt = time.Now()
	if c.rec.Process.State == shim.Created {
		c.rec.Process.State = shim.Running
	}
	err = s.containers.save(&c.rec)
	p = c.rec.Process
	// An exit waits for that, see onExit.
	s.events.append(shim.Event{Kind: shim.EventStarted, ID: id, PID: p.PID, At: p.StartedAt})
	c.mu.Unlock()
	if err != nil {
		s.log.Error("save container", "id", id, "error", err)
	}
	return &p, nil
}

const execFifo = "exec.fifo" // libcontainer's

// releaseGrace is how much longer than its caller a start waits for init, which
// has nothing left to do but to answer; one that is frozen does not.
const releaseGrace = 5 * time.Second

// release opens the fifo that init blocks on and waits for its sign of life.
func (c *container) release(ctx context.Context) error {
	// First: once the fifo is open the program may have run and ended, and all
	// that is left of it is closed.
	c.mu.Lock()
	pidfd, err := unix.FcntlInt(uintptr(c.pidfd), unix.F_DUPFD_CLOEXEC, 0)
	c.mu.Unlock()
	if err != nil {
		return fmt.Errorf("init has ended before it was started: %w", errdefs.ErrFailedPrecondition)
	}
	defer unix.Close(pidfd)
	path := filepath.Join(c.s.path("lc"), c.rec.Process.ID, execFifo)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("init does not wait any more: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("open exec fifo: %w", err)
	}
	defer unix.Close(fd)
	// Init is on its way from now on, and ends itself when it writes and nobody
	// has the other side open: that must not depend on this shim's life.
	c.keep(stored{name: "start", fd: fd})
	var left time.Time // when the caller was seen to be gone
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(pidfd), Events: unix.POLLIN}}
		ready, err := unix.Poll(fds, 100)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("await init: %w", err)
		}
		var b [1]byte
		if n, _ := unix.Read(fd, b[:]); n == 1 {
			break
		}
		if fds[1].Revents != 0 {
			return fmt.Errorf("init has ended before it was started: %w", errdefs.ErrFailedPrecondition)
		}
		if ready == 0 && c.hasStarted() {
			break // a shim before us has taken its sign of life, and died
		}
		if ctx.Err() != nil {
			// That does not take the start back: init is about to answer, and
			// whoever comes next wants to know that it runs.
			if left.IsZero() {
				left = time.Now()
			}
			if time.Since(left) > releaseGrace {
				return ctx.Err()
			}
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return c.executed(pidfd)
}

// executed waits until init has become the container's program, or has ended,
// and ends the container's passage. Before that the container takes no exec:
// threads of init that wait for the execve have the node's privileges, and an
// exec that may trace could use them.
func (c *container) executed(pidfd int) error {
	c.mu.Lock()
	way, helm := c.way, c.helm
	c.mu.Unlock()
	over := func() bool { return helm.Closed(pidfd, startPatience) }
	if helm == nil { // of a shim that has died
		over = func() bool { return c.becameProgram(pidfd) }
	}
	if !over() {
		c.killInit() // which ends the passage
		return fmt.Errorf("init does not execute the program: %w", errdefs.ErrUnavailable)
	}
	way.end()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closeHelm()
	return nil
}

// becameProgram asks until init has another name, or has ended.
func (c *container) becameProgram(pidfd int) bool {
	for deadline := time.Now().Add(startPatience); time.Now().Before(deadline); {
		if ended(pidfd, time.Millisecond) || c.hasStarted() {
			return true
		}
	}
	return false
}

// closeHelm is called with c.mu held.
func (c *container) closeHelm() {
	if c.helm != nil {
		c.helm.Close()
		c.helm = nil
	}
}

// onExit runs once when init has ended and is reaped.
func (c *container) onExit(exit shim.Exit) {
	s := c.s
	if !c.rec.OwnPIDNS {
		// Nobody else ends what init leaves behind in a shared namespace.
		if err := c.killAll(unix.SIGKILL); err != nil {
			s.log.Warn("kill left-over processes", "id", c.rec.Process.ID, "error", err)
		}
	}
	if exit.OOMKilled = c.oom.killed(exit); exit.OOMKilled {
		exit.MemoryPeak = c.oom.peak()
	}
	drained := c.out.finish()
	c.mu.Lock()
	starting := c.starting
	c.mu.Unlock()
	if starting != nil {
		// No exit is recorded or logged before its start: a shim that dies in
		// between would leave a program that has run as one that never did.
		<-starting
	}
	c.mu.Lock()
	made := !c.rec.Making
	c.rec.Process.Exit = &exit
	if made {
		c.rec.Process.State = shim.Exited
		if err := s.containers.save(&c.rec); err != nil {
			s.log.Error("save container", "id", c.rec.Process.ID, "error", err)
		}
		p := c.rec.Process
		s.events.append(shim.Event{Kind: shim.EventExited, ID: p.ID, PID: p.PID, At: exit.At, Exit: &exit})
	}
	way := c.way
	c.mu.Unlock()
	way.end()
	if made {
		// An ended container that is kept for its status holds no descriptors.
		if drained {
			c.out.close()
		}
		c.oom.close()
		c.unkeep("")
		c.closeStreams()
		c.leaveCgroup()
	}
	close(c.exited)
}

// leaveCgroup removes the cgroup of a container that has ended: on v1 its CPU
// quota would bound its pod's from below as long as its record is kept. Where it
// cannot be done, delete does it. Scopes are removed by systemd.
func (c *container) leaveCgroup() {
	if c.rec.SystemdCgroup {
		return
	}
	m, err := c.cgroup()
	if err == nil && m != nil {
		err = m.Destroy()
	}
	if err != nil {
		c.s.log.Info("cgroup of an ended container stays", "id", c.rec.Process.ID, "error", err)
	}
}

// closeStreams gives stdin, terminal and pidfd back.
func (c *container) closeStreams() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.in != nil {
		c.in.Close()
	}
	if c.tty != nil && c.tty != c.in {
		c.tty.Close()
	}
	c.in, c.tty = nil, nil
	c.closeHelm()
	if c.pidfd >= 0 {
		c.w.remove()
		unix.Close(c.pidfd)
		c.pidfd = -1
	}
}

// signal sends to init or to all processes.
func (s *Server) signal(ctx context.Context, id string, sig unix.Signal, all bool) error {
	if sig < 0 || sig > 64 {
		return fmt.Errorf("signal %d: %w", sig, errdefs.ErrInvalidArgument)
	}
	c, err := s.container(id)
	if err != nil {
		if b, e := s.sandbox(id); e == nil {
			return b.signal(sig)
		}
		return err
	}
	c.mu.Lock()
	made, ended := !c.rec.Making, c.pidfd < 0
	if made && !ended && !all {
		err = unix.PidfdSendSignal(c.pidfd, sig, nil, 0)
	}
	c.mu.Unlock()
	switch {
	case !made:
		return fmt.Errorf("container is being created: %w", errdefs.ErrFailedPrecondition)
	case all:
		return c.killAll(sig)
	case err != nil && err != unix.ESRCH:
		return fmt.Errorf("signal init: %w", err)
	}
	return nil
}

// delete ends the container and forgets it.
func (s *Server) delete(ctx context.Context, id string) error {
	c, err := s.container(id)
	if err != nil {
		return nil // gone already
	}
	c.abort()
	if err := c.op.lock(ctx); err != nil {
		return err
	}
	defer c.op.unlock()
	s.mu.RLock()
	current := s.byID[id] == c
	s.mu.RUnlock()
	if !current {
		return nil
	}
	if err := c.killAll(unix.SIGKILL); err != nil {
		return err
	}
	c.mu.Lock()
	if c.pidfd >= 0 {
		err = unix.PidfdSendSignal(c.pidfd, unix.SIGKILL, nil, 0)
	}
	c.mu.Unlock()
	if err != nil && err != unix.ESRCH {
		return fmt.Errorf("kill init: %w", err)
	}
	select {
	case <-c.exited:
	case <-ctx.Done():
		return fmt.Errorf("init does not end: %w", ctx.Err())
	}
	if err := c.destroy(); err != nil {
		return err
	}
	c.closeStreams()
	if err := s.containers.remove(id); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.byID, id)
	s.mu.Unlock()
	s.events.append(shim.Event{Kind: shim.EventDeleted, ID: id, PID: c.snapshot().PID})
	return nil
}

// abort kills an init that is being made, so that a creation which hangs (in a
// mount, say) fails and lets go.
func (c *container) abort() {
	c.mu.Lock()
	making, path, systemd := c.rec.Making, c.rec.Cgroup, c.rec.SystemdCgroup
	c.mu.Unlock()
	if !making {
		return
	}
	cg, err := newCgroup(c.rec.Process.ID, path, systemd, nil)
	if err == nil && cg.Exists() {
		err = killAll(cg, unix.SIGKILL)
	}
	if err != nil {
		c.s.log.Warn("abort creation", "id", c.rec.Process.ID, "error", err)
	}
}

// destroy removes cgroup, RDT group and libcontainer's state and runs the
// poststop hooks; without readable state at least the cgroup and the directory.
func (c *container) destroy() error {
	id := c.rec.Process.ID
	lc, err := libcontainer.Load(c.s.path("lc"), id)
	if err == nil {
		if err = lc.Destroy(); err == nil {
			return nil
		}
		if errors.Is(err, libcontainer.ErrRunning) || errors.Is(err, libcontainer.ErrPaused) {
			return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
		}
	}
	if !errors.Is(err, libcontainer.ErrNotExist) {
		c.s.log.Warn("libcontainer cannot destroy, doing it without", "id", id, "error", err)
	}
	if err := removeCgroup(c.rec.Cgroup, c.rec.SystemdCgroup, c.rec.CgroupPaths); err != nil {
		return fmt.Errorf("cgroup: %w", err)
	}
	return os.RemoveAll(filepath.Join(c.s.path("lc"), id))
}

// killAll signals all processes of the container.
func (c *container) killAll(sig unix.Signal) error {
	m, err := c.cgroup()
	if err != nil || m == nil {
		return err
	}
	return killAll(m, sig)
}

// cgroup is the manager of the container's cgroup, nil before there is one.
func (c *container) cgroup() (cgroups.Manager, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.rec.CgroupPaths) == 0 {
		return nil, nil
	}
	return recordedCgroup(c.rec.Cgroup, c.rec.SystemdCgroup, c.rec.CgroupPaths)
}

// update changes limits; what r leaves out keeps its value.
func (s *Server) update(ctx context.Context, id string, r *specs.LinuxResources) error {
	if r == nil {
		return fmt.Errorf("resources are missing: %w", errdefs.ErrInvalidArgument)
	}
	c, err := s.container(id)
	if err != nil {
		return err
	}
	if err := c.op.lock(ctx); err != nil {
		return err
	}
	defer c.op.unlock()
	lc, err := libcontainer.Load(s.path("lc"), id)
	if err != nil {
		return lcError(err)
	}
	config := lc.Config()
	if err := mergeResources(config.Cgroups.Resources, id, r); err != nil {
		return err
	}
	config.Cgroups.Resources.SkipDevices = true // unchanged; not kept in the state
	if err := lc.Set(config); err != nil {
		if errors.Is(err, libcontainer.ErrNotRunning) {
			return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
		}
		return fmt.Errorf("set limits: %w", err)
	}
	return nil
}

// mergeResources puts what r sets into dst.
func mergeResources(dst *cgroups.Resources, id string, r *specs.LinuxResources) error {
	spec := &specs.Spec{Linux: &specs.Linux{Resources: r}}
	cg, err := specconv.CreateCgroupConfig(&specconv.CreateOpts{CgroupName: id, Spec: spec}, nil)
	if err != nil {
		return fmt.Errorf("resources: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	src := cg.Resources
	if m := r.Memory; m != nil {
		if m.Limit != nil {
			dst.Memory = src.Memory
		}
		if m.Swap != nil {
			dst.MemorySwap = src.MemorySwap
		}
		if m.Reservation != nil {
			dst.MemoryReservation = src.MemoryReservation
		}
		if m.Limit != nil && *m.Limit == -1 && m.Swap == nil {
			dst.MemorySwap = 0 // a swap limit without a memory limit is refused
		}
	}
	if p := r.CPU; p != nil {
		if p.Shares != nil {
			dst.CpuShares, dst.CpuWeight = src.CpuShares, cgroups.ConvertCPUSharesToCgroupV2Value(*p.Shares)
		}
		if p.Quota != nil {
			dst.CpuQuota = src.CpuQuota
		}
		if p.Period != nil {
			dst.CpuPeriod = src.CpuPeriod
		}
		if p.Burst != nil {
			dst.CpuBurst = src.CpuBurst
		}
		if p.Idle != nil {
			dst.CPUIdle = src.CPUIdle
		}
		if p.Cpus != "" {
			dst.CpusetCpus = src.CpusetCpus
		}
		if p.Mems != "" {
			dst.CpusetMems = src.CpusetMems
		}
		if p.RealtimePeriod != nil {
			dst.CpuRtPeriod = src.CpuRtPeriod
		}
		if p.RealtimeRuntime != nil {
			dst.CpuRtRuntime = src.CpuRtRuntime
		}
	}
	if r.Pids != nil {
		dst.PidsLimit = src.PidsLimit
	}
	if len(r.HugepageLimits) > 0 {
		dst.HugetlbLimit = src.HugetlbLimit
	}
	if b := r.BlockIO; b != nil {
		if b.Weight != nil {
			dst.BlkioWeight = src.BlkioWeight
		}
		if len(b.ThrottleReadBpsDevice) > 0 {
			dst.BlkioThrottleReadBpsDevice = src.BlkioThrottleReadBpsDevice
		}
		if len(b.ThrottleWriteBpsDevice) > 0 {
			dst.BlkioThrottleWriteBpsDevice = src.BlkioThrottleWriteBpsDevice
		}
		if len(b.ThrottleReadIOPSDevice) > 0 {
			dst.BlkioThrottleReadIOPSDevice = src.BlkioThrottleReadIOPSDevice
		}
		if len(b.ThrottleWriteIOPSDevice) > 0 {
			dst.BlkioThrottleWriteIOPSDevice = src.BlkioThrottleWriteIOPSDevice
		}
	}
	if len(r.Unified) > 0 {
		dst.Unified = src.Unified
	}
	return nil
}
