package document

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"
)

// A key beside a merge key overrides the merged one, wherever it stands; the
// first of several merged mappings counts (yaml.org/type/merge).
func TestMergeKeysMayBeOverridden(t *testing.T) {
	for name, c := range map[string]struct{ merged, written string }{
		"key after":         {"c: &c {a: 1, b: 2}\nd: {<<: *c, a: 3}\n", "c: {a: 1, b: 2}\nd: {a: 3, b: 2}\n"},
		"key before":        {"c: &c {a: 1, b: 2}\nd: {a: 3, <<: *c}\n", "c: {a: 1, b: 2}\nd: {a: 3, b: 2}\n"},
		"several":           {"x: &x {a: 1}\ny: &y {a: 2, b: 3}\nd: {<<: [*x, *y]}\n", "x: {a: 1}\ny: {a: 2, b: 3}\nd: {a: 1, b: 3}\n"},
		"merge of a merge":  {"x: &x {a: 1, b: 1}\ny: &y {<<: *x, b: 2}\nz: {<<: *y, c: 3, a: 0}\n", "x: {a: 1, b: 1}\ny: {a: 1, b: 2}\nz: {a: 0, b: 2, c: 3}\n"},
		"in place":          {"d:\n  <<: &k {a: 1, b: 2}\n  a: 3\ne: *k\n", "d: {a: 3, b: 2}\ne: {a: 1, b: 2}\n"},
		"list of anchors":   {"l:\n- &c\n  name: a\n  image: i\n- <<: *c\n  name: b\n", "l: [{name: a, image: i}, {name: b, image: i}]\n"},
		"values stay":       {"c: &c {a: yes, b: 'yes', c: 010, d: 1_000, e: ~, f: , g: !!str 5, h: 1.50, i: 2001-12-14t21:59:43.10-05:00, j: 12:30, k: 0x1f, m: 2020-01-01}\nd: {<<: *c, z: 1, a: no}\n", ""},
		"texts stay":        {"c: &c\n  a: |\n    one\n     two\n\n    three\n  b: >-\n    folded\n    text\n  c: \"\\e\\x07é😀\\n\"\n  d: a, b [c] {d} \"e\" 'f' g#h\n  e: http://x:80/?y=1\n  f: '# no comment'\n  g: plain\n    over lines\n  h: -1\n  i: -x\n  j: '<<'\nd:\n  <<: *c\n  z: &z q\n  e: *z\n", ""},
		"alias as a value":  {"v: &v [1, {x: 2}]\nc: &c {a: *v, b: 1}\nd: {<<: *c, b: *v}\n", "v: [1, {x: 2}]\nc: {a: [1, {x: 2}], b: 1}\nd: {a: [1, {x: 2}], b: [1, {x: 2}]}\n"},
		"anchor used twice": {"a: &x {k: 1}\nb: {<<: *x, k: 2}\nc: &x {k: 3}\nd: {<<: *x, l: 4}\n", "a: {k: 1}\nb: {k: 2}\nc: {k: 3}\nd: {k: 3, l: 4}\n"},
		"numbers as keys":   {"c: &c {1: a, 2: b}\nd: {<<: *c, 1: z}\n", "c: {1: a, 2: b}\nd: {1: z, 2: b}\n"},
	} {
		t.Run(name, func(t *testing.T) {
			written := c.written
			if written == "" { // what the same document has without the merge
				head, _, _ := strings.Cut(c.merged, "\nd:")
				written = head + "\n"
			}
			got, problems := Document{Text: []byte(c.merged), Line: 1}.JSON()
			want, wrong := Document{Text: []byte(written), Line: 1}.JSON()
			if problems != nil || wrong != nil {
				t.Fatal(problems, wrong)
			}
			if c.written == "" {
				// The values are the same, but for those that d sets.
				if !strings.Contains(string(got), strings.TrimSuffix(string(want), "}")) {
					t.Errorf("got %s\nwant %s", got, want)
				}
				return
			}
			if string(got) != string(want) {
				t.Errorf("got %s\nwant %s", got, want)
			}
		})
	}
}

