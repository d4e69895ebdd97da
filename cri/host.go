package cri

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/capability"
	selinux "github.com/opencontainers/selinux/go-selinux"
	"golang.org/x/sys/unix"
)

// host is what this node can do; probed once at the start.
type host struct {
	cgroup2  bool // unified hierarchy
	swap     bool // memory controller accounts swap
	hugetlb  bool
	seccomp  bool
	appArmor bool
	// appArmorParser: the program that loads profiles is here. Stock kernels
	// have AppArmor switched on where the package is not installed.
	appArmorParser bool
	selinux        bool
	userns         bool
	rro            bool // mount_setattr(2) with AT_RECURSIVE
	oomScore       int  // what oom_score_adj cannot be lowered below; see clampOOM
	oomClamp       bool
	caps           []string // every capability that the kernel and this process have
}

func probeHost() host {
	h := host{
		cgroup2:  isCgroup2(),
		seccomp:  unix.Prctl(unix.PR_GET_SECCOMP, 0, 0, 0, 0) == nil,
		appArmor: fileHas("/sys/module/apparmor/parameters/enabled", "Y") && exists("/sys/kernel/security/apparmor/profiles"),
		selinux:  selinux.GetEnabled(),
		userns:   exists("/proc/self/ns/user") && !fileHas("/proc/sys/user/max_user_namespaces", "0"),
	}
	_, err := exec.LookPath("apparmor_parser")
	h.appArmorParser = err == nil
	if h.cgroup2 {
		h.swap = !strings.Contains(readSmall("/proc/cmdline"), "swapaccount=0")
		h.hugetlb = strings.Contains(" "+readSmall("/sys/fs/cgroup/cgroup.controllers")+" ", " hugetlb")
	} else {
		h.swap = exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")
		h.hugetlb = exists("/sys/fs/cgroup/hugetlb")
	}
	// An empty attribute set on an invalid descriptor: EBADF tells that the
	// call is there, ENOSYS that it is not (before Linux 5.12).
	err = unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	h.rro = err != unix.ENOSYS
	h.probeCapabilities()
	return h
}

// probeCapabilities learns what "ALL" means here, and whether the kernel lets
// us lower oom_score_adj.
func (h *host) probeCapabilities() {
	c, err := capability.NewPid2(0)
	if err != nil || c.Load() != nil {
		return
	}
	known, err := capability.ListSupported()
	if err != nil {
		return
	}
	for _, k := range known {
		if c.Get(capability.PERMITTED, k) {
			h.caps = append(h.caps, "CAP_"+strings.ToUpper(k.String()))
		}
	}
	if !c.Get(capability.EFFECTIVE, capability.CAP_SYS_RESOURCE) {
		h.oomClamp = true
		h.oomScore, _ = strconv.Atoi(strings.TrimSpace(readSmall("/proc/self/oom_score_adj")))
	}
}

// clampOOM raises a score that this process may not set: without
// CAP_SYS_RESOURCE lowering it is EPERM, which would fail the whole start.
func (h *host) clampOOM(adj int) int {
	if h.oomClamp {
		return max(adj, h.oomScore)
	}
	return adj
}

func isCgroup2() bool {
	var st unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup", &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func readSmall(path string) string {
	b, err := hostFile(filepath.Clean(path))
	if err != nil {
		return ""
	}
	return string(b)
}

func fileHas(path, content string) bool { return strings.TrimSpace(readSmall(path)) == content }
