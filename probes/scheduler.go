package probes

import (
	"container/heap"
	"context"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
)

// Scheduler of probes. Its methods may be called from everywhere.
type Scheduler struct {
	cfg     Config
	probers probers
	jitter  func() float64
	wake    chan struct{}

	slots, execSlots chan struct{}

	mu      sync.Mutex
	targets map[string]*target
	queue   queue
	waiting [2][]*entry // due, without a slot; [1]: exec
	running sync.WaitGroup
}

// target is a container and what its probes have said.
type target struct {
	Target
	started bool
	ready   *bool // last reported
	entries []*entry
}

// entry is one probe of a container.
type entry struct {
	t      *target
	kind   Kind
	spec   *v1.Probe
	at     time.Time // monotonic
	index  int       // in the heap; -1: not in it
	run    run
	gone   bool
	spread bool // the next period is a random part: spreads load after a restart
}

func (e *entry) exec() bool { return e.spec.Exec != nil }

// Add starts probing a container that has probes. It replaces what was
// known of the same id.
func (s *Scheduler) Add(t Target) {
	c := t.Container
	if c.StartupProbe == nil && c.LivenessProbe == nil && c.ReadinessProbe == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop(t.ID)
	tg := &target{Target: t, started: c.StartupProbe == nil}
	if r := t.Restored; r != nil {
		tg.started = tg.started || r.Started
		ready := r.Ready
		tg.ready = &ready
	}
	s.targets[t.ID] = tg
	if tg.started {
		s.steady(tg)
	} else if !t.Ending {
		s.add(tg, Startup, c.StartupProbe)
	}
	s.poke()
}

// Remove ends the probing of a container. A probe that runs is not reported
// any more.
func (s *Scheduler) Remove(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop(id)
}

func (s *Scheduler) drop(id string) {
	t := s.targets[id]
	if t == nil {
		return
	}
	delete(s.targets, id)
	for _, e := range t.entries {
		s.end(e)
	}
}

// end one probe.
func (s *Scheduler) end(e *entry) {
	e.gone = true
	if e.index >= 0 {
		heap.Remove(&s.queue, e.index)
	}
}

// Ending says that a container is about to end: it is not to be restarted any
// more, but whether it is ready still counts until it is gone.
func (s *Scheduler) Ending(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.targets[id]
	if t == nil {
		return
	}
	t.Ending = true
	for _, e := range t.entries {
		if e.kind != Readiness {
			s.end(e)
		}
	}
}

// steady probes begin when the container has started.
func (s *Scheduler) steady(t *target) {
	if p := t.Container.LivenessProbe; p != nil && !t.Ending {
		s.add(t, Liveness, p)
	}
	if p := t.Container.ReadinessProbe; p != nil {
		s.add(t, Readiness, p)
	}
}

func (s *Scheduler) add(t *target, kind Kind, spec *v1.Probe) {
	now := time.Now()
	e := &entry{t: t, kind: kind, spec: spec, at: first(now, t.Started, time.Duration(spec.InitialDelaySeconds)*time.Second)}
	if t.Restored != nil {
		// All containers of the node come back at once: the first probe
		// within a second, the following ones spread over their period.
		e.at = now.Add(time.Duration(s.jitter() * float64(min(time.Second, period(spec)))))
		e.spread = true
	}
	t.entries = append(t.entries, e)
	heap.Push(&s.queue, e)
}

// first is when a container is first probed that started at a time by the wall
// clock, which may have been set since: never later than its delay from now. All
// times in the queue have now's monotonic reading, or they could not be compared.
func first(now, started time.Time, delay time.Duration) time.Time {
	return now.Add(min(max(delay-now.Sub(started), 0), delay))
}

func period(p *v1.Probe) time.Duration {
	return time.Duration(max(p.PeriodSeconds, 1)) * time.Second
}

func (s *Scheduler) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Run probes until ctx ends and waits for the probes under way.
func (s *Scheduler) Run(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	defer s.running.Wait()
	for {
		next := s.dispatch(ctx)
		timer.Reset(next)
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-timer.C:
		}
	}
}

