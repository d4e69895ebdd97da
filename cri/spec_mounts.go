package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux/label"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"
)

// defaultMounts are those of every Linux container.
func defaultMounts(privileged bool) []specs.Mount {
	mode := "ro"
	if privileged {
		mode = "rw"
	}
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", mode}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", mode}},
	}
}

// specMounts merges the defaults, the sandbox' files, the image's volumes and
// the request's mounts. The more specific wins, and parents come first.
func (s *Service) specMounts(ctx context.Context, in *specInput, spec *specs.Spec) error {
	requested := slices.Clone(in.mounts)
	for _, extra := range append(s.sandboxMounts(in), in.volumes...) {
		if !mountsAt(in.mounts, extra.GetContainerPath()) {
			requested = append(requested, extra)
		}
	}
	slices.SortStableFunc(requested, func(a, b *runtimeapi.Mount) int {
		return depth(a.GetContainerPath()) - depth(b.GetContainerPath())
	})
	ownDev := mountsAt(requested, "/dev")
	for _, m := range defaultMounts(in.privileged()) {
		if mountsAt(requested, m.Destination) || (ownDev && strings.HasPrefix(m.Destination, "/dev/")) {
			continue
		}
		if m.Destination == "/sys" && in.sandbox.hostNetwork() && userns(in.sandbox) {
			// A user namespace may not mount sysfs for a network namespace
			// that it does not own.
			m = specs.Mount{Destination: "/sys", Type: "bind", Source: "/sys", Options: []string{"rbind", "rro", "nosuid", "nodev", "noexec"}}
		}
		spec.Mounts = append(spec.Mounts, m)
	}
	for _, m := range requested {
		mount, err := s.bindMount(ctx, m, in.mountLabel, spec)
		if err != nil {
			return err
		}
		spec.Mounts = append(spec.Mounts, *mount)
	}
	return nil
}

func mountsAt(mounts []*runtimeapi.Mount, dst string) bool {
	dst = path.Clean(dst)
	return slices.ContainsFunc(mounts, func(m *runtimeapi.Mount) bool { return path.Clean(m.GetContainerPath()) == dst })
}

func depth(p string) int { return strings.Count(path.Clean("/"+p), "/") }

// sandboxMounts are the pod's own files.
func (s *Service) sandboxMounts(in *specInput) []*runtimeapi.Mount {
	dir, etc := s.sandboxDir(in.sandbox.id), s.etcDir(in.sandbox.id)
	u := in.sandbox.namespaces().GetUsernsOptions()
	var out []*runtimeapi.Mount
	for _, f := range []struct{ file, at string }{{"hostname", "/etc/hostname"}, {"hosts", "/etc/hosts"}, {"resolv.conf", "/etc/resolv.conf"}} {
		out = append(out, &runtimeapi.Mount{
			ContainerPath: f.at, HostPath: filepath.Join(etc, f.file),
			Readonly: in.security().GetReadonlyRootfs(), SelinuxRelabel: true,
			UidMappings: u.GetUids(), GidMappings: u.GetGids(),
		})
	}
	shm := &runtimeapi.Mount{ContainerPath: "/dev/shm", HostPath: filepath.Join(dir, "shm"), SelinuxRelabel: true}
	if in.sandbox.namespaces().GetIpc() == runtimeapi.NamespaceMode_NODE {
		shm.HostPath, shm.SelinuxRelabel = "/dev/shm", false
	}
	return append(out, shm)
}

