package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	cimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Stages of a pull, as Progress.Stage has them.
const (
	stageResolving   = "resolving"
	stageDownloading = "downloading"
	stageUnpacking   = "unpacking"
	stageDone        = "done"
)

// pullKey tells which pulls are the same.
type pullKey struct {
	ref  string
	auth authKey
}

// pull is one pull under way and all who wait for it.
type pull struct {
	done   chan struct{}
	img    *Image
	err    error
	cancel context.CancelCauseFunc

	waiters int // guarded by Store.mu; with the last one the pull is given up

	mu       sync.Mutex
	watchers map[int]func(Progress)
	next     int
	now      Progress
	sent     time.Time
	blobs    []*atomic.Int64 // bytes of each blob that are here
}

// Pull fetches ref from its registry, unpacks it and returns it. Calls for the
// same ref with the same credentials join. When ctx ends and nobody else waits,
// the pull is given up, and what came of it goes soon; when the registry or the
// network fails, it is kept for the next attempt for Config.PartialTTL. progress may be nil; it is called from one goroutine at a
// time, must return soon and must not call the store.
//
// Errors: errdefs.ErrInvalidArgument (reference, or an image that is refused:
// ErrHostile), ErrNotFound, ErrUnauthenticated, ErrPermissionDenied,
// ErrResourceExhausted (rate limit), ErrUnavailable (unreachable, stalled),
// ErrDataLoss (digest mismatch), ErrFailedPrecondition (not for this platform).
func (s *Store) Pull(ctx context.Context, ref string, auth *runtimeapi.AuthConfig, progress func(Progress)) (*Image, error) {
	t, err := parseReference(ref)
	if err != nil {
		return nil, err
	}
	// Credentials are part of the key: joining must not give an image to
	// somebody whom the registry would refuse.
	key := pullKey{t.String(), authKeyOf(auth)}

	s.mu.Lock()
	if s.ctx.Err() != nil {
		s.mu.Unlock()
		return nil, fmt.Errorf("pull %s: image store is closed: %w", t, errdefs.ErrUnavailable)
	}
	p := s.pulls[key]
	if p == nil {
		pctx, cancel := context.WithCancelCause(s.ctx)
		p = &pull{done: make(chan struct{}), cancel: cancel, watchers: map[int]func(Progress){}, now: Progress{Ref: t.String(), Stage: stageResolving}}
		s.pulls[key] = p
		s.wg.Go(func() {
			defer cancel(nil)
			r, err := s.pull(pctx, t, auth, p)
			s.mu.Lock()
			if s.pulls[key] == p {
				delete(s.pulls, key)
			}
			if err == nil {
				p.img = s.image(r)
			}
			p.err = err
			s.mu.Unlock()
			close(p.done)
		})
	}
	p.waiters++
	s.mu.Unlock()

	unwatch := p.watch(progress)
	defer unwatch()
	select {
	case <-p.done:
		if p.err != nil {
			return nil, p.err
		}
		img := *p.img
		return &img, nil
	case <-ctx.Done():
		s.mu.Lock()
		p.waiters--
		last := p.waiters == 0
		if last && s.pulls[key] == p {
			delete(s.pulls, key) // nobody may join it any more
		}
		s.mu.Unlock()
		if last {
			p.cancel(context.Cause(ctx))
			<-p.done
		}
		return nil, fmt.Errorf("pull %s: given up: %w", t, context.Cause(ctx))
	}
}

// Pulling returns the progress of every pull under way.
func (s *Store) Pulling() []Progress {
	s.mu.RLock()
	running := slices.Collect(maps.Values(s.pulls))
	s.mu.RUnlock()
	list := make([]Progress, 0, len(running))
	for _, p := range running {
		p.mu.Lock()
		list = append(list, p.snapshot())
		p.mu.Unlock()
	}
	slices.SortFunc(list, func(a, b Progress) int { return strings.Compare(a.Ref, b.Ref) })
	return list
}

