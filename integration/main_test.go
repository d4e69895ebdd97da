// Package integration runs the real daemon as a user would. Each test has a
// node of its own and is named by the behaviour it holds podd to.
package integration

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	gcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/podd-runtime/podd/integration/images"
	"github.com/podd-runtime/podd/integration/node"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(fuseServer); dir != "" {
		os.Exit(serveFuse(dir))
	}
	if dir := os.Getenv(walkerEnv); dir != "" {
		walk(dir)
		return
	}
	node.Main(m.Run)
}

const (
	testserver = "podd.test/testserver:1"
	busybox    = "podd.test/busybox:1"
	second     = time.Second
)

// builder keeps what it makes from run to run.
var builder = sync.OnceValue(func() *images.Builder {
	dir := os.Getenv("PODD_TEST_CACHE")
	if dir == "" {
		var err error
		if dir, err = filepath.Abs("../.cache/images"); err != nil {
			panic(err)
		}
	}
	return &images.Builder{Dir: dir}
})

type built struct {
	image gcr.Image
	err   error
}

var imagesMade sync.Map // name → func() built

func image(t testing.TB, name string) gcr.Image {
	t.Helper()
	if dir := os.Getenv("PODD_TEST_IMAGES"); dir != "" { // made before, by integration/vm/images
		img, err := tarball.ImageFromPath(filepath.Join(dir, name+".tar"), nil)
		if err != nil {
			t.Fatalf("image %s: %v", name, err)
		}
		return img
	}
	b := builder()
	build := map[string]func(context.Context) (gcr.Image, error){
		"busybox": b.Busybox, "testserver": b.Testserver, "nginx": b.Nginx, "redis": b.Redis,
	}[name]
	once, _ := imagesMade.LoadOrStore(name, sync.OnceValue(func() built {
		img, err := build(context.Background())
		return built{img, err}
	}))
	made := once.(func() built)()
	if made.err != nil {
		t.Fatalf("image %s: %v", name, made.err)
	}
	return made.image
}

// registry serves the images to all tests.
var registry = sync.OnceValues(func() (*images.Registry, error) {
	return images.Serve("127.0.0.1:0", "", "")
})

// mirror lets the node pull the images named, as podd.test/<name>:1.
func mirror(t testing.TB, n *node.Node, names ...string) {
	t.Helper()
	r, err := registry()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if _, err := r.Push(t.Context(), name+":1", image(t, name)); err != nil {
			t.Fatal(err)
		}
	}
	n.Mirror(r.Addr)
}

// start starts a node that can pull the test images.
func start(t testing.TB, flags ...string) *node.Node {
	t.Helper()
	n := node.New(t, flags...)
	mirror(t, n, "testserver", "busybox")
	n.Start()
	return n
}

// configured are the flags by which a node takes fields of KubeletConfiguration.
func configured(t testing.TB, n *node.Node, fields string) []string {
	t.Helper()
	config := filepath.Join(n.Dir, "config.yaml")
	if err := os.WriteFile(config, []byte("apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n"+fields+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return []string{"--config", config}
}

// freePort is a port of this machine that nobody listens on.
func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// fetch gets a page; "" while there is none.
func fetch(url string) string {
	ctx, cancel := context.WithTimeout(context.Background(), node.Scale(2*time.Second))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return ""
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	var b strings.Builder
	if _, err := fmt.Fprint(&b, readAll(resp)); err != nil || resp.StatusCode != http.StatusOK {
		return ""
	}
	return b.String()
}

// pod is a manifest with one container of the test server.
func pod(name string, spec string, args ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Pod\nmetadata:\n  name: %s\nspec:\n  terminationGracePeriodSeconds: 1\n", name)
	b.WriteString(indent(spec, 2))
	fmt.Fprintf(&b, "  containers:\n  - name: main\n    image: %s\n    args: [", testserver)
	for i, a := range args {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%q", a)
	}
	b.WriteString("]\n")
	return b.String()
}

func indent(text string, by int) string {
	if text == "" {
		return ""
	}
	pad := strings.Repeat(" ", by)
	return pad + strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n"+pad) + "\n"
}

// status of the only container.
func status(p *v1.Pod) v1.ContainerStatus {
	if len(p.Status.ContainerStatuses) == 0 {
		return v1.ContainerStatus{}
	}
	return p.Status.ContainerStatuses[0]
}

func terminated(p *v1.Pod) *v1.ContainerStateTerminated { return status(p).State.Terminated }

// settled counts what a node holds once its first pod has come and gone: what
// is made once (the bridge's range, the cached seccomp program) is no leak.
func settled(n *node.Node) node.Counts {
	n.Write("settle.yaml", pod("settle", "", "pause"))
	n.WaitRunning("settle")
	n.Remove("settle.yaml")
	n.WaitGone(15 * second)
	return n.Count()
}