// bindMount turns one CRI mount into OCI's. A source that does not exist
// becomes a directory, as with containerd.
func (s *Service) bindMount(ctx context.Context, m *runtimeapi.Mount, mountLabel string, spec *specs.Spec) (*specs.Mount, error) {
	src, flags, err := s.resolveSource(ctx, m.GetHostPath())
	if err != nil {
		return nil, fmt.Errorf("host path %q for %q: %w", clip(m.GetHostPath()), clip(m.GetContainerPath()), err)
	}
	options := []string{"rbind"}
	switch m.GetPropagation() {
	case runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		if err := propagates(src, false); err != nil {
			return nil, err
		}
		options = append(options, "rshared")
		spec.Linux.RootfsPropagation = "rshared"
	case runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		if err := propagates(src, true); err != nil {
			return nil, err
		}
		options = append(options, "rslave")
		if spec.Linux.RootfsPropagation == "" {
			spec.Linux.RootfsPropagation = "rslave"
		}
	default:
		options = append(options, "rprivate")
	}
	switch {
	case m.GetRecursiveReadOnly() && !s.host.rro:
		return nil, fmt.Errorf("%w: the kernel has no recursive read-only mounts (host path %q): %w", crierrors.ErrRROUnsupported, clip(m.GetHostPath()), errdefs.ErrFailedPrecondition)
	case m.GetRecursiveReadOnly():
		options = append(options, "rro")
	case m.GetReadonly():
		// Or else libcontainer takes the source's flags off.
		options = append(append(options, "ro"), flags...)
	}
	// Nor says "rw" anything: what is mounted nosuid or read-only on the host is
	// so in the container.
	if m.GetSelinuxRelabel() && mountLabel != "" {
		if err := label.Relabel(src, mountLabel, false); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return nil, fmt.Errorf("relabel %q with %q: %w", src, mountLabel, err)
		}
	}
	out := &specs.Mount{Source: src, Destination: path.Join("/", m.GetContainerPath()), Type: "bind", Options: options}
	if out.UIDMappings, err = idMappings("uidMappings", m.GetUidMappings()); err != nil {
		return nil, err
	}
	if out.GIDMappings, err = idMappings("gidMappings", m.GetGidMappings()); err != nil {
		return nil, err
	}
	return out, nil
}

// resolveSource follows the links of a host path once and returns where they
// lead, making a directory where there is nothing. The kernel does the
// following, so a link exchanged meanwhile cannot make the answer a mixture. A
// dead network file system blocks such a look-up for ever; then the request
// ends with its context, naming the path, and the thread waits alone.
func (s *Service) resolveSource(ctx context.Context, p string) (string, []string, error) {
	type answer struct {
		path  string
		flags []string
		err   error
	}
	done := make(chan answer, 1)
	if !s.sources.enter(p) {
		return "", nil, fmt.Errorf("an earlier look-up of it still hangs (a dead network file system?): %w", errdefs.ErrUnavailable)
	}
	go func() {
		defer s.sources.leave(p)
		r, flags, err := s.cfg.Resolve(ctx, p)
		done <- answer{r, flags, err}
	}()
	select {
	case a := <-done:
		return a.path, a.flags, a.err
	case <-ctx.Done():
		s.sources.hung(p)
		return "", nil, fmt.Errorf("look-up hangs (a dead network file system?): %w", context.Cause(ctx))
	}
}

func lookupSource(p string) (string, []string, error) {
	fd, err := unix.Open(p, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		if err := os.MkdirAll(p, 0o755); err != nil {
			return "", nil, err
		}
		fd, err = unix.Open(p, unix.O_PATH|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return "", nil, err
	}
	defer unix.Close(fd)
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return "", nil, os.NewSyscallError("fstatfs", err)
	}
	var flags []string
	for _, f := range []struct {
		bit  int64
		name string
	}{{unix.ST_NOSUID, "nosuid"}, {unix.ST_NODEV, "nodev"}, {unix.ST_NOEXEC, "noexec"}} {
		if st.Flags&f.bit != 0 {
			flags = append(flags, f.name)
		}
	}
	r, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", nil, err
	}
	if !path.IsAbs(r) || strings.HasSuffix(r, " (deleted)") {
		// Not reachable by a path (a descriptor in /proc): the name given is
		// the only one that there is.
		return p, flags, nil
	}
	return r, flags, nil
}

