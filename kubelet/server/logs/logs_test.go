package logs

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func stamp(i int) string {
	return time.Date(2026, 1, 2, 3, 4, 0, i, time.UTC).Add(time.Duration(i) * time.Second).Format(time.RFC3339Nano)
}

func lines(from, to int) string {
	var b strings.Builder
	for i := from; i < to; i++ {
		fmt.Fprintf(&b, "%s stdout F line %d\n", stamp(i), i)
	}
	return b.String()
}

func want(from, to int) string {
	var b strings.Builder
	for i := from; i < to; i++ {
		fmt.Fprintf(&b, "line %d\n", i)
	}
	return b.String()
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if strings.HasSuffix(path, ".gz") {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		z.Write([]byte(text))
		z.Close()
		text = b.String()
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// rotatedLog writes 5 files: lines 0-9 (number), 10-19 and 20-29 compressed, 30-39, 40-49 current.
func rotatedLog(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "0.log")
	write(t, path+".1", lines(0, 10))
	write(t, path+".20260101-000000.gz", lines(10, 20))
	write(t, path+".20260101-000001.gz", lines(20, 30))
	write(t, path+".20260101-000002", lines(30, 40))
	write(t, path+".20260101-000002.gz", "half compressed")
	write(t, path+".20260101-000003.gz.tmp", "being written")
	write(t, path, lines(40, 50))
	return path
}

func read(t *testing.T, path string, o Options) string {
	t.Helper()
	var out bytes.Buffer
	if err := Read(t.Context(), path, o, nil, &out); err != nil {
		t.Fatalf("Read(%+v): %v", o, err)
	}
	return out.String()
}

func TestReadAcrossRotatedFiles(t *testing.T) {
	path := rotatedLog(t)
	if got := read(t, path, Options{Tail: -1}); got != want(0, 50) {
		t.Errorf("all: got %q", got)
	}
	for n := int64(0); n <= 55; n++ {
		if got, want := read(t, path, Options{Tail: n}), want(int(max(0, 50-n)), 50); got != want {
			t.Errorf("tail %d: got %q, want %q", n, got, want)
		}
	}
}

// The last line is whole also when the log was rotated between its parts.
func TestTailOfALineAcrossRotatedFiles(t *testing.T) {
	const at = "2026-01-01T00:00:00Z stdout "
	for name, files := range map[string][]string{
		"plain":      {at + "F one\n" + at + "P a\n", at + "P b\n", at + "F c\n"},
		"compressed": {at + "F one\n" + at + "P a\n", "gz" + at + "P b\n", at + "F c\n"},
		"both":       {"gz" + at + "F one\n" + at + "P a\n", "gz" + at + "P b\n", at + "F c\n"},
		"an empty":   {at + "F one\n" + at + "P ab\n", "", at + "F c\n"},
		"others":     {at + "F one\n" + at + "P ab\n", strings.ReplaceAll(at, "stdout", "stderr") + "F x\n", at + "F c\n"},
		"unended":    {at + "F one\n" + at + "P a\n", at + "P b\n", at + "P c\n"},
	} {
		path := filepath.Join(t.TempDir(), "0.log")
		for i, text := range files {
			to := path
			if i < len(files)-1 {
				to = fmt.Sprintf("%s.20260101-00000%d", path, i)
			}
			if z, ok := strings.CutPrefix(text, "gz"); ok {
				text, to = z, to+".gz"
			}
			write(t, to, text)
		}
		for tail, want := range map[int64]string{1: "abc", 2: "one\nabc", 3: "one\nabc"} {
			if got := read(t, path, Options{Tail: tail, Stream: "stdout"}); strings.TrimSuffix(got, "\n") != want {
				t.Errorf("%s, tail %d: %q, want %q", name, tail, got, want)
			}
		}
	}
}

func TestReadSince(t *testing.T) {
	path := rotatedLog(t)
	at, _ := time.Parse(time.RFC3339Nano, stamp(33))
	if got := read(t, path, Options{Tail: -1, Since: at}); got != want(33, 50) {
		t.Errorf("since: got %q", got)
	}
	if got := read(t, path, Options{Tail: 5, Since: at}); got != want(45, 50) {
		t.Errorf("since and tail: got %q", got)
	}
	if got := read(t, path, Options{Tail: -1, Since: time.Now().Add(time.Hour)}); got != "" {
		t.Errorf("since in the future: got %q", got)
	}
}

func TestReadFormats(t *testing.T) {
	text := stamp(1) + " stdout P one \n" +
		stamp(2) + " stderr F other\n" +
		stamp(3) + " stdout F line\n" +
		"torn by a crash\n" +
		stamp(4) + " stdout F\n" +
		stamp(5) + " stdout F:tag  two  spaces\n" +
		stamp(6) + " stderr P unended"
	path := filepath.Join(t.TempDir(), "0.log")
	write(t, path, text)
	for _, tt := range []struct {
		name string
		o    Options
		want string
	}{
		{"all", Options{Tail: -1}, "one other\nline\n\n two  spaces\nunended"},
		{"timestamps", Options{Tail: -1, Timestamps: true, Stream: "stdout"}, stamp(1) + " one line\n" + stamp(4) + " \n" + stamp(5) + "  two  spaces\n"},
		{"stderr", Options{Tail: -1, Stream: "stderr"}, "other\nunended"},
		{"tail counts the unended line", Options{Tail: 1}, "unended"},
		{"tail of one stream", Options{Tail: 2, Stream: "stdout"}, "\n two  spaces\n"},
		{"tail joins parts", Options{Tail: 3, Stream: "stdout"}, "one line\n\n two  spaces\n"},
		{"limit", Options{Tail: -1, LimitBytes: 6}, "one ot"},
		{"limit at the end", Options{Tail: 1, LimitBytes: 7}, "unended"},
		{"limit beyond", Options{Tail: 1, LimitBytes: 70}, "unended"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := read(t, path, tt.o); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestTailCrossesBlocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	var text, last strings.Builder
	for i := range 40 {
		l := fmt.Sprintf("%d-%s", i, strings.Repeat("x", 7000+i))
		fmt.Fprintf(&text, "%s stdout F %s\n", stamp(i), l)
		if i >= 10 {
			last.WriteString(l + "\n")
		}
	}
	write(t, path, text.String())
	if got := read(t, path, Options{Tail: 30}); got != last.String() {
		t.Errorf("got %d bytes, want %d", len(got), last.Len())
	}
}

func TestReadRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "0.log")
	if err := Read(t.Context(), path, Options{Tail: -1}, nil, &bytes.Buffer{}); !errdefs.IsNotFound(err) {
		t.Errorf("no log: got %v, want not found", err)
	}
	secret := filepath.Join(dir, "secret")
	write(t, secret, lines(0, 1))
	if err := os.Symlink(secret, path); err != nil {
		t.Fatal(err)
	}
	if err := Read(t.Context(), path, Options{Tail: -1}, nil, &bytes.Buffer{}); err == nil {
		t.Error("followed a symbolic link")
	}
	long := filepath.Join(dir, "1.log")
	write(t, long, strings.Repeat("x", 2*maxEntry))
	for _, tail := range []int64{-1, 3} {
		if err := Read(t.Context(), long, Options{Tail: tail}, nil, &bytes.Buffer{}); err == nil {
			t.Errorf("tail %d: accepted an endless entry", tail)
		}
	}
}

// output collects what a follower writes and lets a test wait for it.
type output struct {
	mu   sync.Mutex
	b    strings.Builder
	more chan struct{}
	fail error
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.fail != nil {
		return 0, o.fail
	}
	o.b.Write(b)
	select {
	case o.more <- struct{}{}:
	default:
	}
	return len(b), nil
}

func (o *output) wait(t *testing.T, want string) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		o.mu.Lock()
		got := o.b.String()
		o.mu.Unlock()
		if got == want {
			return
		}
		select {
		case <-o.more:
		case <-deadline:
			t.Fatalf("got %q, want %q", got, want)
		}
	}
}

