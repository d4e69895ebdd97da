package cgroups

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	cgroupfs "github.com/opencontainers/cgroups/fs"
	cgroupfs2 "github.com/opencontainers/cgroups/fs2"
	"github.com/opencontainers/cgroups/systemd"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Drivers as the kubelet's cgroupDriver names them.
const (
	DriverCgroupfs = "cgroupfs"
	DriverSystemd  = "systemd"
)

// Config of a tree.
type Config struct {
	// Root is the kubelet's cgroupRoot: the group that holds kubepods. Empty or
	// "/" is the root of the hierarchies. With the systemd driver it may be a
	// slice ("podd.slice") or a path ("/podd").
	Root string
	// Driver is "cgroupfs" (the default when empty) or "systemd".
	Driver string
	// Owner tells this node agent's groups from those of another one with the
	// same root, be it a second podd or a kubelet: List and Remove see only
	// groups that carry it (an extended attribute). A path that is the
	// instance's own will do; default "podd".
	Owner string
	Log   *slog.Logger
}

// Tree is the pods' part of the host's cgroups. It keeps nothing that the
// kernel does not know; what it remembers only spares work. Methods may be
// called at once from many goroutines; two calls for one pod wait for each
// other.
type Tree struct {
	names   namer
	layout  layout
	systemd bool
	have    map[string]bool // controllers of a v2 host
	owner   string
	marks   bool // owner is marked on groups; not in a user namespace
	log     *slog.Logger

	pods sync.Map // types.UID → *pod

	qosMu sync.Mutex
	// burstable are the cpu.shares of the burstable pods, level what their sum
	// made of the level's; 0: not written yet.
	burstable map[types.UID]uint64
	level     uint64
}

// pod is what Ensure did last for one pod.
type pod struct {
	mu        sync.Mutex
	dead      bool // Remove took it out of the map
	group     string
	resources *specs.LinuxResources
}

var _ Pods = (*Tree)(nil)

// removeTimeout bounds Remove whatever the caller's context says: long enough
// for a dying process to flush and exit, short enough to be retried by the
// pod's worker.
const removeTimeout = 15 * time.Second

// New discovers how cgroups are mounted, and creates kubepods and the QoS
// levels below it. errdefs.ErrInvalidArgument: unknown driver;
// ErrFailedPrecondition: the systemd driver without systemd.
func New(c Config) (*Tree, error) {
	l, err := discover()
	if err != nil {
		return nil, err
	}
	return newTree(c, l)
}

func newTree(c Config, l layout) (*Tree, error) {
	t := &Tree{layout: l, owner: c.Owner, log: c.Log, burstable: map[types.UID]uint64{}}
	if t.owner == "" {
		t.owner = "podd"
	}
	if t.log == nil {
		t.log = slog.New(slog.DiscardHandler)
	}
	switch c.Driver {
	case "", DriverCgroupfs:
	case DriverSystemd:
		if !systemd.IsRunningSystemd() {
			return nil, fmt.Errorf("cgroup driver systemd: systemd does not run on this host, set cgroupDriver to cgroupfs: %w", errdefs.ErrFailedPrecondition)
		}
		t.systemd = true
	default:
		return nil, fmt.Errorf("cgroup driver %q: must be cgroupfs or systemd: %w", c.Driver, errdefs.ErrInvalidArgument)
	}
	t.names = newNamer(c.Root, t.systemd)
	if l.unified {
		data, err := os.ReadFile(l.hierarchies[0].dir + "/cgroup.controllers")
		if err != nil {
			return nil, fmt.Errorf("cgroup controllers: %w", err)
		}
		t.have = map[string]bool{}
		for _, c := range strings.Fields(string(data)) {
			t.have[c] = true
		}
	}
	for _, qos := range levels {
		level := t.names.level(qos)
		if _, err := t.create(level); err != nil {
			return nil, err
		}
		if l.unified {
			enablePath(l.hierarchies[0].dir, t.names.path(level))
		}
		if d := l.of("cpuset"); d != "" && !l.unified {
			// Pod and container cpusets then come up filled by the kernel.
			if err := writeFile(d+t.names.path(level), "cgroup.clone_children", "1"); err != nil {
				return nil, err
			}
		}
	}
	probe := l.hierarchies[0].dir + t.names.path(t.names.level(v1.PodQOSBurstable))
	t.marks = unix.Setxattr(probe, ownerAttr+".probe", []byte("1"), 0) == nil
	two := uint64(MinShares)
	err := t.set(t.names.level(v1.PodQOSBestEffort), &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &two}}, false)
	if err != nil {
		return nil, err
	}
	if err := t.recoverBurstable(); err != nil {
		return nil, err
	}
	return t, nil
}

