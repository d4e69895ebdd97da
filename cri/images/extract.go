package images

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/volumes/tree"
)

// ErrHostile marks what an image may not contain. It is also
// errdefs.ErrInvalidArgument: trying again does not help.
var ErrHostile = fmt.Errorf("refused: %w", errdefs.ErrInvalidArgument)

// budget is what is left of an image's limits; shared by its layers, which
// are extracted in parallel.
type budget struct {
	limits  Limits
	bytes   atomic.Int64 // that take disk
	stream  atomic.Int64 // of the archives, holes of their files included
	entries atomic.Int64
}

// read accounts for n bytes of an archive.
func (b *budget) read(n int64) error {
	if limit := b.limits.StreamSize; n > limit || b.stream.Add(n) > limit {
		return fmt.Errorf("the image's layers unpack to more than %d bytes, zeros included: %w", limit, ErrHostile)
	}
	return nil
}

// metered is an archive that is read within the budget.
type metered struct {
	r io.Reader
	b *budget
}

func (m *metered) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	if over := m.b.read(int64(n)); over != nil {
		return 0, over
	}
	return n, err
}

// extractor unpacks one layer below a directory that nobody else has open.
//
// Every entry is made relative to a directory descriptor, and that descriptor
// is found with openat2(RESOLVE_BENEATH), so no name in the archive and no
// symbolic link made by an earlier entry leads outside (CVE-2025-47290 and
// CVE-2021-32760 are what happens with path names checked first and used
// afterwards).
type extractor struct {
	root    int // the layer's directory
	layer   digest.Digest
	budget  *budget
	devices DevicePolicy
	log     *slog.Logger
	turn    *turn       // nil: nobody else waits
	ratio   func() bool // does the layer write too much for its size?

	dirs     map[string]*dirEntry // directories that the archive lists, by name within the layer
	implicit []string             // directories made because an entry needed them, parents first
	noted    int                  // bytes that these two take
	written  int64                // bytes of content and attributes that take disk
	shown    *atomic.Int64        // where others see them; nil: nobody looks

	lastName string // name and descriptor of the directory used last
	lastFD   int

	buf     []byte
	entries int64
}

// dirEntry is what is applied to a directory after everything in it is there.
type dirEntry struct {
	mode     uint32
	uid, gid int
	mtime    unix.Timespec
	xattrs   map[string]string
	opaque   bool
}

const (
	whiteout       = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
	opaqueXattr    = "trusted.overlay.opaque"
	paxXattr       = "SCHILY.xattr."
	maxXattrs      = 256
	// maxNoted bounds what is remembered of one layer's directories until its
	// end, in bytes: 400,000 of usual names.
	maxNoted = 64 << 20
)

func (x *extractor) refuse(name, format string, args ...any) error {
	return fmt.Errorf("layer %s: entry %q: %s: %w", x.layer, clip(name), fmt.Sprintf(format, args...), ErrHostile)
}

func (x *extractor) fail(name, what string, err error) error {
	return fmt.Errorf("layer %s: entry %q: %s: %w", x.layer, clip(name), what, err)
}

// clip bounds what a hostile archive can put into a message.
func clip(s string) string {
	if len(s) > 256 {
		return s[:256] + "…"
	}
	return s
}

// run extracts the archive read from r. Whiteouts become what overlayfs
// reads: a 0:0 character device, or trusted.overlay.opaque on the directory.
func (x *extractor) run(ctx context.Context, r io.Reader) error {
	x.dirs = map[string]*dirEntry{}
	x.lastFD = -1
	x.buf = make([]byte, 64<<10)
	defer x.forgetLast()

	tr := tar.NewReader(r)
	for {
		if err := x.pause(ctx); err != nil {
			return err
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return x.unreadable(err)
		}
		x.entries++
		if x.budget.entries.Add(1) > x.budget.limits.Entries {
			return x.refuse(hdr.Name, "the image has more than %d entries", x.budget.limits.Entries)
		}
		if err := x.entry(ctx, tr, hdr); err != nil {
			return err
		}
	}
	return x.finishDirs()
}

