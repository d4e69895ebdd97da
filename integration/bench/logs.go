package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"
)

// Lines as programs/payload.c writes them.
const (
	lineSize     = 100
	longLine     = 40000
	longEvery    = 10000
	maxLogRecord = 16 << 10 // a longer line is cut into P records of this size
)

// lineReader follows a CRI log and checks that each line comes once, whole and
// in its place.
type lineReader struct {
	f    *os.File
	r    *bufio.Reader
	part []byte // of the record that is being read
	line []byte // of P records
	next int64
	long bool // long lines are expected
}

func openLines(path string, long bool) (*lineReader, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return &lineReader{f: f, r: bufio.NewReaderSize(f, 1<<20), long: long}, nil
}

// read takes what is there.
func (l *lineReader) read() error {
	for {
		text, err := l.r.ReadSlice('\n')
		l.part = append(l.part, text...)
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
		if err := l.record(bytes.TrimSuffix(l.part, []byte("\n"))); err != nil {
			return fmt.Errorf("%s, behind line %d: %w", l.f.Name(), l.next-1, err)
		}
		l.part = l.part[:0]
	}
}

func (l *lineReader) record(text []byte) error {
	fields := bytes.SplitN(text, []byte(" "), 4)
	if len(fields) != 4 || string(fields[1]) != "stdout" {
		return fmt.Errorf("no record: %.80q", text)
	}
	switch string(fields[2]) {
	case "P":
		if len(fields[3]) != maxLogRecord {
			return fmt.Errorf("a P record of %d bytes", len(fields[3]))
		}
		l.line = append(l.line, fields[3]...)
		return nil
	case "F":
		l.line = append(l.line, fields[3]...)
	default:
		return fmt.Errorf("tag %q", fields[2])
	}
	size := lineSize
	if l.long && l.next%longEvery == longEvery-1 {
		size = longLine
	}
	if len(l.line) != size-1 {
		return fmt.Errorf("line of %d bytes, want %d", len(l.line), size-1)
	}
	if n, err := strconv.ParseInt(string(l.line[:9]), 10, 64); err != nil || n != l.next {
		return fmt.Errorf("line %.9q, want %d", l.line, l.next)
	}
	l.next++
	l.line = l.line[:0]
	return nil
}

// until reads on until that many lines have come.
func (l *lineReader) until(ctx context.Context, lines int64, limit time.Duration) error {
	var failed error
	err := until(ctx, fmt.Sprintf("%d lines in %s", lines, l.f.Name()), limit, func() bool {
		failed = l.read()
		return failed != nil || l.next >= lines
	})
	if failed != nil {
		return failed
	}
	if err != nil {
		return fmt.Errorf("%w (%d came)", err, l.next)
	}
	return nil
}

// measureFlood: one container writes as fast as it can.
func measureFlood(ctx context.Context, o options, n node, images *imageServer, out string, r *report) error {
	lines := o.flood << 20 / (lineSize + longLine/longEvery)
	defer n.runtimeOnly()()
	conn, err := dial(n.criSocket())
	if err != nil {
		return err
	}
	defer conn.Close()
	p, err := newCRIPod(ctx, conn, "flood", images.payload(), out, dir(o, "logs"), "=flood", strconv.FormatInt(lines, 10))
	if err != nil {
		return err
	}
	defer os.Remove(p.logPath)
	defer p.remove(ctx)
	settle(ctx)
	c0, t0 := cpuOfAll(), time.Now()
	if err := p.start(ctx); err != nil {
		return err
	}
	size := func() int64 {
		st, err := os.Stat(p.logPath)
		if err != nil {
			return 0
		}
		return st.Size()
	}
	// Read when it is over: a reader would take part of the machine.
	last := int64(-1)
	err = until(ctx, "the log's end", 10*time.Minute, func() bool {
		time.Sleep(100 * time.Millisecond)
		now := size()
		over := now == last && now > lines*lineSize
		last = now
		return over
	})
	if err != nil {
		return err
	}
	span, spent := time.Since(t0)-100*time.Millisecond, cpuOfAll()-c0
	l, err := openLines(p.logPath, true)
	if err != nil {
		return err
	}
	defer l.f.Close()
	verdict := "every line once, whole, in order"
	if err := l.until(ctx, lines, time.Second); err != nil {
		verdict = err.Error()
	}
	mibs := float64(o.flood) / span.Seconds()
	r.set(fmt.Sprintf("log: %d MiB from one container", o.flood), n.name(), fmt.Sprintf("%.0f MiB/s", mibs), 1/mibs)
	r.set("… CPU of the node", n.name(), fmt.Sprintf("%.2f s", spent.Seconds()), spent.Seconds())
	r.set("… exactness", n.name(), verdict, 0)
	return nil
}

// measureLines: many containers write steadily.
func measureLines(ctx context.Context, o options, n node, images *imageServer, out string, r *report) error {
	const rate, seconds = 1000, 10
	defer n.runtimeOnly()()
	conn, err := dial(n.criSocket())
	if err != nil {
		return err
	}
	defer conn.Close()
	pods := make([]*criPod, 0, o.pods)
	defer func() {
		for _, p := range pods {
			p.remove(ctx)
			os.Remove(p.logPath)
		}
	}()
	for i := range o.pods {
		p, err := newCRIPod(ctx, conn, fmt.Sprintf("lines-%d", i), images.payload(), out, dir(o, "logs"), "=lines", strconv.Itoa(rate*seconds), strconv.Itoa(rate))
		if p != nil {
			pods = append(pods, p)
		}
		if err != nil {
			return err
		}
	}
	for _, p := range pods {
		if err := p.start(ctx); err != nil {
			return err
		}
	}
	// All write for the span of the last start and a little.
	c0, t0 := cpuOfAll(), time.Now()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(seconds / 2 * time.Second):
	}
	spent, span := cpuOfAll()-c0, time.Since(t0)
	verdict := "every line once, whole, in order"
	for _, p := range pods {
		l, err := openLines(p.logPath, false)
		if err == nil {
			err = l.until(ctx, rate*seconds, time.Minute)
			l.f.Close()
		}
		if err != nil {
			verdict = err.Error()
			break
		}
	}
	share := 100 * float64(spent) / float64(span)
	r.set(fmt.Sprintf("log: %d containers, %d lines/s each: CPU", o.pods, rate), n.name(), fmt.Sprintf("%.1f %% of a core", share), share)
	r.set("… exactness of all", n.name(), verdict, 0)
	return nil
}
