package why

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/kubelet/limits"
	"github.com/podd-runtime/podd/kubelet/server/api"
)

var (
	missingObject = regexp.MustCompile(`(?i)\b(configmap|secret) "?(?:[a-z0-9.-]+/)?([a-z0-9.-]+)"?:? (?:not found|.*no such document)`)
	missingKey    = regexp.MustCompile(`couldn't find key (\S+) in (ConfigMap|Secret) \S+?/(\S+)|(?i)(ConfigMap|Secret) \S+?/(\S+?):? (?:has no key|references non-existent (?:config|secret) key:) "?([^" :]+)`)
	program       = regexp.MustCompile(`exec: "([^"]*)"|exec ([^\s:"]+):|executable ([^\s:"]+)`)
)

// startError explains why a container could not be created or started: a kind,
// a cause in words, what to do.
func (x *explainer) startError(c *v1.Container, text string) (reason, cause, remedy string) {
	text = plain(text)
	low := strings.ToLower(text)
	name := ""
	if m := program.FindStringSubmatch(text); m != nil {
		name = m[1] + m[2] + m[3]
	} else if len(c.Command) > 0 {
		name = c.Command[0]
	}
	has := func(words ...string) bool {
		return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(low, w) })
	}
	if noMemory(low) {
		if f, found := limits.Memory(x.Pod, c.Name); found {
			return tooSmall(f)
		}
	}
	switch {
	case missingKey.MatchString(text):
		m := missingKey.FindStringSubmatch(text)
		key, kind, object := m[1], m[2], m[3]
		if key == "" {
			key, kind, object = m[6], m[4], m[5]
		}
		if kind = "ConfigMap"; strings.EqualFold(m[2]+m[4], "secret") {
			kind = "Secret"
		}
		return "MissingKey", fmt.Sprintf("the %s %s has no key %s", kind, object, key), fmt.Sprintf("add the key to the %s's document in the manifests directory, or mark the reference optional", kind)
	case missingObject.MatchString(text):
		return missing(text)
	case has("postStart", "lifecycle hook", "poststarthook"):
		return "PostStartHook", "its postStart hook failed: " + text, "see what the hook's command or server says; a container whose postStart hook fails is ended"
	case has("runasnonroot", "run as root", "non-numeric user"):
		return "RunAsNonRoot", "securityContext.runAsNonRoot forbids to run it as root, and its image or runAsUser says root or names no number (" + text + ")", "set securityContext.runAsUser to a number other than 0, or build the image with USER 1000 or the like"
	case has("exec format error"):
		return "ExecFormat", fmt.Sprintf("its program %s is not one for this machine: another architecture, or a script without #! in its first line", name), "use an image for this architecture, or give the script its first line (#!/bin/sh)"
	case has("executable file not found", "no such file or directory") && has("exec:", "executable"):
		return "NoSuchProgram", fmt.Sprintf("its image has no program %s", name), "check command and args; a program that is there and still not found lacks its dynamic loader (a binary for another libc)"
	case has("permission denied") && has("exec:", "executable"):
		return "NotExecutable", fmt.Sprintf("its program %s may not be executed", name), "chmod +x it in the image; check runAsUser; a volume may be mounted noexec"
	case has("is a directory") && has("exec:"):
		return "NotExecutable", fmt.Sprintf("its program %s is a directory", name), "check command and args"
	case has("memory limit too low", "container init was oom-killed"):
		return "LimitTooSmall", "its memory limit" + ofLimit(c) + " is too small even to start a process", "raise resources.limits.memory: " + limits.NeedMemory
	case has("no space left on device"):
		return "NoSpace", "there is no space left: " + text, "make room on the file systems of podd's data and run directories: df -h, df -i"
	case has("chdir to cwd", "mkdir", "working directory") && has("cwd", "chdir"):
		return "WorkingDir", "its working directory cannot be entered: " + text, "check workingDir and the user's permissions for it"
	case has("unable to find user", "no matching entries in passwd", "unable to find group"):
		return "NoSuchUser", "its user is not known in the image: " + text, "use a number in runAsUser, or a name that the image's /etc/passwd has"
	case has("apparmor"):
		return "AppArmor", "its AppArmor profile cannot be used: " + text, "load the profile on this node, or choose another in securityContext.appArmorProfile"
	case has("seccomp"):
		return "Seccomp", "its seccomp profile cannot be used: " + text, "put the profile below the node's seccomp directory, or choose another in securityContext.seccompProfile"
	case has("image") && has("has been removed"):
		return "ImageRemoved", text, "it is pulled again by itself"
	case has("device or resource busy", "invalid argument") && has("cgroup", "memory.limit", "cpu.max", "cpu.cfs", "memory.max"):
		return "Limits", "the kernel does not take its limits: " + text, "check resources.limits of the container and of the pod"
	case has("subpath"):
		return "SubPath", "its subPath cannot be mounted: " + text, "check subPath of its volumeMounts: it must not leave the volume"
	}
	return "StartError", text, remedyOf(text)
}

