// Package document decodes YAML and JSON documents strictly, and says of every
// error where it is: line, field, and what to do about it.
package document

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"sync"

	yamlv3 "go.yaml.in/yaml/v3"
	sigsjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// Document is one of the documents of a file.
type Document struct {
	Text []byte
	// Line is the number of its first line in the file, from 1.
	Line int

	tree *tree // of a document that Split made
}

// tree is the document parsed to find lines in it, at the first question.
type tree struct {
	once sync.Once
	root *yamlv3.Node
}

// Problem is one thing that is wrong with a document.
type Problem struct {
	// Line in the file, from 1.
	Line int
	// Field is the path of the field, such as spec.containers[0].image; empty
	// for the document as a whole.
	Field string
	// Message says what is wrong, Remedy what to do about it.
	Message, Remedy string
}

// Error makes a Problem one line.
func (p Problem) Error() string {
	s := fmt.Sprintf("line %d: ", p.Line)
	if p.Field != "" {
		s += p.Field + ": "
	}
	s += p.Message
	if p.Remedy != "" {
		s += " (" + p.Remedy + ")"
	}
	return s
}

// JSON turns a document into JSON with sorted keys. Keys that are given twice
// are problems; one beside a merge key (<<) overrides the merged one. An empty
// document is null.
func (doc Document) JSON() ([]byte, []Problem) {
	text, problems := doc.plain()
	if problems != nil {
		return nil, problems
	}
	raw, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		return nil, yamlProblems(doc, err)
	}
	return raw, nil
}

// Split cuts a file into its documents and leaves out those that are empty or
// hold comments only.
func Split(data []byte) []Document {
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	if t := bytes.TrimLeft(data, " \t\r\n"); len(t) > 0 && t[0] == '{' {
		if docs, ok := splitJSON(data); ok {
			return docs
		}
	}
	var docs []Document
	start, startLine, line := 0, 1, 0
	cut := func(end int) {
		if text := data[start:end]; !blank(text) {
			docs = append(docs, Document{Text: text, Line: startLine, tree: &tree{}})
		}
	}
	for at := 0; at < len(data); {
		line++
		end := len(data)
		if i := bytes.IndexByte(data[at:], '\n'); i >= 0 {
			end = at + i + 1
		}
		l := data[at:end]
		if marker(l, "---") || marker(l, "...") {
			cut(at)
			// What follows the marker on its line belongs to the next document.
			start, startLine = at+3, line
		}
		at = end
	}
	cut(len(data))
	return docs
}

func marker(line []byte, mark string) bool {
	if !bytes.HasPrefix(line, []byte(mark)) {
		return false
	}
	return len(line) == 3 || bytes.IndexByte([]byte(" \t\r\n"), line[3]) >= 0
}

// splitJSON cuts concatenated JSON values.
func splitJSON(data []byte) ([]Document, bool) {
	var docs []Document
	dec := json.NewDecoder(bytes.NewReader(data))
	line, counted := 1, int64(0)
	for {
		var raw json.RawMessage
		before := dec.InputOffset()
		err := dec.Decode(&raw)
		if errors.Is(err, io.EOF) {
			return docs, true
		}
		if err != nil {
			return nil, false
		}
		start := before + int64(bytes.Index(data[before:], raw[:1]))
		line += bytes.Count(data[counted:start], []byte("\n"))
		counted = start
		docs = append(docs, Document{Text: raw, Line: line, tree: &tree{}})
	}
}

func blank(text []byte) bool {
	for len(text) > 0 {
		l := text
		if i := bytes.IndexByte(text, '\n'); i >= 0 {
			l, text = text[:i], text[i+1:]
		} else {
			text = nil
		}
		l = bytes.TrimSpace(l)
		if len(l) > 0 && l[0] != '#' && l[0] != '%' {
			return false
		}
	}
	return true
}

var yamlLine = regexp.MustCompile(`line (\d+): *`)

