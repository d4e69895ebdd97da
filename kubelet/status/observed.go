// Package status turns what the runtime says about a pod into the status that
// the Pod API promises. Everything here is a function of values: the same
// observation gives the same status, whoever asks and whenever.
package status

import (
	"time"

	v1 "k8s.io/api/core/v1"
)

// State of a container instance, as CRI names it.
type State uint8

const (
	Created State = iota
	Running
	Exited
	// Unknown: the runtime cannot say; it may run.
	Unknown
)

func (s State) String() string {
	return [...]string{"created", "running", "exited", "unknown"}[s]
}

// Container is one instance of a container: each restart makes a new one.
type Container struct {
	ID      string // without scheme
	Name    string
	Sandbox string // the sandbox it was created in
	Attempt int32  // how often the container was restarted before
	State   State

	CreatedAt, StartedAt, FinishedAt time.Time
	// EndedAt is FinishedAt by the agent's own clock; zero: not taken.
	EndedAt time.Time

	ExitCode int32
	Reason   string // Completed, Error, OOMKilled, StartError, …
	Message  string // the runtime's and the termination message

	Image    string // as the runtime reports it
	ImageRef string // digested

	// User that it was started as; nil: the runtime does not say.
	User *v1.ContainerUser
	// StopSignal as the runtime has it.
	StopSignal v1.Signal

	// Starting: the start, the postStart hook included, is not over yet.
	Starting bool
	// Started: running and past its startup probe.
	Started bool
	// Ready: Started, and its readiness probe says so.
	Ready bool
}

// Done says that the instance exited well.
func (c *Container) Done() bool {
	return c.State == Exited && c.ExitCode == 0 && c.Reason != "OOMKilled"
}

// Alive says that it runs or may run.
func (c *Container) Alive() bool { return c.State == Running || c.State == Unknown }

// Observed is what is known of one pod at one moment.
type Observed struct {
	// Containers holds all instances, of each name the newest first.
	Containers []Container
	// Waiting tells why a container is not running now, where a reason is
	// known: CrashLoopBackOff, ErrImagePull, CreateContainerConfigError, …
	Waiting map[string]v1.ContainerStateWaiting
	// SandboxReady: the pod's sandbox runs and its network is up.
	SandboxReady bool
	PodIPs       []string // empty with hostNetwork
	HostIPs      []string
	StartTime    time.Time
	// Terminal: nothing of the pod will be started any more.
	Terminal bool
	// Starting: something of the pod is being started, and may run by now.
	Starting bool
	// Failed, with a reason such as DeadlineExceeded, makes the pod Failed
	// whatever its containers did.
	Failed *Cause
	// Returning containers have ended and will be started again, whatever
	// their policy says of it: their spec has changed.
	Returning map[string]bool
	// Actual are the resources that running containers have, where they may
	// not be those of the pod.
	Actual map[string]v1.ResourceRequirements
	// ActualPod are the pod's own while a resize has not given it those that it
	// has been allocated; nil: it has them.
	ActualPod *v1.ResourceRequirements
	// ResizePending and ResizeInProgress are resizes that could not be
	// allocated, and that are not with all containers yet; nil: none.
	ResizePending, ResizeInProgress *Resize
	// restarting: all containers are removed and start anew; Compute's own.
	restarting bool
	// Troubles are the volumes whose filesystem does not answer, in words.
	Troubles []string
	// Disruption is why the node ended the pod although it was well.
	Disruption *Cause
	// Note is the status' reason and message without a change of phase.
	Note *Cause
}

// Cause of a pod's state, in upstream's words.
type Cause struct {
	Reason, Message string
}

// Resize of a pod that is not over.
type Resize struct {
	// Reason is Deferred, Infeasible, Error or "".
	Reason, Message string
	Generation      int64 // of the pod that asks for it
}

// Newest instance of the container of that name; nil: none.
func (o *Observed) Newest(name string) *Container {
	for i := range o.Containers {
		if o.Containers[i].Name == name {
			return &o.Containers[i]
		}
	}
	return nil
}

// previous is the instance before the newest.
func (o *Observed) previous(name string) *Container {
	n := 0
	for i := range o.Containers {
		if o.Containers[i].Name == name {
			if n++; n == 2 {
				return &o.Containers[i]
			}
		}
	}
	return nil
}
