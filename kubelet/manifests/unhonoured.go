package manifests

import (
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// ReasonUnsupported is the reason of the event about a field of a pod that has
// no effect on this node.
const ReasonUnsupported = "UnsupportedField"

// unhonoured lists the fields of a pod that are set and that podd does not act
// on. The pod runs without them; nobody shall have to find that out alone.
// Whoever makes podd act on one takes it out here and in docs/support.md.
func unhonoured(pod *v1.Pod) (found []warning) {
	say := func(set bool, path *field.Path, why string) {
		if set {
			found = append(found, warning{Problem{Field: path.String(), Message: "has no effect: " + why}, ReasonUnsupported})
		}
	}
	const scheduling = "no scheduler chooses a node for a static pod"
	spec, s := field.NewPath("spec"), &pod.Spec
	say(len(s.NodeSelector) > 0, spec.Child("nodeSelector"), scheduling)
	say(s.Affinity != nil, spec.Child("affinity"), scheduling)
	say(len(s.TopologySpreadConstraints) > 0, spec.Child("topologySpreadConstraints"), scheduling)
	say(s.SchedulerName != "" && s.SchedulerName != v1.DefaultSchedulerName, spec.Child("schedulerName"), scheduling)
	say(len(s.SchedulingGates) > 0, spec.Child("schedulingGates"), scheduling)
	say(s.SchedulingGroup != nil, spec.Child("schedulingGroup"), scheduling)
	if sc := s.SecurityContext; sc != nil {
		say(sc.WindowsOptions != nil, spec.Child("securityContext", "windowsOptions"), "this is Linux")
		say(sc.SELinuxChangePolicy != nil, spec.Child("securityContext", "seLinuxChangePolicy"), "volumes are relabelled, not mounted with a label, yet")
	}
	container := func(p *field.Path, c *v1.Container) {
		say(c.SecurityContext != nil && c.SecurityContext.WindowsOptions != nil, p.Child("securityContext", "windowsOptions"), "this is Linux")
	}
	for i := range s.InitContainers {
		container(spec.Child("initContainers").Index(i), &s.InitContainers[i])
	}
	for i := range s.Containers {
		container(spec.Child("containers").Index(i), &s.Containers[i])
	}
	return found
}
