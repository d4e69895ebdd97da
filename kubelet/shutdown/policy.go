// Package shutdown ends the node's pods in order before the machine goes down
// (KEP-2000, graceful node shutdown; KEP-2712, by pod priority).
package shutdown

import (
	"cmp"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	kubeletv1beta1 "k8s.io/kubelet/config/v1beta1"

	"github.com/podd-runtime/podd/kubelet/pods"
)

// Step is a part of a shutdown: the pods from a priority on, up to that of the
// next step, and how long they have.
type Step struct {
	Priority int32
	Grace    time.Duration
}

// criticalPriority is that of class system-cluster-critical.
const criticalPriority = 2_000_000_000

// Steps of the configuration, low priorities first; none: pods are not waited
// for. total is shutdownGracePeriod, of which critical is for critical pods.
// byPriority takes their place.
func Steps(total, critical time.Duration, byPriority []kubeletv1beta1.ShutdownGracePeriodByPodPriority) []Step {
	var steps []Step
	for _, p := range byPriority {
		steps = append(steps, Step{p.Priority, time.Duration(p.ShutdownGracePeriodSeconds) * time.Second})
	}
	if len(steps) == 0 && total > 0 && critical <= total {
		steps = []Step{{0, total - critical}, {criticalPriority, critical}}
	}
	slices.SortStableFunc(steps, func(a, b Step) int { return cmp.Compare(a.Priority, b.Priority) })
	return steps
}

// Total is how long all steps may take.
func Total(steps []Step) (sum time.Duration) {
	for _, s := range steps {
		sum += s.Grace
	}
	return sum
}

// Group sorts pods into the steps. Those below the first step are in the first
// one. Pods that are over are in none.
func Group(steps []Step, list []*v1.Pod) [][]*v1.Pod {
	groups := make([][]*v1.Pod, len(steps))
	if len(steps) == 0 {
		return groups
	}
	for _, pod := range list {
		if pod.Status.Phase == v1.PodSucceeded || pod.Status.Phase == v1.PodFailed {
			continue
		}
		in := 0
		for i, s := range steps {
			if pods.Priority(pod) >= s.Priority {
				in = i
			}
		}
		groups[in] = append(groups[in], pod)
	}
	return groups
}

// grace of a pod within its step: its own, if that is less.
func (s Step) grace(pod *v1.Pod) time.Duration {
	if own := pod.Spec.TerminationGracePeriodSeconds; own != nil {
		return min(time.Duration(*own)*time.Second, s.Grace)
	}
	return s.Grace
}
