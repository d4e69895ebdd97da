package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func prefixes(s ...string) (out []netip.Prefix) {
	for _, x := range s {
		out = append(out, netip.MustParsePrefix(x))
	}
	return out
}

func TestChoose(t *testing.T) {
	for _, c := range []struct {
		routes []netip.Prefix
		want   string
	}{
		{nil, "10.86.0.0/20"},
		{prefixes("192.168.1.0/24", "fd00::/8"), "10.86.0.0/20"},
		{prefixes("10.86.0.0/20"), "10.86.16.0/20"},
		{prefixes("10.86.15.255/32", "10.86.16.0/24"), "10.86.32.0/20"},
		{prefixes("10.86.0.0/15"), "10.64.0.0/20"},
		{prefixes("10.0.0.0/8"), "100.80.0.0/20"},
		{prefixes("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12"), "192.168.192.0/20"},
	} {
		got, err := choose(c.routes)
		if err != nil || got.String() != c.want {
			t.Errorf("%v: %s, %v; want %s", c.routes, got, err, c.want)
		}
	}
	if _, err := choose(prefixes("10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16")); !errdefs.IsResourceExhausted(err) {
		t.Errorf("nothing free: %v", err)
	}
}

func TestULA(t *testing.T) {
	a, b := ula("machine", "a"), ula("machine", "b")
	if a == b || a != ula("machine", "a") || a.Bits() != 64 || a.Addr().As16()[0] != 0xfd {
		t.Errorf("%s, %s", a, b)
	}
}

func TestPool(t *testing.T) {
	for _, bad := range []string{"", "10.0.0.0", "10.0.0.0/31", "fd00::/127", "10.0.0.0/24,10.1.0.0/24", "x"} {
		v4, v6, err := parseCIDRs(bad)
		if err == nil {
			_, err = newPool(v4, v6)
		}
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("range %q: %v, want invalid argument", bad, err)
		}
	}
	p, err := newPool(netip.MustParsePrefix("10.1.2.3/29"), netip.MustParsePrefix("fd00::5/64"))
	if err != nil || p.String() != "10.1.2.0/29,fd00::/64" {
		t.Fatal(p, err)
	}
	var got []string
	for i := range 5 {
		n, err := p.take(fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		a := p.addrs(n)
		got = append(got, a[0].String())
		for _, x := range a {
			if m, ok := p.number(x); !ok || m != n {
				t.Errorf("number of %s: %d, want %d", x, m, n)
			}
		}
	}
	if s := strings.Join(got, " "); s != "10.1.2.2 10.1.2.3 10.1.2.4 10.1.2.5 10.1.2.6" {
		t.Errorf("addresses %s", s)
	}
	if _, err := p.take("x"); !errdefs.IsResourceExhausted(err) {
		t.Errorf("full: %v", err)
	}
	delete(p.used, 3)
	p.resting[3] = "l3"
	if _, err := p.take("x"); !errdefs.IsResourceExhausted(err) {
		t.Errorf("only a resting one whose link lives: %v", err)
	}
	delete(p.resting, 3)
	if n, err := p.take("x"); err != nil || n != 3 {
		t.Errorf("%d, %v; want 3", n, err)
	}
	// Rotation: what was given back comes last.
	delete(p.used, 2)
	delete(p.used, 5)
	if n, _ := p.take("y"); n != 5 {
		t.Errorf("got %d, want 5: after the last given", n)
	}
	if _, ok := p.number(netip.MustParseAddr("10.1.3.0")); ok {
		t.Error("an address of another range has a number")
	}
	big, err := newPool(netip.MustParsePrefix("10.0.0.0/8"), netip.Prefix{})
	if err != nil || big.size != maxPool {
		t.Errorf("size %d, %v", big.size, err)
	}
}

