// Package apiserver connects the node with an apiserver. Pods that are bound
// to the node come in by a watch (source.go) and their status goes back
// (reporter.go, mirror.go); ConfigMaps, Secrets and Services are watched as
// long as a pod of the node uses them (objects.go, services.go); tokens of
// service accounts are asked for when they are needed (tokens.go); events are
// passed on (events.go).
//
// It uses client-go's REST client and reflectors with a scheme of only the
// groups that a node needs: a whole clientset registers every group there is,
// and a store of informers would keep every object a second time.
package apiserver

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	v1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/flowcontrol"
)

var (
	scheme = func() *runtime.Scheme {
		s := runtime.NewScheme()
		for _, add := range []func(*runtime.Scheme) error{
			v1.AddToScheme, coordinationv1.AddToScheme, authenticationv1.AddToScheme,
			authorizationv1.AddToScheme, certificatesv1.AddToScheme, nodev1.AddToScheme,
		} {
			utilruntime.Must(add(s))
		}
		metav1.AddToGroupVersion(s, schema.GroupVersion{Version: "v1"})
		return s
	}()
	codecs = serializer.NewCodecFactory(scheme)
)

// Client of the API groups that a node uses.
type Client struct {
	groups map[string]rest.Interface

	mu       sync.Mutex
	wrote    string        // see Wrote
	restored chan struct{} // closed, and replaced, when a database was restored
}

// NewClient connects to nothing yet. All groups share connections and the
// limits of cfg on requests.
func NewClient(cfg *rest.Config) (*Client, error) {
	cfg = rest.CopyConfig(cfg)
	cfg.ContentType = runtime.ContentTypeProtobuf
	cfg.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	cfg.NegotiatedSerializer = codecs.WithoutConversion()
	if cfg.RateLimiter == nil && cfg.QPS > 0 {
		cfg.RateLimiter = flowcontrol.NewTokenBucketRateLimiter(cfg.QPS, cfg.Burst)
	}
	http, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("client of apiserver %s: %w", cfg.Host, err)
	}
	c := &Client{groups: map[string]rest.Interface{}, restored: make(chan struct{})}
	for _, gv := range []schema.GroupVersion{
		v1.SchemeGroupVersion, coordinationv1.SchemeGroupVersion, authenticationv1.SchemeGroupVersion,
		authorizationv1.SchemeGroupVersion, certificatesv1.SchemeGroupVersion, nodev1.SchemeGroupVersion,
	} {
		one := rest.CopyConfig(cfg)
		one.GroupVersion, one.APIPath = &gv, "/apis"
		if gv.Group == "" {
			one.APIPath = "/api"
		}
		if c.groups[gv.Group], err = rest.RESTClientForConfigAndClient(one, http); err != nil {
			return nil, fmt.Errorf("client of %s: %w", gv, err)
		}
	}
	return c, nil
}

// Ref names an object, or a kind of them, at the apiserver.
type Ref struct {
	Group, Resource string
	// Namespace is "" for all, and for objects that are in none.
	Namespace, Name string
	// Subresource such as "status".
	Subresource string
}

func (r Ref) String() string {
	return strings.TrimSuffix(r.Resource+" "+strings.TrimPrefix(r.Namespace+"/"+r.Name, "/")+"/"+r.Subresource, "/")
}

// callTimeout of a request that is no watch.
const callTimeout = 15 * time.Second

func (c *Client) request(r *rest.Request, ref Ref) *rest.Request {
	r = r.Resource(ref.Resource).Timeout(callTimeout)
	if ref.Namespace != "" {
		r = r.Namespace(ref.Namespace)
	}
	if ref.Name != "" {
		r = r.Name(ref.Name)
	}
	if ref.Subresource != "" {
		r = r.SubResource(ref.Subresource)
	}
	return r
}

func (c *Client) do(ctx context.Context, r *rest.Request, into runtime.Object) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res := r.Do(ctx)
	if into == nil {
		return res.Error()
	}
	return res.Into(into)
}

// Get an object. Errors are the apiserver's, see apimachinery/pkg/api/errors.
func (c *Client) Get(ctx context.Context, ref Ref, into runtime.Object) error {
	return c.do(ctx, c.request(c.groups[ref.Group].Get(), ref), into)
}

// Create an object; ref names it only for subresources. into may be obj.
func (c *Client) Create(ctx context.Context, ref Ref, obj, into runtime.Object) error {
	return c.do(ctx, c.request(c.groups[ref.Group].Post(), ref).Body(obj), into)
}

// Update replaces an object.
func (c *Client) Update(ctx context.Context, ref Ref, obj, into runtime.Object) error {
	return c.do(ctx, c.request(c.groups[ref.Group].Put(), ref).Body(obj), into)
}

