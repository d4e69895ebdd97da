// Command bench measures podd next to its peer, upstream's kubelet with
// containerd and runc, on the same manifests in one run, and next to a bare
// clone+mount+pivot_root+exec in C as the floor.
//
// It runs as root in network and mount namespaces of its own (it enters them
// itself), so that nothing it makes is left on the machine or reaches another.
//
//	bench -bin DIR -peers DIR [-pods 100] [-rounds 20] [-only floor,start,burst,cri,exec,rest,probes,flood,lines,volumes,cluster]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

type options struct {
	bin, peers, work string
	pods, rounds     int
	idle             time.Duration
	probePeriod      time.Duration
	flood            int64
	only             string
	nodes            string
}

func (o options) runs(part string) bool {
	return o.only == "" || strings.Contains(","+o.only+",", ","+part+",")
}

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "directory with podd and podd-shim")
	flag.StringVar(&o.peers, "peers", ".cache/peers", "directory with kubelet, containerd, containerd-shim-runc-v2, runc")
	flag.StringVar(&o.work, "work", "", "scratch directory (default: a new one, removed at the end)")
	flag.IntVar(&o.pods, "pods", 100, "pods dropped at once")
	flag.IntVar(&o.rounds, "rounds", 20, "rounds of the single measurements")
	flag.DurationVar(&o.idle, "idle", 30*time.Second, "how long idle CPU is observed")
	flag.StringVar(&o.only, "only", "", "parts to run: floor,start,burst,cri,exec,rest,probes,flood,lines,volumes,cluster (default all)")
	flag.DurationVar(&o.probePeriod, "probe-period", time.Second, "period of the exec probes, in whole seconds")
	flag.Int64Var(&o.flood, "flood", 1024, "MiB that one container writes to its log")
	flag.StringVar(&o.nodes, "nodes", "podd,peer", "which to measure")
	flag.Parse()
	if os.Getenv("PODD_BENCH_INSIDE") == "" {
		os.Exit(enterNamespaces())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// enterNamespaces runs this program again in new network and mount namespaces.
func enterNamespaces() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "PODD_BENCH_INSIDE=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	ignored := make(chan os.Signal, 1)
	signal.Notify(ignored, os.Interrupt) // the child gets the terminal's too and cleans up
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return exit.ExitCode()
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

func run(ctx context.Context, o options) (err error) {
	// Mounts made here may travel among the instances below, never out.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make / private: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make / shared: %w", err)
	}
	// Upstream's kubelet wants an address on a default route; this one leads nowhere.
	const network = `ip link set lo up
		ip link add uplink type bridge && ip addr add 10.98.0.1/24 dev uplink && ip link set uplink up
		ip route add default via 10.98.0.2`
	if out, err := exec.Command("sh", "-ec", network).CombinedOutput(); err != nil {
		return fmt.Errorf("network of the benchmark: %w: %s", err, out)
	}
	// Orphans of what we start come to us: nobody else here reaps them.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	if o.work == "" {
		if o.work, err = os.MkdirTemp("", "podd-bench-"); err != nil {
			return err
		}
		defer os.RemoveAll(o.work)
	}
	if o.bin, err = filepath.Abs(o.bin); err != nil {
		return err
	}
	if o.peers, err = filepath.Abs(o.peers); err != nil {
		return err
	}
	images, err := serveImages(o.work)
	if err != nil {
		return err
	}
	defer images.close()
	go reapOrphans() // and not the compiler, which is waited for

	report := &report{}
	defer report.print(os.Stdout) // what there is, also when a part fails
	if o.runs("floor") {
		if err := measureFloor(ctx, o, report); err != nil {
			return fmt.Errorf("floor: %w", err)
		}
	}
	var nodes []node
	if strings.Contains(o.nodes, "podd") {
		nodes = append(nodes, newPodd(o, images))
	}
	if strings.Contains(o.nodes, "peer") {
		nodes = append(nodes, newPeer(o, images))
	}
	for _, n := range nodes {
		if o.only == "cluster" {
			break
		}
		if err := measureNode(ctx, o, n, report); err != nil {
			return fmt.Errorf("%s: %w", n.name(), err)
		}
	}
	if o.runs("cluster") {
		if err := measureCluster(ctx, o, nodes, report); err != nil {
			return fmt.Errorf("cluster: %w", err)
		}
	}
	return nil
}
