// Package pods gives pods their life: it takes pods from sources, keeps one
// worker for each name, and makes what runs equal to what is desired. What is
// to be done is decided by plan, a pure function; how, by one file a step:
//
//	cgroup.go      the pod's cgroup
//	volumes.go     its volumes and its directory
//	sandbox.go     its sandbox: namespaces and network
//	images.go      its containers' images
//	containers.go  its containers, with hooks.go
//	watchers.go    its probes
//
// Every step can be started and stopped again at any time, and begins anew
// from what the runtime, the disk and the kernel say (recover.go).
package pods

import (
	"context"
	"log/slog"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/pkg/credentialprovider"

	"github.com/podd-runtime/podd/cgroups"
	"github.com/podd-runtime/podd/kubelet/admission"
	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/probes"
)

// Runtime is what of the CRI's RuntimeService pods need, *cri.Service. Every
// call may be repeated.
type Runtime interface {
	RunPodSandbox(context.Context, *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error)
	StopPodSandbox(context.Context, *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error)
	RemovePodSandbox(context.Context, *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error)
	PodSandboxStatus(context.Context, *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error)
	ListPodSandbox(context.Context, *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error)
	CreateContainer(context.Context, *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error)
	StartContainer(context.Context, *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error)
	StopContainer(context.Context, *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error)
	RemoveContainer(context.Context, *runtimeapi.RemoveContainerRequest) (*runtimeapi.RemoveContainerResponse, error)
	ListContainers(context.Context, *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error)
	ContainerStats(context.Context, *runtimeapi.ContainerStatsRequest) (*runtimeapi.ContainerStatsResponse, error)
	UpdateContainerResources(context.Context, *runtimeapi.UpdateContainerResourcesRequest) (*runtimeapi.UpdateContainerResourcesResponse, error)
	UpdatePodSandboxResources(context.Context, *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error)
	ContainerStatus(context.Context, *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error)
	ExecSync(context.Context, *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error)
	// Subscribe delivers what happens from now on, without gaps.
	Subscribe(ctx context.Context) <-chan *runtimeapi.ContainerEventResponse
}

// Images is what of the CRI's ImageService pods need, *cri.Service.
type Images interface {
	PullImage(context.Context, *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error)
	ImageStatus(context.Context, *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error)
}

// Volumes makes pods' volumes, *volumes.Volumes. Setup and Teardown may be
// repeated and are safe one without the other.
type Volumes interface {
	Setup(ctx context.Context, pod *v1.Pod) error
	Mounts(ctx context.Context, pod *v1.Pod, c *v1.Container, env func(string) string) ([]*runtimeapi.Mount, func(), error)
	Refresh(ctx context.Context, pod *v1.Pod) error
	Teardown(ctx context.Context, uid types.UID) error
	// Abort ends what waits for filesystems of the pod that do not answer.
	Abort(ctx context.Context, uid types.UID) error
	Pods() ([]types.UID, error)
}

// Recorder of events, *events.Store.
type Recorder interface {
	Eventf(ref *v1.ObjectReference, eventType, reason, format string, args ...any)
}

// Deps are the parts that a Table drives.
type Deps struct {
	Runtime Runtime
	Images  Images
	Volumes Volumes
	Objects spec.Objects
	Cgroups cgroups.Pods
	Events  Recorder
	// Credentials for images by plugins; nil: there are none.
	Credentials Credentials
	// Admit decides whether the node takes a pod beside the others that are
	// not over; nil: it takes all. One pod after the other is decided on, so it
	// must wait for nothing.
	Admit func(pod *v1.Pod, others []*v1.Pod) admission.Verdict
	// Services are the variables that a pod gets for the cluster's services,
	// see spec.EnvSources; nil without a cluster.
	Services func(ctx context.Context, pod *v1.Pod) (map[string]string, error)
	// RuntimeClass gives the runtime handler of a RuntimeClass; nil: the node
	// knows none.
	RuntimeClass func(name string) (handler string, err error)
}

// Credentials for images, *credentials.Providers.
type Credentials interface {
	// Config for an image of a pod, by registry; empty when there is none.
	Config(ctx context.Context, pod *v1.Pod, image string) credentialprovider.DockerConfig
}

// Observer counts. Its methods must not block.
type Observer interface {
	// Worked is one look of a worker at its pod: "create" for the first, "sync".
	Worked(operation string, d time.Duration)
	Probed(t probes.Target, k probes.Kind, result string, d time.Duration)
	// Healed is a disagreement that the audit has found and put right: "source"
	// of what a source said and what its pod was told, "runtime" of what runs and
	// what was known of it, "place" of a place on the node that nobody had. Each
	// is a fault of podd's.
	Healed(what string)
}

// Config of a Table.
type Config struct {
	Node spec.Node
	// RecordDir keeps one record per pod: <data-dir>/pods.
	RecordDir string
	// Build names this build of the daemon: records of another one are read
	// with fields that either may not know.
	Build string
	// Sources that must have Synced before orphans are removed.
	Sources []string
	// Backoff of containers and of images; zero: 10 s to 300 s.
	Backoff, ImageBackoff BackoffPolicy
	// ParallelPulls at once; 0: 8. One that takes longer than ten seconds no
	// longer counts.
	ParallelPulls int
	// ParallelStarts of sandboxes and containers at once; 0: four per CPU.
	// One that takes longer than a second no longer counts.
	ParallelStarts int
	// CallTimeout bounds a call of the runtime that has no time of its own;
	// 0: 2 minutes, upstream's runtimeRequestTimeout.
	CallTimeout time.Duration
	// Audit is how often the runtime is asked for what events may have
	// missed; 0: a minute.
	Audit time.Duration
	// AllowedUnsafeSysctls that pods may set besides the safe ones; a name, or
	// a prefix that ends in *.
	AllowedUnsafeSysctls []string
	// Admit may refuse a pod before it begins: reason is that of the pod's
	// status, "" admits it. nil admits all.
	Admit func(*v1.Pod) (reason, message string)
	// UserIDsPerPod with hostUsers: false, a multiple of 65536; 0: that.
	UserIDsPerPod int64
	// Probes limits the probes at once; see probes.Config.
	ParallelProbes, ParallelExecProbes int
	// Observer of what is done, for metrics; nil: none.
	Observer Observer
	Log      *slog.Logger
}

func (c *Config) defaults(cpus int) {
	def := BackoffPolicy{Initial: 10 * time.Second, Max: 300 * time.Second}
	if c.Backoff.Initial == 0 {
		c.Backoff = def
	}
	if c.ImageBackoff.Initial == 0 {
		c.ImageBackoff = def
	}
	if c.ParallelPulls == 0 {
		c.ParallelPulls = 8
	}
	if c.ParallelStarts == 0 {
		c.ParallelStarts = 4 * cpus
	}
	if c.CallTimeout == 0 {
		c.CallTimeout = 2 * time.Minute
	}
	if c.Audit == 0 {
		c.Audit = time.Minute
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// execer lends the runtime's ExecSync to probes and hooks.
type execer struct{ rt Runtime }

var _ probes.Execer = execer{}

func (e execer) Exec(ctx context.Context, id string, cmd []string, timeout time.Duration) ([]byte, int32, error) {
	resp, err := e.rt.ExecSync(ctx, &runtimeapi.ExecSyncRequest{
		ContainerId: id, Cmd: cmd, Timeout: int64((timeout + time.Second - 1) / time.Second),
	})
	if err != nil {
		return nil, 0, err
	}
	return append(resp.Stdout, resp.Stderr...), resp.ExitCode, nil
}
