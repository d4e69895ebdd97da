package cri

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/shim"
)

var ctx = context.Background()

func TestPlainLife(t *testing.T) {
	f := newFixture(t)
	pod := f.pod(t, "web")
	st, err := f.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	if st.Status.State != runtimeapi.PodSandboxState_SANDBOX_READY || st.Status.Network.Ip != "10.1.2.3" || st.Status.Network.AdditionalIps[0].Ip != "fd00::3" || !strings.Contains(st.Info["info"], `"pid"`) {
		t.Errorf("sandbox status %v", st)
	}
	resolv, _ := os.ReadFile(filepath.Join(f.etcDir(pod), "resolv.conf"))
	if string(resolv) != "search a.b c\nnameserver 10.0.0.10\noptions ndots:5\n" {
		t.Errorf("resolv.conf %q", resolv)
	}

	id := f.create(t, pod, containerConfig("app"))
	if s := f.status(t, id); s.State != runtimeapi.ContainerState_CONTAINER_CREATED || s.StartedAt != 0 || s.ImageRef != "sha256:aaaa" || s.Image.Image != "example.com/app:1" {
		t.Errorf("created: %v", s)
	}
	if _, err := f.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	if s := f.status(t, id); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING || s.StartedAt == 0 || s.FinishedAt != 0 {
		t.Errorf("running: %v", s)
	}
	if _, err := f.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second start: %v", err)
	}
	if _, err := f.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id[:12], Timeout: 10}); err != nil {
		t.Fatal(err)
	}
	s := f.status(t, id)
	// The image says SIGQUIT (3).
	if s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode != 131 || s.Reason != "Error" || s.FinishedAt < s.StartedAt {
		t.Errorf("stopped: %v", s)
	}
	for range 2 {
		for name, call := range map[string]func() error{
			"StopContainer": func() error {
				_, err := f.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 10})
				return err
			},
			"RemoveContainer": func() error {
				_, err := f.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
				return err
			},
			"StopPodSandbox": func() error {
				_, err := f.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod})
				return err
			},
			"RemovePodSandbox": func() error {
				_, err := f.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
				return err
			},
		} {
			if err := call(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	f.empty(t)
}

// empty checks that nothing of any pod is left anywhere.
func (f *fixture) empty(t *testing.T) {
	t.Helper()
	for _, dir := range []string{
		filepath.Join(f.cfg.RunDir, "netns"), filepath.Join(f.cfg.RunDir, "sandboxes"), filepath.Join(f.cfg.DataDir, "cri", "etc"), filepath.Join(f.cfg.RunDir, "containers"),
		filepath.Join(f.cfg.DataDir, "cri", kindSandbox), filepath.Join(f.cfg.DataDir, "cri", kindContainer),
		filepath.Join(f.cfg.DataDir, "cri", kindSpec), filepath.Join(f.cfg.DataDir, "cri", "volumes"),
	} {
		if left := names(dir); len(left) > 0 {
			t.Errorf("left in %s: %v", dir, left)
		}
	}
	f.shim.mu.Lock()
	defer f.shim.mu.Unlock()
	if len(f.shim.procs) > 0 {
		t.Errorf("processes left: %v", f.shim.procs)
	}
	if len(f.net.attached) > 0 {
		t.Errorf("networks left: %v", f.net.attached)
	}
	if len(f.images.roots) > 0 {
		t.Errorf("root file systems left: %v", f.images.roots)
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	if strings.Contains(string(mounts), f.cfg.RunDir) {
		t.Errorf("mounts left below %s", f.cfg.RunDir)
	}
}

func TestFailedRunLeavesNothingAndNamesTheStage(t *testing.T) {
	for name, c := range map[string]struct {
		arrange func(*fixture)
		stage   string
	}{
		"pause":   {func(f *fixture) { f.shim.fail["CreateSandbox"] = errBoom }, "prepare sandbox files and process"},
		"network": {func(f *fixture) { f.net.fail["Attach"] = errBoom }, "attach network"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			c.arrange(f)
			_, err := f.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig("web")})
			if !errors.Is(err, errBoom) || !strings.Contains(err.Error(), c.stage) {
				t.Errorf("error %v", err)
			}
			f.empty(t)
			f.shim.fail, f.net.fail = map[string]error{}, map[string]error{}
			f.pod(t, "web")
		})
	}
}

