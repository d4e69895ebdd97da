package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The built-in network's packet rules: one table of family inet, written by
// netlink, replaced as a whole at start and changed by one transaction per pod
// with host ports. Pods without host ports change nothing.
//
//	table inet podd {
//	  map any4 { type inet_proto . inet_service : ipv4_addr . inet_service }
//	  map at4  { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service }
//	  map any6, at6                                  # the same for IPv6
//	  chain guard       { type filter hook prerouting priority raw
//	    iifname podd0 ip daddr 127.0.0.0/8 drop }    # route_localnet must not open the host's loopback to pods
//	  chain prerouting  { type nat hook prerouting priority dstnat;  fib daddr type local goto hostports }
//	  chain output      { type nat hook output priority -100;        fib daddr type local goto hostports }
//	  chain hostports   {
//	    ip6 daddr ::1 return                         # the kernel routes ::1 nowhere but lo
//	    dnat ip to ip daddr . meta l4proto . th dport map @at4
//	    dnat ip to meta l4proto . th dport map @any4
//	    … 6 }
//	  chain postrouting { type nat hook postrouting priority srcnat
//	    oifname podd0 ip saddr 127.0.0.0/8 masquerade                  # the host to a hostPort by 127.0.0.1
//	    oifname podd0 ip saddr 10.86.0.0/20 ct status dnat masquerade  # a pod to a hostPort, its own included
//	    oifname != podd0 ip saddr 10.86.0.0/20 ip daddr != 224.0.0.0/4 masquerade
//	    … 6 }
//	}
//
// A table accepts only for itself: where another program's forward chain drops
// (iptables -P FORWARD DROP, as Docker sets it), see forward.go.
type ruleset struct {
	name, bridge string

	// mu is held by callers over deciding on a transaction and doing it: they
	// keep their order. The kernel has one lock for all of nftables anyway.
	mu   sync.Mutex
	kept *nftables.Conn
}

// conn returns a connection that stays open: closing one after a transaction
// that removes something waits for an RCU grace period, some 9 ms
// (nft_rcv_nl_event). Whoever meets an error on it must drop it, for answers
// may be waiting in it.
func (r *ruleset) conn() (*nftables.Conn, error) {
	if r.kept == nil {
		c, err := nftables.New(nftables.AsLasting())
		if err != nil {
			return nil, fmt.Errorf("nftables: %w", err)
		}
		r.kept = c
	}
	return r.kept, nil
}

func (r *ruleset) flush(c *nftables.Conn) error {
	err := c.Flush()
	if err == nil {
		return nil
	}
	r.drop()
	// One error per message of the transaction, of which the first says it.
	if many, ok := errors.AsType[interface {
		error
		Unwrap() []error
	}](err); ok && len(many.Unwrap()) > 0 {
		return many.Unwrap()[0]
	}
	return err
}

func (r *ruleset) drop() {
	if r.kept != nil {
		_ = r.kept.CloseLasting()
		r.kept = nil
	}
}

const (
	reg0 = 8 // NFT_REG32_00: registers of 4 bytes, consecutive
	reg1 = reg0 + 1
	reg2 = reg0 + 2
	reg4 = reg0 + 4
	reg5 = reg0 + 5
)

var (
	tuple4 = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
	tuple6 = nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetService)
	anyKey = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
	at4Key = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)
	at6Key = nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetProto, nftables.TypeInetService)
)

// target is where one pod's host ports lead.
type target struct {
	ips   []netip.Addr
	ports []hostPort
}

func (r *ruleset) table() *nftables.Table {
	return &nftables.Table{Name: r.name, Family: nftables.TableFamilyINet}
}

func (r *ruleset) maps() map[string]*nftables.Set {
	t := r.table()
	// The number counts within one transaction only; without it the library
	// takes one from an unguarded variable.
	set := func(id uint32, name string, key, data nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{Table: t, ID: id, Name: name, IsMap: true, Concatenation: true, KeyType: key, DataType: data}
	}
	return map[string]*nftables.Set{
		"any4": set(1, "any4", anyKey, tuple4), "at4": set(2, "at4", at4Key, tuple4),
		"any6": set(3, "any6", anyKey, tuple6), "at6": set(4, "at6", at6Key, tuple6),
	}
}

