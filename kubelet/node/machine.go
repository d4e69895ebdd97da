package node

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/component-helpers/nodedeclaredfeatures/features/inplacepodresize"
	"k8s.io/component-helpers/nodedeclaredfeatures/features/restartallcontainers"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// KubeletVersion is upstream's whose behaviour podd has; the control plane
// decides by it what a node understands.
const KubeletVersion = "v1.36.3"

// ownLabels say what the machine is.
func ownLabels(name string) map[string]string {
	return map[string]string{
		v1.LabelHostname: name, v1.LabelOSStable: "linux", v1.LabelArchStable: runtime.GOARCH,
		"beta.kubernetes.io/os": "linux", "beta.kubernetes.io/arch": runtime.GOARCH,
	}
}

// CRI is what of the runtime a node's status tells, *cri.Service.
type CRI interface {
	Status(context.Context, *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error)
	ListImages(context.Context, *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error)
}

// Machine tells the status of this machine.
type Machine struct {
	Name string
	IPs  []string
	// Port of the kubelet's HTTPS API; 0: it is not served.
	Port int
	// Capacity and Allocatable are resources that pods may ask for.
	Capacity, Allocatable v1.ResourceList
	// Pressure below these amounts of free memory and disk, of RootDir's file
	// system, in bytes; 0: never.
	MemoryLow, DiskLow int64
	RootDir            string
	// MaxImages in the status, the largest first; -1: all.
	MaxImages int
	Runtime   CRI
	// Version of podd.
	Version string
}

// Fixed is the part of the machine's status that is known without asking the
// runtime: what admission needs. That podd's runtime has supplementalGroupsPolicy
// is part of it.
func (m *Machine) Fixed() v1.NodeStatus {
	groups := true
	s := v1.NodeStatus{
		Capacity: m.Capacity, Allocatable: m.Allocatable, NodeInfo: m.info(),
		DaemonEndpoints: v1.NodeDaemonEndpoints{KubeletEndpoint: v1.DaemonEndpoint{Port: int32(m.Port)}},
		Features:        &v1.NodeFeatures{SupplementalGroupsPolicy: &groups},
	}
	for _, ip := range m.IPs {
		s.Addresses = append(s.Addresses, v1.NodeAddress{Type: v1.NodeInternalIP, Address: ip})
	}
	s.Addresses = append(s.Addresses, v1.NodeAddress{Type: v1.NodeHostName, Address: m.Name})
	return s
}

// Status of the machine now, without times.
func (m *Machine) Status(ctx context.Context) v1.NodeStatus {
	s := m.Fixed()
	s.Features = nil // the runtime tells
	s.Conditions = m.pressures()
	ready := v1.NodeCondition{Type: v1.NodeReady, Status: v1.ConditionTrue, Reason: "KubeletReady", Message: "kubelet is posting ready status"}
	if not := m.runtime(ctx, &s); len(not) > 0 {
		ready.Status, ready.Reason, ready.Message = v1.ConditionFalse, "KubeletNotReady", strings.Join(not, "; ")
	}
	s.Conditions = append(s.Conditions, ready)
	return s
}

// declared are the features that the scheduler and the apiserver ask a node for
// before they give it pods and changes that need them (KEP-5328), sorted.
// ExtendWebSocketsToKubelet is not among them: the apiserver translates to SPDY.
var declared = []string{
	inplacepodresize.PodLevelResourcesResizeFeature.Name(),
	inplacepodresize.NonSidecarInitContainerResizeFeature.Name(),
	restartallcontainers.RestartAllContainersOnContainerExits,
}

// runtime's handlers, features and images, and why the node is not ready.
func (m *Machine) runtime(ctx context.Context, s *v1.NodeStatus) (not []string) {
	st, err := m.Runtime.Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return []string{fmt.Sprintf("container runtime is down: %v", err)}
	}
	for _, c := range st.GetStatus().GetConditions() {
		if !c.Status {
			not = append(not, fmt.Sprintf("container runtime %s: reason:%s message:%s", c.Type, c.Reason, c.Message))
		}
	}
	for _, h := range st.RuntimeHandlers {
		f := h.GetFeatures()
		rro, userns := f.GetRecursiveReadOnlyMounts(), f.GetUserNamespaces()
		s.RuntimeHandlers = append(s.RuntimeHandlers, v1.NodeRuntimeHandler{
			Name: h.Name, Features: &v1.NodeRuntimeHandlerFeatures{RecursiveReadOnlyMounts: &rro, UserNamespaces: &userns},
		})
	}
	groups := st.GetFeatures().GetSupplementalGroupsPolicy()
	s.Features = &v1.NodeFeatures{SupplementalGroupsPolicy: &groups}
	s.DeclaredFeatures = slices.Clone(declared)
	images, err := m.Runtime.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		return append(not, fmt.Sprintf("image service: %v", err))
	}
	s.Images = m.images(images.Images)
	return not
}

// maxNames of one image, as upstream.
const maxNames = 5

func (m *Machine) images(all []*runtimeapi.Image) []v1.ContainerImage {
	var out []v1.ContainerImage
	for _, img := range all {
		names := append(slices.Clone(img.RepoDigests), img.RepoTags...)
		if len(names) == 0 {
			continue
		}
		slices.Sort(names)
		out = append(out, v1.ContainerImage{Names: names[:min(len(names), maxNames)], SizeBytes: int64(img.Size)})
	}
	slices.SortFunc(out, func(a, b v1.ContainerImage) int {
		return cmp.Or(cmp.Compare(b.SizeBytes, a.SizeBytes), cmp.Compare(a.Names[0], b.Names[0]))
	})
	if m.MaxImages >= 0 && len(out) > m.MaxImages {
		out = out[:m.MaxImages]
	}
	return out
}