func TestFailedCreateLeavesNothing(t *testing.T) {
	f := newFixture(t)
	pod := f.pod(t, "web")
	sb, _ := f.objects.sandbox(pod)
	f.images.fail["MountRootfs"] = errBoom
	req := &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: containerConfig("app"), SandboxConfig: sb.config}
	if _, err := f.CreateContainer(ctx, req); !errors.Is(err, errBoom) || !strings.Contains(err.Error(), "mount root file system") {
		t.Errorf("error %v", err)
	}
	f.images.fail = map[string]error{}
	req.Config.Image.Image = "nowhere"
	if _, err := f.CreateContainer(ctx, req); !errdefs.IsNotFound(err) {
		t.Errorf("unknown image: %v", err)
	}
	if left := names(filepath.Join(f.cfg.RunDir, "containers")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestRetriedRunJoins(t *testing.T) {
	f := newFixture(t)
	gate := make(chan struct{})
	f.shim.block["CreateSandbox"] = gate
	var wg sync.WaitGroup
	ids := make([]string, 3)
	for i := range ids {
		wg.Go(func() {
			r, err := f.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig("web")})
			if err != nil {
				t.Error(err)
			}
			ids[i] = r.GetPodSandboxId()
		})
	}
	eventually(t, "one attempt", func() bool { return f.shim.called("CreateSandbox") == 1 })
	close(gate)
	wg.Wait()
	if ids[0] != ids[1] || ids[1] != ids[2] || f.shim.called("CreateSandbox") != 1 {
		t.Errorf("ids %v from %d attempts", ids, f.shim.called("CreateSandbox"))
	}
	// And once more, after the answer got lost.
	if id := f.pod(t, "web"); id != ids[0] {
		t.Errorf("another sandbox: %s", id)
	}
	if _, err := f.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: ids[0]}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig("web")}); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), ids[0]) {
		t.Errorf("over a stopped sandbox: %v", err)
	}
}

func TestCancelledRunIsUndone(t *testing.T) {
	f := newFixture(t)
	f.shim.block["CreateSandbox"] = make(chan struct{})
	cctx, cancel := context.WithCancel(ctx)
	done := make(chan error)
	go func() {
		_, err := f.RunPodSandbox(cctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig("web")})
		done <- err
	}()
	eventually(t, "attempt runs", func() bool { return f.shim.called("CreateSandbox") == 1 })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "prepare sandbox") {
		t.Errorf("error %v", err)
	}
	f.empty(t) // at once: who called takes away next what it stood on
	f.shim.mu.Lock()
	delete(f.shim.block, "CreateSandbox")
	f.shim.mu.Unlock()
	f.pod(t, "web")
}

func TestStartErrorIsReported(t *testing.T) {
	for _, call := range []string{"Create", "Start"} {
		t.Run(call, func(t *testing.T) {
			f := newFixture(t)
			pod := f.pod(t, "web")
			id := f.create(t, pod, containerConfig("app"))
			f.shim.failing(call, fmt.Errorf("exec /bin/app: %w", errBoom))
			if _, err := f.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); !errors.Is(err, errBoom) {
				t.Errorf("start: %v", err)
			}
			s := f.status(t, id)
			if s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode != 128 || s.Reason != "StartError" || !strings.Contains(s.Message, "boom") {
				t.Errorf("status %v", s)
			}
		})
	}
}

