package server_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/integration/killpoint"
)

// kill ends the shim as the OOM killer would and waits until it is gone.
func (n *node) kill() {
	n.t.Helper()
	info, err := n.Info(n.ctx())
	if err != nil {
		n.t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(info.PID, 0)
	if err != nil {
		n.t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		n.t.Fatal(err)
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, 10000); err != unix.EINTR {
			break
		}
	}
	if fds[0].Revents == 0 {
		n.t.Fatal("the shim does not die")
	}
}

func (n *node) restart() {
	n.t.Helper()
	binary, _ := shimBinary()
	if _, err := shim.Ensure(n.ctx(), n.dir, binary, nil); err != nil {
		start, _ := os.ReadFile(filepath.Join(n.dir, "shim/start.log"))
		n.t.Fatalf("%v\n%s", err, start)
	}
}

// adopt reaps pid when it ends, as PID 1 of a node would: after the shim's
// death its children are ours.
func adopt(pid int) {
	go func() {
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
			if got, err := unix.Wait4(pid, nil, 0, nil); got == pid || err != unix.ECHILD && err != unix.EINTR {
				return
			}
			if unix.Kill(pid, 0) == unix.ESRCH {
				return
			}
		}
	}()
}

// checkLines wants the lines of probe lines N SIZE, each once and in order.
func checkLines(t *testing.T, text string, count int) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	for i, l := range lines {
		num, _, _ := strings.Cut(l, " ")
		if got, err := strconv.Atoi(num); err != nil || got != i {
			t.Fatalf("line %d of %d is %.40q", i, len(lines), l)
		}
	}
	if len(lines) != count {
		t.Fatalf("%d lines of %d", len(lines), count)
	}
}

// TestKillWhileWriting kills the shim again and again while a container writes;
// the container ends while no shim is there.
func TestKillWhileWriting(t *testing.T) {
	n := newNode(t)
	const count = 400000
	spec := n.containerSpec(n.sandbox(), fmt.Sprintf("probe lines %d 100; probe lines 3 100 >&2; exit 9", count))
	n.killDuring(spec, 12, 9)
	out, errText := logged(t, spec.LogPath)
	checkLines(t, out, count)
	checkLines(t, errText, 3)
}

// TestKillWhileWritingToTerminal is the same with a terminal.
func TestKillWhileWritingToTerminal(t *testing.T) {
	n := newNode(t)
	const count = 200000
	spec := n.containerSpec(n.sandbox(), fmt.Sprintf("probe lines %d 100; exit 9", count))
	spec.Spec.Process.Terminal = true
	n.killDuring(spec, 40, 9)
	out, _ := logged(t, spec.LogPath)
	checkLines(t, strings.ReplaceAll(out, "\r", ""), count)
}

// killDuring runs spec, kills the shim that often as its log grows, and wants
// its exit code.
func (n *node) killDuring(spec *shim.ContainerSpec, kills, code int) {
	t := n.t
	t.Helper()
	p := n.run(spec)
	size := func() int64 {
		st, err := os.Stat(spec.LogPath)
		if err != nil {
			t.Fatal(err)
		}
		return st.Size()
	}
	for i := range kills {
		before := size()
		for deadline := time.Now().Add(10 * time.Second); size() == before && time.Now().Before(deadline); {
			if q, err := n.State(n.ctx(), spec.ID); err != nil || q.State == shim.Exited {
				t.Logf("ended before kill %d: %v %v", i, q, err)
				break
			}
		}
		n.kill()
		if i == 0 {
			adopt(p.PID)
		}
		n.restart()
	}
	exit := n.until(shim.EventExited, spec.ID).Exit
	if !exit.Known || exit.Code != code {
		t.Errorf("exit: %+v", exit)
	}
}

