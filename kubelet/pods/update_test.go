package pods

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/watch"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
)

// ofAPI marks a pod as one of an apiserver.
func ofAPI(p *v1.Pod) { p.Annotations = map[string]string{configSource: "api"} }

func deleted(p *v1.Pod, grace int64) *v1.Pod {
	p = p.DeepCopy()
	now := metav1.Now()
	p.DeletionTimestamp, p.DeletionGracePeriodSeconds = &now, &grace
	return p
}

// drain takes the events that have come by now.
func drain(events <-chan watch.Event) (all []watch.Event) {
	for {
		synctest.Wait()
		select {
		case ev := <-events:
			all = append(all, ev)
		default:
			return all
		}
	}
}

func containerStatusOf(p *v1.Pod, name string) *v1.ContainerStatus {
	for _, list := range [][]v1.ContainerStatus{p.Status.ContainerStatuses, p.Status.InitContainerStatuses, p.Status.EphemeralContainerStatuses} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return &v1.ContainerStatus{}
}

// TestRestartAllContainers: one container ends with the code, everything else
// of the pod starts anew, and the status tells of it.
func TestRestartAllContainers(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.rt.ends = func(c *runtimeapi.ContainerConfig) (time.Duration, int32, bool) {
			return time.Second, 0, c.Metadata.Name == "init1"
		}
		pod := mkpod("web", "u1", never, withInit("init1", "side"), two)
		restartsAll(&pod.Spec.Containers[0])
		n.table.SetPod("file", pod)
		n.table.Synced("file")
		after(10 * time.Second)
		if !n.ready("web") {
			t.Fatalf("status: %+v", n.get("web").Status)
		}
		live := n.rt.live("default/web")
		n.rt.onTerm = func(*runtimeapi.ContainerConfig) time.Duration { return time.Second }
		n.rt.exit(live["a"].id, 42)
		after(time.Second / 2)
		p := n.get("web")
		if c := condition(p, v1.AllContainersRestarting); c == nil || c.Status != v1.ConditionTrue || c.Reason != "RestartAllContainersStarted" {
			t.Errorf("condition on the way: %+v", c)
		}
		if p.Status.Phase != v1.PodRunning || podutil.IsPodReady(p) {
			t.Errorf("on the way: phase %s, ready %v", p.Status.Phase, podutil.IsPodReady(p))
		}
		after(10 * time.Second)
		p = n.get("web")
		if !n.ready("web") || p.Status.Phase != v1.PodRunning {
			t.Fatalf("not ready again: %+v", p.Status)
		}
		if c := condition(p, v1.AllContainersRestarting); c == nil || c.Status != v1.ConditionFalse {
			t.Errorf("condition at the end: %+v", c)
		}
		for _, name := range []string{"init1", "side", "a", "b"} {
			s := containerStatusOf(p, name)
			if n.rt.starts("default/web/"+name) != 2 || s.RestartCount != 1 || s.LastTerminationState.Terminated == nil ||
				s.LastTerminationState.Terminated.Reason != "RestartingAllContainers" {
				t.Errorf("%s: %d starts, %+v", name, n.rt.starts("default/web/"+name), s)
			}
		}
		if n.rt.count("sandboxes") != 1 || n.rt.count("containers") != 4 {
			t.Errorf("%d sandboxes, %d containers", n.rt.count("sandboxes"), n.rt.count("containers"))
		}
		// Again: the source waits for its back-off, the others do not.
		n.rt.exit(n.rt.live("default/web")["a"].id, 42)
		after(5 * time.Second)
		if s := containerStatusOf(n.get("web"), "a"); s.State.Waiting == nil || s.State.Waiting.Reason != "CrashLoopBackOff" || n.rt.starts("default/web/b") != 3 {
			t.Errorf("no back-off: %+v", s)
		}
		n.crash()
		n.start()
		n.table.SetPod("file", pod)
		n.table.Synced("file")
		after(time.Minute)
		if !n.ready("web") || n.rt.starts("default/web/a") != 3 || n.rt.starts("default/web/b") != 3 {
			t.Errorf("after a restart of the daemon: %d and %d starts", n.rt.starts("default/web/a"), n.rt.starts("default/web/b"))
		}
		n.table.RemovePod("file", "u1")
		after(time.Minute)
		n.empty()
	})
}

