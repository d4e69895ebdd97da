package stats

import (
	"context"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
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

// maxLogFiles of a container that are added up: there are containerLogMaxFiles
// of each instance.
const maxLogFiles = 1000

// logs is what a container's log files take.
func (p *Provider) logs(ref statsapi.PodReference, container string) *statsapi.FsStats {
	path := filepath.Join(p.cfg.PodLogsDir, ref.Namespace+"_"+ref.Name+"_"+ref.UID, container)
	out, err := fsStats(path)
	if err != nil {
		return nil
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(maxLogFiles)
	var bytes, inodes uint64
	for _, name := range names {
		var st unix.Stat_t
		if unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
			bytes += uint64(st.Blocks) * 512
			inodes++
		}
	}
	out.UsedBytes, out.InodesUsed = &bytes, &inodes
	return out
}

// ephemeral is what the pod takes of the node's own storage: containers'
// layers, logs, and volumes that live and die with it.
func (p *Provider) ephemeral(ps *statsapi.PodStats, pod *v1.Pod) *statsapi.FsStats {
	out, err := fsStats(p.cfg.RootDir)
	if err != nil {
		return nil
	}
	var bytes, inodes uint64
	add := func(fs *statsapi.FsStats) {
		if fs != nil && fs.UsedBytes != nil {
			bytes += *fs.UsedBytes
		}
		if fs != nil && fs.InodesUsed != nil {
			inodes += *fs.InodesUsed
		}
	}
	for i := range ps.Containers {
		add(ps.Containers[i].Rootfs)
		add(ps.Containers[i].Logs)
	}
	if pod != nil {
		for i := range pod.Spec.Volumes {
			if !ephemeralVolume(&pod.Spec.Volumes[i]) {
				continue
			}
			for j := range ps.VolumeStats {
				if ps.VolumeStats[j].Name == pod.Spec.Volumes[i].Name {
					add(&ps.VolumeStats[j].FsStats)
				}
			}
		}
	}
	out.UsedBytes, out.InodesUsed = &bytes, &inodes
	return out
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