func (p *pull) watch(f func(Progress)) (unwatch func()) {
	if f == nil {
		return func() {}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next++
	n := p.next
	p.watchers[n] = f
	f(p.snapshot())
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.watchers, n)
	}
}

func (p *pull) snapshot() Progress {
	now := p.now
	for _, b := range p.blobs {
		now.Bytes += b.Load()
	}
	return now
}

// change alters the progress and tells the watchers.
func (p *pull) change(f func(*Progress)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(&p.now)
	p.tell()
}

// moved is called for every piece that arrives; watchers hear of it ten times
// a second.
func (p *pull) moved() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.watchers) > 0 && time.Since(p.sent) > 100*time.Millisecond {
		p.tell()
	}
}

func (p *pull) tell() {
	p.sent = time.Now()
	now := p.snapshot()
	for _, f := range p.watchers {
		f(now)
	}
}

func (p *pull) blob() *atomic.Int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := new(atomic.Int64)
	p.blobs = append(p.blobs, b)
	return b
}

// source is where an image's blobs come from: a registry, or nowhere when a
// Load has put them into the content store already.
type source interface {
	blob(ctx context.Context, desc ocispec.Descriptor, have *atomic.Int64, moved func()) error
}

type remote struct {
	s    *Store
	reg  *registry
	auth authKey
	top  digest.Digest // what the reference names
	// slots bound the transfers of this pull. There is no bound over all
	// pulls: three slow ones would block every other.
	slots *semaphore.Weighted

	mu sync.Mutex
	// from asks the hosts from the skip-th on. The fetcher goes on to the next
	// host where one refuses; hosts that answer, and badly, are skipped here.
	from remotes.Fetcher
	skip int
}

func (r *remote) blob(ctx context.Context, desc ocispec.Descriptor, have *atomic.Int64, moved func()) error {
	for {
		from, skip, err := r.hosts(ctx)
		if err != nil {
			return err
		}
		err = r.s.fetchBlob(ctx, from, origin{r.reg.ref.host, r.auth, skip}, r.slots, desc, have, moved)
		if refused(err) && r.reg.logIn(ctx) {
			continue
		}
		if errdefs.IsNotFound(err) && desc.Digest == r.top {
			// Some have manifests by their tags only.
			if d, raw, merr := r.reg.manifest(ctx, desc.Digest); merr == nil {
				return r.s.putManifest(ctx, d, raw)
			}
		}
		if err == nil || ctx.Err() != nil || !(errors.Is(err, errWrong) || transient(err)) {
			return err
		}
		if more, e := r.next(skip); e != nil || !more {
			return errors.Join(err, e)
		}
		r.s.log.Warn("a host serves bad content, the next one is asked", "ref", r.reg.ref.String(), "blob", desc.Digest, "error", err)
	}
}

// refused tells whether the registry answered that there is nothing for us.
func refused(err error) bool {
	var status remoteerrors.ErrUnexpectedStatus
	return errdefs.IsNotFound(err) || errors.As(err, &status) && (status.StatusCode == http.StatusUnauthorized || status.StatusCode == http.StatusForbidden)
}

// hosts returns the fetcher in use and how many hosts it leaves out.
func (r *remote) hosts(ctx context.Context) (remotes.Fetcher, int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.from == nil {
		var err error
		if r.from, err = r.reg.fetcher(ctx, r.skip); err != nil {
			return nil, 0, err
		}
	}
	return r.from, r.skip, nil
}

// next leaves out one host more than skip, for all blobs to come: more is
// false when none is left.
func (r *remote) next(skip int) (more bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.skip > skip {
		return true, nil // another blob has found out
	}
	n, err := r.reg.pullHosts()
	if err != nil || skip+1 >= n {
		return false, err
	}
	r.skip, r.from = skip+1, nil
	return true, nil
}

