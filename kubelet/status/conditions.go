package status

import (
	"fmt"
	"slices"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
)

// Reasons of conditions, upstream's words.
const (
	ContainersNotReady       = "ContainersNotReady"
	ContainersNotInitialized = "ContainersNotInitialized"
	ReadinessGatesNotReady   = "ReadinessGatesNotReady"
	PodCompleted             = "PodCompleted"
	PodFailed                = "PodFailed"
	// RestartAllContainersStarted is the reason of AllContainersRestarting.
	RestartAllContainersStarted = "RestartAllContainersStarted"
	// VolumeUnresponsive is the reason of VolumesResponding.
	VolumeUnresponsive = "VolumeUnresponsive"
)

// VolumesResponding is a condition of podd's own: a pod has it from the time
// when one of its volumes is found on a filesystem that does not answer.
const VolumesResponding v1.PodConditionType = "podd.dev/VolumesResponding"

// conditions of the pod; those of others, such as readiness gates, are kept.
func conditions(pod *v1.Pod, s *v1.PodStatus, o *Observed, old []v1.PodCondition, now time.Time) []v1.PodCondition {
	containers := containersReady(pod, s)
	own := []v1.PodCondition{
		{Type: v1.PodReadyToStartContainers, Status: truth(o.SandboxReady)},
		initialized(pod, s, old),
		podReady(pod, containers, append(slices.Clone(pod.Status.Conditions), old...)),
		containers,
		{Type: v1.PodScheduled, Status: v1.ConditionTrue},
	}
	if podutil.AllContainersCouldRestart(&pod.Spec) {
		own = append(own, allRestarting(pod, s, o))
	}
	if _, had := podutil.GetPodConditionFromList(old, VolumesResponding); had != nil || len(o.Troubles) > 0 {
		c := v1.PodCondition{Type: VolumesResponding, Status: truth(len(o.Troubles) == 0)}
		if len(o.Troubles) > 0 {
			c.Reason, c.Message = VolumeUnresponsive, strings.Join(o.Troubles, "; ")
		}
		own = append(own, c)
	}
	own = append(own, resizes(o)...)
	if d := o.Disruption; d != nil {
		own = append(own, v1.PodCondition{Type: v1.DisruptionTarget, Status: v1.ConditionTrue, Reason: v1.PodReasonTerminationByKubelet, Message: d.Message})
	}
	for i := range own {
		c := &own[i]
		if c.ObservedGeneration == 0 {
			c.ObservedGeneration = pod.Generation
		}
		c.LastTransitionTime = metav1.NewTime(now.Truncate(time.Second))
		if _, was := podutil.GetPodConditionFromList(old, c.Type); was != nil && was.Status == c.Status {
			c.LastTransitionTime = was.LastTransitionTime
		}
	}
	if len(pod.Status.Conditions) > 0 {
		// The source has others' conditions as they are now, and ours as they were.
		others := slices.Clone(pod.Status.Conditions)
		others = slices.DeleteFunc(others, func(c v1.PodCondition) bool { return Owned(c.Type) })
		old = slices.DeleteFunc(slices.Clone(old), func(c v1.PodCondition) bool { return !Owned(c.Type) && c.Type != v1.DisruptionTarget })
		old = append(others, old...)
	}
	for _, c := range old {
		if _, mine := podutil.GetPodConditionFromList(own, c.Type); mine == nil && !Owned(c.Type) {
			own = append(own, c)
		}
	}
	return own
}

func resizes(o *Observed) (out []v1.PodCondition) {
	if r := o.ResizePending; r != nil {
		out = append(out, v1.PodCondition{Type: v1.PodResizePending, Status: v1.ConditionTrue, Reason: r.Reason, Message: r.Message, ObservedGeneration: r.Generation})
	}
	if r := o.ResizeInProgress; r != nil {
		out = append(out, v1.PodCondition{Type: v1.PodResizeInProgress, Status: v1.ConditionTrue, Reason: r.Reason, Message: r.Message, ObservedGeneration: r.Generation})
	}
	return out
}

// Owned says that a condition is the node agent's alone to set; DisruptionTarget
// it shares with controllers.
func Owned(t v1.PodConditionType) bool {
	switch t {
	case v1.PodScheduled, v1.PodReady, v1.PodInitialized, v1.ContainersReady, v1.PodReadyToStartContainers,
		v1.PodResizeInProgress, v1.PodResizePending, v1.AllContainersRestarting:
		return true
	}
	return false
}

