// Package manifests reads pods, ConfigMaps and Secrets from a directory and
// keeps following it.
package manifests

import (
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Sink takes the pods of a source. *pods.Table is it. Calls for one source
// come one after the other and never block for long.
type Sink interface {
	// SetPod adds a pod or replaces the one with the same namespace and name:
	// a new UID stops the old pod first, then starts the new one; the same UID
	// updates it in place. The pod is defaulted and validated.
	SetPod(source string, pod *v1.Pod)
	// RemovePod stops the pod gracefully and forgets it.
	RemovePod(source string, uid types.UID)
	// Synced says that the source has told all it has once. Until every source
	// has, nothing that runs is cleaned up as an orphan.
	Synced(source string)
}

// Recorder takes events about pods and node. *events.Store is it.
type Recorder interface {
	// Eventf records an event on ref; eventType is v1.EventTypeNormal or
	// v1.EventTypeWarning, reason an upstream reason such as "FailedMount".
	Eventf(ref *v1.ObjectReference, eventType, reason, format string, args ...any)
}
