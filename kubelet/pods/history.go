package pods

import (
	"slices"

	"k8s.io/apimachinery/pkg/watch"

	"github.com/podd-runtime/podd/kubelet/events/feed"
)

// maxHistory of changes that a watch may begin behind. They hold pods' old
// statuses, about 3 KiB each.
const maxHistory = 256

// change is an event with the version that it made.
type change struct {
	rv   uint64
	item feed.Item
}

// history is the last changes, oldest first.
type history struct{ changes []change }

func (h *history) add(rv uint64, key string, ev watch.Event) {
	if len(h.changes) == maxHistory {
		h.changes = slices.Delete(h.changes, 0, maxHistory/4)
	}
	h.changes = append(h.changes, change{rv, feed.Item{Key: key, Event: ev}})
}

// since returns what came after rv; false: it is too long ago to tell.
func (h *history) since(rv, now uint64) ([]feed.Item, bool) {
	if rv == now {
		return nil, true
	}
	if rv > now || len(h.changes) == 0 || h.changes[0].rv > rv+1 {
		return nil, false
	}
	var out []feed.Item
	for _, c := range h.changes {
		if c.rv > rv {
			out = append(out, c.item)
		}
	}
	return out, true
}
