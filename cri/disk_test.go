package cri

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestWhatContainersWriteIsCounted: VOLUMEs of the image with the container, the
// sandbox' files once, with the oldest that runs; and nothing is lost when none
// does (CVE-2020-8557 and its kind).
func TestWhatContainersWriteIsCounted(t *testing.T) {
	f := newFixture(t)
	f.images.image.Config.Config.Volumes = map[string]struct{}{"/data": {}}
	pod := f.pod(t, "web")
	a, b := f.running(t, pod, "a"), f.running(t, pod, "b")
	fill := func(path string, mib int) {
		t.Helper()
		if err := os.WriteFile(path, make([]byte, mib<<20), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for i, name := range []string{"hosts", "hostname", "resolv.conf"} {
		fill(filepath.Join(f.etcDir(pod), name), 1<<i)
	}
	fill(filepath.Join(f.volumeDir(b), "0", "file"), 8)
	const etc = 7
	has := func(what, id string, mib uint64) {
		t.Helper()
		c, err := f.objects.container(id)
		if err != nil {
			t.Fatal(err)
		}
		u, err := f.writable(ctx, c)
		if err != nil || u.Bytes>>20 != mib {
			t.Errorf("%s: %d MiB, %v: want %d", what, u.Bytes>>20, err, mib)
		}
	}
	has("the oldest", a, etc)
	has("the other", b, 8)
	if _, err := f.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: a}); err != nil {
		t.Fatal(err)
	}
	has("what is the oldest now", b, 8+etc)
	uid := podConfig("web").GetMetadata().GetUid()
	rest := f.DiskAtRest(ctx, uid)[uid]
	if len(rest.Containers) != 1 || rest.Containers["a"].Bytes == 0 || rest.Files.Bytes != 0 {
		t.Errorf("beside what runs: %+v", rest)
	}
	if _, err := f.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: b}); err != nil {
		t.Fatal(err)
	}
	rest = f.DiskAtRest(ctx, "")[uid]
	if len(rest.Containers) != 2 || rest.Containers["b"].Bytes>>20 != 8 || rest.Files.Bytes>>20 != etc {
		t.Errorf("when nothing runs: %+v", rest)
	}
	if rest := f.DiskAtRest(ctx, "another"); len(rest) != 0 {
		t.Errorf("of another pod: %+v", rest)
	}
}

// TestADeepVolumeIsRemovedInBoundedMemory: 1,500 directories in a VOLUME.
func TestADeepVolumeIsRemovedInBoundedMemory(t *testing.T) {
	f := newFixture(t)
	f.images.image.Config.Config.Volumes = map[string]struct{}{"/data": {}}
	id := f.create(t, f.pod(t, "web"), containerConfig("app"))
	at, err := unix.Open(filepath.Join(f.volumeDir(id), "0"), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	name := strings.Repeat("n", 255)
	for range 1500 {
		if err == nil {
			err = unix.Mkdirat(at, name, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		var next int
		next, err = unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		unix.Close(at)
		at = next
	}
	unix.Close(at)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := f.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if n := (after.TotalAlloc - before.TotalAlloc) >> 20; n > 32 {
		t.Errorf("the removal allocated %d MiB", n)
	}
	if _, err := os.Lstat(f.volumeDir(id)); !os.IsNotExist(err) {
		t.Errorf("still there: %v", err)
	}
}
