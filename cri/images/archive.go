package images

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	cimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxArchiveFiles bounds the files of an archive that Load reads: each becomes
// a blob. An image has some hundred at most.
const maxArchiveFiles = 20_000

// imageArchive is what Load has read: the blobs are in the content store, the
// small documents in memory.
type imageArchive struct {
	s       *Store
	lease   *lease
	in      *capped
	blobs   map[string]ocispec.Descriptor // by name in the archive
	useless map[string]error              // files that are no blobs of an image, and why, by name
	links   map[string]string             // symbolic links: docker save makes them for layers that images share
	layout  []byte                        // oci-layout
	index   []byte                        // index.json
	docker  []byte                        // manifest.json
	genuine bool                          // manifests are those of a registry, not made up here
}

func (s *Store) readArchive(ctx context.Context, l *lease, r *capped) (*imageArchive, error) {
	a := &imageArchive{s: s, lease: l, in: r, blobs: map[string]ocispec.Descriptor{}, useless: map[string]error{}, links: map[string]string{}}
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) && n > 0 {
			return a, nil
		}
		if err != nil {
			if errors.Is(err, ErrHostile) {
				return nil, err
			}
			return nil, fmt.Errorf("not an OCI layout or docker archive: %v: %w", noEOF(err), errdefs.ErrInvalidArgument)
		}
		if n >= maxArchiveFiles {
			return nil, fmt.Errorf("archive has more than %d files: %w", maxArchiveFiles, ErrHostile)
		}
		name := path.Clean(hdr.Name)
		switch hdr.Typeflag {
		case tar.TypeSymlink, tar.TypeLink:
			to := hdr.Linkname
			if hdr.Typeflag == tar.TypeSymlink {
				to = path.Join(path.Dir(name), to)
			}
			a.links[name] = path.Clean(to)
			continue
		case tar.TypeReg:
		default:
			continue
		}
		base := path.Base(name)
		switch {
		case name == ocispec.ImageLayoutFile:
			a.layout, err = a.document(tr, hdr)
		case name == ocispec.ImageIndexFile:
			a.index, err = a.document(tr, hdr)
		case name == "manifest.json":
			a.docker, err = a.document(tr, hdr)
		case name == "repositories", base == "VERSION", base == "json":
			// Docker's format before manifest.json; the same is said there.
		default:
			err = a.blob(ctx, tr, hdr, name)
		}
		if err != nil {
			return nil, err
		}
	}
}

func (a *imageArchive) document(r io.Reader, hdr *tar.Header) ([]byte, error) {
	if limit := a.s.cfg.Limits.ManifestSize; hdr.Size > limit {
		return nil, fmt.Errorf("archive: %s has %d bytes, at most %d are allowed: %w", clip(hdr.Name), hdr.Size, limit, ErrHostile)
	}
	raw, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("archive: %s: %w: %w", clip(hdr.Name), err, errdefs.ErrInvalidArgument)
	}
	return raw, nil
}

// blob puts a file into the content store. In an OCI layout its name is its
// digest and must be true. What cannot be of use is not written: an archive of
// something else must not fill the disk before that is found out.
func (a *imageArchive) blob(ctx context.Context, r io.Reader, hdr *tar.Header, name string) (err error) {
	var want digest.Digest
	if parts := strings.Split(name, "/"); len(parts) == 3 && parts[0] == "blobs" {
		want = digest.NewDigestFromEncoded(digest.Algorithm(parts[1]), parts[2])
		if err := want.Validate(); err != nil {
			a.useless[name] = fmt.Errorf("it is not named by a digest: %w", ErrHostile)
			return nil
		}
	}
	if sparse(hdr) {
		a.useless[name] = fmt.Errorf("it is a sparse file, which no blob is: %w", ErrHostile)
		return nil
	}
	// Announced is as good as sent: more cannot follow than the archive may hold.
	if hdr.Size > min(a.in.left, a.s.cfg.Limits.UnpackedSize) {
		return fmt.Errorf("archive: %s has %d bytes: %w", clip(name), hdr.Size, errTooLarge)
	}
	head := make([]byte, min(hdr.Size, 512))
	if _, err := io.ReadFull(r, head); err != nil {
		return a.broken(ctx, name, err)
	}
	if !plausible(head, hdr.Size) {
		a.useless[name] = fmt.Errorf("it is neither JSON nor a tar archive, plain or compressed with gzip or zstd: %w", errdefs.ErrInvalidArgument)
		return nil
	}
	desc, err := a.write(ctx, io.MultiReader(bytes.NewReader(head), r), hdr.Size, want)
	switch {
	case errdefs.IsDataLoss(err):
		a.useless[name] = err
		return nil
	case err != nil:
		return fmt.Errorf("archive: %s: %w", clip(name), err)
	}
	a.blobs[name] = desc
	return nil
}