// TestEndWhileNobodyIsThere: output, exit code and stdin of containers that
// live on and end without a shim.
func TestEndWhileNobodyIsThere(t *testing.T) {
	n := newNode(t)
	for _, kind := range []string{"pod", "host namespaces", "shared PID namespace", "terminal"} {
		t.Run(kind, func(t *testing.T) {
			var box *shim.Process
			switch kind {
			case "host namespaces":
				box = n.sandbox(func(s *shim.SandboxSpec) { s.Namespaces = nil; s.Hostname = "" })
			case "shared PID namespace":
				box = n.sandbox(func(s *shim.SandboxSpec) { s.Namespaces = append(s.Namespaces, specs.PIDNamespace) })
			default:
				box = n.sandbox()
			}
			lines := 500
			if kind == "terminal" {
				lines = 20 // a terminal holds a few KiB and then blocks the writer
			}
			spec := n.containerSpec(box, "")
			spec.Spec.Process.Args[2] = "echo first; read x; echo second; while [ ! -e /tmp/" + spec.ID + " ]; do sleep 0.01; done; " +
				fmt.Sprintf("probe lines %d 100; ", lines) + "echo unfinished $x >&2; exit 4"
			spec.Stdin = true
			switch kind {
			case "host namespaces":
				spec.Spec.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.MountNamespace}}
			case "shared PID namespace":
				spec.Spec.Linux.Namespaces[1].Path = fmt.Sprintf("/proc/%d/ns/pid", box.PID)
			case "terminal":
				spec.Spec.Process.Terminal = true
			}
			p := n.run(spec)
			n.waitLog(spec.LogPath, "first")
			n.kill()
			adopt(p.PID)
			n.restart()
			if q, err := n.State(n.ctx(), spec.ID); err != nil || q.State != shim.Running || q.PID != p.PID {
				t.Fatalf("after the restart: %+v %v", q, err)
			}
			n.feed(spec.ID, "now\n")
			n.waitLog(spec.LogPath, "second")
			n.kill()
			// The container goes on and ends with nobody there.
			if err := os.WriteFile(filepath.Join(n.rootfs, "tmp", spec.ID), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			for deadline := time.Now().Add(10 * time.Second); unix.Kill(p.PID, 0) == nil && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			}
			if unix.Kill(p.PID, 0) == nil {
				state, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
				t.Fatalf("the container does not end without a shim:\n%s", state)
			}
			n.restart()
			exit := n.until(shim.EventExited, spec.ID).Exit
			if !exit.Known || exit.Code != 4 {
				t.Errorf("exit: %+v", exit)
			}
			out, errText := logged(t, spec.LogPath)
			if kind == "terminal" {
				out = strings.ReplaceAll(out, "\r", "")
				out, errText = strings.Replace(out, "now\n", "", 1), "unfinished now\n"
				out = strings.TrimSuffix(out, errText)
			}
			checkLines(t, strings.TrimPrefix(out, "first\nsecond\n"), lines)
			if errText != "unfinished now\n" {
				t.Errorf("stderr: %q", errText)
			}
		})
	}
}

// anotherBuild is the same program with another build id.
func anotherBuild(t *testing.T, n *node, binary string) string {
	t.Helper()
	data, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	id, err := shim.BuildID(binary)
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(id, id[:4], "abcd", 1)
	if bytes.Count(data, []byte(id)) == 0 {
		t.Fatal("build id not found in the program")
	}
	newer := filepath.Join(n.dir, "podd-shim-new")
	if err := os.WriteFile(newer, bytes.ReplaceAll(data, []byte(id), []byte(changed)), 0o755); err != nil {
		t.Fatal(err)
	}
	return newer
}

