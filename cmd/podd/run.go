package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	occgroups "github.com/opencontainers/cgroups"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podd-runtime/podd/cgroups"
	"github.com/podd-runtime/podd/cri"
	"github.com/podd-runtime/podd/cri/images"
	"github.com/podd-runtime/podd/cri/streaming"
	"github.com/podd-runtime/podd/kubelet"
	"github.com/podd-runtime/podd/kubelet/apiserver"
	"github.com/podd-runtime/podd/kubelet/certs"
	"github.com/podd-runtime/podd/kubelet/config"
	"github.com/podd-runtime/podd/kubelet/credentials"
	"github.com/podd-runtime/podd/kubelet/events"
	"github.com/podd-runtime/podd/kubelet/imagegc"
	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/node"
	"github.com/podd-runtime/podd/kubelet/pods"
	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/shutdown"
	"github.com/podd-runtime/podd/netns"
	"github.com/podd-runtime/podd/systemd"
	"github.com/podd-runtime/podd/volumes"
)

// again is runDaemon's status when the program is to be executed once more.
const again = -1

// runDaemon is `podd run`; it returns the exit status, or again.
func runDaemon(args []string) int {
	var cfg config.Config
	flags := pflag.NewFlagSet("podd run", pflag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprintf(os.Stderr, "Usage: podd run [flags]\n\nRuns the daemon in the foreground.\n\n%s", flags.FlagUsages())
	}
	config.AddFlags(flags, &cfg)
	drain := flags.Bool("drain", false, "stop every pod, end podd-shim, and exit; for a node whose daemon is down")
	grace := flags.Int64("drain-grace-period", -1, "with --drain, seconds that each pod has to end; negative: what it says itself")
	err := flags.Parse(args)
	if errors.Is(err, pflag.ErrHelp) {
		return 0
	}
	if err == nil && flags.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if err == nil {
		err = cfg.Load()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "podd run:", err)
		return 2
	}
	log, verbosity := newLog(&cfg)
	for _, w := range cfg.Warnings {
		log.Warn("setting without effect", "name", w.Name, "value", w.Value, "from", w.From, "reason", w.Reason)
	}
	asked, stop := untilAsked(log)
	defer stop()
	ctx, cancel := context.WithCancelCause(asked)
	defer cancel(nil)
	agent := agentConfig(&cfg, log, verbosity)
	run := kubelet.Run
	passed := systemd.Activation()
	if *drain {
		run = func(ctx context.Context, cfg kubelet.Config) error {
			if *grace < 0 {
				grace = nil
			}
			return kubelet.Drain(ctx, cfg, grace)
		}
	} else {
		remember(cfg.Podd.RunDir, args, log)
		go heedReload(ctx, args, cancel, log)
		if agent.CRIListener, err = passed.Listener("cri"); err != nil {
			log.Error("podd ends", "error", err)
			return 1
		}
	}
	err = run(ctx, agent)
	if errors.Is(err, kubelet.ErrReload) {
		if asked.Err() != nil {
			return 0 // the end was asked for meanwhile
		}
		if err = passed.Keep(); err == nil {
			return again
		}
	}
	if err != nil {
		log.Error("podd ends", "error", err)
		return 1
	}
	return 0
}

// untilAsked is the context of a daemon that ends when SIGTERM or SIGINT asks it
// to. The log tells: who finds a node without its daemon looks there first.
func untilAsked(log *slog.Logger) (context.Context, func()) {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		select {
		case sig := <-signals:
			log.Info("podd was asked to end", "signal", unix.SignalName(sig.(syscall.Signal)))
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, func() { signal.Stop(signals); cancel() }
}

// heedReload ends this run for the next one, in the same process, at each
// SIGHUP; not when the next one would refuse its configuration.
func heedReload(ctx context.Context, args []string, end context.CancelCauseFunc, log *slog.Logger) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	for {
		select {
		case <-hangup:
		case <-ctx.Done():
			return
		}
		var next config.Config
		flags := pflag.NewFlagSet("podd run", pflag.ContinueOnError)
		config.AddFlags(flags, &next)
		err := flags.Parse(args)
		if err == nil {
			err = next.Load()
		}
		if err == nil {
			log.Info("podd begins anew")
			end(kubelet.ErrReload)
			return
		}
		log.Error("configuration is refused, podd goes on with the one it has", "error", err)
	}
}

