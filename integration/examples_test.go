package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/images"
	"github.com/podd-runtime/podd/integration/node"
)

// private starts a registry that wants a password and has nginx.
func private(t *testing.T) *images.Registry {
	t.Helper()
	r, err := images.Serve("127.0.0.1:0", "podd", "example")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	if _, err := r.Push(t.Context(), "web/nginx:1", image(t, "nginx")); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestExampleManifests(t *testing.T) {
	n := start(t)
	r := private(t)
	tar := filepath.Join(t.TempDir(), "examples.tar")
	if err := images.WriteTar(tar, images.Tag{Ref: "example/busybox:1", Image: image(t, "busybox")}, images.Tag{Ref: "example/redis:1", Image: image(t, "redis")}); err != nil {
		t.Fatal(err)
	}
	if out := n.OK("load", tar); !strings.Contains(out, "example/redis:1") {
		t.Fatalf("load: %q", out)
	}
	port := freePort(t)
	here := strings.NewReplacer("127.0.0.1:18500", r.Addr, "18080", fmt.Sprint(port))
	found, err := filepath.Glob("../examples/manifests/*.yaml")
	if err != nil || len(found) < 3 {
		t.Fatalf("examples: %v, %v", found, err)
	}
	for _, f := range found {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		n.Write(filepath.Base(f), here.Replace(string(b)))
	}
	n.WaitRunning("web", "redis", "shared")
	url := fmt.Sprintf("http://127.0.0.1:%d/", port)
	node.Await(t, "nginx answering with its ConfigMap's page", 10*second, func() bool { return strings.Contains(fetch(url), "It works") })
	if r.Refused.Load() == 0 && r.Requests.Load() == 0 {
		t.Error("nginx did not come from the private registry")
	}
	node.Await(t, "redis answering", 10*second, func() bool {
		out, _, _ := n.Podd("exec", node.PodName("redis"), "--", "redis-cli", "config", "get", "maxmemory")
		return strings.Contains(out, "33554432")
	})
	if out, _, _ := n.Podd("exec", node.PodName("redis"), "--", "sh", "-c", "REDISCLI_AUTH= redis-cli ping"); !strings.Contains(out, "NOAUTH") {
		t.Errorf("redis lets everybody in: %q", out)
	}
	node.Await(t, "the reader seeing the other container's page", 15*second, func() bool {
		out, _, _ := n.Podd("logs", node.PodName("shared"), "-c", "reader")
		return strings.Contains(out, "20")
	})
	if out := n.OK("logs", node.PodName("web")); !strings.Contains(out, "GET /") {
		t.Errorf("nginx' log: %q", out)
	}
}

func TestPrivateRegistryWantsThePodsPassword(t *testing.T) {
	n := start(t)
	r := private(t)
	manifest := func(name, password string) string {
		return fmt.Sprintf(`
apiVersion: v1
kind: Secret
metadata: {name: %[1]s}
type: kubernetes.io/dockerconfigjson
stringData:
  .dockerconfigjson: '{"auths":{%[2]q:{"username":"podd","password":%[3]q}}}'
---
apiVersion: v1
kind: Pod
metadata: {name: %[1]s}
spec:
  terminationGracePeriodSeconds: 1
  imagePullSecrets: [{name: %[1]s}]
  containers:
  - {name: main, image: "%[2]s/web/nginx:1", imagePullPolicy: Always}
`, name, r.Addr, password)
	}
	n.Write("wrong.yaml", manifest("wrong", "guess"))
	p := n.WaitPod("wrong", "refused", 30*second, func(p *v1.Pod) bool {
		w := status(p).State.Waiting
		return w != nil && (w.Reason == "ErrImagePull" || w.Reason == "ImagePullBackOff")
	})
	if m := status(p).State.Waiting.Message; strings.Contains(m, "guess") {
		t.Errorf("the message tells the password: %q", m)
	}
	n.Write("right.yaml", manifest("right", "example"))
	n.WaitRunning("right")
	if _, errOut, err := n.Podd("pull", r.Addr+"/web/nginx:1"); err == nil {
		t.Errorf("pulled without a password: %s", errOut)
	}
	n.OK("pull", "--creds", "podd:example", r.Addr+"/web/nginx:1")
}
