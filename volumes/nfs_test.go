package volumes

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// nfsExport is what this machine's own NFS server serves.
const nfsExport = "/srv/podd-volumes"

// serveNFS starts the kernel's NFS server as its units would, with a tmpfs to
// serve. It takes the machine's whole NFS configuration, so it needs one to
// throw away.
func serveNFS(t *testing.T) {
	t.Helper()
	if os.Getenv("PODD_TEST_DISPOSABLE") == "" {
		t.Skip("configures the machine's NFS server; the long node suite runs it on one to throw away")
	}
	if _, err := os.Stat("/usr/sbin/rpc.nfsd"); err != nil {
		t.Skip("needs nfs-kernel-server")
	}
	if err := os.WriteFile("/etc/exports", []byte(nfsExport+" *(rw,no_root_squash,no_subtree_check,insecure,fsid=1)\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(nfsExport, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", nfsExport, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		reachable(t)
		for _, c := range []string{"rpc.nfsd 0", "exportfs -au"} {
			if out, err := exec.Command("sh", "-c", c).CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", c, err, out)
			}
		}
		if err := unix.Unmount(nfsExport, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	// Clients may go on 10 s after the server is back, not 90.
	const start = `modprobe nfsd; mountpoint -q /proc/fs/nfsd || mount -t nfsd nfsd /proc/fs/nfsd
		pidof rpcbind >/dev/null || rpcbind -w
		exportfs -ra
		rpc.nfsd -G 10 -L 10 4
		pidof rpc.mountd >/dev/null || rpc.mountd
		pidof rpc.statd >/dev/null || rpc.statd --no-notify`
	if out, err := exec.Command("sh", "-ec", start).CombinedOutput(); err != nil {
		t.Fatalf("start the NFS server: %v\n%s", err, out)
	}
}

// unreachable lets every packet to and from the server vanish, as when its
// machine has lost its power; reachable ends that. Where the kernel has no
// filter for IPv4 the loopback device goes down.
func unreachable(t *testing.T) {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader("table ip podd_test_nfs { chain in { type filter hook input priority 0; tcp dport { 111, 2049 } drop; tcp sport 2049 drop; udp dport 111 drop; }; }\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Logf("nft: %v\n%.200s", err, out)
		if out, err := exec.Command("ip", "link", "set", "lo", "down").CombinedOutput(); err != nil {
			t.Fatalf("lo: %v\n%s", err, out)
		}
	}
}

func reachable(t *testing.T) {
	t.Helper()
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Errorf("lo: %v\n%s", err, out)
	}
	if out, err := exec.Command("nft", "delete", "table", "ip", "podd_test_nfs").CombinedOutput(); err != nil && !strings.Contains(string(out), "No such file") {
		t.Errorf("nft: %v\n%s", err, out)
	}
}

func nfsVolume(name, server, path string, readOnly bool) v1.Volume {
	return v1.Volume{Name: name, VolumeSource: v1.VolumeSource{NFS: &v1.NFSVolumeSource{Server: server, Path: path, ReadOnly: readOnly}}}
}

func nfsPV(name, server string, options ...string) *v1.PersistentVolume {
	return &v1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1.PersistentVolumeSpec{
		MountOptions: options, PersistentVolumeSource: v1.PersistentVolumeSource{NFS: &v1.NFSVolumeSource{Server: server, Path: nfsExport}},
	}}
}

// mountLine is the line of a mount point in /proc/self/mounts.
func mountLine(t *testing.T, point string) string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); f[1] == point {
			return line
		}
	}
	return ""
}

