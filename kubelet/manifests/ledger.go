package manifests

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// claim is one document that defines an object.
type claim struct {
	file *file
	obj  *object
}

// delivery is what the sink was told of a pod.
type delivery struct {
	uid  types.UID
	hash string
	seen string
}

// ledger is who defines what, which file has it in force, and what of it the
// sink has.
type ledger struct {
	claims    map[ObjectRef][]claim
	held      held
	delivered map[ObjectRef]delivery
	uids      map[types.UID]ObjectRef // of the pods delivered
	waiting   map[ObjectRef]struct{}  // pods whose UID another one has
}

func newLedger() ledger {
	return ledger{
		claims: map[ObjectRef][]claim{}, held: held{have: map[ObjectRef]holding{}}, delivered: map[ObjectRef]delivery{},
		uids: map[types.UID]ObjectRef{}, waiting: map[ObjectRef]struct{}{},
	}
}

func (o *object) ref() ObjectRef {
	return ObjectRef{Kind: o.kind(), Namespace: o.meta().Namespace, Name: o.meta().Name}
}

// claim replaces what a file defines.
func (s *Source) claim(f *file, objects []object, affected map[ObjectRef]struct{}) {
	for _, obj := range f.objects {
		ref := obj.ref()
		affected[ref] = struct{}{}
		left := slices.DeleteFunc(s.claims[ref], func(c claim) bool { return c.file == f })
		if len(left) == 0 {
			delete(s.claims, ref)
		} else {
			s.claims[ref] = left
		}
	}
	f.objects = objects
	for i := range f.objects {
		ref := f.objects[i].ref()
		affected[ref] = struct{}{}
		s.claims[ref] = append(s.claims[ref], claim{file: f, obj: &f.objects[i]})
	}
}

// settleClaims decides for each affected object which document counts, and
// tells: pods that go, ConfigMaps and Secrets that come, pods that come, and at
// last ConfigMaps and Secrets that go, so that no pod ever lacks what it uses.
func (s *Source) settleClaims(affected map[ObjectRef]struct{}, now time.Time) {
	refs := make([]ObjectRef, 0, len(affected))
	for ref := range affected {
		refs = append(refs, ref)
	}
	slices.SortFunc(refs, ObjectRef.compare)
	var podsCome, objectsCome []claim
	var objectsGo []ObjectRef
	for _, ref := range refs {
		all := s.claims[ref]
		slices.SortFunc(all, s.held.precedence(ref))
		s.reportConflicts(ref, all, now)
		isPod := ref.Kind == "Pod"
		switch {
		case isPod && len(all) > 0:
			podsCome = append(podsCome, all[0])
		case isPod:
			s.removePod(ref)
		case len(all) > 0:
			objectsCome = append(objectsCome, all[0])
		default:
			objectsGo = append(objectsGo, ref)
		}
	}
	for _, c := range objectsCome {
		s.putObject(c, now)
	}
	// Those that are in force already keep their UIDs, which others may want.
	slices.SortStableFunc(podsCome, func(a, b claim) int { return cmp.Compare(s.held.news(a), s.held.news(b)) })
	for _, c := range podsCome {
		s.putPod(c, now)
	}
	for _, ref := range objectsGo {
		if _, err := s.objects.get(ref); err == nil {
			s.objects.set(ref, nil)
			s.log.Info("object removed", "object", ref.String())
		}
	}
	for _, ref := range refs {
		s.hold(ref)
		s.warn(ref, now)
	}
	// Has a UID become free that another pod waits for?
	for ref := range s.waiting {
		if all := s.claims[ref]; len(all) == 0 {
			delete(s.waiting, ref)
		} else if s.uids[all[0].obj.pod.UID] == (ObjectRef{}) {
			s.setConflicts(ref, nil, now)
			s.putPod(all[0], now)
			s.hold(ref)
			s.warn(ref, now)
		}
	}
}

