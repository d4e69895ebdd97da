package spec

import (
	"encoding/json"
	"hash/fnv"
	"strconv"

	v1 "k8s.io/api/core/v1"
	kubelettypes "k8s.io/kubelet/pkg/types"
)

// The labels and annotations that upstream's kubelet sets, so that crictl,
// log collectors and an upstream kubelet read our containers, and we theirs.
const (
	LabelPodName       = kubelettypes.KubernetesPodNameLabel
	LabelPodNamespace  = kubelettypes.KubernetesPodNamespaceLabel
	LabelPodUID        = kubelettypes.KubernetesPodUIDLabel
	LabelContainerName = kubelettypes.KubernetesContainerNameLabel

	AnnHash                     = "io.kubernetes.container.hash"
	AnnRestartCount             = "io.kubernetes.container.restartCount"
	AnnTerminationMessagePath   = "io.kubernetes.container.terminationMessagePath"
	AnnTerminationMessagePolicy = "io.kubernetes.container.terminationMessagePolicy"
	AnnPreStopHandler           = "io.kubernetes.container.preStopHandler"
	AnnPorts                    = "io.kubernetes.container.ports"
	AnnDeletionGracePeriod      = "io.kubernetes.pod.deletionGracePeriod"
	AnnTerminationGracePeriod   = "io.kubernetes.pod.terminationGracePeriod"
)

func sandboxLabels(pod *v1.Pod) map[string]string {
	l := make(map[string]string, len(pod.Labels)+3)
	for k, v := range pod.Labels {
		l[k] = v
	}
	l[LabelPodName], l[LabelPodNamespace], l[LabelPodUID] = pod.Name, pod.Namespace, string(pod.UID)
	return l
}

func containerLabels(pod *v1.Pod, c *v1.Container) map[string]string {
	return map[string]string{
		LabelPodName: pod.Name, LabelPodNamespace: pod.Namespace, LabelPodUID: string(pod.UID),
		LabelContainerName: c.Name,
	}
}

func containerAnnotations(pod *v1.Pod, c *v1.Container, attempt int32) map[string]string {
	a := map[string]string{
		AnnHash:                     hash(c),
		AnnRestartCount:             strconv.Itoa(int(attempt)),
		AnnTerminationMessagePath:   c.TerminationMessagePath,
		AnnTerminationMessagePolicy: string(c.TerminationMessagePolicy),
	}
	if g := pod.DeletionGracePeriodSeconds; g != nil {
		a[AnnDeletionGracePeriod] = strconv.FormatInt(*g, 10)
	}
	if g := pod.Spec.TerminationGracePeriodSeconds; g != nil {
		a[AnnTerminationGracePeriod] = strconv.FormatInt(*g, 10)
	}
	if c.Lifecycle != nil && c.Lifecycle.PreStop != nil {
		if b, err := json.Marshal(c.Lifecycle.PreStop); err == nil {
			a[AnnPreStopHandler] = string(b)
		}
	}
	if len(c.Ports) > 0 {
		if b, err := json.Marshal(c.Ports); err == nil {
			a[AnnPorts] = string(b)
		}
	}
	return a
}

// hash names name and image for readers of the annotation. We never compare
// it: what was applied is in the pod's record.
func hash(c *v1.Container) string {
	h := fnv.New32a()
	h.Write([]byte(c.Name + "\x00" + c.Image))
	return strconv.FormatUint(uint64(h.Sum32()), 16)
}
