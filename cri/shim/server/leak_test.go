package server_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

// holds counts what the shim holds: descriptors by target kind, and mappings of
// cursors.
func (n *node) holds() map[string]int {
	n.t.Helper()
	info, err := n.Info(n.ctx())
	if err != nil {
		n.t.Fatal(err)
	}
	got := map[string]int{}
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", info.PID))
	for _, l := range links {
		target, err := os.Readlink(l)
		if err != nil {
			continue
		}
		kind, _, _ := strings.Cut(target, ":")
		if strings.HasPrefix(target, "/") {
			kind = filepath.Base(target)
		}
		got[kind]++
	}
	maps, _ := os.ReadFile(fmt.Sprintf("/proc/%d/maps", info.PID))
	got["cursor mappings"] = strings.Count(string(maps), "/cursor")
	return got
}

// TestLeaks: what a container took it gives back, at its end and when a start
// fails, whatever happened in between.
func TestLeaks(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	life := func() {
		spec := n.containerSpec(box, "echo out; echo err >&2; read x; sleep 0.01")
		spec.Stdin = true
		n.run(spec)
		n.waitLog(spec.LogPath, "err")
		n.execOut(spec.ID, "/bin/true")
		n.feed(spec.ID, "x\n")
		n.until(shim.EventExited, spec.ID)
		if err := n.Delete(n.ctx(), spec.ID); err != nil {
			t.Fatal(err)
		}
		tty := n.containerSpec(box, "sleep 1000")
		tty.Spec.Process.Terminal = true
		n.run(tty)
		if err := n.Delete(n.ctx(), tty.ID); err != nil {
			t.Fatal(err)
		}
		bad := n.containerSpec(box, "true")
		bad.Spec.Process.Args = []string{"/no/such/program"}
		if _, err := n.Create(n.ctx(), bad); err == nil {
			t.Fatal("created without a program")
		}
		other, err := n.CreateSandbox(n.ctx(), n.sandboxSpec())
		if err != nil {
			t.Fatal(err)
		}
		if err := n.DeleteSandbox(n.ctx(), other.ID); err != nil {
			t.Fatal(err)
		}
		wrong := n.sandboxSpec()
		wrong.Sysctls = map[string]string{"net.ipv4.no_such_key": "1"}
		if _, err := n.CreateSandbox(n.ctx(), wrong); err == nil {
			t.Fatal("created with an unknown sysctl")
		}
	}
	life() // what is made once
	before := n.holds()
	before["pipe"] += 2 // a second idle pump may keep its scratch pipe
	for range 5 {
		life()
	}
	n.holdsNoMoreThan(before)
	// An ended container that is kept holds nothing.
	ended := n.containerSpec(box, "echo x")
	n.run(ended)
	n.until(shim.EventExited, ended.ID)
	n.holdsNoMoreThan(before)
}

