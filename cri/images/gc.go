package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/volumes/tree"
)

// collector is the background garbage collector's state.
type collector struct {
	mu   sync.Mutex // one collection at a time
	kick chan struct{}
}

func (c *collector) init() { c.kick = make(chan struct{}, 1) }

const (
	// gcDelay lets a burst of removals become one collection.
	gcDelay = 200 * time.Millisecond
	// gcLatest is how long a burst without end may put it off.
	gcLatest = 2 * time.Second
	// gcRetry is when a collection that came upon an error is tried again: the
	// disk may have had trouble, and nobody else may ever ask.
	gcRetry = time.Minute
)

func (s *Store) kickGC() {
	select {
	case s.gc.kick <- struct{}{}:
	default:
	}
}

// collectLoop collects soon after something was removed, and when what an
// interrupted pull left is older than PartialTTL. Idle, it costs nothing.
func (s *Store) collectLoop() {
	timer := time.NewTimer(gcDelay) // what the last run left
	defer timer.Stop()
	first := time.Now() // kick that waits; zero: none does
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.gc.kick:
			if first.IsZero() {
				first = time.Now()
			}
			timer.Reset(min(gcDelay, time.Until(first.Add(gcLatest))))
			continue
		case <-timer.C:
		}
		first = time.Time{}
		next, err := s.collect(s.ctx, s.cfg.PartialTTL)
		if err != nil && s.ctx.Err() == nil {
			s.log.Warn("image garbage collection is incomplete, tried again", "error", err)
			if next == 0 || next > s.gcRetry {
				next = s.gcRetry
			}
		}
		if next > 0 {
			timer.Reset(next)
		}
	}
}

// GarbageCollect frees at once everything that no image, snapshot or running
// pull needs, also what interrupted pulls have left for their next attempt.
func (s *Store) GarbageCollect(ctx context.Context) error {
	ctx, leave, err := s.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	_, err = s.collect(ctx, 0)
	return err
}

