package manifests

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"reflect"
	"sync"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/volumes"
)

// ObjectRef names an object of the directory that pods use.
type ObjectRef struct {
	// Kind is "ConfigMap", "Secret", "PersistentVolume" or
	// "PersistentVolumeClaim".
	Kind      string
	Namespace string
	Name      string
}

func (r ObjectRef) String() string { return r.Kind + " " + r.Namespace + "/" + r.Name }

func (r ObjectRef) compare(o ObjectRef) int {
	return cmp.Or(cmp.Compare(r.Kind, o.Kind), cmp.Compare(r.Namespace, o.Namespace), cmp.Compare(r.Name, o.Name))
}

var _ volumes.Objects = (*Source)(nil)

// objectStore keeps the objects that are in force and that pods use.
type objectStore struct {
	mu     sync.RWMutex
	have   map[ObjectRef]object
	nextID int
	subs   map[int]*subscription
}

// subscription collects the changes that its reader has not taken yet: a change
// of the same object counts once, so the memory is bounded by the objects.
type subscription struct {
	mu      sync.Mutex
	pending map[ObjectRef]struct{}
	wake    chan struct{}
}

func newObjectStore() *objectStore {
	return &objectStore{have: map[ObjectRef]object{}, subs: map[int]*subscription{}}
}

// set puts in or, with nil, takes out an object and tells the subscribers.
func (s *objectStore) set(ref ObjectRef, o *object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o == nil {
		delete(s.have, ref)
	} else {
		s.have[ref] = *o
	}
	for _, sub := range s.subs {
		sub.mu.Lock()
		sub.pending[ref] = struct{}{}
		sub.mu.Unlock()
		select {
		case sub.wake <- struct{}{}:
		default:
		}
	}
}

func (s *objectStore) get(ref ObjectRef) (object, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	o, ok := s.have[ref]
	if !ok {
		return object{}, fmt.Errorf("%s: no such document in the manifests directory: %w", ref, errdefs.ErrNotFound)
	}
	return o, nil
}

// ConfigMap returns a document of the directory; errdefs.ErrNotFound when there
// is none. The caller must not change it.
func (s *Source) ConfigMap(namespace, name string) (*v1.ConfigMap, error) {
	o, err := s.objects.get(ObjectRef{"ConfigMap", namespace, name})
	return o.configMap, err
}

// Secret returns a document of the directory, stringData merged into data;
// errdefs.ErrNotFound when there is none. The caller must not change it.
func (s *Source) Secret(namespace, name string) (*v1.Secret, error) {
	o, err := s.objects.get(ObjectRef{"Secret", namespace, name})
	return o.secret, err
}

// Subscribe delivers the name of every ConfigMap and Secret that appears,
// changes or goes from now on. Changes of one object that the reader has not
// taken yet are told once. The channel closes when ctx ends.
func (s *Source) Subscribe(ctx context.Context) <-chan ObjectRef {
	sub := &subscription{pending: map[ObjectRef]struct{}{}, wake: make(chan struct{}, 1)}
	st := s.objects
	st.mu.Lock()
	id := st.nextID
	st.nextID++
	st.subs[id] = sub
	st.mu.Unlock()
	out := make(chan ObjectRef)
	go func() {
		defer close(out)
		defer func() {
			st.mu.Lock()
			delete(st.subs, id)
			st.mu.Unlock()
		}()
		for {
			select {
			case <-ctx.Done():
				return
			case <-sub.wake:
			}
			sub.mu.Lock()
			batch := sub.pending
			sub.pending = map[ObjectRef]struct{}{}
			sub.mu.Unlock()
			for ref := range batch {
				select {
				case out <- ref:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return out
}

// immutableChange says which rule of immutable objects a change breaks; ""
// when none (upstream: ValidateConfigMapUpdate, ValidateSecretUpdate).
func immutableChange(old, new object) string {
	switch {
	case old.configMap != nil && new.configMap != nil && old.configMap.Immutable != nil && *old.configMap.Immutable:
		if new.configMap.Immutable == nil || !*new.configMap.Immutable {
			return "immutable"
		}
		if !maps.Equal(old.configMap.Data, new.configMap.Data) {
			return "data"
		}
		if !reflect.DeepEqual(old.configMap.BinaryData, new.configMap.BinaryData) {
			return "binaryData"
		}
	case old.secret != nil && new.secret != nil && old.secret.Immutable != nil && *old.secret.Immutable:
		if new.secret.Immutable == nil || !*new.secret.Immutable {
			return "immutable"
		}
		if !reflect.DeepEqual(old.secret.Data, new.secret.Data) {
			return "data"
		}
	}
	return ""
}