// recoverBurstable counts in what runs already: the level must not lose weight
// until every pod has come by again.
func (t *Tree) recoverBurstable() error {
	dir := t.layout.of("cpu")
	if dir == "" {
		return nil
	}
	level := dir + t.names.path(t.names.level(v1.PodQOSBurstable))
	entries, err := os.ReadDir(level)
	if err != nil {
		return fmt.Errorf("burstable pods: %w", err)
	}
	for _, e := range entries {
		if uid, ok := t.names.podUID(e.Name()); ok && e.IsDir() {
			if t.layout.unified {
				if w := readUint(level + "/" + e.Name() + "/cpu.weight"); w != nil {
					t.burstable[uid] = weightToShares(*w)
				}
			} else if s := readUint(level + "/" + e.Name() + "/cpu.shares"); s != nil {
				t.burstable[uid] = *s
			}
		}
	}
	return t.weighBurstable("", 0)
}

func readUint(path string) *uint64 {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	return parseUint(b)
}

// Unified tells whether the host has cgroup v2 alone.
func (t *Tree) Unified() bool { return t.layout.unified }

// Driver returns "cgroupfs" or "systemd".
func (t *Tree) Driver() string {
	if t.systemd {
		return DriverSystemd
	}
	return DriverCgroupfs
}

// Parent is CRI's cgroup_parent of the pod. A UID that could name another
// group is escaped here and refused by Ensure.
func (t *Tree) Parent(uid types.UID, qos v1.PodQOSClass) string {
	c := t.names.pod(uid, qos)
	if t.systemd {
		return t.names.unit(c)
	}
	return t.names.path(c)
}

// Path is where the pod's group is below the hierarchies' mount points, with
// either driver.
func (t *Tree) Path(uid types.UID, qos v1.PodQOSClass) string {
	return t.names.path(t.names.pod(uid, qos))
}

