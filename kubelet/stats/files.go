package stats

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"github.com/podd-runtime/podd/cri"
	"github.com/podd-runtime/podd/kubelet/pods/spec"
	"github.com/podd-runtime/podd/volumes/tree"
)

// fsStats of the file system that holds path, which must be one of this
// machine's own.
func fsStats(path string) (*statsapi.FsStats, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return toStats(&st), nil
}

func toStats(st *unix.Statfs_t) *statsapi.FsStats {
	size := uint64(st.Bsize)
	available, capacity, used := st.Bavail*size, st.Blocks*size, (st.Blocks-st.Bfree)*size
	inodesUsed := st.Files - st.Ffree
	return &statsapi.FsStats{
		Time: metav1.Now(), AvailableBytes: &available, CapacityBytes: &capacity, UsedBytes: &used,
		Inodes: &st.Files, InodesFree: &st.Ffree, InodesUsed: &inodesUsed,
	}
}

// imageFs is the image store's file system and what the store uses of it.
func (p *Provider) imageFs(ctx context.Context) *statsapi.RuntimeStats {
	info, err := p.cfg.Runtime.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil {
		return nil
	}
	one := func(list []*runtimeapi.FilesystemUsage) *statsapi.FsStats {
		if len(list) == 0 {
			return nil
		}
		return p.writable(list[0])
	}
	return &statsapi.RuntimeStats{ImageFs: one(info.GetImageFilesystems()), ContainerFs: one(info.GetContainerFilesystems())}
}

// writable is what something uses of a file system of the runtime's.
func (p *Provider) writable(u *runtimeapi.FilesystemUsage) *statsapi.FsStats {
	if u == nil {
		return nil
	}
	out, err := fsStats(u.GetFsId().GetMountpoint())
	if err != nil {
		out = &statsapi.FsStats{}
	}
	out.Time = at(u.GetTimestamp())
	out.UsedBytes, out.InodesUsed = value(u.GetUsedBytes()), value(u.GetInodesUsed())
	return out
}

// logs is what a container's log files take.
func (p *Provider) logs(ref statsapi.PodReference, container string) *statsapi.FsStats {
	path := filepath.Join(p.podLogs(ref), container)
	out, err := fsStats(path)
	if err != nil {
		return nil
	}
	u, err := p.below(path)
	if err != nil {
		return nil
	}
	out.UsedBytes, out.InodesUsed = &u.Bytes, &u.Inodes
	return out
}

func (p *Provider) podLogs(ref statsapi.PodReference) string {
	return filepath.Join(p.cfg.PodLogsDir, ref.Namespace+"_"+ref.Name+"_"+ref.UID)
}

// below is what a directory of podd's own takes with all in it. It is as large
// as podd makes it: containers see files of it, no directory. Nothing there is
// nothing.
func (p *Provider) below(path string) (tree.Usage, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return tree.Usage{}, nil
	}
	if err != nil {
		return tree.Usage{}, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	return tree.Measure(context.Background(), fd, nil)
}

// podFiles is what podd keeps outside of volumes for the containers of a pod to
// write into: the hosts file and the termination messages, also of instances
// that have ended.
func (p *Provider) podFiles(uid string) (tree.Usage, error) {
	dir := filepath.Join(p.cfg.RootDir, "pods", uid)
	u, err := p.below(filepath.Join(dir, spec.MessagesDir))
	if err != nil {
		return u, err
	}
	var st unix.Stat_t
	switch err := unix.Lstat(filepath.Join(dir, spec.HostsFile), &st); {
	case errors.Is(err, unix.ENOENT):
		return u, nil
	case err != nil:
		return u, fmt.Errorf("hosts file of pod %s: %w", uid, err)
	}
	return u.Plus(tree.Usage{Bytes: uint64(st.Blocks) * 512, Inodes: 1}), nil
}

// ephemeral is what the pod takes of the node's own storage: containers'
// layers, logs, files, and volumes that live and die with it.
func (p *Provider) ephemeral(ps *statsapi.PodStats, pod *v1.Pod, rest cri.AtRest) *statsapi.FsStats {
	out, err := fsStats(p.cfg.RootDir)
	if err != nil {
		return nil
	}
	sum := rest.Files
	for _, read := range []func() (tree.Usage, error){
		func() (tree.Usage, error) { return p.below(p.podLogs(ps.PodRef)) },
		func() (tree.Usage, error) { return p.podFiles(ps.PodRef.UID) },
	} {
		u, err := read()
		if err != nil {
			return nil // what is not known is no figure
		}
		sum = sum.Plus(u)
	}
	sum = sum.Plus(layers(ps, pod, rest.Containers))
	if pod != nil {
		for i := range pod.Spec.Volumes {
			if !ephemeralVolume(&pod.Spec.Volumes[i]) {
				continue
			}
			for j := range ps.VolumeStats {
				if ps.VolumeStats[j].Name == pod.Spec.Volumes[i].Name {
					sum = sum.Plus(usage(&ps.VolumeStats[j].FsStats))
				}
			}
		}
	}
	out.UsedBytes, out.InodesUsed = &sum.Bytes, &sum.Inodes
	return out
}

// layers is what containers have written beside volumes. It is added up as the
// limits that it is compared with are: those that run side by side, or one init
// container if that has more. Of a container that has run before the larger of
// the two instances counts: what remains of the last one must not end the next.
func layers(ps *statsapi.PodStats, pod *v1.Pod, ended map[string]tree.Usage) tree.Usage {
	own := maps.Clone(ended)
	if own == nil {
		own = map[string]tree.Usage{}
	}
	running := map[string]bool{}
	for i := range ps.Containers {
		c := &ps.Containers[i]
		running[c.Name] = true
		if u := usage(c.Rootfs); u.Bytes >= own[c.Name].Bytes {
			own[c.Name] = u
		}
	}
	var sum, most tree.Usage
	for name, u := range own {
		if isInit(pod, name) && !running[name] {
			if u.Bytes > most.Bytes {
				most = u
			}
			continue
		}
		sum = sum.Plus(u)
	}
	if most.Bytes > sum.Bytes {
		return most
	}
	return sum
}

func isInit(pod *v1.Pod, name string) bool {
	return pod != nil && slices.ContainsFunc(pod.Spec.InitContainers, func(c v1.Container) bool { return c.Name == name })
}

// usage of a file system's statistics; nil is nothing.
func usage(fs *statsapi.FsStats) (u tree.Usage) {
	if fs != nil && fs.UsedBytes != nil {
		u.Bytes = *fs.UsedBytes
	}
	if fs != nil && fs.InodesUsed != nil {
		u.Inodes = *fs.InodesUsed
	}
	return u
}

// ephemeralVolume says whether the volume is on the node's disk and the pod's.
func ephemeralVolume(v *v1.Volume) bool {
	if v.EmptyDir != nil {
		return v.EmptyDir.Medium == v1.StorageMediumDefault
	}
	return v.ConfigMap != nil || v.GitRepo != nil || v.DownwardAPI != nil
}

// EachVolume calls f for every volume of a pod that belongs to a claim and has
// been measured, for the kubelet_volume_stats metrics.
func (p *Provider) EachVolume(f func(namespace, claim string, fs *statsapi.FsStats)) {
	for _, pod := range p.cfg.Pods.List() {
		for _, v := range p.cfg.Volumes.Stats(pod.UID) {
			if v.PVCRef != nil {
				f(v.PVCRef.Namespace, v.PVCRef.Name, &v.FsStats)
			}
		}
	}
}