func (s *Store) pull(ctx context.Context, t target, auth *runtimeapi.AuthConfig, p *pull) (*record, error) {
	reg, err := s.registry(ctx, t, auth)
	if err != nil {
		return nil, fmt.Errorf("pull %s: %w", t, err)
	}
	defer reg.close()
	return s.pullFrom(ctx, reg, auth, p)
}

func (s *Store) pullFrom(ctx context.Context, reg *registry, auth *runtimeapi.AuthConfig, p *pull) (_ *record, err error) {
	defer func() { err = forPeople(err) }()
	began, t := time.Now(), reg.ref
	l, release := s.lease(false)
	defer release()

	desc, raw, err := reg.resolve(ctx)
	if err != nil {
		return nil, reg.explain(ctx, "resolve", &remoteError{err})
	}
	if raw != nil {
		s.hold(l, []digest.Digest{desc.Digest}, nil)
		if err := s.putManifest(ctx, desc, raw); err != nil {
			return nil, fmt.Errorf("pull %s: %w", t, diskFull(err))
		}
	}
	names := &record{Digests: []string{t.repo + "@" + desc.Digest.String()}}
	if t.tag != "" {
		names.Tags = []string{t.String()}
	}
	from := &remote{s: s, reg: reg, auth: authKeyOf(auth), top: desc.Digest, slots: semaphore.NewWeighted(int64(s.cfg.MaxConcurrentDownloads))}
	r, err := s.assemble(ctx, l, from, desc, p)
	if err != nil {
		s.abandon(l)
		release()
		s.unwanted(ctx, l, err)
		return nil, reg.explain(ctx, "fetch", err)
	}
	r.Tags, r.Digests = names.Tags, names.Digests
	if r, err = s.commit(r); err != nil {
		return nil, fmt.Errorf("pull %s: %w", t, err)
	}
	p.change(func(now *Progress) { now.Stage = stageDone })
	s.log.Info("image pulled", "ref", t.String(), "id", r.ID, "bytes", r.size, "layers", len(r.Layers), "took", time.Since(began))
	return r, nil
}

// givenUpTTL is how long what a pull has brought is kept when nobody waits for
// it any more: long enough for a daemon that ends to have ended, and for its
// next run to go on.
const givenUpTTL = 10 * time.Second

// unwanted frees what a failed pull has brought where nobody will carry it on:
// at once where the disk is full, soon where the pull was given up.
func (s *Store) unwanted(ctx context.Context, l *lease, err error) {
	drop := func() {
		if err := s.dropPartial(l.blobs); err != nil {
			s.log.Warn("what a pull has left takes space for longer", "error", err)
		}
	}
	switch {
	case errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT):
		drop()
	case ctx.Err() != nil && s.ctx.Err() == nil:
		time.AfterFunc(s.givenUpTTL, func() {
			if _, leave, err := s.enter(context.Background()); err == nil {
				defer leave()
				drop()
			}
		})
	}
}

// abandon notes what a failed pull leaves behind, and has it collected when
// its time has come.
func (s *Store) abandon(l *lease) {
	s.mu.Lock()
	defer s.mu.Unlock()
	recorded := map[digest.Digest]struct{}{}
	for _, r := range s.images {
		for d := range r.blobs {
			recorded[d] = struct{}{}
		}
	}
	for d := range l.blobs {
		if _, ok := recorded[d]; ok {
			continue
		}
		if _, ok := s.orphans[d]; !ok {
			s.orphans[d] = orphan{}
		}
	}
	s.kickGC()
}

