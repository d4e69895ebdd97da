package document

import (
	"fmt"
	"strings"
	"testing"
)

func TestSplit(t *testing.T) {
	for name, c := range map[string]struct {
		text  string
		lines []int
	}{
		"one":                  {"a: 1\n", []int{1}},
		"two":                  {"a: 1\n---\nb: 2\n", []int{1, 2}},
		"marker first":         {"---\na: 1\n", []int{1}},
		"content after marker": {"a: 1\n--- {b: 2}\n", []int{1, 2}},
		"comments only":        {"# x\n---\n# y\n...\n", nil},
		"end marker":           {"a: 1\n...\nb: 2\n", []int{1, 2}},
		"no marker in a word":  {"a: 1\n---b\n", []int{1}},
		"json":                 {"{\"a\": 1}\n\n{\"b\": 2}", []int{1, 3}},
		"yaml that looks like": {"{a: 1}\n---\n{b: 2}\n", []int{1, 2}},
		"nothing":              {"", nil},
	} {
		var lines []int
		for _, d := range Split([]byte(c.text)) {
			lines = append(lines, d.Line)
		}
		if fmt.Sprint(lines) != fmt.Sprint(c.lines) {
			t.Errorf("%s: documents at %v, want %v", name, lines, c.lines)
		}
	}
}

type inner struct {
	Count int               `json:"count"`
	Named map[string]string `json:"named"`
}

type outer struct {
	Inner  inner   `json:"inner"`
	Inners []inner `json:"inners"`
	inner  `json:",inline"`
}

func TestStrict(t *testing.T) {
	for text, want := range map[string]string{
		"inner:\n  count: 1\n":              "",
		"inner:\n  cuont: 1\n":              "line 12: inner.cuont: unknown field (did you mean count?)",
		"inners:\n- count: 1\n- count: x\n": "line 13: inners[1].count: is a string but must be a whole number (correct the value)",
		"inner:\n- 1\n":                     "line 11: inner: is a list but must be a mapping (correct the value)",
		"inner: {named: {a: [1]}}\n":        "line 11: inner.named.a: is a list but must be a string (correct the value)",
	} {
		doc := Document{Text: []byte(text), Line: 11}
		raw, problems := doc.JSON()
		if problems != nil {
			t.Fatal(problems)
		}
		got := ""
		for _, p := range doc.Strict(raw, "", &outer{}) {
			got += p.Error()
		}
		if got != want {
			t.Errorf("%q:\n got %s\nwant %s", text, got, want)
		}
	}
}

func TestLocate(t *testing.T) {
	doc := Document{Line: 1, Text: []byte("a:\n  x.y/z: 1\n  list:\n  - k: 1\n    l: &anchor\n      m: 2\n  - *anchor\n")}
	for path, want := range map[string]int{
		"": 1, "a": 1, "a.x.y/z": 2, "a[x.y/z]": 2, "a.list": 3, "a.list[0]": 4, "a.list[0].l.m": 6, "a.list[0].missing": 4,
		"a.list[7]": 3, "a.list[1].m": 6, "nothing.at.all": 1, "a.list[x": 3,
	} {
		if got := doc.Locate(path); got != want {
			t.Errorf("%q: line %d, want %d", path, got, want)
		}
	}
}

// A list with a mistake in its last value must not take for ever to explain.
func TestBlameIsBounded(t *testing.T) {
	var b strings.Builder
	b.WriteString("named:\n")
	for i := range 3 * maxBlame {
		fmt.Fprintf(&b, "  k%d: v\n", i)
	}
	doc := Document{Text: []byte(b.String() + "inner: 1\n"), Line: 1}
	raw, _ := doc.JSON()
	if doc.Strict(raw, "", &outer{}) == nil {
		t.Error("no problem found")
	}
}