// noMemory says that a start ended as those do that get no memory: refused by
// the kernel, or killed before the program began.
func noMemory(low string) bool {
	return strings.Contains(low, "cannot allocate memory") || strings.Contains(low, "memory limit too low") ||
		strings.Contains(low, "oom-killed") || strings.Contains(low, "init has ended before it was started")
}

// tooSmall is a memory limit under which nothing starts.
func tooSmall(f limits.Finding) (reason, cause, remedy string) {
	whose := "its"
	if f.Container == "" {
		whose = "the pod's"
	}
	cause = fmt.Sprintf("%s memory limit (%s) is too small even to start a process", whose, f.Amount.String())
	if limits.Fraction(f.Amount) {
		cause += ": it is a fraction of a byte"
	}
	return "LimitTooSmall", cause, "correct " + f.Field + ": " + strings.TrimPrefix(f.Remedy, "raise it: ")
}

func ofLimit(c *v1.Container) string {
	if q, ok := c.Resources.Limits[v1.ResourceMemory]; ok {
		return fmt.Sprintf(" (%s)", q.String())
	}
	return ""
}

func missing(text string) (reason, cause, remedy string) {
	m := missingObject.FindStringSubmatch(text)
	kind := "ConfigMap"
	if strings.EqualFold(m[1], "secret") {
		kind = "Secret"
	}
	return "Missing" + kind, fmt.Sprintf("the %s %s is not there", kind, m[2]),
		fmt.Sprintf("put a document of kind %s and name %s into the manifests directory, in the pod's namespace; or mark the reference optional", kind, m[2])
}

// since a pod's sandbox was ready: what went wrong before is history.
func (x *explainer) sandboxReady() bool {
	_, c := podutil.GetPodCondition(&x.Pod.Status, v1.PodReadyToStartContainers)
	return c != nil && c.Status == v1.ConditionTrue
}

// cgroup of the pod that could not be made.
func (x *explainer) cgroup() {
	e := x.last("", "FailedCreatePodContainer")
	if e == nil || x.sandboxReady() || x.over() {
		return
	}
	text := plain(last(message(e), "unable to ensure pod container exists: "))
	x.add(api.Finding{Level: api.Failed, Reason: "Cgroup", Subject: "pod", Since: when(e.FirstTimestamp),
		Message: sentence("The pod's cgroup cannot be made: " + text),
		Remedy:  "check that the cgroup hierarchies are mounted and writable, and the pod's resources"})
}

func (x *explainer) over() bool {
	return x.Pod.Status.Phase == v1.PodFailed || x.Pod.Status.Phase == v1.PodSucceeded
}

var hostPortTaken = regexp.MustCompile(`hostPort (\d+) ([A-Z]+): pod (\S+) has it`)

