package config

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// PoddConfiguration is what podd has and upstream's kubelet does not:
//
//	apiVersion: podd.dev/v1alpha1
//	kind: PoddConfiguration
//	dataDir: /srv/podd
type PoddConfiguration struct {
	metav1.TypeMeta `json:",inline"`

	// DataDir keeps images and records, what outlives a reboot. Default
	// /var/lib/podd. Flag --data-dir.
	DataDir string `json:"dataDir,omitempty"`
	// RunDir keeps sockets, FIFOs, namespaces and root filesystems, what a
	// reboot ends; on a tmpfs. Default /run/podd. Flag --run-dir.
	RunDir string `json:"runDir,omitempty"`
	// RootDir keeps the pods' directories and volumes, in upstream's layout.
	// Default /var/lib/kubelet. Flag --root-dir, as upstream's.
	RootDir string `json:"rootDir,omitempty"`
	// CRISocket is where CRI clients such as crictl are answered. Default
	// podd.sock in RunDir. Flag --cri-socket.
	CRISocket string `json:"criSocket,omitempty"`
	// ShimPath is the program podd-shim; a name without a slash is looked for
	// beside podd and then in $PATH. Default podd-shim. Flag --shim.
	ShimPath string `json:"shimPath,omitempty"`
	// ShimUnit is the systemd service that runs podd-shim: podd then asks
	// systemd to start it and never starts one itself. Default: none. Flag
	// --shim-unit.
	ShimUnit string `json:"shimUnit,omitempty"`

	// NodeName is appended to the names of static pods. Default: the host's
	// name, in small letters. Flag --hostname-override, as upstream's.
	NodeName string `json:"nodeName,omitempty"`
	// NodeIPs are the node's addresses, at most one IPv4 and one IPv6, the
	// preferred one first. Default: found out. Flag --node-ip, as upstream's.
	NodeIPs []string `json:"nodeIPs,omitempty"`

	// Kubeconfig makes this machine a node of the cluster that it names; with
	// BootstrapKubeconfig it is written when the node has joined by a bootstrap
	// token. Default: none, a node without a cluster. Flags --kubeconfig and
	// --bootstrap-kubeconfig, as upstream's.
	Kubeconfig          string `json:"kubeconfig,omitempty"`
	BootstrapKubeconfig string `json:"bootstrapKubeconfig,omitempty"`
	// CertDir keeps the node's certificates. Default pki in RootDir. Flag
	// --cert-dir, as upstream's.
	CertDir string `json:"certDir,omitempty"`
	// NodeLabels that the Node is registered with. Flag --node-labels, as
	// upstream's.
	NodeLabels map[string]string `json:"nodeLabels,omitempty"`
	// RegisterWithTaints, written key=value:Effect and separated by commas, are
	// taints that the Node is registered with besides those of the
	// KubeletConfiguration. Flag --register-with-taints, as upstream's.
	RegisterWithTaints string `json:"registerWithTaints,omitempty"`

	// RegistryConfigPath is a directory of registries' settings as containerd
	// has it: <host>/hosts.toml and _default/hosts.toml. Default
	// /etc/podd/certs.d. Flag --registry-config-path.
	RegistryConfigPath string `json:"registryConfigPath,omitempty"`
	// CredentialsFile is a docker config.json with credentials for registries,
	// read at each pull. Default: none. Flag --registry-credentials.
	CredentialsFile string `json:"credentialsFile,omitempty"`

	// ImageCredentialProviderConfig is a file, or a directory of files, that
	// names plugins with credentials for images, and ImageCredentialProviderBinDir
	// has them. Default: none. Flags --image-credential-provider-config and
	// --image-credential-provider-bin-dir, as upstream's.
	ImageCredentialProviderConfig string `json:"imageCredentialProviderConfig,omitempty"`
	ImageCredentialProviderBinDir string `json:"imageCredentialProviderBinDir,omitempty"`

	// CNIConfDir holds CNI configurations; while it has none, pods get podd's
	// built-in network. Default /etc/cni/net.d. Flag --cni-conf-dir.
	CNIConfDir string `json:"cniConfDir,omitempty"`
	// CNIBinDirs are searched for CNI plugins. Default /opt/cni/bin and
	// /usr/lib/cni. Flag --cni-bin-dir.
	CNIBinDirs []string `json:"cniBinDirs,omitempty"`
	// CDIDirs are searched for descriptions of devices (CDI). Default /etc/cdi
	// and /var/run/cdi. Flag --cdi-dir.
	CDIDirs []string `json:"cdiDirs,omitempty"`
	// StreamingAddress is where exec, attach and port-forward of CRI clients
	// are served. Default 127.0.0.1:0, any free port. Flag --streaming-address.
	StreamingAddress string `json:"streamingAddress,omitempty"`
	// StreamingTLSCertFile and StreamingTLSPrivateKeyFile, both or none, make
	// those connections TLS. Renewed files are taken up by themselves. Flags
	// --streaming-tls-cert-file and --streaming-tls-private-key-file.
	StreamingTLSCertFile       string `json:"streamingTLSCertFile,omitempty"`
	StreamingTLSPrivateKeyFile string `json:"streamingTLSPrivateKeyFile,omitempty"`
	// Instance tells several podd on one host apart: it is part of the names
	// of bridge, packet filter table and the like. At most 8 letters and
	// digits. Default: none with the default directories, otherwise derived
	// from RunDir. Flag --instance.
	Instance string `json:"instance,omitempty"`
}

