package config

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/pflag"
)

// load parses args and loads.
func load(t *testing.T, args ...string) (*Config, error) {
	t.Helper()
	var c Config
	fs := pflag.NewFlagSet("run", pflag.ContinueOnError)
	AddFlags(fs, &c)
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	return &c, c.Load()
}

func write(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

const head = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n"
const poddHead = "apiVersion: podd.dev/v1alpha1\nkind: PoddConfiguration\n"

func TestDefaults(t *testing.T) {
	c, err := load(t)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Warnings) != 0 {
		t.Errorf("warnings without any setting: %v", c.Warnings)
	}
	if c.Kubelet.FileCheckFrequency.Duration != 20*time.Second || *c.Kubelet.ContainerLogMaxFiles != 5 || c.LogMaxSize() != 10<<20 ||
		c.Kubelet.PodLogsDir != "/var/log/pods" || c.Kubelet.StaticPodPath != "/etc/kubernetes/manifests" || c.Kubelet.CgroupDriver != "cgroupfs" || *c.Kubelet.ResolverConfig != "/etc/resolv.conf" {
		t.Errorf("upstream's defaults: %+v", c.Kubelet)
	}
	if c.Podd.DataDir != "/var/lib/podd" || c.Podd.CRISocket != "/run/podd/podd.sock" || c.Podd.RootDir != "/var/lib/kubelet" || c.Podd.Instance != "" || c.Podd.NodeName == "" {
		t.Errorf("podd's defaults: %+v", c.Podd)
	}
	if c.LogLevel() != slog.LevelInfo || c.ParallelPulls() != 0 {
		t.Error("derived values")
	}
}

func TestPrecedence(t *testing.T) {
	dir := t.TempDir()
	file := write(t, dir+"/podd.yaml", head+"staticPodPath: manifests\nclusterDomain: file\nclusterDNS: [10.0.0.1, 10.0.0.2]\ncontainerLogMaxFiles: 3\nfileCheckFrequency: 0s\n---\n"+poddHead+"dataDir: /file\nrunDir: run\n")
	write(t, dir+"/d/10-a.conf", head+"clusterDomain: ten\nclusterDNS: [10.0.0.3]\ncontainerLogMaxFiles: 4\n")
	write(t, dir+"/d/20-b.conf", head+"clusterDomain: twenty\n---\n"+poddHead+"dataDir: /twenty\n")
	write(t, dir+"/d/99-not.yaml", "nonsense")
	c, err := load(t, "--config", file, "--config-dir", dir+"/d", "--container-log-max-files=7", "--cgroup_driver", "systemd", "-v", "5")
	if err != nil {
		t.Fatal(err)
	}
	k := c.Kubelet
	if k.ClusterDomain != "twenty" || len(k.ClusterDNS) != 1 || k.ClusterDNS[0] != "10.0.0.3" || *k.ContainerLogMaxFiles != 7 || k.CgroupDriver != "systemd" {
		t.Errorf("precedence: %+v", k)
	}
	if k.StaticPodPath != dir+"/manifests" || c.Podd.RunDir != dir+"/run" || c.Podd.DataDir != "/twenty" {
		t.Errorf("paths: %s %s %s", k.StaticPodPath, c.Podd.RunDir, c.Podd.DataDir)
	}
	if k.FileCheckFrequency.Duration != 20*time.Second {
		t.Errorf("a duration of zero is unset: %v", k.FileCheckFrequency)
	}
	if c.LogLevel() != slog.LevelDebug || len(c.Podd.Instance) != 8 || c.Podd.CRISocket != dir+"/run/podd.sock" {
		t.Errorf("derived: %+v", c.Podd)
	}
	if len(c.Warnings) != 0 {
		t.Errorf("warnings: %v", c.Warnings)
	}
}

func TestWarnings(t *testing.T) {
	dir := t.TempDir()
	file := write(t, dir+"/podd.yaml", head+"maxPods: 110\npodsPerCore: 1234\nevictionHard:\n  memory.available: 5%\nauthentication:\n  anonymous:\n    enabled: false\nfeatureGates: {NodeSwap: true}\n")
	c, err := load(t, "--config", file, "--container-runtime-endpoint=unix:///run/containerd/containerd.sock", "--image-service-endpoint=unix:///x", "--kubeconfig=/etc/kubernetes/kubelet.conf", "--register-with-taints=a=b:NoSchedule", "--housekeeping-interval=1s", "--pods-per-core=99")
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, w := range c.Warnings {
		got[w.Name] = w.Value + " " + w.From
	}
	want := map[string]string{
		"podsPerCore":                   "99 --pods-per-core",
		"evictionHard.memory.available": `"5%" ` + file + ":6",
		"featureGates.NodeSwap":         "true " + file + ":10",
		"imageServiceEndpoint":          `"unix:///x" --image-service-endpoint`,
	}
	for name, v := range want {
		if got[name] != v {
			t.Errorf("%s: got %q, want %q", name, got[name], v)
		}
		delete(got, name)
	}
	for name := range got {
		t.Errorf("a warning too many: %s %s", name, got[name])
	}
	for _, w := range c.Warnings {
		if w.Name == "imageServiceEndpoint" && !strings.Contains(w.String(), "podd is the image service") {
			t.Errorf("reason: %s", w)
		}
	}
}

