package netns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Config of a node's pod network. All directories are this package's own
// except ConfDir and BinDirs.
type Config struct {
	// ConfDir holds CNI configurations (--cni-conf-dir). The first file in
	// order of name that can be read (*.conflist, *.conf, *.json) is used. With
	// none, or ConfDir empty, pods get the built-in network. It is looked at
	// anew for every pod: adding a file needs no restart.
	ConfDir string
	// BinDirs are searched for CNI plugins; default /opt/cni/bin and
	// /usr/lib/cni.
	BinDirs []string
	// RunDir is for state that ends with the host's uptime.
	RunDir string
	// DataDir is for state that outlives it.
	DataDir string
	// LockDir is where the instances of one host keep out of each other's way:
	// the same for all of them, root's alone. Default /run/podd-netns.
	LockDir string
	// Instance tells several podd of one host apart: it names the bridge and
	// the nftables table. Empty: podd0 and podd.
	Instance string
	// PodCIDR of the built-in network: one IPv4 and/or one IPv6 prefix,
	// separated by a comma. Empty: a free range is chosen once and kept, and
	// IPv6 added when the host has it.
	PodCIDR string
	// MTU of the built-in network; 0: that of the default route's interface.
	MTU int
	// PluginTimeout bounds one call of a CNI plugin; default 90 s.
	PluginTimeout time.Duration
	Log           *slog.Logger
}

// Network attaches pods: by CNI where there is a configuration, otherwise to
// the built-in bridge. What a pod was attached with is what detaches it, also
// when the configuration has changed since. Its methods may be called at once
// for many pods; calls for one pod wait for each other.
type Network struct {
	cfg  Config
	log  *slog.Logger
	host *netlink.Handle

	volatile, durable records
	cni               *cni
	builtin           builtin
	sandboxes         keyLocks

	// ranges is held over a change of the pools with its write, before mu.
	ranges sync.Mutex
	// mu guards what follows; it is never held over a system call.
	mu       sync.Mutex
	attached map[string]*entry
	pools    []*pool // the last one is current
	ports    portTable
	closing  []target // host ports to take back
	closer   bool     // somebody is about to
	reaper   *time.Timer
	closed   bool
	wg       sync.WaitGroup
	life     context.Context // of background work, which stop ends
	stop     context.CancelFunc
}

// entry is an attachment that this process knows.
type entry struct {
	*attachment
	since time.Time // zero: found on disk
}

// New reads what earlier runs left and takes it over. Without a CNI
// configuration it begins to set the built-in network up, which takes some 15
// ms that no pod should wait for; whether it could, Ready and Attach tell.
func New(c Config) (*Network, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.RunDir == "" || c.DataDir == "" {
		return nil, fmt.Errorf("network: RunDir and DataDir must be set: %w", errdefs.ErrInvalidArgument)
	}
	if len(c.BinDirs) == 0 {
		c.BinDirs = []string{"/opt/cni/bin", "/usr/lib/cni"}
	}
	if c.PluginTimeout == 0 {
		c.PluginTimeout = 90 * time.Second
	}
	if c.LockDir == "" {
		c.LockDir = defaultLockDir
	}
	for _, d := range []string{c.RunDir, c.DataDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("network: %w", err)
		}
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	n := &Network{
		cfg: c, log: c.Log, host: h,
		volatile: records{c.RunDir + "/attachments"},
		durable:  records{c.DataDir + "/attachments"},
		attached: map[string]*entry{},
		ports:    portTable{},
	}
	n.life, n.stop = context.WithCancel(context.Background())
	n.cni = newCNI(c, n.begin)
	bridge, table := instanceNames(c.Instance)
	n.builtin.bridge = bridge
	n.builtin.rules = ruleset{name: table, bridge: bridge}
	if err := n.recover(); err != nil {
		h.Close()
		return nil, err
	}
	n.begin(func(ctx context.Context) {
		if conf, err := n.cni.config(); conf != nil || err != nil {
			return
		}
		if err := n.ensure(ctx); err != nil && ctx.Err() == nil {
			n.log.Warn("built-in network not set up yet, it is tried again for every pod", "error", err)
		}
	})
	return n, nil
}

