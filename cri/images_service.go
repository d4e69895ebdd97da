package cri

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/images"
)

// pulls holds the progress of running pulls by reference.
type pulls struct {
	mu sync.Mutex
	m  map[string]pullState
}

type pullState struct {
	images.Progress
	n int // joined requests
}

func (p *pulls) begin(ref string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.m == nil {
		p.m = make(map[string]pullState)
	}
	st := p.m[ref]
	st.n++
	st.Ref = ref
	p.m[ref] = st
}

func (p *pulls) update(ref string, now images.Progress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if st, ok := p.m[ref]; ok {
		st.Progress = now
		p.m[ref] = st
	}
}

func (p *pulls) end(ref string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.m[ref]
	if st.n--; st.n <= 0 {
		delete(p.m, ref)
		return
	}
	p.m[ref] = st
}

func (p *pulls) list() []images.Progress {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]images.Progress, 0, len(p.m))
	for _, ref := range slices.Sorted(maps.Keys(p.m)) {
		out = append(out, p.m[ref].Progress)
	}
	return out
}

// imageName checks an image reference of a request.
func imageName(spec *runtimeapi.ImageSpec) (string, error) {
	name := spec.GetImage()
	switch {
	case name == "":
		return "", invalid("image.image is missing")
	case len(name) > maxPath || strings.ContainsAny(name, "\x00\n "):
		return "", invalid("image.image %q: no image reference", clip(name))
	}
	return name, nil
}

// PullImage fetches an image and returns its id.
func (s *Service) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	name, err := imageName(r.GetImage())
	if err != nil {
		return nil, err
	}
	s.pulls.begin(name)
	defer s.pulls.end(name)
	img, err := s.images.Pull(ctx, name, r.GetAuth(), func(p images.Progress) { s.pulls.update(name, p) })
	if err != nil {
		return nil, err // which names the image
	}
	s.log.Info("image pulled", "image", name, "id", img.ID)
	return &runtimeapi.PullImageResponse{ImageRef: img.ID}, nil
}

// ImageStatus returns an image, or no image when there is none.
func (s *Service) ImageStatus(ctx context.Context, r *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	name, err := imageName(r.GetImage())
	if err != nil {
		return nil, err
	}
	img, err := s.images.Get(ctx, name)
	if errdefs.IsNotFound(err) {
		return &runtimeapi.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ImageStatusResponse{Image: criImage(img)}
	if r.GetVerbose() {
		if resp.Info, err = infoMap(map[string]any{"chainID": img.ID, "imageSpec": img.Config}); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// criImage is an image as the CRI shows it. The user of its config is a
// number in uid, or a name.
func criImage(img *images.Image) *runtimeapi.Image {
	out := &runtimeapi.Image{
		Id: img.ID, RepoTags: img.RepoTags, RepoDigests: img.RepoDigests,
		Size: uint64(max(img.Size, 0)), Pinned: img.Pinned,
		Spec: &runtimeapi.ImageSpec{Image: img.ID, Annotations: img.Config.Config.Labels},
	}
	user, _, _ := strings.Cut(img.Config.Config.User, ":")
	if n, err := strconv.ParseInt(user, 10, 64); err == nil {
		out.Uid = &runtimeapi.Int64Value{Value: n}
	} else {
		out.Username = user
	}
	return out
}

// ListImages returns all images, or the one of the filter.
func (s *Service) ListImages(ctx context.Context, r *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	list, err := s.listImages(ctx, r.GetFilter())
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ListImagesResponse{Images: list}, nil
}

func (s *Service) listImages(ctx context.Context, f *runtimeapi.ImageFilter) ([]*runtimeapi.Image, error) {
	if name := f.GetImage().GetImage(); name != "" {
		img, err := s.images.Get(ctx, name)
		if errdefs.IsNotFound(err) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		return []*runtimeapi.Image{criImage(img)}, nil
	}
	list, err := s.images.List(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]*runtimeapi.Image, 0, len(list))
	for _, img := range list {
		out = append(out, criImage(img))
	}
	return out, nil
}

// RemoveImage drops an image; an unknown one is fine.
func (s *Service) RemoveImage(ctx context.Context, r *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	name, err := imageName(r.GetImage())
	if err != nil {
		return nil, err
	}
	if err := s.images.Remove(ctx, name); err != nil && !errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("remove image %q: %w", clip(name), err)
	}
	return &runtimeapi.RemoveImageResponse{}, nil
}

// ImageFsInfo returns what images and writable layers take. Both are in the
// image store's file system.
func (s *Service) ImageFsInfo(ctx context.Context, _ *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	u, err := s.images.FsInfo(ctx)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ImageFsInfoResponse{
		ImageFilesystems: []*runtimeapi.FilesystemUsage{u}, ContainerFilesystems: []*runtimeapi.FilesystemUsage{u},
	}, nil
}
