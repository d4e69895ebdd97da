package images

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// extractInto runs the extractor as unpackLayer does.
func extractInto(t testing.TB, root string, raw []byte, limits Limits, devices DevicePolicy) error {
	t.Helper()
	needRoot(t)
	cfg := Config{Dir: "/x", Limits: limits}
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	b := &budget{limits: cfg.Limits}
	x := &extractor{root: fd, layer: digest.FromBytes(raw), budget: b, devices: devices}
	in := &metered{bytes.NewReader(raw), b}
	x.ratio = func() bool { return false }
	return x.run(context.Background(), in)
}

// TestHostileArchives: each of these gets out of a naive extractor's root, or
// fills the node. Outside the root there is a canary that must stay as it is.
func TestHostileArchives(t *testing.T) {
	needRoot(t)
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	big := entry{tar.Header{Name: "big", Typeflag: tar.TypeReg, Mode: 0o644}, strings.Repeat("x", 5000)}
	dev := func(kind byte, maj, mnr int64) entry {
		return entry{tar.Header{Name: "dev/node", Typeflag: kind, Mode: 0o666, Devmajor: maj, Devminor: mnr}, ""}
	}
	tests := []struct {
		name    string
		entries []entry
		limits  Limits
		devices DevicePolicy
		// refused names the entry that the error must name; "" means that the
		// archive is taken, but confined.
		refused string
	}{
		{name: "parent in the name", entries: []entry{file("../secret", "evil")}, refused: "../secret"},
		{name: "parent within the name", entries: []entry{dir("a/"), file("a/../../secret", "evil")}, refused: "a/../../secret"},
		{name: "absolute name", entries: []entry{file(secret, "evil")}},
		{name: "through a relative link", entries: []entry{symlink("up", "../"+filepath.Base(outside)), file("up/secret", "evil")}, refused: "up/secret"},
		{name: "through an absolute link", entries: []entry{symlink("abs", outside), file("abs/secret", "evil")}},
		{name: "through a chain of links", entries: []entry{dir("a/"), symlink("a/b", ".."), symlink("a/c", "b/.."), file("a/c/secret", "evil")}, refused: "a/c/secret"},
		{name: "link to a link out", entries: []entry{symlink("one", "two"), symlink("two", "../../.."), file("one/secret", "evil")}, refused: "one/secret"},
		{name: "loop of links", entries: []entry{symlink("a", "b"), symlink("b", "a"), file("a/x", "evil")}, refused: "a/x"},
		{name: "file written over a link", entries: []entry{symlink("f", secret), file("f", "evil")}},
		{name: "file written over a hard-linked link", entries: []entry{symlink("f", secret), hardlink("g", "f"), file("g", "evil")}},
		{name: "directory in the place of a link", entries: []entry{symlink("d", outside), dir("d/"), file("d/secret", "evil")}},
		{name: "directory made after its link", entries: []entry{dir("d/"), symlink("d", outside), file("d/secret", "evil")}},
		{name: "hard link out", entries: []entry{hardlink("h", "../../"+filepath.Base(outside)+"/secret")}, refused: "h"},
		{name: "hard link to an absolute name", entries: []entry{hardlink("h", secret), file("h", "evil")}, refused: "h"},
		{name: "hard link through a link", entries: []entry{symlink("s", outside), hardlink("h", "s/secret")}, refused: "h"},
		{name: "hard link through a relative link", entries: []entry{symlink("s", "../.."), hardlink("h", "s/etc/passwd")}, refused: "h"},
		{name: "hard link to a directory", entries: []entry{dir("d/"), hardlink("h", "d")}, refused: "h"},
		{name: "hard link to itself", entries: []entry{file("h", "x"), hardlink("h", "h")}, refused: "h"},
		{name: "whiteout of the parent", entries: []entry{dir("d/"), file("d/.wh...", "")}, refused: "d/.wh..."},
		{name: "whiteout of the directory", entries: []entry{dir("d/"), file("d/.wh..", "")}, refused: "d/.wh.."},
		{name: "whiteout of nothing", entries: []entry{file(".wh.", "")}, refused: ".wh."},
		{name: "opaque through a link", entries: []entry{symlink("s", outside), file("s/.wh..wh..opq", "")}},
		{name: "whiteout through a relative link", entries: []entry{symlink("s", "../"+filepath.Base(outside)), file("s/.wh.secret", "")}, refused: "s/.wh.secret"},
		{name: "disk", entries: []entry{dev(tar.TypeBlock, 8, 0)}},
		{name: "memory", entries: []entry{dev(tar.TypeChar, 1, 1)}},
		{name: "forged whiteout", entries: []entry{dev(tar.TypeChar, 0, 0)}, devices: DevicesAll, refused: "dev/node"},
		{name: "null where none is allowed", entries: []entry{dev(tar.TypeChar, 1, 3)}, devices: DevicesNone},
		{name: "file in a file", entries: []entry{file("a", "x"), file("a/b", "evil")}, refused: "a/b"},
		{name: "owner beyond 32 bits", entries: []entry{{tar.Header{Name: "f", Typeflag: tar.TypeReg, Uid: 1 << 32, Format: tar.FormatGNU}, ""}}, refused: "f"},
		{name: "too many entries", entries: []entry{file("a", ""), file("b", ""), file("c", "")}, limits: Limits{Entries: 2}, refused: "c"},
		{name: "too many entries by parents", entries: []entry{file("a/b/c/d", "")}, limits: Limits{Entries: 3}, refused: "a/b/c/d"},
		{name: "too many zeros", entries: []entry{file("a", strings.Repeat("\x00", 1<<20))}, limits: Limits{StreamSize: 1 << 19}, refused: "a"},
		{name: "too large", entries: []entry{file("a", "x"), big}, limits: Limits{UnpackedSize: 4096}, refused: "big"},
		{name: "unknown type", entries: []entry{{tar.Header{Name: "odd", Typeflag: 'Z'}, ""}}, refused: "odd"},
		{name: "attributes beyond reason", entries: []entry{{tar.Header{Name: "f", Typeflag: tar.TypeReg, PAXRecords: map[string]string{paxXattr + "user.a": strings.Repeat("x", 70000)}}, ""}}, refused: "f"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := os.WriteFile(secret, []byte("canary"), 0o600); err != nil {
				t.Fatal(err)
			}
			before := files(t, outside)
			// The root is beside the canary, so that one ".." reaches it.
			root := filepath.Join(filepath.Dir(outside), "root")
			if err := os.Mkdir(root, 0o755); err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(root)
			raw := archiveOf(t, tt.entries...)
			err := extractInto(t, root, raw, tt.limits, tt.devices)
			if tt.refused == "" && err != nil {
				t.Errorf("refused, should be confined: %v", err)
			}
			if tt.refused != "" {
				if !errors.Is(err, ErrHostile) || !errdefs.IsInvalidArgument(err) {
					t.Fatalf("err = %v, want ErrHostile", err)
				}
				if !strings.Contains(err.Error(), `"`+tt.refused+`"`) || !strings.Contains(err.Error(), digest.FromBytes(raw).String()) {
					t.Errorf("error does not name layer and entry: %v", err)
				}
			}
			if got := read(t, secret); got != "canary" {
				t.Errorf("canary outside the root is now %q", got)
			}
			st, serr := os.Stat(secret)
			if serr != nil || st.Sys().(*syscall.Stat_t).Nlink != 1 {
				t.Errorf("canary was linked to: %v", serr)
			}
			for f := range files(t, outside) {
				if !before[f] {
					t.Errorf("made outside the root: %s", f)
				}
			}
			if _, xerr := unix.Getxattr(outside, opaqueXattr, nil); xerr == nil {
				t.Error("directory outside the root was marked opaque")
			}
		})
	}
}

