package document

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"

	yamlv2 "go.yaml.in/yaml/v2"
	yamlv3 "go.yaml.in/yaml/v3"
)

// maxExpanded bounds what the aliases of a document may add to it, in bytes of
// text: as much as a manifest may have without any.
const maxExpanded = 10 << 20

// nodeWeight is what a node counts besides its text: a value that is decoded
// takes some memory, however short it is.
const nodeWeight = 16

// aliased says that a document may have aliases.
func aliased(text []byte) bool {
	return bytes.IndexByte(text, '&') >= 0 && bytes.IndexByte(text, '*') >= 0
}

// plain returns the text of the document for a decoder that knows no merge keys
// (<<) with keys beside them that override the merged ones: it is written out
// where there are such keys, and as it is elsewhere. Documents that aliases make
// endless or too large are refused.
//
// The decoder reads YAML 1.1 and is strict, and decides what scalars are. That
// must never change: a pod's UID is the hash of what it gives.
func (doc Document) plain() ([]byte, []Problem) {
	if !aliased(doc.Text) {
		return doc.Text, nil
	}
	var root yamlv3.Node
	if yamlv3.Unmarshal(doc.Text, &root) != nil {
		// The other decoder takes some that this one does not. It bounds how many
		// values aliases make, but not how long they are.
		var value any
		if left := maxExpanded; yamlv2.Unmarshal(doc.Text, &value) == nil && !fits(value, &left) {
			return nil, []Problem{tooLarge(doc)}
		}
		return doc.Text, nil
	}
	x := expander{doc: doc}
	if refused := bounded(&root, len(doc.Text)); refused != nil {
		refused.Line = doc.Line
		return nil, []Problem{*refused}
	}
	if !x.overrides(&root) {
		return doc.Text, nil
	}
	x.write(&root)
	return x.out.Bytes(), x.problems
}

// bounded says what is wrong with the aliases of a document whose text has so
// many bytes; nil: nothing. Whatever follows aliases asks it first.
func bounded(root *yamlv3.Node, text int) *Problem {
	w := weights{sizes: map[*yamlv3.Node]int{}}
	switch size := w.of(root); {
	case w.cyclic:
		return &Problem{Message: "an anchor contains itself", Remedy: "remove the alias"}
	case size-len(w.sizes)*nodeWeight-text > maxExpanded:
		large := tooLarge(Document{})
		return &large
	}
	return nil
}

func tooLarge(doc Document) Problem {
	return Problem{Line: doc.Line, Message: fmt.Sprintf("its aliases make it larger than %d MiB", maxExpanded>>20), Remedy: "write out less of it, or split it"}
}

// fits says whether a decoded value takes no more than what is left.
func fits(value any, left *int) bool {
	*left -= nodeWeight
	switch v := value.(type) {
	case string:
		*left -= len(v)
	case []any:
		for _, one := range v {
			if !fits(one, left) {
				return false
			}
		}
	case map[any]any:
		for key, one := range v {
			if !fits(key, left) || !fits(one, left) {
				return false
			}
		}
	}
	return *left > 0
}

// weights are the sizes of nodes when they are written out.
type weights struct {
	sizes  map[*yamlv3.Node]int // 0: under way
	cyclic bool
}

// enough is more than any size that matters.
const enough = 1 << 40

// of a node, at most enough.
func (w *weights) of(n *yamlv3.Node) int {
	if known, ok := w.sizes[n]; ok {
		w.cyclic = w.cyclic || known == 0
		return known
	}
	w.sizes[n] = 0
	sum := nodeWeight + len(n.Value)
	if n.Kind == yamlv3.AliasNode {
		sum = w.of(n.Alias)
	}
	for _, c := range n.Content {
		sum = min(sum+w.of(c), enough)
	}
	w.sizes[n] = sum
	return sum
}

// expander writes a document without aliases and merge keys.
type expander struct {
	doc      Document
	out      bytes.Buffer
	problems []Problem
}

func isMerge(key *yamlv3.Node) bool {
	return key.Kind == yamlv3.ScalarNode && key.Value == "<<" && key.ShortTag() == "!!merge"
}

func behind(n *yamlv3.Node) *yamlv3.Node {
	for n.Kind == yamlv3.AliasNode {
		n = n.Alias
	}
	return n
}

// keyOf tells keys apart.
func keyOf(n *yamlv3.Node) string {
	n = behind(n)
	return n.ShortTag() + " " + n.Value
}

