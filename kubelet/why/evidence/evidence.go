// Package evidence gathers what package why judges: a pod's status and events,
// the end of its containers' logs, what its worker waits for, who has the
// ports that it wants, and how full the node's disks are. Everything is read
// from those who own it, within a bounded time; what cannot be had in time is
// left out.
package evidence

import (
	"bytes"
	"context"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/server/api"
	"github.com/podd-runtime/podd/kubelet/server/logs"
	"github.com/podd-runtime/podd/kubelet/why"
)

// Timeout of all questions about one pod.
const Timeout = 3 * time.Second

// tail is how many lines of a log are evidence; longer ones are cut.
const (
	tail    = 8
	maxLine = 400
	// full is the use of a file system, in percent, that is worth telling.
	full = 95
)

// Containers is the runtime, *cri.Service.
type Containers interface {
	ContainerStatus(context.Context, *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error)
}

// Source of evidence. Everything but Containers may be nil.
type Source struct {
	Containers Containers
	Events     func(namespace string) []v1.Event
	Waits      func(ctx context.Context, namespace, name string) why.Waits
	Problems   func() []api.Problem
	Pulls      func() []api.Progress
	// Pod names the pod of a UID, namespace/name; "": none.
	Pod func(uid string) string
	// Dirs are directories whose file systems pods need.
	Dirs []string
	// Images is where images are kept.
	Images string
	// Holders says what fills the file system of a directory.
	Holders func(ctx context.Context, dir string) []string
}

// Of a pod with its status.
func (s *Source) Of(ctx context.Context, pod *v1.Pod) *why.Evidence {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	e := &why.Evidence{Now: time.Now(), Pod: pod, Containers: map[string]why.Container{}, Ends: map[string]why.End{}}
	if s.Events != nil {
		e.Events = eventsOf(s.Events(pod.Namespace), pod)
	}
	if s.Problems != nil {
		e.Problems = problemsOf(s.Problems(), pod, e.Events)
	}
	if s.Waits != nil {
		e.Waits = s.Waits(ctx, pod.Namespace, pod.Name)
	}
	if s.Pulls != nil {
		e.Pulls = s.Pulls()
	}
	fine := fine(pod)
	for _, list := range [][]v1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses, pod.Status.EphemeralContainerStatuses} {
		for i := range list {
			s.instances(ctx, e, &list[i], !fine) // of fine ones nobody asks what they said last
		}
	}
	if !fine {
		e.Disks = disks(s.Dirs)
		for i := range e.Disks {
			if s.Holders != nil {
				e.Disks[i].Holders = s.Holders(ctx, e.Disks[i].Path)
			}
		}
	}
	if s.Holders != nil && lacksRoom(pod) {
		e.Filling = s.Holders(ctx, s.Images)
	}
	if ports := why.Ports(pod, e.Containers); len(ports) > 0 {
		e.Listeners = listeners(ctx, "/proc", ports)
		for i := range e.Listeners {
			if l := &e.Listeners[i]; l.Pod != "" && s.Pod != nil {
				l.Pod = s.Pod(l.Pod)
			}
		}
	}
	return e
}

// instances of a container that its status tells of. The log that tells most is
// that of the one that failed, or that runs and is not ready: the first here.
func (s *Source) instances(ctx context.Context, e *why.Evidence, cs *v1.ContainerStatus, log bool) {
	var ids []string
	if cs.State.Terminated != nil {
		ids = append(ids, cs.State.Terminated.ContainerID)
	}
	if cs.State.Running != nil {
		ids = append(ids, cs.ContainerID)
	}
	if t := cs.LastTerminationState.Terminated; t != nil {
		ids = append(ids, t.ContainerID)
	}
	for i, id := range ids {
		_, id, ok := strings.Cut(id, "://")
		if !ok {
			continue
		}
		resp, err := s.Containers.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
		if err != nil {
			continue
		}
		c, end := instance(resp)
		e.Ends[id] = end
		if i == 0 {
			if log {
				c.Log = lastLines(ctx, resp.GetStatus().GetLogPath())
			}
			e.Containers[cs.Name] = c
		}
	}
}

