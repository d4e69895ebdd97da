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
)

func TestTidyLogs(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "0.log")
	for i := range 6 {
		os.WriteFile(fmt.Sprintf("%s.2026010%d-000000", path, i+1), fmt.Appendf(nil, "file %d", i+1), 0o640)
	}
	for _, other := range []string{"", ".notes", ".20260101-000000.tmp"} {
		os.WriteFile(path+other, []byte("other"), 0o640)
	}
	tidyLogs(path, 4, slog.New(slog.DiscardHandler))
	got, _ := filepath.Glob(path + "*")
	want := []string{path, path + ".20260104-000000.gz", path + ".20260105-000000.gz", path + ".20260106-000000", path + ".notes"}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Fatalf("files %v, want %v", got, want)
	}
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
