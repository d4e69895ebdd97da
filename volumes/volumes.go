package volumes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/volumes/tree"
)

// Directories of a pod, as upstream's kubelet has them, below
// <root-dir>/pods/<uid>:
//
//	volumes/<plugin>/<name>                            the volume
//	volume-subpaths/<name>/<container>/<mount index>   a verified subPath, bound
const (
	volumesDir  = "volumes"
	subPathsDir = "volume-subpaths"

	pluginEmptyDir  = "kubernetes.io~empty-dir"
	pluginConfigMap = "kubernetes.io~configmap"
	pluginSecret    = "kubernetes.io~secret"
	pluginDownward  = "kubernetes.io~downward-api"
	pluginProjected = "kubernetes.io~projected"
	pluginNFS       = "kubernetes.io~nfs"
	pluginLocal     = "kubernetes.io~local-volume"
)

const (
	// foreignTimeout bounds one operation on a foreign filesystem, such as an
	// NFS mount, that a helper process does (upstream waits two minutes for
	// all volumes of a pod).
	foreignTimeout = 30 * time.Second
	// unmountTimeout is the time for each of the ways to unmount a foreign
	// filesystem: politely, by force, lazily.
	unmountTimeout = 10 * time.Second
)

// Config says where volumes live and where their content comes from.
type Config struct {
	// RootDir is upstream's --root-dir, by default /var/lib/kubelet.
	RootDir string
	// Objects are the ConfigMaps and Secrets of the node. Required if pods use
	// any.
	Objects Objects
	// Claims and Tokens are those of the node; nil: it has none.
	Claims Claims
	Tokens Tokens
	// Node is this node with its labels, for the affinity of
	// PersistentVolumes; may be nil.
	Node func() *v1.Node
	// Allocatable are the node's resources, for limits that a container does
	// not set and the downward API asks for, and as bound of memory volumes;
	// may be nil.
	Allocatable func() v1.ResourceList
	// MeasureEvery is how often Run measures volumes, by default a minute, and
	// WatchEvery how often it asks foreign filesystems for an answer, by default
	// 10 s.
	MeasureEvery, WatchEvery time.Duration
	// Measured, if not nil, is called after each measurement of a pod whose use
	// of the node's storage has a limit, every 10 s at most.
	Measured func(ctx context.Context, pod *v1.Pod)
	// RecursiveReadOnly says whether the runtime can make mounts recursively
	// read-only (mount_setattr, Linux 5.12).
	RecursiveReadOnly bool
	// Helper is the command for work on foreign filesystems: a program that
	// calls HelperMain first. By default this program itself.
	Helper string
	// Log is slog.Default() if nil.
	Log *slog.Logger
}

// Volumes makes the volumes of pods and takes them away. Everything it knows is
// on disk and in the kernel's mount table: there is nothing to restore after a
// restart. Calls for one pod follow each other, calls for different pods do not
// wait for each other.
type Volumes struct {
	cfg Config
	log *slog.Logger

	mu    sync.Mutex
	locks map[types.UID]*podLock

	tokens   tokens
	measured measured
	turns    *tree.Turns   // of the walks that measure
	patience time.Duration // with foreign filesystems that are asked whether they answer

	noswap sync.Once // whether tmpfs knows noswap is found out once
	noSwap bool
}

type podLock struct {
	held  chan struct{} // full while held
	users int
}

// New makes a Volumes. It touches nothing yet.
func New(cfg Config) *Volumes {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Helper == "" {
		cfg.Helper = "/proc/self/exe"
	}
	return &Volumes{cfg: cfg, log: cfg.Log, locks: map[types.UID]*podLock{}, patience: foreignPatience, turns: tree.NewTurns(walkShare, walks)}
}

// lock makes the calls for one pod follow each other. It waits as long as ctx
// lasts.
func (v *Volumes) lock(ctx context.Context, uid types.UID) (unlock func(), err error) {
	v.mu.Lock()
	l := v.locks[uid]
	if l == nil {
		l = &podLock{held: make(chan struct{}, 1)}
		v.locks[uid] = l
	}
	l.users++
	v.mu.Unlock()
	leave := func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(v.locks, uid)
		}
	}
	select {
	case l.held <- struct{}{}:
		return func() { <-l.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("volumes of pod %s are being changed: %w", uid, context.Cause(ctx))
	}
}

// checkUID refuses UIDs that are more than a file name: they come from
// manifests.
func checkUID(uid types.UID) error {
	if uid == "" || uid == "." || uid == ".." || len(uid) > 255 || strings.ContainsAny(string(uid), "/\x00") {
		return fmt.Errorf("pod uid %q is not a file name: %w", uid, errdefs.ErrInvalidArgument)
	}
	return nil
}

// podDir is the path of a pod's directory.
func (v *Volumes) podDir(uid types.UID) string {
	return filepath.Join(v.cfg.RootDir, "pods", string(uid))
}