// said is an error told in words of our own.
type said struct {
	text string
	err  error
}

func (e *said) Error() string { return e.text }
func (e *said) Unwrap() error { return e.err }

// maxTold bounds an error that strangers have had a say in.
const maxTold = 8 << 10

// forPeople makes an error fit for logs, events and terminals: one line without
// control characters, of bounded length.
func forPeople(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	clean := strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, text[:min(len(text), maxTold)])
	if len(text) > maxTold {
		clean += "…"
	}
	if clean == text {
		return err
	}
	return &said{clean, err}
}

// unreadable tells what is wrong with an archive that cannot be read on.
func (x *extractor) unreadable(err error) error {
	cut := errors.Is(err, io.ErrUnexpectedEOF)
	switch {
	case x.entries == 0 && (cut || errors.Is(err, tar.ErrHeader)):
		return &said{fmt.Sprintf("layer %s is no tar archive: this is a signature or another artifact, not a container image, or the layer is damaged", x.layer), errors.Join(err, errdefs.ErrFailedPrecondition)}
	case cut:
		return &said{fmt.Sprintf("layer %s is damaged: it ends within entry %d of its archive", x.layer, x.entries+1), errors.Join(err, errdefs.ErrDataLoss)}
	}
	return fmt.Errorf("layer %s: entry %d of the archive: %w", x.layer, x.entries+1, err)
}

// pause lets others go first, and tells when nobody wants the layer any more.
func (x *extractor) pause(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if x.turn == nil {
		return nil
	}
	return x.turn.offer(ctx)
}

// cleanName turns an entry's name into a relative path without dots. An
// absolute name is taken relative to the layer's root, as every runtime does
// (some builders write "/app"); one that climbs above the root is refused.
func (x *extractor) cleanName(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", x.refuse(name, "the name contains a NUL byte")
	}
	if len(name) >= unix.PathMax {
		return "", x.refuse(name, "the name is %d bytes long", len(name))
	}
	clean := path.Clean(strings.TrimLeft(name, "/"))
	if clean == ".." || strings.HasPrefix(clean, "../") {
		return "", x.refuse(name, "the name leads out of the layer's root")
	}
	return clean, nil
}

func (x *extractor) entry(ctx context.Context, tr *tar.Reader, hdr *tar.Header) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := x.cleanName(hdr.Name)
	if err != nil {
		return err
	}
	if hdr.Uid < 0 || int64(hdr.Uid) >= 1<<32-1 || hdr.Gid < 0 || int64(hdr.Gid) >= 1<<32-1 {
		return x.refuse(hdr.Name, "owner %d:%d is out of range", hdr.Uid, hdr.Gid)
	}
	if hdr.Size < 0 {
		return x.refuse(hdr.Name, "negative size")
	}
	if name == "." {
		return x.rootDir(hdr)
	}
	parent, base := path.Split(name)
	parent = strings.TrimSuffix(parent, "/")

	dir, parent, err := x.dir(parent, hdr.Name)
	if err != nil {
		return err
	}
	name = path.Join(parent, base)
	if strings.HasPrefix(base, whiteout) {
		return x.whiteout(dir, parent, base, hdr)
	}

	switch hdr.Typeflag {
	case tar.TypeDir:
		return x.mkdir(dir, name, base, hdr)
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return x.file(ctx, dir, base, tr, hdr)
	case tar.TypeSymlink:
		if hdr.Linkname == "" || strings.IndexByte(hdr.Linkname, 0) >= 0 || len(hdr.Linkname) >= unix.PathMax {
			return x.refuse(hdr.Name, "symbolic link with an unusable target")
		}
		err = x.create(dir, base, hdr, func() error { return unix.Symlinkat(hdr.Linkname, dir, base) })
	case tar.TypeLink:
		return x.link(dir, base, hdr)
	case tar.TypeChar, tar.TypeBlock:
		if ok, err := x.deviceAllowed(hdr); err != nil || !ok {
			if err == nil {
				err = x.leaveOut(dir, base, hdr)
			}
			return err
		}
		kind := uint32(unix.S_IFCHR)
		if hdr.Typeflag == tar.TypeBlock {
			kind = unix.S_IFBLK
		}
		dev := unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))
		err = x.create(dir, base, hdr, func() error { return unix.Mknodat(dir, base, kind|uint32(hdr.Mode)&0o7777, int(dev)) })
	case tar.TypeFifo:
		err = x.create(dir, base, hdr, func() error { return unix.Mknodat(dir, base, unix.S_IFIFO|uint32(hdr.Mode)&0o7777, 0) })
	default:
		return x.refuse(hdr.Name, "entry of unknown type %q", hdr.Typeflag)
	}
	if err != nil {
		return err
	}
	return x.attributes(dir, base, hdr)
}