// TestSignalsAndOOMKillsAreNoted: an exit code of 137 does not tell them.
func TestSignalsAndOOMKillsAreNoted(t *testing.T) {
	f := newFixture(t)
	pod := f.pod(t, "web")
	type told struct {
		Signal      int   `json:"signal"`
		OOMKills    int   `json:"oomKills"`
		OOMKilledAt int64 `json:"oomKilledAt"`
	}
	info := func(id string) (i told) {
		t.Helper()
		r, err := f.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(r.Info["info"]), &i); err != nil {
			t.Fatal(err)
		}
		return i
	}
	exited := func(id string) func() bool {
		return func() bool { return f.status(t, id).State == runtimeapi.ContainerState_CONTAINER_EXITED }
	}
	byItself, killed := f.running(t, pod, "itself"), f.running(t, pod, "killed")
	f.shim.exit(byItself, shim.Exit{Code: 137, Known: true})
	f.shim.exit(killed, shim.Exit{Code: 137, Signal: 9, Known: true})
	eventually(t, "both exited", func() bool { return exited(byItself)() && exited(killed)() })
	if a, b := info(byItself), info(killed); a.Signal != 0 || b.Signal != 9 {
		t.Errorf("by itself %+v, killed %+v", a, b)
	}
	goesOn := f.running(t, pod, "on")
	for range 2 {
		f.shim.mu.Lock()
		f.shim.emit(shim.Event{Kind: shim.EventOOM, ID: goesOn})
		f.shim.mu.Unlock()
	}
	eventually(t, "kills noted", func() bool { return info(goesOn).OOMKills == 2 })
	if i := info(goesOn); i.OOMKilledAt == 0 {
		t.Errorf("%+v", i)
	}
}

func TestStopKillsAfterTheTimeout(t *testing.T) {
	f := newFixture(t)
	f.shim.ignoreTerm = true
	id := f.running(t, f.pod(t, "web"), "app")
	cctx, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, err := f.StopContainer(cctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 60}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cut off: %v", err)
	}
	if s := f.status(t, id); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after a cut-off stop: %v", s.State)
	}
	if _, err := f.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 1}); err != nil {
		t.Fatal(err)
	}
	if s := f.status(t, id); s.ExitCode != 137 {
		t.Errorf("exit code %d", s.ExitCode)
	}
	if got := fmt.Sprint(f.shim.signals); got != "[3 9]" {
		t.Errorf("signals %s, want the stop signal once and then SIGKILL", got)
	}
}

func TestExitReasons(t *testing.T) {
	for want, e := range map[string]shim.Exit{
		"Completed": {Known: true}, "Error": {Code: 3, Known: true}, "OOMKilled": {Code: 137, Signal: 9, Known: true, OOMKilled: true}, "Unknown": {Code: 255},
	} {
		t.Run(want, func(t *testing.T) {
			f := newFixture(t)
			id := f.running(t, f.pod(t, "web"), "app")
			f.shim.exit(id, e)
			eventually(t, "exit", func() bool { return f.status(t, id).State == runtimeapi.ContainerState_CONTAINER_EXITED })
			if s := f.status(t, id); s.Reason != want || int(s.ExitCode) != e.Code {
				t.Errorf("%v", s)
			}
		})
	}
}

func TestEventsOnceAndInOrder(t *testing.T) {
	f := newFixture(t)
	cctx, cancel := context.WithCancel(ctx)
	ch := f.Subscribe(cctx)
	pod := f.pod(t, "web")
	id := f.running(t, pod, "app")
	f.shim.exit(id, shim.Exit{Known: true})
	eventually(t, "exit", func() bool { return f.status(t, id).State == runtimeapi.ContainerState_CONTAINER_EXITED })
	if _, err := f.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"pod CONTAINER_CREATED_EVENT", "pod CONTAINER_STARTED_EVENT",
		"app CONTAINER_CREATED_EVENT", "app CONTAINER_STARTED_EVENT", "app CONTAINER_STOPPED_EVENT",
		"pod CONTAINER_STOPPED_EVENT", "app CONTAINER_DELETED_EVENT", "pod CONTAINER_DELETED_EVENT",
	}
	for _, w := range want {
		select {
		case e := <-ch:
			who := map[string]string{pod: "pod", id: "app"}[e.ContainerId]
			if got := who + " " + e.ContainerEventType.String(); got != w {
				t.Errorf("got %s, want %s", got, w)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("no %s", w)
		}
	}
	cancel()
	if e, ok := <-ch; ok {
		t.Errorf("one more: %v", e)
	}
}

