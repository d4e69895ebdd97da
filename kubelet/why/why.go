// Package why says in plain words what a pod waits for or why it failed, and
// what to do about it. Explain is a pure function of an Evidence: whoever
// gathers one (package evidence) may ask the runtime, the logs and the kernel;
// here is nothing but judgement.
package why

import (
	"fmt"
	"time"

	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/kubelet/limits"
	"github.com/podd-runtime/podd/kubelet/server/api"
	"github.com/podd-runtime/podd/kubelet/status"
)

// Evidence is what is known of one pod at one moment.
type Evidence struct {
	Now time.Time
	// Pod with its status.
	Pod *v1.Pod
	// Events of the pod, the one that came last at the end.
	Events []v1.Event
	// Problems of the manifest that the pod came from.
	Problems []api.Problem
	// Containers by name, with what the status does not tell.
	Containers map[string]Container
	// Ends of instances, by container id, as far as the runtime still has them.
	Ends map[string]End
	// Waits is what the pod's worker waits for.
	Waits Waits
	// Pulls that are under way on the node.
	Pulls []api.Progress
	// Listeners on ports of the host that the pod wants.
	Listeners []Listener
	// Disks that are nearly full.
	Disks []Disk
	// Filling is what fills the disk of the images, where an image found no
	// room on it.
	Filling []string
}

// Container is what is known of a container besides its status.
type Container struct {
	// Log is the end of the log of the instance that the status is about: the
	// one that failed, or runs. A line each, without time and stream.
	Log []string
	// MemoryPeak is the most that the instance has ever used, MemoryLimit what
	// the kernel lets it have, in bytes; 0: not known, or none.
	MemoryPeak, MemoryLimit uint64
}

// End is what the status does not tell of an instance's end.
type End struct {
	// Signal that ended it; 0: none did. An exit code of 137 says nothing of
	// that: a program may exit with it.
	Signal int32
	// OOMKills is how often processes of it were killed for memory, while it
	// went on or not, OOMKilled when the last time was.
	OOMKills  int
	OOMKilled time.Time
}

// Waits is what a pod's worker has in hand.
type Waits struct {
	// Next is when a container is started or its image is asked for again.
	Next map[string]time.Time
	// Sandbox and Volumes are when these are tried again; zero: no try is due.
	Sandbox, Volumes time.Time
	// Doing names the steps under way: "volumes", "sandbox", "unmount",
	// "remove", or "stop CONTAINER", "preStop CONTAINER", "postStart CONTAINER".
	Doing []string
	// Kill is when containers that are being stopped are killed, by name.
	Kill map[string]time.Time
	// Held: podd has just started and waits for the pod's source to speak.
	Held bool
	// Replaced: another pod of the name begins when this one is gone.
	Replaced bool
}

// Listener is a process that has a port of the host.
type Listener struct {
	Port     int32
	Protocol v1.Protocol
	PID      int
	Program  string
	// Pod that the process belongs to, namespace/name; "": none of ours.
	Pod string
}

func (l Listener) String() string {
	text := fmt.Sprintf("process %d (%s)", l.PID, l.Program)
	if l.PID == 0 {
		text = "a process that cannot be named"
	}
	if l.Pod != "" {
		text += " of pod " + l.Pod
	}
	return text
}

// Disk is a file system of the node.
type Disk struct {
	Path string
	// Used of its bytes and of its inodes, in percent.
	Bytes, Inodes int
	// Holders of the bytes, in words, where known.
	Holders []string
}

// Explain the pod.
func Explain(e *Evidence) api.Diagnosis {
	x := explainer{Evidence: e}
	x.pod()
	d := api.Diagnosis{
		Namespace: e.Pod.Namespace, Name: e.Pod.Name, UID: string(e.Pod.UID),
		Phase: string(e.Pod.Status.Phase), Findings: x.found, Fine: true,
	}
	for _, f := range x.found {
		d.Fine = d.Fine && f.Level == api.Notice
	}
	d.Summary = x.summary(d.Fine)
	return d
}

// explainer collects findings, the most important first.
type explainer struct {
	*Evidence
	found []api.Finding
}

func (x *explainer) add(f api.Finding) { x.found = append(x.found, f) }

// pod goes through a pod's life in the order in which things can go wrong.
func (x *explainer) pod() {
	p := x.Pod
	x.manifest()
	switch {
	case p.DeletionTimestamp != nil:
		x.terminating()
		return
	case x.ended():
		x.preStop()
		return
	}
	if x.Waits.Held && p.Status.Phase == "" {
		x.add(api.Finding{Level: api.Waiting, Reason: "Starting", Message: "podd has just started and is looking at what runs."})
		return
	}
	before := len(x.found)
	x.cgroup()
	x.sandbox()
	x.volumes()
	// Without these no container can start: theirs are only consequences.
	blocked := len(x.found) > before
	for i := range p.Spec.InitContainers {
		x.container(&p.Spec.InitContainers[i], true, blocked)
	}
	for i := range p.Spec.Containers {
		x.container(&p.Spec.Containers[i], false, blocked)
	}
	for i := range p.Spec.EphemeralContainers {
		c := v1.Container(p.Spec.EphemeralContainers[i].EphemeralContainerCommon)
		x.container(&c, false, blocked)
	}
	x.gates()
	x.preStop()
	x.takenOver()
	if trouble(x.found) {
		x.disks()
		x.warnings()
	}
}

