package logs

import (
	"cmp"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// file is one open log file of a container: the current one or a rotated one.
type file struct {
	*os.File
	gz bool
}

// reader returns the file's text from offset, which must be 0 for a compressed file.
func (f *file) reader(offset int64) (io.Reader, error) {
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return nil, fmt.Errorf("seek log %s: %w", f.Name(), err)
	}
	if !f.gz {
		return f.File, nil
	}
	z, err := gzip.NewReader(f.File)
	if err != nil {
		return nil, fmt.Errorf("read compressed log %s: %w", f.Name(), err)
	}
	return z, nil
}

func closeAll(files []*file) {
	for _, f := range files {
		f.Close()
	}
}

// compareRotated orders the suffixes of rotated files, oldest first: the
// kubelet's time stamps ("20260102-150405") ascending, plain numbers ("1" is
// the newest) descending and before any time stamp.
func compareRotated(a, b string) int {
	na, aNum := rotationNumber(a)
	nb, bNum := rotationNumber(b)
	switch {
	case aNum && bNum:
		return cmp.Compare(nb, na)
	case aNum:
		return -1
	case bNum:
		return 1
	}
	return cmp.Compare(a, b)
}

func rotationNumber(suffix string) (int, bool) {
	if len(suffix) > 5 {
		return 0, false
	}
	n, err := strconv.Atoi(suffix)
	return n, err == nil
}

// rotated lists the rotated files of the log at path, oldest first, without
// files that a rotation is still writing. A file that exists both plain and
// compressed is listed once, plain.
func rotated(path string) ([]string, error) {
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var suffixes []string
	gz := map[string]bool{}
	for _, e := range entries {
		suffix, ok := strings.CutPrefix(e.Name(), base+".")
		if !ok || suffix == "" || strings.HasSuffix(suffix, ".tmp") || !e.Type().IsRegular() {
			continue
		}
		plain, compressed := strings.CutSuffix(suffix, ".gz")
		if was, seen := gz[plain]; seen {
			gz[plain] = was && compressed
			continue
		}
		gz[plain] = compressed
		suffixes = append(suffixes, plain)
	}
	slices.SortFunc(suffixes, compareRotated)
	names := make([]string, len(suffixes))
	for i, s := range suffixes {
		names[i] = path + "." + s
		if gz[s] {
			names[i] += ".gz"
		}
	}
	return names, nil
}

func openFile(name string) (*file, error) {
	// A log directory is the daemon's own, but a link in it must not lead the
	// reader elsewhere; a FIFO must not block it.
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("log %s is not a regular file", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &file{File: f, gz: strings.HasSuffix(name, ".gz")}, nil
}

// open opens all files of the log at path, oldest first. The last one is the
// file at path itself when current is true; it may be absent while a rotation
// is under way.
//
// The current file is opened first, so a rotation in between shows up as that
// same file among the rotated ones: it and what is newer is left to the follower.
func open(path string) (files []*file, current bool, err error) {
	cur, err := openFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, false, err
	}
	missing := err
	var curStat os.FileInfo
	if cur != nil {
		if curStat, err = cur.Stat(); err != nil {
			cur.Close()
			return nil, false, err
		}
	}
	names, err := rotated(path)
	if err != nil && cur == nil {
		return nil, false, missing
	}
	for _, name := range names {
		f, err := openFile(name)
		if errors.Is(err, fs.ErrNotExist) && !strings.HasSuffix(name, ".gz") {
			f, err = openFile(name + ".gz") // compressed since it was listed
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue // the oldest one, dropped since it was listed
		}
		if err != nil {
			closeAll(files)
			if cur != nil {
				cur.Close()
			}
			return nil, false, err
		}
		if st, err := f.Stat(); err == nil && curStat != nil && os.SameFile(st, curStat) {
			f.Close()
			break
		}
		files = append(files, f)
	}
	if cur != nil {
		return append(files, cur), true, nil
	}
	if len(files) == 0 {
		return nil, false, missing
	}
	return files, false, nil
}

// after opens the files of the log at path that are newer than f, oldest
// first; none: f still is the current file.
func after(path string, f *file) ([]*file, error) {
	files, _, err := open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	// f's own name now, even if the file was renamed, or compressed and removed.
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		name = f.Name()
	}
	name = strings.TrimSuffix(name, " (deleted)")
	st, err := f.Stat()
	if err != nil {
		closeAll(files)
		return nil, err
	}
	for i := len(files) - 1; i >= 0; i-- {
		other, err := files[i].Stat()
		same := err == nil && os.SameFile(st, other)
		// The file at path is never f when the inodes differ.
		if !same && files[i].Name() != path && filepath.Base(strings.TrimSuffix(files[i].Name(), ".gz")) == filepath.Base(name) {
			same = true
		}
		if same {
			closeAll(files[:i+1])
			return files[i+1:], nil
		}
	}
	// f has been dropped altogether: all that is left is newer.
	return files, nil
}
