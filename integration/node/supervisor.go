package node

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A node's daemon is not the test's child but a supervisor's: this test binary
// once more, as child subreaper. Whatever podd leaves behind when it is killed
// (podd-shim, containers of a killed podd-shim) becomes the supervisor's child
// and is reaped by it, as PID 1 of a real machine does.

const supervisorEnv = "PODD_TEST_SUPERVISOR"

// Main runs the tests of a package that uses this one; call it from TestMain.
func Main(run func() int) {
	if os.Getenv(supervisorEnv) != "" {
		if err := supervise(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "supervisor:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(run())
}

// order starts a program.
type order struct {
	Args []string
	Log  string // file its output is added to
	Env  []string
	// Its end is reaped and not told.
	Untold bool
}

// report tells the start or the end of an ordered program, or, last of all,
// the processes that were left when the orders ended.
type report struct {
	Event  string // started, exited, left
	PID    int
	Status int // exit code, or 128 + signal
	Error  string
	Left   []string
}

func supervise(in io.Reader, out io.Writer) error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	var mu sync.Mutex
	enc := json.NewEncoder(out)
	tell := func(r report) {
		mu.Lock()
		defer mu.Unlock()
		enc.Encode(r)
	}
	ordered := map[int]bool{} // guarded by mu
	wake := make(chan struct{}, 1)
	go func() {
		for {
			var ws syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &ws, 0, nil)
			if errors.Is(err, syscall.ECHILD) {
				<-wake // until there is a child again
				continue
			}
			if err != nil {
				continue
			}
			mu.Lock() // an order registers its child before the lock is free
			ours := ordered[pid]
			delete(ordered, pid)
			mu.Unlock()
			if ours {
				status := ws.ExitStatus()
				if ws.Signaled() {
					status = 128 + int(ws.Signal())
				}
				tell(report{Event: "exited", PID: pid, Status: status})
			}
		}
	}()
	for r := bufio.NewReader(in); ; {
		line, err := r.ReadBytes('\n')
		if err != nil {
			break
		}
		var o order
		if err := json.Unmarshal(line, &o); err != nil {
			return err
		}
		mu.Lock()
		pid, err := begin(o)
		if err == nil && !o.Untold {
			ordered[pid] = true
		}
		mu.Unlock()
		if err != nil {
			tell(report{Event: "started", Error: err.Error()})
			continue
		}
		tell(report{Event: "started", PID: pid})
		select {
		case wake <- struct{}{}:
		default:
		}
	}
	// What is still here has been forgotten by podd: name it and end it.
	var left []string
	// The kernel's list of children may miss one that is just being handed
	// over, so it must be empty several times in a row.
	empty := 0
	for deadline := time.Now().Add(Scale(10 * time.Second)); time.Now().Before(deadline) && empty < 5; time.Sleep(5 * time.Millisecond) {
		pids := children(os.Getpid())
		if empty++; len(pids) > 0 {
			empty = 0
		}
		for _, pid := range pids {
			if c := command(pid); c != "" && len(left) < 50 {
				left = append(left, fmt.Sprintf("%d %s", pid, c))
			}
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	tell(report{Event: "left", Left: left})
	return nil
}

func begin(o order) (int, error) {
	log, err := os.OpenFile(o.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	path, err := exec.LookPath(o.Args[0])
	if err != nil {
		return 0, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	p, err := os.StartProcess(path, o.Args, &os.ProcAttr{
		Env: o.Env, Files: []*os.File{null, log, log}, Sys: &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		return 0, err
	}
	defer p.Release()
	return p.Pid, nil
}

// children of a process that have not ended.
func children(pid int) (pids []int) {
	tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, t := range tasks {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, t.Name()))
		for _, f := range strings.Fields(string(b)) {
			if n, err := strconv.Atoi(f); err == nil {
				pids = append(pids, n)
			}
		}
	}
	return pids
}

// command line of a process; "" for a zombie or none.
func command(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
}
