// Package shim is the private protocol between podd and podd-shim, and its
// client. podd-shim is the parent of every container of the node; podd asks it
// to start, signal and reap them, and may itself come and go.
//
// The types of this file are the whole vocabulary. They carry OCI runtime
// specifications: everything Kubernetes and CRI is resolved before it gets here.
package shim

import (
	"context"
	"os"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// SandboxSpec describes the pause process that holds a pod's namespaces.
type SandboxSpec struct {
	// ID is the CRI sandbox id: 64 hex digits.
	ID string `json:"id"`
	// CgroupPath is the cgroup of the pause process, absolute below the
	// controllers' mount points (cgroupfs) or "slice:prefix:name" (systemd).
	CgroupPath string `json:"cgroupPath"`
	// SystemdCgroup selects the systemd cgroup driver.
	SystemdCgroup bool `json:"systemdCgroup,omitempty"`
	// Resources limits the pause process' own cgroup; nil: no limit.
	Resources *specs.LinuxResources `json:"resources,omitempty"`
	// Namespaces lists those to create. An absent one is the host's. Only
	// network, uts, ipc, pid and user are possible.
	Namespaces []specs.LinuxNamespaceType `json:"namespaces"`
	// UIDMappings and GIDMappings are required when Namespaces has user.
	UIDMappings []specs.LinuxIDMapping `json:"uidMappings,omitempty"`
	GIDMappings []specs.LinuxIDMapping `json:"gidMappings,omitempty"`
	// Hostname and Domainname are set in a new UTS namespace.
	Hostname   string `json:"hostname,omitempty"`
	Domainname string `json:"domainname,omitempty"`
	// Sysctls are written inside the new namespaces, before anything joins them.
	Sysctls map[string]string `json:"sysctls,omitempty"`
	// OOMScoreAdj of the pause process; clamped to what this host permits.
	OOMScoreAdj int `json:"oomScoreAdj"`
	// SELinuxLabel and AppArmorProfile confine the pause process where the host has them.
	SELinuxLabel    string `json:"selinuxLabel,omitempty"`
	AppArmorProfile string `json:"apparmorProfile,omitempty"`
}

// ContainerSpec describes one container.
type ContainerSpec struct {
	ID        string `json:"id"`
	SandboxID string `json:"sandboxID"`
	// Spec is the OCI runtime specification. Root.Path is a mounted root file
	// system; namespaces carry their paths. Linux.Seccomp is applied by a
	// program compiled once and cached.
	Spec *specs.Spec `json:"spec"`
	// SystemdCgroup selects the systemd cgroup driver for Spec.Linux.CgroupsPath.
	SystemdCgroup bool `json:"systemdCgroup,omitempty"`
	// LogPath is the CRI log file that the shim writes; "": output is dropped.
	LogPath string `json:"logPath,omitempty"`
	// LogMaxSize in bytes (0: no rotation) and LogMaxFiles (≥ 2) rotate the log.
	LogMaxSize  int64 `json:"logMaxSize,omitempty"`
	LogMaxFiles int   `json:"logMaxFiles,omitempty"`
	// Stdin keeps a stdin pipe open for Attach; StdinOnce closes it when the
	// first attached client has gone. Terminal comes from Spec.Process.Terminal.
	Stdin     bool `json:"stdin,omitempty"`
	StdinOnce bool `json:"stdinOnce,omitempty"`
}

// State is where a container or sandbox is in its life.
type State string

const (
	Created State = "created" // init waits for Start
	Running State = "running"
	Paused  State = "paused"
	Exited  State = "exited"
)

// Exit says how a process ended.
type Exit struct {
	// Code is the exit code, 128+n for signal n, or Unknown (255) with Known
	// false when nobody could reap the process (see DESIGN: never invented).
	Code   int       `json:"code"`
	Signal int       `json:"signal,omitempty"`
	Known  bool      `json:"known"`
	At     time.Time `json:"at"`
	// OOMKilled: the kernel's OOM killer acted in the container's cgroup.
	OOMKilled bool `json:"oomKilled,omitempty"`
	// MemoryPeak is the most memory that the container has used, in bytes; only
	// of one that was OOM-killed. 0: not known.
	MemoryPeak uint64 `json:"memoryPeak,omitempty"`
}

// Process is the state of a sandbox's pause or a container's init.
type Process struct {
	ID        string    `json:"id"`
	SandboxID string    `json:"sandboxID,omitempty"` // empty for a sandbox
	State     State     `json:"state"`
	PID       int       `json:"pid"` // in the host's PID namespace; kept after exit
	CreatedAt time.Time `json:"createdAt"`
	StartedAt time.Time `json:"startedAt,omitzero"`
	Exit      *Exit     `json:"exit,omitempty"`
}

// EventKind names what an Event tells.
type EventKind string

const (
	EventCreated EventKind = "created"
	EventStarted EventKind = "started"
	EventExited  EventKind = "exited"
	EventOOM     EventKind = "oom" // a process of the container was OOM-killed; it may still run
	EventDeleted EventKind = "deleted"
)

// Event is one entry of the shim's ordered log. Seq grows by one and never
// repeats while the node is up, across restarts of the shim too.
type Event struct {
	Seq     uint64    `json:"seq"`
	Kind    EventKind `json:"kind"`
	ID      string    `json:"id"`
	Sandbox bool      `json:"sandbox,omitempty"`
	PID     int       `json:"pid,omitempty"`
	At      time.Time `json:"at"`
	Exit    *Exit     `json:"exit,omitempty"`
}

// ExecSpec runs a further process in a container.
type ExecSpec struct {
	ContainerID string         `json:"containerID"`
	Process     *specs.Process `json:"process"` // Terminal selects a pty
	// Stdin, Stdout and Stderr are handed to the process as they are (nil:
	// /dev/null); with a terminal they must be nil and the pty master comes back.
	Stdin, Stdout, Stderr *os.File `json:"-"`
	// Libcontainer starts the process by libcontainer even where the shim's
	// own way would do, to compare the two.
	Libcontainer bool `json:"-"`
}

// Info is what the shim says of itself.
type Info struct {
	PID        int       `json:"pid"`
	BuildID    string    `json:"buildID"` // compared by podd to decide on an upgrade in place
	Protocol   int       `json:"protocol"`
	StartedAt  time.Time `json:"startedAt"`
	Containers int       `json:"containers"`
	Sandboxes  int       `json:"sandboxes"`
}

// Session is a running exec or attach.
type Session interface {
	// TTY is the pty master of an exec with a terminal, else nil.
	TTY() *os.File
	// PID of the process on the host; 0 for an attach.
	PID() int
	Resize(width, height uint16) error
	Signal(signal int) error
	// Wait returns how it ended; cancelling ctx kills an exec'd process with
	// all its descendants in the same session. The error is ctx's own only when
	// the shim has said that the process ran until then; of one whose end the
	// shim could not tell it is ErrUnavailable.
	Wait(ctx context.Context) (*Exit, error)
	Close() error
}
