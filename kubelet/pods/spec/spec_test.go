package spec

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func node() *Node {
	return &Node{
		Name: "n1", RootDir: "/var/lib/kubelet", PodLogsDir: "/var/log/pods", SeccompRoot: "/var/lib/kubelet/seccomp", HostIPs: []string{"192.0.2.1", "2001:db8::1"},
		Allocatable: v1.ResourceList{v1.ResourceCPU: resource.MustParse("4"), v1.ResourceMemory: resource.MustParse("8Gi")},
	}
}

func pod(mods ...func(*v1.Pod)) *v1.Pod {
	p := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "ns", UID: "u1", Labels: map[string]string{"app": "web"}, Annotations: map[string]string{"note": "x"}},
		Spec:       v1.PodSpec{Containers: []v1.Container{{Name: "a", Image: "img"}}, ServiceAccountName: "sa"},
	}
	for _, m := range mods {
		m(p)
	}
	return p
}

type objects struct {
	cm map[string]*v1.ConfigMap
	s  map[string]*v1.Secret
}

func (o objects) ConfigMap(ns, name string) (*v1.ConfigMap, error) {
	if c := o.cm[ns+"/"+name]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("configmap %s: %w", name, errdefs.ErrNotFound)
}

func (o objects) Secret(ns, name string) (*v1.Secret, error) {
	if c := o.s[ns+"/"+name]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("secret %s: %w", name, errdefs.ErrNotFound)
}

func list(e *Env) string {
	var out []string
	for _, kv := range e.cri() {
		out = append(out, kv.Key+"="+string(kv.Value))
	}
	return strings.Join(out, " ")
}

func field(path string) *v1.EnvVarSource {
	return &v1.EnvVarSource{FieldRef: &v1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}
}

