package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/images"
)

// specFor builds a specification without a running pod.
func specFor(t *testing.T, host host, change func(*specInput)) (*specs.Spec, error) {
	t.Helper()
	dir := t.TempDir()
	s := &Service{host: host}
	s.cfg = Config{DataDir: dir, RunDir: dir}
	if err := s.cfg.complete(); err != nil {
		t.Fatal(err)
	}
	s.cdi.dirs = []string{filepath.Join(dir, "cdi")}
	in := &specInput{
		id: "c1", pausePID: 42, rootfs: filepath.Join(dir, "rootfs"),
		sandbox: newSandbox("s1", podConfig("web"), "", 0), config: containerConfig("app"),
		image: &images.Image{ID: "sha256:1"},
	}
	in.config.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{}, Resources: &runtimeapi.LinuxContainerResources{}}
	in.config.Command = []string{"/bin/app"}
	in.sandbox.config.Linux = &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{}}}
	for _, d := range []string{"rootfs/etc", "sandboxes/s1/shm", "cri/etc/s1"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"hostname", "hosts", "resolv.conf"} {
		if err := os.WriteFile(filepath.Join(dir, "cri/etc/s1", f), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if change != nil {
		change(in)
	}
	in.mounts = in.config.GetMounts()
	return s.buildSpec(ctx, in)
}

var fullHost = host{cgroup2: true, swap: true, hugetlb: true, seccomp: true, userns: true, rro: true, caps: []string{"CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_NET_ADMIN"}}

func TestProcessArgs(t *testing.T) {
	for _, c := range []struct {
		name                           string
		command, args, entrypoint, cmd []string
		want                           string
		invalid                        bool
	}{
		{"image's", nil, nil, []string{"e"}, []string{"c"}, "[e c]", false},
		{"args replace cmd", nil, []string{"a"}, []string{"e"}, []string{"c"}, "[e a]", false},
		{"command drops cmd", []string{"x"}, nil, []string{"e"}, []string{"c"}, "[x]", false},
		{"both", []string{"x"}, []string{"a"}, []string{"e"}, []string{"c"}, "[x a]", false},
		{"empty entrypoint", nil, nil, []string{""}, []string{"c"}, "[c]", false},
		{"nothing", nil, nil, nil, nil, "", true},
	} {
		got, err := processArgs(&runtimeapi.ContainerConfig{Command: c.command, Args: c.args}, c.entrypoint, c.cmd)
		if c.invalid != errdefs.IsInvalidArgument(err) || (!c.invalid && fmt.Sprint(got) != c.want) {
			t.Errorf("%s: got %v, %v", c.name, got, err)
		}
	}
}

func TestSpecEnvironment(t *testing.T) {
	spec, err := specFor(t, fullHost, func(in *specInput) {
		in.image.Config.Config.Env = []string{"PATH=/image", "A=1", "B=1"}
		in.config.Envs = []*runtimeapi.KeyValue{{Key: "B", Value: []byte("2")}, {Key: "C", Value: []byte("x=y")}}
		in.config.Tty = true
	})
	if err != nil {
		t.Fatal(err)
	}
	want := "[PATH=/image TERM=xterm HOSTNAME=web A=1 B=2 C=x=y]"
	if got := fmt.Sprint(spec.Process.Env); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func nsPaths(s *specs.Spec) string {
	var out []string
	for _, n := range s.Linux.Namespaces {
		out = append(out, string(n.Type)+":"+n.Path)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func TestSpecNamespaces(t *testing.T) {
	pod := func(in *specInput) *runtimeapi.NamespaceOption {
		return in.sandbox.config.Linux.SecurityContext.NamespaceOptions
	}
	mapping := []*runtimeapi.IDMapping{{HostId: 100000, Length: 65536}}
	users := &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: mapping, Gids: mapping}
	for _, c := range []struct {
		name   string
		change func(*specInput)
		want   string
	}{
		{"pod", func(in *specInput) {}, "cgroup: ipc:/proc/42/ns/ipc mount: network:/proc/42/ns/net pid:/proc/42/ns/pid uts:/proc/42/ns/uts"},
		{"own pid", func(in *specInput) {
			in.config.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
		}, "cgroup: ipc:/proc/42/ns/ipc mount: network:/proc/42/ns/net pid: uts:/proc/42/ns/uts"},
		{"target", func(in *specInput) {
			in.targetPID = 77
			in.config.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: "x"}
		}, "cgroup: ipc:/proc/42/ns/ipc mount: network:/proc/42/ns/net pid:/proc/77/ns/pid uts:/proc/42/ns/uts"},
		{"node", func(in *specInput) {
			all := &runtimeapi.NamespaceOption{Network: 2, Pid: 2, Ipc: 2}
			in.sandbox.config.Linux.SecurityContext.NamespaceOptions = all
			in.config.Linux.SecurityContext.NamespaceOptions = all
		}, "cgroup: mount:"},
		{"user", func(in *specInput) {
			pod(in).UsernsOptions = users
			in.config.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{UsernsOptions: users}
		}, "cgroup: ipc:/proc/42/ns/ipc mount: network:/proc/42/ns/net pid:/proc/42/ns/pid user:/proc/42/ns/user uts:/proc/42/ns/uts"},
		{"privileged sees the cgroups", func(in *specInput) { in.config.Linux.SecurityContext.Privileged = true },
			"ipc:/proc/42/ns/ipc mount: network:/proc/42/ns/net pid:/proc/42/ns/pid uts:/proc/42/ns/uts"},
	} {
		spec, err := specFor(t, fullHost, c.change)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if got := nsPaths(spec); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, c.want)
		}
	}
}

