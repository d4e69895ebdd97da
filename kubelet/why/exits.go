package why

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/podd-runtime/podd/kubelet/limits"
	"github.com/podd-runtime/podd/kubelet/server/api"
)

// exit is one end of a container in words.
func (x *explainer) exit(t *v1.ContainerStateTerminated) string {
	n := x.signal(t)
	switch {
	case t.Reason == "ContainerStatusUnknown" || t.Reason == "Unknown":
		return "ended while nobody watched, its exit code is not known"
	case t.Reason == "OOMKilled" && n == int32(unix.SIGKILL):
		return "was killed because it used more memory than its limit"
	case t.Reason == "OOMKilled" && n == 0:
		return fmt.Sprintf("exited with code %d after a process of it had been killed because the container used more memory than its limit", t.ExitCode)
	case n != 0:
		return fmt.Sprintf("was ended by %s (exit code %d)", signal(n), t.ExitCode)
	}
	return fmt.Sprintf("exited with code %d", t.ExitCode)
}

// end of the instance that t tells of.
func (x *explainer) end(containerID string) End {
	_, id, _ := strings.Cut(containerID, "://")
	return x.Ends[id]
}

// signal that ended an instance; 0: it exited by itself, or nobody knows.
func (x *explainer) signal(t *v1.ContainerStateTerminated) int32 {
	return cmp.Or(t.Signal, x.end(t.ContainerID).Signal)
}

// oomKilled tells of processes of a container that were killed while the
// container went on, or before it ended well. A parent may have made up for it.
func (x *explainer) oomKilled(c *v1.Container, subject, id, then string) bool {
	e := x.end(id)
	if e.OOMKills == 0 {
		return false
	}
	f := api.Finding{Level: api.Notice, Reason: "OOMKilled", Subject: subject, Container: c.Name, Since: &e.OOMKilled}
	f.Message = fmt.Sprintf("A process of %s was killed %s because the container used more memory than its limit; the container %s.", subject, x.ago(e.OOMKilled), then)
	if e.OOMKills > 1 {
		f.Message = fmt.Sprintf("Processes of %s were killed %s, last %s, because the container used more memory than its limit; the container %s.", subject, times(e.OOMKills), x.ago(e.OOMKilled), then)
	}
	var cause string
	cause, f.Remedy = x.oom(c)
	f.Message += " " + sentence(cause)
	x.add(f)
	return true
}

// signals in words, signal(7).
var signals = map[unix.Signal]string{
	unix.SIGSEGV: "it used memory that it does not have: a bug in the program, or a library of another system",
	unix.SIGABRT: "it gave up by itself, usually after a failed assertion or an unhandled exception",
	unix.SIGBUS:  "it used memory that is not there, often a mapped file cut short by a full disk",
	unix.SIGILL:  "it used an instruction that this processor does not have",
	unix.SIGFPE:  "it divided by zero or the like",
	unix.SIGTERM: "somebody asked it to end",
	unix.SIGKILL: "somebody killed it at once: podd after the grace period, a user, or the kernel",
	unix.SIGSYS:  "it made a system call that its seccomp profile does not let it make",
	unix.SIGPIPE: "it wrote to a pipe or connection that nobody reads",
	unix.SIGXFSZ: "it wrote a file that is larger than its limit",
}

func signal(n int32) string {
	if name := unix.SignalName(unix.Signal(n)); name != "" {
		return name
	}
	return fmt.Sprintf("signal %d", n)
}

// PreStopFailed is the event of a preStop hook that failed, in words. The
// container ended all the same; what the hook was to save may be lost.
func PreStopFailed(e *v1.Event, now time.Time) api.Finding {
	x := explainer{Evidence: &Evidence{Now: now}}
	c := containerOf(e)
	f := api.Finding{Level: api.Notice, Reason: "PreStopHook", Subject: "container " + c, Container: c, Since: when(e.LastTimestamp)}
	how := ""
	if _, text, ok := strings.Cut(message(e), "failed: "); ok {
		how = ": " + plain(text)
	}
	f.Message = sentence(fmt.Sprintf("The preStop hook of container %s failed %s%s", c, x.ago(e.LastTimestamp.Time), how)) + " The container was ended all the same."
	f.Remedy = "podd's log has what the hook said; run its command by hand in a container that runs"
	return f
}

