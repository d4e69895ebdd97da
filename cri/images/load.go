package images

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"

	cimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// LoadOptions of Store.Load.
type LoadOptions struct {
	// Name for the image if the archive has one image and no name for it; a
	// bare tag in the archive is added to it.
	Name string
	// Progress may be nil; it must return soon.
	Progress func(Progress)
}

// Load reads a tar, plain or compressed with gzip or zstd: an OCI layout, or
// what docker save writes. It returns the images, with their names; an image
// for which neither the archive nor o has a name is known by its id alone.
//
// Errors: errdefs.ErrInvalidArgument (not such an archive, or refused:
// ErrHostile), ErrDataLoss (digest mismatch), ErrFailedPrecondition (not for
// this platform).
func (s *Store) Load(ctx context.Context, r io.Reader, o LoadOptions) ([]*Image, error) {
	var override target
	if o.Name != "" {
		var err error
		if override, err = parseReference(o.Name); err != nil {
			return nil, err
		}
	}
	ctx, leave, err := s.enter(ctx)
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	defer leave()
	s.loading.Lock()
	defer s.loading.Unlock()
	l, release := s.lease(true)
	defer s.kickGC() // what of the archive is no image's
	defer release()

	plain, err := decompress(r)
	if err != nil {
		return nil, fmt.Errorf("load: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	defer plain.Close()
	a, err := s.readArchive(ctx, &capped{ctx: ctx, r: plain, left: s.cfg.Limits.ArchiveSize})
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("load: %w", diskFull(err))
	}
	entries, err := a.images(ctx)
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	groups, err := groupByName(entries, override, o.Name != "")
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	var loaded []*Image
	for _, g := range groups {
		img, err := s.loadOne(ctx, l, a.genuine, g, o.Progress)
		if err != nil {
			return loaded, fmt.Errorf("load: image %s: %w", g, diskFull(err))
		}
		loaded = append(loaded, img)
	}
	return loaded, nil
}

// archived is one image of an archive: one entry per platform.
type archived struct {
	name    target // zero: none
	entries []ocispec.Descriptor
}

func (a archived) String() string {
	if a.name.repo == "" {
		return a.entries[0].Digest.String()
	}
	return a.name.String()
}

func groupByName(list []ocispec.Descriptor, override target, overridden bool) ([]archived, error) {
	var groups []archived
	for _, d := range list {
		var name target
		full, bare := entryName(d)
		switch {
		case full != "":
			t, err := parseReference(full)
			if err != nil {
				return nil, err
			}
			name = t
		case overridden && bare != "":
			t, err := parseReference(override.repo + ":" + bare)
			if err != nil {
				return nil, err
			}
			name = t
		case overridden:
			name = override
		}
		same := func(g archived) bool {
			return g.name == name && (name.repo != "" || g.entries[0].Platform != nil && d.Platform != nil)
		}
		if i := slices.IndexFunc(groups, same); i >= 0 {
			groups[i].entries = append(groups[i].entries, d)
		} else {
			groups = append(groups, archived{name: name, entries: []ocispec.Descriptor{d}})
		}
	}
	if len(groups) == 0 {
		return nil, fmt.Errorf("the archive has no image: %w", errdefs.ErrInvalidArgument)
	}
	for i := range groups {
		named := groups[i].entries
		if overridden && groups[i].name == override && len(named) > 1 && slices.ContainsFunc(named, func(d ocispec.Descriptor) bool { return d.Platform == nil && d.Digest != named[0].Digest }) {
			return nil, fmt.Errorf("the archive has several images without a name, %s cannot be the name of all: %w", override, errdefs.ErrInvalidArgument)
		}
	}
	return groups, nil
}

// entryName reads the annotations of an index entry: a whole reference, or a
// bare tag (the OCI layout leaves the repository to whoever reads it).
func entryName(d ocispec.Descriptor) (full, tag string) {
	if n := d.Annotations[cimages.AnnotationImageName]; n != "" {
		return n, ""
	}
	n := d.Annotations[ocispec.AnnotationRefName]
	if strings.ContainsAny(n, "/:@") {
		return n, ""
	}
	return "", n
}

// loadOne takes an image from what the archive has left in the content store.
// genuine: its manifest is the one that registries know.
func (s *Store) loadOne(ctx context.Context, l *lease, genuine bool, a archived, progress func(Progress)) (*Image, error) {
	p := &pull{watchers: map[int]func(Progress){}, now: Progress{Ref: a.String(), Stage: stageResolving}}
	defer p.watch(progress)()
	desc := a.entries[0]
	if len(a.entries) > 1 {
		var err error
		if desc, err = s.choose("index.json", a.entries); err != nil {
			return nil, err
		}
	}
	r, err := s.assemble(ctx, l, stored{s}, desc, p)
	if err != nil {
		return nil, err
	}
	if a.name.repo != "" {
		if a.name.tag != "" {
			r.Tags = []string{a.name.String()}
		}
		if genuine {
			r.Digests = []string{a.name.repo + "@" + desc.Digest.String()}
		}
	}
	if r, err = s.commit(r); err != nil {
		return nil, err
	}
	p.change(func(now *Progress) { now.Stage = stageDone })
	s.log.Info("image loaded", "ref", a.String(), "id", r.ID, "bytes", r.size, "layers", len(r.Layers))
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.image(r), nil
}

// stored is the source of a Load: everything is in the content store.
type stored struct{ s *Store }

func (f stored) blob(ctx context.Context, desc ocispec.Descriptor, have *atomic.Int64, moved func()) error {
	ok, err := f.s.haveBlob(ctx, desc)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("the archive lacks blob %s: %w", desc.Digest, errdefs.ErrInvalidArgument)
	}
	have.Store(desc.Size)
	moved()
	return nil
}

// capped ends an archive that is larger than allowed, and one whose reader has
// lost interest.
type capped struct {
	ctx  context.Context
	r    io.Reader
	left int64
}

func (c *capped) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	if c.left <= 0 {
		return 0, fmt.Errorf("archive is larger than allowed: %w", ErrHostile)
	}
	n, err := c.r.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	return n, err
}
