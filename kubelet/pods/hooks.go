package pods

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/probe"
	httpprobe "k8s.io/kubernetes/pkg/probe/http"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/probes"
)

// hook is one run of a lifecycle handler.
type hook struct {
	exec    execer
	pod     *v1.Pod
	c       *v1.Container
	id      string
	ip      string
	handler *v1.LifecycleHandler
	warn    func(reason, message string)
}

func (h *hook) run(ctx context.Context) error {
	switch a := h.handler; {
	case a.Exec != nil:
		out, code, err := h.exec.Exec(ctx, h.id, a.Exec.Command, timeLeft(ctx))
		if err == nil && code != 0 {
			err = &hookExitError{a.Exec.Command, code}
		}
		if err != nil {
			return fmt.Errorf("exec lifecycle hook (%v) for Container %q in Pod %q failed - error: %w, message: %q", a.Exec.Command, h.c.Name, spec.Desc(h.pod), err, out)
		}
	case a.HTTPGet != nil:
		if err := h.get(ctx); err != nil {
			return fmt.Errorf("HTTP lifecycle hook (%s) for Container %q in Pod %q failed - error: %w", a.HTTPGet.Path, h.c.Name, spec.Desc(h.pod), err)
		}
	case a.TCPSocket != nil:
		return h.connect(ctx)
	case a.Sleep != nil:
		select {
		case <-time.After(time.Duration(a.Sleep.Seconds) * time.Second):
		case <-ctx.Done():
			return fmt.Errorf("sleep lifecycle hook (%d) for Container %q in Pod %q failed - error: container terminated before sleep hook finished", a.Sleep.Seconds, h.c.Name, spec.Desc(h.pod))
		}
	default:
		return fmt.Errorf("lifecycle hook of container %q names no handler: %w", h.c.Name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// hookExitError is the end of an exec hook whose command failed.
type hookExitError struct {
	command []string
	code    int32
}

func (e *hookExitError) Error() string {
	return fmt.Sprintf("command '%s' exited with %d", strings.Join(e.command, " "), e.code)
}

// hookExit is what an event may say of why a hook failed: the exit code of its
// command. The rest stays out, it may hold secrets of the command or the server.
func hookExit(err error) string {
	var e *hookExitError
	if errors.As(err, &e) {
		return fmt.Sprintf(": its command exited with %d", e.code)
	}
	return ""
}

// timeLeft for an exec; 0: none set, the runtime waits.
func timeLeft(ctx context.Context) time.Duration {
	if d, ok := ctx.Deadline(); ok {
		return max(time.Until(d), time.Second)
	}
	return 0
}

// get asks the handler's URL; TLS is not verified, as with probes, and a
// server that talks plain HTTP is asked again so.
func (h *hook) get(ctx context.Context) error {
	host := h.handler.HTTPGet.Host
	if host == "" {
		if host = h.ip; host == "" {
			return fmt.Errorf("pod has no address: %w", errdefs.ErrUnavailable)
		}
	}
	req, err := probes.Request(h.handler.HTTPGet, h.c, host, "lifecycle")
	if err != nil {
		return err
	}
	client := http.Client{
		Transport: &http.Transport{
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true, Proxy: http.ProxyURL(nil),
		},
		CheckRedirect: httpprobe.RedirectChecker(false),
	}
	resp, err := client.Do(req.WithContext(ctx))
	if err != nil && strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") {
		plain := req.Clone(ctx)
		plain.URL.Scheme = "http"
		plain.Header.Del("Authorization")
		if resp, err = client.Do(plain); err == nil {
			h.warn("LifecycleHTTPFallback", fmt.Sprintf("request to HTTPS lifecycle hook %s got HTTP response, retry with HTTP succeeded", req.URL.Host))
		}
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 10<<10))
	return nil
}

func (h *hook) connect(ctx context.Context) error {
	port, err := probe.ResolveContainerPort(h.handler.TCPSocket.Port, h.c)
	if err != nil {
		return err
	}
	host := h.handler.TCPSocket.Host
	if host == "" {
		host = h.ip
	}
	left := timeLeft(ctx)
	if left == 0 {
		left = 30 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, left)
	defer cancel()
	conn, err := probe.ProbeDialer().DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		return fmt.Errorf("TCP lifecycle hook for Container %q in Pod %q failed - error: %w", h.c.Name, spec.Desc(h.pod), err)
	}
	return conn.Close()
}

