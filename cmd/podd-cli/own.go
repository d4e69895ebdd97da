package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/cli-runtime/pkg/printers"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
	utilcomp "k8s.io/kubectl/pkg/util/completion"
	"sigs.k8s.io/yaml"

	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/server/api"
)

// podPath of one pod below podd's own API.
func (c *client) podPath(name, verb string) (string, error) {
	namespace, _, err := c.ToRawKubeConfigLoader().Namespace()
	if err != nil {
		return "", err
	}
	name = strings.TrimPrefix(strings.TrimPrefix(name, "pods/"), "pod/")
	return "/namespaces/" + url.PathEscape(namespace) + "/pods/" + url.PathEscape(name) + "/" + verb, nil
}

// eachPod asks for verb on every pod named, all at once, and says how it went,
// and for what it waits when that takes long.
func (c *client) eachPod(ctx context.Context, names []string, verb, did string, query url.Values, out io.Writer) error {
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	var mu sync.Mutex
	for i, name := range names {
		wg.Go(func() {
			path, err := c.podPath(name, verb)
			if err == nil {
				err = slowly(func() error { return c.do(ctx, "POST", path, query, nil, nil) }, func() { c.sayWhy(ctx, name) })
			}
			errs[i] = err
			if err == nil {
				mu.Lock()
				defer mu.Unlock()
				fmt.Fprintf(out, "pod/%s %s\n", strings.TrimPrefix(strings.TrimPrefix(name, "pods/"), "pod/"), did)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// maxSaid bounds the pods that are named while all are waited for.
const maxSaid = 10

// sayWhy says what keeps pods from being down; "": all pods.
func (c *client) sayWhy(ctx context.Context, name string) {
	query := url.Values{}
	if name != "" {
		namespace, _, err := c.ToRawKubeConfigLoader().Namespace()
		if err != nil {
			return
		}
		query.Set("namespace", namespace)
		query.Set("name", strings.TrimPrefix(strings.TrimPrefix(name, "pods/"), "pod/"))
	}
	var got api.Diagnoses
	if c.say == nil || c.do(ctx, "GET", "/why", query, nil, &got) != nil {
		return // whoever waits is told of the end
	}
	said := 0
	for i := range got.Items {
		for _, f := range got.Items[i].Findings {
			if f.Reason != "Stopping" && f.Reason != "Terminating" && f.Reason != "Replacing" {
				continue
			}
			if said++; said <= maxSaid {
				fmt.Fprintf(c.say, "pod/%s: %s\n", got.Items[i].Name, f.Message)
			}
		}
	}
	if said > maxSaid {
		fmt.Fprintf(c.say, "and %d more pods\n", said-maxSaid)
	}
	for _, f := range got.Node {
		fmt.Fprintln(c.say, f.Message)
	}
}

func newStop(c *client, f cmdutil.Factory, streams genericiooptions.IOStreams) *cobra.Command {
	var all bool
	grace := int64(-1)
	cmd := &cobra.Command{
		Use:   "stop [POD...|--all] [--grace-period=SECONDS]",
		Short: "Stop pods and keep them stopped",
		Long: `Stop pods gracefully and wait until they have ended. A stopped pod stays
stopped until "podd start", or until its manifest changes.`,
		Example: `  # Stop one pod
  podd stop web-node1

  # Stop every pod of this daemon, also when it is down, giving each five seconds
  podd stop --all --grace-period=5`,
		ValidArgsFunction: utilcomp.PodResourceNameCompletionFunc(f),
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return errors.New("name the pods to stop, or say --all")
			}
			if err := c.reach(cmd.Context()); err != nil {
				var e *silent
				if all && !errors.As(err, &e) { // nobody is there
					return c.drain(cmd.Context(), streams, grace, err)
				}
				return err
			}
			query := url.Values{}
			if grace >= 0 {
				query.Set("gracePeriodSeconds", strconv.FormatInt(grace, 10))
			}
			if all {
				err := slowly(func() error { return c.do(cmd.Context(), "POST", "/stop", query, nil, nil) }, func() { c.sayWhy(cmd.Context(), "") })
				if err != nil {
					return err
				}
				fmt.Fprintln(streams.Out, "all pods stopped")
				return nil
			}
			return c.eachPod(cmd.Context(), args, "stop", "stopped", query, streams.Out)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "Stop all pods of the daemon, in every namespace")
	cmd.Flags().Int64Var(&grace, "grace-period", -1, "Seconds to end in before being killed; negative: what each pod says")
	return cmd
}

// drain stops the pods of a daemon that is down, by running it once more for
// that alone, with grace as its flag says. down is what to say when it cannot.
func (c *client) drain(ctx context.Context, streams genericiooptions.IOStreams, grace int64, down error) error {
	last, err := api.LoadLast(c.runDir)
	if errors.Is(err, os.ErrNotExist) {
		return down // nothing ever ran here
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(streams.Out, "the daemon is down; stopping its pods without it")
	// It would go on without us, unseen.
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer stop()
	cmd := exec.CommandContext(ctx, last.Program, slices.Concat([]string{"run"}, last.Args, []string{"--drain", fmt.Sprintf("--drain-grace-period=%d", grace)})...)
	cmd.Dir = last.Dir
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, log.String())
	}
	fmt.Fprintln(streams.Out, "all pods stopped")
	return nil
}

func newStart(c *client, f cmdutil.Factory, streams genericiooptions.IOStreams) *cobra.Command {
	return &cobra.Command{
		Use:               "start POD...",
		Short:             "Start pods that were stopped",
		Example:           "  podd start web-node1",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: utilcomp.PodResourceNameCompletionFunc(f),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.eachPod(cmd.Context(), args, "start", "started", nil, streams.Out)
		},
	}
}

func newRestart(c *client, f cmdutil.Factory, streams genericiooptions.IOStreams) *cobra.Command {
	var container string
	cmd := &cobra.Command{
		Use:               "restart POD... [-c CONTAINER]",
		Short:             "Restart containers now, without waiting for back-off",
		Example:           "  podd restart web-node1 -c nginx",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: utilcomp.PodResourceNameCompletionFunc(f),
		RunE: func(cmd *cobra.Command, args []string) error {
			query := url.Values{}
			if container != "" {
				query.Set("container", container)
			}
			return c.eachPod(cmd.Context(), args, "restart", "restarted", query, streams.Out)
		},
	}
	cmd.Flags().StringVarP(&container, "container", "c", "", "Container to restart; default: all of the pod")
	return cmd
}

// output prints v as -o says; false: in the command's own form.
func output(w io.Writer, format string, v any) (bool, error) {
	switch format {
	case "":
		return false, nil
	case "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", "    ")
		return true, enc.Encode(v)
	case "yaml":
		b, err := yaml.Marshal(v)
		if err != nil {
			return true, err
		}
		_, err = w.Write(b)
		return true, err
	}
	return true, fmt.Errorf("-o: %q is neither json nor yaml", format)
}

// splitTag cuts a tag off a reference: "host:5000/a:b" is "host:5000/a" and "b".
func splitTag(ref string) (name, tag string) {
	if i := strings.LastIndex(ref, ":"); i > strings.LastIndex(ref, "/") {
		return ref[:i], ref[i+1:]
	}
	return ref, ""
}

// humanSize is crictl's form of a size: three digits, decimal units.
func humanSize(n int64) string {
	v, units := float64(n), []string{"B", "kB", "MB", "GB", "TB"}
	i := 0
	for ; v >= 1000 && i < len(units)-1; i++ {
		v /= 1000
	}
	return fmt.Sprintf("%.3g%s", v, units[i])
}

func shortID(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	return id[:min(len(id), 13)]
}

// shortBuild cuts a build id, of which the last part tells the content.
func shortBuild(id string) string {
	id = id[strings.LastIndex(id, "/")+1:]
	return id[:min(len(id), 12)]
}

func newImages(c *client, streams genericiooptions.IOStreams) *cobra.Command {
	var format string
	var quiet, digests, noTrunc, verify bool
	cmd := &cobra.Command{
		Use:     "images",
		Aliases: []string{"image", "img"},
		Short:   "List images, or verify them",
		Example: `  podd images --digests

  # Read everything that is stored, as after a disk has been mended
  podd images --verify`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if verify {
				return verifyImages(cmd.Context(), c, streams.Out)
			}
			var list api.Images
			if err := c.do(cmd.Context(), "GET", "/images", nil, nil, &list); err != nil {
				return err
			}
			if printed, err := output(streams.Out, format, &list); printed {
				return err
			}
			return printImages(streams.Out, list.Items, quiet, digests, noTrunc)
		},
	}
	cmd.Flags().StringVarP(&format, "output", "o", "", "json or yaml")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "Print ids only")
	cmd.Flags().BoolVar(&digests, "digests", false, "Print digests, too")
	cmd.Flags().BoolVar(&noTrunc, "no-trunc", false, "Print whole ids")
	cmd.Flags().BoolVar(&verify, "verify", false, "Compare all blobs with their digests and all layers with what was unpacked; fail if something is not as it was stored")
	return cmd
}

