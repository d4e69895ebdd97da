package pods

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cgroups"
	"github.com/podd-runtime/podd/kubelet/pods/spec"
)

// fakeRuntime is a CRI in memory. It enforces the invariants that no plan may
// ever break, and fails or hangs where a test tells it to.
type fakeRuntime struct {
	mu         sync.Mutex
	seq        int
	sandboxes  map[string]*fakeSandbox
	containers map[string]*fakeContainer
	images     map[string]bool
	subs       []chan *runtimeapi.ContainerEventResponse
	broken     []string // invariants, with what came before
	history    []string
	started    map[string]int
	calls      map[string]int

	// fault is asked before every call, and again after with "call!" when the
	// work is done; an error is returned to the caller.
	fault func(ctx context.Context, call, subject string) error
	// ends says how a container ends by itself: after how long, with what.
	ends func(c *runtimeapi.ContainerConfig) (after time.Duration, code int32, ok bool)
	// exec answers ExecSync.
	exec func(ctx context.Context, id string, cmd []string) (int32, error)
	// onTerm is how long a container takes to end after SIGTERM.
	onTerm func(c *runtimeapi.ContainerConfig) time.Duration
	stops  []string
	// termCode is what containers exit with after SIGTERM.
	termCode int32
	// updates of resources in order, of pods' groups too; memory is what every
	// container says it uses.
	updates []string
	memory  uint64
	// skew of the clock by which it tells when containers ended.
	skew time.Duration
}

type fakeSandbox struct {
	id      string
	cfg     *runtimeapi.PodSandboxConfig
	ready   bool
	created time.Time
}

type fakeContainer struct {
	id, sandbox string
	cfg         *runtimeapi.ContainerConfig
	state       runtimeapi.ContainerState
	created     time.Time
	start, end  time.Time
	code        int32
	reason      string
	gone        chan struct{}
}

func newFakeRuntime(images ...string) *fakeRuntime {
	f := &fakeRuntime{
		sandboxes: map[string]*fakeSandbox{}, containers: map[string]*fakeContainer{},
		termCode: 143, images: map[string]bool{}, started: map[string]int{}, calls: map[string]int{},
	}
	for _, i := range images {
		f.images[i] = true
	}
	return f
}

// enter a call: not the lock's business, as a fault may hang.
func (f *fakeRuntime) enter(ctx context.Context, call, subject string) error {
	f.mu.Lock()
	f.calls[call]++
	fault := f.fault
	f.note("%s %s", call, subject)
	f.mu.Unlock()
	if fault == nil {
		return nil
	}
	err := fault(ctx, call, subject)
	if err != nil {
		f.mu.Lock()
		f.note("%s %s: %v", call, subject, err)
		f.mu.Unlock()
	}
	return err
}

// note what happens, for the story of a breach.
func (f *fakeRuntime) note(format string, args ...any) {
	f.history = append(f.history, time.Now().Format("04:05.000 ")+fmt.Sprintf(format, args...))
	if len(f.history) > 600 {
		f.history = f.history[50:]
	}
}

func (f *fakeRuntime) breach(format string, args ...any) {
	f.broken = append(f.broken, fmt.Sprintf(format, args...)+"\n"+strings.Join(f.history, "\n"))
}

func podKey(m *runtimeapi.PodSandboxMetadata) string { return m.Namespace + "/" + m.Name }

func (f *fakeRuntime) RunPodSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	if err := f.enter(ctx, "RunPodSandbox", r.Config.Metadata.Name); err != nil {
		return nil, err
	}
	f.mu.Lock()
	for _, s := range f.sandboxes {
		if s.ready && podKey(s.cfg.Metadata) == podKey(r.Config.Metadata) {
			f.breach("two sandboxes of %s", podKey(r.Config.Metadata))
		}
	}
	f.seq++
	s := &fakeSandbox{id: fmt.Sprintf("s%d", f.seq), cfg: r.Config, ready: true, created: time.Now()}
	f.sandboxes[s.id] = s
	f.mu.Unlock()
	if err := f.enter(ctx, "RunPodSandbox!", r.Config.Metadata.Name); err != nil {
		return nil, err
	}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: s.id}, nil
}

func (f *fakeRuntime) StopPodSandbox(ctx context.Context, r *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	if err := f.enter(ctx, "StopPodSandbox", r.PodSandboxId); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.sandboxes[r.PodSandboxId]; s != nil {
		for _, c := range f.containers {
			if c.sandbox == s.id && c.state == runtimeapi.ContainerState_CONTAINER_RUNNING {
				f.finish(c, 137, "Error")
			}
		}
		s.ready = false
	}
	return &runtimeapi.StopPodSandboxResponse{}, nil
}

