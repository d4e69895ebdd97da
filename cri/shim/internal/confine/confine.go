// Package confine applies the parts of a container's confinement that
// libcontainer would apply too slowly: the seccomp filter, which libseccomp
// needs 19 ms to compile, is compiled once by the shim and handed to the
// container's init as a finished program.
//
// libcontainer re-executes podd-shim as the init of every container and of
// every exec. Enter runs there before libcontainer's own code:
//
//	shim                          init (podd-shim init)
//	  |  fd 3: sealed memfd: Order    |
//	  |------------------------------>| keyring; exec: filter now
//	  |                               | container: helper thread waits on fd 4
//	  |     libcontainer's protocol   |
//	  |<----------------------------->| mounts, user, capabilities … waits at exec fifo
//	  |  fd 4: "g"                    |
//	  |------------------------------>| helper: filter for all threads (TSYNC)
//	  |<------------------------------| "k", or "e" and why
//	  |  exec fifo opened (Start)     |
//	  |------------------------------>| execve
//
// The order is always sent, also when it asks for nothing, so that a missing
// one is an error; when the shim dies before "g", init ends itself.
package confine

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"
	"unsafe"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/keys"
	"github.com/opencontainers/selinux/go-selinux"
	"golang.org/x/sys/unix"
)

// Descriptors of the init, the first of libcontainer's ExtraFiles.
const (
	orderFD = 3
	helmFD  = 4
	rootFD  = 5
)

// RootTarget is where the root file system of a container with a user namespace
// is mounted before libcontainer looks for it: root of that namespace may not
// pass through our directories, which are for the node's root alone. In init's
// own mount namespace any directory will do that every node has, that everybody
// may reach and that libcontainer does not need.
const RootTarget = "/sys/class"

// Mode says when the filter is installed.
type Mode string

const (
	None      Mode = ""          // no filter, or libcontainer installs its own
	AtCommand Mode = "atCommand" // container init: when the shim says so
	AtOnce    Mode = "atOnce"    // exec: before libcontainer's code
)

// Order is what init shall do.
type Order struct {
	Mode Mode `json:"mode"`
	// Container is set for a container's init, which has the command socket.
	Container bool `json:"container,omitempty"`
	// Keyring is the name of the session keyring to join; "" leaves the
	// inherited one.
	Keyring string `json:"keyring,omitempty"`
	// KeyringPerm is set on a new container's keyring, see keyctl(2) SETPERM.
	KeyringPerm uint32 `json:"keyringPerm,omitempty"`
	// KeyLabel is the SELinux label of the keyring.
	KeyLabel string `json:"keyLabel,omitempty"`
	// Root: descriptor 5 is a detached mount of the root file system, which
	// goes to RootTarget.
	Root bool `json:"root,omitempty"`
	// Flags of seccomp(2), without TSYNC.
	Flags uint32 `json:"flags,omitempty"`
	// Filter is an array of struct sock_filter.
	Filter []byte `json:"filter,omitempty"`
}

const magic = "podd-confine-1\x00\x00"

