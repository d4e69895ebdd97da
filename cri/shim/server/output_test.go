package server_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

// TestRotation: no line is lost over rotations, old files are compressed and
// bounded in number.
func TestRotation(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	spec := n.containerSpec(box, "for i in 0 1 2 3; do probe lines 3000 100; read x; done")
	spec.Stdin = true
	spec.LogMaxSize, spec.LogMaxFiles = 256<<10, 20
	n.run(spec)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	s, err := n.Attach(n.ctx(), spec.ID, r, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	for range 4 {
		n.waitLog(spec.LogPath, "000002999")
		io.WriteString(w, "go\n")
	}
	w.Close()
	n.until(shim.EventExited, spec.ID)
	s.Close()
	var names []string
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		names, _ = filepath.Glob(spec.LogPath + ".*")
		plain := 0
		for _, f := range names {
			if !strings.HasSuffix(f, ".gz") {
				plain++
			}
		}
		if plain == 1 || time.Now().After(deadline) {
			break
		}
	}
	slices.SortFunc(names, func(a, b string) int { // oldest first
		return strings.Compare(strings.TrimSuffix(a, ".gz"), strings.TrimSuffix(b, ".gz"))
	})
	if len(names) < 3 {
		t.Fatalf("rotated files: %v", names)
	}
	var all bytes.Buffer
	for i, f := range append(names, spec.LogPath) {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(f, ".gz") {
			if i >= len(names)-1 {
				t.Errorf("%s is compressed", f)
			}
			z, err := gzip.NewReader(bytes.NewReader(data))
			if err != nil {
				t.Fatal(err)
			}
			if data, err = io.ReadAll(z); err != nil {
				t.Fatal(err)
			}
		} else if i < len(names)-1 {
			t.Errorf("%s is not compressed", f)
		}
		if st, _ := os.Stat(f); st.Mode().Perm() != 0o640 {
			t.Errorf("%s has mode %v", f, st.Mode())
		}
		all.Write(data)
	}
	joined := filepath.Join(n.dir, "joined")
	os.WriteFile(joined, all.Bytes(), 0o600)
	out, _ := logged(t, joined)
	if got := strings.Count(out, "\n"); got != 12000 {
		t.Errorf("%d lines of 12000", got)
	}
}

func TestLogReopenAndSymlink(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	spec := n.containerSpec(box, "echo one; read x; echo two; read x")
	spec.Stdin = true
	n.run(spec)
	n.waitLog(spec.LogPath, "one")
	if err := os.Rename(spec.LogPath, spec.LogPath+".moved"); err != nil {
		t.Fatal(err)
	}
	// A symbolic link in the place of the log is refused, the old file stays.
	target := filepath.Join(n.dir, "target")
	os.Symlink(target, spec.LogPath)
	if err := n.ReopenLog(n.ctx(), spec.ID); err == nil {
		t.Fatal("a symbolic link was followed")
	}
	os.Remove(spec.LogPath)
	if err := n.ReopenLog(n.ctx(), spec.ID); err != nil {
		t.Fatal(err)
	}
	n.feed(spec.ID, "x\n")
	n.waitLog(spec.LogPath, "two")
	if out, _ := logged(t, spec.LogPath+".moved"); out != "one\n" {
		t.Errorf("old log: %q", out)
	}
	if _, err := os.Lstat(target); err == nil {
		t.Error("the link's target was created")
	}
	bad := n.containerSpec(box, "true")
	os.Symlink(target, bad.LogPath)
	if _, err := n.Create(n.ctx(), bad); err == nil {
		t.Error("created with a symbolic link as log")
	}
}

// feed attaches stdin and writes text. It stays attached to the end of the
// test, because nothing says when the text has been copied.
func (n *node) feed(id, text string) {
	n.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		n.t.Fatal(err)
	}
	s, err := n.Attach(n.ctx(), id, r, nil, nil)
	if err != nil {
		n.t.Fatal(err)
	}
	r.Close()
	io.WriteString(w, text)
	w.Close()
	n.t.Cleanup(func() { s.Close() })
}

func TestLongAndUnfinishedLines(t *testing.T) {
	n := newNode(t)
	spec := n.containerSpec(n.sandbox(), `head -c 40000 /dev/zero | busybox tr '\0' a; echo; printf part; sleep 0.2; echo ial; printf end`)
	n.run(spec)
	n.until(shim.EventExited, spec.ID)
	data, err := os.ReadFile(spec.LogPath)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(data)) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		got = append(got, fmt.Sprintf("%s %d %.8s", parts[2], len(parts[3]), parts[3]))
	}
	want := []string{"P 16384 aaaaaaaa", "P 16384 aaaaaaaa", "F 7232 aaaaaaaa", "F 7 partial", "P 3 end"}
	if strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("records %q, want %q", got, want)
	}
}

