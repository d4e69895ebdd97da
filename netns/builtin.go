package netns

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The built-in network: one bridge per instance, a veth pair per pod, addresses
// of both families from one range, the bridge's address as the gateway,
// masquerading towards everything else and host ports by nftables.

// podLink is the interface's name inside the pod.
const podLink = "eth0"

// builtin is the host's part of the built-in network.
type builtin struct {
	bridge string
	rules  ruleset

	// mu is held while it is set up, and waited for no longer than a caller has
	// time for.
	mu    gate
	ready bool
	stale atomic.Bool  // ready is to be forgotten
	index atomic.Int64 // the bridge's
	mtu   atomic.Int64
	v6    atomic.Bool // the host has IPv6
}

// reset has the next ensure set everything up. It waits for nobody.
func (b *builtin) reset() { b.stale.Store(true) }

// loadPools reads the ranges of earlier runs.
func (n *Network) loadPools() error {
	r, err := loadRange(n.cfg.DataDir)
	if errdefs.IsDataLoss(err) {
		// The bridge, if it is there, still tells: pods use its ranges.
		r = n.rangeOfBridge()
		n.log.Error("pod range is unreadable, taken from the bridge or chosen anew", "error", err, "ranges", r.CIDRs)
		_ = os.Rename(n.cfg.DataDir+"/range.json", n.cfg.DataDir+"/range.json.broken")
		err = nil
	}
	if err != nil {
		return err
	}
	if r != nil {
		for _, c := range r.CIDRs {
			v4, v6, err := parseCIDRs(c)
			if err != nil {
				return err
			}
			p, err := newPool(v4, v6)
			if err != nil {
				return err
			}
			n.pools = append(n.pools, p)
		}
		if err := saveRange(n.cfg.DataDir, *r); err != nil {
			return err
		}
	}
	return nil
}

// configured makes the configuration's range the current one, after the leases
// of others are known.
func (n *Network) configured() error {
	if n.cfg.PodCIDR == "" {
		return nil
	}
	v4, v6, err := parseCIDRs(n.cfg.PodCIDR)
	if err != nil {
		return err
	}
	p, err := newPool(v4, v6)
	if err != nil {
		return err
	}
	_, err = n.setPool(p, true)
	return err
}

// rangeOfBridge reads the ranges back from the bridge's addresses; of several,
// each family's last is current.
func (n *Network) rangeOfBridge() *rangeRecord {
	r := &rangeRecord{}
	br, err := n.host.LinkByName(n.builtin.bridge)
	if err != nil {
		return r
	}
	addrs, err := n.host.AddrList(br, unix.AF_UNSPEC)
	if err != nil {
		return r
	}
	var v4, v6 []string
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.IP)
		ones, _ := a.Mask.Size()
		switch p := netip.PrefixFrom(ip.Unmap(), ones).Masked(); {
		case ip.IsLinkLocalUnicast():
		case p.Addr().Is4():
			v4 = append(v4, p.String())
		default:
			v6 = append(v6, p.String())
		}
	}
	for i := range max(len(v4), len(v6)) {
		var c []string
		if i < len(v4) {
			c = append(c, v4[i])
		}
		if i < len(v6) {
			c = append(c, v6[i])
		}
		r.CIDRs = append(r.CIDRs, strings.Join(c, ","))
	}
	return r
}

// setPool makes p the range that new pods get. Older ranges stay as long as a
// pod has an address of theirs.
func (n *Network) setPool(p *pool, given bool) (changed bool, err error) {
	n.ranges.Lock()
	defer n.ranges.Unlock()
	r, changed := n.changePools(p)
	if !changed {
		return false, nil
	}
	r.Given = given
	return true, saveRange(n.cfg.DataDir, *r)
}