// elements of one pod, by map.
func elements(t target) map[string][]nftables.SetElement {
	out := map[string][]nftables.SetElement{}
	pad := func(b ...byte) []byte { return append(b, make([]byte, (4-len(b)%4)%4)...) }
	port := func(n uint16) []byte { return pad(binary.BigEndian.AppendUint16(nil, n)...) }
	for _, ip := range t.ips {
		fam := "4"
		if ip.Is6() {
			fam = "6"
		}
		for _, p := range t.ports {
			val := append(ip.AsSlice(), port(p.ContainerPort)...)
			key := append(pad(p.Proto), port(p.HostPort)...)
			name := "any" + fam
			switch {
			case !p.HostIP.IsValid():
			case p.HostIP.Is4() != ip.Is4():
				continue
			case !p.HostIP.IsUnspecified():
				name = "at" + fam
				key = append(p.HostIP.AsSlice(), key...)
			}
			out[name] = append(out[name], nftables.SetElement{Key: key, Val: val})
		}
	}
	return out
}

// install replaces the table by one that has the given ranges and host ports,
// in one transaction: no packet sees it half.
func (r *ruleset) install(pools []*pool, targets []target) error {
	c, err := r.conn()
	if err != nil {
		return err
	}
	t := r.table()
	c.AddTable(t)
	c.DelTable(t)
	c.AddTable(t)

	maps := r.maps()
	for _, name := range []string{"any4", "at4", "any6", "at6"} {
		var e []nftables.SetElement
		for _, x := range targets {
			e = append(e, elements(x)[name]...)
		}
		if err := c.AddSet(maps[name], e); err != nil {
			r.drop()
			return fmt.Errorf("nftables map %s: %w", name, err)
		}
	}
	chain := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority) *nftables.Chain {
		return c.AddChain(&nftables.Chain{Table: t, Name: name, Type: typ, Hooknum: hook, Priority: prio})
	}
	rule := func(ch *nftables.Chain, e ...[]expr.Any) {
		var all []expr.Any
		for _, x := range e {
			all = append(all, x...)
		}
		c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: all})
	}
	guard := chain("guard", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw)
	rule(guard, iif(r.bridge), family(4), within(dst4, netip.MustParsePrefix("127.0.0.0/8"), true), verdict(expr.VerdictDrop, ""))

	hostports := c.AddChain(&nftables.Chain{Table: t, Name: "hostports"})
	rule(hostports, family(6), within(dst6, netip.MustParsePrefix("::1/128"), true), verdict(expr.VerdictReturn, ""))
	rule(hostports, family(4), load(dst4, reg0), proto(reg1), dport(reg2), dnat(maps["at4"], 4))
	rule(hostports, family(4), proto(reg0), dport(reg1), dnat(maps["any4"], 4))
	rule(hostports, family(6), load(dst6, reg0), proto(reg4), dport(reg5), dnat(maps["at6"], 6))
	rule(hostports, family(6), proto(reg0), dport(reg1), dnat(maps["any6"], 6))

	pre := chain("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)
	out := chain("output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest)
	rule(pre, toLocal(), verdict(expr.VerdictGoto, "hostports"))
	rule(out, toLocal(), verdict(expr.VerdictGoto, "hostports"))

	post := chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	rule(post, oif(r.bridge, true), family(4), within(src4, netip.MustParsePrefix("127.0.0.0/8"), true), []expr.Any{&expr.Masq{}})
	for _, p := range pools {
		if p.V4.IsValid() {
			rule(post, oif(r.bridge, true), family(4), within(src4, p.V4, true), dnatted(), []expr.Any{&expr.Masq{}})
			rule(post, oif(r.bridge, false), family(4), within(src4, p.V4, true),
				within(dst4, netip.MustParsePrefix("224.0.0.0/4"), false), []expr.Any{&expr.Masq{}})
		}
		if p.V6.IsValid() {
			rule(post, oif(r.bridge, true), family(6), within(src6, p.V6, true), dnatted(), []expr.Any{&expr.Masq{}})
			rule(post, oif(r.bridge, false), family(6), within(src6, p.V6, true),
				within(dst6, netip.MustParsePrefix("ff00::/8"), false), []expr.Any{&expr.Masq{}})
		}
	}
	if err := r.flush(c); err != nil {
		return fmt.Errorf("nftables table %s: %w: kernel 5.2 or later with nf_tables and nft_nat is needed", r.name, err)
	}
	return nil
}

// remove takes the table away.
func (r *ruleset) remove() error {
	c, err := r.conn()
	if err != nil {
		return err
	}
	c.AddTable(r.table())
	c.DelTable(r.table())
	if err := r.flush(c); err != nil {
		return fmt.Errorf("nftables table %s: %w", r.name, err)
	}
	return nil
}

// exists tells whether the table is there.
func (r *ruleset) exists() bool {
	c, err := nftables.New()
	if err != nil {
		return false
	}
	t, err := c.ListTableOfFamily(r.name, nftables.TableFamilyINet)
	return err == nil && t != nil
}

// errNoTable: somebody flushed the ruleset; it must be installed again.
var errNoTable = errors.New("nftables table is gone")

// change takes host ports back and makes others lead to their pods, in one
// transaction.
func (r *ruleset) change(del []target, add ...target) error {
	c, err := r.conn()
	if err != nil {
		return err
	}
	maps, n := r.maps(), 0
	apply := func(ts []target, f func(*nftables.Set, []nftables.SetElement) error) error {
		for _, t := range ts {
			for name, e := range elements(t) {
				n += len(e)
				if err := f(maps[name], e); err != nil {
					return fmt.Errorf("nftables map %s: %w", name, err)
				}
			}
		}
		return nil
	}
	if err := errors.Join(apply(del, c.SetDeleteElements), apply(add, c.SetAddElements)); err != nil {
		r.drop() // what is queued must not go out with the next
		return err
	}
	if n == 0 {
		return nil
	}
	err = r.flush(c)
	if errGone(err) {
		return errNoTable
	}
	if err != nil {
		return fmt.Errorf("host ports in nftables table %s: %w", r.name, err)
	}
	return nil
}

// Expressions.

type field struct{ base, offset, length uint32 }

var (
	src4 = field{uint32(expr.PayloadBaseNetworkHeader), 12, 4}
	dst4 = field{uint32(expr.PayloadBaseNetworkHeader), 16, 4}
	src6 = field{uint32(expr.PayloadBaseNetworkHeader), 8, 16}
	dst6 = field{uint32(expr.PayloadBaseNetworkHeader), 24, 16}
)

func load(f field, reg uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: reg, Base: expr.PayloadBase(f.base), Offset: f.offset, Len: f.length}}
}

