package probes

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	v1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/probe"
	httpprobe "k8s.io/kubernetes/pkg/probe/http"
	"k8s.io/kubernetes/third_party/forked/golang/expansion"
)

const (
	// retries of a probe that could not be made, as upstream has it.
	retries = 3
	// guard is what a runtime may take beyond a command's own timeout: 10 s to
	// begin it, 5 s to kill it, and as much again for a node under load.
	guard = 20 * time.Second
	// maxOutput of an exec probe that is kept, in bytes.
	maxOutput = 10 << 10
	// warning marks the output of a probe that passed with one.
	warning = "warning\x00"
)

// outcome of a probe, as its metrics name it.
func outcome(ok bool, err error) string {
	switch {
	case err != nil:
		return "unknown"
	case ok:
		return "successful"
	}
	return "failed"
}

// probers of the four kinds.
type probers struct {
	exec Execer
	net  network
}

func newProbers(e Execer) probers {
	return probers{exec: e, net: newNetwork(probe.ProbeDialer().DialContext)}
}

func (p *probers) run(ctx context.Context, e *entry) (ok bool, output string, err error) {
	for range retries {
		var r probe.Result
		r, output, err = p.once(ctx, e)
		if err != nil {
			if ctx.Err() != nil {
				return false, "", err
			}
			continue
		}
		switch r {
		case probe.Success:
			return true, "", nil
		case probe.Warning:
			return true, warning + output, nil
		}
		return false, output, nil
	}
	return false, "", err
}

func (p *probers) once(ctx context.Context, e *entry) (probe.Result, string, error) {
	timeout := time.Duration(max(e.spec.TimeoutSeconds, 1)) * time.Second
	c, h := e.t.Container, e.spec
	switch {
	case h.Exec != nil:
		return p.command(ctx, e.t.ID, expand(h.Exec.Command, c.Env), timeout)
	case h.HTTPGet != nil:
		req, err := Request(h.HTTPGet, c, e.t.PodIP, "probe")
		if err != nil {
			return probe.Unknown, "", err
		}
		return p.net.get(req, timeout)
	case h.TCPSocket != nil:
		port, err := probe.ResolveContainerPort(h.TCPSocket.Port, c)
		if err != nil {
			return probe.Unknown, "", err
		}
		host := h.TCPSocket.Host
		if host == "" {
			host = e.t.PodIP
		}
		return p.net.connect(net.JoinHostPort(host, strconv.Itoa(port)), timeout)
	case h.GRPC != nil:
		service := ""
		if h.GRPC.Service != nil {
			service = *h.GRPC.Service
		}
		return p.net.health(net.JoinHostPort(e.t.PodIP, strconv.Itoa(int(h.GRPC.Port))), service, timeout)
	}
	return probe.Unknown, "", fmt.Errorf("%s probe of container %s names no handler: %w", e.kind, c.Name, errdefs.ErrInvalidArgument)
}

// version of upstream whose probes and hooks these are, for servers that go by
// the user agent kube-probe/1.36.
const version = "1.36"

// Request of an httpGet action: purpose is "probe" or "lifecycle". ip is where
// to when the action names no host.
func Request(action *v1.HTTPGetAction, c *v1.Container, ip, purpose string) (*http.Request, error) {
	req, err := httpprobe.NewRequestForHTTPGetAction(action, c, ip, purpose)
	if err != nil {
		return nil, err
	}
	own := func(h v1.HTTPHeader) bool { return http.CanonicalHeaderKey(h.Name) == "User-Agent" }
	if !slices.ContainsFunc(action.HTTPHeaders, own) {
		// Upstream's own takes it from the version that it was built with.
		req.Header.Set("User-Agent", "kube-"+purpose+"/"+version)
	}
	return req, nil
}

// command of an exec probe: exit code 0 is success, any other failure, and so
// is a command that takes longer than its timeout.
func (p *probers) command(ctx context.Context, id string, cmd []string, timeout time.Duration) (probe.Result, string, error) {
	// The runtime enforces the timeout and kills; ours only guards against a
	// runtime that does not answer, which says nothing of the container.
	ctx, cancel := context.WithTimeout(ctx, timeout+guard)
	defer cancel()
	out, code, err := p.exec.Exec(ctx, id, cmd, timeout)
	if len(out) > maxOutput {
		out = out[:maxOutput]
	}
	switch {
	case err != nil && ctx.Err() != nil:
		return probe.Unknown, "", err
	case err != nil && timedOut(err):
		return probe.Failure, fmt.Sprintf("command timed out: %q timed out after %s", cmd, timeout), nil
	case err != nil:
		return probe.Unknown, "", err
	case code != 0:
		return probe.Failure, string(out), nil
	}
	return probe.Success, string(out), nil
}

func timedOut(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errdefs.IsDeadlineExceeded(err) || grpcstatus.Code(err) == codes.DeadlineExceeded
}

// expand replaces $(VAR) by the container's plainly set variables: a probe
// does not see the rest of its environment (upstream's ExpandContainerCommandOnlyStatic).
func expand(cmd []string, env []v1.EnvVar) []string {
	values := make(map[string]string, len(env))
	for i := range env {
		values[env[i].Name] = env[i].Value
	}
	mapping := expansion.MappingFuncFor(values)
	out := make([]string, len(cmd))
	for i := range cmd {
		out[i] = expansion.Expand(cmd[i], mapping)
	}
	return out
}
