// Package cri implements the Container Runtime Interface: sandboxes,
// containers and images as the Kubernetes CRI names them, on podd-shim's
// processes, the image store and the pod network.
package cri

import (
	"context"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/images"
	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/netns"
)

// Processes is what the services need of podd-shim. *shim.Client is it.
// Every call may be repeated: creating what exists with the same spec returns
// it, stopping or deleting what is gone succeeds. Unknown ids are
// errdefs.ErrNotFound.
type Processes interface {
	CreateSandbox(ctx context.Context, s *shim.SandboxSpec) (*shim.Process, error)
	// DeleteSandbox kills the pause process and forgets it.
	DeleteSandbox(ctx context.Context, id string) error
	Create(ctx context.Context, c *shim.ContainerSpec) (*shim.Process, error)
	Start(ctx context.Context, id string) (*shim.Process, error)
	// Signal sends to init, or to every process of the container with all.
	Signal(ctx context.Context, id string, signal int, all bool) error
	// Delete kills what is left and forgets the container; its log is drained first.
	Delete(ctx context.Context, id string) error
	State(ctx context.Context, id string) (*shim.Process, error)
	// List returns all sandboxes and containers.
	List(ctx context.Context) ([]shim.Process, error)
	Update(ctx context.Context, id string, r *specs.LinuxResources) error
	Exec(ctx context.Context, e *shim.ExecSpec) (shim.Session, error)
	// Attach streams a running container: out and err receive what it writes
	// from now on, in feeds its stdin; any may be nil. It returns at once.
	Attach(ctx context.Context, id string, in, out, err *os.File) (shim.Session, error)
	// ResizeTTY sets the window of a container's own terminal.
	ResizeTTY(ctx context.Context, id string, width, height uint16) error
	ReopenLog(ctx context.Context, id string) error
	// Events delivers every event with Seq > after, then those to come, in
	// order and without gaps; the channel closes when ctx ends. The client
	// reconnects by itself when the shim restarts.
	Events(ctx context.Context, after uint64) (<-chan shim.Event, error)
	Info(ctx context.Context) (*shim.Info, error)
}

// Images is what the services need of the image store. *images.Store is it.
// Unknown images are errdefs.ErrNotFound.
type Images interface {
	// Pull fetches and unpacks ref (name:tag, name@digest; short names are
	// docker.io's) and returns it. Concurrent pulls of one ref join.
	Pull(ctx context.Context, ref string, auth *runtimeapi.AuthConfig, progress func(images.Progress)) (*images.Image, error)
	// Get resolves an id (whole or unambiguous prefix), tag or digest reference.
	Get(ctx context.Context, ref string) (*images.Image, error)
	List(ctx context.Context) ([]*images.Image, error)
	// Remove drops the reference, or the image with all its references when
	// ref is its id; what nothing uses any more is freed.
	Remove(ctx context.Context, ref string) error
	// MountRootfs prepares a writable snapshot named key on the image and
	// mounts it at target. Repeating it is harmless. With id mappings the tree
	// appears owned by the mapped ids (id-mapped mount).
	MountRootfs(ctx context.Context, key, image, target string, uid, gid []specs.LinuxIDMapping) error
	// UnmountRootfs unmounts target and drops the snapshot.
	UnmountRootfs(ctx context.Context, key, target string) error
	// MountImage mounts the image's tree read-only at target (image volumes).
	MountImage(ctx context.Context, key, image, target string, uid, gid []specs.LinuxIDMapping) error
	// Snapshots are the keys of all snapshots, writable and read-only.
	Snapshots(ctx context.Context) ([]string, error)
	// Usage of one writable snapshot in bytes and inodes, from a background cache.
	Usage(ctx context.Context, key string) (bytes, inodes uint64, err error)
	// FsInfo of the store's file system.
	FsInfo(ctx context.Context) (*runtimeapi.FilesystemUsage, error)
}

// Network attaches pods. *netns.Network is it.
type Network interface {
	// Attach brings up lo and the pod's interfaces and returns its addresses,
	// the primary one first. On error nothing is left behind.
	Attach(ctx context.Context, p *netns.Pod) (*netns.Result, error)
	// Detach gives everything back; it succeeds when there is nothing left,
	// and also when the namespace is already gone.
	Detach(ctx context.Context, p *netns.Pod) error
	// Ready says why pods cannot be attached now; nil: they can.
	Ready(ctx context.Context) error
	// SetPodCIDR tells the range that the cluster gave this node.
	SetPodCIDR(ctx context.Context, cidr string) error
	// Sweep releases the leases and links of every sandbox not in keep.
	Sweep(ctx context.Context, keep []string) error
}