// dir returns a descriptor of the named directory, made if it is missing, and
// the name without the symbolic links that had to be followed by hand. The
// descriptor belongs to the extractor and is valid until the next call.
func (x *extractor) dir(name, entry string) (int, string, error) {
	if name == "" {
		return x.root, "", nil
	}
	if x.lastFD >= 0 && x.lastName == name {
		return x.lastFD, name, nil
	}
	x.forgetLast()
	fd, err := x.openDir(name)
	switch {
	case err == nil:
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOENT):
		// EXDEV: a symbolic link made by this layer is on the way and is
		// absolute or climbs above the root. Absolute ones mean the
		// container's root, as they will when the container runs.
		if name, err = x.resolve(name, entry); err != nil {
			return -1, "", err
		}
		if name == "" {
			return x.root, "", nil
		}
		if fd, err = x.mkparents(name, entry); err != nil {
			return -1, "", err
		}
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return -1, "", x.refuse(entry, "%q on the way is not a directory", clip(name))
	default:
		return -1, "", x.fail(entry, "open its directory", err)
	}
	x.lastName, x.lastFD = name, fd
	return fd, name, nil
}

func (x *extractor) openDir(name string) (int, error) {
	return openBeneath(x.root, name, unix.O_RDONLY|unix.O_DIRECTORY)
}

// openBeneath opens name below root; no link leads out of it, no mount is crossed.
func openBeneath(root int, name string, flags uint64) (int, error) {
	for {
		fd, err := unix.Openat2(root, name, &unix.OpenHow{
			Flags:   flags | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
		})
		// EAGAIN: a rename anywhere on the system raced with a "..".
		if err != unix.EINTR && err != unix.EAGAIN {
			return fd, err
		}
	}
}

func (x *extractor) forgetLast() {
	if x.lastFD >= 0 {
		unix.Close(x.lastFD)
	}
	x.lastFD, x.lastName = -1, ""
}

// resolve follows the symbolic links of name inside the layer by hand and
// returns the name without them. Links that climb above the root are refused.
func (x *extractor) resolve(name, entry string) (string, error) {
	todo := strings.Split(name, "/")
	var done []string
	for links := 0; len(todo) > 0; {
		c := todo[0]
		todo = todo[1:]
		switch c {
		case "", ".":
			continue
		case "..":
			if len(done) == 0 {
				return "", x.refuse(entry, "a symbolic link on the way leads out of the layer's root")
			}
			done = done[:len(done)-1]
			continue
		}
		var link [unix.PathMax]byte
		parent := x.root
		if len(done) > 0 {
			fd, err := openBeneath(x.root, strings.Join(done, "/"), unix.O_PATH|unix.O_DIRECTORY)
			if errors.Is(err, unix.ENOENT) { // made later
				done = append(done, c)
				continue
			}
			if err != nil {
				return "", x.fail(entry, "resolve its directory", err)
			}
			parent = fd
		}
		n, err := unix.Readlinkat(parent, c, link[:])
		if parent != x.root {
			unix.Close(parent)
		}
		if err != nil { // not a link, or not there
			done = append(done, c)
			continue
		}
		if links++; links > 40 {
			return "", x.refuse(entry, "more than 40 symbolic links on the way")
		}
		to := string(link[:n])
		if strings.HasPrefix(to, "/") {
			done = nil
		}
		todo = append(strings.Split(to, "/"), todo...)
	}
	return strings.Join(done, "/"), nil
}

