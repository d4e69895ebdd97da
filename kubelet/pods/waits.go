package pods

import (
	"context"
	"strings"
	"time"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
)

// Waits is what a pod's worker has in hand: for those who explain it.
type Waits struct {
	// Next is when a container is started or its image is asked for again.
	Next map[string]time.Time
	// Sandbox and Volumes are when these are tried again; zero: no try is due.
	Sandbox, Volumes time.Time
	// Doing names the steps under way: "volumes", "sandbox", "unmount",
	// "remove", or "stop C", "preStop C", "postStart C" of a container C.
	Doing []string
	// Kill is when containers that are being stopped are killed, by name.
	Kill map[string]time.Time
	// Held: no source has spoken for the pod since podd started.
	Held bool
	// Replaced: another pod of the name begins when this one is gone.
	Replaced bool
}

// Waits tells what a pod waits for. It answers empty when the worker does not
// by the end of ctx.
func (t *Table) Waits(ctx context.Context, namespace, name string) Waits {
	w := t.worker(namespace, name)
	if w == nil {
		return Waits{}
	}
	answer := make(chan Waits, 1)
	w.post(func() {
		if len(w.lives) == 0 {
			answer <- Waits{}
			return
		}
		waits := w.lives[0].waiting(w.t.policy, time.Now())
		waits.Replaced = w.next != nil
		answer <- waits
	})
	select {
	case a := <-answer:
		return a
	case <-w.ended:
		return Waits{}
	case <-ctx.Done():
		return Waits{}
	}
}

func (l *life) waiting(pol Policy, now time.Time) Waits {
	out := Waits{Next: map[string]time.Time{}, Kill: map[string]time.Time{}, Held: l.d.Held}
	out.Sandbox = l.o.Retry[Action{Kind: RunSandbox}.key()]
	out.Volumes = l.o.Retry[Action{Kind: SetupVolumes}.key()]
	p := planner{d: &l.d, o: &l.o, pol: pol, now: now}
	next := func(name string, at time.Time) {
		if at.After(out.Next[name]) {
			out.Next[name] = at
		}
	}
	for name, i := range l.o.Images {
		if i.Ref == "" && i.Retry.After(now) {
			next(name, i.Retry)
		}
	}
	for i := range l.o.Containers {
		c := &l.o.Containers[i]
		if l.o.newest(c.Name) == c && c.State == status.Exited && l.d.Stop == nil && !l.o.Completed {
			if s := spec.Container(l.d.Pod, c.Name); s != nil && p.wanted(s, c) {
				next(c.Name, pol.Backoff.Until(l.o.Backoffs[c.Name], ended(c)))
			}
		}
		if k, ok := l.o.Kills[c.ID]; ok && c.Alive() {
			out.Kill[c.Name] = k.deadline()
		}
		for key, what := range map[string]Kind{"stop ": StopContainer, "preStop ": Hook, "postStart ": PostStart} {
			if _, busy := l.o.Busy[Action{Kind: what, ID: c.ID}.key()]; busy {
				out.Doing = append(out.Doing, key+c.Name)
			}
		}
	}
	for key, at := range l.o.Retry {
		if name, ok := strings.CutPrefix(key, "start/"); ok && at.After(now) {
			next(name, at)
		}
	}
	for key := range l.o.Busy {
		switch {
		case key == (Action{Kind: SetupVolumes}).key():
			out.Doing = append(out.Doing, "volumes")
		case key == (Action{Kind: RunSandbox}).key():
			out.Doing = append(out.Doing, "sandbox")
		case key == (Action{Kind: Teardown}).key():
			out.Doing = append(out.Doing, "unmount")
		case strings.HasPrefix(key, "remove/"):
			out.Doing = append(out.Doing, "remove")
		}
	}
	return out
}
