// Package kubelet puts the node agent together: it opens its parts in the order
// in which they need each other and closes them in reverse. It decides nothing
// by itself.
package kubelet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	v1 "k8s.io/api/core/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cgroups"
	"github.com/podd-runtime/podd/cri"
	"github.com/podd-runtime/podd/cri/images"
	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/kubelet/credentials"
	"github.com/podd-runtime/podd/kubelet/events"
	"github.com/podd-runtime/podd/kubelet/imagegc"
	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/metrics"
	"github.com/podd-runtime/podd/kubelet/pods"
	"github.com/podd-runtime/podd/kubelet/server"
	"github.com/podd-runtime/podd/kubelet/server/api"
	"github.com/podd-runtime/podd/kubelet/shutdown"
	"github.com/podd-runtime/podd/kubelet/stats"
	"github.com/podd-runtime/podd/netns"
	"github.com/podd-runtime/podd/systemd"
	"github.com/podd-runtime/podd/volumes"
)

// Config of the agent: where it keeps what, and each part's own settings.
type Config struct {
	// DataDir outlives a reboot, RunDir need not. Both are locked while the
	// agent runs: two agents on one directory would undo each other's work.
	DataDir, RunDir string
	// CRISocket is where CRI clients are answered; CRIListener takes its place
	// when the service manager has opened it.
	CRISocket   string
	CRIListener net.Listener
	// ShimProgram is podd-shim's binary.
	ShimProgram string
	// ShimUnit is the systemd service that runs it; "": podd does.
	ShimUnit string
	NodeName string
	Version  string
	Log      *slog.Logger

	CRI       cri.Config
	Images    images.Config
	Network   netns.Config
	Cgroups   cgroups.Config
	Volumes   volumes.Config
	Manifests manifests.Config
	Events    events.Config
	Pods      pods.Config
	ImageGC   imagegc.Policy
	// Shutdown of the machine; no steps: it is not held up for pods.
	Shutdown []shutdown.Step
	API      APIConfig
	// Credentials for images by plugins; its accounts are filled in; nil: none.
	Credentials *credentials.Config
	// Cluster this machine is a node of; nil: of none.
	Cluster *Cluster
}

// agent is everything that runs, as one holds it between start and stop.
type agent struct {
	cfg     Config
	log     *slog.Logger
	shim    *shim.Client
	shimPID atomic.Int64 // of the one that answered last; 0: none has
	images  *images.Store
	network *netns.Network
	cri     *cri.Service
	volumes *volumes.Volumes
	events  *events.Store
	source  *manifests.Source
	table   *pods.Table
	health  health
	metrics *metrics.Metrics
	tree    *cgroups.Tree
	stats   *stats.Provider
	imageGC *imagegc.Collector
	cluster *cluster // nil: none
	notice  *notice  // while podd-shim is waited for at the start
	undo    []func()
}

// ErrReload as the cause of the end of Run's context says that another agent
// takes over at once, in this process; Run returns it.
var ErrReload = errors.New("reload")

