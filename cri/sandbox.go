package cri

import (
	"encoding/json"
	"fmt"
	"sync"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/netns"
)

// sandbox is one pod sandbox. The fields above mu never change once it is in
// the registry.
//
//	(creating: an attempt, not in the registry)
//	      │ RunPodSandbox                  ┌──────────────┐
//	      ▼                                ▼              │ again
//	    ready ── StopPodSandbox, pause ─► not ready ── RemovePodSandbox ─► gone
//	             exited, reboot
type sandbox struct {
	id        string
	name      string // see sandboxName
	config    *runtimeapi.PodSandboxConfig
	handler   string
	createdAt int64
	gate      gate // orders Stop and Remove

	mu        sync.Mutex
	ready     bool
	removing  bool
	pid       int
	startedAt int64
	network   *netns.Result // nil: nothing attached
	detached  bool          // the network, namespace and pause have been given back
	resources *runtimeapi.LinuxContainerResources
	overhead  *runtimeapi.LinuxContainerResources
	// label is the pause's SELinux label, "" without SELinux. Set before the
	// sandbox is in the registry.
	label string
}

// sandboxRecord is what a sandbox is on disk.
type sandboxRecord struct {
	Config    protoJSON[*runtimeapi.PodSandboxConfig]        `json:"config"`
	Handler   string                                         `json:"handler,omitempty"`
	CreatedAt int64                                          `json:"createdAt"`
	StartedAt int64                                          `json:"startedAt,omitempty"`
	Ready     bool                                           `json:"ready"`
	PID       int                                            `json:"pid,omitempty"`
	Network   *netns.Result                                  `json:"network,omitempty"`
	Detached  bool                                           `json:"detached,omitempty"`
	Label     string                                         `json:"selinuxLabel,omitempty"`
	Resources protoJSON[*runtimeapi.LinuxContainerResources] `json:"resources,omitzero"`
	Overhead  protoJSON[*runtimeapi.LinuxContainerResources] `json:"overhead,omitzero"`
}

// protoJSON stores a protobuf message in a record in its canonical JSON form:
// readable, and fields of later CRI versions are skipped on the way back.
type protoJSON[T proto.Message] struct{ Message T }

// IsZero reports whether there is no message.
func (p protoJSON[T]) IsZero() bool { return !p.Message.ProtoReflect().IsValid() }

// MarshalJSON implements json.Marshaler.
func (p protoJSON[T]) MarshalJSON() ([]byte, error) { return protojson.Marshal(p.Message) }

// UnmarshalJSON implements json.Unmarshaler.
func (p *protoJSON[T]) UnmarshalJSON(b []byte) error {
	var zero T
	m := zero.ProtoReflect().New().Interface()
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, m); err != nil {
		return err
	}
	p.Message = m.(T)
	return nil
}

var (
	_ json.Marshaler   = protoJSON[*runtimeapi.PodSandboxConfig]{}
	_ json.Unmarshaler = (*protoJSON[*runtimeapi.PodSandboxConfig])(nil)
)

// sandboxName identifies an attempt of a pod: a retried RunPodSandbox has the
// same, the next attempt another.
func sandboxName(m *runtimeapi.PodSandboxMetadata) string {
	return fmt.Sprintf("%s_%s_%s_%d", m.GetName(), m.GetNamespace(), m.GetUid(), m.GetAttempt())
}

func newSandbox(id string, config *runtimeapi.PodSandboxConfig, handler string, createdAt int64) *sandbox {
	return &sandbox{
		id: id, name: sandboxName(config.GetMetadata()), config: config,
		handler: handler, createdAt: createdAt, gate: newGate(),
	}
}

// save writes the record; the caller holds sb.mu or owns sb.
func (s *Service) saveSandbox(sb *sandbox) error {
	return s.store.Put(kindSandbox, sb.id, &sandboxRecord{
		Config:    protoJSON[*runtimeapi.PodSandboxConfig]{sb.config},
		Handler:   sb.handler,
		CreatedAt: sb.createdAt, StartedAt: sb.startedAt,
		Ready: sb.ready, PID: sb.pid, Network: sb.network, Detached: sb.detached, Label: sb.label,
		Resources: protoJSON[*runtimeapi.LinuxContainerResources]{sb.resources},
		Overhead:  protoJSON[*runtimeapi.LinuxContainerResources]{sb.overhead},
	})
}

// isReady says whether containers can be made in it, and the pause's pid.
func (sb *sandbox) isReady() (pid int, ready bool) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.pid, sb.ready && !sb.removing
}

func (sb *sandbox) namespaces() *runtimeapi.NamespaceOption {
	return sb.config.GetLinux().GetSecurityContext().GetNamespaceOptions()
}

// hostNetwork says whether the pod uses the node's network namespace.
func (sb *sandbox) hostNetwork() bool {
	return sb.namespaces().GetNetwork() == runtimeapi.NamespaceMode_NODE
}

// netPod is the sandbox as the network sees it.
func (s *Service) netPod(sb *sandbox) *netns.Pod {
	m := sb.config.GetMetadata()
	return &netns.Pod{
		SandboxID: sb.id, Name: m.GetName(), Namespace: m.GetNamespace(), UID: m.GetUid(),
		NetnsPath: s.netnsPath(sb.id), Annotations: sb.config.GetAnnotations(),
		Ports: sb.config.GetPortMappings(), DNS: sb.config.GetDnsConfig(),
		CgroupParent: s.cgroupParent(sb.config),
	}
}
