// Package netns gives pods their network: namespaces, CNI, and a built-in
// default network for nodes that have no CNI configuration.
//
// # The built-in network
//
// One bridge (podd0), a veth pair per pod, one IPv4 and one IPv6 address per
// pod out of a range that is chosen once so that it overlaps no route of the
// host, the bridge as the gateway, masquerading towards everything else, host
// ports by nftables. It needs no set-up, no uplink and no other program, but
// the kernel's bridge, veth and nf_tables (Linux 5.2), and sets
// net.ipv4.ip_forward and net.ipv6.conf.all.forwarding.
//
// Host ports answer on every address of the host, on 127.0.0.1 too, from
// outside, from the host and from pods, the pod itself included; not on ::1,
// which the kernel routes nowhere. A hostIP narrows that; 0.0.0.0 means IPv4,
// :: IPv6, none means both. A process of the host that listens on the same port
// gets nothing any more, as with every port mapper.
//
// # Beside other firewalls
//
// All rules are in a table of our own, which others do not touch and which
// touches nothing of theirs, Docker's and CNI plugins' included. A packet must
// pass every table, though. A policy of DROP in iptables-nft's chain FORWARD
// (Docker sets it) is opened for our bridge, see forward.go. With
// iptables-legacy the administrator does it:
//
//	iptables-legacy -I FORWARD -i podd0 -j ACCEPT
//	iptables-legacy -I FORWARD -o podd0 -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT
//
// and with firewalld "firewall-cmd --permanent --zone=trusted
// --add-interface=podd0". What others delete, the bridge or the table, comes
// back with the next Ready or Attach.
//
// # State
//
// Memory follows disk and kernel. An attachment's record names what the pod
// holds; links of the bridge without a record are nobody's. So whatever a
// crash leaves, New and Sweep find. Nothing is synced to disk: after a power
// cut there are no pods.
package netns

import (
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Pod is what a network needs to know of a pod.
type Pod struct {
	SandboxID, Name, Namespace, UID string
	NetnsPath                       string
	Annotations                     map[string]string
	Ports                           []*runtimeapi.PortMapping
	DNS                             *runtimeapi.DNSConfig
	CgroupParent                    string
}

// Result is what Attach achieved; it is stored with the sandbox.
type Result struct {
	IPs        []string          `json:"ips"`
	Interfaces map[string]string `json:"interfaces,omitempty"` // name → MAC
	DNS        []string          `json:"dns,omitempty"`
}
