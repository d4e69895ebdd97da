package volumes

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// A filesystem that does not answer delays its own operation only, and that for
// no longer than the limit.
func TestHelperIsKilled(t *testing.T) {
	v, _ := testVolumes(t)
	hung := filepath.Join(t.TempDir(), "hung")
	pidFile := filepath.Join(t.TempDir(), "pid")
	if err := os.WriteFile(hung, []byte("#!/bin/sh\necho $$ >"+pidFile+"\nexec sleep 1000\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	v.cfg.Helper = hung
	began := time.Now()
	err := v.helper(context.Background(), 300*time.Millisecond, request{Op: opHostPath, Path: "/mnt/dead"})
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "/mnt/dead") {
		t.Errorf("error: %v", err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
	pid, err := os.ReadFile(pidFile)
	if err == nil {
		if _, err := os.Stat("/proc/" + strings.TrimSpace(string(pid))); err == nil {
			t.Error("the helper still runs")
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := v.helper(ctx, time.Hour, request{Op: opHostPath, Path: "/mnt/dead"}); err == nil {
		t.Error("a cancelled operation went on")
	}
}

func TestHelperThatSaysNothing(t *testing.T) {
	v, _ := testVolumes(t)
	v.cfg.Helper = "/bin/false"
	if err := v.helper(context.Background(), time.Minute, request{Op: opHostPath}); err == nil || !strings.Contains(err.Error(), "volume helper") {
		t.Errorf("error: %v", err)
	}
	v.cfg.Helper = "/no/such/program"
	if err := v.helper(context.Background(), time.Minute, request{Op: opHostPath}); err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("error: %v", err)
	}
}

func TestForeignPath(t *testing.T) {
	local := t.TempDir()
	for name, target := range map[string]string{"abs": "/mnt/nas/data", "rel": "../../../../../../../../mnt/nas", "loop": "loop", "here": "."} {
		if err := os.Symlink(target, filepath.Join(local, name)); err != nil {
			t.Fatal(err)
		}
	}
	table := func(lines ...string) *mountTable {
		m, err := parseMounts([]byte(strings.Join(lines, "\n") + "\n"))
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	const root = "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"
	nas := table(root, "40 21 0:50 / /mnt/nas rw - nfs4 server:/export rw,vers=4.2", "41 40 0:51 / /mnt/nas/local rw - ext4 /dev/sdb rw", `42 21 0:52 / /mnt/with\040space rw - fuse.sshfs u@h: rw`)
	for path, want := range map[string]bool{
		"/": false, local: false, "/mnt": false, "/mnt/nas": true, "/mnt/nas/x/y": true, "/mnt/nasty": false,
		// What lies below a foreign mount is reached through it.
		"/mnt/nas/local": true, "/mnt/with space/x": true, "/mnt/nas/..": true, "/mnt/./nas": true,
		local + "/abs": true, local + "/abs/x": true, local + "/rel": true, local + "/loop": false, local + "/here/here": false, local + "/here/abs": true,
	} {
		if got := nas.foreignPath(path); got != want {
			t.Errorf("%s: %v", path, got)
		}
	}
	covered := table(root, "40 21 0:50 / /mnt/nas rw - nfs4 server:/export rw", "41 21 0:51 / /mnt/nas rw - tmpfs tmpfs rw")
	if covered.foreignPath("/mnt/nas/x") {
		t.Error("a foreign mount that another covers is out of reach")
	}
	if table(root).foreignPath("/mnt/nas") {
		t.Error("no foreign mount at all")
	}
	if _, err := parseMounts([]byte("nonsense\n")); err == nil {
		t.Error("nonsense was read")
	}
}

func TestBelowIsDeepestFirst(t *testing.T) {
	m, err := parseMounts([]byte("1 0 8:1 / / rw - ext4 d rw\n2 1 0:1 / /p/u/a rw - tmpfs t rw\n3 2 0:2 / /p/u/a/b rw master:1 - tmpfs t rw\n4 1 0:3 / /p/u2 rw - tmpfs t rw\n5 1 0:4 / /p/u/a rw - tmpfs over rw\n"))
	if err != nil {
		t.Fatal(err)
	}
	var ids []uint64
	for _, e := range m.below("/p/u") {
		ids = append(ids, e.id)
	}
	if len(ids) != 3 || ids[0] != 3 || ids[1] != 5 || ids[2] != 2 {
		t.Errorf("order %v", ids)
	}
}

func TestNFSOptions(t *testing.T) {
	four, six := net.ParseIP("10.0.0.1"), net.ParseIP("fd00::1")
	for _, c := range []struct {
		options      []string
		addr, client net.IP
		version      string
		want         string
		flags        uintptr
		versions     int
	}{
		{nil, four, net.ParseIP("10.0.0.9"), "4.2", "vers=4.2,proto=tcp,addr=10.0.0.1,clientaddr=10.0.0.9", 0, 4},
		{nil, six, net.ParseIP("fd00::9"), "4.1", "vers=4.1,proto=tcp6,addr=fd00::1,clientaddr=fd00::9", 0, 4},
		{nil, four, nil, "3", "vers=3,proto=tcp,addr=10.0.0.1,mountaddr=10.0.0.1,mountproto=tcp,mountvers=3", 0, 4},
		{[]string{"nfsvers=3", "nolock,soft", "timeo=5"}, four, nil, "3", "vers=3,nolock,soft,timeo=5,proto=tcp,addr=10.0.0.1,mountaddr=10.0.0.1,mountproto=tcp,mountvers=3", 0, 1},
		{[]string{"ro", "noatime", "bg", "_netdev", "x-systemd.automount", "v4.1"}, four, four, "4.1", "vers=4.1,proto=tcp,addr=10.0.0.1,clientaddr=10.0.0.1", unix.MS_RDONLY | unix.MS_NOATIME, 1},
		{[]string{"vers=4,proto=rdma", "ro", "rw"}, four, four, "4.0", "vers=4.0,proto=rdma,addr=10.0.0.1,clientaddr=10.0.0.1", 0, 3},
	} {
		m, err := nfsParse(c.options)
		if err != nil {
			t.Errorf("%v: %v", c.options, err)
			continue
		}
		if got := m.options(c.addr, c.client, c.version); got != c.want || m.flags != c.flags || len(m.versions) != c.versions {
			t.Errorf("%v: got %s, flags %x, versions %v, want %s", c.options, got, m.flags, m.versions, c.want)
		}
	}
	if _, err := nfsParse([]string{"vers=5"}); err == nil {
		t.Error("version 5 was taken")
	}
	for got, want := range map[string]string{nfsSource("server", "/a//b/"): "server:/a/b", nfsSource("fd00::1", "x"): "[fd00::1]:/x"} {
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	if otherVersion(unix.EACCES) || otherVersion(unix.ETIMEDOUT) || !otherVersion(unix.EPROTONOSUPPORT) {
		t.Error("which errors another version may cure")
	}
}

// Without a server the mount fails, names it, and nothing is left.
func TestNFSWithoutServer(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	p := pod("u1", v1.Volume{Name: "n", VolumeSource: v1.VolumeSource{NFS: &v1.NFSVolumeSource{Server: "127.0.0.1", Path: "/export"}}})
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err := v.Setup(ctx, p)
	if err == nil || !strings.Contains(err.Error(), `MountVolume.SetUp failed for volume "n" : nfs 127.0.0.1:/export`) {
		t.Errorf("error: %v", err)
	}
}

func TestHugePages(t *testing.T) {
	request := func(name, amount string) v1.Container {
		return v1.Container{Name: "c", Resources: v1.ResourceRequirements{Requests: v1.ResourceList{v1.ResourceName(name): resource.MustParse(amount)}}}
	}
	for name, c := range map[string]struct {
		medium       v1.StorageMedium
		containers   []v1.Container
		size, amount int64
		bad          bool
	}{
		"named":          {"HugePages-2Mi", []v1.Container{request("hugepages-2Mi", "4Mi")}, 2 << 20, 4 << 20, false},
		"only one":       {"HugePages", []v1.Container{request("hugepages-2Mi", "4Mi"), request("hugepages-2Mi", "2Mi")}, 2 << 20, 6 << 20, false},
		"two sizes":      {"HugePages", []v1.Container{request("hugepages-2Mi", "4Mi"), request("hugepages-1Gi", "1Gi")}, 0, 0, true},
		"none requested": {"HugePages-2Mi", nil, 0, 0, true},
		"no size":        {"HugePages-x", nil, 0, 0, true},
	} {
		p := &v1.Pod{Spec: v1.PodSpec{Containers: c.containers}}
		size, amount, err := hugePages(p, c.medium)
		if (err != nil) != c.bad || size != c.size || amount != c.amount {
			t.Errorf("%s: %d %d %v", name, size, amount, err)
		}
	}
	needRoot(t)
	if _, err := os.Stat("/sys/kernel/mm/hugepages/hugepages-2048kB"); err != nil {
		t.Skip("needs 2 MiB pages")
	}
	v, _ := testVolumes(t)
	p := pod("u1", emptyDirVolume("h", "HugePages-2Mi"))
	p.Spec.Containers[0].Resources.Requests = v1.ResourceList{"hugepages-2Mi": resource.MustParse("4Mi")}
	setup(t, v, p)
	var f unix.Statfs_t
	if err := unix.Statfs(hostPaths(t, v, p)[0], &f); err != nil || f.Type != unix.HUGETLBFS_MAGIC || f.Bsize != 2<<20 {
		t.Errorf("%+v %v", f, err)
	}
}

func TestMemorySize(t *testing.T) {
	q := resource.MustParse
	limit := q("64Mi")
	limited := v1.Container{Resources: v1.ResourceRequirements{Limits: v1.ResourceList{v1.ResourceMemory: q("32Mi")}}}
	always := v1.ContainerRestartPolicyAlways
	sidecar := limited
	sidecar.RestartPolicy = &always
	for name, c := range map[string]struct {
		node int64
		spec v1.PodSpec
		lim  *resource.Quantity
		want int64
	}{
		"nothing known":    {0, v1.PodSpec{Containers: []v1.Container{{}}}, nil, 0},
		"the node's":       {1 << 30, v1.PodSpec{Containers: []v1.Container{{}}}, nil, 1 << 30},
		"the volume's":     {1 << 30, v1.PodSpec{Containers: []v1.Container{{}}}, &limit, 64 << 20},
		"the pod's":        {1 << 30, v1.PodSpec{Containers: []v1.Container{limited}}, &limit, 32 << 20},
		"one is unlimited": {1 << 30, v1.PodSpec{Containers: []v1.Container{limited, {}}}, nil, 1 << 30},
		"with a sidecar":   {1 << 30, v1.PodSpec{Containers: []v1.Container{limited}, InitContainers: []v1.Container{sidecar}}, nil, 64 << 20},
		"more than node":   {1 << 20, v1.PodSpec{Containers: []v1.Container{limited}}, &limit, 1 << 20},
	} {
		v := New(Config{Allocatable: func() v1.ResourceList {
			if c.node == 0 {
				return nil
			}
			return v1.ResourceList{v1.ResourceMemory: *resource.NewQuantity(c.node, resource.BinarySI)}
		}})
		if got := v.memorySize(&v1.Pod{Spec: c.spec}, c.lim); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}