func TestEnvironment(t *testing.T) {
	yes := true
	objs := objects{
		cm: map[string]*v1.ConfigMap{"ns/c": {Data: map[string]string{"B": "2", "A": "1"}}},
		s:  map[string]*v1.Secret{"ns/s": {Data: map[string][]byte{"P": []byte("pw")}}},
	}
	ref := func(n string) v1.LocalObjectReference { return v1.LocalObjectReference{Name: n} }
	for _, tc := range []struct {
		name string
		c    v1.Container
		want string
		err  string
	}{
		{"values and references", v1.Container{Env: []v1.EnvVar{{Name: "X", Value: "1"}, {Name: "Y", Value: "$(X)-$(NO)-$$(X)"}, {Name: "E"}}}, "X=1 Y=1-$(NO)-$(X) E=", ""},
		{"env over envFrom", v1.Container{EnvFrom: []v1.EnvFromSource{{ConfigMapRef: &v1.ConfigMapEnvSource{LocalObjectReference: ref("c")}}, {Prefix: "S_", SecretRef: &v1.SecretEnvSource{LocalObjectReference: ref("s")}}}, Env: []v1.EnvVar{{Name: "A", Value: "x$(B)$(S_P)"}}}, "A=x2pw B=2 S_P=pw", ""},
		{"keys", v1.Container{Env: []v1.EnvVar{
			{Name: "A", ValueFrom: &v1.EnvVarSource{ConfigMapKeyRef: &v1.ConfigMapKeySelector{LocalObjectReference: ref("c"), Key: "A"}}},
			{Name: "P", ValueFrom: &v1.EnvVarSource{SecretKeyRef: &v1.SecretKeySelector{LocalObjectReference: ref("s"), Key: "P"}}},
			{Name: "Q", ValueFrom: &v1.EnvVarSource{SecretKeyRef: &v1.SecretKeySelector{LocalObjectReference: ref("s"), Key: "no", Optional: &yes}}},
			{Name: "R", ValueFrom: &v1.EnvVarSource{ConfigMapKeyRef: &v1.ConfigMapKeySelector{LocalObjectReference: ref("no"), Key: "no", Optional: &yes}}},
		}}, "A=1 P=pw", ""},
		{"no configmap", v1.Container{EnvFrom: []v1.EnvFromSource{{ConfigMapRef: &v1.ConfigMapEnvSource{LocalObjectReference: ref("no")}}}}, "", `configmap "no" not found`},
		{"no key", v1.Container{Env: []v1.EnvVar{{Name: "A", ValueFrom: &v1.EnvVarSource{ConfigMapKeyRef: &v1.ConfigMapKeySelector{LocalObjectReference: ref("c"), Key: "Z"}}}}}, "", "couldn't find key Z in ConfigMap ns/c"},
		{"fields", v1.Container{Env: []v1.EnvVar{
			{Name: "N", ValueFrom: field("metadata.name")}, {Name: "L", ValueFrom: field("metadata.labels['app']")}, {Name: "H", ValueFrom: field("status.hostIP")},
			{Name: "P", ValueFrom: field("status.podIP")}, {Name: "PS", ValueFrom: field("status.podIPs")}, {Name: "NODE", ValueFrom: field("spec.nodeName")}, {Name: "SA", ValueFrom: field("spec.serviceAccountName")},
		}}, "N=web L=web H=192.0.2.1 P=10.0.0.1 PS=10.0.0.1,fd00::1 NODE=n1 SA=sa", ""},
		{"resources", v1.Container{Resources: v1.ResourceRequirements{Limits: v1.ResourceList{v1.ResourceMemory: resource.MustParse("64Mi")}}, Env: []v1.EnvVar{
			{Name: "M", ValueFrom: &v1.EnvVarSource{ResourceFieldRef: &v1.ResourceFieldSelector{Resource: "limits.memory", Divisor: resource.MustParse("1Mi")}}},
			{Name: "C", ValueFrom: &v1.EnvVarSource{ResourceFieldRef: &v1.ResourceFieldSelector{Resource: "limits.cpu"}}},
		}}, "M=64 C=4", ""},
		{"file", v1.Container{Env: []v1.EnvVar{{Name: "F", ValueFrom: &v1.EnvVarSource{FileKeyRef: &v1.FileKeySelector{VolumeName: "v", Path: "p", Key: "K"}}}}}, "F=v:p:K", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := tc.c
			c.Name = "a"
			e, err := node().Environment(pod(func(p *v1.Pod) { p.Spec.Containers[0] = c }), &c, EnvSources{
				Objects: objs, PodIPs: []string{"10.0.0.1", "fd00::1"},
				File: func(v, p, k string) (string, bool, error) { return v + ":" + p + ":" + k, true, nil },
			})
			if tc.err != "" {
				if err == nil || err.Error() != tc.err || !errdefs.IsNotFound(err) {
					t.Fatalf("error %v, want %q, not found", err, tc.err)
				}
				return
			}
			if err != nil || list(e) != tc.want {
				t.Fatalf("%s (%v)\nwant %s", list(e), err, tc.want)
			}
		})
	}
}

func TestServiceVariables(t *testing.T) {
	service := func(namespace, name, ip string) *v1.Service {
		return &v1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: v1.ServiceSpec{
			ClusterIP: ip, Ports: []v1.ServicePort{{Name: "web", Port: 80, Protocol: v1.ProtocolTCP}},
		}}
	}
	services := []*v1.Service{
		service("default", "kubernetes", "10.96.0.1"), service("ns", "my-db", "10.96.0.2"),
		service("ns", "headless", "None"), service("other", "theirs", "10.96.0.3"),
	}
	n := node()
	src := EnvSources{Services: func(namespace string, links bool) (map[string]string, error) {
		return ServiceVariables(services, namespace, links), nil
	}}
	for _, links := range []bool{true, false} {
		p := pod(func(p *v1.Pod) {
			p.Spec.EnableServiceLinks = &links
			p.Spec.Containers[0].Env = []v1.EnvVar{{Name: "KUBERNETES_SERVICE_PORT", Value: "mine"}, {Name: "URL", Value: "http://$(MY_DB_SERVICE_HOST)"}}
		})
		e, err := n.Environment(p, &p.Spec.Containers[0], src)
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]string{"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "mine", "THEIRS_SERVICE_HOST": "", "HEADLESS_SERVICE_HOST": ""}
		want["MY_DB_SERVICE_HOST"], want["MY_DB_PORT_80_TCP"], want["URL"] = "", "", "http://$(MY_DB_SERVICE_HOST)"
		if links {
			want["MY_DB_SERVICE_HOST"], want["MY_DB_PORT_80_TCP"], want["URL"] = "10.96.0.2", "tcp://10.96.0.2:80", "http://10.96.0.2"
		}
		for name, value := range want {
			if got := e.Get(name); got != value {
				t.Errorf("links %v: %s is %q, want %q", links, name, got, value)
			}
		}
	}
}

