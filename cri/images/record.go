package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

const recordVersion = 1

// record is one image on disk. A record in memory is never changed, only
// replaced.
type record struct {
	Version  int                `json:"version"`
	ID       digest.Digest      `json:"id"`                // of the config
	Tags     []string           `json:"tags,omitempty"`    // "host/repo:tag"
	Digests  []string           `json:"digests,omitempty"` // "host/repo@sha256:…"
	Manifest ocispec.Descriptor `json:"manifest"`
	// Indexes are the multi-platform indexes that led to the manifest.
	Indexes []digest.Digest `json:"indexes,omitempty"`
	Config  int64           `json:"configSize"`
	Layers  []layer         `json:"layers"`
	Created time.Time       `json:"created"` // when this store got it

	config *ocispec.Image
	lowers []string // directories of the layers, uppermost first
	size   int64
}

func (r *record) clone() *record {
	c := *r
	c.Tags, c.Digests, c.Indexes = slices.Clone(r.Tags), slices.Clone(r.Digests), slices.Clone(r.Indexes)
	return &c
}

func (r *record) names() []string { return slices.Concat(r.Tags, r.Digests) }

// blobs that the image consists of.
func (r *record) blobs(yield func(digest.Digest) bool) {
	for _, d := range r.Indexes {
		if !yield(d) {
			return
		}
	}
	if !yield(r.Manifest.Digest) || !yield(r.ID) {
		return
	}
	for _, l := range r.Layers {
		if !yield(l.Blob) {
			return
		}
	}
}

// complete computes what is not on disk.
func (r *record) complete() {
	r.size = r.Manifest.Size + r.Config
	r.lowers = make([]string, len(r.Layers))
	for i, l := range r.Layers {
		r.size += l.Size + l.Bytes
		r.lowers[len(r.lowers)-1-i] = layerID(l.Chain)
	}
}

func (s *Store) image(r *record) *Image {
	pinned := slices.ContainsFunc(r.names(), func(n string) bool { return slices.Contains(s.cfg.Pinned, n) })
	return &Image{
		ID:          r.ID.String(),
		RepoTags:    slices.Clone(r.Tags),
		RepoDigests: slices.Clone(r.Digests),
		Size:        r.size,
		Pinned:      pinned,
		Config:      *r.config,
	}
}

func (s *Store) recordPath(id digest.Digest) string {
	return filepath.Join(s.imagesDir, id.Encoded()+".json")
}

// writeRecord replaces the image's record on disk. The caller holds s.records.
func (s *Store) writeRecord(r *record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("record of image %s: %w", r.ID, err)
	}
	return s.writeFile(s.recordPath(r.ID), data)
}

// writeFile writes path so that it is there whole or not at all, also after a
// power cut.
func (s *Store) writeFile(path string, data []byte) (err error) {
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(tmp)
		}
	}()
	_, err = f.Write(data)
	if err == nil && !s.cfg.NoSync {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return s.syncDir(filepath.Dir(path))
}

