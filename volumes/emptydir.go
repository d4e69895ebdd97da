package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// setupEmptyDir makes an emptyDir: a directory, a tmpfs or a hugetlbfs. kind is
// the open directory of all emptyDirs of the pod. An emptyDir that is there is
// not touched: its content and modes are the pod's.
func (v *Volumes) setupEmptyDir(ctx context.Context, pod *v1.Pod, kind *dir, vol *v1.Volume) error {
	medium := vol.EmptyDir.Medium
	made := false
	if err := unix.Mkdirat(kind.fd, vol.Name, 0); err == nil {
		made = true
	} else if !errors.Is(err, unix.EEXIST) {
		return &os.PathError{Op: "mkdir", Path: vol.Name, Err: err}
	}
	if medium != v1.StorageMediumDefault {
		mounted, err := isMountRoot(kind, vol.Name)
		if err != nil {
			return err
		}
		if !mounted {
			if err := v.mountEmptyDir(pod, kind, vol); err != nil {
				return err
			}
			made = true
		}
	}
	root, err := kind.openDir(vol.Name)
	if err != nil {
		return err
	}
	defer root.close()
	group := podGroup(pod)
	if !made {
		var st unix.Stat_t
		if err := unix.Fstat(root.fd, &st); err != nil {
			return err
		}
		switch {
		case st.Mode&0o777 == 0:
			// An interrupted Setup left it: its last act is the mode, which is
			// none until then.
		case group >= 0 && int(st.Gid) != group:
			// The pod has another group than before. Upstream's policy Always
			// would walk at every start of the agent, too; but what an emptyDir
			// holds was made by this pod, below a root that hands its group on.
			return applyGroup(ctx, root, group, groupPolicy(pod))
		default:
			return nil
		}
	}
	mode := uint32(0o777)
	if vol.EmptyDir.Medium == v1.StorageMediumMemory {
		mode |= unix.S_ISVTX // a tmpfs's own, which upstream leaves as it is
	}
	if group >= 0 {
		// The group, and that what is made inside inherits it (upstream:
		// volume.SetVolumeOwnership). The directory is empty: no walk.
		if err := unix.Fchown(root.fd, -1, group); err != nil {
			return fmt.Errorf("fsGroup %d: %w", group, err)
		}
		mode |= unix.S_ISGID
	}
	return unix.Fchmod(root.fd, mode)
}

func (v *Volumes) mountEmptyDir(pod *v1.Pod, kind *dir, vol *v1.Volume) error {
	medium := vol.EmptyDir.Medium
	switch {
	case medium == v1.StorageMediumMemory:
		if err := holdsAPage(vol.EmptyDir.SizeLimit, int64(os.Getpagesize())); err != nil {
			return err
		}
		return v.mountTmpfs(kind, vol.Name, v.memorySize(pod, vol.EmptyDir.SizeLimit))
	case medium == v1.StorageMediumHugePages || strings.HasPrefix(string(medium), string(v1.StorageMediumHugePagesPrefix)):
		size, amount, err := hugePages(pod, medium)
		if err == nil {
			err = holdsAPage(vol.EmptyDir.SizeLimit, size)
		}
		if err != nil {
			return err
		}
		limit := amount
		if s := vol.EmptyDir.SizeLimit; s != nil && s.Value() > 0 && s.Value() < limit {
			limit = s.Value()
		}
		return mountAt(kind, vol.Name, "hugetlbfs", 0, map[string]string{
			"pagesize": strconv.FormatInt(size, 10),
			// Whole pages only.
			"size": strconv.FormatInt(limit/size*size, 10),
		})
	}
	return fmt.Errorf("emptyDir.medium %q: want \"\", Memory, HugePages or HugePages-<size>: %w", medium, errdefs.ErrInvalidArgument)
}

// holdsAPage refuses a limit of a volume in memory that is too small for
// anything: what is written there would fail without a reason that anybody could
// see. nil and 0 are no limit, as upstream has it.
func holdsAPage(limit *resource.Quantity, page int64) error {
	if limit == nil || limit.Sign() <= 0 || limit.Value() >= page {
		return nil
	}
	remedy := "raise it or leave it out"
	if text := limit.String(); strings.HasSuffix(text, "m") {
		n := strings.TrimSuffix(text, "m")
		remedy = fmt.Sprintf("m means thousandths of a byte, write %sM or %sMi", n, n)
	}
	return fmt.Errorf("emptyDir.sizeLimit %s is less than a page of memory (%d bytes), nothing could be written: %s: %w", limit, page, remedy, errdefs.ErrInvalidArgument)
}

