package images

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/hex"
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
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
)

// layer of an image, as its record has it.
type layer struct {
	Blob   digest.Digest `json:"blob"`   // compressed, in the content store
	Size   int64         `json:"size"`   // of the blob
	DiffID digest.Digest `json:"diffID"` // of the uncompressed archive
	Chain  digest.Digest `json:"chain"`  // of this layer and all below: what is unpacked under
	Bytes  int64         `json:"bytes"`  // unpacked, on disk
	Inodes int64         `json:"inodes"`
}

// layerID names the directory of a chain. 120 bits of the digest keep the name
// at 20 bytes, so that the option string of an overlay mount (one page) has
// room for 127 layers. It may start with a dash: it is never an argument of a
// command.
func layerID(chain digest.Digest) string {
	raw, err := hex.DecodeString(chain.Encoded())
	if err != nil || len(raw) < 15 {
		return "invalid" // digests are validated where they come in
	}
	return base64.RawURLEncoding.EncodeToString(raw[:15])
}

func (s *Store) layerPath(chain digest.Digest) string {
	return filepath.Join(s.layersDir, layerID(chain))
}

// unpacking is one layer under way. Those who need the same wait for done.
type unpacking struct {
	done chan struct{}
	info layer
	err  error
}

// unpackKey is what may be waited for: the same bytes for the same chain.
// Another image may say that other bytes unpack to this chain.
type unpackKey struct{ chain, blob digest.Digest }

// turn is a layer's place among those that are unpacked at once: one of its
// pull's, then one of the store's. The latter is offered to others now and
// then, so that a huge layer slows others down and does not stop them.
type turn struct {
	pull, store *semaphore.Weighted
	held        bool
	since       time.Time
}

// turnLength is long against the change of a turn, and short for who waits.
const turnLength = 100 * time.Millisecond

func (t *turn) take(ctx context.Context) error {
	if err := t.pull.Acquire(ctx, 1); err != nil {
		return context.Cause(ctx)
	}
	if err := t.store.Acquire(ctx, 1); err != nil {
		t.pull.Release(1)
		return context.Cause(ctx)
	}
	t.held, t.since = true, time.Now()
	return nil
}

// offer lets others go first who wait, when this turn has been long enough.
func (t *turn) offer(ctx context.Context) error {
	if !t.held || time.Since(t.since) < turnLength {
		return nil
	}
	t.store.Release(1)
	if err := t.store.Acquire(ctx, 1); err != nil {
		t.held = false
		t.pull.Release(1)
		return context.Cause(ctx)
	}
	t.since = time.Now()
	return nil
}

func (t *turn) leave() {
	if t.held {
		t.held = false
		t.store.Release(1)
		t.pull.Release(1)
	}
}

// unpackedLayer returns the layer of the chain, unpacking it unless it is
// there. parents are the chains below, nearest first, which the same pull or
// another one brings. Errors of others are not inherited: with those one's own
// attempt follows.
func (s *Store) unpackedLayer(ctx context.Context, l layer, parents []digest.Digest, slots *semaphore.Weighted, b *budget) (layer, error) {
	key := unpackKey{l.Chain, l.Blob}
	alone := false // waiting for another has been of no use
	for {
		have, u := s.layerOrUnpacking(key)
		if have != nil {
			l.Bytes, l.Inodes = have.Bytes, have.Inodes
			return l, nil
		}
		if u != nil && !alone {
			select {
			case <-u.done:
			case <-ctx.Done():
				return layer{}, context.Cause(ctx)
			}
			alone = u.err != nil
			continue
		}
		t := &turn{pull: slots, store: s.unpackSlots}
		if err := t.take(ctx); err != nil {
			return layer{}, err
		}
		// Entered with a turn: who has none, and may not get one, is not to be
		// waited for.
		u, ok := s.beginUnpacking(key, alone)
		if !ok {
			t.leave()
			continue
		}
		u.info, u.err = s.unpackLayer(ctx, l, parents, t, b)
		t.leave()
		s.endUnpacking(key, u)
		return u.info, u.err
	}
}

func (s *Store) layerOrUnpacking(key unpackKey) (*layer, *unpacking) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if l, ok := s.layers[key.chain]; ok {
		return &l, nil
	}
	return nil, s.unpackings[key]
}

