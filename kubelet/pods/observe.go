package pods

import (
	"context"
	"fmt"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
)

// instance is what the runtime says about a container, in our terms.
func (w *worker) instance(cs *runtimeapi.ContainerStatus, sandbox string) status.Container {
	c := status.Container{
		ID: cs.Id, Name: cs.Labels[spec.LabelContainerName], Sandbox: sandbox,
		Attempt: attemptOf(cs), CreatedAt: time.Unix(0, cs.CreatedAt),
		Image: cs.GetImage().GetUserSpecifiedImage(), ImageRef: cs.ImageRef,
	}
	if c.Name == "" {
		c.Name = cs.GetMetadata().GetName()
	}
	if c.Image == "" {
		c.Image = cs.GetImage().GetImage()
	}
	if cs.StartedAt != 0 {
		c.StartedAt = time.Unix(0, cs.StartedAt)
	}
	if u := cs.GetUser().GetLinux(); u != nil {
		c.User = &v1.ContainerUser{Linux: &v1.LinuxContainerUser{UID: u.Uid, GID: u.Gid, SupplementalGroups: u.SupplementalGroups}}
	}
	if cs.StopSignal != runtimeapi.Signal_RUNTIME_DEFAULT {
		c.StopSignal = v1.Signal(spec.SignalName(cs.StopSignal))
	}
	switch cs.State {
	case runtimeapi.ContainerState_CONTAINER_CREATED:
		c.State = status.Created
	case runtimeapi.ContainerState_CONTAINER_RUNNING:
		c.State = status.Running
	case runtimeapi.ContainerState_CONTAINER_EXITED:
		c.State = status.Exited
		c.ExitCode, c.Reason, c.FinishedAt = cs.ExitCode, exitReason(cs), time.Unix(0, cs.FinishedAt)
		c.EndedAt = past(c.FinishedAt, time.Now())
		c.Message = terminationMessage(cs)
	default:
		c.State = status.Unknown
	}
	return c
}

// exitReason is the runtime's, or what upstream's runtimes say.
func exitReason(cs *runtimeapi.ContainerStatus) string {
	switch {
	case cs.Reason != "":
		return cs.Reason
	case cs.ExitCode == 0:
		return "Completed"
	}
	return "Error"
}

func attemptOf(cs *runtimeapi.ContainerStatus) int32 {
	if m := cs.GetMetadata(); m != nil {
		return int32(m.Attempt)
	}
	return 0
}

// update takes in the state of one container.
func (w *worker) update(l *life, cs *runtimeapi.ContainerStatus) {
	if uid := cs.Labels[spec.LabelPodUID]; uid != "" && uid != string(l.d.Pod.UID) {
		return // of one that waits for this one to be gone
	}
	have := l.container(cs.Id)
	sandbox := ""
	if have != nil {
		sandbox = have.Sandbox
		if have.State == status.Exited {
			return // nothing follows an exit
		}
	} else if s := l.anySandbox(); s != nil {
		sandbox = s.ID
	}
	c := w.instance(cs, sandbox)
	l.unstarted(&c)
	if c.State == status.Exited {
		w.unwatch(l, c.ID)
		delete(l.o.Verdicts, c.ID)
		w.log.Info("container exited", "container", c.Name, "attempt", c.Attempt, "code", c.ExitCode, "reason", c.Reason)
	}
	l.put(c)
	if have := l.container(c.ID); c.State == status.Exited {
		have.Started, have.Ready, have.Starting = false, false, false
	}
}

// refresh asks for the state of one container.
func (w *worker) refresh(l *life, id string) {
	key := "refresh/" + id
	if l.ops[key] != nil {
		l.o.Stale = true
		return
	}
	w.async(l, Action{Kind: Cancel, Key: key}, w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		resp, err := w.t.deps.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err != nil {
			return func() { l.o.Stale = true }, nil
		}
		return func() { w.update(l, resp.Status) }, nil
	})
}

// found is what the runtime has of one pod.
type found struct {
	sandboxes  []Sandbox
	containers []status.Container
}

// look asks the runtime for all it has of a pod.
func (w *worker) look(ctx context.Context, uid types.UID) (*found, error) {
	selector := map[string]string{spec.LabelPodUID: string(uid)}
	sandboxes, err := w.t.deps.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{
		Filter: &runtimeapi.PodSandboxFilter{LabelSelector: selector},
	})
	if err != nil {
		return nil, fmt.Errorf("list the sandboxes of pod %s: %w", uid, err)
	}
	containers, err := w.t.deps.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{
		Filter: &runtimeapi.ContainerFilter{LabelSelector: selector},
	})
	if err != nil {
		return nil, fmt.Errorf("list the containers of pod %s: %w", uid, err)
	}
	return w.inspect(ctx, sandboxes.Items, containers.Containers)
}

