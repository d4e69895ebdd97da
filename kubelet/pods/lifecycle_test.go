package pods

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/watch"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
)

func (n *node) set(p *v1.Pod) {
	n.table.SetPod("file", p)
	n.table.Synced("file")
}

// after d of the bubble's time.
func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestCrashLoopBacksOff(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.rt.ends = func(*runtimeapi.ContainerConfig) (time.Duration, int32, bool) { return time.Second, 3, true }
		n.set(mkpod("web", "u1"))
		// Runs at 0, at once again, then after 10 s, 20 s, 40 s.
		after(5 * time.Second)
		p := n.get("web")
		cs := p.Status.ContainerStatuses[0]
		if cs.State.Waiting == nil || cs.State.Waiting.Reason != "CrashLoopBackOff" ||
			cs.State.Waiting.Message != "back-off 10s restarting failed container=a pod=web_default(u1)" {
			t.Fatalf("state %+v", cs.State)
		}
		if cs.RestartCount != 1 || cs.LastTerminationState.Terminated == nil || cs.LastTerminationState.Terminated.ExitCode != 3 || cs.LastTerminationState.Terminated.Reason != "Error" {
			t.Fatalf("status %+v", cs)
		}
		if p.Status.Phase != v1.PodRunning || podutil.IsPodReady(p) {
			t.Fatalf("phase %s", p.Status.Phase)
		}
		if !n.events.has("BackOff: Back-off restarting failed container a in pod web_default(u1)") {
			t.Errorf("no BackOff event: %v", n.events.all)
		}
		after(90 * time.Second)
		if got := n.rt.starts("default/web/a"); got != 5 {
			t.Fatalf("%d starts in 95 s, want 5", got)
		}
		if n.rt.count("containers") != 2 {
			t.Fatalf("%d instances kept, want the last and the one before", n.rt.count("containers"))
		}
		for _, glob := range []string{"pods/u1/containers/a/*", "log/pods/default_web_u1/a", "log/containers/*"} {
			if m, _ := filepath.Glob(filepath.Join(n.dir, glob)); len(m) > 2 {
				t.Errorf("files of removed instances are left: %v", m)
			}
		}
	})
}

func TestBackoffEndsAfterALongRun(t *testing.T) {
	p := BackoffPolicy{Initial: 10 * time.Second, Max: 300 * time.Second}
	now := time.Unix(1e6, 0)
	b := Backoff{}
	if !p.Until(b, now).Equal(now) {
		t.Fatal("the first failure must restart at once")
	}
	var delays []time.Duration
	for range 7 {
		b = p.Next(b, now, now)
		delays = append(delays, b.Delay/time.Second)
		now = p.Until(b, now)
	}
	if want := []time.Duration{10, 20, 40, 80, 160, 300, 300}; !slices.Equal(delays, want) {
		t.Fatalf("delays %v, want %v", delays, want)
	}
	late := b.Updated.Add(601 * time.Second)
	if !p.Until(b, late).Equal(late) {
		t.Fatal("no reset after ten minutes")
	}
	if b := p.Next(b, late, late); b.Delay != 10*time.Second {
		t.Fatalf("delay %s after reset", b.Delay)
	}
}

func TestRestartPolicies(t *testing.T) {
	for _, tc := range []struct {
		name   string
		policy func(*v1.Pod)
		code   int32
		starts int
		phase  v1.PodPhase
	}{
		{"never, failed", never, 1, 1, v1.PodFailed},
		{"never, done", never, 0, 1, v1.PodSucceeded},
		{"on failure, done", onFailure, 0, 1, v1.PodSucceeded},
		{"on failure, failed", onFailure, 1, 3, v1.PodRunning},
		{"always, done", func(*v1.Pod) {}, 0, 3, v1.PodRunning},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				n.rt.ends = func(*runtimeapi.ContainerConfig) (time.Duration, int32, bool) { return time.Second, tc.code, true }
				n.set(mkpod("web", "u1", tc.policy))
				after(13 * time.Second)
				if got := n.rt.starts("default/web/a"); got != tc.starts {
					t.Errorf("%d starts, want %d", got, tc.starts)
				}
				p := n.get("web")
				if p.Status.Phase != tc.phase {
					t.Errorf("phase %s, want %s", p.Status.Phase, tc.phase)
				}
				if tc.starts == 1 {
					if n.vols.count()+n.groups.count() != 0 {
						t.Error("a completed pod keeps volumes or cgroup")
					}
					if s := p.Status.ContainerStatuses[0].State.Terminated; s == nil || s.ExitCode != tc.code {
						t.Errorf("state %+v", p.Status.ContainerStatuses[0].State)
					}
				}
				// A completed pod stays completed over a restart of the daemon.
				n.stop()
				n.start()
				n.set(mkpod("web", "u1", tc.policy))
				after(time.Second)
				if got := n.rt.starts("default/web/a"); got != tc.starts {
					t.Errorf("%d starts after a restart of the daemon, want %d", got, tc.starts)
				}
				if p := n.get("web"); p.Status.Phase != tc.phase {
					t.Errorf("phase %s after a restart of the daemon, want %s", p.Status.Phase, tc.phase)
				}
			})
		})
	}
}