// TestFailedCreatesLeaveNothing lets the shim have so few descriptors that
// creations and execs fail at each place where they open one.
func TestFailedCreatesLeaveNothing(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	running := n.containerSpec(box, "exec sleep 1000")
	n.run(running)
	info, err := n.Info(n.ctx())
	if err != nil {
		t.Fatal(err)
	}
	var was unix.Rlimit
	if err := unix.Prlimit(info.PID, unix.RLIMIT_NOFILE, nil, &was); err != nil {
		t.Fatal(err)
	}
	lowest := func() uint64 { // descriptor that is free
		for fd := uint64(0); ; fd++ {
			if _, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", info.PID, fd)); err != nil {
				return fd
			}
		}
	}
	short := func(more uint64, do func(ctx context.Context) error) error {
		t.Helper()
		few := was
		few.Cur = lowest() + more
		if err := unix.Prlimit(info.PID, unix.RLIMIT_NOFILE, &few, nil); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(n.ctx(), 5*time.Second)
		defer cancel()
		err := do(ctx)
		if e := unix.Prlimit(info.PID, unix.RLIMIT_NOFILE, &was, nil); e != nil {
			t.Fatal(e)
		}
		return err
	}
	children := func() int {
		count := 0
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", info.PID))
		for _, f := range tasks {
			pids, _ := os.ReadFile(f)
			count += len(strings.Fields(string(pids)))
		}
		return count
	}
	whole := func() { // what is made once, such as a compiled filter
		spec := n.containerSpec(box, "true")
		spec.Stdin = true
		n.run(spec)
		if err := n.Delete(n.ctx(), spec.ID); err != nil {
			t.Fatal(err)
		}
		n.execOut(running.ID, "/bin/true")
	}
	whole()
	before, processes := n.holds(), children()
	before["pipe"] += 2 // a second idle pump may keep its scratch pipe
	failed := map[string]int{}
	for more := uint64(4); more < 40; more++ {
		spec := n.containerSpec(box, "exec sleep 1000")
		spec.Stdin = more%2 == 0
		spec.Spec.Process.Terminal = more%3 == 0
		if err := short(more, func(ctx context.Context) error { _, err := n.Create(ctx, spec); return err }); err != nil {
			failed["container"]++
		} else if err := n.Delete(n.ctx(), spec.ID); err != nil {
			t.Fatal(err)
		}
		other := n.sandboxSpec()
		if err := short(more, func(ctx context.Context) error { _, err := n.CreateSandbox(ctx, other); return err }); err != nil {
			failed["sandbox"]++
		} else if err := n.DeleteSandbox(n.ctx(), other.ID); err != nil {
			t.Fatal(err)
		}
		e := &shim.ExecSpec{ContainerID: running.ID, Process: &specs.Process{Args: []string{"/bin/sleep", "1000"}, Cwd: "/", Env: []string{"PATH=/bin"}}}
		var s shim.Session
		if err := short(more, func(ctx context.Context) (err error) { s, err = n.Exec(ctx, e); return err }); err != nil {
			failed["exec"]++
		} else {
			s.Close()
		}
	}
	t.Logf("failed: %v", failed)
	if failed["container"] < 5 || failed["sandbox"] < 5 || failed["exec"] < 1 {
		t.Errorf("too few failed: %v", failed)
	}
	n.holdsNoMoreThan(before)
	for deadline := time.Now().Add(10 * time.Second); children() > processes; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d processes, there were %d", children(), processes)
		}
	}
	whole() // and still works
}

// holdsNoMoreThan waits a little: connections close a moment after their
// answer, and what libcontainer leaves to the garbage collector goes with it.
func (n *node) holdsNoMoreThan(before map[string]int) {
	n.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		after, more := n.holds(), ""
		for kind, count := range after {
			if count > before[kind] {
				more += fmt.Sprintf(" %s: %d, was %d;", kind, count, before[kind])
			}
		}
		if more == "" {
			return
		}
		if time.Now().After(deadline) {
			n.t.Errorf("the shim holds more:%s", more)
			return
		}
	}
}

// TestParallelExecs: execs in one container do not wait for each other, and
// all exits arrive.
func TestParallelExecs(t *testing.T) {
	n := newNode(t)
	spec := n.containerSpec(n.sandbox(), "sleep 1000")
	n.run(spec)
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			out, exit := n.execOut(spec.ID, "/bin/sh", "-c", fmt.Sprintf("echo %d; exit %d", i, i))
			if out != fmt.Sprintf("%d\n", i) || exit.Code != i {
				t.Errorf("exec %d: %q %+v", i, out, exit)
			}
		})
	}
	wg.Wait()
}

// TestOrphans: processes that lose their parent in a shared or in the host's
// PID namespace are reaped, and end with their container.
func TestOrphans(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	spec := n.containerSpec(box, "for i in 1 2 3 4 5; do (sleep 0.05 &); done; (sleep 999 &); sleep 1; exit 1")
	spec.Spec.Linux.Namespaces = append(spec.Spec.Linux.Namespaces[:1], spec.Spec.Linux.Namespaces[2:]...)
	spec.Spec.Mounts[0].Type, spec.Spec.Mounts[0].Source = "bind", "/proc"
	spec.Spec.Mounts[0].Options = []string{"rbind"}
	spec.Spec.Linux.MaskedPaths, spec.Spec.Linux.ReadonlyPaths = nil, nil
	n.run(spec)
	n.until(shim.EventExited, spec.ID)
	info, err := n.Info(n.ctx())
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		var zombies []string
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", info.PID))
		for _, f := range tasks {
			pids, _ := os.ReadFile(f)
			for _, pid := range strings.Fields(string(pids)) {
				stat, _ := os.ReadFile("/proc/" + pid + "/stat")
				if strings.Contains(string(stat), ") Z ") || strings.Contains(string(stat), "(sleep)") {
					zombies = append(zombies, string(stat))
				}
			}
		}
		if len(zombies) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left: %v", zombies)
		}
	}
}

