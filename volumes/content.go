package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	podresource "k8s.io/kubernetes/pkg/api/v1/resource"
	"k8s.io/kubernetes/pkg/fieldpath"
)

func parentOf(p string) string { return filepath.Dir(p) }

// hasContent says whether podd writes the content of a volume.
func hasContent(vol *v1.Volume) bool {
	return vol.ConfigMap != nil || vol.Secret != nil || vol.DownwardAPI != nil || vol.Projected != nil
}

// inMemory says whether that content must not reach the disk. Upstream has all
// of these but configMap on a tmpfs of their own.
func inMemory(vol *v1.Volume) bool { return vol.ConfigMap == nil }

// setupContent makes a volume whose content podd writes. kind is the open
// directory of its plugin.
func (v *Volumes) setupContent(ctx context.Context, pod *v1.Pod, kind *dir, vol *v1.Volume) error {
	// First the content: what is missing leaves nothing behind.
	files, err := v.content(ctx, pod, vol)
	if err != nil {
		return err
	}
	if err := unix.Mkdirat(kind.fd, vol.Name, 0o777); err != nil && !errors.Is(err, unix.EEXIST) {
		return &os.PathError{Op: "mkdir", Path: vol.Name, Err: err}
	}
	if inMemory(vol) {
		mounted, err := isMountRoot(kind, vol.Name)
		if err != nil {
			return err
		}
		if !mounted {
			if err := v.mountTmpfs(kind, vol.Name, v.memorySize(pod, nil)); err != nil {
				return err
			}
		}
	}
	root, err := kind.openDir(vol.Name)
	if err != nil {
		return err
	}
	defer root.close()
	mode := uint32(0o777)
	if group := podGroup(pod); group >= 0 {
		if err := unix.Fchown(root.fd, -1, group); err != nil {
			return fmt.Errorf("fsGroup %d: %w", group, err)
		}
		mode |= unix.S_ISGID
	}
	if err := unix.Fchmod(root.fd, mode); err != nil {
		return err
	}
	_, err = writeAtomically(root, files, podGroup(pod))
	return err
}

// writeContent renews the content of a volume that is there.
func (v *Volumes) writeContent(ctx context.Context, pod *v1.Pod, root *dir, vol *v1.Volume) error {
	files, err := v.content(ctx, pod, vol)
	if err != nil {
		return err
	}
	changed, err := writeAtomically(root, files, podGroup(pod))
	if changed {
		v.log.Debug("volume content renewed", "namespace", pod.Namespace, "pod", pod.Name, "volume", vol.Name)
	}
	return err
}

// projection is one file to be written.
type projection struct {
	data []byte
	mode uint32
	user int // its owner on the host
}

// files are the content of a volume, by relative path.
type files map[string]projection

// content assembles the files of a volume.
func (v *Volumes) content(ctx context.Context, pod *v1.Pod, vol *v1.Volume) (files, error) {
	out := files{}
	var err error
	switch {
	case vol.ConfigMap != nil:
		s := vol.ConfigMap
		err = v.addConfigMap(out, pod.Namespace, s.Name, s.Items, mode(s.DefaultMode), s.Optional)
	case vol.Secret != nil:
		s := vol.Secret
		err = v.addSecret(out, pod.Namespace, s.SecretName, s.Items, mode(s.DefaultMode), s.Optional)
	case vol.DownwardAPI != nil:
		err = v.addDownward(out, pod, vol.DownwardAPI.Items, mode(vol.DownwardAPI.DefaultMode))
	case vol.Projected != nil:
		def := mode(vol.Projected.DefaultMode)
		for i := range vol.Projected.Sources {
			s := &vol.Projected.Sources[i]
			// Later sources win over earlier ones, as upstream.
			switch {
			case s.ConfigMap != nil:
				err = v.addConfigMap(out, pod.Namespace, s.ConfigMap.Name, s.ConfigMap.Items, def, s.ConfigMap.Optional)
			case s.Secret != nil:
				err = v.addSecret(out, pod.Namespace, s.Secret.Name, s.Secret.Items, def, s.Secret.Optional)
			case s.DownwardAPI != nil:
				err = v.addDownward(out, pod, s.DownwardAPI.Items, def)
			case s.ServiceAccountToken != nil:
				err = v.addToken(ctx, out, pod, vol, s.ServiceAccountToken, def)
			case s.ClusterTrustBundle != nil:
				err = fmt.Errorf("clusterTrustBundle: not supported, as without upstream's gate ClusterTrustBundleProjection: remove the source: %w", errdefs.ErrNotImplemented)
			case s.PodCertificate != nil:
				err = fmt.Errorf("podCertificate: not supported, as without upstream's gate PodCertificateRequest: remove the source: %w", errdefs.ErrNotImplemented)
			default:
				err = fmt.Errorf("names no source: %w", errdefs.ErrInvalidArgument)
			}
			if err != nil {
				err = fmt.Errorf("projected source %d: %w", i, err)
				break
			}
		}
	}
	if err != nil {
		return nil, err
	}
	return out, checkPaths(out)
}

