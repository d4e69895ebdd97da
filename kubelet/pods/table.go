package pods

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/events/feed"
	"github.com/podd-runtime/podd/probes"
)

// Table is the node's pods. Sources fill it (manifests.Sink), Run keeps them.
type Table struct {
	cfg    Config
	deps   Deps
	policy Policy
	log    *slog.Logger

	records *records
	userns  *userns
	sysctls *Sysctls
	probes  *probes.Scheduler
	limits  limits
	admitted
	// ctx of everything that is under way; set by Run before any worker runs.
	ctx       context.Context
	ops       sync.WaitGroup // calls under way
	running   sync.WaitGroup // workers
	recovered chan struct{}  // closed by openUp
	held      atomic.Bool    // see Hold
	sweeper   *worker        // holds UIDs that are being cleaned up; never runs

	mu sync.Mutex
	index
	sources
	readers
}

// limits of what is done at once.
type limits struct {
	starts *gate
	pulls  *gate
}

// sources is what the sources have said; guarded by Table.mu.
type sources struct {
	early  []func() // before Run had looked around
	synced map[string]bool
	// words are what was said last under each name, for the audit.
	words map[types.NamespacedName]pending
}

// readers of pods; guarded by Table.mu.
type readers struct {
	rv      uint64
	history history
	feed    feed.Feed
}

// index finds workers; guarded by Table.mu.
type index struct {
	open    bool // recovery is over
	workers map[types.NamespacedName]*worker
	uids    map[types.UID]*worker
	ids     map[string]*worker // of sandboxes and containers
	// told holds the workers that were given a pod of that UID: one, but for
	// manifests that share a UID.
	told map[types.UID][]*worker
	// blocked workers wait for a UID that another one has.
	blocked map[types.UID][]*worker
}

// New returns a Table; Run must be called for anything to happen.
func New(cfg Config, deps Deps) *Table {
	cfg.defaults(runtime.GOMAXPROCS(0))
	t := &Table{
		cfg: cfg, deps: deps, log: cfg.Log,
		policy:    Policy{Backoff: cfg.Backoff, MinGrace: 2 * time.Second},
		records:   newRecords(cfg.RecordDir, cfg.Log),
		userns:    &userns{podDir: cfg.Node.PodDir, used: map[uint64]types.UID{}},
		recovered: make(chan struct{}),
		limits:    limits{starts: newGate(cfg.ParallelStarts, startPatience), pulls: newGate(cfg.ParallelPulls, pullPatience)},
		sources:   sources{synced: map[string]bool{}, words: map[types.NamespacedName]pending{}},
		index: index{
			workers: map[types.NamespacedName]*worker{}, uids: map[types.UID]*worker{}, ids: map[string]*worker{},
			told: map[types.UID][]*worker{}, blocked: map[types.UID][]*worker{},
		},
	}
	t.admitted.pods, t.admitted.deferred = map[types.UID]*v1.Pod{}, map[types.UID]*worker{}
	t.sweeper = &worker{t: t, key: types.NamespacedName{Name: "sweep"}, log: cfg.Log, wake: make(chan struct{}, 1)}
	var probed func(probes.Target, probes.Kind, string, time.Duration)
	if cfg.Observer != nil {
		probed = cfg.Observer.Probed
	}
	t.probes = probes.New(probes.Config{
		Exec: execer{deps.Runtime}, Events: deps.Events, Log: cfg.Log,
		Parallel: cfg.ParallelProbes, ParallelExec: cfg.ParallelExecProbes, Observe: probed,
		Report: func(r probes.Result) {
			if w := t.owner(r.ID); w != nil {
				w.post(func() { w.probed(r) })
			}
		},
	})
	return t
}

