package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// UpdateContainerResources changes the limits of a created or running
// container; absent (zero) values stay.
func (s *Service) UpdateContainerResources(ctx context.Context, r *runtimeapi.UpdateContainerResourcesRequest) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	c, err := s.objects.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := validResources("linux", r.GetLinux()); err != nil {
		return nil, err
	}
	if r.GetLinux() == nil {
		return &runtimeapi.UpdateContainerResourcesResponse{}, nil
	}
	if err := c.gate.enter(ctx); err != nil {
		return nil, fmt.Errorf("update container %s: waiting for another operation on it: %w", c.id, err)
	}
	defer c.gate.leave()
	if err := s.updateContainer(ctx, c, r.GetLinux()); err != nil {
		return nil, fmt.Errorf("update container %s: %w", c.id, err)
	}
	return &runtimeapi.UpdateContainerResourcesResponse{}, nil
}

func (s *Service) updateContainer(ctx context.Context, c *container, r *runtimeapi.LinuxContainerResources) error {
	c.mu.Lock()
	state, removing := c.state, c.removing
	c.mu.Unlock()
	if removing {
		return fmt.Errorf("it is being removed: %w", errdefs.ErrFailedPrecondition)
	}
	switch state {
	case runtimeapi.ContainerState_CONTAINER_RUNNING:
		oci := new(specs.LinuxResources)
		if err := s.applyResources(oci, r); err != nil {
			return err
		}
		if err := s.procs.Update(ctx, c.id, oci); err != nil {
			return err
		}
	case runtimeapi.ContainerState_CONTAINER_CREATED:
		spec := new(specs.Spec)
		if err := s.store.Get(kindSpec, c.id, spec); err != nil {
			return err
		}
		if err := s.mergeResources(spec.Linux.Resources, r); err != nil {
			return err
		}
		if err := s.store.Put(kindSpec, c.id, spec); err != nil {
			return err
		}
		c.mu.Lock()
		c.spec = spec
		c.mu.Unlock()
	default:
		return fmt.Errorf("it is %v: %w", state, errdefs.ErrFailedPrecondition)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.resources = mergedResources(c.resources, r)
	s.persist(c)
	return nil
}

// mergeResources applies r over what a specification has.
func (s *Service) mergeResources(to *specs.LinuxResources, r *runtimeapi.LinuxContainerResources) error {
	add := new(specs.LinuxResources)
	if err := s.applyResources(add, r); err != nil {
		return err
	}
	if to.CPU == nil {
		to.CPU = new(specs.LinuxCPU)
	}
	if to.Memory == nil {
		to.Memory = new(specs.LinuxMemory)
	}
	set(&to.CPU.Period, add.CPU.Period)
	set(&to.CPU.Quota, add.CPU.Quota)
	set(&to.CPU.Shares, add.CPU.Shares)
	set(&to.Memory.Limit, add.Memory.Limit)
	set(&to.Memory.Swap, add.Memory.Swap)
	if add.CPU.Cpus != "" {
		to.CPU.Cpus = add.CPU.Cpus
	}
	if add.CPU.Mems != "" {
		to.CPU.Mems = add.CPU.Mems
	}
	if add.HugepageLimits != nil {
		to.HugepageLimits = add.HugepageLimits
	}
	for k, v := range add.Unified {
		if to.Unified == nil {
			to.Unified = make(map[string]string)
		}
		to.Unified[k] = v
	}
	return nil
}

func set[T any](to **T, v *T) {
	if v != nil {
		*to = v
	}
}

// mergedResources is what ContainerStatus shows after an update.
func mergedResources(old, r *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	out := new(runtimeapi.LinuxContainerResources)
	if old != nil {
		out = proto.CloneOf(old)
	}
	adj := out.OomScoreAdj // it is set with the process and never updated
	pages := out.HugepageLimits
	if len(r.GetHugepageLimits()) > 0 {
		pages = nil
	}
	out.HugepageLimits = nil
	proto.Merge(out, r)
	if pages != nil {
		out.HugepageLimits = pages
	}
	out.OomScoreAdj = adj
	return out
}

// UpdatePodSandboxResources takes note of a pod's new limits. The pod's own
// cgroup is the kubelet's; what is kept here is shown by status and events.
func (s *Service) UpdatePodSandboxResources(_ context.Context, r *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	sb, err := s.objects.sandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	for field, v := range map[string]*runtimeapi.LinuxContainerResources{"overhead": r.GetOverhead(), "resources": r.GetResources()} {
		if err := validResources(field, v); err != nil {
			return nil, err
		}
	}
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if r.GetOverhead() != nil {
		sb.overhead = r.GetOverhead()
	}
	if r.GetResources() != nil {
		sb.resources = r.GetResources()
	}
	if err := s.saveSandbox(sb); err != nil {
		return nil, err
	}
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, nil
}

// ReopenContainerLog makes the shim open the log file anew after the client
// has moved it away.
func (s *Service) ReopenContainerLog(ctx context.Context, r *runtimeapi.ReopenContainerLogRequest) (*runtimeapi.ReopenContainerLogResponse, error) {
	c, err := s.runningContainer(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := s.procs.ReopenLog(ctx, c.id); err != nil {
		return nil, fmt.Errorf("reopen log of container %s: %w", c.id, err)
	}
	return &runtimeapi.ReopenContainerLogResponse{}, nil
}
