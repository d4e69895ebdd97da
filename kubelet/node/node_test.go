package node

import (
	"context"
	"log/slog"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/runtime"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/apiserver"
)

// hung is a runtime that never answers.
type hung struct{ asked chan struct{} }

func (h hung) Status(ctx context.Context, _ *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	close(h.asked)
	<-ctx.Done()
	return nil, ctx.Err()
}

func (h hung) ListImages(ctx context.Context, _ *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// away is an apiserver that refuses everything.
type away struct{}

func (away) Get(context.Context, apiserver.Ref, runtime.Object) error {
	return context.DeadlineExceeded
}
func (away) Create(context.Context, apiserver.Ref, runtime.Object, runtime.Object) error {
	return context.DeadlineExceeded
}
func (away) Update(context.Context, apiserver.Ref, runtime.Object, runtime.Object) error {
	return context.DeadlineExceeded
}
func (away) Patch(context.Context, apiserver.Ref, []byte, runtime.Object) error {
	return context.DeadlineExceeded
}
func (away) Node(ctx context.Context, _ string, _ func(*v1.Node)) { <-ctx.Done() }

// TestPodsAreAdmittedWhileTheRuntimeHangs: who decides on a pod's place asks for
// the Node under a lock that all other pods wait for.
func TestPodsAreAdmittedWhileTheRuntimeHangs(t *testing.T) {
	rt := hung{make(chan struct{})}
	m := Machine{Name: "n", Allocatable: v1.ResourceList{v1.ResourcePods: resource.MustParse("1")}, Runtime: rt, RootDir: t.TempDir()}
	n := New(Config{
		Client: away{}, Name: "n", Register: true, Status: m.Status, Fixed: m.Fixed, StatusEvery: time.Hour, LeaseDuration: time.Hour,
		Event: func(string, string, string) {}, Log: slog.New(slog.DiscardHandler),
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = n.Run(ctx) }()
	defer func() { cancel(); <-done }()
	<-rt.asked
	got := make(chan *v1.Node)
	go func() { got <- n.Current() }()
	select {
	case node := <-got:
		if node.Name != "n" || node.Status.Allocatable.Pods().Value() != 1 || !*node.Status.Features.SupplementalGroupsPolicy || node.Labels[v1.LabelHostname] != "n" {
			t.Errorf("the node as it would be registered: %+v", node)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the Node is not told while the runtime hangs")
	}
}
