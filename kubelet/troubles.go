package kubelet

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/kubelet/apiserver"
	"github.com/podd-runtime/podd/kubelet/server/api"
	"github.com/podd-runtime/podd/kubelet/why"
)

// shimInfo asks podd-shim about itself. The error says in plain words why it
// does not answer, and what to do.
func (a *agent) shimInfo(ctx context.Context) (*shim.Info, error) {
	info, err := a.shim.Info(ctx)
	if err == nil {
		return info, nil
	}
	pid := int(a.shimPID.Load())
	switch state := processState(pid, "podd-shim"); state {
	case "T", "t":
		return nil, fmt.Errorf("process %d is stopped; kill -CONT %d lets it go on, kill -KILL %d has podd start another: containers go on meanwhile: %w", pid, pid, pid, errdefs.ErrUnavailable)
	case "D":
		return nil, fmt.Errorf("process %d waits in the kernel for a disk or a server that does not answer: %w", pid, errdefs.ErrUnavailable)
	case "", "Z":
		return nil, fmt.Errorf("it has ended, and podd starts it again; podd's log tells if that fails: %w", errdefs.ErrUnavailable)
	}
	return nil, fmt.Errorf("process %d runs and does not answer in time: %w", pid, errdefs.ErrUnavailable)
}

// processState is the letter of proc_pid_stat(5); "": there is no such process
// of that name.
func processState(pid int, name string) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	open, end := strings.IndexByte(string(text), '('), strings.LastIndexByte(string(text), ')')
	if open < 0 || end < open || string(text[open+1:end]) != name || len(text) < end+3 {
		return ""
	}
	return string(text[end+2 : end+3])
}

// clusterState is the node's connection with its apiserver; nil: it is in no
// cluster.
func (a *agent) clusterState() *api.Cluster {
	if a.cluster == nil {
		return nil
	}
	s := a.cluster.contact.State()
	c := &api.Cluster{Server: a.cluster.server, State: string(s.Kind), Message: s.Message}
	if !s.Since.IsZero() {
		c.Since = &s.Since
	}
	return c
}

// shimAsked is how long podd-shim may take to answer somebody who asks why.
const shimAsked = time.Second

// troubles of the node itself, which no pod's state tells.
func (a *agent) troubles(ctx context.Context) (out []api.Finding) {
	ctx, cancel := context.WithTimeout(ctx, shimAsked)
	defer cancel()
	if _, err := a.shimInfo(ctx); err != nil {
		out = append(out, api.Finding{
			Level: api.Failed, Reason: "ShimAway", Subject: "podd-shim",
			Message: "podd-shim does not answer: " + strings.TrimSuffix(err.Error(), ": "+errdefs.ErrUnavailable.Error()) + ".",
			Remedy:  "until it does nothing can be started, stopped, probed by a command or entered",
		})
	}
	if c := a.clusterState(); c != nil {
		out = append(out, clusterTrouble(c)...)
	}
	return out
}

func clusterTrouble(c *api.Cluster) []api.Finding {
	f := api.Finding{Level: api.Failed, Reason: "Apiserver" + c.State, Subject: "cluster", Since: c.Since}
	since := ""
	if c.Since != nil {
		since = ", for " + why.Duration(time.Since(*c.Since))
	}
	switch apiserver.ContactKind(c.State) {
	case apiserver.Connected:
		return nil
	case apiserver.Connecting:
		f.Level = api.Waiting
		f.Message = fmt.Sprintf("The node has not heard of its apiserver %s yet.", c.Server)
		f.Remedy = "wait; podd's log tells what it tries"
	case apiserver.Refused:
		f.Message = fmt.Sprintf("The apiserver %s refuses this node%s: %s.", c.Server, since, c.Message)
		f.Remedy = "see that the node's certificate or token is one that the cluster accepts, and its name the node's; joining again needs --bootstrap-kubeconfig"
	case apiserver.Untrusted:
		f.Message = fmt.Sprintf("The apiserver %s is not trusted%s: %s.", c.Server, since, c.Message)
		f.Remedy = "compare certificate-authority in the kubeconfig (--kubeconfig) with the cluster's, the server's name with its certificate, and this machine's clock"
	default:
		f.Message = fmt.Sprintf("The apiserver %s cannot be reached%s: %s.", c.Server, since, c.Message)
		f.Remedy = "see that it runs and that this machine reaches it; pods go on meanwhile, changes of the cluster come when it is back"
	}
	return []api.Finding{f}
}
