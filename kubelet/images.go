package kubelet

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/cri"
	"github.com/podd-runtime/podd/cri/images"
	"github.com/podd-runtime/podd/kubelet/imagegc"
	"github.com/podd-runtime/podd/kubelet/pods"
)

// node is what events about the node refer to.
func (a *agent) node() *v1.ObjectReference {
	return &v1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: a.cfg.NodeName, UID: types.UID(a.cfg.NodeName)}
}

// newImageGC makes what removes images that nobody uses.
func (a *agent) newImageGC() *imagegc.Collector {
	return imagegc.New(imagegc.Config{
		Policy:  a.cfg.ImageGC,
		Store:   &imageStore{dir: a.cfg.Images.Dir, images: a.images, runtime: a.cri, pods: func() []*v1.Pod { return a.table.Pods() }},
		Event:   func(t, reason, message string) { a.events.Eventf(a.node(), t, reason, "%s", message) },
		Removed: a.metrics.ImageRemoved,
		Log:     a.log.With("part", "image gc"),
	})
}

// collectImages runs when all pods of the last run are known: what they use is
// in use.
func (a *agent) collectImages(ctx context.Context) error {
	select {
	case <-a.table.Recovered():
		return a.imageGC.Run(ctx)
	case <-ctx.Done():
		return nil
	}
}

// imageStore is the node's images as package imagegc sees them.
type imageStore struct {
	dir     string
	images  *images.Store
	runtime *cri.Service
	pods    func() []*v1.Pod
}

func (s *imageStore) Images(ctx context.Context) ([]imagegc.Image, error) {
	all, err := s.images.List(ctx)
	if err != nil {
		return nil, err
	}
	used, err := s.used(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]imagegc.Image, 0, len(all))
	for _, i := range all {
		name := i.ID
		for _, names := range [][]string{i.RepoDigests, i.RepoTags} {
			if len(names) > 0 {
				name = names[0]
			}
		}
		out = append(out, imagegc.Image{ID: i.ID, Name: name, Size: i.Size, Pinned: i.Pinned, Used: used[i.ID]})
	}
	return out, nil
}

// used images, by id: of all containers, whoever made them, as root file
// systems and volumes; and those that pods of this node name, though their
// containers may not be there yet.
func (s *imageStore) used(ctx context.Context) (map[string]bool, error) {
	used := map[string]bool{}
	mark := func(ref string) {
		if i, err := s.images.Get(ctx, ref); err == nil {
			used[i.ID] = true
		}
	}
	list, err := s.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	for _, c := range list.Containers {
		used[c.ImageId] = true
		st, err := s.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.Id})
		if err != nil {
			continue // removed meanwhile
		}
		for _, m := range st.GetStatus().GetMounts() {
			if ref := m.GetImage().GetImage(); ref != "" {
				mark(ref)
			}
		}
	}
	for _, p := range s.pods() {
		for c := range podutil.ContainerIter(&p.Spec, podutil.AllContainers) {
			mark(c.Image)
		}
		for _, v := range p.Spec.Volumes {
			if v.Image != nil && v.Image.Reference != "" {
				mark(v.Image.Reference)
			}
		}
	}
	return used, nil
}

func (s *imageStore) Remove(ctx context.Context, id string) error { return s.images.Remove(ctx, id) }

func (s *imageStore) Sweep(ctx context.Context) error { return s.images.GarbageCollect(ctx) }

func (s *imageStore) Disk() (imagegc.Disk, error) { return diskOf(s.dir) }

func diskOf(dir string) (imagegc.Disk, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return imagegc.Disk{}, fmt.Errorf("statfs %s: %w", filepath.Clean(dir), err)
	}
	return imagegc.Disk{Capacity: int64(st.Blocks) * st.Bsize, Available: int64(st.Bavail) * st.Bsize}, nil
}

// pullsThatFill has room made when a pull finds the disk full.
type pullsThatFill struct {
	pods.Images
	full func()
}

func (p pullsThatFill) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	resp, err := p.Images.PullImage(ctx, r)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		p.full()
	}
	return resp, err
}
