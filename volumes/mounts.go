package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/third_party/forked/golang/expansion"
)

// Mounts returns what the runtime is to mount for the volumeMounts of a
// container, in their order, after Setup. env returns the value of a variable of
// the container, for $(NAME) in a subPathExpr; one without a value is an error.
//
// A subPath is looked up inside its volume by descriptor and bound to a place
// of the pod's, so that nobody can exchange it for a link later. cleanup takes
// these binds away: call it when the container could not be started, or has
// gone; Teardown does so too. It is never nil.
//
// For an image volume the mount carries the reference from the manifest; the
// caller replaces it by the pulled image.
func (v *Volumes) Mounts(ctx context.Context, pod *v1.Pod, container *v1.Container, env func(name string) string) (mounts []*runtimeapi.Mount, cleanup func(), err error) {
	var bound []string
	cleanup = func() {
		for _, name := range bound {
			v.unbind(pod, container, name)
		}
	}
	defer func() {
		if err != nil {
			cleanup()
			mounts, cleanup = nil, func() {}
		}
	}()
	if len(container.VolumeDevices) > 0 {
		d := container.VolumeDevices[0]
		return nil, cleanup, fmt.Errorf("container %q: volumeDevices: block volume %q needs a claim and a cluster: %w", container.Name, d.Name, errdefs.ErrNotImplemented)
	}
	claims, err := v.claims(pod)
	if err != nil {
		return nil, cleanup, err
	}
	byName := map[string]*v1.Volume{}
	for i := range pod.Spec.Volumes {
		byName[pod.Spec.Volumes[i].Name] = &pod.Spec.Volumes[i]
	}
	for i := range container.VolumeMounts {
		m := &container.VolumeMounts[i]
		vol, ok := byName[m.Name]
		if !ok {
			return nil, cleanup, fmt.Errorf("container %q mounts volume %q at %s, but the pod has no such volume: %w", container.Name, m.Name, m.MountPath, errdefs.ErrNotFound)
		}
		if err := unsupported(vol); err != nil {
			return nil, cleanup, fmt.Errorf("container %q: volume %q: %w", container.Name, m.Name, err)
		}
		made, err := claims.volume(pod, vol)
		if err != nil {
			return nil, cleanup, fmt.Errorf("container %q: volume %q: %w", container.Name, m.Name, err)
		}
		mount, err := v.mount(ctx, pod, container, i, made, env, &bound)
		if err != nil {
			return nil, cleanup, fmt.Errorf("container %q: volume %q at %s: %w", container.Name, m.Name, m.MountPath, err)
		}
		mounts = append(mounts, mount)
	}
	return mounts, cleanup, nil
}

// claims are what the pod's claims were bound to by Setup.
func (v *Volumes) claims(pod *v1.Pod) (*claimsRecord, error) {
	if !hasClaims(pod) {
		return &claimsRecord{}, nil
	}
	p, err := v.openPod(pod.UID, false)
	if err != nil {
		return nil, err
	}
	defer p.close()
	return readClaims(p)
}

func (v *Volumes) mount(ctx context.Context, pod *v1.Pod, container *v1.Container, index int, vol *volume, env func(name string) string, bound *[]string) (*runtimeapi.Mount, error) {
	m := &container.VolumeMounts[index]
	content := hasContent(vol.Volume)
	out := &runtimeapi.Mount{ContainerPath: m.MountPath, Readonly: m.ReadOnly || content || vol.readOnly}
	if !path.IsAbs(out.ContainerPath) {
		out.ContainerPath = "/" + out.ContainerPath // as upstream
	}
	switch p := m.MountPropagation; {
	case p == nil || *p == v1.MountPropagationNone:
		out.Propagation = runtimeapi.MountPropagation_PROPAGATION_PRIVATE
	case *p == v1.MountPropagationHostToContainer:
		out.Propagation = runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
	case *p == v1.MountPropagationBidirectional:
		out.Propagation = runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL
	default:
		return nil, fmt.Errorf("mountPropagation %q: %w", *p, errdefs.ErrInvalidArgument)
	}
	rro, err := v.recursiveReadOnly(m)
	if err != nil {
		return nil, err
	}
	out.RecursiveReadOnly = rro
	// The pod's own directories get the pod's label; what belongs to the host or
	// to another machine keeps its own.
	out.SelinuxRelabel = vol.EmptyDir != nil || content

	sub := m.SubPath
	if m.SubPathExpr != "" {
		missing := ""
		sub = expansion.Expand(m.SubPathExpr, func(name string) string {
			value := ""
			if env != nil {
				value = env(name)
			}
			if value == "" {
				missing = name
			}
			return value
		})
		if missing != "" {
			return nil, fmt.Errorf("subPathExpr %q: the container's variable %s has no value: %w", m.SubPathExpr, missing, errdefs.ErrInvalidArgument)
		}
		if sub == "" {
			return nil, fmt.Errorf("subPathExpr %q is empty once expanded: %w", m.SubPathExpr, errdefs.ErrInvalidArgument)
		}
	}
	if err := checkSubPath(sub); err != nil {
		return nil, err
	}
	if vol.Image != nil {
		out.Image, out.ImageSubPath, out.Readonly = &runtimeapi.ImageSpec{Image: vol.Image.Reference}, sub, true
		return out, nil
	}
	out.HostPath = v.hostPath(pod.UID, vol)
	if sub == "" {
		return out, nil
	}
	name := bindName(vol, container, index)
	target, err := v.bindTarget(ctx, pod, name)
	if err != nil {
		return nil, err
	}
	*bound = append(*bound, name)
	if err := v.prepareSubPath(ctx, vol, out.HostPath, sub, target); err != nil {
		return nil, fmt.Errorf("subPath %q: %w", sub, err)
	}
	out.HostPath = target
	return out, nil
}

