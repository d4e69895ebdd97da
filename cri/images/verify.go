package images

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Problem that Verify has found with an image.
type Problem struct {
	ID    string   // of the image
	Names []string // its tags and digests
	Err   error    // what is wrong: errdefs.ErrDataLoss or ErrNotFound
}

// Verify hashes every blob of every image and counts what is in every unpacked
// layer. It reads all content, so it takes a while; it changes nothing. An
// image with a problem is repaired by removing and pulling it again.
func (s *Store) Verify(ctx context.Context) ([]Problem, error) {
	ctx, leave, err := s.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	_, release := s.lease(true) // nothing goes away meanwhile
	defer s.kickGC()
	defer release()
	s.mu.RLock()
	records := make([]*record, 0, len(s.images))
	for _, r := range s.images {
		records = append(records, r)
	}
	s.mu.RUnlock()
	slices.SortFunc(records, func(a, b *record) int { return strings.Compare(a.ID.String(), b.ID.String()) })

	blobs := map[digest.Digest]error{} // images share them
	layers := map[digest.Digest]error{}
	var found []Problem
	for _, r := range records {
		report := func(err error) {
			if err != nil {
				found = append(found, Problem{ID: r.ID.String(), Names: r.names(), Err: err})
			}
		}
		for d := range r.blobs {
			if ctx.Err() != nil {
				return found, context.Cause(ctx)
			}
			err, known := blobs[d]
			if !known {
				err = s.checkBlob(ctx, ocispec.Descriptor{Digest: d})
				blobs[d] = err
			}
			report(err)
		}
		for _, l := range r.Layers {
			err, known := layers[l.Chain]
			if !known {
				err = s.checkLayer(ctx, l)
				layers[l.Chain] = err
			}
			report(err)
		}
	}
	if ctx.Err() != nil {
		return found, context.Cause(ctx)
	}
	return found, nil
}

// checkLayer compares what a layer takes with what it took when it was
// unpacked: a torn one lacks entries.
func (s *Store) checkLayer(ctx context.Context, l layer) error {
	fd, err := unix.Open(s.layerPath(l.Chain), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("layer %s: %w: %w", l.Blob, &os.PathError{Op: "open", Path: s.layerPath(l.Chain), Err: err}, errdefs.ErrNotFound)
	}
	defer unix.Close(fd)
	_, inodes, err := diskUsage(ctx, fd)
	if err != nil {
		return fmt.Errorf("layer %s: %w", l.Blob, err)
	}
	if inodes != l.Inodes {
		return fmt.Errorf("layer %s has %d inodes, had %d when it was unpacked: %w", l.Blob, inodes, l.Inodes, errdefs.ErrDataLoss)
	}
	return nil
}
