package pods

import (
	"fmt"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
)

// run plans a pod that should run:
//
//	cgroup ──> sandbox ─┐
//	volumes ────────────┼─> init containers in order ─> containers, in parallel
//	images ─────────────┘
func (p *planner) run() {
	pod := p.d.Pod
	if s := pod.Spec.ActiveDeadlineSeconds; s != nil && !p.o.Started.IsZero() {
		end := p.o.Started.Add(seconds(s, 0))
		if !p.now.Before(end) {
			p.do(Action{Kind: Expire})
			return
		}
		p.wake(end)
	}
	if p.resets() {
		p.reset()
		return
	}
	p.collect()
	sandbox := p.o.current()
	if sandbox == nil {
		p.newSandbox()
		return
	}
	p.prepare()
	p.resize()
	p.ephemeral()
	if p.initialize(sandbox) {
		p.regular()
	}
}

// prepare what containers need besides the sandbox.
func (p *planner) prepare() {
	if p.o.Cgroup != StepDone && !p.busy(Action{Kind: RemoveCgroup}) {
		p.do(Action{Kind: EnsureCgroup})
	}
	if p.o.Volumes != StepDone && !p.busy(Action{Kind: Teardown}) {
		p.do(Action{Kind: SetupVolumes})
	}
	if p.o.Volumes == StepDone && p.o.Outdated {
		p.do(Action{Kind: Refresh})
	}
}

// newSandbox replaces what is left of the old one, if there was one.
func (p *planner) newSandbox() {
	if p.spent() {
		p.do(Action{Kind: Complete})
		return
	}
	p.prepare()
	clear := true
	for i := range p.o.Containers {
		c := &p.o.Containers[i]
		if p.busy(Action{Kind: Start, Container: c.Name}) {
			p.cancel(Action{Kind: Start, Container: c.Name})
			clear = false
			continue
		}
		if c.Alive() || c.State == status.Created {
			clear = false
			p.kill(c, spec.Container(p.d.Pod, c.Name), podGrace(p.d.Pod), "Pod sandbox changed, it will be killed and re-created.", true)
		}
	}
	if !clear {
		return
	}
	for i := range p.o.Sandboxes {
		if !p.o.Sandboxes[i].Stopped {
			clear = false
			p.do(Action{Kind: StopSandbox, ID: p.o.Sandboxes[i].ID})
		}
	}
	for _, c := range p.first() {
		p.image(c)
	}
	if clear && p.o.Cgroup == StepDone {
		p.do(Action{Kind: RunSandbox})
	}
}

// first are the containers that start first: their images can come already.
func (p *planner) first() []*v1.Container {
	s := &p.d.Pod.Spec
	if len(s.InitContainers) > 0 {
		return []*v1.Container{&s.InitContainers[0]}
	}
	out := make([]*v1.Container, 0, len(s.Containers))
	for i := range s.Containers {
		if c := &s.Containers[i]; p.wanted(c, p.o.newest(c.Name)) {
			out = append(out, c)
		}
	}
	return out
}

// spent says that a pod without a sandbox has nothing left to run.
func (p *planner) spent() bool {
	if len(p.o.Containers) == 0 {
		return false
	}
	created := false
	for i := range p.d.Pod.Spec.Containers {
		c := &p.d.Pod.Spec.Containers[i]
		n := p.o.newest(c.Name)
		created = created || n != nil
		if n == nil && p.d.Pod.Spec.RestartPolicy == v1.RestartPolicyNever && len(p.o.Sandboxes) > 0 {
			continue // upstream begins no second time with Never
		}
		if n == nil || n.Alive() || n.State == status.Created || p.wanted(c, n) {
			return false
		}
	}
	if created {
		return true
	}
	// Initialisation that failed for good.
	for i := range p.d.Pod.Spec.InitContainers {
		c := &p.d.Pod.Spec.InitContainers[i]
		if n := p.o.newest(c.Name); n != nil && n.State == status.Exited && !n.Done() && !p.wanted(c, n) {
			return true
		}
	}
	return false
}

