package netns

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
)

// pool gives out host numbers of one range; number n is the n-th address of
// the IPv4 prefix and of the IPv6 prefix at once, so a dual-stack pod has one
// lease. Number 1 is the gateway. A number that was given back comes again only
// after all others have had their turn.
//
// A pool is not safe for concurrent use: Network's lock guards it.
//
// The CNI project's host-local allocator was measured instead: it takes a file
// lock for the whole range and reads every lease's file for each new one.
type pool struct {
	V4, V6 netip.Prefix // either may be invalid, not both
	size   uint32       // numbers 2 … size-1 are pods'
	next   uint32
	used   map[uint32]string // by sandbox id
	// resting numbers were given back while their link may still be there.
	resting map[uint32]string // host link
}

// maxPool bounds what one range gives out: more pods no node has.
const maxPool = 1 << 16

func newPool(v4, v6 netip.Prefix) (*pool, error) {
	p := &pool{V4: v4, V6: v6, size: maxPool, next: 2, used: map[uint32]string{}, resting: map[uint32]string{}}
	if !v4.IsValid() && !v6.IsValid() {
		return nil, fmt.Errorf("pod range: neither an IPv4 nor an IPv6 prefix: %w", errdefs.ErrInvalidArgument)
	}
	if v4.IsValid() {
		if !v4.Addr().Is4() || v4.Bits() > 30 {
			return nil, fmt.Errorf("pod range %s: must be an IPv4 prefix of at most 30 bits: %w", v4, errdefs.ErrInvalidArgument)
		}
		p.V4 = v4.Masked()
		if n := 32 - v4.Bits(); n < 16 {
			p.size = 1<<n - 1 // the last is the broadcast address
		}
	}
	if v6.IsValid() {
		if !v6.Addr().Is6() || v6.Addr().Is4In6() || v6.Bits() > 126 {
			return nil, fmt.Errorf("pod range %s: must be an IPv6 prefix of at most 126 bits: %w", v6, errdefs.ErrInvalidArgument)
		}
		p.V6 = v6.Masked()
		if n := 128 - v6.Bits(); n < 16 {
			p.size = min(p.size, 1<<n)
		}
	}
	return p, nil
}

// parsePool reads "10.1.0.0/24", "fd00::/64" or both with a comma.
func parseCIDRs(cidr string) (v4, v6 netip.Prefix, err error) {
	for _, s := range splitComma(cidr) {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return v4, v6, fmt.Errorf("pod range %q: %w: %w", s, err, errdefs.ErrInvalidArgument)
		}
		switch {
		case p.Addr().Is4() && !v4.IsValid():
			v4 = p.Masked()
		case p.Addr().Is6() && !v6.IsValid():
			v6 = p.Masked()
		default:
			return v4, v6, fmt.Errorf("pod range %q: two of one IP family: %w", cidr, errdefs.ErrInvalidArgument)
		}
	}
	if !v4.IsValid() && !v6.IsValid() {
		return v4, v6, fmt.Errorf("pod range %q: empty: %w", cidr, errdefs.ErrInvalidArgument)
	}
	return v4, v6, nil
}

func nth(p netip.Prefix, n uint32) netip.Addr {
	if !p.IsValid() {
		return netip.Addr{}
	}
	if p.Addr().Is4() {
		b := p.Addr().As4()
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+n)
		return netip.AddrFrom4(b)
	}
	b := p.Addr().As16()
	binary.BigEndian.PutUint32(b[12:], binary.BigEndian.Uint32(b[12:])+n)
	return netip.AddrFrom16(b)
}

// addrs of number n: IPv4 first, as the kubelet's default primary family.
func (p *pool) addrs(n uint32) []netip.Addr {
	var out []netip.Addr
	for _, x := range []netip.Prefix{p.V4, p.V6} {
		if x.IsValid() {
			out = append(out, nth(x, n))
		}
	}
	return out
}

// number is the inverse of addrs.
func (p *pool) number(a netip.Addr) (uint32, bool) {
	for _, x := range []netip.Prefix{p.V4, p.V6} {
		if x.IsValid() && x.Contains(a) {
			ab, xb := a.As16(), x.Addr().As16()
			n := binary.BigEndian.Uint32(ab[12:]) - binary.BigEndian.Uint32(xb[12:])
			return n, n < p.size
		}
	}
	return 0, false
}

func (p *pool) gateways() []netip.Addr { return p.addrs(1) }

// take leases the next free number; those that rest are not.
func (p *pool) take(id string) (uint32, error) {
	n := p.next
	for range p.size - 2 {
		if n < 2 || n >= p.size {
			n = 2
		}
		if _, resting := p.resting[n]; p.used[n] == "" && !resting {
			p.used[n] = id
			p.next = n + 1
			return n, nil
		}
		n++
	}
	return 0, fmt.Errorf("pod range %s: all %d addresses are in use: %w", p, p.size-2, errdefs.ErrResourceExhausted)
}

func (p *pool) String() string {
	switch {
	case !p.V6.IsValid():
		return p.V4.String()
	case !p.V4.IsValid():
		return p.V6.String()
	}
	return p.V4.String() + "," + p.V6.String()
}
