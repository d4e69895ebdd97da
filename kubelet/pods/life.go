package pods

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
	"github.com/podd-runtime/podd/probes"
)

// life is one pod, by UID, from its first step to its last. Only its worker's
// goroutine touches it.
type life struct {
	d      Desired
	o      Observed
	source string
	// word of its source that it was told last: the pod as it was given.
	word *v1.Pod
	// suspects are sandboxes and containers about which the runtime disagreed at
	// the last audit.
	suspects map[string]bool
	// stopped by a user: it stays down until it changes or is restarted.
	stopped bool
	failed  *status.Cause // by the node, for good
	// disrupted is why the node ended it, until it starts the next time.
	disrupted *status.Cause
	// troubles of its volumes, in words.
	troubles []string
	// news counts what its volumes should be made of.
	news int

	ops    map[string]*op
	probed map[string]bool // by container id
	// epoch counts what has changed the runtime: a look that began before a
	// change says nothing about after it.
	epoch int

	made
	resizing
	tries
	recovered
	shown
}

// made is what the pod's parts were made of.
type made struct {
	// applied is the spec of each container's newest instance.
	applied map[string]*v1.Container
	// sandboxPod is the pod as it was when its sandbox was made.
	sandboxPod *v1.Pod
	// podActual is the pod with the resources that its group was made of; nil:
	// with those it has been allocated.
	podActual *v1.Pod
}

// tries is what failed and is tried again.
type tries struct {
	// failures are why containers could not be started last time.
	failures map[string]v1.ContainerStateWaiting
	// failedStarts are which attempts those were: one that turns out to have
	// started, though its call has failed, did not fail.
	failedStarts map[string]int32
	fails        map[string]int     // in a row, by key
	attempts     map[string]int32   // the next one, by container
	pulls        map[string]Backoff // by container
	// starts are the ops that start an instance, by its id, until it has started.
	starts map[string]*op
}

// recovered is what only a pod of the last run has.
type recovered struct {
	// unseen: the runtime has not been asked yet. heard is what a source says
	// of it meanwhile.
	unseen bool
	heard  *pending
	// bare: there is no record, the pod's spec is what its containers tell.
	bare bool
	// lenient: the record is of another build, whose defaults may differ.
	lenient  bool
	restored map[string]probes.State // by container id, until probed
	starting []string                // as in the record
	// awaits: it would have begun again, but for Hold.
	awaits bool
}

// shown is what was published last.
type shown struct {
	status v1.PodStatus
	spec   *v1.Pod
	ended  ending
	waits  map[string]v1.ContainerStateWaiting // of the last plan
}

func newLife(source string, pod *v1.Pod) *life {
	l := &life{
		source: source, word: pod,
		shown: shown{status: *pod.Status.DeepCopy()},
		d:     Desired{Pod: pod},
		o: Observed{
			Started: time.Now(), Completed: status.Over(pod.Status.Phase), Images: map[string]ImageState{}, Verdicts: map[string]Verdict{},
			Kills: map[string]Kill{}, Backoffs: map[string]Backoff{}, Changed: map[string]bool{},
			Ended: map[string]time.Time{}, Actual: map[string]v1.ResourceRequirements{}, Forced: map[string]string{}, Busy: map[string]time.Time{}, Retry: map[string]time.Time{},
		},
		ops: map[string]*op{}, probed: map[string]bool{},
		made: made{applied: map[string]*v1.Container{}},
		tries: tries{
			failures: map[string]v1.ContainerStateWaiting{}, fails: map[string]int{}, failedStarts: map[string]int32{},
			attempts: map[string]int32{}, pulls: map[string]Backoff{}, starts: map[string]*op{},
		},
		recovered: recovered{restored: map[string]probes.State{}},
	}
	if pod.DeletionTimestamp != nil {
		// A run that was killed may have begun with its group before all else.
		l.o.Cgroup = StepUnknown
	}
	return l
}

// op is something under way for a pod.
type op struct {
	cancel  context.CancelFunc
	settled atomic.Bool
	guard   *time.Timer // gives the op up
	// cancelled by its worker, whose goroutine alone reads this.
	cancelled bool
}

// container by id.
func (l *life) container(id string) *status.Container {
	for i := range l.o.Containers {
		if l.o.Containers[i].ID == id {
			return &l.o.Containers[i]
		}
	}
	return nil
}

// put adds or replaces an instance, keeping what only we know of it.
func (l *life) put(c status.Container) {
	if have := l.container(c.ID); have != nil {
		c.Started, c.Ready, c.Starting = have.Started, have.Ready, have.Starting
		if have.State == status.Exited && c.State == status.Exited && c.Message == "" {
			c.Message = have.Message
		}
		*have = c
	} else {
		l.o.Containers = append(l.o.Containers, c)
		sortContainers(l.o.Containers)
	}
	l.seen(&c)
}

