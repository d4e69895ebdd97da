package model

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
)

// shim is the CRI with what podd-shim holds: it outlives podd.
type shim struct {
	w *world

	mu         sync.Mutex
	counts     map[string]int // of names given
	sandboxes  map[string]*sandbox
	containers map[string]*container
	volumes    map[types.UID]bool
	groups     map[types.UID]bool
	subs       []*subscription
	// away until then: podd-shim cannot be asked. What ends meanwhile is told
	// afterwards.
	away time.Time
	// unfit containers fail their probes, by pod's UID.
	unfit map[types.UID]bool
}

type sandbox struct {
	id      string
	uid     types.UID
	cfg     *runtimeapi.PodSandboxConfig
	ready   bool
	created time.Time
}

type container struct {
	id, sandbox string
	uid         types.UID
	cfg         *runtimeapi.ContainerConfig
	state       runtimeapi.ContainerState
	created     time.Time
	start, end  time.Time
	code        int32
	reason      string
	gone        chan struct{}
}

func newShim(w *world) *shim {
	return &shim{
		w: w, counts: map[string]int{}, sandboxes: map[string]*sandbox{}, containers: map[string]*container{},
		volumes: map[types.UID]bool{}, groups: map[types.UID]bool{}, unfit: map[types.UID]bool{},
	}
}

// caller is the runtime as one podd sees it: when that is killed, what it has
// not begun has no effect.
type caller struct {
	*shim
	dead <-chan struct{}
}

var errDead = errors.New("podd has been killed")

// call the runtime: work is the effect. It takes its time before and after,
// fails at random, and goes on without who has given up.
func (c *caller) call(ctx context.Context, name, subject string, work func() error) error {
	die := c.w.roll(name, subject)
	before, after, fate, late := c.w.latency(die), c.w.latency(die), die.IntN(100), die.IntN(3) == 0
	if c.w.isCalm() {
		fate = 99
	}
	if fate == 0 {
		before = 3 * time.Minute // longer than anybody waits
	}
	if err := c.pass(ctx, before); err != nil {
		if late {
			work()
		}
		return err
	}
	if c.isAway() || fate == 1 || c.w.lost("refuse "+name+" "+subject) {
		return fmt.Errorf("%s %s: %w", name, subject, errdefs.ErrUnavailable)
	}
	for _, which := range []string{name, name + " " + subject} {
		if f := c.w.take(which); f != nil {
			f()
		}
	}
	if err := work(); err != nil {
		return err
	}
	if f := c.w.take(name + "!"); f != nil {
		f()
	}
	if err := c.pass(ctx, after); err != nil {
		return err
	}
	if fate == 2 || c.w.lost(name) || c.w.lost(name+" "+subject) {
		return fmt.Errorf("%s %s, whose answer is lost: %w", name, subject, errdefs.ErrUnavailable)
	}
	return nil
}

func (c *caller) pass(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-c.dead:
		return errDead
	}
}

func (r *shim) isAway() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Now().Before(r.away)
}

func (r *shim) goAway(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.away = time.Now().Add(d)
}

// name of a new thing; r.mu is held.
func (r *shim) name(kind string, uid types.UID, what string) string {
	key := fmt.Sprintf("%s-%s%s", kind, uid, what)
	r.counts[key]++
	return fmt.Sprintf("%s-%d", key, r.counts[key])
}

func (c *caller) RunPodSandbox(ctx context.Context, q *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	uid := types.UID(q.Config.Metadata.Uid)
	var s *sandbox
	err := c.call(ctx, "RunPodSandbox", string(uid), func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, o := range c.sandboxes {
			if o.ready && o.cfg.Metadata.Name == q.Config.Metadata.Name {
				c.w.breach("a sandbox of %s begins beside %s", uid, o.id)
			}
		}
		s = &sandbox{id: c.name("s", uid, ""), uid: uid, cfg: q.Config, ready: true, created: time.Now()}
		c.sandboxes[s.id] = s
		c.w.note("runtime: sandbox %s", s.id)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: s.id}, nil
}

func (c *caller) StopPodSandbox(ctx context.Context, q *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	return &runtimeapi.StopPodSandboxResponse{}, c.call(ctx, "StopPodSandbox", q.PodSandboxId, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.stopSandbox(q.PodSandboxId)
		return nil
	})
}

