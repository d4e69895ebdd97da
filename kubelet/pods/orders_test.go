package pods

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	resourcehelper "k8s.io/component-helpers/resource"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/admission"
	"github.com/podd-runtime/podd/kubelet/status"
)

// apis is an apiserver as far as the table can tell: it has pods, keeps what was
// reported of them, and forgets, restores and repeats itself.
type apis struct {
	n   *node
	r   *rand.Rand
	uid int

	pods map[string]*v1.Pod // by name
	lost map[string]*v1.Pod // removed by force, and may come back

	mu     sync.Mutex
	known  map[types.UID]bool
	last   map[types.UID]*v1.PodStatus
	over   map[types.UID]v1.PodPhase // as told
	starts map[types.UID]int         // of each pod that is over, when it was told
	gone   []types.UID
	wrong  []string
}

// follow what the table tells, and hold it against the laws.
func (a *apis) follow(ctx context.Context) {
	for ev := range a.n.table.Watch(ctx, "") {
		p, ok := ev.Object.(*v1.Pod)
		if !ok {
			continue
		}
		a.mu.Lock()
		if was := a.over[p.UID]; was != "" && p.Status.Phase != was && a.known[p.UID] { // nobody reports others
			a.wrong = append(a.wrong, fmt.Sprintf("%s was told as %s, then as %s", p.UID, was, p.Status.Phase))
			a.note("WRONG %s %s", p.UID, p.Status.Phase)
		}
		if a.known[p.UID] {
			a.last[p.UID] = &p.Status
		}
		if a.known[p.UID] && status.Over(p.Status.Phase) {
			a.over[p.UID] = p.Status.Phase
			a.note("told %s %s", p.UID, p.Status.Phase)
		}
		if ev.Type == watch.Deleted {
			a.gone = append(a.gone, p.UID)
		}
		a.mu.Unlock()
	}
}

// report takes what was told: it is in the pods' status, and what is gone here
// and being deleted is deleted.
func (a *apis) report() {
	a.mu.Lock()
	last, gone := maps.Clone(a.last), a.gone
	a.gone = nil
	for _, list := range []map[string]*v1.Pod{a.pods, a.lost} {
		for name, p := range list {
			if last, told := last[p.UID]; told && !status.Over(p.Status.Phase) {
				p = p.DeepCopy()
				p.Status = *last
				list[name] = p
			}
		}
	}
	a.mu.Unlock()
	for _, uid := range gone {
		for name, p := range a.pods {
			if p.UID == uid && p.DeletionTimestamp != nil {
				delete(a.pods, name)
				a.know(uid, false)
				a.n.table.RemovePod("file", uid)
			}
		}
	}
}

func (a *apis) note(format string, args ...any) {
	a.n.rt.mu.Lock()
	defer a.n.rt.mu.Unlock()
	a.n.rt.note("     "+format, args...)
}

func (a *apis) know(uid types.UID, known bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.known[uid] = known
}

// tell a version of a pod, perhaps the one before once more.
func (a *apis) tell(name string, p *v1.Pod) {
	a.pods[name] = p
	a.know(p.UID, true)
	a.note("told: %s phase %q generation %d deleted %v", p.UID, p.Status.Phase, p.Generation, p.DeletionTimestamp)
	for range 1 + a.r.IntN(2) {
		a.n.table.SetPod("file", p)
	}
}

