package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
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
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// authKey is what is said by the credentials of a pull, field by field: what a
// library prints of them may leave secrets out, and so make two of one.
type authKey struct{ user, password, auth, server, identity, token string }

func authKeyOf(a *runtimeapi.AuthConfig) authKey {
	return authKey{a.GetUsername(), a.GetPassword(), a.GetAuth(), a.GetServerAddress(), a.GetIdentityToken(), a.GetRegistryToken()}
}

// origin is where a pull has its blobs from. Only pulls of one origin share a
// transfer: a registry that is slow, or lies, must be no other's trouble.
type origin struct {
	host string // of the reference; certs.d says who serves it
	auth authKey
	skip int // hosts that are left out, the first ones
}

// fetch is one blob in transfer.
type fetch struct {
	from   origin
	ref    string       // of its ingest
	at     atomic.Int64 // bytes that are here
	cancel context.CancelCauseFunc
	done   chan struct{}
	err    error // set before done is closed
}

const (
	// fetchAttempts without a byte of progress end a download.
	fetchAttempts = 4
	// raceAfter is how long another pull's transfer may be slower than
	// raceRate, in bytes per second, until one's own is begun beside it.
	raceAfter = 5 * time.Second
	raceRate  = 64 << 10
	// maxRaces bounds the transfers of one blob from one origin.
	maxRaces = 3
)

// ingestPrefix begins the names of ingests that may be carried on.
const ingestPrefix = "pull-"

// ingestRef names what is kept of a transfer: of a blob, from a registry,
// whichever of its hosts served it and to whom.
func ingestRef(host string, d digest.Digest) string { return ingestPrefix + d.String() + "@" + host }

// errArrived ends a transfer when another one has brought the blob.
var errArrived = errors.New("the blob has come by another transfer")

// fetchBlob brings a blob into the content store, hashed, going on where an
// earlier attempt has left off. have is set to what is there so far, and moved
// is called as it grows. The caller holds a lease on it.
//
// A transfer of the same origin is waited for while it moves. Whichever
// transfer of a blob ends first, from wherever, ends the others.
func (s *Store) fetchBlob(ctx context.Context, from remotes.Fetcher, o origin, slots *semaphore.Weighted, desc ocispec.Descriptor, have *atomic.Int64, moved func()) error {
	desc.URLs = nil // other places that an image names are not ours to contact
	progress := func(n int64) { have.Store(n); moved() }
	var slow *fetch // was waited for long enough
	for {
		if f := s.fetchOf(desc.Digest, o, slow); f != nil {
			over, err := f.wait(ctx, s.raceAfter)
			switch {
			case err != nil:
				return err
			case !over:
				slow = f
			case f.err == nil:
				progress(desc.Size)
				return nil
			}
			continue // its trouble may not be ours: given up, another repository
		}
		if err := slots.Acquire(ctx, 1); err != nil {
			return context.Cause(ctx)
		}
		fctx, cancel := context.WithCancelCause(ctx)
		f := s.beginFetch(desc.Digest, o, slow, cancel)
		if f == nil { // somebody else has begun one
			cancel(nil)
			slots.Release(1)
			continue
		}
		err := s.fetchOnce(fctx, from, f.ref, desc, func(n int64) { f.at.Store(n); progress(n) })
		s.endFetch(desc.Digest, f, err)
		cancel(nil)
		slots.Release(1)
		if errors.Is(err, errArrived) && ctx.Err() == nil {
			if err := s.content.Abort(ctx, f.ref); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("blob %s: %w", desc.Digest, err)
			}
			continue // which looks whether it is there
		}
		return err
	}
}

// fetchOf returns the transfer to wait for: the newest of the origin, unless
// that was too slow and there may be one more. nil: none.
func (s *Store) fetchOf(d digest.Digest, o origin, slow *fetch) *fetch {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.fetchToJoin(d, o, slow)
}

func (s *Store) fetchToJoin(d digest.Digest, o origin, slow *fetch) (newest *fetch) {
	n := 0
	for _, f := range s.fetches[d] {
		if f.from == o {
			newest = f
			n++
		}
	}
	if newest != nil && newest == slow && n < maxRaces {
		return nil
	}
	return newest
}

