package integration

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/integration/node"
)

// walkerEnv makes the test program the walker, with the directory to walk.
const walkerEnv = "PODD_TEST_WALKER"

// walk is what a user of the node does that looks for a way to what containers
// keep: all below dir, all that is mounted, and the roots of all processes. It
// prints what it can read, write or run.
func walk(dir string) {
	roots := []string{dir}
	mounts, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		fmt.Println("error", err)
		return
	}
	for in := bufio.NewScanner(mounts); in.Scan(); {
		if f := strings.Fields(in.Text()); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			roots = append(roots, f[4])
		}
	}
	// Names that are known need no list of their directory.
	for _, known := range []string{"run", "data", "kubelet", "kubelet/pods", "run/podd.sock", "run/netns", "run/shim", "run/cri", "run/sandboxes",
		"run/containers", "data/images", "data/images/layers", "data/images/snapshots", "data/cri/etc"} {
		roots = append(roots, filepath.Join(dir, known))
	}
	for _, root := range roots {
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil
			}
			for _, may := range []struct {
				name string
				mode uint32
			}{{"read", unix.R_OK}, {"write", unix.W_OK}, {"run", unix.X_OK}} {
				if d.Type()&fs.ModeSymlink == 0 && unix.Access(path, may.mode) == nil {
					fmt.Println(may.name, path)
				}
			}
			return nil
		})
	}
	fmt.Println("walked", len(roots))
}

// TestNodesUsersReachNothingOfPods: a user of the node reaches no file of a
// container, whatever that did to it, nor one of podd's (CVE-2021-41103).
func TestNodesUsersReachNothingOfPods(t *testing.T) {
	n := start(t)
	manifest := func(name, spec string) string {
		return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 1
%s  volumes:
  - {name: e, emptyDir: {}}
  - {name: m, emptyDir: {medium: Memory}}
  - {name: i, image: {reference: "podd.test/busybox:1"}}
  containers:
  - name: main
    image: podd.test/busybox:1
    command: [sh, -c, "for d in / /e /m /dev/shm /etc; do chmod 777 $d; cp /bin/busybox $d/suid; chmod 4755 $d/suid; done; echo line; echo ready; sleep 1000"]
    volumeMounts: [{name: e, mountPath: /e}, {name: m, mountPath: /m}, {name: i, mountPath: /i, readOnly: true}]
`, name, spec)
	}
	n.Write("plain.yaml", manifest("plain", ""))
	n.Write("mapped.yaml", manifest("mapped", "  hostUsers: false\n"))
	n.WaitRunning("plain", "mapped")
	for _, name := range []string{"plain", "mapped"} {
		node.Await(t, "its files", 20*second, func() bool { return strings.Contains(n.OK("logs", node.PodName(name)), "ready") })
	}
	if err := os.Chmod(n.Dir, 0o755); err != nil { // podd's own modes are under test
		t.Fatal(err)
	}
	for _, user := range []uint32{65534, 100000} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), walkerEnv+"="+n.Dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil || !bytes.Contains(out, []byte("\nwalked ")) {
			t.Fatalf("walker: %v\n%s", err, out)
		}
		for line := range strings.Lines(string(out)) {
			may, path, _ := strings.Cut(strings.TrimSpace(line), " ")
			if may == "walked" || harmless(n, may, path) {
				continue
			}
			t.Errorf("user %d may %s %s", user, may, path)
		}
	}
	for _, dir := range []string{"run", "data"} {
		if st, err := os.Stat(filepath.Join(n.Dir, dir)); err != nil || st.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v %v", dir, st.Mode(), err)
		}
	}
}

// harmless is what anybody may see: the test's own directories, and the
// directories of logs, whose files are for root (as a kubelet's).
func harmless(n *node.Node, may, path string) bool {
	rel, err := filepath.Rel(n.Dir, path)
	if err != nil || may == "write" {
		return false
	}
	for _, own := range []string{".", "manifests", "cni", "certs.d", "podd.log", "log"} {
		if rel == own || own != "." && strings.HasPrefix(rel, own+"/") {
			st, err := os.Lstat(path)
			return err == nil && (st.IsDir() || own != "log")
		}
	}
	return false
}

// TestDirectoriesOfAnEarlierReleaseAreNarrowed: what an earlier release left
// open to all is closed, a directory that is others' is refused.
func TestDirectoriesOfAnEarlierReleaseAreNarrowed(t *testing.T) {
	n := node.New(t)
	n.Start()
	n.Signal(syscall.SIGTERM)
	for _, dir := range []string{"run", "data"} {
		if err := os.Chmod(filepath.Join(n.Dir, dir), 0o711); err != nil {
			t.Fatal(err)
		}
	}
	n.Start()
	for _, dir := range []string{"run", "data"} {
		if st, err := os.Stat(filepath.Join(n.Dir, dir)); err != nil || st.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v %v", dir, st.Mode(), err)
		}
	}
	n.Signal(syscall.SIGTERM)
	others := filepath.Join(n.Dir, "others")
	if err := errors.Join(os.Mkdir(others, 0o755), os.WriteFile(filepath.Join(others, "file"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(filepath.Join(n.Bin, "podd"), append([]string{"run"}, append(n.Args(), "--data-dir", others)...)...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "give it one of its own") {
		t.Errorf("%v\n%s", err, out)
	}
	if st, err := os.Stat(others); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("a foreign directory was changed: %v %v", st.Mode(), err)
	}
}
