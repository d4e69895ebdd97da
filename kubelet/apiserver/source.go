package apiserver

import (
	"context"
	"log/slog"
	"maps"
	"strconv"
	"sync"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/podd-runtime/podd/kubelet/manifests"
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
//	apiserver ──watch──> known ──SetPod──> table ──Watch──> report ──patch, delete──> apiserver
type Pods struct {
	cfg Config
	log *slog.Logger
	// slots bounds the requests about pods at one time.
	slots chan struct{}
	work  sync.WaitGroup

	mu  sync.Mutex
	ctx context.Context // of Run; nil before
	// known is each pod as the apiserver has it, by what it told last.
	known map[types.UID]*v1.Pod
	// ended are those of known of which nothing is left on the node.
	ended map[types.UID]bool
	// mirrors are those of known that stand for static pods.
	mirrors map[types.NamespacedName]*v1.Pod
	synced  bool
	// static are the pods of the node's own manifests, by name.
	static       map[types.NamespacedName]types.UID
	staticSynced bool
	nodeUID      types.UID
	reports      map[types.UID]*report
}

// New returns Pods; Run must be called for anything to happen.
func New(cfg Config) *Pods {
	return &Pods{
		cfg: cfg, log: cfg.Log, slots: make(chan struct{}, 32),
		known: map[types.UID]*v1.Pod{}, ended: map[types.UID]bool{}, mirrors: map[types.NamespacedName]*v1.Pod{},
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
			set: func(pod *v1.Pod) { p.set(ctx, pod) }, remove: func(pod *v1.Pod) { p.removed(ctx, pod.UID) },
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

// newer says whether a is a later version than b. The versions of one resource
// are numbers that grow (KEP-5504).
func newer(a, b *v1.Pod) bool {
	x, errX := strconv.ParseUint(a.ResourceVersion, 10, 64)
	y, errY := strconv.ParseUint(b.ResourceVersion, 10, 64)
	return errX != nil || errY != nil || x > y
}

// learn keeps a version of a pod; false when a later one is known. With it
// comes what was known before.
func (p *Pods) learn(pod *v1.Pod) (was *v1.Pod, fresh bool) {
	pod.ManagedFields = nil
	p.mu.Lock()
	defer p.mu.Unlock()
	was = p.known[pod.UID]
	if was != nil && !newer(pod, was) {
		return was, false
	}
	if was != nil && pod.Generation != 0 && was.Generation == pod.Generation {
		pod.Spec = was.Spec // the same: it need not be in memory twice
	}
	p.known[pod.UID] = pod
	if pod.Annotations[mirrorAnnotation] != "" {
		p.mirrors[name(pod)] = pod
	}
	return was, true
}

func (p *Pods) set(ctx context.Context, pod *v1.Pod) {
	was, fresh := p.learn(pod)
	if !fresh {
		return
	}
	p.deliver(was, pod)
	p.kick(ctx, p.reporter(pod))
}

// reporter is the UID under which the table knows a pod.
func (p *Pods) reporter(pod *v1.Pod) types.UID {
	if pod.Annotations[mirrorAnnotation] == "" {
		return pod.UID
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.static[name(pod)]
}

// deliver a pod to the table, unless all that is new is what the node itself
// has reported.
func (p *Pods) deliver(was, pod *v1.Pod) {
	if pod.Annotations[mirrorAnnotation] != "" || was != nil && !differs(was, pod) || p.hasEnded(pod) {
		return
	}
	told := *pod
	told.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	told.Annotations = maps.Clone(pod.Annotations)
	if told.Annotations == nil {
		told.Annotations = map[string]string{}
	}
	told.Annotations[manifests.ConfigSourceAnnotation] = SourceName
	for _, u := range p.cfg.Uses {
		u.Use(pod.UID, &told)
	}
	p.cfg.Sink.SetPod(SourceName, &told)
}

// hasEnded says that a pod which is being deleted has ended here already, and waits
// for somebody's finalizer: it must not begin again.
func (p *Pods) hasEnded(pod *v1.Pod) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return pod.DeletionTimestamp != nil && p.ended[pod.UID]
}

func differs(was, pod *v1.Pod) bool {
	return pod.Generation == 0 || was.Generation != pod.Generation || len(pod.Spec.ReadinessGates) > 0 ||
		!was.DeletionTimestamp.Equal(pod.DeletionTimestamp) ||
		grace(was) != grace(pod) ||
		!maps.Equal(was.Labels, pod.Labels) || !maps.Equal(was.Annotations, pod.Annotations)
}

func grace(pod *v1.Pod) int64 {
	if g := pod.DeletionGracePeriodSeconds; g != nil {
		return *g
	}
	return -1
}

// removed is a pod that the apiserver has no more.
func (p *Pods) removed(ctx context.Context, uid types.UID) {
	p.mu.Lock()
	pod := p.known[uid]
	delete(p.known, uid)
	delete(p.ended, uid)
	mirror := pod != nil && pod.Annotations[mirrorAnnotation] != ""
	var static types.UID
	if mirror {
		if m := p.mirrors[name(pod)]; m != nil && m.UID == uid {
			delete(p.mirrors, name(pod))
		}
		static = p.static[name(pod)]
	}
	p.mu.Unlock()
	switch {
	case pod == nil:
	case mirror:
		p.kick(ctx, static) // it is made anew
	default:
		p.cfg.Sink.RemovePod(SourceName, uid)
	}
}

// replace all that is known by what the apiserver has.
func (p *Pods) replace(ctx context.Context, all []*v1.Pod) {
	there := make(map[types.UID]bool, len(all))
	for _, pod := range all {
		there[pod.UID] = true
	}
	p.mu.Lock()
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
		p.set(ctx, pod)
	}
	p.mu.Lock()
	first := !p.synced
	p.synced = true
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
	for key, u := range s.pods.static {
		if u == uid {
			delete(s.pods.static, key)
		}
	}
	s.pods.mu.Unlock()
	s.Sink.RemovePod(source, uid)
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
