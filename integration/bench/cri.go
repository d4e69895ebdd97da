package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// answers tells whether a CRI runtime is ready at socket.
func answers(ctx context.Context, socket string) bool {
	if _, err := os.Stat(socket); err != nil {
		return false
	}
	conn, err := dial(socket)
	if err != nil {
		return false
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err = runtimeapi.NewRuntimeServiceClient(conn).Version(ctx, &runtimeapi.VersionRequest{})
	return err == nil
}

// measureCRI times the calls of a pod's life one after the other.
func measureCRI(ctx context.Context, o options, n node, images *imageServer, out string, r *report) error {
	conn, err := dial(n.criSocket())
	if err != nil {
		return err
	}
	defer conn.Close()
	for _, profile := range []runtimeapi.SecurityProfile_ProfileType{
		runtimeapi.SecurityProfile_Unconfined, runtimeapi.SecurityProfile_RuntimeDefault,
	} {
		samples := map[string][]time.Duration{}
		var order []string
		step := func(name string, call func() error) error {
			t0 := time.Now()
			if err := call(); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if samples[name] == nil {
				order = append(order, name)
			}
			samples[name] = append(samples[name], time.Since(t0))
			return nil
		}
		for i := range o.rounds {
			name := fmt.Sprintf("cri-%d-%d", profile, i)
			if err := criLife(ctx, conn, name, images.payload(), out, profile, step); err != nil {
				return err
			}
		}
		up := make([]time.Duration, o.rounds)
		for i := range up {
			up[i] = samples["RunPodSandbox"][i] + samples["CreateContainer"][i] + samples["StartContainer"][i]
		}
		label := "CRI, seccomp " + profile.String() + ": "
		r.durations(label+"sandbox+create+start", n.name(), up)
		for _, call := range order {
			r.durations(label+call, n.name(), samples[call])
		}
	}
	return nil
}

func criLife(ctx context.Context, conn *grpc.ClientConn, name, image, out string,
	profile runtimeapi.SecurityProfile_ProfileType, step func(string, func() error) error) error {
	rt := runtimeapi.NewRuntimeServiceClient(conn)
	seccomp := &runtimeapi.SecurityProfile{ProfileType: profile}
	sandbox := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: name},
		LogDirectory: os.TempDir(),
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: "/podd-bench-cri",
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				Seccomp: seccomp,
				NamespaceOptions: &runtimeapi.NamespaceOption{
					Network: runtimeapi.NamespaceMode_POD, Pid: runtimeapi.NamespaceMode_CONTAINER, Ipc: runtimeapi.NamespaceMode_POD},
			},
		},
	}
	container := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "c"},
		Image:    &runtimeapi.ImageSpec{Image: image},
		Args:     []string{name},
		Mounts:   []*runtimeapi.Mount{{HostPath: out, ContainerPath: "/out"}},
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			Seccomp:          seccomp,
			NamespaceOptions: sandbox.Linux.SecurityContext.NamespaceOptions,
		}},
	}
	var pod, id string
	steps := []struct {
		name string
		call func() error
	}{
		{"RunPodSandbox", func() error {
			resp, err := rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: sandbox})
			pod = resp.GetPodSandboxId()
			return err
		}},
		{"CreateContainer", func() error {
			resp, err := rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: container, SandboxConfig: sandbox})
			id = resp.GetContainerId()
			return err
		}},
		{"StartContainer", func() error {
			_, err := rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
			return err
		}},
		{"first act", func() error { // after StartContainer has answered; an exec before it may meet init
			_, err := stamps(ctx, out, 10*time.Second, name)
			return err
		}},
		{"ExecSync", func() error {
			resp, err := rt.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"/payload"}, Timeout: 10})
			if err == nil && resp.ExitCode != 0 {
				err = fmt.Errorf("exit code %d: %s", resp.ExitCode, strings.TrimSpace(string(resp.Stderr)))
			}
			return err
		}},
		{"StopContainer", func() error {
			_, err := rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id})
			return err
		}},
		{"StopPodSandbox", func() error {
			_, err := rt.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod})
			return err
		}},
		{"RemovePodSandbox", func() error {
			_, err := rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod})
			return err
		}},
	}
	for _, s := range steps {
		if err := step(s.name, s.call); err != nil {
			return err
		}
	}
	return nil
}
