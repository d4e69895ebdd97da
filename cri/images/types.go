// Package images is the node's image store: pull, load, unpack, mount, remove.
package images

import (
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is one image of the store.
type Image struct {
	ID          string   // digest of its config: "sha256:…", the same in every RPC
	RepoTags    []string // "host/repo:tag"
	RepoDigests []string // "host/repo@sha256:…"
	Size        int64    // bytes: content plus snapshots
	Pinned      bool
	Config      ocispec.Image
}

// Progress of a pull.
type Progress struct {
	Ref          string
	Stage        string // resolving, downloading, unpacking, done
	Layers       int
	LayersDone   int
	Bytes, Total int64
}
