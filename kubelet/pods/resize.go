package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/types"
	resourcehelper "k8s.io/component-helpers/resource"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"

	"github.com/podd-runtime/podd/cgroups"
	"github.com/podd-runtime/podd/kubelet/status"
)

// resizing is what a pod's resources should be, and how far that is.
type resizing struct {
	// asked is the pod as its source wants it, when that is not what it has
	// been allocated: life.d.Pod has the allocated resources.
	asked *v1.Pod
	// pending: it cannot be allocated, or not now; progress: it is allocated
	// and on its way to the containers.
	pending, progress *status.Resize
}

// resizable resources are those that change in place; a container is replaced
// for the others.
func resizable(name v1.ResourceName) bool {
	return name == v1.ResourceCPU || name == v1.ResourceMemory
}

// withResources is pod with the CPU and memory that another version of it has;
// pod itself when they are the same.
func withResources(pod, from *v1.Pod) *v1.Pod {
	if sameResources(pod, from) {
		return pod
	}
	out := pod.DeepCopy()
	if out.Spec.Resources != nil && from.Spec.Resources != nil {
		*out.Spec.Resources = keepResizable(*out.Spec.Resources, *from.Spec.Resources)
	}
	have := resourcesOf(from)
	for c := range podutil.ContainerIter(&out.Spec, podutil.InitContainers|podutil.Containers) {
		if r, ok := have[c.Name]; ok {
			c.Resources = keepResizable(c.Resources, r)
		}
	}
	return out
}

// asReported is pod with the resources that its containers had when their status
// was reported last: a resize of it may not have been allocated.
func asReported(pod *v1.Pod) *v1.Pod {
	out := pod.DeepCopy()
	for c := range podutil.ContainerIter(&out.Spec, podutil.InitContainers|podutil.Containers) {
		for _, list := range [][]v1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
			for i := range list {
				if s := &list[i]; s.Name == c.Name && s.Resources != nil {
					c.Resources = keepResizable(c.Resources, *s.Resources)
				}
			}
		}
	}
	return out
}

// keepResizable is r with the CPU and memory of another.
func keepResizable(r, from v1.ResourceRequirements) v1.ResourceRequirements {
	merge := func(r, from v1.ResourceList) v1.ResourceList {
		out := v1.ResourceList{}
		for name, q := range r {
			if !resizable(name) {
				out[name] = q
			}
		}
		for name, q := range from {
			if resizable(name) {
				out[name] = q
			}
		}
		if len(out) == 0 {
			return nil
		}
		return out
	}
	r.Limits, r.Requests = merge(r.Limits, from.Limits), merge(r.Requests, from.Requests)
	return r
}

func sameResources(a, b *v1.Pod) bool {
	return equality.Semantic.DeepEqual(a.Spec.Resources, b.Spec.Resources) &&
		equality.Semantic.DeepEqual(resourcesOf(a), resourcesOf(b))
}

// resourcesOf a pod's containers, by name.
func resourcesOf(pod *v1.Pod) map[string]v1.ResourceRequirements {
	out := map[string]v1.ResourceRequirements{}
	for c := range podutil.ContainerIter(&pod.Spec, podutil.InitContainers|podutil.Containers) {
		out[c.Name] = c.Resources
	}
	return out
}

// allocate the resources that the pod's source asks for, if the node has them.
func (w *worker) allocate(l *life) {
	if l.asked == nil || l.leaving() {
		return
	}
	if l.o.Completed || sameResources(l.asked, l.d.Pod) {
		l.d.Pod, l.asked, l.pending = l.asked, nil, nil
		w.t.admitted.settled(l.d.Pod.UID)
		return
	}
	reason, message := w.t.admitted.resize(w, l.asked, l.outgrown(l.asked), w.t.cfg.Node.Allocatable)
	generation := l.asked.Generation
	if reason != "" {
		was := l.pending
		l.pending = &status.Resize{Reason: reason, Message: message, Generation: generation}
		if was == nil || was.Reason != reason || was.Generation != generation {
			w.event(l, "", v1.EventTypeWarning, "Resize"+reason, "%s", resizeMessage("Pod resize "+reason, l.asked, generation, message))
		}
		return
	}
	if l.o.Resize == StepAbsent {
		l.podActual = l.d.Pod
	}
	for name, r := range resourcesOf(l.d.Pod) {
		if _, known := l.o.Actual[name]; !known {
			l.o.Actual[name] = r // it was made of what was allocated first
		}
	}
	l.d.Pod, l.asked, l.pending = l.asked, nil, nil
	l.o.Resize = StepUnknown
	l.progress = &status.Resize{Generation: generation}
	delete(l.o.Retry, Action{Kind: Resize}.key())
	w.event(l, "", v1.EventTypeNormal, "ResizeStarted", "%s", resizeMessage("Pod resize started", l.d.Pod, generation, ""))
	w.refreshVolumes(l) // limits and requests of the downward API
	w.log.Info("pod resize begins", "uid", l.d.Pod.UID, "generation", generation)
}

