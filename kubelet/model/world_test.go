package model

import (
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// world is all that a history happens to: what outlives podd, and podd.
type world struct {
	t    testing.TB
	seed uint64
	dir  string

	api     *server
	rt      *shim
	machine *machine
	disk    *disk
	podd    *daemon

	// statics are the node's own manifests, by name.
	statics map[string]*v1.Pod
	nodeUID types.UID
	stray   map[types.UID]bool // see strayLogs

	mu     sync.Mutex
	rolls  map[string]uint64
	calm   bool // nothing fails and nothing is slow
	story  []line
	broken []string
	truth  truth
	// hooks are what happens before the next effect of a call of that name;
	// losses are calls whose next answer is lost.
	hooks  map[string]func()
	losses map[string]bool
	// lag of all events of watches.
	lag time.Duration
}

// line of the story of a history, put into words only when it is told.
type line struct {
	at     time.Time
	format string
	args   []any
}

func newWorld(t testing.TB, seed uint64) *world {
	w := &world{
		t: t, seed: seed, dir: t.TempDir(), statics: map[string]*v1.Pod{}, nodeUID: "node-0", stray: map[types.UID]bool{},
		rolls: map[string]uint64{}, hooks: map[string]func(){}, losses: map[string]bool{}, truth: newTruth(),
	}
	w.api, w.rt, w.machine, w.disk = newServer(w), newShim(w), &machine{w: w}, newDisk(filepath.Join(w.dir, "records"))
	return w
}

// roll is a die for one event of a kind about a subject. What it shows hangs on
// the seed and on how many there were before of the same kind and subject, but
// not on which goroutine came first: a history can be had again by its seed.
func (w *world) roll(kind, subject string) *rand.Rand {
	key := kind + " " + subject
	w.mu.Lock()
	n := w.rolls[key]
	w.rolls[key]++
	w.mu.Unlock()
	h := fnv.New64a()
	h.Write([]byte(key))
	return rand.New(rand.NewPCG(w.seed^h.Sum64(), n))
}

// latency of one step: mostly less than some milliseconds, at times seconds.
// Each differs from all others in its nanoseconds, so that what happens first
// is decided by the seed.
func (w *world) latency(r *rand.Rand) time.Duration {
	base := 100*time.Microsecond + time.Duration(r.IntN(3_000_000))
	if w.isCalm() {
		return base
	}
	switch r.IntN(20) {
	case 0:
		return base + time.Duration(r.IntN(4_000_000_000))
	case 1, 2:
		return base + time.Duration(r.IntN(200_000_000))
	}
	return base
}

func (w *world) isCalm() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.calm
}

func (w *world) setCalm(on bool) {
	w.mu.Lock()
	w.calm = on
	w.mu.Unlock()
}

// note what happens. The arguments must not change any more.
func (w *world) note(format string, args ...any) {
	w.mu.Lock()
	w.story = append(w.story, line{time.Now(), format, args})
	w.mu.Unlock()
}

// breach of a law.
func (w *world) breach(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	w.note("BREACH: %s", text)
	w.mu.Lock()
	w.broken = append(w.broken, text)
	w.mu.Unlock()
}

func (w *world) breaches() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.broken...)
}

// telling of the story so far.
func (w *world) telling() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var b strings.Builder
	for _, l := range w.story {
		fmt.Fprintf(&b, "%s %s\n", l.at.Format("15:04:05.000000"), fmt.Sprintf(l.format, l.args...))
	}
	return b.String()
}

// take what is to happen before the effect of a call, once.
func (w *world) take(call string) func() {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.hooks[call]
	delete(w.hooks, call)
	return f
}

// lost says that the answer of a call does not arrive, once.
func (w *world) lost(call string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	is := w.losses[call]
	delete(w.losses, call)
	return is
}

func (w *world) delay() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lag
}
