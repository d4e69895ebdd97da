package pods

import (
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/kubelet/status"
)

// Desired is what a pod should be.
type Desired struct {
	Pod *v1.Pod
	// Stop, when set, ends the pod.
	Stop *Stop
	// Held: the pod was found at the start of the daemon and no source has
	// spoken for it yet. It is watched and left as it is.
	Held bool
}

// Stop is the order to end a pod. It only ever becomes stricter.
type Stop struct {
	Since time.Time     `json:"since"`
	Grace time.Duration `json:"grace"`
	// Forget removes everything of the pod, its logs and its record too;
	// otherwise its containers stay for their logs and their status.
	Forget bool `json:"forget,omitempty"`
	// Reason and Message of the status, and whether the pod failed by it.
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
	Failed  bool   `json:"failed,omitempty"`
}

func (s *Stop) deadline() time.Time { return s.Since.Add(s.Grace) }

// Step is how far a step of the pod's life is that is either done or not.
type Step uint8

const (
	StepAbsent Step = iota
	// StepUnknown: begun, or found at the start of the daemon. Starting and
	// stopping are both safe to repeat, so either goes on from here.
	StepUnknown
	StepDone
)

// Sandbox of a pod, as the runtime has it.
type Sandbox struct {
	ID      string
	Attempt uint32
	Ready   bool
	// Stopped: StopPodSandbox has succeeded, its network is given back.
	Stopped bool
	IPs     []string
	Created time.Time
}

// ImageState of the image that a container will be started from.
type ImageState struct {
	Ref    string // resolved; "": not there
	Failed time.Time
	Retry  time.Time // not to be tried before
	Reason string    // ErrImagePull, InvalidImageName, …
	Error  string
}

// Verdict of the probes on a container instance; zero: nothing known.
type Verdict struct {
	Liveness, Startup bool // true: failed
}

// Kill is the order to end one container instance.
type Kill struct {
	Since    time.Time
	Grace    time.Duration
	HookDone bool
	Unfit    bool // a probe had failed for good
}

func (k Kill) deadline() time.Time { return k.Since.Add(k.Grace) }

// Observed is what is known of a pod. plan reads it and changes nothing.
type Observed struct {
	Started time.Time
	// Stale: the runtime must be asked before anything is decided.
	Stale bool
	// Completed: the pod has run to its end and stays down.
	Completed bool

	Cgroup, Volumes Step
	// Outdated: what the volumes are made of has changed since they were.
	Outdated bool
	// Sandboxes and Containers hold the newest first.
	Sandboxes  []Sandbox
	Containers []status.Container
	Images     map[string]ImageState // by container
	Verdicts   map[string]Verdict    // by container id
	Kills      map[string]Kill       // by container id
	Backoffs   map[string]Backoff    // by container
	// Ended is when a container ended whose instance a restart of all
	// containers has removed: its back-off counts from then.
	Ended map[string]time.Time
	// Changed containers run with another spec than the one desired.
	Changed map[string]bool
	// Forced: the instance id of a container that a user wants replaced.
	Forced map[string]string
	// Resize is how far the pod's group and running containers are from the
	// resources that the pod was allocated last; StepAbsent: they have them.
	Resize Step
	// Actual are the resources of each container's newest instance, where
	// known.
	Actual map[string]v1.ResourceRequirements
	// SandboxChanged: the sandbox was made for another pod spec.
	SandboxChanged bool

	// Busy holds what is being done, by key, with the time at which a stop
	// that is under way turns to SIGKILL.
	Busy map[string]time.Time
	// Retry holds the keys that failed, with the time of the next try.
	Retry map[string]time.Time
}

// current is the sandbox that containers are started in; nil: none is ready.
func (o *Observed) current() *Sandbox {
	if len(o.Sandboxes) == 0 || !o.Sandboxes[0].Ready || o.Sandboxes[0].Stopped || o.SandboxChanged {
		return nil
	}
	return &o.Sandboxes[0]
}

// newest instance of a container, in whichever sandbox.
func (o *Observed) newest(name string) *status.Container {
	for i := range o.Containers {
		if o.Containers[i].Name == name {
			return &o.Containers[i]
		}
	}
	return nil
}

// in the current sandbox.
func (o *Observed) in(sandbox, name string) *status.Container {
	if c := o.newest(name); c != nil && c.Sandbox == sandbox {
		return c
	}
	return nil
}