// containerOf an event: the name in "spec.containers{name}".
func containerOf(e *v1.Event) string {
	_, name, _ := strings.Cut(e.InvolvedObject.FieldPath, "{")
	return strings.TrimSuffix(name, "}")
}

// preStop hooks of containers before that failed a short time ago.
func (x *explainer) preStop() {
	for i := range x.Events {
		if e := &x.Events[i]; e.Reason == "FailedPreStopHook" && x.Now.Sub(e.LastTimestamp.Time) <= recent {
			x.add(PreStopFailed(e, x.Now))
		}
	}
}

// codes that mean something by convention.
func (x *explainer) codeMeans(t *v1.ContainerStateTerminated) (meaning, remedy string) {
	code, n := t.ExitCode, x.signal(t)
	switch {
	case n != 0:
		switch unix.Signal(n) {
		case unix.SIGSYS:
			remedy = "allow the call in securityContext.seccompProfile, or use another program"
		case unix.SIGILL:
			remedy = "use an image that is built for this processor"
		}
		return signals[unix.Signal(n)], remedy
	case code == 0:
		return "a container that shall run for ever must not end", "let its program stay in the foreground, or set restartPolicy: OnFailure or Never if it is done when it ends"
	case code == 126:
		return "by convention of shells: the command was found and cannot be executed", "check the permissions and the architecture of the program that the script calls"
	case code == 127:
		return "by convention of shells: a command was not found", "check PATH and the names in the script, and that the image has the program"
	case code > 128 && unix.SignalName(unix.Signal(code-128)) != "":
		return fmt.Sprintf("by convention of shells: a command that it ran was ended by %s", signal(code-128)), ""
	}
	return "", ""
}

// clue is something well known in what a container wrote last.
type clue struct {
	reason string
	words  []string // any of them, in small letters
	say    func(x *explainer, c *v1.Container, line string) (message, remedy string)
}

var clues = []clue{
	{"PortInUse", []string{"address already in use", "eaddrinuse"}, func(x *explainer, c *v1.Container, line string) (string, string) {
		remedy := "end that program, or let this one listen on another port"
		port := PortIn(line)
		who := "another process"
		for _, l := range x.Listeners {
			if l.Port == port {
				who = l.String()
			}
		}
		where := "in the pod's network: two of its containers want it"
		if x.Pod.Spec.HostNetwork {
			where = "of the host"
		}
		if port == 0 {
			return fmt.Sprintf("It wants a port %s that is taken", where), remedy
		}
		return fmt.Sprintf("It wants port %d %s, which %s has", port, where, who), remedy
	}},
	{"ReadOnlyFileSystem", []string{"read-only file system", "erofs"}, func(x *explainer, c *v1.Container, line string) (string, string) {
		if s := c.SecurityContext; s != nil && s.ReadOnlyRootFilesystem != nil && *s.ReadOnlyRootFilesystem {
			return "It writes to its root file system, which is read-only (securityContext.readOnlyRootFilesystem)", "mount an emptyDir volume where it writes, or take readOnlyRootFilesystem away"
		}
		return "It writes to a file system that is mounted read-only", "take readOnly away from the volumeMount, or let it write elsewhere"
	}},
	{"NoSpace", []string{"no space left on device", "enospc", "disk quota exceeded"}, func(x *explainer, c *v1.Container, line string) (string, string) {
		for _, v := range x.Pod.Spec.Volumes {
			if e := v.EmptyDir; e != nil && e.SizeLimit != nil && mounts(c, v.Name) {
				return fmt.Sprintf("It found no space left; its volume %s holds %s at most (emptyDir.sizeLimit)", v.Name, e.SizeLimit), raise(e.SizeLimit)
			}
		}
		for _, d := range x.Disks {
			return fmt.Sprintf("It found no space left; the file system of %s is %d %% full", d.Path, max(d.Bytes, d.Inodes)), "make room: podd rmi --all removes images that no pod uses"
		}
		return "It found no space left on the file system that it writes to", "make room there: df -h and df -i show what is full"
	}},
	{"ExecFormat", []string{"exec format error"}, func(x *explainer, c *v1.Container, line string) (string, string) {
		return "Its program is not one for this machine: another architecture, or a script without #! in its first line", "use an image for this architecture, or give the script its first line (#!/bin/sh)"
	}},
	{"TooManyProcesses", []string{"resource temporarily unavailable", "can't fork", "cannot fork", "pthread_create failed", "unable to create new native thread"}, func(x *explainer, c *v1.Container, line string) (string, string) {
		return "It could not start another process or thread: the pod's limit of processes is reached", "raise podPidsLimit in podd's configuration, or see why it starts so many"
	}},
	{"OutOfMemory", []string{"cannot allocate memory", "out of memory", "outofmemoryerror"}, func(x *explainer, c *v1.Container, line string) (string, string) {
		return "It ran out of memory" + memoryLimit(c), "raise resources.limits.memory, or let the program use less"
	}},
	{"TooManyFiles", []string{"too many open files"}, func(x *explainer, c *v1.Container, line string) (string, string) {
		return "It has more files open than it may", "raise the limit of open files of podd-shim's service (LimitNOFILE), or see why it opens so many"
	}},
	{"NoSuchHost", []string{"no such host", "name or service not known", "temporary failure in name resolution", "name does not resolve"}, func(x *explainer, c *v1.Container, line string) (string, string) {
		return "It could not find the address of a host by name", "check the name and the pod's DNS: podd exec " + x.Pod.Name + " -- cat /etc/resolv.conf; spec.hostAliases can add names"
	}},
	{"ConnectionRefused", []string{"connection refused", "econnrefused"}, func(x *explainer, c *v1.Container, line string) (string, string) {
		return "Something that it needs does not answer at its port", "see that the server it names runs and listens there"
	}},
	{"PermissionDenied", []string{"permission denied", "operation not permitted", "eacces"}, func(x *explainer, c *v1.Container, line string) (string, string) {
		return "It may not do what it tries", "check its user (runAsUser, fsGroup), the owner of its volumes, and the capabilities it needs"
	}},
}

