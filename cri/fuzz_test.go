package cri

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/shim"
)

// maxSpec is what podd-shim takes in one message (cri/shim/internal/wire).
const maxSpec = 8 << 20

// methods of the socket that answer at once.
var methods = append(append([]grpc.MethodDesc{}, runtimeapi.RuntimeService_ServiceDesc.Methods...), runtimeapi.ImageService_ServiceDesc.Methods...)

// FuzzRequest: whatever a client of the socket sends, to whatever method, the
// service answers with a result or with an error that has a code of its own;
// what it made of an accepted request is a specification that podd-shim takes
// and a record that the next start of podd reads.
//
// "pod" and "container" in the request stand for ones that are there.
func FuzzRequest(f *testing.F) {
	x := newFixture(f)
	jail := f.TempDir()
	x.cfg.Resolve = func(_ context.Context, p string) (string, []string, error) { return p, nil, nil }
	x.restart(f)
	for method, m := range seeds() {
		raw, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(indexOf(f, method), raw)
	}
	var pod, container string
	f.Fuzz(func(t *testing.T, method uint8, raw []byte) {
		if c, err := x.objects.container(container); err != nil || c.sandboxID != pod || x.status(t, container).State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			x.removeBut(t, "", "")
			pod = x.pod(t, "base")
			container = x.running(t, pod, "base")
		}
		defer func() { x.removeBut(t, pod, container) }()
		m := methods[int(method)%len(methods)]
		var req proto.Message
		decode := func(v any) error {
			req = v.(proto.Message)
			err := proto.Unmarshal(raw, req)
			place(req.ProtoReflect(), map[string]string{"pod": pod, "container": container}, jail)
			return err
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		resp, err := m.Handler(x.Service, ctx, decode, nil)
		if err != nil {
			if c := status.Code(toGRPC(err)); c == codes.OK {
				t.Fatalf("%s: error without a code: %v", m.MethodName, err)
			}
			if n := len(x.objects.allContainers()); n > 1 {
				t.Fatalf("%s: %v, and %d containers are there", m.MethodName, err, n)
			}
			return
		}
		x.accepted(t, m.MethodName, jail, resp)
	})
}

// accepted checks what came of a request.
func (f *fixture) accepted(t *testing.T, method, jail string, resp any) {
	t.Helper()
	switch r := resp.(type) {
	case *runtimeapi.CreateContainerResponse:
		id := r.GetContainerId()
		c, err := f.objects.container(id)
		if err != nil {
			t.Fatal(err)
		}
		if c.logPath != "" && !strings.HasPrefix(c.logPath, jail+"/") {
			t.Fatalf("log %q is beside the pod's directory", c.logPath)
		}
		// podd-shim is told at the start, which may fail for what is on this host.
		if _, err := f.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: id}); err == nil {
			checkSpec(t, f.shim.specs[id])
		}
		f.restart(t)
		if _, err := f.objects.container(r.GetContainerId()); err != nil {
			t.Fatalf("after a restart: %v", err)
		}
	case *runtimeapi.RunPodSandboxResponse:
		f.restart(t)
		if _, err := f.objects.sandbox(r.GetPodSandboxId()); err != nil {
			t.Fatalf("after a restart: %v", err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(f.cfg.DataDir, "cri", "quarantine", "*")); len(left) > 0 {
		t.Fatalf("%s: records in quarantine: %v", method, left)
	}
}

// checkSpec that a container was made of.
func checkSpec(t *testing.T, c *shim.ContainerSpec) {
	t.Helper()
	raw, err := json.Marshal(c)
	if err != nil || len(raw) > maxSpec {
		t.Fatalf("specification of %d bytes: %v", len(raw), err)
	}
	s := c.Spec
	if s.Process == nil || s.Linux == nil || len(s.Process.Args) == 0 || !filepath.IsAbs(s.Process.Cwd) {
		t.Fatalf("process %+v", s.Process)
	}
	for _, m := range s.Mounts {
		if !filepath.IsAbs(m.Destination) || strings.Contains(m.Destination+m.Source, "\x00") || strings.Contains(m.Destination+"/", "/../") {
			t.Fatalf("mount %+v", m)
		}
	}
	for _, e := range append(s.Process.Env, s.Process.Args...) {
		if strings.Contains(e, "\x00") {
			t.Fatalf("argument or variable %q", e)
		}
	}
}