// A container that failed for good has ended, whatever its start ran into: it
// does not wait for anything.
func TestFailedForGoodIsTerminated(t *testing.T) {
	for _, tc := range []struct {
		name   string
		policy func(*v1.Pod)
		hook   bool
		want   string // reason of the state
	}{
		{"start, never", never, false, "StartError"},
		{"start, always", func(*v1.Pod) {}, false, "waiting CrashLoopBackOff"},
		{"hook, never", never, true, "Error"},
		{"hook, always", func(*v1.Pod) {}, true, "waiting CrashLoopBackOff"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				n.rt.exec = func(context.Context, string, []string) (int32, error) { return 9, nil }
				if !tc.hook {
					n.rt.fault = func(_ context.Context, call, id string) error {
						if call != "StartContainer" {
							return nil
						}
						n.rt.mu.Lock()
						defer n.rt.mu.Unlock()
						n.rt.finish(n.rt.containers[id], 128, "StartError")
						return errors.New("exec: no such file or directory")
					}
				}
				n.set(mkpod("web", "u1", tc.policy, func(p *v1.Pod) {
					if tc.hook {
						p.Spec.Containers[0].Lifecycle = &v1.Lifecycle{PostStart: &v1.LifecycleHandler{Exec: &v1.ExecAction{Command: []string{"x"}}}}
					}
				}))
				after(8 * time.Second)
				p := n.get("web")
				s := p.Status.ContainerStatuses[0].State
				got := ""
				switch {
				case s.Waiting != nil:
					got = "waiting " + s.Waiting.Reason
				case s.Terminated != nil:
					got = s.Terminated.Reason
				}
				if got != tc.want {
					t.Errorf("state %q, want %q", got, tc.want)
				}
				if tc.want != "waiting CrashLoopBackOff" && p.Status.Phase != v1.PodFailed {
					t.Errorf("phase %s", p.Status.Phase)
				}
			})
		})
	}
}

func TestInitContainersInOrder(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		var order []string
		n.rt.ends = func(c *runtimeapi.ContainerConfig) (time.Duration, int32, bool) {
			order = append(order, c.Metadata.Name)
			if strings.HasPrefix(c.Metadata.Name, "init") {
				code := int32(0)
				if c.Metadata.Name == "init2" && c.Metadata.Attempt == 0 {
					code = 1
				}
				return 2 * time.Second, code, true
			}
			return 0, 0, false
		}
		n.set(mkpod("web", "u1", func(p *v1.Pod) {
			p.Spec.InitContainers = []v1.Container{container("init1"), container("init2"), sidecar("side")}
		}))
		after(time.Second)
		p := n.get("web")
		if p.Status.Phase != v1.PodPending || p.Status.ContainerStatuses[0].State.Waiting.Reason != "PodInitializing" {
			t.Fatalf("while initialising: %s %+v", p.Status.Phase, p.Status.ContainerStatuses[0].State)
		}
		after(10 * time.Second)
		if want := []string{"init1", "init2", "init2", "side", "a"}; !slices.Equal(order, want) {
			t.Fatalf("order %v, want %v", order, want)
		}
		p = n.get("web")
		if !podutil.IsPodReady(p) || p.Status.Phase != v1.PodRunning {
			t.Fatalf("status %+v", p.Status)
		}
		// The sidecar goes after the regular container.
		n.rt.onTerm = func(c *runtimeapi.ContainerConfig) time.Duration { return time.Second }
		n.table.RemovePod("file", "u1")
		after(10 * time.Second)
		if want := []string{"a", "side"}; !slices.Equal(n.rt.stopped(), want) {
			t.Fatalf("stopped %v, want %v", n.rt.stopped(), want)
		}
		n.empty()
	})
}

