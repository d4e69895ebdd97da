package pods

import (
	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
)

// resets says that a container has ended with an exit code for which its rules
// want all containers of the pod started anew (KEP-5532).
func (p *planner) resets() bool {
	for i := range p.o.Containers {
		if p.resetSource(&p.o.Containers[i]) {
			return true
		}
	}
	return false
}

// resetSource says that this instance asks for all to be started anew.
func (p *planner) resetSource(n *status.Container) bool {
	if n.State != status.Exited || p.o.newest(n.Name) != n {
		return false
	}
	c := spec.Container(p.d.Pod, n.Name)
	return c != nil && status.RestartsAll(c, n.ExitCode)
}

// reset ends and removes the instances of all containers but the ephemeral
// ones: regular ones first, then init containers, and last those that asked for
// it, so that what the runtime has tells at any time that it is under way. The
// pod then starts from its first init container, in its old sandbox. Logs stay.
func (p *planner) reset() {
	s := &p.d.Pod.Spec
	for _, stage := range []struct {
		containers []v1.Container
		source     bool
	}{{s.Containers, false}, {s.InitContainers, false}, {s.Containers, true}, {s.InitContainers, true}} {
		clear := true
		for i := range stage.containers {
			if !p.resetContainer(&stage.containers[i], stage.source) {
				clear = false
			}
		}
		if !clear {
			return
		}
	}
}

// resetContainer removes a container's instances; with sources false the one
// that asked for the reset stays. It says whether nothing is left to do.
func (p *planner) resetContainer(c *v1.Container, sources bool) bool {
	clear := true
	if start := (Action{Kind: Start, Container: c.Name}); p.busy(start) {
		p.cancel(start)
		clear = false
	}
	for i := range p.o.Containers {
		n := &p.o.Containers[i]
		if n.Name != c.Name || !sources && p.resetSource(n) {
			continue
		}
		clear = false
		p.cancel(Action{Kind: PostStart, ID: n.ID})
		if n.Alive() {
			p.kill(n, c, 0, "killing", true)
		} else {
			p.do(Action{Kind: RemoveContainer, ID: n.ID, Container: n.Name, Keep: true})
		}
	}
	return clear
}

// restartable says whether a container may come back after it has ended, by
// its own policy and rules or the pod's.
func (p *planner) restartable(c *v1.Container) bool {
	if c.RestartPolicy != nil {
		return *c.RestartPolicy != v1.ContainerRestartPolicyNever
	}
	return podutil.IsContainerRestartable(p.d.Pod.Spec, *c)
}
