package volumes

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"github.com/podd-runtime/podd/volumes/tree"
)

const (
	// defaultMeasure is how often volumes are measured (upstream's
	// volumeStatsAggPeriod), limitedMeasure how often those are that have a
	// limit (upstream's eviction manager looks every 10 s).
	defaultMeasure = time.Minute
	limitedMeasure = 10 * time.Second
	// watchForeign is how often foreign filesystems are asked whether they
	// still answer, foreignPatience how long each may take to say so.
	watchForeign    = 10 * time.Second
	foreignPatience = 5 * time.Second
	// walkShare is the part of one CPU that counting trees may take, walks how
	// many may be under way: each holds up to 40 descriptors and a megabyte.
	walkShare = 0.05
	walks     = 64
)

// Trouble is a volume whose filesystem does not answer.
type Trouble struct {
	Volume string
	// What names the filesystem: server and path, or the mount point.
	What  string
	Since time.Time
}

func (t Trouble) String() string {
	return fmt.Sprintf("volume %q: %s does not answer since %s", t.Volume, t.What, t.Since.UTC().Format(time.RFC3339))
}

// measured is what the background work has found, for those who ask.
type measured struct {
	mu       sync.Mutex
	stats    map[types.UID]map[string]stats.VolumeStats
	troubles map[types.UID][]Trouble
	// silent are the foreign filesystems that do not answer, by device.
	silent map[string]time.Time
	// asking are those that a helper waits for.
	asking map[string]bool
	known  map[string]*fsUsage
	// busy are the pods that are being measured, bounded the volumes whose
	// figures are a bound, which has been told.
	busy    map[types.UID]bool
	bounded map[string]bool
}

// Stats returns the usage of a pod's volumes as it was measured last, by name;
// nothing is measured for the call. Volumes of kinds that have no usage of
// their own (hostPath, image) are left out.
func (v *Volumes) Stats(uid types.UID) []stats.VolumeStats {
	v.measured.mu.Lock()
	defer v.measured.mu.Unlock()
	have := v.measured.stats[uid]
	out := make([]stats.VolumeStats, 0, len(have))
	for _, name := range slices.Sorted(maps.Keys(have)) {
		out = append(out, have[name])
	}
	return out
}

// Troubles returns the volumes of a pod that do not answer.
func (v *Volumes) Troubles(uid types.UID) []Trouble {
	v.measured.mu.Lock()
	defer v.measured.mu.Unlock()
	return slices.Clone(v.measured.troubles[uid])
}

// Run does what is done for volumes in the background until ctx ends: it
// measures them, asks foreign filesystems whether they answer, and renews
// tokens. pods are those of the node; they are not changed. troubled, which may
// be nil, is called when the troubles of a pod change.
func (v *Volumes) Run(ctx context.Context, pods func() []*v1.Pod, troubled func(uid types.UID, troubles []Trouble)) error {
	var group sync.WaitGroup
	defer group.Wait()
	every := func(period time.Duration, f func([]*v1.Pod)) {
		group.Go(func() {
			tick := time.NewTicker(period)
			defer tick.Stop()
			for {
				f(pods())
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
			}
		})
	}
	all := v.cfg.MeasureEvery
	if all == 0 {
		all = defaultMeasure
	}
	var last time.Time
	every(min(all, limitedMeasure), func(list []*v1.Pod) {
		whole := time.Since(last) >= all
		if whole {
			last = time.Now()
		}
		v.measure(ctx, list, whole, &group)
	})
	watch := v.cfg.WatchEvery
	if watch == 0 {
		watch = watchForeign
	}
	every(watch, func(list []*v1.Pod) { v.watch(ctx, list, troubled) })
	every(time.Minute, func(list []*v1.Pod) { v.renew(ctx, list) })
	<-ctx.Done()
	return ctx.Err()
}

