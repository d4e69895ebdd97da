package netns

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// cniRecord is what DEL needs, whatever has become of the configuration.
type cniRecord struct {
	Network      string          `json:"network"`
	Config       json.RawMessage `json:"config"` // a configuration list
	NetnsPath    string          `json:"netnsPath"`
	Args         [][2]string     `json:"args"`
	Capabilities map[string]any  `json:"capabilities,omitempty"`
}

// cni runs plugins by libcni and knows the configuration in force.
type cni struct {
	confDir string
	timeout time.Duration
	lib     *libcni.CNIConfig
	// begin work in the background that ends with the network.
	begin func(work func(ctx context.Context))

	mu   sync.Mutex
	sig  string // of the directory's content when list was read
	list *libcni.NetworkConfigList
	err  error

	asking    *asking
	statusAt  time.Time
	statusErr error
}

func newCNI(c Config, begin func(work func(ctx context.Context))) *cni {
	e := &pluginExec{timeout: c.PluginTimeout}
	return &cni{
		confDir: c.ConfDir,
		timeout: c.PluginTimeout, begin: begin,
		lib: libcni.NewCNIConfigWithCacheDir(c.BinDirs, filepath.Join(c.DataDir, "cni"), e),
	}
}

// config returns the network in force, nil for the built-in one. The directory
// is looked at each time and read when anything in it changed: that takes
// microseconds, needs no watch that could be late or lost, and works for a
// directory that does not exist yet. errdefs.ErrFailedPrecondition: there are
// files, and none can be used.
func (c *cni) config() (*libcni.NetworkConfigList, error) {
	if c.confDir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(c.confDir) // sorted by name
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cni configuration: %w", err)
	}
	var files []string
	var sig strings.Builder
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case ".conflist", ".conf", ".json":
		default:
			continue
		}
		path := filepath.Join(c.confDir, e.Name())
		st, err := os.Stat(path) // a link's target: operators mount it so
		if err != nil || !st.Mode().IsRegular() {
			continue
		}
		files = append(files, path)
		fmt.Fprintf(&sig, "%s %d %d\n", e.Name(), st.Size(), st.ModTime().UnixNano())
	}
	c.mu.Lock()
	same, list, err := sig.String() == c.sig, c.list, c.err
	c.mu.Unlock()
	if same {
		return list, err
	}
	list, err = firstConfig(files) // files are read with nobody waiting
	c.mu.Lock()
	defer c.mu.Unlock()
	if sig.String() != c.sig {
		c.sig, c.list, c.err, c.statusAt = sig.String(), list, err, time.Time{}
	}
	return c.list, c.err
}

// firstConfig is the first of the files that can be used.
func firstConfig(files []string) (*libcni.NetworkConfigList, error) {
	var bad []error
	for _, f := range files {
		l, err := loadConfig(f)
		if err == nil {
			return l, nil
		}
		bad = append(bad, fmt.Errorf("cni configuration %s: %w", f, err))
	}
	if len(bad) > 0 {
		return nil, fmt.Errorf("%w: correct or remove it: %w", errors.Join(bad...), errdefs.ErrFailedPrecondition)
	}
	return nil, nil
}

func loadConfig(path string) (*libcni.NetworkConfigList, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var l *libcni.NetworkConfigList
	if filepath.Ext(path) == ".conflist" {
		l, err = libcni.NetworkConfFromBytes(data)
	} else {
		var p *libcni.PluginConfig
		if p, err = libcni.NetworkPluginConfFromBytes(data); err == nil {
			if p.Network.Type == "" {
				return nil, errors.New(`"type" is missing; a list of plugins belongs into a .conflist file`)
			}
			l, err = listOf(p, data)
		}
	}
	if err != nil {
		return nil, err
	}
	if len(l.Plugins) == 0 {
		return nil, errors.New("it names no plugins")
	}
	return l, nil
}

// listOf makes a list of the single plugin that a .conf file is.
func listOf(p *libcni.PluginConfig, data []byte) (*libcni.NetworkConfigList, error) {
	list, err := json.Marshal(map[string]any{
		"cniVersion": p.Network.CNIVersion, "name": p.Network.Name, "plugins": []json.RawMessage{data},
	})
	if err != nil {
		return nil, err
	}
	return libcni.NetworkConfFromBytes(list)
}

