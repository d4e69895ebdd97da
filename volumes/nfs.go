package volumes

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
)

// setupNFS mounts an NFS export. What is mounted already stays.
func (v *Volumes) setupNFS(ctx context.Context, p *dir, vol *v1.Volume) error {
	all, err := p.makeDir(volumesDir, 0o750)
	if err != nil {
		return err
	}
	defer all.close()
	kind, err := all.makeDir(pluginNFS, 0o750)
	if err != nil {
		return err
	}
	defer kind.close()
	if err := unix.Mkdirat(kind.fd, vol.Name, 0o750); err != nil && !errors.Is(err, unix.EEXIST) {
		return &os.PathError{Op: "mkdir", Path: vol.Name, Err: err}
	}
	// The mount table, not stat: that would ask the server.
	real, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(kind.fd))
	if err != nil {
		return err
	}
	target := real + "/" + vol.Name
	table, err := readMounts()
	if err != nil {
		return err
	}
	for _, m := range table.entries {
		if m.point == target {
			return nil
		}
	}
	return v.helper(ctx, foreignTimeout, request{
		Op: opMountNFS, Path: target, Server: vol.NFS.Server, Source: vol.NFS.Path, ReadOnly: vol.NFS.ReadOnly,
	})
}

// nfsVersions are tried in this order, as mount.nfs(8) does: the highest that
// both sides know.
var nfsVersions = []string{"4.2", "4.1", "4.0", "3"}

// mountNFS mounts server:export on target. It speaks to the kernel directly: the
// options are those that mount.nfs(8) would work out.
func mountNFS(server, export, target string, readOnly bool) error {
	host := strings.TrimSuffix(strings.TrimPrefix(server, "["), "]")
	addrs, err := net.LookupIP(host)
	if err != nil {
		return fmt.Errorf("server %s: %w", server, errors.Join(err, errdefs.ErrUnavailable))
	}
	flags := uintptr(0)
	if readOnly {
		flags |= unix.MS_RDONLY
	}
	var errs []error
	for _, addr := range addrs {
		for _, version := range nfsVersions {
			client, err := clientAddress(addr)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", addr, err))
				break
			}
			err = unix.Mount(nfsSource(host, export), target, "nfs", flags, nfsOptions(addr, client, version))
			if err == nil {
				return nil
			}
			errs = append(errs, fmt.Errorf("%s version %s: %w", addr, version, err))
			if !otherVersion(err) {
				break
			}
		}
	}
	return errors.Join(append(errs, errdefs.ErrUnavailable)...)
}

// otherVersion says whether another version of the protocol may do: the others
// that mount.nfs gives up on are about server or export.
func otherVersion(err error) bool {
	return errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EPROTO) || errors.Is(err, unix.EINVAL) ||
		errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT)
}

func nfsSource(host, export string) string {
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return host + ":" + path.Clean("/"+export)
}

// nfsOptions are the mount data for one version (Linux fs/nfs/fs_context.c).
func nfsOptions(addr, client net.IP, version string) string {
	proto := "tcp"
	if addr.To4() == nil {
		proto = "tcp6"
	}
	o := "vers=" + version + ",proto=" + proto + ",addr=" + addr.String()
	if version == "3" {
		// The kernel asks the server's mount daemon itself.
		return o + ",mountaddr=" + addr.String() + ",mountproto=" + proto + ",mountvers=3"
	}
	return o + ",clientaddr=" + client.String()
}

// clientAddress is the address of this host that the server sees.
func clientAddress(server net.IP) (net.IP, error) {
	// Connecting a datagram socket sends nothing.
	c, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: server, Port: 2049})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).IP, nil
}
