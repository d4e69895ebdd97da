package pods

import (
	"testing"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
)

func TestRuntimeClassNamesTheHandler(t *testing.T) {
	table := &Table{}
	pod := mkpod("p", "u")
	if h, err := table.handler(pod); h != "" || err != nil {
		t.Errorf("without a class: %q, %v", h, err)
	}
	pod = mkpod("p", "u", func(p *v1.Pod) { name := "fast"; p.Spec.RuntimeClassName = &name })
	if _, err := table.handler(pod); !errdefs.IsNotFound(err) {
		t.Errorf("a node that knows no classes: %v", err)
	}
	table.deps.RuntimeClass = func(name string) (string, error) { return name + "-handler", nil }
	if h, err := table.handler(pod); h != "fast-handler" || err != nil {
		t.Errorf("its handler: %q, %v", h, err)
	}
}
