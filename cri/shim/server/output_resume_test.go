package server

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pumpFixture is an output with a FIFO as stdout, without a loop.
type pumpFixture struct {
	t    *testing.T
	dir  string
	fifo *os.File // the container's side
	out  *output
}

func (p *pumpFixture) open(spill int) {
	p.t.Helper()
	l, err := newLoop()
	if err != nil {
		p.t.Fatal(err)
	}
	p.out = newOutput("c", l, slog.New(slog.DiscardHandler))
	p.out.spill = spill
	if err := p.out.open(filepath.Join(p.dir, "cursor"), filepath.Join(p.dir, "log"), 0, 0); err != nil {
		p.t.Fatal(err)
	}
	fd, err := unix.Open(filepath.Join(p.dir, "fifo"), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		p.t.Fatal(err)
	}
	if err := p.out.addStream(stdout, fd, false); err != nil {
		p.t.Fatal(err)
	}
}

func newPump(t *testing.T) *pumpFixture {
	p := &pumpFixture{t: t, dir: t.TempDir()}
	path := filepath.Join(p.dir, "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if p.fifo, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.fifo.Close() })
	p.open(-1)
	return p
}

func (p *pumpFixture) records() string {
	p.t.Helper()
	data, err := os.ReadFile(filepath.Join(p.dir, "log"))
	if err != nil {
		p.t.Fatal(err)
	}
	var all []string
	for line := range strings.Lines(string(data)) {
		_, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		all = append(all, strings.TrimPrefix(rest, "stdout "))
	}
	return strings.Join(all, "|")
}

// TestResume stops the pump between any two steps of a batch, as kill -9
// would, and lets a new one go on: each byte is logged once.
func TestResume(t *testing.T) {
	at := time.Unix(1700000000, 5)
	steps := []struct {
		name string
		do   func(p *pumpFixture, sc *scratch)
	}{
		{"nothing", func(p *pumpFixture, sc *scratch) {}},
		{"moved to the spill pipe", func(p *pumpFixture, sc *scratch) { p.take(sc) }},
		{"intent noted", func(p *pumpFixture, sc *scratch) { p.take(sc); p.note(at) }},
		{"half written", func(p *pumpFixture, sc *scratch) {
			n := p.take(sc)
			p.note(at)
			p.write(sc, n, at, 20)
		}},
		{"written, phase not noted", func(p *pumpFixture, sc *scratch) {
			n := p.take(sc)
			p.note(at)
			p.write(sc, n, at, 1<<20)
			p.out.cur.setPhase(phaseWriting)
		}},
		{"written", func(p *pumpFixture, sc *scratch) {
			n := p.take(sc)
			p.note(at)
			p.write(sc, n, at, 1<<20)
		}},
		{"consumed", func(p *pumpFixture, sc *scratch) {
			n := p.take(sc)
			p.note(at)
			p.write(sc, n, at, 1<<20)
			if err := consume(p.out.spill, n); err != nil {
				p.t.Fatal(err)
			}
		}},
		{"unfinished line committed", func(p *pumpFixture, sc *scratch) {
			n := p.take(sc)
			p.note(at)
			p.write(sc, n, at, 1<<20)
			if err := consume(p.out.spill, n); err != nil {
				p.t.Fatal(err)
			}
			p.out.cur.commitRest(stdout)
		}},
	}
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			p := newPump(t)
			p.fifo.WriteString("one\ntw")
			p.out.drain()
			p.fifo.WriteString("o\nthree\nfo")
			sc := getScratch()
			step.do(p, sc)
			putScratch(sc)
			// The old pump is gone without a word; its spill pipe was stored.
			spill, err := unix.FcntlInt(uintptr(p.out.spill), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			p.open(spill)
			if err := p.out.resume(); err != nil {
				t.Fatal(err)
			}
			p.out.drain()
			p.fifo.WriteString("ur\nfive")
			p.out.drain()
			p.out.close()
			if got, want := p.records(), "F one|F two|F three|F four|P five"; got != want {
				t.Errorf("records %q, want %q", got, want)
			}
		})
	}
}

// TestResumeAmongRotations stops the pump within a batch that needs several
// files of the log, at each of them: each line is in one of them once.
func TestResumeAmongRotations(t *testing.T) {
	const limit, count = 1000, 200
	var text strings.Builder
	for i := range count {
		fmt.Fprintf(&text, "%d\n", i)
	}
	for stop := 0; ; stop++ {
		p := newPump(t)
		rotating := func() {
			p.out.file.maxSize = limit
			p.out.file.old = newOldLogs(p.out.file.path, limit, count, p.out.pace, p.out.log)
		}
		rotating()
		if err := p.out.needSpill(); err != nil {
			t.Fatal(err)
		}
		p.fifo.WriteString(text.String() + "half")
		sc := getScratch()
		n := p.take(sc)
		data, err := sc.peek(p.out.spill, n)
		if err != nil {
			t.Fatal(err)
		}
		data = bytes.Clone(data)
		stopped := false
		for i := 0; len(data) > 0; i++ { // as finishBatch
			p.out.file.rotate()
			now := fits(len(p.out.cur.rest(stdout)), data, p.out.file.room())
			if i == stop/2 { // written, or written in part, and no more
				at := time.Now()
				*p.out.cur.u32(curLeft) = uint32(len(data) - now)
				p.note(at)
				w := &limitWriter{w: p.out.file, left: 1 << 20}
				if stop%2 == 1 {
					w.left = 70
				}
				p.out.write(sc, stdout, at, p.out.cur.rest(stdout), data[:now], false, w)
				p.out.cur.setPhase(phaseWriting)
				stopped = true
				break
			}
			if err := p.out.logBatch(sc, stdout, data[:now], len(data)-now, false); err != nil {
				t.Fatal(err)
			}
			data = data[now:]
		}
		putScratch(sc)
		spill, err := unix.FcntlInt(uintptr(p.out.spill), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		p.open(spill)
		rotating()
		if err := p.out.resume(); err != nil {
			t.Fatal(err)
		}
		p.fifo.WriteString("done\n")
		p.out.drain()
		p.out.close()
		names, _ := filepath.Glob(filepath.Join(p.dir, "log.*"))
		slices.Sort(names)
		var got strings.Builder
		for _, name := range append(names, filepath.Join(p.dir, "log")) {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(b)) {
				_, rest, _ := strings.Cut(line, " stdout F ")
				got.WriteString(rest)
			}
		}
		if want := text.String() + "halfdone\n"; got.String() != want {
			t.Fatalf("stopped at %d: %d bytes logged, want %d", stop, got.Len(), len(want))
		}
		if !stopped {
			return
		}
	}
}