// statusTTL: kubelets ask every few seconds, plugins are processes.
const statusTTL = 10 * time.Second

// asking is a STATUS that is under way.
type asking struct {
	list *libcni.NetworkConfigList
	done chan struct{} // closed when err is there
	err  error
}

// status asks the plugins that know STATUS (CNI 1.1). Who asks while somebody
// does waits for that answer, as long as ctx lasts; nobody else waits for a
// plugin that hangs, and after its time-out it is asked anew.
func (c *cni) status(ctx context.Context, l *libcni.NetworkConfigList) error {
	c.mu.Lock()
	if c.list == l && time.Since(c.statusAt) < statusTTL {
		defer c.mu.Unlock()
		return c.statusErr
	}
	a := c.asking
	if a == nil || a.list != l {
		a = &asking{list: l, done: make(chan struct{})}
		c.asking = a
		// For all who wait, so it does not end with the first; a plugin has
		// its time-out.
		c.begin(func(ctx context.Context) { c.ask(ctx, a) })
	}
	c.mu.Unlock()
	select {
	case <-a.done:
		return a.err
	case <-ctx.Done():
		return fmt.Errorf("cni network %s: its plugins have not answered STATUS: %w: %w", l.Name, context.Cause(ctx), errdefs.ErrUnavailable)
	}
}

func (c *cni) ask(ctx context.Context, a *asking) {
	err := c.lib.GetStatusNetworkList(ctx, a.list)
	if err != nil {
		err = fmt.Errorf("cni network %s: %w: %w", a.list.Name, err, errdefs.ErrUnavailable)
	}
	a.err = err
	close(a.done)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.list == a.list {
		c.statusAt, c.statusErr = time.Now(), err
	}
	if c.asking == a {
		c.asking = nil
	}
}

// collect is the GC verb (CNI 1.1) and DEL for what only the cache knows.
func (c *cni) collect(ctx context.Context, l *libcni.NetworkConfigList, ids []string) error {
	args := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}}
	for _, id := range ids {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: id, IfName: podLink})
	}
	if err := c.lib.GCNetworkList(ctx, l, args); err != nil {
		return fmt.Errorf("cni network %s: collect garbage: %w", l.Name, err)
	}
	return nil
}

func (r *cniRecord) runtime(id, netns string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: id, NetNS: netns, IfName: podLink, Args: r.Args, CapabilityArgs: r.Capabilities}
}

func (n *Network) attachCNI(ctx context.Context, p *Pod, conf *libcni.NetworkConfigList) (_ *Result, err error) {
	caps, err := capabilities(p)
	if err != nil {
		return nil, err
	}
	ns, err := open(p.NetnsPath)
	if err != nil {
		return nil, err
	}
	defer unix.Close(ns)
	err = doFD(ns, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return loopback(h)
	})
	if err != nil {
		return nil, err
	}
	a := &attachment{
		Version: recordVersion, SandboxID: p.SandboxID, Pod: p.Namespace + "/" + p.Name, UID: p.UID,
		CNI: &cniRecord{
			Network: conf.Name, Config: conf.Bytes, NetnsPath: p.NetnsPath, Capabilities: caps,
			Args: [][2]string{
				{"IgnoreUnknown", "1"},
				{"K8S_POD_NAMESPACE", p.Namespace},
				{"K8S_POD_NAME", p.Name},
				{"K8S_POD_INFRA_CONTAINER_ID", p.SandboxID},
				{"K8S_POD_UID", p.UID},
			},
		},
	}
	if err := n.durable.save(a); err != nil {
		return nil, err
	}
	n.mu.Lock()
	n.attached[a.SandboxID] = &entry{a, time.Now()}
	n.mu.Unlock()
	defer func() {
		if err == nil {
			return
		}
		// ADD may have failed half way, or the answer been lost: DEL is due
		// (CNI SPEC 1.1, "Lifecycle & Ordering"). When it fails too the record
		// stays for Detach and Sweep.
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), n.cfg.PluginTimeout)
		defer cancel()
		if derr := n.detachCNI(cctx, a); derr != nil {
			err = errors.Join(err, derr)
		}
	}()
	raw, err := n.cni.lib.AddNetworkList(ctx, conf, a.CNI.runtime(a.SandboxID, p.NetnsPath))
	if err != nil {
		return nil, fmt.Errorf("cni network %s: %w", conf.Name, err)
	}
	res, err := types100.NewResultFromResult(raw)
	if err != nil {
		return nil, fmt.Errorf("cni network %s: result: %w", conf.Name, err)
	}
	out := result(res)
	if len(out.IPs) == 0 {
		return nil, fmt.Errorf("cni network %s: the plugins gave no address for %s: %w", conf.Name, podLink, errdefs.ErrFailedPrecondition)
	}
	return out, nil
}

