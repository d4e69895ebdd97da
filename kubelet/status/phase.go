package status

import (
	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
)

// tally counts the containers of a pod by what their status means for the
// pod's phase.
type tally struct {
	pendingInit    int // init containers that have not completed
	pendingSidecar int // sidecars that have not started
	initFailed     int // init containers that failed and are not tried again

	unknown, running, waiting, stopped int
	final                              int // stopped and not to be restarted
	succeeded                          int

	returning map[string]bool // see Observed
}

// phase follows https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-phase
// with the cases of upstream's kubelet.
func phase(pod *v1.Pod, init, regular []v1.ContainerStatus, terminal bool, returning map[string]bool) v1.PodPhase {
	t := tally{returning: returning}
	t.count(&pod.Spec, init, regular)
	initialized := anyStarted(regular)
	switch {
	case t.initFailed > 0:
		return v1.PodFailed
	case t.pendingInit > 0, t.pendingSidecar > 0 && !initialized, t.waiting > 0:
		if terminal && t.running == 0 {
			return v1.PodFailed // stopped before it could begin
		}
		return v1.PodPending
	case t.running > 0 && t.unknown == 0:
		return v1.PodRunning
	case t.running == 0 && t.stopped > 0 && t.unknown == 0:
		if !terminal && t.stopped != t.final {
			return v1.PodRunning // something is about to be restarted
		}
		if t.stopped == t.succeeded {
			return v1.PodSucceeded
		}
		return v1.PodFailed
	}
	return v1.PodPending
}

func (t *tally) count(spec *v1.PodSpec, init, regular []v1.ContainerStatus) {
	for i := range spec.InitContainers {
		c := &spec.InitContainers[i]
		s := find(init, c.Name)
		if podutil.IsRestartableInitContainer(c) {
			t.sidecar(s)
		} else {
			t.init(spec, c, s)
		}
	}
	for i := range spec.Containers {
		t.regular(spec, &spec.Containers[i], find(regular, spec.Containers[i].Name))
	}
}

// ended is the last end of a container, when it does not run now.
func ended(s *v1.ContainerStatus) *v1.ContainerStateTerminated {
	if s.State.Terminated != nil {
		return s.State.Terminated
	}
	if s.State.Waiting != nil {
		return s.LastTerminationState.Terminated
	}
	return nil
}

func (t *tally) init(spec *v1.PodSpec, c *v1.Container, s *v1.ContainerStatus) {
	if s == nil {
		t.pendingInit++
		return
	}
	end := ended(s)
	switch {
	case end == nil:
		t.pendingInit++
	case end.ExitCode == 0 && s.State.Waiting != nil:
		t.pendingInit++ // runs again, in a new sandbox
	case end.ExitCode != 0 && !t.comesBack(spec, c, end):
		t.initFailed++
	}
}

func (t *tally) sidecar(s *v1.ContainerStatus) {
	switch {
	case s == nil:
		t.unknown++
	case s.State.Running != nil:
		if s.Started == nil || !*s.Started {
			t.pendingSidecar++
		}
		t.running++
	case ended(s) != nil:
		// A sidecar that ended does not count.
	default:
		t.pendingSidecar++
		t.waiting++
	}
}

func (t *tally) regular(spec *v1.PodSpec, c *v1.Container, s *v1.ContainerStatus) {
	if s == nil {
		t.unknown++
		return
	}
	end := ended(s)
	switch {
	case s.State.Running != nil:
		t.running++
	case end != nil:
		t.stopped++
		if !t.comesBack(spec, c, end) {
			t.final++
		}
		if s.State.Terminated != nil && end.ExitCode == 0 {
			t.succeeded++
		}
	default:
		t.waiting++
	}
}

// comesBack says that a container that ended so will be started again.
func (t *tally) comesBack(spec *v1.PodSpec, c *v1.Container, end *v1.ContainerStateTerminated) bool {
	return t.returning[c.Name] || end.Reason == RestartingAllContainers || podutil.ContainerShouldRestart(*c, *spec, end.ExitCode)
}

// anyStarted says that some regular container has run at some time.
func anyStarted(regular []v1.ContainerStatus) bool {
	for i := range regular {
		s := &regular[i]
		if s.State.Running != nil || s.State.Terminated != nil || s.LastTerminationState.Terminated != nil {
			return true
		}
	}
	return false
}
