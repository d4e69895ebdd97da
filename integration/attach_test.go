package integration

import (
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/podd-runtime/podd/integration/node"
)

// deafPod has a stdin that it does not read.
const deafPod = `apiVersion: v1
kind: Pod
metadata: {name: deaf}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: podd.test/busybox:1
    command: [sleep, "1000"]
    stdin: true
`

// TestAttachedClientThatDiesLeavesNothing: neither in podd nor in podd-shim,
// also when the container takes none of its input.
func TestAttachedClientThatDiesLeavesNothing(t *testing.T) {
	n := start(t)
	n.Write("deaf.yaml", deafPod)
	n.WaitRunning("deaf")
	client := func() {
		t.Helper()
		cmd := exec.Command(filepath.Join(n.Bin, "podd"), "attach", "--run-dir", n.RunDir(), "-i", node.PodName("deaf"))
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// The client's, podd's and the shim's buffers take some, until all are full.
		wrote, taken := make(chan struct{}), new(atomic.Int64)
		go func() {
			defer close(wrote)
			for buf := make([]byte, 32<<10); ; {
				if n, err := in.Write(buf); err != nil {
					return
				} else {
					taken.Add(int64(n))
				}
			}
		}()
		node.Await(t, "all buffers being full", 20*second, func() bool {
			was := taken.Load()
			time.Sleep(300 * time.Millisecond)
			return was > 0 && taken.Load() == was
		})
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		<-wrote
	}
	client()
	before := n.Count()
	for range 5 {
		client()
	}
	n.NoLeaks(t, before, 20*second)
}