func (f *fakeRuntime) RemovePodSandbox(ctx context.Context, r *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	if err := f.enter(ctx, "RemovePodSandbox", r.PodSandboxId); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.sandboxes[r.PodSandboxId]; s != nil && s.ready {
		f.breach("sandbox %s removed while it is ready", s.id)
	}
	for id, c := range f.containers {
		if c.sandbox == r.PodSandboxId {
			delete(f.containers, id)
		}
	}
	delete(f.sandboxes, r.PodSandboxId)
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

func (f *fakeRuntime) PodSandboxStatus(ctx context.Context, r *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	if err := f.enter(ctx, "PodSandboxStatus", r.PodSandboxId); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.sandboxes[r.PodSandboxId]
	if s == nil {
		return nil, fmt.Errorf("sandbox %s: %w", r.PodSandboxId, errdefs.ErrNotFound)
	}
	return &runtimeapi.PodSandboxStatusResponse{Status: s.status()}, nil
}

func (s *fakeSandbox) status() *runtimeapi.PodSandboxStatus {
	st := runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	if s.ready {
		st = runtimeapi.PodSandboxState_SANDBOX_READY
	}
	return &runtimeapi.PodSandboxStatus{
		Id: s.id, Metadata: s.cfg.Metadata, State: st, CreatedAt: s.created.UnixNano(), Labels: s.cfg.Labels,
		Annotations: s.cfg.Annotations, Network: &runtimeapi.PodSandboxNetworkStatus{Ip: "10.0.0.1"},
	}
}

func matches(have, want map[string]string) bool {
	for k, v := range want {
		if have[k] != v {
			return false
		}
	}
	return true
}

func (f *fakeRuntime) ListPodSandbox(ctx context.Context, r *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	if err := f.enter(ctx, "ListPodSandbox", ""); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &runtimeapi.ListPodSandboxResponse{}
	for _, s := range f.sandboxes {
		if !matches(s.cfg.Labels, r.GetFilter().GetLabelSelector()) {
			continue
		}
		st := s.status()
		resp.Items = append(resp.Items, &runtimeapi.PodSandbox{
			Id: s.id, Metadata: s.cfg.Metadata, State: st.State, CreatedAt: st.CreatedAt,
			Labels: s.cfg.Labels, Annotations: s.cfg.Annotations,
		})
	}
	return resp, nil
}

func (f *fakeRuntime) CreateContainer(ctx context.Context, r *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	if err := f.enter(ctx, "CreateContainer", r.Config.Metadata.Name); err != nil {
		return nil, err
	}
	f.mu.Lock()
	s := f.sandboxes[r.PodSandboxId]
	if s == nil || !s.ready {
		f.mu.Unlock()
		return nil, fmt.Errorf("sandbox %s: %w", r.PodSandboxId, errdefs.ErrNotFound)
	}
	f.seq++
	c := &fakeContainer{id: fmt.Sprintf("c%d", f.seq), sandbox: s.id, cfg: r.Config, created: time.Now(), gone: make(chan struct{})}
	f.containers[c.id] = c
	f.mu.Unlock()
	if err := f.enter(ctx, "CreateContainer!", r.Config.Metadata.Name); err != nil {
		return nil, err
	}
	return &runtimeapi.CreateContainerResponse{ContainerId: c.id}, nil
}

func (f *fakeRuntime) StartContainer(ctx context.Context, r *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	if err := f.enter(ctx, "StartContainer", r.ContainerId); err != nil {
		return nil, err
	}
	f.mu.Lock()
	c := f.containers[r.ContainerId]
	if c == nil || c.state != runtimeapi.ContainerState_CONTAINER_CREATED {
		f.mu.Unlock()
		return nil, fmt.Errorf("container %s: %w", r.ContainerId, errdefs.ErrNotFound)
	}
	for _, o := range f.containers {
		if o != c && o.state == runtimeapi.ContainerState_CONTAINER_RUNNING &&
			o.cfg.Metadata.Name == c.cfg.Metadata.Name && f.podOf(o) == f.podOf(c) {
			f.breach("container %s of %s runs twice", c.cfg.Metadata.Name, f.podOf(c))
		}
	}
	f.note("started %s of %s in %s, attempt %d", c.cfg.Metadata.Name, f.podOf(c), c.sandbox, c.cfg.Metadata.Attempt)
	for _, o := range f.containers {
		if o != c && o.state == runtimeapi.ContainerState_CONTAINER_RUNNING && f.podOf(o) == f.podOf(c) {
			f.note("  beside %s in %s, attempt %d", o.id, o.sandbox, o.cfg.Metadata.Attempt)
		}
	}
	c.state, c.start = runtimeapi.ContainerState_CONTAINER_RUNNING, time.Now()
	f.started[f.podOf(c)+"/"+c.cfg.Metadata.Name]++
	f.started[c.cfg.Labels[spec.LabelPodUID]]++
	if f.ends != nil {
		if after, code, ok := f.ends(c.cfg); ok {
			time.AfterFunc(after, func() { f.exit(c.id, code) })
		}
	}
	f.mu.Unlock()
	if err := f.enter(ctx, "StartContainer!", r.ContainerId); err != nil {
		return nil, err
	}
	return &runtimeapi.StartContainerResponse{}, nil
}

func (f *fakeRuntime) podOf(c *fakeContainer) string {
	return c.cfg.Labels[spec.LabelPodNamespace] + "/" + c.cfg.Labels[spec.LabelPodName]
}

// exit ends a container from inside.
func (f *fakeRuntime) exit(id string, code int32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.containers[id]; c != nil && c.state == runtimeapi.ContainerState_CONTAINER_RUNNING {
		reason := "Completed"
		if code != 0 {
			reason = "Error"
		}
		f.finish(c, code, reason)
	}
}

func (f *fakeRuntime) finish(c *fakeContainer, code int32, reason string) {
	f.note("%s, %s of %s, ends with %d", c.id, c.cfg.Metadata.Name, f.podOf(c), code)
	c.state, c.code, c.reason, c.end = runtimeapi.ContainerState_CONTAINER_EXITED, code, reason, time.Now()
	close(c.gone)
	for _, s := range f.subs {
		s <- &runtimeapi.ContainerEventResponse{
			ContainerId: c.id, ContainerEventType: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, CreatedAt: time.Now().UnixNano(),
		}
	}
}

func (f *fakeRuntime) StopContainer(ctx context.Context, r *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	if err := f.enter(ctx, "StopContainer", r.ContainerId); err != nil {
		return nil, err
	}
	f.mu.Lock()
	c := f.containers[r.ContainerId]
	if c == nil || c.state != runtimeapi.ContainerState_CONTAINER_RUNNING {
		f.mu.Unlock()
		return &runtimeapi.StopContainerResponse{}, nil
	}
	f.stops = append(f.stops, c.cfg.Metadata.Name)
	wait := time.Duration(0)
	if f.onTerm != nil {
		wait = f.onTerm(c.cfg)
	}
	f.mu.Unlock()
	code := f.termCode
	if limit := time.Duration(r.Timeout) * time.Second; wait > limit {
		wait, code = limit, 137
	}
	select {
	case <-time.After(wait):
		f.exit(c.id, code)
	case <-c.gone:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return &runtimeapi.StopContainerResponse{}, nil
}

func (f *fakeRuntime) RemoveContainer(ctx context.Context, r *runtimeapi.RemoveContainerRequest) (*runtimeapi.RemoveContainerResponse, error) {
	if err := f.enter(ctx, "RemoveContainer", r.ContainerId); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.containers[r.ContainerId]; c != nil && c.state == runtimeapi.ContainerState_CONTAINER_RUNNING {
		f.breach("container %s removed while it runs", c.cfg.Metadata.Name)
	}
	delete(f.containers, r.ContainerId)
	return &runtimeapi.RemoveContainerResponse{}, nil
}

func (f *fakeRuntime) ListContainers(ctx context.Context, r *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	if err := f.enter(ctx, "ListContainers", ""); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &runtimeapi.ListContainersResponse{}
	for _, c := range f.containers {
		if matches(c.cfg.Labels, r.GetFilter().GetLabelSelector()) {
			resp.Containers = append(resp.Containers, &runtimeapi.Container{
				Id: c.id, PodSandboxId: c.sandbox, Metadata: c.cfg.Metadata, Image: c.cfg.Image, State: c.state,
				CreatedAt: c.created.UnixNano(), Labels: c.cfg.Labels, Annotations: c.cfg.Annotations,
			})
		}
	}
	return resp, nil
}

func (f *fakeRuntime) ContainerStats(ctx context.Context, r *runtimeapi.ContainerStatsRequest) (*runtimeapi.ContainerStatsResponse, error) {
	if err := f.enter(ctx, "ContainerStats", r.ContainerId); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return &runtimeapi.ContainerStatsResponse{Stats: &runtimeapi.ContainerStats{
		Memory: &runtimeapi.MemoryUsage{UsageBytes: &runtimeapi.UInt64Value{Value: f.memory}},
	}}, nil
}

// UpdateContainerResources notes what a running container has and whether its
// pod's group would hold it.
func (f *fakeRuntime) UpdateContainerResources(ctx context.Context, r *runtimeapi.UpdateContainerResourcesRequest) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	if err := f.enter(ctx, "UpdateContainerResources", r.ContainerId); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.containers[r.ContainerId]
	if c == nil || c.state != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil, fmt.Errorf("container %s: %w", r.ContainerId, errdefs.ErrFailedPrecondition)
	}
	c.cfg.Linux.Resources = r.Linux
	f.updates = append(f.updates, fmt.Sprintf("%s cpu=%d memory=%d", c.cfg.Metadata.Name, r.Linux.CpuQuota, r.Linux.MemoryLimitInBytes))
	return &runtimeapi.UpdateContainerResourcesResponse{}, nil
}

