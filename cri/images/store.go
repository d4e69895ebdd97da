package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/volumes/tree"
)

// Store is the node's image store. Its methods may be called at once from
// many goroutines. Errors are of the kinds of github.com/containerd/errdefs.
type Store struct {
	cfg     Config
	log     *slog.Logger
	content content.Store
	lock    *os.File // flock on the directory

	layersDir, imagesDir, snapshotsDir, quarantineDir, idmapDir, trashDir string

	unpackSlots *semaphore.Weighted
	raceAfter   time.Duration
	givenUpTTL  time.Duration
	gcRetry     time.Duration

	records sync.Mutex // serialises changes of records on disk

	mu         sync.RWMutex
	images     map[digest.Digest]*record
	names      map[string]digest.Digest // every tag and digest reference
	layers     map[digest.Digest]layer  // unpacked and complete, by chain
	bare       map[string]struct{}      // layers that only snapshots need, by directory
	unsynced   map[digest.Digest]int64  // unpacked, perhaps not on disk yet; which unpacking of it, by number
	unpackings map[unpackKey]*unpacking
	unpacked   chan struct{}              // closed, and replaced, when a layer comes to layers
	fetches    map[digest.Digest][]*fetch // oldest first
	pulls      map[pullKey]*pull
	imports    map[string]struct{} // ingests of Load under way
	leases     map[*lease]struct{}
	snapshots  map[string]snapshot
	orphans    map[digest.Digest]orphan // blobs that no record vouches for: of pulls that did not end well
	keys       map[string]*keyLock

	gc         collector
	trashed    atomic.Int64 // names the next one in trash
	unfinished atomic.Int64 // bytes of layers that are being unpacked
	usage      *tree.Meter

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// dropProbes removes what the content library leaves when it is killed while it
// tries out whether the file system has fs-verity.
func (s *Store) dropProbes() error {
	root, err := os.OpenRoot(filepath.Join(s.cfg.Dir, "content"))
	if err != nil {
		return fmt.Errorf("image store: %w", err)
	}
	defer root.Close()
	probes, err := fs.Glob(root.FS(), ".fsverity-check-*")
	if err != nil {
		return fmt.Errorf("image store: content: %w", err)
	}
	for _, p := range probes {
		if err := root.RemoveAll(p); err != nil {
			return fmt.Errorf("image store: content: %w", err)
		}
	}
	return nil
}

// Open makes or opens the store in cfg.Dir. One process can have it open at a
// time (errdefs.ErrUnavailable). Damaged records are put into quarantine.
func Open(ctx context.Context, cfg Config) (_ *Store, err error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	s := &Store{
		cfg:           cfg,
		log:           cfg.Log,
		layersDir:     filepath.Join(cfg.Dir, "layers"),
		imagesDir:     filepath.Join(cfg.Dir, "images"),
		snapshotsDir:  filepath.Join(cfg.Dir, "snapshots"),
		quarantineDir: filepath.Join(cfg.Dir, "quarantine"),
		idmapDir:      filepath.Join(cfg.Dir, "idmap"),
		trashDir:      filepath.Join(cfg.Dir, "trash"),
		unpackSlots:   semaphore.NewWeighted(int64(cfg.MaxConcurrentUnpacks)),
		images:        map[digest.Digest]*record{},
		names:         map[string]digest.Digest{},
		layers:        map[digest.Digest]layer{},
		bare:          map[string]struct{}{},
		unsynced:      map[digest.Digest]int64{},
		unpackings:    map[unpackKey]*unpacking{},
		unpacked:      make(chan struct{}),
		raceAfter:     raceAfter,
		givenUpTTL:    givenUpTTL,
		gcRetry:       gcRetry,
		fetches:       map[digest.Digest][]*fetch{},
		pulls:         map[pullKey]*pull{},
		imports:       map[string]struct{}{},
		leases:        map[*lease]struct{}{},
		snapshots:     map[string]snapshot{},
		orphans:       map[digest.Digest]orphan{},
		keys:          map[string]*keyLock{},
	}
	// Names in trash and of unfinished directories do not meet those of the
	// last run.
	s.trashed.Store(time.Now().UnixNano())
	forwardLogs(cfg.Log)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.gc.init()
	s.usage = tree.NewMeter(cfg.Log, s.measureSnapshot)
	defer func() {
		if err != nil {
			s.cancel()
		}
	}()
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("image store: %w", err)
	}
	s.lock, err = os.OpenFile(filepath.Join(cfg.Dir, "lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("image store: %w", err)
	}
	defer func() {
		if err != nil {
			s.lock.Close()
		}
	}()
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("image store %s is in use by another process (%v): %w", cfg.Dir, err, errdefs.ErrUnavailable)
	}
	for _, d := range []string{s.layersDir, s.imagesDir, s.snapshotsDir, s.quarantineDir, s.idmapDir, s.trashDir, filepath.Join(cfg.Dir, "content"), filepath.Join(cfg.Dir, "content", "blobs", "sha256"), filepath.Join(cfg.Dir, "content", "ingest")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("image store: %w", err)
		}
	}
	if err := s.dropMapped(); err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(cfg.Dir, &st); err == nil && st.Type == unix.OVERLAYFS_SUPER_MAGIC {
		s.log.Warn("image store is on overlayfs, which cannot hold a container's writable layer: put it on ext4, xfs, btrfs or tmpfs", "dir", cfg.Dir)
	}
	spread(s.snapshotsDir)
	spread(s.layersDir)
	if err := s.dropProbes(); err != nil {
		return nil, err
	}
	if s.content, err = local.NewStore(filepath.Join(cfg.Dir, "content")); err != nil {
		return nil, fmt.Errorf("image store: content: %w", err)
	}
	if err := s.loadRecords(ctx); err != nil {
		return nil, err
	}
	if err := s.loadSnapshots(); err != nil {
		return nil, err
	}
	if err := s.loadLayers(ctx); err != nil {
		return nil, err
	}
	if err := s.loadBlobs(ctx); err != nil {
		return nil, err
	}
	s.wg.Go(s.collectLoop)
	s.wg.Go(func() { s.usage.Run(s.ctx) })
	return s, nil
}