func TestSidecarEndsWithTheJob(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.rt.ends = func(c *runtimeapi.ContainerConfig) (time.Duration, int32, bool) {
			return 3 * time.Second, 0, c.Metadata.Name == "a"
		}
		n.set(mkpod("job", "u1", never, func(p *v1.Pod) { p.Spec.InitContainers = []v1.Container{sidecar("side")} }))
		after(10 * time.Second)
		if p := n.get("job"); p.Status.Phase != v1.PodSucceeded || len(n.rt.live("default/job")) != 0 {
			t.Fatalf("phase %s, running %v", p.Status.Phase, n.rt.live("default/job"))
		}
	})
}

func TestInitFailureEndsANeverPod(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.rt.ends = func(*runtimeapi.ContainerConfig) (time.Duration, int32, bool) { return time.Second, 1, true }
		n.set(mkpod("job", "u1", never, func(p *v1.Pod) { p.Spec.InitContainers = []v1.Container{container("init")} }))
		after(10 * time.Second)
		if p := n.get("job"); p.Status.Phase != v1.PodFailed || n.rt.starts("default/job/a") != 0 {
			t.Fatalf("phase %s", p.Status.Phase)
		}
	})
}

func TestReplacedPodStopsFirst(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.rt.onTerm = func(*runtimeapi.ContainerConfig) time.Duration { return 3 * time.Second }
		n.set(mkpod("web", "u1"))
		after(time.Second)
		n.table.SetPod("file", mkpod("web", "u2"))
		n.table.SetPod("file", mkpod("web", "u3")) // u2 must never start
		after(2 * time.Second)
		if n.rt.starts("default/web/a") != 1 {
			t.Fatal("the new pod started before the old one was gone")
		}
		after(5 * time.Second)
		if p := n.get("web"); p.UID != "u3" || !podutil.IsPodReady(p) {
			t.Fatalf("pod %s, %+v", p.UID, p.Status.Conditions)
		}
		if n.rt.starts("default/web/a") != 2 || n.vols.count() != 1 {
			t.Fatalf("%d starts, volumes of %d pods", n.rt.starts("default/web/a"), n.vols.count())
		}
	})
}

func TestSamePodRemovedAndSetAgain(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.set(mkpod("web", "u1"))
		after(time.Second)
		n.table.RemovePod("file", "u1")
		n.table.SetPod("file", mkpod("web", "u1"))
		after(10 * time.Second)
		if n.rt.starts("default/web/a") != 2 || !n.ready("web") {
			t.Fatalf("%d starts", n.rt.starts("default/web/a"))
		}
		if rc := n.get("web").Status.ContainerStatuses[0].RestartCount; rc != 1 {
			t.Fatalf("restart count %d of the same pod, which has run before", rc)
		}
	})
}

func TestChangedImageRestartsOneContainer(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		two := func(p *v1.Pod) { p.Spec.Containers = append(p.Spec.Containers, container("b")) }
		n.set(mkpod("web", "u1", two))
		after(time.Second)
		n.table.SetPod("file", mkpod("web", "u1", two, func(p *v1.Pod) { p.Spec.Containers[1].Image = "img:2" }))
		after(5 * time.Second)
		if n.rt.starts("default/web/a") != 1 || n.rt.starts("default/web/b") != 2 {
			t.Fatalf("starts a %d, b %d", n.rt.starts("default/web/a"), n.rt.starts("default/web/b"))
		}
		if img := n.rt.live("default/web")["b"].cfg.Image.Image; img != "img:2" {
			t.Fatalf("runs %s", img)
		}
		if !n.events.has("Killing: Container b definition changed, will be restarted") {
			t.Errorf("events %v", n.events.all)
		}
		// A probe is not worth a restart.
		n.table.SetPod("file", mkpod("web", "u1", two, func(p *v1.Pod) {
			p.Spec.Containers[1].Image = "img:2"
			p.Spec.Containers[1].ReadinessProbe = &v1.Probe{ProbeHandler: v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{"x"}}}, PeriodSeconds: 1, TimeoutSeconds: 1}
		}))
		after(5 * time.Second)
		if n.rt.starts("default/web/b") != 2 || !n.ready("web") {
			t.Fatalf("starts a %d, b %d", n.rt.starts("default/web/a"), n.rt.starts("default/web/b"))
		}
		// The network is: everything starts anew.
		n.table.SetPod("file", mkpod("web", "u1", two, func(p *v1.Pod) { p.Spec.HostNetwork = true; p.Spec.Containers[1].Image = "img:2" }))
		after(10 * time.Second)
		if n.rt.starts("default/web/a") != 2 || n.rt.starts("default/web/b") != 3 || !n.ready("web") {
			t.Fatalf("starts a %d, b %d", n.rt.starts("default/web/a"), n.rt.starts("default/web/b"))
		}
	})
}

