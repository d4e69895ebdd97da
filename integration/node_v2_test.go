package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/node"
	kubeletstatus "github.com/podd-runtime/podd/kubelet/status"
)

// unified says whether this machine has cgroup v2 alone, as users' have.
func unified() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// group is a cgroup of a pod of this node, by its files.
func group(t *testing.T, n *node.Node, where string, ids map[string]string, pods map[string]*v1.Pod) string {
	t.Helper()
	words := strings.Fields(where)
	switch words[0] {
	case "level": // of the pods of the table: one of each
		pod := map[string]string{"burstable": "limited", "besteffort": "free"}[words[1]]
		return filepath.Dir(group(t, n, "pod "+pod, ids, pods))
	case "pod":
		return filepath.Dir(group(t, n, "container "+words[1]+" main", ids, pods))
	}
	id := ids[words[1]+"/"+words[2]]
	for pid := range n.Processes("/testserver") {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if err == nil && strings.Contains(string(b), id) {
			return filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(strings.TrimSpace(string(b)), "0::"))
		}
	}
	t.Fatalf("no process in the container of %s (%s)", where, id)
	return ""
}

// rows of the tables of a document whose head is the one given.
func rows(t *testing.T, file, head string) (found [][]string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(b), head+"\n")
	if !ok {
		t.Fatalf("%s has no table %s", file, head)
	}
	for i, line := range strings.Split(table, "\n") {
		if !strings.HasPrefix(line, "|") {
			break
		}
		if i == 0 { // the line below the head
			continue
		}
		var cells []string
		for _, c := range strings.Split(strings.Trim(line, "|"), "|") {
			cells = append(cells, strings.TrimSpace(c))
		}
		found = append(found, cells)
	}
	return found
}