// beginFetch enters a transfer, unless there is one to wait for.
func (s *Store) beginFetch(d digest.Digest, o origin, slow *fetch, cancel context.CancelCauseFunc) *fetch {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fetchToJoin(d, o, slow) != nil {
		return nil
	}
	f := &fetch{from: o, ref: ingestRef(o.host, d), cancel: cancel, done: make(chan struct{})}
	// An ingest has one writer: the second transfer has one of its own.
	for n := 2; slices.ContainsFunc(s.fetches[d], func(g *fetch) bool { return g.ref == f.ref }); n++ {
		f.ref = fmt.Sprintf("%s#%d", ingestRef(o.host, d), n)
	}
	s.fetches[d] = append(s.fetches[d], f)
	return f
}

// endFetch lets those go on who wait for f, and ends the other transfers of
// the blob when it is there.
func (s *Store) endFetch(d digest.Digest, f *fetch, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.err = err
	rest := slices.DeleteFunc(s.fetches[d], func(g *fetch) bool { return g == f })
	if s.fetches[d] = rest; len(rest) == 0 {
		delete(s.fetches, d)
	}
	if err == nil {
		for _, g := range rest {
			g.cancel(errArrived)
		}
	}
	close(f.done)
}

// wait until the transfer is over, or has been slow for as long as patience.
func (f *fetch) wait(ctx context.Context, patience time.Duration) (over bool, err error) {
	look := time.NewTicker(patience)
	defer look.Stop()
	enough := int64(patience.Seconds() * raceRate)
	for at := f.at.Load(); ; {
		select {
		case <-f.done:
			return true, nil
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-look.C:
		}
		now := f.at.Load()
		if now-at < enough {
			return false, nil
		}
		at = now
	}
}

// fetchOnce is one transfer, with its repetitions.
func (s *Store) fetchOnce(ctx context.Context, from remotes.Fetcher, ref string, desc ocispec.Descriptor, have func(int64)) error {
	if ok, err := s.haveBlob(ctx, desc); ok || err != nil {
		have(desc.Size)
		return err
	}
	fresh := false // begun from the first byte by this call
	for failures := 0; ; {
		start, end, err := s.fetchFrom(ctx, from, ref, desc, have)
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
func (s *Store) fetchFrom(ctx context.Context, from remotes.Fetcher, ref string, desc ocispec.Descriptor, have func(int64)) (start, end int64, err error) {
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
	if s.suspect(desc.Digest) {
		if ok, err := s.clear(ctx, desc.Digest); !ok || err != nil {
			return false, err
		}
	}
	// The blob is what its digest says; a descriptor of another size lies.
	if info.Size != desc.Size {
		return false, fmt.Errorf("blob %s has %d bytes, its descriptor says %d: %w", desc.Digest, info.Size, desc.Size, errdefs.ErrDataLoss)
	}
	return true, nil
}

// suspect tells whether nothing has vouched for a blob since Open.
func (s *Store) suspect(d digest.Digest) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.orphans[d].unchecked
}

// clear hashes a suspect blob: ok is false when it was damaged, and is gone
// now. One caller does it: the blob that another has fetched since must stay.
func (s *Store) clear(ctx context.Context, d digest.Digest) (ok bool, err error) {
	unlock, err := s.lockKey(ctx, "blob-"+d.Encoded())
	if err != nil {
		return false, err
	}
	defer unlock()
	if !s.suspect(d) {
		_, err := s.content.Info(ctx, d)
		if errdefs.IsNotFound(err) {
			return false, nil
		}
		return err == nil, err
	}
	err = s.checkBlob(ctx, ocispec.Descriptor{Digest: d})
	switch {
	case errdefs.IsDataLoss(err):
		s.log.Warn("blob is damaged, fetched again", "blob", d)
		if err := os.Rename(s.blobPath(d), s.trash(d.Encoded())); err != nil {
			return false, err
		}
		s.kickGC()
		ok = false
	case err != nil:
		return false, err
	default:
		ok = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.orphans[d]; known {
		s.orphans[d] = orphan{}
	}
	return ok, nil
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
