package cri

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/shim"
)

// dial serves f on a socket and returns clients of it.
func (f *fixture) dial(t *testing.T) (runtimeapi.RuntimeServiceClient, runtimeapi.ImageServiceClient) {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	cctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- Serve(cctx, l, f.Service) }()
	conn, err := grpc.NewClient("unix:"+sock, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		_ = conn.Close()
	})
	return runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)
}

func TestCodes(t *testing.T) {
	f := newFixture(t)
	rt, im := f.dial(t)
	pod := f.pod(t, "web")
	id := f.running(t, pod, "app")
	unknown := newID()
	for name, c := range map[string]struct {
		want codes.Code
		call func() error
	}{
		"PodSandboxStatus": {codes.NotFound, func() error {
			_, err := rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: unknown})
			return err
		}},
		"ContainerStatus": {codes.NotFound, func() error {
			_, err := rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: unknown})
			return err
		}},
		"empty id": {codes.NotFound, func() error { _, err := rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{}); return err }},
		"StartContainer": {codes.NotFound, func() error {
			_, err := rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: unknown})
			return err
		}},
		"start again": {codes.FailedPrecondition, func() error {
			_, err := rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
			return err
		}},
		"StopContainer": {codes.OK, func() error {
			_, err := rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: unknown})
			return err
		}},
		"negative timeout": {codes.InvalidArgument, func() error {
			_, err := rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: -1})
			return err
		}},
		"RemoveContainer": {codes.OK, func() error {
			_, err := rt.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: unknown})
			return err
		}},
		"StopPodSandbox": {codes.OK, func() error {
			_, err := rt.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: unknown})
			return err
		}},
		"RemovePodSandbox": {codes.OK, func() error {
			_, err := rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: unknown})
			return err
		}},
		"RunPodSandbox": {codes.InvalidArgument, func() error { _, err := rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{}); return err }},
		"CreateContainer": {codes.InvalidArgument, func() error {
			_, err := rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod})
			return err
		}},
		"ExecSync": {codes.NotFound, func() error {
			_, err := rt.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: unknown, Cmd: []string{"x"}})
			return err
		}},
		"Exec": {codes.InvalidArgument, func() error {
			_, err := rt.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"x"}})
			return err
		}},
		"Attach": {codes.InvalidArgument, func() error {
			_, err := rt.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: id, Tty: true, Stderr: true})
			return err
		}},
		"PortForward": {codes.NotFound, func() error {
			_, err := rt.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: unknown})
			return err
		}},
		"Checkpoint": {codes.Unimplemented, func() error {
			_, err := rt.CheckpointContainer(ctx, &runtimeapi.CheckpointContainerRequest{ContainerId: id})
			return err
		}},
		"UpdateResources": {codes.NotFound, func() error {
			_, err := rt.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: unknown})
			return err
		}},
		"UpdateSandbox": {codes.NotFound, func() error {
			_, err := rt.UpdatePodSandboxResources(ctx, &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: unknown})
			return err
		}},
		"ReopenLog": {codes.NotFound, func() error {
			_, err := rt.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: unknown})
			return err
		}},
		"bad CIDR": {codes.InvalidArgument, func() error {
			_, err := rt.UpdateRuntimeConfig(ctx, &runtimeapi.UpdateRuntimeConfigRequest{RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: "10.0.0.0"}}})
			return err
		}},
		"PullImage": {codes.InvalidArgument, func() error { _, err := im.PullImage(ctx, &runtimeapi.PullImageRequest{}); return err }},
		"pull absent": {codes.NotFound, func() error {
			_, err := im.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "none"}})
			return err
		}},
		"RemoveImage": {codes.OK, func() error {
			_, err := im.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: "none"}})
			return err
		}},
		"exec timeout": {codes.DeadlineExceeded, func() error {
			f.shim.exec = func(*shim.ExecSpec) *shim.Exit { return nil }
			_, err := rt.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"x"}, Timeout: 1})
			return err
		}},
	} {
		if err := c.call(); status.Code(err) != c.want {
			t.Errorf("%s: got %v (%v), want %v", name, status.Code(err), err, c.want)
		}
	}
}

