// Package critest runs programs of other projects against bin/podd's CRI
// socket: critest of cri-tools, crictl, and upstream's kubelet.
package critest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	gcr "github.com/google/go-containerregistry/pkg/v1"

	"github.com/podd-runtime/podd/integration/images"
	"github.com/podd-runtime/podd/integration/isolated"
	"github.com/podd-runtime/podd/integration/node"
)

func TestMain(m *testing.M) {
	if os.Getenv("PODD_TEST_BIN") == "" {
		os.Setenv("PODD_TEST_BIN", fromRoot("bin"))
	}
	node.Main(func() int { return isolated.Run(m.Run, prepare) })
}

// fromRoot is a path in the checkout; tests run in this folder.
func fromRoot(parts ...string) string {
	p, err := filepath.Abs(filepath.Join(append([]string{"../.."}, parts...)...))
	if err != nil {
		panic(err)
	}
	return p
}

// full says whether the long form was asked for: peers that take minutes to
// build, and critest's specs one by one, three times.
func full() bool { return os.Getenv("PODD_TEST_ALL") != "" }

// prepare fetches and builds what the tests run and what the images hold, or
// finds it done by an earlier run.
func prepare() error {
	if os.Getenv("PODD_TEST_IMAGES") != "" {
		return nil // all was made by integration/vm/payload
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	all, err := builder().Critest(ctx)
	if err != nil {
		return err
	}
	digest, err := all[images.CritestPinned].Digest()
	if err != nil {
		return err
	}
	names := []string{"critest", "ginkgo"}
	if full() {
		names = append(names, "crictl", "kubelet", "containerd", "runc", "cni")
	}
	cmd := exec.CommandContext(ctx, fromRoot("integration", "peer", "build.sh"), append([]string{peers()}, names...)...)
	cmd.Env = append(os.Environ(), "CRITEST_PINNED="+digest.String())
	cmd.WaitDelay = 5 * time.Second
	began := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", strings.Join(names, ", "), err, out)
	}
	if took := time.Since(began); took > 5*time.Second {
		fmt.Printf("%s built in %.0f s\n", strings.Join(names, ", "), took.Seconds())
	}
	return nil
}

// prepared fails the test when the programs that it runs could not be had.
func prepared(t *testing.T) {
	t.Helper()
	if err := isolated.Prepared(); err != nil {
		t.Fatal(err)
	}
}

// peers is the directory of other projects' programs.
func peers() string {
	if dir := os.Getenv("PODD_TEST_PEERS"); dir != "" {
		return dir
	}
	return fromRoot(".cache", "peers")
}

func builder() *images.Builder {
	dir := os.Getenv("PODD_TEST_CACHE")
	if dir == "" {
		dir = fromRoot(".cache", "images")
	}
	return &images.Builder{Dir: dir}
}

// critestImages are the stand-ins for the images that critest wants.
func critestImages(t *testing.T) map[string]gcr.Image {
	t.Helper()
	var all map[string]gcr.Image
	var err error
	if dir := os.Getenv("PODD_TEST_IMAGES"); dir != "" {
		all, err = images.ReadLayout(filepath.Join(dir, "critest"))
	} else {
		all, err = builder().Critest(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// serve starts a registry with the images by repository:tag.
func serve(t *testing.T, all map[string]gcr.Image) *images.Registry {
	t.Helper()
	r, err := images.Serve("127.0.0.1:0", "", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	for name, img := range all {
		if _, err := r.Push(t.Context(), name, img); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// socket is where the node serves the CRI.
func socket(n *node.Node) string { return "unix://" + filepath.Join(n.RunDir(), "podd.sock") }
