package manifests

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What lies in the directory and is no manifest is told and does not hold up
// those that are; a file that is one again is taken.
func TestWhatIsNoFileHoldsNobodyUp(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := unix.Mkfifo(path("fifo.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"zero.yaml": "/dev/zero", "loop.yaml": "loop.yaml", "a.yaml": "b.yaml", "b.yaml": "a.yaml", "proc.yaml": "/proc/self/mem"} {
		if err := os.Symlink(target, path(name)); err != nil {
			t.Fatal(err)
		}
	}
	huge, err := os.Create(path("huge.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	defer huge.Close()
	if err := huge.Truncate(1 << 30); err != nil { // sparse
		t.Fatal(err)
	}
	write(t, path("web.yaml"), podYAML("web", "one"))
	began := time.Now()
	s, tab, _ := start(t, dir)
	tab.wait(t, "the good one", tab.has("set default/web-node1 one"))
	tab.wait(t, "the others are told", func() bool { return len(s.Problems()) == 7 })
	t.Logf("after %v", time.Since(began))
	for _, p := range s.Problems() {
		if p.Remedy == "" || p.Kept {
			t.Errorf("problem %v", p)
		}
	}
	if err := os.Remove(path("fifo.yaml")); err != nil {
		t.Fatal(err)
	}
	write(t, path("fifo.yaml"), podYAML("fifo", "one"))
	tab.wait(t, "a file in its place", tab.has("set default/fifo-node1 one"))
}

// silence makes whoever opens a file wait, as a dead network file system does:
// somebody has a lease on it (fcntl(2)). answer gives it up.
func silence(t *testing.T, path string) (answer func()) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		f.Close()
		t.Skip("no leases on this file system: ", err)
	}
	return sync.OnceFunc(func() { f.Close() })
}

// A file on a file system that hangs keeps what it has started, is told, and
// holds up no other; when it answers it is followed again.
func TestHungFileHoldsNobodyUp(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	web := filepath.Join(dir, "web.yaml")
	write(t, web, podYAML("web", "one"))
	_, tab, _, stop := startState(t, dir, state)
	tab.wait(t, "read", tab.has("set default/web-node1 one"))
	stop()

	tab = newTable()
	s := New(Config{Dir: dir, NodeName: "node1", Log: quiet(), Rescan: 20 * time.Millisecond, StateDir: state}, tab)
	s.hung.within = 50 * time.Millisecond
	answer := silence(t, web)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	tab.wait(t, "its last good version", tab.has("set default/web-node1 one"))
	tab.wait(t, "told", func() bool {
		p := s.Problems()
		return len(p) == 1 && p[0].Kept && strings.Contains(p[0].Message, "does not answer")
	})
	write(t, filepath.Join(dir, "other.yaml"), podYAML("other", "b"))
	tab.wait(t, "another file", tab.has("set default/other-node1 b"))
	answer()
	tab.wait(t, "it answers", func() bool { return len(s.Problems()) == 0 })
	write(t, web, podYAML("web", "two"))
	tab.wait(t, "it is followed", tab.has("set default/web-node1 two"))
	if tab.count("remove") != 0 {
		t.Errorf("log %q", tab.log)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// Run ends when it is told to, also while a file system hangs.
func TestRunEndsWhileAFileSystemHangs(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "web.yaml"), podYAML("web", "one"))
	s := New(Config{Dir: dir, NodeName: "node1", Log: quiet()}, newTable())
	answer := silence(t, filepath.Join(dir, "web.yaml"))
	defer answer()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	began := time.Now()
	if err := s.Run(ctx); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > endTime+30*time.Second {
		t.Errorf("took %v", took)
	}
}

// Questions that nobody answers are bounded: each holds a thread.
func TestOpenQuestionsAreBounded(t *testing.T) {
	h := hung{within: time.Millisecond, asked: map[string]struct{}{}}
	answer := make(chan struct{})
	defer close(answer)
	calls := make(chan int, 10*maxHung)
	for range 3 {
		for i := range 2 * maxHung {
			if h.inTime(fmt.Sprint(i), func() { calls <- i; <-answer }) {
				t.Fatal("an answer that was not given")
			}
		}
	}
	if len(calls) != maxHung {
		t.Errorf("%d questions are open, want %d", len(calls), maxHung)
	}
}

// A directory of more files than podd is made for is read in part, and told.
func TestTooManyFilesAreTold(t *testing.T) {
	if os.Getenv("PODD_TEST_ALL") == "" {
		t.Skip("makes 20,000 files")
	}
	dir := t.TempDir()
	for i := range maxFiles + 100 {
		write(t, filepath.Join(dir, fmt.Sprintf("%06d.yaml", i)), "kind: x\n")
	}
	s, _, _ := start(t, dir)
	began := time.Now()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		p := s.Problems()
		if len(p) > 0 && p[0].File == dir && strings.Contains(p[0].Message, "more than 20000") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("not told: %d problems", len(p))
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Logf("%d files: %v", maxFiles, time.Since(began))
}
