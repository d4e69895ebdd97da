package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/integration/cluster/control"
	"github.com/podd-runtime/podd/integration/isolated"
	"github.com/podd-runtime/podd/integration/node"
)

// What is run of the node's suite unless $PODD_E2E_FOCUS and $PODD_E2E_SKIP say
// otherwise: the life of pods.
const (
	nodeFocus = `Container Lifecycle|Containers Lifecycle|Restart|StaticPod|static pod|MirrorPod|mirror pod|Standalone|PodConditions|Probe`
	nodeSkip  = `\[Serial\]|\[Disruptive\]|\[Slow\]|\[Flaky\]|\[Alpha\]|AppArmor`
)

// TestUpstreamNode runs upstream's suite for nodes, which starts an apiserver
// and bin/podd in the kubelet's place.
func TestUpstreamNode(t *testing.T) {
	if !full() {
		t.Skip("upstream's suite is part of the long form (make e2e)")
	}
	if err := isolated.Prepared(); err != nil {
		t.Fatal(err)
	}
	n := node.New(t)
	mirror(t, n)
	out := filepath.Join(n.Dir, "report")
	if err := os.MkdirAll(out, 0o755); err != nil {
		t.Fatal(err)
	}
	furnish(t, n)
	programs := kubelet(t, n)
	// It writes where it lies.
	suite := filepath.Join(out, "e2e_node.test")
	if err := os.Symlink(filepath.Join(peers(), "e2e_node.test"), suite); err != nil {
		t.Fatal(err)
	}
	args := append(ginkgo(out, nodeFocus, nodeSkip), suite, "--",
		"--k8s-bin-dir="+programs, "--node-name="+control.NodeName, "--report-dir="+out, "--prepull-images=false",
		"--container-runtime-endpoint=unix://"+filepath.Join(n.RunDir(), "podd.sock"),
	)
	log := filepath.Join(out, "ginkgo.log")
	status := n.Run(log, os.Environ(), append([]string{"env", "-C", out}, args...)...)
	text, _ := os.ReadFile(log)
	specs := report(t, out, fmt.Sprintf("status %d\n%s", status, text))
	tell(t, specs)
	if t.Failed() {
		keep, err := os.MkdirTemp("", "podd-e2e-node-")
		if err == nil {
			err = os.CopyFS(keep, os.DirFS(out))
		}
		t.Logf("reports and logs: %s (%v)", keep, err)
	}
	n.OK("stop", "--all")
}

// furnish gives the suite the directories that it knows by name, and none of
// the programs by which it would look for systemd.
func furnish(t *testing.T, n *node.Node) {
	t.Helper()
	for dir, from := range map[string]string{"/var/lib/kubelet": "kubelet", "/var/log/pods": "log/pods", "/var/log/containers": "log/containers"} {
		from = filepath.Join(n.Dir, from)
		for _, d := range []string{dir, from} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Mount(from, dir, "", unix.MS_BIND, ""); err != nil {
			t.Fatalf("mount %s: %v", dir, err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	}
	for _, program := range []string{"/usr/bin/systemd-run", "/usr/bin/journalctl"} {
		if _, err := os.Stat(program); err != nil {
			continue
		}
		if err := unix.Mount("/dev/null", program, "", unix.MS_BIND, ""); err != nil {
			t.Fatalf("hide %s: %v", program, err)
		}
		t.Cleanup(func() { unix.Unmount(program, unix.MNT_DETACH) })
	}
}

// kubelet is a directory with a program of that name: podd with what keeps it
// to this node's own directories. All else the suite decides.
func kubelet(t *testing.T, n *node.Node) (dir string) {
	t.Helper()
	var flags []string
	for pair := range slices.Chunk(n.Args(), 2) {
		switch pair[0] {
		case "--root-dir", "--pod-manifest-path", "--hostname-override", "--healthz-port", "--pod-logs-dir":
		default:
			flags = append(flags, pair...)
		}
	}
	dir = filepath.Join(n.Dir, "programs")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\nexec %s/podd run %s --node-ip %s \"$@\"\n", n.Bin, strings.Join(flags, " "), isolated.NodeIP)
	if err := os.WriteFile(filepath.Join(dir, "kubelet"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}
