package imagegc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"time"
)

var (
	t0 = time.Unix(1_000_000, 0)
	// errBusy is what the fake says of an image that cannot be removed.
	errBusy = errors.New("busy")
)

// fakeStore is a disk of 1000 bytes on which images may share bytes.
type fakeStore struct {
	images   []Image
	own      map[string]int64 // what the removal of an image frees; others: its size
	free     int64
	garbage  int64 // freed by Sweep
	pending  int64
	capacity int64
	fail     map[string]error
}

func (f *fakeStore) Images(context.Context) ([]Image, error) { return f.images, f.fail["list"] }

func (f *fakeStore) Remove(_ context.Context, id string) error {
	if err := f.fail[id]; err != nil {
		return err
	}
	for n, i := range f.images {
		if i.ID == id {
			freed, ok := f.own[id]
			if !ok {
				freed = i.Size
			}
			f.pending += freed // it is the sweep that frees it
			f.images = append(f.images[:n:n], f.images[n+1:]...)
			return nil
		}
	}
	return fmt.Errorf("no image %s", id)
}

func (f *fakeStore) Sweep(context.Context) error {
	f.free += f.pending + f.garbage
	f.pending, f.garbage = 0, 0
	return f.fail["sweep"]
}

func (f *fakeStore) Disk() (Disk, error) { return Disk{Capacity: f.capacity, Available: f.free}, nil }

// world is a collector with what it told.
type world struct {
	*Collector
	store   *fakeStore
	events  []string
	reasons []string
}

func newWorld(p Policy, free int64, images ...Image) *world {
	w := &world{store: &fakeStore{images: images, free: free, capacity: 1000, own: map[string]int64{}, fail: map[string]error{}}}
	w.Collector = New(Config{
		Policy: p, Store: w.store, Log: slog.New(slog.DiscardHandler),
		Event:   func(t, reason, message string) { w.events = append(w.events, t+" "+reason+": "+message) },
		Removed: func(reason string) { w.reasons = append(w.reasons, reason) },
	})
	w.began = t0
	return w
}

var usual = Policy{HighPercent: 85, LowPercent: 80, MinAge: 2 * time.Minute}

func images(names ...string) (out []Image) {
	for _, n := range names {
		out = append(out, Image{ID: n, Name: n, Size: 30})
	}
	return out
}

func TestNothingBelowTheHighThreshold(t *testing.T) {
	w := newWorld(usual, 160, images("a", "b")...) // 84 %, rounded up
	for _, after := range []time.Duration{0, time.Hour} {
		if r, err := w.Collect(context.Background(), t0.Add(after)); err != nil || len(r.Removed) > 0 || r.Short {
			t.Fatalf("%+v, %v", r, err)
		}
	}
	w.store.free = 159
	if r, _ := w.Collect(context.Background(), t0.Add(2*time.Hour)); len(r.Removed) == 0 {
		t.Fatalf("at the threshold: %+v", r)
	}
}

