package manifests

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// answerTime is how long a file may take to be read. One on a network file
	// system whose server is away takes for ever.
	answerTime = 10 * time.Second
	// maxHung bounds how many files are waited for at once: each holds a thread.
	maxHung = 16
	// maxFiles of a directory: twenty times the pods that a node is made for.
	maxFiles = 20_000
)

// errSilent is about a file system that does not answer.
var errSilent = errors.New("its file system does not answer")

// hung are the questions to file systems that nobody has answered yet.
type hung struct {
	within time.Duration // answerTime
	mu     sync.Mutex
	asked  map[string]struct{}
}

// inTime calls f, which may hang in a file system, and says whether it ended in
// time. A question that is still open is not asked again, nor are too many at
// once: f is then not called. What f writes must be read only when it ended.
func (h *hung) inTime(question string, f func()) bool {
	h.mu.Lock()
	_, open := h.asked[question]
	full := len(h.asked) >= maxHung
	h.mu.Unlock()
	if open || full {
		return false
	}
	done := make(chan struct{})
	go func() {
		f()
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.asked, question)
		close(done)
	}()
	timer := time.NewTimer(h.within)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	select {
	case <-done: // just then
		return true
	default:
		h.asked[question] = struct{}{}
		return false
	}
}

// readInTime is read of a file that may lie on a file system that hangs: what it
// was before then stays in force, and all others go on.
func (s *Source) readInTime(name string, known *file, id *fileID) (data []byte, same bool, err error) {
	if known != nil { // which may change while the answer is out
		known = &file{id: known.id}
	}
	var found fileID
	path := s.path(name)
	var text []byte
	var old bool
	var wrong error
	if !s.hung.inTime(name, func() { text, old, wrong = s.read(path, known, &found) }) {
		return nil, false, &Problem{Message: errSilent.Error(), Remedy: "see that the server of the file system is there, or remove the link"}
	}
	*id = found
	return text, old, wrong
}

// listInTime is list of a directory that may lie on such a file system.
func (s *Source) listInTime() (names []string, err error) {
	var found []string
	var wrong error
	if !s.hung.inTime("/", func() { found, wrong = s.list() }) {
		return nil, fmt.Errorf("%s: %w", s.cfg.Dir, errSilent)
	}
	return found, wrong
}

// answers says whether the file system of the directory does.
func (s *Source) answers() bool {
	return s.hung.inTime("/", func() {
		var st unix.Stat_t
		_ = unix.Stat(s.cfg.Dir, &st)
	})
}

// bounded leaves out files that are new when there are too many of them.
func (s *Source) bounded(names []string, now time.Time) []string {
	room := maxFiles - len(s.files)
	left := 0
	names = slices.DeleteFunc(names, func(name string) bool {
		if s.files[name] != nil {
			return false
		}
		if room > 0 {
			room--
			return false
		}
		left++
		return true
	})
	if left > 0 {
		s.report("", []Problem{{File: s.cfg.Dir, Message: fmt.Sprintf("holds more than %d manifests, those that came last are not read", maxFiles),
			Remedy: "remove some, or put several documents into one file"}}, now)
	} else if len(s.files) < maxFiles {
		s.report("", nil, now)
	}
	return names
}
