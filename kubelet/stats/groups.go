package stats

import (
	"context"
	"path"

	"github.com/podd-runtime/podd/cgroups"
	"github.com/podd-runtime/podd/cri"
)

// Containers emits the metrics of all pods and containers, and those of the
// groups that no pod is: the whole node ("/") and each class of pods.
func (p *Provider) Containers(ctx context.Context, emit cri.EmitMetric) {
	for _, group := range p.ownGroups() {
		if d, err := cgroups.ReadDetails(group); err == nil {
			cri.EmitGroup(d, p.boot, emit, group)
		}
	}
	p.cfg.Runtime.Metrics(ctx, emit)
}

func (p *Provider) ownGroups() []string {
	out := []string{"/"}
	if p.cfg.PodsGroup == "" || p.cfg.PodsGroup == "/" {
		return out
	}
	out = append(out, p.cfg.PodsGroup)
	base := path.Base(p.cfg.PodsGroup)
	for _, class := range []string{"burstable", "besteffort"} {
		name := class
		if ext := path.Ext(base); ext == ".slice" { // systemd's names hold their parents'
			name = base[:len(base)-len(ext)] + "-" + class + ext
		}
		out = append(out, path.Join(p.cfg.PodsGroup, name))
	}
	return out
}
