package metrics

import (
	"context"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/pods"
)

// counted is the runtime as pods use it, with every call counted.
type counted struct {
	pods.Runtime
	m *Metrics
	// kind of a container by the labels of its pod; see Runtime.
	kind func(namespace, pod, container string) string
	made sync.Map // created, of containers that have not been started, by id
}

// created is what a start's metrics tell of a container.
type created struct {
	kind   string
	userns bool
}

// inUserNamespace says whether a sandbox has one of its own.
func inUserNamespace(s *runtimeapi.PodSandboxConfig) bool {
	u := s.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	return u != nil && u.GetMode() == runtimeapi.NamespaceMode_POD
}

// Runtime counts what is done with r. Containers are told apart by pod, which
// finds the pod that one belongs to.
func (m *Metrics) Runtime(r pods.Runtime, pod func(namespace, name string) (*v1.Pod, bool)) pods.Runtime {
	return &counted{Runtime: r, m: m, kind: func(namespace, name, container string) string {
		p, ok := pod(namespace, name)
		if !ok {
			return "container"
		}
		for i := range p.Spec.InitContainers {
			if p.Spec.InitContainers[i].Name == container {
				return "init_container"
			}
		}
		for i := range p.Spec.EphemeralContainers {
			if p.Spec.EphemeralContainers[i].Name == container {
				return "ephemeral_container"
			}
		}
		return "container"
	}}
}

// count is deferred with the time of the call and where its error will be.
func (m *Metrics) count(operation string, begin time.Time, err *error) {
	m.operations.WithLabelValues(operation).Inc()
	m.operationSeconds.WithLabelValues(operation).Observe(time.Since(begin).Seconds())
	if *err != nil {
		m.operationErrors.WithLabelValues(operation).Inc()
	}
}

func (c *counted) RunPodSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest) (resp *runtimeapi.RunPodSandboxResponse, err error) {
	begin := time.Now()
	defer c.m.count("run_podsandbox", begin, &err)
	resp, err = c.Runtime.RunPodSandbox(ctx, r)
	c.m.sandboxSeconds.WithLabelValues(r.GetRuntimeHandler()).Observe(time.Since(begin).Seconds())
	c.m.podsStarted.Inc()
	userns := inUserNamespace(r.GetConfig())
	if userns {
		c.m.usernsStarted.Inc()
	}
	if err != nil {
		c.m.sandboxErrors.WithLabelValues(r.GetRuntimeHandler()).Inc()
		c.m.podErrors.Inc()
		if userns {
			c.m.usernsErrors.Inc()
		}
	}
	return resp, err
}

func (c *counted) StopPodSandbox(ctx context.Context, r *runtimeapi.StopPodSandboxRequest) (resp *runtimeapi.StopPodSandboxResponse, err error) {
	defer c.m.count("stop_podsandbox", time.Now(), &err)
	return c.Runtime.StopPodSandbox(ctx, r)
}

func (c *counted) RemovePodSandbox(ctx context.Context, r *runtimeapi.RemovePodSandboxRequest) (resp *runtimeapi.RemovePodSandboxResponse, err error) {
	defer c.m.count("remove_podsandbox", time.Now(), &err)
	return c.Runtime.RemovePodSandbox(ctx, r)
}

func (c *counted) PodSandboxStatus(ctx context.Context, r *runtimeapi.PodSandboxStatusRequest) (resp *runtimeapi.PodSandboxStatusResponse, err error) {
	defer c.m.count("podsandbox_status", time.Now(), &err)
	return c.Runtime.PodSandboxStatus(ctx, r)
}

func (c *counted) ListPodSandbox(ctx context.Context, r *runtimeapi.ListPodSandboxRequest) (resp *runtimeapi.ListPodSandboxResponse, err error) {
	defer c.m.count("list_podsandbox", time.Now(), &err)
	return c.Runtime.ListPodSandbox(ctx, r)
}

