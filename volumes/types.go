// Package volumes makes a pod's volumes on the host and takes them away again:
// one file a kind, behind one small interface.
package volumes

import (
	v1 "k8s.io/api/core/v1"
)

// Objects are the ConfigMaps and Secrets that pods of this node may use.
// Unknown ones are errdefs.ErrNotFound.
type Objects interface {
	ConfigMap(namespace, name string) (*v1.ConfigMap, error)
	Secret(namespace, name string) (*v1.Secret, error)
}
