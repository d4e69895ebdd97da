package pods

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
)

// worker drives what stands under one namespace and name: a pod, and those
// that come after it. Because there is one worker for a name, and it begins a
// pod only when the one before is gone, two pods of a name never run at once.
//
// It is an actor: everything that happens is a function in its inbox, run by
// its goroutine, which alone touches its lives. Calls that may take time run
// as ops beside it and put their outcome into the inbox.
type worker struct {
	t   *Table
	key types.NamespacedName
	log *slog.Logger
	// told is the UID that a source gave last; guarded by Table.mu.
	told types.UID

	mu    sync.Mutex
	inbox []func()
	wake  chan struct{}
	ended chan struct{} // closed when its goroutine is over

	// published is the pod as readers see it; nil before the first time.
	published atomic.Pointer[v1.Pod]
	// quiet: what is published was told to no watcher, see show.
	quiet atomic.Bool

	lives   []*life // [0] is driven, the others wait for it to be gone
	next    *pending
	before  former // the last one that is gone
	waiters []waiter
	timer   *time.Timer
}

// former is what is known still of a pod that is gone.
type former struct {
	uid      types.UID
	attempts map[string]int32 // the next ones, by container
	over     v1.PodStatus     // of an apiserver's pod that was over; or zero
}

// pending is a pod that waits for its turn.
type pending struct {
	source string
	pod    *v1.Pod
	// orders of a user for the name, which hold for this pod as well.
	orders []func(*life)
}

// waiter waits for the worker's pods to be down.
type waiter struct {
	until func() bool
	done  chan struct{}
}

// abandonAfter is how long a call may stay away after its time is over before
// it is given up: the pod goes on, and looks again what came of it.
const abandonAfter = 5 * time.Second

func (w *worker) post(f func()) {
	w.mu.Lock()
	w.inbox = append(w.inbox, f)
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// run until there is nothing left under this name, or ctx ends: then what
// runs stays as it is.
func (w *worker) run(ctx context.Context) {
	defer w.timer.Stop()
	for {
		w.drain()
		w.observed(w.advance)
		w.settle()
		if w.idle() && w.t.retire(w) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-w.wake:
		case <-w.timer.C:
		}
	}
}

// observed tells the observer how long a look at the pod took.
func (w *worker) observed(look func()) {
	if w.t.cfg.Observer == nil {
		look()
		return
	}
	operation, begin := "sync", time.Now()
	if w.published.Load() == nil {
		operation = "create"
	}
	look()
	w.t.cfg.Observer.Worked(operation, time.Since(begin))
}

func (w *worker) drain() {
	for {
		w.mu.Lock()
		batch := w.inbox
		w.inbox = nil
		w.mu.Unlock()
		if len(batch) == 0 {
			return
		}
		for _, f := range batch {
			f()
		}
	}
}

func (w *worker) idle() bool { return len(w.lives) == 0 && w.next == nil }

// advance plans and acts until a plan asks for nothing that is done at once.
func (w *worker) advance() {
	for again := true; again; {
		again = false
		if len(w.lives) == 0 && !w.begin() {
			return
		}
		l := w.lives[0]
		p := plan(&l.d, &l.o, w.t.policy, time.Now())
		w.announce(l, p.Waits)
		for _, a := range p.Actions {
			if w.do(l, a) {
				again = true
			}
		}
		if again {
			continue
		}
		w.watch(l)
		w.publish(l)
		w.alarm(p.Wake)
	}
}

// begin the pod whose turn has come.
func (w *worker) begin() bool {
	if w.next == nil || w.t.held.Load() || !w.t.claim(w.next.pod.UID, w) {
		return false
	}
	n, word := w.next, w.next.pod
	w.next = nil
	if w.before.uid == n.pod.UID && status.Over(w.before.over.Phase) {
		n.pod = withStatus(n.pod, &w.before.over) // its source may not remember that
	}
	l := newLife(n.source, n.pod)
	l.word = word
	if w.before.uid == n.pod.UID { // it was taken away and put back
		maps.Copy(l.attempts, w.before.attempts)
	}
	w.before = former{}
	if l.o.Completed || n.pod.DeletionTimestamp != nil {
		// It ends at once, with what a podd that was killed may have made for it.
		l.o.Cgroup, l.o.Volumes = StepUnknown, StepUnknown
	}
	w.lives = append(w.lives, l)
	w.log.Info("pod begins", "uid", n.pod.UID, "source", n.source)
	if n.pod.DeletionTimestamp != nil {
		w.delete(l, n.source, n.pod)
		w.publish(l) // so that its end is told
	}
	for _, f := range n.orders {
		f(l)
	}
	w.admit(l)
	return true
}

func withStatus(pod *v1.Pod, st *v1.PodStatus) *v1.Pod {
	out := *pod
	out.Status = *st
	return &out
}

func (w *worker) alarm(at time.Time) {
	if at.IsZero() {
		w.timer.Stop()
		return
	}
	w.timer.Reset(max(time.Until(at), 0))
}

