package apiserver

import (
	"context"
	"log/slog"
	"maps"
	"strconv"
	"sync"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/status"
)

// SourceName is the name under which pods of an apiserver are known.
const SourceName = "api"

// mirrorAnnotation says that a pod is the image of a static one, and of which
// revision (k8s.io/kubernetes/pkg/kubelet/types).
const mirrorAnnotation = "kubernetes.io/config.mirror"

// Table shows the pods of the node, *pods.Table.
type Table interface {
	Watch(ctx context.Context, resourceVersion string) <-chan watch.Event
}

// Uses is told which pods' objects are needed; *Objects and *Services.
type Uses interface {
	// Use replaces what is known of the pod of that UID; nil: it is gone.
	Use(uid types.UID, pod *v1.Pod)
}

// Config of Pods.
type Config struct {
	Client   *Client
	NodeName string
	// Sink takes the pods, Table shows what has become of them.
	Sink  manifests.Sink
	Table Table
	// Uses are told of each pod before Sink is.
	Uses []Uses
	Log  *slog.Logger
}

// Pods are those that an apiserver has bound to this node: they come in by one
// watch, and their status goes out, each pod's by itself.
//
//	apiserver ──watch, list──> known ──SetPod──> table ──Watch──> report ──patch, delete──> apiserver
//	    └────── answers to own writes ──^
//
// Whatever road a pod's version came by, what it brings is told the table, once:
// told is what that knows, and compared with. Versions are ordered within a road
// only. A list is taken as it is, for an apiserver's database may have been
// restored from a backup; an event of the watch is old only when an answer to a
// write of this node was ahead of it.
type Pods struct {
	cfg Config
	log *slog.Logger
	// slots bounds the requests about pods at one time.
	slots chan struct{}
	work  sync.WaitGroup

	// telling is held from looking at what is known to having told it, so that
	// the last that the table is told is the last that is known. It comes before mu.
	telling sync.Mutex

	mu    sync.Mutex
	ctx   context.Context // of Run; nil before
	known map[types.UID]*fact
	// mirrors are those of known that stand for static pods.
	mirrors map[types.NamespacedName]*v1.Pod
	synced  bool
	// writes under way, and the pods that were removed meanwhile: their answers
	// come from the past.
	writes int
	buried map[types.UID]bool
	// lists that have come in.
	lists int
	// orphans are the mirror pods of no static pod that are being deleted.
	orphans map[types.UID]bool
	// static are the pods of the node's own manifests, by name.
	static       map[types.NamespacedName]types.UID
	staticSynced bool
	nodeUID      types.UID
	reports      map[types.UID]*report
}

// fact is one pod of the apiserver's.
type fact struct {
	pod *v1.Pod // as the apiserver has it, by what it told last
	// answered is the version of the last answer to a write of this node since
	// the last list; "" without one.
	answered string
	told     *told // what the table was told; nil: nothing
	// ended: nothing of it is left on the node.
	ended bool
}

// New returns Pods; Run must be called for anything to happen.
func New(cfg Config) *Pods {
	return &Pods{
		cfg: cfg, log: cfg.Log, slots: make(chan struct{}, 32),
		known: map[types.UID]*fact{}, mirrors: map[types.NamespacedName]*v1.Pod{},
		buried: map[types.UID]bool{}, orphans: map[types.UID]bool{},
		static: map[types.NamespacedName]types.UID{}, reports: map[types.UID]*report{},
	}
}

// Run follows apiserver and table until ctx ends.
func (p *Pods) Run(ctx context.Context) error {
	p.mu.Lock()
	p.ctx = ctx
	p.mu.Unlock()
	p.work.Go(func() { p.report(ctx) })
	p.work.Go(func() {
		selector := fields.OneTermEqualSelector("spec.nodeName", p.cfg.NodeName)
		p.cfg.Client.follow(ctx, Ref{Resource: "pods"}, selector, &v1.Pod{}, changes[*v1.Pod]{
			set: func(pod *v1.Pod) { p.hear(ctx, pod, event) }, remove: func(pod *v1.Pod) { p.removed(ctx, pod.UID) },
			replace: func(all []*v1.Pod) { p.replace(ctx, all) },
		})
	})
	<-ctx.Done()
	p.work.Wait()
	return nil
}

func name(o metav1.Object) types.NamespacedName {
	return types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetName()}
}

// newer says whether version a is later than b. The versions of one resource
// are numbers that grow (KEP-5504).
func newer(a, b string) bool {
	x, errX := strconv.ParseUint(a, 10, 64)
	y, errY := strconv.ParseUint(b, 10, 64)
	return errX != nil || errY != nil || x > y
}

// road is the way that a version of a pod came by.
type road int

const (
	event  road = iota // of the watch
	listed             // in a list
	answer             // to a write of this node
)

