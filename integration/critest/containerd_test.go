package critest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/integration/node"
)

// containerdConfig is the peer's; paths come by Sprintf. Lowering an OOM score
// is not allowed everywhere that tests run.
const containerdConfig = `version = 3
root = %q
state = %q
[grpc]
  address = %q
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = [%q]
    conf_dir = %q
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      BinaryName = %q
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = %q
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = 'registry.k8s.io/pause:3.10'
`

const cniConfig = `{"cniVersion":"1.0.0","name":"peer","plugins":[
{"type":"bridge","bridge":"peer0","isGateway":true,"ipMasq":false,"hairpinMode":true,
 "ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.97.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
{"type":"portmap","capabilities":{"portMappings":true}}]}`

// TestCritestBesideContainerd has the suite take its time on podd and on
// containerd in turn: podd's must be the shorter, one by one and four at a time.
func TestCritestBesideContainerd(t *testing.T) {
	if !full() {
		t.Skip("builds containerd: set PODD_TEST_ALL=1")
	}
	n := node.New(t)
	prepared(t)
	if err := os.Chmod(n.Dir, 0o711); err != nil {
		t.Fatal(err)
	}
	all, err := builder().Critest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r := serve(t, all)
	r.Delay(5 * time.Millisecond)
	n.Mirror(r.Addr)
	n.Start()
	peer := startContainerd(t, n)
	for _, procs := range []int{4, 1} {
		t.Run(fmt.Sprintf("%d at a time", procs), func(t *testing.T) {
			ours := suite{socket: socket(n), procs: procs}.report(t)
			theirs := suite{socket: peer, procs: procs}.report(t)
			t.Logf("podd: %d passed, %d failed in %.1f s; containerd: %d passed, %d failed in %.1f s",
				ours.count("passed"), ours.count("failed"), ours.RunTime.Seconds(),
				theirs.count("passed"), theirs.count("failed"), theirs.RunTime.Seconds())
			if ours.RunTime >= theirs.RunTime {
				t.Errorf("podd took %.1f s, containerd %.1f s", ours.RunTime.Seconds(), theirs.RunTime.Seconds())
			}
			// A peer that fails fast is no measure.
			if theirs.count("passed") < ours.count("passed")*9/10 {
				t.Errorf("containerd passed %d specs only: %s", theirs.count("passed"), theirs.failures())
			}
			if ours.count("failed") > 0 {
				t.Errorf("podd failed: %s", ours.failures())
			}
		})
	}
}

func (r report) count(state string) (n int) {
	for _, s := range r.SpecReports {
		if s.LeafNodeType == "It" && s.State == state {
			n++
		}
	}
	return n
}

func (r report) failures() string {
	var b strings.Builder
	for _, s := range r.SpecReports {
		if s.State == "failed" {
			fmt.Fprintf(&b, "\n%s: %s", s.name(), s.Failure.Message)
		}
	}
	return b.String()
}

// startContainerd starts the peer in the test's namespaces, to be ended with
// the test, and returns its socket.
func startContainerd(t *testing.T, n *node.Node) string {
	t.Helper()
	dir := filepath.Join(n.Dir, "containerd")
	at := func(p string) string { return filepath.Join(dir, p) }
	for _, d := range []string{"cni", "tmp"} {
		if err := os.MkdirAll(at(d), 0o711); err != nil {
			t.Fatal(err)
		}
	}
	sock := at("c.sock")
	for path, text := range map[string]string{
		at("config.toml"): fmt.Sprintf(containerdConfig, at("root"), at("state"), sock, peers(), at("cni"),
			filepath.Join(peers(), "runc"), filepath.Join(n.Dir, "certs.d")),
		at("cni/10-peer.conflist"): fmt.Sprintf(cniConfig, at("ipam")),
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	log, err := os.Create(at("log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(peers(), "containerd"), "-c", at("config.toml"))
	cmd.Env = append(os.Environ(), "PATH="+peers()+":"+os.Getenv("PATH"), "TMPDIR="+at("tmp"))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c := crictl{t, n}
		for _, args := range [][]string{{"rmp", "-fa"}} {
			cmd := c.command(args...)
			cmd.Args[2] = "unix://" + sock
			cmd.Run()
		}
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		unmountBelow(t, dir)
		if t.Failed() {
			b, _ := os.ReadFile(at("log"))
			t.Logf("last of containerd's log:\n%s", b[max(0, len(b)-8000):])
		}
	})
	node.Await(t, "containerd's socket", time.Minute, func() bool {
		c := crictl{t, n}
		cmd := c.command("version")
		cmd.Args[2] = "unix://" + sock
		return cmd.Run() == nil
	})
	return "unix://" + sock
}

// unmountBelow takes away what a daemon has left mounted, the last first.
func unmountBelow(t *testing.T, dir string) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Error(err)
		return
	}
	lines := strings.Split(string(b), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if f := strings.Fields(lines[i]); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			if err := unix.Unmount(f[4], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
				t.Errorf("unmount %s: %v", f[4], err)
			}
		}
	}
}
