// Package servertest has fakes of the parts that the local API serves, for the
// tests of the API and of its client.
package servertest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"github.com/podd-runtime/podd/cri/images"
)

// hub sends events to subscribers; what they have not taken waits. Its owner's
// lock guards it.
type hub[T any] struct {
	subs map[chan T]context.Context
}

func (h *hub[T]) subscribe(ctx context.Context, first []T) <-chan T {
	in, out := make(chan T, 1024), make(chan T)
	for _, ev := range first {
		in <- ev
	}
	if h.subs == nil {
		h.subs = map[chan T]context.Context{}
	}
	h.subs[in] = ctx
	go func() {
		defer close(out)
		for {
			select {
			case ev := <-in:
				select {
				case out <- ev:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

func (h *hub[T]) send(ev T) {
	for in, ctx := range h.subs {
		if ctx.Err() != nil {
			delete(h.subs, in)
			continue
		}
		in <- ev
	}
}

// Pods is a pod table in memory.
type Pods struct {
	mu      sync.Mutex
	rv      int
	pods    map[string]*v1.Pod
	hub     hub[watch.Event]
	log     []watch.Event // all that ever happened
	Stopped []string
	Started []string
	Grace   *int64
}

// Set adds or changes a pod.
func (p *Pods) Set(pod *v1.Pod) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pods == nil {
		p.pods = map[string]*v1.Pod{}
	}
	p.rv++
	pod = pod.DeepCopy()
	pod.ResourceVersion = strconv.Itoa(p.rv)
	key := pod.Namespace + "/" + pod.Name
	typ := watch.Added
	if _, ok := p.pods[key]; ok {
		typ = watch.Modified
	}
	p.pods[key] = pod
	p.publish(watch.Event{Type: typ, Object: pod})
}

// Delete forgets a pod.
func (p *Pods) Delete(namespace, name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pod := p.pods[namespace+"/"+name].DeepCopy()
	delete(p.pods, namespace+"/"+name)
	p.rv++
	pod.ResourceVersion = strconv.Itoa(p.rv)
	p.publish(watch.Event{Type: watch.Deleted, Object: pod})
}

func (p *Pods) publish(ev watch.Event) {
	p.log = append(p.log, ev)
	p.hub.send(ev)
}

func (p *Pods) ResourceVersion() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strconv.Itoa(p.rv)
}

func (p *Pods) List() []*v1.Pod {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*v1.Pod
	for _, pod := range p.pods {
		out = append(out, pod.DeepCopy())
	}
	return out
}

func (p *Pods) Get(namespace, name string) (*v1.Pod, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pod, ok := p.pods[namespace+"/"+name]
	return pod.DeepCopy(), ok
}

func (p *Pods) Watch(ctx context.Context, resourceVersion string) <-chan watch.Event {
	p.mu.Lock()
	defer p.mu.Unlock()
	rv, _ := strconv.Atoi(resourceVersion)
	var missed []watch.Event
	for _, ev := range p.log {
		if n, _ := strconv.Atoi(ev.Object.(*v1.Pod).ResourceVersion); n > rv {
			missed = append(missed, ev)
		}
	}
	return p.hub.subscribe(ctx, missed)
}

// Watchers counts those that still watch.
func (p *Pods) Watchers() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, ctx := range p.hub.subs {
		if ctx.Err() == nil {
			n++
		}
	}
	return n
}

func (p *Pods) Container(namespace, name, container string) (string, error) {
	pod, ok := p.Get(namespace, name)
	if !ok {
		return "", fmt.Errorf("pod %s/%s: %w", namespace, name, errdefs.ErrNotFound)
	}
	return string(pod.UID) + "-" + container, nil
}

func (p *Pods) Stop(ctx context.Context, namespace, name string, grace *int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.Stopped, p.Grace = append(p.Stopped, namespace+"/"+name), grace
	return nil
}

func (p *Pods) StopAll(ctx context.Context, grace *int64) error {
	return p.Stop(ctx, "*", "*", grace)
}

func (p *Pods) Restart(ctx context.Context, namespace, name, container string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.Started = append(p.Started, namespace+"/"+name+"/"+container)
	return nil
}

// Events is an event store in memory.
type Events struct {
	mu  sync.Mutex
	all []v1.Event
	hub hub[watch.Event]
}

// Add records an event on a pod.
func (e *Events) Add(pod *v1.Pod, reason, message string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	ev := v1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: pod.Namespace, Name: fmt.Sprintf("%s.%d", pod.Name, len(e.all)), ResourceVersion: strconv.Itoa(len(e.all) + 1)},
		InvolvedObject: v1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
		Reason:         reason, Message: message, Type: v1.EventTypeNormal, Count: 1,
		FirstTimestamp: metav1.Now(), LastTimestamp: metav1.Now(),
	}
	e.all = append(e.all, ev)
	e.hub.send(watch.Event{Type: watch.Added, Object: &ev})
}