// resizeMessage is the text of upstream's events about a resize.
func resizeMessage(prefix string, pod *v1.Pod, generation int64, problem string) string {
	type container struct {
		Name      string                  `json:"name"`
		Resources v1.ResourceRequirements `json:"resources,omitempty"`
	}
	var summary struct {
		InitContainers []container `json:"initContainers,omitempty"`
		Containers     []container `json:"containers,omitempty"`
		Generation     int64       `json:"generation,omitempty"`
		Error          string      `json:"error,omitempty"`
	}
	summary.Generation, summary.Error = generation, problem
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; podutil.IsRestartableInitContainer(c) {
			summary.InitContainers = append(summary.InitContainers, container{c.Name, c.Resources})
		}
	}
	for i := range pod.Spec.Containers {
		summary.Containers = append(summary.Containers, container{pod.Spec.Containers[i].Name, pod.Spec.Containers[i].Resources})
	}
	data, err := json.Marshal(summary)
	if err != nil {
		return prefix
	}
	return prefix + ": " + string(data)
}

// counted is the pod as others must reckon with it: with the greater of what it
// has been allocated and what its containers and its group still have.
func (l *life) counted() *v1.Pod {
	if l.o.Resize == StepAbsent {
		return l.d.Pod
	}
	return l.outgrown(l.d.Pod)
}

// outgrown is pod with the greater requests of its own and those that the life
// has by now.
func (l *life) outgrown(pod *v1.Pod) *v1.Pod {
	has := resourcesOf(l.d.Pod)
	maps.Copy(has, l.o.Actual)
	group := l.d.Pod
	if l.podActual != nil {
		group = l.podActual
	}
	out := pod.DeepCopy()
	if out.Spec.Resources != nil && group.Spec.Resources != nil {
		out.Spec.Resources.Requests = greater(out.Spec.Resources.Requests, group.Spec.Resources.Requests)
	}
	for c := range podutil.ContainerIter(&out.Spec, podutil.InitContainers|podutil.Containers) {
		c.Resources.Requests = greater(c.Resources.Requests, has[c.Name].Requests)
	}
	return out
}

// greater of two requests, for the resources that can be resized.
func greater(a, b v1.ResourceList) v1.ResourceList {
	out := maps.Clone(a)
	for name, q := range b {
		if have := out[name]; resizable(name) && have.Cmp(q) < 0 {
			if out == nil {
				out = v1.ResourceList{}
			}
			out[name] = q
		}
	}
	return out
}

// fits says why the node cannot give a pod what it asks for: never
// (Infeasible), or not beside the pods that have a place now (Deferred).
func fits(pod *v1.Pod, placed map[types.UID]*v1.Pod, allocatable v1.ResourceList) (reason, message string) {
	want := resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{})
	others := map[v1.ResourceName]int64{}
	for uid, p := range placed {
		if uid == pod.UID {
			continue
		}
		requests := resourcehelper.PodRequests(p, resourcehelper.PodResourcesOptions{})
		for _, name := range []v1.ResourceName{v1.ResourceCPU, v1.ResourceMemory} {
			q := requests[name]
			others[name] += q.MilliValue()
		}
	}
	for _, name := range []v1.ResourceName{v1.ResourceCPU, v1.ResourceMemory} {
		capacity, known := allocatable[name]
		if !known {
			continue
		}
		q := want[name]
		value := func(milli int64) int64 { // in the units of upstream's messages
			if name == v1.ResourceCPU {
				return milli
			}
			return milli / 1000
		}
		switch {
		case q.MilliValue() > capacity.MilliValue():
			return v1.PodReasonInfeasible, fmt.Sprintf("Node didn't have enough capacity: %s, requested: %d, capacity: %d", name, value(q.MilliValue()), value(capacity.MilliValue()))
		case q.MilliValue()+others[name] > capacity.MilliValue():
			reason, message = v1.PodReasonDeferred, fmt.Sprintf("Node didn't have enough resource: %s, requested: %d, used: %d, capacity: %d",
				name, value(q.MilliValue()), value(others[name]), value(capacity.MilliValue()))
		}
	}
	return reason, message
}