func (r *shim) stopSandbox(id string) {
	s := r.sandboxes[id]
	if s == nil {
		return
	}
	for _, k := range r.in(id) {
		if k.state == runtimeapi.ContainerState_CONTAINER_RUNNING {
			r.finish(k, 137, "Error")
		}
	}
	s.ready = false
}

// in a sandbox, by id; r.mu is held.
func (r *shim) in(sandbox string) (out []*container) {
	for _, id := range slices.Sorted(maps.Keys(r.containers)) {
		if k := r.containers[id]; k.sandbox == sandbox {
			out = append(out, k)
		}
	}
	return out
}

func (c *caller) RemovePodSandbox(ctx context.Context, q *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	return &runtimeapi.RemovePodSandboxResponse{}, c.call(ctx, "RemovePodSandbox", q.PodSandboxId, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if s := c.sandboxes[q.PodSandboxId]; s != nil && s.ready {
			c.w.breach("sandbox %s is removed while it is ready", s.id)
		}
		for _, k := range c.in(q.PodSandboxId) {
			delete(c.containers, k.id)
			c.w.removed(k.id)
		}
		delete(c.sandboxes, q.PodSandboxId)
		return nil
	})
}

func (c *caller) PodSandboxStatus(ctx context.Context, q *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	resp := &runtimeapi.PodSandboxStatusResponse{}
	return resp, c.call(ctx, "PodSandboxStatus", q.PodSandboxId, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		s := c.sandboxes[q.PodSandboxId]
		if s == nil {
			return fmt.Errorf("sandbox %s: %w", q.PodSandboxId, errdefs.ErrNotFound)
		}
		resp.Status = &runtimeapi.PodSandboxStatus{
			Id: s.id, Metadata: s.cfg.Metadata, State: s.state(), CreatedAt: c.w.disk.shifted(s.created).UnixNano(), Labels: s.cfg.Labels,
			Annotations: s.cfg.Annotations, Network: &runtimeapi.PodSandboxNetworkStatus{Ip: "10.0.0.1"},
		}
		return nil
	})
}

func (s *sandbox) state() runtimeapi.PodSandboxState {
	if s.ready {
		return runtimeapi.PodSandboxState_SANDBOX_READY
	}
	return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
}

func matches(have, want map[string]string) bool {
	for k, v := range want {
		if have[k] != v {
			return false
		}
	}
	return true
}

func (c *caller) ListPodSandbox(ctx context.Context, q *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	resp := &runtimeapi.ListPodSandboxResponse{}
	selector := q.GetFilter().GetLabelSelector()
	return resp, c.call(ctx, "ListPodSandbox", selector[spec.LabelPodUID], func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, id := range slices.Sorted(maps.Keys(c.sandboxes)) {
			if s := c.sandboxes[id]; matches(s.cfg.Labels, selector) {
				resp.Items = append(resp.Items, &runtimeapi.PodSandbox{
					Id: s.id, Metadata: s.cfg.Metadata, State: s.state(), CreatedAt: c.w.disk.shifted(s.created).UnixNano(),
					Labels: s.cfg.Labels, Annotations: s.cfg.Annotations,
				})
			}
		}
		return nil
	})
}

func (c *caller) CreateContainer(ctx context.Context, q *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	resp := &runtimeapi.CreateContainerResponse{}
	return resp, c.call(ctx, "CreateContainer", q.PodSandboxId+" "+q.Config.Metadata.Name, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		s := c.sandboxes[q.PodSandboxId]
		if s == nil || !s.ready {
			return fmt.Errorf("sandbox %s: %w", q.PodSandboxId, errdefs.ErrNotFound)
		}
		m := q.Config.Metadata
		k := &container{
			id: c.name("c", s.uid, "-"+m.Name), sandbox: s.id, uid: s.uid, cfg: q.Config, created: time.Now(), gone: make(chan struct{}),
		}
		c.containers[k.id] = k
		c.w.created(k.id, k.uid, m.Name, int32(m.Attempt))
		c.w.note("runtime: container %s, number %d", k.id, m.Attempt)
		resp.ContainerId = k.id
		return nil
	})
}

