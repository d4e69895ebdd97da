package pods

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/kubelet/admission"
	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/probes"
)

// node is a Table with fakes, and what outlives it.
type node struct {
	t       testing.TB
	rt      *fakeRuntime
	vols    *fakeVolumes
	groups  *fakeCgroups
	objects *fakeObjects
	events  *fakeEvents
	dir     string
	unsafe  []string // sysctls
	admit   func(pod *v1.Pod, others []*v1.Pod) admission.Verdict

	table *Table
	stop  func()
	audit healed
}

// healed counts what the audit has found; it is to find nothing.
type healed struct {
	mu   sync.Mutex
	what []string
}

func (h *healed) Worked(string, time.Duration)                             {}
func (h *healed) Probed(probes.Target, probes.Kind, string, time.Duration) {}
func (h *healed) Healed(what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.what = append(h.what, what)
}

// take what was found.
func (h *healed) take() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	what := strings.Join(h.what, " ")
	h.what = nil
	return what
}

func newNode(t testing.TB) *node {
	n := &node{t: t, rt: newFakeRuntime("img:1", "img:2"), dir: t.TempDir(), events: &fakeEvents{},
		objects: &fakeObjects{configMaps: map[string]*v1.ConfigMap{}}}
	n.vols = &fakeVolumes{rt: n.rt, set: map[types.UID]bool{}}
	n.groups = &fakeCgroups{rt: n.rt, set: map[types.UID]bool{}}
	return n
}

// start the daemon; stop it with n.stop, kill -9 it with n.crash.
func (n *node) start() {
	ctx, cancel := context.WithCancel(context.Background())
	log := slog.New(slog.DiscardHandler)
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	n.table = New(Config{
		Node: spec.Node{Name: "n1", RootDir: n.dir, PodLogsDir: filepath.Join(n.dir, "log/pods"), HostIPs: []string{"192.0.2.1"},
			Allocatable: v1.ResourceList{v1.ResourceCPU: resource.MustParse("4"), v1.ResourceMemory: resource.MustParse("8Gi")}},
		RecordDir: filepath.Join(n.dir, "records"), Sources: []string{"file"}, Log: log, AllowedUnsafeSysctls: n.unsafe, Observer: &n.audit,
	}, Deps{Runtime: n.rt, Images: n.rt, Volumes: n.vols, Objects: n.objects, Cgroups: n.groups, Events: n.events, Admit: n.verdict()})
	done := make(chan error, 1)
	table := n.table
	go func() { done <- table.Run(ctx) }()
	n.stop = func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("Run: %v", err)
		}
	}
}

// verdict on pods by n.admit; nil: all are taken.
func (n *node) verdict() func(*v1.Pod, []*v1.Pod) admission.Verdict {
	if n.admit == nil {
		return nil
	}
	return func(pod *v1.Pod, others []*v1.Pod) admission.Verdict { return n.admit(pod, others) }
}

func mkpod(name, uid string, mods ...func(*v1.Pod)) *v1.Pod {
	grace := int64(5)
	p := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", UID: types.UID(uid)},
		Spec: v1.PodSpec{
			RestartPolicy: v1.RestartPolicyAlways, TerminationGracePeriodSeconds: &grace, DNSPolicy: v1.DNSDefault,
			Containers: []v1.Container{{Name: "a", Image: "img:1", ImagePullPolicy: v1.PullIfNotPresent, TerminationMessagePath: "/dev/termination-log"}},
		},
	}
	for _, m := range mods {
		m(p)
	}
	return p
}

func container(name string) v1.Container {
	return v1.Container{Name: name, Image: "img:1", ImagePullPolicy: v1.PullIfNotPresent}
}

func sidecar(name string) v1.Container {
	c := container(name)
	always := v1.ContainerRestartPolicyAlways
	c.RestartPolicy = &always
	return c
}

func never(p *v1.Pod)     { p.Spec.RestartPolicy = v1.RestartPolicyNever }
func onFailure(p *v1.Pod) { p.Spec.RestartPolicy = v1.RestartPolicyOnFailure }

// get a pod that must be there.
func (n *node) get(name string) *v1.Pod {
	n.t.Helper()
	p, ok := n.table.Get("default", name)
	if !ok {
		n.t.Fatalf("pod %s is not there", name)
	}
	return p
}

func (n *node) ready(name string) bool {
	p, ok := n.table.Get("default", name)
	return ok && podutil.IsPodReady(p)
}