func (n *Network) changePools(p *pool) (r *rangeRecord, changed bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var kept []*pool
	for i, o := range n.pools {
		if o.String() == p.String() {
			if i == len(n.pools)-1 {
				return nil, false
			}
			p = o
			continue
		}
		if o.V4.IsValid() && p.V4.IsValid() && o.V4.Overlaps(p.V4) || o.V6.IsValid() && p.V6.IsValid() && o.V6.Overlaps(p.V6) {
			// Addresses of the old range that are in use are taken over.
			for k, id := range o.used {
				for _, a := range o.addrs(k) {
					if m, ok := p.number(a); ok {
						p.used[m] = id
					}
				}
			}
		}
		if len(o.used) > 0 {
			kept = append(kept, o)
		}
	}
	n.pools = append(kept, p)
	r = &rangeRecord{}
	for _, p := range n.pools {
		r.CIDRs = append(r.CIDRs, p.String())
	}
	return r, true
}

// ensure sets the host up, once.
func (n *Network) ensure(ctx context.Context) error {
	b := &n.builtin
	if err := b.mu.lock(ctx); err != nil {
		return fmt.Errorf("built-in network is being set up: %w", err)
	}
	defer b.mu.unlock()
	if b.stale.Swap(false) {
		b.ready = false
	}
	if b.ready {
		return nil
	}
	start := time.Now()
	if err := n.setUp(ctx); err != nil {
		return fmt.Errorf("built-in network on bridge %s: %w", b.bridge, err)
	}
	b.ready = true
	n.mu.Lock()
	current := n.pools[len(n.pools)-1]
	n.mu.Unlock()
	n.log.Info("built-in pod network is up", "bridge", b.bridge, "range", current.String(), "mtu", b.mtu.Load(), "took", time.Since(start))
	return nil
}

// setUp is called with b.mu held.
func (n *Network) setUp(ctx context.Context) error {
	b := &n.builtin
	// Other instances of this host look for a free range at the same time.
	unlock, err := hostLock{n.cfg.LockDir}.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	v6 := ipv6Enabled()
	b.v6.Store(v6)
	if err := n.chooseRange(v6); err != nil {
		return err
	}
	n.mu.Lock()
	pools := append([]*pool(nil), n.pools...)
	n.mu.Unlock()

	mtu := n.cfg.MTU
	if mtu == 0 {
		mtu = n.uplinkMTU()
	}
	b.mtu.Store(int64(mtu))
	br, err := n.bridge(mtu)
	if err != nil {
		return err
	}
	b.index.Store(int64(br.Attrs().Index))
	if err := n.bridgeAddrs(br, pools, v6); err != nil {
		return err
	}
	if err := bridgeSysctls(b.bridge, v6); err != nil {
		return err
	}
	if err := n.host.LinkSetUp(br); err != nil {
		return fmt.Errorf("bring up bridge: %w", err)
	}
	if err := forward(pools, v6); err != nil {
		return err
	}
	if err := n.installRules(pools); err != nil {
		return err
	}
	if err := b.rules.allowForward(v6); err != nil {
		// Not ours to break: pods may lack a way out, which the log tells.
		n.log.Warn("forward chain of another firewall not opened, pods may be cut off", "bridge", b.bridge, "error", err)
	}
	return nil
}