// assemble brings the image that desc leads to into the store, up to but
// without its record and names.
func (s *Store) assemble(ctx context.Context, l *lease, from source, desc ocispec.Descriptor, p *pull) (*record, error) {
	r := &record{Version: recordVersion, Created: time.Now().UTC()}
	m, err := s.manifest(ctx, l, from, desc, r, 0)
	if err != nil {
		return nil, err
	}
	if m.Config.Size > s.cfg.Limits.ConfigSize {
		return nil, fmt.Errorf("image config %s has %d bytes, at most %d are allowed: %w", m.Config.Digest, m.Config.Size, s.cfg.Limits.ConfigSize, ErrHostile)
	}
	if n := len(m.Layers); n > s.cfg.Limits.Layers {
		return nil, fmt.Errorf("image has %d layers, at most %d are allowed: %w", n, s.cfg.Limits.Layers, ErrHostile)
	}
	if err := s.checkLayers(m.Layers); err != nil {
		return nil, err
	}
	raw, err := s.small(ctx, l, from, m.Config)
	if err != nil {
		return nil, err
	}
	r.ID, r.Config = m.Config.Digest, m.Config.Size
	if r.config, err = parseConfig(raw, len(m.Layers)); err != nil {
		return nil, err
	}

	var total int64
	var blobs []digest.Digest
	for i, d := range m.Layers {
		blobs = append(blobs, d.Digest)
		total += d.Size
		r.Layers = append(r.Layers, layer{Blob: d.Digest, Size: d.Size, DiffID: r.config.RootFS.DiffIDs[i]})
	}
	chains := identity.ChainIDs(slices.Clone(r.config.RootFS.DiffIDs))
	for i := range r.Layers {
		r.Layers[i].Chain = chains[i]
	}
	s.hold(l, blobs, chains)
	if err := s.checkRoom(ctx, m.Layers); err != nil {
		return nil, err
	}
	p.change(func(now *Progress) {
		now.Stage, now.Layers, now.Total = stageDownloading, len(r.Layers), total
	})
	// Opened before the first write: syncfs then reports every error of writing
	// back since.
	fs, err := unix.Open(s.layersDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: s.layersDir, Err: err}
	}
	defer unix.Close(fs)
	if err := s.layersOf(ctx, from, m, r, chains, p); err != nil {
		return nil, err
	}
	return r, s.syncLayers(fs, chains)
}

// checkLayers looks at what a manifest says of its layers.
func (s *Store) checkLayers(layers []ocispec.Descriptor) error {
	var total int64
	for _, d := range layers {
		switch {
		case strings.Contains(d.MediaType, "encrypted"):
			return fmt.Errorf("layer %s is encrypted (%s), which podd does not support: %w", d.Digest, clip(d.MediaType), errdefs.ErrNotImplemented)
		case strings.HasSuffix(d.MediaType, "json"):
			return fmt.Errorf("layer %s is a %s: this is a signature or another document about an image, not a container image: %w", d.Digest, clip(d.MediaType), errdefs.ErrFailedPrecondition)
		}
		// One that is compressed to no less is no reason to take more.
		if d.Size > s.cfg.Limits.UnpackedSize-total {
			return fmt.Errorf("layers of more than %d bytes, which is what an image may unpack to (layer %s has %d): %w", s.cfg.Limits.UnpackedSize, d.Digest, d.Size, ErrHostile)
		}
		total += d.Size
	}
	return nil
}

// checkRoom compares what is still to be fetched with the space that is free.
// Nothing is reserved: a pull that never ends would keep it from others.
func (s *Store) checkRoom(ctx context.Context, layers []ocispec.Descriptor) error {
	missing := map[digest.Digest]int64{}
	for _, d := range layers {
		if _, err := s.content.Info(ctx, d.Digest); errdefs.IsNotFound(err) {
			missing[d.Digest] = d.Size
		}
	}
	var need int64
	for _, n := range missing {
		need += n
	}
	if need == 0 {
		return nil
	}
	partial, err := s.content.ListStatuses(ctx)
	if err == nil {
		for _, st := range partial {
			for d := range missing {
				if strings.HasPrefix(st.Ref, ingestPrefix+d.String()+"@") {
					need -= min(st.Offset, missing[d])
				}
			}
		}
	}
	return s.roomFor(need, "the image's layers")
}