// broken is the error of an archive that cannot be read on.
func (a *imageArchive) broken(ctx context.Context, name string, err error) error {
	if errors.Is(err, ErrHostile) || ctx.Err() != nil {
		return err
	}
	return fmt.Errorf("archive: it ends within %s (%v): %w", clip(name), noEOF(err), errdefs.ErrInvalidArgument)
}

// plausible tells by its first bytes whether a file could be a layer, a config
// or a manifest.
func plausible(head []byte, size int64) bool {
	if gzipped(head) || zstdCompressed(head) {
		return true
	}
	if text := bytes.TrimLeft(head, " \t\r\n"); len(text) > 0 && (text[0] == '{' || text[0] == '[') {
		return true
	}
	if len(head) < 512 {
		return false
	}
	if bytes.Equal(head, zeros[:len(head)]) {
		return size <= maxPadding
	}
	_, err := tar.NewReader(bytes.NewReader(head)).Next()
	return !errors.Is(err, tar.ErrHeader)
}

// maxPadding of an archive without entries: programs write 1 to 20 blocks.
const maxPadding = 64 << 10

func (a *imageArchive) write(ctx context.Context, r io.Reader, size int64, want digest.Digest) (_ ocispec.Descriptor, err error) {
	if want != "" {
		a.s.hold(a.lease, []digest.Digest{want}, nil)
		desc := ocispec.Descriptor{Digest: want, Size: size}
		if ok, err := a.s.haveBlob(ctx, desc); ok || err != nil {
			return desc, err
		}
	}
	if err := a.s.roomFor(size, "the file's content"); err != nil {
		return ocispec.Descriptor{}, err
	}
	ref, done := a.s.importing()
	defer done()
	w, err := content.OpenWriter(ctx, a.s.content, content.WithRef(ref), content.WithDescriptor(ocispec.Descriptor{Digest: want, Size: size}))
	if errdefs.IsAlreadyExists(err) {
		desc := ocispec.Descriptor{Digest: want, Size: size}
		if ok, err := a.s.haveBlob(ctx, desc); ok || err != nil {
			return desc, err
		}
		return a.write(ctx, r, size, want) // it was damaged, and is gone now
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if _, err := copyBlob(w, r, 0, size, func(int64) {}); err != nil {
		var far *remoteError // reading, not writing
		if !errors.As(err, &far) || errors.Is(err, ErrHostile) || ctx.Err() != nil {
			return ocispec.Descriptor{}, err
		}
		return ocispec.Descriptor{}, fmt.Errorf("%v: %w", err, errdefs.ErrInvalidArgument)
	}
	got := w.Digest()
	if want != "" && got != want {
		return ocispec.Descriptor{}, fmt.Errorf("content has digest %s: %w", got, errdefs.ErrDataLoss)
	}
	a.s.hold(a.lease, []digest.Digest{got}, nil)
	desc := ocispec.Descriptor{Digest: got, Size: size}
	if err := w.Commit(ctx, size, got); err != nil {
		if !errdefs.IsAlreadyExists(err) {
			return ocispec.Descriptor{}, err
		}
		if ok, err := a.s.haveBlob(ctx, desc); !ok || err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("blob %s was damaged, load again: %w", got, errors.Join(err, errdefs.ErrUnavailable))
		}
	}
	return desc, nil
}

// find returns the blob of a name, through links.
func (a *imageArchive) find(name string) (ocispec.Descriptor, error) {
	name = path.Clean(name)
	for range 8 {
		if d, ok := a.blobs[name]; ok {
			return d, nil
		}
		to, ok := a.links[name]
		if !ok {
			break
		}
		name = to
	}
	if why := a.useless[name]; why != nil {
		return ocispec.Descriptor{}, fmt.Errorf("the archive's %q is of no use: %w", clip(name), why)
	}
	return ocispec.Descriptor{}, fmt.Errorf("manifest.json names %q, which is not there: %w", clip(name), errdefs.ErrInvalidArgument)
}

// lacks says why a blob is not there.
func (a *imageArchive) lacks(d digest.Digest) error {
	if why := a.useless[path.Join("blobs", d.Algorithm().String(), d.Encoded())]; why != nil {
		return fmt.Errorf("the archive's blob %s is of no use: %w", d, why)
	}
	return fmt.Errorf("the archive lacks blob %s: %w", d, errdefs.ErrInvalidArgument)
}

