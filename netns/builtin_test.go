package netns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func tcp(host, container int32) *runtimeapi.PortMapping {
	return &runtimeapi.PortMapping{HostPort: host, ContainerPort: container}
}

func TestPodsReachEachOtherAndTheHost(t *testing.T) {
	w := newWorld(t)
	a, b := w.pod(), w.pod()
	ra, rb := w.attach(a), w.attach(b)
	if len(ra.IPs) != 2 {
		t.Fatalf("addresses %v, want IPv4 and IPv6", ra.IPs)
	}
	serve(t, a, "a", 80)
	serve(t, nil, "host", 81)
	for i, ipa := range ra.IPs {
		if name, peer, err := ask(t, b, "tcp", net.JoinHostPort(ipa, "80")); err != nil || name != "a" || peer != rb.IPs[i] {
			t.Errorf("pod to pod by %s: %q saw %q: %v; want a to see %s", ipa, name, peer, err, rb.IPs[i])
		}
		if name, _, err := ask(t, nil, "tcp", net.JoinHostPort(ipa, "80")); err != nil || name != "a" {
			t.Errorf("host to pod by %s: %q: %v", ipa, name, err)
		}
		gw := w.net.Addresses()[i].String()
		if name, _, err := ask(t, b, "tcp", net.JoinHostPort(gw, "81")); err != nil || name != "host" {
			t.Errorf("pod to host by %s: %q: %v", gw, name, err)
		}
	}
	// lo is up in the pod.
	serve(t, b, "b", 82)
	for _, lo := range []string{"127.0.0.1", "::1"} {
		if name, _, err := ask(t, b, "tcp", net.JoinHostPort(lo, "82")); err != nil || name != "b" {
			t.Errorf("pod to itself by %s: %q: %v", lo, name, err)
		}
	}
}

