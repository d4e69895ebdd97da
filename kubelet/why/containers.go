package why

import (
	"fmt"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/kubelet/server/api"
)

func when(t metav1.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t.Time
}

func capital(s string) string {
	if s == "" {
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:]
}

func statusOf(p *v1.Pod, name string) *v1.ContainerStatus {
	for _, list := range [][]v1.ContainerStatus{p.Status.ContainerStatuses, p.Status.InitContainerStatuses, p.Status.EphemeralContainerStatuses} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

// container explains one container that is not as it should be. blocked: the
// pod lacks something that all its containers need.
func (x *explainer) container(c *v1.Container, init, blocked bool) {
	s := statusOf(x.Pod, c.Name)
	if s == nil {
		return
	}
	subject := "container " + c.Name
	if init {
		subject = "init container " + c.Name
		if podutil.IsRestartableInitContainer(c) {
			subject = "sidecar " + c.Name
		}
	}
	switch {
	case s.State.Waiting != nil:
		x.waiting(c, subject, s, blocked)
	case s.State.Terminated != nil:
		t := s.State.Terminated
		switch {
		case x.Pod.Status.Phase == v1.PodSucceeded,
			t.ExitCode == 0 && t.Reason != "OOMKilled" && (init || x.Pod.Spec.RestartPolicy != v1.RestartPolicyAlways):
			x.oomKilled(c, subject, t.ContainerID, fmt.Sprintf("went on and exited with code %d", t.ExitCode))
		default:
			_, again := x.Waits.Next[c.Name]
			x.failed(c, subject, t, s, again)
		}
	case s.State.Running != nil:
		x.running(c, subject, s, init)
	}
}

// waiting explains a container that does not run yet, or not again yet.
func (x *explainer) waiting(c *v1.Container, subject string, s *v1.ContainerStatus, blocked bool) {
	w := s.State.Waiting
	last := s.LastTerminationState.Terminated
	f := api.Finding{Level: api.Waiting, Reason: w.Reason, Subject: subject, Container: c.Name}
	switch w.Reason {
	case "CrashLoopBackOff":
		if last == nil {
			last = &v1.ContainerStateTerminated{}
		}
		x.failed(c, subject, last, s, true)
		return
	case "ErrImagePull", "ImagePullBackOff", "ImageInspectError", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable", "SignatureValidationFailed":
		x.image(c, subject, w)
		return
	case "CreateContainerConfigError", "CreateContainerError", "RunContainerError", "PostStartHookError", "PreCreateHookError", "PreStartHookError":
		f.Level = api.Failed
		var cause string
		f.Reason, cause, f.Remedy = x.startError(c, w.Message)
		f.Message = sentence(fmt.Sprintf("%s cannot be started: %s", capital(subject), cause)) + x.next(&f, c.Name)
		x.add(f)
		return
	case "ContainerCreating", "PodInitializing", "":
		if blocked {
			return
		}
		if running := x.initializing(c); running != "" {
			if running != c.Name {
				return // that one is explained
			}
		}
		if p := x.pulling(c); p != "" {
			f.Reason = "Pulling"
			f.Message = fmt.Sprintf("%s waits for its image: %s.", capital(subject), p)
			x.add(f)
			return
		}
		for _, d := range x.Waits.Doing {
			switch d {
			case "volumes":
				f.Reason = "Volumes"
				f.Message = fmt.Sprintf("%s waits for the pod's volumes: they are being set up.", capital(subject))
				x.add(f)
				return
			case "sandbox":
				f.Reason = "Sandbox"
				f.Message = fmt.Sprintf("%s waits for the pod's sandbox: its namespaces and network are being made.", capital(subject))
				x.add(f)
				return
			}
		}
		f.Message = fmt.Sprintf("%s is being started.", capital(subject))
		x.add(f)
		return
	}
	f.Message = sentence(fmt.Sprintf("%s waits: %s: %s", capital(subject), w.Reason, plain(w.Message))) + x.next(&f, c.Name)
	x.add(f)
}

// initializing names the init container that c has to wait for; "": none.
func (x *explainer) initializing(c *v1.Container) string {
	for i := range x.Pod.Spec.InitContainers {
		ic := &x.Pod.Spec.InitContainers[i]
		if ic.Name == c.Name {
			return ""
		}
		s := statusOf(x.Pod, ic.Name)
		switch {
		case s == nil:
			return ic.Name
		case podutil.IsRestartableInitContainer(ic):
			if s.Started == nil || !*s.Started {
				return ic.Name
			}
		case s.State.Terminated == nil || s.State.Terminated.ExitCode != 0:
			return ic.Name
		}
	}
	return ""
}

// running explains a container that runs and is not ready, or holds others up.
func (x *explainer) running(c *v1.Container, subject string, s *v1.ContainerStatus, init bool) {
	f := api.Finding{Level: api.Waiting, Subject: subject, Container: c.Name, Since: when(s.State.Running.StartedAt)}
	started := s.Started != nil && *s.Started
	for _, d := range x.Waits.Doing {
		if d == "postStart "+c.Name {
			f.Reason = "PostStartHook"
			f.Message = fmt.Sprintf("%s runs, and its postStart hook is not done yet: it counts as started only then.", capital(subject))
			f.Remedy = "if the hook hangs, give its command a time limit; podd restart begins anew"
			x.add(f)
			return
		}
	}
	switch {
	case init && !podutil.IsRestartableInitContainer(c):
		f.Reason = "Initializing"
		f.Message = fmt.Sprintf("The pod waits for %s to finish: it runs since %s.", subject, strings.TrimSuffix(x.ago(s.State.Running.StartedAt.Time), " ago"))
		f.Evidence = x.log(c.Name)
		f.Remedy = fmt.Sprintf("see what it does: podd logs -f %s -c %s", x.Pod.Name, c.Name)
	case !started && c.StartupProbe != nil:
		f.Reason = "StartupProbe"
		f.Message = x.probe(subject, "startup", c.StartupProbe, c.Name, &f)
		f.Remedy = probeRemedy(c.StartupProbe, "startupProbe")
	case !s.Ready && c.ReadinessProbe != nil && !init:
		f.Reason = "ReadinessProbe"
		f.Message = x.probe(subject, "readiness", c.ReadinessProbe, c.Name, &f)
		f.Remedy = probeRemedy(c.ReadinessProbe, "readinessProbe")
	default:
		x.failing(c, subject, s)
		return
	}
	x.add(f)
}

// failing: it runs and is ready, and its liveness probe fails all the same; or
// it came back from a failure only just now.
func (x *explainer) failing(c *v1.Container, subject string, s *v1.ContainerStatus) {
	since := s.State.Running.StartedAt.Time
	if e := x.lastWith("Liveness probe", c.Name, "Unhealthy"); e != nil && e.LastTimestamp.After(since) && x.fresh(e, c.LivenessProbe) {
		f := api.Finding{Level: api.Waiting, Reason: "LivenessProbe", Subject: subject, Container: c.Name, Since: when(e.FirstTimestamp)}
		f.Message = x.probe(subject, "liveness", c.LivenessProbe, c.Name, &f)
		f.Remedy = probeRemedy(c.LivenessProbe, "livenessProbe")
		x.add(f)
		return
	}
	x.oomKilled(c, subject, s.ContainerID, "goes on")
	t := s.LastTerminationState.Terminated
	if s.RestartCount == 0 || t == nil || x.Now.Sub(since) > recent {
		return
	}
	f := api.Finding{Level: api.Notice, Reason: "Restarted", Subject: subject, Container: c.Name, Since: when(t.FinishedAt)}
	f.Message = sentence(fmt.Sprintf("%s runs again since %s; before, it %s", capital(subject), strings.TrimSuffix(x.ago(since), " ago"), x.exit(t)))
	f.Remedy = fmt.Sprintf("the log of the instance before: podd logs -p %s -c %s", x.Pod.Name, c.Name)
	x.add(f)
}

// recent is how long a restart is worth telling.
const recent = 10 * time.Minute

// fresh says that a probe's failure is the last thing heard of it.
func (x *explainer) fresh(e *v1.Event, p *v1.Probe) bool {
	if p == nil {
		return false
	}
	period := time.Duration(max(p.PeriodSeconds, 1)+max(p.TimeoutSeconds, 1)) * time.Second
	return x.Now.Sub(e.LastTimestamp.Time) <= 2*period
}

// probe says which one, what it answered and since when.
func (x *explainer) probe(subject, kind string, p *v1.Probe, container string, f *api.Finding) string {
	title := capital(kind) + " probe"
	e := x.lastWith(title, container, "Unhealthy")
	what := fmt.Sprintf("%s is not ready: its %s probe (%s)", capital(subject), kind, handler(p))
	switch kind {
	case "startup":
		what = fmt.Sprintf("%s runs and has not started up yet: its startup probe (%s)", capital(subject), handler(p))
	case "liveness":
		what = fmt.Sprintf("%s runs and its liveness probe (%s)", capital(subject), handler(p))
	}
	if e == nil || f.Since != nil && e.LastTimestamp.Time.Before(*f.Since) {
		return what + " has not succeeded yet."
	}
	_, answer, ok := strings.Cut(message(e), " failed: ")
	if !ok {
		_, answer, _ = strings.Cut(message(e), ": ")
	}
	text := fmt.Sprintf("%s fails since %s", what, strings.TrimSuffix(x.ago(e.FirstTimestamp.Time), " ago"))
	f.Since = when(e.FirstTimestamp)
	if e.Count > 1 {
		text += fmt.Sprintf(", %s so far", times(int(e.Count)))
	}
	switch kind {
	case "startup", "liveness":
		often := "a single failure"
		if p.FailureThreshold > 1 {
			often = fmt.Sprintf("%d failures in a row", p.FailureThreshold)
		}
		text += fmt.Sprintf("; after %s the container is restarted", often)
	}
	return sentence(text) + " It answered: " + sentence(plain(answer))
}

// probed is why a probe had podd end the container.
func (x *explainer) probed(c *v1.Container, title string) string {
	p := c.LivenessProbe
	if title == "Startup" {
		p = c.StartupProbe
	}
	text := fmt.Sprintf("podd ended it because its %s probe (%s) failed", strings.ToLower(title), handler(p))
	if p != nil && p.FailureThreshold > 1 {
		text += fmt.Sprintf(" %s in a row", times(int(p.FailureThreshold)))
	}
	if e := x.lastWith(title+" probe", c.Name, "Unhealthy"); e != nil {
		if _, answer, ok := strings.Cut(message(e), " failed: "); ok {
			text += "; it answered: " + plain(answer)
		}
	}
	return text
}

// handler of a probe in words.
func handler(p *v1.Probe) string {
	switch {
	case p == nil:
		return "no longer in the manifest"
	case p.Exec != nil:
		return "exec " + strings.Join(p.Exec.Command, " ")
	case p.HTTPGet != nil:
		return fmt.Sprintf("httpGet %s on port %s", p.HTTPGet.Path, p.HTTPGet.Port.String())
	case p.TCPSocket != nil:
		return "tcpSocket port " + p.TCPSocket.Port.String()
	case p.GRPC != nil:
		return fmt.Sprintf("grpc port %d", p.GRPC.Port)
	}
	return "none"
}

func probeRemedy(p *v1.Probe, field string) string {
	switch {
	case p == nil:
		return ""
	case p.Exec != nil:
		return "run the command by hand with podd exec and see what it says; if it only needs longer, raise timeoutSeconds or failureThreshold of " + field
	case p.HTTPGet != nil, p.TCPSocket != nil, p.GRPC != nil:
		return "see that the program listens on that port, on all addresses and not on 127.0.0.1 alone; if it only needs longer, raise initialDelaySeconds, timeoutSeconds or failureThreshold of " + field
	}
	return ""
}
