package state

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

// FuzzLoad: whatever is in a record and whatever it is called, the others
// load, and one that is not understood is in quarantine: nothing is lost.
func FuzzLoad(f *testing.F) {
	good, _ := json.Marshal(envelope{Version: Version, Kind: "k", ID: "a", Data: json.RawMessage(`{"x":1}`)})
	f.Add("a", good)
	f.Add("b", good)
	f.Add("a", []byte(`{"version":2,"kind":"k","id":"a","data":{}}`))
	f.Add("a", []byte(`{"version":1,"kind":"k","id":"a"}`))
	f.Add("a", []byte(`null`))
	f.Add("a", good[:len(good)/2])
	f.Add("..", []byte{})
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		s, err := Open(t.TempDir(), slog.New(slog.DiscardHandler), "k")
		if err != nil {
			t.Fatal(err)
		}
		type value struct{ X, Y any }
		if err := s.Put("k", "good", value{X: "kept"}); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(s.dir, "k", name+suffix)
		if name == "good" || filepath.Dir(path) != filepath.Join(s.dir, "k") || os.WriteFile(path, data, 0o600) != nil {
			t.Skip("no file name")
		}
		seen := map[string]bool{}
		if err := Load(s, "k", func(id string, v *value) error { seen[id] = true; return nil }); err != nil {
			t.Fatal(err)
		}
		if !seen["good"] {
			t.Fatal("a broken record took another with it")
		}
		aside, _ := os.ReadDir(filepath.Join(s.dir, quarantineDir))
		_, err = os.Lstat(path)
		if seen[name] == (err != nil) || (len(aside) == 1) == (err == nil) && name[0] != '.' {
			t.Fatalf("loaded %v, there %v, %d in quarantine", seen[name], err == nil, len(aside))
		}
	})
}