// renew the tokens in pods' volumes that are due.
func (v *Volumes) renew(ctx context.Context, pods []*v1.Pod) {
	for _, pod := range pods {
		if !slices.ContainsFunc(pod.Spec.Volumes, func(vol v1.Volume) bool { return hasToken(&vol) }) {
			continue
		}
		// A pod whose set-up hangs keeps the others from no token.
		one, cancel := context.WithTimeout(ctx, foreignTimeout)
		err := v.Refresh(one, pod)
		cancel()
		if err != nil && ctx.Err() == nil && !errors.Is(err, errNoDirectory) {
			v.log.Warn("volumes are not refreshed", "namespace", pod.Namespace, "pod", pod.Name, "error", err)
		}
	}
}

// limited says whether a pod's use of the node's own storage decides about its
// life. What memory volumes may hold is the kernel's business.
func limited(pod *v1.Pod) bool {
	for i := range pod.Spec.Volumes {
		if e := pod.Spec.Volumes[i].EmptyDir; e != nil && e.SizeLimit != nil && e.SizeLimit.Sign() > 0 && e.Medium == v1.StorageMediumDefault {
			return true
		}
	}
	for _, list := range [][]v1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if _, ok := list[i].Resources.Limits[v1.ResourceEphemeralStorage]; ok {
				return true
			}
		}
	}
	return false
}

// measure the volumes of all pods, or of those that have limits only. Each pod
// is measured by itself, and again when that is done and it is due: what one
// keeps in its volumes makes no other wait for its limit. The group ends when
// all have been measured.
func (v *Volumes) measure(ctx context.Context, pods []*v1.Pod, all bool, group *sync.WaitGroup) {
	m := &v.measured
	table, err := readMounts()
	if err != nil {
		v.log.Warn("volumes are not measured", "error", err)
		return
	}
	present := map[types.UID]bool{}
	for _, pod := range pods {
		present[pod.UID] = true
		if !all && !limited(pod) || !m.begin(pod.UID) {
			continue
		}
		group.Go(func() {
			defer m.end(pod.UID)
			v.measureOne(ctx, pod, table)
		})
	}
	m.keep(present)
}

// measureOne waits for its turn, and gives it up before it asks for more than
// volumes.
func (v *Volumes) measureOne(ctx context.Context, pod *v1.Pod, table *mountTable) {
	turn, err := v.turns.Begin(ctx)
	if err != nil {
		return
	}
	found := v.measurePod(ctx, pod, table, turn)
	turn.End()
	if ctx.Err() != nil {
		return
	}
	v.measured.mu.Lock()
	v.measured.stats[pod.UID] = found
	v.measured.mu.Unlock()
	if v.cfg.Measured != nil && limited(pod) {
		v.cfg.Measured(ctx, pod)
	}
}

// begin says whether a pod is to be measured now.
func (m *measured) begin(uid types.UID) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stats == nil {
		m.stats, m.busy = map[types.UID]map[string]stats.VolumeStats{}, map[types.UID]bool{}
	}
	if m.busy[uid] {
		return false
	}
	m.busy[uid] = true
	return true
}

func (m *measured) end(uid types.UID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.busy, uid)
}

// keep forgets all pods but those that are present.
func (m *measured) keep(present map[types.UID]bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.stats, func(uid types.UID, _ map[string]stats.VolumeStats) bool { return !present[uid] })
	maps.DeleteFunc(m.bounded, func(key string, _ bool) bool {
		uid, _, _ := strings.Cut(key, "/")
		return !present[types.UID(uid)]
	})
}

