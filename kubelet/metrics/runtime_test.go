package metrics

import (
	"context"
	"errors"
	"testing"

	dto "github.com/prometheus/client_model/go"
	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/pods"
)

// failing makes sandboxes and containers, and cannot start one.
type failing struct{ pods.Runtime }

func (failing) RunPodSandbox(context.Context, *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	return &runtimeapi.RunPodSandboxResponse{}, nil
}

func (failing) CreateContainer(context.Context, *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	return &runtimeapi.CreateContainerResponse{ContainerId: "c"}, nil
}

func (failing) StartContainer(context.Context, *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	return nil, errors.New("bogus: not found")
}

func TestFailedStartsAreCounted(t *testing.T) {
	m := New("node", "v1", "")
	r := m.Runtime(failing{}, func(string, string) (*v1.Pod, bool) { return nil, false })
	for _, mode := range []runtimeapi.NamespaceMode{runtimeapi.NamespaceMode_POD, runtimeapi.NamespaceMode_NODE} {
		box := &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: mode}},
		}}}
		_, err := r.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: box})
		if err == nil {
			_, err = r.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{SandboxConfig: box})
		}
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second is of no container that was made
			if _, err := r.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: "c"}); err == nil {
				t.Fatal("it starts")
			}
		}
	}
	for what, c := range map[string]struct {
		metric interface{ Write(*dto.Metric) error }
		want   float64
	}{
		"pods started":                {m.podsStarted, 2},
		"in user namespaces":          {m.usernsStarted, 1},
		"failed in user namespaces":   {m.usernsErrors, 1},
		"containers that did not run": {m.startErrors.WithLabelValues("container", "RunContainerError"), 2},
	} {
		var got dto.Metric
		if err := c.metric.Write(&got); err != nil || got.GetCounter().GetValue() != c.want {
			t.Errorf("%s: %v, want %v (%v)", what, got.GetCounter().GetValue(), c.want, err)
		}
	}
}
