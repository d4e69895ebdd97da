package cri

import (
	"cmp"
	"context"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// criStatus is the container as ContainerStatus shows it.
func (c *container) criStatus() *runtimeapi.ContainerStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := &runtimeapi.ContainerStatus{
		Id: c.id, Metadata: c.config.GetMetadata(), State: c.state, CreatedAt: c.createdAt,
		StartedAt: c.status.StartedAt, FinishedAt: c.status.FinishedAt, ExitCode: c.status.ExitCode,
		Image: c.imageSpec(), ImageRef: c.image.ID, ImageId: c.image.ID,
		Reason: c.status.Reason, Message: c.status.Message,
		Labels: c.config.GetLabels(), Annotations: c.config.GetAnnotations(), Mounts: c.config.GetMounts(),
		LogPath: c.logPath, User: c.criUser(),
		StopSignal: criSignal(stopSignal(c.config, c.image.StopSignal)),
	}
	if c.resources != nil {
		st.Resources = &runtimeapi.ContainerResources{Linux: c.resources}
	}
	return st
}

func (c *container) imageSpec() *runtimeapi.ImageSpec {
	name := c.image.Tag
	if name == "" {
		name = c.image.Spec
	}
	return &runtimeapi.ImageSpec{Image: name, UserSpecifiedImage: c.image.User, Annotations: c.config.GetImage().GetAnnotations()}
}

// criUser is who the first process is, as resolved when it was created.
func (c *container) criUser() *runtimeapi.ContainerUser {
	if c.process == nil {
		return &runtimeapi.ContainerUser{}
	}
	u := &runtimeapi.LinuxContainerUser{Uid: int64(c.process.User.UID), Gid: int64(c.process.User.GID)}
	for _, g := range c.process.User.AdditionalGids {
		u.SupplementalGroups = append(u.SupplementalGroups, int64(g))
	}
	return &runtimeapi.ContainerUser{Linux: u}
}

func (s *Service) containerStatuses(sandboxID string) []*runtimeapi.ContainerStatus {
	var out []*runtimeapi.ContainerStatus
	for _, c := range s.objects.containersOf(sandboxID) {
		out = append(out, c.criStatus())
	}
	return out
}

// ContainerStatus returns one container.
func (s *Service) ContainerStatus(_ context.Context, r *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	c, err := s.objects.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ContainerStatusResponse{Status: c.criStatus()}
	if r.GetVerbose() {
		if resp.Info, err = s.containerInfo(c); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// containerInfo is what crictl inspect shows beyond the status.
func (s *Service) containerInfo(c *container) (map[string]string, error) {
	c.mu.Lock()
	pid, removing, spec, st := c.status.PID, c.removing, c.spec, c.status
	running := c.state == runtimeapi.ContainerState_CONTAINER_RUNNING
	c.mu.Unlock()
	if !running {
		pid = 0
	}
	if spec == nil {
		spec = new(specs.Spec)
		if err := s.store.Get(kindSpec, c.id, spec); err != nil {
			s.log.Warn("specification not readable", "container", c.id, "error", err)
			spec = nil
		}
	}
	return infoMap(struct {
		SandboxID   string                      `json:"sandboxID"`
		PID         int                         `json:"pid"`
		Removing    bool                        `json:"removing"`
		SnapshotKey string                      `json:"snapshotKey"`
		Snapshotter string                      `json:"snapshotter"`
		Rootfs      string                      `json:"rootfs"`
		Runtime     string                      `json:"runtimeType"`
		Config      *runtimeapi.ContainerConfig `json:"config"`
		RuntimeSpec *specs.Spec                 `json:"runtimeSpec"`
		MemoryPeak  uint64                      `json:"memoryPeak,omitempty"`
		Signal      int                         `json:"signal,omitempty"` // that ended it
		oomKills
	}{c.sandboxID, pid, removing, c.id, "overlayfs", s.rootfsPath(c.id), "podd-shim", c.config, spec, st.MemoryPeak, st.Signal, st.oomKills})
}

// ListContainers returns the containers that match the filter.
func (s *Service) ListContainers(_ context.Context, r *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{Containers: s.listContainers(r.GetFilter())}, nil
}

func (s *Service) listContainers(f *runtimeapi.ContainerFilter) []*runtimeapi.Container {
	all := s.objects.allContainers()
	items := make([]*runtimeapi.Container, 0, len(all))
	for _, c := range all {
		if !strings.HasPrefix(c.id, f.GetId()) || !strings.HasPrefix(c.sandboxID, f.GetPodSandboxId()) || !matches(f.GetLabelSelector(), c.config.GetLabels()) {
			continue
		}
		state := c.current()
		if f.GetState() != nil && f.GetState().GetState() != state {
			continue
		}
		items = append(items, &runtimeapi.Container{
			Id: c.id, PodSandboxId: c.sandboxID, Metadata: c.config.GetMetadata(), Image: c.imageSpec(),
			ImageRef: c.image.ID, ImageId: c.image.ID, State: state, CreatedAt: c.createdAt,
			Labels: c.config.GetLabels(), Annotations: c.config.GetAnnotations(),
		})
	}
	slices.SortFunc(items, func(a, b *runtimeapi.Container) int {
		return cmp.Or(cmp.Compare(b.CreatedAt, a.CreatedAt), strings.Compare(a.Id, b.Id))
	})
	return items
}