// instance is what the runtime tells of one in its own words.
func instance(resp *runtimeapi.ContainerStatusResponse) (out why.Container, end why.End) {
	if m := resp.GetStatus().GetResources().GetLinux().GetMemoryLimitInBytes(); m > 0 {
		out.MemoryLimit = uint64(m)
	}
	var info struct {
		MemoryPeak  uint64 `json:"memoryPeak"`
		Signal      int32  `json:"signal"`
		OOMKills    int    `json:"oomKills"`
		OOMKilledAt int64  `json:"oomKilledAt"`
	}
	if json.Unmarshal([]byte(resp.GetInfo()["info"]), &info) == nil {
		out.MemoryPeak = info.MemoryPeak
		end = why.End{Signal: info.Signal, OOMKills: info.OOMKills, OOMKilled: time.Unix(0, info.OOMKilledAt)}
	}
	return out, end
}

// lastLines of a log; nil: there is none.
func lastLines(ctx context.Context, path string) []string {
	var text bytes.Buffer
	if path == "" || logs.Read(ctx, path, logs.Options{Tail: tail, LimitBytes: 64 << 10}, nil, &text) != nil {
		return nil
	}
	return lines(text.String())
}

// lines that a terminal can show.
func lines(text string) (out []string) {
	for _, l := range strings.Split(strings.TrimRight(text, "\n"), "\n") {
		l = strings.Map(func(r rune) rune {
			if r < ' ' && r != '\t' || r == 0x7f {
				return -1
			}
			return r
		}, strings.ToValidUTF8(l, "?"))
		if len(l) > maxLine {
			l = strings.ToValidUTF8(l[:maxLine], "") + "…"
		}
		if strings.TrimSpace(l) != "" {
			out = append(out, l)
		}
	}
	return out
}

// eventsOf the pod, the last one at the end.
func eventsOf(all []v1.Event, pod *v1.Pod) []v1.Event {
	var out []v1.Event
	for i := range all {
		o := &all[i].InvolvedObject
		if o.Kind == "Pod" && o.Name == pod.Name && o.Namespace == pod.Namespace && (o.UID == pod.UID || o.UID == "") {
			out = append(out, all[i])
		}
	}
	slices.SortStableFunc(out, func(a, b v1.Event) int { return a.LastTimestamp.Compare(b.LastTimestamp.Time) })
	return out
}

// problemsOf the manifest of the pod: those that its events tell of, and
// documents that define it and are not in force.
func problemsOf(all []api.Problem, pod *v1.Pod, events []v1.Event) (out []api.Problem) {
	for _, p := range all {
		if p.Object == "Pod "+pod.Namespace+"/"+pod.Name || slices.ContainsFunc(events, func(e v1.Event) bool {
			return e.Reason == manifests.ReasonInvalid && strings.Contains(e.Message, p.File) && strings.Contains(e.Message, p.Message)
		}) {
			out = append(out, p)
		}
	}
	return out
}

// lacksRoom says that an image of the pod found no room.
func lacksRoom(pod *v1.Pod) bool {
	for _, list := range [][]v1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses, pod.Status.EphemeralContainerStatuses} {
		for i := range list {
			if w := list[i].State.Waiting; w != nil && strings.Contains(w.Message, unix.ENOSPC.Error()) {
				return true
			}
		}
	}
	return false
}

// fine at a glance: everything runs and is ready, or is done.
func fine(pod *v1.Pod) bool {
	if pod.DeletionTimestamp != nil {
		return false
	}
	if pod.Status.Phase == v1.PodSucceeded {
		return true
	}
	_, ready := podutil.GetPodCondition(&pod.Status, v1.PodReady)
	return ready != nil && ready.Status == v1.ConditionTrue
}

// disks that are nearly full.
func disks(dirs []string) (out []why.Disk) {
	seen := map[unix.Fsid]bool{}
	for _, d := range dirs {
		var st unix.Statfs_t
		if unix.Statfs(d, &st) != nil || seen[st.Fsid] || st.Blocks == 0 {
			continue
		}
		seen[st.Fsid] = true
		k := why.Disk{Path: d, Bytes: int(100 - st.Bavail*100/st.Blocks)}
		if st.Files > 0 {
			k.Inodes = int(100 - st.Ffree*100/st.Files)
		}
		if k.Bytes >= full || k.Inodes >= full {
			out = append(out, k)
		}
	}
	return out
}
