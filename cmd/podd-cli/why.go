package main

import (
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/kubectl/pkg/cmd/describe"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
	utilcomp "k8s.io/kubectl/pkg/util/completion"

	"github.com/podd-runtime/podd/kubelet/server/api"
)

func newWhy(c *client, f cmdutil.Factory, streams genericiooptions.IOStreams) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "why [POD...]",
		Short: "Say in plain words what pods wait for or why they failed, and what to do",
		Long: `Say in plain words what a pod waits for or why it failed, from its status, its
events, its logs and what the kernel knows, and what to do about it.

Without a name: every pod that is not fine, and every manifest that is not in
force; of all namespaces unless -n names one.`,
		Example: `  # One pod
  podd why web-node1

  # All that is wrong on this node
  podd why

  # For programs
  podd why -o json | jq '.items[].findings[].reason'`,
		ValidArgsFunction: utilcomp.PodResourceNameCompletionFunc(f),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.reach(cmd.Context()); err != nil {
				return c.downWhy(err)
			}
			var all api.Diagnoses
			all.Items = []api.Diagnosis{}
			if len(args) == 0 {
				args = []string{""}
			}
			var errs []error
			for _, name := range args {
				query := url.Values{}
				if name != "" {
					namespace, _, err := c.ToRawKubeConfigLoader().Namespace()
					if err != nil {
						return err
					}
					query.Set("namespace", namespace)
					query.Set("name", strings.TrimPrefix(strings.TrimPrefix(name, "pods/"), "pod/"))
				} else if c.namespace != "" {
					query.Set("namespace", c.namespace)
				}
				var got api.Diagnoses
				if err := c.do(cmd.Context(), "GET", "/why", query, nil, &got); err != nil {
					errs = append(errs, err)
					continue
				}
				all.Items, all.Problems, all.Node = append(all.Items, got.Items...), append(all.Problems, got.Problems...), got.Node
			}
			if printed, err := output(streams.Out, format, &all); printed {
				return errors.Join(append(errs, err)...)
			}
			printWhy(streams.Out, &all)
			if len(errs) == 0 && len(all.Items)+len(all.Problems)+len(all.Node) == 0 {
				fmt.Fprintln(streams.Out, "Everything is fine.")
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().StringVarP(&format, "output", "o", "", "json or yaml")
	return cmd
}

func printWhy(out io.Writer, all *api.Diagnoses) {
	first := true
	print := func(d *api.Diagnosis, title string) {
		if !first {
			fmt.Fprintln(out)
		}
		first = false
		fmt.Fprintf(out, "%s\n%s", title, d.Text("  "))
	}
	if len(all.Node) > 0 {
		print(&api.Diagnosis{Findings: all.Node}, "node")
	}
	for i := range all.Items {
		d := &all.Items[i]
		title := fmt.Sprintf("pod %s/%s", d.Namespace, d.Name)
		if d.Phase != "" {
			title += " (" + d.Phase + ")"
		}
		print(d, title)
	}
	for i := range all.Problems {
		print(&all.Problems[i], "manifest "+all.Problems[i].Name)
	}
}

// downWhy says what a daemon that is down means, and how it was started last.
func (c *client) downWhy(down error) error {
	last, err := api.LoadLast(c.runDir)
	if err != nil || errors.Is(down, os.ErrPermission) {
		return down
	}
	return fmt.Errorf("%w\nIt was started last in %s with: %s run %s\nUntil it runs again nobody restarts containers, probes them, or reads manifests", down, last.Dir, last.Program, strings.Join(last.Args, " "))
}

// newDescribe is kubectl's, with what podd why says below a pod's description.
func newDescribe(c *client, f cmdutil.Factory, streams genericiooptions.IOStreams) *cobra.Command {
	cmd := describe.NewCmdDescribe("podd", f, streams)
	inner := cmd.Run
	cmd.Run = func(cmd *cobra.Command, args []string) {
		inner(cmd, args)
		names := podNames(args)
		if len(names) == 0 {
			return
		}
		namespace, _, err := c.ToRawKubeConfigLoader().Namespace()
		if err != nil {
			return
		}
		for _, name := range names {
			var got api.Diagnoses
			if err := c.do(cmd.Context(), "GET", "/why", url.Values{"namespace": {namespace}, "name": {name}}, nil, &got); err != nil {
				continue // it was described: that must do
			}
			for i := range got.Items {
				d := &got.Items[i]
				title := "Why:"
				if len(names) > 1 {
					title = fmt.Sprintf("Why (%s):", d.Name)
				}
				fmt.Fprintf(streams.Out, "%s\n%s", title, d.Text("  "))
			}
		}
	}
	return cmd
}

// podNames of the arguments of describe: "pod NAME...", "pod/NAME...".
func podNames(args []string) (names []string) {
	isPod := func(s string) bool { return s == "pod" || s == "pods" || s == "po" }
	if len(args) > 0 && isPod(args[0]) {
		return args[1:]
	}
	for _, a := range args {
		if kind, name, ok := strings.Cut(a, "/"); ok && isPod(kind) {
			names = append(names, name)
		}
	}
	return names
}
