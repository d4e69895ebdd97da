package manifests

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// watcher follows a directory, or one file in it, with inotify. fsnotify does
// not tell when a writer closes a file (IN_CLOSE_WRITE), and that is what
// separates a half-written manifest from a whole one; so this is inotify itself.
//
// Besides the directory it watches the directory above (or the nearest one that
// exists), for a directory that comes later, goes or is exchanged.
type watcher struct {
	path string // what is watched for; directory or file
	fd   int
	file *os.File // of fd, for the poller

	dirWD   int32  // of the directory itself; -1 when there is none
	aboveWD int32  // of a directory above; -1 when there is none
	awaited string // what is awaited in the directory above: path or, where that is not there yet, the way to it
}

// watchEvent is one thing that happened.
type watchEvent struct {
	name  string // in the directory
	whole bool   // the file may be read now; otherwise it may still be written to
	all   bool   // anything may have changed: look at everything
	// unlinked: the file was deleted, not renamed as editors do with what they
	// replace.
	unlinked bool
}

const (
	dirMask = unix.IN_CREATE | unix.IN_CLOSE_WRITE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE |
		unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR
	aboveMask = unix.IN_CREATE | unix.IN_CLOSE_WRITE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE |
		unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR
)

func newWatcher(path string) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify for %s: %w (raise fs.inotify.max_user_instances)", path, err)
	}
	return &watcher{path: path, fd: fd, file: os.NewFile(uintptr(fd), "inotify"), dirWD: -1, aboveWD: -1}, nil
}

// arm sets the watches for what exists now. It is called again whenever the
// directory or one above it changed.
func (w *watcher) arm() error {
	dir, above := int32(-1), int32(-1)
	awaited := ""
	for {
		// From the top down: what appears below a directory after its watch is
		// set is reported, what was there before is seen by the next look.
		up := w.path
		for up = filepath.Dir(up); ; up = filepath.Dir(up) {
			wd, err := unix.InotifyAddWatch(w.fd, up, aboveMask)
			if err == nil {
				above = int32(wd)
				break
			}
			if up == filepath.Dir(up) {
				return fmt.Errorf("watch %s: %w", up, err)
			}
		}
		awaited = w.path
		for filepath.Dir(awaited) != up {
			awaited = filepath.Dir(awaited)
		}
		if awaited == w.path {
			break
		}
		if _, err := os.Lstat(awaited); err != nil {
			break
		}
		unix.InotifyRmWatch(w.fd, uint32(above)) // it came meanwhile: go down
	}
	wd, err := unix.InotifyAddWatch(w.fd, w.path, dirMask)
	switch {
	case err == nil:
		dir = int32(wd)
	case !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("watch %s: %w", w.path, err)
	}
	for _, old := range []int32{w.dirWD, w.aboveWD} {
		if old >= 0 && old != dir && old != above {
			unix.InotifyRmWatch(w.fd, uint32(old)) // fails when the kernel removed it already
		}
	}
	w.dirWD, w.aboveWD, w.awaited = dir, above, awaited
	return nil
}

// read delivers what the kernel reports until the watcher is closed. What it
// means is said by translate, in the goroutine that arms the watches.
func (w *watcher) read(raw chan<- []inotifyEvent, done <-chan struct{}) {
	defer close(raw)
	buf := make([]byte, 64<<10)
	for {
		n, err := w.file.Read(buf)
		if err != nil {
			return
		}
		var batch []inotifyEvent
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			length := int(binary.NativeEndian.Uint32(b[12:]))
			name := b[unix.SizeofInotifyEvent : unix.SizeofInotifyEvent+length]
			batch = append(batch, inotifyEvent{
				wd:   int32(binary.NativeEndian.Uint32(b[0:])),
				mask: binary.NativeEndian.Uint32(b[4:]),
				name: strings.TrimRight(string(name), "\x00"),
			})
			b = b[unix.SizeofInotifyEvent+length:]
		}
		select {
		case raw <- batch:
		case <-done:
			return
		}
	}
}

type inotifyEvent struct {
	wd   int32
	mask uint32
	name string
}

// translate says what an event of the kernel means.
func (w *watcher) translate(e inotifyEvent) (watchEvent, bool) {
	switch {
	case e.mask&unix.IN_Q_OVERFLOW != 0:
		return watchEvent{all: true}, true
	case e.wd == w.dirWD:
		if e.mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_IGNORED|unix.IN_UNMOUNT) != 0 {
			return watchEvent{all: true}, true
		}
		if e.name == "" {
			return watchEvent{}, false
		}
		if strings.HasPrefix(e.name, "..") {
			// ..data of a directory that a ConfigMap volume is: all files in it
			// are links through it.
			return watchEvent{all: e.mask&(unix.IN_MOVED_TO|unix.IN_CREATE) != 0}, true
		}
		return watchEvent{name: e.name, whole: e.mask&unix.IN_CREATE == 0, unlinked: e.mask&unix.IN_DELETE != 0}, true
	case e.wd == w.aboveWD:
		if e.mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_IGNORED|unix.IN_UNMOUNT) != 0 {
			return watchEvent{all: true}, true
		}
		if e.name != filepath.Base(w.awaited) {
			return watchEvent{}, false
		}
		if e.mask&unix.IN_CREATE != 0 && w.awaitsFile() {
			return watchEvent{name: e.name, whole: false}, true
		}
		return watchEvent{all: true}, true
	}
	return watchEvent{}, false
}

// awaitsFile says whether what has come is a manifest itself, which somebody may
// be writing to. A link is none: it is whole, and may lead to a directory.
func (w *watcher) awaitsFile() bool {
	var st unix.Stat_t
	return w.awaited == w.path && unix.Lstat(w.path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG
}

func (w *watcher) close() { w.file.Close() }