// wanted says whether a container that does not run should be started.
func (p *planner) wanted(c *v1.Container, n *status.Container) bool {
	if n == nil || n.State == status.Created || p.o.Forced[c.Name] == n.ID || p.o.Changed[c.Name] {
		return true
	}
	// What was ended by a probe is restarted whatever its exit code, as upstream.
	if k, killed := p.o.Kills[n.ID]; killed && (p.restartsForResize(c) || k.Unfit && p.restartable(c)) {
		return true
	}
	code := n.ExitCode
	if n.Reason == "OOMKilled" && code == 0 {
		code = 137 // an OOM kill below an exit of 0 is a failure all the same
	}
	return podutil.ContainerShouldRestart(*c, p.d.Pod.Spec, code)
}

// collect removes instances and sandboxes that nobody needs any more: of
// each container the newest stays, and the one before it for its log.
func (p *planner) collect() {
	seen := map[string]int{}
	used := map[string]bool{}
	for i := range p.o.Containers {
		c := &p.o.Containers[i]
		used[c.Sandbox] = true
		seen[c.Name]++
		if seen[c.Name] == 1 || c.Alive() {
			continue
		}
		if seen[c.Name] == 2 && c.State != status.Created {
			continue
		}
		p.do(Action{Kind: RemoveContainer, ID: c.ID, Container: c.Name})
	}
	for i := 1; i < len(p.o.Sandboxes); i++ {
		s := &p.o.Sandboxes[i]
		switch {
		case !s.Stopped:
			p.do(Action{Kind: StopSandbox, ID: s.ID})
		case !used[s.ID]:
			p.do(Action{Kind: RemoveSandbox, ID: s.ID})
		}
	}
}

// ephemeral containers start once, whenever there is a sandbox.
func (p *planner) ephemeral() {
	for i := range p.d.Pod.Spec.EphemeralContainers {
		c := (*v1.Container)(&p.d.Pod.Spec.EphemeralContainers[i].EphemeralContainerCommon)
		if p.o.newest(c.Name) == nil {
			p.start(c, nil)
		}
	}
}

// initialize takes the init containers one step further and says whether the
// regular ones may run.
func (p *planner) initialize(s *Sandbox) bool {
	before := p.initialized(s)
	for i := range p.d.Pod.Spec.InitContainers {
		c := &p.d.Pod.Spec.InitContainers[i]
		n := p.o.in(s.ID, c.Name)
		if podutil.IsRestartableInitContainer(c) {
			if !p.sidecar(c, n) && !before {
				return false
			}
			continue
		}
		if before || n != nil && n.Done() && p.o.Forced[c.Name] != n.ID {
			continue
		}
		switch {
		case n == nil:
			p.start(c, p.o.newest(c.Name))
		case n.State == status.Running:
			// Another image changes nothing for one that runs already.
			if p.o.Forced[c.Name] == n.ID {
				p.kill(n, c, podGrace(p.d.Pod), fmt.Sprintf("Init container %s was asked to restart", c.Name), true)
			}
		case n.State == status.Unknown:
			p.kill(n, c, podGrace(p.d.Pod), fmt.Sprintf("Init container %s is in \"unknown\" state, try killing it before restart", c.Name), true)
		case p.wanted(c, n):
			p.start(c, n)
		default:
			p.do(Action{Kind: Complete})
		}
		return false
	}
	return true
}

// initialized says that a regular container of this sandbox was created once.
func (p *planner) initialized(s *Sandbox) bool {
	for i := range p.d.Pod.Spec.Containers {
		if p.o.in(s.ID, p.d.Pod.Spec.Containers[i].Name) != nil {
			return true
		}
	}
	return false
}