// Run looks at what runs already, then keeps the pods until ctx ends. All
// pods are left running then.
func (t *Table) Run(ctx context.Context) error {
	t.ctx = ctx
	ids, err := hostUserIDs(t.cfg.UserIDsPerPod)
	if err != nil {
		return err
	}
	t.userns.ids = ids
	if t.sysctls, err = AllowSysctls(t.cfg.AllowedUnsafeSysctls); err != nil {
		return err
	}
	for _, dir := range []string{t.cfg.Node.PodLogsDir, filepath.Join(filepath.Dir(t.cfg.Node.PodLogsDir), "containers")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make the log directory (--pod-logs-dir): %w", err)
		}
	}
	events := t.deps.Runtime.Subscribe(ctx)
	if err := t.recover(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	// What ran before is listed from the start, as it was last: an empty list
	// would be taken for an empty node. No worker runs yet.
	for _, w := range t.all() {
		w.publish(w.lives[0]) // of two of a name the one that goes first, as ever
	}
	var parts sync.WaitGroup
	parts.Go(func() { t.records.run(ctx) })
	parts.Go(func() { _ = t.probes.Run(ctx) })
	parts.Go(func() { t.follow(ctx, events) })
	parts.Go(func() { t.audits(ctx) })
	t.openUp()
	<-ctx.Done()
	parts.Wait()
	t.mu.Lock()
	t.index.open = false // no more workers
	t.mu.Unlock()
	t.running.Wait()
	t.waitOps()
	t.records.flush()
	return nil
}

// waitOps waits for calls under way, but not for those that do not listen.
func (t *Table) waitOps() {
	done := make(chan struct{})
	go func() { t.ops.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(abandonAfter):
		t.log.Warn("runtime calls are still under way at the end")
	}
}

// openUp lets sources in, first with what they have said already.
func (t *Table) openUp() {
	t.mu.Lock()
	t.index.open = true
	early := t.early
	t.early = nil
	for _, w := range t.index.workers {
		t.start(w)
	}
	for _, f := range early {
		f()
	}
	t.mu.Unlock()
	close(t.recovered)
}

// tell runs f, which has t.mu, now or when recovery is over.
func (t *Table) tell(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.index.open {
		t.early = append(t.early, f)
		return
	}
	f()
}

// SetPod adds a pod, or tells what has become of one: a source calls it with
// every version it sees, in order. pod must not be changed afterwards.
//
//   - Another UID under the same namespace and name is another pod: the one
//     before goes gracefully, the new one begins when nothing of it is left.
//   - The same UID with another spec changes the pod in place: containers whose
//     image (or for a pod of a file: anything else) differs are replaced,
//     ephemeral containers are started, CPU and memory are resized (KEP-1287),
//     activeDeadlineSeconds counts from the old start. A change of QoS class,
//     which only a file can make, replaces the pod.
//     Two versions of one non-zero metadata.generation have the same spec.
//   - Labels and annotations reach downward API volumes; conditions that are not
//     the node's (readiness gates) are taken from pod.Status.
//   - A deletionTimestamp ends the pod within deletionGracePeriodSeconds from
//     now; told again, only a shorter period counts, 0 is a forced deletion.
//     When containers, volumes and cgroup are gone, Watch delivers DELETED with
//     the last status: then it is time to delete the pod at its apiserver.
//   - pod.Status is what was known of a pod that the node does not know: restart
//     counts go on, and one that is Succeeded or Failed is never run again.
//
// A pod of an apiserver carries the annotation kubernetes.io/config.source: api,
// as upstream's kubelet sets it; all others are static pods.
func (t *Table) SetPod(source string, pod *v1.Pod) {
	t.tell(func() {
		key := types.NamespacedName{Namespace: pod.Namespace, Name: pod.Name}
		w := t.index.workers[key]
		if w == nil {
			w = t.newWorker(key)
			t.start(w)
		}
		if w.told != pod.UID {
			// A pod of another UID is another pod: the last one is told to go by it.
			t.index.untell(w)
			w.told = pod.UID
			t.index.told[pod.UID] = append(t.index.told[pod.UID], w)
		}
		t.words[key] = pending{source: source, pod: pod}
		w.post(func() { w.set(source, pod) })
	})
}

// RemovePod says that the source has a pod no more: it ends gracefully, within
// the deletionGracePeriodSeconds told last or else its own grace period, and is
// forgotten.
func (t *Table) RemovePod(source string, uid types.UID) {
	t.tell(func() {
		t.unsay(source, uid)
		for _, w := range t.index.told[uid] {
			w.post(func() { w.remove(source, uid) })
		}
		// A pod of the last run may be known by its record alone.
		if w := t.index.uids[uid]; w != nil && !slices.Contains(t.index.told[uid], w) {
			w.post(func() { w.remove(source, uid) })
		}
	})
}