// empty fails the test unless nothing of any pod is left.
func (n *node) empty() {
	n.t.Helper()
	if n.rt.count("sandboxes") != 0 || n.rt.count("containers") != 0 || n.vols.count() != 0 || n.groups.count() != 0 {
		n.t.Errorf("left: %d sandboxes, %d containers, %d volumes, %d cgroups", n.rt.count("sandboxes"), n.rt.count("containers"), n.vols.count(), n.groups.count())
	}
	if len(n.table.List()) != 0 {
		n.t.Errorf("%d pods are still listed", len(n.table.List()))
	}
	for _, glob := range []string{"records/*", "log/pods/*", "log/containers/*"} {
		if m, _ := filepath.Glob(filepath.Join(n.dir, glob)); len(m) != 0 {
			n.t.Errorf("left on disk: %v", m)
		}
	}
	n.table.mu.Lock()
	defer n.table.mu.Unlock()
	i := &n.table.index
	if len(i.workers)+len(i.uids)+len(i.ids)+len(i.told)+len(i.blocked)+len(n.table.words) != 0 {
		n.t.Errorf("left in memory: %d workers, %d uids, %d ids, %d told, %d blocked, %d words", len(i.workers), len(i.uids), len(i.ids), len(i.told), len(i.blocked), len(n.table.words))
	}
	n.table.admitted.mu.Lock()
	defer n.table.admitted.mu.Unlock()
	if a := &n.table.admitted; len(a.pods)+len(a.deferred) != 0 {
		n.t.Errorf("left in memory: %d places, %d resizes that wait", len(a.pods), len(a.deferred))
	}
}

func (n *node) invariants() {
	n.t.Helper()
	if what := n.audit.take(); what != "" {
		n.t.Errorf("the audit had to heal: %s", what)
	}
	n.rt.mu.Lock()
	defer n.rt.mu.Unlock()
	for _, b := range n.rt.broken {
		n.t.Errorf("invariant broken: %s", b)
	}
}

// in a bubble with a clock of its own.
func bubble(t *testing.T, f func(t *testing.T, n *node)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.start()
		defer n.invariants()
		defer func() { n.stop() }()
		f(t, n)
	})
}

func TestPodRunsAndGoes(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		pod := mkpod("web", "u1")
		n.table.SetPod("file", pod)
		n.table.Synced("file")
		time.Sleep(time.Second)
		synctest.Wait()
		p := n.get("web")
		if p.Status.Phase != v1.PodRunning || !podutil.IsPodReady(p) || p.Status.PodIP != "10.0.0.1" {
			t.Fatalf("status: %+v", p.Status)
		}
		if id, err := n.table.Container("default", "web", ""); err != nil || n.rt.live("default/web")["a"].id != id {
			t.Fatalf("container id %q: %v", id, err)
		}
		for _, e := range []string{"Created: Container created", "Started: Container started"} {
			if !n.events.has(e) {
				t.Errorf("no event %q in %v", e, n.events.all)
			}
		}
		if _, err := os.Stat(filepath.Join(n.dir, "records/u1.json")); err != nil {
			t.Error(err)
		}
		n.table.RemovePod("file", "u1")
		time.Sleep(5 * time.Second)
		synctest.Wait()
		n.empty()
	})
}

func (n *node) wipeRecords() {
	files, _ := filepath.Glob(filepath.Join(n.dir, "records/*"))
	for _, f := range files {
		os.Remove(f)
	}
}

// TestEditsTakeNoMemory: each edit of a static pod's manifest is a pod of
// another UID; the old ones are forgotten while the name lives.
func TestEditsTakeNoMemory(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.table.Synced("file")
		for i := range 20 {
			uid := types.UID(fmt.Sprintf("u%d", i))
			n.table.SetPod("file", mkpod("p", string(uid)))
			time.Sleep(time.Minute)
			if p, ok := n.table.Get("default", "p"); !ok || p.UID != uid || !podutil.IsPodReady(p) {
				t.Fatalf("edit %d is not in force: %+v", i, p)
			}
		}
		n.table.mu.Lock()
		told := len(n.table.index.told)
		n.table.mu.Unlock()
		if told != 1 {
			t.Errorf("%d UIDs are remembered for one pod", told)
		}
		n.table.RemovePod("file", "u0") // long gone
		time.Sleep(time.Minute)
		if !n.ready("p") {
			t.Error("the removal of an old pod ended the new one")
		}
		n.table.RemovePod("file", "u19")
		time.Sleep(time.Minute)
		n.empty()
	})
}
