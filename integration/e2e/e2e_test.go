// Package e2e runs Kubernetes' own end-to-end tests against a cluster whose
// node is bin/podd: upstream's control plane and kube-proxy, upstream's tests.
package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podd-runtime/podd/integration/cluster/control"
	"github.com/podd-runtime/podd/integration/images"
	"github.com/podd-runtime/podd/integration/isolated"
	"github.com/podd-runtime/podd/integration/node"
)

// What is run unless $PODD_E2E_FOCUS and $PODD_E2E_SKIP (regular expressions on
// the specs' names, as ginkgo has them) say otherwise: all that conformance asks
// of a node and of its volumes.
const (
	defaultFocus = `\[sig-node\].*\[(Node)?Conformance\]|\[sig-storage\].*\[(Node)?Conformance\]`
	// A second node, cluster DNS, images that nobody can build from sources
	// here, AppArmor, and programs of clouds.
	defaultSkip = `\[Serial\]|\[Disruptive\]|\[Slow\]|\[Flaky\]|\[Alpha\]|\[Feature:|AppArmor`
)

func full() bool { return os.Getenv("PODD_TEST_ALL") != "" }

func fromRoot(parts ...string) string {
	p, err := filepath.Abs(filepath.Join(append([]string{"../.."}, parts...)...))
	if err != nil {
		panic(err)
	}
	return p
}

func peers() string { return fromRoot(".cache", "peers") }

func builder() *images.Builder { return &images.Builder{Dir: fromRoot(".cache", "images")} }

func TestMain(m *testing.M) {
	if os.Getenv("PODD_TEST_BIN") == "" {
		os.Setenv("PODD_TEST_BIN", fromRoot("bin"))
	}
	node.Main(func() int {
		if !full() {
			return m.Run()
		}
		return isolated.Run(m.Run, prepare)
	})
}

// prepare builds upstream's programs and the images.
func prepare() error {
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Minute)
	defer cancel()
	names := append([]string{"e2e.test", "e2e_node.test", "ginkgo", "agnhost"}, control.WithServices...)
	cmd := exec.CommandContext(ctx, fromRoot("integration", "peer", "build.sh"), append([]string{peers()}, names...)...)
	cmd.WaitDelay = 5 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", strings.Join(names, ", "), err, out)
	}
	_, err := builder().E2E(ctx, filepath.Join(peers(), "agnhost"))
	return err
}

// TestUpstream runs upstream's suite for clusters.
func TestUpstream(t *testing.T) {
	if !full() {
		t.Skip("upstream's suite is part of the long form (make e2e)")
	}
	if err := isolated.Prepared(); err != nil {
		t.Fatal(err)
	}
	plane := startPlane(t)
	startNode(t, plane)
	tell(t, suite(t, plane))
}

// tell has each spec that was run be a subtest.
func tell(t *testing.T, specs []spec) {
	for _, spec := range specs {
		if spec.LeafNodeType == "It" && (spec.State != "skipped" || spec.Failure.Message != "") {
			t.Run(spec.name(), spec.result)
		}
	}
}