// mkparents makes the missing directories of name, in which no symbolic links
// are left, and opens the last one. The attributes of those it makes come from
// the layers below, see inherit.
func (x *extractor) mkparents(name, entry string) (int, error) {
	at := x.root
	walked := ""
	for c := range strings.SplitSeq(name, "/") {
		walked = path.Join(walked, c)
		fd, err := openBeneath(at, c, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			if x.budget.entries.Add(1) > x.budget.limits.Entries {
				err = x.refuse(entry, "the image has more than %d entries", x.budget.limits.Entries)
			} else if err = x.note(entry, len(walked)); err != nil {
			} else if err = unix.Mkdirat(at, c, 0o755); err == nil {
				x.implicit = append(x.implicit, walked)
				if fd, err = openBeneath(at, c, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW); err == nil {
					err = unix.Fchmod(fd, 0o755) // the umask
				}
			}
		}
		if at != x.root {
			unix.Close(at)
		}
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			return -1, x.refuse(entry, "%q on the way is not a directory", clip(walked))
		}
		if errors.Is(err, ErrHostile) {
			return -1, err
		}
		if err != nil {
			return -1, x.fail(entry, "make its directory", err)
		}
		at = fd
	}
	return at, nil
}

// create runs make and, when something is in the way, takes that away first:
// a later entry replaces an earlier one.
func (x *extractor) create(dir int, base string, hdr *tar.Header, make func() error) error {
	err := make()
	if errors.Is(err, unix.EEXIST) {
		if err = tree.Remove(context.Background(), dir, base); err == nil {
			err = make()
		}
	}
	if err != nil {
		return x.fail(hdr.Name, "create", err)
	}
	return nil
}

// note accounts for something remembered of a directory until the layer's end.
func (x *extractor) note(entry string, size int) error {
	if x.noted += size + 128; x.noted > maxNoted {
		return x.refuse(entry, "the layer's directories take more than %d MiB to remember", maxNoted>>20)
	}
	return nil
}

// directory is what an entry says of one.
func (x *extractor) directory(name string, hdr *tar.Header) (*dirEntry, error) {
	e := &dirEntry{mode: uint32(hdr.Mode) & 0o7777, uid: hdr.Uid, gid: hdr.Gid, mtime: timespec(hdr.ModTime)}
	var err error
	if e.xattrs, err = x.xattrs(hdr); err != nil {
		return nil, err
	}
	size := len(name)
	for k, v := range e.xattrs {
		size += len(k) + len(v)
	}
	return e, x.note(hdr.Name, size)
}

// rootDir takes what the archive says of the layer's root. It is kept under the
// name "".
func (x *extractor) rootDir(hdr *tar.Header) error {
	if hdr.Typeflag != tar.TypeDir {
		return nil
	}
	e, err := x.directory("", hdr)
	if err != nil {
		return err
	}
	if old := x.dirs[""]; old != nil {
		e.opaque = old.opaque
	}
	x.dirs[""] = e
	return nil
}

func (x *extractor) mkdir(dir int, name, base string, hdr *tar.Header) error {
	e, err := x.directory(name, hdr)
	if err != nil {
		return err
	}
	err = unix.Mkdirat(dir, base, 0o700)
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if err = unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return x.fail(hdr.Name, "stat", err)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			if old := x.dirs[name]; old != nil {
				e.opaque = old.opaque
			}
			x.dirs[name] = e
			return nil
		}
		// A directory in the place of a whiteout of the same layer hides what
		// is below.
		e.opaque = st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
		if err = tree.Remove(context.Background(), dir, base); err == nil {
			err = unix.Mkdirat(dir, base, 0o700)
		}
	}
	if err != nil {
		return x.fail(hdr.Name, "create", err)
	}
	x.dirs[name] = e
	return nil
}

