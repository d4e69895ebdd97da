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
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
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

// unpacking is one layer under way. Those who need the same chain wait for done.
type unpacking struct {
	done chan struct{}
	info layer
	err  error
}

// parentError says that a layer below could not be had: no fault of this one.
type parentError struct{ error }

func (e *parentError) Unwrap() error { return e.error }

// unpackedLayer returns the layer of the chain, unpacking it unless it is
// there. parents are the chains below, nearest first; wait returns when the
// nearest is complete.
func (s *Store) unpackedLayer(ctx context.Context, l layer, parents []digest.Digest, wait func(context.Context) error, b *budget) (layer, error) {
	for {
		s.mu.Lock()
		if have, ok := s.layers[l.Chain]; ok {
			s.mu.Unlock()
			l.Bytes, l.Inodes = have.Bytes, have.Inodes
			return l, nil
		}
		u := s.unpackings[l.Chain]
		mine := u == nil
		if mine {
			u = &unpacking{done: make(chan struct{})}
			s.unpackings[l.Chain] = u
		}
		s.mu.Unlock()

		if !mine {
			select {
			case <-u.done:
			case <-ctx.Done():
				return layer{}, context.Cause(ctx)
			}
			var parent *parentError
			if errors.As(u.err, &parent) || errors.Is(u.err, context.Canceled) || errors.Is(u.err, context.DeadlineExceeded) {
				continue // the other pull was given up, not the layer
			}
			if u.err != nil {
				return layer{}, u.err
			}
			l.Bytes, l.Inodes = u.info.Bytes, u.info.Inodes
			return l, nil
		}

		u.info, u.err = s.unpackLayer(ctx, l, parents, wait, b)
		s.mu.Lock()
		if u.err == nil {
			s.layers[l.Chain] = u.info
			s.unsynced[l.Chain] = struct{}{}
		}
		delete(s.unpackings, l.Chain)
		s.mu.Unlock()
		close(u.done)
		return u.info, u.err
	}
}

func (s *Store) unpackLayer(ctx context.Context, l layer, parents []digest.Digest, wait func(context.Context) error, b *budget) (_ layer, err error) {
	if err := s.unpackSlots.Acquire(ctx, 1); err != nil {
		return layer{}, context.Cause(ctx)
	}
	held := true
	release := func() {
		if held {
			s.unpackSlots.Release(1)
			held = false
		}
	}
	defer release()

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
	hashed := &countingReader{r: io.TeeReader(plain, diffID.Hash())}

	x := &extractor{root: root, layer: l.Blob, budget: b, devices: s.cfg.Devices}
	x.ratio = func() bool { return hashed.n > 256<<20 && hashed.n/max(in.n, 1) > b.limits.Ratio }
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
	release()

	if err := wait(ctx); err != nil {
		return layer{}, &parentError{err}
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

// drain reads to the end, within the limits.
func (x *extractor) drain(ctx context.Context, r *countingReader) error {
	for {
		n, err := r.Read(x.buf)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("layer %s: after the archive's end: %w", x.layer, err)
		}
		if x.budget.bytes.Add(int64(n)) > x.budget.limits.UnpackedSize || x.ratio() {
			return x.refuse("", "the archive is followed by more data than the limits allow")
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
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
			var st unix.Stat_t
			fd, err := openBeneath(p, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
			if errors.Is(err, unix.ENOENT) {
				continue
			}
			if err != nil {
				break // hidden or something else below: nothing to inherit
			}
			err = unix.Fstat(fd, &st)
			e := &dirEntry{mode: st.Mode & 0o7777, uid: int(st.Uid), gid: int(st.Gid), mtime: st.Mtim, xattrs: copyableXattrs(fd)}
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
	case len(head) >= 2 && head[0] == 0x1f && head[1] == 0x8b:
		return gzip.NewReader(br)
	case len(head) >= 4 && (string(head) == "\x28\xb5\x2f\xfd" || head[0]&0xf0 == 0x50 && string(head[1:4]) == "\x2a\x4d\x18"):
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
