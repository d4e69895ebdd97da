package volumes

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// mountAt mounts a new filesystem on name in d. It uses the new mount API, so
// that the place is a descriptor; nosuid and nodev as upstream's callers get
// them from their mounter's defaults do not apply: a pod may make devices in an
// emptyDir if it is privileged.
func mountAt(d *dir, name, fstype string, attrs int, options map[string]string) error {
	at := d.name + "/" + name
	target, err := unix.Openat(d.fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: at, Err: err}
	}
	defer unix.Close(target)
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return &os.PathError{Op: "fsopen " + fstype + " for", Path: at, Err: err}
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "source", fstype); err != nil {
		return &os.PathError{Op: "mount " + fstype, Path: at, Err: err}
	}
	for key, value := range options {
		if value == "" {
			err = unix.FsconfigSetFlag(fs, key)
		} else {
			err = unix.FsconfigSetString(fs, key, value)
		}
		if err != nil {
			return fmt.Errorf("mount %s on %s: option %s=%s: %w", fstype, at, key, value, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return &os.PathError{Op: "mount " + fstype + " on", Path: at, Err: err}
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return &os.PathError{Op: "mount " + fstype + " on", Path: at, Err: err}
	}
	defer unix.Close(mnt)
	if err := unix.MoveMount(mnt, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "mount " + fstype + " on", Path: at, Err: err}
	}
	return nil
}

// mountEntry is one line of /proc/self/mountinfo (Linux
// Documentation/filesystems/proc.rst, 3.5).
type mountEntry struct {
	id     uint64
	parent uint64
	device string // major:minor
	point  string
	flags  string // of this mount, not of the filesystem: "rw,nosuid"
	fstype string
	source string
}

// mountTable is the mounts of this process's namespace, in order of mounting.
type mountTable struct {
	entries []mountEntry
}

// mounts is what the kernel has said last. A table of a node with hundreds of
// pods is long, and each container's mounts ask for it.
var mounts struct {
	sync.Mutex
	fd    int // not an os.File: the runtime's poller would see changes instead of us
	table *mountTable
}

// readMounts returns the table as it is now; it must not be changed.
func readMounts() (*mountTable, error) {
	const name = "/proc/self/mountinfo"
	mounts.Lock()
	defer mounts.Unlock()
	if mounts.fd == 0 {
		fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: name, Err: err}
		}
		mounts.fd = fd
	}
	// The kernel tells by an error that the table has changed since the file was
	// polled last, or opened: proc_pid_mountinfo(5). So: polled first, then read.
	fds := []unix.PollFd{{Fd: int32(mounts.fd), Events: unix.POLLPRI}}
	_, err := unix.Poll(fds, 0)
	if err == nil && mounts.table != nil && fds[0].Revents&(unix.POLLERR|unix.POLLPRI) == 0 {
		return mounts.table, nil
	}
	mounts.table = nil
	data, err := readAll(mounts.fd)
	if err != nil {
		return nil, &os.PathError{Op: "read", Path: name, Err: err}
	}
	mounts.table, err = parseMounts(data)
	return mounts.table, err
}

// readAll reads a file of the kernel's from its beginning.
func readAll(fd int) ([]byte, error) {
	data := make([]byte, 0, 1<<14)
	for {
		if len(data) == cap(data) {
			data = slices.Grow(data, cap(data))
		}
		n, err := unix.Pread(fd, data[len(data):cap(data)], int64(len(data)))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, err
		case n == 0:
			return data, nil
		default:
			data = data[:len(data)+n]
		}
	}
}