// removeBut removes all that a request has left but one pod and its container.
func (f *fixture) removeBut(t *testing.T, pod, container string) {
	t.Helper()
	ctx := context.Background()
	for _, c := range f.objects.allContainers() {
		if c.id == container {
			continue
		}
		if _, err := f.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.id}); err != nil {
			t.Fatalf("remove: %v", err)
		}
	}
	for _, sb := range f.objects.allSandboxes() {
		if sb.id == pod {
			continue
		}
		if _, err := f.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: sb.id}); err != nil {
			t.Fatalf("remove: %v", err)
		}
	}
}

// place puts the names of what is there where a request says so, and keeps
// paths of the host in a directory.
func place(m protoreflect.Message, names map[string]string, jail string) {
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.IsList() && fd.Message() != nil:
			for i := range v.List().Len() {
				place(v.List().Get(i).Message(), names, jail)
			}
		case fd.IsMap() || fd.IsList():
		case fd.Message() != nil:
			place(v.Message(), names, jail)
		case fd.Kind() == protoreflect.StringKind:
			if id, ok := names[v.String()]; ok && strings.HasSuffix(string(fd.Name()), "id") {
				m.Set(fd, protoreflect.ValueOfString(id))
			}
			if fd.Name() == "log_directory" && strings.HasPrefix(v.String(), "/") {
				m.Set(fd, protoreflect.ValueOfString(jail+v.String()))
			}
		}
		return true
	})
}

func indexOf(f *testing.F, name string) uint8 {
	for i, m := range methods {
		if m.MethodName == name {
			return uint8(i)
		}
	}
	f.Fatalf("no method %s", name)
	return 0
}

// seeds are requests that reach far.
func seeds() map[string]proto.Message {
	pod := podConfig("seed")
	pod.LogDirectory = "/var/log/pods/x"
	pod.PortMappings = []*runtimeapi.PortMapping{{Protocol: runtimeapi.Protocol_TCP, ContainerPort: 80, HostPort: 8080, HostIp: "127.0.0.1"}}
	pod.Linux = &runtimeapi.LinuxPodSandboxConfig{
		CgroupParent: "/kubepods/pod1", Sysctls: map[string]string{"net.ipv4.ip_forward": "1"},
		SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER, UsernsOptions: &runtimeapi.UserNamespace{
				Uids: []*runtimeapi.IDMapping{{HostId: 65536, Length: 65536}}, Gids: []*runtimeapi.IDMapping{{HostId: 65536, Length: 65536}},
			}},
			Seccomp: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
		},
	}
	c := containerConfig("seed")
	c.Command, c.Args, c.WorkingDir, c.LogPath = []string{"/bin/sh"}, []string{"-c", "x"}, "/work", "seed/0.log"
	c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("b")}}
	c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/data", HostPath: "/srv/data", Readonly: true, RecursiveReadOnly: true}, {ContainerPath: "/etc/x", HostPath: "/srv/x", Propagation: runtimeapi.MountPropagation_PROPAGATION_PRIVATE}}
	c.Devices = []*runtimeapi.Device{{ContainerPath: "/dev/n", HostPath: "/dev/null", Permissions: "rwm"}}
	c.Linux = &runtimeapi.LinuxContainerConfig{
		Resources: &runtimeapi.LinuxContainerResources{CpuQuota: 10000, CpuPeriod: 100000, CpuShares: 2, MemoryLimitInBytes: 1 << 24, OomScoreAdj: 500,
			HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 0}}},
		SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			Capabilities: &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"ALL"}},
			RunAsUser:    &runtimeapi.Int64Value{Value: 1000}, RunAsGroup: &runtimeapi.Int64Value{Value: 1000}, SupplementalGroups: []int64{5},
			MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"}, NoNewPrivs: true, ReadonlyRootfs: true,
		},
	}
	create := &runtimeapi.CreateContainerRequest{PodSandboxId: "pod", Config: c, SandboxConfig: pod}
	return map[string]proto.Message{
		"RunPodSandbox":            &runtimeapi.RunPodSandboxRequest{Config: pod},
		"StopPodSandbox":           &runtimeapi.StopPodSandboxRequest{PodSandboxId: "pod"},
		"RemovePodSandbox":         &runtimeapi.RemovePodSandboxRequest{PodSandboxId: "pod"},
		"PodSandboxStatus":         &runtimeapi.PodSandboxStatusRequest{PodSandboxId: "pod", Verbose: true},
		"ListPodSandbox":           &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: "pod", LabelSelector: map[string]string{"app": "base"}}},
		"CreateContainer":          create,
		"StartContainer":           &runtimeapi.StartContainerRequest{ContainerId: "container"},
		"StopContainer":            &runtimeapi.StopContainerRequest{ContainerId: "container", Timeout: 1},
		"RemoveContainer":          &runtimeapi.RemoveContainerRequest{ContainerId: "container"},
		"ListContainers":           &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: "pod"}},
		"ContainerStatus":          &runtimeapi.ContainerStatusRequest{ContainerId: "container", Verbose: true},
		"UpdateContainerResources": &runtimeapi.UpdateContainerResourcesRequest{ContainerId: "container", Linux: c.Linux.Resources},
		"ReopenContainerLog":       &runtimeapi.ReopenContainerLogRequest{ContainerId: "container"},
		"ExecSync":                 &runtimeapi.ExecSyncRequest{ContainerId: "container", Cmd: []string{"true"}, Timeout: 1},
		"Exec":                     &runtimeapi.ExecRequest{ContainerId: "container", Cmd: []string{"sh"}, Stdin: true, Stdout: true, Tty: true},
		"Attach":                   &runtimeapi.AttachRequest{ContainerId: "container", Stdout: true},
		"PortForward":              &runtimeapi.PortForwardRequest{PodSandboxId: "pod", Port: []int32{80}},
		"ContainerStats":           &runtimeapi.ContainerStatsRequest{ContainerId: "container"},
		"ListContainerStats":       &runtimeapi.ListContainerStatsRequest{Filter: &runtimeapi.ContainerStatsFilter{Id: "container"}},
		"PodSandboxStats":          &runtimeapi.PodSandboxStatsRequest{PodSandboxId: "pod"},
		"ListPodSandboxStats":      &runtimeapi.ListPodSandboxStatsRequest{},
		"UpdateRuntimeConfig":      &runtimeapi.UpdateRuntimeConfigRequest{RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: "10.1.0.0/24"}}},
		"Status":                   &runtimeapi.StatusRequest{Verbose: true},
		"PullImage":                &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "example.com/app:1"}, Auth: &runtimeapi.AuthConfig{Auth: "dTpw"}},
		"ImageStatus":              &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: "example.com/app:1"}, Verbose: true},
		"RemoveImage":              &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: "example.com/app:1"}},
		"ListImages":               &runtimeapi.ListImagesRequest{Filter: &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: "example.com/app:1"}}},
		"Version":                  &runtimeapi.VersionRequest{Version: "v1"},
	}
}