// TestDirectoriesBeyondMemory: what is remembered of directories is bounded,
// whether they are listed or only implied.
func TestDirectoriesBeyondMemory(t *testing.T) {
	needRoot(t)
	for _, last := range []entry{dir("listed/"), file("implied/f", "")} {
		root := t.TempDir()
		fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		cfg := Config{Dir: "/x"}
		if err := cfg.complete(); err != nil {
			t.Fatal(err)
		}
		x := &extractor{root: fd, budget: &budget{limits: cfg.Limits}, ratio: func() bool { return false }, noted: maxNoted - 300}
		err = x.run(t.Context(), bytes.NewReader(archiveOf(t, dir("a/"), dir("b/"), last)))
		unix.Close(fd)
		if !errors.Is(err, ErrHostile) || !strings.Contains(err.Error(), "remember") || !strings.Contains(err.Error(), last.Name) {
			t.Errorf("%s: %v", last.Name, err)
		}
	}
}

func TestExtractKeepsWhatAnImageNeeds(t *testing.T) {
	root := t.TempDir()
	long := strings.Repeat("long/", 60) + strings.Repeat("n", 200)
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	hole := strings.Repeat("\x00", 1<<20)
	err := extractInto(t, root, archiveOf(t,
		entry{tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o700}, ""},
		entry{tar.Header{Name: "./usr/", Typeflag: tar.TypeDir, Mode: 0o1755, Uid: 7, Gid: 8}, ""},
		entry{tar.Header{Name: "usr/su", Typeflag: tar.TypeReg, Mode: 0o4755, Uid: 11, Gid: 12}, "suid"},
		entry{tar.Header{Name: "usr/ping", Typeflag: tar.TypeReg, Mode: 0o755, PAXRecords: map[string]string{paxXattr + "security.capability": capability, paxXattr + "trusted.overlay.opaque": "y", paxXattr + "user.note": "hi"}}, "ping"},
		hardlink("usr/su2", "usr/su"),
		hardlink("usr/su3", "/usr/su"),
		symlink("lib", "usr/lib"),
		dir("usr/lib/"),
		file("lib/through", "link"),
		symlink("var", "/usr"),
		file("var/through", "absolute"),
		file(long, "deep"),
		file("hole", hole+"end"),
		file("tail", "start"+hole),
		file("striped", strings.Repeat(strings.Repeat("\x00", 31<<12)+strings.Repeat("x", 1<<12), 8)+"\x00"),
		entry{tar.Header{Name: "pipe", Typeflag: tar.TypeFifo, Mode: 0o622}, ""},
		entry{tar.Header{Name: "null", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3}, ""},
		file(".wh.gone", ""),
		dir("opaque/"), file("opaque/.wh..wh..opq", ""), file("opaque/kept", "x"),
		file("first", "1"), file("first", "2"),
		file(".wh.back", ""), dir("back/"),
		dir("both/"), file(".wh.both", ""),
		file(".wh..wh.plnk", ""),
		entry{tar.Header{Name: "/abs", Typeflag: tar.TypeReg, Mode: 0o600}, "absolute"},
	), Limits{}, DevicesSafe)
	if err != nil {
		t.Fatal(err)
	}
	stat := func(name string) (st unix.Stat_t) {
		t.Helper()
		if err := unix.Lstat(filepath.Join(root, name), &st); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return st
	}
	if st := stat("usr"); st.Uid != 7 || st.Gid != 8 || st.Mode&0o7777 != 0o1755 || st.Mtim.Sec != epoch.Unix() {
		t.Errorf("usr: %d:%d %o %d", st.Uid, st.Gid, st.Mode, st.Mtim.Sec)
	}
	if st := stat("usr/su"); st.Uid != 11 || st.Gid != 12 || st.Mode&0o7777 != 0o4755 || st.Nlink != 3 {
		t.Errorf("usr/su: %d:%d %o, %d links", st.Uid, st.Gid, st.Mode, st.Nlink)
	}
	xattr := func(name, key string) string {
		b := make([]byte, 256)
		n, err := unix.Lgetxattr(filepath.Join(root, name), key, b)
		if err != nil {
			return ""
		}
		return string(b[:n])
	}
	if got := xattr("usr/ping", "security.capability"); got != capability {
		t.Errorf("capability: %q", got)
	}
	if got := xattr("usr/ping", "user.note"); got != "hi" {
		t.Errorf("user attribute: %q", got)
	}
	if got := xattr("usr/ping", opaqueXattr); got != "" {
		t.Errorf("trusted attribute was taken from the archive: %q", got)
	}
	for name, want := range map[string]string{"usr/lib/through": "link", "usr/through": "absolute", long: "deep", "first": "2", "abs": "absolute", "hole": hole + "end", "tail": "start" + hole} {
		if got := read(t, filepath.Join(root, name)); got != want {
			t.Errorf("%s: %d bytes, want %d", clip(name), len(got), len(want))
		}
	}
	if st := stat("hole"); st.Blocks*512 > 16<<10 {
		t.Errorf("hole takes %d bytes on disk", st.Blocks*512)
	}
	if st := stat("striped"); st.Size != 8<<17+1 || st.Blocks*512 > 8<<14 {
		t.Errorf("striped has %d bytes and takes %d", st.Size, st.Blocks*512)
	}
	if st := stat("."); st.Mode&0o7777 != 0o700 {
		t.Errorf("root: %o", st.Mode)
	}
	if st := stat("pipe"); st.Mode != unix.S_IFIFO|0o622 {
		t.Errorf("pipe: %o", st.Mode)
	}
	if st := stat("null"); st.Rdev != unix.Mkdev(1, 3) || st.Mode != unix.S_IFCHR|0o666 {
		t.Errorf("null: %x %o", st.Rdev, st.Mode)
	}
	if st := stat("gone"); st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		t.Errorf("whiteout: %o %x", st.Mode, st.Rdev)
	}
	for _, d := range []string{"opaque", "back", "both"} {
		if got := xattr(d, opaqueXattr); got != "y" {
			t.Errorf("%s is not opaque", d)
		}
	}
	if got := read(t, filepath.Join(root, "opaque/kept")); got != "x" {
		t.Errorf("opaque/kept: %q", got)
	}
	if _, err := os.Lstat(filepath.Join(root, ".wh..wh.plnk")); err == nil {
		t.Error("aufs' book-keeping was unpacked")
	}
}