// Ensure creates the pod's group in every hierarchy, or updates its limits.
// Nothing is written when they are those of the last call and the group still
// exists. A nil r means no limits. errdefs.ErrInvalidArgument: the UID cannot
// name a group.
func (t *Tree) Ensure(ctx context.Context, uid types.UID, qos v1.PodQOSClass, r *specs.LinuxResources) error {
	if !validUID(uid) {
		return fmt.Errorf("pod uid %q: cannot name a cgroup, use letters, digits and dashes: %w", uid, errdefs.ErrInvalidArgument)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	p := t.lock(uid)
	defer p.mu.Unlock()
	components := t.names.pod(uid, qos)
	group := t.names.path(components)
	if p.group == group && reflect.DeepEqual(p.resources, r) && unix.Access(t.layout.hierarchies[0].dir+group, unix.F_OK) == nil {
		return nil
	}
	created, err := t.create(components)
	if err == nil {
		err = t.claim(group, created)
	}
	if err == nil {
		err = t.set(components, r, !created)
	}
	if err == nil && qos == v1.PodQOSBurstable {
		err = t.weighBurstable(uid, sharesOf(r))
	}
	if err != nil {
		if created {
			if rerr := t.layout.remove(ctx, group); rerr != nil {
				err = errors.Join(err, rerr)
			}
		}
		return fmt.Errorf("cgroup of pod %s: %w", uid, err)
	}
	p.group, p.resources = group, r
	return nil
}

// lock returns the pod's entry, locked.
func (t *Tree) lock(uid types.UID) *pod {
	for {
		v, ok := t.pods.Load(uid)
		if !ok {
			v, _ = t.pods.LoadOrStore(uid, &pod{})
		}
		p := v.(*pod)
		p.mu.Lock()
		if !p.dead {
			return p
		}
		p.mu.Unlock()
	}
}

// create makes a group in every hierarchy and reports whether any is new.
func (t *Tree) create(components []string) (bool, error) {
	if t.systemd {
		return t.createSlice(components)
	}
	group := t.names.path(components)
	created := false
	for _, h := range t.layout.hierarchies {
		c, err := t.layout.mkdir(h, group)
		created = created || c
		if err != nil {
			return created, err
		}
		if c && t.marks { // at once: List sees marked ones alone; claim tells of errors
			_ = unix.Setxattr(h.dir+group, ownerAttr, []byte(t.owner), 0)
		}
	}
	return created, nil
}

// createSlice has systemd make the group as a slice. On v1 systemd knows only
// some hierarchies; the rest is made as with cgroupfs.
func (t *Tree) createSlice(components []string) (bool, error) {
	group := t.names.path(components)
	created := unix.Access(t.layout.hierarchies[0].dir+group, unix.F_OK) != nil
	m, err := t.slice(components, &cgroups.Resources{SkipDevices: true, SkipFreezeOnSet: true})
	if err != nil {
		return false, err
	}
	if err := m.Apply(-1); err != nil {
		return false, fmt.Errorf("systemd slice %s: %w", t.names.unit(components), err)
	}
	for _, h := range t.layout.hierarchies {
		if _, err := t.layout.mkdir(h, group); err != nil {
			return created, err
		}
	}
	return created, nil
}

func (t *Tree) slice(components []string, r *cgroups.Resources) (cgroups.Manager, error) {
	c := &cgroups.Cgroup{Name: t.names.unit(components), Resources: r, Systemd: true}
	if len(components) > 1 {
		c.Parent = t.names.unit(components[:len(components)-1])
	}
	if t.layout.unified {
		return systemd.NewUnifiedManager(c, t.layout.hierarchies[0].dir+t.names.path(components))
	}
	return systemd.NewLegacyManager(c, t.layout.paths(t.names.path(components)))
}

// set writes limits. With reset, those that r does not have are lifted.
func (t *Tree) set(components []string, r *specs.LinuxResources, reset bool) error {
	group := t.names.path(components)
	res := t.resources(r, reset)
	var m cgroups.Manager
	var err error
	switch {
	case t.systemd:
		m, err = t.slice(components, res)
	case t.layout.unified:
		m, err = cgroupfs2.NewManager(&cgroups.Cgroup{Resources: res}, t.layout.hierarchies[0].dir+group)
	default:
		m, err = cgroupfs.NewManager(&cgroups.Cgroup{Resources: res}, t.layout.paths(group))
	}
	if err != nil {
		return err
	}
	if err := m.Set(res); err != nil {
		return fmt.Errorf("limits of cgroup %s: %w", group, err)
	}
	return nil
}

// resources translates to the library's form, for the host's version.
func (t *Tree) resources(r *specs.LinuxResources, reset bool) *cgroups.Resources {
	out := &cgroups.Resources{SkipDevices: true, SkipFreezeOnSet: true}
	// A controller that is not there (a container without delegation) has no
	// limit to lift and no weight to give; a limit asked of it is an error.
	if reset && !t.layout.unified {
		// -1 is "no limit" to the library on both versions.
		none := int64(-1)
		out.Memory, out.CpuQuota, out.PidsLimit = -1, -1, &none
	} else if reset {
		none := int64(-1)
		if t.have["memory"] {
			out.Memory = -1
		}
		if t.have["cpu"] {
			out.CpuQuota = -1
		}
		if t.have["pids"] {
			out.PidsLimit = &none
		}
	}
	if r == nil {
		return out
	}
	if c := r.CPU; c != nil {
		if c.Shares != nil {
			if t.layout.unified {
				if t.have["cpu"] {
					out.CpuWeight = SharesToWeight(*c.Shares)
				}
			} else {
				out.CpuShares = *c.Shares
			}
		}
		if c.Quota != nil && (*c.Quota != 0 || !reset) {
			out.CpuQuota = *c.Quota
		}
		if c.Period != nil {
			out.CpuPeriod = *c.Period
		}
		out.CpuBurst, out.CPUIdle = c.Burst, c.Idle
		out.CpusetCpus, out.CpusetMems = c.Cpus, c.Mems
	}
	if m := r.Memory; m != nil {
		if m.Limit != nil {
			out.Memory = *m.Limit
		}
		if m.Reservation != nil {
			out.MemoryReservation = *m.Reservation
		}
		if m.Swap != nil {
			out.MemorySwap = *m.Swap
		}
	}
	if r.Pids != nil && r.Pids.Limit != nil {
		out.PidsLimit = r.Pids.Limit
	}
	// A host without the controller has nothing to limit.
	if t.hugetlb() {
		for _, h := range r.HugepageLimits {
			out.HugetlbLimit = append(out.HugetlbLimit, &cgroups.HugepageLimit{Pagesize: h.Pagesize, Limit: h.Limit})
		}
	}
	if t.layout.unified {
		out.Unified = r.Unified
	}
	return out
}

func (t *Tree) hugetlb() bool {
	if !t.layout.unified {
		return t.layout.of("hugetlb") != ""
	}
	return t.have["hugetlb"]
}

// weighBurstable notes the shares of a burstable pod, 0 when it has gone, and
// sets the level's to the sum of all, as the kubelet does.
func (t *Tree) weighBurstable(uid types.UID, shares uint64) error {
	t.qosMu.Lock()
	defer t.qosMu.Unlock()
	if old, known := t.burstable[uid]; known && old == shares || !known && shares == 0 && uid != "" {
		return nil
	}
	if shares > 0 {
		t.burstable[uid] = shares
	} else {
		delete(t.burstable, uid)
	}
	sum := uint64(0)
	for _, s := range t.burstable {
		sum += s
	}
	sum = min(max(sum, MinShares), MaxShares)
	if sum == t.level {
		return nil
	}
	r := &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &sum}}
	if err := t.set(t.names.level(v1.PodQOSBurstable), r, false); err != nil {
		return err
	}
	t.level = sum
	return nil
}

