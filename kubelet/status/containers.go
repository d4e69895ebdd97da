package status

import (
	"sort"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
)

// Scheme is the container runtime's name in "podd://<container id>".
const Scheme = "podd"

// Reasons that this package gives by itself.
const (
	ContainerCreating = "ContainerCreating"
	PodInitializing   = "PodInitializing"
	StatusUnknown     = "ContainerStatusUnknown"
	// Terminated is of containers that a stopped pod's were ended by SIGTERM or
	// SIGKILL; upstream's word for pods that the node has stopped.
	Terminated = "Terminated"
	// Stopped is the reason of a pod that a user has stopped, Stopping while
	// containers of it still run.
	Stopped  = "Stopped"
	Stopping = "Stopping"
	// RestartingAllContainers is of containers that were removed because one
	// of the pod ended with a code for which all start anew (KEP-5532).
	RestartingAllContainers = "RestartingAllContainers"
)

const removedForRestart = "The container is removed because RestartAllContainers in place"

// RestartsAll says whether the container's rules want all containers of its
// pod started anew when it ends with that code.
func RestartsAll(c *v1.Container, exitCode int32) bool {
	rule, ok := podutil.FindMatchingContainerRestartRule(*c, exitCode)
	return ok && rule.Action == v1.ContainerRestartRuleActionRestartAllContainers
}

// restartingAll says that the pod's containers are being removed to start
// anew, or were a moment ago.
func restartingAll(pod *v1.Pod, o *Observed, old *v1.PodStatus) bool {
	if _, c := podutil.GetPodConditionFromList(old.Conditions, v1.AllContainersRestarting); c != nil && c.Status == v1.ConditionTrue {
		return true
	}
	for c := range podutil.ContainerIter(&pod.Spec, podutil.InitContainers|podutil.Containers) {
		if n := o.Newest(c.Name); n != nil && n.State == Exited && RestartsAll(c, n.ExitCode) {
			return true
		}
	}
	return false
}

// containerStatuses of a list of containers. Regular ones come sorted by
// name, init containers in their order, as upstream has it.
func containerStatuses(pod *v1.Pod, containers []v1.Container, init bool, o *Observed, old []v1.ContainerStatus) []v1.ContainerStatus {
	out := make([]v1.ContainerStatus, 0, len(containers))
	for i := range containers {
		c := &containers[i]
		out = append(out, containerStatus(pod, c, init, o, find(old, c.Name)))
	}
	if !init {
		sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	}
	return out
}

func find(list []v1.ContainerStatus, name string) *v1.ContainerStatus {
	for i := range list {
		if list[i].Name == name {
			return &list[i]
		}
	}
	return nil
}

func containerStatus(pod *v1.Pod, c *v1.Container, init bool, o *Observed, old *v1.ContainerStatus) v1.ContainerStatus {
	s := v1.ContainerStatus{
		Name: c.Name, Image: c.Image, State: notYet(pod),
		Resources: resources(c, nil), AllocatedResources: c.Resources.Requests, VolumeMounts: volumeMounts(c),
	}
	if old != nil {
		s.RestartCount, s.LastTerminationState = old.RestartCount, old.LastTerminationState
	}
	sidecar := init && podutil.IsRestartableInitContainer(c)
	inst := o.Newest(c.Name)
	switch {
	case inst != nil:
		fill(&s, inst)
		if l := c.Lifecycle; l != nil && l.StopSignal != nil && inst.StopSignal != "" {
			signal := inst.StopSignal
			s.StopSignal = &signal
		}
		if inst.State == Running {
			s.Resources = resources(c, o.Actual)
		}
		if prev := o.previous(c.Name); prev != nil && prev.State == Exited {
			s.LastTerminationState = v1.ContainerState{Terminated: terminated(prev)}
		} else if old != nil && old.State.Terminated != nil && old.ContainerID != s.ContainerID {
			s.LastTerminationState = v1.ContainerState{Terminated: old.State.Terminated}
		}
	case o.restarting && old != nil && old.State.Waiting == nil:
		s.State = v1.ContainerState{Waiting: &v1.ContainerStateWaiting{Reason: RestartingAllContainers, Message: removedForRestart}}
		s.LastTerminationState = v1.ContainerState{Terminated: &v1.ContainerStateTerminated{
			Reason: RestartingAllContainers, Message: removedForRestart, ExitCode: 137,
		}}
		s.RestartCount++
	case init && !sidecar && anyCreated(pod, o) && !restarted(old):
		// Its instance was collected; what came after it proves its success.
		s.State = v1.ContainerState{Terminated: &v1.ContainerStateTerminated{
			Reason:  "Completed",
			Message: "Unable to get init container status from container runtime and pod has been initialized, treat it as exited normally",
		}}
	case old != nil && old.State.Terminated != nil:
		s.State, s.ContainerID, s.ImageID = old.State, old.ContainerID, old.ImageID
	case old != nil && old.State.Running != nil:
		// The runtime lost a container that ran: say so, invent nothing.
		s.RestartCount++
		s.LastTerminationState = v1.ContainerState{Terminated: &v1.ContainerStateTerminated{
			Reason:      StatusUnknown,
			Message:     "The container could not be located when the pod was deleted.  The container used to be Running",
			ExitCode:    137,
			ContainerID: old.ContainerID,
			StartedAt:   old.State.Running.StartedAt,
		}}
	}
	if w, ok := o.Waiting[c.Name]; ok && (inst == nil || !inst.Alive()) {
		if s.State.Terminated != nil {
			s.LastTerminationState = s.State
		}
		s.State = v1.ContainerState{Waiting: &w}
	}
	if t := s.State.Terminated; t != nil && o.Returning[c.Name] && !podutil.ContainerShouldRestart(*c, pod.Spec, t.ExitCode) {
		// By its policy it would have ended for good, which an apiserver lets
		// nobody take back. Upstream shows nothing between such an end and the
		// next start.
		s.LastTerminationState = s.State
		s.State = v1.ContainerState{Waiting: &v1.ContainerStateWaiting{Reason: ContainerCreating}}
	}
	if t := s.State.Terminated; o.Note != nil && t != nil && t.Reason == "Error" && (t.ExitCode == 128+int32(unix.SIGTERM) || t.ExitCode == 128+int32(unix.SIGKILL)) {
		// It ended because it was asked to.
		ended := *t
		ended.Reason = Terminated
		s.State.Terminated = &ended
	}
	started := inst != nil && inst.State == Running && inst.Started && !inst.Starting
	s.Started = &started
	s.Ready = started && inst.Ready
	if init && !sidecar {
		s.Ready = s.State.Terminated != nil && s.State.Terminated.ExitCode == 0 && s.State.Terminated.Reason != "OOMKilled"
	}
	return s
}