// What kubeadm 1.36 gives the kubelet must be accepted.
func TestKubeadmFlags(t *testing.T) {
	file := write(t, t.TempDir()+"/config.yaml", head+`authentication:
  anonymous: {enabled: false}
  webhook: {cacheTTL: 0s, enabled: true}
  x509: {clientCAFile: /etc/kubernetes/pki/ca.crt}
authorization:
  mode: Webhook
  webhook: {cacheAuthorizedTTL: 0s, cacheUnauthorizedTTL: 0s}
cgroupDriver: systemd
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
containerRuntimeEndpoint: ""
cpuManagerReconcilePeriod: 0s
crashLoopBackOff: {}
evictionPressureTransitionPeriod: 0s
fileCheckFrequency: 0s
healthzBindAddress: 127.0.0.1
healthzPort: 10248
httpCheckFrequency: 0s
imageMaximumGCAge: 0s
imageMinimumGCAge: 0s
logging: {flushFrequency: 0, options: {json: {infoBufferSize: "0"}, text: {infoBufferSize: "0"}}, verbosity: 0}
memorySwap: {}
nodeStatusReportFrequency: 0s
nodeStatusUpdateFrequency: 0s
rotateCertificates: true
runtimeRequestTimeout: 0s
shutdownGracePeriod: 0s
shutdownGracePeriodCriticalPods: 0s
staticPodPath: /etc/kubernetes/manifests
streamingConnectionIdleTimeout: 0s
syncFrequency: 0s
volumeStatsAggPeriod: 0s
`)
	_, err := load(t, "--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf", "--kubeconfig=/etc/kubernetes/kubelet.conf", "--config="+file,
		"--container-runtime-endpoint=unix:///var/run/containerd/containerd.sock", "--node-ip=10.1.2.3", "--hostname-override=Node-1", "--pod-infra-container-image=x")
	if err == nil || !strings.Contains(err.Error(), "pod-infra-container-image") {
		t.Errorf("a flag that 1.36 does not have: %v", err)
	}
	c, err := load(t, "--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf", "--kubeconfig=/etc/kubernetes/kubelet.conf", "--config="+file,
		"--container-runtime-endpoint=unix:///var/run/containerd/containerd.sock", "--node-ip=10.1.2.3", "--hostname-override=Node-1")
	if err != nil {
		t.Fatal(err)
	}
	if c.Podd.NodeName != "node-1" || c.Podd.NodeIPs[0] != "10.1.2.3" || c.Kubelet.StaticPodPath != "/etc/kubernetes/manifests" || c.Kubelet.RuntimeRequestTimeout.Duration != 2*time.Minute {
		t.Errorf("%+v %+v", c.Podd, c.Kubelet)
	}
	for _, w := range c.Warnings {
		switch w.Name {
		case "authentication.x509.clientCAFile", "containerRuntimeEndpoint":
		default:
			t.Errorf("warning about a default: %s", w)
		}
	}
}