func proto(reg uint32) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg}}
}

// dport is at the same place in TCP, UDP and SCTP.
func dport(reg uint32) []expr.Any {
	return load(field{uint32(expr.PayloadBaseTransportHeader), 2, 2}, reg)
}

func family(v int) []expr.Any {
	b := byte(unix.NFPROTO_IPV4)
	if v == 6 {
		b = unix.NFPROTO_IPV6
	}
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{b}}}
}

func within(f field, p netip.Prefix, yes bool) []expr.Any {
	op := expr.CmpOpEq
	if !yes {
		op = expr.CmpOpNeq
	}
	mask := make([]byte, f.length)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return append(load(f, 1),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: f.length, Mask: mask, Xor: make([]byte, f.length)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()})
}

func ifname(s string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, s)
	return b
}

func iif(name string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: ifname(name)}}
}

func oif(name string, yes bool) []expr.Any {
	op := expr.CmpOpEq
	if !yes {
		op = expr.CmpOpNeq
	}
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: ifname(name)}}
}

func toLocal() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

// dnatted: IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
func dnatted() []expr.Any {
	const dstNAT = 1 << 5
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(dstNAT), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// dnat looks the concatenation from reg0 on up and translates to what it finds.
func dnat(m *nftables.Set, v int) []expr.Any {
	nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: reg0, RegProtoMin: reg1, Specified: true}
	if v == 6 {
		nat.Family, nat.RegProtoMin = unix.NFPROTO_IPV6, reg4
	}
	return []expr.Any{&expr.Lookup{SourceRegister: reg0, DestRegister: reg0, IsDestRegSet: true, SetName: m.Name, SetID: m.ID}, nat}
}

func verdict(k expr.VerdictKind, chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: k, Chain: chain}}
}
