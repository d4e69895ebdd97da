// Package killpoint kills a running program at a system call by its number: it
// counts those with an effect over all threads of the program, in the order in
// which they are made, and sends SIGKILL before or after the n-th.
//
// The program is traced by ptrace(2) from outside and does nothing else than
// it would: neither a build of its own nor a seccomp filter, which its children
// would inherit and be refused their calls by when nobody traces them. What it
// executes is not followed, but its own execve is. What it stores to memory that
// it has mapped from a file is no system call and no point; it lies between two.
package killpoint

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Point is a system call with an effect.
type Point struct {
	Number int
	Call   string // its name and what it is about
}

func (p Point) String() string { return fmt.Sprintf("%d %s", p.Number, p.Call) }

// Aim is where the program is killed.
type Aim struct {
	Point int  // 1 is the first; 0: nowhere, calls are counted
	After bool // the call was made; or else it is not
}

// Trace is a program whose system calls are counted.
type Trace struct {
	pid  int
	aim  Aim
	done chan struct{} // closed when nothing is traced any more

	mu     sync.Mutex
	points []Point
	last   time.Time // of the latest point
	struck *Point
	ending bool
}

// Start counts the system calls that a process makes from now on. Nobody else in
// this process may wait for that process meanwhile (exec.Cmd.Wait, say): the
// kernel would tell him of its stops.
func Start(pid int, aim Aim) (*Trace, error) {
	t := &Trace{pid: pid, aim: aim, done: make(chan struct{}), last: time.Now()}
	ready := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // ptrace knows threads
		defer runtime.UnlockOSThread()
		defer close(t.done)
		l := &loop{t: t, threads: map[int]bool{}, awaited: map[int]bool{}}
		if err := l.seize(); err != nil {
			l.release()
			ready <- err
			return
		}
		l.run(ready)
	}()
	if err := <-ready; err != nil {
		<-t.done
		return nil, fmt.Errorf("trace process %d: %w", pid, err)
	}
	return t, nil
}

// Struck is the point at which the program was killed; nil: it was not.
func (t *Trace) Struck() *Point {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.struck
}

// Quiet says that the program has been killed or has made no call with an effect
// for so long.
func (t *Trace) Quiet(d time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.struck != nil || time.Since(t.last) >= d
}