// do one action. It says whether the plan must be made again at once.
func (w *worker) do(l *life, a Action) bool {
	switch a.Kind {
	case Observe:
		w.observe(l)
	case EnsureCgroup:
		w.ensureCgroup(l)
	case RemoveCgroup:
		w.removeCgroup(l)
	case SetupVolumes:
		w.setupVolumes(l)
	case Refresh:
		w.runRefresh(l)
	case Teardown:
		w.teardownVolumes(l)
	case RunSandbox:
		w.runSandbox(l)
	case StopSandbox:
		w.stopSandbox(l, a)
	case RemoveSandbox:
		w.removeSandbox(l, a)
	case EnsureImage:
		w.ensureImage(l, a)
	case Start:
		w.startContainer(l, a)
	case PostStart:
		w.runPostStart(l, a)
	case Hook:
		w.runPreStop(l, a)
	case StopContainer:
		w.stopContainer(l, a)
	case RemoveContainer:
		w.removeContainer(l, a)
	case Order:
		w.order(l, a)
		return true
	case Cancel:
		w.cancel(l, a.Key)
	case Resize:
		w.runResize(l)
	case Abort:
		w.abortVolumes(l)
	case Complete:
		l.o.Completed = true
		w.t.admitted.leaves(l.d.Pod.UID)
		w.log.Info("pod completed", "uid", l.d.Pod.UID)
		return true
	case Expire:
		w.expire(l)
		return true
	case Forget:
		w.forget(l)
		return true
	}
	return false
}

// order the end of a container instance, or a sooner one.
func (w *worker) order(l *life, a Action) {
	k, was := l.o.Kills[a.ID]
	k.Since, k.Grace = time.Now(), a.Grace
	v := l.o.Verdicts[a.ID]
	k.Unfit = k.Unfit || v.Liveness || v.Startup
	l.o.Kills[a.ID] = k
	if !was {
		w.event(l, a.Container, v1.EventTypeNormal, "Killing", "%s", a.Message)
	}
}

func (w *worker) expire(l *life) {
	const message = "Pod was active on the node longer than the specified deadline"
	w.event(l, "", v1.EventTypeNormal, "DeadlineExceeded", message)
	w.fail(l, "DeadlineExceeded", message, podGrace(l.d.Pod))
}

// event about the pod or one of its containers.
func (w *worker) event(l *life, container, eventType, reason, format string, args ...any) {
	w.t.deps.Events.Eventf(spec.Ref(l.d.Pod, container), eventType, reason, format, args...)
}

// announce what has begun to wait.
func (w *worker) announce(l *life, waits map[string]v1.ContainerStateWaiting) {
	for name, now := range waits {
		if l.waits[name] == now {
			continue
		}
		switch now.Reason {
		case "CrashLoopBackOff":
			w.event(l, name, v1.EventTypeWarning, "BackOff", "Back-off restarting failed container %s in pod %s", name, spec.Desc(l.d.Pod))
		case "ImagePullBackOff":
			c := spec.Container(l.d.Pod, name)
			w.event(l, name, v1.EventTypeNormal, "BackOff", "Back-off pulling image %q", c.Image)
			w.event(l, name, v1.EventTypeWarning, "Failed", "Error: ImagePullBackOff")
		}
	}
	l.waits = waits
}

// async runs f beside the worker under a's key. What f returns runs on the
// worker's goroutine when f is over; timeout 0 means that f bounds itself.
func (w *worker) async(l *life, a Action, timeout time.Duration, f func(ctx context.Context) (func(), error)) {
	key := a.key()
	ctx, cancel := within(w.t.ctx, timeout)
	o := &op{cancel: cancel}
	l.ops[key] = o
	l.o.Busy[key] = time.Now().Add(timeout)
	finish := func(done func(), err error, abandoned bool) {
		cancel()
		if !o.settled.CompareAndSwap(false, true) {
			// It was given up before; what it did is found by looking.
			w.post(func() { l.late(key) })
			return
		}
		w.post(func() {
			o.guard.Stop()
			delete(l.ops, key)
			delete(l.o.Busy, key)
			l.epoch++
			if abandoned {
				l.o.Stale = true
			}
			l.outcome(key, err)
			if done != nil {
				done()
			}
		})
	}
	guard := timeout + abandonAfter
	if timeout == 0 {
		guard = 1<<62 - 1
	}
	o.guard = time.AfterFunc(guard, func() {
		finish(nil, fmt.Errorf("%s: no answer for %s: %w", key, guard, errdefs.ErrUnavailable), true)
	})
	w.t.ops.Add(1)
	go func() {
		defer w.t.ops.Done()
		done, err := f(ctx)
		finish(done, err, false)
	}()
}

// late is the end of an op that was given up: what it has made may be there
// although it was taken away since.
func (l *life) late(key string) {
	l.epoch++
	l.o.Stale = true
	switch key {
	case Action{Kind: SetupVolumes}.key():
		l.o.Volumes = StepUnknown
	case Action{Kind: EnsureCgroup}.key(), Action{Kind: Resize}.key():
		l.o.Cgroup = StepUnknown
	}
}

// within bounds ctx by timeout; 0: not at all.
func within(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	if timeout == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, timeout)
}

// outcome of an op: one that failed is tried again later.
func (l *life) outcome(key string, err error) {
	if err == nil {
		delete(l.fails, key)
		delete(l.o.Retry, key)
		return
	}
	l.fails[key]++
	l.o.Retry[key] = time.Now().Add(retryDelay(l.fails[key]))
}

// cancel an op. One that does not listen is given up soon after.
func (w *worker) cancel(l *life, key string) {
	o := l.ops[key]
	if o == nil || o.cancelled {
		return
	}
	o.cancelled = true
	o.cancel()
	o.guard.Reset(abandonAfter)
}

// settle wakes those who wait for the pods to be down.
func (w *worker) settle() {
	kept := w.waiters[:0]
	for _, wt := range w.waiters {
		if wt.until() {
			close(wt.done)
		} else {
			kept = append(kept, wt)
		}
	}
	w.waiters = kept
}
