package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/cri/shim/internal/wire"
)

func TestEventLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events")
	log := slog.New(slog.DiscardHandler)
	l, err := openEvents(path, log)
	if err != nil {
		t.Fatal(err)
	}
	const count = 2*keepEvents + 100
	for i := range count {
		l.append(shim.Event{Kind: shim.EventCreated, ID: fmt.Sprint(i)})
	}
	check := func(l *eventLog) {
		t.Helper()
		all, _ := l.since(0)
		if len(all) < keepEvents || len(all) > 2*keepEvents {
			t.Fatalf("%d events are kept", len(all))
		}
		for i, e := range all {
			if want := uint64(count - len(all) + 1 + i); e.Seq != want || e.ID != fmt.Sprint(want-1) {
				t.Fatalf("event %d is %+v, want number %d", i, e, want)
			}
		}
		if some, _ := l.since(count - 3); len(some) != 3 {
			t.Fatalf("%d events after the last but three", len(some))
		}
	}
	check(l)
	if st, _ := os.Stat(path); st.Size() > 2*keepEvents*200 {
		t.Errorf("the file has %d bytes", st.Size())
	}
	if l, err = openEvents(path, log); err != nil {
		t.Fatal(err)
	}
	check(l)
	_, more := l.since(count)
	l.append(shim.Event{Kind: shim.EventExited, ID: "x"})
	select {
	case <-more:
	default:
		t.Error("subscribers are not told")
	}
	if !l.has("x", shim.EventExited) || l.has("x", shim.EventStarted) {
		t.Error("has is wrong")
	}
	// Damage: no number is given out twice.
	f, _ := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	f.WriteString(`{"seq":99`)
	f.Close()
	if l, err = openEvents(path, log); err != nil {
		t.Fatal(err)
	}
	l.append(shim.Event{Kind: shim.EventExited, ID: "y"})
	if last, _ := l.since(count + 1); len(last) != 1 || last[0].Seq <= count+2 {
		t.Errorf("after damage: %+v", last)
	}
}

func TestFDStore(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	// This process plays pause: the ends have to be where pause has them.
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(self)
	s := &fdStore{pidfd: self, send: pair[0], recv: pair[1]}
	pipe := func(text string) int {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		w.WriteString(text)
		w.Close()
		fd, _ := unix.FcntlInt(r.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		r.Close()
		return fd
	}
	put := func(id, name, text string) {
		t.Helper()
		fd := pipe(text)
		defer unix.Close(fd) // only the store holds it now
		if err := s.put(id, stored{name: name, fd: fd}); err != nil {
			t.Fatal(err)
		}
	}
	want := map[string]string{}
	check := func() {
		t.Helper()
		for range 2 { // loading takes nothing out
			all, err := s.load()
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]bool{}
			for _, f := range all {
				got[f.id+"/"+f.name] = true
				var st unix.Stat_t
				if err := unix.Fstat(f.fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
					t.Errorf("%s/%s is no pipe: %v", f.id, f.name, err)
				}
				n, _ := unix.IoctlGetInt(f.fd, unix.TIOCINQ)
				if n != len(want[f.id+"/"+f.name]) {
					t.Errorf("%s/%s holds %d bytes", f.id, f.name, n)
				}
				unix.Close(f.fd)
			}
			if len(got) != len(want) {
				t.Errorf("stored %v, want %v", got, want)
			}
		}
	}
	check()
	for i := range 300 { // more than a socket's default buffer takes
		id := fmt.Sprintf("c%d", i%60)
		name := fmt.Sprintf("n%d", i/60)
		put(id, name, name+id)
		want[id+"/"+name] = name + id
	}
	check()
	put("c1", "n0", "newer text") // the later one wins
	want["c1/n0"] = "newer text"
	check()
	if err := s.drop("c1", "n1"); err != nil {
		t.Fatal(err)
	}
	delete(want, "c1/n1")
	check()
	for i := range 59 {
		if err := s.drop(fmt.Sprintf("c%d", i), ""); err != nil {
			t.Fatal(err)
		}
		for k := range want {
			if strings.HasPrefix(k, fmt.Sprintf("c%d/", i)) {
				delete(want, k)
			}
		}
	}
	check()
	if len(want) != 5 {
		t.Fatalf("want %d", len(want))
	}
}

