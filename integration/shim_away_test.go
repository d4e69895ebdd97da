package integration

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/integration/node"
)

// probed is a pod whose exec probes have one second, and one failure is enough.
func probed(name string) string {
	probe := func(kind, file string) string {
		return fmt.Sprintf("    %s: {periodSeconds: 1, timeoutSeconds: 1, failureThreshold: 1, exec: {command: [touch, /tmp/%s]}}\n", kind, file)
	}
	return box(name) + probe("livenessProbe", "alive") + probe("readinessProbe", "ready")
}

// TestPodsStayHealthyWhileTheShimIsAway stops podd-shim for several periods of
// probes that may not fail once, and kills it then.
func TestPodsStayHealthyWhileTheShimIsAway(t *testing.T) {
	n := start(t)
	n.Write("web.yaml", probed("web"))
	before := n.WaitPod("web", "ready", 60*second, podutil.IsPodReady)
	shim := n.ShimPID()
	if shim == 0 {
		t.Fatal("podd-shim does not answer")
	}
	if err := syscall.Kill(shim, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(4 * second) // the time that this test is about
	if err := syscall.Kill(shim, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	node.Await(t, "podd-shim being back", 30*second, func() bool { now := n.ShimPID(); return now != 0 && now != shim })
	for _, file := range []string{"alive", "ready"} {
		n.OK("exec", node.PodName("web"), "--", "rm", "-f", "/tmp/"+file)
		node.Await(t, file+" being probed again", 30*second, func() bool {
			_, _, err := n.Podd("exec", node.PodName("web"), "--", "test", "-e", "/tmp/"+file)
			return err == nil
		})
	}
	now, err := n.Pod("web")
	if err != nil {
		t.Fatal(err)
	}
	was, is := status(before), status(now)
	if is.RestartCount != was.RestartCount || is.ContainerID != was.ContainerID {
		t.Errorf("restarted: %+v", is)
	}
	_, wasReady := podutil.GetPodCondition(&before.Status, v1.PodReady)
	_, isReady := podutil.GetPodCondition(&now.Status, v1.PodReady)
	if isReady == nil || isReady.Status != v1.ConditionTrue || !isReady.LastTransitionTime.Equal(&wasReady.LastTransitionTime) {
		t.Errorf("readiness changed: %+v, then %+v", wasReady, isReady)
	}
	if out := n.OK("events"); strings.Contains(out, "probe failed") || strings.Contains(out, "Killing") {
		t.Errorf("probes failed:\n%s", out)
	}
}
