package apiserver

import (
	"context"
	"errors"
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
		return p.removeMirror(ctx, mirror)
	case node == "":
		return nil // and when the node is registered
	case mirror == nil:
		return p.createMirror(ctx, static, node)
	case mirror.DeletionTimestamp != nil || mirror.Annotations[mirrorAnnotation] != hash(static),
		status.Over(mirror.Status.Phase) && !status.Over(static.Status.Phase): // taken away and put back
		return p.removeMirror(ctx, mirror) // and made anew when it is gone
	}
	return p.patch(ctx, mirror, static)
}

var errNoNamespace = errors.New("its namespace is not there")

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
	ref := Ref{Resource: "pods", Namespace: m.Namespace}
	var made *v1.Pod
	err := p.write(ctx, func(is *v1.Pod) error {
		made = is
		return p.cfg.Client.Create(ctx, ref, m, is)
	})
	switch {
	case apierrors.IsAlreadyExists(err):
		return p.takeMirror(ctx, m)
	case apierrors.IsNotFound(err):
		return fmt.Errorf("create mirror pod %s: %w: %w", name(m), errNoNamespace, err)
	case err != nil:
		return fmt.Errorf("create mirror pod %s: %w", name(m), err)
	}
	if made = p.version(made.UID); made == nil {
		p.kick(ctx, static.UID) // deleted meanwhile, or a list was faster: it is looked at again
		return nil
	}
	return p.patch(ctx, made, static)
}

// takeMirror looks at what has the name of a mirror pod. One that is bound to
// this node is told by the watch, but only if that began before it was made.
func (p *Pods) takeMirror(ctx context.Context, m *v1.Pod) error {
	there := &v1.Pod{}
	err := p.cfg.Client.Get(ctx, Ref{Resource: "pods", Namespace: m.Namespace, Name: m.Name}, there)
	switch {
	case apierrors.IsNotFound(err):
		return fmt.Errorf("create mirror pod %s: one of that name went away meanwhile", name(m)) // again
	case err != nil:
		return fmt.Errorf("look at the pod that has the name of mirror pod %s: %w", name(m), err)
	case there.Spec.NodeName != p.cfg.NodeName || !isMirror(there):
		return fmt.Errorf("create mirror pod %s: a pod of that name is there already, on node %q: rename or delete one of them", name(m), there.Spec.NodeName)
	}
	p.hear(ctx, there, event)
	return nil
}

// removeMirror deletes a mirror pod. That it is not there, or has another UID,
// is as good, and must be known: what waits for its end would wait for ever.
func (p *Pods) removeMirror(ctx context.Context, mirror *v1.Pod) error {
	err := p.cfg.Client.Delete(ctx, Ref{Resource: "pods", Namespace: mirror.Namespace, Name: mirror.Name}, mirror.UID)
	switch {
	case apierrors.IsNotFound(err) || apierrors.IsConflict(err):
		p.removed(ctx, mirror.UID)
	case err != nil:
		return fmt.Errorf("delete mirror pod %s: %w", name(mirror), err)
	}
	return nil
}
