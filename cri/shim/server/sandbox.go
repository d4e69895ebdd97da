package server

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"strings"
	"sync"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/cri/shim/internal/program"
)

// sandbox is a pause process.
type sandbox struct {
	s      *Server
	op     opLock
	starts opLock // of containers in a PID namespace that others share
	exited chan struct{}
	fds    *fdStore

	mu    sync.Mutex
	rec   record
	pidfd int
	w     *watch
}

func newSandbox(s *Server, r record) *sandbox {
	return &sandbox{s: s, op: newOpLock(), starts: newOpLock(), exited: make(chan struct{}), rec: r, pidfd: -1}
}

func (b *sandbox) snapshot() shim.Process {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rec.Process
}

// signal sends to pause, if it is there.
func (b *sandbox) signal(sig unix.Signal) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.pidfd < 0 {
		return nil
	}
	if err := unix.PidfdSendSignal(b.pidfd, sig, nil, 0); err != unix.ESRCH {
		return err
	}
	return nil
}

// release gives the pidfd of an ended pause back.
func (b *sandbox) release() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.pidfd >= 0 {
		b.w.remove()
		unix.Close(b.pidfd)
		b.pidfd = -1
	}
}

// opLock is a mutex whose Lock can be given up.
type opLock chan struct{}

func newOpLock() opLock { return make(opLock, 1) }

func (l opLock) lock(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	default:
	}
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("another operation on it has not ended: %w", ctx.Err())
	}
}

func (l opLock) unlock() { <-l }

var cloneFlags = map[specs.LinuxNamespaceType]uintptr{
	specs.NetworkNamespace: unix.CLONE_NEWNET,
	specs.UTSNamespace:     unix.CLONE_NEWUTS,
	specs.IPCNamespace:     unix.CLONE_NEWIPC,
	specs.PIDNamespace:     unix.CLONE_NEWPID,
	specs.UserNamespace:    unix.CLONE_NEWUSER,
}

// createSandbox starts a pause process in new namespaces.
func (s *Server) createSandbox(ctx context.Context, spec *shim.SandboxSpec, digest string) (*shim.Process, error) {
	args, attr, err := pauseCommand(spec)
	if err != nil {
		return nil, err
	}
	b := newSandbox(s, record{Digest: digest, Making: true, Cgroup: spec.CgroupPath, SystemdCgroup: spec.SystemdCgroup})
	b.rec.Process.ID = spec.ID
	if err := b.op.lock(ctx); err != nil {
		return nil, err
	}
	defer b.op.unlock()
	s.mu.Lock()
	old := s.boxes[spec.ID]
	if old == nil && s.byID[spec.ID] == nil {
		s.boxes[spec.ID] = b
	}
	s.mu.Unlock()
	if old != nil {
		return old.again(ctx, digest)
	}
	if err := b.create(spec, args, attr); err != nil {
		s.mu.Lock()
		delete(s.boxes, spec.ID)
		s.mu.Unlock()
		return nil, err
	}
	p := b.snapshot()
	s.events.append(shim.Event{Kind: shim.EventStarted, ID: p.ID, Sandbox: true, PID: p.PID, At: p.StartedAt})
	return &p, nil
}

// again answers a repeated create.
func (b *sandbox) again(ctx context.Context, digest string) (*shim.Process, error) {
	if err := b.op.lock(ctx); err != nil {
		return nil, err
	}
	defer b.op.unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.rec.Process
	if p.State == "" {
		return nil, fmt.Errorf("an earlier create of it failed meanwhile: %w", errdefs.ErrUnavailable)
	}
	if b.rec.Digest != digest {
		return nil, fmt.Errorf("it exists with another specification: %w", errdefs.ErrAlreadyExists)
	}
	return &p, nil
}

// pauseCommand checks the specification and makes pause's arguments of it.
func pauseCommand(spec *shim.SandboxSpec) ([]string, *syscall.SysProcAttr, error) {
	if !validID(spec.ID) {
		return nil, nil, fmt.Errorf("sandbox id %q: %w", spec.ID, errdefs.ErrInvalidArgument)
	}
	attr := &syscall.SysProcAttr{}
	has := map[specs.LinuxNamespaceType]bool{}
	for _, ns := range spec.Namespaces {
		flag, ok := cloneFlags[ns]
		if !ok {
			return nil, nil, fmt.Errorf("namespaces: %q cannot be held by a sandbox: %w", ns, errdefs.ErrInvalidArgument)
		}
		has[ns] = true
		attr.Cloneflags |= flag
	}
	if has[specs.UserNamespace] {
		if len(spec.UIDMappings) == 0 || len(spec.GIDMappings) == 0 {
			return nil, nil, fmt.Errorf("uidMappings and gidMappings are needed for a user namespace: %w", errdefs.ErrInvalidArgument)
		}
		attr.UidMappings, attr.GidMappings = idMap(spec.UIDMappings), idMap(spec.GIDMappings)
		attr.GidMappingsEnableSetgroups = true
		// As the namespace's root it keeps its capabilities over execve.
		attr.Credential = &syscall.Credential{}
	}
	args := []string{"podd-pause"}
	if has[specs.UTSNamespace] {
		if spec.Hostname != "" {
			args = append(args, "h="+spec.Hostname)
		}
		if spec.Domainname != "" {
			args = append(args, "d="+spec.Domainname)
		}
	}
	for key, value := range spec.Sysctls {
		file, err := sysctlPath(key, has)
		if err != nil {
			return nil, nil, err
		}
		args = append(args, "s="+file+"="+value)
	}
	if spec.AppArmorProfile != "" && spec.AppArmorProfile != "unconfined" {
		file := "/proc/self/attr/apparmor/current"
		if _, err := os.Stat(file); err != nil {
			file = "/proc/self/attr/current"
		}
		args = append(args, "l="+file+"=changeprofile "+spec.AppArmorProfile)
	}
	return args, attr, nil
}