func (p *pumpFixture) take(sc *scratch) int {
	p.t.Helper()
	p.out.cur.setStream(stdout)
	n, err := p.out.streams[stdout].take(sc)
	if err != nil || n <= 0 {
		p.t.Fatal(n, err)
	}
	return n
}

func (p *pumpFixture) note(at time.Time) {
	c := p.out.cur
	c.setTime(at)
	c.put64(curOffset, uint64(p.out.file.size))
	c.put64(curDev, p.out.file.dev)
	c.put64(curIno, p.out.file.ino)
	*c.u32(curFinal) = 0
	c.setPhase(phaseWriting)
}

// write writes at most limit bytes of the batch; less than all leaves the
// phase as it was.
func (p *pumpFixture) write(sc *scratch, n int, at time.Time, limit int) {
	p.t.Helper()
	data, err := sc.peek(p.out.spill, n)
	if err != nil {
		p.t.Fatal(err)
	}
	w := &limitWriter{w: p.out.file, left: limit}
	p.out.write(sc, stdout, at, p.out.cur.rest(stdout), data, false, w)
	if w.left == 0 {
		p.out.cur.setPhase(phaseWriting)
	}
}

type limitWriter struct {
	w    logWriter
	left int
}

func (l *limitWriter) Write(p []byte) (int, error) {
	n := min(l.left, len(p))
	l.left -= n
	if _, err := l.w.Write(p[:n]); err != nil {
		return 0, err
	}
	return len(p), nil
}

// TestLogFull: a log that cannot be written loses output, not the container.
func TestLogFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a small tmpfs")
	}
	p := newPump(t)
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=16k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(small, unix.MNT_DETACH)
	p.out.file.path = filepath.Join(small, "log")
	if err := p.out.file.reopen(); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		p.fifo.WriteString(strings.Repeat("x", 500) + "\n")
		p.out.drain()
	}
	if !p.out.failing {
		t.Fatal("the log did not fill up")
	}
	data, err := os.ReadFile(p.out.file.path)
	if err != nil {
		t.Fatal(err)
	}
	if len(data) == 0 || data[len(data)-1] != '\n' {
		t.Errorf("%d bytes, the last record is torn", len(data))
	}
	os.Truncate(p.out.file.path, 0)
	p.out.file.size = 0
	p.fifo.WriteString("again\n")
	p.out.drain()
	if p.out.failing {
		t.Error("still failing with room")
	}
	p.out.close()
}

// A shim that cannot move output loses it, says so, and does not hold the
// container up; when it can again, it does.
func TestFailingPumpHoldsNobodyUp(t *testing.T) {
	p := newPump(t)
	bad, err := unix.Open("/dev/zero", unix.O_RDONLY|unix.O_CLOEXEC, 0) // takes no splice
	if err != nil {
		t.Fatal(err)
	}
	p.out.spill = bad
	go p.out.loop.run(p.out.log)
	if err := p.out.start(); err != nil {
		t.Fatal(err)
	}
	wrote := make(chan error, 1)
	write := func(s string) {
		t.Helper()
		go func() { _, err := p.fifo.WriteString(s); wrote <- err }()
		select {
		case err := <-wrote:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("the container is held up")
		}
	}
	write(strings.Repeat(strings.Repeat("x", 99)+"\n", 2000)) // three pipes full
	p.out.mu.Lock()
	unix.Close(bad)
	p.out.spill = -1
	p.out.mu.Unlock()
	deadline := time.Now().Add(20 * time.Second)
	for !strings.HasSuffix(p.records(), "F again") {
		if time.Now().After(deadline) {
			t.Fatalf("log %q", p.records())
		}
		write("again\n")
	}
	p.out.close()
}

// An init that ends before its output is read for the first time.
func TestStartAfterTheEnd(t *testing.T) {
	p := newPump(t)
	fd := p.out.streams[stdout].fd
	p.out.close()
	// The number is somebody else's now.
	var other [2]int
	if err := unix.Pipe2(other[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	if other[0] != fd {
		if err := unix.Dup3(other[0], fd, unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
	}
	defer unix.Close(other[0])
	defer unix.Close(other[1])
	if err := p.out.start(); err != nil {
		t.Error(err)
	}
	w, err := p.out.loop.add(fd, unix.EPOLLIN, func(uint32) {})
	if err != nil {
		t.Errorf("the descriptor's new owner cannot watch it: %v", err)
	}
	w.remove()
}
