package netns

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

// FuzzRecords: whatever is in a record of the network, the others load, and
// what is not understood is set aside or refused, never guessed.
func FuzzRecords(f *testing.F) {
	f.Add([]byte(`{"version":1,"sandboxID":"a","pod":"d/n","link":"pod1","ips":["10.86.0.2","fd00::2"],"ports":[{"hostPort":80}]}`))
	f.Add([]byte(`{"version":1,"sandboxID":"a","ips":["x"]}`))
	f.Add([]byte(`{"version":1,"sandboxID":"../a"}`))
	f.Add([]byte(`{"version":1,"cidrs":["10.86.0.0/20","fd00::/64"],"given":true}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := records{dir: t.TempDir()}
		if err := r.save(&attachment{Version: recordVersion, SandboxID: "kept"}); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(r.path("a"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		all, err := r.load(slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]int{}
		for _, a := range all {
			seen[a.SandboxID]++
		}
		aside, _ := filepath.Glob(filepath.Join(r.dir, "*.broken"))
		if seen["kept"] != 1 || seen["a"]+len(aside) != 1 || len(all) != 1+seen["a"] {
			t.Fatalf("loaded %v, set aside %v", seen, aside)
		}
		if err := os.WriteFile(filepath.Join(r.dir, "range.json"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := loadRange(r.dir); (got == nil) == (err == nil) {
			t.Fatalf("range %+v, %v", got, err)
		}
	})
}
