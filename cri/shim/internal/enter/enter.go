// Package enter starts a further process in a running container by cmd/enter,
// a program of 8 KB without a C library, where libcontainer executes podd-shim
// with two Go runtimes' worth of work. The picture of the processes is in
// enter.c.
//
// What libcontainer 1.5 does for an exec, and where it happens here ("shim"
// is this package and its caller, outer and inner are enter's two processes):
//
//	process_linux.go  clone into the cgroup (v2)           shim: Start, by clone3
//	                  add to the cgroups (v1)              outer: "0" to each tasks file
//	                  initial, final, default CPU affinity outer
//	                  rlimits                              outer, before it loses the right to raise them
//	nsexec.c          oom_score_adj                        outer
//	                  not dumpable                         outer, first of all
//	                  join namespaces by path              outer: setns(2) with init's pidfd
//	                  fork for the PID namespace           outer: clone3(CLONE_PARENT), so that the shim is the parent
//	                  setsid, root of the user namespace   inner
//	setns_init        SELinux exec and key labels          outer: execve resets them, fork does not
//	                  AppArmor profile on exec             outer, likewise
//	                  session keyring                      inner
//	                  console, controlling terminal, size  inner, only on the container's real devpts
//	                  no_new_privs, umask, scheduler,      inner
//	                  io priority, personality
//	                  seccomp: early, or last with         inner: install_filter, with the shim's compiled program
//	                  no_new_privs
//	                  environment without doubles, $HOME   shim: environ; inner: find_home
//	                  chdir, again as the user             inner
//	                  bounding set, keep-caps, owner of    inner
//	                  the streams, groups, gid, uid
//	                  cwd is inside the root               inner: verify_cwd
//	                  capabilities, ambient ones           inner
//	                  look-up in $PATH                     inner: find_program
//	                  close all other descriptors          outer, on entry; inner keeps the status socket to execve
//	                  execve; exit code 255 and a line on  inner: execute
//	                  stderr when that fails
//
// enter also empties the signal mask. Left to libcontainer: time namespaces,
// Intel RDT, memory policies, seccomp profiles that libcontainer has to apply
// itself (see server.native), and kernels before 5.9 (setns by pidfd,
// close_range).
package enter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim/internal/program"
)

// Plan is what the process shall be. Strings must not contain NUL.
type Plan struct {
	// Namespaces are CLONE_NEW* flags: those of init's that are joined.
	Namespaces uint32
	// Args, and Env with each name once.
	Args, Env []string
	// Home: Env has no HOME; the directory is looked up in the container.
	Home bool
	// Path is the value of PATH, where Args[0] is looked up.
	Path string
	// Cwd; "" leaves the root directory.
	Cwd      string
	UID, GID uint32
	Groups   []uint32
	// Caps nil leaves the capabilities that the user has.
	Caps       *Capabilities
	NoNewPrivs bool
	// OOMScoreAdj, Umask, Personality and IOPriority are set where not nil.
	OOMScoreAdj *int
	Umask       *uint32
	Personality *uint32
	IOPriority  *uint32
	// Scheduler is struct sched_attr.
	Scheduler *unix.SchedAttr
	// InitialCPUs and FinalCPUs are the affinities before and after the
	// cgroup is joined; without either all CPUs are allowed.
	InitialCPUs, FinalCPUs *unix.CPUSet
	Rlimits                []Rlimit
	// CgroupFiles get a "0" written: tasks of v1 hierarchies.
	CgroupFiles []string
	// Attributes of security modules: what is written to which file.
	Attributes []Attribute
	// Keyring is the session keyring to join; "": keep the shim's.
	Keyring string
	// Filter is an array of struct sock_filter, FilterFlags is seccomp(2)'s.
	Filter      []byte
	FilterFlags uint32
	// Terminal makes a pty of Width and Height (0: unset) the streams.
	Terminal      bool
	Width, Height uint16
}

// Capabilities are sets of bits by capability number.
type Capabilities struct {
	Bounding, Effective, Permitted, Inheritable, Ambient uint64
}

// Rlimit is one of setrlimit(2).
type Rlimit struct{ Resource, Soft, Hard uint64 }

// Attribute is a file below /proc/self/attr and the text for it.
type Attribute struct{ File, Text string }

// Descriptors of the process that is started.
type Descriptors struct {
	Program *program.Program // cmd/enter
	Streams [3]uintptr
	Init    int // pidfd of the container's init
	Cgroup  int // directory of a v2 cgroup to be born in; -1: none
	Client  int // a socket whose end cancels; -1: none
}

// Process has executed the program, or is about to end with an exit code.
type Process struct {
	PID int
	// Terminal is the master of the pty.
	Terminal *os.File
}

// Unable says that the kernel or the container asks for more than enter can;
// nothing has happened.
type Unable struct {
	What string
	Err  error
}

func (e *Unable) Error() string { return fmt.Sprintf("enter cannot %s: %v", e.What, e.Err) }
func (e *Unable) Unwrap() error { return e.Err }

// ErrGone: the container seems to have ended meanwhile.
var ErrGone = errors.New("container has ended")

// Kinds of messages, see enter.c.
const (
	kindPID      = 'p'
	kindTerminal = 't'
	kindFailure  = 'e'
	kindUnable   = 'f'
	kindGone     = 'd'
	kindNotFound = 'n' // in $PATH
	kindNoFile   = 's' // stat of a name with a slash
	kindNoExec   = 'x'
	kindDot      = '.' // found in a relative directory of $PATH
)

