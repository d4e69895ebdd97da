package feed

import (
	"container/list"
	"context"
	"strconv"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/watch"
)

func ev(t watch.EventType, rv string) watch.Event {
	p := &v1.Pod{}
	p.ResourceVersion = rv
	return watch.Event{Type: t, Object: p}
}

func TestMerge(t *testing.T) {
	for _, tc := range []struct {
		name string
		in   []watch.Event
		want string
	}{
		{"added then modified is added", []watch.Event{ev(watch.Added, "1"), ev(watch.Modified, "2")}, "ADDED2 "},
		{"modified twice", []watch.Event{ev(watch.Modified, "1"), ev(watch.Modified, "2")}, "MODIFIED2 "},
		{"modified then deleted", []watch.Event{ev(watch.Modified, "1"), ev(watch.Deleted, "2")}, "DELETED2 "},
		{"added then deleted stay two", []watch.Event{ev(watch.Added, "1"), ev(watch.Deleted, "2")}, "ADDED1 DELETED2 "},
		{"replaced", []watch.Event{ev(watch.Deleted, "1"), ev(watch.Added, "2"), ev(watch.Modified, "3")}, "DELETED1 ADDED3 "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := subscriber{last: map[string]*list.Element{}}
			for _, e := range tc.in {
				s.merge(Item{"a", e})
			}
			got := ""
			for e, ok := s.next(); ok; e, ok = s.next() {
				got += string(e.Type) + e.Object.(*v1.Pod).ResourceVersion + " "
			}
			if len(s.last) != 0 {
				t.Errorf("keys are remembered: %v", s.last)
			}
			if got != tc.want {
				t.Fatalf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestSlowSubscriberDoesNotBlock(t *testing.T) {
	var f Feed
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	ch := f.Subscribe(ctx, func() []Item { return []Item{{"a", ev(watch.Added, "0")}} })
	for i := 0; i < 10000; i++ {
		f.Publish("a", ev(watch.Modified, "x"))
	}
	f.Publish("a", ev(watch.Deleted, "last"))
	n := 0
	for e := range ch {
		n++
		if e.Type == watch.Deleted {
			break
		}
	}
	if n > 4 {
		t.Fatalf("%d events for one object, want them merged", n)
	}
	cancel()
	for range ch {
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.subs) != 0 {
		t.Fatal("subscriber left behind")
	}
}

// TestABacklogIsBoundedAndCheap: what waits for a subscriber that takes nothing,
// of objects that come without end, is bounded, the last are there, and to
// publish one more takes no longer for all that.
func TestABacklogIsBoundedAndCheap(t *testing.T) {
	f := Feed{Max: 100}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ch := f.Subscribe(ctx, nil)
	const n = 50000 // by a search through all that waits: 1e9 steps
	for i := range n {
		f.Publish(strconv.Itoa(i), ev(watch.Added, strconv.Itoa(i)))
	}
	got, last := 0, ""
	for last != strconv.Itoa(n-1) {
		e, ok := <-ch
		if !ok {
			t.Fatalf("ended after %d, %s", got, last)
		}
		got, last = got+1, e.Object.(*v1.Pod).ResourceVersion
	}
	if got > 102 { // one was on its way already
		t.Errorf("%d events waited", got)
	}
	var all Feed
	slow := all.Subscribe(ctx, nil)
	for range 2 {
		for i := range n {
			all.Publish(strconv.Itoa(i), ev(watch.Modified, "x"))
		}
	}
	for i := range n {
		if _, ok := <-slow; !ok {
			t.Fatalf("ended after %d of %d", i, n)
		}
	}
}