// overrides says whether a mapping sets a key that it merges, too. It looks at
// each node once.
func (x *expander) overrides(n *yamlv3.Node) bool {
	if n.Kind == yamlv3.MappingNode && slices.ContainsFunc(merged(n, nil), func(p pair) bool { return p.again }) {
		return true
	}
	for _, c := range n.Content {
		if x.overrides(c) {
			return true
		}
	}
	return false
}

// pair of a mapping. again: the same key is before it, and counts.
type pair struct {
	key, value *yamlv3.Node
	again      bool
	merged     bool
}

// merged returns what a mapping holds: its own keys, then those of what it
// merges, in order (yaml.org/type/merge: the first one counts).
func merged(n *yamlv3.Node, seen map[string]bool) (all []pair) {
	top := seen == nil
	if top {
		seen = map[string]bool{}
	}
	var sources []*yamlv3.Node
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if !isMerge(key) {
			k := keyOf(key)
			all = append(all, pair{key: key, value: value, again: seen[k], merged: !top})
			seen[k] = true
			continue
		}
		if from := behind(value); from.Kind == yamlv3.SequenceNode {
			sources = append(sources, from.Content...)
		} else {
			sources = append(sources, value)
		}
	}
	for _, s := range sources {
		if from := behind(s); from.Kind == yamlv3.MappingNode {
			all = append(all, merged(from, seen)...)
		}
	}
	return all
}

// write a node in flow style. Scalars that decide by their looks what they are
// stay as they look.
func (x *expander) write(n *yamlv3.Node) {
	n = behind(n)
	if n.Style&yamlv3.TaggedStyle != 0 {
		fmt.Fprintf(&x.out, "!<%s> ", n.LongTag())
	}
	switch n.Kind {
	case yamlv3.DocumentNode:
		for _, c := range n.Content {
			x.write(c)
		}
	case yamlv3.SequenceNode:
		x.out.WriteByte('[')
		for _, c := range n.Content {
			x.write(c)
			x.out.WriteString(", ")
		}
		x.out.WriteByte(']')
	case yamlv3.MappingNode:
		x.mapping(n)
	default:
		x.scalar(n)
	}
}

func (x *expander) mapping(n *yamlv3.Node) {
	x.mergeable(n)
	x.out.WriteByte('{')
	for _, p := range merged(n, nil) {
		switch {
		case p.again && !p.merged: // given twice
			x.problems = append(x.problems, Problem{Line: x.doc.at(p.key.Line),
				Message: fmt.Sprintf("key %q already set in map", p.key.Value), Remedy: "remove one of the two keys"})
		case !p.again:
			x.write(p.key)
			x.out.WriteString(" : ")
			x.write(p.value)
			x.out.WriteString(", ")
		}
	}
	x.out.WriteByte('}')
}

// mergeable finds merge keys that are given twice, or merge what is no mapping.
func (x *expander) mergeable(n *yamlv3.Node) {
	had := false
	for i := 0; i+1 < len(n.Content); i += 2 {
		if !isMerge(n.Content[i]) {
			continue
		}
		line := x.doc.at(n.Content[i].Line)
		if had {
			x.problems = append(x.problems, Problem{Line: line, Message: `key "<<" already set in map`, Remedy: "merge several by a list: <<: [*a, *b]"})
		}
		had = true
		from := []*yamlv3.Node{n.Content[i+1]}
		if list := behind(from[0]); list.Kind == yamlv3.SequenceNode {
			from = list.Content
		}
		for _, f := range from {
			if behind(f).Kind != yamlv3.MappingNode {
				x.problems = append(x.problems, Problem{Line: line, Field: "<<", Message: "merges what is no mapping", Remedy: "merge a mapping, or a list of them"})
			}
		}
	}
}

const quotedStyles = yamlv3.DoubleQuotedStyle | yamlv3.SingleQuotedStyle | yamlv3.LiteralStyle | yamlv3.FoldedStyle

func (x *expander) scalar(n *yamlv3.Node) {
	switch {
	case n.Style&(quotedStyles|yamlv3.TaggedStyle) != 0 || !flowPlain(n.Value):
		x.out.WriteString(strconv.QuoteToASCII(n.Value))
	case n.Value == "":
		x.out.WriteString("null")
	default:
		x.out.WriteString(n.Value)
	}
}

// flowPlain says whether a plain scalar may stay plain in flow style. One that
// may not is a string: nothing else has such characters.
func flowPlain(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' || strings.ContainsRune(",[]{}\"'#?", r) }) &&
		!strings.Contains(s, ": ") && !strings.HasSuffix(s, ":")
}