func TestSandboxDies(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.set(mkpod("web", "u1"))
		after(time.Second)
		n.rt.mu.Lock()
		for _, s := range n.rt.sandboxes {
			s.ready = false
			for _, sub := range n.rt.subs {
				sub <- &runtimeapi.ContainerEventResponse{ContainerId: s.id, ContainerEventType: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT}
			}
		}
		n.rt.mu.Unlock()
		after(10 * time.Second)
		if !n.ready("web") || len(n.rt.live("default/web")) != 1 {
			t.Fatalf("status %+v", n.get("web").Status)
		}
		if !n.events.has("SandboxChanged: Pod sandbox changed, it will be killed and re-created.") {
			t.Error("no SandboxChanged event")
		}
		if rc := n.get("web").Status.ContainerStatuses[0].RestartCount; rc != 1 {
			t.Errorf("restart count %d", rc)
		}
	})
}

func TestImagePullFails(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		began := time.Now()
		n.rt.setFault(func(_ context.Context, call, subject string) error {
			if call == "PullImage" && time.Since(began) < 15*time.Second {
				return errors.New("no such host")
			}
			return nil
		})
		n.set(mkpod("web", "u1", func(p *v1.Pod) { p.Spec.Containers[0].Image = "reg.example/x:1" }))
		after(time.Second)
		w := n.get("web").Status.ContainerStatuses[0].State.Waiting
		if w == nil || w.Reason != "ErrImagePull" || w.Message != "no such host" {
			t.Fatalf("waiting %+v", w)
		}
		after(6 * time.Second)
		w = n.get("web").Status.ContainerStatuses[0].State.Waiting
		if w == nil || w.Reason != "ImagePullBackOff" || w.Message != `Back-off pulling image "reg.example/x:1": ErrImagePull: no such host` {
			t.Fatalf("waiting %+v", w)
		}
		after(40 * time.Second)
		if !n.ready("web") {
			t.Fatalf("status %+v", n.get("web").Status)
		}
		for _, e := range []string{`Pulling: Pulling image "reg.example/x:1"`, `Failed: Failed to pull image "reg.example/x:1": no such host`, "Failed: Error: ErrImagePull", "Failed: Error: ImagePullBackOff"} {
			if !n.events.has(e) {
				t.Errorf("no event %q in %q", e, n.events.all)
			}
		}
	})
}

func TestMissingConfigMap(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.set(mkpod("web", "u1", func(p *v1.Pod) {
			p.Spec.Containers[0].EnvFrom = []v1.EnvFromSource{{ConfigMapRef: &v1.ConfigMapEnvSource{LocalObjectReference: v1.LocalObjectReference{Name: "cfg"}}}}
		}))
		after(4 * time.Second)
		w := n.get("web").Status.ContainerStatuses[0].State.Waiting
		if w == nil || w.Reason != "CreateContainerConfigError" || w.Message != `configmap "cfg" not found` {
			t.Fatalf("waiting %+v", w)
		}
		n.objects.mu.Lock()
		n.objects.configMaps["default/cfg"] = &v1.ConfigMap{Data: map[string]string{"K": "v"}}
		n.objects.mu.Unlock()
		n.table.ObjectChanged("default", "cfg")
		after(100 * time.Millisecond)
		if !n.ready("web") {
			t.Fatalf("status %+v", n.get("web").Status)
		}
	})
}