// TestFDStoreLosesNothingForLackOfDescriptors: who may open no more drops
// nothing by mistake, and what was to go goes with the next drop.
func TestFDStoreLosesNothingForLackOfDescriptors(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(pair[:])
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(self)
	s := &fdStore{pidfd: self, send: pair[0], recv: pair[1]}
	null, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(null)
	for i := range 10 {
		fds := []stored{{name: "stdout", fd: null}, {name: "stderr", fd: null}, {name: "pidfd", fd: null}}
		if err := s.put(fmt.Sprintf("c%d", i), fds...); err != nil {
			t.Fatal(err)
		}
	}
	names := func() (n int) {
		t.Helper()
		all, err := s.load()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range all {
			unix.Close(f.fd)
		}
		return len(all)
	}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	failed := 0
	for more := range uint64(1000) { // numbers, of which some are taken
		next, err := unix.FcntlInt(uintptr(null), unix.F_DUPFD_CLOEXEC, 0) // the lowest that is free
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(next)
		few := was
		few.Cur = uint64(next) + more
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
			t.Fatal(err)
		}
		err = s.drop("c3", "")
		if e := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); e != nil {
			t.Fatal(e)
		}
		want := 27
		if err != nil {
			want, failed = 30, failed+1
		}
		if got := names(); got != want {
			t.Fatalf("with %d descriptors free %d are left, want %d (%v)", more, got, want, err)
		}
		if err == nil {
			break
		}
	}
	if failed < 10 {
		t.Errorf("only %d drops failed", failed)
	}
	s.gone = map[[2]string]bool{{"c4", "stdout"}: true} // of a drop that failed
	if err := s.drop("c5", "pidfd"); err != nil {
		t.Fatal(err)
	}
	if got := names(); got != 25 {
		t.Errorf("%d are left, want 25", got)
	}
}

func TestSysctlPath(t *testing.T) {
	all := map[specs.LinuxNamespaceType]bool{specs.NetworkNamespace: true, specs.IPCNamespace: true, specs.UTSNamespace: true}
	for _, c := range []struct{ key, want string }{
		{"net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"},
		{"net/ipv4/conf/eth0.1/forwarding", "/proc/sys/net/ipv4/conf/eth0.1/forwarding"},
		{"net.ipv4.conf.eth0/1.forwarding", "/proc/sys/net/ipv4/conf/eth0.1/forwarding"},
		{"kernel.shmmax", "/proc/sys/kernel/shmmax"},
		{"fs.mqueue.msg_max", "/proc/sys/fs/mqueue/msg_max"},
		{"kernel.panic", ""},
		{"vm.swappiness", ""},
		{"net.../../vm.swappiness", ""},
		{"net/../vm/swappiness", ""},
		{"net..ipv4", ""},
		{"net.ipv4.x=y", ""},
		{"", ""},
	} {
		got, err := sysctlPath(c.key, all)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%q: %q %v, want %q", c.key, got, err, c.want)
		}
		if c.want != "" {
			if _, err := sysctlPath(c.key, nil); !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("%q without namespaces: %v", c.key, err)
			}
		}
	}
}

func TestStoreQuarantine(t *testing.T) {
	dir := t.TempDir()
	s := &store{root: filepath.Join(dir, "containers"), quarantine: filepath.Join(dir, "quarantine"), log: slog.New(slog.DiscardHandler)}
	for _, d := range []string{s.quarantine, s.dir("good"), s.dir("empty"), s.dir("torn"), s.dir("future"), s.dir("moved")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.save(&record{Process: shim.Process{ID: "good", State: shim.Running}}); err != nil {
		t.Fatal(err)
	}
	for id, text := range map[string]string{"torn": `{"version":1,"pro`, "future": `{"version":99}`, "moved": `{"version":1,"process":{"id":"other"}}`} {
		os.WriteFile(filepath.Join(s.dir(id), recordName), []byte(text), 0o600)
	}
	records, err := s.load()
	if err != nil || len(records) != 1 || records[0].Process.ID != "good" {
		t.Fatalf("loaded %+v, %v", records, err)
	}
	if q, _ := os.ReadDir(s.quarantine); len(q) != 3 {
		t.Errorf("quarantine: %v", q)
	}
	if left, _ := os.ReadDir(s.root); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

// TestRecordsOfOldReleases: what a release has written loads for ever.
func TestRecordsOfOldReleases(t *testing.T) {
	files, _ := filepath.Glob("testdata/records/*.json")
	if len(files) == 0 {
		t.Fatal("no records in testdata")
	}
	for _, f := range files {
		dir := t.TempDir()
		s := &store{root: dir, quarantine: t.TempDir(), log: slog.New(slog.DiscardHandler)}
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		id := strings.TrimSuffix(filepath.Base(f), ".json")
		os.Mkdir(s.dir(id), 0o700)
		os.WriteFile(filepath.Join(s.dir(id), recordName), data, 0o600)
		records, err := s.load()
		if err != nil || len(records) != 1 {
			t.Fatalf("%s: %v %v", f, records, err)
		}
		r := records[0]
		if r.Process.PID == 0 || r.ProcStart == 0 || r.Process.State == "" || len(r.CgroupPaths) == 0 || r.Digest == "" {
			t.Errorf("%s: %+v", f, r)
		}
	}
}

func TestGate(t *testing.T) {
	var g gate
	leave, err := g.enter(wire.Start)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.enter(wire.Events); err != nil {
		t.Fatal(err)
	}
	shut := g.closing()
	closed := make(chan error)
	go func() { closed <- g.close(time.Minute) }()
	<-shut
	if _, err := g.enter(wire.List); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("entered a closed gate: %v", err)
	}
	select {
	case err := <-closed:
		t.Fatal("closed with a request inside", err)
	default:
	}
	leave()
	leave() // twice is harmless
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	g.open()
	leave, err = g.enter(wire.List)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.close(time.Millisecond); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("closed with a request inside: %v", err)
	}
	if _, err := g.enter(wire.List); err != nil {
		t.Errorf("the gate stays shut after a failed upgrade: %v", err)
	}
	leave()
}

