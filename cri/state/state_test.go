package state

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

type rec struct {
	Name string `json:"name"`
	N    int    `json:"n"`
}

func open(t *testing.T) (*Store, string) {
	t.Helper()
	dir := t.TempDir()
	s, err := Open(dir, slog.New(slog.DiscardHandler), "things")
	if err != nil {
		t.Fatal(err)
	}
	return s, dir
}

func TestPutGetDelete(t *testing.T) {
	s, dir := open(t)
	if err := s.Put("things", "a", rec{"x", 1}); err != nil {
		t.Fatal(err)
	}
	if err := s.Put("things", "a", rec{"x", 2}); err != nil {
		t.Fatal(err)
	}
	var r rec
	if err := s.Get("things", "a", &r); err != nil || r.N != 2 {
		t.Fatalf("got %+v, %v", r, err)
	}
	st, err := os.Stat(filepath.Join(dir, "things", "a.json"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", st.Mode(), err)
	}
	for range 2 {
		if err := s.Delete("things", "a"); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Get("things", "a", &r); !errdefs.IsNotFound(err) {
		t.Fatalf("deleted record: %v", err)
	}
}

func TestShortageIsNoFaultOfTheRecord(t *testing.T) {
	s, dir := open(t)
	if err := s.Put("things", "a", rec{"x", 1}); err != nil {
		t.Fatal(err)
	}
	err := Load(s, "things", func(string, *rec) error { return &os.PathError{Op: "open", Path: "x", Err: unix.EMFILE} })
	if !errors.Is(err, unix.EMFILE) {
		t.Errorf("load: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "things", "a.json")); err != nil {
		t.Errorf("the record is gone: %v", err)
	}
}

func TestHostileIDs(t *testing.T) {
	s, _ := open(t)
	for _, id := range []string{"", "../x", "a/b", ".hidden", "a\x00b", strings.Repeat("x", 201)} {
		if err := s.Put("things", id, rec{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Put(%q): %v", id, err)
		}
		if err := s.Delete("things", id); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Delete(%q): %v", id, err)
		}
	}
}

func TestBrokenRecordsAreQuarantined(t *testing.T) {
	s, dir := open(t)
	for _, id := range []string{"good", "refused"} {
		if err := s.Put("things", id, rec{id, 1}); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, content string) {
		if err := os.WriteFile(filepath.Join(dir, "things", name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("empty.json", "")
	write("torn.json", `{"version":1,"kind":"thi`)
	write("future.json", `{"version":99,"kind":"things","id":"future","data":{}}`)
	write("other.json", `{"version":1,"kind":"things","id":"someone","data":{}}`)
	write("shape.json", `{"version":1,"kind":"things","id":"shape","data":[1]}`)
	write("README", "hello")
	write(tempPrefix+"half", "{")
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "things", "link.json")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "things", "dir.json"), 0o700); err != nil {
		t.Fatal(err)
	}
	var seen []string
	err := Load(s, "things", func(id string, r *rec) error {
		if id == "refused" {
			return errdefs.ErrDataLoss
		}
		seen = append(seen, id)
		return nil
	})
	if err != nil || len(seen) != 1 || seen[0] != "good" {
		t.Fatalf("loaded %v, %v", seen, err)
	}
	left, _ := os.ReadDir(filepath.Join(dir, "things"))
	if len(left) != 1 {
		t.Errorf("left in place: %v", left)
	}
	moved, _ := os.ReadDir(filepath.Join(dir, quarantineDir))
	if len(moved) != 9 {
		t.Errorf("%d in quarantine: %v", len(moved), moved)
	}
}
