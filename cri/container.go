package cri

import (
	"fmt"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/shim"
)

// Reasons and codes of the ContainerStatus, as containerd's CRI reports them.
const (
	reasonCompleted  = "Completed"
	reasonError      = "Error"
	reasonOOMKilled  = "OOMKilled"
	reasonStartError = "StartError"
	reasonUnknown    = "Unknown"

	exitStartError = 128
	exitUnknown    = 255
)

// container is one container. The fields above mu never change once it is in
// the registry.
//
//	(creating: an attempt, not in the registry)
//	   │ CreateContainer
//	   ▼          StartContainer            exit, reboot, lost
//	created ───────────────────► running ─────────────────────► exited
//	   └────────── start failed: code 128, StartError ────────────▲
//
// RemoveContainer leads out of every state.
type container struct {
	id         string
	name       string // see containerName
	sandboxID  string
	config     *runtimeapi.ContainerConfig
	image      imageOf
	createdAt  int64
	logPath    string
	privatePID bool // it has a PID namespace of its own, which dies with its init
	// process is what an exec inherits: user, environment, capabilities; no args.
	process     *specs.Process
	imageMounts []imageMount
	gate        gate // orders Start, Remove and updates

	mu     sync.Mutex
	state  runtimeapi.ContainerState
	status containerStatus
	// spec is kept from Create to Start only.
	spec      *specs.Spec
	starting  bool // the shim may have it, but nothing runs yet
	removing  bool
	gone      bool // its record is deleted and must not come back
	stopping  bool // the stop signal has been sent
	announced bool // STARTED has been emitted
	resources *runtimeapi.LinuxContainerResources
	exited    chan struct{} // closed when the state becomes exited
}

// containerStatus is what changes in a container's life.
type containerStatus struct {
	StartedAt  int64  `json:"startedAt,omitempty"`
	FinishedAt int64  `json:"finishedAt,omitempty"`
	ExitCode   int32  `json:"exitCode,omitempty"`
	Reason     string `json:"reason,omitempty"`
	Message    string `json:"message,omitempty"`
	PID        int    `json:"pid,omitempty"`
	// MemoryPeak of a container that was OOM-killed, in bytes.
	MemoryPeak uint64 `json:"memoryPeak,omitempty"`
	// Signal that ended it, as the kernel says; 0: it exited by itself, or the
	// record is of a release that did not note it. ExitCode is 128+Signal, and a
	// program may exit with that code, too.
	Signal int `json:"signal,omitempty"`
	oomKills
}

// oomKills are those of processes of a container, its first one or others.
type oomKills struct {
	OOMKills    int   `json:"oomKills,omitempty"` // how often some were seen
	OOMKilledAt int64 `json:"oomKilledAt,omitempty"`
}

// imageOf is the image a container was made from. It outlives the image's
// names: those may be removed or moved while the container is there.
type imageOf struct {
	ID         string `json:"id"`
	Spec       string `json:"spec"`           // as the request named it
	User       string `json:"user,omitempty"` // user_specified_image
	Tag        string `json:"tag,omitempty"`
	StopSignal string `json:"stopSignal,omitempty"`
}

// imageMount is an image volume that has to be unmounted with the container.
type imageMount struct {
	Key    string `json:"key"`
	Target string `json:"target"`
}

// containerRecord is what a container is on disk.
type containerRecord struct {
	SandboxID   string                                         `json:"sandboxID"`
	Config      protoJSON[*runtimeapi.ContainerConfig]         `json:"config"`
	Image       imageOf                                        `json:"image"`
	SandboxName string                                         `json:"sandboxName"`
	CreatedAt   int64                                          `json:"createdAt"`
	LogPath     string                                         `json:"logPath,omitempty"`
	PrivatePID  bool                                           `json:"privatePID,omitempty"`
	Process     *specs.Process                                 `json:"process"`
	ImageMounts []imageMount                                   `json:"imageMounts,omitempty"`
	State       string                                         `json:"state"`
	Status      containerStatus                                `json:"status"`
	Resources   protoJSON[*runtimeapi.LinuxContainerResources] `json:"resources,omitzero"`
}

// containerName identifies an attempt of a container of a pod's attempt.
func containerName(sandbox string, m *runtimeapi.ContainerMetadata) string {
	return fmt.Sprintf("%s_%d/%s", m.GetName(), m.GetAttempt(), sandbox)
}