// sidecar keeps a restartable init container running and says whether the
// next one may start.
func (p *planner) sidecar(c *v1.Container, n *status.Container) bool {
	if p.ending() {
		return true // it must not keep a pod alive whose work is done
	}
	if n == nil || n.State == status.Created || n.State == status.Exited {
		p.start(c, p.o.newest(c.Name))
		return false
	}
	if n.State == status.Unknown {
		p.kill(n, c, podGrace(p.d.Pod), fmt.Sprintf("Init container %s is in \"unknown\" state, try killing it before restart", c.Name), true)
		return false
	}
	if message, grace, bad := p.unfit(c, n); bad {
		p.kill(n, c, grace, fmt.Sprintf("Init container %s %s", c.Name, message), true)
		return false
	}
	p.hook(n)
	return n.Started && !n.Starting
}

// hook runs the postStart hook of an instance that has just started.
func (p *planner) hook(n *status.Container) {
	if n.Starting && !p.busy(Action{Kind: Start, Container: n.Name}) {
		p.do(Action{Kind: PostStart, ID: n.ID, Container: n.Name})
	}
}

// over says that all regular containers have ended for good.
func (p *planner) over() bool {
	return p.eachRegular(func(c *v1.Container, n *status.Container) bool { return n.State == status.Exited && !p.wanted(c, n) })
}

// ending says that all regular containers have ended for good or will, because a
// probe has failed that none survives. A sidecar is not restarted then.
func (p *planner) ending() bool {
	return p.eachRegular(func(c *v1.Container, n *status.Container) bool {
		if n.Alive() {
			return p.o.Kills[n.ID].Unfit && !p.restartable(c) && !p.wanted(c, n)
		}
		return n.State == status.Exited && !p.wanted(c, n)
	})
}

// eachRegular says that holds is true of all regular containers, and that none
// is being started.
func (p *planner) eachRegular(holds func(c *v1.Container, n *status.Container) bool) bool {
	for i := range p.d.Pod.Spec.Containers {
		c := &p.d.Pod.Spec.Containers[i]
		n := p.o.newest(c.Name)
		if n == nil || !holds(c, n) || p.busy(Action{Kind: Start, Container: c.Name}) {
			return false
		}
	}
	return len(p.d.Pod.Spec.Containers) > 0
}

// regular keeps the containers running, all at the same time; but none starts
// before the postStart hook of one that is listed before it is over.
func (p *planner) regular() {
	gated := false
	for i := range p.d.Pod.Spec.Containers {
		c := &p.d.Pod.Spec.Containers[i]
		n := p.o.newest(c.Name)
		switch {
		case n == nil || n.State == status.Created:
			p.startUnless(gated, c, n)
		case n.State == status.Exited:
			p.cancel(Action{Kind: PostStart, ID: n.ID}) // in vain now
			p.cancel(Action{Kind: Hook, ID: n.ID})
			if p.wanted(c, n) {
				p.startUnless(gated, c, n)
			}
		case n.State == status.Unknown:
			p.kill(n, c, podGrace(p.d.Pod), fmt.Sprintf("Container is in %q state, try killing it before restart", n.State), true)
		default:
			p.running(c, n)
		}
		gated = gated || p.gates(c, n)
	}
	if p.over() {
		p.do(Action{Kind: Complete})
	}
}

// startUnless another container has to be up first; the image can come.
func (p *planner) startUnless(gated bool, c *v1.Container, n *status.Container) {
	if gated {
		p.image(c)
		return
	}
	p.start(c, n)
}

// gates says that a container with a postStart hook is on its way: one that
// waits for its next try holds up nobody.
func (p *planner) gates(c *v1.Container, n *status.Container) bool {
	if !hasPostStart(c) {
		return false
	}
	if n != nil && n.State == status.Running {
		return n.Starting
	}
	start, image := Action{Kind: Start, Container: c.Name}, Action{Kind: EnsureImage, Container: c.Name}
	if p.busy(start) || p.busy(image) {
		return true
	}
	return slices.ContainsFunc(p.Actions, func(a Action) bool {
		return a.Container == c.Name && (a.Kind == Start || a.Kind == EnsureImage || a.Kind == RemoveContainer && n != nil && a.ID == n.ID)
	})
}

