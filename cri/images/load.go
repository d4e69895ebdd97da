package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"

	cimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
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

// Unloaded is an image of an archive that could not be loaded, and why.
type Unloaded struct {
	Name string // or digest, where it has none
	Err  error
}

// LoadError lists what of an archive could not be loaded; the rest was.
type LoadError struct{ Images []Unloaded }

func (e *LoadError) Error() string {
	var parts []string
	for _, u := range e.Images {
		parts = append(parts, "image "+u.Name+": "+u.Err.Error())
	}
	return strings.Join(parts, "; ")
}

func (e *LoadError) Unwrap() []error {
	errs := make([]error, 0, len(e.Images))
	for _, u := range e.Images {
		errs = append(errs, u.Err)
	}
	return errs
}

// Load reads a tar, plain or compressed with gzip or zstd: an OCI layout, or
// what docker save writes. It returns the images, with their names; an image
// for which neither the archive nor o has a name is known by its id alone.
//
// Images that cannot be loaded do not keep others from it: those are returned
// beside a *LoadError that lists these.
//
// Errors: errdefs.ErrInvalidArgument (not such an archive, or refused:
// ErrHostile), ErrDataLoss (digest mismatch), ErrFailedPrecondition (not for
// this platform), ErrResourceExhausted (no space).
func (s *Store) Load(ctx context.Context, r io.Reader, o LoadOptions) (loaded []*Image, err error) {
	defer func() {
		var not *LoadError
		if !errors.As(err, &not) {
			err = forPeople(err)
		}
	}()
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
	l, release := s.lease(false)
	defer s.kickGC() // what of the archive is no image's
	defer release()

	plain, err := decompress(r)
	if err != nil {
		return nil, fmt.Errorf("load: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	defer plain.Close()
	a, err := s.readArchive(ctx, l, &capped{ctx: ctx, r: plain, left: s.cfg.Limits.ArchiveSize})
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("load: %w", diskFull(err))
	}
	entries, not, err := a.images(ctx)
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	groups, more, err := groupByName(entries, override, o.Name != "")
	not = append(not, more...)
	if err == nil && len(groups)+len(not) == 0 {
		err = fmt.Errorf("the archive has no image: %w", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	for _, g := range groups {
		img, err := s.loadOne(ctx, l, a, g, o.Progress)
		switch {
		case err == nil:
			loaded = append(loaded, img)
		case ctx.Err() != nil:
			return loaded, fmt.Errorf("load: image %s: %w", g, context.Cause(ctx))
		default:
			not = append(not, Unloaded{g.String(), diskFull(err)})
		}
	}
	for i := range not {
		not[i].Err = forPeople(not[i].Err)
	}
	if len(not) > 0 {
		return loaded, &LoadError{not}
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

// groupByName puts the platforms of an image together. Entries whose name is of
// no use are returned apart.
func groupByName(list []ocispec.Descriptor, override target, overridden bool) (groups []archived, not []Unloaded, err error) {
	for _, d := range list {
		name, err := nameOf(d, override, overridden)
		if err != nil {
			not = append(not, Unloaded{d.Digest.String(), err})
			continue
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
	for i := range groups {
		named := groups[i].entries
		if overridden && groups[i].name == override && len(named) > 1 && slices.ContainsFunc(named, func(d ocispec.Descriptor) bool { return d.Platform == nil && d.Digest != named[0].Digest }) {
			return nil, nil, fmt.Errorf("the archive has several images without a name, %s cannot be the name of all: %w", override, errdefs.ErrInvalidArgument)
		}
	}
	return groups, not, nil
}

// nameOf an entry; zero: none.
func nameOf(d ocispec.Descriptor, override target, overridden bool) (target, error) {
	full, bare := entryName(d)
	switch {
	case full != "":
		return parseReference(full)
	case overridden && bare != "":
		return parseReference(override.repo + ":" + bare)
	case overridden:
		return override, nil
	}
	return target{}, nil
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
func (s *Store) loadOne(ctx context.Context, l *lease, from *imageArchive, a archived, progress func(Progress)) (*Image, error) {
	p := &pull{watchers: map[int]func(Progress){}, now: Progress{Ref: a.String(), Stage: stageResolving}}
	defer p.watch(progress)()
	desc := a.entries[0]
	if len(a.entries) > 1 || desc.Platform != nil {
		var err error
		if desc, err = s.choose("index.json", a.entries); err != nil {
			return nil, err
		}
	}
	r, err := s.assemble(ctx, l, stored{s, from.lacks}, desc, p)
	if err != nil {
		return nil, err
	}
	if a.name.repo != "" {
		if a.name.tag != "" {
			r.Tags = []string{a.name.String()}
		}
		if from.genuine {
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

// stored is the source of a Load: everything is in the content store. lacks
// says why something is not.
type stored struct {
	s     *Store
	lacks func(digest.Digest) error
}

func (f stored) blob(ctx context.Context, desc ocispec.Descriptor, have *atomic.Int64, moved func()) error {
	ok, err := f.s.haveBlob(ctx, desc)
	if err != nil {
		return err
	}
	if !ok {
		return f.lacks(desc.Digest)
	}
	have.Store(desc.Size)
	moved()
	return nil
}

// errTooLarge is more than an archive may hold.
var errTooLarge = fmt.Errorf("archive is larger than allowed: %w", ErrHostile)

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
		return 0, errTooLarge
	}
	n, err := c.r.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	return n, err
}
