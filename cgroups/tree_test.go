package cgroups

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// testTree makes a tree below a root of the test's own and removes it after.
func testTree(t testing.TB, l layout) *Tree {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: creates cgroups")
	}
	root := fmt.Sprintf("/podd-test-cg-%d-%s", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "-"))
	tree, err := newTree(Config{Root: root}, l)
	if err != nil {
		if errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.EACCES) {
			t.Skipf("cgroups cannot be written here: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := tree.layout.remove(ctx, root); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return tree
}

// layouts are the trees that this host can test: its own and, on a hybrid
// host, the v2 one as if it were alone.
func layouts(t testing.TB) map[string]layout {
	t.Helper()
	l, err := discover()
	if err != nil {
		t.Skipf("no cgroups here: %v", err)
	}
	m := map[string]layout{"host": l}
	if !l.unified {
		if d := l.of(""); d != "" {
			m["v2"] = layout{unified: true, hierarchies: []hierarchy{{dir: d}}}
		}
	}
	return m
}

func resources(memory int64, shares uint64) *specs.LinuxResources {
	return &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &shares}, Memory: &specs.LinuxMemory{Limit: &memory}}
}

func TestEnsureListRemove(t *testing.T) {
	for name, l := range layouts(t) {
		t.Run(name, func(t *testing.T) {
			tree := testTree(t, l)
			ctx := t.Context()
			for i, qos := range levels {
				uid := types.UID(fmt.Sprintf("0000-%d", i))
				if err := tree.Ensure(ctx, uid, qos, nil); err != nil {
					t.Fatal(err)
				}
				for _, h := range l.hierarchies {
					if _, err := os.Stat(h.dir + tree.Path(uid, qos)); err != nil {
						t.Error(err)
					}
				}
				if _, err := tree.Stats(uid); err != nil {
					t.Error(err)
				}
			}
			got, err := tree.List()
			if err != nil {
				t.Fatal(err)
			}
			slices.Sort(got)
			if want := []types.UID{"0000-0", "0000-1", "0000-2"}; !slices.Equal(got, want) {
				t.Errorf("list: %v, want %v", got, want)
			}
			for range 2 { // removing what is gone succeeds
				for _, uid := range got {
					if err := tree.Remove(ctx, uid); err != nil {
						t.Error(err)
					}
				}
			}
			if got, _ := tree.List(); len(got) != 0 {
				t.Errorf("left: %v", got)
			}
			if _, err := tree.Stats("0000-0"); !errdefs.IsNotFound(err) {
				t.Errorf("stats of a removed group: %v, want not found", err)
			}
		})
	}
}

func TestLimitsAreSetAndLifted(t *testing.T) {
	l, err := discover()
	if err != nil || l.unified && !contains(readString(t, mountRoot+"/cgroup.controllers"), "memory") {
		t.Skip("no memory controller")
	}
	tree := testTree(t, l)
	limit := func() uint64 {
		s, err := tree.Stats("a")
		if err != nil {
			t.Fatal(err)
		}
		if s.MemoryLimit == nil {
			return 0
		}
		return *s.MemoryLimit
	}
	for _, step := range []struct {
		r    *specs.LinuxResources
		want uint64
	}{
		{resources(64<<20, 512), 64 << 20},
		{resources(32<<20, 512), 32 << 20},
		{nil, 0},
		{resources(48<<20, 2), 48 << 20},
	} {
		if err := tree.Ensure(t.Context(), "a", v1.PodQOSBurstable, step.r); err != nil {
			t.Fatal(err)
		}
		if got := limit(); got != step.want {
			t.Errorf("limit %d, want %d", got, step.want)
		}
	}
	// Somebody removes the group: the next Ensure makes it again, with limits.
	if err := l.remove(t.Context(), tree.Path("a", v1.PodQOSBurstable)); err != nil {
		t.Fatal(err)
	}
	if err := tree.Ensure(t.Context(), "a", v1.PodQOSBurstable, resources(48<<20, 2)); err != nil {
		t.Fatal(err)
	}
	if got := limit(); got != 48<<20 {
		t.Errorf("after removal by others: limit %d", got)
	}
}