// enter begins work that Close ends and waits for.
func (s *Store) enter(ctx context.Context) (_ context.Context, leave func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil {
		return nil, nil, fmt.Errorf("image store is closed: %w", errdefs.ErrUnavailable)
	}
	s.wg.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.ctx, cancel)
	return ctx, func() { stop(); cancel(); s.wg.Done() }, nil
}

// Close ends what runs in the background, also pulls and loads, and lets go of
// the directory. Mounts stay.
func (s *Store) Close() error {
	s.mu.Lock()
	s.cancel()
	s.mu.Unlock()
	s.wg.Wait()
	return s.lock.Close()
}

// loadLayers looks at the layers' directories. Those that no record and no
// snapshot vouches for go: an unfinished pull's, perhaps torn by a power cut.
// Images whose layers are missing are unpacked again from their blobs.
func (s *Store) loadLayers(ctx context.Context) error {
	dir, err := os.Open(s.layersDir)
	if err != nil {
		return fmt.Errorf("layers: %w", err)
	}
	names, err := dir.Readdirnames(-1)
	dir.Close()
	if err != nil {
		return fmt.Errorf("layers: %w", err)
	}
	missing := map[string]digest.Digest{}
	for chain := range s.layers {
		missing[layerID(chain)] = chain
	}
	_, used, _ := s.inUse()
	for _, n := range names {
		if _, ok := missing[n]; ok {
			delete(missing, n)
			continue
		}
		if _, ok := used[n]; ok {
			if n != emptyLayer && n != voidLayer {
				s.bare[n] = struct{}{}
			}
			continue
		}
		if err := os.Rename(filepath.Join(s.layersDir, n), s.trash("layer")); err != nil {
			return fmt.Errorf("unfinished layer: %w", err)
		}
	}
	for _, n := range []string{emptyLayer, voidLayer} {
		if err := os.Mkdir(filepath.Join(s.layersDir, n), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("layers: %w", err)
		}
	}
	for _, chain := range missing {
		delete(s.layers, chain)
	}
	for id, r := range s.images {
		if !slices.ContainsFunc(r.Layers, func(l layer) bool { _, ok := missing[layerID(l.Chain)]; return ok }) {
			continue
		}
		if err := s.unpackAgain(ctx, r); err != nil {
			if ctx.Err() != nil {
				return err
			}
			s.log.Warn("image lacks layers and cannot be unpacked again, put aside: pull or load it again", "image", id, "names", r.names(), "error", err)
			if err := s.quarantine(s.recordPath(id)); err != nil {
				return err
			}
			s.forget(id)
			continue
		}
		s.log.Warn("image lacked layers, unpacked again", "image", id, "names", r.names())
	}
	return nil
}