func (v *Volumes) measurePod(ctx context.Context, pod *v1.Pod, table *mountTable, turn *tree.Turn) map[string]stats.VolumeStats {
	names := used(pod)
	claims, err := v.claims(pod)
	if err != nil {
		claims = &claimsRecord{}
	}
	root, err := v.openPod(pod.UID, false)
	if err != nil {
		return nil
	}
	defer root.close()
	out := map[string]stats.VolumeStats{}
	for i := range pod.Spec.Volumes {
		vol, err := claims.volume(pod, &pod.Spec.Volumes[i])
		if err != nil || !names[vol.Name] || vol.plugin() == "" {
			continue
		}
		u, err := v.measureVolume(ctx, pod, root, table, vol, turn)
		if err != nil || u == nil {
			if err != nil && ctx.Err() == nil {
				v.log.Debug("volume is not measured", "pod", pod.Name, "volume", vol.Name, "error", err)
			}
			continue
		}
		s := stats.VolumeStats{Name: vol.Name, FsStats: stats.FsStats{
			Time: metav1.Now(), CapacityBytes: &u.Capacity, AvailableBytes: &u.Available, UsedBytes: &u.Used,
			Inodes: &u.Inodes, InodesFree: &u.InodesFree, InodesUsed: &u.InodesUsed,
		}}
		if vol.claim != "" {
			s.PVCRef = &stats.PVCReference{Name: vol.claim, Namespace: pod.Namespace}
			s.VolumeHealthStats = &stats.VolumeHealthStats{Abnormal: slices.ContainsFunc(v.Troubles(pod.UID), func(t Trouble) bool { return t.Volume == vol.Name })}
		}
		out[vol.Name] = s
	}
	return out
}

// measureVolume tells a filesystem of its own by its own figures, and a
// directory by what is in it. A foreign one was asked by watch.
func (v *Volumes) measureVolume(ctx context.Context, pod *v1.Pod, root *dir, table *mountTable, vol *volume, turn *tree.Turn) (*fsUsage, error) {
	if m := v.foreignOf(table, pod, vol); m != nil {
		v.measured.mu.Lock()
		defer v.measured.mu.Unlock()
		return v.measured.known[m.device], nil
	}
	at, err := root.walk(volumesDir, vol.plugin(), vol.dir)
	if err != nil {
		return nil, err
	}
	defer at.close()
	u, err := statfsOf(at)
	if err != nil || vol.plugin() == pluginLocal || table.at(v.hostPath(pod.UID, vol)) != nil {
		return u, err
	}
	found, err := tree.Measure(ctx, at.fd, turn)
	if err != nil {
		return nil, err
	}
	v.tellBound(pod, vol.Name, found.Bound)
	u.Used, u.InodesUsed = found.Bytes, found.Inodes
	return u, nil
}

// tellBound tells once of a volume that cannot be measured.
func (v *Volumes) tellBound(pod *v1.Pod, volume string, why error) {
	m, key := &v.measured, string(pod.UID)+"/"+volume
	m.mu.Lock()
	told := m.bounded[key]
	if m.bounded == nil {
		m.bounded = map[string]bool{}
	}
	if why == nil {
		delete(m.bounded, key)
	} else {
		m.bounded[key] = true
	}
	m.mu.Unlock()
	if why != nil && !told {
		v.log.Warn("volume cannot be measured, it counts as all that its filesystem has in use", "namespace", pod.Namespace, "pod", pod.Name, "volume", volume, "error", why)
	}
}

// foreignOf is the foreign filesystem that a volume is on; nil: none.
func (v *Volumes) foreignOf(table *mountTable, pod *v1.Pod, vol *volume) *mountEntry {
	switch {
	case vol.NFS != nil:
		return table.at(v.hostPath(pod.UID, vol))
	case vol.HostPath != nil:
		return table.foreignMount(vol.HostPath.Path)
	case vol.local != "":
		return table.foreignMount(vol.local)
	}
	return nil
}

