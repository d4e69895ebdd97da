package pods

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// crash ends the daemon as kill -9 would: what it had not written by now is
// lost.
func (n *node) crash() {
	dir := filepath.Join(n.dir, "records")
	saved := map[string][]byte{}
	files, _ := os.ReadDir(dir)
	for _, f := range files {
		saved[f.Name()], _ = os.ReadFile(filepath.Join(dir, f.Name()))
	}
	n.stop()
	n.wipeRecords()
	for name, data := range saved {
		os.WriteFile(filepath.Join(dir, name), data, 0o600)
	}
}

// faults fails or hangs calls at random.
func faults(r *rand.Rand, chance float64) func(context.Context, string, string) error {
	return func(ctx context.Context, call, subject string) error {
		if r.Float64() >= chance {
			return nil
		}
		switch r.IntN(4) {
		case 0: // hangs until it is told to stop
			<-ctx.Done()
			return ctx.Err()
		case 1: // hangs and does not listen; too late it does nothing
			time.Sleep(time.Duration(r.IntN(300)) * time.Second)
			return ctx.Err()
		}
		return errors.New(call + " failed")
	}
}

// lockedSource is one source for many goroutines. The bubble's schedule decides
// who draws what: a seed does not repeat a run exactly.
type lockedSource struct {
	ch chan struct{}
	s  *rand.PCG
}

func (l *lockedSource) Uint64() uint64 {
	l.ch <- struct{}{}
	defer func() { <-l.ch }()
	return l.s.Uint64()
}

// TestRandomLives drives pods through random orders, exits, restarts and
// faults of everything below, and then checks that each is what was last
// asked for, that nothing is left of the others, and that the runtime never
// saw two of a kind.
func TestRandomLives(t *testing.T) {
	runs := 40
	if s := os.Getenv("RUNS"); s != "" {
		fmt.Sscan(s, &runs)
	}
	if testing.Short() {
		runs = 10
	}
	for i := range runs {
		seed := uint64(i)
		if s := os.Getenv("SEED"); s != "" {
			fmt.Sscan(s, &seed)
		}
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { randomLife(t, seed) })
		})
	}
}

func randomLife(t *testing.T, seed uint64) {
	r := rand.New(&lockedSource{make(chan struct{}, 1), rand.NewPCG(seed, 0)})
	n := newNode(t)
	n.start()
	n.table.Synced("file")
	defer n.invariants()
	defer func() { n.stop() }()
	n.rt.setFault(faults(r, 0.05))
	n.rt.ends = func(c *runtimeapi.ContainerConfig) (time.Duration, int32, bool) {
		return 500 * time.Millisecond, 0, c.Metadata.Name == "init"
	}
	model := map[string]*v1.Pod{} // by name, what is desired
	uid := 0
	for range 60 {
		name := fmt.Sprint("p", r.IntN(4))
		switch r.IntN(10) {
		case 0, 1, 2:
			uid++
			p := mkpod(name, fmt.Sprint("u", uid), shape(r))
			model[name] = p
			n.table.SetPod("file", p)
		case 3:
			if p := model[name]; p != nil {
				delete(model, name)
				n.table.RemovePod("file", p.UID)
			}
		case 4:
			if p := model[name]; p != nil { // told once more
				n.table.SetPod("file", p.DeepCopy())
			}
		case 5:
			for _, c := range n.rt.live("default/" + name) {
				n.rt.exit(c.id, int32(r.IntN(2)))
			}
		case 6:
			if r.IntN(3) == 0 {
				if r.IntN(2) == 0 {
					n.stop()
				} else {
					n.crash()
				}
				n.start()
				for _, p := range model {
					n.table.SetPod("file", p.DeepCopy())
				}
				n.table.Synced("file")
			}
		case 7: // a user's orders; the last one is always to run
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			if r.IntN(2) == 0 {
				n.table.Stop(ctx, "default", name, nil)
			}
			n.table.Restart(ctx, "default", name, "")
			cancel()
		}
		time.Sleep(time.Duration(r.IntN(4000)) * time.Millisecond)
	}
	n.rt.setFault(nil)
	after(30 * time.Minute)
	for name, p := range model {
		got, ok := n.table.Get("default", name)
		if !ok || got.UID != p.UID {
			t.Errorf("pod %s is not the one asked for", name)
			continue
		}
		if !n.ready(name) {
			t.Errorf("pod %s is not ready: %+v", name, got.Status)
		}
		for i := range got.Status.ContainerStatuses {
			cs := &got.Status.ContainerStatuses[i]
			if live := n.rt.live("default/" + name)[cs.Name]; live == nil || "podd://"+live.id != cs.ContainerID {
				t.Errorf("container %s of %s is reported as %s", cs.Name, name, cs.ContainerID)
			}
		}
	}
	left, _ := n.vols.Pods()
	for _, uid := range left {
		if !wanted(model, uid) {
			t.Errorf("volumes of %s are left", uid)
		}
	}
	left, _ = n.groups.List()
	for _, uid := range left {
		if !wanted(model, uid) {
			t.Errorf("cgroup of %s is left", uid)
		}
	}
	for _, s := range n.rt.sandboxes {
		if s.ready && !wanted(model, types.UID(s.cfg.Metadata.Uid)) {
			t.Errorf("sandbox of %s is left", s.cfg.Metadata.Uid)
		}
	}
	if t.Failed() {
		n.dump()
	}
	for _, p := range model {
		n.table.RemovePod("file", p.UID)
	}
	after(time.Minute)
	n.empty()
}

func wanted(model map[string]*v1.Pod, uid types.UID) bool {
	for _, p := range model {
		if p.UID == uid {
			return true
		}
	}
	return false
}

// shape of a random pod: one or two containers, some with init or sidecar.
func shape(r *rand.Rand) func(*v1.Pod) {
	two, init, side := r.IntN(2) == 0, r.IntN(4) == 0, r.IntN(4) == 0
	return func(p *v1.Pod) {
		if two {
			p.Spec.Containers = append(p.Spec.Containers, container("b"))
		}
		if side {
			p.Spec.InitContainers = append(p.Spec.InitContainers, sidecar("s"))
		}
		if init {
			p.Spec.InitContainers = append(p.Spec.InitContainers, container("init"))
		}
	}
}

// dump what each worker believes.
func (n *node) dump() {
	for _, w := range n.table.all() {
		w.post(func() {
			for _, l := range w.lives {
				n.t.Logf("%s %s: stop %+v held %v stale %v unseen %v busy %v retry %v cgroup %d volumes %d kills %v\n sandboxes %+v\n containers %+v\n plan %+v",
					w.key, l.d.Pod.UID, l.d.Stop, l.d.Held, l.o.Stale, l.unseen, l.o.Busy, l.o.Retry, l.o.Cgroup, l.o.Volumes, l.o.Kills,
					l.o.Sandboxes, l.o.Containers, plan(&l.d, &l.o, n.table.policy, time.Now()))
			}
		})
	}
	synctest.Wait()
}
