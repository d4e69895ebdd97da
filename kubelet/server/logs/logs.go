// Package logs reads the log files of containers in the CRI format: the
// current file and the rotated ones, plain or compressed, as one text.
//
// The format is one entry a line, "<RFC 3339 time> <stream> <tags> <content>",
// where the first tag is F for a whole line or its end and P for a part of one
// (https://github.com/kubernetes/design-proposals-archive/blob/main/node/kubelet-cri-logging.md).
package logs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/fsnotify/fsnotify"
)

// Options say what to read, with the meaning of the pod log API's options
// (v1.PodLogOptions).
type Options struct {
	// Tail is how many lines from the end are read; negative: all.
	Tail int64
	// Since drops entries before it; zero: none.
	Since time.Time
	// Timestamps puts each line's time before it.
	Timestamps bool
	// LimitBytes ends the output after that many bytes; 0: no limit.
	LimitBytes int64
	// Follow goes on with what is written until the done channel closes.
	Follow bool
	// Stream reads only "stdout" or "stderr"; "": both.
	Stream string
}

// flusher is implemented by writers that hold text back (http.ResponseWriter).
type flusher interface{ Flush() }

// maxEntry bounds one entry in bytes. The CRI splits lines at 16 KiB; anything
// longer is no log of ours.
const maxEntry = 1 << 20

// errLimit ends a copy when LimitBytes are written.
var errLimit = errors.New("limit reached")

// Read writes the log at path to out. With Follow it goes on until done closes
// and what was written by then is out. It returns errdefs.ErrNotFound when
// there is no such log, ctx's error when that ends first, and out's error when
// the client has gone.
func Read(ctx context.Context, path string, o Options, done <-chan struct{}, out io.Writer) error {
	var changed <-chan fsnotify.Event
	var broken <-chan error
	if o.Follow {
		// Watch before reading, or what is written in between goes unnoticed.
		w, err := fsnotify.NewWatcher()
		if err != nil {
			return fmt.Errorf("watch log %s: %w", path, err)
		}
		defer w.Close()
		if err := w.Add(filepath.Dir(path)); err != nil {
			return notFound(path, err)
		}
		changed, broken = w.Events, w.Errors
	}
	files, _, err := open(path)
	if err != nil {
		return notFound(path, err)
	}
	// The container may have ended before: then what is there now is all.
	ended := false
	select {
	case <-done:
		ended = true
	default:
	}
	defer func() { closeAll(files) }()

	first, offset, skip, err := start(files, o)
	if err != nil {
		return err
	}
	closeAll(files[:first])
	files = files[first:]

	p := &printer{out: bufio.NewWriterSize(out, 32<<10), opts: o, skip: skip, left: o.LimitBytes}
	flush := func() error {
		if err := p.out.Flush(); err != nil {
			return err
		}
		if f, ok := out.(flusher); ok {
			f.Flush()
		}
		return nil
	}
	finish := func() error {
		if err := p.end(); err != nil && !errors.Is(err, errLimit) {
			return err
		}
		return flush()
	}
	for i, f := range files {
		r, err := f.reader(offset)
		if err != nil {
			return err
		}
		offset = 0
		if err := p.copy(ctx, r); err != nil {
			if errors.Is(err, errLimit) {
				return flush()
			}
			return fmt.Errorf("read log %s: %w", f.Name(), err)
		}
		if i < len(files)-1 {
			if err := p.end(); err != nil {
				return flush()
			}
		}
	}
	if !o.Follow {
		return finish()
	}

	f := files[len(files)-1]
	for {
		if err := flush(); err != nil {
			return err
		}
		if !ended {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-done:
				ended = true
			case err := <-broken:
				// An overflow only says that events were dropped: look.
				if err != nil && !errors.Is(err, fsnotify.ErrEventOverflow) {
					return fmt.Errorf("watch log %s: %w", path, err)
				}
			case <-changed:
				for drained := false; !drained; { // one look serves all that queued up
					select {
					case <-changed:
					default:
						drained = true
					}
				}
			}
		}
		next, err := after(path, f)
		if err != nil {
			return err
		}
		for { // f to its end, then each newer file
			if f.gz {
				err = nil // compressed files are complete when they appear, and were read at once
			} else {
				err = p.copy(ctx, f.File)
			}
			if err == nil && len(next) > 0 {
				err = p.end()
			}
			if err != nil {
				closeAll(next)
				if errors.Is(err, errLimit) {
					return flush()
				}
				return fmt.Errorf("read log %s: %w", f.Name(), err)
			}
			if len(next) == 0 {
				break
			}
			f.Close()
			f, next = next[0], next[1:]
			files = []*file{f}
			if f.gz {
				r, err := f.reader(0)
				if err == nil {
					err = p.copy(ctx, r)
				}
				if err != nil {
					closeAll(next)
					return fmt.Errorf("read log %s: %w", f.Name(), err)
				}
			}
		}
		if ended {
			return finish()
		}
	}
}