// roomFor says whether bytes could be written now.
func (s *Store) roomFor(need int64, what string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.cfg.Dir, &st); err != nil {
		return fmt.Errorf("image store: %w", &os.PathError{Op: "statfs", Path: s.cfg.Dir, Err: err})
	}
	if free := int64(st.Bavail) * st.Bsize; need > free {
		return fmt.Errorf("%s take %d bytes, and %d are free: %w", what, need, free, unix.ENOSPC)
	}
	return nil
}

// layersOf downloads and unpacks all layers, each as soon as it is there.
func (s *Store) layersOf(ctx context.Context, from source, m *ocispec.Manifest, r *record, chains []digest.Digest, p *pull) error {
	g, ctx := errgroup.WithContext(ctx)
	b := &budget{limits: s.cfg.Limits}
	// Of one image no more are unpacked at once than of all: an image of many
	// layers has no larger share than others.
	slots := semaphore.NewWeighted(int64(s.cfg.MaxConcurrentUnpacks))
	var downloaded atomic.Int64
	for i := range r.Layers {
		have := p.blob()
		g.Go(func() error {
			if err := from.blob(ctx, m.Layers[i], have, p.moved); err != nil {
				return err
			}
			if int(downloaded.Add(1)) == len(r.Layers) {
				p.change(func(now *Progress) { now.Stage = stageUnpacking })
			}
			parents := slices.Clone(chains[:i])
			slices.Reverse(parents)
			l, err := s.unpackedLayer(ctx, r.Layers[i], parents, slots, b)
			if err != nil {
				return err
			}
			r.Layers[i] = l
			p.change(func(now *Progress) { now.LayersDone++ })
			return nil
		})
	}
	return g.Wait()
}

// syncLayers puts unpacked layers on disk for good, all with one syncfs.
func (s *Store) syncLayers(fs int, chains []digest.Digest) error {
	pending := s.toSync(chains)
	if pending == nil {
		return nil
	}
	if !s.cfg.NoSync {
		if err := unix.Syncfs(fs); err != nil {
			return fmt.Errorf("sync layers: %w", err)
		}
	}
	s.synced(pending)
	return nil
}

// toSync returns what a sync now puts on disk; nil: none of chains needs one.
func (s *Store) toSync(chains []digest.Digest) map[digest.Digest]int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if !slices.ContainsFunc(chains, func(c digest.Digest) bool { _, ok := s.unsynced[c]; return ok }) {
		return nil
	}
	return maps.Clone(s.unsynced)
}

// synced notes that pending is on disk. A layer that was collected and unpacked
// again meanwhile is not.
func (s *Store) synced(pending map[digest.Digest]int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c, n := range pending {
		if s.unsynced[c] == n {
			delete(s.unsynced, c)
		}
	}
}