func TestPortCollisions(t *testing.T) {
	port := func(ip string, n uint16, proto uint8) hostPort {
		p := hostPort{Proto: proto, HostPort: n, ContainerPort: 80}
		if ip != "" {
			p.HostIP = netip.MustParseAddr(ip)
		}
		return p
	}
	for _, c := range []struct {
		a, b hostPort
		want bool
	}{
		{port("", 80, 6), port("", 80, 6), true},
		{port("", 80, 6), port("", 81, 6), false},
		{port("", 80, 6), port("", 80, 17), false},
		{port("", 80, 6), port("10.0.0.1", 80, 6), true},
		{port("0.0.0.0", 80, 6), port("10.0.0.1", 80, 6), true},
		{port("0.0.0.0", 80, 6), port("::", 80, 6), false},
		{port("0.0.0.0", 80, 6), port("fd00::1", 80, 6), false},
		{port("10.0.0.1", 80, 6), port("10.0.0.2", 80, 6), false},
		{port("10.0.0.1", 80, 6), port("10.0.0.1", 80, 6), true},
	} {
		if c.a.collide(c.b) != c.want || c.b.collide(c.a) != c.want {
			t.Errorf("%s and %s: want %v", c.a, c.b, c.want)
		}
	}
	for _, m := range []*runtimeapi.PortMapping{
		{HostPort: 70000, ContainerPort: 80}, {HostPort: -1, ContainerPort: 80}, {HostPort: 80},
		{HostPort: 80, ContainerPort: 80, HostIp: "localhost"}, {HostPort: 80, ContainerPort: 80, Protocol: 9},
	} {
		if _, err := hostPorts([]*runtimeapi.PortMapping{m}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v, want invalid argument", m, err)
		}
	}
}

