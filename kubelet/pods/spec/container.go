package spec

import (
	"strings"

	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cgroups"
)

// ContainerParts is what a container's configuration is made of besides the
// pod and the node.
type ContainerParts struct {
	Attempt  int32
	ImageRef string // resolved
	User     ImageUser
	Env      *Env
	Mounts   []*runtimeapi.Mount
	// TargetID is the container whose processes an ephemeral container sees.
	TargetID string
}

// Container returns the configuration of one container.
func (n *Node) Container(pod *v1.Pod, c *v1.Container, p *ContainerParts) (*runtimeapi.ContainerConfig, error) {
	sc, err := n.containerSecurity(pod, c, p.User)
	if err != nil {
		return nil, err
	}
	if p.TargetID != "" && sc.NamespaceOptions.Pid == runtimeapi.NamespaceMode_CONTAINER {
		sc.NamespaceOptions.Pid, sc.NamespaceOptions.TargetId = runtimeapi.NamespaceMode_TARGET, p.TargetID
	}
	return &runtimeapi.ContainerConfig{
		Metadata:    &runtimeapi.ContainerMetadata{Name: c.Name, Attempt: uint32(p.Attempt)},
		Image:       &runtimeapi.ImageSpec{Image: p.ImageRef, UserSpecifiedImage: c.Image},
		Command:     p.Env.expandAll(c.Command),
		Args:        p.Env.expandAll(c.Args),
		WorkingDir:  c.WorkingDir,
		Envs:        p.Env.cri(),
		Mounts:      p.Mounts,
		Labels:      containerLabels(pod, c),
		Annotations: containerAnnotations(pod, c, p.Attempt),
		LogPath:     LogPath(c.Name, p.Attempt),
		Stdin:       c.Stdin,
		StdinOnce:   c.StdinOnce,
		Tty:         c.TTY,
		StopSignal:  stopSignal(c),
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources:       cgroups.ResourceConfigForContainer(pod, c, n.Resources),
			SecurityContext: sc,
		},
	}, nil
}

// stopSignal of lifecycle.stopSignal; the runtime's default otherwise.
func stopSignal(c *v1.Container) runtimeapi.Signal {
	if c.Lifecycle == nil || c.Lifecycle.StopSignal == nil {
		return runtimeapi.Signal_RUNTIME_DEFAULT
	}
	name := signalName(string(*c.Lifecycle.StopSignal))
	return runtimeapi.Signal(runtimeapi.Signal_value[name])
}

// SignalName is the API's name of CRI's signal.
func SignalName(s runtimeapi.Signal) string {
	return strings.NewReplacer("PLUS", "+", "MINUS", "-").Replace(s.String())
}

// signalName maps the API's SIGRTMIN+1 to CRI's SIGRTMINPLUS1.
func signalName(s string) string {
	out := make([]byte, 0, len(s)+4)
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '+':
			out = append(out, "PLUS"...)
		case '-':
			out = append(out, "MINUS"...)
		default:
			out = append(out, s[i])
		}
	}
	return string(out)
}