func TestDNS(t *testing.T) {
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	os.WriteFile(conf, []byte("# x\nnameserver 10.1.1.1\nsearch old.example\nsearch corp.example. .\noptions ndots:2 timeout:1\noptions ndots:3\n"), 0o644)
	two := "2"
	for _, tc := range []struct {
		name                       string
		dns                        DNS
		mod                        func(*v1.Pod)
		servers, searches, options string
		warned                     string
	}{
		{"default", DNS{ResolvConf: conf}, func(p *v1.Pod) { p.Spec.DNSPolicy = v1.DNSDefault }, "10.1.1.1", "corp.example", "ndots:3 timeout:1", ""},
		{"cluster", DNS{ResolvConf: conf, ClusterDNS: []string{"10.96.0.10"}, ClusterDomain: "cluster.local"}, func(p *v1.Pod) { p.Spec.DNSPolicy = v1.DNSClusterFirst }, "10.96.0.10", "ns.svc.cluster.local svc.cluster.local cluster.local corp.example", "ndots:5", ""},
		{"cluster first without servers", DNS{ResolvConf: conf, ClusterDomain: "cluster.local"}, func(p *v1.Pod) { p.Spec.DNSPolicy = v1.DNSClusterFirst }, "10.1.1.1", "corp.example", "ndots:3 timeout:1", "MissingClusterDNS"},
		{"cluster first without a cluster", DNS{ResolvConf: conf}, func(p *v1.Pod) { p.Spec.DNSPolicy = v1.DNSClusterFirst }, "10.1.1.1", "corp.example", "ndots:3 timeout:1", ""},
		{"cluster first on the host's network", DNS{ResolvConf: conf, ClusterDNS: []string{"10.96.0.10"}}, func(p *v1.Pod) { p.Spec.DNSPolicy = v1.DNSClusterFirst; p.Spec.HostNetwork = true }, "10.1.1.1", "corp.example", "ndots:3 timeout:1", ""},
		{"cluster first with host net", DNS{ResolvConf: conf, ClusterDNS: []string{"10.96.0.10"}}, func(p *v1.Pod) { p.Spec.DNSPolicy = v1.DNSClusterFirstWithHostNet; p.Spec.HostNetwork = true }, "10.96.0.10", "corp.example", "ndots:5", ""},
		{"none, with config", DNS{ResolvConf: conf}, func(p *v1.Pod) {
			p.Spec.DNSPolicy = v1.DNSNone
			p.Spec.DNSConfig = &v1.PodDNSConfig{Nameservers: []string{"1.1.1.1"}, Searches: []string{"x"}, Options: []v1.PodDNSConfigOption{{Name: "edns0"}}}
		}, "1.1.1.1", "x", "edns0", ""},
		{"merged", DNS{ResolvConf: conf}, func(p *v1.Pod) {
			p.Spec.DNSPolicy = v1.DNSDefault
			p.Spec.DNSConfig = &v1.PodDNSConfig{Nameservers: []string{"10.1.1.1", "1.1.1.1"}, Options: []v1.PodDNSConfigOption{{Name: "ndots", Value: &two}}}
		}, "10.1.1.1 1.1.1.1", "corp.example", "ndots:2 timeout:1", ""},
		{"too many servers", DNS{ResolvConf: conf}, func(p *v1.Pod) {
			p.Spec.DNSPolicy = v1.DNSDefault
			p.Spec.DNSConfig = &v1.PodDNSConfig{Nameservers: []string{"1.1.1.1", "2.2.2.2", "3.3.3.3"}}
		}, "10.1.1.1 1.1.1.1 2.2.2.2", "corp.example", "ndots:3 timeout:1", "DNSConfigForming"},
		{"no resolv.conf", DNS{}, func(p *v1.Pod) { p.Spec.DNSPolicy = v1.DNSDefault }, "127.0.0.1", ".", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			warned := ""
			cfg, err := tc.dns.Pod(pod(tc.mod), func(reason, _ string) { warned += reason })
			if err != nil {
				t.Fatal(err)
			}
			got := []string{strings.Join(cfg.Servers, " "), strings.Join(cfg.Searches, " "), strings.Join(cfg.Options, " "), warned}
			if want := []string{tc.servers, tc.searches, tc.options, tc.warned}; !reflect.DeepEqual(got, want) {
				t.Errorf("%q\nwant %q", got, want)
			}
		})
	}
}

