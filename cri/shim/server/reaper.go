package server

import (
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

// reaper is the one place that waits for processes.
//
// Processes we know (inits, execs, pauses) are watched by pidfd and waited for
// by pid. Everything else that becomes our child is an orphan of a container
// without a PID namespace of its own (we are the subreaper) and is reaped
// unseen. Between the two stand the helpers that libcontainer forks and waits
// for itself: an unknown zombie is left alone until every start that was under
// way when it was first seen has ended.
type reaper struct {
	loop *loop
	log  *slog.Logger

	mu       sync.Mutex
	known    map[int]int // pid → number of watchers (a pid may be reused after we reaped it)
	ticket   uint64
	inFlight map[uint64]struct{}
	suspect  int    // unknown zombie at the head of the kernel's list
	seenAt   uint64 // ticket counter when suspect was first seen
}

func newReaper(l *loop, log *slog.Logger) *reaper {
	return &reaper{loop: l, log: log, known: map[int]int{}, inFlight: map[uint64]struct{}{}}
}

// begin marks a start by libcontainer; the returned function ends it. Its
// process must be watched before that.
func (r *reaper) begin() (end func()) {
	r.mu.Lock()
	r.ticket++
	t := r.ticket
	r.inFlight[t] = struct{}{}
	r.mu.Unlock()
	return func() {
		r.mu.Lock()
		delete(r.inFlight, t)
		pending := r.suspect != 0
		r.mu.Unlock()
		if pending {
			r.sweep()
		}
	}
}

// expect keeps the processes from being taken for orphans until release: they
// are known, and watched by nobody yet.
func (r *reaper) expect(pids []int) (release func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, pid := range pids {
		r.known[pid]++
	}
	return func() {
		for _, pid := range pids {
			r.forget(pid)
		}
	}
}

// discard ends a child that cannot be watched. Only for a start that is marked:
// until its end nobody else reaps the child, so the pid is its own.
func discard(pid int) {
	_ = unix.Kill(pid, unix.SIGKILL)
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
			return
		}
	}
}

// run reaps orphans whenever a child ends.
func (r *reaper) run() {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, unix.SIGCHLD)
	r.sweep()
	for range ch {
		r.sweep()
	}
}

// sweep reaps unknown zombies as far as that is safe.
func (r *reaper) sweep() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var info [128]byte
		err := unix.Waitid(unix.P_ALL, 0, (*unix.Siginfo)(unsafe.Pointer(&info)), unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		pid := int(*(*int32)(unsafe.Pointer(&info[sigInfoPid])))
		if err != nil || pid == 0 || r.known[pid] > 0 {
			// A known one at the head hides those behind it until its watcher
			// has reaped it and calls us again.
			r.suspect = 0
			return
		}
		if pid != r.suspect {
			r.suspect, r.seenAt = pid, r.ticket
		}
		for t := range r.inFlight {
			if t <= r.seenAt {
				return
			}
		}
		r.suspect = 0
		_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
	}
}

// sigInfoPid is the offset of si_pid in siginfo_t on 64-bit machines.
const sigInfoPid = 16

// watch calls done in its own goroutine when the process behind pidfd has
// ended and is reaped. It takes over neither pidfd nor its closing.
func (r *reaper) watch(pid, pidfd int, done func(shim.Exit)) (*watch, error) {
	r.mu.Lock()
	r.known[pid]++
	r.mu.Unlock()
	w, err := r.loop.add(pidfd, unix.EPOLLIN, func(uint32) {
		go func() {
			exit := reap(pid, pidfd)
			r.forget(pid)
			done(exit)
		}()
	})
	if err != nil {
		r.forget(pid)
	}
	return w, err
}

func (r *reaper) forget(pid int) {
	r.mu.Lock()
	if r.known[pid]--; r.known[pid] <= 0 {
		delete(r.known, pid)
	}
	r.mu.Unlock()
	r.sweep()
}

// reapTimeout bounds how long we wait for somebody else to reap a process that
// is not our child (it then belongs to PID 1 or to another subreaper).
const reapTimeout = 2 * time.Second

