package apiserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/util/flowcontrol"
)

// Events are passed on to the apiserver as the node's store has put them
// together: one that repeats is patched with its count, and no object gets
// more than a burst of them (client-go's record: 25, then one in five minutes).
type Events struct {
	client *Client
	from   interface {
		Watch(ctx context.Context) <-chan watch.Event
	}
	log   *slog.Logger
	limit flowcontrol.RateLimiter

	sent    map[types.NamespacedName]bool
	buckets map[types.UID]*bucket
}

// bucket of one object's events.
type bucket struct {
	tokens float64
	filled time.Time
}

const (
	eventBurst  = 25
	eventRefill = 5 * time.Minute // for one more
	// eventTries of one event; then it is dropped, as upstream does.
	eventTries = 12
	// maxSent is how many events are remembered to be at the apiserver, and of
	// how many objects. One that is forgotten is found there when it is made.
	maxSent = 4096
)

// NewEvents returns Events that sends at most qps events a second, after a
// burst; qps 0: no limit.
func NewEvents(client *Client, from interface {
	Watch(ctx context.Context) <-chan watch.Event
}, qps float32, burst int, log *slog.Logger) *Events {
	e := &Events{client: client, from: from, log: log, sent: map[types.NamespacedName]bool{}, buckets: map[types.UID]*bucket{}}
	if qps > 0 {
		e.limit = flowcontrol.NewTokenBucketRateLimiter(qps, burst)
	}
	return e
}

// Run passes on what happens from now on until ctx ends. A backlog is merged and
// bounded by the store, so a long silence of the apiserver costs no memory.
func (e *Events) Run(ctx context.Context) error {
	began := time.Now()
	for ev := range e.from.Watch(ctx) {
		event, ok := ev.Object.(*v1.Event)
		if !ok || ev.Type == watch.Deleted || event.LastTimestamp.Time.Before(earliest(began, time.Now(), time.Since(began))) {
			continue // of an earlier run
		}
		if !e.admit(event) {
			continue
		}
		if e.limit != nil && e.limit.Wait(ctx) != nil {
			return nil
		}
		e.send(ctx, event)
	}
	return nil
}

// earliest time, to the second, of an event of a run that began up ago: by the
// clock of then, or by the one of now if that was set back meanwhile.
func earliest(began, now time.Time, up time.Duration) time.Time {
	if then := now.Add(-up).Round(0); then.Before(began.Round(0)) {
		began = then
	}
	return began.Truncate(time.Second)
}

// admit says whether the object of the event has not had too many already.
func (e *Events) admit(event *v1.Event) bool {
	now := time.Now()
	uid := event.InvolvedObject.UID
	b := e.buckets[uid]
	if b == nil {
		if len(e.buckets) >= maxSent {
			clear(e.buckets)
		}
		b = &bucket{tokens: eventBurst, filled: now}
		e.buckets[uid] = b
	}
	b.tokens = min(eventBurst, b.tokens+float64(now.Sub(b.filled))/float64(eventRefill))
	b.filled = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

func (e *Events) send(ctx context.Context, event *v1.Event) {
	key := name(event)
	var err error
	for try := 1; try <= eventTries && ctx.Err() == nil; try++ {
		err = e.put(ctx, event)
		switch {
		case err == nil:
			if len(e.sent) >= maxSent {
				clear(e.sent)
			}
			e.sent[key] = true
			return
		case e.sent[key] && apierrors.IsNotFound(err): // it was an hour ago
			delete(e.sent, key)
			continue
		case !e.sent[key] && apierrors.IsAlreadyExists(err):
			e.sent[key] = true
			continue
		case refused(err):
			e.log.Debug("event is refused", "object", event.InvolvedObject.Name, "reason", event.Reason, "error", err)
			return
		}
		sleep(ctx, Backoff(try, time.Second, 10*time.Second))
	}
	if ctx.Err() == nil {
		e.log.Warn("event is dropped: the apiserver does not take it", "object", event.InvolvedObject.Name, "reason", event.Reason, "error", err)
	}
}

// put makes the event at the apiserver, or patches the one that is there.
func (e *Events) put(ctx context.Context, event *v1.Event) error {
	ref := Ref{Resource: "events", Namespace: event.Namespace}
	if !e.sent[name(event)] {
		made := event.DeepCopy()
		made.ResourceVersion, made.CreationTimestamp = "", metav1.Time{}
		return e.client.Create(ctx, ref, made, nil)
	}
	ref.Name = event.Name
	patch, err := json.Marshal(map[string]any{
		"count": event.Count, "lastTimestamp": event.LastTimestamp, "message": event.Message,
	})
	if err != nil {
		return fmt.Errorf("encode event %s: %w", event.Name, err)
	}
	return e.client.Patch(ctx, ref, patch, nil)
}

// refused says whether an error is the apiserver's answer to what was asked. One
// that has too much to do, is about to end, or does not know the node's new
// certificate yet has not answered.
func refused(err error) bool {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return false
	}
	switch code := status.Status().Code; code {
	case http.StatusUnauthorized, http.StatusRequestTimeout, http.StatusTooManyRequests:
		return false
	default:
		return code >= 400 && code < 500
	}
}
