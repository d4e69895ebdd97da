package pods

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
)

func sized(cpu, memory string) func(*v1.Pod) {
	return func(p *v1.Pod) { p.Spec.Containers[0].Resources = sizes(cpu, memory) }
}

// resized is the next generation of a pod, with other resources.
func resized(p *v1.Pod, cpu, memory string) *v1.Pod {
	p = p.DeepCopy()
	p.Generation++
	sized(cpu, memory)(p)
	return p
}

func condition(p *v1.Pod, t v1.PodConditionType) *v1.PodCondition {
	_, c := podutil.GetPodCondition(&p.Status, t)
	return c
}

func (n *node) takeUpdates() string {
	n.rt.mu.Lock()
	defer n.rt.mu.Unlock()
	u := n.rt.updates
	n.rt.updates = nil
	return strings.Join(u, ", ")
}

// TestResizeInOrder: a pod's group is never narrower than its containers.
func TestResizeInOrder(t *testing.T) {
	const mib = 1 << 20
	for _, tc := range []struct {
		name        string
		cpu, memory string
		want        string
	}{
		{"up", "2", "128Mi", "pod cpu=200000 memory=134217728, a cpu=200000 memory=134217728, pod cpu=200000 memory=134217728"},
		{"down", "500m", "32Mi", "pod cpu=100000 memory=67108864, a cpu=50000 memory=33554432, pod cpu=50000 memory=33554432"},
		{"both ways", "2", "32Mi", "pod cpu=200000 memory=67108864, a cpu=200000 memory=33554432, pod cpu=200000 memory=33554432"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				n.rt.memory = 16 * mib
				pod := mkpod("web", "u1", ofAPI, sized("1", "64Mi"))
				pod.Generation = 1
				n.table.SetPod("api", pod)
				n.table.Synced("file")
				after(time.Second)
				n.takeUpdates()
				next := resized(pod, tc.cpu, tc.memory)
				n.table.SetPod("api", next)
				after(time.Second)
				if got := n.takeUpdates(); got != tc.want {
					t.Errorf("updates are %s\nwant        %s", got, tc.want)
				}
				p := n.get("web")
				s := containerStatusOf(p, "a")
				if n.rt.starts("default/web/a") != 1 || s.Resources.Limits.Memory().String() != tc.memory || s.AllocatedResources.Cpu().Cmp(resource.MustParse(tc.cpu)) != 0 {
					t.Errorf("status: %+v", s)
				}
				if condition(p, v1.PodResizeInProgress) != nil || condition(p, v1.PodResizePending) != nil || p.Status.ObservedGeneration != 2 {
					t.Errorf("conditions: %+v", p.Status.Conditions)
				}
				found := 0
				for _, e := range n.events.all {
					if strings.HasPrefix(e, "ResizeStarted: Pod resize started: {") || strings.HasPrefix(e, "ResizeCompleted: Pod resize completed: {") {
						found++
					}
				}
				if found != 2 {
					t.Errorf("events: %v", n.events.all)
				}
			})
		})
	}
}

// A container without a limit of its own is bounded by the pod's, and follows it.
func TestResizeOfThePodsOwnLimit(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.rt.memory = 16 << 20
		level := func(memory string) func(*v1.Pod) {
			return func(p *v1.Pod) {
				r := sizes("1", memory)
				p.Spec.Resources = &r
				p.Spec.Containers[0].Resources = v1.ResourceRequirements{}
			}
		}
		pod := mkpod("web", "u1", ofAPI, level("64Mi"))
		n.table.SetPod("api", pod)
		n.table.Synced("file")
		after(time.Second)
		n.takeUpdates()
		next := pod.DeepCopy()
		next.Generation++
		level("32Mi")(next)
		n.table.SetPod("api", next)
		after(time.Second)
		if got, want := n.takeUpdates(), "pod cpu=100000 memory=67108864, a cpu=100000 memory=33554432, pod cpu=100000 memory=33554432"; got != want {
			t.Errorf("updates are %s\nwant        %s", got, want)
		}
		if p := n.get("web"); n.rt.starts("default/web/a") != 1 || condition(p, v1.PodResizeInProgress) != nil || p.Status.Resources.Limits.Memory().String() != "32Mi" {
			t.Errorf("status: %+v", p.Status)
		}

		tiny := next.DeepCopy()
		tiny.Generation++
		level("8Mi")(tiny)
		n.table.SetPod("api", tiny)
		after(time.Second)
		p := n.get("web")
		if c := condition(p, v1.PodResizeInProgress); c == nil || c.Reason != v1.PodReasonError || !strings.Contains(c.Message, "attempting to set pod memory limit (8388608) below current usage (16777216)") {
			t.Errorf("condition: %+v", c)
		}
		if got := n.takeUpdates(); got != "" || p.Status.Resources.Limits.Memory().String() != "32Mi" || p.Status.AllocatedResources.Memory().String() != "8Mi" {
			t.Errorf("updates %q, status: %+v", got, p.Status)
		}
	})
}

