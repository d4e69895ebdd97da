package status

import (
	"cmp"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	resourcehelper "k8s.io/component-helpers/resource"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
)

// Compute returns the status of pod for what is observed. old is the status
// of the same pod before: times of transition, restart counts, last states
// and a terminal phase live on in it; nil for a new pod.
func Compute(pod *v1.Pod, o *Observed, old *v1.PodStatus, now time.Time) v1.PodStatus {
	if old == nil {
		old = &v1.PodStatus{}
	}
	with := *o
	o = &with
	o.restarting = restartingAll(pod, o, old)
	s := v1.PodStatus{
		ObservedGeneration:         pod.Generation,
		QOSClass:                   qos.GetPodQOS(pod),
		InitContainerStatuses:      containerStatuses(pod, pod.Spec.InitContainers, true, o, old.InitContainerStatuses),
		ContainerStatuses:          containerStatuses(pod, pod.Spec.Containers, false, o, old.ContainerStatuses),
		EphemeralContainerStatuses: ephemeralStatuses(pod, o, old.EphemeralContainerStatuses),
		Reason:                     old.Reason,
		Message:                    old.Message,
	}
	s.AllocatedResources = resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{})
	s.Resources = podResources(pod, o)
	if len(pod.Spec.InitContainers) == 0 {
		s.InitContainerStatuses = nil
	}
	if !o.StartTime.IsZero() {
		t := metav1.NewTime(o.StartTime.Truncate(time.Second))
		s.StartTime = &t
	}
	s.Phase = phase(pod, s.InitContainerStatuses, s.ContainerStatuses, o.Terminal, o.Returning)
	switch {
	case Over(old.Phase):
		// A pod never leaves its terminal phase.
		s.Phase = old.Phase
	case o.Failed != nil:
		s.Phase, s.Reason, s.Message = v1.PodFailed, o.Failed.Reason, o.Failed.Message
	case o.Note != nil:
		s.Reason, s.Message = o.Note.Reason, o.Note.Message
	default:
		s.Reason, s.Message = "", ""
	}
	if Over(s.Phase) && !Over(old.Phase) && o.Starting {
		// Nobody is told that a pod is over while something of it may run.
		s.Phase, s.Reason, s.Message = cmp.Or(old.Phase, v1.PodPending), old.Reason, old.Message
	}
	addresses(pod, &s, o)
	s.Conditions = conditions(pod, &s, o, old.Conditions, now)
	return s
}

// podResources are what the pod's containers have together, or the pod by its
// own resources.
func podResources(pod *v1.Pod, o *Observed) *v1.ResourceRequirements {
	if len(o.Actual) > 0 || o.ActualPod != nil {
		pod = pod.DeepCopy()
		if o.ActualPod != nil {
			pod.Spec.Resources = o.ActualPod
		}
		for c := range podutil.ContainerIter(&pod.Spec, podutil.InitContainers|podutil.Containers) {
			if r, known := o.Actual[c.Name]; known {
				c.Resources = r
			}
		}
	}
	return &v1.ResourceRequirements{
		Requests: resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{}),
		Limits:   resourcehelper.PodLimits(pod, resourcehelper.PodResourcesOptions{}),
	}
}

// Over says that a pod of that phase has run to its end.
func Over(p v1.PodPhase) bool { return p == v1.PodSucceeded || p == v1.PodFailed }

func addresses(pod *v1.Pod, s *v1.PodStatus, o *Observed) {
	for i, ip := range o.HostIPs {
		if i == 0 {
			s.HostIP = ip
		}
		s.HostIPs = append(s.HostIPs, v1.HostIP{IP: ip})
	}
	ips := o.PodIPs
	if pod.Spec.HostNetwork && o.SandboxReady {
		ips = o.HostIPs
	}
	for i, ip := range ips {
		if i == 0 {
			s.PodIP = ip
		}
		s.PodIPs = append(s.PodIPs, v1.PodIP{IP: ip})
	}
}

func ephemeralStatuses(pod *v1.Pod, o *Observed, old []v1.ContainerStatus) []v1.ContainerStatus {
	if len(pod.Spec.EphemeralContainers) == 0 {
		return nil
	}
	cs := make([]v1.Container, len(pod.Spec.EphemeralContainers))
	for i := range cs {
		cs[i] = v1.Container(pod.Spec.EphemeralContainers[i].EphemeralContainerCommon)
	}
	return containerStatuses(pod, cs, false, o, old)
}