func (f *fakeRuntime) UpdatePodSandboxResources(ctx context.Context, r *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, f.enter(ctx, "UpdatePodSandboxResources", r.PodSandboxId)
}

func (f *fakeRuntime) ContainerStatus(ctx context.Context, r *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	if err := f.enter(ctx, "ContainerStatus", r.ContainerId); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.containers[r.ContainerId]
	if c == nil {
		return nil, fmt.Errorf("container %s: %w", r.ContainerId, errdefs.ErrNotFound)
	}
	st := &runtimeapi.ContainerStatus{
		Id: c.id, Metadata: c.cfg.Metadata, State: c.state, CreatedAt: c.created.UnixNano(), Image: c.cfg.Image,
		ImageRef: c.cfg.Image.Image, Labels: c.cfg.Labels, Annotations: c.cfg.Annotations, Mounts: c.cfg.Mounts,
	}
	if !c.start.IsZero() {
		st.StartedAt = c.start.UnixNano()
	}
	if c.state == runtimeapi.ContainerState_CONTAINER_EXITED {
		st.FinishedAt, st.ExitCode, st.Reason = c.end.Add(f.skew).UnixNano(), c.code, c.reason
	}
	return &runtimeapi.ContainerStatusResponse{Status: st}, nil
}

func (f *fakeRuntime) ExecSync(ctx context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	if err := f.enter(ctx, "ExecSync", r.ContainerId); err != nil {
		return nil, err
	}
	if f.exec == nil {
		return &runtimeapi.ExecSyncResponse{}, nil
	}
	code, err := f.exec(ctx, r.ContainerId, r.Cmd)
	return &runtimeapi.ExecSyncResponse{ExitCode: code}, err
}