// unheard says that a hook was not run as far as anybody can tell: podd-shim did
// not begin its command or could not say how it ended, or the node had no way
// to ask its server. That is no failure of the hook.
func unheard(err error) bool { return errdefs.IsUnavailable(err) || probes.Unasked(err) }

func (w *worker) hook(pod *v1.Pod, c *v1.Container, id, ip string, handler *v1.LifecycleHandler) *hook {
	return &hook{
		exec: execer{w.t.deps.Runtime}, pod: pod, c: c, id: id, ip: ip, handler: handler,
		warn: func(reason, message string) {
			w.t.deps.Events.Eventf(ref(pod), v1.EventTypeWarning, reason, "%s", message)
		},
	}
}

func firstIP(node *spec.Node, pod *v1.Pod, s *Sandbox) string {
	if pod.Spec.HostNetwork && len(node.HostIPs) > 0 {
		return node.HostIPs[0]
	}
	if s == nil || len(s.IPs) == 0 {
		return ""
	}
	return s.IPs[0]
}

// runPostStart runs the hook of a container that has started. It may take as
// long as it likes; when it fails the container is ended. One that could not be
// run is tried again.
func (w *worker) runPostStart(l *life, a Action) {
	pod, c := l.d.Pod, spec.Container(l.d.Pod, a.Container)
	h := w.hook(pod, c, a.ID, firstIP(&w.t.cfg.Node, pod, l.anySandbox()), c.Lifecycle.PostStart)
	w.async(l, a, 0, func(ctx context.Context) (func(), error) {
		err := h.run(ctx)
		if err != nil && ctx.Err() != nil {
			return nil, nil // cancelled: whoever did it ends the container
		}
		if err == nil {
			return func() {
				if i := l.container(a.ID); i != nil {
					i.Starting = false
				}
			}, nil
		}
		if unheard(err) {
			w.log.Warn("postStart hook could not be run, trying again", "container", c.Name, "error", err)
			return nil, err
		}
		w.log.Info("postStart hook failed", "container", c.Name, "error", err)
		w.t.deps.Events.Eventf(spec.Ref(pod, c.Name), v1.EventTypeWarning, "FailedPostStartHook", "PostStartHook failed%s", hookExit(err))
		return func() {
			l.failures[c.Name] = v1.ContainerStateWaiting{Reason: "PostStartHookError", Message: err.Error()}
			if i := l.container(a.ID); i != nil && i.Alive() {
				w.order(l, Action{ID: a.ID, Container: c.Name, Grace: podGrace(pod), Message: "FailedPostStartHook"})
			}
		}, nil
	})
}

// runPreStop runs the hook, for which what is left of the grace period is waited
// at most. However it ends, the signals come next, and with the container's end
// that of a hook that still runs. Only one that could not be run is tried again,
// while there is time.
func (w *worker) runPreStop(l *life, a Action) {
	pod, c := l.d.Pod, spec.Container(l.d.Pod, a.Container)
	h := w.hook(pod, c, a.ID, firstIP(&w.t.cfg.Node, pod, l.anySandbox()), c.Lifecycle.PreStop)
	w.async(l, a, a.Grace+w.t.policy.MinGrace+w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		err := h.run(ctx)
		if err != nil && ctx.Err() == nil && unheard(err) {
			w.log.Warn("preStop hook could not be run, trying again", "container", c.Name, "error", err)
			return func() {
				if k, ordered := l.o.Kills[a.ID]; ordered {
					k.HookDone = false
					l.o.Kills[a.ID] = k
				}
			}, err
		}
		if err != nil {
			w.log.Info("preStop hook failed", "container", c.Name, "error", err)
			w.t.deps.Events.Eventf(spec.Ref(pod, c.Name), v1.EventTypeWarning, "FailedPreStopHook", "PreStopHook failed%s", hookExit(err))
		}
		return nil, nil
	})
	// Also when it is given up: there is no second try of one that was begun.
	k := l.o.Kills[a.ID]
	k.HookDone = true
	l.o.Kills[a.ID] = k
}

func (l *life) anySandbox() *Sandbox {
	if len(l.o.Sandboxes) == 0 {
		return nil
	}
	return &l.o.Sandboxes[0]
}