func TestOpLock(t *testing.T) {
	l := newOpLock()
	if err := l.lock(context.Background()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := l.lock(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("lock: %v", err)
	}
	l.unlock()
	if err := l.lock(ctx); err != nil {
		t.Errorf("a free lock is taken whatever the context: %v", err)
	}
}

func TestStatFields(t *testing.T) {
	state, fields, ok := statFields("12 (a) Z (b) c) S 7 8 9 " + strings.Repeat("0 ", 40))
	if !ok || state != "S" || fields[0] != "7" || fields[2] != "9" {
		t.Errorf("%q %v %v", state, fields, ok)
	}
	if _, _, ok := statFields("12 (a"); ok {
		t.Error("cut off line was accepted")
	}
	if startTime(os.Getpid()) == 0 || startTime(1<<30) != 0 {
		t.Error("start time")
	}
}

func TestCursorRefusesForeignFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cursor")
	c, err := openCursor(path)
	if err != nil {
		t.Fatal(err)
	}
	c.stageRest(stderr, [2][]byte{[]byte("ab"), []byte("c")})
	c.commitRest(stderr)
	c.close()
	if c, err = openCursor(path); err != nil || string(c.rest(stderr)) != "abc" || len(c.rest(stdout)) != 0 {
		t.Fatalf("reopened: %v %q", err, c.rest(stderr))
	}
	*c.u32(curLen + 8) = maxLine + 1 // nothing we would write
	*c.u32(curLen + 12) = maxLine + 1
	c.close()
	if c, err = openCursor(path); err != nil || len(c.rest(stderr)) != 0 || c.phase() != phaseIdle {
		t.Fatalf("damaged cursor was believed: %v", err)
	}
	c.close()
}

func TestHandoverOfAnotherRelease(t *testing.T) {
	fd, err := unix.MemfdCreate("handover", 0)
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	lock, _ := unix.FcntlInt(w.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	listener, _ := unix.FcntlInt(w.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	w.Close()
	f := os.NewFile(uintptr(fd), "handover")
	fmt.Fprintf(f, `{"version":99,"listener":%d,"lock":%d}`, listener, lock)
	dup, _ := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	f.Close()
	t.Setenv(handoverEnv, fmt.Sprint(dup))
	h, err := inherited()
	if h != nil || err != nil {
		t.Fatalf("%+v %v", h, err)
	}
	if os.Getenv(handoverEnv) != "" {
		t.Error("containers would inherit the variable")
	}
	// The lock's descriptor is closed, so that it can be taken anew.
	if n, err := r.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("descriptors are still open: %d %v", n, err)
	}
}

// TestOOMOfARemovedScope: systemd has removed the cgroup of a container that was
// killed for want of memory before anybody could read its counter.
func TestOOMOfARemovedScope(t *testing.T) {
	root := t.TempDir()
	count := func(dir string, n int) {
		t.Helper()
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "memory.events"), fmt.Appendf(nil, "low 0\noom 9\noom_kill %d\n", n), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	log := slog.New(slog.DiscardHandler)
	events, err := openEvents(filepath.Join(t.TempDir(), "events"), log)
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{log: log, events: events, families: map[string]*family{}}
	pod := filepath.Join(root, "pod")
	count(pod, 3) // of containers that were here before
	watch := func(id string, kills int) *oomWatch {
		t.Helper()
		dir := filepath.Join(pod, id)
		count(dir, kills)
		o := &oomWatch{c: &container{s: s, rec: record{Process: shim.Process{ID: id}}}, path: dir, file: "memory.events", fd: -1}
		s.join(o)
		return o
	}
	gone := func(o *oomWatch) {
		t.Helper()
		if err := os.RemoveAll(o.path); err != nil {
			t.Fatal(err)
		}
	}
	killed := shim.Exit{Code: 137, Signal: 9, Known: true}

	a, b, c, d := watch("a", 0), watch("b", 2), watch("c", 0), watch("d", 0)
	gone(a)
	if a.killed(killed) {
		t.Error("a was killed by somebody, and nothing tells of memory")
	}
	count(b.path, 3)
	count(pod, 4)
	gone(c)
	if c.killed(killed) {
		t.Error("the kill in b is taken for one in c")
	}
	count(pod, 5)
	gone(d)
	if d.killed(shim.Exit{Code: 1, Known: true}) {
		t.Error("d ended by itself")
	}
	if !d.killed(killed) || !events.has("d", shim.EventOOM) {
		t.Error("d was killed for want of memory, which is not seen")
	}
	if !b.killed(killed) || b.count != 3 {
		t.Errorf("b: %d kills", b.count)
	}
	e := watch("e", 0)
	gone(e)
	if e.killed(killed) {
		t.Error("the kills before e are taken for its own")
	}
	for _, o := range []*oomWatch{a, b, c, d, e} {
		s.leave(o)
	}
	if len(s.families) != 0 {
		t.Errorf("families stay: %v", s.families)
	}
}
