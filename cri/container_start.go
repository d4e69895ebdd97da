package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/shim"
)

// StartContainer runs the payload. A start that fails before the payload's
// first instruction leaves the container exited with code 128 and the reason
// StartError. While podd-shim cannot be asked the answer is Unavailable and the
// container stays created: whether it was started the shim's events will tell.
func (s *Service) StartContainer(ctx context.Context, r *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	c, err := s.objects.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := c.gate.enter(ctx); err != nil {
		return nil, fmt.Errorf("start container %s: waiting for another operation on it: %w", c.id, err)
	}
	defer c.gate.leave()
	if err := s.startContainer(ctx, c); err != nil {
		return nil, fmt.Errorf("start container %s: %w", c.id, err)
	}
	return &runtimeapi.StartContainerResponse{}, nil
}

func (s *Service) startContainer(ctx context.Context, c *container) error {
	sb, err := s.objects.sandbox(c.sandboxID)
	if err != nil {
		return err
	}
	c.mu.Lock()
	if c.state != runtimeapi.ContainerState_CONTAINER_CREATED || c.removing {
		state := c.state
		c.mu.Unlock()
		return fmt.Errorf("it is %v, only a created container can be started: %w", state, errdefs.ErrFailedPrecondition)
	}
	spec := c.spec
	c.starting = true
	c.mu.Unlock()
	// In this order: a StopPodSandbox either is seen here, or sees the start.
	if err := s.startable(sb, c); err != nil {
		c.mu.Lock()
		c.starting = false
		c.mu.Unlock()
		return err
	}

	p, err := s.launch(ctx, c, spec)
	if err != nil {
		if errdefs.IsUnavailable(err) || ctx.Err() != nil {
			c.mu.Lock()
			c.starting = false
			c.mu.Unlock()
			return err
		}
		s.markStartFailed(c, err)
		// Whatever there is of it goes; its files wait for RemoveContainer.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
		defer cancel()
		if derr := s.procs.Delete(ctx, c.id); derr != nil {
			s.log.Warn("undo incomplete", "step", "container process", "container", c.id, "error", derr)
		}
		return err
	}
	s.markRunning(c, p)
	if p.Exit != nil {
		s.markExited(c, p.Exit, p.PID)
	}
	s.log.Info("container started", "container", c.id, "pid", p.PID)
	return nil
}

// startable checks that the processes whose namespaces the specification names
// by pid are still there: another one may have got the number since.
func (s *Service) startable(sb *sandbox, c *container) error {
	if _, ready := sb.isReady(); !ready {
		return fmt.Errorf("sandbox %s is not ready: %w", sb.id, errdefs.ErrFailedPrecondition)
	}
	ns := c.config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	if ns.GetPid() != runtimeapi.NamespaceMode_TARGET {
		return nil
	}
	target, err := s.objects.container(ns.GetTargetId())
	if err == nil && target.current() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		err = fmt.Errorf("container %s is not running any more: %w", target.id, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("namespace_options.target_id: %w", err)
	}
	return nil
}

// launch has the shim make the container and run it.
func (s *Service) launch(ctx context.Context, c *container, spec *specs.Spec) (*shim.Process, error) {
	if spec == nil { // podd was restarted between create and start
		spec = new(specs.Spec)
		if err := s.store.Get(kindSpec, c.id, spec); err != nil {
			return nil, err
		}
	}
	if c.logPath != "" {
		// The kubelet makes this directory; other clients need not.
		if err := os.MkdirAll(filepath.Dir(c.logPath), 0o755); err != nil {
			return nil, fmt.Errorf("log directory: %w", err)
		}
	}
	_, err := s.procs.Create(ctx, &shim.ContainerSpec{
		ID: c.id, SandboxID: c.sandboxID, Spec: spec, SystemdCgroup: s.cfg.SystemdCgroup,
		LogPath: c.logPath, LogMaxSize: s.cfg.LogMaxSize, LogMaxFiles: s.cfg.LogMaxFiles,
		Stdin: c.config.GetStdin(), StdinOnce: c.config.GetStdinOnce(),
	})
	if err != nil {
		return nil, err
	}
	return s.procs.Start(ctx, c.id)
}