func mounts(c *v1.Container, volume string) bool {
	for _, m := range c.VolumeMounts {
		if m.Name == volume {
			return true
		}
	}
	return false
}

func memoryLimit(c *v1.Container) string {
	if q, ok := c.Resources.Limits[v1.ResourceMemory]; ok {
		return fmt.Sprintf(" (its limit is %s)", q.String())
	}
	return ""
}

// clueIn the last lines of a log; the last line that says something counts.
func (x *explainer) clueIn(c *v1.Container) (reason, message, remedy string) {
	log := x.Containers[c.Name].Log
	for i := len(log) - 1; i >= 0; i-- {
		low := strings.ToLower(log[i])
		for _, cl := range clues {
			for _, w := range cl.words {
				if strings.Contains(low, w) {
					message, remedy = cl.say(x, c, log[i])
					return cl.reason, message, remedy
				}
			}
		}
	}
	return "", "", ""
}

// raise a size limit that is full, which is one in a fraction of a byte at once.
func raise(limit *resource.Quantity) string {
	if limits.Fraction(*limit) {
		return "correct the sizeLimit: m stands for thousandths, Mi for mebibytes"
	}
	return "raise the sizeLimit, or let it write less"
}

// failed explains the last end of a container; again says that it is started
// anew, and after how many starts.
func (x *explainer) failed(c *v1.Container, subject string, t *v1.ContainerStateTerminated, s *v1.ContainerStatus, again bool) {
	f := api.Finding{Level: api.Failed, Reason: t.Reason, Subject: subject, Container: c.Name, Since: when(t.FinishedAt)}
	head := fmt.Sprintf("%s %s", capital(subject), x.exit(t))
	if !t.FinishedAt.IsZero() {
		head += " " + x.ago(t.FinishedAt.Time)
	}
	if ran := t.FinishedAt.Sub(t.StartedAt.Time); !t.StartedAt.IsZero() && !t.FinishedAt.IsZero() && ran >= 0 {
		head += ", after it had run " + Duration(ran)
	}
	var cause, remedy string
	switch {
	case t.Reason == "StartError" || t.Reason == "ContainerCannotRun":
		f.Reason, cause, remedy = x.startError(c, t.Message)
		head = fmt.Sprintf("%s cannot be started", capital(subject))
	case t.Reason == "OOMKilled":
		cause, remedy = x.oom(c)
	default:
		if cause, remedy = x.endedByUs(c, t); cause != "" {
			f.Reason = "Killed"
			break
		}
		reason, say, do := x.clueIn(c)
		if reason != "" {
			f.Reason, cause, remedy = reason, say, do
			break
		}
		cause, remedy = x.codeMeans(t)
	}
	if again {
		n := int(s.RestartCount) + 1
		if s.State.Running == nil && n > 1 {
			head += fmt.Sprintf("; it has been started %s", times(n))
		}
	}
	f.Message = sentence(head)
	if cause != "" {
		f.Message += " " + sentence(capital(cause))
	}
	if again {
		f.Message += x.next(&f, c.Name)
	}
	f.Evidence = x.log(c.Name)
	if t.Message != "" && t.Reason != "StartError" {
		f.Evidence = append([]string{"termination message: " + sentence(t.Message)}, f.Evidence...)
	}
	f.Remedy = remedy
	if f.Remedy == "" {
		f.Remedy = fmt.Sprintf("read its log: podd logs %s%s -c %s", previous(s), x.Pod.Name, c.Name)
	}
	x.add(f)
}

