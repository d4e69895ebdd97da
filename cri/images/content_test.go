package images

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestDeviceNodesAreLeftOut: old bases have nodes that no container may use.
// What the layers below have in their place stays hidden.
func TestDeviceNodesAreLeftOut(t *testing.T) {
	node := func(name string, kind byte, maj, mnr int64) entry {
		return entry{tar.Header{Name: name, Typeflag: kind, Mode: 0o660, Devmajor: maj, Devminor: mnr}, ""}
	}
	s := openStore(t, t.TempDir(), nil)
	root := mountOf(t, s, "c", loadOne(t, s, imageOf(t,
		layerOf(t, dir("dev/"), file("dev/loop0", "below"), file("dev/kept", "x")),
		layerOf(t, dir("dev/"),
			node("dev/agpgart", tar.TypeChar, 10, 175), node("dev/loop0", tar.TypeBlock, 7, 0), node("dev/mem", tar.TypeChar, 1, 1),
			node("dev/odd", tar.TypeChar, 1<<20, 0), hardlink("dev/alias", "dev/agpgart"), node("dev/null", tar.TypeChar, 1, 3),
			file("dev/twice", "x"), node("dev/twice", tar.TypeBlock, 8, 0)),
	)))
	list, err := os.ReadDir(filepath.Join(root, "dev"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	if fmt.Sprint(names) != "[kept null]" {
		t.Errorf("dev has %v", names)
	}
}

// TestZerosTakeNoDisk: a layer of zeros unpacks to thousands of times its size,
// and to nothing on disk.
func TestZerosTakeNoDisk(t *testing.T) {
	const size = 270 << 20 // above what is looked at
	host := registryServer(t, nil)
	raw := archiveOf(t, file("var/log/lastlog", strings.Repeat("\x00", size)+"end"))
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	push(t, host+"/x/y:1", imageOf(t, liar{rawLayer{enc.EncodeAll(raw, nil), nil, types.OCILayerZStd}, hashOf(raw)}))
	s := openStore(t, t.TempDir(), nil)
	img := mustPull(t, s, host+"/x/y:1")
	if img.Size > 1<<20 {
		t.Errorf("the image takes %d bytes", img.Size)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(mountOf(t, s, "c", img.ID), "var/log/lastlog"), &st); err != nil || st.Size != size+3 || st.Blocks*512 > 1<<20 {
		t.Errorf("%v, %d bytes, %d on disk", err, st.Size, st.Blocks*512)
	}
}

// TestRootDirectoryIsTheImages: "./" of a layer is the container's root
// directory. A layer that does not list it leaves it as it is below.
func TestRootDirectoryIsTheImages(t *testing.T) {
	top := func(mode int64, uid int) entry {
		return entry{tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: mode, Uid: uid, Gid: uid + 1}, ""}
	}
	host := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	s := openStore(t, t.TempDir(), nil)
	for i, tt := range []struct {
		img  string
		mode uint32
		uid  uint32
	}{
		{loadOne(t, s, imageOf(t, layerOf(t, top(0o1750, 7), file("a", "")))), 0o1750, 7},
		{loadOne(t, s, imageOf(t, layerOf(t, top(0o1750, 7), file("a", "")), layerOf(t, file("b", "")))), 0o1750, 7},
		{loadOne(t, s, imageOf(t, layerOf(t, top(0o1750, 7), file("a", "")), layerOf(t, file("c", ""), top(0o711, 9)))), 0o711, 9},
		{loadOne(t, s, imageOf(t, layerOf(t, file("d", "")))), 0o755, 0},
	} {
		check := func(what, at string, uid uint32) {
			t.Helper()
			var st unix.Stat_t
			if err := unix.Stat(at, &st); err != nil || st.Mode&0o7777 != tt.mode || st.Uid != uid || tt.uid != 0 && st.Gid != uid+1 {
				t.Errorf("image %d, %s: %v, mode %o, owner %d:%d", i, what, err, st.Mode, st.Uid, st.Gid)
			}
		}
		check("writable", mountOf(t, s, fmt.Sprint("c", i), tt.img), tt.uid)
		at := filepath.Join(t.TempDir(), "ro")
		if err := s.MountImage(t.Context(), fmt.Sprint("v", i), tt.img, at, nil, nil); err != nil {
			t.Fatal(err)
		}
		check("read-only", at, tt.uid)
		if err := s.UnmountRootfs(t.Context(), fmt.Sprint("v", i), at); err != nil {
			t.Error(err)
		}
		at = filepath.Join(t.TempDir(), "mapped")
		if err := s.MountRootfs(t.Context(), fmt.Sprint("m", i), tt.img, at, host, host); err != nil {
			t.Fatal(err)
		}
		check("mapped", at, tt.uid+100000)
		if err := s.UnmountRootfs(t.Context(), fmt.Sprint("m", i), at); err != nil {
			t.Error(err)
		}
	}
}

// block of a tar archive: a header, checksum included.
func tarHeader(name string, kind byte, size int) []byte {
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x0000000000000\x00        ", size))
	h[156] = kind
	copy(h[257:], "ustar\x0000")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return h
}

// sparseArchive has a file of the size that is one hole.
func sparseArchive(name string, size int64) []byte {
	var pax string
	for _, kv := range []string{"GNU.sparse.major=0", "GNU.sparse.minor=1", "GNU.sparse.numblocks=1", fmt.Sprintf("GNU.sparse.map=%d,0", size), fmt.Sprintf("GNU.sparse.size=%d", size), "GNU.sparse.name=" + name} {
		n := len(kv) + 4
		if n > 99 {
			n++
		}
		pax += fmt.Sprintf("%d %s\n", n, kv)
	}
	body := make([]byte, (len(pax)+511)/512*512)
	copy(body, pax)
	raw := append(tarHeader("pax", 'x', len(pax)), body...)
	return append(append(raw, tarHeader(name, '0', 0)...), make([]byte, 1024)...)
}

// TestHolesWithoutEnd: a small archive says that it holds a huge file.
func TestHolesWithoutEnd(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	if err := extractInto(t, root, sparseArchive("holes", 1<<20), Limits{}, DevicesSafe); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(root, "holes"), &st); err != nil || st.Size != 1<<20 || st.Blocks != 0 {
		t.Errorf("%v: %d bytes, %d blocks", err, st.Size, st.Blocks)
	}
	if err := extractInto(t, t.TempDir(), sparseArchive("holes", 1<<62), Limits{}, DevicesSafe); !errors.Is(err, ErrHostile) {
		t.Errorf("err = %v", err)
	}
	// The same as a blob of an archive that is loaded.
	s := openStore(t, t.TempDir(), nil)
	if _, err := s.Load(t.Context(), bytes.NewReader(sparseArchive("holes", 1<<50)), LoadOptions{}); err == nil {
		t.Error("loaded")
	}
}