func truth(b bool) v1.ConditionStatus {
	if b {
		return v1.ConditionTrue
	}
	return v1.ConditionFalse
}

func overReason(phase v1.PodPhase) (reason string, over bool) {
	switch phase {
	case v1.PodSucceeded:
		return PodCompleted, true
	case v1.PodFailed:
		return PodFailed, true
	}
	return "", false
}

func containersReady(pod *v1.Pod, s *v1.PodStatus) v1.PodCondition {
	c := v1.PodCondition{Type: v1.ContainersReady, Status: v1.ConditionFalse}
	if reason, over := overReason(s.Phase); over {
		c.Reason = reason
		return c
	}
	var unready []string
	for i := range pod.Spec.InitContainers {
		ic := &pod.Spec.InitContainers[i]
		if cs := find(s.InitContainerStatuses, ic.Name); podutil.IsRestartableInitContainer(ic) && !cs.Ready {
			unready = append(unready, ic.Name)
		}
	}
	for i := range pod.Spec.Containers {
		if cs := find(s.ContainerStatuses, pod.Spec.Containers[i].Name); !cs.Ready {
			unready = append(unready, cs.Name)
		}
	}
	if len(unready) > 0 {
		c.Reason, c.Message = ContainersNotReady, fmt.Sprintf("containers with unready status: %s", unready)
		return c
	}
	c.Status = v1.ConditionTrue
	return c
}

func podReady(pod *v1.Pod, containers v1.PodCondition, all []v1.PodCondition) v1.PodCondition {
	c := containers
	c.Type = v1.PodReady
	if c.Status != v1.ConditionTrue {
		return c
	}
	var unready []string
	for _, gate := range pod.Spec.ReadinessGates {
		switch _, g := podutil.GetPodConditionFromList(all, gate.ConditionType); {
		case g == nil:
			unready = append(unready, fmt.Sprintf("corresponding condition of pod readiness gate %q does not exist.", gate.ConditionType))
		case g.Status != v1.ConditionTrue:
			unready = append(unready, fmt.Sprintf("the status of pod readiness gate %q is not \"True\", but %v", gate.ConditionType, g.Status))
		}
	}
	if len(unready) > 0 {
		c.Status, c.Reason, c.Message = v1.ConditionFalse, ReadinessGatesNotReady, strings.Join(unready, ", ")
	}
	return c
}

// allRestarting is true until the last container that is to start anew has been
// removed.
func allRestarting(pod *v1.Pod, s *v1.PodStatus, o *Observed) v1.PodCondition {
	c := v1.PodCondition{Type: v1.AllContainersRestarting, Status: v1.ConditionFalse}
	if reason, over := overReason(s.Phase); over {
		c.Reason = reason
		return c
	}
	left := false
	for ct := range podutil.ContainerIter(&pod.Spec, podutil.InitContainers|podutil.Containers) {
		left = left || o.Newest(ct.Name) != nil
	}
	if o.restarting && left {
		c.Status, c.Reason, c.Message = v1.ConditionTrue, RestartAllContainersStarted, "container exited with restart policy rule"
	}
	return c
}

// initialized stays true once it was: a pod that starts anew in place is not
// taken back.
func initialized(pod *v1.Pod, s *v1.PodStatus, old []v1.PodCondition) v1.PodCondition {
	c := v1.PodCondition{Type: v1.PodInitialized, Status: v1.ConditionTrue}
	if s.Phase == v1.PodSucceeded {
		c.Reason = PodCompleted
		return c
	}
	if anyStarted(s.ContainerStatuses) {
		return c
	}
	var incomplete []string
	for i := range pod.Spec.InitContainers {
		ic := &pod.Spec.InitContainers[i]
		cs := find(s.InitContainerStatuses, ic.Name)
		done := cs.Ready
		if podutil.IsRestartableInitContainer(ic) {
			done = cs.Started != nil && *cs.Started
		}
		if !done {
			incomplete = append(incomplete, ic.Name)
		}
	}
	if _, was := podutil.GetPodConditionFromList(old, v1.PodInitialized); was != nil && was.Status == v1.ConditionTrue {
		return c
	}
	if len(incomplete) > 0 {
		c.Status, c.Reason = v1.ConditionFalse, ContainersNotInitialized
		c.Message = fmt.Sprintf("containers with incomplete status: %s", incomplete)
	}
	return c
}
