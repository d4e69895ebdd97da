package cgroups

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Joining a cgroup by cgroup.procs takes the kernel's cgroup_threadgroup_rwsem
// for writing. It is a per-CPU lock: the first writer after a pause waits for
// an RCU grace period, whatever the hierarchy; those that follow within about
// 15 ms do not (include/linux/rcu_sync.h). Measured on 2 cores, Linux 6.18,
// CONFIG_HZ=250, median (worst):
//
//	join after 150 ms of quiet                        7–11 ms (22)
//	… of the other eight v1 hierarchies, each         0.03 ms
//	join within 15 ms of any other join               0.05–0.2 ms (0.4)
//	join 20 ms after another                          6–8 ms (16)
//	join with favordynmods on any hierarchy           0.12 ms (0.32)
//	fork + exec + exit of /bin/true, without / with   0.60 / 0.58 ms
//	mkdir / rmdir of a group, per hierarchy           0.02–0.07 / 0.01–0.03 ms
//
// On Linux 6.1 with cgroup v2 (emulated, so only the proportions count): 16.6
// ms cold, 2.0 ms with favordynmods, 1.2 ms warmed.
//
// So neither fewer hierarchies nor parallel joins help; an early first writer
// does. Two ways:
//
//   - Warm writes our own process into the group it is in already, in the
//     background, while a pod start does other things, and again every few
//     milliseconds until the start is over. Nothing of the host changes.
//   - FavorDynMods takes the wait away for good, at the documented price of
//     dearer forks and exits for the whole host
//     (Documentation/admin-guide/cgroup-v2.rst, "favordynmods").

// warmInterval is below the time for which the lock stays cheap: one grace
// period, at the least 3 jiffies of 4 ms.
const warmInterval = 7 * time.Millisecond

// Warmer keeps joining cheap while somebody is starting processes. The zero
// value is ready. It sleeps when nobody is.
type Warmer struct {
	mu      sync.Mutex
	users   int
	until   time.Time // WarmFor's
	running bool
	fd      int
	open    bool
	off     bool // joining is not possible here
}

// Warm starts warming and returns at once; done ends it and must be called.
// Any number may overlap. On a host where our own group cannot be written (a
// read-only mount) it does nothing.
func (w *Warmer) Warm() (done func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.start() {
		return func() {}
	}
	w.users++
	var once sync.Once
	return func() {
		once.Do(func() {
			w.mu.Lock()
			w.users--
			w.mu.Unlock() // run sees it at its next round
		})
	}
}

// WarmFor warms for d from now on, for callers that know only that joins are
// near: the first costs nobody anything when it comes 10 ms later.
func (w *Warmer) WarmFor(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if until := time.Now().Add(d); until.After(w.until) {
		w.until = until
	}
	w.start()
}

// start has run running; false: there is nothing to be done here.
func (w *Warmer) start() bool {
	if !w.open && !w.off {
		w.fd, w.off = openOwn()
		w.open = !w.off
	}
	if !w.off && !w.running {
		w.running = true
		go w.run()
	}
	return !w.off
}

// run ends by itself once there are no users: a user that comes back before
// finds it running.
func (w *Warmer) run() {
	pid := []byte(strconv.Itoa(os.Getpid()))
	t := time.NewTimer(0)
	defer t.Stop()
	for range t.C {
		_, err := unix.Pwrite(w.fd, pid, 0)
		w.mu.Lock()
		if err != nil && !errors.Is(err, unix.EINTR) {
			w.off = true
		}
		if w.off || w.users == 0 && !time.Now().Before(w.until) {
			w.running = false
			w.mu.Unlock()
			return
		}
		w.mu.Unlock()
		t.Reset(warmInterval)
	}
}

// openOwn opens cgroup.procs of the group that this process is in.
func openOwn() (fd int, off bool) {
	l, err := hostLayout()
	if err != nil {
		return -1, true
	}
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return -1, true
	}
	for line := range strings.Lines(string(data)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		dir := l.of(strings.Split(f[1], ",")[0])
		if dir == "" {
			continue
		}
		fd, err := unix.Open(dir+f[2]+"/cgroup.procs", unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			return fd, false
		}
	}
	return -1, true
}

// FavorDynMods switches the kernel's favordynmods on, or off again. It is off
// by default because it concerns the whole host, and because since Linux 6.18
// it stays on until reboot once it was on ("per threadgroup rwsem mechanism
// can't be disabled").
//
// On cgroup v2 the option of the one mount is changed. On v1, where the option
// counts at the first mount of a hierarchy only, a hierarchy of our own without
// controllers carries it: mounted at dir, which must be an empty directory of
// the caller's (say <run-dir>/favordynmods). Every process then has one more
// line in /proc/PID/cgroup.
//
// errdefs.ErrNotImplemented: the kernel is older than 6.0.
func FavorDynMods(ctx context.Context, on bool, dir string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	l, err := hostLayout()
	if err != nil {
		return err
	}
	if l.unified {
		return remountV2(on)
	}
	if !on {
		err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount favordynmods hierarchy at %s: %w", dir, err)
		}
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err == nil && st.Type == unix.CGROUP_SUPER_MAGIC {
		return nil
	}
	name := "podd-" + strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(filepath.Base(filepath.Dir(dir))))
	err = unix.Mount("none", dir, "cgroup", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "none,name="+name+",favordynmods")
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("mount option favordynmods: %w: %w", err, errdefs.ErrNotImplemented)
	}
	if err != nil {
		return fmt.Errorf("mount favordynmods hierarchy at %s: %w", dir, err)
	}
	return nil
}

// remountV2 keeps the mount's other options: they are of the file system, and
// a reconfiguration without them would switch them off.
func remountV2(on bool) error {
	fd, err := unix.Fspick(unix.AT_FDCWD, mountRoot, unix.FSPICK_CLOEXEC)
	if err != nil {
		return fmt.Errorf("cgroup2 at %s: %w", mountRoot, err)
	}
	defer unix.Close(fd)
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	options := map[string]bool{}
	for line := range strings.Lines(string(data)) {
		head, tail, _ := strings.Cut(strings.TrimSpace(line), " - ")
		h, f := strings.Fields(head), strings.Fields(tail)
		if len(h) > 4 && h[4] == mountRoot && len(f) > 2 {
			for _, o := range strings.Split(f[2], ",") {
				switch o {
				case "nsdelegate", "memory_localevents", "memory_recursiveprot", "memory_hugetlb_accounting", "pids_localevents":
					options[o] = true
				}
			}
		}
	}
	if on {
		options["favordynmods"] = true
	} else {
		options["nofavordynmods"] = true
	}
	for o := range options {
		err := unix.FsconfigSetFlag(fd, o)
		if o == "nofavordynmods" && errors.Is(err, unix.EINVAL) {
			continue // a kernel without it: leaving the flag out is the same
		}
		if err != nil {
			return fmt.Errorf("cgroup2 option %s: %w", o, err)
		}
	}
	if err := unix.FsconfigReconfigure(fd); err != nil {
		return fmt.Errorf("reconfigure cgroup2 at %s: %w", mountRoot, err)
	}
	return nil
}
