package cri

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/images"
)

// specInput is what the OCI specification of a container is made from. The
// root file system is mounted already.
type specInput struct {
	id         string
	sandbox    *sandbox
	pausePID   int
	targetPID  int // of the container whose PID namespace is shared; 0: none
	config     *runtimeapi.ContainerConfig
	image      *images.Image
	rootfs     string
	mounts     []*runtimeapi.Mount // the request's, with image volumes resolved
	volumes    []*runtimeapi.Mount // declared by the image
	mountLabel string
}

func (in *specInput) security() *runtimeapi.LinuxContainerSecurityContext {
	return in.config.GetLinux().GetSecurityContext()
}

func (in *specInput) privileged() bool { return in.security().GetPrivileged() }

// specStep fills one part of the specification.
type specStep struct {
	name string
	fn   func(context.Context, *specInput, *specs.Spec) error
}

// buildSpec is the list of what makes an OCI specification. Later steps see
// what earlier ones did: seccomp needs the capabilities, privileged undoes.
func (s *Service) buildSpec(ctx context.Context, in *specInput) (*specs.Spec, error) {
	spec := &specs.Spec{
		Version:     specs.Version,
		Root:        &specs.Root{Path: in.rootfs, Readonly: in.security().GetReadonlyRootfs()},
		Process:     &specs.Process{Cwd: "/", NoNewPrivileges: in.security().GetNoNewPrivs()},
		Linux:       &specs.Linux{Resources: &specs.LinuxResources{}},
		Annotations: specAnnotations(in),
	}
	for _, step := range []specStep{
		{"process", s.specProcess},
		{"user", s.specUser},
		{"namespaces", s.specNamespaces},
		{"selinux", s.specSELinux},
		{"mounts", s.specMounts},
		{"capabilities", s.specCapabilities},
		{"devices", s.specDevices},
		{"resources", s.specResources},
		{"paths", s.specPaths},
		{"seccomp", s.specSeccomp},
		{"apparmor", s.specAppArmor},
		{"cdi", s.specCDI},
	} {
		if err := step.fn(ctx, in, spec); err != nil {
			return nil, fmt.Errorf("specification: %s: %w", step.name, err)
		}
	}
	return spec, nil
}

// specAnnotations are those by which hooks and tools recognise a CRI container.
func specAnnotations(in *specInput) map[string]string {
	m := in.sandbox.config.GetMetadata()
	return map[string]string{
		"io.kubernetes.cri.container-type":    "container",
		"io.kubernetes.cri.container-name":    in.config.GetMetadata().GetName(),
		"io.kubernetes.cri.image-name":        in.config.GetImage().GetImage(),
		"io.kubernetes.cri.sandbox-id":        in.sandbox.id,
		"io.kubernetes.cri.sandbox-name":      m.GetName(),
		"io.kubernetes.cri.sandbox-namespace": m.GetNamespace(),
		"io.kubernetes.cri.sandbox-uid":       m.GetUid(),
	}
}

// cgroupParent is the group below which all of a pod is.
func (s *Service) cgroupParent(c *runtimeapi.PodSandboxConfig) string {
	if p := c.GetLinux().GetCgroupParent(); p != "" {
		return p
	}
	return s.cfg.CgroupParent
}

// cgroupPath names the group of one process tree: a path with cgroupfs,
// slice:prefix:name with systemd, as libcontainer reads them.
func (s *Service) cgroupPath(c *runtimeapi.PodSandboxConfig, id string) string {
	parent := s.cgroupParent(c)
	if s.cfg.SystemdCgroup {
		// The kubelet may give the whole path of nested slices; systemd wants
		// the last one, whose name says the rest.
		return strings.Join([]string{filepath.Base(parent), "podd", id}, ":")
	}
	return filepath.Join("/", parent, id)
}

// specNamespaces says what the container shares: POD is the pause's, NODE is
// absent, CONTAINER is new, TARGET another container's.
func (s *Service) specNamespaces(_ context.Context, in *specInput, spec *specs.Spec) error {
	ns := in.security().GetNamespaceOptions()
	pod := in.sandbox.namespaces()
	of := func(pid int, kind string) string { return fmt.Sprintf("/proc/%d/ns/%s", pid, kind) }
	add := func(t specs.LinuxNamespaceType, path string) {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: t, Path: path})
	}
	add(specs.MountNamespace, "")
	// The sandbox decides on network and IPC: the pause has these namespaces
	// or it has not.
	if pod.GetNetwork() != runtimeapi.NamespaceMode_NODE {
		add(specs.NetworkNamespace, of(in.pausePID, "net"))
		add(specs.UTSNamespace, of(in.pausePID, "uts"))
	}
	if pod.GetIpc() != runtimeapi.NamespaceMode_NODE {
		add(specs.IPCNamespace, of(in.pausePID, "ipc"))
	}
	switch ns.GetPid() {
	case runtimeapi.NamespaceMode_CONTAINER:
		add(specs.PIDNamespace, "")
	case runtimeapi.NamespaceMode_POD:
		if pod.GetPid() != runtimeapi.NamespaceMode_NODE {
			add(specs.PIDNamespace, of(in.pausePID, "pid"))
		}
	case runtimeapi.NamespaceMode_TARGET:
		add(specs.PIDNamespace, of(in.targetPID, "pid"))
	case runtimeapi.NamespaceMode_NODE:
	}
	if s.host.cgroup2 && !in.privileged() {
		add(specs.CgroupNamespace, "")
	}
	if userns(in.sandbox) {
		// The maps are those of the pause's namespace.
		add(specs.UserNamespace, of(in.pausePID, "user"))
	}
	return nil
}