func notFound(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("log %s: %w", path, errdefs.ErrNotFound)
	}
	return fmt.Errorf("open log %s: %w", path, err)
}

// start finds where reading begins: the first file, the offset in it and how
// many lines to skip from there.
func start(files []*file, o Options) (first int, offset, skip int64, err error) {
	if o.Tail < 0 {
		return firstSince(files, o.Since), 0, 0, nil
	}
	last := len(files) - 1
	want := o.Tail
	for i := last; i >= 0; i-- {
		if files[i].gz {
			r, err := files[i].reader(0)
			if err != nil {
				return 0, 0, 0, err
			}
			n, err := countLines(r, o.Stream)
			if err != nil {
				return 0, 0, 0, fmt.Errorf("read log %s: %w", files[i].Name(), err)
			}
			if n >= want {
				return i, 0, n - want, nil
			}
			want -= n
			continue
		}
		st, err := files[i].Stat()
		if err != nil {
			return 0, 0, 0, err
		}
		off, n, err := tailOffset(files[i], st.Size(), want, o.Stream, i == last)
		if err != nil {
			return 0, 0, 0, fmt.Errorf("read log %s: %w", files[i].Name(), err)
		}
		if n >= want && off == 0 && i > 0 {
			return lineBefore(files, i, o.Stream)
		}
		if n >= want {
			return i, off, 0, nil
		}
		want -= n
	}
	return 0, 0, 0, nil
}

// lineBefore finds where the line begins that the start of file i goes on with:
// a rotation may come between the parts of a long one.
func lineBefore(files []*file, i int, stream string) (first int, offset, skip int64, err error) {
	for ; i > 0; i-- {
		f := files[i-1]
		if f.gz {
			r, err := f.reader(0)
			if err != nil {
				return 0, 0, 0, err
			}
			n, err := countLines(r, stream)
			if err != nil {
				return 0, 0, 0, fmt.Errorf("read log %s: %w", f.Name(), err)
			}
			if n > 0 {
				return i - 1, 0, n, nil // whatever is after its last whole line
			}
			continue
		}
		st, err := f.Stat()
		if err != nil {
			return 0, 0, 0, err
		}
		off, _, err := tailOffset(f, st.Size(), 0, stream, false)
		if err != nil {
			return 0, 0, 0, fmt.Errorf("read log %s: %w", f.Name(), err)
		}
		switch off {
		case 0:
			continue // nothing, or nothing but parts of it
		case st.Size():
			return i, 0, 0, nil
		}
		return i - 1, off, 0, nil
	}
	return 0, 0, 0, nil
}

// firstSince is the first file that may have entries at or after since: a
// rotated file was last written before its successor's first entry.
func firstSince(files []*file, since time.Time) int {
	if since.IsZero() {
		return 0
	}
	for i := 0; i < len(files)-1; i++ {
		st, err := files[i].Stat()
		if err != nil || !st.ModTime().Before(since) {
			return i
		}
	}
	return len(files) - 1
}

// endsLine says whether the entry (without its newline) ends a line of stream.
func endsLine(b []byte, stream string) bool {
	e, ok := parse(b)
	return ok && !e.partial && (stream == "" || string(e.stream) == stream)
}

func countLines(r io.Reader, stream string) (n int64, err error) {
	err = entries(r, func(b []byte) error {
		if endsLine(b, stream) {
			n++
		}
		return nil
	})
	return n, err
}

// tailOffset looks backwards from the end of a file of size bytes for the start
// of its last want lines. It returns how many lines the file has if those are
// fewer. A line that the container has not ended yet counts in the last file; of
// another, want 0 finds the start of what its end leaves open.
func tailOffset(r io.ReaderAt, size, want int64, stream string, last bool) (offset, lines int64, err error) {
	const block = 64 << 10
	if want == 0 && last {
		return size, 0, nil
	}
	var (
		buf    = make([]byte, 0, 2*block)
		pos    = size // file offset of buf[0]
		first  = true // no entry seen yet
		chunk  = make([]byte, block)
		begins = size // start of the entry last looked at
	)
	// see takes the entry at off, going backwards, and says whether the line
	// after it is where the tail starts.
	see := func(b []byte) bool {
		e, ok := parse(b)
		if !ok || (stream != "" && string(e.stream) != stream) {
			return false
		}
		if e.partial {
			if first && last {
				lines++ // unended line
			}
			first = false
			return false
		}
		first = false
		if lines == want {
			return true
		}
		lines++
		return false
	}
	for pos > 0 {
		n := min(int64(block), pos)
		if _, err := r.ReadAt(chunk[:n], pos-n); err != nil {
			return 0, 0, err
		}
		pos -= n
		if len(buf)+int(n) > maxEntry+block {
			return 0, 0, fmt.Errorf("entry at offset %d is longer than %d bytes", pos, maxEntry)
		}
		buf = append(append(make([]byte, 0, len(buf)+int(n)), chunk[:n]...), buf...)
		// Every entry whose start is known, from the back.
		for {
			body := buf
			if len(body) > 0 && body[len(body)-1] == '\n' {
				body = body[:len(body)-1]
			}
			nl := bytes.LastIndexByte(body, '\n')
			if nl < 0 {
				break
			}
			if see(body[nl+1:]) {
				return begins, lines, nil
			}
			begins = pos + int64(nl) + 1
			buf = buf[:nl+1]
		}
	}
	if len(buf) > 0 && see(bytes.TrimSuffix(buf, []byte("\n"))) {
		return begins, lines, nil
	}
	return 0, lines, nil
}

