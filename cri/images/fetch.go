package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
)

// fetch is one blob in transfer; every pull that wants it waits for it.
type fetch struct {
	done chan struct{}
	err  error
}

// fetchAttempts without a byte of progress end a download.
const fetchAttempts = 4

func ingestRef(d digest.Digest) string { return "pull-" + d.String() }

// fetchBlob brings a blob into the content store, hashed, going on where an
// earlier attempt has left off. have is set to what is there so far, and moved
// is called as it grows. The caller holds a lease on it.
func (s *Store) fetchBlob(ctx context.Context, from remotes.Fetcher, slots *semaphore.Weighted, desc ocispec.Descriptor, have *atomic.Int64, moved func()) error {
	desc.URLs = nil // other places that an image names are not ours to contact
	for {
		s.mu.Lock()
		f := s.fetches[desc.Digest]
		mine := f == nil
		if mine {
			f = &fetch{done: make(chan struct{})}
			s.fetches[desc.Digest] = f
		}
		s.mu.Unlock()
		if !mine {
			select {
			case <-f.done:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if f.err == nil {
				have.Store(desc.Size)
				moved()
				return nil
			}
			continue // its trouble may not be ours: other credentials, given up
		}
		f.err = s.fetchOnce(ctx, from, slots, desc, func(n int64) { have.Store(n); moved() })
		s.mu.Lock()
		delete(s.fetches, desc.Digest)
		s.mu.Unlock()
		close(f.done)
		return f.err
	}
}

func (s *Store) fetchOnce(ctx context.Context, from remotes.Fetcher, slots *semaphore.Weighted, desc ocispec.Descriptor, have func(int64)) error {
	if ok, err := s.haveBlob(ctx, desc); ok || err != nil {
		have(desc.Size)
		return err
	}
	if err := slots.Acquire(ctx, 1); err != nil {
		return context.Cause(ctx)
	}
	defer slots.Release(1)
	fresh := false // begun from the first byte by this call
	for failures := 0; ; {
		start, end, err := s.fetchFrom(ctx, from, desc, have)
		fresh = fresh || start == 0
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errdefs.IsDataLoss(err):
			if fresh {
				return err
			}
			continue // what was kept of an earlier attempt was bad; it is gone now
		case !transient(err):
			return err
		}
		if failures++; end > start {
			failures = 0
		}
		if failures >= fetchAttempts {
			return err
		}
		s.log.Debug("download interrupted, going on", "blob", desc.Digest, "at", end, "of", desc.Size, "error", err)
		select {
		case <-time.After(time.Duration(1<<failures) * 50 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// transient errors are worth another attempt: the stream broke or stalled.
func transient(err error) bool {
	return errors.Is(err, errStalled) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, errBroken)
}

// remoteError is what reading from the other side gave, as opposed to trouble
// on this node.
type remoteError struct{ error }

func (e *remoteError) Unwrap() error { return e.error }

// errBroken marks a failure in the middle of a transfer, as opposed to a
// refusal by the registry.
var errBroken = fmt.Errorf("transfer broken off: %w", errdefs.ErrUnavailable)

// errWrong is content that does not have its digest.
var errWrong = fmt.Errorf("the registry sent something else: %w", errdefs.ErrDataLoss)

// fetchFrom goes on with the download and tells from which byte to which.
func (s *Store) fetchFrom(ctx context.Context, from remotes.Fetcher, desc ocispec.Descriptor, have func(int64)) (start, end int64, err error) {
	ref := ingestRef(desc.Digest)
	w, err := content.OpenWriter(ctx, s.content, content.WithRef(ref), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		have(desc.Size)
		return 0, desc.Size, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	st, err := w.Status()
	if err != nil {
		return 0, 0, fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	start = st.Offset
	if start > desc.Size {
		if err := w.Truncate(0); err != nil {
			return 0, 0, fmt.Errorf("blob %s: %w", desc.Digest, err)
		}
		start = 0
	}
	end = start
	have(end)
	if start < desc.Size {
		rc, err := from.Fetch(ctx, desc)
		if err != nil {
			return start, end, &remoteError{err}
		}
		defer rc.Close()
		if start > 0 {
			seeker, ok := rc.(io.Seeker)
			if !ok {
				return start, end, fmt.Errorf("blob %s: transport cannot go on at byte %d: %w", desc.Digest, start, errdefs.ErrNotImplemented)
			}
			if _, err := seeker.Seek(start, io.SeekStart); err != nil {
				return start, end, &remoteError{err}
			}
		}
		if end, err = copyBlob(w, rc, start, desc.Size, have); err != nil {
			var status remoteerrors.ErrUnexpectedStatus
			if start > 0 && errors.As(err, &status) && status.StatusCode == http.StatusRequestedRangeNotSatisfiable {
				// A registry that cannot go on in the middle: from the start.
				return start, 0, errors.Join(w.Truncate(0), &remoteError{fmt.Errorf("blob %s: the registry does not send ranges: %w", desc.Digest, errBroken)})
			}
			return start, end, err
		}
	}
	if err := w.Commit(ctx, desc.Size, desc.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		if errdefs.IsFailedPrecondition(err) {
			got := w.Digest()
			err = errors.Join(s.content.Abort(ctx, ref), nil)
			return start, end, errors.Join(err, fmt.Errorf("blob %s: %w (%s)", desc.Digest, errWrong, got))
		}
		return start, end, fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	return start, end, nil
}

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// copyBlob copies bytes at..size. Errors of reading that come after the first
// byte are errBroken.
func copyBlob(w io.Writer, r io.Reader, at, size int64, have func(int64)) (int64, error) {
	p := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(p)
	first := true
	for at < size {
		n, err := r.Read((*p)[:min(int64(len(*p)), size-at)])
		if n > 0 {
			if _, werr := w.Write((*p)[:n]); werr != nil {
				return at, fmt.Errorf("write blob: %w", werr)
			}
			at += int64(n)
			first = false
			have(at)
		}
		switch {
		case err == nil || at == size:
		case errors.Is(err, io.EOF):
			return at, &remoteError{fmt.Errorf("it ended at byte %d of %d: %w", at, size, errBroken)}
		case first: // the request itself
			return at, &remoteError{err}
		default:
			return at, &remoteError{fmt.Errorf("at byte %d of %d: %w: %w", at, size, err, errBroken)}
		}
	}
	return at, nil
}

// haveBlob tells whether the content store has the blob, after hashing it if
// nothing has vouched for it since Open.
func (s *Store) haveBlob(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	info, err := s.content.Info(ctx, desc.Digest)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	s.mu.RLock()
	suspect := s.orphans[desc.Digest].unchecked
	s.mu.RUnlock()
	if suspect {
		err := s.checkBlob(ctx, ocispec.Descriptor{Digest: desc.Digest})
		switch {
		case errdefs.IsDataLoss(err):
			s.log.Warn("blob is damaged, fetched again", "blob", desc.Digest)
			if err := os.Rename(s.blobPath(desc.Digest), s.trash(desc.Digest.Encoded())); err != nil {
				return false, err
			}
			s.kickGC()
			return false, nil
		case err != nil:
			return false, err
		}
		s.mu.Lock()
		if _, ok := s.orphans[desc.Digest]; ok {
			s.orphans[desc.Digest] = orphan{}
		}
		s.mu.Unlock()
	}
	// The blob is what its digest says; a descriptor of another size lies.
	if info.Size != desc.Size {
		return false, fmt.Errorf("blob %s has %d bytes, its descriptor says %d: %w", desc.Digest, info.Size, desc.Size, errdefs.ErrDataLoss)
	}
	return true, nil
}

// checkBlob hashes a blob of the content store.
func (s *Store) checkBlob(ctx context.Context, desc ocispec.Descriptor) error {
	r, err := s.content.ReaderAt(ctx, desc)
	if err != nil {
		return fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	defer r.Close()
	if desc.Size > 0 && r.Size() != desc.Size {
		return fmt.Errorf("blob %s has %d bytes, should have %d: %w", desc.Digest, r.Size(), desc.Size, errdefs.ErrDataLoss)
	}
	v := desc.Digest.Verifier()
	p := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(p)
	for off := int64(0); off < r.Size(); {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := r.ReadAt(*p, off)
		v.Write((*p)[:n])
		off += int64(n)
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("blob %s: %w", desc.Digest, err)
		}
		if n == 0 {
			break
		}
	}
	if !v.Verified() {
		return fmt.Errorf("blob %s does not have its digest: %w", desc.Digest, errdefs.ErrDataLoss)
	}
	return nil
}
