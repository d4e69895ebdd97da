package tree

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// deep makes a chain of directories of one name below dir, with a file of a
// megabyte at its end, and returns a descriptor of the last one.
func deep(tb testing.TB, dir, name string, levels int) int {
	tb.Helper()
	at, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	for range levels {
		if err == nil {
			err = unix.Mkdirat(at, name, 0o755)
		}
		if err != nil {
			tb.Fatal(err)
		}
		var next int
		next, err = unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		unix.Close(at)
		at = next
	}
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		unix.Close(at)
		if err := Remove(context.Background(), openTest(tb, filepath.Dir(dir)), filepath.Base(dir)); err != nil {
			tb.Error(err)
		}
	})
	fd, err := unix.Openat(at, "payload", unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
	if err != nil {
		tb.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, make([]byte, 1<<20)); err != nil {
		tb.Fatal(err)
	}
	return at
}

func openTest(tb testing.TB, dir string) int {
	tb.Helper()
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(fd) })
	return fd
}

// allocated is what f allocates, all of it, freed or not.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

func openDescriptors(tb testing.TB) int {
	tb.Helper()
	l, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	return len(l)
}

// long is a name of the greatest length.
var long = strings.Repeat("n", 255)

// levels of the deep trees: enough to see what a walk costs by the level. With
// paths of a megabyte 1,500 took 0.3 GB.
const levels = 1500

func TestADeepTreeTakesBoundedMemory(t *testing.T) {
	dir := t.TempDir() + "/tree"
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	deep(t, dir, long, levels)
	root := openTest(t, dir)
	before := openDescriptors(t)
	held := 0
	got := allocated(func() {
		n := 0
		u, err := Measure(context.Background(), root, stepper(func() {
			if n++; n == levels {
				held = openDescriptors(t) - before
			}
		}))
		if err != nil || u.Bound != nil || u.Inodes != levels+2 || u.Bytes < 1<<20 {
			t.Errorf("measured %+v, %v: want %d inodes", u, err, levels+2)
		}
	})
	if got > 8<<20 {
		t.Errorf("measuring took %d KiB of memory", got>>10)
	}
	if held > keptOpen+4 {
		t.Errorf("measuring held %d descriptors", held)
	}
	parent := openTest(t, filepath.Dir(dir))
	before++
	got = allocated(func() {
		if err := Remove(context.Background(), parent, "tree"); err != nil {
			t.Error(err)
		}
	})
	if got > 32<<20 { // a piece of a directory for each
		t.Errorf("removing took %d KiB of memory", got>>10)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
	if after := openDescriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

type stepper func()

func (s stepper) Step(ctx context.Context) error { s(); return ctx.Err() }

// TestWhatCannotBeMeasuredIsNotSmall: it takes all that its filesystem has in
// use.
func TestWhatCannotBeMeasuredIsNotSmall(t *testing.T) {
	dir := t.TempDir() + "/tree"
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	deep(t, dir, "d", 300)
	defer func(was int) { maxDepth = was }(maxDepth)
	maxDepth = 300
	root := openTest(t, dir)
	u, err := Measure(context.Background(), root, nil)
	var st unix.Statfs_t
	if err := unix.Fstatfs(root, &st); err != nil {
		t.Fatal(err)
	}
	if err != nil || !errors.Is(u.Bound, ErrDeep) || u.Bytes < (st.Blocks-st.Bfree)*uint64(st.Frsize)/2 {
		t.Errorf("measured %+v, %v: want what the filesystem has in use", u, err)
	}
}

func TestAMovedLevelIsNoticed(t *testing.T) {
	dir := t.TempDir() + "/tree"
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	last := deep(t, dir, long, keptOpen+10)
	root := openTest(t, dir)
	err := Walk(context.Background(), root, nil, func(e *Entry) error {
		if e.Name != "payload" {
			return nil
		}
		// The parent of the directory that the walk is in gets another parent.
		return unix.Renameat(last, "../../"+long, root, "elsewhere")
	})
	if !errors.Is(err, ErrMoved) {
		t.Errorf("walk: %v", err)
	}
	if err := Walk(context.Background(), root, nil, func(*Entry) error { return nil }); err != nil {
		t.Errorf("walk of a tree at rest: %v", err)
	}
}

func TestWalk(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"a/b/c", "skipped/x", "wide"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 300 { // several reads of the directory
		if err := os.Mkdir(filepath.Join(dir, "wide", "some-longer-name-"+strconv.Itoa(i)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	err := Walk(context.Background(), openTest(t, dir), nil, func(e *Entry) error {
		seen[e.Name]++
		if e.Name == "skipped" {
			return fs.SkipDir
		}
		return nil
	})
	if err != nil || len(seen) != 6+300 || seen["x"] != 0 || seen["link"] != 1 {
		t.Errorf("%v: %d names", err, len(seen))
	}
	for name, n := range seen {
		if n != 1 {
			t.Errorf("%s: seen %d times", name, n)
		}
	}
	end := errors.New("end")
	if err := Walk(context.Background(), openTest(t, dir), nil, func(*Entry) error { return end }); err != end {
		t.Errorf("walk: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := Walk(ctx, openTest(t, dir), nil, func(*Entry) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestRemoveKeepsWhatIsMounted, removes the rest, and says where.
func TestRemoveKeepsWhatIsMounted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	dir := t.TempDir()
	for _, d := range []string{"tree/a/mnt", "tree/b"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("tmpfs", dir+"/tree/a/mnt", "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir+"/tree/a/mnt", unix.MNT_DETACH) })
	if err := os.WriteFile(dir+"/tree/a/mnt/kept", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	err := Remove(context.Background(), openTest(t, dir), "tree")
	if !errors.Is(err, ErrMount) || !strings.Contains(err.Error(), "tree/a/mnt") {
		t.Errorf("remove: %v", err)
	}
	if _, err := os.Stat(dir + "/tree/a/mnt/kept"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir + "/tree/b"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("b is left: %v", err)
	}
}

// TestAWideTreeMakesOthersWaitForOneBatch: a walk that has begun after one of a
// large tree is done long before it.
func TestAWideTreeMakesOthersWaitForOneBatch(t *testing.T) {
	turns := NewTurns(0.05, 8)
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	begun := make(chan struct{})
	for i := range 4 { // four trees that never end
		group.Go(func() {
			turn, err := turns.Begin(ctx)
			if err != nil {
				return
			}
			defer turn.End()
			for n := 0; err == nil; n++ {
				if i == 0 && n == 3*batch {
					close(begun)
				}
				err = turn.Step(ctx)
			}
		})
	}
	<-begun
	// A deadline, since without turns this would not end.
	soon, stop := context.WithTimeout(ctx, time.Minute)
	defer stop()
	for range 20 {
		turn, err := turns.Begin(soon)
		if err != nil {
			t.Fatal(err)
		}
		for range batch / 2 {
			if err := turn.Step(soon); err != nil {
				t.Fatal(err)
			}
		}
		turn.End()
	}
}