// Stop ends the trace, and returns what was counted. The program runs on as it
// did before, unless it was killed.
func (t *Trace) Stop() []Point {
	t.mu.Lock()
	t.ending = true
	t.mu.Unlock()
	for {
		// Wakes one of its threads, so that there is a stop to be seen. Go's
		// runtime uses this signal for itself and takes any number of them.
		_ = unix.Kill(t.pid, unix.SIGURG)
		select {
		case <-t.done:
			t.mu.Lock()
			defer t.mu.Unlock()
			return t.points
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// loop is what the tracing thread does.
type loop struct {
	t       *Trace
	threads map[int]bool // that are traced
	awaited map[int]bool // of them, those that have not stopped for us yet
	inside  int          // thread whose call is over when the program is to be killed
	killed  bool
}

const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEEXEC

func ptrace(request, tid int, addr, data uintptr) error {
	if _, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), addr, data, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// seize takes all threads: those that are made meanwhile by one that was not
// taken yet are found by the next look.
func (l *loop) seize() error {
	seized := map[int]bool{}
	for more := true; more; {
		more = false
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", l.t.pid))
		if err != nil {
			return err
		}
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if err != nil || seized[tid] {
				continue
			}
			switch err := ptrace(unix.PTRACE_SEIZE, tid, 0, options); {
			case errors.Is(err, unix.ESRCH):
				continue // ended
			case errors.Is(err, unix.EPERM) && l.over(tid):
				continue
			case errors.Is(err, unix.EPERM) && l.child(tid):
			case err != nil:
				return err
			}
			seized[tid], more = true, true
			l.threads[tid] = true
			if ptrace(unix.PTRACE_INTERRUPT, tid, 0, 0) == nil {
				l.awaited[tid] = true
			}
		}
	}
	return nil
}

// over says that a thread has ended and is only a name any more.
func (l *loop) over(tid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/stat", l.t.pid, tid))
	if err != nil {
		return true
	}
	_, state, _ := strings.Cut(string(b[bytes.LastIndexByte(b, ')'):]), " ")
	return strings.HasPrefix(state, "Z") || strings.HasPrefix(state, "X")
}

// child says that a thread is traced by us since its beginning.
func (l *loop) child(tid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/status", l.t.pid, tid))
	if err != nil {
		return false
	}
	var tracer int
	for line := range strings.Lines(string(b)) {
		if _, err := fmt.Sscanf(line, "TracerPid: %d", &tracer); err == nil {
			break
		}
	}
	return tracer == unix.Gettid()
}

// run follows the threads until the program or the trace ends.
func (l *loop) run(ready chan<- error) {
	report := sync.OnceFunc(func() { ready <- nil })
	defer report()
	for len(l.threads) > 0 {
		if len(l.awaited) == 0 {
			report()
		}
		var ws unix.WaitStatus
		tid, err := l.wait(&ws)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return
		}
		delete(l.awaited, tid)
		if !ws.Stopped() {
			delete(l.threads, tid)
			continue
		}
		l.threads[tid] = true
		signal := l.stopped(tid, ws)
		if signal < 0 {
			_ = ptrace(ptraceListen, tid, 0, 0)
		} else {
			_ = ptrace(unix.PTRACE_SYSCALL, tid, 0, uintptr(signal))
		}
		l.t.mu.Lock()
		ending := l.t.ending && l.t.struck == nil
		l.t.mu.Unlock()
		if ending {
			l.release()
			return
		}
	}
}

// wait is for a thread that stops or ends. It waits for this thread's alone: the
// test's other children are others' to reap.
func (l *loop) wait(ws *unix.WaitStatus) (tid int, err error) {
	options := unix.WALL | unix.WNOTHREAD
	if l.killed {
		options |= unix.WNOHANG
	}
	for {
		if tid, err = unix.Wait4(-1, ws, options, nil); tid != 0 || err != nil {
			return tid, err
		}
		if unix.Kill(l.t.pid, 0) == unix.ESRCH {
			return 0, unix.ECHILD
		}
		time.Sleep(time.Millisecond)
	}
}

// release lets go of all threads, each of which must stand still for that.
func (l *loop) release() {
	for tid := range l.threads {
		_ = ptrace(unix.PTRACE_INTERRUPT, tid, 0, 0)
	}
	for len(l.threads) > 0 {
		var ws unix.WaitStatus
		tid, err := unix.Wait4(-1, &ws, unix.WALL|unix.WNOTHREAD, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return
		}
		if ws.Stopped() {
			_ = ptrace(unix.PTRACE_DETACH, tid, 0, uintptr(max(l.stopped(tid, ws), 0)))
		}
		delete(l.threads, tid)
	}
}

const (
	ptraceListen         = 0x4208 // PTRACE_LISTEN
	ptraceGetSyscallInfo = 0x420e // PTRACE_GET_SYSCALL_INFO
	ptraceEventStop      = 128    // PTRACE_EVENT_STOP
)

// stopped looks at why a thread stands still, and returns the signal that it is
// to go on with; -1: it stays as the whole program is stopped by a signal.
func (l *loop) stopped(tid int, ws unix.WaitStatus) int {
	signal, event := ws.StopSignal(), int(ws)>>16
	switch {
	case event == ptraceEventStop && signal != unix.SIGTRAP:
		return -1
	case event == unix.PTRACE_EVENT_EXEC:
		if was, err := unix.PtraceGetEventMsg(tid); err == nil && int(was) == l.inside {
			l.inside = tid
		}
		clear(l.threads) // the others are gone
		l.threads[tid] = true
		return 0
	case event == unix.PTRACE_EVENT_CLONE:
		if made, err := unix.PtraceGetEventMsg(tid); err == nil {
			l.threads[int(made)] = true
		}
		return 0
	case event != 0:
		return 0
	case signal == unix.SIGTRAP|0x80:
		l.syscall(tid)
		return 0
	}
	return int(signal)
}

// syscallInfo is struct ptrace_syscall_info of <linux/ptrace.h>.
type syscallInfo struct {
	Op     uint8
	_      [3]uint8
	Arch   uint32
	IP, SP uint64
	Nr     uint64
	Args   [6]uint64
	_      [2]uint64
}

const atEntry, atExit = 1, 2 // PTRACE_SYSCALL_INFO_ENTRY, PTRACE_SYSCALL_INFO_EXIT

// syscall counts a call that is about to be made, and kills the program when it
// is this one's turn. A call whose thread is killed at its entry is not made.
func (l *loop) syscall(tid int) {
	var info syscallInfo
	if ptrace(ptraceGetSyscallInfo, tid, unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info))) != nil {
		return // killed by somebody else
	}
	if info.Op == atExit && tid == l.inside {
		l.strike()
		return
	}
	if info.Op != atEntry {
		return
	}
	text, ok := effect(l.t.pid, tid, int(info.Nr), info.Args)
	if !ok {
		return
	}
	t := l.t
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.struck != nil || t.ending || l.inside != 0 {
		return
	}
	t.points = append(t.points, Point{len(t.points) + 1, text})
	t.last = time.Now()
	switch {
	case len(t.points) != t.aim.Point:
	case t.aim.After:
		l.inside = tid
	default:
		l.kill()
	}
}

// strike kills the program after its call.
func (l *loop) strike() {
	l.t.mu.Lock()
	defer l.t.mu.Unlock()
	l.kill()
}

func (l *loop) kill() {
	p := l.t.points[l.t.aim.Point-1]
	l.t.struck = &p
	l.killed = true
	_ = unix.Kill(l.t.pid, unix.SIGKILL)
}