func TestSpecCapabilities(t *testing.T) {
	all := "CAP_CHOWN CAP_SYS_ADMIN CAP_NET_ADMIN"
	defaults := strings.Join(defaultCapabilities, " ")
	for _, c := range []struct {
		name       string
		caps       *runtimeapi.Capability
		privileged bool
		want       string
	}{
		{"none given", nil, false, defaults},
		{"add", &runtimeapi.Capability{AddCapabilities: []string{"sys_admin"}}, false, defaults + " CAP_SYS_ADMIN"},
		{"with prefix", &runtimeapi.Capability{AddCapabilities: []string{"CAP_SYS_ADMIN"}}, false, defaults + " CAP_SYS_ADMIN"},
		{"drop all, add one", &runtimeapi.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"CHOWN"}}, false, "CAP_CHOWN"},
		{"add all, drop one", &runtimeapi.Capability{AddCapabilities: []string{"all"}, DropCapabilities: []string{"CHOWN"}}, false, "CAP_SYS_ADMIN CAP_NET_ADMIN"},
		{"privileged", &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}, true, all},
	} {
		spec, err := specFor(t, fullHost, func(in *specInput) {
			in.config.Linux.SecurityContext.Capabilities = c.caps
			in.config.Linux.SecurityContext.Privileged = c.privileged
		})
		if err != nil {
			t.Fatal(c.name, err)
		}
		p := spec.Process.Capabilities
		if got := strings.Join(p.Bounding, " "); got != c.want || len(p.Inheritable) > 0 || len(p.Ambient) > 0 || !slices.Equal(p.Bounding, p.Effective) || !slices.Equal(p.Bounding, p.Permitted) {
			t.Errorf("%s: got %+v, want %s", c.name, p, c.want)
		}
	}
	spec, err := specFor(t, fullHost, func(in *specInput) {
		in.config.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddAmbientCapabilities: []string{"NET_ADMIN"}}
	})
	if err != nil {
		t.Fatal(err)
	}
	if p := spec.Process.Capabilities; fmt.Sprint(p.Ambient, p.Inheritable) != "[CAP_NET_ADMIN] [CAP_NET_ADMIN]" || !slices.Contains(p.Permitted, "CAP_NET_ADMIN") {
		t.Errorf("ambient: %+v", p)
	}
}

func TestSpecProfiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	good := write("good", `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["chmod"],"action":"SCMP_ACT_ERRNO"}]}`)
	local := func(ref string) *runtimeapi.SecurityProfile {
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: ref}
	}
	for _, c := range []struct {
		name       string
		seccomp    *runtimeapi.SecurityProfile
		apparmor   *runtimeapi.SecurityProfile
		privileged bool
		host       host
		filter     string // default action, "": none
		fails      func(error) bool
	}{
		{"absent", nil, nil, false, fullHost, "", nil},
		{"default", &runtimeapi.SecurityProfile{}, nil, false, fullHost, "SCMP_ACT_ERRNO", nil},
		{"unconfined", &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, nil, false, fullHost, "", nil},
		{"localhost", local(good), nil, false, fullHost, "SCMP_ACT_ALLOW", nil},
		{"privileged", local(good), nil, true, fullHost, "", nil},
		{"missing file", local(filepath.Join(dir, "none")), nil, false, fullHost, "", errdefs.IsInvalidArgument},
		{"relative", local("good"), nil, false, fullHost, "", errdefs.IsInvalidArgument},
		{"a directory", local(dir), nil, false, fullHost, "", errdefs.IsInvalidArgument},
		{"empty object", local(write("empty", "{}")), nil, false, fullHost, "", errdefs.IsInvalidArgument},
		{"no JSON", local(write("text", "hello")), nil, false, fullHost, "", errdefs.IsInvalidArgument},
		{"ref without type", &runtimeapi.SecurityProfile{LocalhostRef: good}, nil, false, fullHost, "", errdefs.IsInvalidArgument},
		{"no seccomp in the kernel", &runtimeapi.SecurityProfile{}, nil, false, host{}, "", errdefs.IsFailedPrecondition},
		{"no AppArmor", nil, &runtimeapi.SecurityProfile{}, false, fullHost, "", errdefs.IsFailedPrecondition},
		{"AppArmor but no parser", nil, nil, false, host{seccomp: true, appArmor: true}, "", nil},
		{"AppArmor but no parser, asked for", nil, &runtimeapi.SecurityProfile{}, false, host{seccomp: true, appArmor: true}, "", errdefs.IsFailedPrecondition},
		{"no AppArmor, unconfined", nil, &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, false, fullHost, "", nil},
	} {
		spec, err := specFor(t, c.host, func(in *specInput) {
			sc := in.config.Linux.SecurityContext
			sc.Seccomp, sc.Apparmor, sc.Privileged = c.seccomp, c.apparmor, c.privileged
		})
		if c.fails != nil {
			if !c.fails(err) {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		got := ""
		if spec.Linux.Seccomp != nil {
			got = string(spec.Linux.Seccomp.DefaultAction)
		}
		if got != c.filter {
			t.Errorf("%s: default action %q, want %q", c.name, got, c.filter)
		}
	}
}

func TestOldProfilePaths(t *testing.T) {
	for old, want := range map[string]string{
		"": "none", "runtime/default": "RuntimeDefault", "docker/default": "RuntimeDefault",
		"unconfined": "Unconfined", "localhost//x": "Localhost", "localhost/": "invalid", "strange": "invalid",
	} {
		p, err := profileOf("seccomp", nil, old)
		got := "none"
		switch {
		case errdefs.IsInvalidArgument(err):
			got = "invalid"
		case p != nil:
			got = p.GetProfileType().String()
		}
		if got != want {
			t.Errorf("%q: got %s, want %s", old, got, want)
		}
	}
}

func findMount(s *specs.Spec, at string) *specs.Mount {
	for i := range s.Mounts {
		if s.Mounts[i].Destination == at {
			return &s.Mounts[i]
		}
	}
	return nil
}

func TestSpecMounts(t *testing.T) {
	dir := t.TempDir()
	real := filepath.Join(dir, "real")
	if err := os.Mkdir(real, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	made := filepath.Join(dir, "made", "here")
	spec, err := specFor(t, fullHost, func(in *specInput) {
		in.config.Mounts = []*runtimeapi.Mount{
			{ContainerPath: "/a/b/c", HostPath: made},
			{ContainerPath: "/a", HostPath: filepath.Join(dir, "link"), Readonly: true},
			{ContainerPath: "/etc/hosts", HostPath: real},
			{ContainerPath: "/a/r", HostPath: real, Readonly: true, RecursiveReadOnly: true},
			{ContainerPath: "rel", HostPath: real, UidMappings: []*runtimeapi.IDMapping{{HostId: 5, ContainerId: 0, Length: 1}}, GidMappings: []*runtimeapi.IDMapping{{HostId: 6, ContainerId: 0, Length: 1}}},
		}
		in.volumes = []*runtimeapi.Mount{{ContainerPath: "/a/", HostPath: "/never"}, {ContainerPath: "/vol", HostPath: real}}
	})
	if err != nil {
		t.Fatal(err)
	}
	for at, want := range map[string]string{
		"/a": real + " [rbind rprivate ro]", "/a/b/c": made + " [rbind rprivate]", "/a/r": real + " [rbind rprivate rro]",
		"/etc/hosts": real + " [rbind rprivate]", "/vol": real + " [rbind rprivate]", "/rel": real + " [rbind rprivate]",
	} {
		m := findMount(spec, at)
		if m == nil {
			t.Errorf("%s: missing", at)
			continue
		}
		if got := fmt.Sprint(m.Source, " ", m.Options); got != want {
			t.Errorf("%s: got %s, want %s", at, got, want)
		}
	}
	if m := findMount(spec, "/rel"); m.UIDMappings[0].HostID != 5 || m.GIDMappings[0].HostID != 6 {
		t.Errorf("id mappings %+v", m)
	}
	at := func(p string) int {
		return slices.IndexFunc(spec.Mounts, func(m specs.Mount) bool { return m.Destination == p })
	}
	if at("/a") > at("/a/b/c") || at("/proc") > at("/a") || at("/dev") > at("/dev/shm") {
		t.Errorf("order: %v", spec.Mounts)
	}
	if st, err := os.Stat(made); err != nil || !st.IsDir() {
		t.Errorf("missing host path was not made: %v", err)
	}
}

func TestOwnDevTakesAllOfDev(t *testing.T) {
	spec, err := specFor(t, fullHost, func(in *specInput) {
		in.config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/dev", HostPath: t.TempDir()}}
	})
	if err != nil {
		t.Fatal(err)
	}
	if findMount(spec, "/dev/pts") != nil || findMount(spec, "/dev").Type != "bind" {
		t.Errorf("%v", spec.Mounts)
	}
}

func TestHangingSourceIsReportedOnce(t *testing.T) {
	var h hangs
	if !h.enter("/nfs") {
		t.Fatal("first look-up refused")
	}
	h.hung("/nfs")
	if h.enter("/nfs") {
		t.Error("a second look-up of a hanging path began")
	}
	if !h.enter("/other") {
		t.Error("another path was refused")
	}
	h.leave("/nfs")
	if !h.enter("/nfs") {
		t.Error("the path answers again and is refused")
	}
}

func TestPropagationNeedsASharedMount(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	for _, c := range []struct {
		flag        uintptr
		both, slave bool
	}{{unix.MS_PRIVATE, false, false}, {unix.MS_SHARED, true, true}} {
		if err := unix.Mount("", dir, "", c.flag, ""); err != nil {
			t.Fatal(err)
		}
		if err := propagates(dir, false); (err == nil) != c.both {
			t.Errorf("flag %x, bidirectional: %v", c.flag, err)
		}
		if err := propagates(dir, true); (err == nil) != c.slave {
			t.Errorf("flag %x, host to container: %v", c.flag, err)
		}
	}
}

func TestSpecDevices(t *testing.T) {
	spec, err := specFor(t, fullHost, func(in *specInput) {
		in.config.Devices = []*runtimeapi.Device{{HostPath: "/dev/null", ContainerPath: "/dev/mine", Permissions: "r"}}
	})
	if err != nil {
		t.Fatal(err)
	}
	d, rules := spec.Linux.Devices, spec.Linux.Resources.Devices
	if len(d) != 1 || d[0].Path != "/dev/mine" || d[0].Major != 1 || d[0].Minor != 3 || len(rules) != 2 || rules[0].Allow || !rules[1].Allow || rules[1].Access != "r" || *rules[1].Minor != 3 {
		t.Errorf("devices %+v, rules %+v", d, rules)
	}
	spec, err = specFor(t, fullHost, func(in *specInput) { in.config.Linux.SecurityContext.Privileged = true })
	if err != nil {
		t.Fatal(err)
	}
	if r := spec.Linux.Resources.Devices; len(r) != 1 || !r[0].Allow || len(spec.Linux.Devices) == 0 || spec.Linux.MaskedPaths != nil {
		t.Errorf("privileged: %+v", r)
	}
	if m := findMount(spec, "/sys"); !slices.Contains(m.Options, "rw") {
		t.Errorf("privileged /sys: %v", m)
	}
	_, err = specFor(t, fullHost, func(in *specInput) { in.config.Devices = []*runtimeapi.Device{{HostPath: "/etc/passwd"}} })
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "config.devices[0]") {
		t.Errorf("no device: %v", err)
	}
}

func TestSpecCDI(t *testing.T) {
	dir := ""
	add := func(in *specInput, annotation string) {
		dir = filepath.Join(filepath.Dir(in.rootfs), "cdi")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		spec := `{"cdiVersion":"0.6.0","kind":"vendor.com/device","devices":[{"name":"d0","containerEdits":{"env":["CDI=d0"]}}]}`
		if err := os.WriteFile(filepath.Join(dir, "vendor.json"), []byte(spec), 0o600); err != nil {
			t.Fatal(err)
		}
		if annotation != "" {
			in.config.Annotations = map[string]string{"cdi.k8s.io/x": annotation}
		}
	}
	for _, name := range []string{"field", "annotation"} {
		spec, err := specFor(t, fullHost, func(in *specInput) {
			if name == "field" {
				add(in, "")
				in.config.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/device=d0"}}
			} else {
				add(in, "vendor.com/device=d0")
			}
		})
		if err != nil || !slices.Contains(spec.Process.Env, "CDI=d0") {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := specFor(t, fullHost, func(in *specInput) {
		in.config.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/device=none"}}
	})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "vendor.com/device=none") {
		t.Errorf("unknown device: %v", err)
	}
}

func TestSpecResources(t *testing.T) {
	r := &runtimeapi.LinuxContainerResources{
		CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, MemoryLimitInBytes: 1 << 20, CpusetCpus: "0-1", OomScoreAdj: 500,
		HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}}, Unified: map[string]string{"memory.high": "1000"},
	}
	spec, err := specFor(t, fullHost, func(in *specInput) { in.config.Linux.Resources = r })
	if err != nil {
		t.Fatal(err)
	}
	got := spec.Linux.Resources
	if *got.CPU.Quota != 50000 || *got.CPU.Period != 100000 || *got.CPU.Shares != 512 || got.CPU.Cpus != "0-1" || *got.Memory.Limit != 1<<20 || *got.Memory.Swap != 1<<20 ||
		got.HugepageLimits[0].Limit != 4<<20 || got.Unified["memory.high"] != "1000" || *spec.Process.OOMScoreAdj != 500 {
		t.Errorf("%+v", got)
	}
	if spec.Linux.CgroupsPath != "/podd/c1" {
		t.Errorf("cgroup %s", spec.Linux.CgroupsPath)
	}
	noSwap := fullHost
	noSwap.swap = false
	spec, err = specFor(t, noSwap, func(in *specInput) { in.config.Linux.Resources = r })
	if err != nil || spec.Linux.Resources.Memory.Swap != nil {
		t.Errorf("swap without accounting: %v, %v", spec.Linux.Resources.Memory, err)
	}
	_, err = specFor(t, host{}, func(in *specInput) { in.config.Linux.Resources = r })
	if !errdefs.IsInvalidArgument(err) {
		t.Errorf("unified on cgroup v1: %v", err)
	}
}

