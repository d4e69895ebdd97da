package cri

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Each bad request gets InvalidArgument and a message that names the field.
func TestBadSandboxes(t *testing.T) {
	long := strings.Repeat("x", 5000)
	linux := func(c *runtimeapi.PodSandboxConfig) *runtimeapi.LinuxPodSandboxConfig {
		c.Linux = &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{}}}
		return c.Linux
	}
	for field, change := range map[string]func(*runtimeapi.RunPodSandboxRequest, *runtimeapi.PodSandboxConfig){
		"config is missing":         func(r *runtimeapi.RunPodSandboxRequest, _ *runtimeapi.PodSandboxConfig) { r.Config = nil },
		"config.metadata is":        func(_ *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { c.Metadata = nil },
		"config.metadata.name":      func(_ *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = "" },
		"config.metadata.namespace": func(_ *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { c.Metadata.Namespace = long },
		"config.metadata.uid":       func(_ *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { c.Metadata.Uid = "../x" },
		"runtime_handler":           func(r *runtimeapi.RunPodSandboxRequest, _ *runtimeapi.PodSandboxConfig) { r.RuntimeHandler = "kata" },
		"config.hostname":           func(_ *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) { c.Hostname = "a\nb" },
		"config.log_directory": func(_ *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
			c.LogDirectory = "/a/../../etc"
		},
		"config.dns_config.servers": func(_ *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
			c.DnsConfig.Servers = []string{"1.1.1.1\nnameserver 6.6.6.6"}
		},
		"config.port_mappings[0]": func(_ *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
			c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 70000}}
		},
		"config.linux.cgroup_parent": func(_ *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
			linux(c).CgroupParent = "/a/../b"
		},
		"config.linux.sysctls": func(_ *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
			linux(c).Sysctls = map[string]string{"../../etc/passwd": "x"}
		},
		"namespace_options.network": func(_ *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
			linux(c).SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_CONTAINER
		},
		"userns_options": func(_ *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
			linux(c).SecurityContext.NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{}
		},
		"config.linux.resources.cpu_quota": func(_ *runtimeapi.RunPodSandboxRequest, c *runtimeapi.PodSandboxConfig) {
			linux(c).Resources = &runtimeapi.LinuxContainerResources{CpuQuota: -5}
		},
	} {
		r := &runtimeapi.RunPodSandboxRequest{Config: podConfig("web")}
		change(r, r.Config)
		if err := validateSandbox(r); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	if err := validateSandbox(&runtimeapi.RunPodSandboxRequest{Config: podConfig("web"), RuntimeHandler: handlerName}); err != nil {
		t.Error(err)
	}
}

// What the kernel would answer with EINVAL to a write of the map.
func TestBadUserNamespaces(t *testing.T) {
	good := []*runtimeapi.IDMapping{{HostId: 100000, Length: 65536}}
	for _, c := range []struct {
		field      string
		uids, gids []*runtimeapi.IDMapping
	}{
		{"userns_options.uids[1]: container ids", []*runtimeapi.IDMapping{{HostId: 1000, Length: 100}, {HostId: 2000, Length: 100}}, good},
		{"userns_options.gids[1]: container ids", good, []*runtimeapi.IDMapping{{HostId: 1000, Length: 100}, {ContainerId: 99, HostId: 2000, Length: 1}}},
		{"userns_options.uids[1]: host ids", []*runtimeapi.IDMapping{{HostId: 1000, Length: 100}, {ContainerId: 100, HostId: 900, Length: 101}}, good},
		{"userns_options.uids: container id 0 is not mapped", []*runtimeapi.IDMapping{{ContainerId: 1, HostId: 1000, Length: 100}}, good},
		{"userns_options.gids: container id 0 is not mapped", good, []*runtimeapi.IDMapping{{ContainerId: 1, HostId: 1000, Length: 100}}},
	} {
		u := &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: c.uids, Gids: c.gids}
		if _, _, err := userMappings(u); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.field) {
			t.Errorf("%s: %v", c.field, err)
		}
	}
	split := []*runtimeapi.IDMapping{{HostId: 1000, Length: 100}, {ContainerId: 100, HostId: 1100, Length: 5}, {ContainerId: 1000, HostId: 900, Length: 100}}
	if _, _, err := userMappings(&runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: split, Gids: good}); err != nil {
		t.Errorf("ranges that only touch: %v", err)
	}
}

