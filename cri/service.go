package cri

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cgroups"
	"github.com/podd-runtime/podd/cri/images"
	"github.com/podd-runtime/podd/cri/state"
	"github.com/podd-runtime/podd/cri/streaming"
	"github.com/podd-runtime/podd/volumes/tree"
)

// Config of the services. Zero values are usable where a default is named.
type Config struct {
	// DataDir holds the records: <DataDir>/cri.
	DataDir string
	// RunDir holds what a reboot may take: sandboxes' files, network
	// namespaces, root file systems. Absolute, on a tmpfs.
	RunDir string
	// SystemdCgroup selects the systemd cgroup driver.
	SystemdCgroup bool
	// CgroupParent of sandboxes that name none; "" is "/podd", or
	// "system.slice" with the systemd driver.
	CgroupParent string
	// LogMaxSize (bytes, 0: none) and LogMaxFiles rotate container logs in the
	// shim. An agent that rotates by itself (upstream's kubelet) wants 0.
	LogMaxSize  int64
	LogMaxFiles int
	// Resolve follows the links of a host path and makes a directory where
	// there is nothing; nil: by looking. It also returns which of nosuid, nodev
	// and noexec the mount has that the path is on. Whoever has foreign file
	// systems among the paths sees to it here that the daemon does not hang in
	// one.
	Resolve func(ctx context.Context, path string) (is string, flags []string, err error)
	// CDIDirs are searched for CDI specifications; nil: /etc/cdi, /var/run/cdi.
	CDIDirs []string
	// StreamingAddr is where exec, attach and port-forward connections are
	// served to CRI clients; "" is 127.0.0.1:0.
	StreamingAddr string
	// StreamingCert makes those connections TLS; empty: plain HTTP.
	StreamingCert streaming.KeyPair
	// Version is reported as the runtime's.
	Version string
	// Log takes the service's messages; nil: slog.Default().
	Log *slog.Logger
}

const (
	kindSandbox   = "sandbox"
	kindContainer = "container"
	kindSpec      = "spec"
)

// joinsNear is how long before its process joins a cgroup a request may come:
// the kernel is then ready for it, see cgroups.Warmer.
const joinsNear = 50 * time.Millisecond

// Service is the CRI. It implements runtimeapi.RuntimeServiceServer and
// runtimeapi.ImageServiceServer; called in-process its methods return errors
// of github.com/containerd/errdefs, and Serve maps those to gRPC codes.
type Service struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer

	cfg     Config
	log     *slog.Logger
	procs   Processes
	images  Images
	network Network
	host    host
	store   *state.Store
	objects registry
	creates attempts
	left    leftovers
	events  broker
	pulls   pulls
	cdi     cdiCache
	stream  *streaming.Server
	usage   cpuRates
	volumes *tree.Meter // of what image-declared volumes store, by container
	warm    cgroups.Warmer
	sources hangs
	flusher flusher
	// profiles is held while the default AppArmor profile is loaded.
	profiles sync.Mutex

	cancel context.CancelFunc
	wg     sync.WaitGroup
	seq    *sequence
}

var (
	_ runtimeapi.RuntimeServiceServer = (*Service)(nil)
	_ runtimeapi.ImageServiceServer   = (*Service)(nil)
)

