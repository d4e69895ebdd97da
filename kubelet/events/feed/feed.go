// Package feed fans changes out to subscribers that may be slow: a publisher
// never waits, and what a subscriber has not taken yet is merged by key, so
// that its backlog is bounded by the number of objects.
package feed

import (
	"context"
	"sync"

	"k8s.io/apimachinery/pkg/watch"
)

// Feed is ready to use when zero.
type Feed struct {
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
	s := &subscriber{wake: make(chan struct{}, 1)}
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
	mu    sync.Mutex
	queue []Item
	wake  chan struct{}
}

func (s *subscriber) add(key string, ev watch.Event) {
	s.mu.Lock()
	s.queue = merge(s.queue, Item{Key: key, Event: ev})
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// merge appends it, replacing what is pending for its key when the
// subscriber cannot tell the difference.
func merge(queue []Item, it Item) []Item {
	for i := len(queue) - 1; i >= 0; i-- {
		p := &queue[i]
		if p.Key != it.Key {
			continue
		}
		switch {
		case p.Event.Type == watch.Deleted:
			// A new object under the same name: both must be seen.
		case it.Event.Type == watch.Modified:
			p.Event.Object = it.Event.Object
			return queue
		case it.Event.Type == watch.Deleted && p.Event.Type == watch.Modified:
			*p = it
			return queue
		}
		break
	}
	return append(queue, it)
}

func (s *subscriber) pump(ctx context.Context, out chan<- watch.Event) {
	for {
		s.mu.Lock()
		batch := s.queue
		s.queue = nil
		s.mu.Unlock()
		for _, it := range batch {
			select {
			case out <- it.Event:
			case <-ctx.Done():
				return
			}
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-s.wake:
		case <-ctx.Done():
			return
		}
	}
}
