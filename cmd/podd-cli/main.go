// Command podd-cli is what `podd get`, `podd logs` and every other verb but
// `podd run` execute: kubectl's own commands on the socket of this machine's
// daemon, and a few of podd's own. It is a program of its own because kubectl
// would cost the daemon its memory.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/kubectl/pkg/cmd/apiresources"
	"k8s.io/kubectl/pkg/cmd/attach"
	"k8s.io/kubectl/pkg/cmd/completion"
	"k8s.io/kubectl/pkg/cmd/cp"
	"k8s.io/kubectl/pkg/cmd/events"
	"k8s.io/kubectl/pkg/cmd/exec"
	"k8s.io/kubectl/pkg/cmd/get"
	"k8s.io/kubectl/pkg/cmd/logs"
	"k8s.io/kubectl/pkg/cmd/portforward"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/kubectl/pkg/cmd/wait"
	utilcomp "k8s.io/kubectl/pkg/util/completion"
)

// version is stamped by the build.
var version = "unknown"

func main() {
	// Signals end this process, as they end kubectl: nothing of it needs more
	// than that its connections close, but for what catches them itself (a raw
	// terminal, which kubectl's packages give back, and stop without a daemon).
	streams := genericiooptions.IOStreams{In: os.Stdin, Out: os.Stdout, ErrOut: os.Stderr}
	if err := newRoot(streams).ExecuteContext(context.Background()); err != nil {
		// kubectl's commands end the process with their own messages; this is
		// for the rest, in the same words.
		cmdutil.CheckErr(err)
	}
}

const (
	groupPods   = "pods"
	groupImages = "images"
	groupDaemon = "daemon"
)

// needsDaemon marks commands that talk to the daemon.
const needsDaemon = "podd/needs-daemon"

func newRoot(streams genericiooptions.IOStreams) *cobra.Command {
	// The daemon answers these protocols over SPDY at once; asking for
	// WebSocket's newer forms first would cost a refused request each.
	os.Setenv("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "false")
	os.Setenv("KUBECTL_PORT_FORWARD_WEBSOCKETS", "false")

	c := &client{say: streams.ErrOut}
	root := &cobra.Command{
		Use:   "podd",
		Short: "podd runs pods on this machine",
		Long: `podd runs pods on this machine, without a cluster.

"podd run" is the daemon. The other commands talk to it over its socket, which
they find by --run-dir or $PODD_RUN_DIR.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, args []string) error {
			for p := cmd; p != nil; p = p.Parent() {
				switch p.Name() {
				case "exec", "attach", "cp", "port-forward":
					c.streams = true
				}
				if p.Annotations[needsDaemon] != "" {
					return c.reach(cmd.Context())
				}
			}
			return nil
		},
	}
	root.SetIn(streams.In)
	root.SetOut(streams.Out)
	root.SetErr(streams.ErrOut)
	c.addFlags(root.PersistentFlags())
	root.AddGroup(&cobra.Group{ID: groupPods, Title: "Pods:"}, &cobra.Group{ID: groupImages, Title: "Images:"}, &cobra.Group{ID: groupDaemon, Title: "Daemon:"})

	f := cmdutil.NewFactory(cmdutil.NewMatchVersionFlags(c))
	utilcomp.SetFactoryForCompletion(f)
	add := func(group string, daemon bool, cmds ...*cobra.Command) {
		for _, cmd := range cmds {
			cmd.GroupID = group
			if daemon {
				if cmd.Annotations == nil {
					cmd.Annotations = map[string]string{}
				}
				cmd.Annotations[needsDaemon] = "true"
			}
			root.AddCommand(cmd)
		}
	}
	add(groupPods, true,
		get.NewCmdGet("podd", f, streams),
		newDescribe(c, f, streams),
		logs.NewCmdLogs(f, streams),
		exec.NewCmdExec(f, streams),
		attach.NewCmdAttach(f, streams),
		portforward.NewCmdPortForward(f, streams),
		cp.NewCmdCp(f, streams),
		events.NewCmdEvents(f, streams),
		apiresources.NewCmdAPIResources(f, streams),
		wait.NewCmdWait(f, streams),
		newStart(c, f, streams), newRestart(c, f, streams),
	)
	add(groupPods, false, newStop(c, f, streams), newWhy(c, f, streams))
	add(groupImages, true, newImages(c, streams), newPull(c, streams), newLoad(c, streams), newRmi(c, streams))
	add(groupDaemon, false, newDaemon("run [flags]", "Run the daemon"), newDaemon("preflight [flags]", "Look at this host before podd runs here"), newCheck(streams))
	add(groupDaemon, true, newStatus(c, streams))
	add(groupDaemon, false, newVersion(c, streams))
	comp := completion.NewCmdCompletion(streams.Out, "")
	add("", false, comp, newMan())

	rename(root)
	shorten(root)
	return root
}

// rename puts this program's name where upstream's texts have theirs.
func rename(cmd *cobra.Command) {
	for _, text := range []*string{&cmd.Short, &cmd.Long, &cmd.Example, &cmd.Use} {
		*text = strings.ReplaceAll(*text, "kubectl", "podd")
	}
	for _, sub := range cmd.Commands() {
		rename(sub)
	}
}

// shorten replaces upstream's examples where they show what this node has not.
func shorten(root *cobra.Command) {
	for name, text := range map[string]string{
		"get": `  # Pods of namespace default, then of all namespaces
  podd get pods
  podd get pods -A -o wide

  # One pod as YAML
  podd get pod web-node1 -o yaml

  # Follow changes
  podd get pods -w

  # ConfigMaps, Secrets, events and the node
  podd get configmaps,secrets,events,nodes`,
		"describe": `  podd describe pod web-node1

  # Every pod with a label
  podd describe pods -l app=web`,
		"logs": `  # Follow the log, from its last ten lines
  podd logs -f --tail=10 web-node1

  # The container before the last restart
  podd logs -p -c nginx web-node1

  # The last hour, with times
  podd logs --since=1h --timestamps web-node1`,
		"exec": `  # A shell
  podd exec -it web-node1 -- sh

  # One command in a container of several
  podd exec web-node1 -c nginx -- nginx -T`,
		"attach": `  podd attach -it shell-node1`,
		"port-forward": `  # Port 8080 here leads to port 80 of the pod
  podd port-forward web-node1 8080:80`,
		"wait": `  podd wait --for=condition=Ready pod/web-node1 --timeout=60s`,
	} {
		if cmd, _, err := root.Find([]string{name}); err == nil {
			cmd.Example = text
		}
	}
}

// newDaemon is a command that the daemon's program has, for those who call
// podd-cli itself.
func newDaemon(use, short string) *cobra.Command {
	return &cobra.Command{
		Use:                use,
		Short:              short,
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			self, err := os.Executable()
			if err != nil {
				return err
			}
			tried := []string{filepath.Join(filepath.Dir(self), "podd"), "/usr/bin/podd", "/usr/local/bin/podd"}
			for _, p := range tried {
				if _, err := os.Stat(p); err == nil {
					return fmt.Errorf("%s: %w", p, syscall.Exec(p, append([]string{"podd", cmd.Name()}, args...), os.Environ()))
				}
			}
			return fmt.Errorf("the daemon's program is in none of %s", strings.Join(tried, ", "))
		},
	}
}
