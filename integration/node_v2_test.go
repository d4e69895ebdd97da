package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/podd-runtime/podd/integration/node"
)

// unified says whether this machine has cgroup v2 alone, as users' have.
func unified() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// cgroupOf is the directory of the cgroup of the node's process whose command
// line holds text.
func cgroupOf(t *testing.T, n *node.Node, text string) string {
	t.Helper()
	var pids map[int]bool
	node.Await(t, text+" running", 10*second, func() bool { pids = n.Processes(text); return len(pids) == 1 })
	for pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if err != nil {
			t.Fatal(err)
		}
		return filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(strings.TrimSpace(string(b)), "0::"))
	}
	return ""
}

// TestLimitsInUnifiedCgroups compares the files of the container's, the pod's
// and the QoS level's cgroups with what upstream's kubelet writes.
func TestLimitsInUnifiedCgroups(t *testing.T) {
	if !unified() {
		t.Skip("this machine has cgroup v1; make node-test runs it on one with v2")
	}
	n := start(t)
	n.Write("limited.yaml", pod("limited", "", "serve", ":8081")+"    resources: {requests: {cpu: 100m, memory: 16Mi}, limits: {cpu: 500m, memory: 64Mi}}\n")
	n.Write("exact.yaml", pod("exact", "", "serve", ":8082")+"    resources: {limits: {cpu: 250m, memory: 32Mi}}\n")
	n.Write("free.yaml", pod("free", "", "serve", ":8083"))
	n.WaitRunning("limited", "exact", "free")
	// Weights of pods and levels come from shares by the linear formula of
	// KEP-2254 (1+(shares-2)*9999/262142), those of containers by the curve of
	// opencontainers/cgroups: 102 → 4 and 17, 256 → 10 and 35.
	for _, tt := range []struct {
		port string
		up   int // 0 the container's cgroup, 1 the pod's, 2 the level's
		want map[string]string
	}{
		{":8081", 0, map[string]string{"cpu.max": "50000 100000", "cpu.weight": "17", "memory.max": "67108864", "memory.oom.group": "1", "memory.swap.max": "0"}},
		{":8081", 1, map[string]string{"cpu.max": "50000 100000", "cpu.weight": "4", "memory.max": "67108864", "pids.max": "max"}},
		{":8081", 2, map[string]string{"cpu.max": "max 100000", "cpu.weight": "4", "memory.max": "max"}},
		{":8082", 0, map[string]string{"cpu.max": "25000 100000", "cpu.weight": "35", "memory.max": "33554432", "memory.oom.group": "1", "memory.swap.max": "0"}},
		{":8082", 1, map[string]string{"cpu.max": "25000 100000", "cpu.weight": "10", "memory.max": "33554432"}},
		{":8083", 0, map[string]string{"cpu.max": "max 100000", "cpu.weight": "1", "memory.max": "max", "memory.oom.group": "1"}},
		{":8083", 1, map[string]string{"cpu.max": "max 100000", "cpu.weight": "1", "memory.max": "max"}},
		{":8083", 2, map[string]string{"cpu.max": "max 100000", "cpu.weight": "1", "memory.max": "max"}},
	} {
		dir := cgroupOf(t, n, "/testserver serve "+tt.port)
		for range tt.up {
			dir = filepath.Dir(dir)
		}
		for file, want := range tt.want {
			b, err := os.ReadFile(filepath.Join(dir, file))
			if got := strings.TrimSpace(string(b)); err != nil || got != want {
				t.Errorf("%s of %s: %q, want %q (%v)", file, dir, got, want, err)
			}
		}
	}
}

// TestConfinementOfContainers looks at a container as the kernel sees it.
func TestConfinementOfContainers(t *testing.T) {
	n := start(t, "--seccomp-default")
	n.Write("web.yaml", pod("web", "", "serve", ":8084"))
	n.Write("open.yaml", pod("open", "", "serve", ":8085")+"    securityContext: {privileged: true}\n")
	n.WaitRunning("web", "open")
	look := func(port, file string) string {
		var pids map[int]bool
		node.Await(t, port+" running", 10*second, func() bool { pids = n.Processes("/testserver serve " + port); return len(pids) == 1 })
		for pid := range pids {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		return ""
	}
	if s := look(":8084", "status"); !strings.Contains(s, "Seccomp:\t2\n") {
		t.Errorf("no seccomp filter:\n%s", s)
	}
	if s := look(":8085", "status"); !strings.Contains(s, "Seccomp:\t0\n") {
		t.Errorf("a privileged container has a seccomp filter:\n%s", s)
	}
	if b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err != nil || strings.TrimSpace(string(b)) != "Y" {
		t.Log("no AppArmor here; make node-test runs this test where it is")
		return
	}
	if s := look(":8084", "attr/current"); s != "cri-containerd.apparmor.d (enforce)\n" {
		t.Errorf("AppArmor: %q", s)
	}
	if s := look(":8085", "attr/current"); s != "unconfined\n" {
		t.Errorf("AppArmor of a privileged container: %q", s)
	}
}