// hear takes a version of a pod and tells the table what is new.
func (p *Pods) hear(ctx context.Context, pod *v1.Pod, by road) {
	if p.learn(pod, by) {
		p.tell(pod.UID)
		p.kick(ctx, p.reporter(pod))
		p.checkOrphan(ctx, pod)
	}
}

// learn keeps a version of a pod; false: it is from the past.
func (p *Pods) learn(pod *v1.Pod, by road) bool {
	pod.ManagedFields = nil
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.known[pod.UID]
	switch {
	case by == answer && p.buried[pod.UID]:
		return false
	case f == nil:
		f = &fact{ended: p.over(pod.UID)}
		p.known[pod.UID] = f
	case by == answer && !newer(pod.ResourceVersion, f.pod.ResourceVersion):
		return false // the watch was faster
	case by == event && f.answered != "" && !newer(pod.ResourceVersion, f.answered):
		return false
	case pod.Generation != 0 && f.pod.Generation == pod.Generation && (by != listed || equality.Semantic.DeepEqual(&f.pod.Spec, &pod.Spec)):
		// The same: it need not be in memory twice. A generation comes twice when
		// a backup is restored.
		pod.Spec = f.pod.Spec
	}
	switch by {
	case answer:
		f.answered = pod.ResourceVersion
	case listed:
		f.answered = ""
	}
	first := f.pod == nil
	f.pod = pod
	// What comes late of one that is gone does not take the name from its successor.
	if m := p.mirrors[name(pod)]; isMirror(pod) && (first || m == nil || m.UID == pod.UID) {
		p.mirrors[name(pod)] = pod
	}
	return true
}

// succeed a mirror pod that is gone by another one of its name, which may have
// been known before; p.mu is held.
func (p *Pods) succeed(gone *v1.Pod) {
	if m := p.mirrors[name(gone)]; m == nil || m.UID != gone.UID {
		return
	}
	delete(p.mirrors, name(gone))
	for _, f := range p.known {
		if isMirror(f.pod) && name(f.pod) == name(gone) {
			p.mirrors[name(gone)] = f.pod
		}
	}
}

func isMirror(pod *v1.Pod) bool { return pod.Annotations[mirrorAnnotation] != "" }

