package pods

import (
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/kubelet/status"
)

// Kind of an Action.
type Kind uint8

const (
	// Observe asks the runtime for the pod's sandboxes and containers.
	Observe Kind = iota
	EnsureCgroup
	SetupVolumes
	// Refresh what the pod's volumes hold of objects and of the pod itself.
	Refresh
	RunSandbox
	EnsureImage
	// Start creates and starts a container.
	Start
	// PostStart runs the hook of an instance that has started.
	PostStart
	// Order marks a container instance to be ended, with a grace period.
	Order
	// Hook runs the preStop hook of an instance.
	Hook
	// StopContainer ends an instance; after Grace it is killed.
	StopContainer
	RemoveContainer
	StopSandbox
	RemoveSandbox
	Teardown
	RemoveCgroup
	// Cancel what is under way with Key.
	Cancel
	// Resize gives the pod's group and its containers their resources.
	Resize
	// Abort ends what waits for volumes that do not answer.
	Abort
	// Complete: all that the pod had to do is done.
	Complete
	// Expire: the pod is past its activeDeadlineSeconds.
	Expire
	// Forget the pod: nothing of it is left.
	Forget
)

// Action is one thing to do. Actions with different keys run side by side.
type Action struct {
	Kind      Kind
	Container string
	ID        string // of container or sandbox
	Grace     time.Duration
	Message   string
	Key       string
	// Keep the log of a container that is removed.
	Keep bool
}

// key names what an action works on: one at a time for each.
func (a Action) key() string {
	switch a.Kind {
	case Observe:
		return "observe"
	case EnsureCgroup:
		return "cgroup"
	case RemoveCgroup:
		return "rmcgroup"
	case SetupVolumes:
		return "setup"
	case Refresh:
		return "refresh"
	case Teardown:
		return "teardown"
	case Abort:
		return "abort"
	case RunSandbox:
		return "sandbox"
	case Resize:
		return "resize"
	case EnsureImage:
		return "image/" + a.Container
	case Start:
		return "start/" + a.Container
	case PostStart:
		return "post/" + a.ID
	case Hook:
		return "hook/" + a.ID
	case StopContainer:
		return "stop/" + a.ID
	case RemoveContainer, StopSandbox, RemoveSandbox:
		return "remove/" + a.ID
	case Cancel:
		return a.Key
	}
	return ""
}

// Plan is what to do now, what containers wait for, and when to plan again if
// nothing happens before.
type Plan struct {
	Actions []Action
	Waits   map[string]v1.ContainerStateWaiting
	Wake    time.Time // zero: only when something happens
}

// Policy of the node that plans need.
type Policy struct {
	Backoff BackoffPolicy
	// MinGrace is the least time a container gets between SIGTERM and
	// SIGKILL; upstream's 2 s.
	MinGrace time.Duration
}

// plan is the whole decision about a pod: the same values give the same plan.
func plan(d *Desired, o *Observed, pol Policy, now time.Time) Plan {
	p := planner{d: d, o: o, pol: pol, now: now}
	switch {
	case o.Stale:
		p.do(Action{Kind: Observe})
	case d.Stop != nil:
		p.stop()
	case d.Held:
	case o.Completed:
		p.wind(d.Pod.Spec.TerminationGracePeriodSeconds)
	default:
		p.run()
	}
	return p.Plan
}

type planner struct {
	Plan
	d   *Desired
	o   *Observed
	pol Policy
	now time.Time
}

// do adds an action unless its key is busy or has to wait for its next try.
func (p *planner) do(a Action) {
	key := a.key()
	if _, busy := p.o.Busy[key]; busy {
		return
	}
	if t := p.o.Retry[key]; t.After(p.now) {
		p.wake(t)
		return
	}
	p.Actions = append(p.Actions, a)
}

func (p *planner) busy(a Action) bool {
	_, busy := p.o.Busy[a.key()]
	return busy
}

func (p *planner) wake(t time.Time) {
	if p.Wake.IsZero() || t.Before(p.Wake) {
		p.Wake = t
	}
}

func (p *planner) wait(container, reason, message string) {
	if p.Waits == nil {
		p.Waits = map[string]v1.ContainerStateWaiting{}
	}
	p.Waits[container] = v1.ContainerStateWaiting{Reason: reason, Message: message}
}

// cancel what is under way with a's key.
func (p *planner) cancel(a Action) {
	if p.busy(a) {
		p.Actions = append(p.Actions, Action{Kind: Cancel, Key: a.key()})
	}
}

// kill ends one instance: order, preStop hook, then the signals. turn false
// lets it wait for others to end first, until its grace period is over.
func (p *planner) kill(c *status.Container, spec *v1.Container, grace time.Duration, message string, turn bool) {
	if c.State == status.Created {
		p.do(Action{Kind: RemoveContainer, ID: c.ID, Container: c.Name})
		return
	}
	k, ordered := p.o.Kills[c.ID]
	if !ordered || p.now.Add(grace).Before(k.deadline().Add(-time.Second)) {
		p.do(Action{Kind: Order, ID: c.ID, Container: c.Name, Grace: grace, Message: message})
		return
	}
	deadline := k.deadline()
	if hooked(spec) && k.Grace > 0 && !k.HookDone && c.State == status.Running && p.now.Before(deadline) {
		p.do(Action{Kind: Hook, ID: c.ID, Container: c.Name, Grace: deadline.Sub(p.now)})
		return
	}
	if p.busy(Action{Kind: Hook, ID: c.ID}) && p.now.Before(deadline) {
		p.wake(deadline) // then it goes on for as long as the container does
		return
	}
	if !turn && p.now.Before(deadline) {
		p.wake(deadline)
		return
	}
	left := max(deadline.Sub(p.now), p.pol.MinGrace)
	a := Action{Kind: StopContainer, ID: c.ID, Container: c.Name, Grace: left}
	until, busy := p.o.Busy[a.key()]
	if busy && p.now.Add(left).Before(until.Add(-time.Second)) {
		// A shorter grace period has come in since.
		p.cancel(a)
		return
	}
	if busy {
		p.unstick(until.Add(stuckAfter))
	}
	p.do(a)
}

// stuckAfter is how long after SIGKILL a container that has not ended is taken
// to wait in the kernel for a filesystem.
const stuckAfter = 10 * time.Second

// unstick a container that SIGKILL has not ended.
func (p *planner) unstick(since time.Time) {
	if p.now.Before(since) {
		p.wake(since)
		return
	}
	p.do(Action{Kind: Abort})
}

func hooked(c *v1.Container) bool {
	return c != nil && c.Lifecycle != nil && c.Lifecycle.PreStop != nil
}

// seconds of an API field, with a default.
func seconds(s *int64, def time.Duration) time.Duration {
	if s == nil {
		return def
	}
	return time.Duration(*s) * time.Second
}

// podGrace is the pod's own grace period; the API's default is 30 s.
func podGrace(pod *v1.Pod) time.Duration {
	if pod.DeletionGracePeriodSeconds != nil {
		return seconds(pod.DeletionGracePeriodSeconds, 0)
	}
	return seconds(pod.Spec.TerminationGracePeriodSeconds, 30*time.Second)
}