// result picks what concerns the pod's eth0: its addresses first, in the order
// of the plugins; those of no interface in particular count as its.
func result(r *types100.Result) *Result {
	out := &Result{Interfaces: map[string]string{}}
	for _, i := range r.Interfaces {
		if i.Sandbox != "" {
			out.Interfaces[i.Name] = i.Mac
		}
	}
	var others []string
	for _, ip := range r.IPs {
		switch {
		case ip.Interface == nil || *ip.Interface < 0 || *ip.Interface >= len(r.Interfaces),
			r.Interfaces[*ip.Interface].Sandbox != "" && r.Interfaces[*ip.Interface].Name == podLink:
			out.IPs = append(out.IPs, ip.Address.IP.String())
		case r.Interfaces[*ip.Interface].Sandbox != "":
			others = append(others, ip.Address.IP.String())
		}
	}
	if len(out.IPs) == 0 {
		out.IPs = others
	}
	out.DNS = r.DNS.Nameservers
	return out
}

func (n *Network) detachCNI(ctx context.Context, a *attachment) error {
	conf, err := libcni.NetworkConfFromBytes(a.CNI.Config)
	if err != nil {
		return fmt.Errorf("cni network %s: recorded configuration: %w", a.CNI.Network, err)
	}
	netns := a.CNI.NetnsPath
	if fd, err := open(netns); err == nil {
		unix.Close(fd)
	} else {
		netns = "" // gone: plugins must cope (CNI SPEC, DEL)
	}
	if err := n.cni.lib.DelNetworkList(ctx, conf, a.CNI.runtime(a.SandboxID, netns)); err != nil {
		return fmt.Errorf("cni network %s: %w", a.CNI.Network, err)
	}
	if err := n.durable.drop(a.SandboxID); err != nil {
		return err
	}
	n.mu.Lock()
	delete(n.attached, a.SandboxID)
	n.mu.Unlock()
	return nil
}

// Check asks the plugins whether the pod's network is still as they made it
// (CHECK, CNI 0.4). Pods of the built-in network, and of configurations with
// disableCheck, are always well.
func (n *Network) Check(ctx context.Context, p *Pod) error {
	e := n.entry(p.SandboxID)
	if e == nil {
		return fmt.Errorf("network of pod %s/%s: %w", p.Namespace, p.Name, errdefs.ErrNotFound)
	}
	if e.CNI == nil {
		return nil
	}
	conf, err := libcni.NetworkConfFromBytes(e.CNI.Config)
	if err == nil {
		if ok, verr := version.GreaterThanOrEqualTo(conf.CNIVersion, "0.4.0"); verr != nil || !ok {
			return verr
		}
		err = n.cni.lib.CheckNetworkList(ctx, conf, e.CNI.runtime(p.SandboxID, e.CNI.NetnsPath))
	}
	if err != nil {
		return fmt.Errorf("network of pod %s/%s: cni network %s: %w", p.Namespace, p.Name, e.CNI.Network, err)
	}
	return nil
}

// Annotations for CNI's ips and mac capabilities, which Kubernetes has no field
// for: a comma-separated list of addresses with or without prefix length, and
// one hardware address.
const (
	ipsAnnotation = "podd/cni-ips"
	macAnnotation = "podd/cni-mac"
)