func (f *fakeRuntime) Subscribe(ctx context.Context) <-chan *runtimeapi.ContainerEventResponse {
	ch := make(chan *runtimeapi.ContainerEventResponse, 100000)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.subs = append(f.subs, ch)
	context.AfterFunc(ctx, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		for i, s := range f.subs {
			if s == ch {
				f.subs = append(f.subs[:i:i], f.subs[i+1:]...)
				close(ch)
				return
			}
		}
	})
	return ch
}

func (f *fakeRuntime) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	if err := f.enter(ctx, "PullImage", r.Image.Image); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.images[r.Image.Image] = true
	return &runtimeapi.PullImageResponse{ImageRef: r.Image.Image}, nil
}

func (f *fakeRuntime) ImageStatus(ctx context.Context, r *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	if err := f.enter(ctx, "ImageStatus", r.Image.Image); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.images[r.Image.Image] {
		return &runtimeapi.ImageStatusResponse{}, nil
	}
	return &runtimeapi.ImageStatusResponse{Image: &runtimeapi.Image{Id: r.Image.Image, Uid: &runtimeapi.Int64Value{}}}, nil
}

// of the pod's containers that run now, by name.
func (f *fakeRuntime) live(pod string) map[string]*fakeContainer {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := map[string]*fakeContainer{}
	for _, c := range f.containers {
		if c.state == runtimeapi.ContainerState_CONTAINER_RUNNING && f.podOf(c) == pod {
			cc := *c
			out[c.cfg.Metadata.Name] = &cc
		}
	}
	return out
}

// fakeVolumes remembers what is set up.
type fakeVolumes struct {
	rt  *fakeRuntime
	mu  sync.Mutex
	set map[types.UID]bool
	err error
	// holds is the generation of objects, and the labels of the pod, that each
	// pod's volumes were last written with; objects is the generation now.
	holds   map[types.UID]string
	objects int
}

