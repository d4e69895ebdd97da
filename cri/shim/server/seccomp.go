package server

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// filter is a compiled profile.
type filter struct {
	// Name is the digest of the profile; "" is "no filter of ours".
	Name string `json:"name"`
	// Native: libcontainer must install it, because libcontainer's own init
	// could not work under it, or because it notifies an agent.
	Native bool `json:"native,omitempty"`
	// Flags of seccomp(2) and the program, see package confine.
	Flags   uint32 `json:"flags,omitempty"`
	Program []byte `json:"program,omitempty"`
}

// filters compiles each distinct profile once and keeps it, in memory and in
// run-dir for execs after a restart.
type filters struct {
	dir string

	mu    sync.Mutex
	cache map[string]*filterEntry
}

type filterEntry struct {
	once sync.Once
	f    *filter
	err  error
}

// maxFilters bounds the memory: a node has a handful of profiles.
const maxFilters = 256

func newFilters(dir string) *filters {
	return &filters{dir: dir, cache: map[string]*filterEntry{}}
}

func (s *filters) entry(name string) *filterEntry {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.cache[name]
	if e == nil {
		for old := range s.cache {
			if len(s.cache) < maxFilters {
				break
			}
			delete(s.cache, old)
		}
		e = new(filterEntry)
		s.cache[name] = e
	}
	return e
}

// get compiles p unless that was done before. nil asks for no filter.
func (s *filters) get(p *specs.LinuxSeccomp) (*filter, error) {
	if p == nil {
		return &filter{}, nil
	}
	if !seccompBuiltIn {
		return nil, fmt.Errorf("this podd-shim was built without seccomp; build it with cmd/podd-shim/build.sh: %w", errdefs.ErrFailedPrecondition)
	}
	if native(p) {
		return &filter{Native: true}, nil
	}
	text, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("encode seccomp profile: %w", err)
	}
	sum := sha256.Sum256(text)
	name := hex.EncodeToString(sum[:16])
	e := s.entry(name)
	e.once.Do(func() {
		if e.f, e.err = s.read(name); e.err == nil {
			return
		}
		f := &filter{Name: name}
		if f.Flags, e.err = filterFlags(p); e.err != nil {
			return
		}
		if f.Program, e.err = compile(p); e.err != nil {
			e.err = fmt.Errorf("seccomp profile: %w", e.err)
			return
		}
		var data []byte
		if data, e.err = json.Marshal(f); e.err == nil {
			e.err = writeFileAtomic(filepath.Join(s.dir, name), data)
		}
		e.f = f
	})
	if e.err != nil {
		s.forget(name, e) // the next one tries again
		return nil, e.err
	}
	return e.f, nil
}

func (s *filters) forget(name string, e *filterEntry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cache[name] == e {
		delete(s.cache, name)
	}
}

// named returns a filter that an earlier get stored.
func (s *filters) named(name string) (*filter, error) {
	if name == "" {
		return &filter{}, nil
	}
	e := s.entry(name)
	e.once.Do(func() { e.f, e.err = s.read(name) })
	if e.err != nil {
		s.forget(name, e)
		return nil, e.err
	}
	return e.f, nil
}

