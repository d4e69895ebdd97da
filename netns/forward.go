package netns

import (
	"bytes"
	"errors"
	"fmt"
	"net"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// A packet must pass every table's forward chain. Where iptables' chain FORWARD
// has the policy DROP (Docker sets it), pods would be cut off: so it gets two
// rules in front, written as iptables itself writes them, for iptables refuses
// to work with a table in which it finds anything else:
//
//	-A FORWARD -i podd0 -j ACCEPT
//	-A FORWARD -o podd0 -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT
//
// Pods reach out, answers and host ports reach in; a neighbour of the host that
// routes to pod addresses itself does not. Chains of other firewalls are the
// administrator's: firewalld wants the bridge in a trusted zone. Rules of
// iptables-legacy cannot be written by netlink; docs tell the two commands.
func (r *ruleset) allowForward(v6 bool) error {
	families := []nftables.TableFamily{nftables.TableFamilyIPv4}
	if v6 {
		families = append(families, nftables.TableFamilyIPv6)
	}
	var errs []error
	for _, f := range families {
		errs = append(errs, r.openChain(f, false))
	}
	return errors.Join(errs...)
}

// closeForward takes the rules out again.
func (r *ruleset) closeForward() error {
	return errors.Join(r.openChain(nftables.TableFamilyIPv4, true), r.openChain(nftables.TableFamilyIPv6, true))
}

func (r *ruleset) openChain(f nftables.TableFamily, undo bool) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	table := &nftables.Table{Name: "filter", Family: f}
	chain, err := c.ListChain(table, "FORWARD")
	if err != nil || chain == nil || chain.Hooknum == nil || *chain.Hooknum != *nftables.ChainHookForward {
		return nil // no iptables here
	}
	rules, err := c.GetRules(table, chain)
	if err != nil {
		return fmt.Errorf("rules of chain FORWARD: %w", err)
	}
	found := 0
	for _, x := range rules {
		if !r.ours(x) {
			continue
		}
		found++
		if undo {
			if err := c.DelRule(&nftables.Rule{Table: table, Chain: chain, Handle: x.Handle}); err != nil {
				return err
			}
		}
	}
	if undo {
		if found == 0 {
			return nil
		}
	} else {
		if found == 2 || chain.Policy == nil || *chain.Policy != nftables.ChainPolicyDrop {
			return nil
		}
		for _, e := range r.forwardRules(f) {
			c.InsertRule(&nftables.Rule{Table: table, Chain: chain, Exprs: e})
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("rules of chain FORWARD: %w", err)
	}
	return nil
}

func (r *ruleset) forwardRules(f nftables.TableFamily) [][]expr.Any {
	end := []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept}}
	// linux/netfilter/xt_conntrack.h: 1 << (ctinfo+1), DNAT is 1 << 7.
	const established, related, dnat = 1 << 1, 1 << 2, 1 << 7
	ip, mask := net.IPv4zero, net.CIDRMask(0, 32)
	if f == nftables.TableFamilyIPv6 {
		ip, mask = net.IPv6zero, net.CIDRMask(0, 128)
	}
	info := &xt.ConntrackMtinfo3{ConntrackMtinfo2: xt.ConntrackMtinfo2{
		ConntrackMtinfoBase: xt.ConntrackMtinfoBase{
			OrigSrcAddr: ip, OrigSrcMask: mask, OrigDstAddr: ip, OrigDstMask: mask,
			ReplSrcAddr: ip, ReplSrcMask: mask, ReplDstAddr: ip, ReplDstMask: mask,
			MatchFlags: uint16(xt.ConntrackState),
		},
		StateMask: established | related | dnat,
	}}
	name := append([]byte(r.bridge), 0)
	return [][]expr.Any{
		append([]expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name}}, end...),
		append([]expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name},
			&expr.Match{Name: "conntrack", Rev: 3, Info: info}}, end...),
	}
}

// ours recognises the rules by interface and verdict.
func (r *ruleset) ours(x *nftables.Rule) bool {
	iface, accept := false, false
	for _, e := range x.Exprs {
		switch e := e.(type) {
		case *expr.Cmp:
			iface = iface || bytes.Equal(bytes.TrimRight(e.Data, "\x00"), []byte(r.bridge))
		case *expr.Verdict:
			accept = accept || e.Kind == expr.VerdictAccept
		}
	}
	return iface && accept
}

// errGone are the ways in which netfilter says that a table, map or element is
// not there.
func errGone(err error) bool { return errors.Is(err, unix.ENOENT) }
