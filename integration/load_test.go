package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/images"
)

// TestLoadedImageStartsThePodThatWaits: a pod whose image no registry has runs
// when the image is loaded; what else is in the call and cannot be loaded does
// not matter, and is told.
func TestLoadedImageStartsThePodThatWaits(t *testing.T) {
	n := start(t)
	const ref = "podd.test/only-loaded:1"
	n.Write("late.yaml", strings.Replace(pod("late", "", "pause"), testserver, ref, 1))
	n.WaitPod("late", "waiting for its image", 60*second, func(p *v1.Pod) bool {
		w := status(p).State.Waiting
		return w != nil && w.Reason == "ImagePullBackOff"
	})
	dir := t.TempDir()
	bad, good := filepath.Join(dir, "bad.tar"), filepath.Join(dir, "good.tar")
	if err := os.WriteFile(bad, []byte("no archive"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := images.WriteTar(good, images.Tag{Ref: ref, Image: image(t, "testserver")}); err != nil {
		t.Fatal(err)
	}
	out, errOut, err := n.Podd("load", bad, good)
	if err == nil || !strings.Contains(errOut, "bad.tar: not an OCI layout") || out != "loaded "+ref+"\n" {
		t.Errorf("load: %v, %q, %q", err, out, errOut)
	}
	n.WaitRunning("late")
}