const (
	defaultDataDir = "/var/lib/podd"
	defaultRunDir  = "/run/podd"
)

func defaultPodd() PoddConfiguration {
	return PoddConfiguration{
		DataDir: defaultDataDir, RunDir: defaultRunDir, RootDir: "/var/lib/kubelet", ShimPath: "podd-shim",
		RegistryConfigPath: "/etc/podd/certs.d", CNIConfDir: "/etc/cni/net.d",
		CNIBinDirs: []string{"/opt/cni/bin", "/usr/lib/cni"}, CDIDirs: []string{"/etc/cdi", "/var/run/cdi"},
		StreamingAddress: "127.0.0.1:0",
	}
}

// poddFlags are the flags that upstream does not have, and those of upstream's
// whose settings are not in the KubeletConfiguration.
var poddFlags = []flagDef{
	{name: "data-dir", kind: kindString, podd: "dataDir", usage: "images and records, what outlives a reboot (default /var/lib/podd)"},
	{name: "run-dir", kind: kindString, podd: "runDir", usage: "sockets and mounts, what a reboot ends (default /run/podd)"},
	{name: "root-dir", kind: kindString, podd: "rootDir", usage: "pods' directories and volumes (default /var/lib/kubelet)"},
	{name: "cri-socket", kind: kindString, podd: "criSocket", usage: "socket for CRI clients (default podd.sock in --run-dir)"},
	{name: "shim", kind: kindString, podd: "shimPath", usage: "the program podd-shim (default: beside podd)"},
	{name: "shim-unit", kind: kindString, podd: "shimUnit", usage: "systemd service that runs podd-shim (default: podd starts it)"},
	{name: "hostname-override", kind: kindString, podd: "nodeName", usage: "name of the node (default: the host's name)"},
	{name: "node-ip", kind: kindList, podd: "nodeIPs", usage: "addresses of the node (default: found out)"},
	{name: "registry-config-path", kind: kindString, podd: "registryConfigPath", usage: "containerd-style certs.d directory (default /etc/podd/certs.d)"},
	{name: "registry-credentials", kind: kindString, podd: "credentialsFile", usage: "docker config.json with credentials for registries"},
	{name: "cni-conf-dir", kind: kindString, podd: "cniConfDir", usage: "CNI configurations; none: the built-in network (default /etc/cni/net.d)"},
	{name: "cni-bin-dir", kind: kindList, podd: "cniBinDirs", usage: "CNI plugins (default /opt/cni/bin,/usr/lib/cni)"},
	{name: "cdi-dir", kind: kindList, podd: "cdiDirs", usage: "CDI descriptions of devices (default /etc/cdi,/var/run/cdi)"},
	{name: "streaming-address", kind: kindString, podd: "streamingAddress", usage: "address for exec, attach and port-forward of CRI clients (default 127.0.0.1:0)"},
	{name: "streaming-tls-cert-file", kind: kindString, podd: "streamingTLSCertFile", usage: "certificate (PEM) for --streaming-address (default: plain HTTP)"},
	{name: "streaming-tls-private-key-file", kind: kindString, podd: "streamingTLSPrivateKeyFile", usage: "key of --streaming-tls-cert-file"},
	{name: "instance", kind: kindString, podd: "instance", usage: "name of this podd where several run on one host"},
	{name: "pod-logs-dir", kind: kindString, field: "podLogsDir", usage: "containers' logs; links to them in its sibling containers (default /var/log/pods)"},
	{name: "seccomp-default", kind: kindBool, field: "seccompDefault", usage: "RuntimeDefault is the seccomp profile of containers that name none"},
}
