package volumes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The layout is that of upstream's AtomicWriter, which readers know and watch:
//
//	..2026_11_21_03_10_00.123456789/   one generation of the content
//	..data -> ..2026_11_21_03_10_00.123456789
//	key -> ..data/key                  what the container reads
//
// A new generation is written beside the old one; renaming a link over ..data
// changes all files at once.
const (
	dataLink    = "..data"
	newDataLink = "..data_tmp"
)

// ownerReadOnly is what a group gets on files that containers only read, and
// groupDir on their directories (upstream: volume.SetVolumeOwnership).
const (
	groupRead = 0o440
	groupDir  = 0o550 | unix.S_ISGID
)

// writeAtomically brings a volume to the given content, and says whether that
// was a change. group owns what is written if it is not negative.
func writeAtomically(root *dir, want files, group int) (changed bool, err error) {
	old, err := readLink(root, dataLink)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return false, fmt.Errorf("%s: %w", dataLink, err)
	}
	// A link that leads anywhere but to a generation beside it is not ours.
	if strings.Contains(old, "/") || !strings.HasPrefix(old, "..") || old == ".." {
		old = ""
	}
	if old != "" {
		same, err := sameContent(root, old, want, group)
		if err == nil && same {
			// Complete what an interrupted write left undone.
			return false, finishWrite(root, want, old)
		}
	}

	gen, err := writeGeneration(root, want, group)
	if err != nil {
		return false, err
	}
	unix.Unlinkat(root.fd, newDataLink, 0)
	if err := unix.Symlinkat(gen, root.fd, newDataLink); err != nil {
		return false, &os.PathError{Op: "symlink", Path: newDataLink, Err: err}
	}
	if err := unix.Renameat(root.fd, newDataLink, root.fd, dataLink); err != nil {
		return false, &os.PathError{Op: "rename", Path: dataLink, Err: err}
	}
	return true, finishWrite(root, want, gen)
}

// finishWrite makes the visible links and removes what is not wanted any more:
// links to keys that are gone, and all generations but keep.
func finishWrite(root *dir, want files, keep string) error {
	visible := map[string]bool{}
	for p := range want {
		first, _, _ := strings.Cut(p, "/")
		visible[first] = true
	}
	names, err := root.names()
	if err != nil {
		return err
	}
	for _, name := range names {
		switch {
		case name == dataLink || name == keep:
		case name == newDataLink:
			unix.Unlinkat(root.fd, name, 0)
		case strings.HasPrefix(name, ".."):
			if err := removeTree(context.Background(), root, name); err != nil {
				return fmt.Errorf("old content %s: %w", name, err)
			}
		default:
			target, err := readLink(root, name)
			if err != nil || target != dataLink+"/"+name {
				continue // not made here: a subPath's directory
			}
			if visible[name] {
				delete(visible, name)
			} else if err := unix.Unlinkat(root.fd, name, 0); err != nil {
				return &os.PathError{Op: "remove", Path: name, Err: err}
			}
		}
	}
	for name := range visible {
		err := unix.Symlinkat(dataLink+"/"+name, root.fd, name)
		if errors.Is(err, unix.EEXIST) {
			// An empty directory that a subPath asked for before the key was there.
			if unix.Unlinkat(root.fd, name, unix.AT_REMOVEDIR) == nil {
				err = unix.Symlinkat(dataLink+"/"+name, root.fd, name)
			}
		}
		if err != nil {
			return &os.PathError{Op: "symlink", Path: name, Err: err}
		}
	}
	return nil
}