func TestSlowSubscriberIsDisconnected(t *testing.T) {
	s := &subscriber{wake: make(chan struct{}, 1)}
	for range maxQueued + 1 {
		s.push(&runtimeapi.ContainerEventResponse{})
	}
	if _, err := s.next(ctx); !errdefs.IsResourceExhausted(err) {
		t.Errorf("%v", err)
	}
}

func TestRestartKeepsAndLearns(t *testing.T) {
	f := newFixture(t)
	pod := f.pod(t, "web")
	runs, ended, lost := f.running(t, pod, "runs"), f.running(t, pod, "ended"), f.running(t, pod, "lost")
	created, caught := f.create(t, pod, containerConfig("created")), f.create(t, pod, containerConfig("caught"))
	// podd dies before it has written that these run: the shim knows.
	f.flusher.forget(runs)
	f.flusher.forget(ended)
	if err := f.Service.Close(); err != nil {
		t.Fatal(err)
	}
	// While podd is away one ends and one is forgotten.
	f.shim.exit(ended, shim.Exit{Code: 7, Known: true})
	f.shim.mu.Lock()
	delete(f.shim.procs, lost)
	// A sandbox and a container in the making have no record.
	stray := newID()
	f.shim.procs[stray] = &shim.Process{ID: stray, State: shim.Running, PID: os.Getpid()}
	f.shim.procs["1"+stray[1:]] = &shim.Process{ID: "1" + stray[1:], SandboxID: stray, State: shim.Created}
	// And one was about to be started.
	f.shim.procs[caught] = &shim.Process{ID: caught, SandboxID: pod, State: shim.Created, PID: os.Getpid()}
	f.shim.mu.Unlock()
	if err := os.WriteFile(filepath.Join(f.cfg.DataDir, "cri", kindContainer, "broken.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.start(t)
	eventually(t, "all events applied", func() bool {
		f.shim.mu.Lock()
		defer f.shim.mu.Unlock()
		return f.seq.Get() == uint64(len(f.shim.log))
	})

	for id, want := range map[string]string{
		runs: "CONTAINER_RUNNING 0 ", ended: "CONTAINER_EXITED 7 Error", lost: "CONTAINER_EXITED 255 Unknown", created: "CONTAINER_CREATED 0 ",
		caught: "CONTAINER_CREATED 0 ", // its init was ended by us, and never ran the program
	} {
		s := f.status(t, id)
		if got := fmt.Sprintf("%v %d %s", s.State, s.ExitCode, s.Reason); got != want {
			t.Errorf("%s: got %q, want %q", s.Metadata.Name, got, want)
		}
	}
	if len(f.shim.procs) != 3 { // pause, runs, ended
		t.Errorf("processes %v", f.shim.procs)
	}
	if _, err := f.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: created}); err != nil {
		t.Errorf("start after a restart: %v", err)
	}
	if _, err := f.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: caught}); err != nil {
		t.Errorf("second start: %v", err)
	}
	if f.shim.specs[created].Spec.Process.Args[0] != "/bin/app" {
		t.Errorf("specification lost: %+v", f.shim.specs[created].Spec.Process)
	}
	// The retried request finds what was made before.
	if id := f.pod(t, "web"); id != pod {
		t.Errorf("another sandbox %s", id)
	}
}