func verifyImages(ctx context.Context, c *client, out io.Writer) error {
	var found api.ImageProblems
	if err := c.do(ctx, "POST", "/images/verify", nil, nil, &found); err != nil {
		return err
	}
	damaged := map[string]bool{}
	for _, p := range found.Items {
		damaged[p.ID] = true
		name := shortID(p.ID)
		if len(p.Names) > 0 {
			name = p.Names[0]
		}
		fmt.Fprintf(out, "%s: %s\n", name, p.Message)
	}
	if len(damaged) > 0 {
		is, them := "is", "it"
		if len(damaged) > 1 {
			is, them = "are", "them"
		}
		return fmt.Errorf("%s %s damaged; remove (podd rmi --force) and pull %s again", count(len(damaged), "image"), is, them)
	}
	fmt.Fprintln(out, "all images are as they were stored")
	return nil
}

func printImages(out io.Writer, list []api.Image, quiet, digests, noTrunc bool) error {
	type row struct{ name, tag, digest, id, size string }
	var rows []row
	for _, i := range list {
		id := i.ID
		if !noTrunc {
			id = shortID(id)
		}
		if quiet {
			rows = append(rows, row{id: id})
			continue
		}
		digest, name := "<none>", "<none>"
		for _, d := range i.Digests {
			name, digest, _ = strings.Cut(d, "@")
		}
		if !noTrunc && digest != "<none>" {
			digest = shortID(digest)
		}
		if len(i.Tags) == 0 {
			rows = append(rows, row{name, "<none>", digest, id, humanSize(i.Size)})
		}
		for _, t := range i.Tags {
			name, tag := splitTag(t)
			rows = append(rows, row{name, tag, digest, id, humanSize(i.Size)})
		}
	}
	if quiet {
		for _, r := range rows {
			fmt.Fprintln(out, r.id)
		}
		return nil
	}
	sort.SliceStable(rows, func(a, b int) bool {
		return rows[a].name < rows[b].name || rows[a].name == rows[b].name && rows[a].tag < rows[b].tag
	})
	w := printers.GetNewTabWriter(out)
	if digests {
		fmt.Fprintln(w, "IMAGE\tTAG\tDIGEST\tIMAGE ID\tSIZE")
	} else {
		fmt.Fprintln(w, "IMAGE\tTAG\tIMAGE ID\tSIZE")
	}
	for _, r := range rows {
		if digests {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", r.name, r.tag, r.digest, r.id, r.size)
		} else {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", r.name, r.tag, r.id, r.size)
		}
	}
	return w.Flush()
}