func yamlProblems(doc Document, err error) []Problem {
	var problems []Problem
	for _, l := range strings.Split(err.Error(), "\n") {
		l = strings.TrimSpace(l)
		if strings.HasSuffix(l, "unmarshal errors:") || strings.HasSuffix(l, "converting YAML to JSON:") {
			continue
		}
		p := Problem{Line: doc.Line, Message: strings.TrimPrefix(l, "error converting YAML to JSON: "), Remedy: "correct the YAML"}
		p.Message = strings.TrimPrefix(p.Message, "yaml: ")
		if m := yamlLine.FindStringSubmatchIndex(p.Message); m != nil {
			n, _ := strconv.Atoi(p.Message[m[2]:m[3]])
			p.Line = doc.at(n)
			p.Message = p.Message[:m[0]] + p.Message[m[1]:]
		}
		if strings.Contains(p.Message, "already set in map") {
			p.Remedy = "remove one of the two keys"
		}
		problems = append(problems, p)
	}
	return problems
}

// Join appends a path to another.
func Join(at, path string) string {
	switch {
	case at == "":
		return path
	case path == "":
		return at
	default:
		return at + "." + path
	}
}

// What follows runs only when something is wrong: it finds out where.

// Locate returns the line in the file of the field with the given path; of the
// nearest field around it when the field itself is missing.
func (doc Document) Locate(path string) int {
	node := doc.root()
	if node == nil {
		return doc.Line
	}
	line := node.Line
	for rest := path; rest != ""; {
		var next *yamlv3.Node
		var nextLine int
		switch node.Kind {
		case yamlv3.MappingNode:
			// Keys may hold dots and brackets (labels, data): take the longest
			// key of the mapping that the path goes on with.
			best := -1
			for _, p := range merged(node, nil) {
				for _, form := range []string{p.key.Value, "[" + p.key.Value + "]"} {
					if len(form) > best && strings.HasPrefix(rest, form) && boundary(rest[len(form):]) {
						best, next, nextLine = len(form), p.value, p.key.Line
					}
				}
			}
			if next == nil {
				return doc.at(line)
			}
			rest = strings.TrimPrefix(rest[best:], ".")
		case yamlv3.SequenceNode:
			end := strings.IndexByte(rest, ']')
			if !strings.HasPrefix(rest, "[") || end < 0 {
				return doc.at(line)
			}
			i, err := strconv.Atoi(rest[1:end])
			if err != nil || i < 0 || i >= len(node.Content) {
				return doc.at(line)
			}
			next = node.Content[i]
			nextLine = next.Line
			rest = strings.TrimPrefix(rest[end+1:], ".")
		default:
			return doc.at(line)
		}
		if next.Kind == yamlv3.AliasNode {
			next = next.Alias
		}
		node, line = next, nextLine
	}
	return doc.at(line)
}

// at turns a line of the document, as the library counts it, into one of the
// file. The library also ends lines where other tools do not (\r, NEL).
func (doc Document) at(line int) int {
	return doc.Line + min(line-1, bytes.Count(doc.Text, []byte("\n")))
}

func boundary(rest string) bool { return rest == "" || rest[0] == '.' || rest[0] == '[' }

func (doc Document) root() *yamlv3.Node {
	if doc.tree == nil {
		return parse(doc)
	}
	doc.tree.once.Do(func() { doc.tree.root = parse(doc) })
	return doc.tree.root
}

func parse(doc Document) *yamlv3.Node {
	var root yamlv3.Node
	if err := yamlv3.Unmarshal(doc.Text, &root); err != nil || len(root.Content) == 0 || bounded(&root, len(doc.Text)) != nil {
		return nil
	}
	return root.Content[0]
}

var (
	strictUnknown   = regexp.MustCompile(`^unknown field "(.*)"$`)
	strictDuplicate = regexp.MustCompile(`^duplicate field "(.*)"$`)
)

