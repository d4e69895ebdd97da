package control

import (
	"context"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podd-runtime/podd/integration/node"
)

// NewNode is a podd that will join the cluster under that name when it is
// started. At its end the pods that are bound to it are deleted, it is stopped,
// and the Node is deleted.
func (p *Plane) NewNode(t testing.TB, name string, flags ...string) *node.Node {
	t.Helper()
	kubeconfig, err := p.Node(name)
	if err != nil {
		t.Fatal(err)
	}
	return p.NewNodeWith(t, name, append([]string{
		"--kubeconfig", kubeconfig, "--client-ca-file", filepath.Join(p.Dir, "pki", "ca.crt"), "--port", strconv.Itoa(FreePort(t)),
	}, flags...)...)
}

// FreePort is one that nobody listens on.
func FreePort(t testing.TB) int {
	t.Helper()
	ports, err := freePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	return ports[0]
}

// SigningDuration is how long certificates live that the cluster signs until
// the test ends.
func (p *Plane) SigningDuration(t testing.TB, d time.Duration) {
	t.Helper()
	set := func(duration string) {
		p.StopProgram("kube-controller-manager", syscall.SIGTERM)
		p.signing = duration
		if err := p.StartProgram("kube-controller-manager"); err != nil {
			t.Error(err)
		}
	}
	set(d.String())
	t.Cleanup(func() { set("") })
}

// NewNodeWith is NewNode with credentials of the caller's.
func (p *Plane) NewNodeWith(t testing.TB, name string, flags ...string) *node.Node {
	t.Helper()
	t.Cleanup(func() { p.forget(t, name) })
	n := node.New(t, append([]string{"--hostname-override", name}, flags...)...)
	t.Cleanup(func() { p.leave(t, n, name) })
	return n
}

// leave has a node's pods leave it. Nothing new is bound to it, and its
// pods are deleted until none is left.
func (p *Plane) leave(t testing.TB, n *node.Node, name string) {
	ctx, cancel := context.WithTimeout(context.Background(), node.Scale(time.Minute))
	defer cancel()
	_, err := p.Client.CoreV1().Nodes().Patch(ctx, name, "application/merge-patch+json", []byte(`{"spec":{"unschedulable":true}}`), metav1.PatchOptions{})
	if err != nil {
		t.Logf("cordon %s: %v", name, err)
	}
	grace := int64(0)
	for ctx.Err() == nil {
		list, err := p.Client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + name})
		if err != nil {
			t.Logf("pods of %s: %v", name, err)
			break
		}
		if len(list.Items) == 0 && bound(n.Pods()) == 0 {
			break
		}
		for i := range list.Items {
			_ = p.Client.CoreV1().Pods(list.Items[i].Namespace).Delete(ctx, list.Items[i].Name, metav1.DeleteOptions{GracePeriodSeconds: &grace})
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// forget a Node whose podd has ended: one that runs would register it again.
func (p *Plane) forget(t testing.TB, name string) {
	ctx, cancel := context.WithTimeout(context.Background(), node.Scale(time.Minute))
	defer cancel()
	if err := p.Client.CoreV1().Nodes().Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		t.Logf("delete node %s: %v", name, err)
	}
}

// bound counts the pods that are of the apiserver.
func bound(pods []v1.Pod) int {
	n := 0
	for i := range pods {
		if pods[i].Annotations["kubernetes.io/config.source"] != "file" {
			n++
		}
	}
	return n
}
