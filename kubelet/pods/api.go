package pods

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/podd-runtime/podd/kubelet/events/feed"
	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
)

// List returns all pods with their status, by namespace and name. The pods
// are the caller's.
func (t *Table) List() []*v1.Pod {
	out := t.Pods()
	for i := range out {
		out[i] = out[i].DeepCopy()
	}
	return out
}

// Pods is List without copies: the pods must not be changed.
func (t *Table) Pods() []*v1.Pod {
	var out []*v1.Pod
	for _, w := range t.all() {
		if p := w.published.Load(); p != nil {
			out = append(out, p)
		}
	}
	sort.Slice(out, func(i, j int) bool {
		if out[i].Namespace != out[j].Namespace {
			return out[i].Namespace < out[j].Namespace
		}
		return out[i].Name < out[j].Name
	})
	return out
}

// Get returns a pod with its status; it is the caller's.
func (t *Table) Get(namespace, name string) (*v1.Pod, bool) {
	w := t.worker(namespace, name)
	if w == nil {
		return nil, false
	}
	p := w.published.Load()
	if p == nil {
		return nil, false
	}
	return p.DeepCopy(), true
}

func (t *Table) worker(namespace, name string) *worker {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.index.workers[types.NamespacedName{Namespace: namespace, Name: name}]
}

// ResourceVersion is that of the last change.
func (t *Table) ResourceVersion() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strconv.FormatUint(t.rv, 10)
}

// Watch delivers changes until ctx ends: after resourceVersion or, when that
// is "" or "0", all pods as ADDED and what follows. The pods are shared and
// must not be changed. A version too old to tell what came after it is an
// ERROR event with status 410 (Expired), the last one.
func (t *Table) Watch(ctx context.Context, resourceVersion string) <-chan watch.Event {
	initial := func() []feed.Item {
		var items []feed.Item
		for key, w := range t.index.workers {
			if p := w.published.Load(); p != nil && !w.quiet.Load() {
				items = append(items, feed.Item{Key: key.String(), Event: watch.Event{Type: watch.Added, Object: p}})
			}
		}
		sort.Slice(items, func(i, j int) bool { return items[i].Key < items[j].Key })
		return items
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if resourceVersion != "" && resourceVersion != "0" {
		rv, err := strconv.ParseUint(resourceVersion, 10, 64)
		past, ok := t.history.since(rv, t.rv)
		if err != nil || !ok {
			return expired(resourceVersion)
		}
		initial = func() []feed.Item { return past }
	}
	return t.feed.Subscribe(ctx, initial)
}

func expired(rv string) <-chan watch.Event {
	st := apierrors.NewResourceExpired(fmt.Sprintf("too old resource version: %s", rv)).Status()
	out := make(chan watch.Event, 1)
	out <- watch.Event{Type: watch.Error, Object: &st}
	close(out)
	return out
}

// defaultContainer is kubectl's annotation for the container that is meant
// when none is named.
const defaultContainer = "kubectl.kubernetes.io/default-container"

// Container returns the id of a container's running or last instance;
// container "" is the pod's default one. Unknown ones are errdefs.ErrNotFound;
// one that has not been created yet is errdefs.ErrUnavailable.
func (t *Table) Container(namespace, name, container string) (string, error) {
	w := t.worker(namespace, name)
	var pod *v1.Pod
	if w != nil {
		pod = w.published.Load()
	}
	if pod == nil {
		return "", fmt.Errorf("pod %s/%s: %w", namespace, name, errdefs.ErrNotFound)
	}
	if container == "" {
		container = pod.Annotations[defaultContainer]
		if container == "" || spec.Container(pod, container) == nil {
			container = pod.Spec.Containers[0].Name
		}
	}
	if spec.Container(pod, container) == nil {
		return "", fmt.Errorf("container %s is not in pod %s/%s: %w", container, namespace, name, errdefs.ErrNotFound)
	}
	for _, list := range [][]v1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses, pod.Status.EphemeralContainerStatuses} {
		for i := range list {
			if list[i].Name == container {
				return instanceID(&list[i], namespace, name)
			}
		}
	}
	return "", fmt.Errorf("container %s of pod %s/%s has not been created yet: %w", container, namespace, name, errdefs.ErrUnavailable)
}

