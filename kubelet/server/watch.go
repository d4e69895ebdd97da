package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

// watcher turns the changes of a kind into those of one selection.
type watcher struct {
	kind *kind
	sel  selection
	// seen is the version of each object already told or known to the client.
	seen map[types.UID]uint64
	// shown are those that the client has: an object that no longer matches
	// is deleted for it, one that now does is added.
	shown map[types.UID]bool
	send  func(watch.EventType, object) error
}

func idOf(o object) types.UID {
	if id := o.GetUID(); id != "" {
		return id
	}
	return types.UID(o.GetNamespace() + "/" + o.GetName())
}

func (w *watcher) handle(t watch.EventType, o object) error {
	id := idOf(o)
	if t != watch.Deleted && versionOf(o) <= w.seen[id] {
		return nil
	}
	known := w.seen[id] != 0
	w.seen[id] = versionOf(o)
	matches := w.kind.matches(w.sel, o)
	switch {
	case t == watch.Deleted:
		delete(w.seen, id)
		shown := w.shown[id]
		delete(w.shown, id)
		if shown || (matches && !known) {
			return w.send(watch.Deleted, o)
		}
		return nil
	case matches && w.shown[id]:
		return w.send(watch.Modified, o)
	case matches && known:
		w.shown[id] = true
		return w.send(watch.Added, o)
	case matches:
		w.shown[id] = true
		return w.send(t, o)
	case !known && t == watch.Modified:
		// Changed between the client's list and its watch: it may have it.
		return w.send(watch.Deleted, o)
	case w.shown[id]:
		delete(w.shown, id)
		return w.send(watch.Deleted, o)
	}
	return nil
}

// serveWatch streams changes as JSON lines until the client goes or the
// watch's time is up. With resourceVersion it starts after that, else with
// what there is.
func (k *kind) serveWatch(rw http.ResponseWriter, r *http.Request, sel selection) error {
	limit := maxWatch
	if v := r.FormValue("timeoutSeconds"); v != "" {
		n, err := strconv.ParseInt(v, 10, 32)
		if err != nil || n < 0 {
			return apierrors.NewBadRequest(fmt.Sprintf("timeoutSeconds: %q is not a number of seconds", v))
		}
		if n > 0 {
			limit = min(limit, time.Duration(n)*time.Second)
		}
	}
	var from uint64
	if v := r.FormValue("resourceVersion"); v != "" && v != "0" {
		var err error
		if from, err = strconv.ParseUint(v, 10, 64); err != nil {
			return apierrors.NewBadRequest(fmt.Sprintf("resourceVersion: %q is none of this API's", v))
		}
	}
	initial := r.FormValue("sendInitialEvents") == "true"
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	defer cancel()

	now, last := k.snapshot()
	after := last
	if from > 0 {
		if after = from; from > last {
			// A version of an earlier daemon's life: the client lists again.
			return apierrors.NewResourceExpired(fmt.Sprintf("resourceVersion %d is not known here, the last is %d", from, last))
		}
	}
	changes := k.watch(ctx, strconv.FormatUint(after, 10))

	rw.Header().Set("Content-Type", "application/json")
	rw.WriteHeader(http.StatusOK)
	enc := json.NewEncoder(rw)
	flush := func() {}
	if f, ok := rw.(http.Flusher); ok {
		flush = f.Flush
	}
	type event struct {
		Type   watch.EventType `json:"type"`
		Object any             `json:"object"`
	}
	w := &watcher{kind: k, sel: sel, seen: map[types.UID]uint64{}, shown: map[types.UID]bool{}}
	w.send = func(t watch.EventType, o object) error {
		return enc.Encode(event{t, k.typed(o)})
	}
	err := func() error {
		for _, o := range now {
			switch known := versionOf(o) <= from; {
			case from > 0 && known:
				w.seen[idOf(o)] = versionOf(o)
				w.shown[idOf(o)] = k.matches(sel, o)
				if !initial || !w.shown[idOf(o)] {
					continue
				}
				if err := w.send(watch.Added, o); err != nil {
					return err
				}
			case from > 0 && !initial: // changes tells it
			default:
				if err := w.handle(watch.Added, o); err != nil {
					return err
				}
			}
		}
		if initial {
			mark := map[string]any{"kind": k.kind, "apiVersion": "v1", "metadata": metav1.ObjectMeta{
				ResourceVersion: strconv.FormatUint(last, 10),
				Annotations:     map[string]string{metav1.InitialEventsAnnotationKey: "true"},
			}}
			return enc.Encode(event{watch.Bookmark, mark})
		}
		return nil
	}()
	if err != nil {
		return nil // the client has gone
	}
	flush()
	for {
		select {
		case <-ctx.Done():
			return nil
		case ev, ok := <-changes:
			if !ok {
				return nil
			}
			o, isObject := ev.Object.(object)
			if !isObject { // an ERROR with its status, the last event
				enc.Encode(event{ev.Type, ev.Object})
				flush()
				return nil
			}
			if err := w.handle(ev.Type, o); err != nil {
				return nil
			}
			if len(changes) == 0 {
				flush()
			}
		}
	}
}