// step does one thing to the pods of a name.
func (a *apis) step(name string) {
	p := a.pods[name]
	if p == nil {
		a.create(name)
		return
	}
	next := p.DeepCopy()
	next.Generation++
	switch a.r.IntN(12) {
	case 0, 1:
		next = deleted(next, int64(a.r.IntN(8)))
		a.tell(name, next)
	case 2:
		a.lost[name] = p
		delete(a.pods, name)
		a.know(p.UID, false)
		a.note("removed by force: %s", p.UID)
		a.n.table.RemovePod("file", p.UID)
	case 3:
		a.tell(name, labelled(p, fmt.Sprint(a.r.IntN(1000))))
	case 4, 5:
		sized([]string{"200m", "1", "3", "100"}[a.r.IntN(4)], "64Mi")(next)
		a.tell(name, next)
	case 6:
		a.n.change("cm")
	case 7:
		for _, c := range a.n.rt.live("default/" + name) {
			a.n.rt.exit(c.id, int32(a.r.IntN(2)))
		}
	case 8:
		a.n.table.Evict(p.UID, "too much")
	case 9:
		if !status.Over(p.Status.Phase) && a.r.IntN(2) == 0 {
			next = p.DeepCopy()
			next.Status.Phase = v1.PodFailed
			a.tell(name, next)
		}
	case 10:
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		if a.r.IntN(3) == 0 {
			a.n.table.Stop(ctx, "default", name, nil)
		}
		a.n.table.Restart(ctx, "default", name, "")
	case 11:
		next.Spec.Containers[0].Image = []string{"img:1", "img:2"}[a.r.IntN(2)]
		a.tell(name, next)
	}
}

func (a *apis) create(name string) {
	if old := a.lost[name]; old != nil && a.r.IntN(2) == 0 {
		delete(a.lost, name)
		a.tell(name, old)
		return
	}
	a.uid++
	p := mkpod(name, fmt.Sprint("u", a.uid), ofAPI, shape(a.r), sized("500m", "64Mi"), usesObject)
	p.Generation = 1
	switch a.r.IntN(3) {
	case 0:
		never(p)
	case 1:
		onFailure(p)
	}
	a.tell(name, p)
}

// whole does one thing to the node.
func (a *apis) whole(again func()) {
	n := a.n
	switch a.r.IntN(6) {
	case 0, 1:
		if a.r.IntN(2) == 0 {
			n.stop()
		} else {
			n.crash()
		}
		a.note("the daemon is away")
		if a.r.IntN(4) == 0 {
			a.note("and its records are lost")
			n.wipeRecords()
		}
		a.report()
		again()
	case 2:
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		n.table.Hold(ctx, true)
		for _, p := range n.table.Pods() {
			if a.r.IntN(2) == 0 {
				n.table.Terminate(ctx, p.Namespace, p.Name, time.Second, status.Cause{Reason: "Terminated"})
			}
		}
	case 3:
		n.table.Hold(context.Background(), false)
	}
}

// TestRandomOrders has an apiserver, logind, users and crashes say what they
// like in any order: what is over stays over and starts nothing, every pod that
// is not is as it was asked for in the end, nothing stays behind, and the audit
// finds nothing. SEED begins one as it began, though not all of its schedule
// repeats, RUNS sets how many.
func TestRandomOrders(t *testing.T) {
	runs, first := 20, uint64(0)
	if os.Getenv("PODD_TEST_ALL") != "" {
		runs = 500
	}
	if s := os.Getenv("RUNS"); s != "" {
		fmt.Sscan(s, &runs)
	}
	if s := os.Getenv("SEED"); s != "" {
		fmt.Sscan(s, &first)
		runs = 1
	}
	for i := range runs {
		seed := first + uint64(i)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { randomOrders(t, seed) })
		})
	}
}