// newLog returns the log and what changes its level, by klog's levels.
func newLog(cfg *config.Config) (*slog.Logger, func(v string) error) {
	level := &slog.LevelVar{}
	level.Set(cfg.LogLevel())
	options := &slog.HandlerOptions{Level: level}
	var handler slog.Handler = slog.NewTextHandler(os.Stderr, options)
	if cfg.Kubelet.Logging.Format == "json" {
		handler = slog.NewJSONHandler(os.Stderr, options)
	} else if systemd.Journaled() {
		if journal, err := systemd.NewJournal(cfg.Podd.NodeName, options.Level); err == nil {
			handler = journal
		}
	}
	log := slog.New(handler)
	slog.SetDefault(log) // for libraries
	libraries := forwardKlog(log, uint32(cfg.Kubelet.Logging.Verbosity))
	return log, func(v string) error {
		n, err := strconv.ParseUint(v, 10, 31)
		if err != nil {
			return fmt.Errorf("level %q is not a number", v)
		}
		level.Set(config.LogLevel(uint32(n)))
		libraries(uint32(n))
		return nil
	}
}

// agentConfig hands each part what concerns it.
func agentConfig(cfg *config.Config, log *slog.Logger, setVerbosity func(string) error) kubelet.Config {
	k, p := &cfg.Kubelet, &cfg.Podd
	part := func(name string) *slog.Logger { return log.With("part", name) }
	hostIPs := p.NodeIPs
	if len(hostIPs) == 0 {
		hostIPs = kubelet.HostIPs()
	}
	backoff := crashBackoff(cfg)
	capacity := nodeCapacity()
	out := kubelet.Config{
		DataDir: p.DataDir, RunDir: p.RunDir, CRISocket: p.CRISocket, ShimProgram: shimProgram(p.ShimPath), ShimUnit: p.ShimUnit,
		NodeName: p.NodeName, Version: version, Log: log,
		CRI: cri.Config{
			DataDir: p.DataDir, RunDir: p.RunDir,
			SystemdCgroup: k.CgroupDriver == "systemd",
			LogMaxSize:    cfg.LogMaxSize(), LogMaxFiles: int(*k.ContainerLogMaxFiles),
			CDIDirs: p.CDIDirs, StreamingAddr: p.StreamingAddress,
			StreamingCert: streaming.KeyPair{CertFile: p.StreamingTLSCertFile, KeyFile: p.StreamingTLSPrivateKeyFile},
			Version:       version, Log: part("cri"),
		},
		Images: images.Config{
			Dir:                filepath.Join(p.DataDir, "images"),
			RegistryConfigPath: p.RegistryConfigPath, CredentialsFile: p.CredentialsFile,
			Log: part("images"),
		},
		Network: netns.Config{
			ConfDir: p.CNIConfDir, BinDirs: p.CNIBinDirs,
			RunDir: filepath.Join(p.RunDir, "network"), DataDir: filepath.Join(p.DataDir, "network"),
			Instance: p.Instance, PodCIDR: k.PodCIDR, Log: part("network"),
		},
		Cgroups:   cgroups.Config{Root: k.CgroupRoot, Driver: k.CgroupDriver, Owner: p.DataDir, Log: part("cgroups")},
		Volumes:   volumes.Config{RootDir: p.RootDir, RecursiveReadOnly: true, Allocatable: func() v1.ResourceList { return capacity }, Node: func() *v1.Node { return thisNode(p.NodeName) }, Log: part("volumes")},
		Manifests: manifests.Config{Dir: k.StaticPodPath, StateDir: filepath.Join(p.DataDir, "manifests"), Bindings: filepath.Join(p.DataDir, "claims.json"), Ledger: filepath.Join(p.DataDir, "manifests.json"), NodeName: p.NodeName, Rescan: k.FileCheckFrequency.Duration, Log: part("manifests")},
		Events:    events.Config{Path: filepath.Join(p.DataDir, "events"), Component: "podd", Host: p.NodeName, Log: part("events"), Tell: systemd.Journaled()},
		Shutdown:  shutdown.Steps(k.ShutdownGracePeriod.Duration, k.ShutdownGracePeriodCriticalPods.Duration, k.ShutdownGracePeriodByPodPriority),
		API: kubelet.APIConfig{
			Kubelet: k, Said: cfg.Said, Flags: cfg.Given(), CertDir: filepath.Join(p.RootDir, "pki"), Addresses: hostIPs, SetVerbosity: setVerbosity,
		},
		ImageGC: imagegc.Policy{
			HighPercent: int(*k.ImageGCHighThresholdPercent), LowPercent: int(*k.ImageGCLowThresholdPercent),
			MinAge: k.ImageMinimumGCAge.Duration, MaxAge: k.ImageMaximumGCAge.Duration,
		},
		Pods: pods.Config{
			Node: spec.Node{
				Name: p.NodeName, RootDir: p.RootDir, PodLogsDir: k.PodLogsDir,
				SeccompDefault: *k.SeccompDefault, SeccompRoot: filepath.Join(p.RootDir, "seccomp"),
				DNS:     spec.DNS{ClusterDNS: k.ClusterDNS, ClusterDomain: k.ClusterDomain, ResolvConf: *k.ResolverConfig},
				HostIPs: hostIPs, Allocatable: capacity,
				Resources: cgroups.PodOptions{
					NoCPUQuota: !*k.CPUCFSQuota, QuotaPeriod: uint64(k.CPUCFSQuotaPeriod.Microseconds()),
					PIDs: *k.PodPidsLimit, MemoryCapacity: capacity.Memory().Value(), GroupOOM: groupOOM(k.SingleProcessOOMKill),
					Swap: swap(k.MemorySwap.SwapBehavior), MemoryQoS: memoryQoS(cfg, capacity.Memory().Value()),
				},
			},
			RecordDir: filepath.Join(p.DataDir, "pods"), Sources: []string{manifests.SourceName},
			AllowedUnsafeSysctls: k.AllowedUnsafeSysctls, UserIDsPerPod: cfg.UserIDsPerPod(), Backoff: backoff, ParallelPulls: cfg.ParallelPulls(), CallTimeout: k.RuntimeRequestTimeout.Duration, Build: version,
			Log: part("pods"),
		},
	}
	if p.ImageCredentialProviderConfig != "" {
		out.Credentials = &credentials.Config{File: p.ImageCredentialProviderConfig, BinDir: p.ImageCredentialProviderBinDir, Log: part("credentials")}
	}
	if p.Kubeconfig != "" || p.BootstrapKubeconfig != "" {
		inCluster(cfg, &out, hostIPs)
	}
	return out
}

