package cluster

import (
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podd-runtime/podd/integration/node"
)

// TestNode is a node's life as the apiserver sees it: registration and lease,
// a pod that is bound, uses a ConfigMap and is deleted, and a mirror pod.
func TestNode(t *testing.T) {
	p := plane(t)
	n := join(t, "one")
	nodes := p.Client.CoreV1().Nodes()
	node.Await(t, "registered and ready", time.Minute, func() bool {
		is, err := nodes.Get(t.Context(), "one", metav1.GetOptions{})
		if err != nil {
			return false
		}
		for _, c := range is.Status.Conditions {
			if c.Type == v1.NodeReady {
				return c.Status == v1.ConditionTrue && is.Status.Capacity.Pods().Value() == 110
			}
		}
		return false
	})
	node.Await(t, "a lease", time.Minute, func() bool {
		l, err := p.Client.CoordinationV1().Leases("kube-node-lease").Get(t.Context(), "one", metav1.GetOptions{})
		return err == nil && len(l.OwnerReferences) == 1 && l.OwnerReferences[0].Kind == "Node"
	})
	const namespace = "node-test"
	if _, err := p.Client.CoreV1().Namespaces().Create(t.Context(), &v1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	node.Await(t, "the controllers' service account", time.Minute, func() bool {
		_, err := p.Client.CoreV1().ServiceAccounts(namespace).Get(t.Context(), "default", metav1.GetOptions{})
		return err == nil
	})
	if _, err := p.Client.CoreV1().ConfigMaps(namespace).Create(t.Context(), &v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "words"}, Data: map[string]string{"word": "one"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pods := p.Client.CoreV1().Pods(namespace)
	short := int64(1)
	pod := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "bound"},
		Spec: v1.PodSpec{
			NodeName: "one", TerminationGracePeriodSeconds: &short,
			Containers: []v1.Container{{
				Name: "main", Image: testserver, Args: []string{"pause"},
				Env: []v1.EnvVar{{Name: "WORD", ValueFrom: &v1.EnvVarSource{ConfigMapKeyRef: &v1.ConfigMapKeySelector{
					LocalObjectReference: v1.LocalObjectReference{Name: "words"}, Key: "word"}}}},
			}},
		},
	}
	if _, err := pods.Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	ready := func(name string) bool {
		is, err := pods.Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return false
		}
		for _, c := range is.Status.Conditions {
			if c.Type == v1.PodReady {
				return c.Status == v1.ConditionTrue && is.Status.PodIP != ""
			}
		}
		return false
	}
	node.Await(t, "the bound pod ready", time.Minute, func() bool { return ready("bound") })

	// The apiserver asks the node's own API, which asks back whether it may.
	if log, err := pods.GetLogs("bound", &v1.PodLogOptions{Timestamps: true}).DoRaw(t.Context()); err != nil {
		t.Errorf("logs through the apiserver: %v, %s", err, log)
	}
	if _, err := p.Client.CoreV1().RESTClient().Get().Resource("nodes").Name("one").SubResource("proxy").Suffix("stats/summary").DoRaw(t.Context()); err != nil {
		t.Errorf("statistics through the apiserver: %v", err)
	}

	// One that does not fit is rejected, with upstream's reason.
	big := pod.DeepCopy()
	big.Name = "big"
	big.Spec.NodeSelector = map[string]string{"no": "such"}
	if _, err := pods.Create(t.Context(), big, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	node.Await(t, "the other pod rejected", time.Minute, func() bool {
		is, err := pods.Get(t.Context(), "big", metav1.GetOptions{})
		return err == nil && is.Status.Phase == v1.PodFailed && is.Status.Reason == "NodeAffinity" && strings.HasPrefix(is.Status.Message, "Pod was rejected: ")
	})

	// A static pod has a mirror, which comes again when it is deleted.
	n.Write("static.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: static, namespace: "+namespace+"}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers: [{name: main, image: "+testserver+", args: [pause]}]\n")
	node.Await(t, "a mirror pod ready", time.Minute, func() bool { return ready("static-one") })
	before, err := pods.Get(t.Context(), "static-one", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := pods.Delete(t.Context(), "static-one", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	node.Await(t, "the mirror pod anew", time.Minute, func() bool {
		is, err := pods.Get(t.Context(), "static-one", metav1.GetOptions{})
		return err == nil && is.UID != before.UID && ready("static-one")
	})

	// podd goes and comes: the pod is the same.
	bound, err := pods.Get(t.Context(), "bound", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n.Signal(9)
	n.Start()
	if err := pods.Delete(t.Context(), "bound", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	node.Await(t, "the deleted pod gone", time.Minute, func() bool {
		_, err := pods.Get(t.Context(), "bound", metav1.GetOptions{})
		return err != nil
	})
	if bound.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Error("the container was restarted")
	}

	// A Node that is deleted is registered again.
	was, err := nodes.Get(t.Context(), "one", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := nodes.Delete(t.Context(), "one", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	node.Await(t, "the node registered again", time.Minute, func() bool {
		is, err := nodes.Get(t.Context(), "one", metav1.GetOptions{})
		return err == nil && is.UID != was.UID
	})
	n.Remove("static.yaml")
	node.Await(t, "the mirror pod gone", time.Minute, func() bool {
		_, err := pods.Get(t.Context(), "static-one", metav1.GetOptions{})
		return err != nil
	})
}