func TestCgroupPath(t *testing.T) {
	parent := func(p string) *runtimeapi.PodSandboxConfig {
		return &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: p}}
	}
	for _, c := range []struct {
		systemd      bool
		parent, want string
	}{
		{false, "/kubepods/burstable/podX", "/kubepods/burstable/podX/id"},
		{false, "", "/podd/id"},
		{true, "kubepods-podX.slice", "kubepods-podX.slice:podd:id"},
		{true, "/kubepods.slice/kubepods-podX.slice", "kubepods-podX.slice:podd:id"},
		{true, "", "system.slice:podd:id"},
	} {
		s := &Service{cfg: Config{DataDir: "/d", RunDir: "/r", SystemdCgroup: c.systemd}}
		if err := s.cfg.complete(); err != nil {
			t.Fatal(err)
		}
		if got := s.cgroupPath(parent(c.parent), "id"); got != c.want {
			t.Errorf("%+v: got %s", c, got)
		}
	}
}

func TestUsers(t *testing.T) {
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, content string) {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("passwd", "root:x:0:0::/:/\napp:x:1000:1001::/:/\nbig:x:4294967296:0::/:/\n")
	write("group", "root:x:0:\nstaff:x:50:app,root\nweb:x:60:app\nbig:x:4294967296:app\n")
	db, err := openUsers(root)
	if err != nil {
		t.Fatal(err)
	}
	defer db.close()
	for _, c := range []struct {
		who      string
		uid, gid uint32
		invalid  bool
	}{
		{"0", 0, 0, false}, {"1000", 1000, 1001, false}, {"app", 1000, 1001, false}, {"app:staff", 1000, 50, false},
		{"app:7", 1000, 7, false}, {"7:8", 7, 8, false}, {"7", 7, 0, false}, {"7:web", 7, 60, false},
		{"nobody", 0, 0, true}, {"app:nogroup", 0, 0, true}, {"-1", 0, 0, true}, {"4294967296", 0, 0, true},
		{"2147483648", 0, 0, true}, {"99999999999999999999", 0, 0, true}, {"0:4294967296", 0, 0, true},
		{"big", 0, 0, true}, {"app:big", 0, 0, true}, {"a:b:c", 0, 0, true}, {":5", 0, 0, true}, {"app:", 0, 0, true},
	} {
		uid, gid, err := db.resolve(c.who)
		if c.invalid != errdefs.IsInvalidArgument(err) || uid != c.uid || gid != c.gid {
			t.Errorf("%q: %d:%d, %v", c.who, uid, gid, err)
		}
	}
	for who, want := range map[string]string{"app": "[50 60]", "1000": "[50 60]", "0": "[50]", "77": "[]", "nobody": "[]"} {
		if got, err := db.groupsOf(who); err != nil || fmt.Sprint(got) != want {
			t.Errorf("groups of %s: %v, %v", who, got, err)
		}
	}
}