// message is the fixed part of struct message.
type message struct {
	kind, err int32
}

// Start returns when the program is being executed or why it is not. On error
// children may be left that have ended or will: the caller's reaper takes them.
func Start(p *Plan, d Descriptors) (_ *Process, err error) {
	plan, err := p.file()
	if err != nil {
		return nil, err
	}
	defer unix.Close(plan)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	status, theirs := pair[0], pair[1]
	defer unix.Close(status)
	attr := &syscall.ProcAttr{
		Env:   []string{},
		Files: []uintptr{d.Streams[0], d.Streams[1], d.Streams[2], uintptr(theirs), uintptr(plan), uintptr(d.Init)},
		Sys:   &syscall.SysProcAttr{},
	}
	if d.Cgroup >= 0 {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, d.Cgroup
	}
	prog, err := d.Program.Descriptor(attr.Files...)
	if err != nil {
		unix.Close(theirs)
		return nil, err
	}
	outer, err := syscall.ForkExec(program.Path(prog), []string{"podd-enter"}, attr)
	unix.Close(prog)
	unix.Close(theirs)
	if err != nil {
		return nil, &Unable{"start in the cgroup", err}
	}
	s := starting{status: status, client: d.Client, outer: outer, args: p.Args}
	if err := s.follow(); err != nil {
		s.kill()
		if s.proc.Terminal != nil {
			s.proc.Terminal.Close()
		}
		return nil, err
	}
	_, _ = unix.Wait4(outer, nil, unix.WNOHANG, nil)
	return &s.proc, nil
}

// starting is a process on its way.
type starting struct {
	status, client int
	outer          int
	args           []string
	proc           Process
}

// follow reads what the two processes say until both have let go of the socket.
func (s *starting) follow() error {
	fds := []unix.PollFd{{Fd: int32(s.status), Events: unix.POLLIN}, {Fd: int32(s.client), Events: unix.POLLRDHUP}}
	var said error
	for {
		_, err := unix.Poll(fds, -1)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("await process: %w", err)
		}
		if fds[1].Revents&(unix.POLLHUP|unix.POLLRDHUP|unix.POLLERR) != 0 {
			return fmt.Errorf("the caller has left: %w", context.Canceled)
		}
		end, err := s.receive(&said)
		if err != nil {
			return err
		}
		if !end {
			continue
		}
		if said == nil && s.proc.PID == 0 {
			said = errors.New("the process ended before it was set up")
		}
		return said
	}
}

// receive takes one message; said is the reason of a failure.
func (s *starting) receive(said *error) (end bool, err error) {
	var buf [1024]byte
	var oob [64]byte
	n, oobn, _, _, err := unix.Recvmsg(s.status, buf[:], oob[:], unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	switch {
	case err == unix.EAGAIN || err == unix.EINTR:
		return false, nil
	case err == unix.ECONNRESET: // ended with our side unread
		return true, nil
	case err != nil:
		return false, fmt.Errorf("await process: %w", err)
	case n == 0:
		return true, nil
	}
	const head = int(unsafe.Sizeof(message{}))
	if n < head {
		return false, fmt.Errorf("message of %d bytes from the process", n)
	}
	m := *(*message)(unsafe.Pointer(&buf[0]))
	errno, text := unix.Errno(m.err), string(buf[head:n])
	switch m.kind {
	case kindPID:
		s.proc.PID = int(m.err)
		return false, nil
	case kindTerminal:
		s.proc.Terminal, err = terminal(oob[:oobn])
		return false, err
	case kindUnable:
		*said = &Unable{text, errno}
	case kindGone:
		*said = fmt.Errorf("%s: %w: %w", text, errno, ErrGone)
	case kindNotFound:
		*said = &exec.Error{Name: s.args[0], Err: exec.ErrNotFound}
	case kindNoFile:
		*said = &exec.Error{Name: s.args[0], Err: &os.PathError{Op: "stat", Path: s.args[0], Err: errno}}
	case kindNoExec:
		*said = &exec.Error{Name: s.args[0], Err: errno}
	case kindDot:
		*said = &exec.Error{Name: s.args[0], Err: exec.ErrDot}
	case kindFailure:
		*said = fmt.Errorf("%s: %w", text, errno)
	default:
		return false, fmt.Errorf("unknown message %q from the process", m.kind)
	}
	return false, nil
}

func terminal(oob []byte) (*os.File, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err == nil && len(msgs) == 1 {
		var fds []int
		if fds, err = unix.ParseUnixRights(&msgs[0]); err == nil && len(fds) == 1 {
			return os.NewFile(uintptr(fds[0]), "ptmx"), nil
		}
	}
	return nil, fmt.Errorf("receive terminal: %w", errors.Join(err, errors.New("no descriptor came")))
}

// kill ends what is under way. Nobody else has reaped outer, and inner has not
// been waited for by anybody: their numbers are theirs.
func (s *starting) kill() {
	if got, _ := unix.Wait4(s.outer, nil, unix.WNOHANG, nil); got != s.outer {
		_ = unix.Kill(s.outer, unix.SIGKILL)
	}
	if s.proc.PID > 0 {
		_ = unix.Kill(s.proc.PID, unix.SIGKILL)
	}
}
