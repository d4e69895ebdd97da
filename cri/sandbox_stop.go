package cri

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	selinux "github.com/opencontainers/selinux/go-selinux"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// StopPodSandbox stops a pod: its containers are killed, its network goes
// back, its pause process ends. An unknown or stopped sandbox is fine.
func (s *Service) StopPodSandbox(ctx context.Context, r *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	sb, err := s.objects.sandbox(r.GetPodSandboxId())
	if errdefs.IsNotFound(err) {
		if r.GetPodSandboxId() == "" {
			return nil, fmt.Errorf("stop pod sandbox: pod_sandbox_id is empty: %w", errdefs.ErrInvalidArgument)
		}
		return &runtimeapi.StopPodSandboxResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := sb.gate.enter(ctx); err != nil {
		return nil, fmt.Errorf("stop pod sandbox %s: waiting for another stop or removal of it: %w", sb.id, err)
	}
	defer sb.gate.leave()
	if err := s.stopSandbox(ctx, sb); err != nil {
		return nil, fmt.Errorf("stop pod sandbox %s: %w", sb.id, err)
	}
	return &runtimeapi.StopPodSandboxResponse{}, nil
}

// stopSandbox does the stopping. Each step is repeated when it did not
// succeed before; the caller is in the gate.
func (s *Service) stopSandbox(ctx context.Context, sb *sandbox) error {
	sb.mu.Lock()
	if sb.detached {
		sb.mu.Unlock()
		return nil
	}
	stopped := sb.ready
	sb.ready = false // no new container from here on
	sb.mu.Unlock()

	if err := s.stopAll(ctx, s.objects.containersOf(sb.id)); err != nil {
		return err
	}
	if !sb.hostNetwork() {
		if err := s.network.Detach(ctx, s.netPod(sb)); err != nil {
			return fmt.Errorf("detach network: %w", err)
		}
		if err := unpin(s.netnsPath(sb.id)); err != nil {
			return err
		}
	}
	if err := s.procs.DeleteSandbox(ctx, sb.id); err != nil {
		return fmt.Errorf("end sandbox process: %w", err)
	}
	if err := unmount(s.sandboxDir(sb.id) + "/shm"); err != nil {
		return err
	}
	sb.mu.Lock()
	defer sb.mu.Unlock()
	sb.detached = true
	if err := s.saveSandbox(sb); err != nil {
		return err
	}
	if stopped {
		s.events.emit(event{id: sb.id, sandboxID: sb.id, kind: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT})
		s.log.Info("sandbox stopped", "sandbox", sb.id)
	}
	return nil
}

// stopAll kills containers at the same time.
func (s *Service) stopAll(ctx context.Context, cs []*container) error {
	errs := make([]error, len(cs))
	var wg sync.WaitGroup
	for i, c := range cs {
		if c.current() == runtimeapi.ContainerState_CONTAINER_EXITED {
			continue
		}
		wg.Go(func() { errs[i] = s.stopContainer(ctx, c, 0) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// RemovePodSandbox stops a pod where that is needed and forgets it with its
// containers. An unknown sandbox is fine.
func (s *Service) RemovePodSandbox(ctx context.Context, r *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	sb, err := s.objects.sandbox(r.GetPodSandboxId())
	if errdefs.IsNotFound(err) {
		if r.GetPodSandboxId() == "" {
			return nil, fmt.Errorf("remove pod sandbox: pod_sandbox_id is empty: %w", errdefs.ErrInvalidArgument)
		}
		return &runtimeapi.RemovePodSandboxResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := sb.gate.enter(ctx); err != nil {
		return nil, fmt.Errorf("remove pod sandbox %s: waiting for another stop or removal of it: %w", sb.id, err)
	}
	defer sb.gate.leave()
	if err := s.removeSandbox(ctx, sb); err != nil {
		return nil, fmt.Errorf("remove pod sandbox %s: %w", sb.id, err)
	}
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

func (s *Service) removeSandbox(ctx context.Context, sb *sandbox) error {
	sb.mu.Lock()
	sb.removing = true
	sb.mu.Unlock()
	if err := s.stopSandbox(ctx, sb); err != nil {
		return err
	}
	for _, c := range s.objects.containersOf(sb.id) {
		if err := s.removeContainer(ctx, c); err != nil {
			return fmt.Errorf("remove container %s: %w", c.id, err)
		}
	}
	if err := s.dropSandboxFiles(sb.id); err != nil {
		return err
	}
	if err := s.store.Delete(kindSandbox, sb.id); err != nil {
		return err
	}
	if known, err := s.objects.sandbox(sb.id); err != nil || known != sb {
		return nil // a removal that we waited for has done it
	}
	s.objects.dropSandbox(sb)
	if sb.label != "" {
		selinux.ReleaseLabel(sb.label) // its categories may be given out again
	}
	s.events.emit(event{id: sb.id, sandboxID: sb.id, kind: runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT, sandbox: sb.criStatus()})
	s.log.Info("sandbox removed", "sandbox", sb.id)
	return nil
}