func TestHooks(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		var execs []string
		n.rt.exec = func(ctx context.Context, id string, cmd []string) (int32, error) {
			execs = append(execs, cmd[0])
			if cmd[0] == "bad" {
				return 1, nil
			}
			time.Sleep(2 * time.Second)
			return 0, nil
		}
		hook := func(cmd string) *v1.LifecycleHandler {
			return &v1.LifecycleHandler{Exec: &v1.ExecAction{Command: []string{cmd}}}
		}
		n.set(mkpod("web", "u1", func(p *v1.Pod) {
			p.Spec.Containers[0].Lifecycle = &v1.Lifecycle{PostStart: hook("post"), PreStop: hook("pre")}
		}))
		after(time.Second)
		if s := n.get("web").Status.ContainerStatuses[0]; s.State.Waiting == nil || s.State.Waiting.Reason != "ContainerCreating" {
			t.Fatalf("running before its hook is over: %+v", s.State)
		}
		after(2 * time.Second)
		if !n.ready("web") {
			t.Fatal("not ready after the hook")
		}
		began := time.Now()
		n.rt.onTerm = func(*runtimeapi.ContainerConfig) time.Duration { return time.Hour }
		n.table.RemovePod("file", "u1")
		n.waitGone("web")
		// Grace 5 s in all: 2 s of hook, 3 s until SIGKILL.
		if d := time.Since(began); d < 5*time.Second || d > 6*time.Second {
			t.Errorf("gone after %s, want 5 s", d)
		}
		if !slices.Equal(execs, []string{"post", "pre"}) {
			t.Errorf("execs %v", execs)
		}
		after(time.Second)
		n.empty()

		n.set(mkpod("bad", "u2", func(p *v1.Pod) { p.Spec.Containers[0].Lifecycle = &v1.Lifecycle{PostStart: hook("bad")} }))
		after(100 * time.Millisecond)
		if !n.events.has("FailedPostStartHook: PostStartHook failed: its command exited with 1") {
			t.Errorf("events %v", n.events.all)
		}
	})
}

// A hook that podd-shim did not begin has not failed: it is run when it can be.
func TestHooksThatCouldNotBeBegunAreTriedAgain(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		tries := map[string]int{}
		n.rt.exec = func(ctx context.Context, id string, cmd []string) (int32, error) {
			if tries[cmd[0]]++; tries[cmd[0]] <= 2 {
				return 0, fmt.Errorf("connect to podd-shim: %w", errdefs.ErrUnavailable)
			}
			return 0, nil
		}
		hook := func(cmd string) *v1.LifecycleHandler {
			return &v1.LifecycleHandler{Exec: &v1.ExecAction{Command: []string{cmd}}}
		}
		n.set(mkpod("web", "u1", func(p *v1.Pod) {
			p.Spec.TerminationGracePeriodSeconds = new(int64(30))
			p.Spec.Containers[0].Lifecycle = &v1.Lifecycle{PostStart: hook("post"), PreStop: hook("pre")}
		}))
		after(10 * time.Second)
		if s := n.get("web").Status.ContainerStatuses[0]; !n.ready("web") || s.RestartCount != 0 {
			t.Fatalf("after the third try: %+v", s)
		}
		n.table.RemovePod("file", "u1")
		n.waitGone("web")
		if tries["post"] != 3 || tries["pre"] != 3 {
			t.Errorf("tries: %v", tries)
		}
		for _, e := range []string{"FailedPostStartHook", "FailedPreStopHook"} {
			if n.events.has(e) {
				t.Errorf("told: %s", e)
			}
		}
	})
}

// A stop is of the name: what comes after a pod that is being replaced stays
// down, too, and is what is told to be stopped.
func TestStopHoldsForThePodThatWaitsForItsTurn(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.rt.onTerm = func(*runtimeapi.ContainerConfig) time.Duration { return time.Hour }
		n.set(mkpod("web", "u1"))
		after(5 * time.Second)
		n.set(mkpod("web", "u2")) // its manifest has changed
		after(time.Second)
		if err := n.table.Restart(t.Context(), "default", "web", ""); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "the old one ends within 4s, then the new one starts by itself") {
			t.Errorf("restart: %v", err)
		}
		if !n.table.Waits(t.Context(), "default", "web").Replaced {
			t.Error("nobody is told that it is being replaced")
		}
		if err := n.table.Stop(t.Context(), "default", "web", nil); err != nil {
			t.Fatal(err)
		}
		for range 2 { // when stop answers, and later
			p := n.get("web")
			if p.UID != "u2" || p.Status.Reason != "Stopped" || len(n.rt.live("default/web")) != 0 {
				t.Fatalf("%s runs: %+v", p.UID, p.Status)
			}
			after(time.Minute)
		}
		if err := n.table.Restart(t.Context(), "default", "web", ""); err != nil {
			t.Fatal(err)
		}
		after(10 * time.Second)
		if !n.ready("web") {
			t.Errorf("not started: %+v", n.get("web").Status)
		}
	})
}