func TestDownToTheLowThresholdTheLeastUsedFirst(t *testing.T) {
	all := images("never", "early", "late", "used", "pinned")
	all[1].Used, all[2].Used, all[3].Used = true, true, true
	all[4].Pinned = true
	w := newWorld(usual, 900, all...)
	look := func(at time.Duration) Report {
		t.Helper()
		r, err := w.Collect(context.Background(), t0.Add(at))
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	look(0)
	w.store.images[1].Used = false
	look(5 * time.Minute)
	w.store.images[2].Used = false
	w.store.free = 145
	w.store.own["never"] = 5 // it shares the rest
	r := look(10 * time.Minute)
	// 200 must be free: 145 + 5 + 30 + 30.
	if want := []string{"never", "early", "late"}; !reflect.DeepEqual(r.Removed, want) || r.Freed != 65 || r.Short {
		t.Errorf("%+v, want %v removed", r, want)
	}
	if len(w.store.images) != 2 || w.store.images[0].ID != "used" || w.store.images[1].ID != "pinned" {
		t.Errorf("left %v", w.store.images)
	}
	if want := []string{"space", "space", "space"}; !reflect.DeepEqual(w.reasons, want) || len(w.events) > 0 {
		t.Errorf("counted %v, told %v", w.reasons, w.events)
	}
}

func TestNoMoreThanNeeded(t *testing.T) {
	w := newWorld(usual, 900, images("a", "b", "c")...)
	if _, err := w.Collect(context.Background(), t0); err != nil {
		t.Fatal(err)
	}
	w.store.free = 140
	w.store.garbage = 55 // of an interrupted pull
	r, err := w.Collect(context.Background(), t0.Add(time.Hour))
	if err != nil || len(r.Removed) != 1 || r.Freed != 85 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestYoungImagesStay(t *testing.T) {
	w := newWorld(usual, 100, images("a")...)
	r, err := w.Collect(context.Background(), t0)
	if err == nil || !r.Short || len(r.Removed) > 0 || r.Kept.Young != (Sum{1, 30}) {
		t.Errorf("%+v, %v", r, err)
	}
	w.store.free = 190 // all that the next removal has to free is ten
	w.cfg.Policy.HighPercent = 81
	if r, err := w.Collect(context.Background(), t0.Add(2*time.Minute)); err != nil || len(r.Removed) != 1 {
		t.Errorf("two minutes later: %+v, %v", r, err)
	}
}

func TestWhatCannotBeFreedIsTold(t *testing.T) {
	all := images("used", "pinned", "busy")
	all[0].Used, all[1].Pinned = true, true
	w := newWorld(Policy{HighPercent: 85, LowPercent: 80}, 100, all...)
	w.store.fail["busy"] = errBusy
	w.round(context.Background(), t0)
	if len(w.events) != 0 {
		t.Errorf("told at the first error: %v", w.events)
	}
	w.round(context.Background(), t0.Add(Period))
	if len(w.events) != 1 || !strings.HasPrefix(w.events[0], "Warning ImageGCFailed: image busy: busy") {
		t.Errorf("told %v", w.events)
	}
	if r := w.Last(); r.Kept != (Kept{Used: Sum{1, 30}, Pinned: Sum{1, 30}, Failed: Sum{1, 30}}) {
		t.Errorf("kept %+v", r.Kept)
	}

	w.events = nil
	delete(w.store.fail, "busy")
	w.round(context.Background(), t0.Add(2*Period))
	const message = "Insufficient free disk space on the node's image filesystem (90% of 1000 B used). " +
		"Failed to free sufficient space by deleting unused images (freed 30 bytes). " +
		"Investigate disk usage, as it could be used by active images, logs, volumes, or other data. " +
		"Images that stay: 1 used by pods, 30 B; 1 pinned, 30 B."
	if want := []string{"Warning FreeDiskSpaceFailed: " + message, "Warning ImageGCFailed: " + message}; !reflect.DeepEqual(w.events, want) {
		t.Errorf("told %q", w.events)
	}
	if !w.Last().Short {
		t.Error("not short")
	}
	// Room came from elsewhere: all is forgotten.
	w.events, w.store.free = nil, 500
	w.round(context.Background(), t0.Add(3*Period))
	if w.Last().Short || w.failed || len(w.events) > 0 {
		t.Errorf("%+v, told %v", w.Last(), w.events)
	}
}

func TestOldImagesGo(t *testing.T) {
	p := Policy{HighPercent: 100, LowPercent: 80, MaxAge: time.Hour}
	all := images("used", "a", "b")
	all[0].Used = true
	w := newWorld(p, 900, all...)
	removed := func(at time.Duration) []string {
		t.Helper()
		r, err := w.Collect(context.Background(), t0.Add(at))
		if err != nil {
			t.Fatal(err)
		}
		return r.Removed
	}
	// What was used before the agent began is not known: an hour must pass.
	if got := removed(time.Hour); got != nil {
		t.Errorf("removed %v after an hour", got)
	}
	w.store.images[1].Used = true
	if got := removed(time.Hour + time.Second); !reflect.DeepEqual(got, []string{"b"}) {
		t.Errorf("removed %v after more", got)
	}
	w.store.images[1].Used = false
	if got := removed(2 * time.Hour); got != nil {
		t.Errorf("removed %v in its hour", got)
	}
	if got := removed(2*time.Hour + 2*time.Second); !reflect.DeepEqual(got, []string{"a"}) {
		t.Errorf("removed %v after its hour", got)
	}
	if want := []string{"age", "age"}; !reflect.DeepEqual(w.reasons, want) {
		t.Errorf("counted %v", w.reasons)
	}
	if p.Off() || !(Policy{HighPercent: 100}).Off() {
		t.Error("Off")
	}
}

func TestDiskWithoutCapacity(t *testing.T) {
	w := newWorld(usual, 0)
	w.store.capacity = 0
	if _, err := w.Collect(context.Background(), t0); err == nil || len(w.events) != 1 || w.events[0] != "Warning InvalidDiskCapacity: invalid capacity 0 on image filesystem" {
		t.Errorf("%v, told %v", err, w.events)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 3 << 29: "1.5 GiB", 1 << 50: "1024.0 TiB"} {
		if got := Size(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

// Who found no room has given back what he had brought: the disk is below the
// upper threshold, and there is room to make all the same.
func TestRoomIsMadeForWhoFoundNone(t *testing.T) {
	w := newWorld(usual, 170, images("a", "b")...)
	if r, err := w.Collect(t.Context(), t0); err != nil || len(r.Removed) != 0 {
		t.Fatalf("removed %v, %v", r.Removed, err)
	}
	w.Hurry()
	if r, err := w.Collect(t.Context(), t0.Add(time.Hour)); err != nil || len(r.Removed) != 1 {
		t.Errorf("removed %v, %v", r.Removed, err)
	}
	if r, err := w.Collect(t.Context(), t0.Add(2*time.Hour)); err != nil || len(r.Removed) != 0 {
		t.Errorf("later: removed %v, %v", r.Removed, err)
	}
}
