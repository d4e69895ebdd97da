package images

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	cimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// manifestTypes are what is asked for where it is not known what there is.
var manifestTypes = strings.Join([]string{
	ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex,
	cimages.MediaTypeDockerSchema2Manifest, cimages.MediaTypeDockerSchema2ManifestList, "*/*",
}, ", ")

// resolve finds what the reference names. raw is the manifest where it had to
// be read for that.
func (r *registry) resolve(ctx context.Context) (desc ocispec.Descriptor, raw []byte, err error) {
	_, desc, err = r.resolver.Resolve(ctx, r.ref.String())
	if err != nil && r.logIn(ctx) {
		_, desc, err = r.resolver.Resolve(ctx, r.ref.String())
	}
	if errdefs.IsNotFound(err) && r.ref.digest != "" {
		// Some answer HEAD for tags only.
		if desc, raw, merr := r.manifest(ctx, r.ref.digest); merr == nil {
			return desc, raw, nil
		}
	}
	return desc, nil, err
}

// logIn asks the registry's hosts for a challenge at /v2/, as the distribution
// specification has it: some answer 404 to who has not logged in. It says
// whether there is a log-in that there was not before; the second call is not.
func (r *registry) logIn(ctx context.Context) (more bool) {
	r.mu.Lock()
	again := r.loggedIn
	r.loggedIn = true
	r.mu.Unlock()
	hosts, err := r.hosts(r.ref.host)
	if again || err != nil || ctx.Err() != nil {
		return false
	}
	for _, h := range hosts {
		if a, ok := h.Authorizer.(*account); !ok || a.challenged() {
			continue
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.Scheme+"://"+h.Host+path.Join("/", h.Path)+"/", nil)
		if err != nil {
			continue
		}
		resp, err := r.do(h, req)
		if err != nil {
			continue
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusUnauthorized && h.Authorizer.AddResponses(ctx, []*http.Response{resp}) == nil {
			more = true
		}
	}
	return more
}

// do sends a request of our own to a host.
func (r *registry) do(h docker.RegistryHost, req *http.Request) (*http.Response, error) {
	for k, v := range h.Header {
		req.Header[k] = append(req.Header[k], v...)
	}
	for k, v := range userAgent() {
		req.Header[k] = v
	}
	if err := h.Authorizer.Authorize(req.Context(), req); err != nil {
		return nil, err
	}
	return h.Client.Do(req)
}

// manifest reads the manifest with the digest: by its digest, and where the
// registry has it not by that name, by the reference's tag.
func (r *registry) manifest(ctx context.Context, want digest.Digest) (ocispec.Descriptor, []byte, error) {
	hosts, err := r.able(r.ref.host)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	for _, h := range hosts {
		for _, name := range []string{want.String(), r.ref.tag} {
			if name == "" {
				continue
			}
			raw, media, err := r.get(ctx, h, name)
			if err == nil && want.Algorithm().FromBytes(raw) == want {
				return ocispec.Descriptor{MediaType: media, Digest: want, Size: int64(len(raw))}, raw, nil
			}
		}
	}
	return ocispec.Descriptor{}, nil, fmt.Errorf("manifest %s: %w", want, errdefs.ErrNotFound)
}

// get reads one manifest of a host.
func (r *registry) get(ctx context.Context, h docker.RegistryHost, name string) (raw []byte, media string, err error) {
	u := h.Scheme + "://" + h.Host + path.Join("/", h.Path, strings.TrimPrefix(r.ref.repo, r.ref.host+"/"), "manifests", name)
	if h.Host != r.ref.host && !(r.ref.host == "docker.io" && h.Host == "registry-1.docker.io") {
		u += "?" + url.Values{"ns": {r.ref.host}}.Encode() // as the library tells mirrors
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return nil, "", err
	}
	req.Header.Set("Accept", manifestTypes)
	resp, err := r.do(h, req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, "", fmt.Errorf("%s: %w", resp.Status, errdefs.ErrNotFound)
	}
	raw, err = io.ReadAll(resp.Body) // which is bounded
	return raw, resp.Header.Get("Content-Type"), err
}

// putManifest keeps a manifest that was read beside the usual way. The caller
// holds a lease on it.
func (s *Store) putManifest(ctx context.Context, desc ocispec.Descriptor, raw []byte) error {
	ref, done := s.importing()
	defer done()
	err := content.WriteBlob(ctx, s.content, ref, bytes.NewReader(raw), desc)
	if err != nil {
		return fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	return nil
}
