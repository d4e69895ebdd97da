package cri

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Bounds of what a request may carry. They are far above anything that
// Kubernetes sends and keep a bad client from filling memory and disk.
const (
	maxName      = 253  // a DNS subdomain, the longest name Kubernetes has
	maxPath      = 4095 // PATH_MAX without its NUL
	maxMounts    = 10000
	maxPorts     = 65536
	maxUID       = 1<<31 - 1 // runc's bound; the kernel's is 2^32-2
	maxIDMapping = 340       // the kernel's extents of one map, see user_namespaces(7)
)

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// validateSandbox checks what RunPodSandbox is given, field by field.
func validateSandbox(r *runtimeapi.RunPodSandboxRequest) error {
	c := r.GetConfig()
	if c == nil {
		return invalid("config is missing")
	}
	m := c.GetMetadata()
	if m == nil {
		return invalid("config.metadata is missing")
	}
	for _, f := range []struct{ field, value string }{
		{"config.metadata.name", m.GetName()}, {"config.metadata.namespace", m.GetNamespace()}, {"config.metadata.uid", m.GetUid()},
	} {
		if err := validName(f.field, f.value, f.field == "config.metadata.name"); err != nil {
			return err
		}
	}
	if err := validHandler(r.GetRuntimeHandler()); err != nil {
		return err
	}
	if h := c.GetHostname(); len(h) > 64 || strings.ContainsAny(h, "\x00\n/ ") {
		return invalid("config.hostname %q: want at most 64 bytes (the kernel's bound) without blanks", clip(h))
	}
	if d := c.GetLogDirectory(); d != "" && !cleanAbs(d) {
		return invalid("config.log_directory %q: want a clean absolute path", clip(d))
	}
	if err := validDNS(c.GetDnsConfig()); err != nil {
		return err
	}
	if err := validPorts(c.GetPortMappings()); err != nil {
		return err
	}
	return validSandboxLinux(c.GetLinux())
}

func validSandboxLinux(l *runtimeapi.LinuxPodSandboxConfig) error {
	if err := validCgroupParent(l.GetCgroupParent()); err != nil {
		return err
	}
	ns := l.GetSecurityContext().GetNamespaceOptions()
	for field, mode := range map[string]runtimeapi.NamespaceMode{"network": ns.GetNetwork(), "ipc": ns.GetIpc()} {
		if mode != runtimeapi.NamespaceMode_POD && mode != runtimeapi.NamespaceMode_NODE {
			return invalid("config.linux.security_context.namespace_options.%s %v: want POD or NODE", field, mode)
		}
	}
	if m := ns.GetPid(); m == runtimeapi.NamespaceMode_TARGET {
		return invalid("config.linux.security_context.namespace_options.pid TARGET: want POD, CONTAINER or NODE for a sandbox")
	}
	if _, _, err := userMappings(ns.GetUsernsOptions()); err != nil {
		return err
	}
	for k, v := range l.GetSysctls() {
		if k == "" || len(k) > maxName || strings.Contains(k, "..") || strings.ContainsAny(k, "\x00\n ") || strings.Contains(v, "\x00") {
			return invalid("config.linux.sysctls %q: no sysctl's name", clip(k))
		}
	}
	for field, r := range map[string]*runtimeapi.LinuxContainerResources{"resources": l.GetResources(), "overhead": l.GetOverhead()} {
		if err := validResources("config.linux."+field, r); err != nil {
			return err
		}
	}
	return nil
}

