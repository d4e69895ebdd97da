package netns

import (
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// hostPort is one port of the host that leads to a pod. An invalid HostIP
// stands for every address of the host, of both families.
type hostPort struct {
	Proto         uint8      `json:"proto"` // IP protocol number
	HostIP        netip.Addr `json:"hostIP"`
	HostPort      uint16     `json:"hostPort"`
	ContainerPort uint16     `json:"containerPort"`
}

func (p hostPort) String() string {
	proto := map[uint8]string{unix.IPPROTO_TCP: "TCP", unix.IPPROTO_UDP: "UDP", unix.IPPROTO_SCTP: "SCTP"}[p.Proto]
	if p.HostIP.IsValid() {
		return fmt.Sprintf("%s %s", netip.AddrPortFrom(p.HostIP, p.HostPort), proto)
	}
	return fmt.Sprintf("%d %s", p.HostPort, proto)
}

// hostPorts reads CRI's mappings; those without a host port map nothing.
func hostPorts(in []*runtimeapi.PortMapping) ([]hostPort, error) {
	var out []hostPort
	for _, m := range in {
		if m.GetHostPort() == 0 {
			continue
		}
		if m.HostPort < 0 || m.HostPort > 65535 || m.ContainerPort < 1 || m.ContainerPort > 65535 {
			return nil, fmt.Errorf("hostPort %d to containerPort %d: ports are 1 to 65535: %w", m.HostPort, m.ContainerPort, errdefs.ErrInvalidArgument)
		}
		p := hostPort{HostPort: uint16(m.HostPort), ContainerPort: uint16(m.ContainerPort)}
		switch m.Protocol {
		case runtimeapi.Protocol_TCP:
			p.Proto = unix.IPPROTO_TCP
		case runtimeapi.Protocol_UDP:
			p.Proto = unix.IPPROTO_UDP
		case runtimeapi.Protocol_SCTP:
			p.Proto = unix.IPPROTO_SCTP
		default:
			return nil, fmt.Errorf("hostPort %d: protocol %d: %w", m.HostPort, m.Protocol, errdefs.ErrInvalidArgument)
		}
		if m.HostIp != "" {
			ip, err := netip.ParseAddr(m.HostIp)
			if err != nil {
				return nil, fmt.Errorf("hostPort %d: hostIP %q: %w: %w", m.HostPort, m.HostIp, err, errdefs.ErrInvalidArgument)
			}
			p.HostIP = ip.Unmap()
		}
		out = append(out, p)
	}
	return out, nil
}

// collide tells whether two mappings want the same packets.
func (p hostPort) collide(q hostPort) bool {
	if p.Proto != q.Proto || p.HostPort != q.HostPort {
		return false
	}
	a, b := p.HostIP, q.HostIP
	switch {
	case !a.IsValid() || !b.IsValid():
		return true
	case a.Is4() != b.Is4():
		return false
	}
	return a == b || a.IsUnspecified() || b.IsUnspecified()
}

// portTable knows who holds which host port. Network's lock guards it.
type portTable map[portKey][]portHolder

type portKey struct {
	proto uint8
	port  uint16
}

type portHolder struct {
	hostPort
	sandbox, pod string
}

// claim takes all ports or none. errdefs.ErrAlreadyExists names the holder.
func (t portTable) claim(sandbox, pod string, ports []hostPort) error {
	for i, p := range ports {
		for _, h := range t[portKey{p.Proto, p.HostPort}] {
			if h.sandbox != sandbox && h.collide(p) {
				return fmt.Errorf("hostPort %s: pod %s has it (as %s): %w", p, h.pod, h.hostPort, errdefs.ErrAlreadyExists)
			}
		}
		for _, q := range ports[:i] {
			if q.collide(p) {
				return fmt.Errorf("hostPort %s: the pod itself names it twice: %w", p, errdefs.ErrInvalidArgument)
			}
		}
	}
	for _, p := range ports {
		k := portKey{p.Proto, p.HostPort}
		t[k] = append(t[k], portHolder{p, sandbox, pod})
	}
	return nil
}

func (t portTable) release(sandbox string, ports []hostPort) {
	for _, p := range ports {
		k := portKey{p.Proto, p.HostPort}
		kept := t[k][:0]
		for _, h := range t[k] {
			if h.sandbox != sandbox {
				kept = append(kept, h)
			}
		}
		if t[k] = kept; len(kept) == 0 {
			delete(t, k)
		}
	}
}