// A pod counts as stopped when nothing of it runs, not when it was asked to.
func TestAPodThatStillRunsIsNotStopped(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.rt.onTerm = func(*runtimeapi.ContainerConfig) time.Duration { return time.Hour }
		n.set(mkpod("web", "u1"))
		after(5 * time.Second)
		stopped := make(chan error, 1)
		go func() { stopped <- n.table.Stop(t.Context(), "default", "web", nil) }()
		after(time.Second)
		if s := n.get("web").Status; s.Reason != "Stopping" {
			t.Errorf("while it runs: %s", s.Reason)
		}
		if err := <-stopped; err != nil {
			t.Fatal(err)
		}
		if s := n.get("web").Status; s.Reason != "Stopped" {
			t.Errorf("afterwards: %s", s.Reason)
		}
	})
}

// TestStopOfRetiredWorker: a stop that meets a pod's last moment ends with it.
func TestStopOfRetiredWorker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.start()
		defer n.stop()
		n.set(mkpod("web", "u1"))
		after(5 * time.Second)
		w := n.table.worker("default", "web")
		n.table.RemovePod("file", "u1")
		<-w.ended
		if err := w.await(t.Context(), func(*life) { t.Error("asked a retired worker") }); err != nil {
			t.Error(err)
		}
	})
}

func (n *node) waitGone(name string) {
	for i := 0; i < 600; i++ {
		if _, ok := n.table.Get("default", name); !ok {
			return
		}
		after(100 * time.Millisecond)
	}
	n.t.Fatalf("pod %s does not go", name)
}

func TestActiveDeadline(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		ads := int64(10)
		n.set(mkpod("job", "u1", func(p *v1.Pod) { p.Spec.ActiveDeadlineSeconds = &ads }))
		after(9 * time.Second)
		if !n.ready("job") {
			t.Fatal("not ready")
		}
		after(5 * time.Second)
		p := n.get("job")
		if p.Status.Phase != v1.PodFailed || p.Status.Reason != "DeadlineExceeded" || len(n.rt.live("default/job")) != 0 {
			t.Fatalf("%s %s, runs %v", p.Status.Phase, p.Status.Reason, n.rt.live("default/job"))
		}
	})
}

func TestProbes(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		var healthy sync.Map
		healthy.Store("live", true)
		n.rt.exec = func(_ context.Context, _ string, cmd []string) (int32, error) {
			if ok, _ := healthy.Load(cmd[0]); ok == true {
				return 0, nil
			}
			return 1, nil
		}
		probe := func(cmd string, fails int32) *v1.Probe {
			return &v1.Probe{ProbeHandler: v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{cmd}}}, PeriodSeconds: 1, TimeoutSeconds: 1, SuccessThreshold: 1, FailureThreshold: fails}
		}
		n.set(mkpod("web", "u1", func(p *v1.Pod) {
			c := &p.Spec.Containers[0]
			c.StartupProbe, c.LivenessProbe, c.ReadinessProbe = probe("started", 100), probe("live", 3), probe("ready", 1)
		}))
		after(3 * time.Second)
		if s := n.get("web").Status.ContainerStatuses[0]; *s.Started || s.Ready {
			t.Fatal("started before its startup probe passed")
		}
		healthy.Store("started", true)
		after(2 * time.Second)
		if s := n.get("web").Status.ContainerStatuses[0]; !*s.Started || s.Ready {
			t.Fatalf("status %+v", s)
		}
		healthy.Store("ready", true)
		after(2 * time.Second)
		if !n.ready("web") {
			t.Fatal("not ready")
		}
		// A restart of the daemon does not flap readiness, although the
		// first probes come only after it.
		n.stop()
		n.start()
		ctx, cancel := context.WithCancel(t.Context())
		var seen []bool
		done := make(chan struct{})
		go func() {
			defer close(done)
			for ev := range n.table.Watch(ctx, "") {
				if ev.Type != watch.Deleted {
					seen = append(seen, podutil.IsPodReady(ev.Object.(*v1.Pod)))
				}
			}
		}()
		n.set(mkpod("web", "u1", func(p *v1.Pod) {
			c := &p.Spec.Containers[0]
			c.StartupProbe, c.LivenessProbe, c.ReadinessProbe = probe("started", 100), probe("live", 3), probe("ready", 1)
		}))
		after(5 * time.Second)
		cancel()
		<-done
		if len(seen) == 0 || slices.Contains(seen, false) {
			t.Fatalf("readiness flapped: %v", seen)
		}
		// Three failures of liveness in a row restart the container.
		healthy.Store("live", false)
		after(2 * time.Second)
		if n.rt.starts("default/web/a") != 1 {
			t.Fatal("restarted before the threshold")
		}
		after(3 * time.Second)
		if n.rt.starts("default/web/a") != 2 {
			t.Fatalf("%d starts", n.rt.starts("default/web/a"))
		}
		if !n.events.has("Killing: Container a failed liveness probe, will be restarted") {
			t.Errorf("events %v", n.events.all)
		}
	})
}

