package server_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

// tinyRunDir puts the shim's directory on a file system of one MiB.
func tinyRunDir(t *testing.T) func(dir string) {
	return func(dir string) {
		t.Helper()
		sub := filepath.Join(dir, "shim")
		if err := os.Mkdir(sub, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", sub, "tmpfs", 0, "mode=0700,size=1m"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(sub, unix.MNT_DETACH) })
	}
}

// fill takes all room of the directory's file system; empty gives it back.
func fill(t *testing.T, dir string) (empty func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for buf := make([]byte, 64<<10); len(buf) > 0; {
		if _, err := f.Write(buf); errors.Is(err, unix.ENOSPC) {
			buf = buf[:len(buf)/2]
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	}
}

// TestFullRunDirectory: with no room left a container's output, also an
// unfinished line, and its exit are kept, a shim that died is followed by
// another, and what needs room is refused.
func TestFullRunDirectory(t *testing.T) {
	n := newNode(t, tinyRunDir(t))
	dir := filepath.Join(n.dir, "shim")
	box := n.sandbox()
	const script = "read x; printf abc; read x; echo def; printf err >&2; read x; exit 7"
	spec := n.containerSpec(box, script)
	spec.Stdin = true
	p := n.run(spec)
	again := func() {
		t.Helper()
		n.kill()
		fill(t, dir) // what its end gave back, too
		n.restart()
		if q, err := n.State(n.ctx(), spec.ID); err != nil || q.PID != p.PID {
			t.Fatalf("after a restart without room: %+v %v", q, err)
		}
	}
	before, err := n.Info(n.ctx())
	if err != nil {
		t.Fatal(err)
	}
	empty := fill(t, dir)
	n.feed(spec.ID, "x\n")
	n.waitLog(spec.LogPath, " P abc")
	if after, err := n.Info(n.ctx()); err != nil || after.PID != before.PID {
		t.Fatalf("the shim died of an unfinished line: %+v %v", after, err)
	}
	again()
	adopt(p.PID)
	n.feed(spec.ID, "x\n")
	n.waitLog(spec.LogPath, " F def")
	n.waitLog(spec.LogPath, " P err")
	more := n.containerSpec(box, "true")
	if _, err := n.Create(n.ctx(), more); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("created without room: %v", err)
	}
	again()
	n.feed(spec.ID, "x\n")
	first := n.until(shim.EventExited, spec.ID)
	if e := first.Exit; !e.Known || e.Code != 7 {
		t.Errorf("exit: %+v", e)
	}
	again()
	q, err := n.State(n.ctx(), spec.ID)
	if err != nil || q.State != shim.Exited || q.Exit == nil || q.Exit.Code != 7 || !q.Exit.Known {
		t.Errorf("the exit is not remembered: %+v %v", q, err)
	}
	empty()
	if _, err := n.Create(n.ctx(), more); err != nil {
		t.Errorf("created with room again: %v", err)
	}
	e := n.until(shim.EventCreated, more.ID)
	if e.Seq <= first.Seq {
		t.Errorf("event numbers repeat: %+v after %+v", e, first)
	}
}

// TestFullRunDirectoryLosesNoLine: as the run directory fills up and is emptied,
// whole and unfinished lines arrive once and in order, and so when the shim dies
// in between.
func TestFullRunDirectoryLosesNoLine(t *testing.T) {
	n := newNode(t, tinyRunDir(t))
	dir := filepath.Join(n.dir, "shim")
	const count = 3000
	spec := n.containerSpec(n.sandbox(), fmt.Sprintf(
		"read x; i=0; while [ $i -lt %d ]; do printf %%s $i; printf ' %%s' more; echo; i=$((i+1)); done; exit 9", count))
	spec.Stdin = true
	p := n.run(spec)
	n.feed(spec.ID, "x\n")
	for i := range 6 {
		empty := fill(t, dir)
		n.kill()
		if i == 0 {
			adopt(p.PID)
		}
		n.restart()
		empty()
	}
	exit := n.until(shim.EventExited, spec.ID).Exit
	if !exit.Known || exit.Code != 9 {
		t.Errorf("exit: %+v", exit)
	}
	out, _ := logged(t, spec.LogPath)
	checkLines(t, out, count)
}

// TestCreatesWithoutRoomLeaveNothing: whatever the first thing is that has no
// room, of a creation that fails nothing stays.
func TestCreatesWithoutRoomLeaveNothing(t *testing.T) {
	n := newNode(t, tinyRunDir(t))
	dir := filepath.Join(n.dir, "shim")
	box := n.sandbox()
	whole := func() {
		spec := n.containerSpec(box, "true")
		spec.Stdin = true
		if _, err := n.Create(n.ctx(), spec); err != nil {
			t.Fatal(err)
		}
		if err := n.Delete(n.ctx(), spec.ID); err != nil {
			t.Fatal(err)
		}
	}
	whole()
	before, failed := n.holds(), 0
	before["pipe"] += 2 // a second idle pump may keep its scratch pipe
	for pages := range int64(16) {
		empty := fill(t, dir)
		st, err := os.Stat(filepath.Join(dir, "filler"))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(filepath.Join(dir, "filler"), st.Size()-pages*4096); err != nil {
			t.Fatal(err)
		}
		spec := n.containerSpec(box, "true")
		spec.Stdin = true
		_, err = n.Create(n.ctx(), spec)
		empty()
		if err != nil {
			failed++
		} else if err := n.Delete(n.ctx(), spec.ID); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d failed", failed)
	if failed < 4 {
		t.Errorf("only %d creations failed", failed)
	}
	n.holdsNoMoreThan(before)
	whole()
}
