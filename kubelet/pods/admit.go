package pods

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/node/util/sysctl"

	"github.com/podd-runtime/podd/kubelet/status"
)

// safeSysctls are namespaced and of no influence on other pods, from the
// kernel version on that made them so (upstream's list; 0: any).
var safeSysctls = map[string][2]int{
	"kernel.shm_rmid_forced":              {},
	"net.ipv4.ip_local_port_range":        {},
	"net.ipv4.tcp_syncookies":             {},
	"net.ipv4.ping_group_range":           {},
	"net.ipv4.ip_unprivileged_port_start": {},
	"net.ipv4.ip_local_reserved_ports":    {3, 16},
	"net.ipv4.tcp_keepalive_time":         {4, 5},
	"net.ipv4.tcp_fin_timeout":            {4, 6},
	"net.ipv4.tcp_keepalive_intvl":        {4, 5},
	"net.ipv4.tcp_keepalive_probes":       {4, 5},
	"net.ipv4.tcp_rmem":                   {4, 15},
	"net.ipv4.tcp_wmem":                   {4, 15},
}

// Sysctls are those that pods may set: the safe ones and what the node allows
// besides (KubeletConfiguration.allowedUnsafeSysctls).
type Sysctls struct {
	names, prefixes map[string]sysctl.Namespace
}

// AllowSysctls takes names, and prefixes that end in *. errdefs.
// ErrInvalidArgument: one is in no namespace that a pod has.
func AllowSysctls(unsafe []string) (*Sysctls, error) {
	s := &Sysctls{names: map[string]sysctl.Namespace{}, prefixes: map[string]sysctl.Namespace{}}
	major, minor := kernel()
	for name, since := range safeSysctls {
		if major > since[0] || major == since[0] && minor >= since[1] {
			s.names[name], _, _ = sysctl.GetNamespace(name)
		}
	}
	for _, pattern := range unsafe {
		ns, name, prefixed := sysctl.GetNamespace(pattern)
		switch {
		case ns == sysctl.UnknownNamespace:
			return nil, fmt.Errorf("allowedUnsafeSysctls: %q is in no namespace that a pod can have of its own: %w", pattern, errdefs.ErrInvalidArgument)
		case prefixed:
			s.prefixes[name] = ns
		default:
			s.names[name] = ns
		}
	}
	return s, nil
}

// kernel's version; 0, 0 when it cannot be told.
func kernel() (major, minor int) {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return 0, 0
	}
	f := strings.SplitN(unix.ByteSliceToString(u.Release[:]), ".", 3)
	if len(f) < 2 {
		return 0, 0
	}
	major, _ = strconv.Atoi(f[0])
	minor, _ = strconv.Atoi(strings.TrimRightFunc(f[1], func(r rune) bool { return r < '0' || r > '9' }))
	return major, minor
}

// check a pod's sysctls; the error is in upstream's words.
func (s *Sysctls) check(pod *v1.Pod) error {
	if pod.Spec.SecurityContext == nil {
		return nil
	}
	for _, c := range pod.Spec.SecurityContext.Sysctls {
		name := sysctl.NormalizeName(c.Name)
		ns, ok := s.names[name]
		for p, n := range s.prefixes {
			if !ok && strings.HasPrefix(name, p) {
				ns, ok = n, true
			}
		}
		switch {
		case !ok:
			return fmt.Errorf("forbidden sysctl: %q not allowlisted", name)
		case ns == sysctl.IPCNamespace && pod.Spec.HostIPC, ns == sysctl.NetNamespace && pod.Spec.HostNetwork:
			return fmt.Errorf("forbidden sysctl: %q not allowed with host %s enabled", name, ns)
		}
	}
	return nil
}

// rejected begins the message of a pod that was not admitted.
const rejected = "Pod was rejected: "

// admit says whether the pod may run on this node; one that may not has failed.
func (w *worker) admit(l *life) {
	if l.o.Completed || l.d.Stop != nil {
		return
	}
	reason, message := "", ""
	if err := w.t.sysctls.check(l.d.Pod); err != nil {
		reason, message = "SysctlForbidden", err.Error()
	} else if w.t.cfg.Admit != nil {
		reason, message = w.t.cfg.Admit(l.d.Pod)
	}
	if reason == "" {
		reason, message = w.place(l)
	}
	if reason == "" {
		return
	}
	w.event(l, "", v1.EventTypeWarning, reason, "%s", message)
	l.failed = &status.Cause{Reason: reason, Message: rejected + message}
	l.o.Completed = true
	w.log.Info("pod is rejected", "uid", l.d.Pod.UID, "reason", reason, "message", message)
}

// again says that the pod of a record was rejected, and may be asked about once
// more: a static pod has nobody who makes another one in its place.
func (r *record) again() bool {
	return r.Status.Phase == v1.PodFailed && strings.HasPrefix(r.Status.Message, rejected) && !fromAPI(r.Pod)
}