// FuzzRecord: whatever is in a record, podd starts, everything else is there,
// and what cannot be used is in quarantine or gone.
func FuzzRecord(f *testing.F) {
	x := newFixture(f)
	pod := x.pod(f, "base")
	container := x.running(f, pod, "base")
	dir := filepath.Join(x.cfg.DataDir, "cri")
	kinds := []string{kindSandbox, kindContainer, kindSpec}
	for i, id := range []string{pod, container, container} {
		raw, err := os.ReadFile(filepath.Join(dir, kinds[i], id+".json"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(i), []byte(strings.ReplaceAll(string(raw), id, "other")))
	}
	f.Add(uint8(0), []byte(`{"version":1,"kind":"sandbox","id":"other","data":null}`))
	f.Add(uint8(1), []byte(`{"version":2}`))
	f.Fuzz(func(t *testing.T, kind uint8, raw []byte) {
		path := filepath.Join(dir, kinds[int(kind)%len(kinds)], "other.json")
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		defer func() {
			os.Remove(path)
			left, _ := filepath.Glob(filepath.Join(dir, "quarantine", "*"))
			for _, p := range left {
				os.Remove(p)
			}
		}()
		x.restart(t)
		if _, err := x.objects.sandbox(pod); err != nil {
			t.Fatal(err)
		}
		if _, err := x.objects.container(container); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		for _, id := range []string{"other", pod, container} { // whoever asks for it gets an answer
			x.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
			x.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
		}
		if _, err := x.ListContainers(ctx, &runtimeapi.ListContainersRequest{}); err != nil {
			t.Fatal(err)
		}
		x.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: "other"})
		x.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: "other"})
		x.restart(t)
		x.net.fail = map[string]error{}
	})
}