// watch asks every foreign filesystem of the pods whether it answers, each once
// however many pods have it mounted, all of them side by side.
func (v *Volumes) watch(ctx context.Context, pods []*v1.Pod, troubled func(types.UID, []Trouble)) {
	table, err := readMounts()
	if err != nil {
		return
	}
	type use struct {
		uid    types.UID
		volume string
		mount  *mountEntry
	}
	var uses []use
	devices := map[string]*mountEntry{}
	for _, pod := range pods {
		names := used(pod)
		claims, err := v.claims(pod)
		if err != nil {
			continue
		}
		for i := range pod.Spec.Volumes {
			vol, err := claims.volume(pod, &pod.Spec.Volumes[i])
			if err != nil || !names[vol.Name] {
				continue
			}
			if m := v.foreignOf(table, pod, vol); m != nil {
				uses = append(uses, use{pod.UID, vol.Name, m})
				devices[m.device] = m
			}
		}
	}
	var group sync.WaitGroup
	for _, m := range devices {
		group.Go(func() { v.askForeign(ctx, m) })
	}
	group.Wait()
	if ctx.Err() != nil {
		return
	}
	v.measured.mu.Lock()
	now := map[types.UID][]Trouble{}
	for _, u := range uses {
		if since, bad := v.measured.silent[u.mount.device]; bad {
			now[u.uid] = append(now[u.uid], Trouble{Volume: u.volume, What: u.mount.String(), Since: since})
		}
	}
	gone := func(device string) bool { return devices[device] == nil }
	maps.DeleteFunc(v.measured.silent, func(d string, _ time.Time) bool { return gone(d) })
	maps.DeleteFunc(v.measured.known, func(d string, _ *fsUsage) bool { return gone(d) })
	changed := map[types.UID][]Trouble{}
	for uid, t := range now {
		if !slices.Equal(t, v.measured.troubles[uid]) {
			changed[uid] = t
		}
	}
	for uid := range v.measured.troubles {
		if now[uid] == nil {
			changed[uid] = nil
		}
	}
	v.measured.troubles = now
	v.measured.mu.Unlock()
	if troubled != nil {
		for uid, t := range changed {
			troubled(uid, t)
		}
	}
}

// askForeign asks one filesystem. There is never more than one helper that
// waits for it.
func (v *Volumes) askForeign(ctx context.Context, m *mountEntry) {
	ms := &v.measured
	ms.mu.Lock()
	if ms.silent == nil {
		ms.silent, ms.asking, ms.known = map[string]time.Time{}, map[string]bool{}, map[string]*fsUsage{}
	}
	busy := ms.asking[m.device]
	ms.asking[m.device] = true
	ms.mu.Unlock()
	if busy {
		return
	}
	begun := time.Now()
	res, err := v.run(ctx, v.patience, request{Op: opStatfs, Path: m.point}, func() {
		ms.mu.Lock()
		defer ms.mu.Unlock()
		delete(ms.asking, m.device)
	})
	ms.mu.Lock()
	defer ms.mu.Unlock()
	switch {
	case err == nil:
		if since, was := ms.silent[m.device]; was {
			v.log.Info("filesystem answers again", "filesystem", m.String(), "after", time.Since(since).Round(time.Second))
		}
		delete(ms.silent, m.device)
		ms.known[m.device] = res.Usage
	case ctx.Err() != nil:
	default:
		if _, was := ms.silent[m.device]; !was {
			ms.silent[m.device] = begun.Truncate(time.Second)
			v.log.Warn("filesystem does not answer", "filesystem", m.String(), "error", err)
		}
	}
}

// isSilent says that a filesystem, by its device, did not answer last time.
func (v *Volumes) isSilent(device string) bool {
	v.measured.mu.Lock()
	defer v.measured.mu.Unlock()
	_, silent := v.measured.silent[device]
	return silent
}

// String names the filesystem: server and path, or what it is and where.
func (m *mountEntry) String() string {
	if strings.Contains(m.source, ":/") || strings.HasPrefix(m.source, "//") {
		return m.fstype + " " + m.source
	}
	if m.source == "" || m.source == "none" || m.fstype == m.source {
		return m.fstype + " on " + m.point
	}
	return m.fstype + " " + m.source + " on " + m.point
}
