package volumes

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// setupNFS mounts an NFS export. What is mounted already stays.
func (v *Volumes) setupNFS(ctx context.Context, p *dir, vol *volume) error {
	target, mounted, err := v.place(p, vol)
	if err != nil || mounted {
		return err
	}
	return v.helper(ctx, foreignTimeout, request{
		Op: opMountNFS, Path: target, Server: vol.NFS.Server, Source: vol.NFS.Path, ReadOnly: vol.readOnly, Options: vol.options,
	})
}

// nfsVersions are tried in this order, as mount.nfs(8) does: the highest that
// both sides know.
var nfsVersions = []string{"4.2", "4.1", "4.0", "3"}

// nfsMount is what mount options ask for.
type nfsMount struct {
	flags    uintptr
	versions []string
	// data are the options that go to the kernel as they are.
	data []string
	// keys are the names of these.
	keys map[string]bool
}

// mountFlags are the options that are flags of mount(2).
var mountFlags = map[string]struct{ set, clear uintptr }{
	"ro": {set: unix.MS_RDONLY}, "rw": {clear: unix.MS_RDONLY},
	"nosuid": {set: unix.MS_NOSUID}, "suid": {clear: unix.MS_NOSUID},
	"nodev": {set: unix.MS_NODEV}, "dev": {clear: unix.MS_NODEV},
	"noexec": {set: unix.MS_NOEXEC}, "exec": {clear: unix.MS_NOEXEC},
	"sync": {set: unix.MS_SYNCHRONOUS}, "async": {clear: unix.MS_SYNCHRONOUS},
	"dirsync": {set: unix.MS_DIRSYNC},
	"noatime": {set: unix.MS_NOATIME}, "atime": {clear: unix.MS_NOATIME},
	"nodiratime": {set: unix.MS_NODIRATIME}, "diratime": {clear: unix.MS_NODIRATIME},
	"relatime": {set: unix.MS_RELATIME}, "norelatime": {clear: unix.MS_RELATIME},
	"strictatime": {set: unix.MS_STRICTATIME}, "lazytime": {set: unix.MS_LAZYTIME},
	"defaults": {},
}

// nfsUserOptions are for programs that mount, not for the kernel (nfs(5),
// fstab(5)): podd tries again by itself.
var nfsUserOptions = []string{"bg", "fg", "retry", "auto", "noauto", "_netdev", "nofail", "user", "nouser", "users", "owner", "group", "comment"}

// nfsParse sorts mount options; each element may hold several, by commas.
func nfsParse(options []string) (*nfsMount, error) {
	m := &nfsMount{versions: nfsVersions, keys: map[string]bool{}}
	version := ""
	for o := range strings.SplitSeq(strings.Join(options, ","), ",") {
		o = strings.TrimSpace(o)
		key, value, _ := strings.Cut(o, "=")
		if o == "" || strings.HasPrefix(key, "x-") || slices.Contains(nfsUserOptions, key) {
			continue
		}
		if f, ok := mountFlags[o]; ok {
			m.flags = m.flags&^f.clear | f.set
			continue
		}
		switch {
		case key == "vers" || key == "nfsvers":
			version = value
			continue
		case key == "minorversion":
			version = "4." + value
			continue
		case len(o) >= 2 && o[0] == 'v' && o[1] >= '2' && o[1] <= '4': // v3, v4.1
			version = o[1:]
			continue
		}
		m.keys[key] = true
		m.data = append(m.data, o)
	}
	switch version {
	case "":
	case "4":
		m.versions = []string{"4.2", "4.1", "4.0"}
	case "3", "4.0", "4.1", "4.2":
		m.versions = []string{version}
	default:
		return nil, fmt.Errorf("mount option nfsvers=%s: want 3, 4, 4.0, 4.1 or 4.2: %w", version, errdefs.ErrInvalidArgument)
	}
	return m, nil
}

// mountNFS mounts an export. It speaks to the kernel directly: the options that
// are not given are those that mount.nfs(8) would work out.
func mountNFS(r request) error {
	m, err := nfsParse(r.Options)
	if err != nil {
		return err
	}
	if r.ReadOnly {
		m.flags |= unix.MS_RDONLY
	}
	host := strings.TrimSuffix(strings.TrimPrefix(r.Server, "["), "]")
	addrs, err := net.LookupIP(host)
	if err != nil {
		return fmt.Errorf("server %s: %w", r.Server, errors.Join(err, errdefs.ErrUnavailable))
	}
	var errs []error
	for _, addr := range addrs {
		for _, version := range m.versions {
			client, err := clientAddress(addr)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", addr, err))
				break
			}
			err = m.prepare(version)
			if err == nil {
				err = unix.Mount(nfsSource(host, r.Source), r.Path, "nfs", m.flags, m.options(addr, client, version))
			}
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

// statdPID is where rpc.statd writes its process id.
const statdPID = "/run/rpc.statd.pid"

// prepare starts the daemon that version 3 needs for locks, as mount.nfs(8)
// does: without it every lock fails.
func (m *nfsMount) prepare(version string) error {
	if version != "3" || m.keys["nolock"] || m.keys["local_lock"] {
		return nil
	}
	if pid, err := os.ReadFile(statdPID); err == nil {
		if _, err := os.Stat("/proc/" + strings.TrimSpace(string(pid))); err == nil {
			return nil
		}
	}
	if out, err := exec.Command("/usr/sbin/start-statd").CombinedOutput(); err != nil {
		return fmt.Errorf("rpc.statd is needed for locks and cannot be started: %w: %s (install nfs-common, or use version 4 or the mount option nolock)", err, strings.TrimSpace(string(out)))
	}
	return nil
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

// options are the mount data for one version (Linux fs/nfs/fs_context.c).
func (m *nfsMount) options(addr, client net.IP, version string) string {
	proto := "tcp"
	if addr.To4() == nil {
		proto = "tcp6"
	}
	out := append([]string{"vers=" + version}, m.data...)
	add := func(key, value string) {
		if !m.keys[key] {
			out = append(out, key+"="+value)
		}
	}
	if !m.keys["udp"] && !m.keys["tcp"] && !m.keys["rdma"] {
		add("proto", proto)
	}
	add("addr", addr.String())
	if version == "3" {
		// The kernel asks the server's mount daemon itself.
		add("mountaddr", addr.String())
		add("mountproto", proto)
		add("mountvers", "3")
	} else {
		add("clientaddr", client.String())
	}
	return strings.Join(out, ",")
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
