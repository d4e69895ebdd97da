package manifests

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestDecodeProblems(t *testing.T) {
	pod := podYAML("p", "i")
	for name, c := range map[string]struct {
		yaml  string
		doc   int
		line  int
		field string
		text  string
	}{
		"unknown field":         {pod + "  hostnetwork: true\n", 1, 9, "spec.hostnetwork", "hostNetwork"},
		"unknown nested":        {pod + "    ports:\n    - containerPort: 80\n      hostport: 1\n", 1, 11, "spec.containers[0].ports[0].hostport", "unknown"},
		"unknown in second doc": {pod + "---\n" + pod + "  foo: 1\n", 2, 18, "spec.foo", "unknown"},
		"duplicate key":         {pod + "    image: again\n", 1, 9, "", "already set"},
		"wrong type":            {pod + "    ports:\n    - containerPort: 80\n    - containerPort: http\n", 1, 11, "spec.containers[0].ports[1].containerPort", "whole number"},
		"wrong quantity":        {pod + "    resources:\n      limits:\n        cpu: lots\n", 1, 11, "spec.containers[0].resources.limits.cpu", "quantit"},
		"validation":            {pod + "  restartPolicy: Sometimes\n", 1, 9, "spec.restartPolicy", "Unsupported value"},
		"missing required":      {"apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\nspec: {}\n", 1, 5, "spec.containers", "Required"},
		"syntax":                {"apiVersion: v1\nkind: Pod\nmetadata:\n  name: [p\nspec: {}\n", 1, 0, "", ""},
		"no kind":               {"apiVersion: v1\n", 1, 1, "kind", "missing"},
		"no name":               {"apiVersion: v1\nkind: Pod\nmetadata: {}\nspec: {containers: [{name: a, image: b}]}\n", 1, 3, "metadata.name", "missing"},
		"uid as path":           {strings.Replace(pod, "  name: p\n", "  name: p\n  uid: ../x\n", 1), 1, 5, "metadata.uid", "no UID"},
		"other system":          {pod + "  os: {name: windows}\n", 1, 9, "spec.os.name", "windows"},
		"service account":       {pod + "  serviceAccountName: me\n", 1, 9, "spec.serviceAccountName", "service accounts"},
		"claim":                 {pod + "  volumes:\n  - name: v\n    csi: {driver: x}\n", 1, 11, "spec.volumes[0].csi", "CSI drivers"},
		"token":                 {pod + "  volumes:\n  - name: v\n    projected:\n      sources:\n      - serviceAccountToken: {path: x}\n", 1, 13, "spec.volumes[0].projected.sources[0].serviceAccountToken", "serviceAccount"},
		"ephemeral containers":  {pod + "  ephemeralContainers:\n  - {name: e, image: i}\n", 1, 9, "spec.ephemeralContainers", "Forbidden"},
		"other kind":            {"apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n", 1, 2, "kind", "not a kind"},
		"same name twice":       {pod + "---\n" + pod, 2, 9, "metadata.name", "already in document 1"},
		"list item":             {"apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: p}\n  spec:\n    containers: []\n", 1, 8, "items[0].spec.containers", "Required"},
		"label with dots":       {"apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  labels:\n    a.b/c: 'not valid!'\nspec: {containers: [{name: a, image: b}]}\n", 1, 5, "metadata.labels", "Invalid"},
		"json":                  {`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p"},` + "\n" + `"spec":{"containers":[{"name":"a","image":"b"}],"x":1}}`, 1, 2, "spec.x", "unknown"},
		"empty":                 {"# nothing\n", 0, 0, "", "no object"},
		"nulls only":            {"# nothing\n---\n~\n---\n&a\n", 0, 0, "", "no object"},
		"anchors only":          {".c: &c\n  image: a\n", 1, 1, "kind", "missing"},
		"anchor only":           {"&c {}\n", 1, 1, "kind", "missing"},
	} {
		t.Run(name, func(t *testing.T) {
			d := decoder{nodeName: "n"}
			_, problems, _ := d.decodeFile("f.yaml", []byte(c.yaml))
			if len(problems) == 0 {
				t.Fatal("no problem found")
			}
			p := problems[0]
			if p.File != "f.yaml" || p.Document != c.doc || (c.line > 0 && p.Line != c.line) || p.Field != c.field || !strings.Contains(p.Error(), c.text) {
				t.Errorf("got %+v\nwant document %d line %d field %q text %q", p, c.doc, c.line, c.field, c.text)
			}
		})
	}
}