func TestUpgradeInPlace(t *testing.T) {
	n := newNode(t)
	binary, _ := shimBinary()
	newer := anotherBuild(t, n, binary)
	before, err := n.Info(n.ctx())
	if err != nil {
		t.Fatal(err)
	}
	box := n.sandbox()
	const count = 300000
	spec := n.containerSpec(box, fmt.Sprintf("probe lines %d 100; exit 6", count))
	sleeper := n.containerSpec(box, "sleep 1000")
	n.run(sleeper)
	session, err := n.Exec(n.ctx(), &shim.ExecSpec{ContainerID: sleeper.ID, Process: &specs.Process{Args: []string{"/bin/cat"}, Cwd: "/", Env: []string{"PATH=/bin"}, Terminal: true}})
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	n.run(spec)
	for i := range 4 {
		target := newer
		if i%2 == 1 {
			target = binary
		}
		done := make(chan error, 1)
		go func() { // a call that meets the upgrade waits for it
			_, err := n.List(n.ctx())
			done <- err
		}()
		if err := n.Upgrade(n.ctx(), target); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	after, err := n.Info(n.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if after.PID != before.PID || after.Containers != 2 || after.Sandboxes != 1 {
		t.Fatalf("before %+v, after %+v", before, after)
	}
	exit := n.until(shim.EventExited, spec.ID).Exit
	if !exit.Known || exit.Code != 6 {
		t.Errorf("exit: %+v", exit)
	}
	out, _ := logged(t, spec.LogPath)
	checkLines(t, out, count)
	// The exec of before lives on, with its terminal, and its exit arrives.
	if _, err := io.WriteString(session.TTY(), "over\n\x04"); err != nil {
		t.Fatal(err)
	}
	if e, err := session.Wait(n.ctx()); err != nil || e.Code != 0 {
		t.Fatalf("exec after the upgrade: %+v %v", e, err)
	}
	// What is no program leaves the shim as it is.
	junk := filepath.Join(n.dir, "junk")
	os.WriteFile(junk, []byte("junk"), 0o755)
	if err := n.Upgrade(n.ctx(), junk); err == nil {
		t.Fatal("junk was executed")
	}
	if out, _ := n.execOut(sleeper.ID, "/bin/echo", "alive"); out != "alive\n" {
		t.Fatalf("exec: %q", out)
	}
}

// TestExecsKeepTheirExitCodes: one that ends while the shim is being replaced is
// told as it ended. (Before Linux 6.15 the exit code is with whoever waits first.)
func TestExecsKeepTheirExitCodes(t *testing.T) {
	n := newNode(t)
	binary, _ := shimBinary()
	newer := anotherBuild(t, n, binary)
	spec := n.containerSpec(n.sandbox(), "sleep 1000")
	n.run(spec)
	const execs = 24
	for round := range 4 {
		exits := make(chan string, execs)
		var begun sync.WaitGroup
		for i := range execs {
			begun.Add(1)
			go func() {
				e, err := n.Exec(n.ctx(), &shim.ExecSpec{ContainerID: spec.ID, Process: &specs.Process{
					Args: []string{"/bin/sh", "-c", fmt.Sprintf("sleep 0.%02d; exit 7", 5*i%60)}, Cwd: "/", Env: []string{"PATH=/bin"}}})
				begun.Done()
				if err != nil {
					exits <- err.Error()
					return
				}
				defer e.Close()
				exit, err := e.Wait(n.ctx())
				exits <- fmt.Sprint(exit != nil && exit.Known && exit.Code == 7, err)
			}()
		}
		begun.Wait()
		target := newer
		if round%2 == 1 {
			target = binary
		}
		if err := n.Upgrade(n.ctx(), target); err != nil {
			t.Fatal(err)
		}
		for range execs {
			if got := <-exits; got != "true <nil>" {
				t.Errorf("an exec that ended with 7: %s", got)
			}
		}
	}
}

// TestHalfMadeState: what a shim that died in the middle leaves is swept.
func TestHalfMadeState(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	spec := n.containerSpec(box, "sleep 1000")
	p := n.run(spec)
	created := n.containerSpec(box, "echo started; sleep 1000")
	q, err := n.Create(n.ctx(), created)
	if err != nil {
		t.Fatal(err)
	}
	broken := n.containerSpec(box, "sleep 1000")
	b := n.run(broken)
	n.kill()
	for _, pid := range []int{p.PID, q.PID, b.PID} {
		adopt(pid)
	}
	dir := filepath.Join(n.dir, "shim")
	os.Mkdir(filepath.Join(dir, "containers/nothing"), 0o700)
	os.Mkdir(filepath.Join(dir, "lc/nothing"), 0o700)
	os.WriteFile(filepath.Join(dir, "containers", broken.ID, "record.json"), []byte(`{"version":1,`), 0o600)
	f, _ := os.OpenFile(filepath.Join(dir, "events"), os.O_APPEND|os.O_WRONLY, 0)
	f.WriteString(`{"seq":`)
	f.Close()
	n.restart()
	list, err := n.List(n.ctx())
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]shim.State{}
	for _, p := range list {
		got[p.ID] = p.State
	}
	if len(got) != 3 || got[spec.ID] != shim.Running || got[created.ID] != shim.Created {
		t.Fatalf("after the restart: %v", got)
	}
	quarantined, _ := filepath.Glob(filepath.Join(dir, "quarantine", broken.ID+"*"))
	if len(quarantined) != 1 {
		t.Errorf("quarantine: %v", quarantined)
	}
	for deadline := time.Now().Add(5 * time.Second); unix.Kill(b.PID, 0) == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the container of the broken record lives on")
		}
	}
	if left, _ := filepath.Glob(dir + "/*/nothing"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if _, err := n.Start(n.ctx(), created.ID); err != nil {
		t.Fatal(err)
	}
	n.waitLog(created.LogPath, "started")
}

