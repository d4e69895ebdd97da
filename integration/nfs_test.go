package integration

import (
	"bufio"
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/node"
)

// nfsExport is what this machine's own NFS server serves.
const nfsExport = "/srv/podd-test"

// command runs a program of the host that must succeed.
func command(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := osexec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// serveNFS starts the kernel's NFS server as an administrator would, with a
// tmpfs to serve. It takes the machine's whole NFS configuration, so it needs
// one to throw away.
func serveNFS(t *testing.T) {
	t.Helper()
	if os.Getenv("PODD_TEST_DISPOSABLE") == "" {
		t.Skip("configures the machine's NFS server; make node-test runs it on one to throw away")
	}
	if _, err := os.Stat("/usr/sbin/rpc.nfsd"); err != nil {
		t.Skip("needs nfs-kernel-server")
	}
	for name, text := range map[string]string{
		"/etc/exports": nfsExport + " *(rw,no_root_squash,no_subtree_check,insecure,fsid=1)\n",
		// Clients may go on 10 s after the server is back, not 90.
		"/etc/nfs.conf.d/podd-test.conf": "[nfsd]\ngrace-time=10\nlease-time=10\nthreads=4\n",
	} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(nfsExport, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", nfsExport, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		reachable(t)
		osexec.Command("systemctl", "stop", "nfs-server").Run()
		syscall.Unmount(nfsExport, syscall.MNT_DETACH)
	})
	command(t, "systemctl", "unmask", "nfs-server.service", "rpcbind.service", "rpcbind.socket")
	command(t, "systemctl", "start", "rpcbind.socket", "rpcbind", "nfs-server")
}

// unreachable lets every packet to and from the server vanish, as when its
// machine has lost its power; reachable ends that.
func unreachable(t *testing.T) {
	t.Helper()
	cmd := osexec.Command("nft", "-f", "-")
	const chain = "{ chain in { type filter hook input priority 0; meta l4proto { tcp, udp } th dport { 111, 2049 } drop; meta l4proto tcp th sport 2049 drop; }; }"
	cmd.Stdin = strings.NewReader("table ip podd_test_nfs " + chain + "\ntable ip6 podd_test_nfs " + chain + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
}

func reachable(t *testing.T) {
	t.Helper()
	for _, family := range []string{"ip", "ip6"} {
		if out, err := osexec.Command("nft", "delete", "table", family, "podd_test_nfs").CombinedOutput(); err != nil && !strings.Contains(string(out), "No such file") {
			t.Errorf("nft: %v\n%s", err, out)
		}
	}
}

// nfsVolume is a persistent volume with its claim.
func nfsVolume(name, server, options string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: PersistentVolume
metadata: {name: %[1]s}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteMany]
  storageClassName: ""
  mountOptions: [%[3]s]
  nfs: {server: %[2]q, path: %[4]s}
  claimRef: {namespace: default, name: %[1]s}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: %[1]s}
spec:
  accessModes: [ReadWriteMany]
  storageClassName: ""
  volumeName: %[1]s
  resources: {requests: {storage: 1Gi}}