// begin work that Close ends and waits for.
func (n *Network) begin(work func(ctx context.Context)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.closed {
		n.wg.Add(1)
	}
	closed := n.closed
	go func() {
		if !closed {
			defer n.wg.Done()
		}
		work(n.life) // ended already when closed
	}()
}

// recover rebuilds leases and host ports from the records.
func (n *Network) recover() error {
	if err := n.loadPools(); err != nil {
		return err
	}
	for _, r := range []records{n.volatile, n.durable} {
		list, err := r.load(n.log)
		if err != nil {
			return err
		}
		for _, a := range list {
			n.attached[a.SandboxID] = &entry{attachment: a}
			if a.CNI != nil {
				continue
			}
			n.lease(a)
			if err := n.ports.claim(a.SandboxID, a.Pod, a.Ports); err != nil {
				n.log.Error("recovered host port is taken twice", "pod", a.Pod, "error", err)
			}
		}
	}
	return n.configured()
}

// lease marks a recovered attachment's addresses as used.
func (n *Network) lease(a *attachment) {
	for _, ip := range a.IPs {
		for _, p := range n.pools {
			if k, ok := p.number(ip); ok {
				p.used[k] = a.SandboxID
				if k >= p.next {
					p.next = k + 1
				}
			}
		}
	}
}

// tearDownTimeout bounds what Close does to the host.
const tearDownTimeout = 5 * time.Second

// Close waits for background work. Pods stay attached; when there are none, the
// bridge and the rules are removed too: the host is as it was before.
func (n *Network) Close() error {
	n.mu.Lock()
	n.closed = true
	if n.reaper != nil && n.reaper.Stop() {
		n.wg.Done()
	}
	n.mu.Unlock()
	n.stop()
	n.wg.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), tearDownTimeout)
	defer cancel()
	err := n.TearDown(ctx)
	if errdefs.IsFailedPrecondition(err) {
		err = nil // pods are attached
	}
	n.builtin.rules.mu.Lock()
	n.builtin.rules.drop()
	n.builtin.rules.mu.Unlock()
	n.host.Close()
	return err
}

