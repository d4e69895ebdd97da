package pods

import (
	"context"
	"errors"
	"path/filepath"
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

// A record is no more than a memory: a daemon
// that has lost all of them disturbs no container of any pod.
func TestLostRecordsDisturbNoPod(t *testing.T) {
	for name, mod := range map[string]func(*v1.Pod){
		"burstable":  sized("1", "64Mi"),
		"guaranteed": func(p *v1.Pod) { sized("1", "64Mi")(p) },
		"init and sidecar": func(p *v1.Pod) {
			p.Spec.InitContainers = []v1.Container{container("first"), sidecar("side")}
			p.Spec.Containers = append(p.Spec.Containers, container("b"))
		},
		"host network": func(p *v1.Pod) {
			p.Spec.HostNetwork = true
			p.Spec.Containers[0].Ports = []v1.ContainerPort{{ContainerPort: 80, HostPort: 80, Protocol: v1.ProtocolTCP}}
			p.Spec.Hostname, p.Spec.Volumes = "x", []v1.Volume{{Name: "v"}}
		},
		"an ephemeral container": func(p *v1.Pod) {
			p.Spec.EphemeralContainers = []v1.EphemeralContainer{{EphemeralContainerCommon: v1.EphemeralContainerCommon(container("debug"))}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				n.rt.ends = func(c *runtimeapi.ContainerConfig) (time.Duration, int32, bool) {
					return 0, 0, c.Metadata.Name == "first"
				}
				pod := mkpod("web", "u1", ofAPI, mod)
				if name == "burstable" {
					pod.Spec.Containers[0].Resources.Limits = nil
				}
				n.set(pod)
				after(10 * time.Second)
				n.crash()
				n.wipeRecords()
				n.start()
				ctx, cancel := context.WithCancel(t.Context())
				told := n.story(ctx, "web")
				n.set(pod)
				after(time.Minute)
				for _, c := range []string{"a", "b", "first", "side", "debug"} {
					if k := n.rt.starts("default/web/" + c); k > 1 {
						t.Errorf("container %s was started %d times", c, k)
					}
				}
				if !n.ready("web") {
					t.Errorf("status %+v", n.get("web").Status)
				}
				cancel()
				for _, ev := range <-told {
					if p := ev.Object.(*v1.Pod); ev.Type == watch.Deleted || p.DeletionTimestamp != nil {
						t.Errorf("told: %s %v", ev.Type, p.DeletionTimestamp)
					}
				}
			})
		})
	}
}

// A new image that came while the record was lost is carried out all the same.
func TestNewImageOfAPodWithoutARecord(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		pod := mkpod("web", "u1", ofAPI)
		pod.Spec.Containers = append(pod.Spec.Containers, container("b"))
		n.set(pod)
		after(5 * time.Second)
		n.crash()
		n.wipeRecords()
		n.start()
		next := pod.DeepCopy()
		next.Spec.Containers[0].Image = "img:2"
		n.set(next)
		after(time.Minute)
		if a, b := n.rt.starts("default/web/a"), n.rt.starts("default/web/b"); a != 2 || b != 1 || !n.ready("web") {
			t.Errorf("a started %d times, b %d times; ready %v", a, b, n.ready("web"))
		}
	})
}