func (c *caller) StartContainer(ctx context.Context, q *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	return &runtimeapi.StartContainerResponse{}, c.call(ctx, "StartContainer", q.ContainerId, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		k := c.containers[q.ContainerId]
		if k == nil || k.state != runtimeapi.ContainerState_CONTAINER_CREATED || !c.sandboxes[k.sandbox].ready {
			return fmt.Errorf("container %s: %w", q.ContainerId, errdefs.ErrNotFound)
		}
		for _, o := range c.containers {
			if o != k && o.state == runtimeapi.ContainerState_CONTAINER_RUNNING && o.uid == k.uid && o.cfg.Metadata.Name == k.cfg.Metadata.Name {
				c.w.breach("container %s begins beside %s", k.id, o.id)
			}
		}
		die := c.w.roll("start", k.id)
		if !c.w.isCalm() && die.IntN(40) == 0 {
			c.finish(k, 128, "StartError")
			return fmt.Errorf("start container %s: no such file", k.id)
		}
		k.state, k.start = runtimeapi.ContainerState_CONTAINER_RUNNING, time.Now()
		os.WriteFile(filepath.Join(c.sandboxes[k.sandbox].cfg.LogDirectory, k.cfg.LogPath), nil, 0o600)
		c.w.note("runtime: %s runs", k.id)
		c.w.started(k.id)
		if k.cfg.Metadata.Name == "init" {
			time.AfterFunc(time.Duration(100+die.IntN(2000))*time.Millisecond, func() { c.exit(k.id, 0, "Completed") })
		}
		return nil
	})
}

// exit of a container by itself.
func (r *shim) exit(id string, code int32, reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if k := r.containers[id]; k != nil && k.state == runtimeapi.ContainerState_CONTAINER_RUNNING {
		r.finish(k, code, reason)
	}
}

// finish a container; r.mu is held.
func (r *shim) finish(k *container, code int32, reason string) {
	k.state, k.code, k.reason, k.end = runtimeapi.ContainerState_CONTAINER_EXITED, code, reason, time.Now()
	close(k.gone)
	r.w.note("runtime: %s ended with %d %s", k.id, code, reason)
	r.w.ended(k.id, code)
	for _, s := range r.subs {
		s.add(k.id)
	}
}

func (c *caller) StopContainer(ctx context.Context, q *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	var k *container
	resp := &runtimeapi.StopContainerResponse{}
	err := c.call(ctx, "StopContainer", q.ContainerId, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		k = c.containers[q.ContainerId]
		return nil
	})
	if err != nil || k == nil {
		return resp, err
	}
	wait, code := c.afterTerm(k)
	if limit := time.Duration(q.Timeout) * time.Second; wait > limit {
		wait, code = limit, 137
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		c.exit(k.id, code, "Error")
	case <-k.gone:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-c.dead: // the signal has been sent
		return nil, errDead
	}
	return resp, nil
}

// afterTerm is what a container does on SIGTERM.
func (r *shim) afterTerm(k *container) (time.Duration, int32) {
	die := r.w.roll("SIGTERM", k.id)
	code := []int32{143, 0, 1}[die.IntN(3)]
	if die.IntN(8) == 0 {
		return time.Hour, 137 // it does not listen
	}
	return time.Duration(die.IntN(3_000_000_000)), code
}

func (c *caller) RemoveContainer(ctx context.Context, q *runtimeapi.RemoveContainerRequest) (*runtimeapi.RemoveContainerResponse, error) {
	return &runtimeapi.RemoveContainerResponse{}, c.call(ctx, "RemoveContainer", q.ContainerId, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		k := c.containers[q.ContainerId]
		if k == nil {
			return nil
		}
		if k.state == runtimeapi.ContainerState_CONTAINER_RUNNING {
			c.w.breach("container %s is removed while it runs", k.id)
		}
		delete(c.containers, k.id)
		c.w.removed(k.id)
		return nil
	})
}