// sandbox that could not be made: namespaces, network, host ports.
func (x *explainer) sandbox() {
	if x.sandboxReady() || x.over() {
		return
	}
	e := x.last("", "FailedCreatePodSandBox", "FailedCreatePodSandbox")
	if e == nil {
		return
	}
	text := plain(strings.TrimPrefix(strings.TrimPrefix(message(e), "Failed to create pod sandbox: "), "rpc error: "))
	low := strings.ToLower(text)
	f := api.Finding{Level: api.Failed, Reason: "Sandbox", Subject: "pod", Since: when(e.FirstTimestamp)}
	if tiny, found := limits.Memory(x.Pod, ""); found && noMemory(low) {
		var cause string
		f.Reason, cause, f.Remedy = tooSmall(tiny)
		f.Message = sentence("The pod cannot start: " + cause)
		f.Message += x.again(&f, x.Waits.Sandbox)
		x.add(f)
		return
	}
	switch m := hostPortTaken.FindStringSubmatch(text); {
	case m != nil:
		f.Reason = "PortInUse"
		f.Message = fmt.Sprintf("The pod cannot start: host port %s (%s) is taken by pod %s.", m[1], m[2], m[3])
		f.Remedy = "give one of the two another hostPort, or remove the other pod"
	case strings.Contains(low, "runtimeclass"):
		f.Reason = "RuntimeClass"
		f.Message = sentence("The pod cannot start: " + text)
		f.Remedy = "remove spec.runtimeClassName: this node has one runtime"
	case strings.Contains(low, "sysctl"):
		f.Reason = "Sysctl"
		f.Message = sentence("The pod cannot start: " + text)
		f.Remedy = "check spec.securityContext.sysctls: the kernel must know them, and they must belong to the pod's namespaces"
	case strings.Contains(low, "no free address"), strings.Contains(low, "exhausted"), strings.Contains(low, "no ip addresses available"):
		f.Reason = "NoAddress"
		f.Message = sentence("The pod cannot start: its network has no address left: " + text)
		f.Remedy = "give the node a larger podCIDR, or run fewer pods"
	case strings.Contains(low, "cni"), strings.Contains(low, "plugin"):
		f.Reason = "CNI"
		f.Message = sentence("The pod cannot start: its network plugin (CNI) failed: " + last(text, "attach network: "))
		f.Remedy = "check the configurations in the CNI directory (--cni-conf-dir) and the plugins in --cni-bin-dir"
	case strings.Contains(low, "no space left on device"):
		f.Reason = "NoSpace"
		f.Message = sentence("The pod cannot start: there is no space left: " + text)
		f.Remedy = "make room on the file systems of podd's data and run directories: df -h, df -i"
	default:
		f.Message = sentence("The pod's sandbox (namespaces and network) cannot be made: " + text)
		f.Remedy = remedyOf(text)
	}
	f.Message += x.again(&f, x.Waits.Sandbox)
	x.add(f)
}

// again adds when a step of the pod is tried again.
func (x *explainer) again(f *api.Finding, t time.Time) string {
	if t.IsZero() {
		return ""
	}
	f.Next = &t
	return " The next try is " + x.in(t) + "."
}

var (
	volumeName = regexp.MustCompile(`volume "([^"]+)"`)
	nfsSource  = regexp.MustCompile(`nfs (\S+?):(/\S*?)[:,]? `)
	hostPath   = regexp.MustCompile(`hostPath (?:type check failed: )?(/\S+)`)
	unattached = regexp.MustCompile(`failed to process volumes=\[([^]]+)\]`)
)

// reason is what a message about a volume says after its name.
func reason(text, volume string) string {
	return last(last(text, fmt.Sprintf("volume %q : ", volume)), "failed to process volumes=["+volume+"]: ")
}