// validContainer checks what CreateContainer is given.
func validContainer(r *runtimeapi.CreateContainerRequest) error {
	c := r.GetConfig()
	if c == nil {
		return invalid("config is missing")
	}
	if c.GetMetadata() == nil {
		return invalid("config.metadata is missing")
	}
	if err := validName("config.metadata.name", c.GetMetadata().GetName(), true); err != nil {
		return err
	}
	if r.GetSandboxConfig() == nil || r.GetSandboxConfig().GetMetadata() == nil {
		return invalid("sandbox_config.metadata is missing")
	}
	if c.GetImage().GetImage() == "" {
		return invalid("config.image.image is missing")
	}
	if w := c.GetWorkingDir(); w != "" && (!path.IsAbs(w) || badPath(w)) {
		return invalid("config.working_dir %q: want an absolute path", clip(w))
	}
	if p := c.GetLogPath(); p != "" && (badPath(p) || path.IsAbs(p) || path.Clean(p) != p || p == ".." || strings.HasPrefix(p, "../")) {
		return invalid("config.log_path %q: want a clean relative path below the sandbox' log_directory", clip(p))
	}
	if _, ok := signalNumber(c.GetStopSignal()); !ok {
		return invalid("config.stop_signal %d: unknown", c.GetStopSignal())
	}
	for i, e := range c.GetEnvs() {
		if e.GetKey() == "" || strings.ContainsAny(e.GetKey(), "=\x00") || strings.Contains(string(e.GetValue()), "\x00") {
			return invalid("config.envs[%d] %q: a name without '=' and no NUL bytes are needed", i, clip(e.GetKey()))
		}
	}
	for i, a := range append(append([]string(nil), c.GetCommand()...), c.GetArgs()...) {
		if strings.Contains(a, "\x00") {
			return invalid("config.command and args: element %d holds a NUL byte", i)
		}
	}
	if len(c.GetMounts()) > maxMounts {
		return invalid("config.mounts: %d, at most %d", len(c.GetMounts()), maxMounts)
	}
	for i, m := range c.GetMounts() {
		if err := validMount(fmt.Sprintf("config.mounts[%d]", i), m); err != nil {
			return err
		}
	}
	for i, d := range c.GetDevices() {
		if err := validDevice(fmt.Sprintf("config.devices[%d]", i), d); err != nil {
			return err
		}
	}
	if err := validResources("config.linux.resources", c.GetLinux().GetResources()); err != nil {
		return err
	}
	return validSecurity(c.GetLinux().GetSecurityContext())
}

func validSecurity(sc *runtimeapi.LinuxContainerSecurityContext) error {
	const in = "config.linux.security_context."
	for field, v := range map[string]*runtimeapi.Int64Value{"run_as_user": sc.GetRunAsUser(), "run_as_group": sc.GetRunAsGroup()} {
		if v != nil && (v.GetValue() < 0 || v.GetValue() > maxUID) {
			return invalid(in+"%s %d: out of range 0 to %d", field, v.GetValue(), maxUID)
		}
	}
	if sc.GetRunAsGroup() != nil && sc.GetRunAsUser() == nil && sc.GetRunAsUsername() == "" {
		return invalid(in + "run_as_group is set without run_as_user or run_as_username")
	}
	for _, g := range sc.GetSupplementalGroups() {
		if g < 0 || g > maxUID {
			return invalid(in+"supplemental_groups %d: out of range 0 to %d", g, maxUID)
		}
	}
	if p := sc.GetSupplementalGroupsPolicy(); p != runtimeapi.SupplementalGroupsPolicy_Merge && p != runtimeapi.SupplementalGroupsPolicy_Strict {
		return invalid(in+"supplemental_groups_policy %d: unknown", p)
	}
	ns := sc.GetNamespaceOptions()
	if ns.GetPid() == runtimeapi.NamespaceMode_TARGET && ns.GetTargetId() == "" {
		return invalid(in + "namespace_options.target_id is missing with pid TARGET")
	}
	if _, _, err := userMappings(ns.GetUsernsOptions()); err != nil {
		return err
	}
	for field, paths := range map[string][]string{"masked_paths": sc.GetMaskedPaths(), "readonly_paths": sc.GetReadonlyPaths()} {
		for _, p := range paths {
			if !path.IsAbs(p) || badPath(p) {
				return invalid(in+"%s %q: want an absolute path", field, clip(p))
			}
		}
	}
	return nil
}

func validMount(field string, m *runtimeapi.Mount) error {
	if p := m.GetContainerPath(); p == "" || badPath(p) {
		return invalid("%s.container_path %q: want a path of at most %d bytes", field, clip(p), maxPath)
	}
	if path.Clean("/"+m.GetContainerPath()) == "/" {
		return invalid("%s.container_path %q: the root cannot be mounted over", field, clip(m.GetContainerPath()))
	}
	if img := m.GetImage(); img != nil && img.GetImage() != "" {
		switch {
		case m.GetHostPath() != "":
			return invalid("%s: host_path and image exclude each other", field)
		case !m.GetReadonly():
			return invalid("%s.readonly: an image can be mounted read-only only", field)
		}
		if sub := m.GetImageSubPath(); sub != "" && (badPath(sub) || path.IsAbs(sub) || hasDotDot(sub)) {
			return invalid("%s.image_sub_path %q: want a relative path without '..'", field, clip(sub))
		}
	} else if p := m.GetHostPath(); !path.IsAbs(p) || badPath(p) {
		return invalid("%s.host_path %q: want an absolute path of at most %d bytes", field, clip(p), maxPath)
	}
	if m.GetRecursiveReadOnly() {
		if !m.GetReadonly() {
			return invalid("%s.recursive_read_only needs readonly", field)
		}
		if m.GetPropagation() != runtimeapi.MountPropagation_PROPAGATION_PRIVATE {
			return invalid("%s.recursive_read_only needs private propagation, got %v", field, m.GetPropagation())
		}
	}
	for _, ids := range [][]*runtimeapi.IDMapping{m.GetUidMappings(), m.GetGidMappings()} {
		if _, err := idMappings(field+" id mappings", ids); err != nil {
			return err
		}
	}
	if (len(m.GetUidMappings()) == 0) != (len(m.GetGidMappings()) == 0) {
		return invalid("%s: uidMappings and gidMappings go together", field)
	}
	return nil
}

