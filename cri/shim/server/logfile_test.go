package server

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestOldLogs(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "0.log")
	for i := range 6 {
		os.WriteFile(fmt.Sprintf("%s.2026010%d-000000", path, i+1), fmt.Appendf(nil, "file %d", i+1), 0o640)
	}
	for _, other := range []string{"", ".notes", ".20260101-000000.tmp"} {
		os.WriteFile(path+other, []byte("other"), 0o640)
	}
	newOldLogs(path, 1000, 3, newPace(), slog.New(slog.DiscardHandler))
	want := []string{path, path + ".20260104-000000", path + ".20260105-000000", path + ".20260106-000000", path + ".notes"}
	if got, _ := filepath.Glob(path + "*"); strings.Join(got, " ") != strings.Join(want, " ") {
		t.Fatalf("at once: files %v, want %v", got, want)
	}
	want = []string{path, path + ".20260104-000000.gz", path + ".20260105-000000.gz", path + ".20260106-000000", path + ".notes"}
	awaitFiles(t, path, want)
	f, err := os.Open(want[1])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := io.ReadAll(z); string(text) != "file 4" {
		t.Errorf("compressed: %q", text)
	}
}

func awaitFiles(t *testing.T, path string, want []string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		got, _ := filepath.Glob(path + "*")
		if strings.Join(got, " ") == strings.Join(want, " ") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("files %v, want %v", got, want)
		}
	}
}

// TestOnlyLogsAreCompressed: what a pod puts in the place of a rotated log is
// neither followed nor waited for, nor read without end.
func TestOnlyLogsAreCompressed(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "0.log")
	names := make([]string, 5)
	for i := range names {
		names[i] = fmt.Sprintf("%s.2026010%d-000000", path, i+1)
	}
	secret := filepath.Join(dir, "secret")
	os.WriteFile(secret, []byte("secret"), 0o600)
	if err := unix.Mkfifo(names[0], 0o600); err != nil {
		t.Fatal(err)
	}
	os.Symlink(secret, names[1])
	f, err := os.Create(names[2])
	if err != nil {
		t.Fatal(err)
	}
	f.Truncate(1 << 40)
	f.Close()
	for _, n := range names[3:] {
		os.WriteFile(n, []byte("a log"), 0o640)
	}
	newOldLogs(path, 1000, 5, newPace(), slog.New(slog.DiscardHandler))
	awaitFiles(t, path, []string{names[0], names[1], names[2], names[3] + ".gz", names[4]})
}

// TestNoLogFileIsLongerThanItsLimit: however much a batch grows by being
// formatted, no file is longer than its limit by more than a record, there are
// no more files than may be, and nothing is lost while there are not.
func TestNoLogFileIsLongerThanItsLimit(t *testing.T) {
	const limit, files = 64 << 10, 4
	for _, c := range []struct{ name, text string }{
		{"empty lines", strings.Repeat("\n", 64<<10)},
		{"short lines", strings.Repeat("abc\n", 16<<10)},
		{"long lines", strings.Repeat("x", 3*maxLine+5) + "\n"},
		{"no line at all", strings.Repeat("x", 60<<10)},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPump(t)
			p.out.file.maxSize = limit
			p.out.file.old = newOldLogs(p.out.file.path, limit, files-1, p.out.pace, p.out.log)
			for range 20 {
				if _, err := p.fifo.WriteString(c.text); err != nil {
					t.Fatal(err)
				}
				p.out.drain()
				names, _ := filepath.Glob(p.out.file.path + "*")
				if len(names) > files {
					t.Fatalf("%d files: %v", len(names), names)
				}
				for _, n := range names {
					if st, err := os.Stat(n); err == nil && st.Size() > limit+maxLine+recordOverhead {
						t.Fatalf("%s has %d bytes, the limit is %d", n, st.Size(), limit)
					}
				}
			}
			p.out.close()
		})
	}
}

func TestFits(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 123456789, time.FixedZone("", 3600))
	text := []byte(strings.Repeat("\n\n\nabc\n", 1000) + strings.Repeat("x", 3*maxLine) + "\n" + strings.Repeat("yy\n", 500))
	for _, room := range []int64{1, 46, 100, 1000, 20000, 100000, 1 << 20} {
		for rest, data := "begun", text; len(data) > 0; {
			n := fits(len(rest), data, room)
			if n < 1 || n > len(data) {
				t.Fatalf("%d of %d bytes", n, len(data))
			}
			var f formatter
			var buf bytes.Buffer
			f.begin(&buf, at, "stderr")
			left := f.lines([]byte(rest), data[:n], false)
			if records := bytes.Count(buf.Bytes(), []byte("\n")); int64(buf.Len()) > room && records > 2 {
				t.Errorf("room %d: %d bytes in %d records", room, buf.Len(), records)
			}
			rest, data = string(left[0])+string(left[1]), data[n:]
		}
	}
}

func TestFormatter(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)
	long := strings.Repeat("x", maxLine)
	for _, c := range []struct {
		name       string
		rest, data string
		end        bool
		records    []string // tag and text
		left       string
	}{
		{"nothing", "", "", false, nil, ""},
		{"lines", "", "a\n\nb\n", false, []string{"F a", "F ", "F b"}, ""},
		{"unfinished", "", "a\nb", false, []string{"F a"}, "b"},
		{"finished later", "b", "c\n", false, []string{"F bc"}, ""},
		{"still unfinished", "b", "c", false, nil, "bc"},
		{"end", "b", "", true, []string{"P b"}, ""},
		{"end with data", "b", "c", true, []string{"P bc"}, ""},
		{"exactly the limit", "", long + "\n", false, []string{"F " + long}, ""},
		{"limit without newline", "", long, false, nil, long},
		{"one over", "", long + "y\n", false, []string{"P " + long, "F y"}, ""},
		{"one over in two", long, "y", false, []string{"P " + long}, "y"},
		{"limit, then newline", long, "\n", false, []string{"F " + long}, ""},
		{"three limits", "", long + long + long, true, []string{"P " + long, "P " + long, "P " + long}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var f formatter
			var buf bytes.Buffer
			f.begin(&buf, at, "stdout")
			left := f.lines([]byte(c.rest), []byte(c.data), c.end)
			var want strings.Builder
			for _, r := range c.records {
				want.WriteString("2026-01-02T03:04:05.0000006Z stdout " + r + "\n")
			}
			if buf.String() != want.String() {
				t.Errorf("records %.200q, want %.200q", buf.String(), want.String())
			}
			if got := string(left[0]) + string(left[1]); got != c.left {
				t.Errorf("left %.50q, want %.50q", got, c.left)
			}
		})
	}
}
