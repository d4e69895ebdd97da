package config

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// Reserved is what is kept from pods for the system and for the node agent.
func (c *Config) Reserved() v1.ResourceList {
	out := v1.ResourceList{}
	for _, m := range []map[string]string{c.Kubelet.KubeReserved, c.Kubelet.SystemReserved} {
		for name, text := range m {
			q, err := resource.ParseQuantity(text)
			if err != nil {
				continue // check has refused it
			}
			sum := out[v1.ResourceName(name)]
			sum.Add(q)
			out[v1.ResourceName(name)] = sum
		}
	}
	return out
}

// Upstream's hard eviction thresholds when none are set.
var defaultThresholds = map[string]string{"memory.available": "100Mi", "nodefs.available": "10%"}

// Thresholds are the free memory and disk below which the node is under
// pressure: evictionHard's, or upstream's defaults. Pods may not have those
// either.
func (c *Config) Thresholds(capacity v1.ResourceList) v1.ResourceList {
	set := c.Kubelet.EvictionHard
	if len(set) == 0 {
		set = defaultThresholds
	}
	out := v1.ResourceList{}
	for signal, name := range map[string]v1.ResourceName{"memory.available": v1.ResourceMemory, "nodefs.available": v1.ResourceEphemeralStorage} {
		text, ok := set[signal]
		if !ok {
			continue
		}
		if share, ok := strings.CutSuffix(text, "%"); ok {
			if f, err := strconv.ParseFloat(share, 64); err == nil {
				whole := capacity[name]
				out[name] = *resource.NewQuantity(int64(float64(whole.Value())*f/100), resource.BinarySI)
			}
			continue
		}
		if q, err := resource.ParseQuantity(text); err == nil {
			out[name] = q
		}
	}
	return out
}

// Taints that the Node is registered with.
func (c *Config) Taints() []v1.Taint {
	out := c.Kubelet.RegisterWithTaints
	more, _ := parseTaints(c.Podd.RegisterWithTaints) // check has refused a bad one
	return append(out[:len(out):len(out)], more...)
}

// parseTaints reads key=value:Effect,key:Effect.
func parseTaints(text string) ([]v1.Taint, error) {
	var out []v1.Taint
	for one := range strings.SplitSeq(text, ",") {
		if one == "" {
			continue
		}
		what, effect, ok := strings.Cut(one, ":")
		key, value, _ := strings.Cut(what, "=")
		t := v1.Taint{Key: key, Value: value, Effect: v1.TaintEffect(effect)}
		switch t.Effect {
		case v1.TaintEffectNoSchedule, v1.TaintEffectPreferNoSchedule, v1.TaintEffectNoExecute:
		default:
			ok = false
		}
		if !ok || key == "" {
			return nil, fmt.Errorf("taint %q: write key=value:Effect with NoSchedule, PreferNoSchedule or NoExecute: %w", one, errdefs.ErrInvalidArgument)
		}
		out = append(out, t)
	}
	return out, nil
}