// Run is the agent's life: it returns when ctx ends, with every container
// still running, or when a part cannot go on.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Cluster == nil { // before anything is started
		if err := checkReviews(cfg.API); err != nil {
			return err
		}
	}
	a, err := open(ctx, cfg, (*agent).awaitShim)
	if err != nil {
		return askedFor(ctx, err)
	}
	defer a.close()
	outer := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	criListener := cfg.CRIListener
	if criListener == nil {
		if criListener, err = a.listen(ctx, cfg.CRISocket); err != nil {
			return fmt.Errorf("CRI socket (--cri-socket): %w", err)
		}
	}
	localListener, err := a.listen(ctx, filepath.Join(cfg.RunDir, api.SocketName))
	if err != nil {
		criListener.Close()
		return fmt.Errorf("local API (--run-dir): %w", err)
	}
	nodeAPI, err := a.openAPI()
	if err != nil {
		criListener.Close()
		localListener.Close()
		return err
	}
	defer nodeAPI.close()
	local := server.New(server.Config{
		NodeName: cfg.NodeName, Version: cfg.Version,
		Pods: podAPI{a.table}, Events: a.events, Objects: a.source,
		Containers: a.cri, Images: a.images, Problems: a.source.Problems,
		Shim: a.shimInfo, Cluster: a.clusterState, Troubles: a.troubles, Shutdown: cancel, Explain: a.explain, Disk: a.imageDisk, Log: a.log,
	})

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return cri.Serve(ctx, criListener, a.cri) })
	group.Go(func() error {
		defer localListener.Close()
		select { // a list without the pods of the last run would be wrong
		case <-a.table.Recovered():
			return local.Serve(ctx, localListener)
		case <-ctx.Done():
			return nil
		}
	})
	group.Go(func() error { return nodeAPI.run(ctx) })
	group.Go(func() error { return a.keepShim(ctx) })
	group.Go(func() error { return a.events.Run(ctx) })
	group.Go(func() error { return a.table.Run(ctx) })
	group.Go(func() error { return a.source.Run(ctx) })
	group.Go(func() error { return a.refreshVolumes(ctx) })
	group.Go(func() error { return a.collectImages(ctx) })
	if a.cluster != nil {
		group.Go(func() error { return a.cluster.run(ctx) })
	}
	group.Go(func() error { return a.volumes.Run(ctx, a.table.Pods, a.volumesTroubled) })
	group.Go(func() error { return a.tellReady(ctx) })
	group.Go(func() error { return a.keepAlive(ctx) })
	group.Go(func() error { return a.tellStatus(ctx) })
	group.Go(func() error { return a.heedShutdowns(ctx) })
	context.AfterFunc(ctx, func() {
		if context.Cause(outer) == ErrReload {
			systemd.Reloading(a.log)
		} else {
			systemd.Stopping(a.log)
		}
	})
	return askedFor(outer, group.Wait())
}

// askedFor is what Run returns: the end of its context is no error.
func askedFor(ctx context.Context, err error) error {
	switch {
	case context.Cause(ctx) == ErrReload:
		return ErrReload
	case errors.Is(err, context.Canceled):
		return nil
	}
	return err
}

// tellReady says so when the pods of the last run are taken up and both sockets
// answer: they listen already, so that who connects before waits.
func (a *agent) tellReady(ctx context.Context) error {
	select {
	case <-a.table.Recovered():
	case <-ctx.Done():
		return nil
	}
	a.log.Info("podd is ready", "node", a.cfg.NodeName, "manifests", a.cfg.Manifests.Dir, "cri", a.cfg.CRISocket, "version", a.cfg.Version)
	systemd.Ready(a.log)
	return nil
}

// heedShutdowns ends the pods in order before the machine goes down.
func (a *agent) heedShutdowns(ctx context.Context) error {
	if len(a.cfg.Shutdown) == 0 {
		return nil
	}
	return shutdown.Run(ctx, shutdown.Config{
		Steps: a.cfg.Shutdown, Pods: a.table, Log: a.log,
		Connect: func(ctx context.Context) (shutdown.Machine, error) { return systemd.OpenLogind(ctx) },
		Event:   func(reason, message string) { a.events.Eventf(a.node(), v1.EventTypeNormal, reason, "%s", message) },
	})
}