func newPull(c *client, streams genericiooptions.IOStreams) *cobra.Command {
	var creds string
	var quiet bool
	cmd := &cobra.Command{
		Use:   "pull IMAGE",
		Short: "Pull an image",
		Example: `  podd pull nginx:1.27
  podd pull --creds user:password registry.example/app@sha256:...`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := api.Pull{Ref: args[0]}
			if creds != "" {
				var ok bool
				if req.Username, req.Password, ok = strings.Cut(creds, ":"); !ok {
					return errors.New("--creds: want user:password")
				}
			}
			body, err := json.Marshal(&req)
			if err != nil {
				return err
			}
			resp, err := c.open(cmd.Context(), "POST", "/images", nil, strings.NewReader(string(body)))
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			p := &progressPrinter{out: streams.ErrOut, quiet: quiet}
			if f, ok := streams.ErrOut.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
				p.bar = true
			}
			last, err := p.follow(resp.Body)
			if err != nil && !strings.HasPrefix(err.Error(), "pull ") { // the daemon's own words name it
				err = fmt.Errorf("pull %s: %w", args[0], err)
			}
			if err != nil {
				return err
			}
			fmt.Fprintln(streams.Out, last.Image.ID)
			return nil
		},
	}
	cmd.Flags().StringVar(&creds, "creds", "", "user:password for the registry")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "Print the image's id only")
	return cmd
}