func TestNFSVersionsAndOptions(t *testing.T) {
	serveNFS(t)
	v, _ := testVolumes(t)
	v.cfg.Claims = &fakeClaims{volumes: map[string]*v1.PersistentVolume{
		"three": nfsPV("three", "127.0.0.1", "nfsvers=3", "noatime"), "four": nfsPV("four", "127.0.0.1", "nfsvers=4.1,rsize=65536", "nosuid"),
		"zero": nfsPV("zero", "127.0.0.1", "vers=4.0", "soft", "timeo=50"),
	}}
	// Alone: a client that has the server by another address uses that one.
	six := pod("six", nfsVolume("six", "::1", nfsExport, false))
	setup(t, v, six)
	line := mountLine(t, hostPaths(t, v, six)[0])
	if !strings.HasPrefix(line, "[::1]:"+nfsExport+" ") || !strings.Contains(line, "proto=tcp6") {
		t.Errorf("by IPv6: %q", line)
	}
	if err := v.Teardown(context.Background(), six.UID); err != nil {
		t.Fatal(err)
	}
	newest := pod("newest", nfsVolume("newest", "127.0.0.1", nfsExport, false))
	newest.Spec.Containers[0].VolumeMounts = append(newest.Spec.Containers[0].VolumeMounts, v1.VolumeMount{Name: "newest", MountPath: "/sub", SubPath: "deep/er"})
	list := []*v1.Pod{
		newest, pod("readonly", nfsVolume("readonly", "127.0.0.1", nfsExport, true)),
		pod("three", claimVolume("three", "three")), pod("four", claimVolume("four", "four")), pod("zero", claimVolume("zero", "zero")),
	}
	paths := map[string]string{}
	for _, p := range list {
		began := time.Now()
		setup(t, v, p)
		t.Logf("%s: mounted in %v", p.UID, time.Since(began).Round(time.Millisecond))
		mounts, cleanup, err := v.Mounts(context.Background(), p, &p.Spec.Containers[0], nil)
		if err != nil {
			t.Fatal(err)
		}
		defer cleanup()
		for _, m := range mounts {
			paths[m.ContainerPath] = m.HostPath
			if m.ContainerPath == "/readonly" && !m.Readonly {
				t.Error("a readOnly volume is mounted writable")
			}
		}
	}
	for name, want := range map[string][]string{
		"/newest": {"127.0.0.1:" + nfsExport, " nfs4 ", "vers=4.2"},
		"/three":  {" nfs ", "vers=3", "noatime"}, "/four": {" nfs4 ", "vers=4.1", "nosuid", "rsize=65536"},
		"/zero": {"vers=4.0", "soft", "timeo=50"}, "/readonly": {" ro,", "vers=4.2"},
	} {
		line := mountLine(t, paths[name])
		for _, w := range want {
			if !strings.Contains(line, w) {
				t.Errorf("%s: no %q in %q", name, w, line)
			}
		}
	}
	// One export for all; a lock of version 3 is one of the server's too.
	if err := os.WriteFile(paths["/three"]+"/shared", []byte("one"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, path := range paths {
		if name == "/sub" {
			continue
		}
		if data, err := os.ReadFile(path + "/shared"); err != nil || string(data) != "one" {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	locked, err := os.OpenFile(paths["/three"]+"/shared", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer locked.Close()
	if err := unix.FcntlFlock(locked.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		t.Errorf("lock by version 3: %v", err)
	}
	locked.Close()
	if err := os.WriteFile(paths["/readonly"]+"/x", nil, 0o644); err == nil {
		t.Error("a readOnly volume was written to")
	}
	if err := os.WriteFile(paths["/sub"]+"/f", []byte("sub"), 0o644); err != nil {
		t.Error(err)
	}
	if data, err := os.ReadFile(nfsExport + "/deep/er/f"); err != nil || string(data) != "sub" {
		t.Errorf("subPath: %q, %v", data, err)
	}
	v.watch(context.Background(), list[:1], nil)
	measureAll(v, list[:1]...)
	if s := v.Stats("newest"); len(s) != 1 || *s[0].CapacityBytes != 64<<20 {
		t.Errorf("statistics: %+v", s)
	}
	// Setup again, as after a restart of the daemon: the same mounts.
	before := mountLine(t, paths["/newest"])
	setup(t, New(v.cfg), newest)
	if now := mountLine(t, paths["/newest"]); now != before {
		t.Errorf("mounted anew: %s, before %s", now, before)
	}

	missing := pod("none", nfsVolume("none", "127.0.0.1", "/srv/not-exported", false))
	if err := v.Setup(context.Background(), missing); err == nil || !strings.Contains(err.Error(), "nfs 127.0.0.1:/srv/not-exported") {
		t.Errorf("an export that is none: %v", err)
	}
	for _, p := range append(list, missing) {
		if err := v.Teardown(context.Background(), p.UID); err != nil {
			t.Error(err)
		}
	}
	if data, err := os.ReadFile(nfsExport + "/shared"); err != nil || string(data) != "one" {
		t.Errorf("data of the export: %q, %v", data, err)
	}
}

// writer is a process that keeps dirty pages of a volume, which an exit waits
// for, and other calls under way.
func writer(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", "-c", "while :; do dd if=/dev/zero of="+dir+"/data bs=64k count=64 2>/dev/null; ls "+dir+" >/dev/null; sleep 0.2; done")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// ended says whether no process of a group is left within a time.
func ended(pgid int, within time.Duration) bool {
	for end := time.Now().Add(within); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if unix.Kill(-pgid, 0) == unix.ESRCH {
			return true
		}
	}
	return false
}

// A server that vanishes under load: who uses it is told, is given up by force
// and goes within a minute; nobody else notices; and all is as before when it
// is back.
func TestNFSServerDies(t *testing.T) {
	serveNFS(t)
	v, _ := testVolumes(t)
	v.patience = 20 * time.Second // an emulated machine may take that long to start a process
	v.cfg.Claims = &fakeClaims{volumes: map[string]*v1.PersistentVolume{"three": nfsPV("three", "127.0.0.1", "nfsvers=3")}}
	pods := map[types.UID]*v1.Pod{
		"four": pod("four", nfsVolume("data", "127.0.0.1", nfsExport, false)), "three": pod("three", claimVolume("data", "three")),
	}
	groups := map[types.UID]int{}
	var list []*v1.Pod
	for uid, p := range pods {
		setup(t, v, p)
		dir := hostPaths(t, v, p)[0]
		if err := os.Mkdir(filepath.Join(dir, string(uid)), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := writer(t, filepath.Join(dir, string(uid)))
		groups[uid] = cmd.Process.Pid
		go cmd.Wait()
		list = append(list, p)
	}
	local := func(i int) time.Duration {
		began := time.Now()
		p := pod(fmt.Sprintf("l%d", i), emptyDirVolume("disk", ""), configMapVolume("conf"), emptyDirVolume("mem", v1.StorageMediumMemory))
		setup(t, v, p)
		hostPaths(t, v, p)
		if err := v.Teardown(context.Background(), p.UID); err != nil {
			t.Error(err)
		}
		return time.Since(began)
	}
	told := map[types.UID][]Trouble{}
	watch := func() {
		v.watch(context.Background(), list, func(uid types.UID, now []Trouble) { told[uid] = now })
	}
	watch()
	if len(told) != 0 {
		t.Fatalf("a server that answers: %v", told)
	}
	var alive, dead time.Duration
	for i := range 10 {
		alive += local(i)
	}
	unreachable(t)
	watch()
	for uid := range pods {
		if len(told[uid]) != 1 || !strings.Contains(told[uid][0].String(), "127.0.0.1:"+nfsExport) {
			t.Errorf("%s is told %v", uid, told[uid])
		}
	}
	for i := range 10 {
		dead += local(10 + i)
	}
	t.Logf("10 pods with local volumes: %v with the server, %v without", alive.Round(time.Millisecond), dead.Round(time.Millisecond))
	if dead > 3*alive+time.Second {
		t.Errorf("volumes of others take %v without the server, %v with it", dead, alive)
	}
	late := pod("late", nfsVolume("data", "127.0.0.1", nfsExport, false))
	late.Spec.Volumes[0].NFS.Path = nfsExport + "/late" // a mount of its own
	began := time.Now()
	if err := v.Setup(context.Background(), late); err == nil || !strings.Contains(err.Error(), "nfs 127.0.0.1:"+nfsExport) {
		t.Errorf("a mount without the server: %v", err)
	}
	if took := time.Since(began); took > foreignTimeout+10*time.Second {
		t.Errorf("it took %v", took)
	}

	for uid := range pods {
		began := time.Now()
		ids := map[uint64]bool{}
		table, err := readMounts()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range table.below(v.podDir(uid)) {
			ids[m.id] = true
		}
		if err := unix.Kill(-groups[uid], unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		// As a pod's worker does.
		if ended(groups[uid], 10*time.Second) {
			t.Logf("%s: its processes end by SIGKILL alone", uid)
		} else {
			t.Logf("%s: SIGKILL alone does not end its processes", uid)
			for try := 0; !ended(groups[uid], 10*time.Second) && try < 3; try++ {
				if err := v.Abort(context.Background(), uid); err != nil {
					t.Log(err)
				}
			}
			if !ended(groups[uid], time.Second) {
				t.Errorf("%s: its processes do not end", uid)
			}
		}
		if err := v.Teardown(context.Background(), uid); err != nil {
			t.Errorf("%s: %v", uid, err)
		}
		took := time.Since(began)
		t.Logf("%s: gone after %v", uid, took.Round(100*time.Millisecond))
		if took > time.Minute {
			t.Errorf("%s: took %v, want a minute at most", uid, took)
		}
		if table, err = readMounts(); err != nil {
			t.Fatal(err)
		}
		for _, m := range table.entries {
			if ids[m.id] {
				t.Errorf("%s: mount %d at %s is left", uid, m.id, m.point)
			}
		}
	}

	if err := os.Mkdir(nfsExport+"/late", 0o755); err != nil {
		t.Fatal(err)
	}
	reachable(t)
	began = time.Now()
	var err error
	for end := began.Add(3 * time.Minute); time.Now().Before(end); {
		if err = v.Setup(context.Background(), late); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatalf("with the server again: %v", err)
	}
	t.Logf("mounted %v after the server's return", time.Since(began).Round(100*time.Millisecond))
	list = []*v1.Pod{late}
	watch()
	if len(told["late"]) != 0 {
		t.Errorf("a server that answers again: %v", told["late"])
	}
}
