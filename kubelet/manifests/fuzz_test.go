package manifests

import "testing"

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