func TestLongSearchLinesAreCut(t *testing.T) {
	cfg := &runtimeapi.DNSConfig{}
	for i := range 40 {
		cfg.Searches = append(cfg.Searches, fmt.Sprintf("%02d.%s", i, strings.Repeat("x", 100)))
	}
	cfg.Searches[0] = strings.Repeat("y", 300)
	warned := false
	fit(cfg, func(string, string) { warned = true })
	if !warned || len(strings.Join(cfg.Searches, " ")) > 2048 || cfg.Searches[0][:2] != "01" {
		t.Fatalf("%d bytes, first %s", len(strings.Join(cfg.Searches, " ")), cfg.Searches[0])
	}
}

func TestHosts(t *testing.T) {
	n := node()
	n.DNS.ClusterDomain = "cluster.local"
	p := pod(func(p *v1.Pod) {
		p.Spec.Hostname, p.Spec.Subdomain = "h", "sub"
		p.Spec.HostAliases = []v1.HostAlias{{IP: "1.2.3.4", Hostnames: []string{"x", "y"}}}
	})
	b, err := n.Hosts(p, []string{"10.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n", "10.0.0.1\th.sub.ns.svc.cluster.local\th\n", "\n# Entries added by HostAliases.\n1.2.3.4\tx\ty\n"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %q in\n%s", want, b)
		}
	}
	c := &v1.Container{VolumeMounts: []v1.VolumeMount{{MountPath: "/etc/hosts"}}}
	if WantsHosts(p, c, []string{"10.0.0.1"}) || !WantsHosts(p, &v1.Container{}, []string{"10.0.0.1"}) || WantsHosts(p, &v1.Container{}, nil) {
		t.Error("WantsHosts")
	}
}

