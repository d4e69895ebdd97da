// Package limits finds amounts of memory and storage in a pod with which it
// cannot run: fractions of a byte, which is what 128m is where 128Mi was meant,
// and limits below what the start of a process takes. Such a pod is valid, and
// upstream takes it, too. It is pure: manifests warn by it, and package why
// recognises by it what has happened.
package limits

import (
	"fmt"
	"slices"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

const (
	// MinMemory is what a container's start takes before its program runs, in
	// bytes: libcontainer's init is charged to it. Measured with containers of
	// busybox on cgroup v1: none starts with 2.5 MiB; with 3 MiB those of the
	// node's users do, with 3.5 MiB those of a user namespace of their own.
	MinMemory = 4 << 20
	// block is the least that a file takes, of a disk or of a tmpfs, in bytes.
	block = 4 << 10
)

// Finding is one amount that cannot be meant.
type Finding struct {
	// Field is its path, such as spec.containers[0].resources.limits[memory].
	Field string
	// Container that it limits; "": the pod, or a volume.
	Container string
	// Name is that of the resource; ephemeral-storage for the size of a volume.
	Name v1.ResourceName
	// Limit: it bounds what runs. Otherwise it is a request or an overhead.
	Limit   bool
	Amount  resource.Quantity
	Message string
	Remedy  string
}

// Fraction says whether an amount of bytes has a fraction.
func Fraction(q resource.Quantity) bool {
	// MilliValue overflows for amounts above 9 PB, which Value does not.
	whole := *resource.NewQuantity(q.Value(), resource.BinarySI)
	return whole.Cmp(q) != 0
}

// Of a pod, in the order of its fields.
func Of(pod *v1.Pod) (found []Finding) {
	add := func(path *field.Path, container string, name v1.ResourceName, limit bool, q resource.Quantity) {
		f := Finding{Field: path.String(), Container: container, Name: name, Limit: limit, Amount: q}
		if f.judge() {
			found = append(found, f)
		}
	}
	list := func(path *field.Path, container string, limits, requests v1.ResourceList) {
		for _, name := range []v1.ResourceName{v1.ResourceMemory, v1.ResourceEphemeralStorage} {
			limit, limited := limits[name]
			if limited {
				add(path.Child("limits").Key(string(name)), container, name, true, limit)
			}
			if q, ok := requests[name]; ok && !(limited && q.Cmp(limit) == 0) { // the default of a request
				add(path.Child("requests").Key(string(name)), container, name, false, q)
			}
		}
	}
	spec := field.NewPath("spec")
	containers := func(path *field.Path, all []v1.Container) {
		for i := range all {
			list(path.Index(i).Child("resources"), all[i].Name, all[i].Resources.Limits, all[i].Resources.Requests)
		}
	}
	containers(spec.Child("initContainers"), pod.Spec.InitContainers)
	containers(spec.Child("containers"), pod.Spec.Containers)
	if r := pod.Spec.Resources; r != nil {
		list(spec.Child("resources"), "", r.Limits, r.Requests)
	}
	for _, name := range []v1.ResourceName{v1.ResourceMemory, v1.ResourceEphemeralStorage} {
		if q, ok := pod.Spec.Overhead[name]; ok {
			add(spec.Child("overhead").Key(string(name)), "", name, false, q)
		}
	}
	for i := range pod.Spec.Volumes {
		if e := pod.Spec.Volumes[i].EmptyDir; e != nil && e.SizeLimit != nil && !e.SizeLimit.IsZero() {
			add(spec.Child("volumes").Index(i).Child("emptyDir", "sizeLimit"), "", v1.ResourceEphemeralStorage, true, *e.SizeLimit)
		}
	}
	return found
}

// judge says whether the amount is one that cannot be meant, and why.
func (f *Finding) judge() bool {
	amount := f.Amount.String()
	switch {
	case f.Amount.Sign() < 0 || f.Amount.IsZero():
		return false
	case Fraction(f.Amount):
		f.Message = FractionMessage(f.Amount)
		f.Remedy = "m stands for thousandths: write Mi for mebibytes"
	case !f.Limit:
		return false
	case f.Name == v1.ResourceMemory && f.Amount.Value() < MinMemory:
		f.Message = fmt.Sprintf("%s is too small even to start a process", amount)
		f.Remedy = "raise it: " + NeedMemory
	case f.Name == v1.ResourceEphemeralStorage && f.Amount.Value() < block:
		f.Message = fmt.Sprintf("%s is less than the smallest file takes", amount)
		f.Remedy = "raise it: a file takes 4Ki at least"
	default:
		return false
	}
	return true
}

// NeedMemory says how much a start takes.
const NeedMemory = "some 4Mi are needed before the program runs at all"

// FractionMessage is upstream's about a fraction of a byte.
func FractionMessage(q resource.Quantity) string {
	return fmt.Sprintf("fractional byte value %q is invalid, must be an integer", q.String())
}

// Memory returns the finding about the memory limit under which a container
// runs: its own or the pod's. container "": whatever keeps the pod as a whole
// from starting, which is a limit of its own or the sum of its containers'.
func Memory(pod *v1.Pod, container string) (Finding, bool) {
	all := slices.DeleteFunc(Of(pod), func(f Finding) bool {
		return f.Name != v1.ResourceMemory || !f.Limit || f.Amount.Value() >= MinMemory
	})
	for _, f := range all {
		if f.Container == container {
			return f, true
		}
	}
	for _, f := range all {
		if f.Container == "" {
			return f, true
		}
	}
	if container == "" && len(all) > 0 && sumOfLimits(pod) < MinMemory {
		return all[0], true
	}
	return Finding{}, false
}

// sumOfLimits of the memory of the containers, which limits the pod if each has
// one; in bytes.
func sumOfLimits(pod *v1.Pod) (sum int64) {
	for i := range pod.Spec.Containers {
		q, ok := pod.Spec.Containers[i].Resources.Limits[v1.ResourceMemory]
		if !ok {
			return MinMemory
		}
		sum += min(q.Value(), MinMemory)
	}
	return sum
}

// Storage returns the first finding about storage by which a pod is evicted.
func Storage(pod *v1.Pod) (Finding, bool) {
	for _, f := range Of(pod) {
		if f.Name == v1.ResourceEphemeralStorage && f.Limit {
			return f, true
		}
	}
	return Finding{}, false
}
