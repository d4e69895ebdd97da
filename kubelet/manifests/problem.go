package manifests

import (
	"cmp"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
)

// Problem is one reason why a manifest file, or a part of it, is not in force, or
// what is questionable about one that is.
type Problem struct {
	// File is the path of the manifest as the directory names it.
	File string
	// Document is the number of the YAML document in the file, from 1; 0 when
	// the file as a whole is meant.
	Document int
	// Line in the file, from 1; 0 when it is not known.
	Line int
	// Field is the path of the field, such as spec.containers[0].image; empty
	// when the document as a whole is meant.
	Field string
	// Message says what is wrong.
	Message string
	// Remedy says what to do about it.
	Remedy string
	// Object is what the document defines, such as "Pod default/web", where it
	// or another file or version has it in force; else empty.
	Object string
	// Kept says that the last good version of the file stays in force.
	Kept bool
	// Warning says that the document is in force all the same.
	Warning bool
	// Since is when this state of the file was first seen.
	Since time.Time
}

// Error makes a Problem one line: file:line: document n: field: message (remedy).
func (p Problem) Error() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
	}
	if p.Document > 0 {
		fmt.Fprintf(&b, ": document %d", p.Document)
	}
	if p.Field != "" {
		b.WriteString(": " + p.Field)
	}
	b.WriteString(": " + p.Message)
	if p.Remedy != "" {
		b.WriteString(" (" + p.Remedy + ")")
	}
	return b.String()
}

// sameProblems compares all but the time.
func sameProblems(a, b []Problem) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		x, y := a[i], b[i]
		x.Since, y.Since = time.Time{}, time.Time{}
		if x != y {
			return false
		}
	}
	return true
}

// problems are what is wrong now.
type problems struct {
	mu       sync.Mutex
	files    map[string][]Problem    // by name: of the file itself
	objects  map[ObjectRef][]Problem // documents that lose against others
	warnings map[ObjectRef][]Problem // of documents in force
}

func newProblems() problems {
	return problems{files: map[string][]Problem{}, objects: map[ObjectRef][]Problem{}, warnings: map[ObjectRef][]Problem{}}
}

func (p *problems) ofObject(ref ObjectRef) []Problem {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.objects[ref])
}

// put replaces what is wrong with one file or object, and says whether that is
// news.
func put[K comparable](p *problems, m map[K][]Problem, key K, found []Problem, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if sameProblems(m[key], found) {
		return false
	}
	for i := range found {
		found[i].Since = now
	}
	if len(found) == 0 {
		delete(m, key)
	} else {
		m[key] = found
	}
	return true
}

// Problems returns what is wrong now, and the warnings, sorted by file and
// document.
func (s *Source) Problems() []Problem {
	s.problems.mu.Lock()
	defer s.problems.mu.Unlock()
	var all []Problem
	for _, p := range s.problems.files {
		all = append(all, p...)
	}
	for _, p := range s.problems.objects {
		all = append(all, p...)
	}
	for _, p := range s.problems.warnings {
		all = append(all, p...)
	}
	slices.SortStableFunc(all, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Document, b.Document), cmp.Compare(a.Line, b.Line))
	})
	return all
}

func (s *Source) setConflicts(ref ObjectRef, found []Problem, now time.Time) {
	if put(&s.problems, s.problems.objects, ref, found, now) {
		s.tell(found, nil)
	}
}

// report notes what is wrong with a file, and tells it if that is news.
func (s *Source) report(name string, found []Problem, now time.Time) {
	if put(&s.problems, s.problems.files, name, found, now) {
		s.tell(found, s.files[name])
	}
}

// tell logs problems and records them as events: on the file, and on the pods
// of the file that run on.
func (s *Source) tell(problems []Problem, f *file) {
	for _, p := range problems {
		s.log.Error("manifest is not in force", "file", p.File, "document", p.Document, "line", p.Line,
			"field", p.Field, "problem", p.Message, "remedy", p.Remedy, "last_good_kept", p.Kept)
		if s.cfg.Recorder == nil {
			continue
		}
		s.cfg.Recorder.Eventf(&v1.ObjectReference{
			APIVersion: "podd.dev/v1alpha1", Kind: "Manifest", Namespace: v1.NamespaceDefault,
			Name: filepath.Base(p.File), FieldPath: p.Field,
		}, v1.EventTypeWarning, ReasonInvalid, "%s", p.Error())
		if f == nil || !p.Kept {
			continue
		}
		for _, o := range f.objects {
			if o.pod != nil {
				s.cfg.Recorder.Eventf(podRef(o.pod), v1.EventTypeWarning, ReasonInvalid, "changed manifest is not in force: %s", p.Error())
			}
		}
	}
}

func podRef(pod *v1.Pod) *v1.ObjectReference {
	return &v1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID}
}
