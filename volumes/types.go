// Package volumes makes a pod's volumes on the host and takes them away again:
// one file a kind, behind one small interface.
package volumes

import (
	"context"
	"time"

	v1 "k8s.io/api/core/v1"
)

// Objects are the ConfigMaps and Secrets that pods of this node may use.
// Unknown ones are errdefs.ErrNotFound.
type Objects interface {
	ConfigMap(namespace, name string) (*v1.ConfigMap, error)
	Secret(namespace, name string) (*v1.Secret, error)
}

// Claims finds the PersistentVolume behind a claim. It is asked once for each
// claim of a pod: the answer is kept beside the pod's volumes, so a pod that
// runs needs nobody's answer to be restarted.
type Claims interface {
	// PersistentVolume returns a claim and what it is bound to; the caller must
	// not change them. An unknown claim is errdefs.ErrNotFound, one that is not
	// bound yet errdefs.ErrUnavailable.
	PersistentVolume(ctx context.Context, namespace, claim string) (*v1.PersistentVolumeClaim, *v1.PersistentVolume, error)
}

// Tokens makes tokens of a pod's service account that are bound to the pod
// (the API's TokenRequest).
type Tokens interface {
	// Token for an audience ("": the API server's own), asked to be valid for a
	// time, and the time at which it ends in truth. While nobody answers it is
	// errdefs.ErrUnavailable: a token that is there is then used to its end.
	Token(ctx context.Context, pod *v1.Pod, audience string, valid time.Duration) (token string, expires time.Time, err error)
}
