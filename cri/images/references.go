package images

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// target is a parsed image reference. Exactly one of tag and digest is set.
type target struct {
	repo   string // "docker.io/library/nginx"
	host   string // "docker.io"
	tag    string
	digest digest.Digest
}

// String returns the normalised reference.
func (t target) String() string {
	if t.digest != "" {
		return t.repo + "@" + t.digest.String()
	}
	return t.repo + ":" + t.tag
}

// parseReference normalises as Docker and containerd do: "nginx" is
// "docker.io/library/nginx:latest"; when both a tag and a digest are given,
// the digest decides.
func parseReference(ref string) (target, error) {
	if len(ref) > 4096 {
		return target{}, fmt.Errorf("image reference of %d bytes is too long: %w", len(ref), errdefs.ErrInvalidArgument)
	}
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return target{}, fmt.Errorf("image reference %q is invalid (%v); expected [host[:port]/]repository[:tag|@digest]: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	t := target{repo: named.Name(), host: reference.Domain(named)}
	switch n := named.(type) {
	case reference.Canonical:
		t.digest = n.Digest()
	case reference.Tagged:
		t.tag = n.Tag()
	default:
		return target{}, fmt.Errorf("image reference %q has neither tag nor digest: %w", ref, errdefs.ErrInvalidArgument)
	}
	return t, nil
}

var hexOnly = regexp.MustCompile(`^[0-9a-f]{3,64}$`)

// idPrefix returns the hexadecimal part of what may be an image id or the
// beginning of one, "" if ref cannot be one.
func idPrefix(ref string) string {
	h := strings.TrimPrefix(ref, "sha256:")
	if !hexOnly.MatchString(h) {
		return ""
	}
	return h
}
