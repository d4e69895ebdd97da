package server

import (
	"bufio"
	"bytes"
	"encoding/json"
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
type eventLog struct {
	path string
	log  *slog.Logger

	mu    sync.Mutex
	file  *os.File
	lines int
	last  uint64        // highest number given out
	tail  []shim.Event  // the last keepEvents, ascending
	more  chan struct{} // closed and replaced at every append
}

func openEvents(path string, log *slog.Logger) (*eventLog, error) {
	l := &eventLog{path: path, log: log, more: make(chan struct{})}
	damaged := false
	data, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("read event log: %w", err)
	}
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
	if damaged || s.Err() != nil {
		l.log.Error("event log was damaged, numbers skip ahead", "path", path, "last", l.last)
		l.last += seqSkip
	}
	l.trim()
	if err := l.rewrite(); err != nil {
		return nil, err
	}
	return l, nil
}

func (l *eventLog) trim() {
	if n := len(l.tail) - keepEvents; n > 0 {
		l.tail = append(l.tail[:0:0], l.tail[n:]...)
	}
}

// rewrite replaces the file by the tail.
func (l *eventLog) rewrite() error {
	var buf bytes.Buffer
	for i := range l.tail {
		line, err := json.Marshal(&l.tail[i])
		if err != nil {
			return err
		}
		buf.Write(line)
		buf.WriteByte('\n')
	}
	if err := writeFileAtomic(l.path, buf.Bytes()); err != nil {
		return fmt.Errorf("write event log: %w", err)
	}
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return fmt.Errorf("open event log: %w", err)
	}
	if l.file != nil {
		l.file.Close()
	}
	l.file, l.lines = f, len(l.tail)
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
	line, err := json.Marshal(&e)
	if err == nil {
		_, err = l.file.Write(append(line, '\n'))
	}
	if err != nil {
		// Subscribers still get it; only a restart of the shim would lose it.
		l.log.Error("write event log", "error", err)
	}
	l.tail = append(l.tail, e)
	if l.lines++; l.lines >= 2*keepEvents {
		l.trim()
		if err := l.rewrite(); err != nil {
			l.log.Error("compact event log", "error", err)
			l.lines = 0
		}
	} else if len(l.tail) >= 2*keepEvents {
		l.trim()
	}
	close(l.more)
	l.more = make(chan struct{})
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
