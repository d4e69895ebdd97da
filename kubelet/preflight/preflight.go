// Package preflight looks at a host before podd runs there, as kubeadm's
// preflight does, and says for each thing in the way what to do about it. It
// changes nothing.
package preflight

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/sys/unix"
)

// Severity of a finding.
type Severity string

const (
	// OK: nothing to do.
	OK Severity = "ok"
	// Warning: podd runs, and something will not work or not well.
	Warning Severity = "warning"
	// Error: podd will not run, or would do harm.
	Error Severity = "error"
)

// Result of a check; one that finds several things has several.
type Result struct {
	Check    string   `json:"check"`
	Severity Severity `json:"severity"`
	Message  string   `json:"message"`
	Remedy   string   `json:"remedy,omitempty"`
}

// Node is what podd is configured to be.
type Node struct {
	DataDir, RunDir, RootDir, LogsDir string
	CNIConfDir                        string
	CNIBinDirs                        []string
	ResolvConf                        string
	CgroupDriver                      string
	NodeName                          string
	// Ports that it listens on, beside unix sockets.
	Ports []int
	// FailSwapOn, and swap for containers.
	FailSwapOn, Swap bool
	// Shutdown: the machine's shutdown is to wait for pods.
	Shutdown bool
}

// Host is what checks look at: files below Root, and what only the kernel and
// the resolver can tell.
type Host struct {
	// Root is "/" but for tests.
	Root string
	Kernel
}

// Kernel is what no file tells.
type Kernel struct {
	Release func() string
	UID     func() int
	Statfs  func(path string) (*unix.Statfs_t, error)
	// Syscalls probes one by name: nil when it is there.
	Syscall func(name string) error
	// Unsynchronized says that nothing keeps the clock; Year is what it shows.
	Unsynchronized func() bool
	Year           func() int
	Resolve        func(ctx context.Context, name string) error
}

// check is one look at the host.
type check struct {
	name string
	look func(*look)
}

// checks in the order in which a person would go about it.
var checks = []check{
	{"Privileges", privileges},
	{"Kernel", kernelVersion},
	{"KernelFeatures", kernelFeatures},
	{"Modules", modules},
	{"Cgroups", controllers},
	{"CgroupDriver", cgroupDriver},
	{"Sysctls", sysctls},
	{"Swap", swap},
	{"OtherAgents", otherAgents},
	{"Ports", ports},
	{"CNI", cni},
	{"Resolver", resolver},
	{"Hostname", hostname},
	{"Disk", disk},
	{"MountPropagation", propagation},
	{"Clock", clock},
	{"SecurityModules", securityModules},
	{"Shutdown", shutdown},
}

// look is a check on its way.
type look struct {
	ctx  context.Context
	host *Host
	node *Node
	name string
	out  []Result
}

func (l *look) found(s Severity, remedy, format string, args ...any) {
	l.out = append(l.out, Result{Check: l.name, Severity: s, Message: fmt.Sprintf(format, args...), Remedy: remedy})
}

// Names of all checks.
func Names() []string {
	var out []string
	for _, c := range checks {
		out = append(out, c.name)
	}
	return out
}

// Run makes all checks. Errors of those in ignore ("all": of every one) are
// warnings. Names that are no check's are an error.
func Run(ctx context.Context, host *Host, node *Node, ignore []string) ([]Result, error) {
	all := false
	for _, name := range ignore {
		all = all || strings.EqualFold(name, "all")
		if !all && !slices.ContainsFunc(checks, func(c check) bool { return strings.EqualFold(c.name, name) }) {
			return nil, fmt.Errorf("--ignore: %q is no check: want all, or some of %s", name, strings.Join(Names(), ", "))
		}
	}
	var out []Result
	for _, c := range checks {
		l := &look{ctx: ctx, host: host, node: node, name: c.name}
		c.look(l)
		ignored := all || slices.ContainsFunc(ignore, func(name string) bool { return strings.EqualFold(c.name, name) })
		for _, r := range l.out {
			if ignored && r.Severity == Error {
				r.Severity = Warning
			}
			out = append(out, r)
		}
	}
	return out, nil
}

// Failed says whether there is an error among the results.
func Failed(results []Result) bool {
	return slices.ContainsFunc(results, func(r Result) bool { return r.Severity == Error })
}

// Print results for people, or as JSON.
func Print(w io.Writer, results []Result, format string) error {
	switch format {
	case "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(struct {
			Results []Result `json:"results"`
			Failed  bool     `json:"failed"`
		}{results, Failed(results)})
	case "":
	default:
		return fmt.Errorf("-o: %q is not json", format)
	}
	table := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	count := map[Severity]int{}
	for _, r := range results {
		count[r.Severity]++
		mark := map[Severity]string{OK: "ok", Warning: "WARNING", Error: "ERROR"}[r.Severity]
		fmt.Fprintf(table, "%s\t%s\t%s\n", mark, r.Check, r.Message)
		if r.Remedy != "" && r.Severity != OK {
			fmt.Fprintf(table, "\t\t→ %s\n", r.Remedy)
		}
	}
	if err := table.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "%d errors, %d warnings\n", count[Error], count[Warning])
	return err
}

// path of a file of the host.
func (h *Host) path(name string) string { return filepath.Join(cmp.Or(h.Root, "/"), name) }
