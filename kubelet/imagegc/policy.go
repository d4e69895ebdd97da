// Package imagegc removes images that no pod uses: those that have not been
// used for long, and, when their file system is nearly full, as many as it
// takes, the one that was used last the longest ago first. The rules, numbers
// and events are those of upstream's kubelet (pkg/kubelet/images); unlike there
// what a removal has freed is measured and not taken from the image's size,
// which counts layers that others keep.
package imagegc

import (
	"cmp"
	"slices"
	"time"
)

// Policy of the node.
type Policy struct {
	// HighPercent of the image file system in use begins a removal, which goes
	// on until LowPercent is reached; 0 to 100. 100: never.
	HighPercent, LowPercent int
	// MinAge protects images that were found on the node less than that ago.
	MinAge time.Duration
	// MaxAge removes images that have not been used for so long, however much
	// room there is; 0: never.
	MaxAge time.Duration
}

// Off says that there is nothing to do, ever.
func (p Policy) Off() bool { return p.HighPercent >= 100 && p.MaxAge == 0 }

// Image of the node's store.
type Image struct {
	ID   string
	Name string // what people call it
	Size int64  // bytes, layers that others share included
	// Pinned images stay.
	Pinned bool
	// Used by a container, running or not, or wanted by a pod of this node.
	Used bool
}

// Disk is the file system of the images, in bytes.
type Disk struct{ Capacity, Available int64 }

// UsedPercent is rounded up.
func (d Disk) UsedPercent() int {
	if d.Capacity <= 0 {
		return 0
	}
	return 100 - int(min(d.Available, d.Capacity)*100/d.Capacity)
}

// missing is how much room there is to make; 0: there is enough. Where somebody
// has found no room, the lower threshold counts at once: what he had brought by
// then is gone again, and the disk may be less full than the upper one.
func (p Policy) missing(d Disk, found bool) int64 {
	if p.HighPercent >= 100 || d.UsedPercent() < p.HighPercent && !found {
		return 0
	}
	return max(p.short(d), 0)
}

// short of the lower threshold by so much.
func (p Policy) short(d Disk) int64 {
	return d.Capacity*int64(100-p.LowPercent)/100 - d.Available
}

// history is when images were seen, by id.
type history map[string]seen

type seen struct {
	found time.Time // first seen on the node
	used  time.Time // last seen in use; zero: never
}

// see takes in what is there at a moment.
func (h history) see(images []Image, now time.Time) {
	there := map[string]bool{}
	for _, i := range images {
		there[i.ID] = true
		s, known := h[i.ID]
		if !known {
			s.found = now
		}
		if i.Used {
			s.used = now
		}
		h[i.ID] = s
	}
	for id := range h {
		if !there[id] {
			delete(h, id)
		}
	}
}

// candidates are the images that may go, the first to go first.
func (h history) candidates(images []Image) []Image {
	out := slices.DeleteFunc(slices.Clone(images), func(i Image) bool { return i.Used || i.Pinned })
	slices.SortStableFunc(out, func(a, b Image) int {
		x, y := h[a.ID], h[b.ID]
		return cmp.Or(x.used.Compare(y.used), x.found.Compare(y.found))
	})
	return out
}

// expired says that the image has not been used for too long; began is when
// the agent started to look: what it has not seen used before says nothing.
func (p Policy) expired(s seen, now, began time.Time) bool {
	return p.MaxAge > 0 && now.Sub(began) > p.MaxAge && now.Sub(s.used) > p.MaxAge
}

// young says that the image may have been pulled for a container that is just
// about to be made.
func (p Policy) young(s seen, now time.Time) bool { return now.Sub(s.found) < p.MinAge }

// Sum of some images.
type Sum struct {
	Images int
	Bytes  int64
}

func (s *Sum) add(i Image) { s.Images, s.Bytes = s.Images+1, s.Bytes+i.Size }

// Kept are the images that stay, by why.
type Kept struct{ Used, Pinned, Young, Failed Sum }