func startPlane(t *testing.T) *control.Plane {
	t.Helper()
	dir, err := os.MkdirTemp("", "podd-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	p, err := control.StartAt(ctx, peers(), dir, isolated.NodeIP, control.WithServices...)
	if err != nil {
		t.Fatalf("control plane: %v", err)
	}
	t.Cleanup(func() {
		p.Stop()
		if !t.Failed() {
			os.RemoveAll(dir)
		}
	})
	return p
}

// startNode returns when the node is ready and pods may come.
func startNode(t *testing.T, p *control.Plane) *node.Node {
	t.Helper()
	n := p.NewNode(t, control.NodeName, "--node-ip", isolated.NodeIP)
	mirror(t, n)
	n.Start()
	node.Await(t, "the node ready", time.Minute, func() bool {
		is, err := p.Client.CoreV1().Nodes().Get(t.Context(), control.NodeName, metav1.GetOptions{})
		if err != nil {
			return false
		}
		for _, c := range is.Status.Conditions {
			if c.Type == v1.NodeReady {
				return c.Status == v1.ConditionTrue
			}
		}
		return false
	})
	return n
}

// mirror makes a node find the tests' images.
func mirror(t *testing.T, n *node.Node) {
	t.Helper()
	all, err := builder().E2E(t.Context(), filepath.Join(peers(), "agnhost"))
	if err != nil {
		t.Fatal(err)
	}
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
	n.Mirror(r.Addr)
}

// spec is what is read of ginkgo's report of one.
type spec struct {
	ContainerHierarchyTexts []string
	LeafNodeType            string
	LeafNodeText            string
	State                   string
	RunTime                 time.Duration
	Failure                 struct {
		Message  string
		Location struct {
			FileName   string
			LineNumber int
		}
	}
	CapturedGinkgoWriterOutput string
}

func (s spec) name() string {
	return strings.Join(append(s.ContainerHierarchyTexts, s.LeafNodeText), " ")
}

func (s spec) result(t *testing.T) {
	switch s.State {
	case "passed":
		t.Logf("%.1f s", s.RunTime.Seconds())
	case "skipped":
		t.Skip(s.Failure.Message)
	default:
		t.Errorf("%s at %s:%d after %.1f s: %s\n%s", s.State, s.Failure.Location.FileName, s.Failure.Location.LineNumber,
			s.RunTime.Seconds(), s.Failure.Message, s.CapturedGinkgoWriterOutput)
	}
}

func setting(name, otherwise string) string {
	if v, ok := os.LookupEnv(name); ok {
		return v
	}
	return otherwise
}

// suite runs upstream's tests and returns what became of them.
func suite(t *testing.T, p *control.Plane) []spec {
	t.Helper()
	out := filepath.Join(p.Dir, "report")
	if err := os.MkdirAll(out, 0o755); err != nil {
		t.Fatal(err)
	}
	args := append(ginkgo(out, defaultFocus, defaultSkip), filepath.Join(peers(), "e2e.test"), "--",
		"-kubeconfig="+p.Kubeconfig("admin"), "-provider=local", "-num-nodes=1", "-report-dir="+out,
		"-non-blocking-taints=", "-disable-log-dump", "-node-os-distro=custom",
	)
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir, cmd.WaitDelay = out, 10*time.Second
	cmd.Env = append(os.Environ(), "KUBECONFIG="+p.Kubeconfig("admin"))
	text, runErr := cmd.CombinedOutput()
	return report(t, out, fmt.Sprintf("%v\n%s", runErr, text))
}

// ginkgo is the command line that runs specs and reports to a directory.
func ginkgo(out, focus, skip string) []string {
	return []string{
		filepath.Join(peers(), "ginkgo"), "run", "--no-color", "--silence-skips", "--timeout=90m", "--output-dir=" + out, "--json-report=report.json",
		"--procs=" + setting("PODD_E2E_PROCS", "4"),
		"--focus=" + setting("PODD_E2E_FOCUS", focus), "--skip=" + setting("PODD_E2E_SKIP", skip),
	}
}

// report reads ginkgo's; text is what there is instead.
func report(t *testing.T, out, text string) []spec {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(out, "report.json"))
	if err != nil {
		t.Fatalf("no report: %v, %s", err, text)
	}
	var reports []struct {
		SpecialSuiteFailureReasons []string
		RunTime                    time.Duration
		SpecReports                []spec
	}
	if err := json.Unmarshal(b, &reports); err != nil || len(reports) != 1 {
		t.Fatalf("the suite's report: %v, %d of them\n%s", err, len(reports), text)
	}
	for _, reason := range reports[0].SpecialSuiteFailureReasons {
		t.Errorf("the suite: %s", reason)
	}
	t.Logf("%.0f s", reports[0].RunTime.Seconds())
	return reports[0].SpecReports
}