func TestHostPorts(t *testing.T) {
	w := newWorld(t)
	ip(t, false, "link", "add", "up0", "type", "veth", "peer", "name", "up1")
	t.Cleanup(func() { ip(t, true, "link", "del", "up0") })
	ip(t, false, "addr", "add", "198.51.100.1/24", "dev", "up0")
	ip(t, false, "addr", "add", "2001:db8::1/64", "dev", "up0", "nodad")
	ip(t, false, "link", "set", "up0", "up")
	outside := w.pod() // a machine on the host's network, not a pod
	ip(t, false, "link", "set", "up1", "netns", w.netnsName(outside))
	in(t, outside, func() error {
		ip(t, false, "link", "set", "lo", "up")
		ip(t, false, "addr", "add", "198.51.100.2/24", "dev", "up1")
		ip(t, false, "addr", "add", "2001:db8::2/64", "dev", "up1", "nodad")
		ip(t, false, "link", "set", "up1", "up")
		return nil
	})

	web := w.pod(tcp(8080, 80), &runtimeapi.PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: runtimeapi.Protocol_UDP},
		&runtimeapi.PortMapping{HostPort: 8081, ContainerPort: 80, HostIp: "127.0.0.1"},
		&runtimeapi.PortMapping{HostPort: 8082, ContainerPort: 80, HostIp: "198.51.100.1"},
		&runtimeapi.PortMapping{HostPort: 8083, ContainerPort: 80, HostIp: "2001:db8::1"},
		&runtimeapi.PortMapping{HostPort: 8084, ContainerPort: 80, HostIp: "0.0.0.0"})
	rw := w.attach(web)
	other := w.pod()
	w.attach(other)
	serve(t, web, "web", 80)
	gw := w.net.Addresses()[0].String()

	for _, c := range []struct {
		what    string
		from    *Pod
		network string
		addr    string
		ok      bool
	}{
		{"outside by IPv4", outside, "tcp", "198.51.100.1:8080", true},
		{"outside by IPv6", outside, "tcp", "[2001:db8::1]:8080", true},
		{"outside by UDP", outside, "udp", "198.51.100.1:8080", true},
		{"outside by UDP6", outside, "udp", "[2001:db8::1]:8080", true},
		{"host by its own address", nil, "tcp", "198.51.100.1:8080", true},
		{"host by its own IPv6 address", nil, "tcp", "[2001:db8::1]:8080", true},
		{"host by 127.0.0.1", nil, "tcp", "127.0.0.1:8080", true},
		{"host by 127.0.0.1 and UDP", nil, "udp", "127.0.0.1:8080", true},
		{"host by ::1 is refused, not lost", nil, "tcp", "[::1]:8080", false},
		{"host to 127.0.0.1 only", nil, "tcp", "127.0.0.1:8081", true},
		{"outside to 127.0.0.1 only", outside, "tcp", "198.51.100.1:8081", false},
		{"outside to one address", outside, "tcp", "198.51.100.1:8082", true},
		{"host to another address", nil, "tcp", "127.0.0.1:8082", false},
		{"outside to one IPv6 address", outside, "tcp", "[2001:db8::1]:8083", true},
		{"outside to 0.0.0.0", outside, "tcp", "198.51.100.1:8084", true},
		{"outside to 0.0.0.0 by IPv6", outside, "tcp", "[2001:db8::1]:8084", false},
		{"another pod by the host's address", other, "tcp", "198.51.100.1:8080", true},
		{"another pod by the host's IPv6 address", other, "tcp", "[2001:db8::1]:8080", true},
		{"another pod by the gateway", other, "tcp", gw + ":8080", true},
		{"another pod by UDP", other, "udp", "198.51.100.1:8080", true},
		{"the pod itself", web, "tcp", "198.51.100.1:8080", true},
		{"the pod itself by IPv6", web, "tcp", "[2001:db8::1]:8080", true},
	} {
		name, peer, err := ask(t, c.from, c.network, c.addr)
		if got := err == nil && name == "web"; got != c.ok {
			t.Errorf("%s (%s): answer %q, %v; want one: %v", c.what, c.addr, name, err, c.ok)
		}
		if c.ok && c.from == outside && err == nil && !strings.HasPrefix(peer, "198.51.100.2") && !strings.HasPrefix(peer, "2001:db8::2") {
			t.Errorf("%s: the pod saw %s, not the client's address", c.what, peer)
		}
	}

	// The pod goes out by masquerade.
	serve(t, outside, "world", 90)
	for addr, want := range map[string]string{"198.51.100.2:90": "198.51.100.1", "[2001:db8::2]:90": "2001:db8::1"} {
		if name, peer, err := ask(t, other, "tcp", addr); err != nil || name != "world" || peer != want {
			t.Errorf("pod to %s: %q saw %s, %v; want world to see %s", addr, name, peer, err, want)
		}
	}

	// A conflict names the holder; nothing is left of the attempt.
	late := w.pod(tcp(9000, 80), tcp(8080, 80))
	if _, err := w.net.Attach(t.Context(), late); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "default/"+web.Name) {
		t.Errorf("taken port: %v; want already exists, by default/%s", err, web.Name)
	}
	if _, _, err := ask(t, nil, "tcp", "127.0.0.1:9000"); err == nil {
		t.Error("port 9000 of the refused pod answers")
	}

	// A restart rebuilds the rules from the records.
	w.restart()
	if err := w.net.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if name, _, err := ask(t, outside, "tcp", "198.51.100.1:8080"); err != nil || name != "web" {
		t.Errorf("after restart: %q, %v", name, err)
	}
	// Somebody flushes all rules: Ready repairs.
	nft(t, "flush", "ruleset")
	if err := w.net.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if name, _, err := ask(t, outside, "tcp", "198.51.100.1:8080"); err != nil || name != "web" {
		t.Errorf("after nft flush ruleset: %q, %v", name, err)
	}

	// A UDP client that keeps sending from one port follows the port to the
	// next pod.
	var c net.Conn
	in(t, outside, func() (err error) {
		c, err = net.Dial("udp", "198.51.100.1:8080")
		return err
	})
	defer c.Close()
	if got := udp(t, c); got != "web" {
		t.Fatalf("udp before: %q", got)
	}
	w.detach(web)
	eventually(t, "port 8080 closed", func() bool {
		_, _, err := ask(t, outside, "tcp", "198.51.100.1:8080")
		return err != nil
	})
	next := w.pod(&runtimeapi.PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: runtimeapi.Protocol_UDP})
	if r := w.attach(next); r.IPs[0] == rw.IPs[0] {
		t.Errorf("address %s reused at once", rw.IPs[0])
	}
	serve(t, next, "next", 80)
	eventually(t, "the client's packets come to the next pod", func() bool { return udp(t, c) == "next" })
}

// The host's loopback is not open to pods, although route_localnet is on.
func TestLoopbackIsClosedToPods(t *testing.T) {
	w := newWorld(t)
	a := w.pod()
	w.attach(a)
	l, err := net.Listen("tcp4", "127.0.0.1:7777")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	bridge := w.net.builtin.bridge
	in(t, a, func() error {
		ip(t, false, "addr", "del", "127.0.0.1/8", "dev", "lo")
		ip(t, false, "route", "add", "127.0.0.1", "via", w.net.Addresses()[0].String())
		return sysctl("net/ipv4/conf/eth0/route_localnet", "1")
	})
	if _, _, err := ask(t, a, "tcp4", "127.0.0.1:7777"); err == nil {
		t.Errorf("a pod on %s reached the host's 127.0.0.1", bridge)
	}
}

