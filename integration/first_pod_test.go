package integration

import (
	"fmt"
	"strings"
	"testing"

	"github.com/podd-runtime/podd/integration/node"
)

func TestFirstPodRunsAndAnswersOnItsHostPort(t *testing.T) {
	n := start(t)
	before := settled(n)
	port := freePort(t)
	n.Write("web.yaml", pod("web", "", "serve", ":8080")+fmt.Sprintf("    ports:\n    - containerPort: 8080\n      hostPort: %d\n", port))
	n.WaitRunning("web")
	p, err := n.Pod("web")
	if err != nil {
		t.Fatal(err)
	}
	if p.Status.PodIP == "" || p.Status.HostIP == "" || p.Spec.NodeName != "node1" {
		t.Errorf("addresses: pod %q host %q node %q", p.Status.PodIP, p.Status.HostIP, p.Spec.NodeName)
	}
	for _, url := range []string{fmt.Sprintf("http://127.0.0.1:%d/hostname", port), "http://" + p.Status.PodIP + ":8080/hostname"} {
		node.Await(t, url+" answering", 10*second, func() bool { return fetch(url) == node.PodName("web") })
	}
	st := status(p)
	if !strings.Contains(st.ContainerID, "://") || !strings.HasPrefix(st.ImageID, "podd.test/testserver@sha256:") && !strings.Contains(st.ImageID, "sha256:") || st.RestartCount != 0 {
		t.Errorf("container status: %+v", st)
	}
	n.Remove("web.yaml")
	n.WaitGone(10 * second)
	if got := fetch(fmt.Sprintf("http://127.0.0.1:%d/", port)); got != "" {
		t.Errorf("the host port still answers: %q", got)
	}
	n.NoLeaks(t, before, 5*second)
}

func TestTwoContainersShareAVolumeAndLocalhost(t *testing.T) {
	n := start(t)
	n.Write("two.yaml", `
apiVersion: v1
kind: Pod
metadata: {name: two}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: server
    image: podd.test/testserver:1
    args: [serve, "127.0.0.1:9000"]
    volumeMounts: [{name: shared, mountPath: /shared}]
  - name: client
    image: podd.test/busybox:1
    command: [sh, -c, "echo from-client > /shared/file; exec sleep 1000"]
    volumeMounts: [{name: shared, mountPath: /shared}]
  volumes: [{name: shared, emptyDir: {}}]
`)
	n.WaitRunning("two")
	name := node.PodName("two")
	node.Await(t, "the file in the other container", 10*second, func() bool {
		out, _, err := n.Podd("exec", name, "-c", "client", "--", "wget", "-q", "-O", "-", "http://127.0.0.1:9000/file?path=/shared/file")
		return err == nil && out == "from-client\n"
	})
}

func TestConfigMapAndSecretDocumentsServePods(t *testing.T) {
	n := start(t)
	n.Write("objects.yaml", `
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {colour: green, page.txt: "first"}
---
apiVersion: v1
kind: Secret
metadata: {name: keys}
stringData: {token: s3cret}
`)
	n.Write("pod.yaml", `
apiVersion: v1
kind: Pod
metadata: {name: reader}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: podd.test/busybox:1
    command: [sleep, "1000"]
    env:
    - {name: COLOUR, valueFrom: {configMapKeyRef: {name: settings, key: colour}}}
    - {name: TOKEN, valueFrom: {secretKeyRef: {name: keys, key: token}}}
    volumeMounts: [{name: settings, mountPath: /settings}]
  volumes: [{name: settings, configMap: {name: settings}}]
`)
	n.WaitRunning("reader")
	name := node.PodName("reader")
	if got := n.OK("exec", name, "--", "sh", "-c", "echo $COLOUR $TOKEN; cat /settings/page.txt"); got != "green s3cret\nfirst" {
		t.Errorf("got %q", got)
	}
	n.Write("objects.yaml", `
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {colour: blue, page.txt: "second"}
---
apiVersion: v1
kind: Secret
metadata: {name: keys}
stringData: {token: s3cret}
`)
	node.Await(t, "the changed page in the volume", 20*second, func() bool {
		out, _, _ := n.Podd("exec", name, "--", "cat", "/settings/page.txt")
		return out == "second"
	})
	if p, err := n.Pod("reader"); err != nil || status(p).RestartCount != 0 {
		t.Errorf("the container was restarted: %v", err)
	}
	if got := n.OK("get", "configmaps"); !strings.Contains(got, "settings") {
		t.Errorf("get configmaps: %q", got)
	}
}
