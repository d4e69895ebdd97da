package cluster

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podd-runtime/podd/integration/node"
)

// starts of the containers of pods with a label, by pod and container.
func (s *space) starts(selector string) map[string]time.Time {
	s.Helper()
	pods, err := s.pods(s.Context(), selector)
	if err != nil {
		s.Fatal(err)
	}
	out := map[string]time.Time{}
	for i := range pods {
		for _, c := range pods[i].Status.ContainerStatuses {
			if c.State.Running != nil {
				out[string(pods[i].UID)+"/"+c.ContainerID+"/"+strconv.Itoa(int(c.RestartCount))] = c.State.Running.StartedAt.Time
			}
		}
	}
	return out
}

// TestAPIServerGoesAway in the middle of a rollout: what runs keeps running, and
// the rollout is finished when it is back.
func TestAPIServerGoesAway(t *testing.T) {
	long(t)
	n := join(t, "away")
	s := enter(t, "away")
	s.apply(deployment("web", 8, "one"))
	s.awaitRollout("deployment/web")
	keep := serverOf("keep")
	s.create(keep)
	s.awaitReady("keep")
	was := s.starts("app=keep")

	s.apply(deployment("web", 8, "two"))
	s.await("the rollout has begun", time.Minute, func(ctx context.Context) error {
		pods, err := s.pods(ctx, "version=two")
		if err != nil || len(pods) < 2 {
			return fmt.Errorf("%d pods: %w", len(pods), err)
		}
		return nil
	})
	s.StopProgram("kube-apiserver", syscall.SIGKILL)
	// A static pod needs no apiserver, and neither does a restarted podd.
	n.Write("static.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: static, namespace: "+s.name+"}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers: [{name: main, image: "+testserver+", args: [pause]}]\n")
	running := func(pods map[string]*v1.Pod) bool {
		p := pods[s.name+"/static-away"]
		k := pods[s.name+"/keep"]
		return p != nil && node.Running(p) && k != nil && node.Running(k)
	}
	n.WaitPods("a static pod runs without an apiserver", time.Minute, running)
	n.Signal(syscall.SIGKILL)
	n.Start()
	n.WaitPods("the pods are known after a restart without an apiserver", time.Minute, running)

	if err := s.StartProgram("kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	if err := s.AwaitAPI(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.awaitRollout("deployment/web")
	s.awaitVersion("web", "two", 8)
	s.awaitReady("static-away")
	if is := s.starts("app=keep"); !maps.Equal(was, is) {
		t.Errorf("a container was disturbed: %v, then %v", was, is)
	}
	n.Remove("static.yaml")
	s.awaitGone("static-away")
}

// TestPoddIsKilled again and again in the middle of a rollout.
func TestPoddIsKilled(t *testing.T) {
	long(t)
	n := join(t, "killed")
	s := enter(t, "killed")
	const replicas = 16
	s.apply(deployment("web", replicas, "one"))
	s.awaitRollout("deployment/web")
	s.create(serverOf("keep"))
	s.awaitReady("keep")
	was := s.starts("app=keep")
	for i := range 3 {
		version := fmt.Sprint("v", i)
		s.apply(deployment("web", replicas, version))
		s.await("the rollout has begun", time.Minute, func(ctx context.Context) error {
			pods, err := s.pods(ctx, "version="+version)
			if err != nil || len(pods) < 1+i {
				return fmt.Errorf("%d pods: %w", len(pods), err)
			}
			return nil
		})
		n.Signal(syscall.SIGKILL)
		n.Start()
	}
	s.awaitRollout("deployment/web")
	s.awaitVersion("web", "v2", replicas)
	if is := s.starts("app=keep"); !maps.Equal(was, is) {
		t.Errorf("a container was disturbed: %v, then %v", was, is)
	}
}

// TestNoExecute has pods that do not tolerate a taint leave the node, and those
// that do for a while leave it later.
func TestNoExecute(t *testing.T) {
	long(t)
	join(t, "taints")
	s := enter(t, "taints")
	all, few := serverOf("all"), serverOf("few")
	all.Spec.Tolerations = []v1.Toleration{{Key: "test", Operator: v1.TolerationOpExists}}
	seconds := int64(3)
	few.Spec.Tolerations = []v1.Toleration{{Key: "test", Operator: v1.TolerationOpExists, Effect: v1.TaintEffectNoExecute, TolerationSeconds: &seconds}}
	s.create(all, few, serverOf("none"))
	s.awaitReady("all", "few", "none")
	s.kubectl("taint", "node", "taints", "test=yes:NoExecute")
	s.awaitGone("none")
	s.awaitGone("few")
	s.awaitReady("all")
	s.kubectl("taint", "node", "taints", "test-")
}

// TestDrain moves pods from a node to another by kubectl drain, with a
// PodDisruptionBudget, and takes the drained node out of the cluster.
func TestDrain(t *testing.T) {
	long(t)
	join(t, "first")
	s := enter(t, "drain")
	s.apply(deployment("web", 6, "one") + `
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: web}
spec: {minAvailable: 5, selector: {matchLabels: {app: web}}}
`)
	s.awaitRollout("deployment/web")
	join(t, "second")
	s.awaitNode("second", v1.ConditionTrue)
	s.kubectl("drain", "first", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout="+node.Scale(3*time.Minute).String())
	s.awaitVersion("web", "one", 6)
	pods, err := s.pods(t.Context(), "app=web")
	if err != nil {
		t.Fatal(err)
	}
	for i := range pods {
		if pods[i].Spec.NodeName != "second" {
			t.Errorf("%s is on %s", pods[i].Name, pods[i].Spec.NodeName)
		}
	}
	s.kubectl("uncordon", "first")
}

// TestNodeIsDeleted under its pods: it registers again, and the pods that the
// cluster has no more are ended.
func TestNodeIsDeleted(t *testing.T) {
	long(t)
	n := join(t, "gone")
	s := enter(t, "gone")
	s.create(serverOf("web"))
	s.awaitReady("web")
	was := s.awaitNode("gone", v1.ConditionTrue)
	s.kubectl("delete", "node", "gone")
	is := s.awaitNode("gone", v1.ConditionTrue)
	if is.UID == was.UID {
		s.await("another Node", time.Minute, func(ctx context.Context) error {
			is, err := s.Client.CoreV1().Nodes().Get(ctx, "gone", metav1.GetOptions{})
			if err != nil || is.UID == was.UID {
				return fmt.Errorf("it is the old one: %w", err)
			}
			return nil
		})
	}
	s.await("its lease is of the new Node", time.Minute, func(ctx context.Context) error {
		l, err := s.Client.CoordinationV1().Leases("kube-node-lease").Get(ctx, "gone", metav1.GetOptions{})
		if err != nil {
			return err
		}
		now, err := s.Client.CoreV1().Nodes().Get(ctx, "gone", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if len(l.OwnerReferences) != 1 || l.OwnerReferences[0].UID != now.UID {
			return fmt.Errorf("owners %+v, Node %s", l.OwnerReferences, now.UID)
		}
		return nil
	})
	// The pod garbage collector may or may not have taken the pod by then; what
	// the cluster has no more, the node ends.
	s.await("node and cluster agree", 2*time.Minute, func(ctx context.Context) error {
		list, err := s.Client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=gone"})
		if err != nil {
			return err
		}
		var there, here []string
		for i := range list.Items {
			there = append(there, list.Items[i].Name)
		}
		for _, p := range n.Pods() {
			here = append(here, p.Name)
		}
		slices.Sort(there)
		slices.Sort(here)
		if !slices.Equal(there, here) {
			return fmt.Errorf("cluster %q, node %q", there, here)
		}
		return nil
	})
	s.create(serverOf("next"))
	s.awaitReady("next")
}

// TestForceDelete of pods whose node is away: they are ended when it is back.
func TestForceDelete(t *testing.T) {
	long(t)
	n := join(t, "forced")
	s := enter(t, "forced")
	s.create(serverOf("web"))
	s.awaitReady("web")
	n.Signal(syscall.SIGKILL)
	s.kubectl("delete", "pod", "web", "--force", "--grace-period=0")
	if _, err := s.pod(t.Context(), "web"); !apierrors.IsNotFound(err) {
		t.Fatalf("the pod is there: %v", err)
	}
	n.Start()
	n.WaitGone(time.Minute)
}

// TestFinalizer: a pod that somebody's finalizer keeps in the cluster ends here
// once, and does not begin again with each change that is made to it there.
func TestFinalizer(t *testing.T) {
	long(t)
	n := join(t, "final")
	s := enter(t, "final")
	pod := serverOf("web")
	pod.Finalizers = []string{"podd.test/hold"}
	s.create(pod)
	s.awaitReady("web")
	s.kubectl("delete", "pod", "web", "--wait=false", "--grace-period=1")
	n.WaitGone(time.Minute)
	s.kubectl("label", "pod", "web", "changed=yes")
	s.kubectl("patch", "pod", "web", "--type=merge", "-p", `{"metadata":{"finalizers":null}}`)
	s.awaitGone("web")
	b, err := os.ReadFile(filepath.Join(n.Dir, "podd.log"))
	if err != nil {
		t.Fatal(err)
	}
	if begun := strings.Count(string(b), "pod begins"); begun != 1 {
		t.Errorf("the pod began %d times:\n%s", begun, b)
	}
}