// TestKillDuringStarts kills the shim at any point of creations and starts;
// nothing half-made remains, and what was made works.
func TestKillDuringStarts(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	binary, _ := shimBinary()
	for round := range 8 {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		done := make(chan string, 4)
		for range 4 {
			spec := n.containerSpec(box, "sleep 1000")
			go func() {
				if _, err := n.Create(ctx, spec); err == nil {
					_, _ = n.Start(ctx, spec.ID)
				}
				done <- spec.ID
			}()
		}
		time.Sleep(time.Duration(round*3) * time.Millisecond)
		n.kill()
		if _, err := shim.Ensure(ctx, n.dir, binary, nil); err != nil {
			t.Fatal(err)
		}
		for range 4 {
			id := <-done
			p, err := n.State(ctx, id)
			if err != nil {
				t.Fatalf("round %d: %v", round, err) // calls are repeated until they succeed
			}
			if p.State != shim.Running {
				if _, err := n.Start(ctx, id); err != nil {
					text, _ := os.ReadFile(filepath.Join(n.dir, id+".log")) // init's last words
					t.Errorf("round %d: %+v, exit %+v: %v\n%s", round, p, p.Exit, err, text)
				}
			}
			adopt(p.PID)
			if out, exit := n.execOut(id, "/bin/echo", "ok"); out != "ok\n" {
				t.Errorf("round %d: exec: %q %+v", round, out, exit)
			}
			if err := n.Delete(ctx, id); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		}
		cancel()
	}
	if out, err := exec.Command("sh", "-c", "ls /sys/fs/cgroup/memory"+n.cgroup+" | grep ctr").Output(); err == nil {
		t.Errorf("cgroups are left: %s", out)
	}
}

// TestListKnowsWhatADeadCallerLeft: what the calls of a caller that was killed
// still make is in the next list, or never comes to be.
func TestListKnowsWhatADeadCallerLeft(t *testing.T) {
	n := newNode(t)
	for round := range 12 {
		ctx, cancel := context.WithCancel(n.ctx())
		done := make(chan struct{}, 8)
		box := n.sandbox()
		var ids []string
		for range 4 {
			b, c := n.sandboxSpec(), n.containerSpec(box, "sleep 1000")
			ids = append(ids, b.ID, c.ID)
			go func() {
				_, _ = n.CreateSandbox(ctx, b)
				done <- struct{}{}
			}()
			go func() {
				if _, err := n.Create(ctx, c); err == nil {
					_, _ = n.Start(ctx, c.ID)
				}
				done <- struct{}{}
			}()
		}
		time.Sleep(time.Duration(round*2) * time.Millisecond) // the moment of the caller's death
		cancel()
		for range 8 {
			<-done
		}
		states := func() map[string]shim.State {
			list, err := n.List(n.ctx())
			if err != nil {
				t.Fatal(err)
			}
			m := map[string]shim.State{}
			for _, p := range list {
				m[p.ID] = p.State
			}
			return m
		}
		first := states()
		n.sandbox() // as long as what may still be under way
		second := states()
		for _, id := range ids {
			if first[id] != second[id] {
				t.Errorf("round %d: %s was %q in the first list and is %q now", round, id, first[id], second[id])
			}
		}
		for id := range second {
			if first[id] != "" && id != box.ID {
				_ = n.Delete(n.ctx(), id)
				_ = n.DeleteSandbox(n.ctx(), id)
			}
		}
	}
}