// Strict decodes the document as JSON, or the part of it at a path, into a
// value: unknown fields, duplicate fields and wrong
// types are problems. It returns nil when all is well.
func (doc Document) Strict(raw []byte, at string, into any) []Problem {
	strictErrs, err := sigsjson.UnmarshalStrict(raw, into)
	if err == nil && len(strictErrs) == 0 {
		return nil
	}
	var problems []Problem
	for _, e := range strictErrs {
		p := Problem{Line: doc.Line, Message: e.Error(), Remedy: "remove it"}
		if m := strictUnknown.FindStringSubmatch(e.Error()); m != nil {
			p.Field = Join(at, m[1])
			p.Line = doc.Locate(p.Field)
			p.Message, p.Remedy = "unknown field", suggest(reflect.TypeOf(into), m[1])
		} else if m := strictDuplicate.FindStringSubmatch(e.Error()); m != nil {
			p.Field = Join(at, m[1])
			p.Line = doc.Locate(p.Field)
			p.Message, p.Remedy = "is given twice", "remove one of the two"
		}
		problems = append(problems, p)
	}
	if err != nil {
		p := Problem{Message: err.Error(), Remedy: "correct the value"}
		var typeErr *json.UnmarshalTypeError
		path := ""
		if errors.As(err, &typeErr) {
			path = pathAt(raw, typeErr.Offset)
			p.Message = fmt.Sprintf("is %s but must be %s", valueName(typeErr.Value), typeName(typeErr.Type))
		} else if offset, ok := typeErrorOffset(err); ok {
			path = pathAt(raw, offset)
		}
		if path == "" {
			path = blame(raw, into, err)
		}
		p.Field = Join(at, path)
		p.Line = doc.Locate(p.Field)
		problems = append(problems, p)
	}
	return problems
}

// typeErrorOffset reads the offset out of errors of the JSON library's own
// UnmarshalTypeError, which is not exported.
func typeErrorOffset(err error) (int64, bool) {
	v := reflect.Indirect(reflect.ValueOf(err))
	if v.Kind() != reflect.Struct {
		return 0, false
	}
	f := v.FieldByName("Offset")
	if !f.IsValid() || f.Kind() != reflect.Int64 {
		return 0, false
	}
	return f.Int(), true
}

// valueName says what encoding/json calls object, array, bool, number or string
// in the words of YAML.
func valueName(v string) string {
	switch v {
	case "array":
		return "a list"
	case "object":
		return "a mapping"
	case "bool":
		return "true or false"
	}
	return "a " + v
}

func typeName(t reflect.Type) string {
	if t == nil {
		return "something else"
	}
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int32, reflect.Int64, reflect.Uint, reflect.Uint32, reflect.Uint64:
		return "a whole number"
	case reflect.String:
		return "a string"
	case reflect.Slice:
		return "a list"
	case reflect.Map, reflect.Struct:
		return "a mapping"
	}
	return t.String()
}

