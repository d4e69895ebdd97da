package pods

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
)

// change an object that pods use.
func (n *node) change(name string) {
	n.vols.mu.Lock()
	n.vols.objects++
	n.vols.mu.Unlock()
	n.table.ObjectChanged("default", name)
}

// holds fails the test unless the pod's volumes show what is now.
func (n *node) holds(p *v1.Pod) {
	n.t.Helper()
	n.vols.mu.Lock()
	defer n.vols.mu.Unlock()
	if have, want := n.vols.holds[p.UID], fmt.Sprint(n.vols.objects, p.Labels); have != want {
		n.t.Errorf("the volumes hold %s, want %s", have, want)
	}
}

func usesObject(p *v1.Pod) {
	p.Spec.Volumes = []v1.Volume{{Name: "v", VolumeSource: v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{LocalObjectReference: v1.LocalObjectReference{Name: "cm"}}}}}
}

func labelled(p *v1.Pod, value string) *v1.Pod {
	p = p.DeepCopy()
	p.Labels = map[string]string{"l": value}
	return p
}

// What volumes are made of reaches them, whenever it changes: while they are
// set up, while a refresh is under way, and when one fails or never answers.
func TestNoUpdateOfVolumesIsLost(t *testing.T) {
	for _, call := range []string{"Setup!", "Refresh"} {
		for _, how := range []string{"slow", "fails", "hangs"} {
			t.Run(call+" "+how, func(t *testing.T) {
				bubble(t, func(t *testing.T, n *node) {
					tries := 0
					n.rt.setFault(func(ctx context.Context, what, _ string) error {
						if what != call {
							return nil
						}
						if tries++; tries > 2 {
							return nil
						}
						switch how {
						case "slow":
							time.Sleep(10 * time.Second)
						case "fails":
							return errors.New("not now")
						default:
							time.Sleep(5 * time.Minute) // and listens to nobody
							return ctx.Err()
						}
						return nil
					})
					pod := mkpod("web", "u1", usesObject)
					n.set(pod)
					after(time.Second)
					for i := range 5 {
						n.change("cm")
						pod = labelled(pod, fmt.Sprint(i))
						n.set(pod)
						after(time.Second)
					}
					after(30 * time.Minute)
					n.holds(pod)
					n.rt.mu.Lock()
					calls := n.rt.calls["Refresh"] + n.rt.calls["Setup!"]
					n.rt.mu.Unlock()
					if calls > 10 {
						t.Errorf("%d calls", calls)
					}
				})
			})
		}
	}
}

// A pod that ends is not refreshed while its volumes are taken away.
func TestNoRefreshDuringTeardown(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		busy := false
		n.rt.setFault(func(_ context.Context, what, _ string) error {
			switch what {
			case "Refresh":
				busy = true
				time.Sleep(3 * time.Second)
				busy = false
			case "Teardown":
				if busy {
					t.Error("volumes are taken away while they are refreshed")
				}
			}
			return nil
		})
		n.set(mkpod("web", "u1", usesObject))
		after(5 * time.Second)
		n.change("cm")
		after(time.Second)
		n.table.RemovePod("file", "u1")
		n.change("cm")
		after(time.Minute)
		n.empty()
	})
}