func TestErrorsNameFileLineAndField(t *testing.T) {
	for name, c := range map[string]struct {
		file string
		args []string
		want []string
	}{
		"unknown field":      {head + "maxPods: 1\nmaxPodz: 2\n", nil, []string{"podd.yaml: line 4: maxPodz: unknown field", "did you mean maxPods?"}},
		"unknown podd field": {head + "---\n" + poddHead + "dataDirectory: /x\n", nil, []string{"line 6: dataDirectory"}},
		"wrong type":         {head + "maxPods: many\n", nil, []string{"line 3: maxPods: is a string"}},
		"wrong kind":         {"apiVersion: v1\nkind: Pod\n", nil, []string{"line 2: kind", "PoddConfiguration"}},
		"empty":              {"# nothing\n", nil, []string{"is empty"}},
		"bad duration":       {head + "syncFrequency: often\n", nil, []string{"line 3: syncFrequency"}},
		"bad value":          {head + "cgroupDriver: docker\n", nil, []string{"podd.yaml:3: cgroupDriver", "cgroupfs or systemd"}},
		"bad flag value":     {head, []string{"--cgroup-driver=docker"}, []string{"--cgroup-driver: cgroupDriver"}},
		"bad flag text":      {head, []string{"--max-pods=many"}, []string{"max-pods", "whole number"}},
		"unknown flag":       {head, []string{"--no-such-flag"}, []string{"no-such-flag"}},
		"bad instance":       {head + "---\n" + poddHead + "instance: Much-Too-Long\n", nil, []string{"instance"}},
		"root as data dir":   {head, []string{"--data-dir=/"}, []string{"--data-dir: dataDir"}},
	} {
		t.Run(name, func(t *testing.T) {
			file := write(t, t.TempDir()+"/podd.yaml", c.file)
			_, err := load(t, append([]string{"--config", file}, c.args...)...)
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v\nlacks %q", err, want)
				}
			}
		})
	}
	if _, err := load(t, "--config", "/no/such/file"); err == nil || !strings.Contains(err.Error(), "/no/such/file") {
		t.Errorf("missing file: %v", err)
	}
	file := write(t, t.TempDir()+"/podd.yaml", head+"cgroupDriver: docker\n")
	if _, err := load(t, "--config", file); !errdefs.IsInvalidArgument(err) {
		t.Errorf("class of the error: %v", err)
	}
}

// Every flag's target must exist, or a value given would be lost silently.
func TestFlagTargets(t *testing.T) {
	for _, d := range append(append([]flagDef{}, upstreamFlags...), poddFlags...) {
		text := map[kind]string{kindString: "x1", kindIP: "10.0.0.1", kindBool: "true", kindInt: "3", kindDuration: "17s", kindList: "10.0.0.1", kindMap: "k=v", kindBoolMap: "k=true", kindThresholds: "k<1", kindOpaque: "x"}[d.kind]
		value, err := parseFlag(d.kind, text)
		if err != nil {
			t.Fatalf("%s: %v", d.name, err)
		}
		s := settings{}
		var into any
		switch {
		case d.field != "":
			set(s, d.field, value)
			into = kubeletInto()
		case d.podd != "":
			set(s, d.podd, value)
			into = &PoddConfiguration{}
		default:
			continue
		}
		if d.kind == kindOpaque {
			continue
		}
		if d.name == "log-text-info-buffer-size" {
			set(s, d.field, "1Ki")
		}
		if err := decodeStrict(s, into); err != nil {
			t.Errorf("--%s sets %s%s: %v", d.name, d.field, d.podd, err)
		}
	}
	for _, d := range upstreamFlags {
		if (d.field != "" && isHonoured(d.field)) != (usages[d.name] != "") {
			t.Errorf("--%s: help and effect differ", d.name)
		}
	}
	for _, name := range honoured {
		s := settings{}
		set(s, name, nil)
		err := decodeStrict(s, kubeletInto())
		if err != nil {
			set(s, name, "1s") // a duration is never null
			err = decodeStrict(s, kubeletInto())
		}
		if err != nil {
			t.Errorf("honoured: %s: %v", name, err)
		}
	}
}

// What is wrong stands in one line for each problem, and the kind of error in
// no line of its own.
func TestErrorOfAFileIsOneLineAProblem(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(path, []byte(head+"maxPodz: 1\nevictionHrd: {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var cfg Config
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	AddFlags(flags, &cfg)
	if err := flags.Parse([]string{"--config", path}); err != nil {
		t.Fatal(err)
	}
	err := cfg.Load()
	if !errdefs.IsInvalidArgument(err) {
		t.Fatalf("error %v", err)
	}
	if lines := strings.Split(err.Error(), "\n"); len(lines) != 2 || !strings.Contains(lines[0], "evictionHrd") || !strings.Contains(lines[1], "maxPodz") {
		t.Errorf("error\n%v", err)
	}
}

// A file that is no configuration ends the start with a word, not with the
// node's memory.
func TestConfigurationIsBounded(t *testing.T) {
	bomb := "a0: &a0 [lol, lol]\n"
	for i := 1; i < 40; i++ {
		bomb += fmt.Sprintf("a%d: &a%d [*a%d, *a%d]\n", i, i, i-1, i-1)
	}
	path := filepath.Join(t.TempDir(), "bomb.yaml")
	if err := os.WriteFile(path, []byte(bomb), 0o600); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{"/dev/zero": "larger than 1 MiB", path: "larger than 10 MiB"} {
		if _, err := load(t, "--config", file); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", file, err)
		}
	}
}