// openPod opens a pod's directory, and makes it when create is set. It is
// os.ErrNotExist otherwise.
func (v *Volumes) openPod(uid types.UID, create bool) (*dir, error) {
	if err := checkUID(uid); err != nil {
		return nil, err
	}
	pods := filepath.Join(v.cfg.RootDir, "pods")
	if create {
		if err := os.MkdirAll(pods, 0o750); err != nil {
			return nil, err
		}
	}
	base, err := openDir(pods)
	if err != nil {
		return nil, err
	}
	defer base.close()
	if create {
		return base.makeDir(string(uid), 0o750)
	}
	return base.openDir(string(uid))
}

// plugin returns the directory name of a volume's kind, "" when the volume has
// no directory of its own.
func plugin(vol *v1.Volume) string {
	switch {
	case vol.EmptyDir != nil:
		return pluginEmptyDir
	case vol.ConfigMap != nil:
		return pluginConfigMap
	case vol.Secret != nil:
		return pluginSecret
	case vol.DownwardAPI != nil:
		return pluginDownward
	case vol.Projected != nil:
		return pluginProjected
	case vol.NFS != nil:
		return pluginNFS
	}
	return ""
}

// unsupported names the volume kinds that need more than this node.
func unsupported(vol *v1.Volume) error {
	kind, why := "", "not supported"
	switch {
	case vol.CSI != nil:
		kind, why = "csi", "CSI drivers are not supported yet; use hostPath or nfs"
	case vol.ISCSI != nil:
		kind, why = "iscsi", "mount it on the host and use hostPath"
	case vol.FC != nil:
		kind, why = "fc", "mount it on the host and use hostPath"
	case vol.FlexVolume != nil:
		kind, why = "flexVolume", "deprecated upstream"
	case vol.GitRepo != nil:
		kind, why = "gitRepo", "removed upstream for CVE-2024-10220; clone in an init container"
	case isClaim(vol):
		return nil
	case vol.EmptyDir == nil && vol.ConfigMap == nil && vol.Secret == nil && vol.DownwardAPI == nil &&
		vol.Projected == nil && vol.NFS == nil && vol.HostPath == nil && vol.Image == nil:
		kind, why = "source", "this kind of volume is not supported; use emptyDir, hostPath, nfs, configMap, secret, downwardAPI, projected or image"
	default:
		return nil
	}
	return fmt.Errorf("%s: %s: %w", kind, why, errdefs.ErrNotImplemented)
}

// used returns the names of the volumes that containers mount: the others are
// not made, as upstream does.
func used(pod *v1.Pod) map[string]bool {
	names := map[string]bool{}
	add := func(mounts []v1.VolumeMount, devices []v1.VolumeDevice) {
		for _, m := range mounts {
			names[m.Name] = true
		}
		for _, d := range devices {
			names[d.Name] = true
		}
	}
	for i := range pod.Spec.InitContainers {
		add(pod.Spec.InitContainers[i].VolumeMounts, pod.Spec.InitContainers[i].VolumeDevices)
	}
	for i := range pod.Spec.Containers {
		add(pod.Spec.Containers[i].VolumeMounts, pod.Spec.Containers[i].VolumeDevices)
	}
	for i := range pod.Spec.EphemeralContainers {
		add(pod.Spec.EphemeralContainers[i].VolumeMounts, pod.Spec.EphemeralContainers[i].VolumeDevices)
	}
	return names
}

