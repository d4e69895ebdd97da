package integration

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/podd-runtime/podd/integration/node"
)

// rotated are the files that rotation has made of a pod's log.
func rotated(t *testing.T, n *node.Node, pod string) (compressed, other []string) {
	t.Helper()
	p, err := n.Pod(pod)
	if err != nil {
		t.Fatal(err)
	}
	all, err := filepath.Glob(filepath.Join(n.LogDir(), strings.Join([]string{"default", p.Name, string(p.UID)}, "_"), "main", "0.log.*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if strings.HasSuffix(f, ".gz") {
			compressed = append(compressed, f)
		} else {
			other = append(other, f)
		}
	}
	return compressed, other
}

// TestLogsRotateThroughKills: whatever is killed while a log is rotated and
// compressed, no line is lost, and who follows the log sees all of them.
func TestLogsRotateThroughKills(t *testing.T) {
	n := start(t, "--container-log-max-size", "64Ki", "--container-log-max-files", "1000")
	n.Write("writer.yaml", pod("writer", "", "lines", "200us"))
	n.WaitRunning("writer")
	var seen bytes.Buffer
	follow := exec.Command(filepath.Join(n.Bin, "podd"), "logs", "-f", node.PodName("writer"))
	follow.Env = append(os.Environ(), "PODD_RUN_DIR="+n.RunDir())
	follow.Stdout = &seen
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	files := 0
	more := func(n2 int) {
		t.Helper()
		files += n2
		node.Await(t, "more files", 60*second, func() bool { c, _ := rotated(t, n, "writer"); return len(c) >= files })
	}
	kill := func(pid int) {
		t.Helper()
		if pid == 0 {
			t.Fatal("podd-shim does not answer")
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	back := func() {
		t.Helper()
		node.Await(t, "podd and podd-shim answering", 15*second, func() bool { return n.ShimPID() != 0 })
	}
	more(2)
	for range 5 {
		kill(n.ShimPID())
		back()
		more(1)
	}
	if err := follow.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	follow.Wait()
	got := numbers(seen.String())
	unbroken(t, "logs -f", got[:max(0, len(got)-1)], true) // the last may be cut
	if c, _ := rotated(t, n, "writer"); len(got) < 1000 {
		t.Errorf("logs -f saw %d lines of %d files", len(got), len(c))
	}
	for range 5 {
		shim := n.ShimPID()
		n.Signal(syscall.SIGKILL)
		kill(shim)
		n.Start()
		back()
		more(1)
	}
	unbroken(t, "logs", lines(t, n, "writer"), true)
	node.Await(t, "all but the newest compressed", 30*second, func() bool {
		c, other := rotated(t, n, "writer")
		return len(c) >= files && len(other) <= 1
	}, func() string { _, other := rotated(t, n, "writer"); return strings.Join(other, " ") })
	if p, err := n.Pod("writer"); err != nil || status(p).RestartCount != 0 {
		t.Errorf("the writer: %+v, %v", p.Status, err)
	}
}
