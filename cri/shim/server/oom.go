package server

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

// oomWatch tells when the kernel's OOM killer acted in a container's cgroup.
// The kernel's own counter says whether it was a kill; the notification only
// says when to look: an eventfd on v1 (memory.txt, 10. OOM Control), inotify on
// memory.events on v2.
type oomWatch struct {
	c    *container
	path string // directory of the memory cgroup
	file string // counter file in it
	fd   int
	w    *watch

	mu    sync.Mutex
	count uint64
	total bool // some process was killed since the container was made

	family *family // nil on v1
	// When the watch began: kills below the parent, and known ones of them.
	before, knownBefore uint64
	told                uint64 // kills that the family knows of, or that were before
}

// family is the containers whose cgroups have one parent. systemd removes the
// scope of a container that has ended at once, and with it the counter that
// tells why; the parent's counter has the kill too (cgroup-v2.rst: memory.events
// is hierarchical), and what no other container accounts for was this one's.
type family struct {
	file    string // the parent's counter file
	known   atomic.Uint64
	members map[*oomWatch]bool // by Server.familyMu
}

// join the family of the watch's cgroup; leave it at the end.
func (s *Server) join(o *oomWatch) {
	s.familyMu.Lock()
	defer s.familyMu.Unlock()
	path := filepath.Join(filepath.Dir(o.path), o.file)
	f := s.families[path]
	if f == nil {
		f = &family{file: path, members: map[*oomWatch]bool{}}
		s.families[path] = f
	}
	f.members[o] = true
	o.family = f
	o.told, _ = oomKills(filepath.Join(o.path, o.file))
	o.knownBefore = f.known.Load()
	o.before, _ = oomKills(path)
}

func (s *Server) leave(o *oomWatch) {
	s.familyMu.Lock()
	defer s.familyMu.Unlock()
	if delete(o.family.members, o); len(o.family.members) == 0 {
		delete(s.families, o.family.file)
	}
}

// watchOOM never fails: without a memory cgroup there is nothing to see. With
// reported, kills up to now are known to be in the event log.
func (s *Server) watchOOM(c *container, reported bool) *oomWatch {
	o := &oomWatch{c: c, fd: -1, total: reported}
	c.mu.Lock()
	paths := c.rec.CgroupPaths
	c.mu.Unlock()
	var err error
	if dir := paths["memory"]; dir != "" {
		o.path, o.file = dir, "memory.oom_control"
		o.fd, err = oomEventfd(dir)
	} else if dir := paths[""]; dir != "" && s.host.unified {
		o.path, o.file = dir, "memory.events"
		if o.fd, err = oomInotify(dir); err == nil {
			s.join(o)
		}
	} else {
		return o
	}
	if reported {
		o.count, _ = oomKills(filepath.Join(o.path, o.file))
	}
	if err == nil {
		o.w, err = s.loop.add(o.fd, unix.EPOLLIN, func(uint32) { go o.look() })
	}
	if err != nil {
		s.log.Warn("watch for OOM kills", "id", c.rec.Process.ID, "error", err)
	}
	return o
}

func oomEventfd(dir string) (int, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, err
	}
	f, err := os.Open(filepath.Join(dir, "memory.oom_control"))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "cgroup.event_control"), fmt.Appendf(nil, "%d %d", fd, f.Fd()), 0)
		f.Close()
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func oomInotify(dir string) (int, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return -1, err
	}
	if _, err := unix.InotifyAddWatch(fd, filepath.Join(dir, "memory.events"), unix.IN_MODIFY); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// look reads the notification and reports new kills.
func (o *oomWatch) look() {
	o.mu.Lock()
	fd, w := o.fd, o.w
	if fd >= 0 {
		var buf [4096]byte
		for {
			if n, err := unix.Read(fd, buf[:]); n <= 0 || err != nil {
				break
			}
		}
	}
	o.mu.Unlock()
	// v1 notifies before it kills: the counter follows within milliseconds.
	for delay := time.Millisecond; !o.check() && delay < time.Second; delay *= 4 {
		time.Sleep(delay)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	// The removal of the cgroup signals too, for ever: then nothing is left.
	if _, err := os.Stat(filepath.Join(o.path, o.file)); err == nil && o.fd >= 0 && w != nil {
		_ = w.rearm(unix.EPOLLIN)
	}
}

// check compares the counter and reports a rise. It is true when there is
// nothing more to wait for.
func (o *oomWatch) check() bool {
	if o == nil || o.path == "" {
		return true
	}
	n, ok := oomKills(filepath.Join(o.path, o.file))
	if !ok {
		return true
	}
	return o.counted(n)
}

// counted notes that n processes of the container were killed so far, and
// reports a rise.
func (o *oomWatch) counted(n uint64) bool {
	o.mu.Lock()
	rise := max(n, o.count) - o.count
	o.count += rise
	o.total = o.total || rise > 0
	if o.family != nil && n > o.told {
		o.family.known.Add(n - o.told)
		o.told = n
	}
	o.mu.Unlock()
	if rise == 0 {
		return false
	}
	p := o.c.snapshot()
	o.c.s.events.append(shim.Event{Kind: shim.EventOOM, ID: o.c.rec.Process.ID, PID: p.PID})
	return true
}

// killed says whether the OOM killer acted in the life of a container that has
// ended so.
func (o *oomWatch) killed(exit shim.Exit) bool {
	if o == nil {
		return false
	}
	o.check()
	if exit.Code == 128+int(unix.SIGKILL) && o.family != nil {
		if _, err := os.Stat(filepath.Join(o.path, o.file)); err != nil {
			o.askFamily()
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.total
}

// askFamily finds the kills of a container whose own counter is gone.
func (o *oomWatch) askFamily() {
	s := o.c.s
	all, ok := oomKills(o.family.file) // first: later ones of others do not count
	if !ok {
		return
	}
	s.familyMu.Lock()
	others := slices.Collect(maps.Keys(o.family.members))
	s.familyMu.Unlock()
	for _, w := range others {
		w.check()
	}
	known := o.family.known.Load() - o.knownBefore
	if rise := all - o.before; rise > known {
		o.mu.Lock()
		n := max(o.told, o.count) + rise - known
		o.mu.Unlock()
		o.counted(n)
	}
}

// peak is the most memory that the cgroup has used: memory.peak on v2 (Linux
// 5.19), memory.max_usage_in_bytes on v1.
func (o *oomWatch) peak() uint64 {
	if o == nil || o.path == "" {
		return 0
	}
	for _, name := range []string{"memory.peak", "memory.max_usage_in_bytes"} {
		if text, err := os.ReadFile(filepath.Join(o.path, name)); err == nil {
			if n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64); err == nil {
				return n
			}
		}
	}
	return 0
}

func (o *oomWatch) close() {
	if o == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.fd >= 0 {
		o.w.remove()
		unix.Close(o.fd)
		o.fd = -1
		if o.family != nil {
			o.c.s.leave(o)
		}
	}
}

// oomKills reads the line "oom_kill N", which both versions have (v1 since
// Linux 4.13).
func oomKills(path string) (uint64, bool) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "oom_kill "); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(rest), 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}
