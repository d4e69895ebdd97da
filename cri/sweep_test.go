package cri

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// powerCut takes the run directory and every process; records named by lose had
// not reached the disk.
func (f *fixture) powerCut(t *testing.T, sandboxes []string, lose ...[2]string) {
	t.Helper()
	if err := f.Service.Close(); err != nil {
		t.Fatal(err)
	}
	for _, id := range sandboxes {
		if err := errors.Join(unpin(f.netnsPath(id)), unmount(f.sandboxDir(id)+"/shm")); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(f.cfg.RunDir); err != nil {
		t.Fatal(err)
	}
	for _, r := range lose {
		if err := os.Remove(filepath.Join(f.cfg.DataDir, "cri", r[0], r[1]+".json")); err != nil {
			t.Fatal(err)
		}
	}
	f.shim = newFakeShim()
}

// TestWhatAPowerCutLeftWithoutARecordGoes: snapshots, VOLUMEs and files of
// containers and sandboxes whose records are lost; what has one stays, and so
// does what is not ours.
func TestWhatAPowerCutLeftWithoutARecordGoes(t *testing.T) {
	f := newFixture(t)
	f.images.image.Config.Config.Volumes = map[string]struct{}{"/data": {}}
	volumes := func(name string) *runtimeapi.ContainerConfig {
		c := containerConfig(name)
		c.Mounts = []*runtimeapi.Mount{
			{ContainerPath: "/a", HostPath: "/etc"},
			{ContainerPath: "/img", Readonly: true, Image: &runtimeapi.ImageSpec{Image: "example.com/app:1"}},
		}
		return c
	}
	pod, gone := f.pod(t, "web"), f.pod(t, "gone")
	kept, lost := f.create(t, pod, volumes("kept")), f.create(t, pod, volumes("lost"))
	withPod := f.create(t, gone, volumes("app"))
	if n := len(f.images.roots); n != 6 {
		t.Fatalf("%d snapshots, want a root file system and an image volume of each of 3: %v", n, f.images.roots)
	}
	f.images.roots["by-hand"], f.images.roots[kept[:63]] = "", ""

	f.powerCut(t, []string{pod, gone}, [2]string{kindContainer, lost}, [2]string{kindSandbox, gone}, [2]string{kindContainer, withPod})
	f.images.fail["Snapshots"] = errBoom // no answer is no reason not to serve
	f.start(t)
	f.powerCut(t, nil)
	delete(f.images.fail, "Snapshots")
	f.start(t)

	left, _ := f.images.Snapshots(ctx)
	slices.Sort(left)
	want := []string{"by-hand", kept, kept + "-volume-1", kept[:63]}
	slices.Sort(want)
	if !slices.Equal(left, want) {
		t.Errorf("snapshots %v, want %v", left, want)
	}
	delete(f.images.roots, "by-hand")
	delete(f.images.roots, kept[:63])
	if _, err := f.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Error(err)
	}
	f.empty(t)
}

// TestUndoThatFailedIsTriedAgain: nobody can name what a failed request leaves,
// so the service itself tries again.
func TestUndoThatFailedIsTriedAgain(t *testing.T) {
	f := newFixture(t)
	f.net.fail["Attach"], f.net.fail["Detach"] = errBoom, errBoom
	f.shim.failing("DeleteSandbox", errBoom)
	if _, err := f.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig("web")}); !errors.Is(err, errBoom) {
		t.Fatalf("error %v", err)
	}
	f.shim.mu.Lock()
	left := len(f.shim.procs)
	f.shim.mu.Unlock()
	if left != 1 {
		t.Fatalf("%d processes left, the test wants one", left)
	}
	f.net.mu.Lock()
	f.net.fail = map[string]error{}
	f.net.mu.Unlock()
	f.shim.failing("DeleteSandbox", nil)
	eventually(t, "what was left is undone", func() bool {
		f.shim.mu.Lock()
		defer f.shim.mu.Unlock()
		return len(f.shim.procs) == 0
	})
	eventually(t, "nothing is left to undo", func() bool {
		f.left.mu.Lock()
		defer f.left.mu.Unlock()
		return len(f.left.steps) == 0
	})
	f.empty(t)
}

func TestLeftoversAreBounded(t *testing.T) {
	var l leftovers
	for range maxLeftovers {
		l.add(make([]undoStep, 3))
	}
	if n := len(l.steps); n != maxLeftovers {
		t.Errorf("%d steps wait", n)
	}
}