func TestEveryListAndItsStream(t *testing.T) {
	f := newFixture(t)
	rt, im := f.dial(t)
	pod := f.pod(t, "web")
	f.pod(t, "other")
	id := f.running(t, pod, "app")

	pods, err := rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "web"}}})
	if err != nil || len(pods.Items) != 1 || pods.Items[0].Id != pod {
		t.Errorf("%v, %v", pods, err)
	}
	if pods, _ := rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: pod[:10]}}); len(pods.GetItems()) != 1 {
		t.Errorf("by prefix: %v", pods)
	}
	if pods, _ := rt.ListPodSandbox(ctx, nil); len(pods.GetItems()) != 2 {
		t.Errorf("all: %v", pods)
	}
	cs, err := rt.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: pod, State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}}})
	if err != nil || len(cs.Containers) != 1 || cs.Containers[0].Id != id || cs.Containers[0].ImageId != "sha256:aaaa" {
		t.Errorf("%v, %v", cs, err)
	}
	s1, err := rt.StreamPodSandboxes(ctx, &runtimeapi.StreamPodSandboxesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := s1.Recv(); err != nil || len(m.PodSandboxes) != 2 {
		t.Errorf("%v, %v", m, err)
	}
	s2, err := rt.StreamContainers(ctx, &runtimeapi.StreamContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := s2.Recv(); err != nil || len(m.Containers) != 1 {
		t.Errorf("%v, %v", m, err)
	}
	s3, err := im.StreamImages(ctx, &runtimeapi.StreamImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := s3.Recv(); err != nil || len(m.Images) != 1 {
		t.Errorf("%v, %v", m, err)
	}
	events, err := rt.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the subscription", func() bool {
		f.events.mu.Lock()
		defer f.events.mu.Unlock()
		return len(f.events.subs) == 1
	})
	f.shim.exit(id, shim.Exit{Known: true})
	m, err := events.Recv()
	if err != nil || m.ContainerId != id || m.ContainerEventType != runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT || m.PodSandboxStatus.GetId() != pod || len(m.ContainersStatuses) != 1 || m.ContainersStatuses[0].State != runtimeapi.ContainerState_CONTAINER_EXITED {
		t.Errorf("%v, %v", m, err)
	}
}

func TestPages(t *testing.T) {
	var sizes []int
	items := make([]int, 2*streamPage+1)
	if err := pages(items, func(p []int) error { sizes = append(sizes, len(p)); return nil }); err != nil || len(sizes) != 3 || sizes[2] != 1 {
		t.Errorf("%v, %v", sizes, err)
	}
	if err := pages(items, func([]int) error { return errBoom }); !errors.Is(err, errBoom) {
		t.Error(err)
	}
	if err := pages(nil, func([]int) error { return errBoom }); err != nil {
		t.Error(err)
	}
}

func TestStatusConditions(t *testing.T) {
	f := newFixture(t)
	f.net.fail["Ready"] = errBoom
	st, err := f.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, c := range st.Status.Conditions {
		got[c.Type] = c.Status
	}
	if !got[runtimeapi.RuntimeReady] || got[runtimeapi.NetworkReady] || st.Info["config"] == "" || len(st.RuntimeHandlers) != 2 || !st.Features.SupplementalGroupsPolicy {
		t.Errorf("%v", st)
	}
	v, _ := f.Version(ctx, nil)
	if v.RuntimeApiVersion != "v1" || v.RuntimeName != "podd" {
		t.Errorf("%v", v)
	}
}

func TestCPURates(t *testing.T) {
	var r cpuRates
	at := time.Unix(1000, 0)
	if _, ok := r.add("a", at, time.Second); ok {
		t.Error("a rate from one sample")
	}
	if v, ok := r.add("a", at.Add(2*time.Second), 2*time.Second); !ok || v != 500_000_000 {
		t.Errorf("half a core: %d %v", v, ok)
	}
	if v, ok := r.add("a", at.Add(2100*time.Millisecond), 9*time.Second); !ok || v != 500_000_000 {
		t.Errorf("too soon: %d %v", v, ok)
	}
	if _, ok := r.add("a", at.Add(time.Hour), 10*time.Second); ok {
		t.Error("a rate over an hour")
	}
	if _, ok := r.add("a", at.Add(time.Hour+2*time.Second), 0); ok {
		t.Error("a rate from a counter that went back")
	}
	r.keep(func(string) bool { return false })
	if len(r.m) != 0 {
		t.Error("kept")
	}
}

func TestParseNetDev(t *testing.T) {
	i, ok := parseNetDev("  eth0: 10 1 2 0 0 0 0 0 20 1 3 0 0 0 0 0")
	if !ok || i.name != "eth0" || i.counters != [16]uint64{0: 10, 1: 1, 2: 2, 8: 20, 9: 1, 10: 3} {
		t.Errorf("%+v", i)
	}
	for _, l := range []string{"", "Inter-|   Receive", "eth0: 1 2", "eth0: a b c d e f g h i j k l m n o p"} {
		if _, ok := parseNetDev(l); ok {
			t.Errorf("%q was read", l)
		}
	}
}