// kill -9 before the record of a pod that is gone was removed: its successor
// runs, and nobody is told that it does not, whatever the clock says.
func TestRecordOfAPodThatIsGoneHarmsNoSuccessor(t *testing.T) {
	for _, clock := range []time.Duration{-time.Hour, time.Hour} {
		bubble(t, func(t *testing.T, n *node) {
			old := mkpod("web", "u1", ofAPI)
			n.rt.onTerm = func(*runtimeapi.ContainerConfig) time.Duration { return time.Second }
			n.set(old)
			after(5 * time.Second)
			n.table.SetPod("file", deleted(old, 5))
			after(500 * time.Millisecond)
			path := filepath.Join(n.dir, "records", "u1.json")
			r, err := readRecord(path)
			if err != nil || r.Stop == nil {
				t.Fatalf("%+v, %v", r, err)
			}
			after(time.Minute)
			next := mkpod("web", "u2", ofAPI)
			n.set(next)
			after(5 * time.Second)
			n.crash()
			r.Started = time.Now().Add(clock)
			if err := n.table.records.write("u1", r); err != nil {
				t.Fatal(err)
			}
			n.start()
			ctx, cancel := context.WithCancel(t.Context())
			told := n.story(ctx, "web")
			n.set(next)
			after(time.Minute)
			cancel()
			for _, ev := range <-told {
				if p := ev.Object.(*v1.Pod); p.UID == "u2" && (ev.Type == watch.Deleted || p.DeletionTimestamp != nil) {
					t.Errorf("of the successor was told: %s %v", ev.Type, p.DeletionTimestamp)
				}
			}
			if k := n.rt.starts("default/web/a"); k != 2 || !n.ready("web") || n.get("web").UID != "u2" {
				t.Errorf("%d starts, %+v", k, n.get("web").Status)
			}
		})
	}
}

// A pod that an apiserver takes away and gives back under the same UID runs; one
// that was over is over still, though the apiserver has forgotten that.
func TestPodThatComesBackUnderItsUID(t *testing.T) {
	for _, over := range []bool{false, true} {
		for _, crash := range []bool{false, true} {
			bubble(t, func(t *testing.T, n *node) {
				pod := mkpod("web", "u1", ofAPI)
				if over {
					never(pod)
				}
				n.rt.onTerm = func(*runtimeapi.ContainerConfig) time.Duration { return 3 * time.Second }
				n.set(pod)
				after(5 * time.Second)
				if over {
					n.rt.exit(n.rt.live("default/web")["a"].id, 0)
					after(time.Second)
					n.rt.setFault(func(_ context.Context, call, _ string) error {
						if call == "RemoveContainer" {
							return errors.New("not now")
						}
						return nil
					})
				}
				n.table.RemovePod("file", "u1")
				after(time.Second)
				if crash {
					n.crash()
					n.start()
				}
				n.rt.setFault(nil)
				n.set(pod)
				after(5 * time.Minute)
				p := n.get("web")
				if p.DeletionTimestamp != nil {
					t.Errorf("over %v, crash %v: still Terminating", over, crash)
				}
				if k := n.rt.starts("default/web/a"); over && (k != 1 || p.Status.Phase != v1.PodSucceeded) || !over && !n.ready("web") {
					t.Errorf("over %v, crash %v: %d starts, %+v", over, crash, n.rt.starts("default/web/a"), p.Status)
				}
			})
		}
	}
}

// A container that has started, though the call that started it has failed, is
// shown as what it is: the answer was lost, not the container.
func TestStartWhoseAnswerIsLost(t *testing.T) {
	for _, in := range []string{"regular", "init"} {
		bubble(t, func(t *testing.T, n *node) {
			n.rt.ends = func(c *runtimeapi.ContainerConfig) (time.Duration, int32, bool) {
				return time.Second, 0, c.Metadata.Name == "first"
			}
			lost := false
			n.rt.setFault(func(_ context.Context, call, _ string) error {
				if call == "StartContainer!" && !lost {
					lost = true
					return errors.New("connection reset")
				}
				return nil
			})
			pod := mkpod("web", "u1")
			if in == "init" {
				pod.Spec.InitContainers = []v1.Container{container("first")}
			}
			n.set(pod)
			after(time.Minute)
			if st := n.get("web").Status; st.Phase != v1.PodRunning || !n.ready("web") || n.rt.starts("default/web/a") != 1 || n.rt.starts("default/web/first") > 1 {
				t.Errorf("%s: %+v", in, st)
			}
		})
	}
}