// writeGeneration writes the content into a new directory and returns its name.
func writeGeneration(root *dir, want files, group int) (name string, err error) {
	now := time.Now().UTC()
	for try := 0; ; try++ {
		name = now.Format("..2006_01_02_15_04_05.") + strconv.Itoa(now.Nanosecond()+try)
		err := unix.Mkdirat(root.fd, name, 0o755)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EEXIST) || try == 100 {
			return "", &os.PathError{Op: "mkdir", Path: name, Err: err}
		}
	}
	defer func() {
		if err != nil {
			_ = removeTree(context.Background(), root, name)
		}
	}()
	gen, err := root.openDir(name)
	if err != nil {
		return "", err
	}
	defer gen.close()
	if err := own(gen.fd, 0o755, group, true); err != nil {
		return "", err
	}
	dirs := map[string]*dir{".": gen}
	defer func() {
		for p, d := range dirs {
			if p != "." {
				d.close()
			}
		}
	}()
	for _, p := range slices.Sorted(maps.Keys(want)) {
		up, err := ensureDir(dirs, path.Dir(p), group)
		if err != nil {
			return "", err
		}
		if err := writeFile(up, path.Base(p), want[p], group); err != nil {
			return "", err
		}
	}
	return name, nil
}

func ensureDir(dirs map[string]*dir, p string, group int) (*dir, error) {
	if d, ok := dirs[p]; ok {
		return d, nil
	}
	up, err := ensureDir(dirs, path.Dir(p), group)
	if err != nil {
		return nil, err
	}
	d, err := up.makeDir(path.Base(p), 0o755)
	if err != nil {
		return nil, err
	}
	if err := own(d.fd, 0o755, group, true); err != nil {
		d.close()
		return nil, err
	}
	dirs[p] = d
	return d, nil
}

func writeFile(d *dir, name string, f projection, group int) error {
	fd, err := unix.Openat(d.fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: d.name + "/" + name, Err: err}
	}
	out := os.NewFile(uintptr(fd), name)
	defer out.Close()
	if _, err := out.Write(f.data); err != nil {
		return err
	}
	// After the write and past the umask. No fsync: after a crash of the host
	// the content is written anew.
	if f.user != 0 {
		if err := unix.Fchown(fd, f.user, -1); err != nil {
			return fmt.Errorf("user %d: %w", f.user, err)
		}
	}
	return own(fd, f.mode, group, false)
}

// modeFor is the mode of a file or directory that containers only read.
func modeFor(mode uint32, group int, isDir bool) uint32 {
	if group < 0 {
		return mode
	}
	if isDir {
		return mode | groupDir
	}
	return mode | groupRead
}

func own(fd int, mode uint32, group int, isDir bool) error {
	if group >= 0 {
		if err := unix.Fchown(fd, -1, group); err != nil {
			return fmt.Errorf("fsGroup %d: %w", group, err)
		}
	}
	return unix.Fchmod(fd, modeFor(mode, group, isDir))
}

// sameContent compares a generation on disk with what is wanted.
func sameContent(root *dir, name string, want files, group int) (bool, error) {
	gen, err := root.openDir(name)
	if err != nil {
		return false, err
	}
	defer gen.close()
	found := 0
	dirs := map[string]bool{} // nothing else is entered, whatever is there
	for p := range want {
		for up := path.Dir(p); up != "."; up = path.Dir(up) {
			dirs[up] = true
		}
	}
	var walk func(d *dir, prefix string) (bool, error)
	walk = func(d *dir, prefix string) (bool, error) {
		names, err := d.names()
		if err != nil {
			return false, err
		}
		for _, n := range names {
			p := prefix + n
			f, isFile := want[p]
			if !isFile && !dirs[p] {
				return false, nil
			}
			if !isFile {
				sub, err := d.openDir(n)
				if err != nil {
					return false, nil // a file that is not wanted
				}
				same, err := walk(sub, p+"/")
				sub.close()
				if err != nil || !same {
					return false, err
				}
				continue
			}
			same, err := sameFile(d, n, f, group)
			if err != nil || !same {
				return false, err
			}
			found++
		}
		return true, nil
	}
	same, err := walk(gen, "")
	return same && found == len(want), err
}

func sameFile(d *dir, name string, want projection, group int) (bool, error) {
	fd, err := unix.Openat(d.fd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return false, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != int64(len(want.data)) ||
		st.Mode&0o7777 != modeFor(want.mode, group, false) || (group >= 0 && int(st.Gid) != group) || (want.user != 0 && int(st.Uid) != want.user) {
		return false, nil
	}
	have, err := io.ReadAll(f)
	return bytes.Equal(have, want.data), err
}

func readLink(d *dir, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(d.fd, name, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}