// manifest reads the manifest that desc is or leads to through an index.
func (s *Store) manifest(ctx context.Context, l *lease, from source, desc ocispec.Descriptor, r *record, depth int) (*ocispec.Manifest, error) {
	if depth > 3 {
		return nil, fmt.Errorf("index %s: nested deeper than 3: %w", desc.Digest, ErrHostile)
	}
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("manifest digest %q: %v: %w", clip(string(desc.Digest)), err, ErrHostile)
	}
	if desc.Size < 0 || desc.Size > s.cfg.Limits.ManifestSize {
		return nil, fmt.Errorf("manifest %s has %d bytes, at most %d are allowed: %w", desc.Digest, desc.Size, s.cfg.Limits.ManifestSize, ErrHostile)
	}
	if !cimages.IsManifestType(desc.MediaType) && !cimages.IsIndexType(desc.MediaType) {
		// A registry that says something vague: its content decides below, but
		// the fetcher must ask for a manifest.
		desc.MediaType = ocispec.MediaTypeImageManifest
	}
	raw, err := s.small(ctx, l, from, desc)
	if err != nil {
		return nil, err
	}
	var doc struct {
		SchemaVersion int                   `json:"schemaVersion"`
		MediaType     string                `json:"mediaType"`
		Manifests     *[]ocispec.Descriptor `json:"manifests"`
		Layers        *[]ocispec.Descriptor `json:"layers"`
		Config        *ocispec.Descriptor   `json:"config"`
		FSLayers      json.RawMessage       `json:"fsLayers"`
	}
	if isWebPage(raw) {
		return nil, fmt.Errorf("manifest %s: %w", desc.Digest, errWebPage)
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return nil, fmt.Errorf("manifest %s is no JSON document, so this is no container image (%v): %w", desc.Digest, err, ErrHostile)
	}
	switch {
	case doc.FSLayers != nil:
		return nil, fmt.Errorf("manifest %s is Docker schema 1, which registries gave up: push the image again with a current tool: %w", desc.Digest, errdefs.ErrNotImplemented)
	case doc.Manifests != nil && (doc.Layers != nil || doc.Config != nil):
		// One document, two meanings (CVE-2021-41190).
		return nil, fmt.Errorf("manifest %s is both an index and a manifest: %w", desc.Digest, ErrHostile)
	case doc.Manifests != nil:
		r.Indexes = append(r.Indexes, desc.Digest)
		chosen, err := s.choose("index "+desc.Digest.String(), *doc.Manifests)
		if err != nil {
			return nil, err
		}
		return s.manifest(ctx, l, from, chosen, r, depth+1)
	case doc.Config == nil:
		return nil, fmt.Errorf("manifest %s has no config: not a container image: %w", desc.Digest, ErrHostile)
	}
	switch doc.Config.MediaType {
	case ocispec.MediaTypeImageConfig, cimages.MediaTypeDockerSchema2Config, "application/octet-stream", "":
	default:
		return nil, fmt.Errorf("manifest %s holds %q: not a container image: %w", desc.Digest, clip(doc.Config.MediaType), errdefs.ErrFailedPrecondition)
	}
	m := &ocispec.Manifest{Config: *doc.Config}
	if doc.Layers != nil {
		m.Layers = *doc.Layers
	}
	for _, d := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		if err := d.Digest.Validate(); err != nil || d.Size < 0 {
			return nil, fmt.Errorf("manifest %s: descriptor %q of %d bytes is invalid: %w", desc.Digest, clip(string(d.Digest)), d.Size, ErrHostile)
		}
	}
	r.Manifest = ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}
	return m, nil
}

// choose picks the manifest of this platform from an index.
func (s *Store) choose(index string, list []ocispec.Descriptor) (ocispec.Descriptor, error) {
	match := platforms.Only(*s.cfg.Platform)
	var best *ocispec.Descriptor
	var have []string
	for i := range list {
		d := &list[i]
		if isAttestation(*d) {
			continue
		}
		if d.Platform == nil {
			if best == nil {
				best = d
			}
			continue
		}
		have = append(have, platforms.Format(*d.Platform))
		if !match.Match(*d.Platform) {
			continue
		}
		if best == nil || best.Platform == nil || match.Less(*d.Platform, *best.Platform) {
			best = d
		}
	}
	if best == nil && len(have) == 0 {
		return ocispec.Descriptor{}, fmt.Errorf("%s has no image: %w", index, errdefs.ErrFailedPrecondition)
	}
	if best == nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s has no image for %s, only for %s: %w", index, platforms.Format(*s.cfg.Platform), clip(strings.Join(have, ", ")), errdefs.ErrFailedPrecondition)
	}
	return *best, nil
}

// small fetches and reads a manifest or config; its size is checked already.
func (s *Store) small(ctx context.Context, l *lease, from source, desc ocispec.Descriptor) ([]byte, error) {
	s.hold(l, []digest.Digest{desc.Digest}, nil)
	if err := from.blob(ctx, desc, new(atomic.Int64), func() {}); err != nil {
		return nil, err
	}
	raw, err := content.ReadBlob(ctx, s.content, desc)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	return raw, nil
}