func (e *Events) List(namespace string) (out []v1.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, ev := range e.all {
		if namespace == "" || ev.Namespace == namespace {
			out = append(out, ev)
		}
	}
	return out
}

func (e *Events) Watch(ctx context.Context) <-chan watch.Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	var first []watch.Event
	for i := range e.all {
		first = append(first, watch.Event{Type: watch.Added, Object: e.all[i].DeepCopy()})
	}
	return e.hub.subscribe(ctx, first)
}

// Objects are ConfigMaps and Secrets.
type Objects struct {
	Maps []*v1.ConfigMap
	Keys []*v1.Secret
}

func (o *Objects) ConfigMaps() []*v1.ConfigMap { return o.Maps }
func (o *Objects) Secrets() []*v1.Secret       { return o.Keys }

// Containers is a runtime whose containers are files and functions.
type Containers struct {
	mu       sync.Mutex
	statuses map[string]*runtimeapi.ContainerStatus
	hub      hub[*runtimeapi.ContainerEventResponse]
	// Run is an exec or (with no command) an attach.
	Run func(ctx context.Context, id string, cmd []string, in io.Reader, out, err io.Writer, tty bool, resize <-chan remotecommand.TerminalSize) error
	// Ports answers port-forwards.
	Ports func(ctx context.Context, sandbox string, port int32, stream io.ReadWriteCloser) error
}

// Set tells the log and state of a container.
func (c *Containers) Set(id, log string, state runtimeapi.ContainerState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.statuses == nil {
		c.statuses = map[string]*runtimeapi.ContainerStatus{}
	}
	c.statuses[id] = &runtimeapi.ContainerStatus{Id: id, LogPath: log, State: state}
	if state == runtimeapi.ContainerState_CONTAINER_EXITED {
		c.hub.send(&runtimeapi.ContainerEventResponse{ContainerId: id, ContainerEventType: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT})
	}
}

func (c *Containers) ContainerStatus(_ context.Context, r *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	st, ok := c.statuses[r.ContainerId]
	if !ok {
		return nil, fmt.Errorf("container %q: %w", r.ContainerId, errdefs.ErrNotFound)
	}
	return &runtimeapi.ContainerStatusResponse{Status: st}, nil
}

func (c *Containers) ListPodSandbox(_ context.Context, r *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	uid := r.GetFilter().GetLabelSelector()["io.kubernetes.pod.uid"]
	return &runtimeapi.ListPodSandboxResponse{Items: []*runtimeapi.PodSandbox{
		{Id: "old-" + uid, CreatedAt: 1}, {Id: "sandbox-" + uid, CreatedAt: 2},
	}}, nil
}

func (c *Containers) Subscribe(ctx context.Context) <-chan *runtimeapi.ContainerEventResponse {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.hub.subscribe(ctx, nil)
}

func (c *Containers) ExecStream(ctx context.Context, id string, cmd []string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return c.Run(ctx, id, cmd, in, out, err, tty, resize)
}

func (c *Containers) AttachStream(ctx context.Context, id string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return c.Run(ctx, id, nil, in, out, err, tty, resize)
}

