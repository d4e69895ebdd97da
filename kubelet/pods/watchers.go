package pods

import (
	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
	"github.com/podd-runtime/podd/probes"
)

// watch starts the probes of containers that have come up; of a pod that ends
// only those of readiness.
func (w *worker) watch(l *life) {
	for i := range l.o.Containers {
		c := &l.o.Containers[i]
		if c.State != status.Running || c.Starting || l.probed[c.ID] {
			continue
		}
		l.probed[c.ID] = true
		cs := spec.Container(l.d.Pod, c.Name)
		if cs == nil || cs.StartupProbe == nil && cs.LivenessProbe == nil && cs.ReadinessProbe == nil {
			continue
		}
		t := probes.Target{
			ID: c.ID, Pod: l.d.Pod, Container: cs, Ref: spec.Ref(l.d.Pod, c.Name),
			Ending: l.d.Stop != nil,
			PodIP:  firstIP(&w.t.cfg.Node, l.d.Pod, l.sandbox(c.Sandbox)), Started: c.StartedAt,
		}
		if r, ok := l.restored[c.ID]; ok {
			t.Restored = &r
			delete(l.restored, c.ID)
		}
		w.t.probes.Add(t)
	}
}

// unwatch ends the probes of one container.
func (w *worker) unwatch(l *life, id string) {
	if l.probed[id] {
		w.t.probes.Remove(id)
	}
}

// probed takes the result of a probe.
func (w *worker) probed(r probes.Result) {
	if len(w.lives) == 0 {
		return
	}
	l := w.lives[0]
	c := l.container(r.ID)
	if c == nil || c.State != status.Running {
		return
	}
	cs := spec.Container(l.d.Pod, c.Name)
	switch r.Kind {
	case probes.Startup:
		if r.OK {
			c.Started = true
			c.Ready = cs == nil || cs.ReadinessProbe == nil
		} else {
			l.o.Verdicts[c.ID] = Verdict{Startup: true}
		}
	case probes.Liveness:
		l.o.Verdicts[c.ID] = Verdict{Liveness: !r.OK}
	case probes.Readiness:
		c.Ready = r.OK && c.Started
	}
	w.log.Info("probe changed", "container", c.Name, "probe", r.Kind.String(), "ok", r.OK)
}