// images returns an entry per image, platform and name, and the images that
// cannot have one.
func (a *imageArchive) images(ctx context.Context) ([]ocispec.Descriptor, []Unloaded, error) {
	var saved []dockerSaved
	if a.docker != nil {
		if err := json.Unmarshal(a.docker, &saved); err != nil {
			return nil, nil, fmt.Errorf("archive: manifest.json: %v: %w", err, ErrHostile)
		}
	}
	if a.layout == nil || a.index == nil {
		if saved == nil {
			return nil, nil, fmt.Errorf("not an OCI layout or docker archive: there is neither oci-layout with index.json nor manifest.json: %w", errdefs.ErrInvalidArgument)
		}
		return a.fromDocker(ctx, saved)
	}
	var layout ocispec.ImageLayout
	if err := json.Unmarshal(a.layout, &layout); err != nil || layout.Version != ocispec.ImageLayoutVersion {
		return nil, nil, fmt.Errorf("archive: oci-layout has version %q, %s is supported: %w", clip(layout.Version), ocispec.ImageLayoutVersion, errdefs.ErrInvalidArgument)
	}
	var index ocispec.Index
	if err := json.Unmarshal(a.index, &index); err != nil {
		return nil, nil, fmt.Errorf("archive: index.json: %v: %w", err, ErrHostile)
	}
	a.genuine = true
	// docker save writes both formats, older ones with the names in the
	// second only.
	if len(index.Manifests) == 1 && len(saved) == 1 {
		if full, tag := entryName(index.Manifests[0]); full == "" && tag == "" && len(saved[0].RepoTags) > 0 {
			return named(index.Manifests[0], saved[0].RepoTags), nil, nil
		}
	}
	return a.withoutAttestations(index.Manifests), nil, nil
}

// withoutAttestations leaves out what is said about another image of the
// archive: it belongs to that one and is none itself.
func (a *imageArchive) withoutAttestations(list []ocispec.Descriptor) []ocispec.Descriptor {
	return slices.DeleteFunc(slices.Clone(list), func(d ocispec.Descriptor) bool {
		of := d.Annotations["vnd.docker.reference.digest"]
		if !isAttestation(d) || !slices.ContainsFunc(list, func(e ocispec.Descriptor) bool { return e.Digest.String() == of }) {
			return false
		}
		a.s.log.Debug("attestation in an archive is left out", "manifest", d.Digest, "of", of)
		return true
	})
}

func isAttestation(d ocispec.Descriptor) bool {
	return d.Annotations["vnd.docker.reference.type"] == "attestation-manifest"
}

// named repeats the entry for each of the names.
func named(d ocispec.Descriptor, names []string) []ocispec.Descriptor {
	if len(names) == 0 {
		return []ocispec.Descriptor{d}
	}
	var list []ocispec.Descriptor
	for _, n := range names {
		d.Annotations = map[string]string{cimages.AnnotationImageName: n}
		list = append(list, d)
	}
	return list
}

// dockerSaved is an entry of docker save's manifest.json.
type dockerSaved struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// fromDocker makes the manifests that the format lacks.
func (a *imageArchive) fromDocker(ctx context.Context, saved []dockerSaved) (list []ocispec.Descriptor, not []Unloaded, err error) {
	for _, sv := range saved {
		desc, err := a.fromSaved(ctx, sv)
		switch {
		case ctx.Err() != nil:
			return nil, nil, context.Cause(ctx)
		case err != nil:
			name := sv.Config
			if len(sv.RepoTags) > 0 {
				name = strings.Join(sv.RepoTags, ", ")
			}
			not = append(not, Unloaded{clip(name), err})
		default:
			list = append(list, named(desc, slices.Clone(sv.RepoTags))...)
		}
	}
	return list, not, nil
}

// fromSaved makes the manifest of one image.
func (a *imageArchive) fromSaved(ctx context.Context, sv dockerSaved) (ocispec.Descriptor, error) {
	config, err := a.find(sv.Config)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	config.MediaType = cimages.MediaTypeDockerSchema2Config
	m := struct {
		SchemaVersion int                  `json:"schemaVersion"`
		MediaType     string               `json:"mediaType"`
		Config        ocispec.Descriptor   `json:"config"`
		Layers        []ocispec.Descriptor `json:"layers"`
	}{2, cimages.MediaTypeDockerSchema2Manifest, config, []ocispec.Descriptor{}}
	if len(sv.Layers) > a.s.cfg.Limits.Layers {
		return ocispec.Descriptor{}, fmt.Errorf("image has %d layers, at most %d are allowed: %w", len(sv.Layers), a.s.cfg.Limits.Layers, ErrHostile)
	}
	for _, name := range sv.Layers {
		l, err := a.find(name)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		l.MediaType = cimages.MediaTypeDockerSchema2Layer // what it really is, its first bytes tell
		m.Layers = append(m.Layers, l)
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc, err := a.write(ctx, bytes.NewReader(raw), int64(len(raw)), digest.FromBytes(raw))
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("manifest of %s: %w", clip(sv.Config), err)
	}
	desc.MediaType = m.MediaType
	return desc, nil
}
