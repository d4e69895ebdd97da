package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/podd-runtime/podd/"

// layers, from above: a package may import its own layer and those below.
// systemd is a leaf that anyone may use, integration may use anything.
var layers = [][]string{
	{"cmd"},
	{"kubelet"},
	{"probes", "volumes", "cri"},
	{"cgroups", "netns"},
	{"systemd"},
}

func layerOf(pkg string) int {
	top, _, _ := strings.Cut(strings.TrimPrefix(pkg, module), "/")
	return slices.IndexFunc(layers, func(names []string) bool { return slices.Contains(names, top) })
}

func goList(t *testing.T, args ...string) []string {
	t.Helper()
	out, err := exec.Command("go", append([]string{"list"}, args...)...).Output()
	if err != nil {
		t.Fatalf("go list %v: %v", args, err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

func TestImportsGoOneWay(t *testing.T) {
	seen := 0
	for _, line := range goList(t, "-f", `{{.ImportPath}}{{range .Imports}} {{.}}{{end}}`, module+"...") {
		pkg, imports, _ := strings.Cut(line, " ")
		from := layerOf(pkg)
		if from < 0 { // integration, examples: above everything
			continue
		}
		for imported := range strings.FieldsSeq(imports) {
			if !strings.HasPrefix(imported, module) {
				continue
			}
			seen++
			if to := layerOf(imported); to < from {
				t.Errorf("%s imports %s, which lies above it", pkg, imported)
			}
		}
	}
	if seen < 20 {
		t.Fatalf("only %d imports seen: the test looks at the wrong thing", seen)
	}
}

// TestDaemonStaysLean keeps out what would cost the daemon memory or start-up
// time, or belongs to another program.
func TestDaemonStaysLean(t *testing.T) {
	deps := goList(t, "-deps", ".")
	if !slices.Contains(deps, module+"kubelet") {
		t.Fatalf("the daemon does not import the agent: %d packages", len(deps))
	}
	for prefix, why := range map[string]string{
		"k8s.io/kubectl":                             "podd-cli's: 30 MB of resident memory",
		"k8s.io/cli-runtime":                         "podd-cli's",
		"github.com/opencontainers/runc":             "podd-shim's: libcontainer executes its host program again",
		"github.com/seccomp":                         "podd-shim's: needs cgo",
		"k8s.io/client-go/kubernetes/":               "every API group of a cluster",
		"github.com/google/go-containerregistry":     "for tests",
		"k8s.io/kubernetes/pkg/apis/core/install":    "registers with global schemes",
		"github.com/containerd/containerd/v2/client": "the daemon has no containerd to talk to",
		"github.com/containerd/containerd/v2/cmd":    "the daemon has no containerd to talk to",
	} {
		for _, dep := range deps {
			if dep == prefix || strings.HasPrefix(dep, prefix+"/") || (strings.HasSuffix(prefix, "/") && strings.HasPrefix(dep, prefix)) {
				t.Errorf("the daemon links %s: %s", dep, why)
			}
		}
	}
}