func TestAttach(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	spec := n.containerSpec(box, "while read x; do echo out $x; echo err $x >&2; done; echo bye; exit 8")
	spec.Stdin, spec.StdinOnce = true, true
	n.run(spec)
	inR, inW, _ := os.Pipe()
	outR, outW, _ := os.Pipe()
	errR, errW, _ := os.Pipe()
	s, err := n.Attach(n.ctx(), spec.ID, inR, outW, errW)
	if err != nil {
		t.Fatal(err)
	}
	// A second client sees the same output.
	out2R, out2W, _ := os.Pipe()
	s2, err := n.Attach(n.ctx(), spec.ID, nil, out2W, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []*os.File{inR, outW, errW, out2W} {
		f.Close()
	}
	io.WriteString(inW, "a\nb\n")
	inW.Close() // half-close: ends the container's stdin
	out, _ := io.ReadAll(outR)
	errText, _ := io.ReadAll(errR)
	out2, _ := io.ReadAll(out2R)
	if string(out) != "out a\nout b\nbye\n" || string(errText) != "err a\nerr b\n" || string(out2) != string(out) {
		t.Errorf("attached: %q %q %q", out, errText, out2)
	}
	for _, s := range []shim.Session{s, s2} {
		if exit, err := s.Wait(n.ctx()); err != nil || exit.Code != 8 {
			t.Errorf("session: %+v %v", exit, err)
		}
	}
	if _, err := n.Attach(n.ctx(), spec.ID, nil, nil, nil); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("attach to an ended container: %v", err)
	}
}

// TestSlowAttach: clients that do not read are disconnected, not obeyed; they
// hold container and log up no longer than one of them would.
func TestSlowAttach(t *testing.T) {
	n := newNode(t)
	spec := n.containerSpec(n.sandbox(), "read x; probe lines 50000 100")
	spec.Stdin = true
	n.run(spec)
	var clients []shim.Session
	for range 6 {
		outR, outW, _ := os.Pipe()
		defer outR.Close()
		s, err := n.Attach(n.ctx(), spec.ID, nil, outW, nil)
		if err != nil {
			t.Fatal(err)
		}
		outW.Close()
		clients = append(clients, s)
	}
	begin := time.Now()
	n.feed(spec.ID, "x\n")
	n.until(shim.EventExited, spec.ID)
	if d := time.Since(begin); d > 12*time.Second { // 5 s, on a machine with other things to do
		t.Errorf("held up for %v", d)
	}
	for _, s := range clients {
		if _, err := s.Wait(n.ctx()); !errors.Is(err, errdefs.ErrResourceExhausted) {
			t.Errorf("slow client: %v", err)
		}
	}
	out, _ := logged(t, spec.LogPath)
	checkLines(t, out, 50000)
}

func TestTerminal(t *testing.T) {
	n := newNode(t)
	spec := n.containerSpec(n.sandbox(), "stty size; read x; stty size; echo got $x; exit 3")
	spec.Spec.Process.Terminal, spec.Stdin = true, true
	spec.Spec.Process.ConsoleSize = &specs.Box{Width: 90, Height: 30}
	n.run(spec)
	n.waitLog(spec.LogPath, "30 90")
	if err := n.ResizeTTY(n.ctx(), spec.ID, 100, 40); err != nil {
		t.Fatal(err)
	}
	n.feed(spec.ID, "word\n")
	if exit := n.until(shim.EventExited, spec.ID).Exit; exit.Code != 3 {
		t.Errorf("exit: %+v", exit)
	}
	out, _ := logged(t, spec.LogPath)
	if !strings.Contains(out, "40 100\r\n") || !strings.Contains(out, "got word\r\n") {
		t.Errorf("log: %q", out)
	}
}

