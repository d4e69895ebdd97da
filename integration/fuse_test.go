package integration

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/node"
)

// fuseServer names the directory that a process of this program serves, instead
// of running tests.
const fuseServer = "PODD_TEST_FUSE_SERVER"

// fuseRoot has one file, whose content nobody keeps in a cache.
type fuseRoot struct{ fs.Inode }

func (r *fuseRoot) OnAdd(ctx context.Context) {
	file := &fs.MemRegularFile{Data: []byte("content\n"), Attr: fuse.Attr{Mode: 0o644}}
	r.AddChild("file", r.NewPersistentInode(ctx, file, fs.StableAttr{}), false)
}

// serveFuse mounts and serves until the input ends.
func serveFuse(dir string) int {
	none := time.Duration(0)
	server, err := fs.Mount(dir, &fuseRoot{}, &fs.Options{
		EntryTimeout: &none, AttrTimeout: &none,
		MountOptions: fuse.MountOptions{DirectMountStrict: true, AllowOther: true, FsName: "podd-test", Name: "hung"},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("serving")
	_, _ = io.Copy(io.Discard, os.Stdin)
	_ = unix.Unmount(dir, unix.MNT_DETACH)
	server.Wait()
	return 0
}

// fuseMount is a file system whose server can be made to hang.
func fuseMount(t *testing.T) (dir string, server *os.Process) {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("no FUSE here: ", err)
	}
	dir = t.TempDir()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fuseServer+"="+dir)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGCONT)
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the FUSE server: %v", err)
		}
	})
	said := make([]byte, len("serving"))
	if _, err := io.ReadFull(out, said); err != nil {
		t.Fatalf("the FUSE server does not serve: %v", err)
	}
	return dir, cmd.Process
}

// TestFuseServerHangs: a file system of the host that does not answer any more
// costs the pods alone that use it.
func TestFuseServerHangs(t *testing.T) {
	dir, server := fuseMount(t)
	n := start(t)
	volume := "hostPath: {path: " + dir + ", type: Directory}"
	const reads = "while :; do cat /data/file >/dev/null; sleep 0.3; done"
	n.Write("reads.yaml", user("reads", volume, "", reads))
	n.Write("stays.yaml", user("stays", volume, "", reads))
	n.Write("below.yaml", user("below", volume, ", subPath: file", "while :; do cat /data >/dev/null; sleep 0.3; done"))
	n.WaitRunning("reads", "stays", "below")
	affected := []string{"reads", "stays", "below"}
	alive, hung := &bystanders{n: n}, &bystanders{n: n, made: 1000}
	alive.round(t) // what is made once
	*alive = bystanders{n: n, made: 100}
	for range 3 {
		alive.round(t)
	}
	if err := server.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	n.WaitPods("told", 60*second, told(v1.ConditionFalse, affected))
	for range 3 {
		hung.round(t)
	}
	compare(t, alive, hung)
	events := n.OK("events")
	for _, want := range []string{"VolumeConditionAbnormal", dir} {
		if !strings.Contains(events, want) {
			t.Errorf("no event has %q:\n%s", want, events)
		}
	}

	// One that wants to begin waits and is told why, and can go again.
	n.Write("late.yaml", user("late", volume, "", reads))
	n.Write("gone.yaml", user("gone", volume, "", reads))
	node.Await(t, "the pod that cannot begin told", 60*second, func() bool {
		out, _, _ := n.Podd("why", node.PodName("gone"))
		return strings.Contains(out, dir)
	}, func() string { return n.OK("why", node.PodName("gone")) })
	begun := time.Now()
	n.Remove("gone.yaml", "reads.yaml")
	awaitGone(t, n, 120*second, "gone", "reads")
	if took := time.Since(begun); took > 61*second {
		t.Errorf("pods of the hung file system took %v, want their grace period and 60 s", took)
	} else {
		t.Logf("pods of the hung file system are deleted in %v", took.Round(100*time.Millisecond))
	}
	n.Signal(syscall.SIGKILL)
	n.Start()
	hung.round(t)

	affected = []string{"stays", "below"}
	if err := server.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	begun = time.Now()
	n.WaitPods("told again", 60*second, told(v1.ConditionTrue, affected))
	n.WaitRunning("late")
	t.Logf("recovered in %v", time.Since(begun).Round(100*time.Millisecond))
	for _, name := range affected {
		if p, err := n.Pod(name); err != nil || status(p).RestartCount != 0 {
			t.Errorf("%s: %v %+v", name, err, p.Status)
		}
		n.OK("exec", node.PodName(name), "--", "cat", map[string]string{"stays": "/data/file", "below": "/data"}[name])
	}
	n.Remove("stays.yaml", "below.yaml", "late.yaml")
	n.WaitGone(60 * second)
}
