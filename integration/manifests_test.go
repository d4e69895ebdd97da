package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/node"
	"github.com/podd-runtime/podd/kubelet/server/api"
)

func TestChangedManifestReplacesThePod(t *testing.T) {
	n := start(t)
	n.Write("web.yaml", pod("web", "", "serve"))
	n.WaitRunning("web")
	first, err := n.Pod("web")
	if err != nil {
		t.Fatal(err)
	}
	n.Write("web.yaml", pod("web", "", "serve", ":9090"))
	p := n.WaitPod("web", "replaced", 30*second, func(p *v1.Pod) bool { return p.UID != first.UID && node.Running(p) })
	if got := p.Spec.Containers[0].Args[1]; got != ":9090" {
		t.Errorf("args: %q", got)
	}
	// A container runs a moment before its program has replaced the shim's init.
	node.Await(t, "the new server running alone", 5*second, func() bool {
		return len(n.Processes("/testserver serve")) == 1 && len(n.Processes("/testserver serve :9090")) == 1
	})
	n.Remove("web.yaml")
	n.WaitGone(10 * second)
}

func TestInvalidManifestKeepsTheLastGoodVersion(t *testing.T) {
	n := start(t)
	n.Write("web.yaml", pod("web", "", "serve"))
	n.WaitRunning("web")
	before, err := n.Pod("web")
	if err != nil {
		t.Fatal(err)
	}
	n.Write("web.yaml", strings.Replace(pod("web", "", "serve"), "image:", "imagge:", 1))
	var problems api.Problems
	node.Await(t, "the problem told", 10*second, func() bool {
		return n.Get(api.Prefix+"/problems", &problems) == nil && len(problems.Items) > 0
	})
	if p := problems.Items[0]; !strings.HasSuffix(p.File, "web.yaml") || p.Document != 1 || p.Line != 9 || !strings.Contains(p.Field, "containers[0].imagge") || !p.Kept {
		t.Errorf("problem: %+v", p)
	}
	if out := n.OK("status"); !strings.Contains(out, "imagge") {
		t.Errorf("status does not tell it:\n%s", out)
	}
	after, err := n.Pod("web")
	if err != nil || after.UID != before.UID || status(after).ContainerID != status(before).ContainerID || !node.Running(after) {
		t.Errorf("the last good version does not go on: %v, %+v", err, after)
	}
	n.Write("web.yaml", pod("web", "", "serve"))
	node.Await(t, "the problem gone", 10*second, func() bool {
		return n.Get(api.Prefix+"/problems", &problems) == nil && len(problems.Items) == 0
	})
}

func TestEditorsFilesAndPartialWritesStartNothing(t *testing.T) {
	n := start(t)
	dir := filepath.Join(n.Dir, "manifests")
	whole := pod("web", "", "serve")
	for name, text := range map[string]string{".web.yaml.swp": "b0VIM", "web.yaml~": whole, "#web.yaml#": whole, "notes.txt": whole} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Create(filepath.Join(dir, "web.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{whole[:60], whole[60:120], whole[120:]} {
		if _, err := f.WriteString(part); err != nil {
			t.Fatal(err)
		}
	}
	f.Close()
	n.WaitRunning("web")
	if pods := n.Pods(); len(pods) != 1 {
		t.Errorf("%d pods", len(pods))
	}
	// About files the events are the node's.
	if out := n.OK("events", "--for", "node/node1"); strings.Contains(out, "Warning") {
		t.Errorf("warnings:\n%s", out)
	}
	var problems api.Problems
	if err := n.Get(api.Prefix+"/problems", &problems); err != nil || len(problems.Items) != 0 {
		t.Errorf("problems: %v, %v", problems.Items, err)
	}
}

func TestManyDocumentsAndJSON(t *testing.T) {
	n := start(t)
	n.Write("many.yaml", pod("a", "", "pause")+"---\n"+pod("b", "", "pause"))
	n.Write("one.json", fmt.Sprintf(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"c"},"spec":{"terminationGracePeriodSeconds":1,"containers":[{"name":"main","image":%q,"args":["pause"]}]}}`, testserver))
	n.WaitRunning("a", "b", "c")
	n.Write("many.yaml", pod("a", "", "pause"))
	n.WaitPods("b gone", 15*second, func(pods map[string]*v1.Pod) bool {
		return len(pods) == 2 && pods["default/"+node.PodName("a")] != nil && pods["default/"+node.PodName("c")] != nil
	})
}

// TestDeletedManifestThatComesBackRestartsThePod: as with the kubelet, however
// soon it comes back.
func TestDeletedManifestThatComesBackRestartsThePod(t *testing.T) {
	n := start(t)
	n.Write("web.yaml", pod("web", "", "serve"))
	n.WaitRunning("web")
	before, err := n.Pod("web")
	if err != nil {
		t.Fatal(err)
	}
	n.Remove("web.yaml")
	n.Write("web.yaml", pod("web", "", "serve"))
	after := n.WaitPod("web", "restarted", 30*second, func(p *v1.Pod) bool {
		return node.Running(p) && status(p).ContainerID != status(before).ContainerID
	})
	if after.UID != before.UID || status(after).RestartCount != 1 {
		t.Errorf("UID %s was %s, restarted %d times, want once", after.UID, before.UID, status(after).RestartCount)
	}
}

// TestCopyOfAManifestDoesNotTakeOver: cp web.yaml web-copy.yaml changes nothing,
// also across a restart of podd, and is told; a rename and an editor's save go on
// as if the copy was not there.
func TestCopyOfAManifestDoesNotTakeOver(t *testing.T) {
	n := start(t)
	n.Write("web.yaml", pod("web", "", "pause"))
	n.WaitRunning("web")
	was, _ := n.Pod("web")
	same := func(what string) {
		t.Helper()
		now, err := n.Pod("web")
		if err != nil || now.UID != was.UID || status(now).ContainerID != status(was).ContainerID {
			t.Fatalf("%s: the pod is another one: %v, %v, %v", what, now.UID, was.UID, err)
		}
	}
	told := func(copied, inForce string) {
		t.Helper()
		node.Await(t, "the copy is told", 20*second, func() bool {
			out := n.OK("status")
			return strings.Contains(out, copied+":") && strings.Contains(out, inForce+", which is in force")
		}, func() string { return n.OK("status") })
		for _, args := range [][]string{{"why"}, {"why", "web"}} {
			if out := n.OK(args...); !strings.Contains(out, copied) || !strings.Contains(out, inForce+", which is in force") {
				t.Errorf("podd %v:\n%s", args, out)
			}
		}
	}
	n.Write("web-copy.yaml", pod("web", "", "serve")) // comes first by name
	told("web-copy.yaml", "web.yaml")
	same("copied")
	n.Signal(syscall.SIGTERM)
	n.Start()
	told("web-copy.yaml", "web.yaml")
	same("restarted")
	manifests := filepath.Join(n.Dir, "manifests")
	if err := os.Rename(filepath.Join(manifests, "web.yaml"), filepath.Join(manifests, "web2.yaml")); err != nil {
		t.Fatal(err)
	}
	told("web-copy.yaml", "web2.yaml")
	same("renamed")
	n.Remove("web2.yaml")
	n.WaitPod("web", "the copy takes over", 30*second, func(p *v1.Pod) bool { return p.UID != was.UID && node.Running(p) })
	if out := n.OK("status"); strings.Contains(out, "in force") {
		t.Errorf("podd status:\n%s", out)
	}
}
