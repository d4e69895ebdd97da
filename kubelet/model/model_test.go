// Package model is a test of the order in which things happen. A world of one
// node is made in memory, with an apiserver, a runtime, logind, a disk and a
// clock, and in it podd's own packages run: pods.Table, apiserver.Pods and
// shutdown.Run. What happens to it is drawn at random (operations_test.go), in
// virtual time, and the laws that must hold in every order are checked as it
// goes (truth_test.go) and whenever it has settled (laws_test.go).
//
//	PODD_TEST_SEED=n  one history again, with its story
//	PODD_TEST_ALL=1   a hundred thousand histories, or eight minutes of them
//
// A bug that is found becomes a history with a name, in named_test.go.
package model

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/klog/v2"
)

const (
	// short and long are how long histories are drawn for; a package of tests has ten
	// minutes.
	short, long = 20 * time.Second, 8 * time.Minute
	// few and many are how many histories that may be.
	few, many = 500, 100_000
	// steps of a round; after each round the world settles.
	steps = 25
)

func TestMain(m *testing.M) {
	// client-go's own waits at least so long after the error before, and that was
	// at another time: that of the world before, or of ours.
	utilruntime.ErrorHandlers = nil
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)
	debug.SetGCPercent(400) // worlds are small and many
	os.Exit(m.Run())
}

func TestHistories(t *testing.T) {
	if s := os.Getenv("PODD_TEST_SEED"); s != "" {
		replay(t, s)
		return
	}
	// The same histories in each make test, as many as there is time for, and
	// others in each long one.
	limit, most, first := short, uint64(few), uint64(1)
	if os.Getenv("PODD_TEST_ALL") != "" {
		limit, most, first = long, many, rand.Uint64()>>20
	}
	begin := time.Now()
	var drawn atomic.Uint64
	t.Logf("first seed %d", first)
	t.Cleanup(func() {
		n := drawn.Load()
		n = min(n, most)
		t.Logf("%d histories from seed %d on, %.0f a second", n, first, float64(n)/time.Since(begin).Seconds())
	})
	for i := range runtime.GOMAXPROCS(0) {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			for time.Since(begin) < limit { // or until one fails, which ends it
				n := drawn.Add(1) - 1
				if n >= most {
					return
				}
				draw(t, first+n, false)
			}
		})
	}
}

// replay a history, until it fails once more: what the packages themselves roll
// or leave to the scheduler is not in the seed.
func replay(t *testing.T, s string) {
	seed, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("PODD_TEST_SEED: %v", err)
	}
	for n := range 20 { // the first that fails ends it
		draw(t, seed, n == 19)
	}
}

// draw one history; one that breaks a law ends the test, with its story.
func draw(t *testing.T, seed uint64, tell bool) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, seed)
		h := &history{world: w, r: rand.New(rand.NewPCG(seed, 1))}
		h.live()
		broken := w.breaches()
		if len(broken) > 0 || tell {
			t.Logf("the story of history %d:\n%s", seed, w.telling())
		}
		for _, b := range broken {
			t.Errorf("history %d: %s", seed, b)
		}
		if len(broken) > 0 {
			t.Errorf("again: PODD_TEST_SEED=%d go test -run TestHistories ./kubelet/model", seed)
		}
	})
}

// live a history from its beginning to its end.
func (h *history) live() {
	h.api.listsOnly = h.r.IntN(2) == 0
	h.begin()
	defer h.end()
	for range 1 + h.r.IntN(2) {
		h.setCalm(false)
		for range h.r.IntN(steps) {
			if h.step(); len(h.breaches()) > 0 {
				return
			}
		}
		if h.settle(bound); h.unsound() {
			return
		}
	}
	h.empty()
}

// unsound says that a law is broken, when all of them have been checked.
func (h *history) unsound() bool {
	h.check()
	return len(h.breaches()) > 0
}
