package pods

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/kubelet/status"
)

// startError is why a container could not be started: upstream's reason.
type startError struct {
	reason string
	err    error
}

func (e *startError) Error() string { return message(e.err) }
func (e *startError) Unwrap() error { return e.err }

// launch is one start of a container.
type launch struct {
	w       *worker
	l       *life // only its immutable parts; everything else by post
	pod     *v1.Pod
	c       *v1.Container
	sandbox Sandbox
	attempt int32
	image   string
	target  string // container id whose processes an ephemeral one sees
	op      *op    // for the worker's goroutine
}

// startContainer creates and starts the next instance of a container.
func (w *worker) startContainer(l *life, a Action) {
	c := spec.Container(l.d.Pod, a.Container)
	s := &launch{w: w, l: l, pod: l.d.Pod, c: c, sandbox: *l.o.current(), image: l.o.Images[c.Name].Ref}
	s.attempt = w.nextAttempt(l, c.Name)
	s.target = targetOf(l, c.Name)
	switch n, at := l.o.newest(c.Name), l.o.Ended[c.Name]; {
	case n != nil && n.State == status.Exited && l.o.Forced[c.Name] != n.ID:
		l.o.Backoffs[c.Name] = w.t.cfg.Backoff.Next(l.o.Backoffs[c.Name], ended(n), time.Now())
	case n == nil && !at.IsZero():
		l.o.Backoffs[c.Name] = w.t.cfg.Backoff.Next(l.o.Backoffs[c.Name], at, time.Now())
	}
	delete(l.o.Ended, c.Name)
	w.async(l, a, 3*w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		err := s.run(ctx)
		if err == nil {
			return func() {
				delete(l.failures, c.Name)
				delete(l.failedStarts, c.Name)
				delete(l.o.Forced, c.Name)
				if c.ImagePullPolicy == v1.PullAlways {
					delete(l.o.Images, c.Name)
				}
			}, nil
		}
		var e *startError
		if !errors.As(err, &e) || ctx.Err() != nil {
			return func() { l.o.Stale = true }, err
		}
		w.t.deps.Events.Eventf(spec.Ref(s.pod, c.Name), v1.EventTypeWarning, "Failed", "Error: %s", e.Error())
		return func() {
			l.failures[c.Name] = v1.ContainerStateWaiting{Reason: e.reason, Message: e.Error()}
			l.failedStarts[c.Name] = s.attempt
			delete(l.o.Images, c.Name) // it may have been removed meanwhile
			l.o.Stale = true
		}, err
	})
	s.op = l.ops[a.key()]
}

// nextAttempt counts on from the instances and records; without either, from
// the logs that are there: they must not be written over.
func (w *worker) nextAttempt(l *life, name string) int32 {
	if n, known := l.attempts[name]; known {
		return n
	}
	n := attemptByLogs(filepath.Join(w.t.cfg.Node.LogDir(l.d.Pod.Namespace, l.d.Pod.Name, l.d.Pod.UID), name))
	l.attempts[name] = n
	return n
}

var logName = regexp.MustCompile(`^(\d+)\.log(\..*)?$`)

func attemptByLogs(dir string) int32 {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	next := int32(0)
	for _, e := range entries {
		if m := logName.FindStringSubmatch(e.Name()); m != nil {
			if n, err := strconv.ParseInt(m[1], 10, 31); err == nil {
				next = max(next, int32(n)+1)
			}
		}
	}
	return next
}

func targetOf(l *life, name string) string {
	for i := range l.d.Pod.Spec.EphemeralContainers {
		e := &l.d.Pod.Spec.EphemeralContainers[i]
		if e.Name == name && e.TargetContainerName != "" {
			if t := l.o.newest(e.TargetContainerName); t != nil {
				return t.ID
			}
		}
	}
	return ""
}

func (s *launch) run(ctx context.Context) error {
	leave, err := s.w.t.limits.starts.enter(ctx, critical(s.pod))
	if err != nil {
		return err
	}
	defer leave()
	id, err := s.create(ctx)
	if err != nil {
		return err
	}
	return s.start(ctx, id)
}