// reallocate tries a resize again that waits for what others leave.
func (w *worker) reallocate(uid types.UID) {
	for _, l := range w.lives {
		if l.d.Pod.UID == uid && l.pending != nil {
			w.allocate(l)
		}
	}
}

// runResize does one pass of the plan's resize.
func (w *worker) runResize(l *life) {
	pod, was := l.d.Pod, l.podActual
	actual := maps.Clone(l.o.Actual)
	live := map[string]string{} // ids of running containers
	for i := range l.o.Containers {
		if c := &l.o.Containers[i]; c.State == status.Running && l.o.newest(c.Name) == c {
			live[c.Name] = c.ID
		}
	}
	sandbox := ""
	if s := l.o.current(); s != nil {
		sandbox = s.ID
	}
	r := &resizer{w: w, pod: pod, was: was, live: live, actual: actual, sandbox: sandbox}
	w.async(l, Action{Kind: Resize}, 2*w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		left, err := r.run(ctx)
		return func() {
			if l.d.Pod != pod {
				return // resized once more meanwhile
			}
			for name := range r.updated {
				l.o.Actual[name] = r.actual[name]
			}
			defer w.recount(l)
			if err != nil {
				w.resizeFailed(l, err)
				return
			}
			l.o.Resize = StepDone
			if left == 0 {
				l.o.Resize, l.podActual = StepAbsent, nil
				if g := l.progress; g != nil {
					w.event(l, "", v1.EventTypeNormal, "ResizeCompleted", "%s", resizeMessage("Pod resize completed", pod, g.Generation, ""))
				}
				l.progress = nil
			}
		}, err
	})
}

// recount gives back what a resize has left.
func (w *worker) recount(l *life) {
	if !l.o.Completed && !l.leaving() {
		w.t.admitted.keeps(l.counted())
	}
}

func (w *worker) resizeFailed(l *life, err error) {
	g := l.progress
	if g == nil {
		g = &status.Resize{Generation: l.d.Pod.Generation}
	}
	if g.Message != err.Error() {
		w.event(l, "", v1.EventTypeWarning, "ResizeError", "%s", resizeMessage("Pod resize error", l.d.Pod, g.Generation, err.Error()))
	}
	l.progress = &status.Resize{Reason: v1.PodReasonError, Message: err.Error(), Generation: g.Generation}
}

// resizer is one pass over a pod's group and containers.
type resizer struct {
	w        *worker
	pod, was *v1.Pod
	live     map[string]string
	sandbox  string
	actual   map[string]v1.ResourceRequirements
	updated  map[string]bool
}

// run widens the group, updates what need not restart, those that shrink
// first, and narrows the group when no running container has the old
// resources. left is how many have.
func (r *resizer) run(ctx context.Context) (left int, err error) {
	if err := r.check(ctx); err != nil {
		return 0, err
	}
	opts := r.w.t.cfg.Node.Resources
	narrow := cgroups.ResourceConfigForPod(r.pod, opts)
	wide := narrow
	if r.was != nil {
		wide = cgroups.Widest(narrow, cgroups.ResourceConfigForPod(r.was, opts))
	}
	if err := r.group(ctx, wide); err != nil {
		return 0, err
	}
	r.updated = map[string]bool{}
	for _, shrink := range []bool{true, false} {
		for c := range podutil.ContainerIter(&r.pod.Spec, podutil.InitContainers|podutil.Containers) {
			id, running := r.live[c.Name]
			kind := resizeOf(c, r.actual)
			if kind == resizeNone && inherits(c, r.was, r.pod) {
				kind = resizeUpdate
			}
			if !running || kind != resizeUpdate || shrink != shrinks(r.actual[c.Name], c.Resources) {
				continue
			}
			linux := cgroups.ResourceConfigForContainer(r.pod, c, opts)
			linux.OomScoreAdj = 0 // is as it was
			_, err := r.w.t.deps.Runtime.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: linux})
			if err != nil {
				return 0, fmt.Errorf("update the resources of container %s: %w", c.Name, errors.New(message(err)))
			}
			r.actual[c.Name], r.updated[c.Name] = c.Resources, true
		}
	}
	for c := range podutil.ContainerIter(&r.pod.Spec, podutil.InitContainers|podutil.Containers) {
		if _, running := r.live[c.Name]; running && resizeOf(c, r.actual) != resizeNone {
			left++
		}
	}
	if left > 0 {
		return left, nil
	}
	return 0, r.group(ctx, narrow)
}