// The user database is the image's: links, devices and FIFOs in it must lead
// nowhere else and block nothing.
func TestUsersStayInside(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(outside, []byte("evil:x:1:1::/:/\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, make := range map[string]func(at string) error{
		"absolute link": func(at string) error { return os.Symlink(outside, at) },
		"climbing link": func(at string) error { return os.Symlink(strings.Repeat("../", 20)+outside, at) },
		"magic link":    func(at string) error { return os.Symlink("/proc/1/root"+outside, at) },
		"fifo":          func(at string) error { return unix.Mkfifo(at, 0o644) },
		"directory":     func(at string) error { return os.Mkdir(at, 0o755) },
	} {
		root := t.TempDir()
		if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := make(filepath.Join(root, "etc", "passwd")); err != nil {
			t.Fatal(err)
		}
		db, err := openUsers(root)
		if err != nil {
			t.Fatal(err)
		}
		if uid, _, err := db.resolve("evil"); err == nil {
			t.Errorf("%s: found uid %d outside", name, uid)
		}
		db.close()
	}
}

func TestImageSubPathStaysInside(t *testing.T) {
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "a/b"), 0o755); err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{"abs": "/a/b", "climb": "../../../../a/b"} {
		if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, sub := range []string{"a/b", "abs", "climb"} {
		if got, err := imageSubPath(root, sub); err != nil || got != filepath.Join(root, "a/b") {
			t.Errorf("%s: %s, %v", sub, got, err)
		}
	}
	if _, err := imageSubPath(root, "none"); err == nil {
		t.Error("a missing path was found")
	}
}

