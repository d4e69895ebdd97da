package pods

import (
	"slices"

	v1 "k8s.io/api/core/v1"
)

// uses says whether the pod names a ConfigMap, Secret or claim of that name, or
// any claim where it is a PersistentVolume that has changed (namespace ""). A
// name that fits another kind costs one look too many, which does no harm.
func uses(pod *v1.Pod, namespace, name string) bool {
	if namespace == "" {
		return slices.ContainsFunc(pod.Spec.Volumes, func(v v1.Volume) bool { return v.PersistentVolumeClaim != nil || v.Ephemeral != nil })
	}
	if pod.Namespace != namespace {
		return false
	}
	for i := range pod.Spec.Volumes {
		if volumeUses(&pod.Spec.Volumes[i].VolumeSource, name) {
			return true
		}
	}
	if pullsWith(pod, name) {
		return true
	}
	for _, list := range [][]v1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if containerUses(&list[i], name) {
				return true
			}
		}
	}
	return false
}

// pullsWith says whether the Secret has credentials for the pod's images.
func pullsWith(pod *v1.Pod, secret string) bool {
	return slices.ContainsFunc(pod.Spec.ImagePullSecrets, func(r v1.LocalObjectReference) bool { return r.Name == secret })
}

func volumeUses(v *v1.VolumeSource, name string) bool {
	switch {
	case v.ConfigMap != nil:
		return v.ConfigMap.Name == name
	case v.Secret != nil:
		return v.Secret.SecretName == name
	case v.PersistentVolumeClaim != nil:
		return v.PersistentVolumeClaim.ClaimName == name
	case v.Projected != nil:
		for i := range v.Projected.Sources {
			s := &v.Projected.Sources[i]
			if s.ConfigMap != nil && s.ConfigMap.Name == name || s.Secret != nil && s.Secret.Name == name {
				return true
			}
		}
	}
	return false
}

func containerUses(c *v1.Container, name string) bool {
	for i := range c.EnvFrom {
		f := &c.EnvFrom[i]
		if f.ConfigMapRef != nil && f.ConfigMapRef.Name == name || f.SecretRef != nil && f.SecretRef.Name == name {
			return true
		}
	}
	for i := range c.Env {
		f := c.Env[i].ValueFrom
		if f == nil {
			continue
		}
		if f.ConfigMapKeyRef != nil && f.ConfigMapKeyRef.Name == name || f.SecretKeyRef != nil && f.SecretKeyRef.Name == name {
			return true
		}
	}
	return false
}
