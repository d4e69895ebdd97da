// Package node makes this machine a Node of a cluster: it registers it, keeps
// its Lease, and reports its status when that has changed.
package node

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/kubelet/apiserver"
)

// Client of the apiserver, *apiserver.Client.
type Client interface {
	Get(ctx context.Context, ref apiserver.Ref, into runtime.Object) error
	Create(ctx context.Context, ref apiserver.Ref, obj, into runtime.Object) error
	Update(ctx context.Context, ref apiserver.Ref, obj, into runtime.Object) error
	Patch(ctx context.Context, ref apiserver.Ref, patch []byte, into runtime.Object) error
	// Wrote is told each version of the Lease; see apiserver.Client.
	Wrote(version string) (restored bool)
	Node(ctx context.Context, name string, set func(*v1.Node))
}

// Config of a Node.
type Config struct {
	Client Client
	Name   string
	// Register: make the Node when there is none; otherwise somebody else does.
	Register bool
	// Labels and Taints that a new Node gets, and whether pods may be bound to it.
	Labels        map[string]string
	Taints        []v1.Taint
	Unschedulable bool
	// Status is what the machine is like now; it asks the runtime, which may take
	// its time. Fixed is what of it is known without.
	Status func(ctx context.Context) v1.NodeStatus
	Fixed  func() v1.NodeStatus
	// StatusEvery is how often that is looked at, ReportEvery how often it is
	// reported when nothing has changed, LeaseDuration how long the control
	// plane takes the node for alive after a renewal.
	StatusEvery, ReportEvery, LeaseDuration time.Duration
	// Registered is told the Node's UID, whenever it is another one.
	Registered func(uid types.UID)
	// Event tells of the Node.
	Event func(eventType, reason, message string)
	Log   *slog.Logger
}

// Node of the cluster.
type Node struct {
	cfg  Config
	log  *slog.Logger
	wake chan struct{}

	// telling is held from learning what the Node is to having told it: whatever
	// road it came by, what is new is told once and in order. It comes before mu.
	telling sync.Mutex
	told    *v1.Node // what others were told last; guarded by telling

	mu sync.Mutex
	// node as the apiserver has it; nil: it has none.
	node     *v1.Node
	planned  *v1.Node // what would be registered
	reported time.Time
}

// New returns a Node; Run must be called for anything to happen.
func New(cfg Config) *Node {
	return &Node{cfg: cfg, log: cfg.Log, wake: make(chan struct{}, 1)}
}

// Run keeps the Node until ctx ends.
func (n *Node) Run(ctx context.Context) error {
	var parts sync.WaitGroup
	n.tell(change{v1.EventTypeNormal, "Starting", "Starting kubelet."})
	parts.Go(func() { n.renewals(ctx) })
	parts.Go(func() { n.cfg.Client.Node(ctx, n.cfg.Name, n.seen) })
	failures := 0
	tick := time.NewTicker(n.cfg.StatusEvery)
	defer tick.Stop()
	for ctx.Err() == nil {
		if err := n.once(ctx); err != nil && ctx.Err() == nil {
			failures++
			if failures == 1 || failures%20 == 0 {
				n.log.Warn("node is not reported to the apiserver", "node", n.cfg.Name, "failures", failures, "error", err)
			}
			wait(ctx, apiserver.Backoff(failures, 200*time.Millisecond, 7*time.Second), nil)
			continue
		}
		failures = 0
		select {
		case <-ctx.Done():
		case <-tick.C:
		case <-n.wake:
		}
	}
	parts.Wait()
	return nil
}

// statusWait is how long the runtime may take to tell its part of the status;
// then the node is reported as not ready.
const statusWait = 30 * time.Second

// once registers the node if it must be, or reports its status if it must be.
func (n *Node) once(ctx context.Context) error {
	sctx, cancel := context.WithTimeout(ctx, statusWait)
	status := n.cfg.Status(sctx)
	cancel()
	n.mu.Lock()
	node := n.node
	n.mu.Unlock()
	if node == nil {
		if !n.cfg.Register {
			return nil // the watch tells when somebody has made it
		}
		return n.register(ctx, status)
	}
	return n.report(ctx, node, status)
}