func TestDaemonRestartKeepsPods(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.set(mkpod("web", "u1"))
		n.table.SetPod("file", mkpod("old", "u2"))
		after(time.Second)
		id := n.rt.live("default/web")["a"].id
		before := n.get("web")
		n.stop()
		if len(n.rt.live("default/web")) != 1 {
			t.Fatal("the daemon's end took a container with it")
		}
		// While the daemon is away, one container exits.
		n.rt.exit(n.rt.live("default/old")["a"].id, 7)
		n.start()
		after(time.Minute)
		if len(n.rt.live("default/web")) != 1 || n.rt.starts("default/old/a") != 1 {
			t.Fatal("something was done before the source had spoken")
		}
		n.table.SetPod("file", mkpod("web", "u1"))
		n.table.Synced("file")
		after(20 * time.Second)
		if got := n.rt.live("default/web")["a"]; got == nil || got.id != id || n.rt.starts("default/web/a") != 1 {
			t.Fatal("the container was replaced")
		}
		p := n.get("web")
		if !p.Status.StartTime.Equal(before.Status.StartTime) || p.UID != before.UID {
			t.Fatal("start time or UID changed")
		}
		if _, ok := n.table.Get("default", "old"); ok {
			t.Fatal("a pod of no source is still there")
		}
	})
}

func TestLostRecord(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.set(mkpod("web", "u1"))
		after(time.Second)
		n.stop()
		n.wipeRecords()
		n.start()
		n.set(mkpod("web", "u1"))
		after(10 * time.Second)
		if n.rt.starts("default/web/a") != 1 || !n.ready("web") {
			t.Fatalf("%d starts, %+v", n.rt.starts("default/web/a"), n.get("web").Status)
		}
		n.table.RemovePod("file", "u1")
		after(10 * time.Second)
		n.empty()
	})
}

func TestStopAndRestart(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.set(mkpod("web", "u1"))
		n.table.SetPod("file", mkpod("db", "u2"))
		after(time.Second)
		if err := n.table.Stop(t.Context(), "default", "web", nil); err != nil {
			t.Fatal(err)
		}
		if len(n.rt.live("default/web")) != 0 {
			t.Fatal("still running")
		}
		again := func() {
			n.stop()
			n.start()
			n.set(mkpod("web", "u1"))
			n.table.SetPod("file", mkpod("db", "u2"))
			after(5 * time.Second)
		}
		again()
		if len(n.rt.live("default/web")) != 0 || len(n.rt.live("default/db")) != 1 {
			t.Fatal("a stopped pod came back with the daemon")
		}
		if err := n.table.Restart(t.Context(), "default", "web", ""); err != nil {
			t.Fatal(err)
		}
		after(3 * time.Second)
		if !n.ready("web") {
			t.Fatalf("status %+v", n.get("web").Status)
		}
		if err := n.table.StopAll(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if len(n.rt.live("default/web"))+len(n.rt.live("default/db")) != 0 {
			t.Fatal("still running")
		}
		again()
		if !n.ready("web") || !n.ready("db") {
			t.Fatal("stop --all must not outlive the daemon")
		}
		n.rt.ends = nil
		starts := n.rt.starts("default/web/a")
		if err := n.table.Restart(t.Context(), "default", "web", "a"); err != nil {
			t.Fatal(err)
		}
		after(3 * time.Second)
		if n.rt.starts("default/web/a") != starts+1 || !n.ready("web") {
			t.Fatal("container was not restarted")
		}
		if err := n.table.Restart(t.Context(), "default", "web", "nope"); err == nil {
			t.Fatal("restarted a container that is not there")
		}
	})
}