func TestTruncatedArchive(t *testing.T) {
	raw := archiveOf(t, file("a", strings.Repeat("x", 4096)))
	for _, n := range []int{100, 700, 2000} {
		err := extractInto(t, t.TempDir(), raw[:n], Limits{}, DevicesSafe)
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("archive cut at %d: %v", n, err)
		}
	}
}

func TestParseConfig(t *testing.T) {
	many := `"` + strings.Repeat(`A=b","`, 5000) + `A=b"`
	tests := []struct {
		name, json string
		layers     int
		ok         bool
	}{
		{"plain", `{"os":"linux","config":{"Env":["A=b"],"User":"1000:1000"},"rootfs":{"type":"layers"}}`, 0, true},
		{"no time", `{"created":"","config":{},"rootfs":{"type":"layers"},"history":[{"created":"","comment":"x"}]}`, 0, true},
		{"name and group", `{"config":{"User":"www-data:www-data"}}`, 0, true},
		{"windows", `{"os":"windows"}`, 0, false},
		{"no json", `{`, 0, false},
		{"too few diff ids", `{"rootfs":{"diff_ids":[]}}`, 1, false},
		{"bad diff id", `{"rootfs":{"diff_ids":["sha256:../../x"]}}`, 1, false},
		{"uid that wraps to root", `{"config":{"User":"4294967296"}}`, 0, false},
		{"negative uid", `{"config":{"User":"-1"}}`, 0, false},
		{"gid that wraps", `{"config":{"User":"1:4294967296"}}`, 0, false},
		{"newline in user", `{"config":{"User":"a\nroot"}}`, 0, false},
		{"two colons", `{"config":{"User":"a:b:c"}}`, 0, false},
		{"newline in home", `{"config":{"Env":["HOME=/\nroot::0:0::/:/bin/sh"]}}`, 0, false},
		{"NUL in env", `{"config":{"Env":["A=b\u0000c"]}}`, 0, false},
		{"huge variable", `{"config":{"Env":["A=` + strings.Repeat("x", 200<<10) + `"]}}`, 0, false},
		{"many variables", `{"config":{"Env":[` + many + `]}}`, 0, false},
		{"huge label", `{"config":{"Labels":{"a":"` + strings.Repeat("x", 2<<20) + `"}}}`, 0, false},
		{"NUL in args", `{"config":{"Cmd":["a\u0000"]}}`, 0, false},
		{"odd working directory", `{"config":{"WorkingDir":"/a\nb"}}`, 0, false},
		{"odd stop signal", `{"config":{"StopSignal":"` + strings.Repeat("x", 99) + `"}}`, 0, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := parseConfig([]byte(tt.json), tt.layers)
			if (err == nil) != tt.ok {
				t.Errorf("err = %v, ok = %v", err, tt.ok)
			}
			if err != nil && !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err) {
				t.Errorf("kind of %v", err)
			}
		})
	}
	c, err := parseConfig([]byte(`{"config":{"Labels":{"io.kubernetes.cri-containerd.x":"y","containerd.io/gc.root":"1","a":"b"},"Env":["PATH=/bin","junk","=x"]},"history":[{"comment":"c"}]}`), 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Config.Labels) != 1 || c.Config.Labels["a"] != "b" || len(c.Config.Env) != 1 || c.History != nil {
		t.Errorf("config: %+v", c)
	}
}

func TestParseReference(t *testing.T) {
	d := "sha256:" + strings.Repeat("a", 64)
	for in, want := range map[string]string{
		"nginx":                 "docker.io/library/nginx:latest",
		"team/app:1":            "docker.io/team/app:1",
		"localhost:5000/x":      "localhost:5000/x:latest",
		"r.io/a/b@" + d:         "r.io/a/b@" + d,
		"r.io/a/b:v1@" + d:      "r.io/a/b@" + d,
		"docker.io/nginx":       "docker.io/library/nginx:latest",
		"[::1]:5000/x:y":        "[::1]:5000/x:y",
		"x/UPPER":               "",
		"":                      "",
		"a b":                   "",
		"nginx@sha256:short":    "",
		strings.Repeat("a", 70): "docker.io/library/" + strings.Repeat("a", 70) + ":latest",
	} {
		got, err := parseReference(in)
		if want == "" {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q: %v, %v", in, got, err)
			}
			continue
		}
		if err != nil || got.String() != want {
			t.Errorf("%q: %s, %v; want %s", in, got, err, want)
		}
	}
}