// unsay what a source has said of a pod; t.mu is held.
func (t *Table) unsay(source string, uid types.UID) {
	maps.DeleteFunc(t.words, func(_ types.NamespacedName, p pending) bool { return p.source == source && p.pod.UID == uid })
}

// Synced says that source has told all it has; see manifests.Sink.
func (t *Table) Synced(source string) {
	t.tell(func() {
		if t.synced[source] {
			return
		}
		t.synced[source] = true
		if !t.complete() {
			return
		}
		for _, w := range t.index.workers {
			w.post(w.disclaim)
		}
		t.ops.Add(1)
		go func() { defer t.ops.Done(); t.sweep() }()
	})
}

// complete says that all sources have told all; t.mu is held.
func (t *Table) complete() bool {
	for _, s := range t.cfg.Sources {
		if !t.synced[s] {
			return false
		}
	}
	return t.index.open
}

// holder of a UID.
func (t *Table) holder(uid types.UID) *worker {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.index.uids[uid]
}

// newWorker for a name; t.mu is held.
func (t *Table) newWorker(key types.NamespacedName) *worker {
	w := &worker{
		t: t, key: key, wake: make(chan struct{}, 1), ended: make(chan struct{}), timer: time.NewTimer(time.Hour),
		log: t.log.With("pod", key.String()),
	}
	w.timer.Stop()
	t.index.workers[key] = w
	return w
}

func (t *Table) start(w *worker) {
	t.running.Add(1)
	go func() { defer t.running.Done(); defer close(w.ended); w.run(t.ctx) }()
}

// retire forgets a worker that has nothing left, unless something has come in.
func (t *Table) retire(w *worker) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.inbox) > 0 {
		return false
	}
	delete(t.index.workers, w.key)
	t.index.untell(w)
	if said, have := t.words[w.key]; have && said.pod.DeletionTimestamp != nil {
		delete(t.words, w.key) // it is done
	}
	return true
}

// untell forgets which UID a worker was given.
func (i *index) untell(w *worker) {
	left := slices.DeleteFunc(i.told[w.told], func(o *worker) bool { return o == w })
	if len(left) > 0 {
		i.told[w.told] = left
	} else {
		delete(i.told, w.told)
	}
	w.told = ""
}

// claim a UID for a worker. Directories and cgroups are named by it, so that
// two pods of one UID, from two manifests, run one after the other.
func (t *Table) claim(uid types.UID, w *worker) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if o := t.index.uids[uid]; o != nil && o != w {
		if !slices.Contains(t.index.blocked[uid], w) {
			w.log.Warn("pod waits for another of the same uid", "uid", uid, "other", o.key.String())
			t.index.blocked[uid] = append(t.index.blocked[uid], w)
		}
		return false
	}
	t.index.uids[uid] = w
	return true
}

// release a UID and wake those who may wait for it.
func (t *Table) release(uid types.UID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.index.uids, uid)
	for _, w := range t.index.blocked[uid] {
		w.post(func() {})
	}
	delete(t.index.blocked, uid)
}

func (t *Table) own(id string, w *worker) {
	t.mu.Lock()
	t.index.ids[id] = w
	t.mu.Unlock()
}

func (t *Table) disown(id string) {
	t.mu.Lock()
	delete(t.index.ids, id)
	t.mu.Unlock()
}

func (t *Table) owner(id string) *worker {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.index.ids[id]
}

// follow the runtime's events until ctx ends. When they end before, they are
// asked for again, and what there is by then is looked at.
func (t *Table) follow(ctx context.Context, events <-chan *runtimeapi.ContainerEventResponse) {
	for n := 1; ; n++ {
		begin := time.Now()
		for ev := range events {
			if w := t.owner(ev.ContainerId); w != nil {
				w.post(func() { w.happened(ev) })
			}
		}
		if time.Since(begin) > time.Minute {
			n = 1
		}
		if ctx.Err() == nil {
			t.log.Error("the runtime's events have ended, asking for them again")
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryDelay(n)):
		}
		events = t.deps.Runtime.Subscribe(ctx)
		for _, w := range t.all() {
			w.post(w.doubt)
		}
	}
}

// all workers there are.
func (t *Table) all() []*worker {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]*worker, 0, len(t.index.workers))
	for _, w := range t.index.workers {
		out = append(out, w)
	}
	return out
}