// TestManyStartersOneShim: concurrent Ensure calls agree on one process, and a
// second program on the same directory refuses.
func TestManyStartersOneShim(t *testing.T) {
	n := newNode(t)
	binary, _ := shimBinary()
	n.kill()
	pids := make(chan int, 8)
	for range 8 {
		go func() {
			c, err := shim.Ensure(n.ctx(), n.dir, binary, nil)
			if err != nil {
				t.Error(err)
				pids <- 0
				return
			}
			info, err := c.Info(n.ctx())
			if err != nil {
				t.Error(err)
				pids <- 0
				return
			}
			pids <- info.PID
		}()
	}
	first := <-pids
	for range 7 {
		if pid := <-pids; pid != first {
			t.Errorf("two shims: %d and %d", first, pid)
		}
	}
	text, err := exec.Command(binary, "--run-dir", n.dir, "--log-stderr").CombinedOutput()
	if err == nil || !strings.Contains(string(text), "another podd-shim runs on") {
		t.Errorf("second shim: %v %s", err, text)
	}
}

// detached starts a shim that nothing here waits for, so that it can be traced.
func (n *node) detached() {
	n.t.Helper()
	binary, _ := shimBinary()
	_, err := shim.EnsureBy(n.ctx(), n.dir, nil, func(context.Context) error {
		return exec.Command("sh", "-c", `"$0" --run-dir "$1" >/dev/null 2>&1 </dev/null &`, binary, n.dir).Run()
	})
	if err != nil {
		n.t.Fatal(err)
	}
}

// TestStartIsToldAsItWas kills the shim at each call with an effect of a start
// whose program ends at once. Who repeats the call is told that it was started,
// and the exit code of the program is known.
func TestStartIsToldAsItWas(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	n.kill()
	n.detached()
	for point := 1; ; point++ {
		spec := n.containerSpec(box, "echo ran >>/tmp/starts; exit 7")
		p, err := n.Create(n.ctx(), spec)
		if err != nil {
			t.Fatal(err)
		}
		info, err := n.Info(n.ctx())
		if err != nil {
			t.Fatal(err)
		}
		trace, err := killpoint.Start(info.PID, killpoint.Aim{Point: point, After: true})
		if err != nil {
			t.Fatal(err)
		}
		told := make(chan error, 1)
		go func() {
			_, err := n.Start(n.ctx(), spec.ID)
			told <- err
		}()
		for trace.Struck() == nil && !trace.Quiet(200*time.Millisecond) {
			time.Sleep(time.Millisecond)
		}
		if trace.Stop(); trace.Struck() == nil {
			if err := <-told; err != nil {
				t.Errorf("nothing was killed: %v", err)
			}
			if point < 8 {
				t.Errorf("only %d points", point-1)
			}
			return
		}
		adopt(p.PID)
		// It ends with nobody there.
		for deadline := time.Now().Add(time.Second); unix.Kill(p.PID, 0) == nil && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		n.detached()
		if err := <-told; err != nil {
			t.Errorf("%v: start: %v", trace.Struck(), err)
		}
		if exit := n.until(shim.EventExited, spec.ID).Exit; exit.Known && exit.Code != 7 {
			t.Errorf("%v: exit: %+v", trace.Struck(), exit)
		}
		starts, err := os.ReadFile(filepath.Join(n.rootfs, "tmp/starts"))
		if err != nil || string(starts) != "ran\n" {
			t.Errorf("%v: the program ran so: %q %v", trace.Struck(), starts, err)
		}
		os.Remove(filepath.Join(n.rootfs, "tmp/starts"))
		if err := n.Delete(n.ctx(), spec.ID); err != nil {
			t.Errorf("%v: %v", trace.Struck(), err)
		}
	}
}

// TestStartOfAProgramThatEndsAtOnceSucceeds traces the shim, which makes it slow,
// so that programs end while their start is still under way.
func TestStartOfAProgramThatEndsAtOnceSucceeds(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	n.kill()
	n.detached()
	info, err := n.Info(n.ctx())
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		spec := n.containerSpec(box, "exit 7")
		if _, err := n.Create(n.ctx(), spec); err != nil {
			t.Fatal(err)
		}
		trace, err := killpoint.Start(info.PID, killpoint.Aim{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Start(n.ctx(), spec.ID); err != nil {
			t.Error(err)
		}
		trace.Stop()
		if exit := n.until(shim.EventExited, spec.ID).Exit; !exit.Known || exit.Code != 7 {
			t.Errorf("exit: %+v", exit)
		}
		if err := n.Delete(n.ctx(), spec.ID); err != nil {
			t.Error(err)
		}
	}
}