func TestHostname(t *testing.T) {
	n := node()
	yes := true
	long := strings.Repeat("a", 62) + "-bcd"
	for _, tc := range []struct {
		name string
		mod  func(*v1.Pod)
		want string
		err  bool
	}{
		{"the pod's name", func(*v1.Pod) {}, "web", false},
		{"its own", func(p *v1.Pod) { p.Spec.Hostname = "h" }, "h", false},
		{"cut at 63, not at a dash", func(p *v1.Pod) { p.Name = long }, strings.Repeat("a", 62), false},
		{"fqdn", func(p *v1.Pod) { p.Spec.Hostname, p.Spec.Subdomain, p.Spec.SetHostnameAsFQDN = "h", "s", &yes }, "h.s.ns.svc.", false},
		{"fqdn too long", func(p *v1.Pod) {
			p.Spec.Hostname, p.Spec.Subdomain, p.Spec.SetHostnameAsFQDN = strings.Repeat("h", 60), "s", &yes
		}, "", true},
		{"invalid", func(p *v1.Pod) { p.Spec.Hostname = "a_b" }, "", true},
		{"override", func(p *v1.Pod) { o := "x.y"; p.Spec.HostnameOverride = &o }, "x.y", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := n.kernelHostname(pod(tc.mod))
			if got != tc.want || (err != nil) != tc.err {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

func TestContainerConfig(t *testing.T) {
	yes, no, uid := true, false, int64(1000)
	n := node()
	p := pod(func(p *v1.Pod) {
		g := int64(30)
		p.Spec.TerminationGracePeriodSeconds = &g
		fs := int64(5)
		p.Spec.SecurityContext = &v1.PodSecurityContext{RunAsUser: &uid, FSGroup: &fs, SupplementalGroups: []int64{6}, SeccompProfile: &v1.SeccompProfile{Type: v1.SeccompProfileTypeRuntimeDefault}}
		c := &p.Spec.Containers[0]
		c.Command, c.Args = []string{"run", "$(X)"}, []string{"$(NO)"}
		c.TerminationMessagePath, c.TerminationMessagePolicy = "/dev/t", v1.TerminationMessageReadFile
		sig := v1.SIGUSR1
		c.Lifecycle = &v1.Lifecycle{PreStop: &v1.LifecycleHandler{Sleep: &v1.SleepAction{Seconds: 1}}, StopSignal: &sig}
		c.SecurityContext = &v1.SecurityContext{AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes, Capabilities: &v1.Capabilities{Drop: []v1.Capability{"ALL"}}}
	})
	env := &Env{values: map[string]string{"X": "1"}, order: []string{"X"}}
	cfg, err := n.Container(p, &p.Spec.Containers[0], &ContainerParts{Attempt: 2, ImageRef: "sha256:1", Env: env, User: ImageUser{Name: "nobody"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(append(cfg.Command, cfg.Args...), " "); got != "run 1 $(NO)" {
		t.Errorf("command %q", got)
	}
	if cfg.LogPath != "a/2.log" || cfg.Metadata.Attempt != 2 || cfg.Image.Image != "sha256:1" || cfg.Image.UserSpecifiedImage != "img" || cfg.StopSignal != runtimeapi.Signal_SIGUSR1 {
		t.Errorf("%+v", cfg)
	}
	for k, v := range map[string]string{AnnRestartCount: "2", AnnTerminationMessagePath: "/dev/t", AnnTerminationMessagePolicy: "File", AnnTerminationGracePeriod: "30", AnnPreStopHandler: `{"sleep":{"seconds":1}}`} {
		if cfg.Annotations[k] != v {
			t.Errorf("annotation %s is %q, want %q", k, cfg.Annotations[k], v)
		}
	}
	for k, v := range map[string]string{LabelPodName: "web", LabelPodNamespace: "ns", LabelPodUID: "u1", LabelContainerName: "a"} {
		if cfg.Labels[k] != v {
			t.Errorf("label %s is %q", k, cfg.Labels[k])
		}
	}
	sc := cfg.Linux.SecurityContext
	if sc.RunAsUser.GetValue() != 1000 || sc.RunAsUsername != "" || !sc.NoNewPrivs || !sc.ReadonlyRootfs || !reflect.DeepEqual(sc.SupplementalGroups, []int64{5, 6}) ||
		sc.Seccomp.ProfileType != runtimeapi.SecurityProfile_RuntimeDefault || sc.Capabilities.DropCapabilities[0] != "ALL" || len(sc.MaskedPaths) == 0 {
		t.Errorf("%+v", sc)
	}
}

func TestRunAsNonRoot(t *testing.T) {
	yes, zero, one := true, int64(0), int64(1)
	for _, tc := range []struct {
		name string
		run  *int64
		user ImageUser
		ok   bool
	}{
		{"runAsUser", &one, ImageUser{UID: &zero}, true},
		{"runAsUser 0", &zero, ImageUser{UID: &one}, false},
		{"image's user", nil, ImageUser{UID: &one}, true},
		{"image is root", nil, ImageUser{UID: &zero}, false},
		{"image's user has a name", nil, ImageUser{Name: "web"}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := pod(func(p *v1.Pod) {
				p.Spec.SecurityContext = &v1.PodSecurityContext{RunAsNonRoot: &yes, RunAsUser: tc.run}
			})
			_, err := node().containerSecurity(p, &p.Spec.Containers[0], tc.user)
			if (err == nil) != tc.ok {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestSeccomp(t *testing.T) {
	local, out := "p.json", "../../etc/passwd"
	prof := func(typ v1.SeccompProfileType, f *string) *v1.SeccompProfile {
		return &v1.SeccompProfile{Type: typ, LocalhostProfile: f}
	}
	for _, tc := range []struct {
		name      string
		def       bool
		pod, c    *v1.SeccompProfile
		want, ref string
		err       bool
	}{
		{"nothing said", false, nil, nil, "Unconfined", "", false},
		{"the node's default", true, nil, nil, "RuntimeDefault", "", false},
		{"the pod's", false, prof(v1.SeccompProfileTypeRuntimeDefault, nil), nil, "RuntimeDefault", "", false},
		{"the container's over it", true, prof(v1.SeccompProfileTypeRuntimeDefault, nil), prof(v1.SeccompProfileTypeUnconfined, nil), "Unconfined", "", false},
		{"localhost", false, nil, prof(v1.SeccompProfileTypeLocalhost, &local), "Localhost", "/var/lib/kubelet/seccomp/p.json", false},
		{"localhost, out of its directory", false, nil, prof(v1.SeccompProfileTypeLocalhost, &out), "", "", true},
		{"localhost without a file", false, nil, prof(v1.SeccompProfileTypeLocalhost, nil), "", "", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := node()
			n.SeccompDefault = tc.def
			p := pod(func(p *v1.Pod) {
				p.Spec.SecurityContext = &v1.PodSecurityContext{SeccompProfile: tc.pod}
				p.Spec.Containers[0].SecurityContext = &v1.SecurityContext{SeccompProfile: tc.c}
			})
			got, err := n.seccomp(p, &p.Spec.Containers[0])
			if (err != nil) != tc.err {
				t.Fatal(err)
			}
			if err == nil && (got.ProfileType.String() != tc.want || got.LocalhostRef != tc.ref) {
				t.Errorf("%+v", got)
			}
		})
	}
}

func TestSandboxConfig(t *testing.T) {
	n := node()
	share := true
	p := pod(func(p *v1.Pod) {
		p.Spec.ShareProcessNamespace = &share
		p.Spec.SecurityContext = &v1.PodSecurityContext{Sysctls: []v1.Sysctl{{Name: "net.x", Value: "1"}}}
		p.Spec.Containers[0].Ports = []v1.ContainerPort{{ContainerPort: 80, HostPort: 8080, Protocol: v1.ProtocolTCP}, {ContainerPort: 80, HostPort: 8080, Protocol: v1.ProtocolTCP}, {ContainerPort: 53, Protocol: v1.ProtocolUDP}}
	})
	cfg, err := n.Sandbox(p, 3, "/kubepods/podu1", func(string, string) {})
	if err != nil {
		t.Fatal(err)
	}
	ns := cfg.Linux.SecurityContext.NamespaceOptions
	if ns.Pid != runtimeapi.NamespaceMode_POD || ns.Network != runtimeapi.NamespaceMode_POD || ns.Ipc != runtimeapi.NamespaceMode_POD {
		t.Errorf("namespaces %+v", ns)
	}
	if len(cfg.PortMappings) != 2 || cfg.PortMappings[0].HostPort != 8080 || cfg.PortMappings[1].Protocol != runtimeapi.Protocol_UDP {
		t.Errorf("ports %+v", cfg.PortMappings)
	}
	if cfg.Hostname != "web" || cfg.LogDirectory != "/var/log/pods/ns_web_u1" || cfg.Metadata.Attempt != 3 || cfg.Linux.CgroupParent != "/kubepods/podu1" || cfg.Linux.Sysctls["net.x"] != "1" || cfg.Labels["app"] != "web" {
		t.Errorf("%+v", cfg)
	}
	host, err := n.Sandbox(pod(func(p *v1.Pod) { p.Spec.HostNetwork, p.Spec.HostPID, p.Spec.HostIPC = true, true, true }), 0, "", func(string, string) {})
	if err != nil {
		t.Fatal(err)
	}
	ns = host.Linux.SecurityContext.NamespaceOptions
	if ns.Pid != runtimeapi.NamespaceMode_NODE || ns.Network != runtimeapi.NamespaceMode_NODE || ns.Ipc != runtimeapi.NamespaceMode_NODE || host.Hostname != "" {
		t.Errorf("host namespaces %+v, hostname %q", ns, host.Hostname)
	}
}

func TestNames(t *testing.T) {
	n := node()
	if got := n.LogLink("ns", "web", "a", "0123"); got != "/var/log/containers/web_ns_a-0123.log" {
		t.Error(got)
	}
	if got := filepath.Base(n.LogLink("ns", strings.Repeat("w", 253), "a", "0123")); len(got) != 255 || !strings.HasSuffix(got, ".log") {
		t.Error(len(got), got)
	}
	p := pod(func(p *v1.Pod) { p.Spec.InitContainers = []v1.Container{{Name: "i"}} })
	if got := Ref(p, "i").FieldPath; got != "spec.initContainers{i}" {
		t.Error(got)
	}
	if got := SignalName(runtimeapi.Signal_SIGRTMAXMINUS2); got != "SIGRTMAX-2" {
		t.Error(got)
	}
	if got := signalName("SIGRTMIN+3"); runtimeapi.Signal_value[got] != int32(runtimeapi.Signal_SIGRTMINPLUS3) {
		t.Error(got)
	}
}