// Current is the Node as the apiserver has it, or as it would be registered,
// without what the runtime tells. It asks nobody: pods begin by it one after the
// other. It must not be changed.
func (n *Node) Current() *v1.Node {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.node != nil {
		return n.node
	}
	if n.planned == nil {
		n.planned = n.fresh(n.cfg.Fixed())
	}
	return n.planned
}

// seen takes what the watch says of the Node; nil: there is none. It is taken as
// it is: a database may have been restored from a backup.
func (n *Node) seen(node *v1.Node) {
	n.telling.Lock()
	defer n.telling.Unlock()
	n.mu.Lock()
	was := n.node
	if node != nil {
		node.ManagedFields = nil
	}
	n.node = node
	n.mu.Unlock()
	n.tellNew(node)
	if node == nil {
		if was != nil {
			n.log.Warn("the Node was deleted, it is registered again", "node", n.cfg.Name)
		}
		n.poke()
	}
}

// answered takes the answer to a request that was made when since was known. It
// is left out when the watch has told something meanwhile: that is later, or
// what the request has done follows.
func (n *Node) answered(since, node *v1.Node) {
	n.telling.Lock()
	defer n.telling.Unlock()
	n.mu.Lock()
	old := n.node != since
	if !old {
		n.node = node
	}
	n.mu.Unlock()
	if !old {
		n.tellNew(node)
	}
}

// tellNew tells what is new in the Node; n.telling is held.
func (n *Node) tellNew(node *v1.Node) {
	was := n.told
	n.told = node
	switch {
	case node == nil:
	case was == nil || was.UID != node.UID:
		n.cfg.Registered(node.UID)
		n.poke()
	default:
		n.tellSchedulable(was, node)
	}
}