// reporter is the UID under which the table knows a pod.
func (p *Pods) reporter(pod *v1.Pod) types.UID {
	if !isMirror(pod) {
		return pod.UID
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.static[name(pod)]
}

// tell the table what is known of a pod, unless it knows: all that is new may be
// what the node itself has reported.
func (p *Pods) tell(uid types.UID) {
	p.telling.Lock()
	defer p.telling.Unlock()
	p.mu.Lock()
	f := p.known[uid]
	// One that is being deleted, has ended here and waits for somebody's
	// finalizer must not begin again.
	if f == nil || isMirror(f.pod) || f.pod.DeletionTimestamp != nil && f.ended {
		p.mu.Unlock()
		return
	}
	pod, news := f.pod, toldOf(f.pod)
	known := f.told != nil && f.told.equal(news)
	f.told = news
	p.mu.Unlock()
	if known && pod.Generation != 0 {
		return
	}
	say := *pod
	say.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	say.Annotations = maps.Clone(pod.Annotations)
	if say.Annotations == nil {
		say.Annotations = map[string]string{}
	}
	say.Annotations[manifests.ConfigSourceAnnotation] = SourceName
	for _, u := range p.cfg.Uses {
		u.Use(uid, &say)
	}
	p.cfg.Sink.SetPod(SourceName, &say)
}

// told is what of a pod the node acts on.
type told struct {
	generation          int64
	deleted             *metav1.Time
	grace               int64
	labels, annotations map[string]string
	// spec of that generation, which may come twice: where it lies in memory.
	spec *v1.Container
	// over: the phase is a terminal one, whoever has set it.
	over bool
	// gates are the conditions that the pod's readiness waits for.
	gates map[v1.PodConditionType]v1.ConditionStatus
}

func toldOf(pod *v1.Pod) *told {
	t := &told{
		generation: pod.Generation, deleted: pod.DeletionTimestamp, grace: -1,
		labels: pod.Labels, annotations: pod.Annotations, over: status.Over(pod.Status.Phase),
	}
	if g := pod.DeletionGracePeriodSeconds; g != nil {
		t.grace = *g
	}
	if c := pod.Spec.Containers; len(c) > 0 {
		t.spec = &c[0]
	}
	for _, gate := range pod.Spec.ReadinessGates {
		for _, c := range pod.Status.Conditions {
			if c.Type == gate.ConditionType {
				if t.gates == nil {
					t.gates = map[v1.PodConditionType]v1.ConditionStatus{}
				}
				t.gates[c.Type] = c.Status
			}
		}
	}
	return t
}

func (t *told) equal(o *told) bool {
	return t.generation == o.generation && t.spec == o.spec && t.deleted.Equal(o.deleted) && t.grace == o.grace && t.over == o.over &&
		maps.Equal(t.labels, o.labels) && maps.Equal(t.annotations, o.annotations) && maps.Equal(t.gates, o.gates)
}

// removed is a pod that the apiserver has no more.
func (p *Pods) removed(ctx context.Context, uid types.UID) {
	p.telling.Lock()
	defer p.telling.Unlock()
	p.mu.Lock()
	if p.writes > 0 {
		p.buried[uid] = true
	}
	f := p.known[uid]
	if f == nil {
		p.mu.Unlock()
		return
	}
	delete(p.known, uid)
	p.succeed(f.pod)
	static := p.static[name(f.pod)]
	r := p.reports[uid]
	begun := r != nil && !r.gone
	p.spent(uid)
	p.mu.Unlock()
	if isMirror(f.pod) {
		p.kick(ctx, static) // it is made anew
		return
	}
	p.cfg.Sink.RemovePod(SourceName, uid)
	if !begun { // else the table tells of its end
		p.forgetUses(uid)
	}
}

// use the objects of a pod again that has ended and is there once more.
func (p *Pods) use(uid types.UID) {
	p.telling.Lock()
	defer p.telling.Unlock()
	pod := p.version(uid)
	if pod == nil || isMirror(pod) {
		return
	}
	for _, u := range p.cfg.Uses {
		u.Use(uid, pod)
	}
}

func (p *Pods) forgetUses(uid types.UID) {
	for _, u := range p.cfg.Uses {
		u.Use(uid, nil)
	}
}

// write does a request about a pod and takes what it answers.
func (p *Pods) write(ctx context.Context, request func(into *v1.Pod) error) error {
	p.mu.Lock()
	p.writes++
	lists := p.lists
	p.mu.Unlock()
	is := &v1.Pod{}
	err := request(is)
	p.mu.Lock()
	// A list has come in since that does not have it: either it is gone again, or
	// the watch is about to tell of it.
	past := p.lists != lists && p.known[is.UID] == nil
	p.mu.Unlock()
	if err == nil && !past {
		p.hear(ctx, is, answer)
	}
	p.mu.Lock()
	if p.writes--; p.writes == 0 {
		clear(p.buried)
	}
	p.mu.Unlock()
	return err
}

// replace all that is known by what the apiserver has.
func (p *Pods) replace(ctx context.Context, all []*v1.Pod) {
	there := make(map[types.UID]bool, len(all))
	for _, pod := range all {
		there[pod.UID] = true
	}
	p.mu.Lock()
	p.lists++
	var gone []types.UID
	for uid := range p.known {
		if !there[uid] {
			gone = append(gone, uid)
		}
	}
	p.mu.Unlock()
	for _, uid := range gone {
		p.removed(ctx, uid)
	}
	for _, pod := range all {
		p.hear(ctx, pod, listed)
	}
	p.mu.Lock()
	first := !p.synced
	p.synced = true
	if first {
		for uid := range p.reports {
			p.spent(uid)
		}
	}
	p.mu.Unlock()
	if first {
		p.log.Info("pods of the apiserver are known", "pods", len(all))
		p.cfg.Sink.Synced(SourceName)
		p.kickStatic(ctx)
	}
}

// Registered says that the node is known to the apiserver, with that UID:
// mirror pods can be made.
func (p *Pods) Registered(uid types.UID) {
	p.mu.Lock()
	changed := p.nodeUID != uid
	p.nodeUID = uid
	ctx := p.ctx
	p.mu.Unlock()
	if changed && ctx != nil {
		p.kickStatic(ctx)
	}
}

// Static returns a sink for the node's own manifests, which remembers what
// they hold and passes it on to sink.
func (p *Pods) Static(sink manifests.Sink) manifests.Sink {
	return staticSink{Sink: sink, pods: p}
}

type staticSink struct {
	manifests.Sink
	pods *Pods
}

func (s staticSink) SetPod(source string, pod *v1.Pod) {
	s.pods.mu.Lock()
	s.pods.static[name(pod)] = pod.UID
	s.pods.mu.Unlock()
	s.Sink.SetPod(source, pod)
}

func (s staticSink) RemovePod(source string, uid types.UID) {
	s.pods.mu.Lock()
	var left *v1.Pod
	for key, u := range s.pods.static {
		if u == uid {
			delete(s.pods.static, key)
			left = s.pods.mirrors[key]
		}
	}
	begun, ctx := s.pods.reports[uid] != nil, s.pods.ctx
	s.pods.mu.Unlock()
	s.Sink.RemovePod(source, uid)
	if left != nil && !begun && ctx != nil { // else its end in the table is waited for
		s.pods.checkOrphan(ctx, left)
	}
}

func (s staticSink) Synced(source string) {
	s.pods.mu.Lock()
	s.pods.staticSynced = true
	ctx := s.pods.ctx
	s.pods.mu.Unlock()
	s.Sink.Synced(source)
	if ctx != nil {
		s.pods.kickStatic(ctx)
	}
}
