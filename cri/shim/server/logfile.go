package server

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// rotatedLayout is the suffix that kubelet's log rotation uses, so that every
// log reader which knows kubelet's files finds ours.
const rotatedLayout = "20060102-150405"

// logFile is a container's CRI log: appended, rotated by size, reopened on
// demand. The directory is opened once per open; the file itself is never
// followed through a symbolic link and must be regular, because pods can write
// to the log directory when they mount it. Callers serialise.
type logFile struct {
	path    string
	maxSize int64 // 0: not rotated
	log     *slog.Logger

	fd   int
	size int64 // bytes in the current file
	dev  uint64
	ino  uint64

	old *oldLogs // nil: not rotated
}

// openLog opens the log; pace is charged for what is done to its old files.
func openLog(path string, maxSize int64, maxFiles int, pace *pace, log *slog.Logger) (*logFile, error) {
	l := &logFile{path: path, maxSize: maxSize, fd: -1, log: log}
	if err := l.reopen(); err != nil {
		return nil, err
	}
	if maxSize > 0 {
		l.old = newOldLogs(path, maxSize, max(maxFiles, 2)-1, pace, log)
	}
	return l, nil
}

// reopen opens the path anew, creating the file if it is not there.
func (l *logFile) reopen() error {
	dir, err := unix.Open(filepath.Dir(l.path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open log directory of %s: %w", l.path, err)
	}
	defer unix.Close(dir)
	fd, err := unix.Openat(dir, filepath.Base(l.path), unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o640)
	if err != nil {
		return fmt.Errorf("open log %s: %w", l.path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return fmt.Errorf("stat log %s: %w", l.path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		unix.Close(fd)
		return fmt.Errorf("log %s is not a regular file: %w", l.path, errdefs.ErrInvalidArgument)
	}
	if l.fd >= 0 {
		unix.Close(l.fd)
	}
	l.fd, l.size, l.dev, l.ino = fd, st.Size, st.Dev, st.Ino
	return nil
}

// Write appends whole records. Of those that have no room the first ones may be
// there, none in part.
func (l *logFile) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n, err := unix.Write(l.fd, p[done:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			whole := bytes.LastIndexByte(p[:done], '\n') + 1
			l.cut(l.size - int64(done-whole))
			return whole, err
		}
		done += n
		l.size += int64(n)
	}
	return done, nil
}

// cut removes what is behind size.
func (l *logFile) cut(size int64) {
	if size < l.size && unix.Ftruncate(l.fd, size) == nil {
		l.size = size
	}
}

// room is what the current file may still take before it is rotated, at least
// one record. A file is longer than the limit by no more than that.
func (l *logFile) room() int64 {
	if l.maxSize <= 0 {
		return math.MaxInt64
	}
	return max(l.maxSize-l.size, 1)
}

// rotate moves a full file aside, starts a new one and removes those beyond the
// number that is kept. What fails leaves the current file in use: no line is
// lost for the sake of rotation.
func (l *logFile) rotate() {
	if l.maxSize <= 0 || l.size < l.maxSize {
		return
	}
	name := l.nextName()
	if err := os.Rename(l.path, l.path+"."+name); err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			l.log.Warn("rotate log", "path", l.path, "error", err)
			return
		}
		// Somebody moved it; a new file is due all the same.
		name = ""
	}
	if err := l.reopen(); err != nil {
		l.log.Warn("reopen rotated log", "path", l.path, "error", err)
	}
	l.old.add(name)
}

// nextName is the suffix of the file that is rotated now. Where a second has
// more than one they have a fraction, which Go's time.Parse reads by the same
// layout.
func (l *logFile) nextName() string {
	now := time.Now()
	name := now.Format(rotatedLayout)
	if name > l.old.newest() {
		return name
	}
	return max(now.Format(rotatedLayout+".000000"), after(l.old.newest()))
}

// after is a suffix that sorts behind the given one, which is not in the past.
func after(name string) string {
	t, err := time.ParseInLocation(rotatedLayout, name, time.Local)
	if err != nil {
		return name + "0"
	}
	return t.Add(time.Microsecond).Format(rotatedLayout + ".000000")
}

func (l *logFile) close() {
	if l.fd >= 0 {
		unix.Close(l.fd)
		l.fd = -1
	}
}
