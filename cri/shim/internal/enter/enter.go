// Package enter starts a further process in a running container by cmd/enter,
// a program of 8 KB without a C library, where libcontainer executes podd-shim
// with two Go runtimes' worth of work. The picture of the processes is in
// enter.c.
//
// What libcontainer 1.5 does for an exec, and where it happens here ("shim"
// is this package and its caller, outer and inner are enter's two processes).
// All of it but the last happens in outer, which nobody in the container can
// name; inner is within reach of a container that may trace (CAP_SYS_PTRACE),
// so it is born with the rights, the filter and the descriptors of the program
// that it executes and with no others:
//
//	process_linux.go  clone into the cgroup (v2)           shim: Start, by clone3
//	                  add to the cgroups (v1)              outer: "0" to each tasks file
//	                  initial, final, default CPU affinity outer
//	                  rlimits                              outer, before it loses the right to raise them
//	nsexec.c          oom_score_adj                        outer
//	                  not dumpable                         outer, first of all and after it has changed its user
//	                  join namespaces by path              outer: setns(2) with init's pidfd
//	                  root of the user namespace           outer
//	setns_init        SELinux exec and key labels          outer: execve resets them, fork does not
//	                  AppArmor profile on exec             outer, likewise
//	                  session keyring                      outer
//	                  console and its size                 outer, only on the container's real devpts
//	                  no_new_privs, umask, scheduler,      outer
//	                  io priority, personality
//	                  seccomp: early, or last with         outer: install_filter, with the shim's compiled program
//	                  no_new_privs
//	                  environment without doubles, $HOME   shim: environ; outer: find_home
//	                  chdir, again as the user             outer
//	                  bounding set, keep-caps, owner of    outer
//	                  the streams, groups, gid, uid
//	                  cwd is inside the root               outer: verify_cwd
//	                  capabilities, ambient ones           outer
//	                  look-up in $PATH                     outer: find_program
//	                  close all other descriptors          outer
//	                  fork for the PID namespace           outer: clone(CLONE_PARENT), so that the shim is the parent
//	                  setsid, controlling terminal         inner
//	                  execve; exit code 255 and a line on  inner: execute
//	                  stderr when that fails
//
// enter also empties the signal mask. Left to libcontainer: time namespaces,
// Intel RDT, memory policies, schedulers that a fork resets, seccomp profiles
// that libcontainer has to apply itself (see server.native), and kernels before
// 5.9 (setns by pidfd, close_range).
package enter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"
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
	outer := -1
	attr.Sys.PidFD = &outer
	pid, err := syscall.ForkExec(program.Path(prog), []string{"podd-enter"}, attr)
	unix.Close(prog)
	unix.Close(theirs)
	if err != nil {
		return nil, &Unable{"start in the cgroup", err}
	}
	if outer < 0 { // a kernel without CLONE_PIDFD; nobody has waited for it
		if outer, err = unix.PidfdOpen(pid, 0); err != nil {
			return nil, fmt.Errorf("pidfd of enter: %w", err)
		}
	}
	defer unix.Close(outer)
	s := starting{status: status, client: d.Client, outer: outer, plan: plan, args: p.Args}
	err = s.follow()
	if err != nil {
		s.kill()
	}
	_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
	if err != nil {
		return nil, err
	}
	return &s.proc, nil
}

// starting is a process on its way.
type starting struct {
	status, client int
	outer          int // pidfd
	plan           int
	args           []string
	said           error // why outer gave up
	proc           Process
}

// follow reads what outer says until it has ended: inner executes the program
// then, or there is none.
func (s *starting) follow() error {
	fds := []unix.PollFd{{Fd: int32(s.outer), Events: unix.POLLIN}, {Fd: int32(s.client), Events: unix.POLLRDHUP}, {Fd: int32(s.status), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, -1)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("await process: %w", err)
		}
		if fds[1].Revents&(unix.POLLHUP|unix.POLLRDHUP|unix.POLLERR) != 0 {
			return fmt.Errorf("the caller has left: %w", context.Canceled)
		}
		closed, err := s.receive()
		if err != nil {
			return err
		}
		if closed {
			fds[2].Fd = -1
		}
		if closed && fds[0].Revents != 0 {
			return s.result()
		}
	}
}