func TestDetachGivesBack(t *testing.T) {
	w := newWorld(t)
	p := w.pod(tcp(8080, 80))
	w.attach(p)
	link := w.link(p.SandboxID)
	if out := ip(t, false, "link", "show", "master", w.net.builtin.bridge); !strings.Contains(out, link) {
		t.Errorf("no link %s on the bridge: %s", link, out)
	}
	w.detach(p)
	eventually(t, "link gone with its namespace", func() bool { _, err := net.InterfaceByName(link); return err != nil })
	for range 2 {
		if err := w.net.Detach(t.Context(), p); err != nil {
			t.Errorf("detach again: %v", err)
		}
	}
	eventually(t, "host port gone", func() bool {
		return !strings.Contains(nft(t, "list", "table", "inet", w.net.builtin.rules.name), "8080")
	})

	// A namespace that somebody keeps: the reaper deletes the link.
	q := w.pod()
	w.attach(q)
	if err := w.net.Detach(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	eventually(t, "link deleted by the reaper", func() bool { _, err := net.InterfaceByName(w.link(q.SandboxID)); return err != nil })

	// A namespace that vanished first.
	r := w.pod(tcp(8080, 80))
	w.attach(r)
	if err := Unpin(r.NetnsPath); err != nil {
		t.Fatal(err)
	}
	if err := w.net.Detach(t.Context(), r); err != nil {
		t.Errorf("detach without namespace: %v", err)
	}
	if left := w.leases(); left != 0 {
		t.Errorf("%d leases left", left)
	}
}

func (w *world) leases() int {
	w.net.mu.Lock()
	defer w.net.mu.Unlock()
	n := 0
	for _, p := range w.net.pools {
		n += len(p.used)
	}
	return n
}

// A policy of DROP, as Docker sets it, does not cut pods off, and iptables still
// understands its table.
func TestForwardPolicyDrop(t *testing.T) {
	needRoot(t)
	if _, err := exec.LookPath("iptables-nft"); err != nil {
		t.Skip("needs iptables-nft")
	}
	run := func(cmd string, args ...string) string {
		out, err := exec.Command(cmd, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v: %s", cmd, args, err, out)
		}
		return string(out)
	}
	for _, cmd := range []string{"iptables-nft", "ip6tables-nft"} {
		run(cmd, "-P", "FORWARD", "DROP")
		t.Cleanup(func() { run(cmd, "-F", "FORWARD"); run(cmd, "-P", "FORWARD", "ACCEPT") })
	}
	w := newWorld(t)
	a, b := w.pod(tcp(8080, 80)), w.pod()
	ra := w.attach(a)
	w.attach(b)
	serve(t, a, "a", 80)
	for i, ip := range ra.IPs {
		if name, _, err := ask(t, b, "tcp", net.JoinHostPort(ip, "80")); err != nil || name != "a" {
			t.Errorf("pod to pod by %s: %q, %v", ip, name, err)
		}
		if name, _, err := ask(t, b, "tcp", net.JoinHostPort(w.net.Addresses()[i].String(), "8080")); err != nil || name != "a" {
			t.Errorf("pod to host port by %s: %q, %v", ip, name, err)
		}
	}
	br := w.net.builtin.bridge
	for _, cmd := range []string{"iptables-nft", "ip6tables-nft"} {
		got := run(cmd, "-S", "FORWARD")
		for _, want := range []string{"-A FORWARD -i " + br + " -j ACCEPT",
			"-A FORWARD -o " + br + " -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT"} {
			if strings.Count(got, want) != 1 {
				t.Errorf("%s: %q not once in\n%s", cmd, want, got)
			}
		}
	}
	w.restart()
	if err := w.net.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := run("iptables-nft", "-S", "FORWARD"); strings.Count(got, br) != 2 {
		t.Errorf("rules doubled by a restart: %s", got)
	}
	if err := w.net.TearDown(t.Context()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("tear down with pods: %v", err)
	}
	w.detach(a)
	w.detach(b)
	if err := w.net.TearDown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := run("iptables-nft", "-S", "FORWARD") + ip(t, false, "link") + nft(t, "list", "ruleset"); strings.Contains(got, br) {
		t.Errorf("left after tear down: %s", got)
	}
}

func TestAttachAgain(t *testing.T) {
	w := newWorld(t)
	p := w.pod(tcp(8080, 80))
	w.attach(p)
	w.attach(p) // a retry after an answer that was lost
	if n := w.leases(); n != 2-1 {
		t.Errorf("%d leases, want 1", n)
	}
	w.detach(p)
	if _, err := w.net.Attach(t.Context(), p); !errdefs.IsNotFound(err) {
		t.Errorf("attach without namespace: %v; want not found", err)
	}
	if n := w.leases(); n != 0 {
		t.Errorf("%d leases left by the failed attempt", n)
	}
}

// Whatever a kill -9 leaves is found again.
func TestSweepAfterCrash(t *testing.T) {
	w := newWorld(t)
	alive, dead := w.pod(tcp(8080, 80)), w.pod(tcp(8081, 80))
	ra := w.attach(alive)
	w.attach(dead)
	serve(t, alive, "alive", 80)
	// A link without a record: the record was lost.
	orphan := w.pod()
	w.attach(orphan)
	if err := w.net.volatile.drop(orphan.SandboxID); err != nil {
		t.Fatal(err)
	}
	// A record without a link: the crash came between the two.
	early := &attachment{Version: recordVersion, SandboxID: "early", Pod: "default/early", Link: w.link("early"),
		IPs: []netip.Addr{netip.MustParseAddr(ra.IPs[0]).Next().Next().Next().Next()}}
	if err := w.net.volatile.save(early); err != nil {
		t.Fatal(err)
	}
	w.restart()
	if n := w.leases(); n != 3 {
		t.Errorf("%d leases recovered, want alive, dead and early", n)
	}
	if err := w.net.Sweep(t.Context(), []string{alive.SandboxID}); err != nil {
		t.Fatal(err)
	}
	if n := w.leases(); n != 1 {
		t.Errorf("%d leases after the sweep, want alive's", n)
	}
	eventually(t, "links of dead and orphan deleted", func() bool {
		for _, p := range []*Pod{dead, orphan} {
			if _, err := net.InterfaceByName(w.link(p.SandboxID)); err == nil {
				return false
			}
		}
		return true
	})
	if name, _, err := ask(t, nil, "tcp", "127.0.0.1:8080"); err != nil || name != "alive" {
		t.Errorf("the living pod's port: %q, %v", name, err)
	}
	// What was attached just now is safe from a list made before.
	fresh := w.pod()
	w.attach(fresh)
	if err := w.net.Sweep(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if w.net.entry(fresh.SandboxID) == nil {
		t.Error("a sweep took a pod that had just been attached")
	}
	w.detach(fresh)
}

func TestExhaustionAndRotation(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.PodCIDR = "10.99.0.0/29" }) // 5 pods
	var pods []*Pod
	seen := map[string]bool{}
	for range 5 {
		p := w.pod()
		seen[w.attach(p).IPs[0]] = true
		pods = append(pods, p)
	}
	extra := w.pod()
	if _, err := w.net.Attach(t.Context(), extra); !errdefs.IsResourceExhausted(err) {
		t.Fatalf("sixth pod of five: %v; want exhausted", err)
	}
	freed := w.net.entry(pods[2].SandboxID).IPs[0].String()
	w.detach(pods[2])
	// Only the resting address is left: it is given once its link is gone.
	if got := w.attach(extra).IPs[0]; got != freed {
		t.Errorf("got %s, want the only free %s", got, freed)
	}
	if len(seen) != 5 {
		t.Errorf("addresses not distinct: %v", seen)
	}
}

