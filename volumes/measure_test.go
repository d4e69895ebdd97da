package volumes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
)

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
	v.measure(context.Background(), []*v1.Pod{p}, true)
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
	v.measure(context.Background(), nil, true)
	if len(v.Stats("u1")) != 0 {
		t.Error("a pod that is gone is still known")
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
		if _, n, err := treeUsage(context.Background(), d, &pace{share: 1}); err != nil || n != 10001 {
			b.Fatal(n, err)
		}
	}
}