func instanceID(s *v1.ContainerStatus, namespace, name string) (string, error) {
	const prefix = status.Scheme + "://"
	id := s.ContainerID
	if id == "" && s.LastTerminationState.Terminated != nil {
		id = s.LastTerminationState.Terminated.ContainerID
	}
	if len(id) <= len(prefix) {
		reason := ""
		if s.State.Waiting != nil {
			reason = s.State.Waiting.Reason
		}
		return "", fmt.Errorf("container %q in pod %q is waiting to start: %s: %w", s.Name, name, reason, errdefs.ErrUnavailable)
	}
	return id[len(prefix):], nil
}

// Stop ends a pod's containers and waits until it is down or ctx ends; grace
// in seconds replaces the pod's own. The pod stays known and down, also over
// a restart of the daemon, until its manifest changes or Restart is called.
func (t *Table) Stop(ctx context.Context, namespace, name string, grace *int64) error {
	w := t.worker(namespace, name)
	if w == nil {
		return fmt.Errorf("pod %s/%s: %w", namespace, name, errdefs.ErrNotFound)
	}
	return w.await(ctx, func(l *life) { w.halt(l, grace, true) })
}

// StopAll ends all pods, critical ones after all others, as at a shutdown of
// the machine, and waits until they are down or ctx ends. They stay down until
// the daemon starts the next time, those of an apiserver for good: it is told
// that they are over.
func (t *Table) StopAll(ctx context.Context, grace *int64) error {
	var others, critical []*worker
	for _, w := range t.all() {
		if w.critical() {
			critical = append(critical, w)
		} else {
			others = append(others, w)
		}
	}
	return errors.Join(stopEach(ctx, others, grace), stopEach(ctx, critical, grace))
}

// stopEach ends the pods at once and returns the first error.
func stopEach(ctx context.Context, workers []*worker, grace *int64) error {
	errs := make(chan error, len(workers))
	for _, w := range workers {
		go func() { errs <- w.await(ctx, func(l *life) { w.halt(l, grace, false) }) }()
	}
	var first error
	for range workers {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	return first
}

// halt a pod on a user's order.
func (w *worker) halt(l *life, grace *int64, keep bool) {
	if l.leaving() {
		if grace != nil {
			w.stop(l, Stop{Grace: seconds(grace, 0), Forget: true})
		}
		return
	}
	l.stopped = keep
	w.stop(l, Stop{Grace: seconds(grace, podGrace(l.d.Pod)), Reason: status.Stopped, Message: "Pod was stopped by a user."})
}

// await does f to each pod under the name, also to one that waits for its turn,
// and waits until they are down.
func (w *worker) await(ctx context.Context, f func(*life)) error {
	done := make(chan struct{})
	w.post(func() {
		lives := append([]*life(nil), w.lives...)
		for _, l := range lives {
			f(l)
		}
		next := w.next
		if next != nil {
			next.orders = append(next.orders, f)
		}
		w.waiters = append(w.waiters, waiter{done: done, until: func() bool {
			if next != nil && w.next == next {
				return false
			}
			for _, l := range lives {
				if !l.down() {
					return false
				}
			}
			return true
		}})
	})
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("pod %s is not down yet: %w", w.key, ctx.Err())
	case <-w.ended:
		// Retired before it looked: nothing is left under the name.
		if w.t.ctx.Err() == nil {
			return nil
		}
		return fmt.Errorf("pod %s: the daemon ends: %w", w.key, errdefs.ErrUnavailable)
	case <-w.t.ctx.Done():
		return fmt.Errorf("pod %s: the daemon ends: %w", w.key, errdefs.ErrUnavailable)
	}
}

