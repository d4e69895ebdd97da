package pods

import (
	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/kubelet/status"
)

// resize brings running containers and the pod's group to the resources that
// the pod has been allocated (KEP-1287):
//
//	StepUnknown: the group is made wide enough for old and new, containers
//	             are updated that need not restart for it
//	StepDone:    what is left are containers that restart; when none is, the
//	             group is made as narrow as it should be
func (p *planner) resize() {
	switch p.o.Resize {
	case StepUnknown:
		p.do(Action{Kind: Resize})
	case StepDone:
		for c := range podutil.ContainerIter(&p.d.Pod.Spec, podutil.InitContainers|podutil.Containers) {
			n := p.o.newest(c.Name)
			if n == nil || resizeOf(c, p.o.Actual) == resizeNone {
				continue
			}
			if _, killed := p.o.Kills[n.ID]; killed || n.State == status.Running {
				return
			}
		}
		p.do(Action{Kind: Resize})
	}
}

// resizeKind is what it takes to give a running container its resources.
type resizeKind uint8

const (
	resizeNone resizeKind = iota
	resizeUpdate
	resizeRestart
)

// resizeOf a container that runs with the resources that actual says.
func resizeOf(c *v1.Container, actual map[string]v1.ResourceRequirements) resizeKind {
	have, known := actual[c.Name]
	if !known {
		return resizeNone
	}
	kind := resizeNone
	for _, name := range []v1.ResourceName{v1.ResourceCPU, v1.ResourceMemory} {
		if sameQuantity(have.Limits, c.Resources.Limits, name) && sameQuantity(have.Requests, c.Resources.Requests, name) {
			continue
		}
		kind = max(kind, resizeUpdate)
		for i := range c.ResizePolicy {
			if r := &c.ResizePolicy[i]; r.ResourceName == name && r.RestartPolicy == v1.RestartContainer {
				kind = resizeRestart
			}
		}
	}
	return kind
}

func sameQuantity(a, b v1.ResourceList, name v1.ResourceName) bool {
	x, inA := a[name]
	y, inB := b[name]
	return inA == inB && x.Cmp(y) == 0
}

// restartsForResize says that a running container must be replaced to get its
// resources, and that the pod's group is ready for it.
func (p *planner) restartsForResize(c *v1.Container) bool {
	return p.o.Resize == StepDone && resizeOf(c, p.o.Actual) == resizeRestart
}