// dispatch starts what is due and says how long nothing more will be.
func (s *Scheduler) dispatch(ctx context.Context) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	for len(s.queue) > 0 && !s.queue[0].at.After(now) {
		e := heap.Pop(&s.queue).(*entry)
		s.waiting[lane(e)] = append(s.waiting[lane(e)], e)
	}
	for l, slots := range []chan struct{}{s.slots, s.execSlots} {
		for len(s.waiting[l]) > 0 {
			if s.waiting[l][0].gone {
				s.waiting[l] = s.waiting[l][1:]
				continue
			}
			select {
			case slots <- struct{}{}:
			default:
				goto next
			}
			e := s.waiting[l][0]
			s.waiting[l] = s.waiting[l][1:]
			s.running.Add(1)
			go s.probe(ctx, e, slots)
		}
		s.waiting[l] = nil // release the array
	next:
	}
	if len(s.queue) == 0 {
		return time.Hour
	}
	return s.queue[0].at.Sub(now)
}

func lane(e *entry) int {
	if e.exec() {
		return 1
	}
	return 0
}

// probe runs one probe and schedules the next.
func (s *Scheduler) probe(ctx context.Context, e *entry, slots chan struct{}) {
	defer s.running.Done()
	begin := time.Now()
	ok, output, err := s.probers.run(ctx, e)
	if s.cfg.Observe != nil && ctx.Err() == nil {
		s.cfg.Observe(e.t.Target, e.kind, outcome(ok, err), time.Since(begin))
	}
	<-slots
	if ctx.Err() != nil {
		return
	}
	s.mu.Lock()
	if e.gone {
		s.mu.Unlock()
		s.poke()
		return
	}
	result, report, hold := s.judge(e, ok, output, err)
	s.mu.Unlock()
	s.event(e, ok, output, err)
	if report {
		s.cfg.Report(result)
	}
	// Only now: the next one, or those that a start lets begin, could be told
	// before this one is.
	s.mu.Lock()
	defer s.mu.Unlock()
	if !e.gone {
		s.next(e, hold)
	}
	s.poke()
}

// next schedules what follows the outcome of a probe; hold: not the same probe.
func (s *Scheduler) next(e *entry, hold bool) {
	if e.kind == Startup && e.t.started {
		s.steady(e.t)
	}
	if hold {
		return
	}
	e.at = e.at.Add(period(e.spec))
	if e.spread {
		e.at = time.Now().Add(time.Duration((0.5 + s.jitter()/2) * float64(period(e.spec))))
		e.spread = false
	}
	if now := time.Now(); e.at.Before(now) {
		// Behind: the missed ones are not made up for.
		e.at = now.Add(period(e.spec))
	}
	heap.Push(&s.queue, e)
}

// judge counts the outcome. An error of the probe itself is not an outcome.
func (s *Scheduler) judge(e *entry, ok bool, output string, err error) (r Result, report, hold bool) {
	if err != nil {
		return r, false, false
	}
	var enough bool
	e.run, enough = e.run.next(ok, e.spec.SuccessThreshold, e.spec.FailureThreshold)
	if !enough {
		return r, false, false
	}
	r = Result{ID: e.t.ID, Kind: e.kind, OK: ok, Output: output}
	switch e.kind {
	case Startup:
		e.t.started = ok
		return r, true, true
	case Liveness:
		return r, !ok, !ok
	}
	changed := e.t.ready == nil || *e.t.ready != ok
	e.t.ready = &ok
	return r, changed, false
}

func (s *Scheduler) event(e *entry, ok bool, output string, err error) {
	switch {
	case err != nil:
		s.cfg.Events.Eventf(e.t.Ref, v1.EventTypeWarning, "Unhealthy", "%s probe errored and resulted in unknown state: %s", e.kind, err)
	case !ok:
		s.cfg.Events.Eventf(e.t.Ref, v1.EventTypeWarning, "Unhealthy", "%s probe failed: %s", e.kind, output)
	case output != "" && e.warned(output):
		s.cfg.Events.Eventf(e.t.Ref, v1.EventTypeWarning, "ProbeWarning", "%s probe warning: %s", e.kind, output[len(warning):])
	}
}

// warned says whether a successful probe came with a warning.
func (e *entry) warned(output string) bool {
	return len(output) > len(warning) && output[:len(warning)] == warning
}

// queue is a heap of entries by time.
type queue []*entry

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].at.Before(q[j].at) }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}
func (q *queue) Push(x any) {
	e := x.(*entry)
	e.index = len(*q)
	*q = append(*q, e)
}
func (q *queue) Pop() any {
	old := *q
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	e.index = -1
	return e
}
