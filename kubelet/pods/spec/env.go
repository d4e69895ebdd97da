package spec

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	resourceapi "k8s.io/kubernetes/pkg/api/v1/resource"
	podshelper "k8s.io/kubernetes/pkg/apis/core/pods"
	"k8s.io/kubernetes/pkg/fieldpath"
	"k8s.io/kubernetes/pkg/kubelet/envvars"
	"k8s.io/kubernetes/third_party/forked/golang/expansion"
)

// Objects are the ConfigMaps and Secrets that pods may use; volumes.Objects.
type Objects interface {
	ConfigMap(namespace, name string) (*v1.ConfigMap, error)
	Secret(namespace, name string) (*v1.Secret, error)
}

// Env is a container's environment: ordered for the runtime, by name for
// $(VAR) references.
type Env struct {
	order  []string
	values map[string]string
	// services are variables of services, behind all others.
	services map[string]string
}

// Get is the value of a variable, "" when there is none.
func (e *Env) Get(name string) string { return e.values[name] }

// Expand replaces $(VAR) references; unknown ones stay as they are.
func (e *Env) Expand(s string) string {
	return expansion.Expand(s, expansion.MappingFuncFor(e.values, e.services))
}

func (e *Env) expandAll(in []string) []string {
	if len(in) == 0 {
		return nil
	}
	out := make([]string, len(in))
	for i := range in {
		out[i] = e.Expand(in[i])
	}
	return out
}

func (e *Env) cri() []*runtimeapi.KeyValue {
	out := make([]*runtimeapi.KeyValue, len(e.order))
	for i, k := range e.order {
		out[i] = &runtimeapi.KeyValue{Key: k, Value: []byte(e.values[k])}
	}
	return out
}

func (e *Env) set(name, value string) {
	if _, have := e.values[name]; !have {
		e.order = append(e.order, name)
	}
	e.values[name] = value
}

// EnvSources is where values of a pod's environment come from.
type EnvSources struct {
	Objects Objects
	PodIPs  []string
	// VolumePath of a volume on the host, for fileKeyRef.
	File func(volume, path, key string) (value string, found bool, err error)
	// Services gives the variables of the services of a namespace; links is
	// the pod's enableServiceLinks: without it only the API server's are meant.
	// nil: there is no cluster.
	Services func(namespace string, links bool) (map[string]string, error)
}

// ServiceVariables are those that pods of a namespace get for services, of all
// namespaces: NAME_SERVICE_HOST and so on for those with an address.
func ServiceVariables(services []*v1.Service, namespace string, links bool) map[string]string {
	const master = "kubernetes" // the API server, for every pod
	chosen := map[string]*v1.Service{}
	for _, s := range services {
		switch {
		case s.Spec.ClusterIP == "" || s.Spec.ClusterIP == v1.ClusterIPNone:
		case s.Namespace == v1.NamespaceDefault && s.Name == master:
			if chosen[s.Name] == nil { // the namespace's own comes before it
				chosen[s.Name] = s
			}
		case s.Namespace == namespace && links:
			chosen[s.Name] = s
		}
	}
	out := map[string]string{}
	for _, v := range envvars.FromServices(slices.Collect(maps.Values(chosen))) {
		out[v.Name] = v.Value
	}
	return out
}