// New recovers what an earlier process left on disk and in the shim, and
// returns the running service. Close ends it; containers go on.
func New(cfg Config, procs Processes, imgs Images, network Network) (*Service, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	store, err := state.Open(filepath.Join(cfg.DataDir, "cri"), cfg.Log, kindSandbox, kindContainer, kindSpec)
	if err != nil {
		return nil, err
	}
	for _, d := range []string{"netns", "sandboxes", "containers", "cri"} {
		if err := os.MkdirAll(filepath.Join(cfg.RunDir, d), 0o700); err != nil {
			return nil, fmt.Errorf("create run directory: %w", err)
		}
	}
	if err := os.MkdirAll(filepath.Join(cfg.DataDir, "cri", "etc"), 0o700); err != nil {
		return nil, fmt.Errorf("create data directory: %w", err)
	}
	seq, err := openSequence(filepath.Join(cfg.RunDir, "cri", "seq"))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &Service{
		cfg: cfg, log: cfg.Log, procs: procs, images: imgs, network: network,
		host: probeHost(), store: store, cancel: cancel, seq: seq,
	}
	s.volumes = tree.NewMeter(cfg.Log, s.measureVolumes)
	s.cdi.dirs = cfg.CDIDirs
	s.stream = streaming.New(cfg.StreamingAddr, cfg.StreamingCert, streamRuntime{s})
	if err := s.recover(ctx); err != nil {
		cancel()
		seq.Close()
		return nil, err
	}
	s.wg.Go(func() { s.follow(ctx) })
	s.wg.Go(func() { s.volumes.Run(ctx) })
	s.wg.Go(func() { s.left.retry(ctx, s.log) })
	return s, nil
}

func (c *Config) complete() error {
	if c.DataDir == "" || !filepath.IsAbs(c.DataDir) {
		return fmt.Errorf("cri: data directory %q: want an absolute path", c.DataDir)
	}
	if c.RunDir == "" || !filepath.IsAbs(c.RunDir) {
		return fmt.Errorf("cri: run directory %q: want an absolute path", c.RunDir)
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.CgroupParent == "" {
		c.CgroupParent = "/podd"
		if c.SystemdCgroup {
			c.CgroupParent = "system.slice"
		}
	}
	if c.Resolve == nil {
		c.Resolve = func(_ context.Context, p string) (string, []string, error) { return lookupSource(p) }
	}
	if c.CDIDirs == nil {
		c.CDIDirs = []string{"/etc/cdi", "/var/run/cdi"}
	}
	if c.StreamingAddr == "" {
		c.StreamingAddr = net.JoinHostPort("127.0.0.1", "0")
	}
	if err := c.StreamingCert.Check(); err != nil {
		return err
	}
	if c.Version == "" {
		c.Version = "0.0.0"
	}
	return nil
}

// Close stops following events and serving streams. Sandboxes and containers
// are left as they are.
func (s *Service) Close() error {
	ctx, done := context.WithTimeout(context.Background(), cleanupTimeout)
	defer done()
	err := s.creates.wait(ctx)
	s.cancel()
	if serr := s.stream.Close(); err == nil {
		err = serr
	}
	s.events.close()
	s.wg.Wait()
	s.flusher.flush()
	s.seq.Close()
	return err
}

// PullProgress returns the image pulls that are going on now.
func (s *Service) PullProgress() []images.Progress { return s.pulls.list() }

// newID returns a fresh object id: 64 hexadecimal digits.
func newID() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return hex.EncodeToString(b[:])
}

func (s *Service) sandboxDir(id string) string { return filepath.Join(s.cfg.RunDir, "sandboxes", id) }

// etcDir holds the files of a sandbox that its containers see in /etc, and
// write to: they must not fill the memory either, see volumeDir.
func (s *Service) etcDir(id string) string    { return filepath.Join(s.cfg.DataDir, "cri", "etc", id) }
func (s *Service) netnsPath(id string) string { return filepath.Join(s.cfg.RunDir, "netns", id) }
func (s *Service) containerDir(id string) string {
	return filepath.Join(s.cfg.RunDir, "containers", id)
}
func (s *Service) rootfsPath(id string) string { return filepath.Join(s.containerDir(id), "rootfs") }

// volumeDir holds what image-declared volumes of a container store; it must
// not fill the memory, so it is not below the run directory.
func (s *Service) volumeDir(id string) string {
	return filepath.Join(s.cfg.DataDir, "cri", "volumes", id)
}

// now is the clock of the records, in nanoseconds.
func now() int64 { return time.Now().UnixNano() }