func (v *Volumes) recursiveReadOnly(m *v1.VolumeMount) (bool, error) {
	if m.RecursiveReadOnly == nil || *m.RecursiveReadOnly == v1.RecursiveReadOnlyDisabled {
		return false, nil
	}
	if !m.ReadOnly {
		return false, fmt.Errorf("recursiveReadOnly needs readOnly: %w", errdefs.ErrInvalidArgument)
	}
	if m.MountPropagation != nil && *m.MountPropagation != v1.MountPropagationNone {
		return false, fmt.Errorf("recursiveReadOnly does not go with mountPropagation %s: %w", *m.MountPropagation, errdefs.ErrInvalidArgument)
	}
	switch *m.RecursiveReadOnly {
	case v1.RecursiveReadOnlyIfPossible:
		return v.cfg.RecursiveReadOnly, nil
	case v1.RecursiveReadOnlyEnabled:
		if !v.cfg.RecursiveReadOnly {
			return false, fmt.Errorf("recursiveReadOnly: this kernel cannot (mount_setattr, Linux 5.12): %w", errdefs.ErrFailedPrecondition)
		}
		return true, nil
	}
	return false, fmt.Errorf("recursiveReadOnly %q: %w", *m.RecursiveReadOnly, errdefs.ErrInvalidArgument)
}

// checkSubPath refuses what leaves the volume by its words.
func checkSubPath(sub string) error {
	if path.IsAbs(sub) {
		return fmt.Errorf("subPath %q must be relative: %w", sub, errdefs.ErrInvalidArgument)
	}
	for part := range strings.SplitSeq(sub, "/") {
		if part == ".." {
			return fmt.Errorf("subPath %q must not hold \"..\": %w", sub, errdefs.ErrInvalidArgument)
		}
	}
	if strings.ContainsRune(sub, 0) {
		return fmt.Errorf("subPath %q holds a zero byte: %w", sub, errdefs.ErrInvalidArgument)
	}
	return nil
}

// bindName is the place of a subPath's bind below the pod's volume-subpaths.
func bindName(vol *volume, container *v1.Container, index int) string {
	return filepath.Join(vol.Name, container.Name, strconv.Itoa(index))
}

// bindTarget makes the directory for a bind and takes away what an earlier start
// of the container left there: its file may have been replaced since.
func (v *Volumes) bindTarget(ctx context.Context, pod *v1.Pod, name string) (string, error) {
	p, err := v.openPod(pod.UID, true)
	if err != nil {
		return "", err
	}
	defer p.close()
	at, err := p.makeDir(subPathsDir, 0o750)
	if err != nil {
		return "", err
	}
	parts := strings.Split(name, "/")
	for _, part := range parts[:len(parts)-1] {
		next, err := at.makeDir(part, 0o750)
		at.close()
		if err != nil {
			return "", err
		}
		at = next
	}
	defer at.close()
	if err := v.dropBind(ctx, at, parts[len(parts)-1]); err != nil {
		return "", err
	}
	return filepath.Join(v.podDir(pod.UID), subPathsDir, name), nil
}

// dropBind detaches whatever is bound on name in d and removes the place. The
// containers keep their own mounts of it.
func (v *Volumes) dropBind(ctx context.Context, d *dir, name string) error {
	real, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(d.fd))
	if err != nil {
		return err
	}
	table, err := readMounts()
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(table.entries) {
		if m.point != real+"/"+name {
			continue
		}
		if foreignType(m.fstype) {
			// Whoever gives up the last use of a filesystem waits for it.
			err = v.unmountForeign(ctx, m, true)
		} else {
			err = unmountPoint(d.fd, name, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		if err != nil {
			return fmt.Errorf("%s/%s: %w", d.name, name, err)
		}
	}
	err = unix.Unlinkat(d.fd, name, 0)
	if errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EPERM) {
		err = unix.Unlinkat(d.fd, name, unix.AT_REMOVEDIR)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "remove", Path: d.name + "/" + name, Err: err}
	}
	return nil
}

// unbind takes one bind away; what fails is left to Teardown.
func (v *Volumes) unbind(pod *v1.Pod, container *v1.Container, name string) {
	p, err := v.openPod(pod.UID, false)
	if err != nil {
		return
	}
	defer p.close()
	parts := strings.Split(name, "/")
	at, err := p.walk(append([]string{subPathsDir}, parts[:len(parts)-1]...)...)
	if err != nil {
		return
	}
	defer at.close()
	ctx, cancel := context.WithTimeout(context.Background(), foreignTimeout)
	defer cancel()
	if err := v.dropBind(ctx, at, parts[len(parts)-1]); err != nil {
		v.log.Debug("subPath is left for the end of the pod", "pod", pod.Name, "container", container.Name, "error", err)
	}
}

// prepareSubPath binds a subPath on target: here, or in a helper if the volume
// is on a foreign filesystem.
func (v *Volumes) prepareSubPath(ctx context.Context, vol *volume, path, sub, target string) error {
	foreign := vol.NFS != nil
	if vol.HostPath != nil || vol.local != "" {
		table, err := readMounts()
		if err != nil {
			return err
		}
		foreign = table.foreignPath(filepath.Join(path, sub))
	}
	if foreign {
		return v.helper(ctx, foreignTimeout, request{Op: opSubPath, Path: path, SubPath: sub, Target: target})
	}
	root, err := openVolume(path)
	if err != nil {
		return err
	}
	defer root.close()
	return bindSubPath(root, sub, target)
}