// beginUnpacking enters one, unless there is one or it is done already; alone
// begins one beside it.
func (s *Store) beginUnpacking(key unpackKey, alone bool) (*unpacking, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, done := s.layers[key.chain]; done {
		return nil, false
	}
	u := &unpacking{done: make(chan struct{})}
	if s.unpackings[key] == nil {
		s.unpackings[key] = u
	} else if !alone {
		return nil, false
	}
	return u, true
}

func (s *Store) endUnpacking(key unpackKey, u *unpacking) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unpackings[key] == u {
		delete(s.unpackings, key)
	}
	if u.err == nil {
		if _, done := s.layers[key.chain]; !done {
			s.layers[key.chain] = u.info
		}
		s.unsynced[key.chain] = s.trashed.Add(1)
		close(s.unpacked)
		s.unpacked = make(chan struct{})
	}
	close(u.done)
}

// awaitLayers waits until all chains are unpacked, whoever does it.
func (s *Store) awaitLayers(ctx context.Context, chains []digest.Digest) error {
	for {
		s.mu.RLock()
		more := s.unpacked
		missing := slices.ContainsFunc(chains, func(c digest.Digest) bool { _, ok := s.layers[c]; return !ok })
		s.mu.RUnlock()
		if !missing {
			return nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (s *Store) unpackLayer(ctx context.Context, l layer, parents []digest.Digest, t *turn, b *budget) (_ layer, err error) {
	tmp, err := os.MkdirTemp(s.layersDir, unfinished)
	if err != nil {
		return layer{}, fmt.Errorf("layer %s: %w", l.Blob, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	if err := os.Chmod(tmp, 0o755); err != nil { // what the root of the container shows
		return layer{}, fmt.Errorf("layer %s: %w", l.Blob, err)
	}
	root, err := unix.Open(tmp, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return layer{}, fmt.Errorf("layer %s: open %s: %w", l.Blob, tmp, err)
	}
	defer unix.Close(root)

	blob, err := s.content.ReaderAt(ctx, ocispec.Descriptor{Digest: l.Blob, Size: l.Size})
	if err != nil {
		return layer{}, fmt.Errorf("layer %s: %w", l.Blob, err)
	}
	defer blob.Close()
	diffID := l.DiffID.Algorithm().Digester()
	in := &countingReader{r: content.NewReader(blob)}
	plain, err := decompress(in)
	if err != nil {
		return layer{}, fmt.Errorf("layer %s: %w", l.Blob, err)
	}
	defer plain.Close()
	hashed := io.TeeReader(&metered{plain, b}, diffID.Hash())

	x := &extractor{root: root, layer: l.Blob, budget: b, devices: s.cfg.Devices, log: s.log, turn: t, shown: &s.unfinished}
	defer func() { s.unfinished.Add(-x.written) }()
	x.ratio = func() bool { return x.written > 256<<20 && x.written/max(in.n, 1) > b.limits.Ratio }
	if err := x.run(ctx, hashed); err != nil {
		return layer{}, err
	}
	// What follows the archive's end belongs to the diffID all the same.
	if err := x.drain(ctx, hashed); err != nil {
		return layer{}, err
	}
	if got := diffID.Digest(); got != l.DiffID {
		return layer{}, fmt.Errorf("layer %s unpacks to %s, but the image's config says %s: the image is damaged or forged: %w", l.Blob, got, l.DiffID, errdefs.ErrDataLoss)
	}
	t.leave() // who waits for the layers below does not work

	if err := s.awaitLayers(ctx, parents); err != nil {
		return layer{}, err
	}
	if err := s.inherit(x, parents); err != nil {
		return layer{}, err
	}
	// Usage as overlay users count it: content and inodes of this layer alone.
	l.Bytes, l.Inodes, err = diskUsage(ctx, root)
	if err != nil {
		return layer{}, fmt.Errorf("layer %s: usage: %w", l.Blob, err)
	}
	err = os.Rename(tmp, s.layerPath(l.Chain))
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
		// There for a snapshot of an image that was removed: the same layer,
		// complete, and mounted perhaps.
		err = os.RemoveAll(tmp)
	}
	if err != nil {
		return layer{}, fmt.Errorf("layer %s: %w", l.Blob, err)
	}
	s.mu.Lock()
	delete(s.bare, layerID(l.Chain))
	s.mu.Unlock()
	return l, nil
}

// drain reads to the end; the budget bounds it.
func (x *extractor) drain(ctx context.Context, r io.Reader) error {
	for {
		_, err := r.Read(x.buf)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("layer %s: after the archive's end: %w", x.layer, err)
		}
		if err := x.pause(ctx); err != nil {
			return err
		}
	}
}

// inherit gives the directories that the layer has but does not list the
// attributes they have below: overlayfs shows the uppermost one's.
func (s *Store) inherit(x *extractor, parents []digest.Digest) error {
	var below []int
	defer func() {
		for _, fd := range below {
			unix.Close(fd)
		}
	}()
	if x.dirs[""] == nil && len(parents) > 0 {
		if err := s.inheritRoot(x, parents[0]); err != nil {
			return err
		}
	}
	for _, name := range x.implicit {
		if x.dirs[name] != nil {
			continue // listed after all
		}
		if below == nil && len(parents) > 0 {
			for _, p := range parents {
				fd, err := unix.Open(s.layerPath(p), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
				if err != nil {
					return fmt.Errorf("layer %s: its parent %s: %w", x.layer, p, err)
				}
				below = append(below, fd)
			}
		}
		for _, p := range below {
			fd, err := openBeneath(p, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
			if errors.Is(err, unix.ENOENT) {
				continue
			}
			if err != nil {
				break // hidden or something else below: nothing to inherit
			}
			e, err := attributesOf(fd)
			unix.Close(fd)
			if err != nil {
				return x.fail(name, "stat below", err)
			}
			to, err := x.openDir(name)
			if err != nil {
				break // replaced by a later entry
			}
			err = applyDir(to, e)
			unix.Close(to)
			if err != nil {
				return x.fail(name, "inherit attributes", err)
			}
			break
		}
	}
	return nil
}

// inheritRoot gives the layer's root the attributes of the one below, which has
// them from those below it.
func (s *Store) inheritRoot(x *extractor, parent digest.Digest) error {
	fd, err := unix.Open(s.layerPath(parent), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("layer %s: its parent %s: %w", x.layer, parent, err)
	}
	defer unix.Close(fd)
	e, err := attributesOf(fd)
	if err == nil {
		err = applyDir(x.root, e)
	}
	if err != nil {
		return x.fail(".", "inherit attributes", err)
	}
	return nil
}

// attributesOf a directory, as far as they move with it.
func attributesOf(fd int) (*dirEntry, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	return &dirEntry{mode: st.Mode & 0o7777, uid: int(st.Uid), gid: int(st.Gid), mtime: st.Mtim, xattrs: copyableXattrs(fd)}, nil
}

// copyableXattrs reads the attributes of a directory that move with it.
func copyableXattrs(fd int) map[string]string {
	var list [4096]byte
	n, err := unix.Flistxattr(fd, list[:])
	if err != nil || n == 0 {
		return nil
	}
	m := map[string]string{}
	for k := range strings.SplitSeq(strings.TrimRight(string(list[:n]), "\x00"), "\x00") {
		if !strings.HasPrefix(k, "user.") && k != "security.capability" {
			continue
		}
		v := make([]byte, 64<<10)
		if n, err := unix.Fgetxattr(fd, k, v); err == nil {
			m[k] = string(v[:n])
		}
	}
	return m
}

type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// decompress recognises gzip and zstd by their magic bytes, as every runtime
// does: media types in the wild are wrong too often.
func decompress(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	head, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case gzipped(head):
		return gzip.NewReader(br)
	case zstdCompressed(head):
		// One goroutine, and a window that keeps the memory of a hostile frame
		// in bounds: zstd's own levels up to 19 use 8 MiB at most.
		d, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(32<<20))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(br), nil
}

func gzipped(head []byte) bool { return len(head) >= 2 && head[0] == 0x1f && head[1] == 0x8b }

// zstdCompressed: a frame, or a skippable one, which pzstd begins with.
func zstdCompressed(head []byte) bool {
	return len(head) >= 4 && (string(head[:4]) == "\x28\xb5\x2f\xfd" || head[0]&0xf0 == 0x50 && string(head[1:4]) == "\x2a\x4d\x18")
}
