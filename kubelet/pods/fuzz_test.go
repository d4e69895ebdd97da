package pods

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

// FuzzRecord: whatever is in a pod's record, the others load, what is not
// understood is set aside, and what is understood can be written again.
func FuzzRecord(f *testing.F) {
	files, err := filepath.Glob("testdata/records/*.json")
	if err != nil || len(files) == 0 {
		f.Fatalf("%d records, %v", len(files), err)
	}
	for _, p := range files {
		raw, err := os.ReadFile(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(filepath.Base(p), raw)
		f.Add(filepath.Base(p), raw[:len(raw)/2])
	}
	f.Add("a.json", []byte(`{"version":1,"pod":{"metadata":{"uid":"a","name":"n","namespace":"d"}},"status":null,"backoffs":{"x":{}},"probes":{"x":null}}`))
	f.Add("a.json", []byte(`{"version":1,"pod":null}`))
	f.Add("a.json", []byte(`null`))
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		s := newRecords(t.TempDir(), slog.New(slog.DiscardHandler))
		kept := []byte(`{"version":1,"pod":{"metadata":{"uid":"kept","name":"n","namespace":"d"}}}`)
		if err := os.WriteFile(s.path("kept"), kept, 0o600); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(s.dir, name)
		if filepath.Dir(path) != s.dir || path == s.path("kept") || os.WriteFile(path, data, 0o600) != nil {
			t.Skip("no file name")
		}
		all, err := s.load()
		if err != nil {
			t.Fatal(err)
		}
		if all["kept"] == nil {
			t.Fatal("a broken record took another with it")
		}
		for uid, r := range all {
			if r.Pod == nil || r.Pod.UID != uid {
				t.Fatalf("record of %q: %+v", uid, r.Pod)
			}
			s.save(uid, r)
		}
		if !s.flush() {
			t.Fatal("a record that was read cannot be written")
		}
		again, err := s.load()
		if err != nil || len(again) != len(all) {
			t.Fatalf("%d of %d records, %v", len(again), len(all), err)
		}
	})
}
