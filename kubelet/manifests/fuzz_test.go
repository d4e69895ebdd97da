package manifests

import (
	"os"
	"path/filepath"
	"testing"
)

// FuzzDecode: whatever is in a file, podd goes on, and everything that is not
// taken is explained with a line inside the file.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(podYAML("a", "i")))
	f.Add([]byte("---\n...\n--- {}\n"))
	f.Add([]byte(`{"apiVersion":"v1","kind":"List","items":[{"kind":"Pod","metadata":{"name":3}}]} {}`))
	f.Add([]byte("apiVersion: v1\nkind: Secret\nmetadata: {name: a}\nstringData: &x {a: *x}\n"))
	f.Add([]byte("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {a: 1, a: 2}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		d := decoder{nodeName: "n"}
		objects, problems, fatal := d.decodeFile("f", data)
		if fatal && (len(objects) > 0 || len(problems) == 0) {
			t.Errorf("fatal with %d objects and %d problems", len(objects), len(problems))
		}
		lines := 1
		for _, b := range data {
			if b == '\n' {
				lines++
			}
		}
		for _, p := range problems {
			if p.Line > lines+1 || p.Message == "" {
				t.Errorf("problem %+v in %d lines", p, lines)
			}
		}
	})
}

// FuzzState: whatever is in the files that this package keeps, they load or are
// refused with a reason, and what loads can be kept again.
func FuzzState(f *testing.F) {
	ledger, err := os.ReadFile("testdata/ledger-v1.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(ledger)
	f.Add([]byte(`{"version":1,"claims":{"default/a":"pv","b":"","/":"x"}}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte("podd-manifest/v1 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		path := filepath.Join(dir, "kept")
		put := func(path string) {
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		put(path)
		h := held{path: path, have: map[ObjectRef]holding{}}
		if err := h.load(); err == nil {
			h.dirty = true
			if err := h.save(); err != nil {
				t.Fatal(err)
			}
			again := held{path: path, have: map[ObjectRef]holding{}}
			if err := again.load(); err != nil || len(again.have) != len(h.have) {
				t.Fatalf("%d of %d, %v", len(again.have), len(h.have), err)
			}
		} else if _, err := os.Stat(path + ".broken"); err != nil {
			t.Fatalf("not put aside: %v", err)
		}
		put(path)
		b := bindings{path: path}
		if b.load() == nil {
			if err := b.save(); err != nil {
				t.Fatal(err)
			}
		}
		l := lastGood{dir: dir}
		put(l.path("web.yaml"))
		if good, err := l.load("web.yaml"); err == nil {
			if err := l.save("web.yaml", good); err != nil {
				t.Fatal(err)
			}
		} else if _, err := os.Stat(l.path("web.yaml")); err == nil {
			t.Fatal("a torn version is kept")
		}
	})
}