// TestUnifiedCgroups compares the files of containers', pods' and QoS levels'
// cgroups with the table of docs/cgroups.md, and their names with the kubelet's.
func TestUnifiedCgroups(t *testing.T) {
	if !unified() {
		t.Skip("this machine has cgroup v1; make node-test runs it on one with v2")
	}
	n := start(t, "--pod-max-pids", "1024")
	container := func(name, port, resources string) string {
		return fmt.Sprintf("  - {name: %s, image: %q, args: [serve, %q], resources: {%s}}\n", name, testserver, port, resources)
	}
	for name, containers := range map[string]string{
		"limited": container("main", ":8081", "requests: {cpu: 100m, memory: 16Mi}, limits: {cpu: 500m, memory: 64Mi}"),
		"two":     container("main", ":8081", "limits: {cpu: 200m, memory: 32Mi}") + container("second", ":8082", ""),
		"exact":   container("main", ":8081", "limits: {cpu: 250m, memory: 32Mi}"),
		"free":    container("main", ":8081", ""),
	} {
		n.Write(name+".yaml", fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n%s", name, containers))
	}
	n.WaitRunning("limited", "two", "exact", "free")
	ids, pods := map[string]string{}, map[string]*v1.Pod{}
	for _, name := range []string{"limited", "two", "exact", "free"} {
		p, err := n.Pod(name)
		if err != nil {
			t.Fatal(err)
		}
		pods[name] = p
		for _, c := range p.Status.ContainerStatuses {
			ids[name+"/"+c.Name] = strings.TrimPrefix(c.ContainerID, kubeletstatus.Scheme+"://")
		}
	}
	checked := 0
	for _, row := range rows(t, "../docs/cgroups.md", "| group | file | value | rule |") {
		where, file, want := row[0], row[1], row[2]
		b, err := os.ReadFile(filepath.Join(group(t, n, where, ids, pods), file))
		if os.IsNotExist(err) && strings.HasPrefix(file, "hugetlb.") {
			continue // of a kernel without, or with other sizes
		}
		if got := strings.TrimSpace(string(b)); err != nil || got != want {
			t.Errorf("%s: %s: %q, want %q (%v)", where, file, got, want, err)
		}
		checked++
	}
	if checked < 50 {
		t.Errorf("%d lines checked", checked)
	}
	for _, name := range []string{"limited", "exact", "free"} {
		p := pods[name]
		level := map[v1.PodQOSClass]string{v1.PodQOSBurstable: "burstable", v1.PodQOSBestEffort: "besteffort"}[p.Status.QOSClass]
		uid, id := string(p.UID), ids[name+"/main"]
		want := filepath.Join(n.CgroupDir(), "kubepods", level, "pod"+uid, id)
		if node.CgroupDriver() == "systemd" {
			// As systemd.slice(5) has it: a slice lies in that of its name up to the last dash.
			slice := strings.TrimSuffix(filepath.Base(n.CgroupDir()), ".slice") + "-kubepods"
			want = filepath.Join(n.CgroupDir(), slice+".slice")
			if level != "" {
				slice += "-" + level
				want = filepath.Join(want, slice+".slice")
			}
			want = filepath.Join(want, slice+"-pod"+strings.ReplaceAll(uid, "-", "_")+".slice", "podd-"+id+".scope")
		}
		dir := group(t, n, "container "+name+" main", ids, pods)
		if got := strings.TrimPrefix(dir, "/sys/fs/cgroup"); got != want {
			t.Errorf("%s is in\n%s, want\n%s", name, got, want)
		}
		attr := make([]byte, 256)
		size, err := unix.Getxattr(filepath.Dir(dir), "user.pod", attr)
		if err != nil || string(attr[:max(size, 0)]) != "default/"+node.PodName(name) {
			t.Errorf("name of the group of %s: %q (%v)", name, attr[:max(size, 0)], err)
		}
		for _, file := range []string{"cpu.pressure", "memory.pressure", "io.pressure"} {
			if b, err := os.ReadFile(filepath.Join(dir, file)); err != nil || !strings.HasPrefix(string(b), "some avg10=") {
				t.Errorf("%s of %s: %q (%v)", file, name, b, err)
			}
		}
	}
}

// TestUnifiedOutOfMemory: the kernel takes all of a container at once, or with
// singleProcessOOMKill the one process that is too big.
func TestUnifiedOutOfMemory(t *testing.T) {
	if !unified() {
		t.Skip("this machine has cgroup v1; make node-test runs it on one with v2")
	}
	for _, single := range []bool{false, true} {
		t.Run(fmt.Sprintf("singleProcessOOMKill=%v", single), func(t *testing.T) {
			config := filepath.Join(t.TempDir(), "podd.yaml")
			text := fmt.Sprintf("apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nsingleProcessOOMKill: %v\n", single)
			if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			n := start(t, "--config", config)
			n.Write("two.yaml", pod("two", "restartPolicy: Never", "serve", ":8081")+"    resources: {limits: {memory: 48Mi}}\n")
			n.WaitRunning("two")
			_, _, err := n.Podd("exec", node.PodName("two"), "--", "/testserver", "hog", "200")
			if err == nil {
				t.Error("the process that is too big ended well")
			}
			if single {
				if p, err := n.Pod("two"); err != nil || !node.Running(p) {
					t.Errorf("the container did not survive: %v, %+v", err, p.Status)
				}
				return
			}
			p := n.WaitPod("two", "ended", 30*second, func(p *v1.Pod) bool { return terminated(p) != nil })
			if st := terminated(p); st.Reason != "OOMKilled" || st.ExitCode != 137 {
				t.Errorf("got %+v", st)
			}
		})
	}
}

// TestDevicesOfContainers: a container opens the devices of its specification
// and makes no others, a privileged one has all.
func TestDevicesOfContainers(t *testing.T) {
	n := start(t)
	shell := func(name, extra string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  - {name: main, image: %q, command: [sleep, \"1000000\"]%s}\n", name, busybox, extra)
	}
	n.Write("plain.yaml", shell("plain", ""))
	n.Write("open.yaml", shell("open", ", securityContext: {privileged: true}"))
	n.WaitRunning("plain", "open")
	const opens = "rm -f /x && mknod /x c %s && : < /x && echo opened"
	for _, tt := range []struct {
		pod, device string
		opened      bool
	}{
		{"plain", "1 3", true},   // null
		{"plain", "1 5", true},   // zero
		{"plain", "1 11", false}, // kmsg
		{"plain", "1 1", false},  // mem
		{"open", "1 11", true},
	} {
		out, errOut, err := n.Podd("exec", node.PodName(tt.pod), "--", "sh", "-c", fmt.Sprintf(opens, tt.device))
		if opened := strings.Contains(out, "opened"); opened != tt.opened {
			t.Errorf("device %s in %s: opened %v, want %v (%v)\n%s", tt.device, tt.pod, opened, tt.opened, err, errOut)
		} else if !opened && !strings.Contains(errOut, "not permitted") {
			t.Errorf("device %s in %s: %s", tt.device, tt.pod, errOut)
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

// TestForkingAndFrozenPodsEnd: what forks faster than its processes are listed
// ends with its pod, and so does what somebody has frozen.
func TestForkingAndFrozenPodsEnd(t *testing.T) {
	n := start(t)
	// Each process lives for a moment and leaves another one behind.
	n.Write("forks.yaml", user("forks", "emptyDir: {}", "", `trap "" TERM; f() { ( sleep 0.01; f ) & }; f; f; f; f; while :; do sleep 1; done`))
	n.Write("frozen.yaml", user("frozen", "emptyDir: {}", "", "while :; do sleep 1; done"))
	n.WaitRunning("forks", "frozen")
	p, err := n.Pod("frozen")
	if err != nil {
		t.Fatal(err)
	}
	id := strings.TrimPrefix(status(p).ContainerID, kubeletstatus.Scheme+"://")
	file, freeze, frozen := "/sys/fs/cgroup"+containerGroup(t, n, id)+"/cgroup.freeze", "1", "1"
	if !unified() {
		for pid := range n.Processes("") {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
			for line := range strings.Lines(string(b)) {
				f := strings.SplitN(strings.TrimSpace(line), ":", 3)
				if len(f) == 3 && f[1] == "freezer" && strings.Contains(f[2], id) {
					file = "/sys/fs/cgroup/freezer" + f[2] + "/freezer.state"
				}
			}
		}
		freeze, frozen = "FROZEN", "FROZEN"
	}
	if err := os.WriteFile(file, []byte(freeze), 0); err != nil {
		t.Fatal(err)
	}
	node.Await(t, "frozen", 10*second, func() bool { b, _ := os.ReadFile(file); return strings.TrimSpace(string(b)) == frozen })
	n.Remove("forks.yaml", "frozen.yaml")
	n.WaitGone(15 * second)
	if left := n.Processes(""); len(left) > 0 {
		t.Errorf("processes left: %v", left)
	}
}
