package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/podd-runtime/podd/integration/node"
)

// racer is the attacker of cri/shim/server's tests; $PODD_TEST_PROGRAMS has it
// where there is no compiler.
func racer(t *testing.T) (dir string) {
	t.Helper()
	if dir := os.Getenv("PODD_TEST_PROGRAMS"); dir != "" {
		return dir
	}
	dir = t.TempDir()
	out, err := exec.Command("cc", "-O2", "-static", "-o", filepath.Join(dir, "racer"), "../cri/shim/server/testdata/racer.c").CombinedOutput()
	if err != nil {
		t.Fatalf("build racer: %v\n%s", err, out)
	}
	return dir
}

var racerVerdict = regexp.MustCompile(`caught (\d+), reached (\d+)`)

// TestTracerReachesNothingBesideProbesAndHooks: a pod may trace and nothing
// else; it does so to whatever probes, hooks, execs and the starts of its other
// container bring into its PID namespace, and has no more than before.
func TestTracerReachesNothingBesideProbesAndHooks(t *testing.T) {
	if node.Scale(second) > 4*second {
		t.Skip("three racers leave an emulated machine no time for anything else: those of cri/shim/server attack it one by one")
	}
	programs, seconds := racer(t), 4
	if os.Getenv("PODD_TEST_ALL") != "" {
		seconds = 60
	}
	n := start(t)
	names := map[string]string{
		"own":    "",
		"shared": "  shareProcessNamespace: true\n",
		"mapped": "  shareProcessNamespace: true\n  hostUsers: false\n",
	}
	for name, spec := range names {
		n.Write(name+".yaml", fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 2
%s  volumes: [{name: r, hostPath: {path: %q}}]
  containers:
  - name: racer
    image: podd.test/busybox:1
    command: [sh, -c, "/r/racer %d; sleep 1000"]
    volumeMounts: [{name: r, mountPath: /r, readOnly: true}]
    securityContext: {capabilities: {drop: [ALL], add: [SYS_PTRACE]}, seccompProfile: {type: RuntimeDefault}}
    livenessProbe: {exec: {command: ["true"]}, periodSeconds: 1, timeoutSeconds: 30, failureThreshold: 10}
    lifecycle: {postStart: {exec: {command: ["true"]}}}
  - name: other
    image: podd.test/busybox:1
    command: [sh, -c, "trap 'exit 0' TERM; while :; do sleep 0.1; done"]
    securityContext: {capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}
    readinessProbe: {exec: {command: ["true"]}, periodSeconds: 1, timeoutSeconds: 30}
    lifecycle: {postStart: {exec: {command: ["true"]}}, preStop: {exec: {command: ["true"]}}}
`, name, spec, programs, int(node.Scale(time.Duration(seconds)*second)/second)))
	}
	n.WaitRunning("own", "shared", "mapped")
	verdict := func(name string) []string {
		return racerVerdict.FindStringSubmatch(n.OK("logs", node.PodName(name), "-c", "racer"))
	}
	restarts := 0
	node.Await(t, "the verdicts", time.Duration(4*seconds)*second+time.Minute, func() bool {
		for name := range names {
			_, _, _ = n.Podd("exec", node.PodName(name), "-c", "racer", "--", "true")
			if _, _, err := n.Podd("restart", node.PodName(name), "-c", "other"); err == nil {
				restarts++
			}
		}
		for name := range names {
			if verdict(name) == nil {
				return false
			}
		}
		return true
	})
	for name := range names {
		m := verdict(name)
		t.Logf("%s, %d restarts in all: %s", name, restarts, m[0])
		if m[2] != "0" {
			out := n.OK("logs", node.PodName(name), "-c", "racer")
			t.Errorf("%s: the tracer reached the runtime:\n%s", name, strings.TrimSpace(out[:min(len(out), 2000)]))
		}
	}
}
