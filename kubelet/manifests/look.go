package manifests

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// outcome is what a look at a file found.
type outcome struct {
	name     string
	gone     bool
	same     bool
	id       fileID
	sum      [sha256.Size]byte
	objects  []object
	problems []Problem
	broken   bool
	data     []byte // of a good version that is not kept yet
}

// look reads the files that are due and puts what changed in force.
func (s *Source) look(now time.Time) {
	var names []string
	for name, at := range s.due {
		if !at.After(now) {
			names = append(names, name)
			delete(s.due, name)
			delete(s.writing, name)
		}
	}
	if len(names) == 0 {
		return
	}
	slices.Sort(names)
	names = s.bounded(names, now)
	found := make([]outcome, len(names))
	s.each(len(names), func(i int) {
		known := s.files[names[i]]
		if known != nil && known.unlinked {
			known = nil
		}
		found[i] = s.load(names[i], known)
	})

	affected := map[ObjectRef]struct{}{}
	held := 0
	for i := range found {
		s.take(found[i], now, affected)
		if held += len(found[i].data); held > maxSize {
			s.keep(&found[i])
		}
	}
	s.settleClaims(affected, now)
	// After the pods are on their way.
	for i := range found {
		s.keep(&found[i])
	}
	s.saveHeld()
}

// keep the good version of a file for a start that finds it broken.
func (s *Source) keep(o *outcome) {
	if o.data == nil {
		return
	}
	if err := s.kept.save(o.name, o.data); err != nil {
		s.log.Warn("good version of the manifest is not kept", "file", o.name, "error", err)
	}
	o.data = nil
}

// restore puts the last good version of a file in force that podd found broken
// when it started.
func (s *Source) restore(name string, affected map[ObjectRef]struct{}) *file {
	data, err := s.kept.load(name)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			s.log.Warn("last good version of the manifest is lost", "file", name, "error", err)
		}
		return nil
	}
	objects, _, broken := s.decoder.decodeFile(s.path(name), data)
	if broken { // by the rules of this version of podd
		return nil
	}
	f := &file{name: name}
	s.files[name] = f
	s.claim(f, objects, affected)
	return f
}

// each calls f for 0..n-1, on as many processors as there are.
func (s *Source) each(n int, f func(int)) {
	workers := min(runtime.GOMAXPROCS(0), n/4)
	if workers < 2 {
		for i := range n {
			f(i)
		}
		return
	}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n; i += workers {
				f(i)
			}
		})
	}
	wg.Wait()
}

// read returns what is in a file; same: nothing new since it was known. Symlinks
// are followed, as upstream does. What is no file is found out without opening
// it: a FIFO would block, and a device may do anything.
func (s *Source) read(path string, known *file, id *fileID) (data []byte, same bool, err error) {
	at, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, false, err
	}
	defer unix.Close(at)
	var st unix.Stat_t
	if err := unix.Fstat(at, &st); err != nil {
		return nil, false, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, false, &Problem{Message: "is not a regular file", Remedy: "directories are not descended into; move manifests up"}
	}
	*id = fileID{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
	if known != nil && known.id == *id {
		return nil, true, nil
	}
	large := &Problem{Message: fmt.Sprintf("is larger than %d MiB", maxSize>>20), Remedy: "split it"}
	if st.Size > maxSize {
		return nil, false, large
	}
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", at))
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	if data, err = io.ReadAll(io.LimitReader(f, maxSize+1)); err == nil && len(data) > maxSize {
		err = large // it grows
	}
	return data, false, err
}

// load reads one file. It only reads s and known.
func (s *Source) load(name string, known *file) (o outcome) {
	o.name = name
	path := s.path(name)
	fail := func(message, remedy string) outcome {
		o.broken = true
		o.problems = []Problem{{File: path, Message: message, Remedy: remedy}}
		return o
	}
	// The code that decodes and validates is large and not ours: what one file
	// makes of it must not end the daemon, again at every start.
	defer func() {
		if r := recover(); r != nil {
			s.log.Error("manifest cannot be decoded", "file", name, "panic", r, "stack", string(debug.Stack()))
			o.objects, o.data = nil, nil
			fail(fmt.Sprintf("cannot be decoded: %v", r), "report this with the file")
		}
	}()
	data, same, err := s.readInTime(name, known, &o.id)
	var wrong *Problem
	switch {
	case errors.Is(err, unix.ENOENT):
		o.gone = true
		return o
	case errors.As(err, &wrong):
		return fail(wrong.Message, wrong.Remedy)
	case err != nil:
		return fail(fmt.Sprintf("cannot be read: %v", err), "make it readable for podd")
	case same:
		o.same = true
		return o
	}
	o.sum = sha256.Sum256(data)
	if known != nil && known.sum == o.sum {
		o.same = true
		return o
	}
	o.objects, o.problems, o.broken = s.decoder.decodeFile(path, data)
	if !o.broken {
		o.data = data
	}
	return o
}

// take puts the outcome of a look into the books; affected collects the objects
// whose definition may be another now.
func (s *Source) take(o outcome, now time.Time, affected map[ObjectRef]struct{}) {
	f := s.files[o.name]
	if f != nil && f.unlinked && !o.gone && !o.broken {
		f.unlinked = false
		if o.id != f.id { // or else the event is of the file before it
			s.release(f, affected)
			delete(s.files, o.name)
			s.log.Info("manifest removed and written again", "file", o.name)
			f = nil
		}
	}
	switch {
	case o.gone:
		if f == nil {
			s.report(o.name, nil, now)
			return
		}
		if f.goneSince.IsZero() {
			f.goneSince = now
			for _, obj := range f.objects {
				affected[obj.ref()] = struct{}{}
			}
		}
		delay := goneDelay
		if !s.dirGone.IsZero() {
			delay = 0 // was waited for
		}
		if left := delay - now.Sub(f.goneSince); left > 0 {
			s.due[o.name] = now.Add(left)
			return
		}
		s.claim(f, nil, affected)
		delete(s.files, o.name)
		s.kept.forget(o.name)
		s.report(o.name, nil, now)
		s.log.Info("manifest removed", "file", o.name)
		return
	case f != nil && !f.goneSince.IsZero():
		f.goneSince = time.Time{}
		for _, obj := range f.objects {
			affected[obj.ref()] = struct{}{}
		}
	}
	if o.same {
		f.id = o.id
		return
	}
	if o.broken && f == nil {
		f = s.restore(o.name, affected)
	}
	if o.broken {
		// Half-written? Look again once it has been left alone.
		changed := time.Unix(o.id.ctime.Unix())
		if age := now.Sub(changed); o.id != (fileID{}) && age >= 0 && age < settle {
			s.due[o.name] = now.Add(settle - age)
			return
		}
	}
	if f == nil {
		f = &file{name: o.name}
		s.files[o.name] = f
	}
	f.id, f.sum = o.id, o.sum
	if o.broken {
		for i := range o.problems {
			o.problems[i].Kept = len(f.objects) > 0
		}
		s.report(o.name, o.problems, now)
		return
	}
	s.claim(f, o.objects, affected)
	s.report(o.name, o.problems, now)
}