func (x *extractor) file(ctx context.Context, dir int, base string, r io.Reader, hdr *tar.Header) error {
	if sparse(hdr) { // its holes are not in the archive, and cost time all the same
		if err := x.budget.read(hdr.Size); err != nil {
			return x.fail(hdr.Name, "holes", err)
		}
	}
	fd := -1
	err := x.create(dir, base, hdr, func() (err error) {
		fd, err = unix.Openat(dir, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := x.copy(ctx, fd, r, hdr); err != nil {
		return err
	}
	if hdr.Uid != 0 || hdr.Gid != 0 {
		if err := unix.Fchown(fd, hdr.Uid, hdr.Gid); err != nil {
			return x.fail(hdr.Name, "chown", err)
		}
	}
	// After chown, which clears these two.
	if err := unix.Fchmod(fd, uint32(hdr.Mode)&0o7777); err != nil {
		return x.fail(hdr.Name, "chmod", err)
	}
	xattrs, err := x.xattrs(hdr)
	if err != nil {
		return err
	}
	for k, v := range xattrs {
		if err := unix.Fsetxattr(fd, k, []byte(v), 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return x.fail(hdr.Name, "set attribute "+clip(k), err)
		}
	}
	return x.times(dir, base, hdr)
}

// sparse files are read with zeros where the archive has nothing.
func sparse(hdr *tar.Header) bool {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range hdr.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// block is the unit of holes: that of the file systems that matter.
const block = 4096

var zeros [block]byte

// copy writes the entry's content, leaving holes where it is zero.
func (x *extractor) copy(ctx context.Context, fd int, r io.Reader, hdr *tar.Header) error {
	var off, end int64 // where it is, and up to where the file is written
	for left := hdr.Size; left > 0; {
		n, err := io.ReadFull(r, x.buf[:min(left, int64(len(x.buf)))])
		if err != nil {
			return x.fail(hdr.Name, "read", noEOF(err))
		}
		left -= int64(n)
		for b := x.buf[:n]; len(b) > 0; {
			size, hole := run(b)
			if !hole {
				if err := x.writeAt(fd, b[:size], off, hdr); err != nil {
					return err
				}
				end = off + int64(size)
			}
			off += int64(size)
			b = b[size:]
		}
		if err := x.pause(ctx); err != nil {
			return err
		}
	}
	if end < off {
		if err := unix.Ftruncate(fd, off); err != nil {
			return x.fail(hdr.Name, "truncate", err)
		}
	}
	return nil
}

// run is how many bytes of b, in whole blocks, are a hole, or are none.
func run(b []byte) (size int, hole bool) {
	for size < len(b) {
		part := b[size:min(size+block, len(b))]
		z := bytes.Equal(part, zeros[:len(part)])
		if size > 0 && z != hole {
			break
		}
		hole = z
		size += len(part)
	}
	return size, hole
}

func (x *extractor) writeAt(fd int, b []byte, at int64, hdr *tar.Header) error {
	if err := x.takes(hdr, len(b)); err != nil {
		return err
	}
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, at)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return x.fail(hdr.Name, "write", err)
		}
		b, at = b[n:], at+int64(n)
	}
	return nil
}

// takes accounts for bytes that take disk.
func (x *extractor) takes(hdr *tar.Header, n int) error {
	x.written += int64(n)
	if x.shown != nil {
		x.shown.Add(int64(n))
	}
	if x.budget.bytes.Add(int64(n)) > x.budget.limits.UnpackedSize {
		return x.refuse(hdr.Name, "the image unpacks to more than %d bytes", x.budget.limits.UnpackedSize)
	}
	if x.ratio() {
		return x.refuse(hdr.Name, "the layer unpacks to more than %d times its size", x.budget.limits.Ratio)
	}
	return nil
}

// noEOF: an archive that ends in the middle of an entry is broken, not done.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (x *extractor) link(dir int, base string, hdr *tar.Header) error {
	to, err := x.cleanName(hdr.Linkname)
	if err != nil {
		return x.refuse(hdr.Name, "hard link to %q, which leads out of the layer's root", clip(hdr.Linkname))
	}
	self, _ := x.cleanName(hdr.Name)
	if to == "." || to == self {
		return x.refuse(hdr.Name, "hard link to itself or the root")
	}
	parent, target := path.Split(to)
	parent = strings.TrimSuffix(parent, "/")
	from := x.root
	if parent != "" {
		fd, err := x.openDir(parent)
		if errors.Is(err, unix.EXDEV) {
			var resolved string
			if resolved, err = x.resolve(parent, hdr.Name); err != nil {
				return err
			}
			if resolved == "" {
				resolved = "."
			}
			fd, err = x.openDir(resolved)
		}
		if err != nil {
			return x.refuse(hdr.Name, "hard link to %q, which is not in this layer (%v)", clip(hdr.Linkname), err)
		}
		defer unix.Close(fd)
		from = fd
	}
	var st unix.Stat_t
	if err := unix.Fstatat(from, target, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return x.refuse(hdr.Name, "hard link to %q, which is not in this layer (%v)", clip(hdr.Linkname), err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return x.refuse(hdr.Name, "hard link to the directory %q", clip(hdr.Linkname))
	}
	return x.create(dir, base, hdr, func() error { return unix.Linkat(from, target, dir, base, 0) })
}

// deviceAllowed tells whether a device node is made. Those that are not are no
// fault of the image: a container has a /dev of its own.
func (x *extractor) deviceAllowed(hdr *tar.Header) (bool, error) {
	maj, mnr := hdr.Devmajor, hdr.Devminor
	if hdr.Typeflag == tar.TypeChar && maj == 0 && mnr == 0 {
		return false, x.refuse(hdr.Name, "device node 0:0 is overlayfs' own whiteout")
	}
	if maj < 0 || maj >= 1<<12 || mnr < 0 || mnr >= 1<<20 {
		return false, nil
	}
	switch x.devices {
	case DevicesAll:
		return true, nil
	case DevicesSafe:
		if hdr.Typeflag == tar.TypeChar {
			switch [2]int64{maj, mnr} {
			case [2]int64{1, 3}, [2]int64{1, 5}, [2]int64{1, 7}, [2]int64{1, 8}, [2]int64{1, 9}, // null zero full random urandom
				[2]int64{5, 0}, [2]int64{5, 1}, [2]int64{5, 2}: // tty console ptmx
				return true, nil
			}
		}
	}
	return false, nil
}

// leaveOut puts a whiteout where a device node would be: what the layers below
// have there is hidden by it all the same, and links to it have a target.
func (x *extractor) leaveOut(dir int, base string, hdr *tar.Header) error {
	if x.log != nil {
		x.log.Debug("device node of a layer is left out", "layer", x.layer, "entry", clip(hdr.Name), "type", string(hdr.Typeflag), "major", hdr.Devmajor, "minor", hdr.Devminor)
	}
	return x.create(dir, base, hdr, func() error { return unix.Mknodat(dir, base, unix.S_IFCHR, 0) })
}

// whiteout hides what the layers below have.
func (x *extractor) whiteout(dir int, parent, base string, hdr *tar.Header) error {
	switch {
	case base == whiteoutOpaque:
		if err := unix.Fsetxattr(dir, opaqueXattr, []byte("y"), 0); err != nil {
			return x.fail(hdr.Name, "mark its directory opaque", err)
		}
		if d := x.dirs[parent]; d != nil {
			d.opaque = true
		}
		return nil
	case strings.HasPrefix(base, whiteoutMeta):
		return nil // aufs' own book-keeping
	}
	hidden := strings.TrimPrefix(base, whiteout)
	if hidden == "" || hidden == "." || hidden == ".." {
		return x.refuse(hdr.Name, "whiteout of nothing that can be named")
	}
	err := unix.Mknodat(dir, hidden, unix.S_IFCHR, 0)
	if !errors.Is(err, unix.EEXIST) {
		if err != nil {
			return x.fail(hdr.Name, "create whiteout", err)
		}
		return nil
	}
	// The layer has the name itself: whiteouts speak only of the layers
	// below, so a directory becomes opaque and a file already hides them.
	var st unix.Stat_t
	if err := unix.Fstatat(dir, hidden, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return x.fail(hdr.Name, "stat", err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		fd, err := openBeneath(dir, hidden, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
		if err != nil {
			return x.fail(hdr.Name, "open", err)
		}
		defer unix.Close(fd)
		if err := unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0); err != nil {
			return x.fail(hdr.Name, "mark opaque", err)
		}
	}
	return nil
}

// attributes of what is neither a file nor a directory.
func (x *extractor) attributes(dir int, base string, hdr *tar.Header) error {
	if err := unix.Fchownat(dir, base, hdr.Uid, hdr.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return x.fail(hdr.Name, "chown", err)
	}
	if hdr.Typeflag != tar.TypeSymlink {
		// The umask took bits away. The name is one that this call has made
		// and no link, so fchmodat's following does no harm.
		if err := unix.Fchmodat(dir, base, uint32(hdr.Mode)&0o7777, 0); err != nil {
			return x.fail(hdr.Name, "chmod", err)
		}
	}
	return x.times(dir, base, hdr)
}

func (x *extractor) times(dir int, base string, hdr *tar.Header) error {
	t := timespec(hdr.ModTime)
	if err := unix.UtimesNanoAt(dir, base, []unix.Timespec{t, t}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return x.fail(hdr.Name, "set times", err)
	}
	return nil
}

// timespec bounds a time to what every file system stores.
func timespec(t time.Time) unix.Timespec {
	s := min(max(t.Unix(), 0), 1<<34)
	return unix.Timespec{Sec: s, Nsec: int64(t.Nanosecond())}
}

// xattrs returns the extended attributes that an image may set: those of
// trusted.* steer overlayfs, those of system.* are access lists of this host.
func (x *extractor) xattrs(hdr *tar.Header) (map[string]string, error) {
	var m map[string]string
	for k, v := range hdr.PAXRecords {
		k, ok := strings.CutPrefix(k, paxXattr)
		if !ok || strings.HasPrefix(k, "trusted.") || strings.HasPrefix(k, "system.") || strings.HasPrefix(k, "user.overlay.") || strings.HasPrefix(k, "security.ima") || strings.HasPrefix(k, "security.evm") || strings.HasPrefix(k, "security.selinux") {
			continue
		}
		if len(v) > 64<<10 || len(k) > 255 || len(m) >= maxXattrs {
			return nil, x.refuse(hdr.Name, "extended attributes beyond what Linux takes")
		}
		if m == nil {
			m = map[string]string{}
		}
		m[k] = v
		if err := x.takes(hdr, len(k)+len(v)); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// finishDirs applies what directory entries said, children first: making
// entries in a directory changes its times, and its mode may forbid it.
func (x *extractor) finishDirs() error {
	names := make([]string, 0, len(x.dirs))
	for n := range x.dirs {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, name := range slices.Backward(names) {
		e := x.dirs[name]
		fd, err := x.openDir(cmp.Or(name, "."))
		if err != nil {
			if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EXDEV) {
				continue // an entry made through a link that a later one replaced
			}
			return x.fail(name, "open", err)
		}
		err = applyDir(fd, e)
		unix.Close(fd)
		if err != nil {
			return x.fail(name, "set attributes", err)
		}
	}
	return nil
}

func applyDir(fd int, e *dirEntry) error {
	if err := unix.Fchown(fd, e.uid, e.gid); err != nil {
		return err
	}
	if err := unix.Fchmod(fd, e.mode); err != nil {
		return err
	}
	for k, v := range e.xattrs {
		if err := unix.Fsetxattr(fd, k, []byte(v), 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return err
		}
	}
	if e.opaque {
		if err := unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0); err != nil {
			return err
		}
	}
	return unix.UtimesNanoAt(fd, ".", []unix.Timespec{e.mtime, e.mtime}, unix.AT_SYMLINK_NOFOLLOW)
}