// reap returns how the ended process behind pidfd ended. A child is waited for.
// What a dead shim left to others is asked of the kernel: while it is a zombie
// through /proc/PID/stat, afterwards through PIDFD_GET_INFO (Linux ≥ 6.15).
func reap(pid, pidfd int) shim.Exit {
	now := time.Now()
	var status unix.WaitStatus
	for {
		got, err := unix.Wait4(pid, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err == nil && got == pid {
			return exitOf(status, now)
		}
		break
	}
	for deadline := now.Add(reapTimeout); ; time.Sleep(5 * time.Millisecond) {
		if status, ok := zombieStatus(pid, pidfd); ok {
			return exitOf(status, now)
		}
		if status, ok := pidfdExit(pidfd); ok {
			return exitOf(status, now)
		}
		if !procExists(pid) || time.Now().After(deadline) {
			// It may have been reaped between the two questions.
			if status, ok := pidfdExit(pidfd); ok {
				return exitOf(status, now)
			}
			return shim.Exit{Code: shim.Unknown, At: now}
		}
	}
}

func exitOf(status unix.WaitStatus, at time.Time) shim.Exit {
	e := shim.Exit{Known: true, At: at, Code: status.ExitStatus()}
	if status.Signaled() {
		e.Signal = int(status.Signal())
		e.Code = 128 + e.Signal
	}
	return e
}

// zombieStatus reads the exit status of an unreaped process that is not our
// child: the last field of /proc/PID/stat (proc_pid_stat(5), exit_code).
func zombieStatus(pid, pidfd int) (unix.WaitStatus, bool) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, false
	}
	// A reaped pid may have been given to another process meanwhile: then the
	// pidfd, which cannot be reused, no longer accepts signals.
	if err := unix.PidfdSendSignal(pidfd, 0, nil, 0); err != nil {
		return 0, false
	}
	state, fields, ok := statFields(string(stat))
	if !ok || state != "Z" || len(fields) < 49 {
		return 0, false
	}
	code, err := strconv.ParseUint(fields[48], 10, 32)
	return unix.WaitStatus(code), err == nil
}

// statFields splits /proc/PID/stat behind the command name, which may contain
// anything: state and the fields from the fourth on ([0] is ppid, [48] exit_code,
// [18] starttime).
func statFields(stat string) (state string, fields []string, ok bool) {
	_, rest, ok := cutLast(stat, ") ")
	if !ok {
		return "", nil, false
	}
	fields = strings.Fields(rest)
	if len(fields) < 20 {
		return "", nil, false
	}
	// [0] of the rest is the third field of the file.
	return fields[0], fields[1:], true
}

func cutLast(s, sep string) (before, after string, ok bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// startTime of a process in clock ticks since boot, 0 when it does not exist.
// With the pid it identifies a process for as long as the machine is up.
func startTime(pid int) uint64 {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0
	}
	_, fields, ok := statFields(string(stat))
	if !ok {
		return 0
	}
	t, _ := strconv.ParseUint(fields[18], 10, 64)
	return t
}

func procExists(pid int) bool {
	return unix.Kill(pid, 0) != unix.ESRCH
}

// pidfdInfo is struct pidfd_info of <linux/pidfd.h>, first published version.
type pidfdInfo struct {
	Mask     uint64
	CgroupID uint64
	PID      uint32
	TGID     uint32
	PPID     uint32
	IDs      [8]uint32
	ExitCode int32
}

const (
	pidfdGetInfo  = 0xc040ff0b // _IOWR(0xFF, 11, struct pidfd_info of 64 bytes)
	pidfdInfoExit = 1 << 3
)

// pidfdExit asks for the exit status of a process that has been reaped.
func pidfdExit(pidfd int) (unix.WaitStatus, bool) {
	info := pidfdInfo{Mask: pidfdInfoExit}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(pidfd), pidfdGetInfo, uintptr(unsafe.Pointer(&info)))
	if errno != 0 || info.Mask&pidfdInfoExit == 0 {
		return 0, false
	}
	return unix.WaitStatus(info.ExitCode), true
}
