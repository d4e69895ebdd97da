package apiserver

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

// Objects are the ConfigMaps and Secrets that pods of this node use: each is
// watched by itself from the first pod that uses it until the last is gone. An
// immutable one is watched until it is known, and again for each pod that comes
// to use it: what is under its name may have been deleted and made anew.
type Objects struct {
	client  *Client
	changed func(namespace, name string)
	log     *slog.Logger
	watches sync.WaitGroup

	mu    sync.Mutex
	ctx   context.Context // of the watches; nil until Run
	users map[types.UID][]objectKey
	have  map[objectKey]*watched
}

type objectKey struct{ resource, namespace, name string }

// watched is one ConfigMap or Secret; guarded by Objects.mu.
type watched struct {
	users int
	stop  context.CancelFunc // of the watch; nil: there is none
	// known is closed when the apiserver has said what it has, by this watch.
	known chan struct{}
	asked bool // it has, by this watch
	// heard: by any; value is what it had last, nil: nothing.
	heard bool
	value runtime.Object
}

// NewObjects returns Objects; changed is told of every one that appears,
// changes or goes.
func NewObjects(client *Client, changed func(namespace, name string), log *slog.Logger) *Objects {
	return &Objects{client: client, changed: changed, log: log, users: map[types.UID][]objectKey{}, have: map[objectKey]*watched{}}
}

// Run ends with ctx, and the watches with it.
func (o *Objects) Run(ctx context.Context) error {
	o.mu.Lock()
	o.ctx = ctx
	for key, w := range o.have {
		o.watch(key, w)
	}
	o.mu.Unlock()
	<-ctx.Done()
	o.watches.Wait()
	return nil
}