// inCluster makes a node of a cluster of what would be one by itself.
func inCluster(cfg *config.Config, out *kubelet.Config, hostIPs []string) {
	k, p := &cfg.Kubelet, &cfg.Podd
	capacity := node.Capacity(p.RootDir, int64(k.MaxPods))
	low := cfg.Thresholds(capacity)
	allocatable := node.Allocatable(capacity, cfg.Reserved(), low)
	memoryLow, diskLow := low[v1.ResourceMemory], low[v1.ResourceEphemeralStorage]
	out.Manifests.NoObjects = true
	out.Pods.Sources = append(out.Pods.Sources, apiserver.SourceName)
	out.Pods.Node.Allocatable = allocatable
	out.Volumes.Allocatable = func() v1.ResourceList { return allocatable }
	out.Events.Component = "kubelet" // the name that users of a cluster look for
	out.Cluster = &kubelet.Cluster{
		Certs: certs.Config{
			Kubeconfig: p.Kubeconfig, Bootstrap: p.BootstrapKubeconfig, Dir: p.CertDir, NodeName: p.NodeName,
			Rotate: k.RotateCertificates, Log: out.Log.With("part", "certs"),
		},
		ServingByCluster: k.ServerTLSBootstrap,
		QPS:              float32(*k.KubeAPIQPS), Burst: int(k.KubeAPIBurst),
		EventQPS: float32(*k.EventRecordQPS), EventBurst: int(k.EventBurst),
		Node: node.Config{
			Name: p.NodeName, Register: *k.RegisterNode, Labels: p.NodeLabels, Taints: cfg.Taints(),
			StatusEvery: k.NodeStatusUpdateFrequency.Duration, ReportEvery: k.NodeStatusReportFrequency.Duration,
			LeaseDuration: time.Duration(k.NodeLeaseDurationSeconds) * time.Second,
		},
		Machine: node.Machine{
			Name: p.NodeName, IPs: hostIPs, Port: int(k.Port), Capacity: capacity, Allocatable: allocatable,
			MemoryLow: memoryLow.Value(), DiskLow: diskLow.Value(), RootDir: p.RootDir,
			MaxImages: int(*k.NodeStatusMaxImages), Version: version,
		},
		Enforce: slices.Contains(k.EnforceNodeAllocatable, "pods"),
	}
}