// chooseRange picks a range when there is none, or when nobody uses ours and
// the host now routes it elsewhere.
func (n *Network) chooseRange(v6 bool) error {
	index := 0
	if l, err := n.host.LinkByName(n.builtin.bridge); err == nil {
		index = l.Attrs().Index
	}
	taken, err := routes(n.host, index)
	if err != nil {
		return err
	}
	n.mu.Lock()
	var current *pool
	inUse := 0
	if len(n.pools) > 0 {
		current = n.pools[len(n.pools)-1]
		inUse = len(current.used)
	}
	n.mu.Unlock()
	if current != nil {
		clash := ""
		for _, r := range taken {
			if current.V4.IsValid() && r.Overlaps(current.V4) || current.V6.IsValid() && r.Overlaps(current.V6) {
				clash = r.String()
			}
		}
		r, err := loadRange(n.cfg.DataDir)
		switch {
		case clash == "":
			return nil
		case err == nil && r != nil && r.Given || n.cfg.PodCIDR != "":
			n.log.Warn("pod range overlaps a route of the host", "range", current.String(), "route", clash)
			return nil
		case inUse > 0:
			n.log.Warn("pod range overlaps a new route of the host, another is chosen once no pod uses it", "range", current.String(), "route", clash)
			return nil
		}
	}
	p4, err := choose(taken)
	if err != nil {
		return err
	}
	var p6 netip.Prefix
	if v6 {
		p6 = ula(machineID(), n.cfg.Instance+"\x00"+n.cfg.DataDir)
	}
	p, err := newPool(p4, p6)
	if err != nil {
		return err
	}
	_, err = n.setPool(p, false)
	return err
}

func (n *Network) bridge(mtu int) (netlink.Link, error) {
	b := &n.builtin
	br, err := n.host.LinkByName(b.bridge)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = b.bridge, mtu
		// A fixed address: else it follows the ports, and pods' neighbour
		// entries for the gateway go stale.
		h := sha256.Sum256([]byte(machineID() + b.bridge))
		attrs.HardwareAddr = net.HardwareAddr{0x0a, 0x58, h[0], h[1], h[2], h[3]}
		err = n.host.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("create bridge: %w", err)
		}
		br, err = n.host.LinkByName(b.bridge)
	}
	if err != nil {
		return nil, fmt.Errorf("bridge: %w", err)
	}
	if br.Type() != "bridge" {
		return nil, fmt.Errorf("interface %s is a %s, not podd's bridge: rename or remove it: %w", b.bridge, br.Type(), errdefs.ErrFailedPrecondition)
	}
	if br.Attrs().MTU != mtu {
		if err := n.host.LinkSetMTU(br, mtu); err != nil {
			return nil, fmt.Errorf("mtu %d of bridge: %w", mtu, err)
		}
	}
	return br, nil
}

// bridgeAddrs gives the bridge the gateways of all ranges in use, and no
// others.
func (n *Network) bridgeAddrs(br netlink.Link, pools []*pool, v6 bool) error {
	want := map[netip.Prefix]bool{}
	for _, p := range pools {
		if p.V4.IsValid() {
			want[netip.PrefixFrom(nth(p.V4, 1), p.V4.Bits())] = true
		}
		if p.V6.IsValid() && v6 {
			want[netip.PrefixFrom(nth(p.V6, 1), p.V6.Bits())] = true
		}
	}
	have, err := n.host.AddrList(br, unix.AF_UNSPEC)
	if err != nil {
		return fmt.Errorf("addresses of bridge: %w", err)
	}
	for i := range have {
		ip, _ := netip.AddrFromSlice(have[i].IP)
		ones, _ := have[i].Mask.Size()
		p := netip.PrefixFrom(ip.Unmap(), ones)
		if ip.IsLinkLocalUnicast() {
			continue
		}
		if want[p] {
			delete(want, p)
		} else if err := n.host.AddrDel(br, &have[i]); err != nil {
			return fmt.Errorf("remove address %s from bridge: %w", p, err)
		}
	}
	if v6 {
		// Before any IPv6 address: no duplicate detection, no router adverts.
		_ = sysctl("net/ipv6/conf/"+br.Attrs().Name+"/accept_dad", "0")
	}
	for p := range want {
		if err := n.host.AddrAdd(br, address(p)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("address %s on bridge: %w", p, err)
		}
	}
	return nil
}