// Environment of a container: envFrom first, env over it, as upstream does.
func (n *Node) Environment(pod *v1.Pod, c *v1.Container, src EnvSources) (*Env, error) {
	e := &Env{values: map[string]string{}}
	if src.Services != nil {
		var err error
		links := pod.Spec.EnableServiceLinks == nil || *pod.Spec.EnableServiceLinks
		if e.services, err = src.Services(pod.Namespace, links); err != nil {
			return nil, err
		}
	}
	for i := range c.EnvFrom {
		if err := envFrom(e, pod.Namespace, &c.EnvFrom[i], src.Objects); err != nil {
			return nil, err
		}
	}
	for i := range c.Env {
		v := &c.Env[i]
		switch {
		case v.Value != "":
			e.set(v.Name, e.Expand(v.Value))
		case v.ValueFrom != nil:
			value, found, err := n.valueFrom(pod, c, v.ValueFrom, src)
			if err != nil {
				return nil, err
			}
			if found {
				e.set(v.Name, value)
			}
		default:
			e.set(v.Name, "")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(e.services)) {
		if _, own := e.values[name]; !own {
			e.set(name, e.services[name])
		}
	}
	return e, nil
}

func envFrom(e *Env, namespace string, f *v1.EnvFromSource, objects Objects) error {
	switch {
	case f.ConfigMapRef != nil:
		cm, err := objects.ConfigMap(namespace, f.ConfigMapRef.Name)
		if err != nil {
			return missing(err, f.ConfigMapRef.Optional, "configmap", f.ConfigMapRef.Name)
		}
		for _, k := range slices.Sorted(maps.Keys(cm.Data)) {
			e.set(f.Prefix+k, cm.Data[k])
		}
	case f.SecretRef != nil:
		s, err := objects.Secret(namespace, f.SecretRef.Name)
		if err != nil {
			return missing(err, f.SecretRef.Optional, "secret", f.SecretRef.Name)
		}
		for _, k := range slices.Sorted(maps.Keys(s.Data)) {
			e.set(f.Prefix+k, string(s.Data[k]))
		}
	}
	return nil
}

// missing is nil for an object that is not there and need not be.
func missing(err error, optional *bool, kind, name string) error {
	if !errdefs.IsNotFound(err) {
		return fmt.Errorf("get %s %q: %w", kind, name, err)
	}
	if optional != nil && *optional {
		return nil
	}
	// Upstream's words, which people search for; the cause stays wrapped.
	return &textError{fmt.Sprintf("%s %q not found", kind, name), err}
}

// textError shows text and keeps its cause for errors.Is.
type textError struct {
	text  string
	cause error
}

func (e *textError) Error() string { return e.text }
func (e *textError) Unwrap() error { return e.cause }

func (n *Node) valueFrom(pod *v1.Pod, c *v1.Container, from *v1.EnvVarSource, src EnvSources) (string, bool, error) {
	switch {
	case from.FieldRef != nil:
		v, err := n.field(pod, from.FieldRef, src.PodIPs)
		return v, true, err
	case from.ResourceFieldRef != nil:
		v, err := n.resourceField(pod, c, from.ResourceFieldRef)
		return v, true, err
	case from.ConfigMapKeyRef != nil:
		r := from.ConfigMapKeyRef
		cm, err := src.Objects.ConfigMap(pod.Namespace, r.Name)
		if err != nil {
			return "", false, missing(err, r.Optional, "configmap", r.Name)
		}
		v, ok := cm.Data[r.Key]
		return v, ok, noKey(ok, r.Optional, r.Key, "ConfigMap", pod.Namespace, r.Name)
	case from.SecretKeyRef != nil:
		r := from.SecretKeyRef
		s, err := src.Objects.Secret(pod.Namespace, r.Name)
		if err != nil {
			return "", false, missing(err, r.Optional, "secret", r.Name)
		}
		v, ok := s.Data[r.Key]
		return string(v), ok, noKey(ok, r.Optional, r.Key, "Secret", pod.Namespace, r.Name)
	case from.FileKeyRef != nil && src.File != nil:
		r := from.FileKeyRef
		v, ok, err := src.File(r.VolumeName, r.Path, r.Key)
		if err != nil {
			return "", false, fmt.Errorf("couldn't parse env file %s of volume %s: %w", r.Path, r.VolumeName, err)
		}
		if !ok && (r.Optional == nil || !*r.Optional) {
			return "", false, fmt.Errorf("environment variable key %q not found in file %q of volume %q: %w", r.Key, r.Path, r.VolumeName, errdefs.ErrNotFound)
		}
		return v, ok, nil
	}
	return "", true, nil
}

func noKey(ok bool, optional *bool, key, kind, namespace, name string) error {
	if ok || optional != nil && *optional {
		return nil
	}
	return &textError{fmt.Sprintf("couldn't find key %v in %s %v/%v", key, kind, namespace, name), errdefs.ErrNotFound}
}

// field is the downward API for one field of the pod.
func (n *Node) field(pod *v1.Pod, ref *v1.ObjectFieldSelector, podIPs []string) (string, error) {
	version := ref.APIVersion
	if version == "" {
		version = "v1"
	}
	path, _, err := podshelper.ConvertDownwardAPIFieldLabel(version, ref.FieldPath, "")
	if err != nil {
		return "", err
	}
	first := func(list []string) string {
		if len(list) == 0 {
			return ""
		}
		return list[0]
	}
	if pod.Spec.HostNetwork {
		podIPs = n.HostIPs
	}
	switch path {
	case "spec.nodeName":
		if pod.Spec.NodeName == "" {
			return n.Name, nil
		}
		return pod.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return pod.Spec.ServiceAccountName, nil
	case "status.hostIP":
		return first(n.HostIPs), nil
	case "status.hostIPs":
		return strings.Join(n.HostIPs, ","), nil
	case "status.podIP":
		return first(podIPs), nil
	case "status.podIPs":
		return strings.Join(podIPs, ","), nil
	}
	return fieldpath.ExtractFieldPathAsString(pod, path)
}

// resourceField of the container, or of the one it names; a limit that is not
// set is what the node can give.
func (n *Node) resourceField(pod *v1.Pod, c *v1.Container, ref *v1.ResourceFieldSelector) (string, error) {
	if ref.ContainerName != "" {
		if c = Container(pod, ref.ContainerName); c == nil {
			return "", fmt.Errorf("container %s not found", ref.ContainerName)
		}
	}
	c = c.DeepCopy()
	allocatable := n.Allocatable
	if r := pod.Spec.Resources; r != nil && len(r.Limits) > 0 {
		allocatable = allocatable.DeepCopy()
		for name, q := range r.Limits {
			if _, have := allocatable[name]; have {
				allocatable[name] = q
			}
		}
	}
	resourceapi.MergeContainerResourceLimits(c, allocatable)
	return resourceapi.ExtractContainerResourceValue(ref, c)
}
