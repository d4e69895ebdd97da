package node

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
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
func (away) Wrote(string) bool                                    { return false }
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

// scripted is an apiserver that answers about Nodes as the test says.
type scripted struct {
	away
	answer func() (*v1.Node, error)
}

func (s scripted) give(into runtime.Object) error {
	node, err := s.answer()
	if err == nil {
		node.DeepCopyInto(into.(*v1.Node))
	}
	return err
}

func (s scripted) Get(_ context.Context, _ apiserver.Ref, into runtime.Object) error {
	return s.give(into)
}
func (s scripted) Create(_ context.Context, _ apiserver.Ref, _, into runtime.Object) error {
	return s.give(into)
}
func (s scripted) Patch(_ context.Context, _ apiserver.Ref, _ []byte, into runtime.Object) error {
	return s.give(into)
}

// told is a Node that writes down what it tells others.
type told struct {
	*Node
	api *scripted

	mu  sync.Mutex
	all []string
}

func newTold() *told {
	f := &told{api: &scripted{}}
	note := func(s string) { f.mu.Lock(); f.all = append(f.all, s); f.mu.Unlock() }
	f.Node = New(Config{
		Client: f.api, Name: "n", Register: true, StatusEvery: time.Hour, ReportEvery: time.Hour, LeaseDuration: time.Hour,
		Registered: func(uid types.UID) { note("uid " + string(uid)) },
		Event:      func(_, reason, _ string) { note(reason) },
		Log:        slog.New(slog.DiscardHandler),
	})
	return f
}

func (f *told) expect(t *testing.T, want ...string) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Equal(f.all, want) {
		t.Errorf("told %q, want %q", f.all, want)
	}
}

func aNode(uid types.UID, version string, change ...func(*v1.Node)) *v1.Node {
	n := &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", UID: uid, ResourceVersion: version}}
	for _, c := range change {
		c(n)
	}
	return n
}

func cordoned(n *v1.Node) { n.Spec.Unschedulable = true }

// The answer to a patch of the status may be the first that tells of a cordon;
// the watch's own event brings nothing new then.
func TestWhatAnAnswerBringsOfTheNodeIsTold(t *testing.T) {
	f := newTold()
	f.seen(aNode("a", "1"))
	f.api.answer = func() (*v1.Node, error) { return aNode("a", "3", cordoned), nil }
	if err := f.once(t.Context(), v1.NodeStatus{}); err != nil {
		t.Fatal(err)
	}
	f.seen(aNode("a", "2", cordoned))
	f.seen(aNode("a", "3", cordoned))
	f.expect(t, "uid a", "NodeNotSchedulable")
}

// A Node that somebody has deleted and made again between two events: mirror pods
// are refused with the old one's UID.
func TestANodeMadeAgainIsToldWhateverTellsOfIt(t *testing.T) {
	f := newTold()
	f.seen(aNode("a", "1"))
	f.api.answer = func() (*v1.Node, error) { return aNode("b", "3"), nil }
	if err := f.once(t.Context(), v1.NodeStatus{}); err != nil {
		t.Fatal(err)
	}
	f.seen(aNode("b", "3")) // a list: the watch was cut meanwhile
	f.expect(t, "uid a", "uid b")
}

// What the watch tells while a request is under way is not taken back by its
// answer: pods are admitted by the labels.
func TestAnAnswerDoesNotTakeBackWhatTheWatchTold(t *testing.T) {
	labelled := func(n *v1.Node) { n.Labels = map[string]string{"l": "later"} }
	for name, begin := range map[string]func(f *told){
		"register": func(*told) {},
		"report":   func(f *told) { f.seen(aNode("a", "1")) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newTold()
			begin(f)
			f.api.answer = func() (*v1.Node, error) {
				f.seen(aNode("a", "3", labelled))
				return aNode("a", "2"), nil
			}
			if err := f.once(t.Context(), v1.NodeStatus{}); err != nil {
				t.Fatal(err)
			}
			if got := f.Current().Labels["l"]; got != "later" {
				t.Errorf("label %q", got)
			}
			f.api.answer = func() (*v1.Node, error) {
				f.seen(aNode("a", "5", labelled))
				return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "nodes"}, "n")
			}
			f.reported = time.Time{}
			if err := f.once(t.Context(), v1.NodeStatus{}); err != nil {
				t.Fatal(err)
			}
			if f.Current().Labels["l"] != "later" || f.Current().UID != "a" {
				t.Error("a Node that is there is taken for gone")
			}
		})
	}
}

// once is one round with that status.
func (f *told) once(ctx context.Context, status v1.NodeStatus) error {
	f.cfg.Status = func(context.Context) v1.NodeStatus { return status }
	return f.Node.once(ctx)
}

// restoring is an apiserver whose database goes back to an earlier version once.
type restoring struct {
	away
	mu      sync.Mutex
	version int
	wrote   []string
	again   chan struct{} // closed when it has been told a version from after it
}

func (r *restoring) Get(_ context.Context, _ apiserver.Ref, into runtime.Object) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	into.(*coordinationv1.Lease).ResourceVersion = fmt.Sprint(r.version)
	return nil
}

func (r *restoring) Update(_ context.Context, _ apiserver.Ref, obj, into runtime.Object) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if obj.(*coordinationv1.Lease).ResourceVersion != fmt.Sprint(r.version) {
		return apierrors.NewConflict(schema.GroupResource{Resource: "leases"}, "n", nil)
	}
	if r.version++; r.version == 1003 {
		r.version = 5
	}
	into.(*coordinationv1.Lease).ResourceVersion = fmt.Sprint(r.version)
	return nil
}

func (r *restoring) Wrote(version string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.wrote = append(r.wrote, version); len(r.wrote) == 4 {
		close(r.again)
	}
	return false
}

// The versions of the Lease are those that tell of a database that was restored.
func TestEachVersionOfTheLeaseIsTold(t *testing.T) {
	api := &restoring{version: 1000, again: make(chan struct{})}
	f := newTold()
	f.cfg.Client, f.cfg.LeaseDuration = api, 3*time.Millisecond
	f.seen(aNode("a", "1"))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); f.renewals(ctx) }()
	select {
	case <-api.again:
	case <-time.After(30 * time.Second):
		t.Error("not four renewals within 30 s")
	}
	cancel()
	<-done
	if want := []string{"1001", "1002", "5", "6"}; !slices.Equal(api.wrote[:4], want) {
		t.Errorf("told %q, want %q", api.wrote, want)
	}
}
