package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/cdi"
)

// errNoDevice says that a file is not a device node.
var errNoDevice = errors.New("not a device node")

// maxDevices bounds what one directory of devices may bring.
const maxDevices = 16384

// specDevices denies all devices but the usual ones (which libcontainer adds)
// and those asked for; privileged containers have all of the node's.
func (s *Service) specDevices(_ context.Context, in *specInput, spec *specs.Spec) error {
	r := spec.Linux.Resources
	r.Devices = []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	for i, d := range in.config.GetDevices() {
		devices, err := requestedDevices(d)
		if err != nil {
			return fmt.Errorf("config.devices[%d] %q: %w", i, clip(d.GetHostPath()), err)
		}
		access := d.GetPermissions()
		if access == "" {
			access = "rwm"
		}
		for _, dev := range devices {
			spec.Linux.Devices = append(spec.Linux.Devices, dev)
			r.Devices = append(r.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: dev.Type, Major: &dev.Major, Minor: &dev.Minor, Access: access})
		}
	}
	if in.privileged() {
		all, err := deviceTree("/dev", "/dev", nil)
		if err != nil {
			return err
		}
		spec.Linux.Devices = append(spec.Linux.Devices, all...)
		r.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	}
	return nil
}

// requestedDevices is one device, or all below a directory.
func requestedDevices(d *runtimeapi.Device) ([]specs.LinuxDevice, error) {
	host, err := filepath.EvalSymlinks(d.GetHostPath())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	at := d.GetContainerPath()
	if at == "" {
		at = d.GetHostPath()
	}
	st, err := os.Stat(host)
	if err != nil {
		return nil, err
	}
	if st.IsDir() {
		return deviceTree(host, at, nil)
	}
	dev, err := device(host, at)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return []specs.LinuxDevice{*dev}, nil
}

// deviceTree collects the device nodes below a directory, without the parts
// of /dev that are file systems of their own.
func deviceTree(host, at string, out []specs.LinuxDevice) ([]specs.LinuxDevice, error) {
	entries, err := os.ReadDir(host)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		from, to := filepath.Join(host, e.Name()), path.Join(at, e.Name())
		if e.IsDir() {
			switch e.Name() {
			case "pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev":
				continue
			}
			if out, err = deviceTree(from, to, out); err != nil {
				return nil, err
			}
			continue
		}
		if e.Name() == "console" {
			continue // libcontainer makes it
		}
		dev, err := device(from, to)
		if errors.Is(err, errNoDevice) || errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if out = append(out, *dev); len(out) > maxDevices {
			return nil, invalid("%s: more than %d devices", host, maxDevices)
		}
	}
	return out, nil
}

func device(host, at string) (*specs.LinuxDevice, error) {
	var st unix.Stat_t
	if err := unix.Lstat(host, &st); err != nil {
		return nil, &os.PathError{Op: "lstat", Path: host, Err: err}
	}
	kind := ""
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		kind = "b"
	case unix.S_IFCHR:
		kind = "c"
	default:
		return nil, fmt.Errorf("%s: %w", host, errNoDevice)
	}
	mode := os.FileMode(st.Mode &^ unix.S_IFMT)
	return &specs.LinuxDevice{
		Type: kind, Path: at, Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev)),
		FileMode: &mode, UID: &st.Uid, GID: &st.Gid,
	}, nil
}

// cdiCache reads the CDI specifications when the first container wants one.
type cdiCache struct {
	dirs  []string
	once  sync.Once
	cache *cdi.Cache
	err   error
}

// specCDI applies the edits of the CDI devices that the request names, in its
// field or in annotations (cdi.k8s.io/…, as device plugins write them).
func (s *Service) specCDI(_ context.Context, in *specInput, spec *specs.Spec) error {
	names, err := cdiNames(in.config)
	if err != nil || len(names) == 0 {
		return err
	}
	c := &s.cdi
	c.once.Do(func() { c.cache, c.err = cdi.NewCache(cdi.WithSpecDirs(c.dirs...), cdi.WithAutoRefresh(false)) })
	if c.err != nil {
		return fmt.Errorf("CDI: %w", c.err)
	}
	// Broken specifications of other vendors are no reason to fail; a device
	// that cannot be found is, and says so below.
	if err := c.cache.Refresh(); err != nil {
		s.log.Warn("CDI specifications with errors", "error", err)
	}
	if missing, err := c.cache.InjectDevices(spec, names...); err != nil {
		if len(missing) > 0 {
			return fmt.Errorf("CDI devices %s are in no specification in %s: %w", strings.Join(missing, ", "), strings.Join(c.dirs, ", "), errdefs.ErrNotFound)
		}
		return fmt.Errorf("CDI devices %s: %w", strings.Join(names, ", "), err)
	}
	return nil
}

func cdiNames(c *runtimeapi.ContainerConfig) ([]string, error) {
	var names []string
	seen := make(map[string]bool)
	add := func(n string) {
		if !seen[n] {
			seen[n] = true
			names = append(names, n)
		}
	}
	for _, d := range c.GetCDIDevices() {
		add(d.GetName())
	}
	if len(c.GetAnnotations()) > 0 {
		_, annotated, err := cdi.ParseAnnotations(c.GetAnnotations())
		if err != nil {
			return nil, invalid("config.annotations: %v", err)
		}
		for _, n := range annotated {
			add(n)
		}
	}
	return names, nil
}
