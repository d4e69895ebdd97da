package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/podd-runtime/podd/volumes/tree"
)

// measureAll measures pods and waits for it.
func measureAll(v *Volumes, pods ...*v1.Pod) {
	var group sync.WaitGroup
	v.measure(context.Background(), pods, true, &group)
	group.Wait()
}

func TestVolumesAreMeasured(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	p := pod("u1", emptyDirVolume("disk", ""), emptyDirVolume("mem", v1.StorageMediumMemory), configMapVolume("conf"))
	setup(t, v, p)
	disk := v.path(p, &p.Spec.Volumes[0])
	if err := os.WriteFile(disk+"/a", make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(disk+"/a", disk+"/b"); err != nil { // counts once
		t.Fatal(err)
	}
	if err := os.Symlink("/", disk+"/link"); err != nil { // is not followed
		t.Fatal(err)
	}
	// What is mounted inside is not the volume's.
	other := filepath.Join(disk, "other")
	if err := os.Mkdir(other, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", other, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(other+"/big", make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(v.path(p, &p.Spec.Volumes[1])+"/m", make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if len(v.Stats("u1")) != 0 {
		t.Error("something is known before it was measured")
	}
	measureAll(v, p)
	found := map[string]uint64{}
	for _, s := range v.Stats("u1") {
		found[s.Name] = *s.UsedBytes
		if *s.CapacityBytes == 0 || *s.Inodes == 0 {
			t.Errorf("%s: capacity %d, inodes %d", s.Name, *s.CapacityBytes, *s.Inodes)
		}
	}
	if u := found["disk"]; u < 1<<20 || u > 1<<20+64<<10 {
		t.Errorf("emptyDir on disk: %d", u)
	}
	if u := found["mem"]; u < 1<<20 || u > 1<<20+64<<10 {
		t.Errorf("emptyDir in memory: %d", u)
	}
	if _, ok := found["conf"]; !ok || len(found) != 3 {
		t.Errorf("measured: %v", found)
	}
	measureAll(v)
	if len(v.Stats("u1")) != 0 {
		t.Error("a pod that is gone is still known")
	}
}

// TestADeepEmptyDirTakesBoundedMemory when it is measured, given to a group and
// torn down: 1,500 directories with long names took podd 0.3 GB, 4,000 took 1.95.
func TestADeepEmptyDirTakesBoundedMemory(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	p := pod("u1", emptyDirVolume("disk", ""))
	setup(t, v, p)
	const levels = 1500
	at, err := openDir(v.path(p, &p.Spec.Volumes[0]))
	name := strings.Repeat("n", 255)
	for range levels {
		if err == nil {
			err = unix.Mkdirat(at.fd, name, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		fd, oerr := unix.Openat(at.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		at.close()
		at, err = &dir{fd: fd}, oerr
	}
	at.close()
	bounded := func(what string, mib uint64, f func()) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		f()
		runtime.ReadMemStats(&after)
		if n := (after.TotalAlloc - before.TotalAlloc) >> 20; n > mib {
			t.Errorf("%s allocated %d MiB", what, n)
		}
	}
	bounded("measuring", 8, func() { measureAll(v, p) })
	if s := v.Stats("u1"); len(s) != 1 || *s[0].InodesUsed != levels+1 {
		t.Errorf("measured: %+v", s)
	}
	bounded("the walk for a group", 8, func() {
		group := int64(77)
		p.Spec.SecurityContext = &v1.PodSecurityContext{FSGroup: &group}
		setup(t, v, p)
	})
	bounded("teardown", 32, func() {
		if err := v.Teardown(context.Background(), "u1"); err != nil {
			t.Error(err)
		}
	})
	if _, err := os.Lstat(v.podDir("u1")); !os.IsNotExist(err) {
		t.Errorf("still there: %v", err)
	}
}

// TestALargeVolumeKeepsNoOtherFromItsLimit: others are measured, and their
// limits looked at, while it is walked.
func TestALargeVolumeKeepsNoOtherFromItsLimit(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	// So little of the time is work that the large one takes seconds: 15 turns.
	v.turns = tree.NewTurns(0.005, 4)
	limit := resource.MustParse("1Gi")
	large, small := pod("large", emptyDirVolume("d", "")), pod("small", emptyDirVolume("d", ""))
	for _, p := range []*v1.Pod{large, small} {
		p.Spec.Volumes[0].EmptyDir.SizeLimit = &limit
		setup(t, v, p)
	}
	for i := range 2000 {
		if err := os.WriteFile(fmt.Sprintf("%s/%d", v.path(large, &large.Spec.Volumes[0]), i), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	looked := make(chan string, 16)
	v.cfg.Measured = func(_ context.Context, p *v1.Pod) { looked <- string(p.UID) }
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	for range 3 { // three times the small one, once begun the large one
		var one sync.WaitGroup
		v.measure(ctx, []*v1.Pod{large}, false, &group)
		v.measure(ctx, []*v1.Pod{small}, false, &one)
		select {
		case uid := <-looked:
			if uid != "small" {
				t.Fatalf("%s is done first", uid)
			}
		case <-time.After(time.Minute):
			t.Fatal("nobody looks at the limit of the small one")
		}
		one.Wait()
	}
}

// BenchmarkMeasure is the cost of looking at a tree, with no rest in between.
func BenchmarkMeasure(b *testing.B) {
	needRoot(b)
	v, _ := testVolumes(b)
	p := pod("u1", emptyDirVolume("disk", ""))
	setup(b, v, p)
	for i := range 10000 {
		if err := os.WriteFile(fmt.Sprintf("%s/%d", v.path(p, &p.Spec.Volumes[0]), i), nil, 0o600); err != nil {
			b.Fatal(err)
		}
	}
	d, err := openDir(v.path(p, &p.Spec.Volumes[0]))
	if err != nil {
		b.Fatal(err)
	}
	defer d.close()
	for b.Loop() {
		if u, err := tree.Measure(context.Background(), d.fd, nil); err != nil || u.Inodes != 10001 {
			b.Fatal(u, err)
		}
	}
}

// TestNobodyWaitsForAPodLongerThanHeHasTime: a set-up that hangs has the pod's
// lock.
func TestNobodyWaitsForAPodLongerThanHeHasTime(t *testing.T) {
	v, _ := testVolumes(t)
	unlock, err := v.lock(t.Context(), "u1")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	p := pod("u1")
	for what, err := range map[string]error{"refresh": v.Refresh(ctx, p), "set-up": v.Setup(ctx, p), "teardown": v.Teardown(ctx, "u1")} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", what, err)
		}
	}
	unlock()
	if len(v.locks) != 0 {
		t.Errorf("%d locks are left", len(v.locks))
	}
}