func appendTo(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = f.WriteString(text)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestFollow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	write(t, path, lines(0, 5))
	out := &output{more: make(chan struct{}, 1)}
	done, result := make(chan struct{}), make(chan error, 1)
	go func() { result <- Read(context.Background(), path, Options{Tail: 2, Follow: true}, done, out) }()
	out.wait(t, want(3, 5))

	whole := lines(5, 6)
	appendTo(t, path, whole[:20]) // an entry in two writes
	appendTo(t, path, whole[20:])
	out.wait(t, want(3, 6))

	// Two rotations, the first one compressed already when the reader looks.
	appendTo(t, path, lines(6, 8))
	rename(t, path, path+".20260101-000000")
	appendTo(t, path, lines(8, 10))
	write(t, path+".20260101-000000.gz", lines(0, 8))
	if err := os.Remove(path + ".20260101-000000"); err != nil {
		t.Fatal(err)
	}
	rename(t, path, path+".20260101-000001")
	appendTo(t, path, lines(10, 12))
	out.wait(t, want(3, 12))

	appendTo(t, path, lines(12, 13))
	close(done)
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	out.wait(t, want(3, 13))
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestFollowEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	write(t, path, lines(0, 5))

	ended := make(chan struct{})
	close(ended)
	var out bytes.Buffer
	if err := Read(t.Context(), path, Options{Tail: -1, Follow: true}, ended, &out); err != nil || out.String() != want(0, 5) {
		t.Errorf("container gone: got %q, %v", out.String(), err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	o := &output{more: make(chan struct{}, 1)}
	go func() { result <- Read(ctx, path, Options{Tail: -1, Follow: true}, nil, o) }()
	o.wait(t, want(0, 5))
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("client gone: got %v", err)
	}

	broken := errors.New("broken pipe")
	if err := Read(t.Context(), path, Options{Tail: -1, Follow: true}, nil, &output{fail: broken}); !errors.Is(err, broken) {
		t.Errorf("writer broken: got %v", err)
	}

	go func() {
		result <- Read(t.Context(), path, Options{Tail: -1, Follow: true, LimitBytes: 10}, nil, o)
	}()
	if err := <-result; err != nil {
		t.Errorf("limit: got %v", err)
	}
}
