package spec

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	corevalidation "k8s.io/kubernetes/pkg/apis/core/validation"
)

// DNS is the node's part in its pods' resolv.conf.
type DNS struct {
	// ClusterDNS servers; none on a node without a cluster.
	ClusterDNS    []string
	ClusterDomain string
	// ResolvConf is the file that pods inherit, KubeletConfiguration's
	// resolvConf; "" turns look-ups off for pods with dnsPolicy Default.
	ResolvConf string
}

// Pod returns the resolver's configuration for pod. Lists longer than
// resolvers take are cut, with a warning.
func (d *DNS) Pod(pod *v1.Pod, warn func(reason, message string)) (*runtimeapi.DNSConfig, error) {
	cfg := &runtimeapi.DNSConfig{}
	cluster := false
	switch pod.Spec.DNSPolicy {
	case v1.DNSNone:
	case v1.DNSClusterFirstWithHostNet:
		cluster = true
	case v1.DNSClusterFirst, "":
		cluster = !pod.Spec.HostNetwork
	}
	if pod.Spec.DNSPolicy != v1.DNSNone {
		if err := d.host(cfg); err != nil {
			return nil, err
		}
		if cluster && len(d.ClusterDNS) == 0 {
			cluster = false
			// Upstream warns always. ClusterFirst is the default of a pod that
			// says nothing, so on a node that is part of no cluster the
			// warning would be in every pod's events and mean nothing.
			if d.ClusterDomain != "" {
				warn("MissingClusterDNS", fmt.Sprintf("pod: %q. kubelet does not have ClusterDNS IP configured and cannot create Pod using %q policy. Falling back to %q policy.",
					Desc(pod), v1.DNSClusterFirst, v1.DNSDefault))
			}
		}
		switch {
		case cluster:
			cfg.Servers = slices.Clone(d.ClusterDNS)
			cfg.Searches = d.clusterSearches(pod.Namespace, cfg.Searches)
			cfg.Options = []string{"ndots:5"}
		case d.ResolvConf == "":
			// No servers would mean the local machine to a resolver: say so.
			cfg.Servers, cfg.Searches = []string{"127.0.0.1"}, []string{"."}
		}
	}
	if c := pod.Spec.DNSConfig; c != nil {
		cfg.Servers = unique(append(cfg.Servers, c.Nameservers...))
		cfg.Searches = unique(append(cfg.Searches, c.Searches...))
		for _, o := range c.Options {
			s := o.Name
			if o.Value != nil && *o.Value != "" {
				s += ":" + *o.Value
			}
			cfg.Options = setOption(cfg.Options, s)
		}
	}
	fit(cfg, warn)
	return cfg, nil
}

func (d *DNS) host(cfg *runtimeapi.DNSConfig) error {
	if d.ResolvConf == "" {
		return nil
	}
	data, err := os.ReadFile(d.ResolvConf)
	if err != nil {
		return fmt.Errorf("read resolvConf: %w", err)
	}
	return parseResolvConf(data, cfg)
}

// parseResolvConf reads resolv.conf(5): nameservers add up, the last search
// line holds, options add up and the last of a name holds.
func parseResolvConf(data []byte, cfg *runtimeapi.DNSConfig) error {
	sc := bufio.NewScanner(bytes.NewReader(data))
	for line := 1; sc.Scan(); line++ {
		f := strings.Fields(sc.Text())
		if len(f) == 0 || f[0][0] == '#' || f[0][0] == ';' {
			continue
		}
		switch f[0] {
		case "nameserver":
			if len(f) < 2 {
				return fmt.Errorf("resolv.conf line %d: nameserver without an address", line)
			}
			cfg.Servers = append(cfg.Servers, f[1])
		case "search":
			cfg.Searches = nil
			for _, s := range f[1:] {
				if s != "." {
					cfg.Searches = append(cfg.Searches, strings.TrimSuffix(s, "."))
				}
			}
		case "options":
			for _, o := range f[1:] {
				cfg.Options = setOption(cfg.Options, o)
			}
		}
	}
	return sc.Err()
}

func (d *DNS) clusterSearches(namespace string, host []string) []string {
	if d.ClusterDomain == "" {
		return host
	}
	return unique(append([]string{namespace + ".svc." + d.ClusterDomain, "svc." + d.ClusterDomain, d.ClusterDomain}, host...))
}

func setOption(list []string, o string) []string {
	name, _, _ := strings.Cut(o, ":")
	for i := range list {
		if have, _, _ := strings.Cut(list[i], ":"); have == name {
			list[i] = o
			return list
		}
	}
	return append(list, o)
}

func unique(list []string) []string {
	var out []string
	for _, s := range list {
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// fit cuts what resolvers do not take (resolv.conf(5); glibc aborts on a
// search path over 255 bytes), as upstream does.
func fit(cfg *runtimeapi.DNSConfig, warn func(reason, message string)) {
	const reason = "DNSConfigForming"
	if len(cfg.Servers) > corevalidation.MaxDNSNameservers {
		cfg.Servers = cfg.Servers[:corevalidation.MaxDNSNameservers]
		warn(reason, "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: "+strings.Join(cfg.Servers, " "))
	}
	n := len(cfg.Searches)
	s := cfg.Searches[:min(n, corevalidation.MaxDNSSearchPaths)]
	s = slices.DeleteFunc(s, func(p string) bool { return len(p) > validation.DNS1123SubdomainMaxLength })
	for len(s) > 0 && len(strings.Join(s, " ")) > corevalidation.MaxDNSSearchListChars {
		s = s[:len(s)-1]
	}
	cfg.Searches = s
	if len(s) < n {
		warn(reason, "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: "+strings.Join(s, " "))
	}
}