// progressPrinter shows a pull: a bar that is redrawn, or a line for each stage.
type progressPrinter struct {
	out        io.Writer
	bar, quiet bool
	stage      string
}

// follow reads the daemon's answer to its end and returns its last line.
func (p *progressPrinter) follow(r io.Reader) (*api.Progress, error) {
	dec := json.NewDecoder(r)
	for {
		var line api.Progress
		if err := dec.Decode(&line); err != nil {
			p.end()
			if errors.Is(err, io.EOF) {
				return nil, errors.New("the daemon went away meanwhile")
			}
			return nil, err
		}
		switch {
		case line.Error != "":
			p.end()
			return nil, errors.New(line.Error)
		case line.Image != nil:
			p.end()
			return &line, nil
		}
		p.show(&line)
	}
}

func (p *progressPrinter) show(l *api.Progress) {
	switch {
	case p.quiet:
	case p.bar:
		const width = 30
		full := 0
		if l.Total > 0 {
			full = int(min(l.Bytes, l.Total) * width / l.Total)
		}
		fmt.Fprintf(p.out, "\r\x1b[K%-11s [%s%s] %s / %s, %d of %d layers", l.Stage, strings.Repeat("=", full), strings.Repeat(" ", width-full),
			humanSize(l.Bytes), humanSize(l.Total), l.LayersDone, l.Layers)
	case l.Stage != p.stage:
		fmt.Fprintf(p.out, "%s %s\n", l.Ref, l.Stage)
	}
	p.stage = l.Stage
}

func (p *progressPrinter) end() {
	if p.bar && !p.quiet && p.stage != "" {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
}

func newLoad(c *client, streams genericiooptions.IOStreams) *cobra.Command {
	var quiet bool
	var name string
	cmd := &cobra.Command{
		Use:   "load FILE...",
		Short: "Load images from OCI layout or docker-archive tars",
		Long: `Load images from OCI layout or docker-archive tars.
What can be loaded is; what cannot be is listed with its reason.`,
		Example: `  podd load nginx.tar
  docker save app:1 | podd load -
  podd load --name example/app:1 layout.tar`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			query := url.Values{}
			if name != "" {
				query.Set("name", name)
			}
			var errs []error
			for _, name := range args {
				list, err := loadFile(cmd.Context(), c, name, streams.In, query)
				if err != nil {
					errs = append(errs, fmt.Errorf("load %s: %s", name, strings.TrimPrefix(err.Error(), "load: ")))
				}
				for _, f := range list.Failed {
					errs = append(errs, fmt.Errorf("load %s: image %s: %s", name, strings.Join(f.Names, ", "), f.Message))
				}
				for _, i := range list.Items {
					if quiet || len(i.Tags) == 0 {
						fmt.Fprintln(streams.Out, i.ID)
						continue
					}
					for _, t := range i.Tags {
						fmt.Fprintln(streams.Out, "loaded", t)
					}
				}
				if cmd.Context().Err() != nil {
					break
				}
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "Print the images' ids only")
	cmd.Flags().StringVar(&name, "name", "", "What to call an image that has no name in its archive")
	return cmd
}

// loadFile sends one archive to the daemon; "-" is standard input.
func loadFile(ctx context.Context, c *client, name string, stdin io.Reader, query url.Values) (list api.Images, err error) {
	in := stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return list, err
		}
		defer f.Close()
		in = f
	}
	err = c.do(ctx, "PUT", "/images", query, in, &list)
	return list, err
}