// group gives the pod's group its limits and tells the runtime.
func (r *resizer) group(ctx context.Context, limits *specs.LinuxResources) error {
	if r.sandbox != "" {
		_, err := r.w.t.deps.Runtime.UpdatePodSandboxResources(ctx, &runtimeapi.UpdatePodSandboxResourcesRequest{
			PodSandboxId: r.sandbox, Resources: cgroups.ForCRI(limits),
		})
		if err != nil && !errdefs.IsNotImplemented(err) {
			return fmt.Errorf("the runtime rejects the pod's resources: %w", errors.New(message(err)))
		}
	}
	return r.w.t.deps.Cgroups.Ensure(ctx, r.pod.UID, qos.GetPodQOS(r.pod), limits)
}

// inherits says that a container without a limit of its own has the pod's
// (KEP-2837), and that the two versions of the pod differ in that.
func inherits(c *v1.Container, was, is *v1.Pod) bool {
	if was == nil || was.Spec.Resources == nil || is.Spec.Resources == nil {
		return false
	}
	for _, name := range []v1.ResourceName{v1.ResourceCPU, v1.ResourceMemory} {
		if _, own := c.Resources.Limits[name]; !own && !sameQuantity(was.Spec.Resources.Limits, is.Spec.Resources.Limits, name) {
			return true
		}
	}
	return false
}

func shrinks(was, is v1.ResourceRequirements) bool {
	a, b := was.Limits[v1.ResourceMemory], is.Limits[v1.ResourceMemory]
	return b.Cmp(a) < 0
}

// check refuses limits that are below what is in use: the kernel would kill.
func (r *resizer) check(ctx context.Context) error {
	var problems []error
	if limit, decreases := r.podLimit(); decreases {
		used := uint64(0)
		for name, id := range r.live {
			n, err := r.used(ctx, name, id)
			if err != nil {
				return err
			}
			used += n
		}
		if used >= uint64(limit) {
			problems = append(problems, fmt.Errorf("attempting to set pod memory limit (%d) below current usage (%d)", limit, used))
		}
	}
	for c := range podutil.ContainerIter(&r.pod.Spec, podutil.InitContainers|podutil.Containers) {
		id, running := r.live[c.Name]
		limit, limited := c.Resources.Limits[v1.ResourceMemory]
		had, hadLimit := r.actual[c.Name].Limits[v1.ResourceMemory]
		if !running || !limited || resizeOf(c, r.actual) != resizeUpdate || hadLimit && limit.Cmp(had) >= 0 {
			continue
		}
		used, err := r.used(ctx, c.Name, id)
		if err != nil {
			return err
		}
		if used >= uint64(limit.Value()) {
			problems = append(problems, fmt.Errorf("attempting to set container %q memory limit (%d) below current usage (%d)", c.Name, limit.Value(), used))
		}
	}
	if problems == nil {
		return nil
	}
	return fmt.Errorf("cannot decrease memory limits: %w", errors.Join(problems...))
}

// podLimit is the pod's own memory limit in bytes, and whether it is to shrink.
func (r *resizer) podLimit() (limit int64, decreases bool) {
	if r.was == nil || r.was.Spec.Resources == nil || r.pod.Spec.Resources == nil {
		return 0, false
	}
	want, limited := r.pod.Spec.Resources.Limits[v1.ResourceMemory]
	have, had := r.was.Spec.Resources.Limits[v1.ResourceMemory]
	return want.Value(), limited && (!had || want.Cmp(have) < 0)
}

// used is a container's memory in bytes.
func (r *resizer) used(ctx context.Context, name, id string) (uint64, error) {
	resp, err := r.w.t.deps.Runtime.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
	if err != nil {
		return 0, fmt.Errorf("unable to read memory usage of container %q: %w", name, errors.New(message(err)))
	}
	return resp.GetStats().GetMemory().GetUsageBytes().GetValue(), nil
}