func sharesOf(r *specs.LinuxResources) uint64 {
	if r == nil || r.CPU == nil || r.CPU.Shares == nil {
		return MinShares
	}
	return *r.CPU.Shares
}

// ownerAttr marks a pod's group in every hierarchy; the kernel keeps trusted
// attributes on cgroups of both versions.
const ownerAttr = "trusted.podd"

// claim marks a new group as ours. One that was there is refused when it is
// another owner's; one without a mark is of a run that was killed between
// making and marking it.
func (t *Tree) claim(group string, created bool) error {
	if !t.marks {
		return nil
	}
	if !created {
		for _, h := range t.layout.hierarchies {
			if o := t.ownerOf(h.dir + group); o != "" && o != t.owner {
				return fmt.Errorf("cgroup %s belongs to another node agent (%s): set another cgroup root: %w", group, o, errdefs.ErrAlreadyExists)
			}
		}
	}
	for _, h := range t.layout.hierarchies {
		err := unix.Setxattr(h.dir+group, ownerAttr, []byte(t.owner), 0)
		if err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("mark cgroup %s: %w", group, err)
		}
	}
	return nil
}

// ownerOf reads the mark, "" for none. Where marks cannot be made everything
// counts as ours, as with the kubelet.
func (t *Tree) ownerOf(dir string) string {
	if !t.marks {
		return t.owner
	}
	var b [4096]byte
	n, err := unix.Getxattr(dir, ownerAttr, b[:])
	if err != nil {
		return ""
	}
	return string(b[:n])
}

// nameAttr is the name of a group's pod, where tools show extended attributes
// (systemd-cgls --xattr). The kernel keeps a user's on cgroup v2 only.
const nameAttr = "user.pod"

// Name writes the pod's namespace and name onto its group. A host that cannot
// keep it does without: nothing reads it but people.
func (t *Tree) Name(uid types.UID, qos v1.PodQOSClass, name string) {
	if !t.layout.unified {
		return
	}
	group := t.Path(uid, qos)
	if err := unix.Setxattr(t.layout.hierarchies[0].dir+group, nameAttr, []byte(name), 0); err != nil {
		t.log.Debug("cgroup is not named", "group", group, "error", err)
	}
}

// SetNodeAllocatable limits all pods together (kubepods), see NodeAllocatable.
func (t *Tree) SetNodeAllocatable(r *specs.LinuxResources) error {
	return t.set(t.names.level(v1.PodQOSGuaranteed), r, true)
}

// Remove kills what is left in the pod's group, whatever its QoS level, and
// removes it with all below it from every hierarchy. It returns within 15 s;
// the error then names what is still busy. It succeeds when the group is gone,
// and leaves another owner's alone.
func (t *Tree) Remove(ctx context.Context, uid types.UID) error {
	if !validUID(uid) {
		return nil // Ensure never made one
	}
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	p := t.lock(uid)
	defer p.mu.Unlock()
	known := p.group
	p.group, p.resources = "", nil
	for _, qos := range levels {
		components := t.names.pod(uid, qos)
		group := t.names.path(components)
		if known != "" && group != known {
			continue
		}
		if known == "" && !t.mine(group) {
			t.removeUnmarked(group)
			continue
		}
		if t.systemd {
			if err := t.stopSlice(components); err != nil {
				return fmt.Errorf("cgroup of pod %s: %w", uid, err)
			}
		}
		if err := t.layout.remove(ctx, group); err != nil {
			return fmt.Errorf("cgroup of pod %s: %w", uid, err)
		}
	}
	if err := t.weighBurstable(uid, 0); err != nil {
		t.log.Warn("weight of the burstable level not set", "error", err)
	}
	p.dead = true
	t.pods.CompareAndDelete(uid, p)
	return nil
}