---
`, name, server, options, nfsExport)
}

const nfsForever = "trap exit TERM; while :; do sleep 1; done"

func TestNFS(t *testing.T) {
	serveNFS(t)
	n := start(t)
	direct := func(server string) string { return fmt.Sprintf("nfs: {server: %q, path: %s}", server, nfsExport) }
	claim := func(name string) string { return "persistentVolumeClaim: {claimName: " + name + "}" }
	for name, text := range map[string]string{
		"newest":   user("newest", direct("127.0.0.1"), "", nfsForever),
		"six":      user("six", direct("::1"), "", nfsForever),
		"three":    nfsVolume("three", "127.0.0.1", "nfsvers=3, noatime") + user("three", claim("three"), "", nfsForever),
		"four":     nfsVolume("four", "127.0.0.1", `nfsvers=4.1, "rsize=65536,nosuid"`) + user("four", claim("four"), ", subPath: deep/er", nfsForever),
		"readonly": user("readonly", "nfs: {server: 127.0.0.1, path: "+nfsExport+", readOnly: true}", "", nfsForever),
		"mountro":  user("mountro", direct("127.0.0.1"), ", readOnly: true", nfsForever),
		"missing":  user("missing", "nfs: {server: 127.0.0.1, path: /srv/not-exported}", "", nfsForever),
	} {
		n.Write(name+".yaml", text)
	}
	n.WaitRunning("newest", "six", "three", "four", "readonly", "mountro")
	exec := func(pod, cmd string) string {
		out, errOut, _ := n.Podd("exec", node.PodName(pod), "--", "sh", "-c", cmd)
		return strings.TrimSpace(out + errOut)
	}
	for pod, want := range map[string]string{
		"newest": ` nfs4 rw,.*vers=4\.2,`,
		"six":    `:` + nfsExport + ` /data nfs4 `, // the kernel knows the server again, and its first address
		"three":  ` nfs rw,noatime,vers=3,`,
		"four":   ` nfs4 rw,nosuid,.*vers=4\.1,rsize=65536,`,
	} {
		if got := exec(pod, "grep ' /data ' /proc/mounts"); !regexp.MustCompile(want).MatchString(got) {
			t.Errorf("%s has mounted %q, want %s", pod, got, want)
		}
	}
	for _, c := range []struct{ pod, cmd, want string }{
		// Everybody has the same export.
		{"newest", "echo one > /data/shared; sync", ""},
		{"three", "cat /data/shared", "one"},
		{"readonly", "cat /data/shared; touch /data/x 2>&1 | grep -o Read-only", "one\nRead-only"},
		{"mountro", "cat /data/shared; touch /data/x 2>&1 | grep -o Read-only", "one\nRead-only"},
		{"four", "echo sub > /data/f; sync", ""},
		{"newest", "cat /data/deep/er/f", "sub"},
	} {
		if got := exec(c.pod, c.cmd); got != c.want {
			t.Errorf("%s: %s: %q, want %q", c.pod, c.cmd, got, c.want)
		}
	}
	// Locks are the server's: of version 3 with a daemon's help. One holds for all.
	locked := func(pod string, args ...string) *osexec.Cmd {
		p, err := n.Pod(pod)
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range nfsMounts(t, filepath.Join(n.Dir, "kubelet", "pods", string(p.UID))) {
			return osexec.CommandContext(t.Context(), "flock", append([]string{"-n", at + "/shared"}, args...)...)
		}
		t.Fatalf("%s has no mount", pod)
		return nil
	}
	holder := locked("three", "sh", "-c", "echo held; read line")
	in, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "held\n" {
		t.Errorf("lock by version 3: %q, %v", line, err)
	}
	if err := locked("newest", "true").Run(); err == nil {
		t.Error("the server gave one lock twice")
	}
	in.Close()
	holder.Wait()
	if out, err := locked("newest", "true").CombinedOutput(); err != nil {
		t.Errorf("lock by version 4: %v %s", err, out)
	}
	node.Await(t, "the export that is none told", 30*second, func() bool {
		return strings.Contains(n.OK("events"), "127.0.0.1:/srv/not-exported")
	}, func() string { return n.OK("events") })

	before := status(n.WaitPod("newest", "running", 10*second, node.Running)).ContainerID
	n.Signal(syscall.SIGKILL)
	n.Start()
	if p := n.WaitPod("newest", "running", 30*second, node.Running); status(p).ContainerID != before {
		t.Error("the daemon's restart restarted the container")
	}
	if got := exec("newest", "cat /data/shared"); got != "one" {
		t.Errorf("data after the daemon's restart: %q", got)
	}
	n.Remove("newest.yaml", "missing.yaml")
	awaitGone(t, n, 60*second, "newest")
	n.Write("newest.yaml", user("newest", direct("127.0.0.1"), "", nfsForever))
	n.WaitRunning("newest")
	if got := exec("newest", "cat /data/shared"); got != "one" {
		t.Errorf("data in the next pod: %q", got)
	}
	for _, name := range []string{"newest", "six", "three", "four", "readonly", "mountro"} {
		n.Remove(name + ".yaml")
	}
	n.WaitGone(90 * second)
	if b, err := os.ReadFile(nfsExport + "/deep/er/f"); err != nil || string(b) != "sub\n" {
		t.Errorf("data of the export: %q, %v", b, err)
	}
	if left := nfsMounts(t, n.Dir); len(left) > 0 {
		t.Errorf("mounts left: %v", left)
	}
}

// nfsMounts are the mounts of the test's server below a directory, by mount id.
func nfsMounts(t testing.TB, below string) map[string]string {
	t.Helper()
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	found := map[string]string{}
	for s := bufio.NewScanner(f); s.Scan(); {
		f := strings.Fields(s.Text())
		if strings.HasPrefix(f[4], below) && strings.Contains(s.Text(), ":"+nfsExport+" ") {
			found[f[0]] = f[4]
		}
	}
	return found
}

// A server that vanishes while pods write to it costs those pods alone.
func TestNFSServerDies(t *testing.T) {
	serveNFS(t)
	n := start(t)
	hostMount := t.TempDir()
	command(t, "mount", "-t", "nfs", "-o", "vers=4.1", "127.0.0.1:"+nfsExport, hostMount)
	t.Cleanup(func() {
		if err := syscall.Unmount(hostMount, syscall.MNT_FORCE|syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", hostMount, err)
		}
	})
	// Dirty pages, which an exit waits for, and waits of every other kind.
	write := func(file string) string {
		return "while :; do dd if=/dev/zero of=/data/" + file + " bs=16k count=8 2>/dev/null; ls /data >/dev/null; rm -f /data/" + file + "x; sleep 0.2; done"
	}
	direct := "nfs: {server: 127.0.0.1, path: " + nfsExport + "}"
	n.Write("four.yaml", user("four", direct, "", write("four")))
	n.Write("three.yaml", nfsVolume("three", "127.0.0.1", "nfsvers=3")+user("three", "persistentVolumeClaim: {claimName: three}", "", write("three")))
	n.Write("stays.yaml", user("stays", direct, ", subPath: stays", write("stays")))
	n.Write("onhost.yaml", user("onhost", "hostPath: {path: "+hostMount+", type: Directory}", "", write("onhost")))
	n.Write("again.yaml", user("again", direct, "", "ls /data; sleep 5"))
	n.Write("watch.yaml", pod("watch", "", "serve", ":8098")+
		"    readinessProbe: {httpGet: {port: 8098, path: /}, periodSeconds: 1}\n    livenessProbe: {exec: {command: [/testserver, env]}, periodSeconds: 1, timeoutSeconds: 30}\n")
	n.WaitRunning("four", "three", "stays", "onhost")
	watch := n.WaitPod("watch", "ready", 60*second, ready)
	affected := []string{"four", "three", "stays", "onhost"}
	alive, dead := &bystanders{n: n}, &bystanders{n: n, made: 1000}
	const rounds, each = 2, 5
	alive.round(t) // what is made once
	*alive = bystanders{n: n, made: 100}
	for i := range rounds {
		for range each {
			alive.round(t)
		}
		unreachable(t)
		n.WaitPods("told", 60*second, told(v1.ConditionFalse, affected))
		for range each {
			dead.round(t)
		}
		if i == rounds-1 {
			break
		}
		reachable(t)
		n.WaitPods("told again", 300*second, told(v1.ConditionTrue, affected))
	}
	compare(t, alive, dead)
	events := n.OK("events")
	for _, want := range []string{"VolumeConditionAbnormal", "127.0.0.1:" + nfsExport} {
		if !strings.Contains(events, want) {
			t.Errorf("no event has %q:\n%s", want, events)
		}
	}

	stays := n.WaitPod("stays", "running", 10*second, node.Running)
	// A pod that wants to begin now waits, and is told why.
	n.Write("late.yaml", user("late", direct, "", "echo up; "+nfsForever))
	// Those that are deleted now go, with processes that wait for the server.
	mounts := nfsMounts(t, n.Dir)
	begun := time.Now()
	n.Remove("four.yaml", "three.yaml", "again.yaml")
	awaitGone(t, n, 300*second, "four", "three", "again")
	took := time.Since(begun)
	t.Logf("pods of the dead server are deleted in %v", took.Round(100*time.Millisecond))
	if took > 61*second {
		t.Errorf("pods of the dead server took %v, want their grace period and 60 s", took)
	}
	left := nfsMounts(t, n.Dir)
	for id, at := range mounts {
		if _, there := left[id]; there == !strings.Contains(at, string(stays.UID)) {
			t.Errorf("mount %s at %s is there: %v", id, at, there)
		}
	}
	node.Await(t, "the failed mount told", 120*second, func() bool {
		return strings.Contains(n.OK("events"), "nfs 127.0.0.1:"+nfsExport)
	}, func() string { return n.OK("events") })

	// The daemon comes up without the server, and with it all is as before.
	n.Signal(syscall.SIGKILL)
	n.Start()
	n.WaitPod("watch", "ready", 60*second, ready)
	affected = []string{"stays", "onhost"}
	n.WaitPods("told after the restart", 60*second, told(v1.ConditionFalse, affected))
	reachable(t)
	begun = time.Now()
	n.WaitPods("told again", 300*second, told(v1.ConditionTrue, affected))
	n.WaitPod("late", "running", 300*second, node.Running)
	t.Logf("recovered in %v", time.Since(begun).Round(100*time.Millisecond))
	wrote := func() bool {
		st, err := os.Stat(nfsExport + "/stays/stays")
		return err == nil && time.Since(st.ModTime()) < 10*second
	}
	node.Await(t, "the pod that stayed writing again", 120*second, wrote)
	if p := n.WaitPod("stays", "running", 10*second, node.Running); status(p).RestartCount != 0 {
		t.Errorf("the pod that waited was restarted: %+v", status(p))
	}
	if p := n.WaitPod("watch", "ready", 10*second, ready); status(p).RestartCount != 0 || status(p).ContainerID != status(watch).ContainerID {
		t.Errorf("probes of a pod without volumes failed: %+v", status(p))
	}
	n.Remove("stays.yaml", "onhost.yaml", "late.yaml", "watch.yaml")
	n.WaitGone(90 * second)
	if left := nfsMounts(t, n.Dir); len(left) > 0 {
		t.Errorf("mounts left: %v", left)
	}
}
