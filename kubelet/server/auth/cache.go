package auth

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// maxVerdicts in a cache. Callers without rights cannot make it grow further;
// the oldest go first.
const maxVerdicts = 4096

// cache keeps verdicts for a while. Who asks for one that is being looked for
// waits for it instead of asking again. Errors are not kept.
type cache[T any] struct {
	now    func() time.Time
	flight singleflight.Group

	mu    sync.Mutex
	kept  map[string]verdict[T]
	order []string // of insertion
}

type verdict[T any] struct {
	value   T
	expires time.Time
}

func newCache[T any]() *cache[T] {
	return &cache[T]{now: time.Now, kept: map[string]verdict[T]{}}
}

// get returns the verdict under key, asking for it when none is in force.
func (c *cache[T]) get(ctx context.Context, key string, ask func(context.Context) (T, time.Duration, error)) (T, error) {
	if v, ok := c.find(key); ok {
		return v, nil
	}
	// The one who asks must not take the answer from the others by going away.
	done := c.flight.DoChan(key, func() (any, error) {
		if v, ok := c.find(key); ok {
			return v, nil
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reviewTime)
		defer cancel()
		v, ttl, err := ask(ctx)
		if err == nil && ttl > 0 {
			c.keep(key, v, ttl)
		}
		return v, err
	})
	var none T
	select {
	case r := <-done:
		if r.Err != nil {
			return none, r.Err
		}
		return r.Val.(T), nil
	case <-ctx.Done():
		return none, ctx.Err()
	}
}

func (c *cache[T]) find(key string) (v T, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.kept[key]
	if !ok || !c.now().Before(e.expires) {
		return v, false
	}
	return e.value, true
}

func (c *cache[T]) keep(key string, v T, ttl time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.kept[key]; !ok {
		c.order = append(c.order, key)
	}
	c.kept[key] = verdict[T]{v, c.now().Add(ttl)}
	for len(c.kept) > maxVerdicts {
		delete(c.kept, c.order[0])
		c.order = c.order[1:]
	}
}
