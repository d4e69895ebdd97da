package pods

import (
	"encoding/json"
	"maps"
	"reflect"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
)

const (
	configHash   = "kubernetes.io/config.hash"
	configSource = "kubernetes.io/config.source"
)

// fromAPI says that the pod is of an apiserver, not a static one.
func fromAPI(pod *v1.Pod) bool { return pod.Annotations[configSource] == "api" }

// sameRevision says that two pods of one UID are the same pod told twice:
// nothing is compared then, so that another daemon's defaults change nothing.
func sameRevision(a, b *v1.Pod) bool {
	if a.Generation != 0 && a.Generation == b.Generation {
		return sameImages(a, b)
	}
	// A UID that is the hash of the manifest changes with it.
	h := a.Annotations[configHash]
	return h != "" && h == b.Annotations[configHash] && h != string(a.UID)
}

// sameImages of all containers. A generation comes twice when an apiserver's
// database is restored from a backup and the pod changes again; of what may change
// in a pod this alone has been made into something that runs, and is compared.
func sameImages(a, b *v1.Pod) bool {
	for c := range podutil.ContainerIter(&b.Spec, podutil.InitContainers|podutil.Containers) {
		if was := spec.Container(a, c.Name); was != nil && was.Image != c.Image {
			return false
		}
	}
	return true
}

// containerView is what of a container's spec cannot change under a running
// instance.
func containerView(c *v1.Container) *v1.Container {
	v := *c
	v.Resources = *v.Resources.DeepCopy()
	for _, list := range []v1.ResourceList{v.Resources.Limits, v.Resources.Requests} {
		maps.DeleteFunc(list, func(name v1.ResourceName, _ resource.Quantity) bool { return resizable(name) })
	}
	v.LivenessProbe, v.ReadinessProbe, v.StartupProbe = nil, nil, nil
	v.ImagePullPolicy, v.TerminationMessagePolicy = "", ""
	v.ResizePolicy, v.RestartPolicy, v.RestartPolicyRules = nil, nil, nil
	if l := v.Lifecycle; l != nil {
		v.Lifecycle = nil
		if l.StopSignal != nil {
			v.Lifecycle = &v1.Lifecycle{StopSignal: l.StopSignal}
		}
	}
	return &v
}

// sandboxView is what of a pod's spec its sandbox and all its containers are
// made of.
func sandboxView(p *v1.Pod) *v1.PodSpec {
	s := &p.Spec
	v := &v1.PodSpec{
		HostNetwork: s.HostNetwork, HostPID: s.HostPID, HostIPC: s.HostIPC, HostUsers: s.HostUsers,
		ShareProcessNamespace: s.ShareProcessNamespace, SecurityContext: s.SecurityContext,
		Hostname: s.Hostname, Subdomain: s.Subdomain, SetHostnameAsFQDN: s.SetHostnameAsFQDN,
		HostnameOverride: s.HostnameOverride, HostAliases: s.HostAliases,
		DNSPolicy: s.DNSPolicy, DNSConfig: s.DNSConfig, RuntimeClassName: s.RuntimeClassName, Volumes: s.Volumes,
	}
	for i := range s.Containers {
		v.Containers = append(v.Containers, v1.Container{Name: s.Containers[i].Name, Ports: s.Containers[i].Ports})
	}
	for i := range s.InitContainers {
		v.InitContainers = append(v.InitContainers, v1.Container{Name: s.InitContainers[i].Name})
	}
	return v
}

// differ compares two specs as they are written. Leniently, a field that the
// old one does not have is no difference: a newer daemon knows more defaults.
func differ(was, is any, lenient bool) bool {
	a, b := generic(was), generic(is)
	if lenient {
		return !contains(a, b)
	}
	return !reflect.DeepEqual(a, b)
}

func generic(v any) any {
	data, err := json.Marshal(v)
	if err != nil {
		return nil
	}
	var out any
	if json.Unmarshal(data, &out) != nil {
		return nil
	}
	return out
}

// contains says whether all that a has is in b.
func contains(a, b any) bool {
	switch x := a.(type) {
	case map[string]any:
		y, ok := b.(map[string]any)
		if !ok {
			return len(x) == 0
		}
		for k, v := range x {
			if !contains(v, y[k]) {
				return false
			}
		}
		return true
	case []any:
		y, ok := b.([]any)
		if !ok || len(x) != len(y) {
			return len(x) == 0 && b == nil
		}
		for i := range x {
			if !contains(x[i], y[i]) {
				return false
			}
		}
		return true
	}
	return reflect.DeepEqual(a, b)
}