func validDevice(field string, d *runtimeapi.Device) error {
	if !path.IsAbs(d.GetHostPath()) || badPath(d.GetHostPath()) {
		return invalid("%s.host_path %q: want an absolute path", field, clip(d.GetHostPath()))
	}
	if p := d.GetContainerPath(); p != "" && (!path.IsAbs(p) || badPath(p)) {
		return invalid("%s.container_path %q: want an absolute path", field, clip(p))
	}
	if p := d.GetPermissions(); strings.Trim(p, "rwm") != "" || len(p) > 3 {
		return invalid("%s.permissions %q: want letters of rwm", field, clip(p))
	}
	return nil
}

func validResources(field string, r *runtimeapi.LinuxContainerResources) error {
	for _, f := range []struct {
		name     string
		v, least int64
	}{
		{"cpu_period", r.GetCpuPeriod(), 0}, {"cpu_quota", r.GetCpuQuota(), -1}, {"cpu_shares", r.GetCpuShares(), 0},
		{"memory_limit_in_bytes", r.GetMemoryLimitInBytes(), -1}, {"memory_swap_limit_in_bytes", r.GetMemorySwapLimitInBytes(), -1},
	} {
		if f.v < f.least {
			return invalid("%s.%s %d: must not be below %d", field, f.name, f.v, f.least)
		}
	}
	if a := r.GetOomScoreAdj(); a < -1000 || a > 1000 {
		return invalid("%s.oom_score_adj %d: out of range -1000 to 1000", field, a)
	}
	for _, h := range r.GetHugepageLimits() {
		if h.GetPageSize() == "" || strings.ContainsAny(h.GetPageSize(), "/\x00") || len(h.GetPageSize()) > 16 {
			return invalid("%s.hugepage_limits page_size %q: want a size like 2MB", field, clip(h.GetPageSize()))
		}
	}
	for k := range r.GetUnified() {
		if k == "" || len(k) > maxName || strings.ContainsAny(k, "/\x00") {
			return invalid("%s.unified %q: want a cgroup v2 file's name", field, clip(k))
		}
	}
	return nil
}

func validDNS(c *runtimeapi.DNSConfig) error {
	for field, list := range map[string][]string{"servers": c.GetServers(), "searches": c.GetSearches(), "options": c.GetOptions()} {
		for _, v := range list {
			// A newline would add lines of the client's choice to resolv.conf.
			if v == "" || len(v) > maxName+1 || strings.ContainsAny(v, "\n\r\x00 \t") {
				return invalid("config.dns_config.%s %q: want one word", field, clip(v))
			}
		}
	}
	return nil
}

func validPorts(ports []*runtimeapi.PortMapping) error {
	if len(ports) > maxPorts {
		return invalid("config.port_mappings: %d, at most %d", len(ports), maxPorts)
	}
	for i, p := range ports {
		if p.GetContainerPort() < 0 || p.GetContainerPort() > 65535 || p.GetHostPort() < 0 || p.GetHostPort() > 65535 {
			return invalid("config.port_mappings[%d]: ports %d and %d: out of range 0 to 65535", i, p.GetContainerPort(), p.GetHostPort())
		}
		if _, ok := runtimeapi.Protocol_name[int32(p.GetProtocol())]; !ok {
			return invalid("config.port_mappings[%d].protocol %d: unknown", i, p.GetProtocol())
		}
	}
	return nil
}