func TestRebootMakesSandboxesNotReady(t *testing.T) {
	f := newFixture(t)
	pod := f.pod(t, "web")
	id := f.running(t, pod, "app")
	created := f.create(t, pod, containerConfig("created"))
	if err := f.Service.Close(); err != nil {
		t.Fatal(err)
	}
	if err := unpin(f.netnsPath(pod)); err != nil {
		t.Fatal(err)
	}
	if err := f.dropSandboxFiles(pod); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(f.cfg.RunDir); err != nil {
		t.Fatal(err)
	}
	f.shim = newFakeShim()
	f.start(t)
	st, err := f.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil || st.Status.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("sandbox %v, %v", st, err)
	}
	for _, id := range []string{id, created} {
		if s := f.status(t, id); s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode != 255 {
			t.Errorf("container %v", s)
		}
	}
	if _, err := f.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Error(err)
	}
	f.empty(t)
}

func TestPauseExitMakesSandboxNotReady(t *testing.T) {
	f := newFixture(t)
	pod := f.pod(t, "web")
	f.shim.exit(pod, shim.Exit{Code: 137, Known: true})
	eventually(t, "not ready", func() bool {
		return len(f.listSandboxes(&runtimeapi.PodSandboxFilter{State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY}})) == 1
	})
	sb, _ := f.objects.sandbox(pod)
	_, err := f.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: containerConfig("app"), SandboxConfig: sb.config})
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("container in a dead sandbox: %v", err)
	}
}

func TestFailedDetachIsRetried(t *testing.T) {
	f := newFixture(t)
	pod := f.pod(t, "web")
	f.running(t, pod, "app")
	f.net.fail["Detach"] = errBoom
	if _, err := f.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); !errors.Is(err, errBoom) {
		t.Errorf("stop: %v", err)
	}
	if _, err := f.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); !errors.Is(err, errBoom) {
		t.Errorf("remove: %v", err)
	}
	delete(f.net.fail, "Detach")
	if _, err := f.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Errorf("remove: %v", err)
	}
	f.empty(t)
}

func TestExecSync(t *testing.T) {
	f := newFixture(t)
	id := f.running(t, f.pod(t, "web"), "app")
	f.shim.exec = func(e *shim.ExecSpec) *shim.Exit {
		fmt.Fprint(e.Stdout, "out")
		fmt.Fprint(e.Stderr, "err")
		return &shim.Exit{Code: 4, Known: true}
	}
	r, err := f.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"x"}})
	if err != nil || string(r.Stdout) != "out" || string(r.Stderr) != "err" || r.ExitCode != 4 {
		t.Errorf("%v, %v", r, err)
	}
	f.shim.exec = func(*shim.ExecSpec) *shim.Exit { return nil }
	if _, err := f.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"x"}, Timeout: 1}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("timeout: %v", err)
	}
	if _, err := f.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no command: %v", err)
	}
}

// What could not be begun has not failed: its caller must be able to tell.
func TestExecThatCouldNotBeBegunIsUnavailable(t *testing.T) {
	f := newFixture(t)
	id := f.running(t, f.pod(t, "web"), "app")
	ask := func(ctx context.Context) error {
		_, err := f.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"x"}, Timeout: 1})
		return err
	}
	f.shim.mu.Lock()
	f.shim.block["Exec"] = make(chan struct{}) // a shim that is stopped
	f.shim.mu.Unlock()
	limited, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if err := ask(limited); !errdefs.IsUnavailable(err) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("shim stopped: %v", err)
	}
	gone, leave := context.WithCancel(ctx)
	leave()
	if err := ask(gone); !errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("caller gone: %v", err)
	}
	f.shim.mu.Lock()
	delete(f.shim.block, "Exec")
	f.shim.mu.Unlock()
	f.shim.failing("Exec", fmt.Errorf("connect to podd-shim: %w", errdefs.ErrUnavailable))
	if err := ask(ctx); !errdefs.IsUnavailable(err) {
		t.Errorf("shim gone: %v", err)
	}
}