func TestBadContainers(t *testing.T) {
	img := &runtimeapi.ImageSpec{Image: "x"}
	mount := func(m *runtimeapi.Mount) func(*runtimeapi.ContainerConfig) {
		return func(c *runtimeapi.ContainerConfig) { c.Mounts = []*runtimeapi.Mount{m} }
	}
	security := func(f func(*runtimeapi.LinuxContainerSecurityContext)) func(*runtimeapi.ContainerConfig) {
		return func(c *runtimeapi.ContainerConfig) {
			c.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{}}
			f(c.Linux.SecurityContext)
		}
	}
	resources := func(r *runtimeapi.LinuxContainerResources) func(*runtimeapi.ContainerConfig) {
		return func(c *runtimeapi.ContainerConfig) { c.Linux = &runtimeapi.LinuxContainerConfig{Resources: r} }
	}
	for _, c := range []struct {
		field  string
		change func(*runtimeapi.ContainerConfig)
	}{
		{"config.metadata is missing", func(c *runtimeapi.ContainerConfig) { c.Metadata = nil }},
		{"config.metadata.name", func(c *runtimeapi.ContainerConfig) { c.Metadata.Name = "a/b" }},
		{"config.image.image", func(c *runtimeapi.ContainerConfig) { c.Image = nil }},
		{"config.working_dir", func(c *runtimeapi.ContainerConfig) { c.WorkingDir = "rel" }},
		{"config.log_path", func(c *runtimeapi.ContainerConfig) { c.LogPath = "../../../etc/cron.d/x" }},
		{"config.log_path", func(c *runtimeapi.ContainerConfig) { c.LogPath = "/etc/passwd" }},
		{"config.stop_signal", func(c *runtimeapi.ContainerConfig) { c.StopSignal = 999 }},
		{"config.envs[0]", func(c *runtimeapi.ContainerConfig) { c.Envs = []*runtimeapi.KeyValue{{Key: "A=B"}} }},
		{"config.command and args", func(c *runtimeapi.ContainerConfig) { c.Args = []string{"a\x00b"} }},
		{"config.mounts[0].container_path", mount(&runtimeapi.Mount{HostPath: "/x"})},
		{"config.mounts[0].container_path", mount(&runtimeapi.Mount{HostPath: "/x", ContainerPath: "/a/.."})},
		{"config.mounts[0].host_path", mount(&runtimeapi.Mount{HostPath: "x", ContainerPath: "/x"})},
		{"config.mounts[0].host_path", mount(&runtimeapi.Mount{HostPath: "/" + strings.Repeat("x", 5000), ContainerPath: "/x"})},
		{"config.mounts[0]: host_path and image", mount(&runtimeapi.Mount{HostPath: "/x", ContainerPath: "/x", Image: img, Readonly: true})},
		{"config.mounts[0].readonly", mount(&runtimeapi.Mount{ContainerPath: "/x", Image: img})},
		{"config.mounts[0].image_sub_path", mount(&runtimeapi.Mount{ContainerPath: "/x", Image: img, Readonly: true, ImageSubPath: "a/../../b"})},
		{"config.mounts[0].recursive_read_only", mount(&runtimeapi.Mount{HostPath: "/x", ContainerPath: "/x", RecursiveReadOnly: true})},
		{"config.mounts[0].recursive_read_only", mount(&runtimeapi.Mount{HostPath: "/x", ContainerPath: "/x", Readonly: true, RecursiveReadOnly: true, Propagation: 1})},
		{"uidMappings and gidMappings", mount(&runtimeapi.Mount{HostPath: "/x", ContainerPath: "/x", UidMappings: []*runtimeapi.IDMapping{{Length: 1}}})},
		{"config.devices[0].host_path", func(c *runtimeapi.ContainerConfig) { c.Devices = []*runtimeapi.Device{{HostPath: "null"}} }},
		{"config.devices[0].permissions", func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{HostPath: "/dev/null", Permissions: "x"}}
		}},
		{"config.linux.resources.memory_limit_in_bytes", resources(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: -2})},
		{"config.linux.resources.cpu_shares", resources(&runtimeapi.LinuxContainerResources{CpuShares: -1})},
		{"config.linux.resources.oom_score_adj", resources(&runtimeapi.LinuxContainerResources{OomScoreAdj: 1001})},
		{"config.linux.resources.unified", resources(&runtimeapi.LinuxContainerResources{Unified: map[string]string{"../x": "1"}})},
		{"run_as_user", security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser = &runtimeapi.Int64Value{Value: 1 << 32}
		})},
		{"run_as_user", security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsUser = &runtimeapi.Int64Value{Value: -1} })},
		{"run_as_group", security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.RunAsGroup = &runtimeapi.Int64Value{Value: 1} })},
		{"supplemental_groups", security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.SupplementalGroups = []int64{-1} })},
		{"supplemental_groups_policy", security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.SupplementalGroupsPolicy = 7 })},
		{"target_id", security(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET}
		})},
		{"masked_paths", security(func(s *runtimeapi.LinuxContainerSecurityContext) { s.MaskedPaths = []string{"proc"} })},
	} {
		r := &runtimeapi.CreateContainerRequest{Config: containerConfig("app"), SandboxConfig: podConfig("web")}
		c.change(r.Config)
		if err := validContainer(r); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.field) {
			t.Errorf("%s: %v", c.field, err)
		}
	}
	if err := validContainer(&runtimeapi.CreateContainerRequest{Config: containerConfig("app")}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no sandbox_config: %v", err)
	}
	if err := validContainer(&runtimeapi.CreateContainerRequest{Config: containerConfig("app"), SandboxConfig: podConfig("web")}); err != nil {
		t.Error(err)
	}
}
