package preflight

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

func privileges(l *look) {
	if uid := l.host.UID(); uid != 0 {
		l.found(Error, "run it as root; rootless operation is not supported", "runs as user %d", uid)
		return
	}
	l.found(OK, "", "root")
}

// version of a release such as 6.1.0-18-amd64.
func version(release string) (major, minor int) {
	fmt.Sscanf(release, "%d.%d", &major, &minor)
	return major, minor
}

// kernelVersion: pidfd_getfd, openat2 and CLONE_INTO_CGROUP came with 5.7 at the
// latest; cgroup.kill and id-mapped mounts with 5.14.
func kernelVersion(l *look) {
	release := l.host.Release()
	major, minor := version(release)
	switch n := major*1000 + minor; {
	case n < 5007:
		l.found(Error, "boot Linux 5.7 or later, better 6.1", "Linux %s is too old", release)
	case n < 5014:
		l.found(Warning, "boot Linux 5.14 or later", "Linux %s has no id-mapped mounts and no cgroup.kill: pods with users of their own do not start", release)
	default:
		l.found(OK, "", "Linux %s", release)
	}
}

func kernelFeatures(l *look) {
	missing := 0
	lacks := func(s Severity, remedy, format string, args ...any) {
		missing++
		l.found(s, remedy, format, args...)
	}
	for _, ns := range []string{"mnt", "pid", "net", "ipc", "uts"} {
		if !l.host.exists("/proc/self/ns/" + ns) {
			lacks(Error, "boot a kernel with CONFIG_NAMESPACES and all below it", "no %s namespaces", ns)
		}
	}
	if !l.host.exists("/proc/self/ns/cgroup") {
		lacks(Warning, "boot a kernel with CONFIG_CGROUPS", "no cgroup namespaces: containers see the host's groups")
	}
	if !l.host.exists("/proc/self/ns/user") || l.host.read("/proc/sys/user/max_user_namespaces") == "0" {
		lacks(Warning, "set sysctl user.max_user_namespaces above 0", "no user namespaces: pods with hostUsers: false do not start")
	}
	for _, call := range []string{"pidfd_open", "openat2"} {
		if err := l.host.Syscall(call); err != nil {
			lacks(Error, "boot Linux 5.7 or later; inside a container, allow the call", "%s does not work: %v", call, err)
		}
	}
	if err := l.host.Syscall("seccomp"); err != nil || !strings.Contains(l.host.read("/proc/sys/kernel/seccomp/actions_avail"), "errno") {
		lacks(Error, "boot a kernel with CONFIG_SECCOMP_FILTER", "no seccomp filters")
	}
	if missing == 0 {
		l.found(OK, "", "namespaces, seccomp, pidfd, openat2")
	}
}

// modules that are neither there nor can be loaded.
func modules(l *look) {
	dir := "/lib/modules/" + l.host.Release()
	loadable := func(name string) bool {
		for _, list := range []string{"modules.builtin", "modules.dep"} {
			for line := range strings.SplitSeq(l.host.read(filepath.Join(dir, list)), "\n") {
				file, _, _ := strings.Cut(line, ":")
				base, _, _ := strings.Cut(filepath.Base(file), ".ko")
				if strings.ReplaceAll(base, "-", "_") == name {
					return true
				}
			}
		}
		return l.host.exists("/sys/module/" + name)
	}
	missing := 0
	if !slices.Contains(strings.Fields(l.host.read("/proc/filesystems")), "overlay") && !loadable("overlay") {
		missing++
		l.found(Error, "install the kernel's modules, or boot a kernel with CONFIG_OVERLAY_FS", "no overlay file system: containers have no root file system")
	}
	// A kernel without modules has what it has, and no list of it.
	if l.host.exists(filepath.Join(dir, "modules.dep")) {
		for _, m := range []struct{ name, what string }{
			{"bridge", "the built-in network"}, {"veth", "networks of pods"}, {"nf_tables", "host ports and masquerading"},
		} {
			if !loadable(m.name) {
				missing++
				l.found(Warning, "install the kernel's modules (Debian: linux-image-amd64, not -cloud; Ubuntu: linux-modules-extra)", "no module %s: %s will not work", m.name, m.what)
			}
		}
	}
	if missing == 0 {
		l.found(OK, "", "overlay, bridge, veth, nf_tables")
	}
}

func controllers(l *look) {
	if l.host.exists("/sys/fs/cgroup/cgroup.controllers") {
		have := strings.Fields(l.host.read("/sys/fs/cgroup/cgroup.controllers"))
		lack := func(want ...string) (out []string) {
			for _, c := range want {
				if !slices.Contains(have, c) {
					out = append(out, c)
				}
			}
			return out
		}
		if missing := lack("cpu", "memory", "pids"); missing != nil {
			l.found(Error, "boot without cgroup_disable=; on a Raspberry Pi add cgroup_enable=memory", "cgroup v2 without %s", strings.Join(missing, ", "))
			return
		}
		if missing := lack("cpuset", "io", "hugetlb"); missing != nil {
			l.found(Warning, "boot a kernel that has them, if pods need them", "cgroup v2 without %s: such limits have no effect", strings.Join(missing, ", "))
			return
		}
		l.found(OK, "", "cgroup v2: %s", strings.Join(have, " "))
		return
	}
	enabled := map[string]bool{}
	for line := range strings.SplitSeq(l.host.read("/proc/cgroups"), "\n") {
		if f := strings.Fields(line); len(f) == 4 && f[3] == "1" {
			enabled[f[0]] = true
		}
	}
	var missing []string
	for _, c := range []string{"cpu", "memory", "pids", "devices", "freezer"} {
		if !enabled[c] {
			missing = append(missing, c)
		}
	}
	switch {
	case len(enabled) == 0:
		l.found(Error, "mount cgroup2 on /sys/fs/cgroup", "no control groups")
	case missing != nil:
		l.found(Error, "boot without cgroup_disable=", "cgroup v1 without %s", strings.Join(missing, ", "))
	default:
		l.found(Warning, "boot with systemd.unified_cgroup_hierarchy=1", "cgroup v1: it works here, but Kubernetes has deprecated it")
	}
}