// pathAt returns the path of the JSON value that ends at or holds offset.
func pathAt(raw []byte, offset int64) string {
	type level struct {
		path  string
		array bool
		index int
		key   string
		isKey bool
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	var stack []*level
	current := func() string {
		if len(stack) == 0 {
			return ""
		}
		l := stack[len(stack)-1]
		if l.array {
			return fmt.Sprintf("%s[%d]", l.path, l.index)
		}
		return Join(l.path, l.key)
	}
	done := func() { // a value of the innermost level is complete
		if len(stack) == 0 {
			return
		}
		if l := stack[len(stack)-1]; l.array {
			l.index++
		} else {
			l.isKey = true
		}
	}
	for {
		tok, err := dec.Token()
		if err != nil {
			return ""
		}
		if d, ok := tok.(json.Delim); ok {
			switch d {
			case '{', '[':
				path := current()
				if dec.InputOffset() >= offset {
					return path
				}
				stack = append(stack, &level{path: path, array: d == '[', isKey: d == '{'})
			default:
				path := stack[len(stack)-1].path
				stack = stack[:len(stack)-1]
				if dec.InputOffset() >= offset {
					return path
				}
				done()
			}
			continue
		}
		if len(stack) > 0 {
			if l := stack[len(stack)-1]; !l.array && l.isKey {
				l.key, l.isKey = tok.(string), false
				continue
			}
		}
		if dec.InputOffset() >= offset {
			return current()
		}
		done()
	}
}

// maxBlame bounds how many leaves are tried to find the one to blame, and
// maxBlameWork the bytes that are decoded for it: a second of work or so.
const (
	maxBlame     = 2000
	maxBlameWork = 8 << 20
)

// blame finds the leaf that a decoding error without a place comes from (values
// with their own decoders: quantities, times, int-or-string): the one without
// which the error goes away.
func blame(raw []byte, into any, cause error) string {
	var tree any
	if json.Unmarshal(raw, &tree) != nil {
		return ""
	}
	tried := 0
	var walk func(v any, path string, set func(any)) string
	walk = func(v any, path string, set func(any)) string {
		switch t := v.(type) {
		case map[string]any:
			for k, child := range t {
				if found := walk(child, Join(path, k), func(x any) { t[k] = x }); found != "" {
					return found
				}
			}
			return ""
		case []any:
			for i, child := range t {
				if found := walk(child, fmt.Sprintf("%s[%d]", path, i), func(x any) { t[i] = x }); found != "" {
					return found
				}
			}
			return ""
		}
		if tried++; tried > maxBlame || tried*len(raw) > maxBlameWork || v == nil {
			return ""
		}
		set(nil)
		defer set(v)
		without, err := json.Marshal(tree)
		if err != nil {
			return ""
		}
		fresh := reflect.New(reflect.TypeOf(into).Elem()).Interface()
		if _, err := sigsjson.UnmarshalStrict(without, fresh); err == nil || err.Error() != cause.Error() {
			return path
		}
		return ""
	}
	return walk(tree, "", func(any) {})
}

// suggest proposes the field that an unknown one may be meant to be.
func suggest(t reflect.Type, path string) string {
	const remove = "remove it or correct its name"
	dot := strings.LastIndexByte(path, '.')
	name := path[dot+1:]
	parent := ""
	if dot >= 0 {
		parent = path[:dot]
	}
	for _, part := range strings.FieldsFunc(parent, func(r rune) bool { return r == '.' }) {
		part, _, indexed := strings.Cut(part, "[")
		f, ok := fieldNamed(t, part)
		if !ok {
			return remove
		}
		t = f
		if indexed && t.Kind() == reflect.Slice {
			t = t.Elem()
		}
	}
	best, bestDistance := "", 3
	for _, known := range fieldNames(t) {
		if d := distance(strings.ToLower(known), strings.ToLower(name)); d < bestDistance {
			best, bestDistance = known, d
		}
	}
	if best == "" {
		return remove
	}
	return fmt.Sprintf("did you mean %s?", best)
}

func deref(t reflect.Type) reflect.Type {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t
}

func eachField(t reflect.Type, visit func(name string, t reflect.Type)) {
	t = deref(t)
	if t.Kind() != reflect.Struct {
		return
	}
	for i := range t.NumField() {
		f := t.Field(i)
		name, opts, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "" && (f.Anonymous || strings.Contains(opts, "inline")) {
			eachField(f.Type, visit)
		} else if name != "" && name != "-" {
			visit(name, f.Type)
		}
	}
}

func fieldNamed(t reflect.Type, name string) (found reflect.Type, ok bool) {
	eachField(t, func(n string, t reflect.Type) {
		if n == name {
			found, ok = deref(t), true
		}
	})
	return found, ok
}

func fieldNames(t reflect.Type) (names []string) {
	eachField(t, func(n string, _ reflect.Type) { names = append(names, n) })
	return names
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		prev := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := prev
			if a[i-1] != b[j-1] {
				cost++
			}
			prev = row[j]
			row[j] = min(cost, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}