// Drain stops every pod that runs in the directories of cfg, each within grace
// seconds, by default its own grace period, and ends podd-shim. No agent may be
// running there.
func Drain(ctx context.Context, cfg Config, grace *int64) error {
	cfg.Cluster, cfg.Pods.Sources = nil, []string{manifests.SourceName}
	a, err := open(ctx, cfg, (*agent).ensureShim)
	if err != nil {
		return err
	}
	defer a.close()
	running, stop := context.WithCancel(ctx)
	defer stop()
	group, running := errgroup.WithContext(running)
	group.Go(func() error { return a.table.Run(running) })
	select {
	case <-a.table.Recovered():
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := a.table.StopAll(ctx, grace); err != nil { // in order, which the next does not keep
		return err
	}
	// No source holds a pod: all there is is an orphan, and goes.
	a.table.Synced(manifests.SourceName)
	if err := a.waitEmpty(ctx); err != nil {
		return err
	}
	stop()
	if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return a.shim.Shutdown(ctx)
}

// open builds the parts in the order in which they need each other; shimOf finds
// podd-shim or has it started.
func open(ctx context.Context, cfg Config, shimOf func(*agent, context.Context) (*shim.Client, error)) (_ *agent, err error) {
	a := &agent{cfg: cfg, log: cfg.Log}
	defer func() {
		if err != nil {
			a.close()
		}
	}()
	for _, dir := range []string{cfg.DataDir, cfg.RunDir} {
		unlock, err := lock(dir)
		if err != nil {
			return nil, err
		}
		a.undo = append(a.undo, unlock)
	}
	objects := &objects{}
	plugins, err := openCredentials(cfg, objects)
	if err != nil {
		return nil, err
	}
	logs := cfg.Pods.Node.PodLogsDir
	for _, dir := range []string{logs, filepath.Join(filepath.Dir(logs), "containers")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make %s: %w", dir, err)
		}
	}
	// Volumes are within, and what containers put there: not for the node's users.
	volumesOf := filepath.Join(cfg.Pods.Node.RootDir, "pods")
	if err := errors.Join(os.MkdirAll(volumesOf, 0o750), os.Chmod(volumesOf, 0o750)); err != nil {
		return nil, fmt.Errorf("make %s: %w", volumesOf, err)
	}
	if a.shim, err = a.openShim(ctx, shimOf); err != nil {
		return nil, err
	}
	cfg.Images.Present = func(names []string) {
		if a.table != nil {
			a.table.ImagePresent(names)
		}
	}
	if a.images, err = images.Open(ctx, cfg.Images); err != nil {
		return nil, err
	}
	a.onClose("image store", a.images.Close)
	if a.network, err = netns.New(cfg.Network); err != nil {
		return nil, err
	}
	a.onClose("network", a.network.Close)
	cfg.Volumes.Objects, cfg.Volumes.Claims = objects, objects
	if cfg.Cluster != nil {
		cfg.Volumes.Tokens = objects
	}
	cfg.Volumes.Measured = a.limitStorage
	a.volumes = volumes.New(cfg.Volumes)
	cfg.CRI.Resolve = a.volumes.Resolve
	if a.cri, err = cri.New(cfg.CRI, a.shim, a.images, a.network); err != nil {
		return nil, err
	}
	a.onClose("runtime", a.cri.Close)
	if a.events, err = events.Open(cfg.Events); err != nil {
		return nil, err
	}
	a.onClose("events", a.events.Flush)
	tree, err := cgroups.New(cfg.Cgroups)
	if err != nil {
		return nil, err
	}
	a.tree = tree
	a.metrics = metrics.New(cfg.NodeName, cfg.Version, server.KubernetesVersion)
	cfg.Pods.Observer = a.metrics
	deps := pods.Deps{
		Runtime: a.metrics.Runtime(a.cri, a.pod), Volumes: a.volumes,
		Images:  pullsThatFill{a.metrics.Images(a.cri), func() { a.imageGC.Hurry() }},
		Objects: objects, Cgroups: tree, Events: a.events,
	}
	if cfg.Cluster != nil {
		if err := a.join(cfg.Cluster, tree, &deps, objects); err != nil {
			return nil, err
		}
	}
	if plugins != nil {
		deps.Credentials = plugins
	}
	a.table = pods.New(cfg.Pods, deps)
	a.imageGC = a.newImageGC()
	a.stats = stats.New(stats.Config{
		NodeName: cfg.NodeName, RootDir: cfg.Pods.Node.RootDir, PodLogsDir: logs,
		PodsGroup: path.Dir(tree.Path("any", v1.PodQOSGuaranteed)), Pods: livePods{a.table}, Runtime: a.cri, Volumes: a.volumes,
	})
	cfg.Manifests.Recorder = a.events
	var sink manifests.Sink = a.table
	if a.cluster != nil {
		sink = a.cluster.follow(cfg.NodeName, a.table)
	}
	a.source = manifests.New(cfg.Manifests, sink)
	objects.Source = a.source
	return a, nil
}

// openCredentials reads the configuration of the plugins; nil when there are none.
func openCredentials(cfg Config, accounts credentials.Accounts) (*credentials.Providers, error) {
	c := cfg.Credentials
	if c == nil {
		return nil, nil
	}
	if cfg.Cluster != nil {
		c.Accounts = accounts
	}
	return credentials.Open(*c)
}

// pod finds a pod for what is made before the table.
func (a *agent) pod(namespace, name string) (*v1.Pod, bool) { return a.table.Get(namespace, name) }