// inspect asks for the details of each.
func (w *worker) inspect(ctx context.Context, sandboxes []*runtimeapi.PodSandbox, containers []*runtimeapi.Container) (*found, error) {
	f := &found{}
	for _, s := range sandboxes {
		resp, err := w.t.deps.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: s.Id})
		if notFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("status of sandbox %s: %w", s.Id, err)
		}
		f.sandboxes = append(f.sandboxes, *toSandbox(resp.Status))
	}
	slices.SortStableFunc(f.sandboxes, func(a, b Sandbox) int {
		if a.Attempt != b.Attempt {
			return int(b.Attempt) - int(a.Attempt)
		}
		return b.Created.Compare(a.Created)
	})
	for _, c := range containers {
		resp, err := w.t.deps.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.Id})
		if notFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("status of container %s: %w", c.Id, err)
		}
		f.containers = append(f.containers, w.instance(resp.Status, c.PodSandboxId))
	}
	sortContainers(f.containers)
	return f, nil
}

// observe brings what is known of the pod in line with the runtime.
func (w *worker) observe(l *life) {
	uid, epoch := l.d.Pod.UID, l.epoch
	w.async(l, Action{Kind: Observe}, w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		f, err := w.look(ctx, uid)
		if err != nil {
			w.log.Warn("runtime is not answering", "error", err)
			return nil, err
		}
		return func() {
			// This op's own end is the one change that is allowed.
			if l.epoch == epoch+1 {
				w.adopt(l, f)
			}
		}, nil
	})
}

// adopt what was found; what we alone know of it stays.
func (w *worker) adopt(l *life, f *found) {
	l.o.Stale = false
	stopped := map[string]bool{}
	for _, s := range l.o.Sandboxes {
		stopped[s.ID] = s.Stopped
	}
	for i := range f.sandboxes {
		s := &f.sandboxes[i]
		s.Stopped = stopped[s.ID]
		w.t.own(s.ID, w)
	}
	l.o.Sandboxes = f.sandboxes
	before := l.o.Containers
	l.o.Containers = nil
	for i := range f.containers {
		c := f.containers[i]
		l.unstarted(&c)
		w.t.own(c.ID, w)
		var b status.Container
		if j := slices.IndexFunc(before, func(b status.Container) bool { return b.ID == c.ID }); j >= 0 {
			b = before[j]
		}
		switch {
		case b.State == status.Exited:
			c = b // its message may have been read from files since gone
		case c.State == status.Running && b.State == status.Running:
			c.Started, c.Ready, c.Starting = b.Started, b.Ready, b.Starting
		case c.State == status.Running:
			w.initial(l, &c)
			if made := l.applied[c.Name]; made != nil && !l.unseen { // its start ended without a word
				l.outdated(made)
			}
		}
		switch c.State {
		case status.Exited:
			w.unwatch(l, c.ID)
		case status.Running: // also after a start that nobody could tell of
			if l.failures[c.Name].Reason == "RunContainerError" {
				delete(l.failures, c.Name)
			}
		}
		l.o.Containers = append(l.o.Containers, c)
		l.seen(&c)
	}
	for _, b := range before {
		if l.container(b.ID) == nil {
			w.unwatch(l, b.ID)
			w.t.disown(b.ID)
			l.dropContainer(b.ID)
		}
	}
	if l.unseen {
		w.meet(l)
	}
}

// initial readiness of an instance that we did not start, or not remember.
func (w *worker) initial(l *life, c *status.Container) {
	if c.State != status.Running {
		return
	}
	var cs *v1.Container
	if cs = spec.Container(l.d.Pod, c.Name); cs == nil {
		return
	}
	// A hook that was cut off is run again, as is one of a container that has
	// not even been recorded: at least once is what hooks are promised.
	r, ok := l.restored[c.ID]
	c.Starting = hasPostStart(cs) && (!ok || slices.Contains(l.starting, c.ID))
	if ok {
		c.Started, c.Ready = r.Started, r.Ready
		return
	}
	c.Started = cs.StartupProbe == nil
	c.Ready = c.Started && cs.ReadinessProbe == nil
}

// happened takes an event of the runtime about one of our ids.
func (w *worker) happened(ev *runtimeapi.ContainerEventResponse) {
	if len(w.lives) == 0 {
		return
	}
	l := w.lives[0]
	id := ev.ContainerId
	switch ev.ContainerEventType {
	case runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT:
	case runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT:
		if l.container(id) != nil || l.sandbox(id) != nil {
			if l.ops["remove/"+id] == nil {
				l.o.Stale = true // removed by someone else
			}
		}
		return
	default:
		return // we know what we start
	}
	if s := l.sandbox(id); s != nil {
		if s.Ready && l.ops["remove/"+id] == nil {
			s.Ready = false
			l.o.Stale = true // its containers died with it
		}
		return
	}
	for _, cs := range ev.ContainersStatuses {
		if cs.Id == id && cs.State == runtimeapi.ContainerState_CONTAINER_EXITED && l.container(id) != nil {
			w.update(l, cs)
			return
		}
	}
	w.refresh(l, id)
}
