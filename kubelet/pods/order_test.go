package pods

import (
	"context"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/watch"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// story is every status of a pod that a watcher is told.
func (n *node) story(ctx context.Context, name string) <-chan []watch.Event {
	out := make(chan []watch.Event, 1)
	events := n.table.Watch(ctx, "")
	go func() {
		var all []watch.Event
		for ev := range events {
			if p, ok := ev.Object.(*v1.Pod); ok && p.Name == name {
				all = append(all, ev)
			}
		}
		out <- all
	}()
	return out
}

// A container whose start we cancelled has not failed: whatever the runtime
// makes of the cut call, no status says that it has ended, and it is not
// counted as a restart.
func TestStartThatIsCancelledIsNoFailure(t *testing.T) {
	for _, call := range []string{"CreateContainer", "CreateContainer!", "StartContainer"} {
		for _, in := range []string{"regular", "init"} {
			t.Run(call+" "+in, func(t *testing.T) {
				bubble(t, func(t *testing.T, n *node) {
					n.rt.setFault(func(ctx context.Context, what, id string) error {
						if what != call {
							return nil
						}
						<-ctx.Done()
						n.rt.failStart(id)
						return ctx.Err()
					})
					pod := mkpod("web", "u1", ofAPI, never)
					if in == "init" {
						pod.Spec.InitContainers = []v1.Container{container("first")}
					}
					ctx, cancel := context.WithCancel(t.Context())
					told := n.story(ctx, "web")
					n.table.SetPod("file", pod)
					n.table.Synced("file")
					after(time.Second)
					n.table.SetPod("file", deleted(pod, 1))
					after(time.Minute)
					n.empty()
					cancel()
					for _, ev := range <-told {
						st := &ev.Object.(*v1.Pod).Status
						for _, s := range append(st.InitContainerStatuses, st.ContainerStatuses...) {
							if s.State.Waiting == nil || s.LastTerminationState.Terminated != nil || s.RestartCount != 0 {
								t.Errorf("%s: phase %s, %s: %+v", ev.Type, st.Phase, s.Name, s)
							}
						}
					}
				})
			})
		}
	}
}

// failStart is what a runtime does with a container whose start has failed,
// for whatever reason.
func (f *fakeRuntime) failStart(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.containers[id]; c != nil && c.state == runtimeapi.ContainerState_CONTAINER_CREATED {
		f.finish(c, 128, "StartError")
	}
}