// propagates checks that the mount a path is on passes mounts on: shared for
// both directions, shared or a slave for those of the host.
func propagates(src string, slaveIsEnough bool) error {
	want := "shared"
	if slaveIsEnough {
		want = "shared or slave"
	}
	infos, err := mountinfo.GetMounts(mountinfo.ParentsFilter(src))
	if err != nil {
		return fmt.Errorf("mounts above %q: %w", src, err)
	}
	var at *mountinfo.Info
	for _, i := range infos { // the deepest, and of those the last, is on top
		if at == nil || len(i.Mountpoint) >= len(at.Mountpoint) {
			at = i
		}
	}
	if at == nil {
		return fmt.Errorf("no mount found for %q: %w", src, errdefs.ErrFailedPrecondition)
	}
	for opt := range strings.SplitSeq(at.Optional, " ") {
		if strings.HasPrefix(opt, "shared:") || (slaveIsEnough && strings.HasPrefix(opt, "master:")) {
			return nil
		}
	}
	return fmt.Errorf("path %q is mounted on %q, which is not a %s mount (mount --make-rshared it): %w", src, at.Mountpoint, want, errdefs.ErrFailedPrecondition)
}

// prepareImageVolumes mounts the request's image volumes and returns the
// request's mounts with their sources filled in, and what was mounted.
func (s *Service) prepareImageVolumes(ctx context.Context, id string, mounts []*runtimeapi.Mount, u *undo) ([]*runtimeapi.Mount, []imageMount, error) {
	out := slices.Clone(mounts)
	var done []imageMount
	for i, m := range mounts {
		if m.GetImage().GetImage() == "" {
			continue
		}
		img, err := s.images.Get(ctx, m.GetImage().GetImage())
		if err != nil {
			return nil, nil, fmt.Errorf("%w: image %q for %q: %w", crierrors.ErrImageVolumeMountFailed, clip(m.GetImage().GetImage()), clip(m.GetContainerPath()), err)
		}
		uids, err := idMappings("uidMappings", m.GetUidMappings())
		if err != nil {
			return nil, nil, err
		}
		gids, err := idMappings("gidMappings", m.GetGidMappings())
		if err != nil {
			return nil, nil, err
		}
		im := s.imageMount(id, i)
		if err := os.Mkdir(im.Target, 0o700); err != nil {
			return nil, nil, err
		}
		u.push("image volume", func(ctx context.Context) error { return s.dropImageVolume(ctx, im) })
		if err := s.images.MountImage(ctx, im.Key, img.ID, im.Target, uids, gids); err != nil {
			return nil, nil, fmt.Errorf("%w: %w", crierrors.ErrImageVolumeMountFailed, err)
		}
		done = append(done, im)
		src, err := imageSubPath(im.Target, m.GetImageSubPath())
		if err != nil {
			return nil, nil, fmt.Errorf("%w: image_sub_path %q: %w", crierrors.ErrImageVolumeMountFailed, clip(m.GetImageSubPath()), err)
		}
		out[i] = &runtimeapi.Mount{
			ContainerPath: m.GetContainerPath(), HostPath: src, Readonly: true,
			SelinuxRelabel: m.GetSelinuxRelabel(), Propagation: m.GetPropagation(), RecursiveReadOnly: m.GetRecursiveReadOnly(),
		}
	}
	return out, done, nil
}

// volumeKey is between a container's id and a number in the key of an image
// volume's snapshot.
const volumeKey = "-volume-"

// imageMount is where the image volume of a container's i-th mount is.
func (s *Service) imageMount(id string, i int) imageMount {
	return imageMount{
		Key:    fmt.Sprintf("%s%s%d", id, volumeKey, i),
		Target: filepath.Join(s.containerDir(id), fmt.Sprintf("image-%d", i)),
	}
}

func (s *Service) dropImageVolume(ctx context.Context, im imageMount) error {
	if err := s.images.UnmountRootfs(ctx, im.Key, im.Target); err != nil {
		return err
	}
	if err := os.Remove(im.Target); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}

// imageSubPath resolves a path inside a mounted image. Links in the image stay
// inside of it (CVE-2022-23648); the tree is read-only, so the answer holds.
func imageSubPath(root, sub string) (string, error) {
	if sub == "" {
		return root, nil
	}
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, sub, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return "", fmt.Errorf("in the image: %w", err)
	}
	defer unix.Close(fd)
	return os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
}
