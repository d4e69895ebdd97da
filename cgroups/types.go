// Package cgroups owns the pods' part of the cgroup tree: the QoS levels, one
// group per pod, their limits, their statistics and their removal, on cgroup
// v1 and v2, with the cgroupfs and systemd drivers.
package cgroups

import (
	"context"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Pods is the contract that *Tree fulfils for the agent.
type Pods interface {
	// Parent is what CRI's cgroup_parent takes for this pod: an absolute path
	// (cgroupfs) or a slice name (systemd).
	Parent(uid types.UID, qos v1.PodQOSClass) string
	// Ensure creates the pod's group, or updates its limits.
	Ensure(ctx context.Context, uid types.UID, qos v1.PodQOSClass, r *specs.LinuxResources) error
	// Name writes a name for people to read onto the pod's group, as far as the
	// kernel can keep one.
	Name(uid types.UID, qos v1.PodQOSClass, name string)
	// Remove kills what is left in the pod's group and removes it with all
	// below it. It succeeds when the group is gone.
	Remove(ctx context.Context, uid types.UID) error
	// List returns the pods that have a group.
	List() ([]types.UID, error)
	// Stats of the pod's group.
	Stats(uid types.UID) (*Stats, error)
}

// Stats of one cgroup. Absent values are nil: the kernel or the controller
// does not give them.
type Stats struct {
	At               time.Time
	CPUUsage         *time.Duration // cumulated
	MemoryUsage      *uint64        // bytes, page cache included
	MemoryWorkingSet *uint64        // usage without inactive file pages
	MemoryRSS        *uint64
	MemoryLimit      *uint64 // nil: no limit
	SwapUsage        *uint64
	PageFaults       *uint64
	MajorPageFaults  *uint64
	PIDs             *uint64
	CPU, Memory, IO  *Pressure // cgroup v2 with PSI only
	IOReadBytes      *uint64
	IOWriteBytes     *uint64
	OOMKills         *uint64
}

// Pressure is one PSI file, see Documentation/accounting/psi.rst.
type Pressure struct{ Some, Full PressureLine }

// PressureLine holds shares in percent and the total stall time.
type PressureLine struct {
	Avg10, Avg60, Avg300 float64
	Total                time.Duration
}