// Restart replaces a container's instance at once and without back-off, or
// those of all containers when container is "", and starts a pod that was
// stopped or has completed, but no pod of an apiserver that is over
// (errdefs.ErrFailedPrecondition).
func (t *Table) Restart(ctx context.Context, namespace, name, container string) error {
	w := t.worker(namespace, name)
	if w == nil {
		return fmt.Errorf("pod %s/%s: %w", namespace, name, errdefs.ErrNotFound)
	}
	done := make(chan error, 1)
	w.post(func() { done <- w.restart(container) })
	select {
	case err := <-done:
		return err
	case <-w.ended:
		return fmt.Errorf("pod %s: %w", w.key, errdefs.ErrNotFound)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w *worker) restart(container string) error {
	if len(w.lives) == 0 || w.lives[0].leaving() {
		if w.next != nil && len(w.next.orders) > 0 {
			w.next.orders = nil // a stop, which this takes back: it starts by itself
			return nil
		}
		return w.departing()
	}
	l := w.lives[0]
	if l.final() {
		return fmt.Errorf("pod %s is %s, which its apiserver lets nobody take back: have another one made in its place: %w", w.key, l.status.Phase, errdefs.ErrFailedPrecondition)
	}
	var names []string
	for i := range l.d.Pod.Spec.Containers {
		if n := l.d.Pod.Spec.Containers[i].Name; container == "" || n == container {
			names = append(names, n)
		}
	}
	for i := range l.d.Pod.Spec.InitContainers {
		if n := l.d.Pod.Spec.InitContainers[i].Name; n == container {
			names = append(names, n)
		}
	}
	if len(names) == 0 {
		return fmt.Errorf("container %s is not in pod %s: %w", container, w.key, errdefs.ErrNotFound)
	}
	if l.d.Stop != nil || l.o.Completed {
		w.revive(l)
		l.o.Started = time.Now()
	}
	clear(l.o.Retry)
	clear(l.fails)
	for _, n := range names {
		delete(l.o.Backoffs, n)
		delete(l.o.Images, n)
		delete(l.pulls, n)
		delete(l.failures, n)
		if i := l.o.newest(n); i != nil && i.State != status.Created {
			l.o.Forced[n] = i.ID
		}
	}
	return nil
}

// departing says why a pod that goes is not restarted: it was told to end within
// a time, and what comes after it needs no order.
func (w *worker) departing() error {
	if w.next == nil {
		return fmt.Errorf("pod %s is being removed, put its manifest back to run it again: %w", w.key, errdefs.ErrFailedPrecondition)
	}
	left := ""
	if len(w.lives) > 0 {
		left = fmt.Sprintf(" within %s", max(time.Until(w.lives[0].d.Stop.deadline()), 0).Round(time.Second))
	}
	return fmt.Errorf("pod %s is being replaced as its manifest has changed: the old one ends%s, then the new one starts by itself (podd stop --grace-period=0 and podd start do it at once): %w",
		w.key, left, errdefs.ErrFailedPrecondition)
}

// ObjectChanged says that a ConfigMap, Secret or claim has changed, or with no
// namespace a PersistentVolume: pods that use it
// get the new content in their volumes, and those that wait for it try again.
func (t *Table) ObjectChanged(namespace, name string) {
	for _, w := range t.all() {
		if namespace != "" && w.key.Namespace != namespace {
			continue
		}
		w.post(func() {
			for _, l := range w.lives {
				if uses(l.d.Pod, namespace, name) {
					w.refreshVolumes(l)
					for key := range l.o.Retry {
						if len(key) > 6 && key[:6] == "start/" {
							delete(l.o.Retry, key)
						}
					}
					if pullsWith(l.d.Pod, name) {
						l.retryImages(func(string) bool { return true })
					}
				}
			}
		})
	}
}