func TestDeletionTimestampEndsThePod(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.rt.onTerm = func(*runtimeapi.ContainerConfig) time.Duration { return time.Hour }
		pod := mkpod("web", "u1", ofAPI)
		n.table.SetPod("api", pod)
		n.table.Synced("file")
		after(time.Second)
		begin := time.Now()
		n.table.SetPod("api", deleted(pod, 30))
		after(10 * time.Second)
		n.table.SetPod("api", deleted(pod, 30)) // told again: the clock runs on
		after(time.Second)
		if p := n.get("web"); p.DeletionTimestamp == nil || *p.DeletionGracePeriodSeconds != 30 {
			t.Errorf("it does not say that it goes: %+v", p.ObjectMeta)
		}
		after(20 * time.Second)
		n.empty()
		if took := time.Since(begin); took > 32*time.Second {
			t.Errorf("took %s", took)
		}
		// Forced.
		pod = mkpod("web", "u2", ofAPI)
		n.table.SetPod("api", pod)
		after(time.Second)
		n.table.SetPod("api", deleted(pod, 3600))
		after(time.Minute)
		n.table.SetPod("api", deleted(pod, 0))
		after(4 * time.Second)
		n.empty()
		// One that the node never saw is gone at once, and said to be.
		events := n.table.Watch(t.Context(), n.table.ResourceVersion())
		n.table.SetPod("api", deleted(mkpod("web", "u3", ofAPI), 30))
		after(time.Second)
		n.empty()
		var last string
		for _, ev := range drain(events) {
			last = string(ev.Type)
		}
		if last != "DELETED" || n.rt.starts("default/web/a") != 2 {
			t.Errorf("last event %s, %d starts", last, n.rt.starts("default/web/a"))
		}
	})
}

func TestFinishedPodsOfAnAPIAreNotRunAgain(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		pod := mkpod("job", "u1", ofAPI, never)
		pod.Status = v1.PodStatus{Phase: v1.PodSucceeded, ContainerStatuses: []v1.ContainerStatus{{
			Name: "a", State: v1.ContainerState{Terminated: &v1.ContainerStateTerminated{Reason: "Completed"}},
		}}}
		n.table.SetPod("api", pod)
		n.table.Synced("file")
		after(time.Minute)
		p := n.get("job")
		if p.Status.Phase != v1.PodSucceeded || containerStatusOf(p, "a").State.Terminated == nil || n.rt.starts("default/job/a") != 0 {
			t.Errorf("status: %+v", p.Status)
		}
		n.table.RemovePod("api", "u1")
		after(time.Minute)
		n.empty()
	})
}

func TestEphemeralContainersComeLater(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		pod := mkpod("web", "u1", ofAPI)
		n.table.SetPod("api", pod)
		n.table.Synced("file")
		after(time.Second)
		pod = pod.DeepCopy()
		pod.Generation++
		pod.Spec.EphemeralContainers = []v1.EphemeralContainer{{
			EphemeralContainerCommon: v1.EphemeralContainerCommon{Name: "dbg", Image: "img:1"}, TargetContainerName: "a",
		}}
		n.table.SetPod("api", pod)
		after(time.Second)
		if live := n.rt.live("default/web"); live["dbg"] == nil || n.rt.starts("default/web/a") != 1 {
			t.Fatalf("not started: %v", live)
		}
		if s := containerStatusOf(n.get("web"), "dbg"); s.State.Running == nil {
			t.Errorf("status: %+v", s)
		}
		n.rt.exit(n.rt.live("default/web")["dbg"].id, 1)
		after(time.Minute)
		if n.rt.starts("default/web/dbg") != 1 || !n.ready("web") {
			t.Error("it was started again, or took the pod's readiness")
		}
	})
}