func newRmi(c *client, streams genericiooptions.IOStreams) *cobra.Command {
	var force, all bool
	cmd := &cobra.Command{
		Use:   "rmi IMAGE...",
		Short: "Remove images",
		Long: `Remove a tag or digest of an image, or the whole image when its id is given.
Space is given back as soon as nothing refers to it.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return errors.New("name the images to remove, or say --all")
			}
			if all {
				var list api.Images
				if err := c.do(cmd.Context(), "GET", "/images", nil, nil, &list); err != nil {
					return err
				}
				for _, i := range list.Items {
					if !i.Pinned {
						args = append(args, i.ID)
					}
				}
			}
			var errs []error
			for _, ref := range args {
				query := url.Values{"ref": {ref}}
				if force {
					query.Set("force", "true")
				}
				if err := c.do(cmd.Context(), "DELETE", "/images", query, nil, nil); err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(streams.Out, "removed", ref)
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Remove even what pods use")
	cmd.Flags().BoolVar(&all, "all", false, "Remove all images that no pod uses")
	return cmd
}

func newStatus(c *client, streams genericiooptions.IOStreams) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the daemon, what it is doing and the manifests it could not use",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			var st api.Status
			var probs api.Problems
			if err := c.do(cmd.Context(), "GET", "/status", nil, nil, &st); err != nil {
				return err
			}
			if err := c.do(cmd.Context(), "GET", "/problems", nil, nil, &probs); err != nil {
				return err
			}
			if printed, err := output(streams.Out, format, struct {
				api.Status  `json:",inline"`
				Problematic []api.Problem `json:"manifestProblems"`
			}{st, probs.Items}); printed {
				return errors.Join(err, shimAway(&st))
			}
			w := printers.GetNewTabWriter(streams.Out)
			fmt.Fprintf(w, "Node:\t%s\n", st.NodeName)
			fmt.Fprintf(w, "Daemon:\t%s, pid %d, since %s\n", st.Daemon.Version, st.Daemon.PID, st.StartedAt.Local().Format("2006-01-02 15:04:05"))
			if st.Shim != nil {
				fmt.Fprintf(w, "Shim:\t%s, pid %d\n", shortBuild(st.Shim.Version), st.Shim.PID)
			} else {
				fmt.Fprintf(w, "Shim:\tdoes not answer: %s\n", st.ShimProblem)
			}
			printCluster(w, st.Cluster)
			fmt.Fprintf(w, "Pods:\t%s\n", podCounts(&st))
			printDisk(w, st.Disk)
			for _, p := range st.Pulls {
				fmt.Fprintf(w, "Pull:\t%s %s, %s of %s\n", p.Ref, p.Stage, humanSize(p.Bytes), humanSize(p.Total))
			}
			if err := w.Flush(); err != nil {
				return err
			}
			for _, p := range probs.Items {
				fmt.Fprintln(streams.Out, problemLine(p))
			}
			return shimAway(&st)
		},
	}
	cmd.Flags().StringVarP(&format, "output", "o", "", "json or yaml")
	return cmd
}

// shimAway is the error of a node whose podd-shim does not answer: scripts that
// ask for the status shall not take it for well.
func shimAway(st *api.Status) error {
	if st.ShimProblem == "" {
		return nil
	}
	return errors.New("podd-shim does not answer: nothing can be started, stopped or entered until it does")
}

// podCounts by phase, with what is wrong among them.
func podCounts(st *api.Status) string {
	var phases []string
	for phase, n := range st.Pods {
		text := fmt.Sprintf("%d %s", n, phase)
		var wrong []string
		for why, n := range st.Troubled[phase] {
			wrong = append(wrong, fmt.Sprintf("%d %s", n, why))
		}
		if sort.Strings(wrong); len(wrong) > 0 {
			text += " (" + strings.Join(wrong, ", ") + ")"
		}
		phases = append(phases, text)
	}
	if sort.Strings(phases); len(phases) == 0 {
		return "none"
	}
	return strings.Join(phases, ", ")
}

// printCluster in one line.
func printCluster(w io.Writer, c *api.Cluster) {
	if c == nil {
		return
	}
	how := map[string]string{"Connected": "connected", "Connecting": "not heard of yet", "Refused": "refuses this node", "Untrusted": "not trusted", "Away": "cannot be reached"}[c.State]
	if how == "" { // of a later daemon
		how = c.State
	}
	if c.Since != nil {
		how += " since " + c.Since.Local().Format("2006-01-02 15:04:05")
	}
	if c.Message != "" {
		how += ": " + c.Message
	}
	fmt.Fprintf(w, "Cluster:\t%s, %s\n", c.Server, how)
}

// printDisk that holds the images, and what fills it when it is too full.
func printDisk(w io.Writer, d *api.Disk) {
	if d == nil {
		return
	}
	fmt.Fprintf(w, "Images:\t%d %% of %s used in %s\n", d.UsedPercent, humanSize(d.Capacity), d.Path)
	if d.Short {
		stay := "none is left"
		if d.Kept != "" {
			stay = d.Kept
		}
		fmt.Fprintf(w, "\tfuller than imageGCHighThresholdPercent %d %%, and no image can be removed: %s\n", d.High, stay)
	}
	for _, h := range d.Holders {
		fmt.Fprintf(w, "\t  %s\t%s\n", humanSize(h.Bytes), h.What)
	}
}

// problemLine is file:line: document n: field: message (remedy).
func problemLine(p api.Problem) string {
	line := manifests.Problem(p).Error()
	if p.Warning {
		line = "warning: " + line
	}
	if p.Kept {
		line += "; the last good version stays in force"
	}
	return line
}

func newVersion(c *client, streams genericiooptions.IOStreams) *cobra.Command {
	var format string
	var clientOnly bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the versions of client, daemon and shim",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			out := struct {
				Client api.Version  `json:"client"`
				Daemon *api.Version `json:"daemon,omitempty"`
				Shim   *api.Version `json:"shim,omitempty"`
			}{Client: api.Version{Version: version, Go: runtime.Version()}}
			var unreachable error
			if !clientOnly {
				if unreachable = c.reach(cmd.Context()); unreachable == nil {
					var v api.Versions
					if err := c.do(cmd.Context(), "GET", "/version", nil, nil, &v); err != nil {
						return err
					}
					out.Daemon, out.Shim = &v.Daemon, v.Shim
				}
			}
			if printed, err := output(streams.Out, format, &out); printed {
				return err
			}
			fmt.Fprintf(streams.Out, "Client: %s (%s)\n", out.Client.Version, out.Client.Go)
			if out.Daemon != nil {
				fmt.Fprintf(streams.Out, "Daemon: %s (%s)\n", out.Daemon.Version, out.Daemon.Go)
				if out.Shim != nil {
					fmt.Fprintf(streams.Out, "Shim: build %s\n", shortBuild(out.Shim.Version))
				} else {
					fmt.Fprintln(streams.Out, "Shim: does not answer")
				}
			}
			return unreachable
		},
	}
	cmd.Flags().StringVarP(&format, "output", "o", "", "json or yaml")
	cmd.Flags().BoolVar(&clientOnly, "client", false, "Print the client's version only")
	return cmd
}

// count of things in words: "1 file", "2 files".
func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

func newCheck(streams genericiooptions.IOStreams) *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE...",
		Short: "Check manifests without a daemon",
		Long: `Check manifests as the daemon would read them and print every problem with its
file, line, document and field. Directories are checked file by file.

A warning is about a manifest that is taken all the same; warnings alone do not
make the command fail.`,
		Example: "  podd check /etc/kubernetes/manifests",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			files, found, err := manifests.Check(args...)
			if err != nil {
				return err
			}
			for _, p := range found {
				fmt.Fprintln(streams.Out, problemLine(api.Problem(p)))
			}
			wrong := manifests.NotInForce(found)
			warnings := ""
			if n := len(found) - wrong; n > 0 {
				warnings = fmt.Sprintf(", warnings: %d", n)
			}
			if wrong > 0 {
				return fmt.Errorf("%s in %s%s", count(wrong, "problem"), count(files, "file"), warnings)
			}
			if warnings == "" {
				warnings = ", no problems"
			}
			fmt.Fprintf(streams.Out, "%s%s\n", count(files, "file"), warnings)
			return nil
		},
	}
}