// Patch an object by a strategic merge patch in JSON.
func (c *Client) Patch(ctx context.Context, ref Ref, patch []byte, into runtime.Object) error {
	return c.do(ctx, c.request(c.groups[ref.Group].Patch(types.StrategicMergePatchType), ref).Body(patch), into)
}

// Delete an object at once, if it still has that UID.
func (c *Client) Delete(ctx context.Context, ref Ref, uid types.UID) error {
	now := int64(0)
	opts := &metav1.DeleteOptions{GracePeriodSeconds: &now, Preconditions: &metav1.Preconditions{UID: &uid}}
	return c.do(ctx, c.request(c.groups[ref.Group].Delete(), ref).Body(opts), nil)
}

// Wrote says which version an object has that nobody but this node writes, its
// Lease. Versions grow, unless the apiserver's database was restored from a
// backup. Then a watch that goes on from a version of before is told nothing until
// versions have grown beyond it, which may take days: all that is followed is
// listed anew. It reports whether that is so.
func (c *Client) Wrote(version string) (restored bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	restored = c.wrote != "" && version != c.wrote && !newer(version, c.wrote)
	c.wrote = version
	if restored {
		close(c.restored)
		c.restored = make(chan struct{})
	}
	return restored
}

// follow lists and watches the objects that selector admits and keeps store up
// to date until ctx ends. Interruptions are made up for, with back-off and
// jitter.
func (c *Client) follow(ctx context.Context, ref Ref, selector fields.Selector, expected runtime.Object, store cache.ReflectorStore) {
	lw := cache.NewListWatchFromClient(c.groups[ref.Group], ref.Resource, ref.Namespace, selector)
	list, watch := lw.ListWithContextFunc, lw.WatchFuncWithContext
	lw.ListWithContextFunc = func(ctx context.Context, o metav1.ListOptions) (all runtime.Object, err error) {
		err = authorized(ctx, func() error { all, err = list(ctx, o); return err })
		return all, err
	}
	lw.WatchFuncWithContext = func(ctx context.Context, o metav1.ListOptions) (w apiwatch.Interface, err error) {
		err = authorized(ctx, func() error { w, err = watch(ctx, o); return err })
		return w, err
	}
	for ctx.Err() == nil {
		c.mu.Lock()
		restored := c.restored
		c.mu.Unlock()
		ctx, cancel := context.WithCancel(ctx)
		go func() {
			defer cancel()
			select {
			case <-restored:
			case <-ctx.Done():
			}
		}()
		cache.NewReflectorWithOptions(lw, expected, store, cache.ReflectorOptions{Name: ref.String()}).RunWithContext(ctx)
		cancel()
	}
}

// authorized repeats a call that is forbidden at first, for a second or two. A
// node may read what its pods use: the apiserver's node authorizer learns of a
// pod's binding by a watch of its own, which is often behind the node's.
func authorized(ctx context.Context, call func() error) error {
	const first, most, tries = 20 * time.Millisecond, 640 * time.Millisecond, 6
	for failures := 1; ; failures++ {
		err := call()
		if !apierrors.IsForbidden(err) || failures > tries {
			return err
		}
		sleep(ctx, Backoff(failures, first, most))
		if ctx.Err() != nil {
			return err
		}
	}
}

// Backoff between tries that fail: doubled from first up to most, and each
// made longer by up to a half at random, so that the nodes of a cluster do not
// come back all at once.
func Backoff(failures int, first, most time.Duration) time.Duration {
	d := most
	if failures < 16 {
		d = min(first<<max(failures-1, 0), most)
	}
	return d + rand.N(d/2+1)
}

// sleep until the time is over or ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// changes is a ReflectorStore that passes on instead of keeping.
type changes[T any] struct {
	set     func(T)
	remove  func(T)
	replace func([]T)
}

func (s changes[T]) Add(obj any) error    { s.set(obj.(T)); return nil }
func (s changes[T]) Update(obj any) error { s.set(obj.(T)); return nil }

func (s changes[T]) Delete(obj any) error {
	if t, ok := obj.(T); ok {
		s.remove(t)
	}
	return nil
}

func (s changes[T]) Replace(list []any, _ string) error {
	all := make([]T, len(list))
	for i := range list {
		all[i] = list[i].(T)
	}
	s.replace(all)
	return nil
}

func (s changes[T]) Resync() error { return nil }

// Node follows the Node of that name; set gets nil when there is none.
func (c *Client) Node(ctx context.Context, name string, set func(*v1.Node)) {
	c.follow(ctx, Ref{Resource: "nodes"}, fields.OneTermEqualSelector("metadata.name", name), &v1.Node{}, changes[*v1.Node]{
		set: set, remove: func(*v1.Node) { set(nil) },
		replace: func(all []*v1.Node) {
			if len(all) == 0 {
				set(nil)
				return
			}
			set(all[0])
		},
	})
}