func TestResizeByRestart(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		pod := mkpod("web", "u1", ofAPI, never, sized("1", "64Mi"), func(p *v1.Pod) {
			p.Spec.Containers[0].ResizePolicy = []v1.ContainerResizePolicy{{ResourceName: v1.ResourceMemory, RestartPolicy: v1.RestartContainer}}
		})
		n.table.SetPod("api", pod)
		n.table.Synced("file")
		after(time.Second)
		n.table.SetPod("api", resized(pod, "1", "32Mi"))
		after(20 * time.Second)
		p := n.get("web")
		if n.rt.starts("default/web/a") != 2 || n.rt.live("default/web")["a"].cfg.Linux.Resources.MemoryLimitInBytes != 32<<20 {
			t.Errorf("%d starts, %+v", n.rt.starts("default/web/a"), n.rt.live("default/web")["a"].cfg.Linux.Resources)
		}
		if u := n.takeUpdates(); !strings.HasSuffix(u, "pod cpu=100000 memory=33554432") {
			t.Errorf("the group is not narrowed: %s", u)
		}
		if condition(p, v1.PodResizeInProgress) != nil || !podutil.IsPodReady(p) || !n.events.has("Killing: Container a resize requires restart, will be restarted") {
			t.Errorf("conditions: %+v, events %v", p.Status.Conditions, n.events.all)
		}
	})
}

func TestResizeThatDoesNotFit(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		pod := mkpod("web", "u1", ofAPI, sized("1", "64Mi"))
		n.table.SetPod("api", pod)
		other := mkpod("other", "u2", ofAPI, sized("2", "64Mi"))
		n.table.SetPod("api", other)
		n.table.Synced("file")
		after(time.Second)
		n.takeUpdates()
		never := resized(pod, "1000", "64Mi")
		n.table.SetPod("api", never)
		after(time.Second)
		p := n.get("web")
		c := condition(p, v1.PodResizePending)
		if c == nil || c.Reason != v1.PodReasonInfeasible || c.Message != "Node didn't have enough capacity: cpu, requested: 1000000, capacity: 4000" {
			t.Errorf("condition: %+v", c)
		}
		if p.Spec.Containers[0].Resources.Limits.Cpu().String() != "1k" || containerStatusOf(p, "a").AllocatedResources.Cpu().String() != "1" {
			t.Errorf("desired %v, allocated %v", p.Spec.Containers[0].Resources, containerStatusOf(p, "a").AllocatedResources)
		}
		n.table.SetPod("api", resized(never, "3", "64Mi"))
		after(time.Second)
		if c := condition(n.get("web"), v1.PodResizePending); c == nil || c.Reason != v1.PodReasonDeferred {
			t.Errorf("condition: %+v", c)
		}
		if u := n.takeUpdates(); strings.Contains(u, "a ") {
			t.Errorf("resized all the same: %s", u)
		}
		// It gets what another one frees.
		n.table.RemovePod("api", "u2")
		after(time.Minute)
		p = n.get("web")
		if condition(p, v1.PodResizePending) != nil || containerStatusOf(p, "a").Resources.Limits.Cpu().String() != "3" {
			t.Errorf("not resized: %+v", p.Status)
		}
	})
}

// TestResizeFailsAndGoesOn: limits below what is in use are refused and tried
// again; so is what the runtime cannot do; and a new daemon goes on with it.
func TestResizeFailsAndGoesOn(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.rt.memory = 48 << 20
		pod := mkpod("web", "u1", ofAPI, sized("1", "64Mi"))
		pod.Generation = 1
		n.table.SetPod("api", pod)
		n.table.Synced("file")
		after(time.Second)
		next := resized(pod, "1", "32Mi")
		n.table.SetPod("api", next)
		after(time.Second)
		c := condition(n.get("web"), v1.PodResizeInProgress)
		if c == nil || c.Reason != v1.PodReasonError || !strings.Contains(c.Message, `cannot decrease memory limits: attempting to set container "a" memory limit (33554432) below current usage (50331648)`) {
			t.Errorf("condition: %+v", c)
		}
		if s := containerStatusOf(n.get("web"), "a"); s.Resources.Limits.Memory().String() != "64Mi" || s.AllocatedResources.Memory().String() != "32Mi" {
			t.Errorf("status: %+v", s)
		}
		n.stop()
		n.rt.memory = 1 << 20
		n.rt.setFault(func(_ context.Context, call, _ string) error {
			if call == "UpdateContainerResources" {
				return errors.New("not now")
			}
			return nil
		})
		n.start()
		n.table.SetPod("api", next)
		n.table.Synced("file")
		after(time.Minute)
		if c := condition(n.get("web"), v1.PodResizeInProgress); c == nil || c.Message != "update the resources of container a: not now" {
			t.Errorf("condition: %+v", c)
		}
		n.rt.setFault(nil)
		after(2 * time.Minute)
		if p := n.get("web"); condition(p, v1.PodResizeInProgress) != nil || containerStatusOf(p, "a").Resources.Limits.Memory().String() != "32Mi" || n.rt.starts("default/web/a") != 1 {
			t.Errorf("not resized: %+v", p.Status)
		}
	})
}