// TestMemory: what an idle running container costs the shim.
func TestMemory(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	info, err := n.Info(n.ctx())
	if err != nil {
		t.Fatal(err)
	}
	private := func() int {
		time.Sleep(6 * time.Second) // the shim gives memory back when idle
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", info.PID))
		if err != nil {
			t.Fatal(err)
		}
		sum := 0
		for line := range strings.Lines(string(data)) {
			var kb int
			if _, err := fmt.Sscanf(line, "Private_Dirty: %d kB", &kb); err == nil {
				sum += kb
			}
		}
		t.Log(strings.ReplaceAll(string(data)[strings.Index(string(data), "Rss"):][:220], "\n", "; "))
		return sum
	}
	first := n.containerSpec(box, "sleep 1000")
	n.run(first)
	before := private()
	const count = 40
	for range count {
		n.run(n.containerSpec(box, "echo x; exec sleep 1000"))
	}
	after := private()
	threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", info.PID))
	each := (after - before) / count
	t.Logf("%d kB at 1 container, %d kB at %d: %d kB each; %d threads", before, after, count+1, each, len(threads))
	if each > 100 {
		t.Errorf("an idle container costs %d kB of the shim, the budget is 100", each)
	}
	if len(threads) > 20 {
		t.Errorf("%d threads", len(threads))
	}
}

// TestExecsEndWithTheirContainer: a running exec neither blocks the deletion
// nor survives it, whatever PID namespace it is in.
func TestExecsEndWithTheirContainer(t *testing.T) {
	n := newNode(t)
	for _, own := range []bool{true, false} {
		box := n.sandbox()
		spec := n.containerSpec(box, "sleep 1000")
		if !own {
			spec.Spec.Linux.Namespaces = append(spec.Spec.Linux.Namespaces[:1], spec.Spec.Linux.Namespaces[2:]...)
		}
		n.run(spec)
		s, err := n.Exec(n.ctx(), &shim.ExecSpec{ContainerID: spec.ID, Process: &specs.Process{
			Args: []string{"/bin/sh", "-c", "trap '' TERM; sleep 999"}, Cwd: "/", Env: []string{"PATH=/bin"}}})
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := n.Delete(n.ctx(), spec.ID); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(begin); d > 3*time.Second {
			t.Errorf("own PID namespace %v: deletion took %v", own, d)
		}
		if exit, err := s.Wait(n.ctx()); err != nil || exit.Code != 137 {
			t.Errorf("own PID namespace %v: exec ended with %+v, %v", own, exit, err)
		}
		s.Close()
	}
}

// TestEndedContainersLeaveTheirCgroup: the record stays until it is deleted, the
// cgroup with its limits does not.
func TestEndedContainersLeaveTheirCgroup(t *testing.T) {
	n := newNode(t)
	spec := n.containerSpec(n.sandbox(), "sleep 1000")
	n.run(spec)
	groups := func() []string {
		v1, _ := filepath.Glob("/sys/fs/cgroup/*" + spec.Spec.Linux.CgroupsPath)
		v2, _ := filepath.Glob("/sys/fs/cgroup" + spec.Spec.Linux.CgroupsPath)
		return append(v1, v2...)
	}
	if len(groups()) == 0 {
		t.Fatal("a container that runs has no cgroup")
	}
	if err := n.Signal(n.ctx(), spec.ID, int(unix.SIGKILL), false); err != nil {
		t.Fatal(err)
	}
	n.until(shim.EventExited, spec.ID)
	for deadline := time.Now().Add(10 * time.Second); len(groups()) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("an ended container has cgroups %v", groups())
		}
	}
	if err := n.Delete(n.ctx(), spec.ID); err != nil {
		t.Error(err)
	}
}
