// Package cluster runs podd as a node of a real control plane of upstream's,
// and looks at it as a user of the cluster does.
package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/podd-runtime/podd/integration/cluster/control"
	"github.com/podd-runtime/podd/integration/images"
	"github.com/podd-runtime/podd/integration/node"
)

func TestMain(m *testing.M) {
	if os.Getenv("PODD_TEST_BIN") == "" {
		os.Setenv("PODD_TEST_BIN", fromRoot("bin"))
	}
	node.Main(func() int {
		defer stopPlane()
		return m.Run()
	})
}

// fromRoot is a path in the checkout; tests run in this folder.
func fromRoot(parts ...string) string {
	p, err := filepath.Abs(filepath.Join(append([]string{"../.."}, parts...)...))
	if err != nil {
		panic(err)
	}
	return p
}

// testingAll says whether the long form was asked for.
func testingAll() bool { return os.Getenv("PODD_TEST_ALL") != "" }

// long skips what takes longer than `make test` should.
func long(t testing.TB) {
	t.Helper()
	if !testingAll() {
		t.Skip("part of make cluster-test")
	}
}

// peers is where upstream's programs are built.
func peers() string { return fromRoot(".cache", "peers") }

var (
	planeOnce sync.Once
	thePlane  *control.Plane
	planeErr  error
)

// plane is the control plane that all tests share.
func plane(t testing.TB) *control.Plane {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("pods need root")
	}
	planeOnce.Do(func() { thePlane, planeErr = startPlane() })
	if planeErr != nil {
		t.Fatal(planeErr)
	}
	return thePlane
}

// build upstream's programs, if they are not there.
func build(ctx context.Context, programs ...string) error {
	cmd := exec.CommandContext(ctx, fromRoot("integration", "peer", "build.sh"), append([]string{peers()}, programs...)...)
	cmd.WaitDelay = 5 * time.Second
	began := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", strings.Join(programs, ", "), err, out)
	}
	if took := time.Since(began); took > 5*time.Second {
		fmt.Printf("%s built in %.0f s\n", strings.Join(programs, ", "), took.Seconds())
	}
	return nil
}

func startPlane() (*control.Plane, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	if err := build(ctx, append([]string{"kubectl"}, control.Complete...)...); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "podd-plane-")
	if err != nil {
		return nil, err
	}
	began := time.Now()
	ctx, cancel = context.WithTimeout(context.Background(), node.Scale(2*time.Minute))
	defer cancel()
	p, err := control.Start(ctx, peers(), dir, control.Complete...)
	if err != nil {
		return nil, err
	}
	fmt.Printf("control plane ready in %.1f s: %s\n", time.Since(began).Seconds(), dir)
	return p, nil
}

func stopPlane() {
	if thePlane != nil {
		thePlane.Stop()
		os.RemoveAll(thePlane.Dir)
	}
}

const (
	testserver = "podd.test/testserver:1"
	busybox    = "podd.test/busybox:1"
)

// imageCache keeps the test images from run to run.
func imageCache() string {
	if dir := os.Getenv("PODD_TEST_CACHE"); dir != "" {
		return dir
	}
	return fromRoot(".cache", "images")
}

// registry serves the test images.
var registry = sync.OnceValues(func() (*images.Registry, error) {
	b := &images.Builder{Dir: imageCache()}
	r, err := images.Serve("127.0.0.1:0", "", "")
	if err != nil {
		return nil, err
	}
	ctx := context.Background()
	server, err := b.Testserver(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := r.Push(ctx, "testserver:1", server); err != nil {
		return nil, err
	}
	box, err := b.Busybox(ctx)
	if err != nil {
		return nil, err
	}
	_, err = r.Push(ctx, "busybox:1", box)
	return r, err
})

// join starts a node of the cluster that can pull the test images.
func join(t testing.TB, name string, flags ...string) *node.Node {
	t.Helper()
	n := plane(t).NewNode(t, name, flags...)
	mirror(t, n)
	n.Start()
	return n
}

func mirror(t testing.TB, n *node.Node) {
	t.Helper()
	r, err := registry()
	if err != nil {
		t.Fatal(err)
	}
	n.Mirror(r.Addr)
}