func TestImageChangeReplacesTheContainer(t *testing.T) {
	for _, policy := range []v1.RestartPolicy{v1.RestartPolicyAlways, v1.RestartPolicyOnFailure, v1.RestartPolicyNever} {
		t.Run(string(policy), func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				pod := mkpod("web", "u1", ofAPI, two, withInit("init1"))
				pod.Spec.RestartPolicy = policy
				n.rt.ends = func(c *runtimeapi.ContainerConfig) (time.Duration, int32, bool) {
					return 20 * time.Second, 0, c.Metadata.Name == "init1"
				}
				n.table.SetPod("api", pod)
				n.table.Synced("file")
				after(10 * time.Second)
				// While the init container runs nothing of it restarts.
				next := pod.DeepCopy()
				next.Generation = 2
				next.Spec.InitContainers[0].Image, next.Spec.Containers[1].Image = "img:2", "img:2"
				n.table.SetPod("api", next)
				after(20 * time.Second)
				if n.rt.starts("default/web/init1") != 1 || n.rt.live("default/web")["b"].cfg.Image.UserSpecifiedImage != "img:2" {
					t.Error("the init container restarted, or the regular one has the old image")
				}
				if s := containerStatusOf(n.get("web"), "init1"); s.Image != "img:1" {
					t.Errorf("init container's image: %s", s.Image)
				}
				next = next.DeepCopy()
				next.Generation = 3
				next.Spec.Containers[0].Image, next.Spec.InitContainers[0].Image = "img:2", "img:1"
				n.table.SetPod("api", next)
				after(20 * time.Second)
				if n.rt.starts("default/web/a") != 2 || n.rt.starts("default/web/b") != 1 || n.rt.starts("default/web/init1") != 1 || !n.ready("web") {
					t.Errorf("starts: a %d, b %d", n.rt.starts("default/web/a"), n.rt.starts("default/web/b"))
				}
				// During its end nothing starts any more.
				last := deleted(next, 30)
				n.rt.onTerm = func(*runtimeapi.ContainerConfig) time.Duration { return 20 * time.Second }
				n.table.SetPod("api", last)
				after(time.Second)
				last = last.DeepCopy()
				last.Generation, last.Spec.Containers[0].Image = 4, "img:1"
				n.table.SetPod("api", last)
				after(time.Minute)
				if n.rt.starts("default/web/a") != 2 {
					t.Error("it was restarted while it ended")
				}
				n.empty()
			})
		})
	}
}

// TestPostStartThatWasCutOffRunsAgain: a daemon that is killed while a hook
// runs runs it once more, and one that has seen it end does not.
func TestPostStartThatWasCutOffRunsAgain(t *testing.T) {
	for _, recorded := range []time.Duration{0, time.Second} {
		t.Run(recorded.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				calls := 0
				n.rt.exec = func(ctx context.Context, _ string, _ []string) (int32, error) {
					calls++
					select {
					case <-ctx.Done():
						return 0, ctx.Err()
					case <-time.After(30 * time.Second):
						return 0, nil
					}
				}
				pod := mkpod("web", "u1", func(p *v1.Pod) {
					p.Spec.Containers[0].Lifecycle = &v1.Lifecycle{PostStart: &v1.LifecycleHandler{Exec: &v1.ExecAction{Command: []string{"hook"}}}}
				})
				n.table.SetPod("file", pod)
				n.table.Synced("file")
				after(time.Millisecond + recorded)
				if calls != 1 || n.ready("web") {
					t.Fatalf("%d hooks, ready %v", calls, n.ready("web"))
				}
				again := func() {
					n.crash()
					n.start()
					n.table.SetPod("file", pod.DeepCopy())
					n.table.Synced("file")
				}
				again()
				after(10 * time.Second)
				if calls != 2 || n.ready("web") {
					t.Errorf("cut off: %d hooks, ready %v", calls, n.ready("web"))
				}
				after(time.Minute)
				again()
				after(time.Minute)
				if calls != 2 || !n.ready("web") || n.rt.starts("default/web/a") != 1 {
					t.Errorf("at the end: %d hooks, ready %v", calls, n.ready("web"))
				}
			})
		})
	}
}

