package kubelet

import (
	"cmp"
	"context"
	"slices"

	"golang.org/x/sys/unix"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"github.com/podd-runtime/podd/kubelet/imagegc"
	"github.com/podd-runtime/podd/kubelet/server/api"
)

// imageDisk is the file system of the images; of one that is too full it says
// what fills it, too.
func (a *agent) imageDisk(ctx context.Context) *api.Disk {
	dir := a.cfg.Images.Dir
	d, err := diskOf(dir)
	if err != nil {
		a.log.Warn("size of the image file system is not known", "error", err)
		return nil
	}
	p := a.imageGC.Policy()
	out := &api.Disk{Path: dir, Capacity: d.Capacity, Available: d.Available, UsedPercent: d.UsedPercent(), High: p.HighPercent, Low: p.LowPercent}
	if out.UsedPercent < p.HighPercent {
		return out
	}
	if last := a.imageGC.Last(); last.Short {
		out.Short, out.Kept = true, last.Kept.String()
	}
	out.Holders = a.holders(ctx, d)
	return out
}

// diskHolders says what fills the disk of a directory, when it is that of the
// images.
func (a *agent) diskHolders(ctx context.Context, dir string) (lines []string) {
	d, err := diskOf(a.cfg.Images.Dir)
	if err != nil || !sameDisk(dir, a.cfg.Images.Dir) {
		return nil
	}
	for _, h := range a.holders(ctx, d) {
		lines = append(lines, imagegc.Size(h.Bytes)+" "+h.What)
	}
	return lines
}

// holders of a full disk's bytes.
func (a *agent) holders(ctx context.Context, d imagegc.Disk) []api.Holder {
	summary, err := a.stats.Summary(ctx, false)
	if err != nil {
		a.log.Warn("what fills the disk is not known", "error", err)
		return nil
	}
	images, err := a.images.FsInfo(ctx)
	if err != nil {
		a.log.Warn("what fills the disk is not known", "error", err)
		return nil
	}
	dir := a.cfg.Images.Dir
	return holders(summary.Pods, int64(images.GetUsedBytes().GetValue()), d.Capacity-d.Available,
		sameDisk(dir, a.cfg.Pods.Node.PodLogsDir), sameDisk(dir, a.cfg.Pods.Node.RootDir))
}

// shownHolders are the pods that are named; the others are summed up.
const shownHolders = 5

// holders of used bytes: images (stored includes containers' layers), pods with
// their layers, and, where they are on the same disk, logs and volumes; and what
// is none of podd's.
func holders(pods []statsapi.PodStats, stored, used int64, logs, volumes bool) []api.Holder {
	var out []api.Holder
	for i := range pods {
		p := &pods[i]
		var layers, log, all int64
		for j := range p.Containers {
			layers += usedBytes(p.Containers[j].Rootfs)
			log += usedBytes(p.Containers[j].Logs)
		}
		all = max(usedBytes(p.EphemeralStorage), layers+log)
		stored -= layers
		bytes := layers
		if logs {
			bytes += log
		}
		if volumes {
			bytes += all - layers - log
		}
		out = append(out, api.Holder{What: "pod " + p.PodRef.Namespace + "/" + p.PodRef.Name, Bytes: bytes})
	}
	slices.SortStableFunc(out, func(a, b api.Holder) int { return cmp.Compare(b.Bytes, a.Bytes) })
	others := api.Holder{What: "other pods"}
	for _, h := range out[min(len(out), shownHolders):] {
		others.Bytes += h.Bytes
	}
	out = append(out[:min(len(out), shownHolders)], others, api.Holder{What: "images", Bytes: max(stored, 0)})
	for _, h := range out {
		used -= h.Bytes
	}
	out = append(out, api.Holder{What: "files that are not podd's", Bytes: max(used, 0)})
	out = slices.DeleteFunc(out, func(h api.Holder) bool { return h.Bytes <= 0 })
	slices.SortStableFunc(out, func(a, b api.Holder) int { return cmp.Compare(b.Bytes, a.Bytes) })
	return out
}

func usedBytes(fs *statsapi.FsStats) int64 {
	if fs == nil || fs.UsedBytes == nil {
		return 0
	}
	return int64(*fs.UsedBytes)
}

func sameDisk(a, b string) bool {
	var x, y unix.Stat_t
	return unix.Stat(a, &x) == nil && unix.Stat(b, &y) == nil && x.Dev == y.Dev
}