func TestStartThatCouldNotBeAskedForLeavesTheContainerCreated(t *testing.T) {
	for _, call := range []string{"Create", "Start"} {
		f := newFixture(t)
		id := f.create(t, f.pod(t, "web"), containerConfig("app"))
		f.shim.failing(call, fmt.Errorf("podd-shim went away: %w", errdefs.ErrUnavailable))
		if _, err := f.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); !errdefs.IsUnavailable(err) {
			t.Errorf("%s: %v", call, err)
		}
		if s := f.status(t, id); s.State != runtimeapi.ContainerState_CONTAINER_CREATED {
			t.Errorf("%s: %v", call, s)
		}
		f.shim.failing(call, nil)
		if _, err := f.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
			t.Errorf("%s, again: %v", call, err)
		}
		eventually(t, "it runs", func() bool { return f.status(t, id).State == runtimeapi.ContainerState_CONTAINER_RUNNING })
	}
}

// slowClient takes nothing until it is told to.
type slowClient struct {
	got   bytes.Buffer
	ready <-chan struct{}
}

func (c *slowClient) Write(p []byte) (int, error) {
	<-c.ready
	return c.got.Write(p)
}

func (c *slowClient) Close() error { return nil }

// A client that reads slowly (less at the other end of kubectl exec) gets all
// that the process wrote, however long ago that has ended.
func TestExecStreamOwesItsOutputToSlowClients(t *testing.T) {
	f := newFixture(t)
	id := f.running(t, f.pod(t, "web"), "app")
	want := bytes.Repeat([]byte("0123456789abcdef"), 4096) // a pipe full
	ready := make(chan struct{})
	f.shim.exec = func(e *shim.ExecSpec) *shim.Exit {
		if _, err := e.Stdout.Write(want); err != nil {
			t.Error(err)
		}
		time.AfterFunc(drainTime+drainTime/2, func() { close(ready) })
		return &shim.Exit{Known: true}
	}
	out := &slowClient{ready: ready}
	if err := f.ExecStream(ctx, id, []string{"x"}, nil, out, nil, false, nil); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.got.Bytes(), want) {
		t.Errorf("%d of %d bytes came through", out.got.Len(), len(want))
	}
}

// What a process leaves behind holds an exec up for a short time only, even
// when it never stops writing.
func TestExecEndsThoughAChildWrites(t *testing.T) {
	f := newFixture(t)
	id := f.running(t, f.pod(t, "web"), "app")
	f.shim.exec = func(e *shim.ExecSpec) *shim.Exit {
		fd, err := unix.FcntlInt(e.Stdout.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Error(err)
		}
		child := os.NewFile(uintptr(fd), "child")
		go func() {
			for _, err := child.Write(make([]byte, 4096)); err == nil; _, err = child.Write(make([]byte, 4096)) {
			}
			child.Close()
		}()
		return &shim.Exit{Known: true}
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if r, err := f.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"x"}}); err != nil || ctx.Err() != nil {
		t.Errorf("%d bytes, %v, %v", len(r.GetStdout()), err, ctx.Err())
	}
}

// A start that has begun before its sandbox is stopped and goes on after that
// must not bring the pod back to life.
func TestStartMeetsStopOfItsSandbox(t *testing.T) {
	f := newFixture(t)
	for i := range 50 {
		pod := f.pod(t, fmt.Sprintf("web-%d", i))
		id := f.create(t, pod, containerConfig("app"))
		sb, _ := f.objects.sandbox(pod)
		c, _ := f.objects.container(id)
		c.mu.Lock() // the start comes as far as to this
		done := make(chan error, 1)
		go func() {
			_, err := f.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
			done <- err
		}()
		eventually(t, "the start is under way", func() bool { return len(c.gate) == 1 })
		for range 100 {
			runtime.Gosched()
		}
		// StopPodSandbox's first step; its next finds a container that is not
		// being started.
		sb.mu.Lock()
		sb.ready = false
		sb.mu.Unlock()
		c.mu.Unlock()
		if err := <-done; !errdefs.IsFailedPrecondition(err) {
			t.Fatalf("started in a stopped sandbox: %v", err)
		}
		if _, err := f.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Fatal(err)
		}
	}
}

