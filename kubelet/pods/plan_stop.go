package pods

import (
	"fmt"
	"time"

	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
)

// stop plans the end of a pod: what is being started is cancelled, containers
// end in order, then the sandbox, and with Forget all that was the pod's.
func (p *planner) stop() {
	p.abort()
	left := max(p.d.Stop.deadline().Sub(p.now), 0)
	if p.end(left) && p.d.Stop.Forget {
		p.forget()
	}
}

// wind down a pod that has completed: sidecars end, the sandbox stops, its
// containers stay for their logs.
func (p *planner) wind(grace *int64) {
	p.abort()
	p.end(seconds(grace, 30*time.Second))
}

// abort what would only make more to clean up.
func (p *planner) abort() {
	s := &p.d.Pod.Spec
	p.cancel(Action{Kind: RunSandbox})
	for i := range s.InitContainers {
		p.abortContainer(s.InitContainers[i].Name)
	}
	for i := range s.Containers {
		p.abortContainer(s.Containers[i].Name)
	}
	for i := range s.EphemeralContainers {
		p.abortContainer(s.EphemeralContainers[i].Name)
	}
	p.cancel(Action{Kind: SetupVolumes})
	p.cancel(Action{Kind: Resize})
	p.cancel(Action{Kind: Refresh})
	for i := range p.o.Containers {
		p.cancel(Action{Kind: PostStart, ID: p.o.Containers[i].ID})
	}
}

func (p *planner) abortContainer(name string) {
	p.cancel(Action{Kind: EnsureImage, Container: name})
	p.cancel(Action{Kind: Start, Container: name})
}

// starting says that something is on its way that may leave a container or a
// sandbox behind.
func (p *planner) starting() bool {
	for key := range p.o.Busy {
		if key == "sandbox" || len(key) > 6 && key[:6] == "start/" {
			return true
		}
	}
	return false
}

// end stops the containers, then the sandboxes, then gives back volumes and
// cgroup; true when all of it is done.
func (p *planner) end(grace time.Duration) bool {
	if !p.endContainers(grace) || p.starting() {
		return false
	}
	done := true
	for i := range p.o.Sandboxes {
		if !p.o.Sandboxes[i].Stopped {
			done = false
			p.do(Action{Kind: StopSandbox, ID: p.o.Sandboxes[i].ID})
		}
	}
	if !done {
		return false
	}
	if p.busy(Action{Kind: SetupVolumes}) || p.busy(Action{Kind: Refresh}) || p.busy(Action{Kind: EnsureCgroup}) {
		return false
	}
	if p.o.Volumes != StepAbsent {
		done = false
		p.do(Action{Kind: Teardown})
	}
	if p.o.Cgroup != StepAbsent {
		done = false
		p.do(Action{Kind: RemoveCgroup})
	}
	return done
}

// endContainers stops regular containers at once and sidecars in reverse
// order, each after those that started after it; true when none runs.
func (p *planner) endContainers(grace time.Duration) bool {
	sidecars := map[string]int{}
	for i := range p.d.Pod.Spec.InitContainers {
		if c := &p.d.Pod.Spec.InitContainers[i]; podutil.IsRestartableInitContainer(c) {
			sidecars[c.Name] = i + 1
		}
	}
	last := 0 // the latest sidecar that runs; regular ones come before any
	regular := false
	for i := range p.o.Containers {
		if c := &p.o.Containers[i]; c.Alive() {
			n, is := sidecars[c.Name]
			last = max(last, n)
			regular = regular || !is
		}
	}
	none := true
	for i := range p.o.Containers {
		c := &p.o.Containers[i]
		if !c.Alive() {
			p.cancel(Action{Kind: Hook, ID: c.ID}) // nobody is left to hear it
			continue
		}
		none = false
		if p.busy(Action{Kind: Start, Container: c.Name}) {
			continue // its start is being cancelled; it must be over first
		}
		n, is := sidecars[c.Name]
		turn := !is || !regular && n == last
		p.kill(c, spec.Container(p.d.Pod, c.Name), grace, fmt.Sprintf("Stopping container %s", c.Name), turn)
	}
	return none
}

// forget removes what is left of a pod whose processes are gone.
func (p *planner) forget() {
	if len(p.o.Busy) > 0 {
		return
	}
	for i := range p.o.Containers {
		// Oldest first: the status shows the newest that is there, and goes not back.
		c, last := &p.o.Containers[i], i == len(p.o.Containers)-1
		if last || p.o.Containers[i+1].Name != c.Name {
			p.do(Action{Kind: RemoveContainer, ID: c.ID, Container: c.Name})
		}
	}
	if len(p.o.Containers) > 0 {
		return
	}
	for i := range p.o.Sandboxes {
		p.do(Action{Kind: RemoveSandbox, ID: p.o.Sandboxes[i].ID})
	}
	if len(p.o.Sandboxes) == 0 {
		p.do(Action{Kind: Forget})
	}
}
