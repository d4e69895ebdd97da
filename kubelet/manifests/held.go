package manifests

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
)

// held says which file has each object in force. While several files define an
// object, the one in force stays: a copy that somebody puts beside it, whatever
// its name, is told as a Problem and changes nothing. It is kept on disk, so
// that a copy made while podd was down changes nothing either.
type held struct {
	path  string // of the file that keeps it; "": memory only
	have  map[ObjectRef]holding
	dirty bool // have is not on disk yet
}

// holding is the file that has an object in force, by its name in the
// directory, and the hash of the content.
type holding struct {
	file, hash string
}

const (
	heldVersion = 1
	// maxHeld bounds the record, in bytes: some 300,000 objects.
	maxHeld = 64 << 20
)

type heldFile struct {
	Version int          `json:"version"`
	Objects []heldObject `json:"objects"`
}

type heldObject struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	File      string `json:"file"`
	Hash      string `json:"hash"`
}

// precedence orders the documents that define one object, the one that counts
// first:
//
//  1. the one in force, also while its file is away for a moment: editors rename
//     a file away before they write it anew, and that is nobody's turn;
//  2. one with the content that is in force: a file that was renamed, or a copy;
//  3. the first one by the name of its file.
//
// Files that are there come before those that are not.
func (h *held) precedence(ref ObjectRef) func(a, b claim) int {
	now := h.have[ref]
	rank := func(c claim) int {
		switch {
		case c.file.name == now.file:
			return 0
		case !c.file.goneSince.IsZero():
			return 3
		case c.obj.hash == now.hash:
			return 1
		default:
			return 2
		}
	}
	return func(a, b claim) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.file.name, b.file.name))
	}
}

// news is 0 for a document that is in force as it is, or was when podd ran last;
// 1 for others.
func (h *held) news(c claim) int {
	if h.have[c.obj.ref()].hash == c.obj.hash {
		return 0
	}
	return 1
}

// takesOver says whether the object was in force from another file.
func (s *Source) takesOver(c claim) bool {
	h, had := s.held.have[c.obj.ref()]
	return had && h.file != c.file.name
}

// hold notes, and tells, which file has an object in force now.
func (s *Source) hold(ref ObjectRef) {
	old, had := s.held.have[ref]
	all := s.claims[ref]
	if len(all) == 0 {
		if had {
			delete(s.held.have, ref)
			s.held.dirty = true
		}
		return
	}
	h := holding{file: all[0].file.name, hash: s.hashInForce(ref)}
	if h == old {
		return
	}
	s.held.have[ref], s.held.dirty = h, true
	if had && h.file != old.file {
		s.log.Info("another file has the object in force", "object", ref.String(), "file", h.file, "before", old.file,
			"same_content", h.hash == old.hash, "waiting", len(all)-1)
	}
}

// hashInForce of an object; "": none is in force.
func (s *Source) hashInForce(ref ObjectRef) string {
	if ref.Kind == "Pod" {
		return s.delivered[ref].hash
	}
	o, _ := s.objects.get(ref)
	return o.hash
}

// load reads what was in force when podd ran last. Without it the first file by
// name counts.
func (h *held) load() error {
	if h.path == "" {
		return nil
	}
	f, err := os.Open(h.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxHeld+1))
	if err != nil {
		return err
	}
	have, err := decodeHeld(data)
	if err != nil {
		aside := h.path + ".broken"
		return fmt.Errorf("%s: %w; put aside as %s", h.path, errors.Join(err, os.Rename(h.path, aside)), aside)
	}
	h.have = have
	return nil
}

func decodeHeld(data []byte) (map[ObjectRef]holding, error) {
	if len(data) > maxHeld {
		return nil, fmt.Errorf("is larger than %d MiB", maxHeld>>20)
	}
	var f heldFile
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, err
	}
	if f.Version != heldVersion {
		return nil, fmt.Errorf("version %d is not known", f.Version)
	}
	have := make(map[ObjectRef]holding, len(f.Objects))
	for _, o := range f.Objects {
		have[ObjectRef{o.Kind, o.Namespace, o.Name}] = holding{file: o.File, hash: o.Hash}
	}
	return have, nil
}

// save keeps what is in force, without fsync: after a power cut it may be old,
// never half-written.
func (h *held) save() error {
	if h.path == "" || !h.dirty {
		return nil
	}
	f := heldFile{Version: heldVersion, Objects: make([]heldObject, 0, len(h.have))}
	for _, ref := range slices.SortedFunc(maps.Keys(h.have), ObjectRef.compare) {
		now := h.have[ref]
		f.Objects = append(f.Objects, heldObject{ref.Kind, ref.Namespace, ref.Name, now.file, now.hash})
	}
	data, err := json.Marshal(f)
	if err != nil {
		return err
	}
	temporary := h.path + ".tmp"
	if err := os.WriteFile(temporary, data, 0o600); err != nil {
		return err
	}
	if err := os.Rename(temporary, h.path); err != nil {
		return err
	}
	h.dirty = false
	return nil
}

// tidy forgets objects that no file defines any more: those whose files went
// while podd was down.
func (s *Source) tidyHeld() {
	for ref := range s.held.have {
		if len(s.claims[ref]) == 0 {
			s.hold(ref)
		}
	}
	s.saveHeld()
}

func (s *Source) saveHeld() {
	if err := s.held.save(); err != nil {
		s.log.Warn("which manifests are in force is not kept", "path", s.held.path, "error", err)
	}
}