func parseMounts(data []byte) (*mountTable, error) {
	t := &mountTable{entries: make([]mountEntry, 0, bytes.Count(data, []byte("\n")))}
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSuffix(line, "\n")
		head, tail, ok := strings.Cut(line, " - ")
		fields := strings.Split(head, " ")
		rest := strings.Split(tail, " ")
		if !ok || len(fields) < 6 || len(rest) < 2 {
			return nil, fmt.Errorf("mountinfo: cannot read line %q", line)
		}
		id, err1 := strconv.ParseUint(fields[0], 10, 64)
		parent, err2 := strconv.ParseUint(fields[1], 10, 64)
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("mountinfo: line %q: %w", line, err)
		}
		t.entries = append(t.entries, mountEntry{
			id: id, parent: parent, device: fields[2], point: unescape(fields[4]), flags: fields[5], fstype: rest[0], source: unescape(rest[1]),
		})
	}
	return t, nil
}

// unescape undoes the octal escapes of mountinfo (space, tab, newline,
// backslash).
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// at is the mount on top at a place; nil: nothing is mounted there.
func (t *mountTable) at(point string) *mountEntry {
	for i := range slices.Backward(t.entries) {
		if t.entries[i].point == point {
			return &t.entries[i]
		}
	}
	return nil
}

// restrictions are those of nosuid, nodev and noexec that hold at a path without
// links.
func (t *mountTable) restrictions(path string) (flags []string) {
	var on *mountEntry // the deepest, and of those the last
	for i := range t.entries {
		e := &t.entries[i]
		if (on == nil || len(e.point) >= len(on.point)) && (e.point == "/" || path == e.point || strings.HasPrefix(path, e.point+"/")) {
			on = e
		}
	}
	if on == nil {
		return nil
	}
	for f := range strings.SplitSeq(on.flags, ",") {
		if f == "nosuid" || f == "nodev" || f == "noexec" {
			flags = append(flags, f)
		}
	}
	return flags
}

// below returns the mounts strictly below path, the last mounted first, so that
// they can be unmounted in this order.
func (t *mountTable) below(path string) []mountEntry {
	var found []mountEntry
	for _, e := range t.entries {
		if strings.HasPrefix(e.point, path+"/") {
			found = append(found, e)
		}
	}
	// A mount moved or made under an older one still has the greater depth.
	slices.Reverse(found)
	slices.SortStableFunc(found, func(a, b mountEntry) int {
		return strings.Count(b.point, "/") - strings.Count(a.point, "/")
	})
	return found
}

// foreignTypes are the filesystems whose every access may wait for something
// that is not this machine.
var foreignTypes = []string{"nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "9p", "afs", "lustre", "glusterfs", "gfs2", "ocfs2", "beegfs", "gpfs", "autofs", "orangefs", "coda"}

func foreignType(fstype string) bool {
	return strings.HasPrefix(fstype, "fuse") && fstype != "fusectl" || slices.Contains(foreignTypes, fstype)
}

// maxLinks is the kernel's limit for links in one path.
const maxLinks = 40

// foreignPath says whether a path leads to or through a foreign filesystem.
func (t *mountTable) foreignPath(path string) bool { return t.foreignMount(path) != nil }

// foreignMount is the first foreign filesystem on the way of a path; nil: there
// is none. It looks at links, but never at anything on such a filesystem.
func (t *mountTable) foreignMount(path string) *mountEntry {
	// The filesystem at a place is that of the last mount there.
	points := map[string]*mountEntry{}
	any := false
	for i := range t.entries {
		e := &t.entries[i]
		points[e.point] = e
		any = any || foreignType(e.fstype)
	}
	if !any {
		return nil
	}
	at, links := "/", 0
	rest := strings.Split(path, "/")
	for len(rest) > 0 {
		name := rest[0]
		rest = rest[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			at = filepath.Dir(at)
			continue
		}
		next := filepath.Join(at, name)
		if e := points[next]; e != nil {
			if foreignType(e.fstype) {
				return e
			}
			at = next // a mount point is not a link
			continue
		}
		target, err := os.Readlink(next)
		if err != nil {
			at = next // not a link, or not there
			continue
		}
		if links++; links > maxLinks {
			return nil // the kernel says ELOOP
		}
		if filepath.IsAbs(target) {
			at = "/"
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return nil
}