func (m *Machine) info() v1.NodeSystemInfo {
	var u unix.Utsname
	_ = unix.Uname(&u) // of a struct of our own: it cannot fail
	i := v1.NodeSystemInfo{
		MachineID: first("/etc/machine-id", "/var/lib/dbus/machine-id"), SystemUUID: first("/sys/class/dmi/id/product_uuid"),
		BootID: first("/proc/sys/kernel/random/boot_id"), KernelVersion: unix.ByteSliceToString(u.Release[:]),
		OSImage: osImage(), ContainerRuntimeVersion: "podd://" + m.Version, KubeletVersion: KubeletVersion,
		OperatingSystem: "linux", Architecture: runtime.GOARCH,
	}
	if i.SystemUUID == "" {
		i.SystemUUID = i.MachineID
	}
	return i
}

// first of the files that can be read.
func first(paths ...string) string {
	for _, p := range paths {
		if b, err := os.ReadFile(p); err == nil {
			return strings.TrimSpace(string(b))
		}
	}
	return ""
}

// osImage is os-release(5)'s PRETTY_NAME.
func osImage() string {
	b, err := os.ReadFile("/etc/os-release")
	if err != nil {
		b, _ = os.ReadFile("/usr/lib/os-release")
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "PRETTY_NAME="); ok {
			return strings.Trim(v, `"'`)
		}
	}
	return "Linux"
}

// pressures of memory, disk and process IDs.
func (m *Machine) pressures() []v1.NodeCondition {
	condition := func(t v1.NodeConditionType, has bool, bad, good, what string) v1.NodeCondition {
		if has {
			return v1.NodeCondition{Type: t, Status: v1.ConditionTrue, Reason: bad, Message: "kubelet has " + what}
		}
		return v1.NodeCondition{Type: t, Status: v1.ConditionFalse, Reason: good, Message: "kubelet has " + what}
	}
	word := func(has bool, bad, good string) string {
		if has {
			return bad
		}
		return good
	}
	memory := m.MemoryLow > 0 && available() < m.MemoryLow
	disk := m.DiskLow > 0 && free(m.RootDir) < m.DiskLow
	pids := pidsLow()
	return []v1.NodeCondition{
		condition(v1.NodeMemoryPressure, memory, "KubeletHasInsufficientMemory", "KubeletHasSufficientMemory", word(memory, "insufficient memory available", "sufficient memory available")),
		condition(v1.NodeDiskPressure, disk, "KubeletHasDiskPressure", "KubeletHasNoDiskPressure", word(disk, "disk pressure", "no disk pressure")),
		condition(v1.NodePIDPressure, pids, "KubeletHasInsufficientPID", "KubeletHasSufficientPID", word(pids, "insufficient PID available", "sufficient PID available")),
	}
}

// available memory, as proc_meminfo(5) estimates it.
func available() int64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 1 << 62
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), "MemAvailable:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err == nil {
				return kib << 10
			}
		}
	}
	return 1 << 62
}

func free(dir string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 1 << 62
	}
	return int64(st.Bavail) * st.Bsize
}

// pidsLow says that the kernel has nearly no process ID left: the threads that
// there are (proc_loadavg(5)) against the limit.
func pidsLow() bool {
	limit, err := strconv.Atoi(first("/proc/sys/kernel/pid_max"))
	fields := strings.Fields(first("/proc/loadavg"))
	if err != nil || len(fields) < 4 {
		return false
	}
	_, total, _ := strings.Cut(fields[3], "/")
	n, err := strconv.Atoi(total)
	return err == nil && limit-n < limit/100
}

// Capacity of the machine for pods: dir is where their files are.
func Capacity(dir string, maxPods int64) v1.ResourceList {
	list := v1.ResourceList{
		v1.ResourceCPU:  *resource.NewQuantity(int64(runtime.NumCPU()), resource.DecimalSI),
		v1.ResourcePods: *resource.NewQuantity(maxPods, resource.DecimalSI),
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		list[v1.ResourceMemory] = *resource.NewQuantity(int64(info.Totalram)*int64(info.Unit), resource.BinarySI)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) { // it may not have been made yet
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil {
			list[v1.ResourceEphemeralStorage] = *resource.NewQuantity(int64(st.Blocks)*st.Bsize, resource.BinarySI)
			break
		}
	}
	pages, _ := filepath.Glob("/sys/kernel/mm/hugepages/hugepages-*kB")
	for _, p := range pages {
		kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimPrefix(filepath.Base(p), "hugepages-"), "kB"), 10, 64)
		n, err2 := strconv.ParseInt(first(filepath.Join(p, "nr_hugepages")), 10, 64)
		if err == nil && err2 == nil {
			size := resource.NewQuantity(kib<<10, resource.BinarySI)
			list[v1.ResourceName(v1.ResourceHugePagesPrefix+size.String())] = *resource.NewQuantity(n*kib<<10, resource.BinarySI)
		}
	}
	return list
}

// Allocatable is what of capacity pods may have: less what is reserved.
func Allocatable(capacity v1.ResourceList, reserved ...v1.ResourceList) v1.ResourceList {
	out := capacity.DeepCopy()
	for _, list := range reserved {
		for name, q := range list {
			if have, ok := out[name]; ok {
				have.Sub(q)
				if have.Sign() < 0 {
					have = *resource.NewQuantity(0, have.Format)
				}
				out[name] = have
			}
		}
	}
	return out
}