func readString(t testing.TB, path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestQoSWeights(t *testing.T) {
	l, err := discover()
	if err != nil {
		t.Skip(err)
	}
	tree := testTree(t, l)
	file, want := "/cpu.shares", [3]string{"2560", "2", "2048"}
	if l.unified {
		file, want = "/cpu.weight", [3]string{"98", "1", "79"}
		if !tree.have["cpu"] {
			t.Skip("no cpu controller")
		}
	}
	weight := func(qos v1.PodQOSClass) string {
		return strings.TrimSpace(readString(t, l.of("cpu")+tree.names.path(tree.names.level(qos))+file))
	}
	for uid, qos := range map[types.UID]v1.PodQOSClass{"a": v1.PodQOSBurstable, "b": v1.PodQOSBurstable, "g": v1.PodQOSGuaranteed, "e": v1.PodQOSBestEffort} {
		if err := tree.Ensure(t.Context(), uid, qos, resources(64<<20, 1280)); err != nil {
			t.Fatal(err)
		}
	}
	if err := tree.SetNodeAllocatable(NodeAllocatable(2000, 1<<30, 0)); err != nil {
		t.Fatal(err)
	}
	if got := [3]string{weight(v1.PodQOSBurstable), weight(v1.PodQOSBestEffort), weight(v1.PodQOSGuaranteed)}; got != want {
		t.Errorf("burstable, best effort, kubepods: %v, want %v", got, want)
	}
	// A restart keeps the weight; what goes takes its part with it.
	again, err := newTree(Config{Root: strings.Join(tree.names.root, "/")}, l)
	if err != nil {
		t.Fatal(err)
	}
	// Read back from the pods' weights, which are coarser than shares.
	if got := weight(v1.PodQOSBurstable); got != want[0] && (!l.unified || got != "97") {
		t.Errorf("burstable after a restart: %s, want %s", got, want[0])
	}
	for _, uid := range []types.UID{"a", "b"} {
		if err := again.Remove(t.Context(), uid); err != nil {
			t.Fatal(err)
		}
	}
	if got := weight(v1.PodQOSBurstable); got != want[1] {
		t.Errorf("burstable without pods: %s, want %s", got, want[1])
	}
}

// Two node agents with one root leave each other's pods alone.
func TestOwners(t *testing.T) {
	for name, l := range layouts(t) {
		t.Run(name, func(t *testing.T) {
			one := testTree(t, l)
			other, err := newTree(Config{Root: strings.Join(one.names.root, "/"), Owner: "other"}, l)
			if err != nil {
				t.Fatal(err)
			}
			if err := one.Ensure(t.Context(), "a", v1.PodQOSBestEffort, nil); err != nil {
				t.Fatal(err)
			}
			if got, err := other.List(); err != nil || len(got) != 0 {
				t.Errorf("the other sees %v, %v", got, err)
			}
			if err := other.Remove(t.Context(), "a"); err != nil {
				t.Error(err)
			}
			if err := other.Ensure(t.Context(), "a", v1.PodQOSBestEffort, nil); !errdefs.IsAlreadyExists(err) {
				t.Errorf("the other's pod of the same UID: %v, want already exists", err)
			}
			if _, err := one.Stats("a"); err != nil {
				t.Errorf("the first one's group suffered: %v", err)
			}
			// A kubelet's group carries no mark, and has groups of containers in it.
			for _, h := range l.hierarchies {
				for _, below := range []string{"", "/container"} {
					if _, err := l.mkdir(h, one.Path("kubelets", v1.PodQOSBestEffort)+below); err != nil {
						t.Fatal(err)
					}
				}
			}
			if got, err := one.List(); err != nil || !slices.Equal(got, []types.UID{"a"}) {
				t.Errorf("list: %v, %v; want a alone", got, err)
			}
			if err := one.Remove(t.Context(), "kubelets"); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(l.hierarchies[0].dir + one.Path("kubelets", v1.PodQOSBestEffort)); err != nil {
				t.Error(err)
			}
			again, err := newTree(Config{Root: strings.Join(one.names.root, "/")}, l)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(again.Ensure(t.Context(), "a", v1.PodQOSBestEffort, nil), again.Remove(t.Context(), "a")); err != nil {
				t.Errorf("the owner after a restart: %v", err)
			}
		})
	}
}

// TestRemoveTakesWhatAKilledRunWasMaking: a group that is in some hierarchies, and
// marked in none or one of those.
func TestRemoveTakesWhatAKilledRunWasMaking(t *testing.T) {
	for name, l := range layouts(t) {
		t.Run(name, func(t *testing.T) {
			tree := testTree(t, l)
			group := tree.Path("half", v1.PodQOSBestEffort)
			for _, marked := range []bool{false, true} {
				for i, h := range l.hierarchies[:(len(l.hierarchies)+1)/2] {
					if _, err := l.mkdir(h, group); err != nil {
						t.Fatal(err)
					}
					if marked && i == 0 {
						if err := unix.Setxattr(h.dir+group, ownerAttr, []byte(tree.owner), 0); err != nil {
							t.Skipf("no marks here: %v", err)
						}
					}
				}
				if !marked {
					if got, err := tree.List(); err != nil || len(got) > 0 {
						t.Errorf("list of a young one: %v, %v", got, err)
					}
					old := time.Now().Add(-2 * halfMade)
					if err := os.Chtimes(l.hierarchies[0].dir+group, old, old); err != nil {
						t.Fatal(err)
					}
				}
				if got, err := tree.List(); err != nil || len(got) != 1 {
					t.Errorf("list (marked: %v): %v, %v", marked, got, err)
				}
				if err := tree.Remove(t.Context(), "half"); err != nil {
					t.Error(err)
				}
				for _, h := range l.hierarchies {
					if _, err := os.Stat(h.dir + group); err == nil {
						t.Errorf("%s is left (marked: %v)", h.dir+group, marked)
					}
				}
			}
		})
	}
}

// Everything in the group dies, also what is below in a subgroup and frozen,
// and what forks.
func TestRemoveKills(t *testing.T) {
	for name, l := range layouts(t) {
		t.Run(name, func(t *testing.T) {
			tree := testTree(t, l)
			if err := tree.Ensure(t.Context(), "k", v1.PodQOSBestEffort, nil); err != nil {
				t.Fatal(err)
			}
			group := tree.Path("k", v1.PodQOSBestEffort) + "/ctr"
			cmd := exec.Command("/bin/sh", "-c", "while :; do sleep 60 & sleep 0.01; done")
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
			for _, h := range l.hierarchies {
				if _, err := l.mkdir(h, group); err != nil {
					t.Fatal(err)
				}
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
			for _, h := range l.hierarchies {
				if err := writeFile(h.dir+group, "cgroup.procs", fmt.Sprint(cmd.Process.Pid)); err != nil {
					t.Fatal(err)
				}
			}
			if d := l.of("freezer"); d != "" && !l.unified {
				if err := writeFile(d+group, "freezer.state", "FROZEN"); err != nil {
					t.Fatal(err)
				}
			}
			done := make(chan error, 1)
			go func() { done <- cmd.Wait() }()
			if err := tree.Remove(t.Context(), "k"); err != nil {
				t.Fatal(err)
			}
			select {
			case <-done:
			case <-time.After(5 * time.Second):
				t.Fatal("the process survived")
			}
		})
	}
}

// TestRemoveSparesVisitingThreads: podd-shim starts a pod's first process from a
// thread that has joined the pod's group alone. Should the group be removed in
// that moment, the shim must not be killed with what is in it.
func TestRemoveSparesVisitingThreads(t *testing.T) {
	l := layouts(t)["host"]
	if l.unified {
		t.Skip("on cgroup v2 no thread joins a group alone")
	}
	tree := testTree(t, l)
	const uid = types.UID("visited")
	if err := tree.Ensure(t.Context(), uid, v1.PodQOSBurstable, nil); err != nil {
		t.Fatal(err)
	}
	entered, leave, left := make(chan error), make(chan struct{}), make(chan struct{})
	var visit func()
	visit = func() {
		runtime.LockOSThread() // the thread ends with this goroutine
		if unix.Gettid() == os.Getpid() {
			go visit() // the main thread would be the whole process
			<-left
			runtime.UnlockOSThread()
			return
		}
		defer close(left)
		var err error
		for _, h := range l.hierarchies {
			if h.dir == l.of("freezer") {
				continue // killed while frozen, this test would not even end
			}
			err = errors.Join(err, os.WriteFile(h.dir+tree.Path(uid, v1.PodQOSBurstable)+"/tasks", []byte("0"), 0))
		}
		entered <- err
		<-leave
	}
	go visit()
	if err := <-entered; err != nil {
		close(leave)
		t.Skipf("a thread cannot join the group: %v", err)
	}
	l.kill(tree.Path(uid, v1.PodQOSBurstable)) // ends this test where it kills too much
	close(leave)
	<-left
	if err := tree.Remove(t.Context(), uid); err != nil {
		t.Error(err)
	}
}

func TestRemoveIsBounded(t *testing.T) {
	l, err := discover()
	if err != nil {
		t.Skip(err)
	}
	tree := testTree(t, l)
	if err := tree.Ensure(t.Context(), "b", v1.PodQOSBestEffort, nil); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	if err := writeFile(l.hierarchies[0].dir+tree.Path("b", v1.PodQOSBestEffort), "cgroup.procs", fmt.Sprint(cmd.Process.Pid)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err = tree.Remove(ctx, "b")
	if err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("want the context's error, got %v", err)
	}
	if err := tree.Remove(t.Context(), "b"); err != nil {
		t.Error(err)
	}
}

func TestEnsureRefusesUIDs(t *testing.T) {
	tree := &Tree{}
	for _, uid := range []types.UID{"", "../../x", "a/b", types.UID(strings.Repeat("x", 300))} {
		if err := tree.Ensure(t.Context(), uid, v1.PodQOSBurstable, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("uid %.20q: %v, want invalid argument", uid, err)
		}
	}
}

func BenchmarkEnsureRemove(b *testing.B) {
	l, err := discover()
	if err != nil {
		b.Skip(err)
	}
	tree := testTree(b, l)
	r := resources(64<<20, 512)
	for b.Loop() {
		if err := tree.Ensure(b.Context(), "bench", v1.PodQOSBurstable, r); err != nil {
			b.Fatal(err)
		}
		if err := tree.Remove(b.Context(), "bench"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEnsureUnchanged(b *testing.B) {
	l, err := discover()
	if err != nil {
		b.Skip(err)
	}
	tree := testTree(b, l)
	r := resources(64<<20, 512)
	for b.Loop() {
		if err := tree.Ensure(b.Context(), "bench", v1.PodQOSBurstable, r); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStats(b *testing.B) {
	l, err := discover()
	if err != nil {
		b.Skip(err)
	}
	tree := testTree(b, l)
	if err := tree.Ensure(b.Context(), "bench", v1.PodQOSBurstable, nil); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := tree.Stats("bench"); err != nil {
			b.Fatal(err)
		}
	}
}
