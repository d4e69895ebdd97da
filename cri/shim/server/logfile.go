package server

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
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
	path     string
	maxSize  int64
	maxFiles int
	log      *slog.Logger

	fd   int
	size int64 // bytes in the current file
	dev  uint64
	ino  uint64

	gzips *sync.WaitGroup // compressions under way
}

func openLog(path string, maxSize int64, maxFiles int, gzips *sync.WaitGroup, log *slog.Logger) (*logFile, error) {
	l := &logFile{path: path, maxSize: maxSize, maxFiles: max(maxFiles, 2), fd: -1, log: log, gzips: gzips}
	if err := l.reopen(); err != nil {
		return nil, err
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

func (l *logFile) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n, err := unix.Write(l.fd, p[done:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, err
		}
		done += n
		l.size += int64(n)
	}
	return done, nil
}

// rotate moves a full file aside and starts a new one. What fails leaves the
// current file in use: no line is lost for the sake of rotation.
func (l *logFile) rotate() {
	if l.maxSize <= 0 || l.size < l.maxSize {
		return
	}
	rotated := l.path + "." + time.Now().Format(rotatedLayout)
	if _, err := os.Lstat(rotated); err == nil {
		return // twice within a second: the file may grow until the next one
	}
	if err := os.Rename(l.path, rotated); err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			l.log.Warn("rotate log", "path", l.path, "error", err)
			return
		}
		// Somebody moved it; a new file is due all the same.
	}
	if err := l.reopen(); err != nil {
		l.log.Warn("reopen rotated log", "path", l.path, "error", err)
		return
	}
	l.gzips.Add(1)
	go func() {
		defer l.gzips.Done()
		tidyLogs(l.path, l.maxFiles, l.log)
	}()
}

func (l *logFile) close() {
	if l.fd >= 0 {
		unix.Close(l.fd)
		l.fd = -1
	}
}

// tidying keeps compression to one file at a time on the whole node.
var tidying sync.Mutex

// tidyLogs removes what is beyond maxFiles (the current file included) and
// compresses all rotated files but the newest, which readers may still follow.
func tidyLogs(path string, maxFiles int, log *slog.Logger) {
	tidying.Lock()
	defer tidying.Unlock()
	names, err := filepath.Glob(globEscape(path) + ".*")
	if err != nil {
		log.Warn("list rotated logs", "path", path, "error", err)
		return
	}
	var rotated []string
	for _, n := range names {
		suffix := strings.TrimSuffix(strings.TrimPrefix(n, path+"."), ".gz")
		if strings.HasSuffix(n, ".tmp") {
			_ = os.Remove(n)
		} else if _, err := time.Parse(rotatedLayout, suffix); err == nil {
			rotated = append(rotated, n)
		}
	}
	sort.Strings(rotated) // oldest first
	for len(rotated) > maxFiles-1 {
		if err := os.Remove(rotated[0]); err != nil {
			log.Warn("remove old log", "path", rotated[0], "error", err)
		}
		rotated = rotated[1:]
	}
	for i, n := range rotated {
		if i == len(rotated)-1 || strings.HasSuffix(n, ".gz") {
			continue
		}
		if err := compress(n); err != nil {
			log.Warn("compress rotated log", "path", n, "error", err)
		}
	}
}

func globEscape(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

func compress(path string) error {
	src, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	tmp := path + ".tmp"
	dst, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o640)
	if err != nil {
		return err
	}
	z, _ := gzip.NewWriterLevel(dst, gzip.BestSpeed)
	_, err = io.Copy(z, src)
	if e := z.Close(); err == nil {
		err = e
	}
	if e := dst.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(tmp, path+".gz")
	}
	if err != nil {
		_ = os.Remove(tmp)
		return err
	}
	return os.Remove(path)
}