func randomOrders(t *testing.T, seed uint64) {
	r := rand.New(&lockedSource{make(chan struct{}, 1), rand.NewPCG(seed, 1)})
	n := newNode(t)
	is := &v1.Node{Status: v1.NodeStatus{Allocatable: v1.ResourceList{v1.ResourceCPU: resource.MustParse("4"), v1.ResourceMemory: resource.MustParse("8Gi"), v1.ResourcePods: resource.MustParse("110")}}}
	n.admit = func(pod *v1.Pod, others []*v1.Pod) admission.Verdict { return admission.Admit(is, pod, false, others) }
	n.rt.ends = func(c *runtimeapi.ContainerConfig) (time.Duration, int32, bool) {
		return 500 * time.Millisecond, 0, c.Metadata.Name == "init"
	}
	n.rt.setFault(faults(r, 0.03))
	a := &apis{n: n, r: r, pods: map[string]*v1.Pod{}, lost: map[string]*v1.Pod{}, known: map[types.UID]bool{}, last: map[types.UID]*v1.PodStatus{}, over: map[types.UID]v1.PodPhase{}, starts: map[types.UID]int{}}
	watching := func() {}
	again := func() {
		watching()
		n.start()
		ctx, cancel := context.WithCancel(t.Context())
		watching = cancel
		go a.follow(ctx)
		// A crash may have lost what was told a moment before: until the source
		// speaks, which has it, what is told is of no account.
		for _, p := range a.pods {
			a.know(p.UID, false)
		}
		if r.IntN(2) == 0 {
			synctest.Wait()
		}
		for _, p := range a.pods {
			n.table.SetPod("file", p)
		}
		n.table.Synced("file")
		synctest.Wait()
		for _, p := range a.pods {
			a.know(p.UID, true)
		}
	}
	again()
	defer n.invariants()
	defer func() { n.stop(); watching() }()
	for range 60 {
		if r.IntN(12) == 0 {
			a.whole(again)
		} else {
			a.step(fmt.Sprint("p", r.IntN(4)))
		}
		time.Sleep(time.Duration(r.IntN(3000)) * time.Millisecond)
		a.report()
		a.law()
	}
	n.rt.setFault(nil)
	n.table.Hold(context.Background(), false)
	for range 30 {
		after(time.Minute)
		a.report()
	}
	a.law()
	a.end(t)
	if t.Failed() {
		n.dump()
	}
	for _, p := range a.pods {
		n.table.RemovePod("file", p.UID)
	}
	after(5 * time.Minute)
	n.empty()
	if t.Failed() {
		t.Log(strings.Join(n.rt.history, "\n"))
	}
}

// law: what is over starts nothing.
func (a *apis) law() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for uid, phase := range a.over {
		have, seen := a.starts[uid]
		now := a.n.rt.starts(string(uid))
		if !seen {
			a.starts[uid] = now
		} else if now != have {
			a.wrong = append(a.wrong, fmt.Sprintf("%s is %s, and %d containers were started", uid, phase, now-have))
		}
	}
}

// settledPod says that each container runs well or has ended for good.
func settledPod(p *v1.Pod) bool {
	for _, s := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		ended := s.State.Terminated != nil && (p.Spec.RestartPolicy != v1.RestartPolicyAlways || s.Name == "init")
		if !s.Ready && !ended {
			return false
		}
	}
	return p.Status.Phase == v1.PodRunning
}

// end is how all must be when nobody has said anything for long.
func (a *apis) end(t *testing.T) {
	n := a.n
	for _, w := range a.wrong {
		t.Error(w)
	}
	for name, p := range a.pods {
		got, ok := n.table.Get("default", name)
		switch {
		case p.DeletionTimestamp != nil:
			t.Errorf("%s is still there: %v", p.UID, ok)
		case !ok || got.UID != p.UID:
			t.Errorf("%s is not there", p.UID)
		case status.Over(got.Status.Phase):
			if len(n.rt.live("default/"+name)) != 0 {
				t.Errorf("%s is %s and runs", p.UID, got.Status.Phase)
			}
		case got.DeletionTimestamp != nil || !settledPod(got):
			t.Errorf("%s is not ready: %+v", p.UID, got.Status)
		default:
			n.holds(p)
		}
	}
	n.table.admitted.mu.Lock()
	defer n.table.admitted.mu.Unlock()
	sum, counted := int64(0), []string(nil)
	for _, p := range n.table.admitted.pods {
		q := resourcehelper.PodRequests(p, resourcehelper.PodResourcesOptions{})
		sum += q.Cpu().MilliValue()
		counted = append(counted, fmt.Sprint(p.UID, " ", q.Cpu()))
	}
	if sum > 4000 {
		t.Errorf("%dm of 4 CPUs are given away: %s", sum, counted)
	}
}
