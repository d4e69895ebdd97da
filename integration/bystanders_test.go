package integration

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/node"
	kubestatus "github.com/podd-runtime/podd/kubelet/status"
)

// bystanders measures what pods that have nothing to do with the server see.
type bystanders struct {
	n    *node.Node
	made int
	// start is from the manifest to a ready pod, stop from its removal to the
	// pod's end, exec and list one command each.
	start, stop, exec, list []time.Duration
}

func (b *bystanders) round(t *testing.T) {
	t.Helper()
	b.made++
	name := fmt.Sprintf("by%d", b.made)
	since := func(to *[]time.Duration, begun time.Time) { *to = append(*to, time.Since(begun)) }
	begun := time.Now()
	b.n.Write(name+".yaml", pod(name, "", "serve", ":8099")+"    readinessProbe: {httpGet: {port: 8099, path: /}, periodSeconds: 1}\n")
	b.n.WaitPod(name, "ready", 60*second, ready)
	since(&b.start, begun)
	begun = time.Now()
	b.n.OK("exec", node.PodName(name), "--", "/testserver", "env")
	since(&b.exec, begun)
	begun = time.Now()
	b.n.OK("get", "pods")
	since(&b.list, begun)
	begun = time.Now()
	b.n.Remove(name + ".yaml")
	awaitGone(t, b.n, 60*second, name)
	since(&b.stop, begun)
}

// awaitGone waits until there are no such pods; others may stay.
func awaitGone(t *testing.T, n *node.Node, timeout time.Duration, names ...string) {
	t.Helper()
	node.Await(t, strings.Join(names, ", ")+" gone", timeout, func() bool {
		var list v1.PodList
		return n.Get("/api/v1/pods", &list) == nil && !slices.ContainsFunc(list.Items, func(p v1.Pod) bool {
			return slices.ContainsFunc(names, func(name string) bool { return p.Name == node.PodName(name) })
		})
	})
}

func median(d []time.Duration) time.Duration {
	d = slices.Clone(d)
	slices.Sort(d)
	return d[len(d)/2]
}

// compare what they saw with a server that answers and without.
func compare(t *testing.T, alive, dead *bystanders) {
	t.Helper()
	for what, d := range map[string][2][]time.Duration{
		"start": {alive.start, dead.start}, "stop": {alive.stop, dead.stop}, "exec": {alive.exec, dead.exec}, "list": {alive.list, dead.list},
	} {
		a, b := median(d[0]), median(d[1])
		t.Logf("%s: %v with the server, %v without, %.2f times", what, a.Round(time.Millisecond), b.Round(time.Millisecond), float64(b)/float64(a))
		// What is meant is a tenth. A machine that does something else besides
		// shows far more now and then, but never what waiting for the server
		// would make of it: 5 s at the least.
		if b > 2*a+node.Scale(2*time.Second) {
			t.Errorf("%s takes %v without the server, %v with it", what, b, a)
		}
	}
}

func responding(p *v1.Pod) v1.ConditionStatus {
	for _, c := range p.Status.Conditions {
		if c.Type == kubestatus.VolumesResponding {
			return c.Status
		}
	}
	return v1.ConditionTrue
}

// told holds when the pods' conditions say so of their volumes.
func told(want v1.ConditionStatus, names []string) func(map[string]*v1.Pod) bool {
	return func(pods map[string]*v1.Pod) bool {
		for _, name := range names {
			if p := pods["default/"+node.PodName(name)]; p == nil || responding(p) != want {
				return false
			}
		}
		return true
	}
}