// entries calls f with each entry of r without its newline; the slice is valid
// during the call only. A last entry without newline is passed too.
func entries(r io.Reader, f func([]byte) error) error {
	br := bufio.NewReaderSize(r, 64<<10)
	var long []byte
	for {
		b, err := br.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			if len(long)+len(b) > maxEntry {
				return fmt.Errorf("entry is longer than %d bytes", maxEntry)
			}
			long = append(long, b...)
			continue
		case err == nil:
			b = b[:len(b)-1]
		case !errors.Is(err, io.EOF):
			return err
		}
		if len(long) > 0 {
			b = append(long, b...)
			long = long[:0]
		}
		if len(b) > 0 || err == nil {
			if err := f(b); err != nil {
				return err
			}
		}
		if err != nil {
			return nil
		}
	}
}

type entry struct {
	time    []byte
	stream  []byte
	partial bool
	content []byte
}

func parse(b []byte) (e entry, ok bool) {
	e.time, b, ok = bytes.Cut(b, []byte(" "))
	if !ok || len(e.time) < len("2006-01-02T15:04:05Z") {
		return e, false
	}
	e.stream, b, ok = bytes.Cut(b, []byte(" "))
	if !ok || (string(e.stream) != "stdout" && string(e.stream) != "stderr") {
		return e, false
	}
	tags, content, _ := bytes.Cut(b, []byte(" ")) // an empty line may have lost its space
	tag, _, _ := bytes.Cut(tags, []byte(":"))
	switch string(tag) {
	case "P":
		e.partial = true
	case "F":
	default:
		return e, false
	}
	e.content = content
	return e, true
}

// printer formats entries.
type printer struct {
	out  *bufio.Writer
	opts Options
	skip int64  // lines still to skip
	left int64  // bytes of LimitBytes still to write
	rest []byte // an entry whose end is not there yet
	buf  []byte
	// A line of each stream is open when its last entry was partial.
	open [2]bool
}

func index(stream []byte) int {
	if string(stream) == "stderr" {
		return 1
	}
	return 0
}

// copy prints the entries of r to its end and keeps an unfinished one for the
// next call.
func (p *printer) copy(ctx context.Context, r io.Reader) error {
	if p.buf == nil {
		p.buf = make([]byte, 32<<10)
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := r.Read(p.buf)
		b := p.buf[:n]
		for len(b) > 0 {
			line, more, whole := bytes.Cut(b, []byte("\n"))
			if !whole {
				if len(p.rest)+len(line) > maxEntry {
					return fmt.Errorf("entry is longer than %d bytes", maxEntry)
				}
				p.rest = append(p.rest, line...)
				break
			}
			if len(p.rest) > 0 {
				line = append(p.rest, line...)
				p.rest = p.rest[:0]
			}
			if err := p.print(line); err != nil {
				return err
			}
			b = more
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// end prints an entry that a crash left without its newline.
func (p *printer) end() error {
	rest := p.rest
	p.rest = nil
	if len(rest) == 0 {
		return nil
	}
	return p.print(rest)
}

func (p *printer) print(b []byte) error {
	e, ok := parse(b)
	if !ok {
		return nil // torn by a crash or not ours: the rest is still worth reading
	}
	if p.opts.Stream != "" && string(e.stream) != p.opts.Stream {
		return nil
	}
	if p.skip > 0 {
		if !e.partial {
			p.skip--
		}
		return nil
	}
	if !p.opts.Since.IsZero() {
		t, err := time.Parse(time.RFC3339Nano, string(e.time))
		if err != nil || t.Before(p.opts.Since) {
			return nil
		}
	}
	i := index(e.stream)
	if p.opts.Timestamps && !p.open[i] {
		if err := p.write(e.time); err != nil {
			return err
		}
		if err := p.write([]byte(" ")); err != nil {
			return err
		}
	}
	p.open[i] = e.partial
	if err := p.write(e.content); err != nil {
		return err
	}
	if e.partial {
		return nil
	}
	return p.write([]byte("\n"))
}

func (p *printer) write(b []byte) error {
	if p.opts.LimitBytes > 0 {
		if int64(len(b)) >= p.left {
			b = b[:p.left]
			p.left = 0
			if _, err := p.out.Write(b); err != nil {
				return err
			}
			return errLimit
		}
		p.left -= int64(len(b))
	}
	_, err := p.out.Write(b)
	return err
}
