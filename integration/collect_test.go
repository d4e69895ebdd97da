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
)

// TestDeadContainersAreCollected: of a container that ends again and again the
// last dead instance stays, with its log, and nothing else however often it ends.
func TestDeadContainersAreCollected(t *testing.T) {
	n := node.New(t)
	n.Extra(configured(t, n, "crashLoopBackOff: {maxContainerRestartPeriod: 1s}")...)
	mirror(t, n, "testserver")
	n.Start()
	n.Write("crash.yaml", pod("crash", "", "exit", "1"))
	p := n.WaitPod("crash", "restarted often", 60*second, func(p *v1.Pod) bool {
		return status(p).RestartCount >= 5 && status(p).State.Waiting != nil
	})
	dir := filepath.Join(n.LogDir(), strings.Join([]string{"default", p.Name, string(p.UID)}, "_"), "main")
	left := func() (logs, links []string) {
		logs, _ = filepath.Glob(filepath.Join(dir, "*"))
		links, _ = filepath.Glob(filepath.Join(filepath.Dir(n.LogDir()), "containers", "*"))
		return logs, links
	}
	node.Await(t, "at most the running and the last dead instance", 15*second, func() bool {
		logs, links := left()
		return len(logs) > 0 && len(logs) <= 2 && len(links) > 0 && len(links) <= 2
	}, func() string { logs, links := left(); return strings.Join(append(logs, links...), " ") })
	if out := n.OK("logs", "-p", node.PodName("crash")); out != "exiting with 1\n" {
		t.Errorf("log of the last instance: %q", out)
	}
	was := n.Count()
	n.WaitPod("crash", "restarted more often", 60*second, func(p *v1.Pod) bool {
		return status(p).RestartCount >= 8 && status(p).State.Waiting != nil
	})
	node.Await(t, "no more kept than before", 15*second, func() bool {
		is := n.Count()
		return len(is.Files) <= len(was.Files) && len(is.Mounts) <= len(was.Mounts) && len(is.Cgroups) <= len(was.Cgroups)
	}, func() string { return fmt.Sprintf("%+v was %+v", n.Count(), was) })
}

// TestLeftoversOfUnknownPodsAreCollected: what a pod that nobody knows any more
// has left goes with the next start of the daemon, and what another client of
// the log directory has there stays.
func TestLeftoversOfUnknownPodsAreCollected(t *testing.T) {
	n := start(t)
	n.Write("stays.yaml", pod("stays", "", "pause"))
	n.WaitRunning("stays")
	n.Signal(syscall.SIGKILL)
	const uid = "4b0ad0a1-0d0e-4d43-9a5b-d4f6b1d3c001"
	orphan := filepath.Join(n.Dir, "kubelet", "pods", uid)
	logs := filepath.Join(n.LogDir(), "default_orphan_"+uid)
	others := filepath.Join(n.LogDir(), "default_other_4b0ad0a1-0d0e-4d43-9a5b-d4f6b1d3c002")
	link := filepath.Join(filepath.Dir(n.LogDir()), "containers", "orphan_default_main-0123.log")
	outside := t.TempDir()
	for path, text := range map[string]string{
		orphan + "/volumes/kubernetes.io~empty-dir/data/file": "x",
		logs + "/main/0.log":   "x",
		others + "/main/0.log": "x",
		outside + "/file":      "x",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, to := range map[string]string{link: logs + "/main/0.log", logs + "/escape": outside} {
		if err := os.Symlink(to, name); err != nil {
			t.Fatal(err)
		}
	}
	n.Start()
	there := func(path string) bool { _, err := os.Lstat(path); return err == nil }
	node.Await(t, "the unknown pod's directory, logs and link gone", 30*second, func() bool {
		return !there(orphan) && !there(logs) && !there(link)
	})
	n.WaitRunning("stays")
	if !there(others + "/main/0.log") {
		t.Error("logs that are not podd's are gone")
	}
	if !there(outside + "/file") {
		t.Error("what a link in the logs leads to is gone")
	}
	if p, err := n.Pod("stays"); err != nil || status(p).RestartCount != 0 {
		t.Errorf("the pod that is known: %+v, %v", p.Status, err)
	}
	if err := os.RemoveAll(others); err != nil {
		t.Fatal(err)
	}
}
