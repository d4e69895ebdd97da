package document

import (
	"bytes"
	"testing"

	"sigs.k8s.io/yaml"
)

// FuzzJSON: whatever the text, there is JSON or a problem inside the text; what
// the strict decoder takes comes out as it decodes it, since the UIDs of pods
// are made of that; and aliases do not make it endless.
func FuzzJSON(f *testing.F) {
	for _, text := range []string{
		"a: &x {b: 1}\nc: {<<: *x, b: 2}\n", "a: &a [*a]\n", "a: &a {<<: [*a, {b: 1}]}\n", "x: &x !!str 5\ny: [*x, &z yes, *z]\n",
		"a: 1\na: 2\n", "? [a]\n: b\n", "{a: &b c, d: *b}", "- &a {k: |\n    x\n   , l: 'it''s'}\n- {<<: *a, l: \"\\u00e9\"}\n", "&a a: *a\n*a : b\n",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if len(text) > 64<<10 {
			t.Skip("large ones take long, whatever is in them")
		}
		for _, doc := range Split(text) {
			raw, problems := doc.JSON()
			if (raw == nil) == (problems == nil) {
				t.Fatalf("JSON %q, problems %v", raw, problems)
			}
			for _, p := range problems {
				if p.Line < doc.Line || p.Line > doc.Line+bytes.Count(doc.Text, []byte("\n")) {
					t.Fatalf("problem %+v outside of the document", p)
				}
			}
			doc.Locate("a.b[0].c")
			if plain, wrong := doc.plain(); wrong != nil || !bytes.Equal(plain, doc.Text) {
				continue // written out, or refused by what would have been written out
			}
			want, err := yaml.YAMLToJSONStrict(doc.Text)
			if (err == nil) != (problems == nil) || err == nil && !bytes.Equal(raw, want) {
				t.Fatalf("JSON %q, %v, want %q, %v", raw, problems, want, err)
			}
		}
	})
}

// FuzzMerge: what the strict decoder takes is never refused or changed.
func FuzzMerge(f *testing.F) {
	for _, text := range []string{"a: &x 1\nb: *x\n", "a: &x {b: 1}\nc: {<<: *x, d: 2}\n", "s: \"a && b *\"\n", "s: |\n  cp *.a & b\n"} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		doc := Document{Text: text, Line: 1}
		if !aliased(text) || len(text) > 16<<10 {
			t.Skip("no aliases")
		}
		plain, problems := doc.plain()
		want, err := yaml.YAMLToJSONStrict(text)
		if err != nil {
			return
		}
		if problems != nil {
			t.Fatalf("refused: %v", problems)
		}
		if got, err := yaml.YAMLToJSONStrict(plain); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%q, %v, want %q", got, err, want)
		}
	})
}