// The target's pid namespace is named by a pid, which is another process' once
// the target has ended.
func TestStartWithoutItsTarget(t *testing.T) {
	f := newFixture(t)
	pod := f.pod(t, "web")
	target := f.running(t, pod, "app")
	c := containerConfig("debugger")
	c.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
		NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: target},
	}}
	id := f.create(t, pod, c)
	if _, err := f.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: target}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "target_id") {
		t.Errorf("started in another process' namespace: %v", err)
	}
}

// An image must not fill the disk with copies of itself.
func TestDeclaredVolumesAreBounded(t *testing.T) {
	f := newFixture(t)
	f.images.image.Config.Config.Volumes = map[string]struct{}{"/data": {}, "/data/": {}, "//data/.": {}}
	id := f.create(t, f.pod(t, "web"), containerConfig("app"))
	if made := names(f.volumeDir(id)); len(made) != 1 {
		t.Errorf("one VOLUME in three spellings made %v", made)
	}
	many := map[string]struct{}{}
	for i := range maxVolumes + 1 {
		many[fmt.Sprintf("/v%d", i)] = struct{}{}
	}
	f.images.image.Config.Config.Volumes = many
	pod := f.pod(t, "hostile")
	sb, _ := f.objects.sandbox(pod)
	_, err := f.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: containerConfig("app"), SandboxConfig: sb.config})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "VOLUME") {
		t.Errorf("%d VOLUMEs: %v", len(many), err)
	}
}

// A sandbox whose change cannot be written (a full disk) is still known.
func TestRecoverWithoutRoomForRecords(t *testing.T) {
	f := newFixture(t)
	pod := f.pod(t, "web")
	f.shim.mu.Lock()
	delete(f.shim.procs, pod) // as after a reboot
	f.shim.mu.Unlock()
	inTheWay := filepath.Join(f.cfg.DataDir, "cri", kindSandbox, ".tmp-"+pod)
	if err := os.MkdirAll(filepath.Join(inTheWay, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	f.restart(t)
	st, err := f.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil || st.Status.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("%v, %v", st.GetStatus().GetState(), err)
	}
	if err := os.RemoveAll(inTheWay); err != nil {
		t.Fatal(err)
	}
}

// The other side of an HTTP/1.0-like exchange: the client says that it has
// asked all, the pod's answer takes longer than lingerTime, but never pauses
// for that long.
func TestForwardDeliversALongAnswer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const parts = 6
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.Copy(io.Discard, c) // until the client has said all
		for range time.NewTicker(lingerTime / 3).C {
			if _, err := c.Write([]byte("x")); err != nil {
				return
			}
		}
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	got := make(chan struct{}, 64)
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- forward(ctx, conn.(*net.TCPConn), askedAll{got}) }()
	for i := range parts {
		select {
		case <-got:
		case err := <-done:
			t.Fatalf("ended after %d parts of the answer: %v", i, err)
		}
	}
	cancel()
	<-done
}

// askedAll is a client that has nothing more to say and counts the answers.
type askedAll struct{ got chan<- struct{} }

func (askedAll) Read([]byte) (int, error) { return 0, io.EOF }
func (a askedAll) Write(p []byte) (int, error) {
	a.got <- struct{}{}
	return len(p), nil
}
func (askedAll) Close() error { return nil }

func TestCapped(t *testing.T) {
	c := capped{max: 5}
	for _, s := range []string{"abc", "def", "ghi"} {
		if n, err := c.Write([]byte(s)); n != 3 || err != nil {
			t.Fatal(n, err)
		}
	}
	if c.b.String() != "abcde" {
		t.Errorf("%q", c.b.String())
	}
}