func TestParallelAttach(t *testing.T) {
	w := newWorld(t)
	const n = 50
	pods := make([]*Pod, n)
	for i := range pods {
		pods[i] = w.pod(tcp(int32(10000+i), 80))
	}
	var wg sync.WaitGroup
	ips := make([]string, n)
	for i, p := range pods {
		wg.Add(1)
		go func() {
			defer wg.Done()
			r, err := w.net.Attach(context.Background(), p)
			if err != nil {
				t.Error(err)
				return
			}
			ips[i] = r.IPs[0]
		}()
	}
	wg.Wait()
	seen := map[string]bool{}
	for _, ip := range ips {
		if seen[ip] {
			t.Errorf("address %s given twice", ip)
		}
		seen[ip] = true
	}
	serve(t, pods[n-1], "last", 80)
	if name, _, err := ask(t, pods[0], "tcp", fmt.Sprintf("%s:%d", w.net.Addresses()[0], 10000+n-1)); err != nil || name != "last" {
		t.Errorf("host port of the last pod: %q, %v", name, err)
	}
	for _, p := range pods {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := w.net.Detach(context.Background(), p); err != nil {
				t.Error(err)
			}
			if err := Unpin(p.NetnsPath); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	if left := w.leases(); left != 0 {
		t.Errorf("%d leases left", left)
	}
	eventually(t, "all links gone", func() bool {
		return !strings.Contains(ip(t, false, "link", "show", "master", w.net.builtin.bridge), linkPrefix)
	})
}

func BenchmarkAttachDetach(b *testing.B) {
	for name, ports := range map[string][]*runtimeapi.PortMapping{"plain": nil, "hostPort": {tcp(8080, 80)}} {
		b.Run(name, func(b *testing.B) {
			w := newWorld(b)
			w.cfg.Log = nil
			if err := w.net.Ready(b.Context()); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				b.StopTimer()
				p := w.pod(ports...)
				b.StartTimer()
				w.attach(p)
				b.StopTimer()
				w.detach(p)
				b.StartTimer()
			}
		})
		b.Run(name+"/detach", func(b *testing.B) {
			w := newWorld(b)
			for b.Loop() {
				b.StopTimer()
				p := w.pod(ports...)
				w.attach(p)
				b.StartTimer()
				w.detach(p)
			}
		})
	}
}