// Instances that start at once get different ranges, and keep them.
func TestInstancesDoNotCollide(t *testing.T) {
	var worlds []*world
	for range 4 {
		worlds = append(worlds, newWorld(t))
	}
	var wg sync.WaitGroup
	for _, w := range worlds {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := w.net.Ready(context.Background()); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	seen := map[netip.Addr]bool{}
	for _, w := range worlds {
		for _, a := range w.net.Addresses() {
			if seen[a] {
				t.Errorf("%s twice", a)
			}
			seen[a] = true
		}
	}
	w := worlds[2]
	before := fmt.Sprint(w.net.Addresses())
	w.restart()
	if err := w.net.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := fmt.Sprint(w.net.Addresses()); after != before {
		t.Errorf("range changed by a restart: %s, was %s", after, before)
	}
	// Pods of two instances reach each other, by routing.
	a, b := worlds[0].pod(), worlds[1].pod()
	r := worlds[0].attach(a)
	worlds[1].attach(b)
	serve(t, a, "a", 80)
	for _, ip := range r.IPs {
		if name, _, err := ask(t, b, "tcp", net.JoinHostPort(ip, "80")); err != nil || name != "a" {
			t.Errorf("from another instance's pod by %s: %q, %v", ip, name, err)
		}
	}
}

// A chosen range that the host comes to route elsewhere is left while nobody
// uses it.
func TestChosenRangeMoves(t *testing.T) {
	w := newWorld(t)
	if err := w.net.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	old := w.net.Addresses()[0]
	ip(t, false, "link", "del", w.net.builtin.bridge)
	ip(t, false, "link", "add", "vpn0", "type", "bridge")
	t.Cleanup(func() { ip(t, true, "link", "del", "vpn0") })
	ip(t, false, "addr", "add", old.Next().String()+"/16", "dev", "vpn0")
	ip(t, false, "link", "set", "vpn0", "up")
	w.restart()
	p := w.pod()
	r := w.attach(p)
	vpn, _ := old.Prefix(16)
	if a := netip.MustParseAddr(r.IPs[0]); vpn.Contains(a) {
		t.Errorf("pod has %s, inside the new route %s", a, vpn)
	}
}

func TestSetPodCIDR(t *testing.T) {
	w := newWorld(t)
	a := w.pod()
	ra := w.attach(a)
	serve(t, a, "a", 80)
	if err := w.net.SetPodCIDR(t.Context(), "10.99.8.0/24,fd99::/64"); err != nil {
		t.Fatal(err)
	}
	b := w.pod()
	rb := w.attach(b)
	if rb.IPs[0] != "10.99.8.2" || rb.IPs[1] != "fd99::2" {
		t.Errorf("new pod has %v", rb.IPs)
	}
	for _, ip := range ra.IPs {
		if name, _, err := ask(t, b, "tcp", net.JoinHostPort(ip, "80")); err != nil || name != "a" {
			t.Errorf("pod of the old range by %s: %q, %v", ip, name, err)
		}
	}
	w.restart()
	if got := w.net.Addresses()[0].String(); got != "10.99.8.1" {
		t.Errorf("after restart %s", got)
	}
	if n := w.leases(); n != 2 {
		t.Errorf("%d leases recovered, want 2 in 2 ranges", n)
	}
	w.detach(a)
	w.detach(b)
	// IPv6 alone, then IPv4 alone.
	for cidr, want := range map[string]string{"fd98::/64": "[fd98::2]", "10.98.0.0/24": "[10.98.0.2]"} {
		if err := w.net.SetPodCIDR(t.Context(), cidr); err != nil {
			t.Fatal(err)
		}
		p := w.pod()
		if got := fmt.Sprint(w.attach(p).IPs); got != want {
			t.Errorf("range %s: %s, want %s", cidr, got, want)
		}
		w.detach(p)
	}
	if err := w.net.SetPodCIDR(t.Context(), "10.0.0.0/33"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad range: %v", err)
	}
	w.net.mu.Lock()
	n := len(w.net.pools)
	w.net.mu.Unlock()
	if n != 1 {
		t.Errorf("%d ranges kept, want those in use only", n)
	}
}

// A range in the configuration takes over from a chosen one; pods of that one
// keep their leases.
func TestConfiguredRangeComesLater(t *testing.T) {
	w := newWorld(t)
	a := w.pod()
	ra := w.attach(a)
	w.cfg.PodCIDR = "10.97.0.0/24"
	w.restart()
	if n := w.leases(); n != 1 {
		t.Errorf("%d leases recovered, want 1", n)
	}
	b := w.pod()
	if r := w.attach(b); len(r.IPs) != 1 || r.IPs[0] != "10.97.0.2" {
		t.Errorf("new pod has %v", r.IPs)
	}
	serve(t, a, "a", 80)
	if name, _, err := ask(t, b, "tcp", net.JoinHostPort(ra.IPs[0], "80")); err != nil || name != "a" {
		t.Errorf("pod of the old range: %q, %v", name, err)
	}
}

// Waiting for another's change of the same sandbox ends with the context.
func TestLockIsBounded(t *testing.T) {
	var k keyLocks
	unlock, err := k.lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := k.lock(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want canceled", err)
	}
	other, err := k.lock(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	other()
	unlock()
	if len(k.m) != 0 {
		t.Errorf("%d locks kept", len(k.m))
	}
}

func TestWithoutIPv6(t *testing.T) {
	needRoot(t)
	for _, k := range []string{"all", "default"} {
		if err := sysctl("net/ipv6/conf/"+k+"/disable_ipv6", "1"); err != nil {
			t.Skip(err)
		}
		t.Cleanup(func() { _ = sysctl("net/ipv6/conf/"+k+"/disable_ipv6", "0") })
	}
	w := newWorld(t)
	p := w.pod(tcp(8080, 80))
	if r := w.attach(p); len(r.IPs) != 1 {
		t.Errorf("addresses %v, want one", r.IPs)
	}
	serve(t, p, "p", 80)
	if name, _, err := ask(t, nil, "tcp", "127.0.0.1:8080"); err != nil || name != "p" {
		t.Errorf("%q, %v", name, err)
	}
	// A range from when there was IPv6.
	if err := w.net.SetPodCIDR(t.Context(), "10.99.9.0/24,fd97::/64"); err != nil {
		t.Fatal(err)
	}
	if r := w.attach(w.pod()); len(r.IPs) != 1 || r.IPs[0] != "10.99.9.2" {
		t.Errorf("addresses %v", r.IPs)
	}
	if err := w.net.SetPodCIDR(t.Context(), "fd97::/64"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.net.Attach(t.Context(), w.pod()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("IPv6 alone on a host without: %v", err)
	}
}

func TestMTUFollowsTheUplink(t *testing.T) {
	needRoot(t)
	ip(t, false, "link", "add", "wan0", "mtu", "1400", "type", "bridge")
	t.Cleanup(func() { ip(t, true, "link", "del", "wan0") })
	ip(t, false, "addr", "add", "198.51.100.1/24", "dev", "wan0")
	ip(t, false, "link", "set", "wan0", "up")
	ip(t, false, "route", "add", "default", "via", "198.51.100.2")
	if err := errors.Join(sysctl("net/ipv6/conf/wan0/accept_ra", "1"), sysctl("net/ipv6/conf/all/forwarding", "0")); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	p := w.pod()
	w.attach(p)
	in(t, p, func() error {
		if out := ip(t, false, "link", "show", "eth0"); !strings.Contains(out, "mtu 1400") {
			t.Errorf("eth0: %s", out)
		}
		return nil
	})
	if ra := readSysctl("net/ipv6/conf/wan0/accept_ra"); ra != "2" {
		t.Errorf("accept_ra of the uplink is %s: a forwarding host loses its IPv6 default route, want 2", ra)
	}
}

func TestBandwidth(t *testing.T) {
	w := newWorld(t)
	p := w.pod()
	p.Annotations = map[string]string{ingressAnnotation: "8M", egressAnnotation: "16M"}
	w.attach(p)
	if out := tc(t, "qdisc", "show", "dev", w.link(p.SandboxID)); !strings.Contains(out, "tbf") || !strings.Contains(out, "rate 8Mbit") {
		t.Errorf("ingress: %s", out)
	}
	in(t, p, func() error {
		if out := tc(t, "qdisc", "show", "dev", "eth0"); !strings.Contains(out, "tbf") || !strings.Contains(out, "rate 16Mbit") {
			t.Errorf("egress: %s", out)
		}
		return nil
	})
	// 1 MB at 8 Mbit/s takes a second (less the burst).
	var l net.Listener
	in(t, p, func() (err error) {
		l, err = net.Listen("tcp", ":80")
		return err
	})
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		b := make([]byte, 64<<10)
		for n := 0; n < 1<<20; {
			k, err := c.Read(b)
			if err != nil {
				return
			}
			n += k
		}
		_, _ = c.Write([]byte("."))
		c.Close()
	}()
	c, err := net.Dial("tcp", net.JoinHostPort(w.net.entry(p.SandboxID).IPs[0].String(), "80"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	start := time.Now()
	if _, err := c.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d < 700*time.Millisecond || d > 4*time.Second {
		t.Errorf("1 MiB at 8 Mbit/s took %s", d)
	}
	for _, bad := range []string{"x", "10", "2P", "-1M"} {
		if _, err := parseRates(map[string]string{egressAnnotation: bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("rate %q: %v, want invalid argument", bad, err)
		}
	}
}

func tc(t testing.TB, args ...string) string {
	out, err := exec.Command("tc", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("tc %v: %v: %s", args, err, out)
	}
	return string(out)
}

func TestPin(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "ns")
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	inode := func(p string) uint64 {
		var st unix.Stat_t
		if err := unix.Stat(p, &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	want := inode(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
	for range 2 { // the second replaces the first
		if err := Pin(cmd.Process.Pid, path); err != nil {
			t.Fatal(err)
		}
	}
	pid := cmd.Process.Pid
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if got := inode(path); got != want {
		t.Errorf("pinned namespace %d, want %d", got, want)
	}
	var inside uint64
	if err := Do(path, func() error { inside = inode("/proc/thread-self/ns/net"); return nil }); err != nil || inside != want {
		t.Errorf("inside %d, %v; want %d", inside, err, want)
	}
	if home := inode("/proc/self/ns/net"); home == want {
		t.Error("a thread stayed inside")
	}
	for range 2 {
		if err := Unpin(path); err != nil {
			t.Fatal(err)
		}
	}
	if err := Do(path, func() error { return nil }); !errdefs.IsNotFound(err) {
		t.Errorf("unpinned: %v, want not found", err)
	}
	if err := Pin(pid, path); !errdefs.IsNotFound(err) {
		t.Errorf("pin of a dead process: %v, want not found", err)
	}
	// What is no namespace is not touched.
	precious := filepath.Join(dir, "precious")
	if err := os.WriteFile(precious, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Unpin(precious); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("unpin of a file: %v", err)
	}
	if err := Unpin(dir); err == nil {
		t.Error("unpin of a directory: no error")
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(precious, link); err != nil {
		t.Fatal(err)
	}
	if err := Unpin(link); err == nil {
		t.Error("unpin of a link: no error")
	}
	if b, _ := os.ReadFile(precious); string(b) != "data" {
		t.Error("a file was harmed")
	}
}

// Descriptors, threads' namespaces, links, records and goroutines before and
// after are the same.
func TestNothingLeaks(t *testing.T) {
	w := newWorld(t)
	count := func() [7]int {
		fds, _ := os.ReadDir("/proc/self/fd")
		ns := map[string]int{}
		threads, _ := os.ReadDir("/proc/self/task")
		for _, th := range threads {
			l, _ := os.Readlink("/proc/self/task/" + th.Name() + "/ns/net")
			if l != "" {
				ns[l]++
			}
		}
		mounts, _ := os.ReadFile("/proc/self/mountinfo")
		records, _ := os.ReadDir(w.net.volatile.dir)
		return [7]int{len(fds), len(ns), strings.Count(string(mounts), "\n"), len(records),
			strings.Count(ip(t, false, "-o", "link"), "\n"), w.leases(), runtime.NumGoroutine()}
	}
	round := func() {
		var pods []*Pod
		for i := range 10 {
			p := w.pod(tcp(int32(8000+i), 80))
			w.attach(p)
			pods = append(pods, p)
		}
		for _, p := range pods {
			w.detach(p)
		}
		bad := w.pod(tcp(-1, 80))
		if _, err := w.net.Attach(t.Context(), bad); err == nil {
			t.Error("no error")
		}
		if err := Unpin(bad.NetnsPath); err != nil {
			t.Error(err)
		}
	}
	round() // what is made once is made now
	eventually(t, "reaper done", w.idle)
	before := count()
	for range 3 {
		round()
	}
	eventually(t, "reaper done", w.idle)
	var after [7]int
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("descriptors, namespaces of threads, mounts, records, links, leases, goroutines: before %v, after %v", before, after)
		}
	})
	eventually(t, "no more than before", func() bool {
		after = count()
		for i := range after {
			if after[i] > before[i] {
				return false
			}
		}
		return true
	})
}

func (w *world) idle() bool {
	w.net.mu.Lock()
	defer w.net.mu.Unlock()
	return w.net.reaper == nil && !w.net.closer
}

// A process that attaches and detaches is killed at arbitrary moments; what it
// leaves is found and given back.
func TestKilledAnywhere(t *testing.T) {
	needRoot(t)
	if dir := os.Getenv("PODD_TEST_VICTIM"); dir != "" {
		victim(t, dir)
		return
	}
	w := newWorld(t)
	if err := w.net.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i := range 12 {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestKilledAnywhere$")
		cmd.Env = append(os.Environ(), "PODD_TEST_VICTIM="+w.cfg.RunDir+"/..")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Not a wait for something: the moment of death is what varies.
		time.Sleep(time.Duration(150+i*7) * time.Millisecond)
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	}
	w.restart()
	if err := w.net.Sweep(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if n := w.leases(); n != 0 {
		t.Errorf("%d leases left", n)
	}
	if e, _ := os.ReadDir(w.net.volatile.dir); len(e) != 0 {
		t.Errorf("records left: %v", e)
	}
	names, _ := filepath.Glob(w.cfg.RunDir + "/ns/*")
	if len(names) == 0 {
		t.Error("the victims never came to attach")
	}
	for _, n := range names {
		if err := Unpin(n); err != nil {
			t.Error(err)
		}
	}
	eventually(t, "no links left", func() bool {
		return !strings.Contains(ip(t, false, "link", "show", "master", w.net.builtin.bridge), linkPrefix)
	})
	if err := w.net.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := w.pod(tcp(8000, 80))
	w.attach(p)
	serve(t, p, "p", 80)
	if name, _, err := ask(t, nil, "tcp", "127.0.0.1:8000"); err != nil || name != "p" {
		t.Errorf("after it all: %q, %v", name, err)
	}
}

func victim(t *testing.T, dir string) {
	n, err := New(Config{RunDir: dir + "/run", DataDir: dir + "/data", Instance: filepath.Clean(dir)})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Sweep(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		id := fmt.Sprintf("v%d-%d", os.Getpid(), i)
		p := &Pod{SandboxID: id, Name: id, Namespace: "v", NetnsPath: filepath.Join(dir, "run", "ns", id), Ports: []*runtimeapi.PortMapping{tcp(int32(8000+i%7), 80)}}
		if err := Create(p.NetnsPath); err != nil {
			t.Fatal(err)
		}
		if _, err := n.Attach(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		if i%3 == 0 {
			continue
		}
		if err := n.Detach(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		if err := Unpin(p.NetnsPath); err != nil {
			t.Fatal(err)
		}
	}
}

// A record that cannot be read costs that pod, not the node.
func TestBrokenRecord(t *testing.T) {
	w := newWorld(t)
	a, b := w.pod(), w.pod()
	w.attach(a)
	rb := w.attach(b)
	if err := os.WriteFile(w.net.volatile.path(a.SandboxID), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.cfg.DataDir+"/range.json", []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.restart()
	if w.net.entry(a.SandboxID) != nil || w.net.entry(b.SandboxID) == nil {
		t.Error("want b's record alone")
	}
	if err := w.net.Sweep(t.Context(), []string{b.SandboxID}); err != nil {
		t.Fatal(err)
	}
	if _, err := net.InterfaceByName(w.link(a.SandboxID)); err == nil {
		t.Error("the broken record's link is left")
	}
	if n := w.leases(); n != 1 {
		t.Errorf("%d leases, want b's in the range that the bridge has", n)
	}
	if r := w.attach(w.pod()); r.IPs[0] == rb.IPs[0] {
		t.Errorf("%s given twice", r.IPs[0])
	}
}
