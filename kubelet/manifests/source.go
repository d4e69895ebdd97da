package manifests

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// DefaultRescan is how often everything is looked at even when inotify
	// reports nothing (upstream's fileCheckFrequency).
	DefaultRescan = 20 * time.Second

	// settle is how long a file must have been left alone before it is called
	// broken: until then it may be half-written. A file that is good is taken
	// at once.
	settle = 300 * time.Millisecond
	// goneDelay is how long a file must be away before what it started is
	// stopped: editors rename the old file away before they write the new one.
	goneDelay = 150 * time.Millisecond
	// dirGoneDelay is the same for the whole directory, which is exchanged by
	// hand or by a deployment tool.
	dirGoneDelay = time.Second

	// endTime is how long Run waits at its end for a file system: it may be one
	// that never answers.
	endTime = 2 * time.Second

	// maxSize of a manifest, in bytes, as upstream has it.
	maxSize = 10 << 20

	// ReasonInvalid is the reason of the event that a broken manifest causes.
	ReasonInvalid = "InvalidManifest"
)

// Config says what a Source reads.
type Config struct {
	// Dir is the directory, or one file (upstream's staticPodPath). It need not
	// exist yet.
	Dir string
	// NodeName is appended to the names of the pods.
	NodeName string
	// Rescan is the time between two looks at everything; DefaultRescan if 0.
	Rescan time.Duration
	// NoObjects refuses pods that refer to ConfigMaps and Secrets: on a node
	// with an apiserver static pods may not (upstream's
	// PreventStaticPodAPIReferences).
	NoObjects bool
	// StateDir keeps the last good version of each file, for a start of podd
	// that finds it broken; "": a pod whose file is broken then is unknown.
	StateDir string
	// Bindings is the file that keeps which claim has which PersistentVolume;
	// "": they are found anew at each start.
	Bindings string
	// Ledger is the file that keeps which manifest has each object in force
	// while several define it; "": the first one by name counts at each start.
	Ledger string
	// Recorder takes events about broken manifests; may be nil.
	Recorder Recorder
	// Log is slog.Default() if nil.
	Log *slog.Logger
}

// Source follows a directory of manifests.
//
// A file is a unit: when any document in it is broken the last good version of
// the whole file stays in force. Objects have an identity of their own: kind,
// namespace and name. Where a document is written does not matter, so renaming
// a file or moving a document to another file restarts nothing. While several
// files hold the same object the one in force stays and the others are Problems;
// when its file goes one with the same content comes next, or else the first by
// name. At the first start that is the first by name.
type Source struct {
	cfg     Config
	sink    Sink
	log     *slog.Logger
	decoder decoder
	objects *objectStore
	kept    lastGood

	bindings bindings
	problems problems

	// What follows belongs to the goroutine of Run.
	files map[string]*file // by name in the directory
	ledger
	agenda
	hung     hung
	dirGone  time.Time // since when the directory is missing
	dirState string    // last error about the directory, to log it once
}

// agenda is when to look at what.
type agenda struct {
	due     map[string]time.Time // a file
	writing map[string]struct{}  // created, not yet closed by the writer
	scanDue time.Time            // everything
}

// file is what is known of one manifest.
type file struct {
	name    string
	id      fileID
	sum     [sha256.Size]byte
	objects []object // of the last good version
	// goneSince is when the file was first found missing.
	goneSince time.Time
	// unlinked: deleted since it was read. One that comes in its place is
	// another one, whatever is in it.
	unlinked bool
}

// fileID changes whenever the content of a file may have.
type fileID struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// next is the earliest time at which something is due.
func (a *agenda) next() time.Time {
	at := a.scanDue
	for _, t := range a.due {
		if t.Before(at) {
			at = t
		}
	}
	return at
}

// New makes a Source; Run starts it.
func New(cfg Config, sink Sink) *Source {
	if cfg.Rescan <= 0 {
		cfg.Rescan = DefaultRescan
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	cfg.Dir = filepath.Clean(cfg.Dir)
	cfg.NodeName = strings.ToLower(cfg.NodeName) // a node's name is one of DNS
	s := &Source{
		cfg:      cfg,
		hung:     hung{within: answerTime, asked: map[string]struct{}{}},
		sink:     sink,
		log:      cfg.Log.With("source", SourceName, "path", cfg.Dir),
		decoder:  decoder{nodeName: cfg.NodeName, noObjects: cfg.NoObjects},
		objects:  newObjectStore(),
		kept:     lastGood{dir: cfg.StateDir},
		bindings: bindings{path: cfg.Bindings},
		problems: newProblems(),
		files:    map[string]*file{},
		ledger:   newLedger(),
		agenda:   agenda{due: map[string]time.Time{}, writing: map[string]struct{}{}},
	}
	s.held.path = cfg.Ledger
	return s
}

// Run reads the directory, tells the sink, and follows it until ctx ends; then
// it returns nil. The pods stay with the sink.
func (s *Source) Run(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- s.run(ctx) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-done:
		return err
	case <-time.After(endTime):
		s.log.Error("manifests lie on a file system that does not answer, not waited for")
		return nil
	}
}

