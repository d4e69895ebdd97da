package spec

import (
	"errors"
	"fmt"
	"math"
	"path/filepath"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/pkg/security/apparmor"
	"k8s.io/kubernetes/pkg/securitycontext"
)

func namespaces(pod *v1.Pod) *runtimeapi.NamespaceOption {
	o := &runtimeapi.NamespaceOption{
		Network: runtimeapi.NamespaceMode_POD,
		Pid:     runtimeapi.NamespaceMode_CONTAINER,
		Ipc:     runtimeapi.NamespaceMode_POD,
	}
	if pod.Spec.HostNetwork {
		o.Network = runtimeapi.NamespaceMode_NODE
	}
	if pod.Spec.HostIPC {
		o.Ipc = runtimeapi.NamespaceMode_NODE
	}
	switch {
	case pod.Spec.HostPID:
		o.Pid = runtimeapi.NamespaceMode_NODE
	case pod.Spec.ShareProcessNamespace != nil && *pod.Spec.ShareProcessNamespace:
		o.Pid = runtimeapi.NamespaceMode_POD
	}
	return o
}

func sandboxSecurity(pod *v1.Pod) *runtimeapi.LinuxSandboxSecurityContext {
	sc := &runtimeapi.LinuxSandboxSecurityContext{
		NamespaceOptions: namespaces(pod),
		Privileged:       anyPrivileged(pod),
		Seccomp:          &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
	}
	p := pod.Spec.SecurityContext
	if p == nil {
		return sc
	}
	if p.RunAsUser != nil {
		sc.RunAsUser = &runtimeapi.Int64Value{Value: *p.RunAsUser}
	}
	if p.RunAsGroup != nil {
		sc.RunAsGroup = &runtimeapi.Int64Value{Value: *p.RunAsGroup}
	}
	sc.SupplementalGroups, sc.SupplementalGroupsPolicy = groups(p)
	sc.SelinuxOptions = selinux(p.SELinuxOptions)
	return sc
}

func anyPrivileged(pod *v1.Pod) bool {
	privileged := func(c *v1.Container) bool {
		return c.SecurityContext != nil && c.SecurityContext.Privileged != nil && *c.SecurityContext.Privileged
	}
	for i := range pod.Spec.InitContainers {
		if privileged(&pod.Spec.InitContainers[i]) {
			return true
		}
	}
	for i := range pod.Spec.Containers {
		if privileged(&pod.Spec.Containers[i]) {
			return true
		}
	}
	return false
}

func groups(p *v1.PodSecurityContext) ([]int64, runtimeapi.SupplementalGroupsPolicy) {
	var g []int64
	if p.FSGroup != nil {
		g = append(g, *p.FSGroup)
	}
	g = append(g, p.SupplementalGroups...)
	policy := runtimeapi.SupplementalGroupsPolicy_Merge
	if p.SupplementalGroupsPolicy != nil && *p.SupplementalGroupsPolicy == v1.SupplementalGroupsPolicyStrict {
		policy = runtimeapi.SupplementalGroupsPolicy_Strict
	}
	return g, policy
}

func selinux(o *v1.SELinuxOptions) *runtimeapi.SELinuxOption {
	if o == nil {
		return nil
	}
	return &runtimeapi.SELinuxOption{User: o.User, Role: o.Role, Type: o.Type, Level: o.Level}
}

// ImageUser is the user that an image runs as: an id, or a name.
type ImageUser struct {
	UID  *int64
	Name string
}

// containerSecurity merges the pod's and the container's security context as
// upstream does; what neither says comes from the image.
func (n *Node) containerSecurity(pod *v1.Pod, c *v1.Container, user ImageUser) (*runtimeapi.LinuxContainerSecurityContext, error) {
	eff := securitycontext.DetermineEffectiveSecurityContext(pod, c)
	if err := verifyNonRoot(pod, c, eff, user); err != nil {
		return nil, err
	}
	sc := &runtimeapi.LinuxContainerSecurityContext{
		NamespaceOptions: namespaces(pod),
		NoNewPrivs:       securitycontext.AddNoNewPrivileges(eff),
		MaskedPaths:      securitycontext.ConvertToRuntimeMaskedPaths(eff.ProcMount),
		ReadonlyPaths:    securitycontext.ConvertToRuntimeReadonlyPaths(eff.ProcMount),
		SelinuxOptions:   selinux(eff.SELinuxOptions),
		Capabilities:     capabilities(eff.Capabilities),
		Privileged:       eff.Privileged != nil && *eff.Privileged,
		ReadonlyRootfs:   eff.ReadOnlyRootFilesystem != nil && *eff.ReadOnlyRootFilesystem,
	}
	switch {
	case eff.RunAsUser != nil:
		sc.RunAsUser = &runtimeapi.Int64Value{Value: *eff.RunAsUser}
	case user.UID != nil:
		sc.RunAsUser = &runtimeapi.Int64Value{Value: *user.UID}
	default:
		sc.RunAsUsername = user.Name
	}
	if eff.RunAsGroup != nil {
		sc.RunAsGroup = &runtimeapi.Int64Value{Value: *eff.RunAsGroup}
	}
	if p := pod.Spec.SecurityContext; p != nil {
		sc.SupplementalGroups, sc.SupplementalGroupsPolicy = groups(p)
	}
	var err error
	if sc.Seccomp, err = n.seccomp(pod, c); err != nil {
		return nil, err
	}
	if sc.Apparmor, err = appArmor(pod, c); err != nil {
		return nil, err
	}
	return sc, nil
}