// restarted says that the container was removed to start anew and has not yet.
func restarted(old *v1.ContainerStatus) bool {
	return old != nil && old.State.Waiting != nil && old.LastTerminationState.Terminated != nil &&
		old.LastTerminationState.Terminated.Reason == RestartingAllContainers
}

// notYet is the state of a container that nothing is known of.
func notYet(pod *v1.Pod) v1.ContainerState {
	reason := ContainerCreating
	if len(pod.Spec.InitContainers) > 0 {
		reason = PodInitializing
	}
	return v1.ContainerState{Waiting: &v1.ContainerStateWaiting{Reason: reason}}
}

func fill(s *v1.ContainerStatus, c *Container) {
	s.ContainerID = Scheme + "://" + c.ID
	if c.Image != "" {
		s.Image = c.Image
	}
	s.ImageID = c.ImageRef
	s.RestartCount = max(s.RestartCount, c.Attempt)
	s.User = c.User
	switch {
	case c.Starting && c.State != Exited:
		// Upstream shows a container as running when its postStart hook is over.
	case c.State == Running:
		s.State = v1.ContainerState{Running: &v1.ContainerStateRunning{StartedAt: metav1.NewTime(c.StartedAt)}}
	case c.State == Exited:
		s.State = v1.ContainerState{Terminated: terminated(c)}
	case c.State == Unknown:
		s.State = v1.ContainerState{Waiting: &v1.ContainerStateWaiting{}}
	}
}

func terminated(c *Container) *v1.ContainerStateTerminated {
	return &v1.ContainerStateTerminated{
		ExitCode: c.ExitCode, Reason: c.Reason, Message: c.Message,
		StartedAt: metav1.NewTime(c.StartedAt), FinishedAt: metav1.NewTime(c.FinishedAt),
		ContainerID: Scheme + "://" + c.ID,
	}
}

func anyCreated(pod *v1.Pod, o *Observed) bool {
	for i := range pod.Spec.Containers {
		if o.Newest(pod.Spec.Containers[i].Name) != nil {
			return true
		}
	}
	return false
}

// resources of a container: those that its instance has when it runs.
func resources(c *v1.Container, actual map[string]v1.ResourceRequirements) *v1.ResourceRequirements {
	if r, known := actual[c.Name]; known {
		return &r
	}
	return &v1.ResourceRequirements{Limits: c.Resources.Limits, Requests: c.Resources.Requests}
}

func volumeMounts(c *v1.Container) []v1.VolumeMountStatus {
	if len(c.VolumeMounts) == 0 {
		return nil
	}
	out := make([]v1.VolumeMountStatus, 0, len(c.VolumeMounts))
	for i := range c.VolumeMounts {
		m := &c.VolumeMounts[i]
		s := v1.VolumeMountStatus{Name: m.Name, MountPath: m.MountPath, ReadOnly: m.ReadOnly}
		if m.ReadOnly {
			mode := v1.RecursiveReadOnlyDisabled
			if r := m.RecursiveReadOnly; r != nil && (*r == v1.RecursiveReadOnlyEnabled || *r == v1.RecursiveReadOnlyIfPossible) {
				mode = v1.RecursiveReadOnlyEnabled
			}
			s.RecursiveReadOnly = &mode
		}
		out = append(out, s)
	}
	return out
}