// mountTmpfs mounts a tmpfs of a size in bytes (0: the kernel's default, half of
// the memory) that is not swapped out where the kernel can (6.4).
func (v *Volumes) mountTmpfs(d *dir, name string, size int64) error {
	options := map[string]string{"mode": "1777"} // a tmpfs's own default
	if size > 0 {
		options["size"] = strconv.FormatInt(size, 10)
	}
	v.noswap.Do(func() { v.noSwap = tmpfsNoSwap() })
	if v.noSwap {
		options["noswap"] = ""
	}
	return mountAt(d, name, "tmpfs", 0, options)
}

// tmpfsNoSwap asks the kernel by setting the option on a filesystem context that
// is never mounted.
func tmpfsNoSwap() bool {
	fd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	if unix.FsconfigSetFlag(fd, "noswap") != nil {
		return false
	}
	// The option is known to 6.4 and refused at creation without privilege.
	return unix.FsconfigCreate(fd) == nil
}

// memorySize is the size of a memory volume: what the manifest says, at most
// what the pod, and then the node, may use (upstream: calculateEmptyDirMemorySize).
func (v *Volumes) memorySize(pod *v1.Pod, limit *resource.Quantity) int64 {
	size := int64(0)
	if v.cfg.Allocatable != nil {
		if q, ok := v.cfg.Allocatable()[v1.ResourceMemory]; ok {
			size = q.Value()
		}
	}
	if m := podMemoryLimit(pod); m > 0 && (size == 0 || m < size) {
		size = m
	}
	if limit != nil && limit.Value() > 0 && (size == 0 || limit.Value() < size) {
		size = limit.Value()
	}
	return size
}

// podMemoryLimit is the memory limit of the pod's cgroup; 0 when there is none.
func podMemoryLimit(pod *v1.Pod) int64 {
	if r := pod.Spec.Resources; r != nil {
		if q, ok := r.Limits[v1.ResourceMemory]; ok {
			return q.Value()
		}
	}
	total := int64(0)
	for i := range pod.Spec.Containers {
		q, ok := pod.Spec.Containers[i].Resources.Limits[v1.ResourceMemory]
		if !ok {
			return 0
		}
		total += q.Value()
	}
	sidecars := int64(0)
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		q, ok := c.Resources.Limits[v1.ResourceMemory]
		if !ok {
			return 0
		}
		if c.RestartPolicy != nil && *c.RestartPolicy == v1.ContainerRestartPolicyAlways {
			sidecars += q.Value()
			total += q.Value()
		} else {
			total = max(total, sidecars+q.Value())
		}
	}
	return total
}

// hugePages returns the page size of a medium and how many bytes of such pages
// the containers request.
func hugePages(pod *v1.Pod, medium v1.StorageMedium) (size, amount int64, err error) {
	want := strings.TrimPrefix(string(medium), string(v1.StorageMediumHugePagesPrefix))
	bySize := map[int64]int64{}
	for _, list := range [][]v1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			for name, q := range list[i].Resources.Requests {
				s, ok := strings.CutPrefix(string(name), v1.ResourceHugePagesPrefix)
				if !ok {
					continue
				}
				page, err := resource.ParseQuantity(s)
				if err != nil || page.Value() <= 0 {
					return 0, 0, fmt.Errorf("resource %s of container %q: no page size: %w", name, list[i].Name, errdefs.ErrInvalidArgument)
				}
				bySize[page.Value()] += q.Value()
			}
		}
	}
	if medium == v1.StorageMediumHugePages {
		if len(bySize) != 1 {
			return 0, 0, fmt.Errorf("emptyDir.medium HugePages: containers request %d page sizes, want one; name it as HugePages-<size>: %w", len(bySize), errdefs.ErrInvalidArgument)
		}
		for s, n := range bySize {
			size, amount = s, n
		}
		return size, amount, nil
	}
	page, err := resource.ParseQuantity(want)
	if err != nil || page.Value() <= 0 {
		return 0, 0, fmt.Errorf("emptyDir.medium %q: no page size: %w", medium, errdefs.ErrInvalidArgument)
	}
	n, ok := bySize[page.Value()]
	if !ok {
		return 0, 0, fmt.Errorf("emptyDir.medium %q: no container requests %s%s: %w", medium, v1.ResourceHugePagesPrefix, want, errdefs.ErrInvalidArgument)
	}
	return page.Value(), n, nil
}
