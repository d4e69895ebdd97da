package apiserver

import (
	"context"
	"fmt"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	v1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"

	"github.com/containerd/errdefs"
)

// Token asks for a token of the pod's service account that is bound to the pod
// (TokenRequest); audience "" is the apiserver's own. It says when the token
// ends, which may be sooner or later than was asked for.
func (c *Client) Token(ctx context.Context, pod *v1.Pod, audience string, valid time.Duration) (string, time.Time, error) {
	seconds := int64(valid / time.Second)
	req := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		ExpirationSeconds: &seconds,
		BoundObjectRef:    &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
	}}
	if audience != "" {
		req.Spec.Audiences = []string{audience}
	}
	ref := Ref{Resource: "serviceaccounts", Namespace: pod.Namespace, Name: pod.Spec.ServiceAccountName, Subresource: "token"}
	if err := authorized(ctx, func() error { return c.Create(ctx, ref, req, req) }); err != nil {
		return "", time.Time{}, fmt.Errorf("token of service account %s/%s: %w", pod.Namespace, pod.Spec.ServiceAccountName, kindOf(err))
	}
	return req.Status.Token, req.Status.ExpirationTimestamp.Time, nil
}

// ServiceAccount of the cluster.
func (c *Client) ServiceAccount(ctx context.Context, namespace, name string) (*v1.ServiceAccount, error) {
	account := &v1.ServiceAccount{}
	ref := Ref{Resource: "serviceaccounts", Namespace: namespace, Name: name}
	if err := authorized(ctx, func() error { return c.Get(ctx, ref, account) }); err != nil {
		return nil, fmt.Errorf("service account %s/%s: %w", namespace, name, kindOf(err))
	}
	return account, nil
}

// PersistentVolume returns a claim and the volume that it is bound to;
// errdefs.ErrNotFound for an unknown claim, errdefs.ErrUnavailable for one that
// is not bound yet.
func (c *Client) PersistentVolume(ctx context.Context, namespace, claim string) (*v1.PersistentVolumeClaim, *v1.PersistentVolume, error) {
	pvc := &v1.PersistentVolumeClaim{}
	ref := Ref{Resource: "persistentvolumeclaims", Namespace: namespace, Name: claim}
	if err := authorized(ctx, func() error { return c.Get(ctx, ref, pvc) }); err != nil {
		return nil, nil, fmt.Errorf("claim %s/%s: %w", namespace, claim, kindOf(err))
	}
	if pvc.Status.Phase != v1.ClaimBound || pvc.Spec.VolumeName == "" {
		return nil, nil, fmt.Errorf("claim %s/%s is not bound to a volume yet: %w", namespace, claim, errdefs.ErrUnavailable)
	}
	pv := &v1.PersistentVolume{}
	ref = Ref{Resource: "persistentvolumes", Name: pvc.Spec.VolumeName}
	if err := authorized(ctx, func() error { return c.Get(ctx, ref, pv) }); err != nil {
		return nil, nil, fmt.Errorf("volume %s of claim %s/%s: %w", pvc.Spec.VolumeName, namespace, claim, kindOf(err))
	}
	if r := pv.Spec.ClaimRef; r == nil || r.UID != pvc.UID {
		return nil, nil, fmt.Errorf("volume %s is bound to another claim than %s/%s: %w", pv.Name, namespace, claim, errdefs.ErrUnavailable)
	}
	return pvc, pv, nil
}

// RuntimeClass gives the handler that a RuntimeClass names; errdefs.ErrNotFound
// when there is none of that name.
func (c *Client) RuntimeClass(name string) (handler string, err error) {
	is := &nodev1.RuntimeClass{}
	err = c.Get(context.Background(), Ref{Group: nodev1.GroupName, Resource: "runtimeclasses", Name: name}, is)
	if err != nil {
		return "", fmt.Errorf("RuntimeClass %q: %w", name, kindOf(err))
	}
	return is.Handler, nil
}
