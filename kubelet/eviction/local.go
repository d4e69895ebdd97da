// Package eviction decides which pods have to go for what they use of the
// node's storage. It is policy alone: figures in, a verdict out.
package eviction

import (
	"fmt"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	resourcehelper "k8s.io/component-helpers/resource"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

// Reason of an evicted pod's status and event; upstream's.
const Reason = "Evicted"

// Grace is what the containers of a pod get that is evicted at once
// (upstream: immediateEvictionGracePeriodSeconds).
const Grace = time.Second

// Local says why a pod has to go for its use of the node's storage, in
// upstream's words (pkg/kubelet/eviction: localStorageEviction); "": it may
// stay. The order is upstream's: a volume, the pod, one container.
func Local(pod *v1.Pod, used *stats.PodStats) (message string) {
	volumes := map[string]uint64{}
	for i := range used.VolumeStats {
		if b := used.VolumeStats[i].UsedBytes; b != nil {
			volumes[used.VolumeStats[i].Name] = *b
		}
	}
	for i := range pod.Spec.Volumes {
		vol := &pod.Spec.Volumes[i]
		if vol.EmptyDir == nil || vol.EmptyDir.SizeLimit == nil || vol.EmptyDir.SizeLimit.Sign() <= 0 {
			continue
		}
		if limit := vol.EmptyDir.SizeLimit; over(volumes[vol.Name], limit) {
			return fmt.Sprintf("Usage of EmptyDir volume %q exceeds the limit %q. ", vol.Name, limit.String()) + fraction(limit)
		}
	}
	limits := resourcehelper.PodLimits(pod, resourcehelper.PodResourcesOptions{})
	if limit, ok := limits[v1.ResourceEphemeralStorage]; ok && over(usedBytes(used.EphemeralStorage), &limit) {
		return fmt.Sprintf("Pod ephemeral local storage usage exceeds the total limit of containers %s. ", limit.String()) + fraction(&limit)
	}
	for i := range used.Containers {
		c := &used.Containers[i]
		for j := range pod.Spec.Containers {
			limit, ok := pod.Spec.Containers[j].Resources.Limits[v1.ResourceEphemeralStorage]
			if !ok || limit.IsZero() || pod.Spec.Containers[j].Name != c.Name {
				continue
			}
			if over(usedBytes(c.Logs)+usedBytes(c.Rootfs), &limit) {
				return fmt.Sprintf("Container %s exceeded its local ephemeral storage limit %q. ", c.Name, limit.String()) + fraction(&limit)
			}
		}
	}
	return ""
}

// fraction adds to upstream's words what a limit says that has a fraction of a
// byte: somebody meant something else.
func fraction(limit *resource.Quantity) string {
	n, ok := strings.CutSuffix(limit.String(), "m")
	if !ok {
		return ""
	}
	return fmt.Sprintf("%sm are thousandths of a byte: write %sM or %sMi. ", n, n, n)
}

func over(used uint64, limit *resource.Quantity) bool {
	return resource.NewQuantity(int64(used), resource.BinarySI).Cmp(*limit) > 0
}

func usedBytes(fs *stats.FsStats) uint64 {
	if fs == nil || fs.UsedBytes == nil {
		return 0
	}
	return *fs.UsedBytes
}