// seen keeps the count of restarts: instances that were never started do not
// count, their number is used again.
func (l *life) seen(c *status.Container) {
	next := c.Attempt
	if c.State != status.Created {
		next++
	}
	if at, failed := l.failedStarts[c.Name]; failed && c.Attempt >= at && !c.StartedAt.IsZero() {
		delete(l.failures, c.Name)
		delete(l.failedStarts, c.Name)
	}
	l.attempts[c.Name] = max(l.attempts[c.Name], next)
}

// unstarted makes an instance whose start was cancelled here what it is: never
// started. Runtimes tell of a start that failed, but it was we who cut it off.
func (l *life) unstarted(c *status.Container) {
	if o := l.starts[c.ID]; o != nil && o.cancelled && c.State == status.Exited && c.StartedAt.IsZero() {
		c.State, c.ExitCode, c.Reason, c.Message, c.FinishedAt, c.EndedAt = status.Created, 0, "", "", time.Time{}, time.Time{}
	}
}

func (l *life) dropContainer(id string) {
	l.o.Containers = slices.DeleteFunc(l.o.Containers, func(c status.Container) bool { return c.ID == id })
	delete(l.o.Kills, id)
	delete(l.o.Verdicts, id)
	delete(l.restored, id)
	delete(l.probed, id)
	delete(l.starts, id)
}

// sortContainers puts the newest instance of each container first. By name
// before all else: clocks stand still or step back, and an order that took
// attempts for one name and times across names would be none.
func sortContainers(cs []status.Container) {
	slices.SortStableFunc(cs, func(a, b status.Container) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(b.Attempt, a.Attempt), b.CreatedAt.Compare(a.CreatedAt))
	})
}

// observed is the part of what is known that the status is made of.
func (l *life) observed(hostIPs []string) *status.Observed {
	o := &status.Observed{
		Containers: l.o.Containers, HostIPs: hostIPs, StartTime: l.o.Started,
		Terminal: l.o.Completed || l.d.Stop != nil, Failed: l.failed, Disruption: l.disrupted,
		Troubles: l.troubles, Starting: l.launching(),
		ResizePending: l.pending, ResizeInProgress: l.progress,
	}
	if l.o.Resize != StepAbsent {
		o.Actual = l.o.Actual // otherwise it is what the pod says
		if l.podActual != nil {
			o.ActualPod = l.podActual.Spec.Resources
		}
	}
	p := planner{d: &l.d, o: &l.o}
	for c := range podutil.ContainerIter(&l.d.Pod.Spec, podutil.InitContainers|podutil.Containers) {
		if n := l.o.newest(c.Name); n != nil && n.State == status.Exited && !o.Terminal && p.wanted(c, n) {
			if o.Returning == nil {
				o.Returning = map[string]bool{}
			}
			o.Returning[c.Name] = true
		}
	}
	if s := l.o.current(); s != nil {
		o.SandboxReady, o.PodIPs = true, s.IPs
	}
	if len(l.failures)+len(l.waits) > 0 {
		o.Waiting = make(map[string]v1.ContainerStateWaiting, len(l.failures)+len(l.waits))
		for name, f := range l.failures {
			if l.tried(name) {
				o.Waiting[name] = f
			}
		}
		maps.Copy(o.Waiting, l.waits)
	}
	if s := l.d.Stop; s != nil && !s.Failed && s.Reason != "" {
		o.Note = &status.Cause{Reason: s.Reason, Message: s.Message}
		if s.Reason == status.Stopped && l.alive() {
			o.Note = &status.Cause{Reason: status.Stopping, Message: "Pod is being stopped by a user."}
		}
	}
	return o
}

// launching says that a container is being started, or that what came of a
// start is not known: it may run by now. So may one that the pod's spec has no more.
func (l *life) launching() bool {
	stray := func(c status.Container) bool { return c.Alive() && spec.Container(l.d.Pod, c.Name) == nil }
	if l.o.Stale || slices.ContainsFunc(l.o.Containers, stray) {
		return true
	}
	for key := range l.o.Busy {
		if strings.HasPrefix(key, "start/") {
			return true
		}
	}
	return false
}

// alive says that a container of the pod runs.
func (l *life) alive() bool {
	return slices.ContainsFunc(l.o.Containers, func(c status.Container) bool { return c.Alive() })
}

// tried says whether a container that could not be started will be tried
// again: one that will not does not wait, it has ended.
func (l *life) tried(name string) bool {
	c, n := spec.Container(l.d.Pod, name), l.o.newest(name)
	if c == nil || n == nil || n.State != status.Exited {
		return true
	}
	p := planner{d: &l.d, o: &l.o}
	return p.wanted(c, n)
}

// down says that nothing of the pod runs or is held any more.
func (l *life) down() bool {
	if l.alive() {
		return false
	}
	for i := range l.o.Sandboxes {
		if !l.o.Sandboxes[i].Stopped {
			return false
		}
	}
	return len(l.o.Busy) == 0 && l.o.Volumes == StepAbsent && l.o.Cgroup == StepAbsent
}