func idMap(specs []specs.LinuxIDMapping) []syscall.SysProcIDMap {
	m := make([]syscall.SysProcIDMap, len(specs))
	for i, s := range specs {
		m[i] = syscall.SysProcIDMap{ContainerID: int(s.ContainerID), HostID: int(s.HostID), Size: int(s.Size)}
	}
	return m
}

// sysctlPath finds the file and refuses what would change the host: only
// namespaced sysctls whose namespace the sandbox has may be set.
func sysctlPath(key string, has map[specs.LinuxNamespaceType]bool) (string, error) {
	// sysctl.d(5): when the first separator is a dot, dots and slashes trade
	// places (an interface called eth0.1 is written eth0/1).
	name := key
	if i := strings.IndexAny(key, "./"); i >= 0 && key[i] == '.' {
		name = strings.NewReplacer(".", "/", "/", ".").Replace(key)
	}
	for p := range strings.SplitSeq(name, "/") {
		if p == "" || p == "." || p == ".." || strings.ContainsAny(p, "=\x00") {
			return "", fmt.Errorf("sysctl %q: %w", key, errdefs.ErrInvalidArgument)
		}
	}
	ok := false
	switch {
	case strings.HasPrefix(name, "net/"):
		ok = has[specs.NetworkNamespace]
	case strings.HasPrefix(name, "fs/mqueue/"), name == "kernel/msgmax", name == "kernel/msgmnb", name == "kernel/msgmni",
		name == "kernel/sem", name == "kernel/shmall", name == "kernel/shmmax", name == "kernel/shmmni", name == "kernel/shm_rmid_forced":
		ok = has[specs.IPCNamespace]
	case name == "kernel/domainname", name == "kernel/hostname":
		ok = has[specs.UTSNamespace]
	}
	if !ok {
		return "", fmt.Errorf("sysctl %q belongs to no namespace of this sandbox: %w", key, errdefs.ErrInvalidArgument)
	}
	return path.Join("/proc/sys", name), nil
}