func TestForbiddenSysctlsRejectThePod(t *testing.T) {
	sysctls := func(names ...string) func(*v1.Pod) {
		return func(p *v1.Pod) {
			p.Spec.SecurityContext = &v1.PodSecurityContext{}
			for _, name := range names {
				p.Spec.SecurityContext.Sysctls = append(p.Spec.SecurityContext.Sysctls, v1.Sysctl{Name: name, Value: "1"})
			}
		}
	}
	host := func(p *v1.Pod) { p.Spec.HostNetwork, p.Spec.HostIPC = true, true }
	s, err := AllowSysctls([]string{"kernel.msg*", "net.core.somaxconn"})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		mods []func(*v1.Pod)
		want string
	}{
		{mods(), ""},
		{mods(sysctls("kernel.shm_rmid_forced", "net/ipv4/tcp_syncookies", "kernel.msgmax", "net.core.somaxconn")), ""},
		{mods(sysctls("kernel.sem")), `forbidden sysctl: "kernel.sem" not allowlisted`},
		{mods(sysctls("vm.swappiness")), `forbidden sysctl: "vm.swappiness" not allowlisted`},
		{mods(sysctls("net.ipv4.tcp_syncookies"), host), `forbidden sysctl: "net.ipv4.tcp_syncookies" not allowed with host Net enabled`},
		{mods(sysctls("kernel.msgmax"), host), `forbidden sysctl: "kernel.msgmax" not allowed with host IPC enabled`},
	} {
		if err := s.check(mkpod("p", "u", tc.mods...)); err == nil && tc.want != "" || err != nil && err.Error() != tc.want {
			t.Errorf("got %v, want %q", err, tc.want)
		}
	}
	if _, err := AllowSysctls([]string{"vm.*"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a sysctl of no namespace: %v", err)
	}
	bubble(t, func(t *testing.T, n *node) {
		pod := mkpod("web", "u1", sysctls("kernel.sem"))
		n.table.SetPod("file", pod)
		n.table.Synced("file")
		after(time.Minute)
		p := n.get("web")
		if p.Status.Phase != v1.PodFailed || p.Status.Reason != "SysctlForbidden" || p.Status.Message != `Pod was rejected: forbidden sysctl: "kernel.sem" not allowlisted` ||
			n.rt.count("sandboxes") != 0 || !n.events.has(`SysctlForbidden: forbidden sysctl: "kernel.sem" not allowlisted`) {
			t.Errorf("status: %+v, events %v", p.Status, n.events.all)
		}
		// A daemon with other settings is asked again.
		n.stop()
		n.unsafe = []string{"kernel.sem"}
		n.start()
		n.table.SetPod("file", pod)
		n.table.Synced("file")
		after(time.Minute)
		if !n.ready("web") {
			t.Errorf("status: %+v", n.get("web").Status)
		}
		n.table.RemovePod("file", "u1")
		after(time.Minute)
		n.empty()
	})
}