// create the container. Each call to the runtime is bounded.
func (s *launch) create(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, s.w.t.cfg.CallTimeout)
	defer cancel()
	cfg, cleanup, err := s.config(ctx)
	// The mounts of subPaths are the container's from here on: only when there
	// will be none are they taken away at once.
	created := false
	defer func() {
		if cleanup != nil && !created {
			cleanup()
		}
	}()
	if err != nil {
		return "", &startError{"CreateContainerConfigError", err}
	}
	sandbox, err := s.w.sandboxConfig(s.l, s.pod, s.sandbox.Attempt, func(string, string) {})
	if err != nil {
		return "", &startError{"CreateContainerConfigError", err}
	}
	resp, err := s.w.t.deps.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: s.sandbox.ID, Config: cfg, SandboxConfig: sandbox,
	})
	if err != nil {
		return "", &startError{"CreateContainerError", err}
	}
	created = true
	s.event(v1.EventTypeNormal, "Created", "Container created")
	return resp.ContainerId, nil
}

func (s *launch) event(t, reason, format string, args ...any) {
	s.w.t.deps.Events.Eventf(spec.Ref(s.pod, s.c.Name), t, reason, format, args...)
}

func (s *launch) config(ctx context.Context) (*runtimeapi.ContainerConfig, func(), error) {
	node, deps := &s.w.t.cfg.Node, &s.w.t.deps
	user, err := s.imageUser(ctx)
	if err != nil {
		return nil, nil, err
	}
	src := spec.EnvSources{Objects: deps.Objects, PodIPs: s.sandbox.IPs, File: s.envFile}
	if deps.Services != nil {
		src.Services = func(string, bool) (map[string]string, error) { return deps.Services(ctx, s.pod) }
	}
	env, err := node.Environment(s.pod, s.c, src)
	if err != nil {
		return nil, nil, err
	}
	mounts, cleanup, err := deps.Volumes.Mounts(ctx, s.pod, s.c, env.Get)
	if err != nil {
		return nil, cleanup, err
	}
	own, err := s.ownMounts()
	if err != nil {
		return nil, cleanup, err
	}
	logs := filepath.Join(node.LogDir(s.pod.Namespace, s.pod.Name, s.pod.UID), s.c.Name)
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return nil, cleanup, fmt.Errorf("create container log directory for container %s failed: %w", s.c.Name, err)
	}
	cfg, err := node.Container(s.pod, s.c, &spec.ContainerParts{
		Attempt: s.attempt, ImageRef: s.image, User: user, Env: env, Mounts: append(mounts, own...), TargetID: s.target,
	})
	if err != nil {
		return nil, cleanup, err
	}
	ids, err := s.w.t.userns.get(s.pod)
	if ids != nil {
		// Volumes show their files as the pod's users', whoever's they are.
		for _, m := range cfg.Mounts {
			m.UidMappings, m.GidMappings = ids.Uids, ids.Gids
		}
		cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = ids
	}
	return cfg, cleanup, err
}

func (s *launch) imageUser(ctx context.Context) (spec.ImageUser, error) {
	i, err := s.w.inspectImage(ctx, s.image)
	if err != nil {
		return spec.ImageUser{}, fmt.Errorf("inspect image %q: %w", s.c.Image, err)
	}
	switch {
	case i == nil:
		return spec.ImageUser{}, fmt.Errorf("image %q has been removed while container %s was being created", s.c.Image, s.c.Name)
	case i.Uid != nil:
		return spec.ImageUser{UID: &i.Uid.Value}, nil
	case i.Username != "":
		return spec.ImageUser{Name: i.Username}, nil
	}
	return spec.ImageUser{UID: new(int64)}, nil // root
}

func (s *launch) start(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, s.w.t.cfg.CallTimeout)
	defer cancel()
	s.w.t.own(id, s.w)
	l, c := s.l, s.c
	s.w.post(func() { l.starts[id], l.applied[c.Name] = s.op, c })
	if _, err := s.w.t.deps.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		return &startError{"RunContainerError", err}
	}
	s.event(v1.EventTypeNormal, "Started", "Container started")
	s.w.linkLog(s.pod, s.c.Name, s.attempt, id)
	resp, err := s.w.t.deps.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		return fmt.Errorf("status of container %s: %w", id, err)
	}
	inst := s.w.instance(resp.Status, s.sandbox.ID)
	hook := hasPostStart(s.c)
	s.w.post(func() {
		l.epoch++
		l.applied[c.Name] = c
		l.o.Actual[c.Name] = c.Resources
		l.outdated(c)
		delete(l.starts, id)
		if have := l.container(id); have != nil && have.State == status.Exited {
			return // its exit was seen before its start
		}
		inst.Starting = hook && inst.State == status.Running
		inst.Started = inst.State == status.Running && c.StartupProbe == nil
		inst.Ready = inst.Started && c.ReadinessProbe == nil
		l.putNew(inst)
	})
	return nil
}