func TestTrueDuplicatesStayErrors(t *testing.T) {
	for text, want := range map[string]string{
		"c: &c {a: 1}\nd:\n  <<: *c\n  b: 1\n  a: 2\n  b: 3\n":       `line 16: key "b" already set in map (remove one of the two keys)`,
		"c: &c\n  a: 1\n  a: 2\nd: {<<: *c, a: 3}\n":                 `line 13: key "a" already set in map`,
		"c: &c {a: 1}\nd: {e: *c, b: 1}\nb: 1\nb: 2\n":               `line 14: key "b" already set in map`,
		"c: &c {a: 1}\nd:\n  <<: *c\n  <<: {a: 2}\n":                 `line 14: key "<<" already set in map (merge several by a list`,
		"c: &c {a: 1}\nd:\n  <<: [*c, 1]\n  a: 1\n":                  "line 13: <<: merges what is no mapping",
		"a: &a {<<: *a, b: 1}\n":                                     "anchor contains itself",
		"a: &a [*a]\n":                                               "anchor contains itself",
		"a: &a {b: 1}\nc: *d\n":                                      "unknown anchor",
		"c: {a: 1, a: 2}\n":                                          "already set in map",
		"metadata: &m {name: a}\nspec: {<<: *m, name: b, name: c}\n": `line 12: key "name" already set in map`,
	} {
		_, problems := Document{Text: []byte(text), Line: 11}.JSON()
		if len(problems) != 1 || !strings.Contains(problems[0].Error(), want) {
			t.Errorf("%q: %v, want %s", text, problems, want)
		}
	}
}

// What a pod's UID is made of never changes: only documents that were refused
// are written out.
func TestDocumentsWithoutOverridesStayAsTheyAre(t *testing.T) {
	for _, text := range []string{
		"a: 1\n", "a: &x 1\nb: *x\n", "c: &c {a: 1}\nd: {<<: *c, b: 2}\n", "run: \"a && b *\"\n", "a: 1\na: 2\n",
		"script: |\n  cp *.txt /x && echo & wait\n",
	} {
		doc := Document{Text: []byte(text), Line: 1}
		if got, problems := doc.plain(); string(got) != text || problems != nil {
			t.Errorf("%q became %q, %v", text, got, problems)
		}
	}
}

// Fields that are merged are found where they are written.
func TestLocateFindsMergedFields(t *testing.T) {
	doc := Document{Text: []byte("c: &c\n  a:\n    x: 1\n  b: 2\nd:\n  <<: *c\n  b: 3\n"), Line: 1}
	for path, want := range map[string]int{"d.a.x": 3, "d.b": 7, "d.z": 5, "c.b": 4} {
		if got := doc.Locate(path); got != want {
			t.Errorf("%s: line %d, want %d", path, got, want)
		}
	}
}

// Aliases make a small file large: what they make is bounded before it is made.
func TestAliasBombsAreRefused(t *testing.T) {
	laughs := "a0: &a0 [lol, lol]\n"
	merges := "a0: &a0 {k: 1}\n"
	for i := 1; i < 60; i++ {
		laughs += fmt.Sprintf("a%d: &a%d [*a%d, *a%d]\n", i, i, i-1, i-1)
		merges += fmt.Sprintf("a%d: &a%d {<<: [*a%d, *a%d], k%d: 1}\n", i, i, i-1, i-1, i)
	}
	long := "a: &a " + strings.Repeat("x", 1<<20) + "\nb: [" + strings.Repeat("*a, ", 4000) + "]\n"
	wide := "a: &a {k: 1, l: 2, m: [1, 2, 3]}\nb:\n" + strings.Repeat("- *a\n", 200_000)
	for name, text := range map[string]string{"laughs": laughs, "merges": merges, "one long text": long, "many": wide} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			began := time.Now()
			_, problems := Document{Text: []byte(text), Line: 1}.JSON()
			runtime.ReadMemStats(&after)
			if len(problems) != 1 || !strings.Contains(problems[0].Message, "larger than 10 MiB") {
				t.Errorf("problems: %v", problems)
			}
			t.Logf("%d bytes: %v, %d MiB allocated", len(text), time.Since(began), (after.TotalAlloc-before.TotalAlloc)>>20)
		})
	}
}

// What only one of the decoders takes is measured when it is decoded.
func TestDecodedValuesAreMeasured(t *testing.T) {
	long := strings.Repeat("x", 1<<20)
	for n, want := range map[int]bool{1: true, 9: true, 11: false} {
		list := []any{map[any]any{"k": 1, true: nil}}
		for range n {
			list = append(list, long)
		}
		left := maxExpanded
		if got := fits(map[any]any{"a": list}, &left); got != want {
			t.Errorf("%d MiB: %v, want %v", n, got, want)
		}
	}
}
