// Package spec turns pods into what the CRI takes: sandbox and container
// configurations. It reads no state but what it is given and the host's
// resolv.conf and hosts files, so that the same pod always gives the same
// configuration.
package spec

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/cgroups"
)

// Node is what of this node goes into its pods.
type Node struct {
	Name string
	// RootDir holds pods/<uid>/…, see the kubelet's --root-dir.
	RootDir string
	// PodLogsDir is /var/log/pods; the links of old log collectors are in its
	// sibling "containers".
	PodLogsDir string
	// SeccompDefault makes RuntimeDefault the profile of containers that name
	// none (KubeletConfiguration.seccompDefault).
	SeccompDefault bool
	// SeccompRoot holds Localhost profiles.
	SeccompRoot string
	DNS         DNS
	// HostIPs are the node's addresses, the preferred one first.
	HostIPs []string
	// Resources shape limits.
	Resources cgroups.PodOptions
	// Allocatable stands for the limits that a container does not have in
	// its downward API.
	Allocatable v1.ResourceList
}

// PodDir is the pod's directory under RootDir.
func (n *Node) PodDir(uid types.UID) string { return filepath.Join(n.RootDir, "pods", string(uid)) }

// Desc is upstream's name of a pod in messages: name_namespace(uid).
func Desc(pod *v1.Pod) string {
	return fmt.Sprintf("%s_%s(%s)", pod.Name, pod.Namespace, pod.UID)
}

// Container finds a container of any kind by name.
func Container(pod *v1.Pod, name string) *v1.Container {
	for i := range pod.Spec.InitContainers {
		if pod.Spec.InitContainers[i].Name == name {
			return &pod.Spec.InitContainers[i]
		}
	}
	for i := range pod.Spec.Containers {
		if pod.Spec.Containers[i].Name == name {
			return &pod.Spec.Containers[i]
		}
	}
	for i := range pod.Spec.EphemeralContainers {
		if pod.Spec.EphemeralContainers[i].Name == name {
			return (*v1.Container)(&pod.Spec.EphemeralContainers[i].EphemeralContainerCommon)
		}
	}
	return nil
}

// Ref is the reference that events about the pod, or about one of its
// containers, carry.
func Ref(pod *v1.Pod, container string) *v1.ObjectReference {
	ref := &v1.ObjectReference{
		Kind: "Pod", APIVersion: "v1", Namespace: pod.Namespace, Name: pod.Name,
		UID: pod.UID, ResourceVersion: pod.ResourceVersion,
	}
	if container == "" {
		return ref
	}
	ref.FieldPath = fmt.Sprintf("spec.containers{%s}", container)
	for i := range pod.Spec.InitContainers {
		if pod.Spec.InitContainers[i].Name == container {
			ref.FieldPath = fmt.Sprintf("spec.initContainers{%s}", container)
		}
	}
	for i := range pod.Spec.EphemeralContainers {
		if pod.Spec.EphemeralContainers[i].Name == container {
			ref.FieldPath = fmt.Sprintf("spec.ephemeralContainers{%s}", container)
		}
	}
	return ref
}

// LogDir is the pod's log directory: <pod-logs-dir>/<namespace>_<name>_<uid>.
func (n *Node) LogDir(namespace, name string, uid types.UID) string {
	return filepath.Join(n.PodLogsDir, strings.Join([]string{namespace, name, string(uid)}, "_"))
}

// LogPath of the attempt's log, relative to LogDir.
func LogPath(container string, attempt int32) string {
	return filepath.Join(container, strconv.Itoa(int(attempt))+".log")
}

// LogLink is the link by which log collectors find a container's log:
// <sibling of pod-logs-dir>/containers/<pod>_<namespace>_<container>-<id>.log.
func (n *Node) LogLink(namespace, pod, container, id string) string {
	const maxName = 255 // of ext4
	name := fmt.Sprintf("%s_%s_%s-%s", pod, namespace, container, id)
	if len(name) > maxName-len(".log") {
		name = name[:maxName-len(".log")]
	}
	return filepath.Join(filepath.Dir(n.PodLogsDir), "containers", name+".log")
}
