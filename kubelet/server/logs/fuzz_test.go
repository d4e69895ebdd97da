package logs

import (
	"bytes"
	"compress/gzip"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// FuzzRead: whatever is in a container's log files, which the container has
// written in part, reading them ends, keeps to the limits, and the last lines
// are the last of all.
func FuzzRead(f *testing.F) {
	const first = "2024-01-02T03:04:05.000000006Z stdout F hello\n2024-01-02T03:04:06Z stderr P par\n2024-01-02T03:04:07Z stderr F tial\n"
	f.Add([]byte(first), []byte(first), int64(1), uint16(0), uint8(0))
	f.Add([]byte(first), []byte("2024-01-02T03:04:08Z stdout P unended\n2024-01-02T03:04:08Z stdout F"), int64(2), uint16(9), uint8(3))
	f.Add([]byte("no log\n\n\x00\xff"), []byte(strings.Repeat("x", 70_000)), int64(3), uint16(1), uint8(5))
	f.Add([]byte(""), []byte("2024-01-02T03:04:08Z stdout F\n2024-01-02T03:04:08Z stdout F:x \n2024-99-99T03:04:08Z stdout F late\n"), int64(0), uint16(0), uint8(2))
	f.Fuzz(func(t *testing.T, old, now []byte, tail int64, limit uint16, flags uint8) {
		dir := t.TempDir()
		path := filepath.Join(dir, "0.log")
		rotated, name := old, path+".20240102-030405"
		if flags&1 != 0 {
			var z bytes.Buffer
			w := gzip.NewWriter(&z)
			w.Write(old)
			w.Close()
			rotated, name = z.Bytes(), name+".gz"
		}
		if flags&16 != 0 { // not even compressed
			rotated = old
		}
		for p, b := range map[string][]byte{path: now, name: rotated} {
			if err := os.WriteFile(p, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		o := Options{Tail: -1, Timestamps: flags&2 != 0}
		if flags&4 != 0 {
			o.Stream = "stderr"
		}
		if flags&8 != 0 {
			o.Since = time.Date(2024, 1, 2, 3, 4, 6, 0, time.UTC)
		}
		read := func(o Options) (string, error) {
			var out strings.Builder
			err := Read(context.Background(), path, o, nil, &out)
			return out.String(), err
		}
		whole, err := read(o)
		if len(whole) > 2*(len(old)+len(now)) {
			t.Fatalf("%d bytes were read of %d", len(whole), len(old)+len(now))
		}
		o.LimitBytes = int64(limit)
		if some, _ := read(o); limit > 0 && (len(some) > int(limit) || !strings.HasPrefix(whole, some)) {
			t.Fatalf("limit %d: %q of %q", limit, some, whole)
		}
		o.LimitBytes, o.Tail = 0, max(tail, 0)%64
		last, terr := read(o)
		if err != nil || terr != nil {
			return // entries too long, files that are not compressed
		}
		// Lines of two streams may lie in each other: what the last of both are is
		// nobody's to say.
		if o.Since.IsZero() && o.Stream != "" && !strings.HasSuffix(whole, last) {
			t.Fatalf("the last %d lines are not the last of all:\n%q\n%q", o.Tail, last, whole)
		}
		if n := strings.Count(last, "\n"); int64(n) > o.Tail+2 { // an open line of each stream, and what others mix into it
			t.Fatalf("%d lines instead of %d", n, o.Tail)
		}
	})
}
