package integration

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	gcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/integration/node"
)

// weighty is the testserver's image with a layer of so many bytes that nothing
// compresses.
func weighty(t *testing.T, size int) gcr.Image {
	t.Helper()
	data := make([]byte, size)
	rand.Read(data)
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "ballast", Mode: 0o600, Size: int64(size)}); err != nil {
		t.Fatal(err)
	}
	w.Write(data)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(image(t, "testserver"), static.NewLayer(buf.Bytes(), types.OCIUncompressedLayer))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestFullDiskLosesImagesThatNobodyUses: a pull that finds no room has images
// removed that no pod uses, and only those; when there is none, the node says
// what fills the disk.
func TestFullDiskLosesImagesThatNobodyUses(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("pods need root")
	}
	dir := t.TempDir() // not below the node's: it is there until the node has ended
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size=160m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	const mib = 1 << 20
	n := node.New(t)
	if err := os.MkdirAll(filepath.Join(n.Dir, "data"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir, filepath.Join(n.Dir, "data", "images")); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(n.Dir, "config.yaml")
	text := "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nimageGCHighThresholdPercent: 70\nimageGCLowThresholdPercent: 60\nimageMinimumGCAge: 1ms\n"
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	n.Extra("--config", config)
	r, err := registry()
	if err != nil {
		t.Fatal(err)
	}
	mirror(t, n, "testserver")
	n.Start()
	// Each takes its size twice, as blob and as layer; with the program that they
	// share they take 110 of 160 MiB before the last one comes, which needs 60.
	for name, size := range map[string]int{"kept": 10 * mib, "first": 20 * mib, "second": 20 * mib, "big": 30 * mib, "last": 30 * mib} {
		if _, err := r.Push(t.Context(), "gc/"+name+":1", weighty(t, size)); err != nil {
			t.Fatal(err)
		}
	}
	ref := func(name string) string { return "podd.test/gc/" + name + ":1" }
	manifest := func(name string) string {
		return strings.Replace(pod(name, "", "pause"), testserver, ref(name), 1)
	}
	n.Write("kept.yaml", manifest("kept"))
	n.WaitRunning("kept")
	n.OK("pull", ref("first"))
	n.OK("pull", ref("second"))
	n.Write("big.yaml", manifest("big"))
	n.WaitRunning("big")
	images := n.OK("images")
	has := func(name string) bool { return strings.Contains(images, "/gc/"+name+" ") }
	// Of two that came since the last look either may go, as upstream has it.
	if !has("kept") || !has("big") || has("first") && has("second") {
		t.Errorf("images that pods use are there, and one of the others is not:\n%s", images)
	}

	// What else there is on the disk cannot be removed, and without the second
	// image, too, the last one has no room.
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	foreign := int(int64(st.Bavail)*st.Bsize) - 5*mib
	if err := os.WriteFile(filepath.Join(dir, "foreign"), make([]byte, foreign), 0o600); err != nil {
		t.Fatal(err)
	}
	n.Write("last.yaml", manifest("last"))
	node.Await(t, "an event that tells of it", 60*second, func() bool {
		return strings.Contains(n.OK("get", "events", "-A"), "FreeDiskSpaceFailed")
	}, func() string { return n.OK("status") })
	out := n.OK("status")
	for _, want := range []string{"no image can be removed", "used by pods", "files that are not podd's"} {
		if !strings.Contains(out, want) {
			t.Errorf("status does not say %q:\n%s", want, out)
		}
	}
	why := n.OK("why", "last")
	for _, want := range []string{"no space left", "files that are not podd's"} {
		if !strings.Contains(why, want) {
			t.Errorf("why does not say %q:\n%s", want, why)
		}
	}
	if p, err := n.Pod("kept"); err != nil || !node.Running(p) || p.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("the pod that was there is not as it was: %v %v", p, err)
	}
}
