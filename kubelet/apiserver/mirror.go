package apiserver

import (
	"context"
	"fmt"
	"maps"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/status"
)

// bringMirror keeps a pod at the apiserver that shows a static one. The static
// pod never waits for it.
func (p *Pods) bringMirror(ctx context.Context, static *v1.Pod, gone bool) error {
	p.mu.Lock()
	mirror, node, synced := p.mirrors[name(static)], p.nodeUID, p.synced
	uid, there := p.static[name(static)]
	p.mu.Unlock()
	switch {
	case !synced:
		return nil // looked at again when the apiserver's pods are known
	case gone && there && uid != static.UID:
		return nil // its successor has the name
	case gone && mirror == nil:
		return nil
	case gone:
		return p.remove(ctx, mirror)
	case node == "":
		return nil // and when the node is registered
	case mirror == nil:
		return p.createMirror(ctx, static, node)
	case mirror.DeletionTimestamp != nil || mirror.Annotations[mirrorAnnotation] != hash(static),
		status.Over(mirror.Status.Phase) && !status.Over(static.Status.Phase): // taken away and put back
		return p.remove(ctx, mirror) // and made anew when it is gone
	}
	return p.patch(ctx, mirror, static)
}

func hash(static *v1.Pod) string { return static.Annotations[manifests.ConfigHashAnnotation] }

func (p *Pods) createMirror(ctx context.Context, static *v1.Pod, node types.UID) error {
	yes := true
	m := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: static.Name, Namespace: static.Namespace, Labels: static.Labels, Annotations: maps.Clone(static.Annotations),
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: p.cfg.NodeName, UID: node, Controller: &yes}},
		},
		Spec: *static.Spec.DeepCopy(),
	}
	if m.Annotations == nil {
		m.Annotations = map[string]string{}
	}
	m.Annotations[mirrorAnnotation] = hash(static)
	m.Spec.NodeName = p.cfg.NodeName
	is := &v1.Pod{}
	err := p.cfg.Client.Create(ctx, Ref{Resource: "pods", Namespace: m.Namespace}, m, is)
	switch {
	case apierrors.IsAlreadyExists(err):
		return nil // the watch tells of it
	case apierrors.IsNotFound(err):
		return fmt.Errorf("create mirror pod %s: its namespace is not there: %w", name(m), err)
	case err != nil:
		return fmt.Errorf("create mirror pod %s: %w", name(m), err)
	}
	p.learn(is)
	return p.patch(ctx, is, static)
}