func TestDecodeGood(t *testing.T) {
	for name, c := range map[string]struct {
		yaml    string
		objects int
	}{
		"markers and comments":  {"# c\n---\n# only a comment\n---\n" + podYAML("a", "i") + "...\n--- # next\n" + podYAML("b", "i") + "---\n", 2},
		"windows line ends":     {strings.ReplaceAll(podYAML("a", "i"), "\n", "\r\n"), 1},
		"byte order mark":       {"\xef\xbb\xbf" + podYAML("a", "i"), 1},
		"json twice":            {`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a"}} {"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"b"}}`, 2},
		"pod list":              {"apiVersion: v1\nkind: PodList\nitems:\n- metadata: {name: a}\n  spec: {containers: [{name: c, image: i}]}\n", 1},
		"other kind is skipped": {"apiVersion: v1\nkind: Service\nmetadata: {name: s}\n---\n" + podYAML("a", "i"), 1},
		"privileged container":  {"apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c, image: i, securityContext: {privileged: true}}]}\n", 1},
		"merged and overridden": {"apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  containers:\n  - &c\n    name: a\n    image: i\n    env: [{name: A, value: 'yes'}]\n  - <<: *c\n    name: b\n", 1},
		"status is dropped":     {podYAML("a", "i") + "status: {phase: Running}\n", 1},
	} {
		t.Run(name, func(t *testing.T) {
			d := decoder{nodeName: "n"}
			objects, problems, fatal := d.decodeFile("f.yaml", []byte(c.yaml))
			if fatal || len(objects) != c.objects {
				t.Errorf("%d objects, want %d; problems %v", len(objects), c.objects, problems)
			}
		})
	}
}

func TestUnhonouredFields(t *testing.T) {
	y := podYAML("a", "i") + `    resources: {limits: {ephemeral-storage: 1Gi}}
    restartPolicy: Never
  initContainers:
  - {name: side, image: i, restartPolicy: Always}
  nodeSelector: {a: b}
  affinity: {nodeAffinity: {}}
  volumes:
  - name: v
    emptyDir:
      sizeLimit: 1Mi
  - name: m
    emptyDir: {medium: Memory, sizeLimit: 1Mi}
`
	d := decoder{nodeName: "n"}
	objects, problems, _ := d.decodeFile("f.yaml", []byte(y))
	if problems != nil {
		t.Fatal(problems)
	}
	got := map[string]int{}
	for _, w := range objects[0].warnings {
		got[w.Field] = w.Line
	}
	want := map[string]int{
		"spec.nodeSelector": 13, "spec.affinity": 14,
	}
	if len(got) != len(want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for f, line := range want {
		if got[f] != line {
			t.Errorf("%s: line %d, want %d", f, got[f], line)
		}
	}
	// What a pod is by default warns about nothing.
	objects, _, _ = d.decodeFile("f.yaml", []byte(podYAML("a", "i")))
	if w := objects[0].warnings; w != nil {
		t.Errorf("a plain pod warns: %v", w)
	}
}

// The UID must never change with podd's version: containers would restart.
func TestUIDIsStable(t *testing.T) {
	d := decoder{nodeName: "n"}
	objects, problems, _ := d.decodeFile("f.yaml", []byte(podYAML("a", "i")))
	if problems != nil {
		t.Fatal(problems)
	}
	const want = "151f64394fdb4fd808b7d93d64d22ab3"
	if got := string(objects[0].pod.UID); got != want {
		t.Errorf("UID %s, want %s: an upgrade would restart every static pod", got, want)
	}
}

func BenchmarkDecode(b *testing.B) {
	d := decoder{nodeName: "n"}
	y := []byte(podYAML("a", "i"))
	for b.Loop() {
		d.decodeFile("f.yaml", y)
	}
}

// A file whose mistakes are many or deep costs no more than its size.
func TestWorkForOneFileIsBounded(t *testing.T) {
	deep := strings.Repeat(`{"apiVersion":"v1","kind":"List","items":[`, 2000) + strings.Repeat("]}", 2000)
	var unknown, sizes, envs strings.Builder
	for i := range 5_000 {
		fmt.Fprintf(&unknown, "  unknown%d: 1\n", i)
		fmt.Fprintf(&sizes, "    x%d: y\n", i)
		fmt.Fprintf(&envs, "    - {name: A, value: x}\n")
	}
	pod := podYAML("p", "i")
	for name, c := range map[string]struct {
		text              string
		problems, warning int
	}{
		"lists in lists":     {deep, 1, 0},
		"unknown fields":     {pod + unknown.String(), maxProblems, 0},
		"a quantity to find": {strings.Replace(pod, "  name: p\n", "  name: p\n  annotations:\n"+sizes.String(), 1) + "    resources: {limits: {cpu: lots}}\n", 1, 0},
		"warnings":           {pod + "    env:\n" + envs.String(), 0, maxProblems},
		"broken documents":   {strings.Repeat("---\nkind: Pod\n", 5_000), maxProblems + 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			d := decoder{nodeName: "n"}
			began := time.Now()
			objects, problems, _ := d.decodeFile("f.yaml", []byte(c.text))
			if len(problems) < min(c.problems, 1) || len(problems) > c.problems {
				t.Errorf("%d problems, want at most %d; the first: %v", len(problems), c.problems, problems[:min(len(problems), 1)])
			}
			if c.warning > 0 && (len(objects) != 1 || len(objects[0].warnings) != c.warning) {
				t.Errorf("warnings are not bounded")
			}
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("took %v", took)
			} else {
				t.Logf("%d bytes: %v", len(c.text), took)
			}
		})
	}
}