func TestExecTerminal(t *testing.T) {
	n := newNode(t)
	spec := n.containerSpec(n.sandbox(), "sleep 1000")
	n.run(spec)
	s, err := n.Exec(n.ctx(), &shim.ExecSpec{ContainerID: spec.ID, Process: &specs.Process{
		Args: []string{"/bin/sh", "-c", "read x; stty size; exit 2"}, Cwd: "/", Env: []string{"PATH=/bin"}, Terminal: true}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Resize(77, 11); err != nil {
		t.Fatal(err)
	}
	io.WriteString(s.TTY(), "go\n")
	text, _ := io.ReadAll(s.TTY()) // ends with EIO when the process has gone
	if !strings.Contains(string(text), "11 77\r\n") {
		t.Errorf("terminal: %q", text)
	}
	if exit, err := s.Wait(n.ctx()); err != nil || exit.Code != 2 {
		t.Errorf("exit: %+v %v", exit, err)
	}
}

func TestOOM(t *testing.T) {
	n := newNode(t)
	box := n.sandbox()
	limit := int64(32 << 20)
	limits := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit, Swap: &limit}}
	spec := n.containerSpec(box, "exec probe eat 100")
	spec.Spec.Linux.Resources = limits
	n.run(spec)
	if exit := n.until(shim.EventExited, spec.ID).Exit; !exit.OOMKilled || exit.Signal != 9 {
		t.Errorf("exit: %+v", exit)
	}
	// A process that is not init: the container lives on, the event comes.
	child := n.containerSpec(box, "probe eat 100; echo survived; sleep 1000")
	child.Spec.Linux.Resources = limits
	n.run(child)
	n.until(shim.EventOOM, child.ID)
	n.waitLog(child.LogPath, "survived")
	// Raising the limit lets it through.
	more := int64(256 << 20)
	if err := n.Update(n.ctx(), child.ID, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &more, Swap: &more}}); err != nil {
		t.Fatal(err)
	}
	if _, exit := n.execOut(child.ID, "/bin/probe", "eat", "100"); exit.Code != 0 {
		t.Errorf("after the limit was raised: %+v", exit)
	}
	// Without an OOM kill a SIGKILL is just that.
	if err := n.Update(n.ctx(), child.ID, &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(512))}}); err != nil {
		t.Fatal(err)
	}
	plain := n.containerSpec(box, "sleep 1000")
	plain.Spec.Linux.Resources = limits
	n.run(plain)
	if err := n.Signal(n.ctx(), plain.ID, int(unix.SIGKILL), true); err != nil {
		t.Fatal(err)
	}
	if exit := n.until(shim.EventExited, plain.ID).Exit; exit.OOMKilled || exit.Code != 137 {
		t.Errorf("exit: %+v", exit)
	}
}

func ptr[T any](v T) *T { return &v }

// BenchmarkLog is a container that writes as fast as it can: what goes through,
// and what of a CPU the shim needs for that.
func BenchmarkLog(b *testing.B) {
	for _, c := range []struct {
		name        string
		lines, size int
		maxSize     int64
	}{
		{"line=1KiB", 1 << 20, 1 << 10, 0},
		{"line=128", 4 << 20, 128, 0},
		{"line=128,rotated", 4 << 20, 128, 10 << 20},
	} {
		b.Run(c.name, func(b *testing.B) {
			n := newNode(b)
			box := n.sandbox()
			info, err := n.Info(n.ctx())
			if err != nil {
				b.Fatal(err)
			}
			before := cpuOf(b, info.PID)
			for b.Loop() {
				spec := n.containerSpec(box, fmt.Sprintf("exec probe lines %d %d", c.lines, c.size))
				spec.LogMaxSize, spec.LogMaxFiles = c.maxSize, 5
				n.run(spec)
				n.until(shim.EventExited, spec.ID)
				os.Remove(spec.LogPath)
			}
			b.SetBytes(int64(c.lines * c.size))
			b.ReportMetric((cpuOf(b, info.PID)-before).Seconds()/b.Elapsed().Seconds(), "shim-cpus")
		})
	}
}

// TestFloodIsHeldUp: a container that writes empty lines without end keeps
// within its log's limits all the time, and within its share of the shim's CPU.
func TestFloodIsHeldUp(t *testing.T) {
	n := newNode(t)
	spec := n.containerSpec(n.sandbox(), "exec yes ''")
	spec.LogMaxSize, spec.LogMaxFiles = 1<<20, 3
	n.run(spec)
	info, err := n.Info(n.ctx())
	if err != nil {
		t.Fatal(err)
	}
	n.waitLog(spec.LogPath, "stdout F")
	cpu, begin := cpuOf(t, info.PID), time.Now()
	for time.Since(begin) < 2*time.Second {
		var sum int64
		names, _ := filepath.Glob(spec.LogPath + "*")
		for _, f := range names {
			if st, err := os.Stat(f); err == nil {
				sum += st.Size()
			}
		}
		// A file may be made before the oldest one is removed.
		if sum > 4*(1<<20+64<<10) || len(names) > 4 {
			t.Fatalf("%d files of %d bytes, the limit is 3 of 1 MiB", len(names), sum)
		}
		time.Sleep(time.Millisecond)
	}
	used, wall := cpuOf(t, info.PID)-cpu, time.Since(begin)
	t.Logf("the shim used %v of CPU in %v", used, wall)
	// 0.4 of a CPU, 200 ms at first, and what this test itself asks for.
	if most := wall*45/100 + 500*time.Millisecond; used > most {
		t.Errorf("the shim used %v of CPU in %v", used, wall)
	}
	if err := n.Delete(n.ctx(), spec.ID); err != nil {
		t.Error(err)
	}
}