func (c *caller) ListContainers(ctx context.Context, q *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	resp := &runtimeapi.ListContainersResponse{}
	selector := q.GetFilter().GetLabelSelector()
	return resp, c.call(ctx, "ListContainers", selector[spec.LabelPodUID], func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, id := range slices.Sorted(maps.Keys(c.containers)) {
			if k := c.containers[id]; matches(k.cfg.Labels, selector) {
				resp.Containers = append(resp.Containers, &runtimeapi.Container{
					Id: k.id, PodSandboxId: k.sandbox, Metadata: k.cfg.Metadata, Image: k.cfg.Image, State: k.state,
					CreatedAt: c.w.disk.shifted(k.created).UnixNano(), Labels: k.cfg.Labels, Annotations: k.cfg.Annotations,
				})
			}
		}
		return nil
	})
}

func (c *caller) ContainerStats(ctx context.Context, q *runtimeapi.ContainerStatsRequest) (*runtimeapi.ContainerStatsResponse, error) {
	return &runtimeapi.ContainerStatsResponse{Stats: &runtimeapi.ContainerStats{
		Memory: &runtimeapi.MemoryUsage{UsageBytes: &runtimeapi.UInt64Value{Value: 1 << 20}},
	}}, c.call(ctx, "ContainerStats", q.ContainerId, func() error { return nil })
}

func (c *caller) UpdateContainerResources(ctx context.Context, q *runtimeapi.UpdateContainerResourcesRequest) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	return &runtimeapi.UpdateContainerResourcesResponse{}, c.call(ctx, "UpdateContainerResources", q.ContainerId, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		k := c.containers[q.ContainerId]
		if k == nil || k.state != runtimeapi.ContainerState_CONTAINER_RUNNING {
			return fmt.Errorf("container %s: %w", q.ContainerId, errdefs.ErrFailedPrecondition)
		}
		k.cfg.Linux.Resources = q.Linux
		return nil
	})
}

func (c *caller) UpdatePodSandboxResources(ctx context.Context, q *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, c.call(ctx, "UpdatePodSandboxResources", q.PodSandboxId, func() error { return nil })
}

func (c *caller) ContainerStatus(ctx context.Context, q *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	resp := &runtimeapi.ContainerStatusResponse{}
	err := c.call(ctx, "ContainerStatus", q.ContainerId, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		k := c.containers[q.ContainerId]
		if k == nil {
			return fmt.Errorf("container %s: %w", q.ContainerId, errdefs.ErrNotFound)
		}
		resp.Status = c.status(k)
		return nil
	})
	return resp, err
}

func (r *shim) status(k *container) *runtimeapi.ContainerStatus {
	st := &runtimeapi.ContainerStatus{
		Id: k.id, Metadata: k.cfg.Metadata, State: k.state, CreatedAt: r.w.disk.shifted(k.created).UnixNano(), Image: k.cfg.Image,
		ImageRef: k.cfg.Image.Image, Labels: k.cfg.Labels, Annotations: k.cfg.Annotations, Mounts: k.cfg.Mounts,
	}
	if !k.start.IsZero() {
		st.StartedAt = r.w.disk.shifted(k.start).UnixNano()
	}
	if k.state == runtimeapi.ContainerState_CONTAINER_EXITED {
		st.FinishedAt, st.ExitCode, st.Reason = r.w.disk.shifted(k.end).UnixNano(), k.code, k.reason
	}
	return st
}

// ExecSync is probes. At times their answer comes long after its time.
func (c *caller) ExecSync(ctx context.Context, q *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	resp := &runtimeapi.ExecSyncResponse{}
	return resp, c.call(ctx, "ExecSync", q.ContainerId, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		k := c.containers[q.ContainerId]
		if k == nil || k.state != runtimeapi.ContainerState_CONTAINER_RUNNING {
			return fmt.Errorf("container %s: %w", q.ContainerId, errdefs.ErrFailedPrecondition)
		}
		if c.unfit[k.uid] {
			resp.ExitCode = 1
		}
		return nil
	})
}

func (c *caller) PullImage(ctx context.Context, q *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	return &runtimeapi.PullImageResponse{ImageRef: q.Image.Image}, nil
}

func (c *caller) ImageStatus(ctx context.Context, q *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	return &runtimeapi.ImageStatusResponse{Image: &runtimeapi.Image{Id: q.Image.Image, Uid: &runtimeapi.Int64Value{}}}, nil
}