func (v *fakeVolumes) Setup(ctx context.Context, pod *v1.Pod) error {
	if err := v.rt.enter(ctx, "Setup", pod.Name); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.err != nil {
		return v.err
	}
	v.set[pod.UID] = true
	v.mu.Unlock()
	defer v.mu.Lock()
	return v.write(ctx, "Setup!", pod)
}

// write what there is to know now, and take a while for it.
func (v *fakeVolumes) write(ctx context.Context, call string, pod *v1.Pod) error {
	v.mu.Lock()
	text := fmt.Sprint(v.objects, pod.Labels)
	v.mu.Unlock()
	if err := v.rt.enter(ctx, call, pod.Name); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.holds == nil {
		v.holds = map[types.UID]string{}
	}
	v.holds[pod.UID] = text
	return nil
}

func (v *fakeVolumes) Mounts(context.Context, *v1.Pod, *v1.Container, func(string) string) ([]*runtimeapi.Mount, func(), error) {
	return nil, nil, nil
}
func (v *fakeVolumes) Abort(context.Context, types.UID) error { return nil }
func (v *fakeVolumes) Refresh(ctx context.Context, pod *v1.Pod) error {
	return v.write(ctx, "Refresh", pod)
}

func (v *fakeVolumes) Teardown(ctx context.Context, uid types.UID) error {
	if err := v.rt.enter(ctx, "Teardown", string(uid)); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.set, uid)
	return nil
}

func (v *fakeVolumes) Pods() ([]types.UID, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	var out []types.UID
	for u := range v.set {
		out = append(out, u)
	}
	return out, nil
}

// fakeCgroups remembers which groups there are.
type fakeCgroups struct {
	rt  *fakeRuntime
	mu  sync.Mutex
	set map[types.UID]bool
}

func (g *fakeCgroups) Parent(uid types.UID, qos v1.PodQOSClass) string { return "/pods/" + string(uid) }

func (g *fakeCgroups) Name(types.UID, v1.PodQOSClass, string) {}

func (g *fakeCgroups) Ensure(ctx context.Context, uid types.UID, _ v1.PodQOSClass, r *specs.LinuxResources) error {
	if err := g.rt.enter(ctx, "EnsureCgroup", string(uid)); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.set[uid] = true
	u := "pod"
	if r.CPU != nil && r.CPU.Quota != nil {
		u += fmt.Sprintf(" cpu=%d", *r.CPU.Quota)
	}
	if r.Memory != nil && r.Memory.Limit != nil {
		u += fmt.Sprintf(" memory=%d", *r.Memory.Limit)
	}
	g.rt.mu.Lock()
	g.rt.updates = append(g.rt.updates, u)
	g.rt.mu.Unlock()
	return nil
}

func (g *fakeCgroups) Remove(ctx context.Context, uid types.UID) error {
	if err := g.rt.enter(ctx, "RemoveCgroup", string(uid)); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.set, uid)
	return nil
}

func (g *fakeCgroups) List() ([]types.UID, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []types.UID
	for u := range g.set {
		out = append(out, u)
	}
	return out, nil
}
func (g *fakeCgroups) Stats(types.UID) (*cgroups.Stats, error) { return nil, errdefs.ErrNotFound }

// fakeObjects is a set of ConfigMaps and Secrets.
type fakeObjects struct {
	mu         sync.Mutex
	configMaps map[string]*v1.ConfigMap
}

func (o *fakeObjects) ConfigMap(ns, name string) (*v1.ConfigMap, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if c := o.configMaps[ns+"/"+name]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("configmap %s/%s: %w", ns, name, errdefs.ErrNotFound)
}

func (o *fakeObjects) Secret(ns, name string) (*v1.Secret, error) {
	return nil, fmt.Errorf("secret %s/%s: %w", ns, name, errdefs.ErrNotFound)
}

// fakeEvents keeps "Reason: message".
type fakeEvents struct {
	mu  sync.Mutex
	all []string
}

func (e *fakeEvents) Eventf(ref *v1.ObjectReference, typ, reason, format string, args ...any) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, reason+": "+fmt.Sprintf(format, args...))
}

func (e *fakeEvents) has(s string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, x := range e.all {
		if x == s {
			return true
		}
	}
	return false
}

// starts of a container, "namespace/pod/container".
func (f *fakeRuntime) starts(key string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.started[key]
}

func (f *fakeRuntime) count(what string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if what == "sandboxes" {
		return len(f.sandboxes)
	}
	return len(f.containers)
}

// stopped containers, in order.
func (f *fakeRuntime) stopped() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.stops...)
}

func (v *fakeVolumes) count() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.set)
}

func (g *fakeCgroups) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.set)
}

func (f *fakeRuntime) setFault(fault func(ctx context.Context, call, subject string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault = fault
}
