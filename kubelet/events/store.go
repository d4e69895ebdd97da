// Package events keeps the node's events: recorded without waiting, put
// together as upstream's recorder does, bounded, and written behind so that
// they survive a restart.
package events

import (
	"context"
	"fmt"
	"log/slog"
	"sort"
	"strings"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/podd-runtime/podd/kubelet/events/feed"
)

// DefaultMax is how many different events are kept: about 0.3 KiB each.
const DefaultMax = 2000

// Config of a Store.
type Config struct {
	// Path of the file that keeps the events; "": memory only.
	Path string
	// Max number of different events; the one that came last the longest ago
	// goes first. 0 is DefaultMax.
	Max int
	// Component and Host name the reporter, as in "kubelet" on node "n1".
	Component, Host string
	// Now is the clock; nil is time.Now.
	Now func() time.Time
	Log *slog.Logger
	// Tell has each new event of a pod logged, too: where the log goes to a
	// journal, which finds all that concerns a pod.
	Tell bool
}

// Store of events. It implements the Recorder of manifests, pods and probes.
type Store struct {
	cfg Config
	out feed.Feed

	mu      sync.Mutex
	rv      uint64
	events  map[same]*entry
	similar map[kind]*similar
	dirty   map[*entry]struct{}
	lastNew time.Time
	changed chan struct{} // one token: there is something to write
	file    journal
}