func capabilities(o *v1.Capabilities) *runtimeapi.Capability {
	if o == nil {
		return nil
	}
	list := func(in []v1.Capability) []string {
		out := make([]string, len(in))
		for i := range in {
			out[i] = string(in[i])
		}
		return out
	}
	return &runtimeapi.Capability{AddCapabilities: list(o.Add), DropCapabilities: list(o.Drop)}
}

// seccomp profile: the container's, else the pod's, else the node's default.
func (n *Node) seccomp(pod *v1.Pod, c *v1.Container) (*runtimeapi.SecurityProfile, error) {
	var p *v1.SeccompProfile
	if pod.Spec.SecurityContext != nil {
		p = pod.Spec.SecurityContext.SeccompProfile
	}
	if c.SecurityContext != nil && c.SecurityContext.SeccompProfile != nil {
		p = c.SecurityContext.SeccompProfile
	}
	out := &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
	switch {
	case p == nil:
		if n.SeccompDefault {
			out.ProfileType = runtimeapi.SecurityProfile_RuntimeDefault
		}
	case p.Type == v1.SeccompProfileTypeRuntimeDefault:
		out.ProfileType = runtimeapi.SecurityProfile_RuntimeDefault
	case p.Type == v1.SeccompProfileTypeLocalhost:
		if p.LocalhostProfile == nil || *p.LocalhostProfile == "" {
			return nil, fmt.Errorf("localhostProfile must be set if seccompProfile type is Localhost: %w", errdefs.ErrInvalidArgument)
		}
		if !filepath.IsLocal(*p.LocalhostProfile) {
			return nil, fmt.Errorf("localhostProfile %q leads out of %s: %w", *p.LocalhostProfile, n.SeccompRoot, errdefs.ErrInvalidArgument)
		}
		out.ProfileType = runtimeapi.SecurityProfile_Localhost
		out.LocalhostRef = filepath.Join(n.SeccompRoot, *p.LocalhostProfile)
	}
	return out, nil
}

func appArmor(pod *v1.Pod, c *v1.Container) (*runtimeapi.SecurityProfile, error) {
	p := apparmor.GetProfile(pod, c)
	if p == nil {
		return nil, nil
	}
	switch p.Type {
	case v1.AppArmorProfileTypeRuntimeDefault:
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, nil
	case v1.AppArmorProfileTypeUnconfined:
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, nil
	case v1.AppArmorProfileTypeLocalhost:
		if p.LocalhostProfile == nil {
			return nil, errors.New("missing localhost apparmor profile name")
		}
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: *p.LocalhostProfile}, nil
	}
	return nil, fmt.Errorf("unknown apparmor profile type: %q", p.Type)
}

// verifyNonRoot holds runAsNonRoot before a container is created; users by
// name cannot be verified.
func verifyNonRoot(pod *v1.Pod, c *v1.Container, eff *v1.SecurityContext, user ImageUser) error {
	if eff.RunAsNonRoot == nil || !*eff.RunAsNonRoot {
		return nil
	}
	switch {
	case eff.RunAsUser != nil && *eff.RunAsUser == 0:
		return fmt.Errorf("container's runAsUser breaks non-root policy (pod: %q, container: %s)", Desc(pod), c.Name)
	case eff.RunAsUser != nil:
		return nil
	case user.UID == nil && user.Name != "":
		return fmt.Errorf("container has runAsNonRoot and image has non-numeric user (%s), cannot verify user is non-root (pod: %q, container: %s)", user.Name, Desc(pod), c.Name)
	case user.UID == nil || *user.UID == 0:
		return fmt.Errorf("container has runAsNonRoot and image will run as root (pod: %q, container: %s)", Desc(pod), c.Name)
	case *user.UID < 0 || *user.UID > math.MaxInt32:
		return fmt.Errorf("container has runAsNonRoot and image has an invalid user id (%d) (pod: %q, container: %s)", *user.UID, Desc(pod), c.Name)
	}
	return nil
}
