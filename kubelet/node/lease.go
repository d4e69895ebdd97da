package node

import (
	"context"
	"fmt"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podd-runtime/podd/kubelet/apiserver"
)

// renewals of the Lease: the control plane takes the node for alive as long as it
// sees them. They are most of what a node asks of an apiserver at rest. Upstream
// renews after a quarter of the duration; a third is enough for one that tries
// again within seconds.
func (n *Node) renewals(ctx context.Context) {
	var lease *coordinationv1.Lease
	failures := 0
	for ctx.Err() == nil {
		n.mu.Lock()
		node := n.node
		n.mu.Unlock()
		if node == nil { // a Lease is owned by its Node
			wait(ctx, 100*time.Millisecond, nil)
			continue
		}
		is, err := n.renew(ctx, lease, node)
		if err != nil {
			lease = nil
			failures++
			if ctx.Err() == nil && (failures == 1 || failures%20 == 0) {
				n.log.Warn("lease is not renewed", "node", n.cfg.Name, "failures", failures, "error", err)
			}
			wait(ctx, apiserver.Backoff(failures, 200*time.Millisecond, 5*time.Second), nil)
			continue
		}
		if n.cfg.Client.Wrote(is.ResourceVersion) {
			n.log.Warn("the apiserver's database was restored: all is listed anew", "node", n.cfg.Name, "version", is.ResourceVersion)
		}
		lease, failures = is, 0
		wait(ctx, n.cfg.LeaseDuration/3, nil)
	}
}

// renew the lease that we have, or the one that is there, or a new one.
func (n *Node) renew(ctx context.Context, have *coordinationv1.Lease, node *v1.Node) (*coordinationv1.Lease, error) {
	ref := apiserver.Ref{Group: coordinationv1.GroupName, Resource: "leases", Namespace: v1.NamespaceNodeLease}
	seconds := int32(n.cfg.LeaseDuration / time.Second)
	set := func(l *coordinationv1.Lease) {
		now := metav1.NowMicro()
		l.Spec.HolderIdentity, l.Spec.LeaseDurationSeconds, l.Spec.RenewTime = &n.cfg.Name, &seconds, &now
		l.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID}}
	}
	named := ref
	named.Name = n.cfg.Name
	for range 3 {
		if have == nil {
			have = &coordinationv1.Lease{}
			err := n.cfg.Client.Get(ctx, named, have)
			if apierrors.IsNotFound(err) {
				made := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: n.cfg.Name, Namespace: v1.NamespaceNodeLease}}
				set(made)
				is := &coordinationv1.Lease{}
				if err := n.cfg.Client.Create(ctx, ref, made, is); err != nil {
					return nil, fmt.Errorf("create lease %s: %w", n.cfg.Name, err)
				}
				return is, nil
			}
			if err != nil {
				return nil, fmt.Errorf("get lease %s: %w", n.cfg.Name, err)
			}
		}
		set(have)
		is := &coordinationv1.Lease{}
		err := n.cfg.Client.Update(ctx, named, have, is)
		if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
			have = nil // look again
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("renew lease %s: %w", n.cfg.Name, err)
		}
		return is, nil
	}
	return nil, fmt.Errorf("renew lease %s: somebody else writes it", n.cfg.Name)
}