// saveContainer writes the record; the caller holds c.mu or owns c.
func (s *Service) saveContainer(c *container, sandboxName string) error {
	return s.store.Put(kindContainer, c.id, &containerRecord{
		SandboxID: c.sandboxID, Config: protoJSON[*runtimeapi.ContainerConfig]{c.config},
		Image: c.image, SandboxName: sandboxName, CreatedAt: c.createdAt, LogPath: c.logPath,
		PrivatePID: c.privatePID, Process: c.process, ImageMounts: c.imageMounts,
		State: c.state.String(), Status: c.status,
		Resources: protoJSON[*runtimeapi.LinuxContainerResources]{c.resources},
	})
}

// persist saves a change of state at once. A failure is logged only: the
// change has happened, and the next start learns it again from the shim. The
// caller holds c.mu.
func (s *Service) persist(c *container) {
	if c.gone {
		return
	}
	_, sandbox, _ := cutName(c.name)
	if err := s.saveContainer(c, sandbox); err != nil {
		s.log.Error("container record not written", "container", c.id, "error", err)
	}
}

// persistSoon saves a change that the shim knows as well.
func (s *Service) persistSoon(c *container) {
	s.flusher.soon(c.id, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		s.persist(c)
	})
}

func cutName(name string) (string, string, bool) {
	for i := range len(name) {
		if name[i] == '/' {
			return name[:i], name[i+1:], true
		}
	}
	return name, "", false
}

// running reports the state under the lock.
func (c *container) current() runtimeapi.ContainerState {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// markRunning records a start. The exit may have been recorded before: then
// only the time of the start is new.
func (s *Service) markRunning(c *container, p *shim.Process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.markRunningLocked(c, p.PID, p.StartedAt.UnixNano())
	s.persistSoon(c)
}

func (s *Service) markRunningLocked(c *container, pid int, startedAt int64) {
	if c.status.StartedAt == 0 {
		c.status.StartedAt = startedAt
	}
	if pid != 0 {
		c.status.PID = pid
	}
	c.starting = false
	c.spec = nil
	if c.state == runtimeapi.ContainerState_CONTAINER_CREATED {
		c.state = runtimeapi.ContainerState_CONTAINER_RUNNING
	}
	if !c.announced {
		c.announced = true
		s.events.emit(event{id: c.id, sandboxID: c.sandboxID, kind: runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT})
	}
}

// markExited records how a container ended, once.
func (s *Service) markExited(c *container, e *shim.Exit, pid int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == runtimeapi.ContainerState_CONTAINER_EXITED {
		return
	}
	s.markRunningLocked(c, pid, e.At.UnixNano())
	c.state = runtimeapi.ContainerState_CONTAINER_EXITED
	c.status.FinishedAt = e.At.UnixNano()
	c.status.ExitCode = int32(e.Code)
	c.status.Reason, c.status.Message = exitReason(e)
	c.status.MemoryPeak, c.status.Signal = e.MemoryPeak, e.Signal
	s.persistSoon(c)
	close(c.exited)
	s.events.emit(event{id: c.id, sandboxID: c.sandboxID, kind: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT})
}

// exitReason names an exit as the CRI's reason and message.
func exitReason(e *shim.Exit) (reason, message string) {
	switch {
	case !e.Known:
		return reasonUnknown, "the exit status was lost: the container ended while nothing could wait for it"
	case e.OOMKilled:
		return reasonOOMKilled, ""
	case e.Code == 0:
		return reasonCompleted, ""
	}
	return reasonError, ""
}

// markStartFailed records a start that never ran the payload.
func (s *Service) markStartFailed(c *container, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != runtimeapi.ContainerState_CONTAINER_CREATED {
		return
	}
	t := now()
	c.starting = false
	c.spec = nil
	c.state = runtimeapi.ContainerState_CONTAINER_EXITED
	c.status = containerStatus{StartedAt: 0, FinishedAt: t, ExitCode: exitStartError, Reason: reasonStartError, Message: err.Error()}
	s.persist(c)
	close(c.exited)
	s.events.emit(event{id: c.id, sandboxID: c.sandboxID, kind: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT})
}