// removeUnmarked removes a group that a run was making when it was killed: nobody
// has marked it, so nothing has come into it. Others' groups, and those that are in
// use, stay: such directories cannot be removed.
func (t *Tree) removeUnmarked(group string) {
	for _, h := range t.layout.hierarchies {
		if t.ownerOf(h.dir+group) != "" {
			return
		}
	}
	for _, h := range t.layout.hierarchies {
		if err := unix.Rmdir(h.dir + group); err != nil && !errors.Is(err, unix.ENOENT) {
			t.log.Debug("cgroup without an owner stays", "cgroup", h.dir+group, "error", err)
		}
	}
}

// mine tells whether a group that this process did not make carries our mark in
// any hierarchy.
func (t *Tree) mine(group string) bool {
	for _, h := range t.layout.hierarchies {
		if t.ownerOf(h.dir+group) == t.owner {
			return true
		}
	}
	return false
}

// stopSlice has systemd kill and forget the slice's units. Removing the
// directories alone would leave the units in its memory.
func (t *Tree) stopSlice(components []string) error {
	group := t.names.path(components)
	if unix.Access(t.layout.hierarchies[0].dir+group, unix.F_OK) != nil {
		return nil
	}
	t.layout.kill(group)
	m, err := t.slice(components, &cgroups.Resources{SkipDevices: true, SkipFreezeOnSet: true})
	if err != nil {
		return err
	}
	if err := m.Destroy(); err != nil {
		t.log.Debug("systemd slice not stopped, its cgroup is removed directly", "slice", t.names.unit(components), "error", err)
	}
	return nil
}

// halfMade is how old an empty group without a mark has to be to count as what a
// killed run was making. Another agent's has something in it long before.
const halfMade = 10 * time.Second

// ours says whether a group is to be listed.
func (t *Tree) ours(dir string) bool {
	owner := t.ownerOf(dir)
	if owner != "" {
		return owner == t.owner
	}
	var st unix.Stat_t
	err := unix.Lstat(dir, &st)
	return err == nil && st.Nlink == 2 && time.Since(time.Unix(st.Mtim.Unix())) > halfMade
}

// List returns the pods that have a group of ours in any hierarchy, also a half
// made or half removed one.
func (t *Tree) List() ([]types.UID, error) {
	seen := map[types.UID]bool{}
	var out []types.UID
	for _, h := range t.layout.hierarchies {
		for _, qos := range levels {
			dir := h.dir + t.names.path(t.names.level(qos))
			entries, err := os.ReadDir(dir)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("list pod cgroups: %w", err)
			}
			for _, e := range entries {
				uid, ok := t.names.podUID(e.Name())
				if ok && e.IsDir() && !seen[uid] && t.ours(dir+"/"+e.Name()) {
					seen[uid] = true
					out = append(out, uid)
				}
			}
		}
	}
	return out, nil
}

// Stats of the pod's group. errdefs.ErrNotFound: it has none.
func (t *Tree) Stats(uid types.UID) (*Stats, error) {
	if v, ok := t.pods.Load(uid); ok {
		p := v.(*pod)
		p.mu.Lock()
		group := p.group
		p.mu.Unlock()
		if group != "" {
			return t.layout.stats(group)
		}
	}
	for _, qos := range levels {
		s, err := t.layout.stats(t.names.path(t.names.pod(uid, qos)))
		if !errdefs.IsNotFound(err) {
			return s, err
		}
	}
	return nil, fmt.Errorf("cgroup of pod %s: %w", uid, errdefs.ErrNotFound)
}

// ReadStats reads the statistics of any group by its path below the
// hierarchies' mount points ("/kubepods/burstable/pod1/c1").
// errdefs.ErrNotFound: there is no such group.
func (t *Tree) ReadStats(group string) (*Stats, error) { return t.layout.stats(group) }
