package server

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/podd-runtime/podd/cri/shim"
)

const (
	// keepEvents is how far back the log reaches: a hundred pods' whole lives.
	keepEvents = 4096
	// seqSkip is left out after a damaged log, so that no number is repeated.
	seqSkip = 1 << 20
)

// eventLog numbers what happens, keeps it in a file for the next shim and
// hands it to subscribers. The file has one JSON document a line; it is
// rewritten with the last keepEvents when it holds twice as many.
//
// Neither the start nor an event needs room on the file system. What could not
// be written is written with the next event; should the shim end before, the
// file of marks says which number was the last, so that none is given out twice:
// who had heard of it would not hear the other. Its few bytes are there from
// the beginning and are written over.
type eventLog struct {
	path string
	log  *slog.Logger

	mu     sync.Mutex
	file   *os.File // nil: could not be opened yet
	size   int64    // of the file, whole lines
	lines  int
	last   uint64        // highest number given out
	tail   []shim.Event  // the last keepEvents, ascending
	behind int           // events at the end of tail that are not in the file
	more   chan struct{} // closed and replaced at every append
}

func openEvents(path string, log *slog.Logger) (*eventLog, error) {
	l := &eventLog{path: path, log: log, more: make(chan struct{})}
	data, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("read event log: %w", err)
	}
	damaged := l.read(data)
	if damaged {
		l.log.Error("event log was damaged, numbers skip ahead", "path", path, "last", l.last)
		l.last += seqSkip
	}
	if mark := l.mark(); mark > l.last {
		l.log.Error("events were not written, their numbers are left out", "path", path, "from", l.last+1, "to", mark)
		l.last = mark
	}
	l.trim()
	whole := int64(bytes.LastIndexByte(data, '\n') + 1)
	if err := l.take(damaged, whole); err != nil { // tried again with the next event
		l.log.Error("open event log", "error", err)
		l.behind = len(l.tail)
	}
	if err := l.reserveMark(); err != nil {
		l.log.Error("reserve the event log's mark", "error", err)
	}
	return l, nil
}

// take opens the file, of whose bytes the first ones are whole lines. One that is
// damaged or long is made anew if there is room for that.
func (l *eventLog) take(damaged bool, whole int64) error {
	if damaged || l.lines >= 2*keepEvents {
		err := l.rewrite()
		if err == nil {
			return nil
		}
		l.log.Error("compact event log", "error", err)
	}
	if err := l.reopen(); err != nil {
		return err
	}
	l.size = whole
	return l.file.Truncate(whole)
}

// read takes the events of an earlier shim up.
func (l *eventLog) read(data []byte) (damaged bool) {
	s := bufio.NewScanner(bytes.NewReader(data))
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		var e shim.Event
		if json.Unmarshal(s.Bytes(), &e) != nil || e.Seq <= l.last {
			damaged = true
			continue
		}
		l.last = e.Seq
		l.tail = append(l.tail, e)
		l.lines++
	}
	return damaged || s.Err() != nil || len(data) > 0 && data[len(data)-1] != '\n'
}

func (l *eventLog) trim() {
	if n := len(l.tail) - keepEvents; n > 0 {
		l.tail = append(l.tail[:0:0], l.tail[n:]...)
		l.behind = min(l.behind, keepEvents)
	}
}

// encode returns events as lines.
func encode(events []shim.Event) ([]byte, error) {
	var buf bytes.Buffer
	for i := range events {
		line, err := json.Marshal(&events[i])
		if err != nil {
			return nil, err
		}
		buf.Write(line)
		buf.WriteByte('\n')
	}
	return buf.Bytes(), nil
}

// rewrite replaces the file by the tail.
func (l *eventLog) rewrite() error {
	data, err := encode(l.tail)
	if err != nil {
		return err
	}
	if err := writeFileAtomic(l.path, data); err != nil {
		return fmt.Errorf("write event log: %w", err)
	}
	l.lines, l.behind = len(l.tail), 0
	return l.reopen()
}

// reopen opens the file to append to it.
func (l *eventLog) reopen() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open event log: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return fmt.Errorf("open event log: %w", err)
	}
	if l.file != nil {
		l.file.Close()
	}
	l.file, l.size = f, st.Size()
	return nil
}

// append numbers the event, stores it and tells the subscribers.
func (l *eventLog) append(e shim.Event) {
	if e.At.IsZero() {
		e.At = time.Now()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last++
	e.Seq = l.last
	l.tail = append(l.tail, e)
	l.behind++
	if err := l.store(); err != nil {
		// Subscribers get it all the same; a restart of the shim would lose it.
		if l.behind == 1 {
			l.log.Error("write event log", "error", err)
		}
		if err := l.setMark(l.last); err != nil {
			l.log.Error("mark the last event", "error", err)
		}
	}
	if len(l.tail) >= 2*keepEvents {
		l.trim()
	}
	close(l.more)
	l.more = make(chan struct{})
}

// store writes what is behind, whole lines or nothing.
func (l *eventLog) store() error {
	if l.file == nil || l.lines+l.behind >= 2*keepEvents {
		return l.compact()
	}
	data, err := encode(l.tail[len(l.tail)-l.behind:])
	if err != nil {
		return err
	}
	if _, err := l.file.Write(data); err != nil {
		return errors.Join(err, l.file.Truncate(l.size))
	}
	l.size += int64(len(data))
	l.lines += l.behind
	l.behind = 0
	return nil
}

// compact makes the file anew. Where there is no room for a second one the old
// one grows on.
func (l *eventLog) compact() error {
	l.trim()
	err := l.rewrite()
	if err != nil && l.file != nil {
		l.log.Error("compact event log", "error", err)
		l.lines = -l.behind // not again before as many have come
		return l.store()
	}
	return err
}

// markName is beside the log; eight bytes, big endian.
func (l *eventLog) markName() string { return l.path + ".last" }

// mark is the number that was noted last, 0 when there was no need.
func (l *eventLog) mark() uint64 {
	data, err := os.ReadFile(l.markName())
	if err != nil || len(data) < 8 {
		return 0
	}
	return binary.BigEndian.Uint64(data)
}

// reserveMark makes the file of marks while there is room.
func (l *eventLog) reserveMark() error {
	if st, err := os.Stat(l.markName()); err == nil && st.Size() >= 8 {
		return nil
	}
	return writeFileAtomic(l.markName(), make([]byte, 8))
}

// setMark notes a number in place.
func (l *eventLog) setMark(seq uint64) error {
	f, err := os.OpenFile(l.markName(), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt(binary.BigEndian.AppendUint64(nil, seq), 0)
	return err
}

// since returns the events after the given number and a channel that closes
// when there are more.
func (l *eventLog) since(after uint64) ([]shim.Event, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := len(l.tail)
	for i > 0 && l.tail[i-1].Seq > after {
		i--
	}
	return append([]shim.Event(nil), l.tail[i:]...), l.more
}

// has says whether the log knows such an event of id.
func (l *eventLog) has(id string, kind shim.EventKind) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := len(l.tail) - 1; i >= 0; i-- {
		if l.tail[i].ID == id && l.tail[i].Kind == kind {
			return true
		}
	}
	return false
}

func (l *eventLog) lastSeq() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}