// addToken writes a token of the pod's service account. Where the volume has a
// group or all containers have one user, it is theirs alone (upstream:
// projected.collectData).
func (v *Volumes) addToken(ctx context.Context, out files, pod *v1.Pod, vol *v1.Volume, source *v1.ServiceAccountTokenProjection, def uint32) error {
	p := path.Clean(source.Path)
	text, err := v.token(ctx, pod, source, func() string { return v.writtenFile(pod.UID, vol, p) })
	if err != nil {
		return err
	}
	f := projection{data: []byte(text), mode: def, user: podUser(pod)}
	if podGroup(pod) >= 0 || f.user != 0 {
		f.mode = 0o600
	}
	out[p] = f
	return nil
}

// podUser is the user that all containers of a pod run as by the manifest; 0
// when there is not one (upstream: util.FsUserFrom).
func podUser(pod *v1.Pod) int {
	user := -1
	for _, list := range [][]v1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			own := int64(-1)
			if sc := pod.Spec.SecurityContext; sc != nil && sc.RunAsUser != nil {
				own = *sc.RunAsUser
			}
			if sc := list[i].SecurityContext; sc != nil && sc.RunAsUser != nil {
				own = *sc.RunAsUser
			}
			if own < 0 || user >= 0 && user != int(own) {
				return 0
			}
			user = int(own)
		}
	}
	return max(user, 0)
}

func mode(m *int32) uint32 {
	if m == nil {
		return 0o644 // upstream's default
	}
	return uint32(*m) & 0o777
}

func isOptional(o *bool) bool { return o != nil && *o }

func (v *Volumes) addConfigMap(out files, namespace, name string, items []v1.KeyToPath, def uint32, optional *bool) error {
	if v.cfg.Objects == nil {
		return fmt.Errorf("configMap %s/%s: %w", namespace, name, errdefs.ErrNotFound)
	}
	m, err := v.cfg.Objects.ConfigMap(namespace, name)
	switch {
	case err == nil:
	case errdefs.IsNotFound(err) && isOptional(optional):
		return nil
	default:
		return fmt.Errorf("configMap %s/%s: %w", namespace, name, err)
	}
	all := make(map[string][]byte, len(m.Data)+len(m.BinaryData))
	for k, d := range m.Data {
		all[k] = []byte(d)
	}
	for k, d := range m.BinaryData {
		all[k] = d
	}
	if err := pick(out, "config", all, items, def, isOptional(optional)); err != nil {
		return fmt.Errorf("configMap %s/%s: %w", namespace, name, err)
	}
	return nil
}

func (v *Volumes) addSecret(out files, namespace, name string, items []v1.KeyToPath, def uint32, optional *bool) error {
	if v.cfg.Objects == nil {
		return fmt.Errorf("secret %s/%s: %w", namespace, name, errdefs.ErrNotFound)
	}
	s, err := v.cfg.Objects.Secret(namespace, name)
	switch {
	case err == nil:
	case errdefs.IsNotFound(err) && isOptional(optional):
		return nil
	default:
		return fmt.Errorf("secret %s/%s: %w", namespace, name, err)
	}
	if err := pick(out, "secret", s.Data, items, def, isOptional(optional)); err != nil {
		return fmt.Errorf("secret %s/%s: %w", namespace, name, err)
	}
	return nil
}