func TestSignals(t *testing.T) {
	for s, want := range map[string]int{
		"SIGTERM": 15, "term": 15, "9": 9, "SIGRTMIN+3": 37, "RTMAX-1": 63, "SIGRTMINPLUS15": 49, "SIGRTMAXMINUS14": 50,
		"SIGCLD": 17, "SIGPOLL": 29, "": 0, "0": 0, "65": 0, "SIGNONE": 0, "SIGRTMIN+99": 0, "-1": 0,
	} {
		if got := parseSignal(s); got != want {
			t.Errorf("%q: got %d, want %d", s, got, want)
		}
	}
	for v, name := range runtimeapi.Signal_name {
		n, ok := signalNumber(runtimeapi.Signal(v))
		if !ok || (v != 0 && n == 0) {
			t.Errorf("%s has no number", name)
		}
	}
	if criSignal(10) != runtimeapi.Signal_SIGUSR1 || criSignal(17) != runtimeapi.Signal_SIGCHLD {
		t.Errorf("%v %v", criSignal(10), criSignal(17))
	}
	if n := stopSignal(&runtimeapi.ContainerConfig{StopSignal: runtimeapi.Signal_SIGUSR1}, "SIGQUIT"); n != 10 {
		t.Errorf("the container's signal comes first, got %d", n)
	}
	if n := stopSignal(&runtimeapi.ContainerConfig{}, "nonsense"); n != 15 {
		t.Errorf("got %d", n)
	}
}

// TestGroupOfAnImagesUser: with a user of the request the image's group does
// not count (which is what the kubelet's requests always have), without one its
// user and group do.
func TestGroupOfAnImagesUser(t *testing.T) {
	one, three := &runtimeapi.Int64Value{Value: 1}, &runtimeapi.Int64Value{Value: 3}
	for _, tt := range []struct {
		sc   *runtimeapi.LinuxContainerSecurityContext
		want string
	}{
		{&runtimeapi.LinuxContainerSecurityContext{RunAsUser: one}, "1"},
		{&runtimeapi.LinuxContainerSecurityContext{RunAsUsername: "app"}, "app"},
		{&runtimeapi.LinuxContainerSecurityContext{RunAsUser: one, RunAsGroup: three}, "1:3"},
		{&runtimeapi.LinuxContainerSecurityContext{}, "1:2"},
	} {
		if got, err := userString(tt.sc, "1:2"); err != nil || got != tt.want {
			t.Errorf("%v: %q, %v; want %q", tt.sc, got, err, tt.want)
		}
	}
}