// BenchmarkAttach100 attaches 100 pods at once.
func BenchmarkAttach100(b *testing.B) {
	w := newWorld(b)
	if err := w.net.Ready(b.Context()); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		b.StopTimer()
		pods := make([]*Pod, 100)
		for i := range pods {
			pods[i] = w.pod()
		}
		b.StartTimer()
		var wg sync.WaitGroup
		for _, p := range pods {
			wg.Go(func() {
				if _, err := w.net.Attach(context.Background(), p); err != nil {
					b.Error(err)
				}
			})
		}
		wg.Wait()
		b.StopTimer()
		for _, p := range pods {
			w.detach(p)
		}
		b.StartTimer()
	}
}

// A pod in a user namespace of its own owns its network namespace; the node
// still sets it up.
func TestUserNamespace(t *testing.T) {
	w := newWorld(t)
	cmd := exec.Command("/bin/sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}},
	}
	if err := cmd.Start(); err != nil {
		t.Skipf("no user namespaces here: %v", err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	p := &Pod{SandboxID: "userns", Name: "u", Namespace: "default", NetnsPath: filepath.Join(w.cfg.RunDir, "ns", "userns")}
	if err := Pin(cmd.Process.Pid, p.NetnsPath); err != nil {
		t.Fatal(err)
	}
	defer Unpin(p.NetnsPath)
	r := w.attach(p)
	serve(t, p, "u", 80)
	for _, ip := range r.IPs {
		if name, _, err := ask(t, nil, "tcp", net.JoinHostPort(ip, "80")); err != nil || name != "u" {
			t.Errorf("by %s: %q, %v", ip, name, err)
		}
	}
	w.detach(p)
}

func TestHostPortSCTP(t *testing.T) {
	w := newWorld(t)
	p := w.pod(&runtimeapi.PortMapping{HostPort: 9899, ContainerPort: 99, Protocol: runtimeapi.Protocol_SCTP})
	r := w.attach(p)
	got := nft(t, "list", "table", "inet", w.net.builtin.rules.name)
	want := " . 9899 : " + r.IPs[0] + " . 99"
	if !strings.Contains(got, "sctp"+want) && !strings.Contains(got, "132"+want) {
		t.Errorf("no sctp%s in %s", want, got)
	}
	if fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP); err != nil {
		t.Skipf("no SCTP in this kernel, the rule is checked alone: %v", err)
	} else {
		unix.Close(fd)
	}
	sctp := func(bind *unix.SockaddrInet4, connect *unix.SockaddrInet4) (int, error) {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
		if err != nil {
			return -1, err
		}
		t.Cleanup(func() { unix.Close(fd) })
		if bind != nil {
			if err := unix.Bind(fd, bind); err != nil {
				return fd, err
			}
			return fd, unix.Listen(fd, 1)
		}
		return fd, unix.Connect(fd, connect)
	}
	in(t, p, func() error { _, err := sctp(&unix.SockaddrInet4{Port: 99}, nil); return err })
	if _, err := sctp(nil, &unix.SockaddrInet4{Port: 9899, Addr: w.net.Addresses()[0].As4()}); err != nil {
		t.Errorf("connect by SCTP: %v", err)
	}
}