// capabilities builds the capability arguments (CNI CONVENTIONS.md); libcni
// passes on what a plugin declares.
func capabilities(p *Pod) (map[string]any, error) {
	caps := map[string]any{}
	ports, err := hostPorts(p.Ports)
	if err != nil {
		return nil, err
	}
	if len(ports) > 0 {
		type mapping struct {
			HostPort      uint16 `json:"hostPort"`
			ContainerPort uint16 `json:"containerPort"`
			Protocol      string `json:"protocol"`
			HostIP        string `json:"hostIP,omitempty"`
		}
		names := map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_SCTP: "sctp"}
		var m []mapping
		for _, hp := range ports {
			x := mapping{HostPort: hp.HostPort, ContainerPort: hp.ContainerPort, Protocol: names[hp.Proto]}
			if hp.HostIP.IsValid() {
				x.HostIP = hp.HostIP.String()
			}
			m = append(m, x)
		}
		caps["portMappings"] = m
	}
	r, err := parseRates(p.Annotations)
	if err != nil {
		return nil, err
	}
	if r.ingress > 0 || r.egress > 0 {
		// The plugin wants a burst in bits with every rate.
		const maxBurst = 1<<31 - 1
		b := map[string]uint64{}
		if r.ingress > 0 {
			b["ingressRate"], b["ingressBurst"] = r.ingress, maxBurst
		}
		if r.egress > 0 {
			b["egressRate"], b["egressBurst"] = r.egress, maxBurst
		}
		caps["bandwidth"] = b
	}
	if d := p.DNS; d != nil && (len(d.Servers) > 0 || len(d.Searches) > 0 || len(d.Options) > 0) {
		caps["dns"] = dnsArgs(d)
	}
	if p.CgroupParent != "" {
		caps["cgroupPath"] = p.CgroupParent
	}
	if s := p.Annotations[ipsAnnotation]; s != "" {
		caps["ips"] = splitComma(s)
	}
	if s := p.Annotations[macAnnotation]; s != "" {
		caps["mac"] = s
	}
	return caps, nil
}

func dnsArgs(d *runtimeapi.DNSConfig) map[string][]string {
	m := map[string][]string{}
	for k, v := range map[string][]string{"servers": d.Servers, "searches": d.Searches, "options": d.Options} {
		if len(v) > 0 {
			m[k] = v
		}
	}
	return m
}

// pluginExec runs plugins. libcni's own leaves a plugin's children running when
// the deadline comes, and then waits for them.
type pluginExec struct {
	version.PluginDecoder
	timeout time.Duration
}

func (e *pluginExec) FindInPath(plugin string, paths []string) (string, error) {
	return invoke.FindInPath(plugin, paths)
}

func (e *pluginExec) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	var stdout, stderr bytes.Buffer
	run := func() error {
		stdout.Reset()
		stderr.Reset()
		cmd := exec.CommandContext(ctx, path)
		cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = env, bytes.NewReader(stdin), &stdout, &stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
		cmd.WaitDelay = time.Second
		return cmd.Run()
	}
	err := run()
	for i := 0; i < 5 && errors.Is(err, unix.ETXTBSY); i++ {
		// An installer is still writing it.
		t := time.NewTimer(200 * time.Millisecond)
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
		err = run()
	}
	if err == nil {
		return stdout.Bytes(), nil
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("no answer in time: %w%s", ctx.Err(), tail(&stderr))
	}
	said := &types.Error{}
	if stdout.Len() > 0 && json.Unmarshal(stdout.Bytes(), said) == nil && said.Msg != "" {
		return nil, said
	}
	return nil, fmt.Errorf("%w%s%s", err, tail(&stdout), tail(&stderr))
}

// tail is what a failed plugin said, not more than a log line takes.
func tail(b *bytes.Buffer) string {
	s := strings.TrimSpace(b.String())
	if s == "" {
		return ""
	}
	if len(s) > 1000 {
		s = "…" + s[len(s)-1000:]
	}
	return ": " + s
}