func cgroupDriver(l *look) {
	systemd := l.host.exists("/run/systemd/system")
	switch driver := l.node.CgroupDriver; {
	case driver == "systemd" && !systemd:
		l.found(Error, "set cgroupDriver: cgroupfs", "cgroupDriver is systemd, but systemd does not run")
	case driver != "systemd" && systemd:
		l.found(Warning, "set cgroupDriver: systemd", "systemd runs here, but cgroupDriver is %s: two who write into one hierarchy undo each other's work", driver)
	default:
		l.found(OK, "", "%s", driver)
	}
}

func sysctls(l *look) {
	find := 0
	number := func(name string) (int, bool) {
		n, err := strconv.Atoi(l.host.read("/proc/sys/" + name))
		return n, err == nil
	}
	least := func(name string, want int, why string) {
		if n, ok := number(name); ok && n < want {
			find++
			key := strings.ReplaceAll(name, "/", ".")
			l.found(Warning, fmt.Sprintf("sysctl -w %s=%d, and in /etc/sysctl.d", key, want), "%s is %d: %s", key, n, why)
		}
	}
	least("fs/inotify/max_user_instances", 1024, "containers that watch files run out of them")
	least("fs/inotify/max_user_watches", 65536, "containers that watch files run out of them")
	least("kernel/keys/maxkeys", 2000, "each container takes a key, and the last ones of a user do not start")
	if len(cniConfigs(l)) > 0 {
		// The built-in network sets it by itself.
		least("net/ipv4/ip_forward", 1, "pods of a CNI network are not reached")
		if n, ok := number("net/bridge/bridge-nf-call-iptables"); ok && n == 0 {
			find++
			l.found(Warning, "sysctl -w net.bridge.bridge-nf-call-iptables=1, unless the network is known not to need it", "net.bridge.bridge-nf-call-iptables is 0: services and policies of bridged CNI networks miss traffic within the node")
		}
	}
	if find == 0 {
		l.found(OK, "", "inotify, keys, forwarding")
	}
}

func swap(l *look) {
	lines := strings.Split(l.host.read("/proc/swaps"), "\n")
	switch on := len(lines) > 1; {
	case on && l.node.FailSwapOn && !l.node.Swap:
		l.found(Warning, "swapoff -a and out of /etc/fstab, or set failSwapOn: false", "swap is on (%s) and failSwapOn, too: containers get none, but the rest of the machine swaps", strings.Fields(lines[1])[0])
	case on:
		l.found(OK, "", "on, as configured")
	case l.node.Swap:
		l.found(Warning, "add swap, or set memorySwap.swapBehavior: NoSwap", "memorySwap wants swap, but there is none")
	default:
		l.found(OK, "", "none")
	}
}

func propagation(l *look) {
	for line := range strings.SplitSeq(l.host.read("/proc/self/mountinfo"), "\n") {
		f := strings.Fields(line)
		if len(f) < 7 || f[4] != "/" {
			continue
		}
		if strings.HasPrefix(f[6], "shared:") {
			l.found(OK, "", "the root is shared")
			return
		}
	}
	l.found(Warning, "mount --make-rshared /", "the root mount is not shared: mounts that containers make (mountPropagation: Bidirectional) are not seen outside")
}

func clock(l *look) {
	switch year := l.host.Year(); {
	case year < 2025:
		l.found(Error, "set the clock", "the clock shows the year %d: certificates are not valid yet", year)
	case l.host.Unsynchronized():
		l.found(Warning, "install chrony or enable systemd-timesyncd", "the clock is not synchronized")
	default:
		l.found(OK, "", "synchronized")
	}
}

func securityModules(l *look) {
	find := 0
	if strings.HasPrefix(l.host.read("/sys/module/apparmor/parameters/enabled"), "Y") {
		parser := false
		for _, dir := range []string{"/sbin", "/usr/sbin"} {
			parser = parser || l.host.exists(filepath.Join(dir, "apparmor_parser"))
		}
		if !parser {
			find++
			l.found(Warning, "install apparmor", "AppArmor is on, but there is no apparmor_parser: containers run without podd's default profile")
		}
	}
	if l.host.read("/sys/fs/selinux/enforce") == "1" {
		find++
		l.found(Warning, "set seLinuxOptions, and label /var/lib/podd as container_var_lib_t", "SELinux is enforcing: containers without labels of their own may be denied their files")
	}
	if find == 0 {
		l.found(OK, "", "nothing in the way")
	}
}

func shutdown(l *look) {
	if !l.node.Shutdown {
		l.found(OK, "", "pods are not waited for (shutdownGracePeriod is 0s)")
		return
	}
	if !l.host.exists("/run/dbus/system_bus_socket") || !l.host.exists("/run/systemd/system") {
		l.found(Warning, "install dbus on a machine with systemd, or set shutdownGracePeriod: 0s", "shutdownGracePeriod is set, but there is no logind: pods are killed when the machine goes down")
		return
	}
	l.found(OK, "", "logind can wait for pods")
}
