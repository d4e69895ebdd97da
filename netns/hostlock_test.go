package netns

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// TestNobodyInTheHostsNamespaceHoldsUpThePodNetwork: everybody there may lock
// the namespace's own file, for ever.
func TestNobodyInTheHostsNamespaceHoldsUpThePodNetwork(t *testing.T) {
	needRoot(t)
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := w.net.Ready(ctx); err != nil {
		t.Error(err)
	}
}

// TestInstancesOfOneHostWaitForEachOther, with an end, and keep what others have
// out of their way.
func TestInstancesOfOneHostWaitForEachOther(t *testing.T) {
	l := hostLock{filepath.Join(t.TempDir(), "lock")}
	unlock, err := l.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(l.dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", st, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*lockPoll)
	defer cancel()
	if _, err := l.lock(ctx); !errdefs.IsUnavailable(err) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while it is held: %v", err)
	}
	unlock()
	if _, err := os.Stat(l.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
	// The file comes and goes with the lock: at most one ever has it.
	var inside atomic.Int32
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 20 {
				unlock, err := l.lock(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				if inside.Add(1) != 1 {
					t.Error("two have the lock")
				}
				inside.Add(-1)
				unlock()
			}
		})
	}
	group.Wait()
	if err := os.Mkdir(l.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(l.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := l.lock(t.Context()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("in a directory of everybody's: %v", err)
	}
}

// TestASetUpThatHangsHoldsNobodyLongerThanHeWaits.
func TestASetUpThatHangsHoldsNobodyLongerThanHeWaits(t *testing.T) {
	w := newWorld(t)
	if err := w.net.Ready(t.Context()); err != nil { // what New began is done
		t.Fatal(err)
	}
	unlock, err := hostLock{w.cfg.LockDir}.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	w.net.builtin.reset()
	first := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { first <- w.net.Ready(ctx) }() // waits for the lock
	soon, stop := context.WithTimeout(t.Context(), 5*lockPoll)
	defer stop()
	if err := w.net.Ready(soon); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the second: %v", err)
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the first: %v", err)
	}
}