// release takes out of force what a file has in force that was deleted and is
// written again. It keeps its place before others that define the same.
func (s *Source) release(f *file, affected map[ObjectRef]struct{}) {
	for i := range f.objects {
		ref := f.objects[i].ref()
		if s.held.have[ref].file != f.name {
			continue
		}
		if ref.Kind == "Pod" {
			s.removePod(ref)
		} else {
			s.objects.set(ref, nil)
		}
	}
	s.claim(f, nil, affected)
}

func (s *Source) removePod(ref ObjectRef) {
	d, ok := s.delivered[ref]
	if !ok {
		return
	}
	delete(s.delivered, ref)
	delete(s.uids, d.uid)
	s.log.Info("pod removed", "namespace", ref.Namespace, "pod", ref.Name, "uid", d.uid)
	s.sink.RemovePod(SourceName, d.uid)
}

func (s *Source) putPod(c claim, now time.Time) {
	ref := c.obj.ref()
	old, had := s.delivered[ref]
	d := delivery{uid: c.obj.pod.UID, hash: c.obj.hash, seen: now.Format(time.RFC3339Nano)}
	if had && old.uid == d.uid {
		if old.hash == d.hash {
			return
		}
		d.seen = old.seen
	}
	if other, taken := s.uids[d.uid]; taken && other != ref {
		// Two pods in one directory of the node: never.
		s.waiting[ref] = struct{}{}
		s.setConflicts(ref, append(s.problems.ofObject(ref), Problem{
			File: s.path(c.file.name), Document: c.obj.doc, Line: c.obj.line, Field: "metadata.uid", Object: ref.String(), Kept: had,
			Message: fmt.Sprintf("%s is the UID of %s too", d.uid, other), Remedy: "remove the field from one of the two",
		}), now)
		return
	}
	delete(s.waiting, ref)
	if had {
		delete(s.uids, old.uid)
	}
	s.uids[d.uid] = ref
	s.delivered[ref] = d
	pod := c.obj.pod.DeepCopy()
	pod.Annotations[ConfigSeenAnnotation] = d.seen
	s.log.Info("pod read", "file", c.file.name, "document", c.obj.doc, "namespace", ref.Namespace, "pod", ref.Name, "uid", d.uid, "replaces", old.uid)
	s.sink.SetPod(SourceName, pod)
}

// putObject puts a ConfigMap or Secret in force.
func (s *Source) putObject(c claim, now time.Time) {
	ref, new := c.obj.ref(), c.obj
	old, err := s.objects.get(ref)
	had := err == nil
	if had && old.hash == new.hash {
		return
	}
	if had && !s.takesOver(c) { // a document that is deleted may be written anew
		if fieldName := immutableChange(old, *new); fieldName != "" {
			path := s.path(c.file.name)
			s.setConflicts(ref, append(s.problems.ofObject(ref), Problem{File: path, Document: new.doc, Line: new.line, Field: fieldName, Object: ref.String(), Kept: true,
				Message: fmt.Sprintf("%s is immutable", ref), Remedy: "delete the document, then write it anew, or use another name"}), now)
			return
		}
	}
	s.objects.set(ref, new)
	s.log.Info("object read", "object", ref.String(), "file", c.file.name)
}

// reportConflicts reports every document that loses against another one.
func (s *Source) reportConflicts(ref ObjectRef, all []claim, now time.Time) {
	if len(all) > 1 && !all[0].file.goneSince.IsZero() {
		return // it is being renamed, exchanged or removed: told when it is over
	}
	var problems []Problem
	for i, c := range all {
		if i == 0 || !c.file.goneSince.IsZero() {
			continue
		}
		problems = append(problems, Problem{
			File: s.path(c.file.name), Document: c.obj.doc, Line: c.obj.line, Field: "metadata.name", Object: ref.String(),
			Message: fmt.Sprintf("%s is already defined in %s, which is in force", ref, s.path(all[0].file.name)),
			Remedy:  "remove or rename one of the two",
		})
	}
	s.setConflicts(ref, problems, now)
}