func (s *filters) read(name string) (*filter, error) {
	data, err := os.ReadFile(filepath.Join(s.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("compiled seccomp profile %s: %w", name, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	f := new(filter)
	if err := json.Unmarshal(data, f); err != nil || f.Name != name || len(f.Program) == 0 {
		return nil, fmt.Errorf("compiled seccomp profile %s is damaged: %w", name, errdefs.ErrDataLoss)
	}
	return f, nil
}

func filterFlags(p *specs.LinuxSeccomp) (uint32, error) {
	var flags uint32
	for _, f := range p.Flags {
		switch f {
		case "SECCOMP_FILTER_FLAG_TSYNC":
			// always, see package confine
		case specs.LinuxSeccompFlagLog:
			flags |= unix.SECCOMP_FILTER_FLAG_LOG
		case specs.LinuxSeccompFlagSpecAllow:
			flags |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		case specs.LinuxSeccompFlagWaitKillableRecv:
			flags |= 1 << 5 // SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
		default:
			return 0, fmt.Errorf("seccomp flag %q: %w", f, errdefs.ErrInvalidArgument)
		}
	}
	return flags, nil
}

// native says whether libcontainer has to install the profile itself: our way
// puts more of the runtime's own code under the filter than libcontainer's
// does (all threads of init; the whole second half of an exec).
func native(p *specs.LinuxSeccomp) bool {
	if p.ListenerPath != "" || p.DefaultAction == specs.ActNotify {
		return true
	}
	for _, s := range p.Syscalls {
		if s.Action == specs.ActNotify {
			return true
		}
	}
	for _, name := range initSyscalls {
		if !alwaysAllowed(p, name) {
			return true
		}
	}
	for _, name := range initAttempts {
		if !survivable(p, name) {
			return true
		}
	}
	return !forksAllowed(p)
}

// alwaysAllowed: every call of name is allowed, whatever its arguments.
func alwaysAllowed(p *specs.LinuxSeccomp, name string) bool {
	if permits(p.DefaultAction) {
		for _, s := range p.Syscalls {
			if slices.Contains(s.Names, name) && !permits(s.Action) {
				return false
			}
		}
		return true
	}
	allowed := false
	for _, s := range p.Syscalls {
		if !slices.Contains(s.Names, name) {
			continue
		}
		if !permits(s.Action) {
			return false
		}
		allowed = allowed || len(s.Args) == 0
	}
	return allowed
}

// survivable: a call of name is allowed or fails with an error, but kills nobody.
func survivable(p *specs.LinuxSeccomp, name string) bool {
	fine := func(a specs.LinuxSeccompAction) bool { return permits(a) || a == specs.ActErrno }
	named := false
	for _, s := range p.Syscalls {
		if slices.Contains(s.Names, name) {
			if !fine(s.Action) {
				return false
			}
			named = named || len(s.Args) == 0
		}
	}
	return named || fine(p.DefaultAction)
}

func permits(a specs.LinuxSeccompAction) bool {
	return a == specs.ActAllow || a == specs.ActLog
}

// threadFlags is what glibc's pthread_create passes to clone, enterFlags what
// cmd/enter does: the process it starts is born under the filter.
const (
	threadFlags = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SYSVSEM |
		unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SETTLS | unix.CLONE_PARENT_SETTID | unix.CLONE_CHILD_CLEARTID
	enterFlags = unix.CLONE_PARENT | unix.CLONE_VFORK | unix.CLONE_PARENT_SETTID
)

// forksAllowed: threads and the processes of enter may be made. A filter may
// look at clone's flags, and may answer clone3 with ENOSYS, which makes the C
// library use clone.
func forksAllowed(p *specs.LinuxSeccomp) bool {
	if !alwaysAllowed(p, "clone3") && !answers(p, "clone3", uint(unix.ENOSYS)) {
		return false
	}
	return alwaysAllowed(p, "clone") || cloneAllowed(p, threadFlags) && cloneAllowed(p, enterFlags)
}

// cloneAllowed: clone is allowed with these flags, whatever its other arguments.
func cloneAllowed(p *specs.LinuxSeccomp, flags uint64) bool {
	ok := false
	for _, s := range p.Syscalls {
		if !slices.Contains(s.Names, "clone") {
			continue
		}
		hit := true
		for _, a := range s.Args {
			hit = hit && a.Index == 0 && a.Op == specs.OpMaskedEqual && flags&a.Value == a.ValueTwo
		}
		if hit && !permits(s.Action) {
			return false
		}
		ok = ok || hit
	}
	return ok
}

// answers: every call of name fails with errno.
func answers(p *specs.LinuxSeccomp, name string, errno uint) bool {
	found := false
	for _, s := range p.Syscalls {
		if !slices.Contains(s.Names, name) {
			continue
		}
		if s.Action != specs.ActErrno || s.ErrnoRet == nil || *s.ErrnoRet != errno || len(s.Args) > 0 {
			return false
		}
		found = true
	}
	if !found && p.DefaultAction == specs.ActErrno {
		return p.DefaultErrnoRet != nil && *p.DefaultErrnoRet == errno
	}
	return found
}

// initAttempts is what libcontainer's init tries and can do without.
var initAttempts = []string{"open_tree", "fsopen", "fsconfig", "fsmount", "mount_setattr"}

// initSyscalls is what libcontainer 1.5's init (with Go's runtime and glibc)
// calls between the installation of our filter and execve of the payload, for
// containers and for execs; found by strace over the test-suite's containers
// (root and other users, with and without terminal, user namespace, label) and
// by reading setns_init_linux.go and Go's runtime. clone and clone3 are
// checked apart.
var initSyscalls = []string{
	// Go runtime and C library
	"brk", "clock_gettime", "clock_nanosleep", "close", "close_range", "dup", "dup2", "dup3",
	"epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_wait", "eventfd2", "exit", "exit_group",
	"fcntl", "futex", "getpid", "getrandom", "gettid", "madvise", "mincore", "mmap", "mprotect",
	"munmap", "nanosleep", "pipe2", "prlimit64", "read", "rseq", "rt_sigaction", "rt_sigprocmask",
	"rt_sigreturn", "sched_getaffinity", "sched_yield", "set_robust_list", "sigaltstack", "tgkill",
	"restart_syscall", "getrlimit", "setrlimit", "uname",
	// files and sockets
	"access", "faccessat", "faccessat2", "chdir", "fchdir", "fchown", "fchownat", "fstat",
	"fstatfs", "getcwd", "getdents64", "ioctl", "lseek", "newfstatat", "open", "openat", "openat2",
	"readlink", "readlinkat", "readv", "recvfrom", "recvmsg", "sendmsg", "sendto", "stat", "statfs",
	"statx", "write", "writev", "pread64", "shutdown", "getsockopt", "getsockname", "getpeername",
	// credentials
	"capget", "capset", "getegid", "geteuid", "getgid", "getgroups", "getppid", "getuid", "prctl",
	"setgid", "setgroups", "setuid", "setresgid", "setresuid", "setsid", "umask",
	// scheduling attributes
	"sched_getattr", "sched_setaffinity", "sched_setattr", "ioprio_set",
	"pidfd_open", "pidfd_send_signal", "waitid", "kill",
	"execve",
}
