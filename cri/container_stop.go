package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/volumes/tree"
)

// killWait is how long an exit may take to be reported after SIGKILL before
// the shim is asked directly, and then again.
const killWait = 5 * time.Second

// StopContainer sends the stop signal, waits up to timeout seconds and kills.
// A container that does not run, or is unknown, is fine. When the request ends
// early the container keeps running or dying, and a further StopContainer goes
// on without signalling twice.
func (s *Service) StopContainer(ctx context.Context, r *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	if r.GetTimeout() < 0 {
		return nil, invalid("timeout %d: must not be negative", r.GetTimeout())
	}
	c, err := s.objects.container(r.GetContainerId())
	if errdefs.IsNotFound(err) {
		if r.GetContainerId() == "" {
			return nil, invalid("container_id is empty")
		}
		return &runtimeapi.StopContainerResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	// A second at most 292 years; a client may say "for ever" by MaxInt64.
	timeout := time.Duration(min(r.GetTimeout(), int64(time.Duration(1<<63-1)/time.Second))) * time.Second
	if err := s.stopContainer(ctx, c, timeout); err != nil {
		return nil, fmt.Errorf("stop container %s: %w", c.id, err)
	}
	return &runtimeapi.StopContainerResponse{}, nil
}

// stopContainer stops and waits for the exit. It takes no gate: stops of one
// container may overlap, and the shortest wins.
func (s *Service) stopContainer(ctx context.Context, c *container, timeout time.Duration) error {
	c.mu.Lock()
	state, starting := c.state, c.starting
	signal := timeout > 0 && !c.stopping
	c.mu.Unlock()
	switch {
	case state == runtimeapi.ContainerState_CONTAINER_EXITED:
		return nil
	case state == runtimeapi.ContainerState_CONTAINER_CREATED && !starting:
		return nil // nothing runs, and nothing says that it did
	case state == runtimeapi.ContainerState_CONTAINER_CREATED:
		// A start is going on: it decides first what there is to stop.
		if err := c.gate.enter(ctx); err != nil {
			return fmt.Errorf("waiting for its start: %w", err)
		}
		c.gate.leave()
		if c.current() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			return nil
		}
	}
	if signal {
		if err := s.procs.Signal(ctx, c.id, stopSignal(c.config, c.image.StopSignal), false); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("send stop signal: %w", err)
		}
		c.mu.Lock()
		c.stopping = true
		c.mu.Unlock()
	}
	if timeout > 0 {
		timer := time.NewTimer(timeout)
		defer timer.Stop()
		select {
		case <-c.exited:
			return nil
		case <-timer.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the container to end after its stop signal: %w", context.Cause(ctx))
		}
	}
	return s.kill(ctx, c)
}

// kill sends SIGKILL to all of a container and waits for its exit.
func (s *Service) kill(ctx context.Context, c *container) error {
	for {
		err := s.procs.Signal(ctx, c.id, int(unix.SIGKILL), true)
		if errdefs.IsNotFound(err) {
			s.lost(c)
			return nil
		}
		if err != nil {
			return fmt.Errorf("kill: %w", err)
		}
		timer := time.NewTimer(killWait)
		select {
		case <-c.exited:
			timer.Stop()
			return nil
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("waiting for the container to end after SIGKILL (a process in uninterruptible sleep?): %w", context.Cause(ctx))
		case <-timer.C:
		}
		// The event may be late, or its stream broken; the shim knows.
		p, err := s.procs.State(ctx, c.id)
		if err == nil && p.Exit != nil {
			s.markExited(c, p.Exit, p.PID)
			return nil
		}
	}
}

// lost marks a container that the shim does not know: it ended, and how is
// not known.
func (s *Service) lost(c *container) {
	c.mu.Lock()
	pid := c.status.PID
	c.mu.Unlock()
	s.markExited(c, &shim.Exit{Code: exitUnknown, At: time.Now()}, pid)
}

// RemoveContainer forgets a container with its root file system, killing it
// where it runs. An unknown container is fine.
func (s *Service) RemoveContainer(ctx context.Context, r *runtimeapi.RemoveContainerRequest) (*runtimeapi.RemoveContainerResponse, error) {
	c, err := s.objects.container(r.GetContainerId())
	if errdefs.IsNotFound(err) {
		if r.GetContainerId() == "" {
			return nil, invalid("container_id is empty")
		}
		return &runtimeapi.RemoveContainerResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := s.removeContainer(ctx, c); err != nil {
		return nil, fmt.Errorf("remove container %s: %w", c.id, err)
	}
	return &runtimeapi.RemoveContainerResponse{}, nil
}

// removeContainer undoes createContainer and startContainer. Each step may be
// done already; a failed one is repeated by the next removal.
func (s *Service) removeContainer(ctx context.Context, c *container) error {
	if err := s.stopContainer(ctx, c, 0); err != nil {
		return err
	}
	if err := c.gate.enter(ctx); err != nil {
		return fmt.Errorf("waiting for another operation on it: %w", err)
	}
	defer c.gate.leave()
	c.mu.Lock()
	c.removing = true
	running := c.state == runtimeapi.ContainerState_CONTAINER_RUNNING
	c.mu.Unlock()
	if running { // started between the stop and the gate
		if err := s.kill(ctx, c); err != nil {
			return err
		}
	}
	if err := s.procs.Delete(ctx, c.id); err != nil {
		return fmt.Errorf("delete process: %w", err)
	}
	if err := s.dropContainerFiles(ctx, c.id, c.imageMounts); err != nil {
		return err
	}
	c.mu.Lock()
	c.gone = true
	c.mu.Unlock()
	s.flusher.forget(c.id)
	if err := errors.Join(s.store.Delete(kindSpec, c.id), s.store.Delete(kindContainer, c.id)); err != nil {
		return err
	}
	if known, err := s.objects.container(c.id); err != nil || known != c {
		return nil // a removal that we waited for has done it
	}
	s.objects.dropContainer(c)
	s.events.emit(event{id: c.id, sandboxID: c.sandboxID, kind: runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT})
	s.log.Info("container removed", "container", c.id)
	return nil
}

// dropContainerFiles gives back the root file system and all volumes.
func (s *Service) dropContainerFiles(ctx context.Context, id string, mounts []imageMount) error {
	if err := s.images.UnmountRootfs(ctx, id, s.rootfsPath(id)); err != nil {
		return fmt.Errorf("unmount root file system: %w", err)
	}
	for _, im := range mounts {
		if err := s.dropImageVolume(ctx, im); err != nil {
			return fmt.Errorf("unmount image volume: %w", err)
		}
	}
	if err := s.dropVolumes(ctx, id); err != nil {
		return fmt.Errorf("remove volumes: %w", err)
	}
	return removeFlat(s.containerDir(id))
}

// dropVolumes deletes what the image-declared volumes of a container store: a
// tree that the container has written.
func (s *Service) dropVolumes(ctx context.Context, id string) error {
	s.volumes.Forget(id)
	dir := s.volumeDir(id)
	parent, err := unix.Open(filepath.Dir(dir), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: filepath.Dir(dir), Err: err}
	}
	defer unix.Close(parent)
	return tree.Remove(ctx, parent, filepath.Base(dir))
}
