package kubelet

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/kubelet/eviction"
	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/status"
	"github.com/podd-runtime/podd/volumes"
)

// storageWait is how long a look at a pod's storage may wait for the first
// measurement of its layers; then it is looked at with the next.
const storageWait = 10 * time.Second

// limitStorage evicts a pod that takes more of the node's storage than it may.
// In a cluster static pods stay, as upstream has it: nobody would make another
// one. On a node of its own nothing but static pods could be limited.
func (a *agent) limitStorage(ctx context.Context, pod *v1.Pod) {
	if status.Over(pod.Status.Phase) || a.cluster != nil && pod.Annotations[manifests.ConfigSourceAnnotation] == manifests.SourceName {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, storageWait)
	defer cancel()
	used, err := a.stats.Storage(ctx, pod)
	if err != nil {
		if !errdefs.IsNotFound(err) && ctx.Err() == nil {
			a.log.Debug("storage of a pod is not measured", "namespace", pod.Namespace, "pod", pod.Name, "error", err)
		}
		return
	}
	if used.EphemeralStorage == nil && ctx.Err() == nil {
		a.log.Warn("what a pod has on disk is not known, its limit is looked at again", "namespace", pod.Namespace, "pod", pod.Name)
	}
	if message := eviction.Local(pod, used); message != "" {
		a.table.Evict(pod.UID, message)
	}
}

func (a *agent) volumesTroubled(uid types.UID, troubles []volumes.Trouble) {
	var words []string
	for _, t := range troubles {
		words = append(words, t.String())
	}
	a.table.VolumesTroubled(uid, words)
}