func (c *counted) CreateContainer(ctx context.Context, r *runtimeapi.CreateContainerRequest) (resp *runtimeapi.CreateContainerResponse, err error) {
	defer c.m.count("create_container", time.Now(), &err)
	m := r.GetSandboxConfig().GetMetadata()
	kind := c.kind(m.GetNamespace(), m.GetName(), r.GetConfig().GetMetadata().GetName())
	// Counted here and not when it starts: a start names no pod.
	c.m.started.WithLabelValues(kind).Inc()
	resp, err = c.Runtime.CreateContainer(ctx, r)
	is := created{kind, inUserNamespace(r.GetSandboxConfig())}
	if err != nil {
		c.failed(is, "CreateContainerError")
	} else {
		c.made.Store(resp.GetContainerId(), is)
	}
	return resp, err
}

// failed counts a start that failed, by upstream's reason.
func (c *counted) failed(is created, reason string) {
	c.m.startErrors.WithLabelValues(is.kind, reason).Inc()
	if is.userns {
		c.m.usernsErrors.Inc()
	}
}

func (c *counted) StartContainer(ctx context.Context, r *runtimeapi.StartContainerRequest) (resp *runtimeapi.StartContainerResponse, err error) {
	defer c.m.count("start_container", time.Now(), &err)
	resp, err = c.Runtime.StartContainer(ctx, r)
	if is, known := c.made.LoadAndDelete(r.GetContainerId()); known && err != nil {
		c.failed(is.(created), "RunContainerError")
	}
	return resp, err
}

func (c *counted) StopContainer(ctx context.Context, r *runtimeapi.StopContainerRequest) (resp *runtimeapi.StopContainerResponse, err error) {
	defer c.m.count("stop_container", time.Now(), &err)
	return c.Runtime.StopContainer(ctx, r)
}

func (c *counted) RemoveContainer(ctx context.Context, r *runtimeapi.RemoveContainerRequest) (resp *runtimeapi.RemoveContainerResponse, err error) {
	defer c.m.count("remove_container", time.Now(), &err)
	c.made.Delete(r.GetContainerId())
	return c.Runtime.RemoveContainer(ctx, r)
}

func (c *counted) ListContainers(ctx context.Context, r *runtimeapi.ListContainersRequest) (resp *runtimeapi.ListContainersResponse, err error) {
	defer c.m.count("list_containers", time.Now(), &err)
	return c.Runtime.ListContainers(ctx, r)
}

func (c *counted) ContainerStatus(ctx context.Context, r *runtimeapi.ContainerStatusRequest) (resp *runtimeapi.ContainerStatusResponse, err error) {
	defer c.m.count("container_status", time.Now(), &err)
	return c.Runtime.ContainerStatus(ctx, r)
}

func (c *counted) ExecSync(ctx context.Context, r *runtimeapi.ExecSyncRequest) (resp *runtimeapi.ExecSyncResponse, err error) {
	defer c.m.count("exec_sync", time.Now(), &err)
	return c.Runtime.ExecSync(ctx, r)
}

// countedImages is the image service as pods use it.
type countedImages struct {
	pods.Images
	m *Metrics
}

// Images counts what is done with i, and notes when whose images were pulled.
func (m *Metrics) Images(i pods.Images) pods.Images { return &countedImages{i, m} }

func (c *countedImages) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (resp *runtimeapi.PullImageResponse, err error) {
	begin := time.Now()
	defer c.m.count("pull_image", begin, &err)
	defer func() { c.m.starts.pulled(r.GetSandboxConfig().GetMetadata().GetUid(), begin, time.Now()) }()
	return c.Images.PullImage(ctx, r)
}

func (c *countedImages) ImageStatus(ctx context.Context, r *runtimeapi.ImageStatusRequest) (resp *runtimeapi.ImageStatusResponse, err error) {
	defer c.m.count("image_status", time.Now(), &err)
	return c.Images.ImageStatus(ctx, r)
}