// subscription to events: they come late, but in order and without gaps.
type subscription struct {
	r    *shim
	mu   sync.Mutex
	ids  []string
	wake chan struct{}
}

func (s *subscription) add(id string) {
	s.mu.Lock()
	s.ids = append(s.ids, id)
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (c *caller) Subscribe(ctx context.Context) <-chan *runtimeapi.ContainerEventResponse {
	s := &subscription{r: c.shim, wake: make(chan struct{}, 1)}
	out := make(chan *runtimeapi.ContainerEventResponse)
	c.mu.Lock()
	c.subs = append(c.subs, s)
	c.mu.Unlock()
	go func() {
		defer close(out)
		defer func() {
			c.mu.Lock()
			c.subs = slices.DeleteFunc(c.subs, func(o *subscription) bool { return o == s })
			c.mu.Unlock()
		}()
		for {
			select {
			case <-s.wake:
			case <-ctx.Done():
				return
			}
			s.mu.Lock()
			ids := s.ids
			s.ids = nil
			s.mu.Unlock()
			for _, id := range ids {
				if !s.deliver(ctx, c, out, id) {
					return
				}
			}
		}
	}()
	return out
}

func (s *subscription) deliver(ctx context.Context, c *caller, out chan<- *runtimeapi.ContainerEventResponse, id string) bool {
	die := c.w.roll("exit event", id)
	if c.pass(ctx, c.w.latency(die)) != nil {
		return false
	}
	for c.isAway() {
		if c.pass(ctx, time.Second) != nil {
			return false
		}
	}
	ev := &runtimeapi.ContainerEventResponse{ContainerId: id, ContainerEventType: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, CreatedAt: time.Now().UnixNano()}
	c.mu.Lock()
	if k := c.containers[id]; k != nil && die.IntN(2) == 0 {
		ev.ContainersStatuses = append(ev.ContainersStatuses, c.status(k))
	}
	c.mu.Unlock()
	select {
	case out <- ev:
		return true
	case <-ctx.Done():
		return false
	}
}

// reboot: nothing runs any more.
func (r *shim) reboot() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(r.containers)) {
		if k := r.containers[id]; k.state == runtimeapi.ContainerState_CONTAINER_RUNNING {
			r.finish(k, 255, "Unknown")
		}
	}
	for _, s := range r.sandboxes {
		s.ready = false
	}
	clear(r.groups)
	r.away = time.Time{}
}

// has says that something of a pod is there.
func (r *shim) has(uid types.UID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.sandboxes {
		if s.uid == uid {
			return true
		}
	}
	return false
}

// running containers of a pod, by name.
func (r *shim) running(uid types.UID) map[string]*container {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[string]*container{}
	for _, k := range r.containers {
		if k.uid == uid && k.state == runtimeapi.ContainerState_CONTAINER_RUNNING {
			one := *k
			out[k.cfg.Metadata.Name] = &one
		}
	}
	return out
}

// The volumes and cgroups of pods outlive podd as well.

type volumes struct{ *caller }

func (v volumes) Setup(ctx context.Context, pod *v1.Pod) error {
	return v.call(ctx, "Setup", string(pod.UID), func() error { v.keep(v.volumes, pod.UID, true); return nil })
}

func (r *shim) keep(in map[types.UID]bool, uid types.UID, on bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if in[uid] = on; !on {
		delete(in, uid)
	}
}

func (r *shim) kept(in map[types.UID]bool) []types.UID {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Sorted(maps.Keys(in))
}

func (v volumes) Mounts(context.Context, *v1.Pod, *v1.Container, func(string) string) ([]*runtimeapi.Mount, func(), error) {
	return nil, nil, nil
}
func (v volumes) Abort(context.Context, types.UID) error { return nil }
func (v volumes) Refresh(context.Context, *v1.Pod) error { return nil }
func (v volumes) Pods() ([]types.UID, error)             { return v.kept(v.volumes), nil }

func (v volumes) Teardown(ctx context.Context, uid types.UID) error {
	return v.call(ctx, "Teardown", string(uid), func() error { v.keep(v.volumes, uid, false); return nil })
}