func address(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		// The range is ours: nobody can have the address already.
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// bridgeSysctls: route_localnet lets the host reach host ports by 127.0.0.1
// (the ruleset's guard keeps pods out); router advertisements come from pods
// only and are not believed.
func bridgeSysctls(bridge string, v6 bool) error {
	if err := sysctl("net/ipv4/conf/"+bridge+"/route_localnet", "1"); err != nil {
		return err
	}
	if v6 {
		return sysctl("net/ipv6/conf/"+bridge+"/accept_ra", "0")
	}
	return nil
}

// forward makes the host a router. A host that forwards IPv6 no longer listens
// to router advertisements, by which it may have its own default route: where
// they are on (1) they become "even when forwarding" (2),
// Documentation/networking/ip-sysctl.rst.
func forward(pools []*pool, v6 bool) error {
	has4, has6 := false, false
	for _, p := range pools {
		has4, has6 = has4 || p.V4.IsValid(), has6 || p.V6.IsValid()
	}
	if has4 {
		if err := sysctl("net/ipv4/ip_forward", "1"); err != nil {
			return err
		}
	}
	if !has6 || !v6 {
		return nil
	}
	if readSysctl("net/ipv6/conf/all/forwarding") == "1" {
		return nil
	}
	entries, err := os.ReadDir("/proc/sys/net/ipv6/conf")
	if err != nil {
		return fmt.Errorf("sysctl net.ipv6.conf: %w", err)
	}
	for _, e := range entries {
		key := "net/ipv6/conf/" + e.Name() + "/accept_ra"
		if e.Name() != "all" && e.Name() != "lo" && readSysctl(key) == "1" {
			if err := sysctl(key, "2"); err != nil {
				return err
			}
		}
	}
	return sysctl("net/ipv6/conf/all/forwarding", "1")
}

func readSysctl(key string) string {
	b, err := os.ReadFile("/proc/sys/" + key)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// sysctl writes only what differs: where /proc/sys is read-only the right
// value may be there already.
func sysctl(key, value string) error {
	if readSysctl(key) == value {
		return nil
	}
	fd, err := unix.Open("/proc/sys/"+key, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Write(fd, []byte(value))
		unix.Close(fd)
	}
	if err != nil {
		return fmt.Errorf("sysctl %s=%s: %w: set it before podd starts", strings.ReplaceAll(key, "/", "."), value, err)
	}
	return nil
}

func ipv6Enabled() bool { return readSysctl("net/ipv6/conf/all/disable_ipv6") == "0" }

// uplinkMTU is that of the default route's interface, 1500 without one.
func (n *Network) uplinkMTU() int {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		list, err := n.host.RouteList(nil, family)
		if err != nil {
			continue
		}
		for _, r := range list {
			if r.Dst != nil {
				if ones, _ := r.Dst.Mask.Size(); ones != 0 {
					continue
				}
			}
			if l, err := n.host.LinkByIndex(r.LinkIndex); err == nil && l.Attrs().MTU >= 576 && l.Attrs().Flags&net.FlagLoopback == 0 {
				return l.Attrs().MTU
			}
		}
	}
	return 1500
}

// installRules writes the whole table for the pods attached now.
func (n *Network) installRules(pools []*pool) error {
	r := &n.builtin.rules
	r.mu.Lock()
	defer r.mu.Unlock()
	n.mu.Lock()
	var targets []target
	for _, e := range n.attached {
		if len(e.Ports) > 0 && e.CNI == nil {
			targets = append(targets, target{e.IPs, e.Ports})
		}
	}
	n.closing = nil
	n.mu.Unlock()
	return r.install(pools, targets)
}

// readyBuiltin sets up, or repairs, the host's part.
func (n *Network) readyBuiltin(ctx context.Context) error {
	b := &n.builtin
	if err := b.mu.lock(ctx); err != nil {
		return fmt.Errorf("built-in network is being set up: %w", err)
	}
	if b.ready {
		l, err := n.host.LinkByName(b.bridge)
		b.ready = err == nil && int64(l.Attrs().Index) == b.index.Load() && b.rules.exists()
	}
	b.mu.unlock()
	return n.ensure(ctx)
}

func (n *Network) attachBuiltin(ctx context.Context, p *Pod) (_ *Result, err error) {
	ports, err := hostPorts(p.Ports)
	if err != nil {
		return nil, err
	}
	rates, err := parseRates(p.Annotations)
	if err != nil {
		return nil, err
	}
	if err := n.ensure(ctx); err != nil {
		return nil, err
	}
	ns, err := open(p.NetnsPath)
	if err != nil {
		return nil, err
	}
	defer unix.Close(ns)

	a := &attachment{
		Version: recordVersion, SandboxID: p.SandboxID, Pod: p.Namespace + "/" + p.Name, UID: p.UID,
		Link: linkName(n.cfg.Instance, p.SandboxID), Ports: ports,
	}
	v6 := n.builtin.v6.Load()
	lease, err := n.reserve(a, v6)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.undo(a))
		}
	}()
	// The record is written meanwhile: a crash before it is there leaves a
	// link without a record, which Sweep deletes.
	saved := make(chan error, 1)
	go func() { saved <- n.volatile.save(a) }()
	err = n.connect(ns, a, lease, rates)
	if errors.Is(err, errNoBridge) {
		// Somebody removed the bridge: once more with a new one.
		n.builtin.reset()
		if err = n.ensure(ctx); err == nil {
			err = n.connect(ns, a, lease, rates)
		}
	}
	if serr := <-saved; err == nil {
		err = serr
	}
	if err != nil {
		return nil, err
	}
	if len(ports) > 0 {
		if err := n.openPorts(ctx, target{a.IPs, ports}); err != nil {
			return nil, err
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	res := &Result{Interfaces: map[string]string{podLink: lease.mac.String()}}
	for _, ip := range a.IPs {
		res.IPs = append(res.IPs, ip.String())
	}
	return res, nil
}

// lease is what the allocator gave to one pod.
type lease struct {
	addrs []netip.Prefix
	gws   []netip.Addr
	mac   net.HardwareAddr
}

// reserve takes the ports and an address of each family that the host has; the
// attachment is known from here on. When no address is left but those whose
// links are on their way out, these are helped along.
func (n *Network) reserve(a *attachment, v6 bool) (*lease, error) {
	l, err := n.tryReserve(a, v6)
	for range maxSettle { // others may take what was settled
		if !errdefs.IsResourceExhausted(err) || !n.settle() {
			break
		}
		l, err = n.tryReserve(a, v6)
	}
	return l, err
}

// maxSettle is how many links are deleted at once for a pod that needs an
// address, 14 ms each, and how often.
const maxSettle = 8

// settle deletes links of resting addresses of the current range, and says
// whether an address came free.
func (n *Network) settle() bool {
	n.mu.Lock()
	p := n.pools[len(n.pools)-1]
	resting := map[uint32]string{}
	for k, link := range p.resting {
		if len(resting) < maxSettle {
			resting[k] = link
		}
	}
	n.mu.Unlock()
	for k, link := range resting {
		if n.deleteLink(link) != nil {
			delete(resting, k)
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for k, link := range resting {
		if p.resting[k] == link {
			delete(p.resting, k)
		}
	}
	return len(resting) > 0
}

func (n *Network) tryReserve(a *attachment, v6 bool) (*lease, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p := n.pools[len(n.pools)-1]; !v6 && !p.V4.IsValid() {
		return nil, fmt.Errorf("pod range %s: IPv6 is switched off on this host (net.ipv6.conf.all.disable_ipv6): %w", p, errdefs.ErrFailedPrecondition)
	}
	if err := n.ports.claim(a.SandboxID, a.Pod, a.Ports); err != nil {
		return nil, err
	}
	p := n.pools[len(n.pools)-1]
	k, err := p.take(a.SandboxID)
	if err != nil {
		n.ports.release(a.SandboxID, a.Ports)
		return nil, err
	}
	l := &lease{}
	for _, x := range []netip.Prefix{p.V4, p.V6} {
		if x.IsValid() && (v6 || x.Addr().Is4()) {
			l.addrs = append(l.addrs, netip.PrefixFrom(nth(x, k), x.Bits()))
			l.gws = append(l.gws, nth(x, 1))
			a.IPs = append(a.IPs, nth(x, k))
		}
	}
	// The hardware address follows the IP address: whoever has the neighbour
	// entry of the address' last pod reaches the next one all the same.
	h := a.IPs[0].AsSlice()
	l.mac = net.HardwareAddr{0x0a, 0x58, h[len(h)-4], h[len(h)-3], h[len(h)-2], h[len(h)-1]}
	n.attached[a.SandboxID] = &entry{a, time.Now()}
	return l, nil
}

// undo is detachBuiltin with the link deleted at once: the namespace may live.
func (n *Network) undo(a *attachment) error {
	derr := n.deleteLink(a.Link)
	return errors.Join(derr, n.detachBuiltin(a))
}

func (n *Network) detachBuiltin(a *attachment) error {
	if err := n.volatile.drop(a.SandboxID); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closePorts(target{a.IPs, a.Ports})
	n.ports.release(a.SandboxID, a.Ports)
	for _, p := range n.pools {
		for _, ip := range a.IPs {
			if k, ok := p.number(ip); ok && p.used[k] == a.SandboxID {
				delete(p.used, k)
				p.resting[k] = a.Link
			}
		}
	}
	delete(n.attached, a.SandboxID)
	n.reapLater()
	return nil
}

// reapDelay is far above what a namespace takes to die, and short enough that
// a link whose namespace somebody else keeps does not answer for long.
const reapDelay = time.Second

// reapLater looks after the links of detached pods in a second. With n.mu held.
func (n *Network) reapLater() {
	if n.reaper != nil || n.closed {
		return
	}
	n.wg.Add(1)
	n.reaper = time.AfterFunc(reapDelay, func() {
		defer n.wg.Done()
		n.mu.Lock()
		n.reaper = nil
		links := map[string]bool{}
		for _, p := range n.pools {
			for _, l := range p.resting {
				links[l] = true
			}
		}
		mine := map[string]bool{}
		for _, e := range n.attached {
			// Attached again meanwhile: the name is the new link's, so the old
			// one is gone.
			mine[e.Link] = true
		}
		n.mu.Unlock()
		for l := range links {
			if mine[l] {
				continue
			}
			if err := n.deleteLink(l); err != nil {
				n.log.Warn("link of a detached pod not deleted", "link", l, "error", err)
				delete(links, l)
			}
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		more := false
		for _, p := range n.pools {
			for k, l := range p.resting {
				if links[l] {
					delete(p.resting, k)
				} else {
					more = true
				}
			}
		}
		if more {
			n.reapLater()
		}
	})
}

// deleteLink deletes a link; none is fine.
func (n *Network) deleteLink(name string) error {
	if name == "" {
		return nil
	}
	l, err := n.host.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	if err := n.host.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

// sweepLinks deletes the bridge's ports that no attachment knows.
func (n *Network) sweepLinks() error {
	br, err := n.host.LinkByName(n.builtin.bridge)
	if err != nil {
		return nil // no bridge, no links
	}
	list, err := n.host.LinkList()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	n.mu.Lock()
	known := map[string]bool{}
	for _, e := range n.attached {
		known[e.Link] = true
	}
	for _, p := range n.pools {
		for _, l := range p.resting {
			known[l] = true // the reaper's
		}
	}
	n.mu.Unlock()
	var errs []error
	for _, l := range list {
		if l.Attrs().MasterIndex == br.Attrs().Index && l.Type() == "veth" && strings.HasPrefix(l.Attrs().Name, linkPrefix) && !known[l.Attrs().Name] {
			n.log.Info("link without a sandbox deleted", "link", l.Attrs().Name)
			if err := n.host.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
				errs = append(errs, fmt.Errorf("delete link %s: %w", l.Attrs().Name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// openPorts makes the pod's host ports lead to it, after taking back those
// that wait for it: one of them may be the same.
func (n *Network) openPorts(ctx context.Context, t target) error {
	err := n.changePorts(t)
	if err != nil {
		// The rules are not what we think: somebody flushed them. A new table
		// has this pod's ports, which is attached already.
		n.log.Warn("host port rules are written anew", "error", err)
		n.builtin.reset()
		err = n.ensure(ctx)
	}
	if err == nil {
		n.mu.Lock()
		if !n.closed {
			n.wg.Add(1)
			go func() {
				defer n.wg.Done()
				n.forgetFlows(t)
			}()
		}
		n.mu.Unlock()
	}
	return err
}

func (n *Network) changePorts(add ...target) error {
	r := &n.builtin.rules
	r.mu.Lock()
	defer r.mu.Unlock()
	n.mu.Lock()
	del := n.closing
	n.closing = nil
	n.mu.Unlock()
	if len(del)+len(add) == 0 {
		return nil
	}
	return r.change(del, add...)
}

// closePorts takes the pod's host ports back soon, together with those of
// others that are on their way. With n.mu held, so that whoever claims one of
// them next finds it among the closing.
func (n *Network) closePorts(t target) {
	if len(t.ports) == 0 {
		return
	}
	n.closing = append(n.closing, t)
	if n.closer || n.closed {
		return
	}
	n.closer = true
	n.wg.Add(1)
	go func() {
		defer n.wg.Done()
		for {
			err := n.changePorts()
			if err != nil {
				// Whatever is wrong with the table: the next Ready or host
				// port writes it anew.
				n.log.Warn("host ports not taken back, rules will be written anew", "error", err)
				n.builtin.reset()
			}
			n.mu.Lock()
			if len(n.closing) == 0 || n.closed {
				n.closer = false
				n.mu.Unlock()
				return
			}
			n.mu.Unlock()
		}
	}()
}

// forgetFlows drops what the kernel remembers of UDP flows to these host ports:
// a client that keeps sending would be led past the new pod for ever. The
// kernel's table is read whole, which takes its time on a busy router: nobody
// waits for it.
func (n *Network) forgetFlows(t target) {
	for _, p := range t.ports {
		if p.Proto != unix.IPPROTO_UDP {
			continue
		}
		for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			f := &netlink.ConntrackFilter{}
			if f.AddProtocol(unix.IPPROTO_UDP) != nil || f.AddPort(netlink.ConntrackOrigDstPort, p.HostPort) != nil {
				continue
			}
			if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, f); err != nil {
				n.log.Debug("connection tracking not cleared", "port", p.String(), "error", err)
			}
		}
	}
}

// TearDown removes the bridge, the rules and what else the built-in network has
// on the host, for who stops everything. Address range and forwarding sysctls
// stay. errdefs.ErrFailedPrecondition: pods are attached.
func (n *Network) TearDown(ctx context.Context) error {
	b := &n.builtin
	if err := b.mu.lock(ctx); err != nil {
		return fmt.Errorf("built-in network is being set up: %w", err)
	}
	defer b.mu.unlock()
	n.mu.Lock()
	for _, e := range n.attached {
		if e.CNI == nil {
			n.mu.Unlock()
			return fmt.Errorf("built-in network: pod %s is attached, stop it first: %w", e.Pod, errdefs.ErrFailedPrecondition)
		}
	}
	n.closing = nil
	n.mu.Unlock()
	b.ready = false
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := n.host.LinkByName(b.bridge); errors.As(err, new(netlink.LinkNotFoundError)) && !b.rules.exists() {
		return nil // never set up, or gone with all
	}
	b.rules.mu.Lock()
	defer b.rules.mu.Unlock()
	return errors.Join(b.rules.closeForward(), b.rules.remove(), n.deleteLink(b.bridge))
}
