package spec

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cgroups"
)

// Sandbox returns the configuration of the pod's sandbox; warn receives what
// had to be left out, as an event's reason and message.
func (n *Node) Sandbox(pod *v1.Pod, attempt uint32, cgroupParent string, warn func(reason, message string)) (*runtimeapi.PodSandboxConfig, error) {
	dns, err := n.DNS.Pod(pod, warn)
	if err != nil {
		return nil, err
	}
	cfg := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: pod.Name, Namespace: pod.Namespace, Uid: string(pod.UID), Attempt: attempt},
		Labels:       sandboxLabels(pod),
		Annotations:  pod.Annotations,
		LogDirectory: n.LogDir(pod.Namespace, pod.Name, pod.UID),
		DnsConfig:    dns,
		PortMappings: portMappings(pod),
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    cgroupParent,
			SecurityContext: sandboxSecurity(pod),
			Sysctls:         sysctls(pod),
			Resources:       n.sandboxResources(pod),
			Overhead:        n.overhead(pod),
		},
	}
	if !pod.Spec.HostNetwork {
		if cfg.Hostname, err = n.kernelHostname(pod); err != nil {
			return nil, err
		}
	}
	return cfg, nil
}

// sandboxResources tell runtimes that size a sandbox what the pod may use.
func (n *Node) sandboxResources(pod *v1.Pod) *runtimeapi.LinuxContainerResources {
	return cgroups.ForCRI(cgroups.ResourceConfigForPod(pod, n.Resources))
}

// overhead of the pod's sandbox (KEP-688); it is in the pod's group, too.
func (n *Node) overhead(pod *v1.Pod) *runtimeapi.LinuxContainerResources {
	if len(pod.Spec.Overhead) == 0 {
		return nil
	}
	c := &v1.Container{Resources: v1.ResourceRequirements{Requests: pod.Spec.Overhead, Limits: pod.Spec.Overhead}}
	r := cgroups.ResourceConfigForContainer(&v1.Pod{Spec: v1.PodSpec{Containers: []v1.Container{*c}}}, c, n.Resources)
	return &runtimeapi.LinuxContainerResources{CpuPeriod: r.CpuPeriod, CpuQuota: r.CpuQuota, CpuShares: r.CpuShares, MemoryLimitInBytes: r.MemoryLimitInBytes}
}

func sysctls(pod *v1.Pod) map[string]string {
	m := map[string]string{}
	if sc := pod.Spec.SecurityContext; sc != nil {
		for _, s := range sc.Sysctls {
			m[s.Name] = s.Value
		}
	}
	return m
}

// portMappings of the pod's regular containers. A name, or the same port
// twice, counts once in a container, as upstream has it.
func portMappings(pod *v1.Pod) []*runtimeapi.PortMapping {
	var out []*runtimeapi.PortMapping
	for i := range pod.Spec.Containers {
		seen := map[string]bool{}
		for _, p := range pod.Spec.Containers[i].Ports {
			key := p.Name
			if key == "" {
				key = fmt.Sprintf("%s-%s-%s:%d:%d", family(p.HostIP), p.Protocol, p.HostIP, p.ContainerPort, p.HostPort)
			}
			if seen[key] {
				continue
			}
			seen[key] = true
			out = append(out, &runtimeapi.PortMapping{
				HostIp: p.HostIP, HostPort: p.HostPort, ContainerPort: p.ContainerPort, Protocol: protocol(p.Protocol),
			})
		}
	}
	return out
}

func family(ip string) string {
	a, err := netip.ParseAddr(ip)
	switch {
	case err != nil:
		return "any"
	case a.Is4():
		return "v4"
	}
	return "v6"
}

func protocol(p v1.Protocol) runtimeapi.Protocol {
	switch p {
	case v1.ProtocolUDP:
		return runtimeapi.Protocol_UDP
	case v1.ProtocolSCTP:
		return runtimeapi.Protocol_SCTP
	}
	return runtimeapi.Protocol_TCP
}

// Hostname and domain of the pod (upstream's GeneratePodHostNameAndDomain).
func (n *Node) Hostname(pod *v1.Pod) (host, domain string, err error) {
	if o := pod.Spec.HostnameOverride; o != nil {
		if msgs := validation.IsDNS1123Subdomain(*o); len(msgs) > 0 {
			return "", "", fmt.Errorf("pod %s: spec.hostnameOverride %q is not a valid DNS subdomain: %s", Desc(pod), *o, strings.Join(msgs, ";"))
		}
		host, err = cutHostname(*o)
		return host, "", err
	}
	host = pod.Name
	if h := pod.Spec.Hostname; h != "" {
		if msgs := validation.IsDNS1123Label(h); len(msgs) > 0 {
			return "", "", fmt.Errorf("pod %s: spec.hostname %q is not a valid DNS label: %s", Desc(pod), h, strings.Join(msgs, ";"))
		}
		host = h
	}
	if host, err = cutHostname(host); err != nil {
		return "", "", err
	}
	if s := pod.Spec.Subdomain; s != "" {
		if msgs := validation.IsDNS1123Label(s); len(msgs) > 0 {
			return "", "", fmt.Errorf("pod %s: spec.subdomain %q is not a valid DNS label: %s", Desc(pod), s, strings.Join(msgs, ";"))
		}
		domain = fmt.Sprintf("%s.%s.svc.%s", s, pod.Namespace, n.DNS.ClusterDomain)
	}
	return host, domain, nil
}

// cutHostname to what DNS allows for a label, 63 bytes.
func cutHostname(h string) (string, error) {
	if len(h) <= 63 {
		return h, nil
	}
	cut := strings.TrimRight(h[:63], "-.")
	if cut == "" {
		return "", fmt.Errorf("hostname %q has no valid beginning: %w", h, errdefs.ErrInvalidArgument)
	}
	return cut, nil
}

// kernelHostname is what uname shows: the whole name with setHostnameAsFQDN,
// of at most the kernel's 64 bytes.
func (n *Node) kernelHostname(pod *v1.Pod) (string, error) {
	host, domain, err := n.Hostname(pod)
	if err != nil || domain == "" || pod.Spec.SetHostnameAsFQDN == nil || !*pod.Spec.SetHostnameAsFQDN {
		return host, err
	}
	fqdn := host + "." + domain
	if len(fqdn) > 64 {
		return "", fmt.Errorf("failed to construct FQDN from pod hostname and cluster domain, FQDN %s is too long (64 characters is the max, %d characters requested)", fqdn, len(fqdn))
	}
	return fqdn, nil
}