// validHandler accepts the runtime handlers of Status.
func validHandler(h string) error {
	if h == "" || h == handlerName {
		return nil
	}
	return fmt.Errorf("runtime_handler %q: the handlers are \"\" and %q: %w", clip(h), handlerName, errdefs.ErrInvalidArgument)
}

func validCgroupParent(p string) error {
	if p == "" {
		return nil
	}
	if badPath(p) || hasDotDot(p) || len(p) > 1024 || strings.ContainsAny(p, "\n:") {
		return invalid("config.linux.cgroup_parent %q: want a path or slice without '..'", clip(p))
	}
	return nil
}

func validName(field, v string, required bool) error {
	switch {
	case v == "" && required:
		return invalid("%s is missing", field)
	case len(v) > maxName:
		return invalid("%s: %d bytes, at most %d", field, len(v), maxName)
	case strings.ContainsAny(v, "/\x00\n"):
		return invalid("%s %q: '/', newline and NUL are not allowed", field, clip(v))
	}
	return nil
}

func badPath(p string) bool { return len(p) > maxPath || strings.Contains(p, "\x00") }

func cleanAbs(p string) bool { return path.IsAbs(p) && !badPath(p) && !hasDotDot(p) }

func hasDotDot(p string) bool {
	for part := range strings.SplitSeq(p, "/") {
		if part == ".." {
			return true
		}
	}
	return false
}

// userMappings returns the id maps of a pod's user namespace; nil: the node's.
func userMappings(u *runtimeapi.UserNamespace) (uids, gids []specs.LinuxIDMapping, err error) {
	const field = "namespace_options.userns_options"
	if u == nil {
		return nil, nil, nil
	}
	switch u.GetMode() {
	case runtimeapi.NamespaceMode_NODE:
		if len(u.GetUids()) > 0 || len(u.GetGids()) > 0 {
			return nil, nil, invalid("%s: mappings need mode POD", field)
		}
		return nil, nil, nil
	case runtimeapi.NamespaceMode_POD:
	default:
		return nil, nil, invalid("%s.mode %v: want POD or NODE", field, u.GetMode())
	}
	if uids, err = idMappings(field+".uids", u.GetUids()); err != nil {
		return nil, nil, err
	}
	if gids, err = idMappings(field+".gids", u.GetGids()); err != nil {
		return nil, nil, err
	}
	if len(uids) == 0 || len(gids) == 0 {
		return nil, nil, invalid("%s: uids and gids are both needed", field)
	}
	zero := func(m specs.LinuxIDMapping) bool { return m.ContainerID == 0 }
	switch {
	case !slices.ContainsFunc(uids, zero):
		return nil, nil, invalid("%s.uids: container id 0 is not mapped", field)
	case !slices.ContainsFunc(gids, zero):
		return nil, nil, invalid("%s.gids: container id 0 is not mapped", field)
	}
	return uids, gids, nil
}

func idMappings(field string, ids []*runtimeapi.IDMapping) ([]specs.LinuxIDMapping, error) {
	if len(ids) > maxIDMapping {
		return nil, invalid("%s: %d ranges, at most %d", field, len(ids), maxIDMapping)
	}
	var out []specs.LinuxIDMapping
	for i, m := range ids {
		if m.GetLength() == 0 {
			return nil, invalid("%s[%d].length is 0", field, i)
		}
		if uint64(m.GetHostId())+uint64(m.GetLength()) > 1<<32-1 || uint64(m.GetContainerId())+uint64(m.GetLength()) > 1<<32-1 {
			return nil, invalid("%s[%d]: the range leaves the 32-bit ids", field, i)
		}
		for j, o := range out { // the kernel wants them disjoint on either side, user_namespaces(7)
			switch {
			case overlap(m.GetContainerId(), o.ContainerID, m.GetLength(), o.Size):
				return nil, invalid("%s[%d]: container ids are in range %d too", field, i, j)
			case overlap(m.GetHostId(), o.HostID, m.GetLength(), o.Size):
				return nil, invalid("%s[%d]: host ids are in range %d too", field, i, j)
			}
		}
		out = append(out, specs.LinuxIDMapping{ContainerID: m.GetContainerId(), HostID: m.GetHostId(), Size: m.GetLength()})
	}
	return out, nil
}

// overlap says whether two ranges of ids, begun at a and b, have one in common.
func overlap(a, b, lengthA, lengthB uint32) bool {
	return uint64(a) < uint64(b)+uint64(lengthB) && uint64(b) < uint64(a)+uint64(lengthA)
}