// collect frees what nothing needs. What interrupted pulls left is kept until
// it is older than ttl; next says when that will be (0: nothing is kept).
func (s *Store) collect(ctx context.Context, ttl time.Duration) (next time.Duration, err error) {
	s.gc.mu.Lock()
	defer s.gc.mu.Unlock()

	// Under mu: what is in use, and what of the rest may go. A pull adds to
	// its lease before it looks for a blob, and to layers only what it holds.
	s.mu.Lock()
	blobs, dirs, all := s.inUse()
	var errs []error
	layers := 0
	for chain := range s.layers {
		id := layerID(chain)
		if _, ok := dirs[id]; ok || all {
			continue
		}
		// A rename is quick, and frees the name at once.
		if err := os.Rename(s.layerPath(chain), s.trash(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
			continue
		}
		layers++
		delete(s.layers, chain)
		delete(s.unsynced, chain)
	}
	for id := range s.bare {
		if _, ok := dirs[id]; ok || all {
			continue
		}
		if err := os.Rename(filepath.Join(s.layersDir, id), s.trash(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
			continue
		}
		layers++
		delete(s.bare, id)
	}
	s.mu.Unlock()

	if !all {
		n, err := s.collectBlobs(ctx, blobs, ttl, &next)
		errs = append(errs, err)
		if n+layers > 0 {
			s.log.Info("image garbage collected", "blobs", n, "layers", layers)
		}
		errs = append(errs, s.collectIngests(ctx, ttl, &next))
	} // else a Verify is under way, and kicks when it ends
	errs = append(errs, s.emptyTrash(ctx))
	return next, errors.Join(errs...)
}

// inUse returns the blobs that records and leases need, and the layers'
// directories that these and snapshots need. The caller holds s.mu.
func (s *Store) inUse() (blobs map[digest.Digest]struct{}, dirs map[string]struct{}, all bool) {
	blobs, dirs = map[digest.Digest]struct{}{}, map[string]struct{}{emptyLayer: {}, voidLayer: {}}
	for _, r := range s.images {
		for d := range r.blobs {
			blobs[d] = struct{}{}
		}
		for _, id := range r.lowers {
			dirs[id] = struct{}{}
		}
	}
	for _, sn := range s.snapshots {
		for _, id := range sn.lowers {
			dirs[id] = struct{}{}
		}
	}
	for l := range s.leases {
		all = all || l.all
		for d := range l.blobs {
			blobs[d] = struct{}{}
		}
		for c := range l.chains {
			dirs[layerID(c)] = struct{}{}
		}
	}
	return blobs, dirs, all
}

func (s *Store) collectBlobs(ctx context.Context, used map[digest.Digest]struct{}, ttl time.Duration, next *time.Duration) (n int, err error) {
	now := time.Now()
	var garbage []digest.Digest
	err = s.content.Walk(ctx, func(i content.Info) error {
		if _, ok := used[i.Digest]; ok {
			return nil
		}
		s.mu.RLock()
		_, orphan := s.orphans[i.Digest]
		s.mu.RUnlock()
		if orphan && keep(now, i.CreatedAt, ttl, next) {
			return nil
		}
		garbage = append(garbage, i.Digest)
		return nil
	})
	for _, d := range garbage {
		// Looked up again, and moved away in one go: a pull may have come to
		// want it. The deletion itself can take long and comes later.
		s.mu.Lock()
		blobs, _, all := s.inUse()
		if _, ok := blobs[d]; !ok && !all {
			if rerr := os.Rename(s.blobPath(d), s.trash(d.Encoded())); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
				err = errors.Join(err, rerr)
			} else {
				n++
				delete(s.orphans, d)
			}
		}
		s.mu.Unlock()
	}
	return n, err
}

func (s *Store) blobPath(d digest.Digest) string {
	return filepath.Join(s.cfg.Dir, "content", "blobs", d.Algorithm().String(), d.Encoded())
}

// trash returns a fresh name in the directory that every collection empties.
func (s *Store) trash(name string) string {
	return filepath.Join(s.trashDir, fmt.Sprintf("%s-%d", name, s.trashed.Add(1)))
}

// keep decides whether something of an interrupted pull stays, and notes when
// to look again.
func keep(now, since time.Time, ttl time.Duration, next *time.Duration) bool {
	left := ttl - now.Sub(since)
	if ttl == 0 || left <= 0 {
		return false
	}
	if *next == 0 || left < *next {
		*next = left
	}
	return true
}

// collectIngests drops downloads that nobody carries on: those of pulls when
// they are older than ttl, what a Load has left (its names say nothing about
// its content) and torn ones at once.
func (s *Store) collectIngests(ctx context.Context, ttl time.Duration, next *time.Duration) error {
	root := s.ingestDir()
	entries, err := os.ReadDir(root)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	now := time.Now()
	for _, e := range entries {
		dir := filepath.Join(root, e.Name())
		ref, err := os.ReadFile(filepath.Join(dir, "ref"))
		if err == nil && strings.HasPrefix(string(ref), ingestPrefix) {
			if st, err := os.Stat(filepath.Join(dir, "data")); err == nil && keep(now, st.ModTime(), ttl, next) {
				continue
			}
		}
		errs = append(errs, s.dropIngest(e.Name()))
	}
	return errors.Join(errs...)
}

// dropIngest moves an ingest away unless somebody writes it: fetches and imports
// are entered under mu before they open theirs. One that has ended since it was
// listed is gone.
func (s *Store) dropIngest(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ingesting(name) {
		return nil
	}
	err := os.Rename(filepath.Join(s.ingestDir(), name), s.trash(name))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

func (s *Store) ingestDir() string { return filepath.Join(s.cfg.Dir, "content", "ingest") }

// dropPartial frees what a pull has brought that nobody else wants: it is not
// carried on.
func (s *Store) dropPartial(blobs map[digest.Digest]struct{}) error {
	s.mu.Lock()
	used, _, _ := s.inUse()
	for d := range blobs {
		if _, ok := used[d]; !ok {
			delete(s.orphans, d) // the collector does the rest
		}
	}
	s.mu.Unlock()
	defer s.kickGC()
	entries, err := os.ReadDir(s.ingestDir())
	errs := []error{err}
	for _, e := range entries {
		dir := filepath.Join(s.ingestDir(), e.Name())
		ref, err := os.ReadFile(filepath.Join(dir, "ref"))
		d, _, ok := strings.Cut(strings.TrimPrefix(string(ref), ingestPrefix), "@")
		if _, mine := blobs[digest.Digest(d)]; err != nil || !ok || !mine {
			continue
		}
		errs = append(errs, s.dropIngest(e.Name()))
	}
	return errors.Join(errs...)
}

// ingesting tells whether somebody writes the ingest that has this directory.
// The caller holds s.mu.
func (s *Store) ingesting(dir string) bool {
	is := func(ref string) bool { return digest.FromString(ref).Encoded() == dir }
	for ref := range s.imports {
		if is(ref) {
			return true
		}
	}
	for _, list := range s.fetches {
		if slices.ContainsFunc(list, func(f *fetch) bool { return is(f.ref) }) {
			return true
		}
	}
	return false
}

// emptyTrash deletes what was moved out of the way: trees that containers have
// made, of any depth and width.
func (s *Store) emptyTrash(ctx context.Context) error {
	fd, err := unix.Open(s.trashDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: s.trashDir, Err: err}
	}
	defer unix.Close(fd)
	if err := tree.Clear(ctx, fd); err != nil {
		return fmt.Errorf("empty %s: %w", s.trashDir, err)
	}
	return nil
}
