package spec

import (
	"bytes"
	"fmt"
	"os"
	"strings"

	v1 "k8s.io/api/core/v1"
)

const (
	hostsHeader        = "# Kubernetes-managed hosts file.\n"
	hostsHeaderHostNet = "# Kubernetes-managed hosts file (host network).\n"
	// EtcHosts is where the managed hosts file is mounted in containers.
	EtcHosts = "/etc/hosts"
	// HostsFile is that file in the pod's directory, and MessagesDir where the
	// termination messages are there, in a directory for each container: what
	// containers write there counts as the pod's.
	HostsFile   = "etc-hosts"
	MessagesDir = "containers"
)

// Hosts is the content of the pod's /etc/hosts; with hostNetwork it is the
// node's file with the pod's aliases.
func (n *Node) Hosts(pod *v1.Pod, ips []string) ([]byte, error) {
	var b bytes.Buffer
	if pod.Spec.HostNetwork {
		data, err := os.ReadFile(EtcHosts)
		if err != nil && !os.IsNotExist(err) {
			return nil, fmt.Errorf("read the node's hosts file: %w", err)
		}
		b.WriteString(hostsHeaderHostNet)
		b.Write(data)
	} else {
		host, domain, err := n.Hostname(pod)
		if err != nil {
			return nil, err
		}
		b.WriteString(hostsHeader)
		b.WriteString("127.0.0.1\tlocalhost\n" +
			"::1\tlocalhost ip6-localhost ip6-loopback\n" +
			"fe00::0\tip6-localnet\n" +
			"fe00::0\tip6-mcastprefix\n" +
			"fe00::1\tip6-allnodes\n" +
			"fe00::2\tip6-allrouters\n")
		for _, ip := range ips {
			if domain != "" {
				fmt.Fprintf(&b, "%s\t%s.%s\t%s\n", ip, host, domain, host)
			} else {
				fmt.Fprintf(&b, "%s\t%s\n", ip, host)
			}
		}
	}
	if len(pod.Spec.HostAliases) > 0 {
		b.WriteString("\n# Entries added by HostAliases.\n")
		for _, a := range pod.Spec.HostAliases {
			fmt.Fprintf(&b, "%s\t%s\n", a.IP, strings.Join(a.Hostnames, "\t"))
		}
	}
	return b.Bytes(), nil
}

// WantsHosts says whether the managed hosts file is mounted in the container.
func WantsHosts(pod *v1.Pod, c *v1.Container, ips []string) bool {
	for i := range c.VolumeMounts {
		if c.VolumeMounts[i].MountPath == EtcHosts {
			return false
		}
	}
	return len(ips) > 0 || pod.Spec.HostNetwork
}