// Open reads the events of the last run. A broken file is set aside and
// reported; the store starts empty then.
func Open(cfg Config) (*Store, error) {
	if cfg.Max == 0 {
		cfg.Max = DefaultMax
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{
		cfg: cfg, events: map[same]*entry{}, similar: map[kind]*similar{},
		dirty: map[*entry]struct{}{}, changed: make(chan struct{}, 1), file: journal{path: cfg.Path},
		out: feed.Feed{Max: cfg.Max},
	}
	if cfg.Path == "" {
		return s, nil
	}
	loaded, err := s.file.load()
	if err != nil {
		return nil, fmt.Errorf("read events from %s: %w", cfg.Path, err)
	}
	for _, e := range loaded {
		s.events[e.key()] = e
		s.rv = max(s.rv, e.RV)
		if strings.HasPrefix(e.Message, combinedPrefix) {
			s.similar[e.key().kind] = &similar{combined: e}
		}
	}
	s.prune()
	return s, nil
}

func (e *entry) key() same { return same{kind{e.Object, e.Type, e.Reason}, e.Message} }

// Eventf records an event on ref. It neither blocks nor fails.
func (s *Store) Eventf(ref *v1.ObjectReference, eventType, reason, format string, args ...any) {
	message := format
	if len(args) > 0 {
		message = fmt.Sprintf(format, args...)
	}
	now := s.cfg.Now()
	k := same{kind{newObject(ref), eventType, reason}, truncate(message)}

	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.events[k]
	if e == nil && s.combine(k.kind, now) {
		k.message = truncate(combinedPrefix + message)
		e = s.combined(k)
	}
	s.rv++
	typ := watch.Modified
	if e == nil {
		typ = watch.Added
		// Two events in one tick of the clock need different names.
		named := now
		if !named.After(s.lastNew) {
			named = s.lastNew.Add(1)
		}
		s.lastNew = named
		e = &entry{Name: eventName(k.object, named), Object: k.object, Type: eventType, Reason: reason, Message: k.message, First: now}
		s.events[k] = e
		if strings.HasPrefix(k.message, combinedPrefix) {
			s.remember(k.kind, e)
		}
	}
	e.RV, e.Last = s.rv, now
	e.Count++
	s.touch(e)
	s.prune()
	s.out.Publish(e.Name, watch.Event{Type: typ, Object: e.api(s.cfg.Component, s.cfg.Host)})
	if s.cfg.Tell && typ == watch.Added && ref.Kind == "Pod" {
		s.tell(ref, eventType, reason, k.message)
	}
}

// combined is the one event that stands for all further ones of a kind, with
// its new message; nil: there is none yet.
func (s *Store) combined(k same) *entry {
	e := s.similar[k.kind].combined
	if e == nil || s.events[e.key()] != e {
		return nil
	}
	delete(s.events, e.key())
	e.Message = k.message
	s.events[k] = e
	return e
}

// remember the combined event of a kind.
func (s *Store) remember(k kind, e *entry) {
	if m := s.similar[k]; m != nil {
		m.combined = e
	}
}

// tell the log of a new event.
func (s *Store) tell(ref *v1.ObjectReference, eventType, reason, message string) {
	level := slog.LevelInfo
	if eventType == v1.EventTypeWarning {
		level = slog.LevelWarn
	}
	attrs := []slog.Attr{slog.String("reason", reason), slog.String("message", message), slog.String("pod", ref.Namespace+"/"+ref.Name), slog.String("uid", string(ref.UID))}
	if _, container, ok := strings.Cut(ref.FieldPath, "{"); ok {
		attrs = append(attrs, slog.String("container", strings.TrimSuffix(container, "}")))
	}
	s.cfg.Log.LogAttrs(context.Background(), level, "event", attrs...)
}

// combine says whether one more message of this kind is one too many.
func (s *Store) combine(k kind, now time.Time) bool {
	m := s.similar[k]
	if m == nil || now.Sub(m.since) > similarWindow {
		var combined *entry
		if m != nil {
			combined = m.combined
		}
		m = &similar{since: now, combined: combined}
		s.similar[k] = m
	}
	m.messages++
	return m.messages >= similarMax
}

func (s *Store) touch(e *entry) {
	if s.file.path == "" {
		return
	}
	s.dirty[e] = struct{}{}
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// prune drops a tenth of the events when there are too many: sorting then
// costs little for each.
func (s *Store) prune() {
	if len(s.events) <= s.cfg.Max {
		return
	}
	all := s.sorted()
	for _, e := range all[:len(all)-s.cfg.Max*9/10] {
		delete(s.events, e.key())
		delete(s.dirty, e)
	}
	for k, m := range s.similar {
		if s.cfg.Now().Sub(m.since) > similarWindow && (m.combined == nil || s.events[m.combined.key()] != m.combined) {
			delete(s.similar, k)
		}
	}
}

// sorted by the time of the last occurrence.
func (s *Store) sorted() []*entry {
	all := make([]*entry, 0, len(s.events))
	for _, e := range s.events {
		all = append(all, e)
	}
	sort.Slice(all, func(i, j int) bool { return all[i].RV < all[j].RV })
	return all
}

// List returns the events of a namespace ("": of all), oldest first.
func (s *Store) List(namespace string) []v1.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []v1.Event
	for _, e := range s.sorted() {
		ev := e.api(s.cfg.Component, s.cfg.Host)
		if namespace == "" || ev.Namespace == namespace {
			out = append(out, *ev)
		}
	}
	return out
}

// Watch delivers the events there are as ADDED and then every change, until
// ctx ends. A slow reader sees the last state of each event.
func (s *Store) Watch(ctx context.Context) <-chan watch.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.Subscribe(ctx, func() []feed.Item {
		var items []feed.Item
		for _, e := range s.sorted() {
			items = append(items, feed.Item{Key: e.Name, Event: watch.Event{Type: watch.Added, Object: e.api(s.cfg.Component, s.cfg.Host)}})
		}
		return items
	})
}

// writeDelay gathers a burst of events into one write.
const writeDelay = 500 * time.Millisecond

// Run writes events behind until ctx ends, and then what is left.
func (s *Store) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return s.Flush()
		case <-s.changed:
		}
		select {
		case <-ctx.Done():
		case <-time.After(writeDelay):
		}
		if err := s.Flush(); err != nil {
			s.cfg.Log.Warn("events are not saved", "path", s.file.path, "error", err)
		}
	}
}

// Flush writes what is not written yet.
func (s *Store) Flush() error {
	if s.file.path == "" {
		return nil
	}
	s.mu.Lock()
	batch := make([]entry, 0, len(s.dirty))
	for e := range s.dirty {
		batch = append(batch, *e)
	}
	clear(s.dirty)
	var all []entry
	if s.file.full(len(batch), s.cfg.Max) {
		for _, e := range s.sorted() {
			all = append(all, *e)
		}
	}
	s.mu.Unlock()
	if all != nil {
		return s.file.rewrite(all)
	}
	return s.file.append(batch)
}