// Setup makes the pod's directory and all volumes that its containers mount.
// What is there already is left as it is, so it may be called again after a
// failure or a restart. The error names volume and path.
func (v *Volumes) Setup(ctx context.Context, pod *v1.Pod) error {
	unlock, err := v.lock(ctx, pod.UID)
	if err != nil {
		return err
	}
	defer unlock()
	p, err := v.openPod(pod.UID, true)
	if err != nil {
		return fmt.Errorf("directory %s of pod %s/%s: %w", v.podDir(pod.UID), pod.Namespace, pod.Name, err)
	}
	defer p.close()
	if len(pod.Spec.Volumes) == 0 {
		return nil
	}
	names := used(pod)
	bound, err := v.bind(ctx, pod, p)
	if err != nil {
		return err
	}
	var all *dir // volumes/
	defer func() { all.close() }()
	var foreign []*volume
	for i := range pod.Spec.Volumes {
		vol := &pod.Spec.Volumes[i]
		if !names[vol.Name] {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := unsupported(vol); err != nil {
			return setupError(vol.Name, err)
		}
		switch {
		case vol.Image != nil: // the runtime's
		case vol.NFS != nil || vol.HostPath != nil || isClaim(vol):
			f, err := bound.volume(pod, vol)
			if err != nil {
				return setupError(vol.Name, err)
			}
			foreign = append(foreign, f)
		default:
			if all == nil {
				if all, err = p.makeDir(volumesDir, 0o750); err != nil {
					return setupError(vol.Name, err)
				}
			}
			if err := v.setupLocal(ctx, pod, all, vol); err != nil {
				return setupError(vol.Name, fmt.Errorf("%s: %w", v.path(pod, vol), err))
			}
		}
	}
	return v.setupForeign(ctx, pod, p, foreign)
}

// setupError says, in upstream's words, which volume is not there and why.
func setupError(volume string, err error) error {
	return fmt.Errorf("MountVolume.SetUp failed for volume %q : %w", volume, err)
}

// path is where a volume is on the host.
func (v *Volumes) path(pod *v1.Pod, vol *v1.Volume) string {
	return v.hostPath(pod.UID, &volume{Volume: vol, dir: vol.Name})
}

func (v *Volumes) setupLocal(ctx context.Context, pod *v1.Pod, all *dir, vol *v1.Volume) error {
	kind, err := all.makeDir(plugin(vol), 0o750)
	if err != nil {
		return err
	}
	defer kind.close()
	if vol.EmptyDir != nil {
		return v.setupEmptyDir(ctx, pod, kind, vol)
	}
	return v.setupContent(ctx, pod, kind, vol)
}

// setupForeign makes the volumes that may take long, side by side. The error
// names what was to be mounted.
func (v *Volumes) setupForeign(ctx context.Context, pod *v1.Pod, p *dir, vols []*volume) error {
	errs := make([]error, len(vols))
	var wg sync.WaitGroup
	for i, vol := range vols {
		wg.Go(func() {
			var err error
			what := ""
			switch {
			case vol.NFS != nil:
				what = fmt.Sprintf("nfs %s:%s: ", vol.NFS.Server, vol.NFS.Path)
				err = v.setupNFS(ctx, p, vol)
			case vol.local != "":
				what = "local " + vol.local + ": "
				err = v.setupLocalPV(ctx, pod, p, vol)
			default:
				err = v.setupHostPath(ctx, vol.HostPath)
			}
			if err != nil {
				if vol.claim != "" {
					what = fmt.Sprintf("claim %s (volume %s): %s", vol.claim, vol.dir, what)
				}
				errs[i] = setupError(vol.Name, fmt.Errorf("%s%w", what, err))
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (v *Volumes) setupHostPath(ctx context.Context, source *v1.HostPathVolumeSource) error {
	if source.Type == nil || *source.Type == v1.HostPathUnset {
		return nil // nothing is checked; the runtime makes a missing directory
	}
	mounts, err := readMounts()
	if err != nil {
		return err
	}
	if !mounts.foreignPath(source.Path) {
		return checkHostPath(source.Path, *source.Type)
	}
	return v.helper(ctx, foreignTimeout, request{Op: opHostPath, Path: source.Path, Type: string(*source.Type)})
}

// errNoDirectory is returned for pods that have none of their own yet.
var errNoDirectory = fmt.Errorf("pod has no directory: %w", errdefs.ErrNotFound)

// Refresh brings configMap, secret, downwardAPI and projected volumes up to
// date. Volumes whose content is the same are not touched, and volumes that are
// not there are not made.
func (v *Volumes) Refresh(ctx context.Context, pod *v1.Pod) error {
	unlock, err := v.lock(ctx, pod.UID)
	if err != nil {
		return err
	}
	defer unlock()
	p, err := v.openPod(pod.UID, false)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("volumes of pod %s/%s: %w", pod.Namespace, pod.Name, errNoDirectory)
	} else if err != nil {
		return err
	}
	defer p.close()
	names := used(pod)
	var errs []error
	for i := range pod.Spec.Volumes {
		vol := &pod.Spec.Volumes[i]
		if !names[vol.Name] || !hasContent(vol) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		root, err := p.walk(volumesDir, plugin(vol), vol.Name)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = v.writeContent(ctx, pod, root, vol)
			root.close()
		}
		if err != nil {
			errs = append(errs, setupError(vol.Name, fmt.Errorf("%s: %w", v.path(pod, vol), err)))
		}
	}
	return errors.Join(errs...)
}

// Pods returns the UIDs of the pods that have a directory on disk.
func (v *Volumes) Pods() ([]types.UID, error) {
	entries, err := os.ReadDir(filepath.Join(v.cfg.RootDir, "pods"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var uids []types.UID
	for _, e := range entries {
		if e.IsDir() {
			uids = append(uids, types.UID(e.Name()))
		}
	}
	return uids, nil
}

// podGroup is the group that owns the volumes of a pod; -1 when none is set.
func podGroup(pod *v1.Pod) int {
	if sc := pod.Spec.SecurityContext; sc != nil && sc.FSGroup != nil {
		return int(*sc.FSGroup)
	}
	return -1
}

// isMountRoot says whether name in d is the root of another mount.
func isMountRoot(d *dir, name string) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(d.fd, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st); err != nil {
		return false, &os.PathError{Op: "statx", Path: name, Err: err}
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}