// Attach brings up lo and eth0 in the pod's namespace. Attaching again what is
// attached starts afresh. On error nothing is left.
//
// errdefs.ErrResourceExhausted: no address is free. ErrAlreadyExists: a host
// port is another pod's, which the message names. ErrNotFound: the namespace.
// ErrInvalidArgument: a port, range or rate that cannot be.
func (n *Network) Attach(ctx context.Context, p *Pod) (*Result, error) {
	if err := checkID(p.SandboxID); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	unlock, err := n.sandboxes.lock(ctx, p.SandboxID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if old := n.entry(p.SandboxID); old != nil {
		if err := n.detach(ctx, old.attachment); err != nil {
			return nil, fmt.Errorf("network of pod %s/%s: what an earlier attempt left: %w", p.Namespace, p.Name, err)
		}
	}
	conf, err := n.cni.config()
	if err != nil {
		return nil, err
	}
	var res *Result
	if conf != nil {
		res, err = n.attachCNI(ctx, p, conf)
	} else {
		res, err = n.attachBuiltin(ctx, p)
	}
	if err != nil {
		return nil, fmt.Errorf("network of pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	return res, nil
}

// Detach gives everything back. It succeeds when there is nothing left, and
// when the namespace is gone. The host's side of the link is left to die with
// the namespace, which the caller drops next: deleting it takes 14 ms. What
// still lives a second later is deleted then, and its address is not used again
// before.
func (n *Network) Detach(ctx context.Context, p *Pod) error {
	if err := checkID(p.SandboxID); err != nil {
		return err
	}
	unlock, err := n.sandboxes.lock(ctx, p.SandboxID)
	if err != nil {
		return err
	}
	defer unlock()
	e := n.entry(p.SandboxID)
	if e == nil {
		return nil
	}
	if err := n.detach(ctx, e.attachment); err != nil {
		return fmt.Errorf("network of pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	return nil
}

func (n *Network) detach(ctx context.Context, a *attachment) error {
	if a.CNI != nil {
		return n.detachCNI(ctx, a)
	}
	return n.detachBuiltin(a)
}

func (n *Network) entry(id string) *entry {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.attached[id]
}

// Ready says why pods cannot be attached now. It also repairs what others
// removed: the bridge, the packet rules.
func (n *Network) Ready(ctx context.Context) error {
	conf, err := n.cni.config()
	if err != nil {
		return err
	}
	if conf != nil {
		return n.cni.status(ctx, conf)
	}
	return n.readyBuiltin(ctx)
}

// SetPodCIDR sets the range for pods attached from now on. Pods of the old
// range keep their addresses. CNI networks have their own ranges: for them it
// changes nothing until CNI's configuration is gone.
func (n *Network) SetPodCIDR(ctx context.Context, cidr string) error {
	if cidr == "" {
		return nil
	}
	v4, v6, err := parseCIDRs(cidr)
	if err != nil {
		return err
	}
	p, err := newPool(v4, v6)
	if err != nil {
		return err
	}
	changed, err := n.setPool(p, true)
	if err != nil || !changed {
		return err
	}
	n.builtin.reset()
	if conf, err := n.cni.config(); err != nil || conf != nil {
		return err
	}
	return n.ensure(ctx)
}

// young is how long an attachment is safe from Sweep: the caller's list may be
// from before it was made.
const young = 30 * time.Second

// Sweep releases the leases and links of every sandbox not in keep, except of
// those attached within the last 30 s, and has CNI plugins collect their
// garbage where they can.
func (n *Network) Sweep(ctx context.Context, keep []string) error {
	var errs []error
	n.mu.Lock()
	var gone []*attachment
	for id, e := range n.attached {
		if !slices.Contains(keep, id) && time.Since(e.since) > young {
			gone = append(gone, e.attachment)
		}
	}
	n.mu.Unlock()
	for _, a := range gone {
		unlock, err := n.sandboxes.lock(ctx, a.SandboxID)
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		if e := n.entry(a.SandboxID); e != nil && e.attachment == a {
			n.log.Info("network of a vanished sandbox released", "sandbox", a.SandboxID, "pod", a.Pod)
			if err := n.detach(ctx, a); err != nil {
				errs = append(errs, fmt.Errorf("network of pod %s: %w", a.Pod, err))
			}
		}
		unlock()
	}
	if err := n.sweepLinks(); err != nil {
		errs = append(errs, err)
	}
	conf, err := n.cni.config()
	if err == nil && conf != nil {
		n.mu.Lock()
		var valid []string
		for id, e := range n.attached {
			if e.CNI != nil {
				valid = append(valid, id)
			}
		}
		n.mu.Unlock()
		err = n.cni.collect(ctx, conf, valid)
	}
	return errors.Join(append(errs, err)...)
}

// Addresses of the node inside the built-in network (the pods' gateways), for
// whoever tells users where to look; empty before the first pod.
func (n *Network) Addresses() []netip.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.pools) == 0 {
		return nil
	}
	return n.pools[len(n.pools)-1].gateways()
}

// gate is a mutex that is waited for no longer than a context lasts. Its zero
// value is free.
type gate struct {
	once sync.Once
	held chan struct{} // full while held
}

func (g *gate) init() chan struct{} {
	g.once.Do(func() { g.held = make(chan struct{}, 1) })
	return g.held
}

func (g *gate) lock(ctx context.Context) error {
	select {
	case g.init() <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (g *gate) unlock() { <-g.held }

// keyLocks is a lock per key that exists only while somebody wants it.
type keyLocks struct {
	mu sync.Mutex
	m  map[string]*keyLock
}

type keyLock struct {
	held chan struct{} // full while held
	n    int           // who hold or want it
}

// lock waits until ctx ends at the longest.
func (k *keyLocks) lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mu.Lock()
	if k.m == nil {
		k.m = map[string]*keyLock{}
	}
	l := k.m[key]
	if l == nil {
		l = &keyLock{held: make(chan struct{}, 1)}
		k.m[key] = l
	}
	l.n++
	k.mu.Unlock()
	leave := func() {
		k.mu.Lock()
		if l.n--; l.n == 0 {
			delete(k.m, key)
		}
		k.mu.Unlock()
	}
	select {
	case l.held <- struct{}{}:
		return func() { <-l.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("network of sandbox %s is being changed: %w", key, ctx.Err())
	}
}