// waitEmpty waits until nothing of any pod is left but what is to outlive it.
func (a *agent) waitEmpty(ctx context.Context) error {
	// The watch ends with the wait: close waits for it.
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	changes := a.table.Watch(ctx, "")
	look := time.NewTicker(time.Second)
	defer look.Stop()
	for len(a.table.Pods()) > 0 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changes:
		case <-look.C: // nothing is told of a pod whose record was lost and whose source is silent
		}
	}
	list, err := a.cri.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	if len(list.Items) > 0 {
		return fmt.Errorf("%d pods of other CRI clients run on, and podd-shim for them: remove them with these clients (crictl rmp)", len(list.Items))
	}
	return nil
}

// openShim starts podd-shim, or finds the one that runs, and brings it to the
// version of our own: in place, its containers do not notice.
func (a *agent) openShim(ctx context.Context, shimOf func(*agent, context.Context) (*shim.Client, error)) (*shim.Client, error) {
	client, err := shimOf(a, ctx)
	if err != nil {
		return nil, err
	}
	ours, err := shim.BuildID(a.cfg.ShimProgram)
	if err != nil {
		return nil, err
	}
	info, err := client.Info(ctx)
	if err != nil {
		return nil, err
	}
	if info.BuildID == ours {
		return client, nil
	}
	if err := client.Upgrade(ctx, a.cfg.ShimProgram); err != nil {
		// The old one serves on; what it cannot do will say so.
		a.log.Warn("podd-shim keeps its old version", "program", a.cfg.ShimProgram, "error", err)
		return client, nil
	}
	a.log.Info("podd-shim upgraded in place", "pid", info.PID, "containers", info.Containers)
	return client, nil
}

// ensureShim finds the shim that runs or has one started. It waits for one that
// takes its time, since to end would only begin the wait anew.
func (a *agent) ensureShim(ctx context.Context) (*shim.Client, error) {
	if a.cfg.ShimUnit == "" {
		return shim.Ensure(ctx, a.cfg.RunDir, a.cfg.ShimProgram, a.shimSlow)
	}
	return shim.EnsureBy(ctx, a.cfg.RunDir, a.shimSlow, func(ctx context.Context) error { return systemd.Start(ctx, a.cfg.ShimUnit) })
}

// shimExtension is the time that the service manager is asked for, on top of its
// limit for a start, each time podd-shim is found not to answer yet.
const shimExtension = time.Minute

func (a *agent) shimSlow(waited time.Duration) {
	waited = waited.Round(time.Second)
	a.log.Warn("podd-shim does not answer yet, waiting on", "waited", waited)
	systemd.Status(a.log, fmt.Sprintf("waiting for podd-shim, which has not answered for %v", waited))
	systemd.Extend(a.log, shimExtension)
	if a.notice != nil {
		a.notice.post(a, fmt.Errorf("it has not answered for %v", waited))
	}
}

// refreshVolumes carries changes of ConfigMaps and Secrets into the volumes
// and environments of the pods that use them.
func (a *agent) refreshVolumes(ctx context.Context) error {
	for ref := range a.source.Subscribe(ctx) {
		a.table.ObjectChanged(ref.Namespace, ref.Name)
	}
	return nil
}

// onClose stacks the end of a part.
func (a *agent) onClose(what string, end func() error) {
	a.undo = append(a.undo, func() {
		if err := end(); err != nil {
			a.log.Warn("part not closed cleanly", "part", what, "error", err)
		}
	})
}

func (a *agent) close() {
	for i := len(a.undo) - 1; i >= 0; i-- {
		a.undo[i]()
	}
	a.undo = nil
}

// HostIPs are this machine's addresses for pods on the host's network, the one
// of the interface with the default route first (as upstream chooses the node's
// address); without any, the loopback address.
func HostIPs() []string {
	ip, err := utilnet.ChooseHostInterface()
	if err != nil {
		return []string{"127.0.0.1"}
	}
	return []string{ip.String()}
}

// podAPI is the table as the local API knows it: to start a stopped pod is to
// restart all of it.
type podAPI struct{ *pods.Table }

func (p podAPI) Start(ctx context.Context, namespace, name string) error {
	return p.Restart(ctx, namespace, name, "")
}