// TestReadinessOfAPodThatEnds: it is probed on during preStop and grace period,
// liveness is not.
func TestReadinessOfAPodThatEnds(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		ending, live := false, 0
		n.rt.exec = func(_ context.Context, _ string, cmd []string) (int32, error) {
			switch {
			case cmd[0] == "live" && ending:
				live++
				return 1, nil
			case cmd[0] == "ready" && ending:
				return 1, nil
			}
			return 0, nil
		}
		probe := func(cmd string) *v1.Probe {
			return &v1.Probe{ProbeHandler: v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{cmd}}}, PeriodSeconds: 1, TimeoutSeconds: 1, FailureThreshold: 1, SuccessThreshold: 1}
		}
		n.rt.onTerm = func(*runtimeapi.ContainerConfig) time.Duration { return time.Hour }
		pod := mkpod("web", "u1", ofAPI, func(p *v1.Pod) {
			c := &p.Spec.Containers[0]
			c.LivenessProbe, c.ReadinessProbe = probe("live"), probe("ready")
			c.Lifecycle = &v1.Lifecycle{PreStop: &v1.LifecycleHandler{Sleep: &v1.SleepAction{Seconds: 20}}}
		})
		n.table.SetPod("api", pod)
		n.table.Synced("file")
		after(5 * time.Second)
		if !n.ready("web") {
			t.Fatal("not ready")
		}
		n.table.SetPod("api", deleted(pod, 60))
		after(2 * time.Second)
		if !n.ready("web") {
			t.Error("it is not ready although its probe says so")
		}
		ending = true
		after(2 * time.Second)
		if n.ready("web") || live != 0 {
			t.Errorf("ready %v, %d liveness probes", n.ready("web"), live)
		}
		n.stop()
		n.start() // another daemon goes on with it
		ending = false
		n.table.SetPod("api", deleted(pod, 60))
		n.table.Synced("file")
		after(5 * time.Second)
		if !n.ready("web") || live != 0 {
			t.Errorf("after a restart: ready %v, %d liveness probes", n.ready("web"), live)
		}
		after(time.Minute)
		n.empty()
	})
}

// TestPhaseOfAPodThatWasDeleted goes by what its regular containers did of the
// order to end, whatever its sidecars do.
func TestPhaseOfAPodThatWasDeleted(t *testing.T) {
	for _, tc := range []struct {
		name          string
		regular, side time.Duration // from SIGTERM to the end
		code          int32         // of the regular one
		want          v1.PodPhase
	}{
		{"both end well", time.Second, time.Second, 0, v1.PodSucceeded},
		{"the sidecar is killed", time.Second, time.Hour, 0, v1.PodSucceeded},
		{"the regular one fails", time.Second, time.Second, 3, v1.PodFailed},
		{"the regular one is killed", time.Hour, time.Second, 0, v1.PodFailed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				n.rt.onTerm = func(c *runtimeapi.ContainerConfig) time.Duration {
					if c.Metadata.Name == "side" {
						return tc.side
					}
					return tc.regular
				}
				n.rt.termCode = tc.code
				pod := mkpod("web", "u1", ofAPI, never, withInit("side"))
				n.table.SetPod("api", pod)
				n.table.Synced("file")
				after(time.Second)
				events := n.table.Watch(t.Context(), n.table.ResourceVersion())
				n.table.SetPod("api", deleted(pod, 10))
				after(time.Minute)
				all := drain(events)
				if len(all) == 0 || all[len(all)-1].Type != watch.Deleted {
					t.Fatalf("%d events, none of them its end", len(all))
				}
				last := all[len(all)-1].Object.(*v1.Pod)
				if last.Status.Phase != tc.want || containerStatusOf(last, "a").State.Terminated == nil || containerStatusOf(last, "side").State.Terminated == nil {
					t.Errorf("phase %s, want %s: %+v", last.Status.Phase, tc.want, last.Status.ContainerStatuses)
				}
				if s := n.rt.stopped(); len(s) != 2 || s[0] != "a" {
					t.Errorf("stopped in the order %v", s)
				}
				n.empty()
			})
		})
	}
}

