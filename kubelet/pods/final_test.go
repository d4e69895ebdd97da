package pods

import (
	"context"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/kubelet/status"
)

// A pod of an apiserver that the node has ended stays so, whatever comes after:
// its replacement runs by now.
func TestTerminalIsFinalForPodsOfAnAPI(t *testing.T) {
	told := func(n *node, p *v1.Pod) { // as it was before: our report came to nobody
		n.table.SetPod("file", p)
		n.table.Synced("file")
	}
	for how, then := range map[string]func(t *testing.T, n *node, p *v1.Pod){
		"the shutdown is called off": func(_ *testing.T, n *node, p *v1.Pod) { n.table.Hold(context.Background(), false) },
		"next boot":                  func(_ *testing.T, n *node, p *v1.Pod) { n.stop(); n.start(); told(n, p) },
		"kill -9":                    func(_ *testing.T, n *node, p *v1.Pod) { n.crash(); n.start(); told(n, p) },
		"kill -9, record lost": func(_ *testing.T, n *node, p *v1.Pod) {
			st := n.get("web").Status
			n.crash()
			n.wipeRecords()
			n.start()
			p = p.DeepCopy()
			p.Status = st
			told(n, p)
		},
		"another spec": func(_ *testing.T, n *node, p *v1.Pod) {
			n.table.Hold(context.Background(), false)
			p = p.DeepCopy()
			p.Generation++
			p.Spec.Containers[0].Image = "img:2"
			told(n, p)
		},
		"a user restarts it": func(t *testing.T, n *node, p *v1.Pod) {
			n.table.Hold(context.Background(), false)
			if err := n.table.Restart(t.Context(), "default", "web", ""); err == nil {
				t.Error("it can be restarted")
			}
		},
	} {
		for end, reason := range map[string]string{"shutdown": "Terminated", "evicted": "Evicted", "user": "Stopped"} {
			t.Run(end+", "+how, func(t *testing.T) {
				bubble(t, func(t *testing.T, n *node) {
					pod := mkpod("web", "u1", ofAPI)
					pod.Generation = 1
					told(n, pod)
					after(5 * time.Second)
					switch end {
					case "shutdown":
						n.table.Hold(context.Background(), true)
						n.table.Terminate(t.Context(), "default", "web", time.Second, status.Cause{Reason: "Terminated", Message: "going down"})
					case "evicted":
						n.table.Evict("u1", "too much")
					default:
						n.table.Stop(t.Context(), "default", "web", nil)
					}
					after(time.Minute)
					before := n.get("web").Status
					if before.Phase != v1.PodFailed || before.Reason != reason {
						t.Fatalf("status %+v", before)
					}
					then(t, n, pod)
					after(10 * time.Minute)
					if k := n.rt.starts("default/web/a"); k != 1 {
						t.Errorf("started %d times", k)
					}
					if st := n.get("web").Status; st.Phase != v1.PodFailed || st.Reason != reason || disrupted(&st) != disrupted(&before) {
						t.Errorf("status %+v", st)
					}
					n.table.RemovePod("file", "u1")
					after(time.Minute)
					n.empty()
				})
			})
		}
	}
}

// What the apiserver says is over ends here: others may have its place, its
// addresses and its volumes.
func TestPodThatItsApiserverSaysIsOverEnds(t *testing.T) {
	for _, how := range []string{"told", "told after a restart"} {
		t.Run(how, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				pod := mkpod("web", "u1", ofAPI)
				n.set(pod)
				after(5 * time.Second)
				over := pod.DeepCopy()
				over.Status = v1.PodStatus{Phase: v1.PodFailed, Reason: "NodeLost", Message: "by the garbage collector"}
				if how != "told" {
					n.stop()
					n.start()
				}
				n.set(over)
				after(time.Minute)
				for range 2 {
					if st := n.get("web").Status; len(n.rt.live("default/web")) != 0 || st.Phase != v1.PodFailed || st.Reason != "NodeLost" {
						t.Fatalf("live %d, status %+v", len(n.rt.live("default/web")), st)
					}
					n.crash()
					n.start()
					n.set(pod)
					after(time.Minute)
				}
			})
		})
	}
}
