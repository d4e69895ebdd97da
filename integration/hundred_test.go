package integration

import (
	"fmt"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/node"
)

func TestHundredPodsComeAndGoAndLeaveNothing(t *testing.T) {
	n := start(t)
	before := settled(n)

	const count = 100
	begin := time.Now()
	var names []string
	for i := range count {
		name := fmt.Sprintf("p%d.yaml", i)
		names = append(names, name)
		n.Write(name, pod(fmt.Sprintf("p%d", i), "", "pause"))
	}
	n.WaitPods("100 running", 120*second, func(pods map[string]*v1.Pod) bool {
		running := 0
		for _, p := range pods {
			if node.Running(p) {
				running++
			}
		}
		return running == count
	})
	t.Logf("100 pods run after %v", time.Since(begin))
	if veths := len(n.Count().Links) - len(before.Links); veths < count {
		t.Errorf("%d veths are counted for %d pods: the count sees no leak of them", veths, count)
	}
	addresses := map[string]string{}
	for _, p := range n.Pods() {
		if other := addresses[p.Status.PodIP]; other != "" || p.Status.PodIP == "" {
			t.Errorf("%s has the address %q of %s", p.Name, p.Status.PodIP, other)
		}
		addresses[p.Status.PodIP] = p.Name
	}
	begin = time.Now()
	n.Remove(names...)
	n.WaitGone(60 * second)
	took := time.Since(begin)
	t.Logf("100 pods are gone after %v", took)
	if took > node.Scale(15*second) {
		t.Errorf("gone after %v, want 15 s", took)
	}
	n.NoLeaks(t, before, 10*second)
}
