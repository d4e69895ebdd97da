package server

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// oldLogs are the rotated files of one log: the newest few are kept, and all of
// these but the newest are compressed, which readers may still follow.
//
// A container that floods its log rotates many times a second. So files beyond
// the limit are removed by whoever rotates, at once, before anything else; and
// a file is compressed only when it has been there for a while, so that what is
// removed soon costs nothing.
type oldLogs struct {
	path    string // of the log
	maxSize int64  // of each, roughly
	keep    int
	pace    *pace
	log     *slog.Logger

	mu      sync.Mutex
	names   []string // suffixes without .gz, oldest first
	working bool     // compress is running or due
}

const (
	// compressAfter is when a rotated file is compressed.
	compressAfter = 2 * time.Second
	// compressors bounds what the node compresses at a time. Who gets none of
	// these places for compressPatience tries again after its next rotation.
	compressors      = 2
	compressPatience = 10 * time.Second
	// maxOldLogs bounds what is taken up of a directory that a pod may write to.
	maxOldLogs = 1000
)

var compressing = make(chan struct{}, compressors)

// newOldLogs takes up the files that are there.
func newOldLogs(path string, maxSize int64, keep int, pace *pace, log *slog.Logger) *oldLogs {
	o := &oldLogs{path: path, maxSize: maxSize, keep: keep, pace: pace, log: log}
	if err := o.find(); err != nil {
		log.Warn("list rotated logs", "path", path, "error", err)
	}
	o.add("")
	return o
}

// find lists the rotated files and removes what a compression left unfinished.
func (o *oldLogs) find() error {
	dir, err := os.Open(filepath.Dir(o.path))
	if err != nil {
		return err
	}
	defer dir.Close()
	prefix := filepath.Base(o.path) + "."
	for {
		names, err := dir.Readdirnames(1000)
		for _, n := range names {
			suffix, ours := strings.CutPrefix(n, prefix)
			if !ours || len(o.names) >= maxOldLogs {
				continue
			}
			if strings.HasSuffix(suffix, ".tmp") {
				_ = os.Remove(filepath.Join(filepath.Dir(o.path), n))
				continue
			}
			suffix = strings.TrimSuffix(suffix, ".gz")
			if _, err := time.Parse(rotatedLayout, suffix); err == nil {
				o.names = append(o.names, suffix)
			}
		}
		if errors.Is(err, io.EOF) {
			slices.Sort(o.names)
			o.names = slices.Compact(o.names) // may be there plain and compressed
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// newest is the suffix of the newest file, "" when there is none.
func (o *oldLogs) newest() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.names) == 0 {
		return ""
	}
	return o.names[len(o.names)-1]
}

// add notes a file, "" none, removes those that are too many and has the others
// compressed.
func (o *oldLogs) add(name string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if name != "" {
		o.names = append(o.names, name)
	}
	for len(o.names) > o.keep {
		for _, suffix := range []string{"", ".gz"} {
			if err := os.Remove(o.file(o.names[0]) + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
				o.log.Warn("remove old log", "path", o.file(o.names[0])+suffix, "error", err)
			}
		}
		o.names = o.names[1:]
	}
	if len(o.names) > 1 && !o.working {
		o.working = true
		time.AfterFunc(compressAfter, o.compress)
	}
}

func (o *oldLogs) file(name string) string { return o.path + "." + name }

// compress does so to all files but the newest, one after the other.
func (o *oldLogs) compress() {
	tried := ""
	for {
		o.mu.Lock()
		name := ""
		for _, n := range o.names[:max(len(o.names)-1, 0)] {
			if n > tried {
				name = n
				break
			}
		}
		if name == "" {
			o.working = false
			o.mu.Unlock()
			return
		}
		o.mu.Unlock()
		tried = name
		if err := o.compressOne(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			o.log.Warn("compress rotated log", "path", o.file(name), "error", err)
		}
	}
}

// compressOne compresses one file if that is not done, and not removed meanwhile.
func (o *oldLogs) compressOne(name string) error {
	path := o.file(name)
	src, err := openOldLog(path, o.maxSize+maxLine+recordOverhead)
	if err != nil {
		return err
	}
	defer src.Close()
	select {
	case compressing <- struct{}{}:
		defer func() { <-compressing }()
	case <-time.After(compressPatience):
		return nil
	}
	tmp := path + ".tmp"
	dst, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o640)
	if err != nil {
		return err
	}
	err = o.pace.charge(func() error { return gzipTo(dst, src) })
	if e := dst.Close(); err == nil {
		err = e
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if err == nil && slices.Contains(o.names, name) {
		if err = os.Rename(tmp, path+".gz"); err == nil {
			return os.Remove(path)
		}
	}
	_ = os.Remove(tmp)
	return err
}

// openOldLog opens a rotated file. Pods that mount their log directory may have
// put something else in its place: it is not followed, not waited for, and not
// read when it is no file or longer than one that was rotated can be.
func openOldLog(path string, limit int64) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && (!st.Mode().IsRegular() || st.Size() > limit) {
		err = fmt.Errorf("%v of %d bytes is no log of ours: %w", st.Mode(), st.Size(), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func gzipTo(dst io.Writer, src *os.File) error {
	z, err := gzip.NewWriterLevel(dst, gzip.BestSpeed)
	if err != nil {
		return err
	}
	st, err := src.Stat()
	if err != nil {
		return err
	}
	// It is not written to any more; who does all the same is not followed.
	if _, err := io.CopyN(z, src, st.Size()); err != nil {
		return err
	}
	return z.Close()
}
