package netns

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// errNoBridge: the bridge has gone away behind our back.
var errNoBridge = errors.New("bridge is gone")

// connect makes the veth pair and sets up the pod's side.
func (n *Network) connect(ns int, a *attachment, l *lease, r rates) error {
	bridge, mtu := int(n.builtin.index.Load()), int(n.builtin.mtu.Load())
	err := addVeth(a, l, ns, bridge, mtu)
	if errors.Is(err, unix.EEXIST) {
		// Left by an attempt that a crash cut short, or eth0 is there already.
		if err := n.deleteLink(a.Link); err != nil {
			return err
		}
		err = addVeth(a, l, ns, bridge, mtu)
	}
	switch {
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("the namespace already has an interface %s: %w", podLink, err)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODEV):
		if _, lerr := n.host.LinkByIndex(bridge); lerr != nil {
			return errNoBridge
		}
		fallthrough
	case err != nil:
		return fmt.Errorf("create veth pair: %w", err)
	}
	if err := doFD(ns, func() error { return configure(l, r) }); err != nil {
		return err
	}
	link, err := n.host.LinkByName(a.Link)
	if err != nil {
		return fmt.Errorf("link %s: %w", a.Link, err)
	}
	// A pod must reach itself by its host port or service. With br_netfilter
	// loaded the translated packet stays on the bridge and goes out by the port
	// it came in.
	if err := n.host.LinkSetHairpin(link, true); err != nil {
		return fmt.Errorf("hairpin mode of link %s: %w", a.Link, err)
	}
	if r.ingress > 0 {
		if err := shape(n.host, link.Attrs().Index, r.ingress); err != nil {
			return fmt.Errorf("limit ingress bandwidth to %d bit/s: %w", r.ingress, err)
		}
	}
	return nil
}

// addVeth creates the pair in one message: one end up and on the bridge, the
// other in the pod's namespace. The library's LinkAdd takes several.
func addVeth(a *attachment, l *lease, ns, bridge, mtu int) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Flags, msg.Change = unix.IFF_UP, unix.IFF_UP
	req.AddData(msg)
	add := func(typ int, data []byte) { req.AddData(nl.NewRtAttr(typ, data)) }
	add(unix.IFLA_IFNAME, nl.ZeroTerminated(a.Link))
	add(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu)))
	// One queue: veth needs no lock to send, and the default, one per CPU,
	// costs sysfs entries and memory for each.
	add(unix.IFLA_NUM_TX_QUEUES, nl.Uint32Attr(1))
	add(unix.IFLA_NUM_RX_QUEUES, nl.Uint32Attr(1))
	add(unix.IFLA_MASTER, nl.Uint32Attr(uint32(bridge)))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC) // up later: veth refuses it before the pair is one
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(podLink))
	peer.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu)))
	peer.AddRtAttr(unix.IFLA_NUM_TX_QUEUES, nl.Uint32Attr(1))
	peer.AddRtAttr(unix.IFLA_NUM_RX_QUEUES, nl.Uint32Attr(1))
	peer.AddRtAttr(unix.IFLA_ADDRESS, l.mac)
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(ns)))
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// configure runs inside the pod's namespace.
func configure(l *lease, r rates) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink in the pod: %w", err)
	}
	defer h.Close()
	if err := loopback(h); err != nil {
		return err
	}
	link, err := h.LinkByName(podLink)
	if err != nil {
		return fmt.Errorf("%s in the pod: %w", podLink, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s in the pod: %w", podLink, err)
	}
	for i, p := range l.addrs {
		if p.Addr().Is6() {
			// No advertisement on this bridge comes from a router.
			if err := errors.Join(sysctl("net/ipv6/conf/"+podLink+"/accept_ra", "0"),
				sysctl("net/ipv6/conf/"+podLink+"/disable_ipv6", "0")); err != nil {
				return err
			}
		}
		if err := h.AddrAdd(link, address(p)); err != nil {
			return fmt.Errorf("address %s in the pod: %w", p, err)
		}
		dst := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
		if p.Addr().Is6() {
			dst = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
		}
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Gw: l.gws[i].AsSlice()}
		if err := h.RouteAdd(route); err != nil {
			return fmt.Errorf("default route by %s in the pod: %w", l.gws[i], err)
		}
	}
	if r.egress > 0 {
		if err := shape(h, link.Attrs().Index, r.egress); err != nil {
			return fmt.Errorf("limit egress bandwidth to %d bit/s: %w", r.egress, err)
		}
	}
	return nil
}

// loopback brings lo up. It has index 1 in every namespace
// (LOOPBACK_IFINDEX).
func loopback(h *netlink.Handle) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Index = 1
	if err := h.LinkSetUp(&netlink.Device{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("bring up lo in the pod: %w", err)
	}
	return nil
}