func TestForeignSandboxesAreLeftAlone(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: &runtimeapi.PodSandboxConfig{
			Metadata: &runtimeapi.PodSandboxMetadata{Name: "x", Namespace: "y", Uid: "z"},
			Labels:   map[string]string{"io.kubernetes.pod.uid": "z"},
		}})
		n.stop()
		n.start()
		n.table.Synced("file")
		after(time.Minute)
		if n.rt.count("sandboxes") != 1 {
			t.Fatal("a sandbox of someone else was removed")
		}
	})
}

func TestLostEventIsFoundByTheAudit(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.set(mkpod("web", "u1"))
		after(time.Second)
		n.rt.mu.Lock()
		subs := n.rt.subs
		n.rt.subs = nil
		n.rt.mu.Unlock()
		n.rt.exit(n.rt.live("default/web")["a"].id, 1)
		n.rt.mu.Lock()
		n.rt.subs = subs
		n.rt.mu.Unlock()
		after(2 * time.Minute)
		if n.rt.starts("default/web/a") != 2 {
			t.Fatal("the exit was never noticed")
		}
		if what := n.audit.take(); what != "runtime" {
			t.Errorf("counted: %s", what)
		}
	})
}

func TestSameUIDUnderTwoNames(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.set(mkpod("one", "u1"))
		n.table.SetPod("file", mkpod("two", "u1"))
		after(5 * time.Second)
		if len(n.rt.live("default/one"))+len(n.rt.live("default/two")) != 1 {
			t.Fatal("not exactly one pod of the UID runs")
		}
		n.table.RemovePod("file", "u1")
		after(20 * time.Second)
		n.empty()
	})
}

// A pod that waits to get an image again has it as soon as it is there, by
// whatever way it came; pods that wait for others are not stirred.
func TestImageThatComesWakesThePod(t *testing.T) {
	for name, policy := range map[string]v1.PullPolicy{"ErrImagePull": v1.PullIfNotPresent, "ErrImageNeverPull": v1.PullNever} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				n.rt.setFault(func(_ context.Context, call, subject string) error {
					if call == "PullImage" {
						return errors.New("no such host")
					}
					return nil
				})
				for pod, image := range map[string]string{"web": "app:1", "other": "other:1"} {
					n.set(mkpod(pod, "u-"+pod, func(p *v1.Pod) {
						p.Spec.Containers[0].Image, p.Spec.Containers[0].ImagePullPolicy = image, policy
					}))
				}
				after(2 * time.Minute) // its back-off is long by now
				w := n.get("web").Status.ContainerStatuses[0].State.Waiting
				if w == nil || w.Reason != name && w.Reason != "ImagePullBackOff" {
					t.Fatalf("waiting %+v", w)
				}
				n.rt.mu.Lock()
				n.rt.images["app:1"] = true
				before := n.rt.calls["PullImage"]
				n.rt.mu.Unlock()
				n.table.ImagePresent([]string{"docker.io/library/app:1", "sha256:1"})
				after(2 * time.Second)
				if !n.ready("web") {
					t.Fatalf("it still waits: %+v", n.get("web").Status)
				}
				n.rt.mu.Lock()
				defer n.rt.mu.Unlock()
				if n.rt.calls["PullImage"] != before {
					t.Error("the registry was asked")
				}
			})
		})
	}
}

// Pulls that a registry draws out do not keep other pods from pulling, however
// few may pull at once.
func TestSlowPullsGiveTheirPlaceAway(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.table.limits.pulls = newGate(1, pullPatience)
		n.rt.setFault(func(ctx context.Context, call, subject string) error {
			if call == "PullImage" && strings.HasPrefix(subject, "slow.example/") {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		})
		n.set(mkpod("slow", "u1", func(p *v1.Pod) { p.Spec.Containers[0].Image = "slow.example/x:1" }))
		after(time.Second)
		n.set(mkpod("web", "u2", func(p *v1.Pod) { p.Spec.Containers[0].Image = "reg.example/x:1" }))
		after(pullPatience + 2*time.Second)
		if !n.ready("web") {
			t.Fatalf("it waits for another registry: %+v", n.get("web").Status.ContainerStatuses)
		}
	})
}