func (c *Containers) PortForwardStream(ctx context.Context, sandbox string, port int32, stream io.ReadWriteCloser) error {
	return c.Ports(ctx, sandbox, port, stream)
}

// Exit is the error of a command that ended with code.
func Exit(code int) error {
	return utilexec.CodeExitError{Err: fmt.Errorf("exit status %d", code), Code: code}
}

// Images is an image store in memory.
type Images struct {
	mu     sync.Mutex
	Stored []*images.Image
	// Broken is what Verify finds.
	Broken []images.Problem
	// Gate holds pulls back after their first progress until it is closed; nil: not.
	Gate chan struct{}
}

func (i *Images) Pull(ctx context.Context, ref string, auth *runtimeapi.AuthConfig, progress func(images.Progress)) (*images.Image, error) {
	progress(images.Progress{Ref: ref, Stage: "downloading", Layers: 2, LayersDone: 1, Bytes: 5, Total: 10})
	if i.Gate != nil {
		select {
		case <-i.Gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if auth.GetPassword() == "wrong" {
		return nil, fmt.Errorf("pull %s: %w", ref, errdefs.ErrUnauthenticated)
	}
	img := &images.Image{ID: "sha256:" + fmt.Sprintf("%064x", len(ref)), RepoTags: []string{ref}, Size: 10}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.Stored = append(i.Stored, img)
	return img, nil
}

func (i *Images) Get(_ context.Context, ref string) (*images.Image, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, img := range i.Stored {
		if img.ID == ref || slices.Contains(img.RepoTags, ref) {
			return img, nil
		}
	}
	return nil, fmt.Errorf("image %s: %w", ref, errdefs.ErrNotFound)
}

func (i *Images) List(context.Context) ([]*images.Image, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Clone(i.Stored), nil
}

func (i *Images) Remove(_ context.Context, ref string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.Stored = slices.DeleteFunc(i.Stored, func(img *images.Image) bool { return img.ID == ref || slices.Contains(img.RepoTags, ref) })
	return nil
}

// Load takes the text of its input for the name of the image; with "half " before
// it the archive has another one that cannot be loaded. The real one tells an
// image once for each of its tags; this one tells it twice.
func (i *Images) Load(ctx context.Context, tar io.Reader, _ images.LoadOptions) ([]*images.Image, error) {
	b, err := io.ReadAll(tar)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(b, []byte("bad")) {
		return nil, fmt.Errorf("no image in the archive: %w", errdefs.ErrInvalidArgument)
	}
	name, half := strings.CutPrefix(string(b), "half ")
	img, err := i.Pull(ctx, name, nil, func(images.Progress) {})
	if err == nil && half {
		err = &images.LoadError{Images: []images.Unloaded{{Name: "a.io/other:1", Err: fmt.Errorf("lacks blob x: %w", errdefs.ErrInvalidArgument)}}}
	}
	return []*images.Image{img, img}, err
}

func (i *Images) Verify(context.Context) ([]images.Problem, error) { return i.Broken, nil }

func (i *Images) Pulling() []images.Progress { return nil }

// Pod makes a running pod with one container for each name.
func Pod(namespace, name string, containers ...string) *v1.Pod {
	p := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID("uid-" + name), Labels: map[string]string{"app": name}, CreationTimestamp: metav1.Now()}}
	p.Spec.NodeName = "node1"
	p.Status.Phase = v1.PodRunning
	p.Status.PodIP = "10.1.2.3"
	for _, c := range containers {
		p.Spec.Containers = append(p.Spec.Containers, v1.Container{Name: c, Image: "example/" + c + ":1"})
		p.Status.ContainerStatuses = append(p.Status.ContainerStatuses, v1.ContainerStatus{
			Name: c, Ready: true, ContainerID: "podd://" + string(p.UID) + "-" + c, Image: "example/" + c + ":1",
			State: v1.ContainerState{Running: &v1.ContainerStateRunning{StartedAt: metav1.Now()}},
		})
	}
	return p
}