// unpackAgain restores the layers of a recorded image from its blobs.
func (s *Store) unpackAgain(ctx context.Context, r *record) error {
	l, release := s.lease(false)
	defer release()
	p := &pull{}
	gone := func(d digest.Digest) error { return fmt.Errorf("blob %s: %w", d, errdefs.ErrNotFound) }
	again, err := s.assemble(ctx, l, stored{s, gone}, r.Manifest, p)
	if err != nil {
		return err
	}
	if again.ID != r.ID {
		return fmt.Errorf("manifest %s leads to image %s: %w", r.Manifest.Digest, again.ID, errdefs.ErrDataLoss)
	}
	return nil
}

// loadBlobs notes which blobs no record vouches for: they may be torn, and
// are hashed before they are used.
func (s *Store) loadBlobs(ctx context.Context) error {
	used := map[digest.Digest]struct{}{}
	for _, r := range s.images {
		for d := range r.blobs {
			used[d] = struct{}{}
		}
	}
	return s.content.Walk(ctx, func(i content.Info) error {
		if _, ok := used[i.Digest]; !ok {
			s.orphans[i.Digest] = orphan{unchecked: true}
		}
		return nil
	})
}

// orphan is a blob that no record names.
type orphan struct {
	unchecked bool // found at Open: hash it before use
}

// lease keeps blobs and layers that no record names yet from being collected.
type lease struct {
	all    bool // everything: who looks at all
	blobs  map[digest.Digest]struct{}
	chains map[digest.Digest]struct{}
}

// importing names a new ingest, which the collector spares until done.
func (s *Store) importing() (ref string, done func()) {
	ref = fmt.Sprintf("import-%d", s.trashed.Add(1))
	s.mu.Lock()
	s.imports[ref] = struct{}{}
	s.mu.Unlock()
	return ref, func() {
		s.mu.Lock()
		delete(s.imports, ref)
		s.mu.Unlock()
	}
}

// lease returns a new lease and what gives it back.
func (s *Store) lease(all bool) (*lease, func()) {
	l := &lease{all: all, blobs: map[digest.Digest]struct{}{}, chains: map[digest.Digest]struct{}{}}
	s.mu.Lock()
	s.leases[l] = struct{}{}
	s.mu.Unlock()
	return l, func() {
		s.mu.Lock()
		delete(s.leases, l)
		s.mu.Unlock()
	}
}

func (s *Store) hold(l *lease, blobs []digest.Digest, chains []digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range blobs {
		l.blobs[d] = struct{}{}
	}
	for _, c := range chains {
		l.chains[c] = struct{}{}
	}
}

// spread asks ext4 to place each directory below dir in a block group of its
// own, as it does below a file system's root (chattr +T). Without it all of
// them share one group, and there ext4 looks through every inode that was
// deleted in the last five seconds before it takes a new one (recently_deleted
// in fs/ext4/ialloc.c): after a burst of removals each mkdir costs 0.5 ms.
// Other file systems have no such flag, and no such need.
func spread(dir string) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	if err == nil && flags&fsTopdir == 0 {
		_ = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags|fsTopdir)
	}
}

// fsTopdir is FS_TOPDIR_FL of linux/fs.h.
const fsTopdir = 0x00020000