// TestDeletionInEveryPhase: a pod that is deleted while it begins goes at once
// and leaves nothing.
func TestDeletionInEveryPhase(t *testing.T) {
	for _, during := range []string{"EnsureCgroup", "Setup", "RunPodSandbox", "RunPodSandbox!", "PullImage", "CreateContainer", "CreateContainer!", "StartContainer", "StartContainer!", "init", "postStart"} {
		t.Run(during, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *node) {
				reached := make(chan struct{}, 100)
				n.rt.setFault(func(ctx context.Context, call, _ string) error {
					if call != during {
						return nil
					}
					reached <- struct{}{}
					<-ctx.Done() // hangs, and listens
					return ctx.Err()
				})
				n.rt.exec = func(ctx context.Context, _ string, _ []string) (int32, error) {
					reached <- struct{}{}
					<-ctx.Done()
					return 0, ctx.Err()
				}
				pod := mkpod("web", "u1", ofAPI, func(p *v1.Pod) {
					p.Spec.Containers[0].Image = "img:9"
					if during == "init" {
						p.Spec.InitContainers = []v1.Container{container("init1")}
						reached <- struct{}{}
					}
					p.Spec.Containers[0].Lifecycle = &v1.Lifecycle{PostStart: &v1.LifecycleHandler{Exec: &v1.ExecAction{Command: []string{"hook"}}}}
				})
				n.table.SetPod("api", pod)
				n.table.Synced("file")
				after(5 * time.Second)
				if len(reached) == 0 {
					t.Fatal("it never came so far")
				}
				n.table.SetPod("api", deleted(pod, 30))
				after(time.Second)
				n.rt.setFault(nil)
				after(2 * time.Minute)
				n.empty()
			})
		})
	}
}

// TestPreStopOfAContainerThatEndsByItself does not hold up its pod's end.
func TestPreStopOfAContainerThatEndsByItself(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		pod := mkpod("web", "u1", ofAPI, func(p *v1.Pod) {
			p.Spec.Containers[0].Lifecycle = &v1.Lifecycle{PreStop: &v1.LifecycleHandler{Sleep: &v1.SleepAction{Seconds: 60}}}
		})
		n.table.SetPod("api", pod)
		n.table.Synced("file")
		after(time.Second)
		n.table.SetPod("api", deleted(pod, 120))
		after(5 * time.Second)
		n.rt.exit(n.rt.live("default/web")["a"].id, 0)
		after(5 * time.Second)
		n.empty()
	})
}

// TestHTTPHooks: over TLS nobody verifies, and a server that speaks plain HTTP
// is asked so.
func TestHTTPHooks(t *testing.T) {
	var asked []string
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.Path+" "+r.UserAgent()+" "+r.Header.Get("X-A"))
	})
	plain, secure := httptest.NewServer(handler), httptest.NewTLSServer(handler)
	defer plain.Close()
	defer secure.Close()
	for _, tc := range []struct {
		srv    *httptest.Server
		scheme v1.URIScheme
		warns  bool
	}{{plain, v1.URISchemeHTTP, false}, {secure, v1.URISchemeHTTPS, false}, {plain, v1.URISchemeHTTPS, true}} {
		host, port, _ := net.SplitHostPort(tc.srv.Listener.Addr().String())
		asked = nil
		warned := false
		h := &hook{
			pod: mkpod("web", "u1"), c: &v1.Container{Name: "a"}, ip: host, warn: func(reason, _ string) { warned = reason == "LifecycleHTTPFallback" },
			handler: &v1.LifecycleHandler{HTTPGet: &v1.HTTPGetAction{Path: "/echo", Port: intstr.Parse(port), Scheme: tc.scheme, HTTPHeaders: []v1.HTTPHeader{{Name: "X-A", Value: "b"}}}},
		}
		if err := h.run(t.Context()); err != nil || warned != tc.warns || len(asked) != 1 || asked[0] != "/echo kube-lifecycle/1.36 b" {
			t.Errorf("%s to %s: %v, asked %v, warned %v", tc.scheme, tc.srv.URL, err, asked, warned)
		}
	}
}
