package images

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Config of a Store. Only Dir is required; the zero value of every other
// field means its default.
type Config struct {
	// Dir holds the store, see the package comment. It is created 0700. It
	// must be on a file system that overlayfs can use as upper layer (ext4,
	// xfs with ftype=1, btrfs; not overlayfs).
	Dir string
	// RegistryConfigPath is a containerd-style certs.d directory:
	// <host>[_port_]/hosts.toml, _default/hosts.toml. "" means none.
	RegistryConfigPath string
	// CredentialsFile is a docker config.json ("auths"), read at each pull;
	// "" means none. Credentials given with a pull come first.
	CredentialsFile string
	// MaxConcurrentDownloads bounds the blobs of one pull in transfer at once.
	// Default 3, as containerd.
	MaxConcurrentDownloads int
	// MaxConcurrentUnpacks bounds the layers being extracted at once.
	// Default: the number of CPUs.
	MaxConcurrentUnpacks int
	// StallTimeout: a transfer that moves fewer than MinRate bytes per second
	// over this long is given up and retried from where it was. Default 30 s.
	StallTimeout time.Duration
	// MinRate in bytes per second. Default 1024.
	MinRate int64
	// PartialTTL is how long what an interrupted pull has fetched is kept for
	// its next attempt. Default 1 h.
	PartialTTL time.Duration
	// Limits on what an image may contain.
	Limits Limits
	// Devices says which device nodes of layers are made.
	Devices DevicePolicy
	// Platform to choose from an index. Default: this machine's.
	Platform *ocispec.Platform
	// Pinned references are reported as pinned: the kubelet does not
	// garbage-collect them.
	Pinned []string
	// Present is told the names and the id of an image that has come, by a pull
	// or a load, or was pulled again. It must return soon and not call the
	// store. nil: nobody is told.
	Present func(names []string)
	// NoSync leaves out every sync to disk: for tests and throw-away stores.
	NoSync bool
	// Log receives what the store does. Default slog.Default().
	Log *slog.Logger
}

// Limits bound what one image may contain, so that a hostile one is refused
// before it fills the disk or the memory. Zero means the default.
type Limits struct {
	Layers       int   // default 127, Docker's own limit; overlayfs ends at 500
	UnpackedSize int64 // bytes of all layers that take disk: holes do not; default 128 GiB
	// StreamSize is how many bytes all layers may decompress to, blocks of
	// zeros included. They take no disk and are no fault (the lastlog of a
	// large uid has hundreds of GiB), but they take a CPU. Default 1 TiB.
	StreamSize int64
	Entries    int64 // entries of all layers; default 4 million
	// Ratio of bytes written to compressed bytes, looked at once a layer has
	// written 256 MiB. Default 250 (gzip cannot exceed 1032).
	Ratio        int64
	ManifestSize int64 // bytes of a manifest or index; default 4 MiB
	ConfigSize   int64 // bytes of an image config; default 4 MiB
	ArchiveSize  int64 // bytes that Load reads, decompressed; default 256 GiB
}

// DevicePolicy says which device nodes of an image are made. The others are
// left out.
type DevicePolicy int

const (
	// DevicesSafe allows those that every container gets anyway: null, zero,
	// full, random, urandom, tty, console, ptmx.
	DevicesSafe DevicePolicy = iota
	// DevicesNone allows none.
	DevicesNone
	// DevicesAll allows all. The device cgroup of the container still rules
	// what can be opened.
	DevicesAll
)

func (c *Config) complete() error {
	if c.Dir == "" {
		return fmt.Errorf("image store: Dir is not set: %w", errdefs.ErrInvalidArgument)
	}
	abs, err := filepath.Abs(c.Dir)
	if err != nil {
		return fmt.Errorf("image store directory %s: %w", c.Dir, err)
	}
	c.Dir = abs
	def(&c.MaxConcurrentDownloads, 3)
	def(&c.MaxConcurrentUnpacks, runtime.GOMAXPROCS(0))
	def(&c.StallTimeout, 30*time.Second)
	def(&c.MinRate, 1024)
	def(&c.PartialTTL, time.Hour)
	def(&c.Limits.Layers, 127)
	def(&c.Limits.UnpackedSize, 128<<30)
	def(&c.Limits.StreamSize, 1<<40)
	def(&c.Limits.Entries, 4_000_000)
	def(&c.Limits.Ratio, 250)
	def(&c.Limits.ManifestSize, 4<<20)
	def(&c.Limits.ConfigSize, 4<<20)
	def(&c.Limits.ArchiveSize, 256<<30)
	if c.Platform == nil {
		p := platforms.DefaultSpec()
		c.Platform = &p
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	pinned := make([]string, 0, len(c.Pinned))
	for _, ref := range c.Pinned {
		t, err := parseReference(ref)
		if err != nil {
			return fmt.Errorf("pinned image: %w", err)
		}
		pinned = append(pinned, t.String())
	}
	c.Pinned = pinned
	return nil
}

func def[T int | int64 | time.Duration](v *T, d T) {
	if *v <= 0 {
		*v = d
	}
}