// thisNode is the node with the labels that every node has.
func thisNode(name string) *v1.Node {
	return &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{
		v1.LabelHostname: name, v1.LabelOSStable: runtime.GOOS, v1.LabelArchStable: runtime.GOARCH,
	}}}
}

// shimProgram finds podd-shim: a bare name is looked for beside this program,
// in its private directory, and in $PATH.
func shimProgram(name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	if self, err := os.Executable(); err == nil {
		for _, dir := range []string{".", "../lib/podd"} {
			if path := filepath.Join(filepath.Dir(self), dir, name); unix.Access(path, unix.X_OK) == nil {
				return path
			}
		}
	}
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	return name // starting it says what is missing
}

// crashBackoff of containers: upstream's 10 s to 300 s, or as configured
// (KEP-4603).
func crashBackoff(cfg *config.Config) pods.BackoffPolicy {
	gates := cfg.Kubelet.FeatureGates
	p := pods.BackoffPolicy{Initial: 10 * time.Second, Max: 300 * time.Second}
	if gates["ReduceDefaultCrashLoopBackOffDecay"] {
		p = pods.BackoffPolicy{Initial: time.Second, Max: time.Minute}
	}
	if on, set := gates["KubeletCrashLoopBackOffMax"]; set && !on {
		return p
	}
	if m := cfg.Kubelet.CrashLoopBackOff.MaxContainerRestartPeriod; m != nil {
		p.Max = m.Duration
		p.Initial = min(p.Initial, p.Max)
	}
	return p
}

// swap of this machine, by memorySwap.swapBehavior.
func swap(behavior string) cgroups.Swap {
	s := cgroups.Swap{Unified: occgroups.IsCgroup2UnifiedMode(), Limited: behavior == "LimitedSwap"}
	s.Controlled = cgroups.SwapControlled()
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		s.Capacity = int64(info.Totalswap) * int64(info.Unit)
	}
	return s
}

// memoryQoS is nil unless the feature is on and the host has cgroup v2.
func memoryQoS(cfg *config.Config, allocatable int64) *cgroups.MemoryQoS {
	k := &cfg.Kubelet
	if !k.FeatureGates["MemoryQoS"] || !occgroups.IsCgroup2UnifiedMode() {
		return nil
	}
	q := &cgroups.MemoryQoS{Factor: 0.9, Allocatable: allocatable, Reserve: k.MemoryReservationPolicy == "TieredReservation"}
	if k.MemoryThrottlingFactor != nil {
		q.Factor = *k.MemoryThrottlingFactor
	}
	return q
}

// groupOOM is upstream's default for singleProcessOOMKill turned round: only
// cgroup v2 can kill a container as a whole, and there that is the default.
func groupOOM(singleProcess *bool) bool {
	return occgroups.IsCgroup2UnifiedMode() && (singleProcess == nil || !*singleProcess)
}

// nodeCapacity is what this machine has; nothing is reserved yet, so all of it
// is allocatable.
func nodeCapacity() v1.ResourceList {
	list := v1.ResourceList{v1.ResourceCPU: *resource.NewQuantity(int64(runtime.NumCPU()), resource.DecimalSI)}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		list[v1.ResourceMemory] = *resource.NewQuantity(int64(info.Totalram)*int64(info.Unit), resource.BinarySI)
	}
	return list
}