func TestMissedEventsAreListed(t *testing.T) {
	f := newFixture(t)
	pod := f.pod(t, "web")
	ended, lost, runs := f.running(t, pod, "ended"), f.running(t, pod, "lost"), f.running(t, pod, "runs")
	f.shim.mu.Lock()
	last := uint64(len(f.shim.log))
	f.shim.mu.Unlock()
	eventually(t, "events applied", func() bool { return f.seq.Get() == last })
	f.shim.mu.Lock()
	f.shim.procs[ended].State, f.shim.procs[ended].Exit = shim.Exited, &shim.Exit{Code: 6, Known: true, At: time.Now()}
	delete(f.shim.procs, lost)
	// The log lost what told of these, and goes on with something else.
	for range 5 {
		f.shim.log = append(f.shim.log, shim.Event{Seq: uint64(len(f.shim.log) + 1), Kind: shim.EventOOM, ID: "gone"})
	}
	f.shim.skip = uint64(len(f.shim.log))
	f.shim.emit(shim.Event{Kind: shim.EventOOM, ID: runs})
	f.shim.mu.Unlock()
	for id, want := range map[string]int32{ended: 6, lost: 255} {
		eventually(t, "the exit is known", func() bool { return f.status(t, id).State == runtimeapi.ContainerState_CONTAINER_EXITED })
		if got := f.status(t, id).ExitCode; got != want {
			t.Errorf("exit code %d, want %d", got, want)
		}
	}
	if s := f.status(t, runs); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("%v", s)
	}
}

// The same pods again and again leave nothing in this process.
func TestNothingLeaks(t *testing.T) {
	f := newFixture(t)
	round := func() {
		pod := f.pod(t, "web")
		id := f.running(t, pod, "app")
		if _, err := f.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"x"}}); err != nil {
			t.Fatal(err)
		}
		cctx, cancel := context.WithCancel(ctx)
		ch := f.Subscribe(cctx)
		if _, err := f.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Fatal(err)
		}
		cancel()
		for range ch { //nolint:revive // until it is closed
		}
	}
	count := func() (fds, goroutines int) {
		entries, _ := os.ReadDir("/proc/self/fd")
		return len(entries), runtime.NumGoroutine()
	}
	round()
	fds, goroutines := count()
	for range 20 {
		round()
	}
	eventually(t, "no goroutine more", func() bool { _, g := count(); return g <= goroutines })
	if after, _ := count(); after > fds {
		t.Errorf("%d descriptors, %d before", after, fds)
	}
	if len(f.objects.byName) != 0 || len(f.creates.m) != 0 || len(f.events.subs) != 0 {
		t.Errorf("left: names %v, attempts %v, subscribers %v", f.objects.byName, f.creates.m, f.events.subs)
	}
	f.empty(t)
}

// A waiter that leaves does not end the work another one waits for.
func TestAttemptLivesWithItsLastWaiter(t *testing.T) {
	var a attempts
	entered, leave := make(chan struct{}), make(chan struct{})
	fn := func(ctx context.Context, at *attempt) (string, error) {
		at.stage("waiting")
		close(entered)
		select {
		case <-leave:
			return "id", nil
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	first, cancel := context.WithCancel(ctx)
	gone := make(chan error, 1)
	go func() { _, err := a.do(first, "x", fn); gone <- err }()
	<-entered
	got := make(chan string, 1)
	go func() {
		id, err := a.do(ctx, "x", func(context.Context, *attempt) (string, error) { return "second", nil })
		if err != nil {
			t.Error(err)
		}
		got <- id
	}()
	eventually(t, "two wait", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.m["x"].waiters == 2 })
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "waiting (after") {
		t.Errorf("the first: %v", err)
	}
	close(leave)
	if id := <-got; id != "id" {
		t.Errorf("the second got %q", id)
	}
}