// running looks after a container that runs.
func (p *planner) running(c *v1.Container, n *status.Container) {
	message, grace, bad := p.unfit(c, n)
	if !bad {
		p.hook(n)
		return
	}
	message = fmt.Sprintf("Container %s %s", c.Name, message)
	if p.o.Changed[c.Name] || p.restartsForResize(c) || p.o.Forced[c.Name] == n.ID || p.restartable(c) {
		message += ", will be restarted"
	}
	p.kill(n, c, grace, message, true)
}

// unfit says why a running container must be replaced, and its grace period.
func (p *planner) unfit(c *v1.Container, n *status.Container) (message string, grace time.Duration, bad bool) {
	grace = podGrace(p.d.Pod)
	v := p.o.Verdicts[n.ID]
	switch {
	case p.o.Forced[c.Name] == n.ID:
		return "was asked to restart", grace, true
	case p.o.Changed[c.Name]:
		return "definition changed", grace, true
	case p.restartsForResize(c):
		return "resize requires restart", grace, true
	case v.Liveness:
		return "failed liveness probe", probeGrace(c.LivenessProbe, grace), true
	case v.Startup:
		return "failed startup probe", probeGrace(c.StartupProbe, grace), true
	}
	// A kill that began stays one, whatever the probes say by now.
	if k, ordered := p.o.Kills[n.ID]; ordered {
		return "", k.Grace, true
	}
	return "", 0, false
}

func probeGrace(pr *v1.Probe, pod time.Duration) time.Duration {
	if pr == nil {
		return pod
	}
	return seconds(pr.TerminationGracePeriodSeconds, pod)
}

// start a container as soon as its back-off, its image and the pod's volumes
// allow. n is the instance before.
func (p *planner) start(c *v1.Container, n *status.Container) {
	if p.busy(Action{Kind: Start, Container: c.Name}) {
		return
	}
	if n != nil && n.State == status.Created {
		// Created and never started: the daemon or the runtime died between.
		p.do(Action{Kind: RemoveContainer, ID: n.ID, Container: n.Name})
		return
	}
	if n != nil && n.State == status.Exited && p.o.Forced[c.Name] != n.ID && !p.o.Changed[c.Name] {
		if p.backsOff(c, ended(n)) {
			return
		}
	}
	if at := p.o.Ended[c.Name]; n == nil && !at.IsZero() && p.backsOff(c, at) {
		return
	}
	if !p.image(c) || p.o.Volumes != StepDone || p.o.Cgroup != StepDone {
		return
	}
	p.do(Action{Kind: Start, Container: c.Name})
}

// backsOff says that a container that ended at a time must wait still.
func (p *planner) backsOff(c *v1.Container, ended time.Time) bool {
	b := p.o.Backoffs[c.Name]
	until := p.pol.Backoff.Until(b, ended)
	if !p.now.Before(until) {
		return false
	}
	p.wake(until)
	p.wait(c.Name, "CrashLoopBackOff", fmt.Sprintf("back-off %s restarting failed container=%s pod=%s", b.Delay, c.Name, spec.Desc(p.d.Pod)))
	return true
}

// image says whether the container's image is there, and gets it if not.
func (p *planner) image(c *v1.Container) bool {
	i := p.o.Images[c.Name]
	if i.Ref != "" {
		return true
	}
	if p.now.Before(i.Retry) {
		p.wake(i.Retry)
		// Half of the time the status shows the error, half of it the wait.
		if turn := i.Failed.Add(i.Retry.Sub(i.Failed) / 2); p.now.Before(turn) {
			p.wake(turn)
			p.wait(c.Name, i.Reason, i.Error)
		} else {
			reason := i.Reason
			if reason == "ErrImagePull" {
				reason = "ImagePullBackOff"
			}
			p.wait(c.Name, reason, fmt.Sprintf("Back-off pulling image %q: %s: %s", c.Image, i.Reason, i.Error))
		}
		return false
	}
	p.do(Action{Kind: EnsureImage, Container: c.Name})
	return false
}
