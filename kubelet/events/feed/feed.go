// Package feed fans changes out to subscribers that may be slow: a publisher
// never waits, whatever has piled up, and what a subscriber has not taken yet is
// merged by key, so that its backlog is bounded by the number of objects.
package feed

import (
	"container/list"
	"context"
	"sync"

	"k8s.io/apimachinery/pkg/watch"
)

// Feed is ready to use when zero.
type Feed struct {
	// Max, if not 0, is how many events may wait for a subscriber: the oldest go
	// first then. For objects that come and go without end, and of which the
	// last ones matter.
	Max int

	mu   sync.Mutex
	subs map[*subscriber]struct{}
}

// Publish hands ev, about the object named key, to every subscriber. The
// object must not be changed any more.
func (f *Feed) Publish(key string, ev watch.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for s := range f.subs {
		s.add(key, ev)
	}
}

// Item is an event with the key of its object.
type Item struct {
	Key   string
	Event watch.Event
}

// Subscribe returns a channel that delivers initial's items and then all that
// is published; it closes when ctx ends. initial is called with publishing
// held back, so that nothing is missed and nothing comes twice.
func (f *Feed) Subscribe(ctx context.Context, initial func() []Item) <-chan watch.Event {
	s := &subscriber{max: f.Max, last: map[string]*list.Element{}, wake: make(chan struct{}, 1)}
	out := make(chan watch.Event)
	f.mu.Lock()
	if initial != nil {
		for _, it := range initial() {
			s.add(it.Key, it.Event)
		}
	}
	if f.subs == nil {
		f.subs = make(map[*subscriber]struct{})
	}
	f.subs[s] = struct{}{}
	f.mu.Unlock()
	go func() {
		defer close(out)
		defer func() {
			f.mu.Lock()
			delete(f.subs, s)
			f.mu.Unlock()
		}()
		s.pump(ctx, out)
	}()
	return out
}

// subscriber is a queue of events, at most two for each key.
type subscriber struct {
	max  int
	wake chan struct{}

	mu    sync.Mutex
	queue list.List                // of Item
	last  map[string]*list.Element // of each key, in the queue
}

func (s *subscriber) add(key string, ev watch.Event) {
	s.mu.Lock()
	s.merge(Item{Key: key, Event: ev})
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// merge appends it, replacing what is pending for its key when the subscriber
// cannot tell the difference. It takes the same time whatever is pending.
func (s *subscriber) merge(it Item) {
	if e := s.last[it.Key]; e != nil {
		p := e.Value.(Item)
		switch {
		case p.Event.Type == watch.Deleted:
			// A new object under the same name: both must be seen.
		case it.Event.Type == watch.Modified:
			p.Event.Object = it.Event.Object
			e.Value = p
			return
		case it.Event.Type == watch.Deleted && p.Event.Type == watch.Modified:
			e.Value = it
			return
		}
	}
	s.last[it.Key] = s.queue.PushBack(it)
	if s.max > 0 && s.queue.Len() > s.max {
		s.remove(s.queue.Front())
	}
}

func (s *subscriber) remove(e *list.Element) Item {
	it := s.queue.Remove(e).(Item)
	if s.last[it.Key] == e {
		delete(s.last, it.Key)
	}
	return it
}

// next takes the oldest event.
func (s *subscriber) next() (watch.Event, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.queue.Front()
	if e == nil {
		return watch.Event{}, false
	}
	return s.remove(e).Event, true
}

func (s *subscriber) pump(ctx context.Context, out chan<- watch.Event) {
	for {
		ev, ok := s.next()
		if ok {
			select {
			case out <- ev:
				continue
			case <-ctx.Done():
				return
			}
		}
		select {
		case <-s.wake:
		case <-ctx.Done():
			return
		}
	}
}