// volumes that could not be set up. Containers that have started since prove
// that it is over.
func (x *explainer) volumes() {
	e := x.last("", "FailedMount", "FailedAttachVolume", "FailedMapVolume")
	if e == nil || x.over() {
		return
	}
	if s := x.last("", "Started"); s != nil && !s.LastTimestamp.Before(&e.LastTimestamp) {
		return
	}
	text := plain(message(e))
	low := strings.ToLower(text)
	name := "of the pod"
	if m := unattached.FindStringSubmatch(text); m != nil {
		name = m[1]
	} else if m := volumeName.FindStringSubmatch(text); m != nil {
		name = m[1]
	}
	f := api.Finding{Level: api.Failed, Reason: "FailedMount", Subject: "volume " + name, Since: when(e.FirstTimestamp)}
	say := func(reason, cause, remedy string) {
		f.Reason, f.Remedy = reason, remedy
		f.Message = sentence(fmt.Sprintf("Volume %s is not ready: %s", name, cause))
	}
	nfs, path := nfsSource.FindStringSubmatch(text+" "), hostPath.FindStringSubmatch(text)
	switch {
	case missingKey.MatchString(text):
		_, cause, remedy := x.startError(&v1.Container{}, text)
		say("MissingKey", cause, remedy)
	case missingObject.MatchString(text):
		reason, cause, remedy := missing(text)
		say(reason, cause, remedy)
	case nfs != nil:
		where := fmt.Sprintf("the NFS server %s (path %s)", nfs[1], nfs[2])
		answer := strings.TrimSpace(strings.TrimPrefix(text[strings.Index(text, nfs[0])+len(nfs[0])-1:], ":"))
		switch {
		case strings.Contains(low, "no such device"):
			say("NFS", fmt.Sprintf("this kernel cannot mount NFS (wanted from server %s, path %s): %s", nfs[1], nfs[2], answer), "load the kernel's NFS client: modprobe nfs nfsv4")
		case strings.Contains(low, "refused"), strings.Contains(low, "timed out"), strings.Contains(low, "deadline"), strings.Contains(low, "no route"), strings.Contains(low, "unreachable"), strings.Contains(low, "does not answer"):
			say("VolumeServer", where+" does not answer: "+answer, "see that the server runs and can be reached from this node at port 2049")
		case strings.Contains(low, "access denied"), strings.Contains(low, "permission denied"), strings.Contains(low, "not permitted"):
			say("VolumeServer", where+" does not let this node mount it: "+answer, "export the path to this node's address (/etc/exports on the server)")
		case strings.Contains(low, "no such file"):
			say("VolumeServer", where+" has no such path", "check the path; the server's exports are listed by showmount -e "+nfs[1])
		default:
			say("VolumeServer", where+" cannot be mounted: "+answer, "mount it by hand to see more: mount -t nfs "+nfs[1]+":"+nfs[2]+" /mnt")
		}
	case path != nil:
		remedy := "make it on the node, or choose a type of hostPath that does (DirectoryOrCreate, FileOrCreate)"
		if !strings.Contains(low, "not exist") && !strings.Contains(low, "no such file") {
			remedy = "check what is there on the node, and the type of the hostPath"
		}
		say("HostPath", reason(text, name), remedy)
	case strings.Contains(low, "no space left on device"):
		say("NoSpace", "there is no space left: "+text, "make room on the file system of podd's root directory (--root-dir)")
	default:
		say("FailedMount", reason(text, name), remedyOf(text))
	}
	if !x.sandboxReady() || x.Waits.Volumes.After(x.Now) {
		f.Message += x.again(&f, x.Waits.Volumes)
	}
	x.add(f)
}

var portIn = regexp.MustCompile(`(?:\]|[0-9a-z*.]|::):(\d{1,5})\b|\bport[ =:]+(\d{1,5})\b|(?:^|\s|")\[?:+\]?:?(\d{1,5})\b`)

// PortIn finds the port in a line about one that is taken; 0: none.
func PortIn(line string) int32 {
	// Times such as 12:34:56 come before the words, ports close to them.
	low := strings.ToLower(line)
	if i := strings.Index(low, "listen"); i >= 0 {
		low = low[i:]
	} else if i := strings.Index(low, "bind"); i >= 0 {
		low = low[i:]
	}
	for _, m := range portIn.FindAllStringSubmatch(low, -1) {
		if n, err := strconv.ParseInt(m[1]+m[2]+m[3], 10, 32); err == nil && n > 0 && n < 65536 {
			return int32(n)
		}
	}
	return 0
}

// Ports of the host that the pod wants or is said to miss: those whose
// listeners an Evidence should name.
func Ports(pod *v1.Pod, logs map[string]Container) []int32 {
	var out []int32
	add := func(p int32) {
		if p > 0 && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	for _, list := range [][]v1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			for _, p := range list[i].Ports {
				add(p.HostPort)
			}
		}
	}
	if pod.Spec.HostNetwork {
		for _, c := range logs {
			for _, line := range c.Log {
				if strings.Contains(strings.ToLower(line), "address already in use") {
					add(PortIn(line))
				}
			}
		}
	}
	return out
}

