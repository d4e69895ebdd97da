package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// stdio is a container's three streams while it is being created.
//
// stdout and stderr are FIFOs that the container has open for reading and
// writing, so that it never gets SIGPIPE while no shim is there. stdin is a
// pipe that it has open for reading only, or it would never see its end.
type stdio struct {
	child  [3]*os.File // the container's ends
	socket *os.File    // where libcontainer's init sends the terminal
	tty    bool
}

// makeStdio makes the pipes and registers our ends with the container.
func (c *container) makeStdio(config *configs.Config) (_ *stdio, err error) {
	io := &stdio{tty: c.rec.Terminal}
	defer func() {
		if err != nil {
			io.close()
		}
	}()
	if io.tty {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("console socket: %w", err)
		}
		io.socket, io.child[0] = os.NewFile(uintptr(pair[0]), "console"), os.NewFile(uintptr(pair[1]), "console-init")
		return io, nil
	}
	uid, err := config.HostRootUID()
	if err != nil {
		return nil, err
	}
	gid, err := config.HostRootGID()
	if err != nil {
		return nil, err
	}
	if c.rec.Stdin {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, fmt.Errorf("stdin: %w", err)
		}
		io.child[0], c.in = r, w
		if err := r.Chown(uid, gid); err != nil {
			return nil, fmt.Errorf("stdin: %w", err)
		}
	}
	for n, name := range streamNames {
		path := filepath.Join(c.s.containers.dir(c.rec.Process.ID), name)
		if err := unix.Mkfifo(path, 0o600); err != nil {
			return nil, fmt.Errorf("make %s fifo: %w", name, err)
		}
		r, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("open %s fifo: %w", name, err)
		}
		if err := c.out.addStream(n, r, false); err != nil {
			unix.Close(r)
			return nil, err
		}
		w, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("open %s fifo: %w", name, err)
		}
		io.child[1+n] = os.NewFile(uintptr(w), name)
		if err := io.child[1+n].Chown(uid, gid); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return io, nil
}

// give hands the container's ends to the process.
func (io *stdio) give(p *libcontainer.Process) {
	if io.tty {
		p.ConsoleSocket = io.child[0]
		return
	}
	// A nil *os.File in an interface would not be nil.
	if io.child[0] != nil {
		p.Stdin = io.child[0]
	}
	p.Stdout, p.Stderr = io.child[1], io.child[2]
}

// receive takes the terminal that init has made.
func (io *stdio) receive(c *container) error {
	if !io.tty {
		return nil
	}
	master, err := receiveTTY(io.socket)
	if err != nil {
		return err
	}
	return c.useTTY(master)
}

// useTTY makes master the container's input and output.
func (c *container) useTTY(master *os.File) (err error) {
	defer func() {
		if err != nil {
			master.Close()
		}
	}()
	fd, err := unix.FcntlInt(master.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := c.out.addStream(stdout, fd, true); err != nil {
		unix.Close(fd)
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tty, err = pollable(master); err != nil {
		return err
	}
	c.in = c.tty
	return nil
}

// receiveTTY reads the pty master that libcontainer's init sends with its name.
func receiveTTY(socket *os.File) (*os.File, error) {
	_ = unix.SetsockoptTimeval(int(socket.Fd()), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10})
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	for {
		_, oobn, _, _, err := unix.Recvmsg(int(socket.Fd()), buf, oob, unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("receive terminal: %w", err)
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(msgs) != 1 {
			return nil, fmt.Errorf("receive terminal: %w", errors.Join(err, errdefs.ErrInternal))
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if err != nil || len(fds) != 1 {
			return nil, fmt.Errorf("receive terminal: %w", errors.Join(err, errdefs.ErrInternal))
		}
		return os.NewFile(uintptr(fds[0]), "ptmx"), nil
	}
}

// close gives up the container's ends; ours belong to the container.
func (io *stdio) close() {
	closeFiles(io.child[:]...)
	closeFiles(io.socket)
	io.child, io.socket = [3]*os.File{}, nil
}

// keepAll stores the descriptors that must outlive the shim.
func (c *container) keepAll() {
	keep := []stored{{name: "pidfd", fd: c.pidfd}}
	for n, st := range c.out.streams {
		if st != nil {
			name := streamNames[n]
			if st.tty {
				name = "tty"
			}
			keep = append(keep, stored{name: name, fd: st.fd})
		}
	}
	if c.in != nil && c.in != c.tty {
		keep = append(keep, stored{name: "stdin", fd: rawFD(c.in)})
	}
	c.keep(keep...)
}

// newProcess translates a process for libcontainer.
func newProcess(p *specs.Process) (*libcontainer.Process, error) {
	if len(p.Args) == 0 {
		return nil, fmt.Errorf("process has no args: %w", errdefs.ErrInvalidArgument)
	}
	nnp := p.NoNewPrivileges
	lp := &libcontainer.Process{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd,
		UID: int(p.User.UID), GID: int(p.User.GID),
		Label: p.SelinuxLabel, AppArmorProfile: p.ApparmorProfile, NoNewPrivileges: &nnp,
		Scheduler: p.Scheduler, IOPriority: p.IOPriority,
	}
	if p.ConsoleSize != nil {
		lp.ConsoleWidth, lp.ConsoleHeight = uint16(p.ConsoleSize.Width), uint16(p.ConsoleSize.Height)
	}
	if caps := p.Capabilities; caps != nil {
		lp.Capabilities = &configs.Capabilities{
			Bounding: caps.Bounding, Effective: caps.Effective, Inheritable: caps.Inheritable,
			Permitted: caps.Permitted, Ambient: caps.Ambient,
		}
	}
	for _, g := range p.User.AdditionalGids {
		lp.AdditionalGroups = append(lp.AdditionalGroups, int(g))
	}
	for _, r := range p.Rlimits {
		kind, ok := rlimits[r.Type]
		if !ok {
			return nil, fmt.Errorf("rlimit %q: %w", r.Type, errdefs.ErrInvalidArgument)
		}
		lp.Rlimits = append(lp.Rlimits, configs.Rlimit{Type: kind, Hard: r.Hard, Soft: r.Soft})
	}
	aff, err := configs.ConvertCPUAffinity(p.ExecCPUAffinity)
	if err != nil {
		return nil, fmt.Errorf("execCPUAffinity: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	lp.CPUAffinity = aff
	return lp, nil
}

var rlimits = map[string]int{
	"RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_STACK": unix.RLIMIT_STACK, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_RSS": unix.RLIMIT_RSS,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
}