func (n *Node) poke() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// fresh is the Node as it is registered.
func (n *Node) fresh(status v1.NodeStatus) *v1.Node {
	labels := maps.Clone(n.cfg.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	maps.Copy(labels, ownLabels(n.cfg.Name))
	node := &v1.Node{
		ObjectMeta: metav1.ObjectMeta{
			Name: n.cfg.Name, Labels: labels,
			// Attaching is the controller's work, as upstream has it by default.
			Annotations: map[string]string{"volumes.kubernetes.io/controller-managed-attach-detach": "true"},
		},
		Spec:   v1.NodeSpec{Taints: n.cfg.Taints, Unschedulable: n.cfg.Unschedulable},
		Status: status,
	}
	now := metav1.Now()
	node.Status.Conditions = slices.Clone(status.Conditions)
	for i := range node.Status.Conditions {
		c := &node.Status.Conditions[i]
		c.LastHeartbeatTime, c.LastTransitionTime = now, now
	}
	if n.cfg.Unschedulable {
		node.Spec.Taints = append(node.Spec.Taints, v1.Taint{Key: v1.TaintNodeUnschedulable, Effect: v1.TaintEffectNoSchedule})
	}
	return node
}

// register makes the Node, or takes over the one that is there.
func (n *Node) register(ctx context.Context, status v1.NodeStatus) error {
	ref := apiserver.Ref{Resource: "nodes"}
	is := &v1.Node{}
	err := n.cfg.Client.Create(ctx, ref, n.fresh(status), is)
	made := err == nil
	if apierrors.IsAlreadyExists(err) {
		ref.Name = n.cfg.Name
		if err = n.cfg.Client.Get(ctx, ref, is); err == nil {
			err = n.relabel(ctx, is)
		}
	}
	if err != nil {
		return fmt.Errorf("register node %s: %w", n.cfg.Name, err)
	}
	if made {
		n.tell(changes(n.cfg.Name, nil, &status)...)
	}
	n.log.Info("node registered", "node", n.cfg.Name, "uid", is.UID)
	n.answered(nil, is)
	n.poke() // its status may be of another time
	return nil
}

// relabel a Node of before: the labels that say what the machine is.
func (n *Node) relabel(ctx context.Context, node *v1.Node) error {
	missing := map[string]string{}
	for k, v := range ownLabels(n.cfg.Name) {
		if node.Labels[k] != v {
			missing[k] = v
		}
	}
	if len(missing) == 0 {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": missing}})
	if err != nil {
		return err
	}
	return n.cfg.Client.Patch(ctx, apiserver.Ref{Resource: "nodes", Name: n.cfg.Name}, patch, node)
}

// report the status when it differs from what the apiserver has, or when it
// was not for long.
func (n *Node) report(ctx context.Context, node *v1.Node, status v1.NodeStatus) error {
	now := metav1.Now()
	due := n.reported.IsZero() || time.Since(n.reported) >= n.cfg.ReportEvery
	patch, changed, err := statusPatch(&node.Status, &status, now, due)
	if err != nil || !changed && !due {
		return err
	}
	is := &v1.Node{}
	err = n.cfg.Client.Patch(ctx, apiserver.Ref{Resource: "nodes", Name: n.cfg.Name, Subresource: "status"}, patch, is)
	if apierrors.IsNotFound(err) {
		n.answered(node, nil)
		n.poke()
		return nil
	}
	if err != nil {
		return fmt.Errorf("patch status of node %s: %w", n.cfg.Name, err)
	}
	n.answered(node, is)
	n.reported = now.Time
	n.tell(changes(n.cfg.Name, &node.Status, &status)...)
	return nil
}

// statusPatch is the strategic merge patch from what the apiserver has to what
// is; changed says whether there is more in it than the time of day.
func statusPatch(was, is *v1.NodeStatus, now metav1.Time, due bool) (patch []byte, changed bool, err error) {
	want := *is
	want.Conditions = nil
	diff := map[string]any{}
	for i := range is.Conditions {
		c := is.Conditions[i]
		c.LastHeartbeatTime, c.LastTransitionTime = now, now
		var have *v1.NodeCondition
		for j := range was.Conditions {
			if was.Conditions[j].Type == c.Type {
				have = &was.Conditions[j]
			}
		}
		if have != nil && have.Status == c.Status {
			c.LastTransitionTime = have.LastTransitionTime
		}
		same := have != nil && have.Status == c.Status && have.Reason == c.Reason && have.Message == c.Message
		changed = changed || !same
		want.Conditions = append(want.Conditions, c)
	}
	old, err := object(was)
	if err != nil {
		return nil, false, err
	}
	fresh, err := object(&want)
	if err != nil {
		return nil, false, err
	}
	for k, v := range fresh {
		if k != "conditions" && !reflect.DeepEqual(old[k], v) {
			if list, ok := v.([]any); ok && k == "addresses" {
				v = append(list, map[string]any{"$patch": "replace"}) // two may be of one type
			}
			diff[k] = v
		}
	}
	for k := range old {
		if _, have := fresh[k]; !have && mine[k] {
			diff[k] = nil
		}
	}
	// Resources that the machine has no more.
	for _, k := range []string{"capacity", "allocatable"} {
		list, ok := diff[k].(map[string]any)
		had, _ := old[k].(map[string]any)
		for name := range had {
			if _, have := list[name]; ok && !have {
				list[name] = nil
			}
		}
	}
	changed = changed || len(diff) > 0
	if changed || due {
		diff["conditions"] = fresh["conditions"]
	}
	patch, err = json.Marshal(map[string]any{"status": diff})
	return patch, changed, err
}

// mine are the fields of a status that only the node sets.
var mine = map[string]bool{"images": true, "runtimeHandlers": true, "features": true, "addresses": true}

func object(v any) (map[string]any, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode a node's status: %w", err)
	}
	out := map[string]any{}
	return out, json.Unmarshal(raw, &out)
}

// wait until the time is over, there is a wake-up, or ctx ends.
func wait(ctx context.Context, d time.Duration, wake <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-wake:
	}
}