// pick takes all keys, or those that items name. kind is upstream's word for
// whose keys they are.
func pick(out files, kind string, all map[string][]byte, items []v1.KeyToPath, def uint32, optional bool) error {
	if len(items) == 0 {
		for k, d := range all {
			out[k] = projection{data: d, mode: def}
		}
		return nil
	}
	for _, item := range items {
		d, ok := all[item.Key]
		if !ok {
			if optional {
				continue
			}
			return fmt.Errorf("references non-existent %s key: %s: %w", kind, item.Key, errdefs.ErrNotFound)
		}
		m := def
		if item.Mode != nil {
			m = mode(item.Mode)
		}
		out[item.Path] = projection{data: d, mode: m}
	}
	return nil
}

func (v *Volumes) addDownward(out files, pod *v1.Pod, items []v1.DownwardAPIVolumeFile, def uint32) error {
	for i := range items {
		item := &items[i]
		m := def
		if item.Mode != nil {
			m = mode(item.Mode)
		}
		var value string
		var err error
		switch {
		case item.FieldRef != nil:
			value, err = fieldpath.ExtractFieldPathAsString(pod, item.FieldRef.FieldPath)
			if err != nil {
				return fmt.Errorf("downwardAPI item %q: field %s: %w", item.Path, item.FieldRef.FieldPath, err)
			}
		case item.ResourceFieldRef != nil:
			r := item.ResourceFieldRef
			var allocatable v1.ResourceList
			if v.cfg.Allocatable != nil {
				allocatable = v.cfg.Allocatable()
			}
			value, err = podresource.ExtractResourceValueByContainerNameAndNodeAllocatable(r, pod, r.ContainerName, allocatable)
			if err != nil {
				return fmt.Errorf("downwardAPI item %q: resource %s of container %q: %w", item.Path, r.Resource, r.ContainerName, err)
			}
		default:
			return fmt.Errorf("downwardAPI item %q has no fieldRef and no resourceFieldRef: %w", item.Path, errdefs.ErrInvalidArgument)
		}
		out[path.Clean(item.Path)] = projection{data: []byte(value), mode: m}
	}
	return nil
}

// checkPaths refuses paths that would leave the volume or meet podd's own names
// in it (upstream: validatePath of the atomic writer), and files below files.
func checkPaths(f files) error {
	for p := range f {
		clean := path.Clean(p)
		switch {
		case p == "" || clean == ".":
			return fmt.Errorf("a file of the volume has no name: %w", errdefs.ErrInvalidArgument)
		case path.IsAbs(p):
			return fmt.Errorf("file %q of the volume: path must be relative: %w", p, errdefs.ErrInvalidArgument)
		case len(p) > 4096:
			return fmt.Errorf("file %.40q… of the volume: path is longer than 4096 bytes: %w", p, errdefs.ErrInvalidArgument)
		case strings.ContainsRune(p, 0):
			return fmt.Errorf("file %q of the volume: path holds a zero byte: %w", p, errdefs.ErrInvalidArgument)
		case strings.HasPrefix(p, ".."):
			return fmt.Errorf("file %q of the volume: path must not begin with \"..\": %w", p, errdefs.ErrInvalidArgument)
		}
		for part := range strings.SplitSeq(p, "/") {
			if part == ".." {
				return fmt.Errorf("file %q of the volume: path must not hold \"..\": %w", p, errdefs.ErrInvalidArgument)
			}
			if len(part) > 255 {
				return fmt.Errorf("file %.40q… of the volume: a name is longer than 255 bytes: %w", p, errdefs.ErrInvalidArgument)
			}
		}
		if clean != p {
			if _, ok := f[clean]; ok {
				return fmt.Errorf("file %q of the volume is there twice, as %q too: %w", p, clean, errdefs.ErrInvalidArgument)
			}
			f[clean] = f[p]
			delete(f, p)
		}
		for up := path.Dir(clean); up != "."; up = path.Dir(up) {
			if _, ok := f[up]; ok {
				return fmt.Errorf("file %q of the volume lies below %q, which is a file: %w", p, up, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}
