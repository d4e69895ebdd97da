package pods

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
)

// annManaged on a sandbox says that it is ours, and of which source: what
// others run through the CRI's socket is none of our business.
const annManaged = "io.podd.source"

// notFound in either of the ways a runtime may say it.
func notFound(err error) bool {
	return errdefs.IsNotFound(err) || grpcstatus.Code(err) == codes.NotFound
}

// message of an error without gRPC's frame around it.
func message(err error) string {
	if s, ok := grpcstatus.FromError(err); ok && s != nil {
		return s.Message()
	}
	return err.Error()
}

func (w *worker) sandboxConfig(l *life, pod *v1.Pod, attempt uint32, warn func(reason, message string)) (*runtimeapi.PodSandboxConfig, error) {
	cfg, err := w.t.cfg.Node.Sandbox(pod, attempt, w.t.deps.Cgroups.Parent(pod.UID, qos.GetPodQOS(pod)), warn)
	if err != nil {
		return nil, err
	}
	if cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions, err = w.t.userns.get(pod); err != nil {
		return nil, err
	}
	a := make(map[string]string, len(cfg.Annotations)+1)
	for k, v := range cfg.Annotations {
		a[k] = v
	}
	a[annManaged] = l.source
	cfg.Annotations = a
	return cfg, nil
}

// runSandbox starts the pod's sandbox, the next attempt if there was one.
func (w *worker) runSandbox(l *life) {
	pod := l.d.Pod
	var attempt uint32
	if len(l.o.Sandboxes) > 0 {
		attempt = l.o.Sandboxes[0].Attempt + 1
		w.event(l, "", v1.EventTypeNormal, "SandboxChanged", "Pod sandbox changed, it will be killed and re-created.")
	}
	w.async(l, Action{Kind: RunSandbox}, w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		s, err := w.callRunSandbox(ctx, l, pod, attempt)
		if err != nil {
			if ctx.Err() == nil {
				w.t.deps.Events.Eventf(ref(pod), v1.EventTypeWarning, "FailedCreatePodSandBox", "Failed to create pod sandbox: %s", message(err))
			}
			return func() { l.o.Stale = true }, err
		}
		return func() {
			l.o.Sandboxes = slices.Insert(l.o.Sandboxes, 0, *s)
			l.o.SandboxChanged = false
			l.sandboxPod = pod
			w.t.own(s.ID, w)
		}, nil
	})
}

func (w *worker) callRunSandbox(ctx context.Context, l *life, pod *v1.Pod, attempt uint32) (*Sandbox, error) {
	cfg, err := w.sandboxConfig(l, pod, attempt, func(reason, message string) {
		w.t.deps.Events.Eventf(ref(pod), v1.EventTypeWarning, reason, "%s", message)
	})
	if err != nil {
		return nil, err
	}
	handler, err := w.t.handler(pod)
	if err != nil {
		return nil, err
	}
	leave, err := w.t.limits.starts.enter(ctx, critical(pod))
	if err != nil {
		return nil, err
	}
	defer leave()
	if err := os.MkdirAll(cfg.LogDirectory, 0o755); err != nil {
		return nil, fmt.Errorf("make the log directory of pod %s: %w", pod.Name, err)
	}
	resp, err := w.t.deps.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handler})
	if err != nil {
		return nil, err
	}
	st, err := w.t.deps.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: resp.PodSandboxId})
	if err != nil {
		return nil, fmt.Errorf("status of sandbox %s: %w", resp.PodSandboxId, err)
	}
	return toSandbox(st.Status), nil
}

// handler of the pod's RuntimeClass; "" is the runtime's default.
func (t *Table) handler(pod *v1.Pod) (string, error) {
	name := pod.Spec.RuntimeClassName
	if name == nil || *name == "" {
		return "", nil
	}
	if t.deps.RuntimeClass == nil {
		return "", fmt.Errorf("pod %s: runtimeClassName %q: RuntimeClass %q not found: %w", spec.Desc(pod), *name, *name, errdefs.ErrNotFound)
	}
	handler, err := t.deps.RuntimeClass(*name)
	if err != nil {
		return "", fmt.Errorf("pod %s: runtimeClassName %q: %w", spec.Desc(pod), *name, err)
	}
	return handler, nil
}

func toSandbox(st *runtimeapi.PodSandboxStatus) *Sandbox {
	s := &Sandbox{
		ID: st.Id, Attempt: st.GetMetadata().GetAttempt(), Created: time.Unix(0, st.CreatedAt),
		Ready: st.State == runtimeapi.PodSandboxState_SANDBOX_READY,
	}
	if n := st.Network; n != nil && n.Ip != "" {
		s.IPs = append(s.IPs, n.Ip)
		for _, a := range n.AdditionalIps {
			s.IPs = append(s.IPs, a.Ip)
		}
	}
	return s
}

func (l *life) sandbox(id string) *Sandbox {
	for i := range l.o.Sandboxes {
		if l.o.Sandboxes[i].ID == id {
			return &l.o.Sandboxes[i]
		}
	}
	return nil
}

// stopSandbox ends what runs in the sandbox and gives its network back.
func (w *worker) stopSandbox(l *life, a Action) {
	pod := l.d.Pod
	w.async(l, a, w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		_, err := w.t.deps.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: a.ID})
		if err != nil && !notFound(err) {
			w.t.deps.Events.Eventf(ref(pod), v1.EventTypeWarning, "FailedKillPod", "error killing pod: %s", message(err))
			return nil, err
		}
		return func() {
			if s := l.sandbox(a.ID); s != nil {
				s.Stopped, s.Ready = true, false
			}
			// Containers that a reboot or a crash left behind are exited now.
			l.o.Stale = l.o.Stale || l.anyAlive(a.ID)
		}, nil
	})
}

func (l *life) anyAlive(sandbox string) bool {
	return slices.ContainsFunc(l.o.Containers, func(c status.Container) bool { return c.Sandbox == sandbox && c.Alive() })
}

// removeSandbox forgets a stopped sandbox.
func (w *worker) removeSandbox(l *life, a Action) {
	w.async(l, a, w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		_, err := w.t.deps.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: a.ID})
		if err != nil && !notFound(err) {
			w.log.Warn("sandbox is not removed", "sandbox", a.ID, "error", err)
			return nil, err
		}
		return func() {
			l.o.Sandboxes = slices.DeleteFunc(l.o.Sandboxes, func(s Sandbox) bool { return s.ID == a.ID })
			w.t.disown(a.ID)
		}, nil
	})
}
