package kubelet

import (
	"context"
	"path/filepath"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/kubelet/server/api"
	"github.com/podd-runtime/podd/kubelet/why"
	"github.com/podd-runtime/podd/kubelet/why/evidence"
)

// explain gathers what the parts know of a pod and says what it means.
func (a *agent) explain(ctx context.Context, pod *v1.Pod) api.Diagnosis {
	src := evidence.Source{
		Containers: a.cri, Events: a.events.List,
		Waits: func(ctx context.Context, namespace, name string) why.Waits {
			return why.Waits(a.table.Waits(ctx, namespace, name))
		},
		Problems: func() (out []api.Problem) {
			for _, p := range a.source.Problems() {
				out = append(out, api.Problem(p))
			}
			return out
		},
		Pulls: func() (out []api.Progress) {
			for _, p := range a.images.Pulling() {
				out = append(out, api.Progress{Ref: p.Ref, Stage: p.Stage, Layers: p.Layers, LayersDone: p.LayersDone, Bytes: p.Bytes, Total: p.Total})
			}
			return out
		},
		Pod: func(uid string) string {
			for _, p := range a.table.List() {
				if string(p.UID) == uid {
					return p.Namespace + "/" + p.Name
				}
			}
			return ""
		},
		Holders: a.diskHolders, Images: a.cfg.Images.Dir,
		Dirs: []string{a.cfg.DataDir, a.cfg.RunDir, a.cfg.Pods.Node.RootDir, filepath.Clean(a.cfg.Pods.Node.PodLogsDir)},
	}
	return why.Explain(src.Of(ctx, pod))
}
