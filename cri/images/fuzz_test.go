package images

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// FuzzExtract: whatever the archive, nothing appears or changes beside the
// root.
func FuzzExtract(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("needs root")
	}
	// Without the padding at their ends, which says nothing.
	archiveOf := func(f *testing.F, entries ...entry) []byte {
		raw := archiveOf(f, entries...)
		return raw[:len(raw)-1024]
	}
	f.Add(archiveOf(f, dir("a/"), symlink("a/b", "../.."), file("a/b/secret", "evil"), hardlink("h", "a/b/secret")))
	f.Add(archiveOf(f, dir("./"), file(".wh.a", ""), entry{tar.Header{Name: "a", Typeflag: tar.TypeBlock, Devmajor: 8}, ""}, hardlink("b", "a"), dir("a/")))
	f.Add(sparseArchive("holes", 1<<19))
	f.Add(archiveOf(f, symlink("s", "/"), file("s/tmp/x", "evil"), file("s/.wh.x", ""), file(".wh..wh..opq", "")))
	f.Add(archiveOf(f, file("../secret", "evil"), entry{tar.Header{Name: "n", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, ""}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		top, err := os.MkdirTemp(memory(t), "podd-fuzz-")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(top)
		root, secret := filepath.Join(top, "root"), filepath.Join(top, "secret")
		if err := os.Mkdir(root, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(secret, []byte("canary"), 0o600); err != nil {
			t.Fatal(err)
		}
		_ = extractInto(t, root, raw, Limits{UnpackedSize: 1 << 20, Entries: 1000}, DevicesSafe)
		if got := read(t, secret); got != "canary" {
			t.Fatalf("canary is %q", got)
		}
		list, err := os.ReadDir(top)
		if err != nil || len(list) != 2 {
			t.Fatalf("beside the root: %v, %v", list, err)
		}
	})
}

// FuzzParseConfig: what is accepted keeps within the bounds.
func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(`{"os":"linux","config":{"Env":["A=b"],"User":"1000:1000","Labels":{"a":"b"}},"rootfs":{"type":"layers","diff_ids":[]}}`))
	f.Add([]byte(`{"config":{"User":"4294967296"}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := parseConfig(raw, 0)
		if err != nil {
			return
		}
		if err := checkUser(c.Config.User); err != nil {
			t.Error(err)
		}
		for _, e := range c.Config.Env {
			if bytes.IndexByte([]byte(e), 0) >= 0 || bytes.IndexByte([]byte(e), '=') < 1 {
				t.Errorf("variable %q", e)
			}
		}
	})
}