func (s *Store) syncDir(dir string) error {
	if s.cfg.NoSync {
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// loadRecords reads every record at Open. One that cannot be used is moved to
// quarantine, and the node goes on without that image; pulling it again finds
// its blobs.
func (s *Store) loadRecords(ctx context.Context) error {
	entries, err := os.ReadDir(s.imagesDir)
	if err != nil {
		return fmt.Errorf("image records: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(s.imagesDir, e.Name())
		if strings.HasSuffix(e.Name(), ".tmp") {
			if err := os.Remove(path); err != nil {
				return fmt.Errorf("image records: %w", err)
			}
			continue
		}
		r, err := s.readRecord(ctx, path)
		if err != nil {
			s.log.Warn("image record is damaged, put aside: pull or load the image again", "record", path, "quarantine", s.quarantineDir, "error", err)
			if err := s.quarantine(path); err != nil {
				return err
			}
			continue
		}
		s.install(r)
	}
	return nil
}

func (s *Store) readRecord(ctx context.Context, path string) (*record, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, 16<<20))
	if err != nil {
		return nil, err
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, err
	}
	if r.Version != recordVersion {
		return nil, fmt.Errorf("version %d is not known to this podd (it knows %d): %w", r.Version, recordVersion, errdefs.ErrFailedPrecondition)
	}
	if err := r.ID.Validate(); err != nil || filepath.Base(path) != r.ID.Encoded()+".json" {
		return nil, fmt.Errorf("id %q does not match the record's name", r.ID)
	}
	for d := range r.blobs {
		if err := d.Validate(); err != nil {
			return nil, fmt.Errorf("digest %q: %w", d, err)
		}
		if _, err := s.content.Info(ctx, d); err != nil {
			return nil, err
		}
	}
	for _, l := range r.Layers {
		if l.Chain.Validate() != nil || l.DiffID.Validate() != nil {
			return nil, fmt.Errorf("layer %s has an invalid digest", l.Blob)
		}
	}
	raw, err := content.ReadBlob(ctx, s.content, ocispec.Descriptor{Digest: r.ID, Size: r.Config})
	if err != nil {
		return nil, err
	}
	if digest.FromBytes(raw) != r.ID {
		return nil, fmt.Errorf("config %s does not have its digest: %w", r.ID, errdefs.ErrDataLoss)
	}
	if r.config, err = parseConfig(raw, len(r.Layers)); err != nil {
		return nil, err
	}
	r.complete()
	return &r, nil
}

// quarantine moves a broken file where it disturbs nobody and can be looked at.
func (s *Store) quarantine(path string) error {
	to := filepath.Join(s.quarantineDir, fmt.Sprintf("%s.%d", filepath.Base(path), time.Now().UnixNano()))
	if err := os.Rename(path, to); err != nil {
		return fmt.Errorf("put %s aside: %w", path, err)
	}
	return nil
}

// install makes r the image's record in memory.
func (s *Store) install(r *record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.images[r.ID]; old != nil {
		for _, n := range old.names() {
			if s.names[n] == r.ID {
				delete(s.names, n)
			}
		}
	}
	s.images[r.ID] = r
	for _, n := range r.names() {
		s.names[n] = r.ID
	}
	for _, l := range r.Layers {
		if _, ok := s.layers[l.Chain]; !ok {
			s.layers[l.Chain] = l
		}
	}
	for d := range r.blobs {
		delete(s.orphans, d)
	}
}

// commit makes the image known under names, taking them from whichever image
// has them now. What the record names must be on disk.
func (s *Store) commit(r *record) (*record, error) {
	r, err := s.commitRecord(r)
	if err == nil && s.cfg.Present != nil {
		s.cfg.Present(append(r.names(), r.ID.String()))
	}
	return r, err
}

func (s *Store) commitRecord(r *record) (*record, error) {
	s.records.Lock()
	defer s.records.Unlock()

	s.mu.RLock()
	old := s.images[r.ID]
	var losers []*record
	for _, n := range r.names() {
		if id, ok := s.names[n]; ok && id != r.ID {
			if l := s.images[id]; !slices.Contains(losers, l) {
				losers = append(losers, l)
			}
		}
	}
	s.mu.RUnlock()

	if old != nil {
		r = r.clone()
		r.Tags, r.Digests, r.Indexes = union(old.Tags, r.Tags), union(old.Digests, r.Digests), union(old.Indexes, r.Indexes)
		if len(losers) == 0 && len(r.Tags) == len(old.Tags) && len(r.Digests) == len(old.Digests) && len(r.Indexes) == len(old.Indexes) && r.Manifest.Digest == old.Manifest.Digest {
			return old, nil // pulled again: nothing is new
		}
	}
	// The new record first: a crash in between leaves a tag on two images,
	// and the newer one wins at Open.
	r.complete()
	if err := s.writeRecord(r); err != nil {
		return nil, fmt.Errorf("image %s: %w", r.ID, err)
	}
	for _, l := range losers {
		l = l.clone()
		taken := func(n string) bool { return slices.Contains(r.Tags, n) || slices.Contains(r.Digests, n) }
		l.Tags = slices.DeleteFunc(l.Tags, taken)
		l.Digests = slices.DeleteFunc(l.Digests, taken)
		if err := s.writeRecord(l); err != nil {
			return nil, fmt.Errorf("image %s, whose name is taken over: %w", l.ID, err)
		}
		s.install(l)
	}
	s.install(r)
	if old != nil || losers != nil {
		s.kickGC() // another manifest of the same image leaves blobs behind
	}
	return r, nil
}

func union[T comparable](a, b []T) []T {
	u := slices.Clone(a)
	for _, v := range b {
		if !slices.Contains(u, v) {
			u = append(u, v)
		}
	}
	return u
}

// lookup resolves an id, an unambiguous beginning of one, a tag or a digest
// reference. The caller holds s.mu.
func (s *Store) lookup(ref string) (*record, error) {
	if ref == "" {
		return nil, fmt.Errorf("image reference is empty: %w", errdefs.ErrInvalidArgument)
	}
	if id, err := digest.Parse(ref); err == nil {
		if r := s.images[id]; r != nil {
			return r, nil
		}
		return nil, fmt.Errorf("image %s: %w", ref, errdefs.ErrNotFound)
	}
	t, perr := parseReference(ref)
	if perr == nil {
		if id, ok := s.names[t.String()]; ok {
			return s.images[id], nil
		}
	}
	if p := idPrefix(ref); p != "" {
		var found *record
		for id, r := range s.images {
			if !strings.HasPrefix(id.Encoded(), p) {
				continue
			}
			if found != nil {
				return nil, fmt.Errorf("image id %q is ambiguous, give more of it: %w", ref, errdefs.ErrInvalidArgument)
			}
			found = r
		}
		if found != nil {
			return found, nil
		}
		return nil, fmt.Errorf("image %q: %w", ref, errdefs.ErrNotFound)
	}
	if perr != nil {
		return nil, perr
	}
	return nil, fmt.Errorf("image %s: %w", t, errdefs.ErrNotFound)
}

// Get resolves an id (whole, or an unambiguous beginning of at least three
// digits), a tag or a digest reference. The result's Config is shared: read only.
func (s *Store) Get(ctx context.Context, ref string) (*Image, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r, err := s.lookup(ref)
	if err != nil {
		return nil, err
	}
	return s.image(r), nil
}

// List returns all images, by id. Their Config is shared: read only.
func (s *Store) List(ctx context.Context) ([]*Image, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	list := make([]*Image, 0, len(s.images))
	for _, r := range s.images {
		list = append(list, s.image(r))
	}
	slices.SortFunc(list, func(a, b *Image) int { return strings.Compare(a.ID, b.ID) })
	return list, nil
}

// Remove drops a tag or digest reference; with the last one, or when ref is
// the image's id, the image goes. Snapshots on it stay usable; the layers they
// need are freed with the last of them.
func (s *Store) Remove(ctx context.Context, ref string) error {
	s.records.Lock()
	defer s.records.Unlock()
	s.mu.RLock()
	r, err := s.lookup(ref)
	name := ""
	if err == nil {
		if t, perr := parseReference(ref); perr == nil && s.names[t.String()] == r.ID {
			name = t.String()
		}
	}
	s.mu.RUnlock()
	if err != nil {
		return err
	}
	r = r.clone()
	if name != "" {
		r.Tags = slices.DeleteFunc(r.Tags, func(n string) bool { return n == name })
		r.Digests = slices.DeleteFunc(r.Digests, func(n string) bool { return n == name })
		if repo, tag, ok := cutTag(name); ok && tag != "" && !slices.ContainsFunc(r.Tags, func(n string) bool { return strings.HasPrefix(n, repo+":") }) {
			// The digest that came along with the repository's last tag goes with it.
			r.Digests = slices.DeleteFunc(r.Digests, func(n string) bool { return strings.HasPrefix(n, repo+"@") })
		}
	}
	if name != "" && len(r.Tags)+len(r.Digests) > 0 {
		if err := s.writeRecord(r); err != nil {
			return fmt.Errorf("image %s: %w", ref, err)
		}
		s.install(r)
		s.log.Info("image untagged", "ref", ref, "id", r.ID)
		return nil
	}
	if err := os.Remove(s.recordPath(r.ID)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	s.forget(r.ID)
	s.kickGC()
	s.log.Info("image removed", "ref", ref, "id", r.ID)
	return s.syncDir(s.imagesDir)
}

// forget drops the image from memory.
func (s *Store) forget(id digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.images[id]
	if r == nil {
		return
	}
	for _, n := range r.names() {
		if s.names[n] == id {
			delete(s.names, n)
		}
	}
	delete(s.images, id)
}

// cutTag splits a normalised "repo:tag"; ok is false for digest references.
func cutTag(name string) (repo, tag string, ok bool) {
	if strings.Contains(name, "@") {
		return "", "", false
	}
	i := strings.LastIndexByte(name, ':')
	return name[:i], name[i+1:], true
}