// warnings of the manifest may be what the trouble comes from.
func (x *explainer) warnings() {
	for _, p := range x.Problems {
		if p.Warning {
			x.add(p.Finding())
		}
	}
}

// trouble says whether there is more than notices.
func trouble(found []api.Finding) bool {
	for _, f := range found {
		if f.Level != api.Notice {
			return true
		}
	}
	return false
}

func (x *explainer) summary(fine bool) string {
	p := x.Pod
	if !fine {
		for _, f := range x.found {
			if f.Level != api.Notice {
				return f.Message
			}
		}
	}
	if p.Status.Phase == v1.PodSucceeded {
		return "The pod has done its work: all containers exited with code 0."
	}
	text := "The pod runs and is ready"
	if _, c := podutil.GetPodCondition(&p.Status, v1.PodReady); c != nil && !c.LastTransitionTime.IsZero() {
		text += " since " + x.ago(c.LastTransitionTime.Time)
	}
	restarts := int32(0)
	for _, s := range p.Status.ContainerStatuses {
		restarts += s.RestartCount
	}
	if restarts > 0 {
		text += fmt.Sprintf("; its containers have been restarted %s before", times(int(restarts)))
	}
	return text + "."
}

// manifest: a changed file that is not in force, or another one that defines
// the pod too, which does it no harm.
func (x *explainer) manifest() {
	for _, p := range x.Problems {
		if p.Warning {
			continue
		}
		f := p.Finding()
		if p.Object != "" && !p.Kept {
			f.Level = api.Notice
		}
		x.add(f)
	}
}

// ended: the pod as a whole is over, and not by its containers alone.
func (x *explainer) ended() bool {
	s := &x.Pod.Status
	switch {
	case s.Reason == status.Stopping:
		x.stopping()
		return true
	case s.Reason == status.Stopped:
		x.add(api.Finding{Level: api.Failed, Reason: "Stopped", Message: "The pod was stopped by a user and stays down.",
			Remedy: "podd start " + x.Pod.Name + ", or change its manifest"})
		return true
	case s.Reason == "DeadlineExceeded":
		limit := ""
		if d := x.Pod.Spec.ActiveDeadlineSeconds; d != nil {
			limit = fmt.Sprintf(" (%d s)", *d)
		}
		x.add(api.Finding{Level: api.Failed, Reason: s.Reason, Message: "The pod was ended because it ran longer than its activeDeadlineSeconds" + limit + ".",
			Remedy: "raise spec.activeDeadlineSeconds, or see why its work takes so long; podd start " + x.Pod.Name + " runs it again"})
		return true
	case s.Phase == v1.PodFailed && s.Reason == "Evicted":
		f := api.Finding{Level: api.Failed, Reason: s.Reason, Message: sentence("The pod was ended by the node: " + s.Reason + ": " + s.Message), Remedy: remedyOf(s.Message)}
		if tiny, found := limits.Storage(x.Pod); found {
			f.Message += " " + sentence("The field "+tiny.Field+": "+tiny.Message)
			f.Remedy = tiny.Remedy
		}
		x.add(f)
		return true
	case s.Phase == v1.PodFailed && s.Reason != "":
		x.add(api.Finding{Level: api.Failed, Reason: s.Reason, Message: sentence(fmt.Sprintf("The pod was ended or not admitted by the node: %s: %s", s.Reason, s.Message)), Remedy: remedyOf(s.Message)})
		return true
	}
	return false
}

// gates that nobody has opened.
func (x *explainer) gates() {
	if trouble(x.found) {
		return
	}
	for _, g := range x.Pod.Spec.ReadinessGates {
		_, c := podutil.GetPodCondition(&x.Pod.Status, g.ConditionType)
		switch {
		case c == nil:
			x.add(api.Finding{Level: api.Waiting, Reason: "ReadinessGate", Subject: "pod",
				Message: fmt.Sprintf("All containers are ready; the pod is not, because nobody has set the condition %s of its readiness gate.", g.ConditionType),
				Remedy:  "the controller that owns the condition has to set it in the pod's status; without one, remove spec.readinessGates"})
		case c.Status != v1.ConditionTrue:
			x.add(api.Finding{Level: api.Waiting, Reason: "ReadinessGate", Subject: "pod",
				Message: sentence(fmt.Sprintf("All containers are ready; the pod is not, because the condition %s of its readiness gate is %s: %s", g.ConditionType, c.Status, c.Message)),
				Remedy:  "see why the controller that owns the condition does not set it to True"})
		}
	}
}

// disks that are nearly full explain failures that look like something else.
func (x *explainer) disks() {
	for _, d := range x.Disks {
		what, used := "space", d.Bytes
		if d.Inodes > d.Bytes {
			what, used = "inodes", d.Inodes
		}
		x.add(api.Finding{Level: api.Notice, Reason: "DiskPressure", Subject: d.Path,
			Message:  fmt.Sprintf("The file system of %s is nearly full: %d %% of its %s are used.", d.Path, used, what),
			Evidence: d.Holders,
			Remedy:   "make room: podd rmi --all removes images that no pod uses; see also logs and emptyDir volumes"})
	}
}