// userns says whether the pod has a user namespace of its own.
func userns(sb *sandbox) bool {
	return sb.namespaces().GetUsernsOptions() != nil && sb.namespaces().GetUsernsOptions().GetMode() == runtimeapi.NamespaceMode_POD
}

// specProcess sets arguments, environment, directory and terminal.
func (s *Service) specProcess(_ context.Context, in *specInput, spec *specs.Spec) error {
	args, err := processArgs(in.config, in.image.Config.Config.Entrypoint, in.image.Config.Config.Cmd)
	if err != nil {
		return err
	}
	p := spec.Process
	p.Args = args
	if w := in.config.GetWorkingDir(); w != "" {
		p.Cwd = w
	} else if w := in.image.Config.Config.WorkingDir; w != "" {
		if badPath(w) {
			return invalid("image %s: working directory %q", in.image.ID, clip(w))
		}
		p.Cwd = filepath.Join("/", w)
	}
	hostname := in.sandbox.config.GetHostname()
	if hostname == "" {
		hostname, _ = os.Hostname()
	}
	env := environment{index: make(map[string]int)}
	env.set("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	if in.config.GetTty() {
		p.Terminal = true
		env.set("TERM=xterm")
	}
	env.set("HOSTNAME=" + hostname)
	for _, e := range in.image.Config.Config.Env {
		if strings.Contains(e, "\x00") || strings.HasPrefix(e, "=") {
			continue // the kernel would cut it there
		}
		env.set(e)
	}
	for _, e := range in.config.GetEnvs() {
		env.set(e.GetKey() + "=" + string(e.GetValue()))
	}
	p.Env = env.list
	if r := in.config.GetLinux().GetResources(); r != nil {
		adj := s.host.clampOOM(int(r.GetOomScoreAdj()))
		p.OOMScoreAdj = &adj
	}
	return nil
}

// environment keeps one value for each name, in the order of first mention.
type environment struct {
	list  []string
	index map[string]int
}

func (e *environment) set(kv string) {
	key, _, _ := strings.Cut(kv, "=")
	if i, ok := e.index[key]; ok {
		e.list[i] = kv
		return
	}
	e.index[key] = len(e.list)
	e.list = append(e.list, kv)
}

// processArgs applies Kubernetes' rules: command replaces the entrypoint and
// drops the image's cmd, args replace the cmd. An entrypoint of one empty
// string is none.
func processArgs(c *runtimeapi.ContainerConfig, entrypoint, cmd []string) ([]string, error) {
	command, args := c.GetCommand(), c.GetArgs()
	if len(command) == 0 {
		if len(args) == 0 {
			args = cmd
		}
		if len(entrypoint) != 1 || entrypoint[0] != "" {
			command = entrypoint
		}
	}
	out := append(append(make([]string, 0, len(command)+len(args)), command...), args...)
	if len(out) == 0 {
		return nil, invalid("no command: config.command and args are empty and the image has neither entrypoint nor cmd")
	}
	return out, nil
}

// specResources sets the cgroup and its limits.
func (s *Service) specResources(_ context.Context, in *specInput, spec *specs.Spec) error {
	spec.Linux.CgroupsPath = s.cgroupPath(in.sandbox.config, in.id)
	return s.applyResources(spec.Linux.Resources, in.config.GetLinux().GetResources())
}

// applyResources adds the CRI's limits to OCI ones; absent (zero) values stay
// as they are.
func (s *Service) applyResources(to *specs.LinuxResources, r *runtimeapi.LinuxContainerResources) error {
	if r == nil {
		return nil
	}
	cpu := &specs.LinuxCPU{Cpus: r.GetCpusetCpus(), Mems: r.GetCpusetMems()}
	if v := uint64(r.GetCpuPeriod()); v != 0 {
		cpu.Period = &v
	}
	if v := r.GetCpuQuota(); v != 0 {
		cpu.Quota = &v
	}
	if v := uint64(r.GetCpuShares()); v != 0 {
		cpu.Shares = &v
	}
	to.CPU = cpu
	mem := &specs.LinuxMemory{}
	if limit := r.GetMemoryLimitInBytes(); limit != 0 {
		mem.Limit = &limit
		if s.host.swap && r.GetMemorySwapLimitInBytes() == 0 {
			mem.Swap = &limit // no swap unless it is asked for
		}
	}
	if v := r.GetMemorySwapLimitInBytes(); v != 0 && s.host.swap {
		mem.Swap = &v
	}
	to.Memory = mem
	if len(r.GetHugepageLimits()) > 0 && s.host.hugetlb {
		for _, h := range r.GetHugepageLimits() {
			to.HugepageLimits = append(to.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: h.GetPageSize(), Limit: h.GetLimit()})
		}
	}
	if len(r.GetUnified()) > 0 {
		if !s.host.cgroup2 {
			return invalid("resources.unified: this node has no unified cgroup hierarchy")
		}
		to.Unified = maps.Clone(r.GetUnified())
	}
	return nil
}