// Use replaces the objects that a pod uses; nil: none any more.
func (o *Objects) Use(uid types.UID, pod *v1.Pod) {
	var keys []objectKey
	if needs(pod) {
		keys = objectsOf(pod)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, k := range keys {
		w := o.have[k]
		if w == nil {
			w = &watched{known: make(chan struct{})}
			o.have[k] = w
			o.watch(k, w)
		} else if w.settled() && !slices.Contains(o.users[uid], k) {
			w.known, w.asked = make(chan struct{}), false
			o.watch(k, w)
		}
		w.users++
	}
	for _, k := range o.users[uid] {
		w := o.have[k]
		if w.users--; w.users == 0 {
			if w.stop != nil {
				w.stop()
			}
			delete(o.have, k)
		}
	}
	delete(o.users, uid)
	if len(keys) > 0 {
		o.users[uid] = keys
	}
}

// needs says whether a pod, nil for one that is gone, still needs anything.
func needs(pod *v1.Pod) bool {
	return pod != nil && pod.Status.Phase != v1.PodSucceeded && pod.Status.Phase != v1.PodFailed
}

// settled says whether an object is known and not watched any more.
func (w *watched) settled() bool { return w.asked && immutable(w.value) }

// watch one object; o.mu is held.
func (o *Objects) watch(key objectKey, w *watched) {
	if o.ctx == nil || o.ctx.Err() != nil {
		return
	}
	ctx, stop := context.WithCancel(o.ctx)
	w.stop = stop
	o.watches.Go(func() {
		defer stop()
		if key.resource == "secrets" {
			followOne(ctx, o, key, w, &v1.Secret{})
		} else {
			followOne(ctx, o, key, w, &v1.ConfigMap{})
		}
	})
}

// followOne keeps one object up to date.
func followOne[T interface {
	runtime.Object
	metav1.Object
}](ctx context.Context, o *Objects, key objectKey, w *watched, expected T) {
	set := func(v T) { o.put(ctx, key, w, v) }
	ref := Ref{Resource: key.resource, Namespace: key.namespace}
	o.client.follow(ctx, ref, fields.OneTermEqualSelector("metadata.name", key.name), expected, changes[T]{
		set: set, remove: func(T) { o.put(ctx, key, w, nil) },
		replace: func(all []T) {
			if len(all) == 0 {
				o.put(ctx, key, w, nil)
				return
			}
			set(all[0])
		},
	})
}

// put what the apiserver has told of an object; nil: there is none.
func (o *Objects) put(ctx context.Context, key objectKey, w *watched, v runtime.Object) {
	o.mu.Lock()
	if ctx.Err() != nil || o.have[key] != w {
		o.mu.Unlock()
		return
	}
	first := !w.asked
	same := w.heard && v == nil && w.value == nil
	w.asked, w.heard = true, true
	if m, ok := v.(metav1.Object); ok && v != nil {
		m.SetManagedFields(nil)
	}
	w.value = v
	if first {
		close(w.known)
	}
	if immutable(v) {
		w.stop() // it stays as it is; it cannot change
	}
	o.mu.Unlock()
	if !same {
		o.changed(key.namespace, key.name)
	}
}

func immutable(v runtime.Object) bool {
	switch v := v.(type) {
	case *v1.ConfigMap:
		return v.Immutable != nil && *v.Immutable
	case *v1.Secret:
		return v.Immutable != nil && *v.Immutable
	}
	return false
}

// objectWait is how long a look at an object waits for the apiserver's first
// word on it; whoever asked tries again, and is told when it comes.
const objectWait = 2 * time.Second

// get what is known of an object. One that no pod uses is asked for each time.
func (o *Objects) get(key objectKey, into runtime.Object) (runtime.Object, error) {
	o.mu.Lock()
	w, ctx := o.have[key], o.ctx
	var known chan struct{}
	if w != nil {
		known = w.known
	}
	o.mu.Unlock()
	if ctx == nil {
		return nil, fmt.Errorf("%s %s/%s: the apiserver has not been asked yet: %w", key.resource, key.namespace, key.name, errdefs.ErrUnavailable)
	}
	if w == nil {
		err := o.client.Get(ctx, Ref{Resource: key.resource, Namespace: key.namespace, Name: key.name}, into)
		return into, kindOf(err)
	}
	t := time.NewTimer(objectWait)
	defer t.Stop()
	select {
	case <-known:
	case <-t.C:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if !w.heard {
		return nil, fmt.Errorf("%s %s/%s: the apiserver has not answered yet: %w", key.resource, key.namespace, key.name, errdefs.ErrUnavailable)
	}
	if w.value == nil {
		return nil, fmt.Errorf("%s %q not found: %w", key.resource, key.name, errdefs.ErrNotFound)
	}
	return w.value, nil
}

// kindOf gives an error of the apiserver its kind of our own.
func kindOf(err error) error {
	switch {
	case err == nil:
		return nil
	case apierrors.IsNotFound(err):
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
}

// ConfigMap of the apiserver; errdefs.ErrNotFound when there is none,
// errdefs.ErrUnavailable while it has not answered. The caller must not change it.
func (o *Objects) ConfigMap(namespace, name string) (*v1.ConfigMap, error) {
	v, err := o.get(objectKey{"configmaps", namespace, name}, &v1.ConfigMap{})
	if err != nil {
		return nil, err
	}
	return v.(*v1.ConfigMap), nil
}

// Secret is the same for Secrets.
func (o *Objects) Secret(namespace, name string) (*v1.Secret, error) {
	v, err := o.get(objectKey{"secrets", namespace, name}, &v1.Secret{})
	if err != nil {
		return nil, err
	}
	return v.(*v1.Secret), nil
}

// objectsOf are the ConfigMaps and Secrets that a pod names, each once.
func objectsOf(pod *v1.Pod) []objectKey {
	found := map[objectKey]bool{}
	add := func(resource, name string) {
		if name != "" {
			found[objectKey{resource, pod.Namespace, name}] = true
		}
	}
	for _, s := range pod.Spec.ImagePullSecrets {
		add("secrets", s.Name)
	}
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		switch {
		case v.ConfigMap != nil:
			add("configmaps", v.ConfigMap.Name)
		case v.Secret != nil:
			add("secrets", v.Secret.SecretName)
		case v.Projected != nil:
			for j := range v.Projected.Sources {
				if s := v.Projected.Sources[j].ConfigMap; s != nil {
					add("configmaps", s.Name)
				}
				if s := v.Projected.Sources[j].Secret; s != nil {
					add("secrets", s.Name)
				}
			}
		}
	}
	container := func(env []v1.EnvVar, from []v1.EnvFromSource) {
		for i := range from {
			if r := from[i].ConfigMapRef; r != nil {
				add("configmaps", r.Name)
			}
			if r := from[i].SecretRef; r != nil {
				add("secrets", r.Name)
			}
		}
		for i := range env {
			if f := env[i].ValueFrom; f != nil && f.ConfigMapKeyRef != nil {
				add("configmaps", f.ConfigMapKeyRef.Name)
			} else if f != nil && f.SecretKeyRef != nil {
				add("secrets", f.SecretKeyRef.Name)
			}
		}
	}
	for i := range pod.Spec.InitContainers {
		container(pod.Spec.InitContainers[i].Env, pod.Spec.InitContainers[i].EnvFrom)
	}
	for i := range pod.Spec.Containers {
		container(pod.Spec.Containers[i].Env, pod.Spec.Containers[i].EnvFrom)
	}
	for i := range pod.Spec.EphemeralContainers {
		container(pod.Spec.EphemeralContainers[i].Env, pod.Spec.EphemeralContainers[i].EnvFrom)
	}
	keys := make([]objectKey, 0, len(found))
	for k := range maps.Keys(found) {
		keys = append(keys, k)
	}
	return keys
}