// result is what became of it, once outer has ended. Inner's number is what the
// kernel gave outer (CLONE_PARENT_SETTID): nobody else could write it.
func (s *starting) result() error {
	if s.said != nil {
		return s.said
	}
	var r [2]int32
	if _, err := unix.Pread(s.plan, unsafe.Slice((*byte)(unsafe.Pointer(&r)), unsafe.Sizeof(r)), resultAt); err != nil {
		return fmt.Errorf("read the result: %w", err)
	}
	const fork = "fork in the container"
	child, errno := int(r[0]), unix.Errno(r[1])
	switch {
	case errno == unix.ENOMEM: // or the PID namespace has ended
		return fmt.Errorf("%s: %w: %w", fork, errno, ErrGone)
	case errno != 0:
		return fmt.Errorf("%s: %w", fork, errno)
	case child <= 0:
		return errors.New("the process ended before it was set up")
	}
	s.proc.PID = child
	return nil
}

// receive takes the messages that are there; closed after the last one.
func (s *starting) receive() (closed bool, err error) {
	var buf [1024]byte
	var oob [64]byte
	for {
		n, oobn, _, _, err := unix.Recvmsg(s.status, buf[:], oob[:], unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return false, nil
		case err == unix.ECONNRESET: // ended with our side unread
			return true, nil
		case err != nil:
			return false, fmt.Errorf("await process: %w", err)
		case n == 0:
			return true, nil
		}
		if err := s.hear(buf[:n], oob[:oobn]); err != nil {
			return false, err
		}
	}
}

// hear takes one message of outer's.
func (s *starting) hear(msg, oob []byte) (err error) {
	const head = int(unsafe.Sizeof(message{}))
	if len(msg) < head {
		return fmt.Errorf("message of %d bytes from the process", len(msg))
	}
	m := *(*message)(unsafe.Pointer(&msg[0]))
	errno, text := unix.Errno(m.err), string(msg[head:])
	switch m.kind {
	case kindTerminal:
		s.proc.Terminal, err = terminal(oob)
		return err
	case kindUnable:
		s.said = &Unable{text, errno}
	case kindGone:
		s.said = fmt.Errorf("%s: %w: %w", text, errno, ErrGone)
	case kindNotFound:
		s.said = &exec.Error{Name: s.args[0], Err: exec.ErrNotFound}
	case kindNoFile:
		s.said = &exec.Error{Name: s.args[0], Err: &os.PathError{Op: "stat", Path: s.args[0], Err: errno}}
	case kindNoExec:
		s.said = &exec.Error{Name: s.args[0], Err: errno}
	case kindDot:
		s.said = &exec.Error{Name: s.args[0], Err: exec.ErrDot}
	case kindFailure:
		s.said = fmt.Errorf("%s: %w", text, errno)
	default:
		return fmt.Errorf("unknown message %q from the process", m.kind)
	}
	return nil
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

// killPatience is how long a killed outer may take to end. One that hangs in a
// file system for longer cannot fork any more: a fork fails while a signal waits.
const killPatience = time.Second

// kill ends what is under way: outer, and inner if it came to that. Inner is
// the shim's child and has not been waited for, so its number is its own.
func (s *starting) kill() {
	_ = unix.PidfdSendSignal(s.outer, unix.SIGKILL, nil, 0)
	fds := []unix.PollFd{{Fd: int32(s.outer), Events: unix.POLLIN}}
	for deadline := time.Now().Add(killPatience); ; {
		n, err := unix.Poll(fds, int(max(time.Until(deadline), 0).Milliseconds()))
		if n > 0 || err != unix.EINTR {
			break
		}
	}
	if s.said == nil && s.result() == nil {
		if fd, err := unix.PidfdOpen(s.proc.PID, 0); err == nil {
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			unix.Close(fd)
		}
	}
	if s.proc.Terminal != nil {
		s.proc.Terminal.Close()
	}
}