func previous(s *v1.ContainerStatus) string {
	if s.State.Terminated == nil && s.LastTerminationState.Terminated != nil {
		return "-p "
	}
	return ""
}

// oom with limit and peak.
func (x *explainer) oom(c *v1.Container) (cause, remedy string) {
	m := x.Containers[c.Name]
	limit := ""
	if q, ok := c.Resources.Limits[v1.ResourceMemory]; ok {
		limit = q.String()
	} else if m.MemoryLimit > 0 {
		limit = size(m.MemoryLimit)
	}
	switch {
	case limit == "":
		cause = "The container has no limit of its own: the pod or the whole machine ran out of memory"
		remedy = "give the pods of this node memory limits, or the node more memory"
		if r := x.Pod.Spec.Resources; r != nil {
			if q, ok := r.Limits[v1.ResourceMemory]; ok {
				cause = "The limit is the pod's, " + q.String()
				remedy = "raise spec.resources.limits.memory"
			}
		}
	default:
		cause = "Its limit is " + limit
		remedy = "raise resources.limits.memory of the container, or let its program use less"
	}
	if m.MemoryPeak > 0 {
		cause += fmt.Sprintf(", at its peak it used %s", size(m.MemoryPeak))
	}
	return cause, remedy
}

// endedByUs: podd ended the container itself, and says why. A stop that came
// before the instance's end by more than its start is another one's.
func (x *explainer) endedByUs(c *v1.Container, t *v1.ContainerStateTerminated) (cause, remedy string) {
	e := x.last(c.Name, "Killing")
	if e == nil || e.LastTimestamp.Time.Before(t.StartedAt.Time) || t.ExitCode == 0 {
		return "", ""
	}
	text := message(e)
	switch {
	case strings.Contains(text, "failed liveness probe"):
		return x.probed(c, "Liveness"), probeRemedy(c.LivenessProbe, "livenessProbe")
	case strings.Contains(text, "failed startup probe"):
		return x.probed(c, "Startup"), probeRemedy(c.StartupProbe, "startupProbe")
	case strings.Contains(text, "FailedPostStartHook"):
		return x.hook(c, "FailedPostStartHook", "podd ended it because its postStart hook failed"), "run the hook's command by hand: podd exec " + x.Pod.Name + " -c " + c.Name + " -- COMMAND; what it says is in podd's log"
	case strings.Contains(text, "definition changed"), strings.Contains(text, "was asked to restart"):
		return "podd ended it to start it anew: " + plain(text), "nothing: it was asked for"
	}
	return "", ""
}

func (x *explainer) hook(c *v1.Container, reason, text string) string {
	if e := x.last(c.Name, reason); e != nil {
		if _, how, ok := strings.Cut(message(e), "failed: "); ok {
			text += ": " + how
		}
	}
	return text
}

// log is the end of a container's log as evidence.
func (x *explainer) log(name string) []string {
	lines := x.Containers[name].Log
	if len(lines) == 0 {
		return nil
	}
	return append([]string{"the end of its log:"}, indented(lines)...)
}

func indented(lines []string) []string {
	out := make([]string, len(lines))
	for i, l := range lines {
		out[i] = "  " + l
	}
	return out
}

// next adds when the next try is.
func (x *explainer) next(f *api.Finding, container string) string {
	t, ok := x.Waits.Next[container]
	if !ok || t.IsZero() {
		return ""
	}
	f.Next = &t
	return " The next try is " + x.in(t) + "."
}