// outdated: the pod may have changed while an instance was made of c.
func (l *life) outdated(c *v1.Container) {
	delete(l.o.Changed, c.Name)
	now := spec.Container(l.d.Pod, c.Name)
	if now != nil && now != c && differ(containerView(c), containerView(now), false) {
		l.o.Changed[c.Name] = true
	}
}

// putNew adds an instance with what we know of it.
func (l *life) putNew(c status.Container) {
	l.put(c)
	have := l.container(c.ID)
	have.Starting, have.Started, have.Ready = c.Starting, c.Started, c.Ready
}

// linkLog makes the link by which log collectors find the log.
func (w *worker) linkLog(pod *v1.Pod, container string, attempt int32, id string) {
	node := &w.t.cfg.Node
	link := node.LogLink(pod.Namespace, pod.Name, container, id)
	target := filepath.Join(node.LogDir(pod.Namespace, pod.Name, pod.UID), spec.LogPath(container, attempt))
	if err := os.Symlink(target, link); err != nil && !os.IsExist(err) {
		w.log.Warn("log link is not made", "link", link, "error", err)
	}
}

// stopContainer ends an instance; the runtime kills it after the grace period.
func (w *worker) stopContainer(l *life, a Action) {
	pod := l.d.Pod
	w.async(l, a, a.Grace+w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		_, err := w.t.deps.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{
			ContainerId: a.ID, Timeout: int64((a.Grace + time.Second - 1) / time.Second),
		})
		if err != nil && !notFound(err) {
			if ctx.Err() == nil {
				w.t.deps.Events.Eventf(spec.Ref(pod, a.Container), v1.EventTypeWarning, "FailedKillPod", "error killing pod: %s", message(err))
			}
			return nil, err
		}
		resp, err := w.t.deps.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: a.ID})
		if err != nil {
			return func() { l.o.Stale = true }, nil
		}
		return func() { w.update(l, resp.Status) }, nil
	})
	l.o.Busy[a.key()] = time.Now().Add(a.Grace) // when SIGKILL comes
}

// removeContainer forgets an instance that does not run, its log too unless it
// is to be kept.
func (w *worker) removeContainer(l *life, a Action) {
	pod := l.d.Pod
	inst := l.container(a.ID)
	attempt := inst.Attempt
	ran := inst.State != status.Created
	if a.Keep && ran && status.RestartsAll(spec.Container(pod, a.Container), inst.ExitCode) {
		l.o.Ended[a.Container] = ended(inst)
	}
	w.async(l, a, w.t.cfg.CallTimeout, func(ctx context.Context) (func(), error) {
		_, err := w.t.deps.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: a.ID})
		if err != nil && !notFound(err) {
			w.log.Warn("container is not removed", "container", a.ID, "error", err)
			return nil, err
		}
		if a.Keep {
			os.Remove(terminationFile(w.t.cfg.Node.PodDir(pod.UID), a.Container, attempt))
		} else {
			w.removeLog(pod, a.Container, attempt, a.ID, ran)
		}
		return func() {
			l.dropContainer(a.ID)
			w.t.disown(a.ID)
		}, nil
	})
}

// removeLog of one instance, what rotation made of it too.
func (w *worker) removeLog(pod *v1.Pod, container string, attempt int32, id string, ran bool) {
	node := &w.t.cfg.Node
	os.Remove(node.LogLink(pod.Namespace, pod.Name, container, id))
	if !ran {
		return // its number is used again
	}
	path := filepath.Join(node.LogDir(pod.Namespace, pod.Name, pod.UID), spec.LogPath(container, attempt))
	os.Remove(terminationFile(node.PodDir(pod.UID), container, attempt))
	files, _ := filepath.Glob(path + "*")
	for _, f := range files {
		if err := os.Remove(f); err != nil && !os.IsNotExist(err) {
			w.log.Warn("log is not removed", "path", f, "error", err)
		}
	}
}