func (s *Source) run(ctx context.Context) error {
	if err := s.held.load(); err != nil {
		s.log.Error("which manifests were in force is not known, of several for one object the first by name counts", "error", err)
	}
	var raw chan []inotifyEvent
	w, err := newWatcher(s.cfg.Dir)
	if err != nil {
		// Without inotify changes are seen by the rescan alone.
		s.log.Error("manifests are not watched, only rescanned", "error", err, "every", s.cfg.Rescan)
	} else {
		defer w.close()
		raw = make(chan []inotifyEvent, 4)
		go w.read(raw, ctx.Done())
	}

	// A directory that cannot be read is not an empty one: until it can, nothing
	// that runs may be taken for an orphan.
	synced := false
	armed := ""
	pass := func(now time.Time) {
		if w != nil && s.answers() {
			state := ""
			if err := w.arm(); err != nil {
				state = err.Error()
			}
			if state != armed && state != "" {
				s.log.Error("manifests are not watched, only rescanned", "error", state, "every", s.cfg.Rescan)
			}
			armed = state
		}
		if s.scan(now) && !synced {
			synced = true
			s.kept.tidy(func(name string) bool { return s.files[name] != nil })
			s.tidyHeld()
			s.sink.Synced(SourceName)
			s.log.Info("manifests read", "files", len(s.files), "pods", len(s.delivered))
		}
	}
	pass(time.Now())

	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		timer.Reset(time.Until(s.next()))
		select {
		case <-ctx.Done():
			return nil
		case batch, ok := <-raw:
			if !ok {
				raw = nil
				if ctx.Err() == nil {
					s.log.Error("watch ended, manifests are only rescanned", "every", s.cfg.Rescan)
				}
				continue
			}
			s.note(w, batch)
			// Take what the kernel has by now: a thousand files copied at once
			// are few rounds, a single one never waits.
			for more := true; more; {
				select {
				case batch, ok := <-raw:
					if more = ok; ok {
						s.note(w, batch)
					}
				default:
					more = false
				}
			}
		case <-timer.C:
		}
		now := time.Now()
		if !s.scanDue.After(now) {
			pass(now)
		}
		s.look(now)
	}
}

// note files events under what is due.
func (s *Source) note(w *watcher, batch []inotifyEvent) {
	now := time.Now()
	for _, raw := range batch {
		e, ok := w.translate(raw)
		switch {
		case !ok:
		case e.all:
			s.scanDue = now
			if raw.mask&unix.IN_DELETE_SELF != 0 { // all went with the directory, which may be exchanged
				for _, f := range s.files {
					f.unlinked = false
				}
			}
		case !s.wanted(e.name):
		case e.whole:
			delete(s.writing, e.name)
			s.due[e.name] = now
			if f := s.files[e.name]; f != nil && e.unlinked {
				f.unlinked = true
			}
		default:
			// Created. A link or a file that was linked in is whole; a file that
			// somebody is writing tells when it is closed, or never does.
			var st unix.Stat_t
			if unix.Lstat(s.path(e.name), &st) == nil && (st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink > 1) {
				s.due[e.name] = now
				continue
			}
			s.writing[e.name] = struct{}{}
			s.due[e.name] = now.Add(settle)
		}
	}
}

// wanted says whether a name in the directory is a manifest. Files of editors
// and of tools that write beside and rename (.x.swp, x~, #x#, 4913, x.tmp) do
// not end in one of the three.
func (s *Source) wanted(name string) bool {
	if name == filepath.Base(s.cfg.Dir) && s.isFile() {
		return true
	}
	if name == "" || name[0] == '.' || name[0] == '#' {
		return false
	}
	switch strings.ToLower(filepath.Ext(name)) {
	case ".yaml", ".yml", ".json":
		return true
	}
	return false
}

// isFile says whether the path is one manifest and not a directory of them.
func (s *Source) isFile() bool {
	var st unix.Stat_t
	return unix.Stat(s.cfg.Dir, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG
}

func (s *Source) path(name string) string {
	if name == filepath.Base(s.cfg.Dir) && s.isFile() {
		return s.cfg.Dir
	}
	return filepath.Join(s.cfg.Dir, name)
}

// scan looks at everything, and says whether it could.
func (s *Source) scan(now time.Time) bool {
	s.scanDue = now.Add(s.cfg.Rescan)
	names, err := s.listInTime()
	if err != nil {
		state := err.Error()
		if !errors.Is(err, os.ErrNotExist) {
			// Unreadable is not empty: all stays as it is.
			if s.dirState != state {
				s.log.Error("manifests cannot be read", "error", err)
			}
			s.dirState = state
			return false
		}
		if s.dirState != state {
			s.log.Info("manifest directory does not exist", "waiting", true)
		}
		s.dirState = state
		if s.dirGone.IsZero() {
			s.dirGone = now
		}
		if len(s.files) > 0 && now.Sub(s.dirGone) < dirGoneDelay {
			s.scanDue = s.dirGone.Add(dirGoneDelay)
			return true
		}
	} else {
		s.dirGone, s.dirState = time.Time{}, ""
	}
	present := make(map[string]struct{}, len(names))
	for _, name := range names {
		present[name] = struct{}{}
		if _, busy := s.writing[name]; !busy {
			s.due[name] = now
		}
	}
	for name := range s.files {
		if _, ok := present[name]; !ok {
			s.due[name] = now
		}
	}
	s.look(now)
	return true
}

// list returns the names of the manifests.
func (s *Source) list() ([]string, error) {
	if s.isFile() {
		return []string{filepath.Base(s.cfg.Dir)}, nil
	}
	dir, err := os.Open(s.cfg.Dir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var names []string
	for len(names) <= maxFiles { // files that are known and not listed are looked at all the same
		some, err := dir.Readdirnames(1024)
		names = append(names, slices.DeleteFunc(some, func(name string) bool { return !s.wanted(name) })...)
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
	}
	return names, nil
}