// File returns the order in a sealed, non-executable memfd.
func (o *Order) File() (*os.File, error) {
	body, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("podd-order", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if err == unix.EINVAL { // before Linux 6.3
		fd, err = unix.MemfdCreate("podd-order", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err == nil {
			err = unix.Fchmod(fd, 0o400)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("memfd for init: %w", err)
	}
	f := os.NewFile(uintptr(fd), "podd-order")
	buf := append([]byte(magic), 0, 0, 0, 0)
	binary.BigEndian.PutUint32(buf[len(magic):], uint32(len(body)))
	if _, err = f.Write(append(buf, body...)); err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("memfd for init: %w", err)
	}
	return f, nil
}

func readOrder() (*Order, error) {
	var head [len(magic) + 4]byte
	if _, err := unix.Pread(orderFD, head[:], 0); err != nil {
		return nil, fmt.Errorf("read order: %w", err)
	}
	if string(head[:len(magic)]) != magic {
		return nil, errors.New("no order on descriptor 3")
	}
	body := make([]byte, binary.BigEndian.Uint32(head[len(magic):]))
	if n, err := unix.Pread(orderFD, body, int64(len(head))); err != nil || n != len(body) {
		return nil, fmt.Errorf("read order: %d of %d bytes: %w", n, len(body), err)
	}
	o := new(Order)
	if err := json.Unmarshal(body, o); err != nil {
		return nil, fmt.Errorf("decode order: %w", err)
	}
	return o, nil
}

// Enter turns the process into a container's init when it was started as one
// and does not return then. It must be called from an init function, on the
// main thread, before anything else happens.
func Enter() {
	if len(os.Args) < 2 || os.Args[1] != "init" || os.Getenv("_LIBCONTAINER_INITPIPE") == "" {
		return
	}
	runtime.LockOSThread()
	if err := prepare(); err != nil {
		// The shim reports a start that broke off; the reason goes where
		// libcontainer's own last words go.
		fmt.Fprintln(os.Stderr, "podd-shim init:", err)
		os.Exit(255)
	}
	libcontainer.Init()
}

func prepare() error {
	o, err := readOrder()
	if err != nil {
		return err
	}
	// Kept open until execve, so that their numbers are not used again.
	unix.CloseOnExec(orderFD)
	if o.Container {
		unix.CloseOnExec(helmFD)
	}
	if o.Keyring != "" {
		if err := joinKeyring(o); err != nil {
			return err
		}
	}
	if o.Root {
		if err := unix.MoveMount(rootFD, "", unix.AT_FDCWD, RootTarget, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("mount root file system: %w", err)
		}
		unix.Close(rootFD)
	}
	switch o.Mode {
	case None:
		return nil
	case AtOnce:
		return install(o)
	case AtCommand:
		if !o.Container {
			return errors.New("no command socket")
		}
		ready := make(chan error)
		go helper(o, ready)
		return <-ready
	}
	return fmt.Errorf("unknown mode %q", o.Mode)
}

// joinKeyring is what libcontainer's inits do first, at the same point of the
// container's creation and with the same names; libcontainer is told not to,
// because a filter installed for an exec would forbid it.
func joinKeyring(o *Order) error {
	if o.KeyLabel != "" {
		if err := selinux.SetKeyLabel(o.KeyLabel); err != nil {
			return err
		}
	}
	id, err := keys.JoinSessionKeyring(o.Keyring)
	if errors.Is(err, unix.ENOSYS) {
		return nil // no keyrings in this kernel
	}
	if err != nil {
		return fmt.Errorf("join session keyring: %w", err)
	}
	if o.KeyringPerm != 0 {
		if err := keys.ModKeyringPerm(id, 0xffffffff, o.KeyringPerm); err != nil {
			return fmt.Errorf("set keyring permissions: %w", err)
		}
	}
	return nil
}

// helper waits on its own thread for the shim's command. Credentials belong to
// threads: with keep-caps this one retains, through the main thread's change
// of user (which the C library applies to all threads), the right to install
// a filter. execve ends the thread.
func helper(o *Order, ready chan<- error) {
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		ready <- fmt.Errorf("keep capabilities: %w", err)
		return
	}
	ready <- nil
	var buf [1]byte
	for {
		n, err := unix.Read(helmFD, buf[:])
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 || buf[0] != 'g' {
			// The shim is gone or gave up: nobody must start unconfined.
			os.Exit(255)
		}
		break
	}
	err := raiseAdmin()
	if err == nil {
		err = install(o)
	}
	if err != nil {
		_, _ = unix.Write(helmFD, append([]byte{'e'}, err.Error()...))
		os.Exit(255)
	}
	// This thread has done what it had its privileges for: while init waits to be
	// started nobody shall find them here. (Every filter that is installed this
	// way allows capset, see server.native.)
	var none [2]unix.CapUserData
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
		_, _ = unix.Write(helmFD, fmt.Appendf([]byte{'e'}, "drop capabilities: %v", err))
		os.Exit(255)
	}
	_, _ = unix.Write(helmFD, []byte{'k'})
	select {} // until execve
}

// raiseAdmin puts CAP_SYS_ADMIN from this thread's permitted into its
// effective set; a change of user has cleared the latter.
func raiseAdmin() error {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&head, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	data[0].Effective |= data[0].Permitted & (1 << unix.CAP_SYS_ADMIN)
	if err := unix.Capset(&head, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}

// install sets the filter for all threads of the process.
func install(o *Order) error {
	n := len(o.Filter) / 8
	if n == 0 || n > 4096 || len(o.Filter)%8 != 0 {
		return fmt.Errorf("seccomp program of %d bytes", len(o.Filter))
	}
	prog := unix.SockFprog{Len: uint16(n), Filter: (*unix.SockFilter)(unsafe.Pointer(&o.Filter[0]))}
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		uintptr(o.Flags|unix.SECCOMP_FILTER_FLAG_TSYNC), uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(o)
	if errno != 0 {
		return fmt.Errorf("install seccomp filter: %w", errno)
	}
	if r != 0 {
		return fmt.Errorf("install seccomp filter: thread %d has another one", r)
	}
	return nil
}

// Helm is the shim's end of a container init's command socket.
type Helm struct{ f *os.File }

// NewHelm returns the shim's end and the one for init.
func NewHelm() (*Helm, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socket pair for init: %w", err)
	}
	_ = unix.SetNonblock(fds[0], true)
	return &Helm{os.NewFile(uintptr(fds[0]), "helm")}, os.NewFile(uintptr(fds[1]), "helm-init"), nil
}

// Install makes the waiting init install its filter and returns when it is in
// force.
func (h *Helm) Install() error {
	if _, err := h.f.Write([]byte{'g'}); err != nil {
		return fmt.Errorf("command init: %w", err)
	}
	buf := make([]byte, 512)
	n, err := h.f.Read(buf)
	switch {
	case err != nil && err != io.EOF:
		return fmt.Errorf("await init: %w", err)
	case n > 0 && buf[0] == 'k':
		return nil
	case n > 1:
		return errors.New(string(buf[1:n]))
	}
	return errors.New("init ended before its seccomp filter was installed")
}

// Closed waits until init has executed the container's program, which closes its
// end, or has ended, or patience is over: then it is false.
func (h *Helm) Closed(pidfd int, patience time.Duration) bool {
	raw, err := h.f.SyscallConn()
	if err != nil {
		return false
	}
	closed := false
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}, {Fd: int32(pidfd), Events: unix.POLLIN}} // POLLHUP needs no asking
		for deadline := time.Now().Add(patience); !closed; {
			left := time.Until(deadline)
			if left <= 0 {
				return
			}
			n, err := unix.Poll(fds, int(left.Milliseconds())+1)
			if err != nil && err != unix.EINTR {
				return
			}
			closed = n > 0
		}
	})
	return err == nil && closed
}

// Close gives up; an init that has not been commanded ends.
func (h *Helm) Close() error { return h.f.Close() }