// create does the work; whatever it acquired it gives back on error.
func (b *sandbox) create(spec *shim.SandboxSpec, args []string, attr *syscall.SysProcAttr) (err error) {
	s := b.s
	var undo undoStack
	defer func() {
		if err != nil {
			undo.run(s.log)
		}
	}()
	dir := s.sandboxes.dir(spec.ID)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	undo.add("state", func() error { return s.sandboxes.remove(spec.ID) })
	cg, err := newCgroup(spec.ID, spec.CgroupPath, spec.SystemdCgroup, spec.Resources)
	if err != nil {
		return err
	}
	b.rec.CgroupPaths = cg.GetPaths()
	if err := s.sandboxes.save(&b.rec); err != nil {
		return err
	}
	undo.add("cgroup", cg.Destroy)

	status, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("status of pause: %w", err)
	}
	_ = unix.SetNonblock(status[0], true) // for its deadline
	ours, theirs := os.NewFile(uintptr(status[0]), "status"), os.NewFile(uintptr(status[1]), "status")
	defer ours.Close()
	defer theirs.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("descriptor store: %w", err)
	}
	send, recv := os.NewFile(uintptr(pair[0]), "store"), os.NewFile(uintptr(pair[1]), "store")
	defer send.Close()
	defer recv.Close()

	pidfd := -1
	attr.PidFD = &pidfd
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	prog, err := s.pause.Descriptor(null.Fd(), null.Fd(), null.Fd(), theirs.Fd(), send.Fd(), recv.Fd(), s.empty.Fd())
	if err != nil {
		return err
	}
	defer unix.Close(prog)
	cmd := &exec.Cmd{
		Path: program.Path(prog), Args: args, Env: []string{}, Dir: "/",
		Stdin: null, Stdout: null, Stderr: null,
		ExtraFiles:  []*os.File{pauseStatus - 3: theirs, pauseStoreSend - 3: send, pauseStoreRecv - 3: recv, pauseRoot - 3: s.empty},
		SysProcAttr: attr,
	}
	end := s.reaper.begin()
	defer end()
	if err := startIn(cg, s.host, cmd, spec.SELinuxLabel); err != nil {
		if pidfd >= 0 {
			unix.Close(pidfd)
		}
		return fmt.Errorf("start pause: %w", err)
	}
	pid := cmd.Process.Pid
	_ = cmd.Process.Release()
	if pidfd < 0 {
		if pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
			discard(pid)
			return fmt.Errorf("pidfd of pause: %w", err)
		}
	}
	b.mu.Lock()
	b.pidfd = pidfd
	b.w, err = s.reaper.watch(pid, pidfd, b.onExit)
	b.mu.Unlock()
	if err != nil {
		discard(pid)
		unix.Close(pidfd)
		return err
	}
	undo.add("pause", func() error {
		_ = b.signal(unix.SIGKILL)
		<-b.exited
		b.release()
		return nil
	})
	theirs.Close()
	if err := awaitPause(ours); err != nil {
		return err
	}
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), fmt.Append(nil, s.host.oomScore(spec.OOMScoreAdj)), 0); err != nil {
		return fmt.Errorf("oom score of pause: %w", err)
	}
	if spec.Resources != nil {
		if err := cg.Set(cgroupResources(cg)); err != nil {
			return fmt.Errorf("limit pause: %w", err)
		}
	}
	b.fds = newFDStore(pidfd)
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rec.Process.Exit != nil {
		return fmt.Errorf("pause ended at once: %w", errdefs.ErrInternal)
	}
	b.rec.Making = false
	b.rec.ProcStart = startTime(pid)
	b.rec.CgroupPaths = cg.GetPaths()
	b.rec.Process = shim.Process{ID: spec.ID, State: shim.Running, PID: pid, CreatedAt: now, StartedAt: now}
	if err := s.sandboxes.save(&b.rec); err != nil {
		return err
	}
	// Until now it would have ended with this shim: whoever comes next knows of it.
	if _, err := ours.Write([]byte{pauseGo}); err != nil {
		return fmt.Errorf("release pause: %w", err)
	}
	return nil
}

// Bytes of the status socket, see cmd/pause.
const (
	pauseReady = 'k'
	pauseGo    = 'g'
)

// awaitPause returns when pause has set itself up, or why it has not.
func awaitPause(status *os.File) error {
	_ = status.SetReadDeadline(time.Now().Add(10 * time.Second))
	said := make([]byte, 1, 512)
	if _, err := io.ReadFull(status, said); err != nil {
		return fmt.Errorf("await pause: %w", err)
	}
	if said[0] == pauseReady {
		return nil
	}
	rest, err := io.ReadAll(io.LimitReader(status, 4096))
	if err != nil {
		return fmt.Errorf("await pause: %w", err)
	}
	return fmt.Errorf("sandbox: %s: %w", append(said, rest...), errdefs.ErrInvalidArgument)
}

// onExit: the pod's namespaces have lost their holder.
func (b *sandbox) onExit(exit shim.Exit) {
	b.mu.Lock()
	made := !b.rec.Making
	b.rec.Process.Exit = &exit
	if made {
		b.rec.Process.State = shim.Exited
		if err := b.s.sandboxes.save(&b.rec); err != nil {
			b.s.log.Error("save sandbox", "id", b.rec.Process.ID, "error", err)
		}
	}
	p := b.rec.Process
	b.mu.Unlock()
	if made {
		b.s.events.append(shim.Event{Kind: shim.EventExited, ID: p.ID, Sandbox: true, PID: p.PID, At: exit.At, Exit: &exit})
	}
	close(b.exited)
}

// deleteSandbox kills the pause process and removes its cgroup.
func (s *Server) deleteSandbox(ctx context.Context, id string) error {
	b, err := s.sandbox(id)
	if err != nil {
		return nil // gone already
	}
	if err := b.op.lock(ctx); err != nil {
		return err
	}
	defer b.op.unlock()
	s.mu.RLock()
	current := s.boxes[id] == b
	s.mu.RUnlock()
	if !current {
		return nil
	}
	if b.pidfd >= 0 {
		if err := b.signal(unix.SIGKILL); err != nil {
			return fmt.Errorf("kill pause: %w", err)
		}
		select {
		case <-b.exited:
		case <-ctx.Done():
			return fmt.Errorf("pause does not end: %w", ctx.Err())
		}
		b.release()
	}
	if err := removeCgroup(b.rec.Cgroup, b.rec.SystemdCgroup, b.rec.CgroupPaths); err != nil {
		return fmt.Errorf("cgroup of pause: %w", err)
	}
	if err := s.sandboxes.remove(id); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.boxes, id)
	s.mu.Unlock()
	s.events.append(shim.Event{Kind: shim.EventDeleted, ID: id, Sandbox: true, PID: b.snapshot().PID})
	return nil
}