// takenOver tells of host ports that some program of the host has, too: the
// node's rules lead to the pod what was meant for that program.
func (x *explainer) takenOver() {
	if x.Pod.Spec.HostNetwork || !x.sandboxReady() {
		return
	}
	own := x.Pod.Namespace + "/" + x.Pod.Name
	for _, list := range [][]v1.Container{x.Pod.Spec.InitContainers, x.Pod.Spec.Containers} {
		for i := range list {
			for _, p := range list[i].Ports {
				for _, l := range x.Listeners {
					if p.HostPort == 0 || l.Port != p.HostPort || l.Pod == own || p.Protocol != "" && l.Protocol != p.Protocol {
						continue
					}
					x.add(api.Finding{Level: api.Notice, Reason: "PortTakenOver", Subject: "pod", Container: list[i].Name,
						Message: fmt.Sprintf("Host port %d (%s) of container %s is also that of %s on this machine: connections from outside now reach the pod and no longer that program.", p.HostPort, l.Protocol, list[i].Name, l),
						Remedy:  "give the pod another hostPort, or end that program"})
				}
			}
		}
	}
}

// terminating: the pod was told to go for good.
func (x *explainer) terminating() {
	p := x.Pod
	f := api.Finding{Level: api.Waiting, Reason: "Terminating", Subject: "pod"}
	parts := x.going(&f)
	since := ""
	if p.DeletionTimestamp != nil && p.DeletionGracePeriodSeconds != nil {
		start := p.DeletionTimestamp.Add(-time.Duration(*p.DeletionGracePeriodSeconds) * time.Second)
		f.Since = &start
		since = " since " + strings.TrimSuffix(x.ago(start), " ago")
	}
	f.Message = fmt.Sprintf("The pod is being removed%s and waits for %s.", since, parts)
	if x.Waits.Replaced {
		f.Reason = "Replacing"
		f.Message = fmt.Sprintf("The pod is being replaced%s, because its manifest has changed: the new one starts when the old one is gone, which waits for %s.", since, parts)
		f.Remedy = "wait, or end it at once: podd stop --grace-period=0 " + p.Name + ", then podd start " + p.Name
	}
	x.add(f)
}

// stopping: a user has told the pod to stop, and containers of it still run.
func (x *explainer) stopping() {
	f := api.Finding{Level: api.Waiting, Reason: "Stopping", Subject: "pod"}
	f.Message = fmt.Sprintf("The pod is being stopped and waits for %s.", x.going(&f))
	x.add(f)
}

// going is what a pod that ends still waits for.
func (x *explainer) going(f *api.Finding) string {
	p := x.Pod
	var parts []string
	for _, list := range [][]v1.ContainerStatus{p.Status.ContainerStatuses, p.Status.InitContainerStatuses, p.Status.EphemeralContainerStatuses} {
		for i := range list {
			s := &list[i]
			if s.State.Running == nil {
				continue
			}
			part := "container " + s.Name + " to end"
			if slices.Contains(x.Waits.Doing, "preStop "+s.Name) {
				part = "the preStop hook of container " + s.Name
			}
			if t, ok := x.Waits.Kill[s.Name]; ok {
				f.Next = &t
				part += fmt.Sprintf(", which is killed %s", x.in(t))
			}
			parts = append(parts, part)
		}
	}
	f.Remedy = "wait, or end it at once: podd stop --grace-period=0 " + p.Name
	if len(parts) == 0 {
		f.Remedy = ""
		switch {
		case slices.Contains(x.Waits.Doing, "unmount"):
			parts = append(parts, "its volumes to be unmounted")
			if e := x.last("", "FailedUnmount", "FailedMount"); e != nil {
				f.Evidence = []string{plain(message(e))}
			}
			f.Remedy = "a server that does not answer keeps a volume busy: see that it can be reached"
		case slices.Contains(x.Waits.Doing, "sandbox"), slices.Contains(x.Waits.Doing, "remove"):
			parts = append(parts, "its sandbox and its containers' files to be removed")
		default:
			parts = append(parts, "what is left of it to be removed")
		}
		if e := x.last("", "FailedKillPod"); e != nil {
			f.Evidence = append(f.Evidence, plain(message(e)))
		}
	}
	for i := range p.Spec.Containers {
		c := &p.Spec.Containers[i]
		if e := x.last(c.Name, "FailedPreStopHook"); e != nil {
			f.Evidence = append(f.Evidence, sentence(fmt.Sprintf("container %s: %s", c.Name, plain(message(e)))))
		}
	}
	return strings.Join(parts, ", and for ")
}
