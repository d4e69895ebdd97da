package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/podd-runtime/podd/kubelet/config"
	"github.com/podd-runtime/podd/kubelet/preflight"
)

// packagedConfig is where packages put the configuration: what `podd preflight`
// looks at when it is told nothing else.
const packagedConfig = "/etc/podd/podd.yaml"

// runPreflight is `podd preflight`; it returns the exit status.
func runPreflight(args []string) int {
	var cfg config.Config
	flags := pflag.NewFlagSet("podd preflight", pflag.ContinueOnError)
	ignore := flags.StringSlice("ignore", nil, "checks whose errors are warnings; all: those of every one")
	format := flags.StringP("output", "o", "", "json")
	own := flags.FlagUsages()
	flags.Usage = func() {
		fmt.Fprintf(os.Stderr, `Usage: podd preflight [--ignore CHECK,...] [-o json] [flags of podd run]

Looks at this host before podd runs here, as it is configured, and says for each
thing in the way what to do about it. Nothing is changed. Without --config that
of the package is taken, if it is there: %s.

The exit status is 0 when there are no errors, 1 when there are, and 2 for a
mistake in configuration or command line.

Checks: %s.

%s`, packagedConfig, strings.Join(preflight.Names(), ", "), own)
	}
	config.AddFlags(flags, &cfg)
	err := flags.Parse(args)
	if errors.Is(err, pflag.ErrHelp) {
		return 0
	}
	if err == nil && flags.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if _, missing := os.Stat(packagedConfig); err == nil && missing == nil && !flags.Changed("config") {
		err = flags.Set("config", packagedConfig)
	}
	if err == nil {
		err = cfg.Load()
	}
	var results []preflight.Result
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		results, err = preflight.Run(ctx, preflight.ThisHost(), preflightNode(&cfg), *ignore)
	}
	if err == nil {
		err = preflight.Print(os.Stdout, results, *format)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "podd preflight:", err)
		return 2
	}
	if preflight.Failed(results) {
		return 1
	}
	return 0
}

// preflightNode is what the configuration makes of this host.
func preflightNode(cfg *config.Config) *preflight.Node {
	k, p := &cfg.Kubelet, &cfg.Podd
	node := &preflight.Node{
		DataDir: p.DataDir, RunDir: p.RunDir, RootDir: p.RootDir, LogsDir: k.PodLogsDir,
		CNIConfDir: p.CNIConfDir, CNIBinDirs: p.CNIBinDirs, ResolvConf: *k.ResolverConfig,
		CgroupDriver: k.CgroupDriver, NodeName: p.NodeName,
		FailSwapOn: *k.FailSwapOn, Swap: k.MemorySwap.SwapBehavior == "LimitedSwap",
		Shutdown: k.ShutdownGracePeriod.Duration > 0 || len(k.ShutdownGracePeriodByPodPriority) > 0,
	}
	if _, port, err := net.SplitHostPort(p.StreamingAddress); err == nil {
		if n, err := strconv.Atoi(port); err == nil && n > 0 {
			node.Ports = append(node.Ports, n)
		}
	}
	return node
}
