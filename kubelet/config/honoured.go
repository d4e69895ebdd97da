package config

import (
	"fmt"
	"net"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"
)

// honoured are the fields of the KubeletConfiguration that podd acts on; a name
// stands for all below it. Whoever makes podd act on another one adds it here:
// all others warn when they are set.
var honoured = []string{
	"address",
	"allowedUnsafeSysctls",
	"authentication",
	"authorization",
	"cgroupDriver",
	"cgroupRoot",
	"clusterDNS",
	"clusterDomain",
	"containerLogMaxFiles",
	"containerLogMaxSize",
	"cpuCFSQuota",
	"cpuCFSQuotaPeriod",
	"crashLoopBackOff",
	"enableContentionProfiling",
	"enableDebugFlagsHandler",
	"enableDebuggingHandlers",
	"enableProfilingHandler",
	"enableServer",
	"enableSystemLogHandler",
	"featureGates.KubeletCrashLoopBackOffMax",
	"featureGates.MemoryQoS",
	"featureGates.ReduceDefaultCrashLoopBackOffDecay",
	"eventBurst",
	"eventRecordQPS",
	"fileCheckFrequency",
	"healthzBindAddress",
	"healthzPort",
	"imageGCHighThresholdPercent",
	"imageGCLowThresholdPercent",
	"imageMaximumGCAge",
	"imageMinimumGCAge",
	"kubeAPIBurst",
	"kubeAPIQPS",
	"kubeReserved",
	"logging.format",
	"logging.verbosity",
	"maxParallelImagePulls",
	"memoryReservationPolicy",
	"memorySwap",
	"memoryThrottlingFactor",
	"maxPods",
	"nodeLeaseDurationSeconds",
	"nodeStatusMaxImages",
	"nodeStatusReportFrequency",
	"nodeStatusUpdateFrequency",
	"podCIDR",
	"podLogsDir",
	"podPidsLimit",
	"port",
	"readOnlyPort",
	"registerNode",
	"registerWithTaints",
	"resolvConf",
	"rotateCertificates",
	"runtimeRequestTimeout",
	"seccompDefault",
	"serializeImagePulls",
	"shutdownGracePeriod",
	"shutdownGracePeriodByPodPriority",
	"shutdownGracePeriodCriticalPods",
	"serverTLSBootstrap",
	"singleProcessOOMKill",
	"staticPodPath",
	"streamingConnectionIdleTimeout",
	"tlsCertFile",
	"tlsCipherSuites",
	"tlsMinVersion",
	"tlsPrivateKeyFile",
	"systemReserved",
	"userNamespaces",
}

// usages are the help of upstream's flags that podd acts on. The others are
// accepted and not shown.
var usages = map[string]string{
	"address":                                      "address of the kubelet API (default 0.0.0.0)",
	"allowed-unsafe-sysctls":                       "sysctls that pods may set besides the safe ones; * at the end stands for more",
	"anonymous-auth":                               "let callers without credentials be system:anonymous (default false)",
	"authentication-token-webhook":                 "have the cluster review bearer tokens",
	"authentication-token-webhook-cache-ttl":       "how long a review of a token counts (default 2m0s)",
	"authorization-mode":                           "AlwaysAllow, or Webhook: have the cluster review access",
	"authorization-webhook-cache-authorized-ttl":   "how long a permission counts (default 5m0s)",
	"authorization-webhook-cache-unauthorized-ttl": "how long a refusal counts (default 30s)",
	"cgroup-driver":                                "cgroupfs or systemd (default cgroupfs)",
	"cgroup-root":                                  "cgroup that holds the pods' groups (default: the root)",
	"client-ca-file":                               "CAs of the kubelet API's client certificates",
	"cluster-dns":                                  "name servers for pods with dnsPolicy ClusterFirst",
	"cluster-domain":                               "domain of the cluster, for the pods' resolv.conf",
	"container-log-max-files":                      "log files kept for each container, the current one included (default 5)",
	"container-log-max-size":                       "size at which a container's log is rotated (default 10Mi)",
	"contention-profiling":                         "profile what goroutines block on (default false)",
	"cpu-cfs-quota":                                "enforce CPU limits (default true)",
	"cpu-cfs-quota-period":                         "period of the CPU quota (default 100ms)",
	"enable-debugging-handlers":                    "serve logs, exec, attach, port-forward and pprof (default true)",
	"enable-server":                                "serve the kubelet API (default true)",
	"event-burst":                                  "events sent to the apiserver at once at most (default 100)",
	"event-qps":                                    "events sent to the apiserver a second; 0: no limit (default 50)",
	"file-check-frequency":                         "time between two full looks at the manifests; changes are seen at once (default 20s)",
	"healthz-bind-address":                         "address of /healthz (default 127.0.0.1)",
	"healthz-port":                                 "port of /healthz; 0: none (default 10248)",
	"image-gc-high-threshold":                      "use of the image disk, in percent, at which unused images are removed; 100: never (default 85)",
	"image-gc-low-threshold":                       "use of the image disk down to which they are removed (default 80)",
	"minimum-image-ttl-duration":                   "age below which an unused image stays (default 2m0s)",
	"kube-api-burst":                               "requests to the apiserver at once at most (default 100)",
	"kube-api-qps":                                 "requests to the apiserver a second (default 50)",
	"kube-reserved":                                "resources kept from pods for the node agent, as cpu=200m,memory=500Mi",
	"logging-format":                               "text or json (default text)",
	"max-pods":                                     "pods that the node takes in a cluster (default 110)",
	"node-status-max-images":                       "images listed in the Node's status; -1: all (default 50)",
	"node-status-update-frequency":                 "time between two looks at what the Node's status should say (default 10s)",
	"pod-cidr":                                     "addresses of the built-in network (default: a free range)",
	"pod-manifest-path":                            "directory of manifests, or one file (default /etc/kubernetes/manifests)",
	"pod-max-pids":                                 "processes of one pod at most; -1: no limit (default -1)",
	"port":                                         "port of the kubelet API (default 10250)",
	"read-only-port":                               "port without authentication, for reading (default: none)",
	"register-node":                                "register the Node at the apiserver (default true)",
	"resolv-conf":                                  "the host's name servers for pods (default /etc/resolv.conf)",
	"rotate-certificates":                          "renew the node's client certificate before it ends (default false)",
	"rotate-server-certificates":                   "have the certificate of the node's API signed by the cluster (default false)",
	"runtime-request-timeout":                      "time for one request of the runtime (default 2m0s)",
	"serialize-image-pulls":                        "pull one image at a time (default false)",
	"streaming-connection-idle-timeout":            "end streams that carry nothing for so long (default 4h0m0s)",
	"system-reserved":                              "resources kept from pods for the system, as cpu=200m,memory=500Mi",
	"tls-cert-file":                                "serving certificate of the kubelet API (default: self-signed)",
	"tls-cipher-suites":                            "cipher suites of TLS below 1.3",
	"tls-min-version":                              "least version of TLS",
	"tls-private-key-file":                         "its key",
	"v":                                            "level of the log; 4 and up: debug (default 0)",
}

// reasons are given where "not yet" is not the reason.
var reasons = map[string]string{
	"containerRuntimeEndpoint":    "podd is the container runtime",
	"imageServiceEndpoint":        "podd is the image service",
	"cgroupsPerQOS":               "pods always have their QoS groups",
	"failCgroupV1":                "podd runs on cgroup v1 and v2",
	"runOnce":                     "removed upstream",
	"containerLogMaxWorkers":      "the writer rotates its log",
	"containerLogMonitorInterval": "the writer rotates its log",
	"volumePluginDir":             "FlexVolume is deprecated upstream",
	"cloud-provider":              "a cloud's own controller does this",
	"containerd":                  "podd is the container runtime",
}

func reason(field string) string {
	for name := field; ; {
		if r, ok := reasons[name]; ok {
			return r
		}
		dot := strings.LastIndexByte(name, '.')
		if dot < 0 {
			return "not supported yet"
		}
		name = name[:dot]
	}
}

func isHonoured(field string) bool {
	return slices.ContainsFunc(honoured, func(name string) bool {
		return field == name || strings.HasPrefix(field, name+".")
	})
}

var instanceName = regexp.MustCompile(`^[a-z0-9]{0,8}$`)

// checkImageGC is upstream's validation.
func (c *Config) checkImageGC(bad func(field, format string, args ...any) error) error {
	k := &c.Kubelet
	for field, n := range map[string]int32{"kubelet.imageGCHighThresholdPercent": *k.ImageGCHighThresholdPercent, "kubelet.imageGCLowThresholdPercent": *k.ImageGCLowThresholdPercent} {
		if n < 0 || n > 100 {
			return bad(field, "%d: want 0 to 100", n)
		}
	}
	if low, high := *k.ImageGCLowThresholdPercent, *k.ImageGCHighThresholdPercent; low >= high {
		return bad("kubelet.imageGCLowThresholdPercent", "%d: want less than imageGCHighThresholdPercent, %d", low, high)
	}
	least, most := k.ImageMinimumGCAge.Duration, k.ImageMaximumGCAge.Duration
	if least < 0 {
		return bad("kubelet.imageMinimumGCAge", "%s is negative", least)
	}
	if most < 0 || most > 0 && most <= least {
		return bad("kubelet.imageMaximumGCAge", "%s: want more than imageMinimumGCAge, %s, or 0s", most, least)
	}
	return nil
}

// check refuses values that cannot work.
func (c *Config) check(l *loader) error {
	bad := func(field, format string, args ...any) error {
		where := l.from[field]
		_, name, _ := strings.Cut(field, ".")
		if where == "" {
			where = "configuration"
		}
		return fmt.Errorf("%s: %s: %s: %w", where, name, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	k, p := &c.Kubelet, &c.Podd
	if _, err := parseTaints(p.RegisterWithTaints); err != nil {
		return bad("podd.registerWithTaints", "%v", err)
	}
	for field, reserved := range map[string]map[string]string{"kubelet.kubeReserved": k.KubeReserved, "kubelet.systemReserved": k.SystemReserved} {
		for name, text := range reserved {
			if _, err := resource.ParseQuantity(text); err != nil {
				return bad(field, "%s=%s is no quantity", name, text)
			}
		}
	}
	if d := k.CgroupDriver; d != "cgroupfs" && d != "systemd" {
		return bad("kubelet.cgroupDriver", "%q: want cgroupfs or systemd", d)
	}
	if q, err := resource.ParseQuantity(k.ContainerLogMaxSize); err != nil || q.Sign() <= 0 {
		return bad("kubelet.containerLogMaxSize", "%q: want a size such as 10Mi", k.ContainerLogMaxSize)
	}
	if n := k.ContainerLogMaxFiles; n != nil && *n < 2 {
		return bad("kubelet.containerLogMaxFiles", "%d: want 2 or more", *n)
	}
	if k.FileCheckFrequency.Duration < 0 {
		return bad("kubelet.fileCheckFrequency", "%s is negative", k.FileCheckFrequency.Duration)
	}
	if k.RuntimeRequestTimeout.Duration < 0 {
		return bad("kubelet.runtimeRequestTimeout", "%s is negative", k.RuntimeRequestTimeout.Duration)
	}
	if n := k.PodPidsLimit; n != nil && *n < -1 {
		return bad("kubelet.podPidsLimit", "%d: want -1 for no limit, or a number", *n)
	}
	if n := k.MaxParallelImagePulls; n != nil && *n < 1 {
		return bad("kubelet.maxParallelImagePulls", "%d: want 1 or more", *n)
	}
	if n := k.MaxParallelImagePulls; n != nil && *n > 1 && k.SerializeImagePulls != nil && *k.SerializeImagePulls && l.from["kubelet.serializeImagePulls"] != "" {
		return bad("kubelet.maxParallelImagePulls", "%d contradicts serializeImagePulls", *n)
	}
	if err := c.checkImageGC(bad); err != nil {
		return err
	}
	if f := k.Logging.Format; f != "text" && f != "json" {
		return bad("kubelet.logging.format", "%q: want text or json", f)
	}
	// As upstream validates them.
	for name, d := range map[string]time.Duration{"shutdownGracePeriod": k.ShutdownGracePeriod.Duration, "shutdownGracePeriodCriticalPods": k.ShutdownGracePeriodCriticalPods.Duration} {
		if d < 0 || d > 0 && d < time.Second {
			return bad("kubelet."+name, "%s: want 0s or at least 1s", d)
		}
	}
	if all, critical := k.ShutdownGracePeriod.Duration, k.ShutdownGracePeriodCriticalPods.Duration; critical > all {
		return bad("kubelet.shutdownGracePeriodCriticalPods", "%s is more than shutdownGracePeriod, %s, of which it is a part", critical, all)
	} else if all > 0 && len(k.ShutdownGracePeriodByPodPriority) > 0 {
		return bad("kubelet.shutdownGracePeriodByPodPriority", "takes the place of shutdownGracePeriod and shutdownGracePeriodCriticalPods: set those to 0s")
	}
	for _, s := range k.ShutdownGracePeriodByPodPriority {
		if s.ShutdownGracePeriodSeconds < 0 {
			return bad("kubelet.shutdownGracePeriodByPodPriority", "shutdownGracePeriodSeconds: %d is negative", s.ShutdownGracePeriodSeconds)
		}
	}
	for _, ip := range k.ClusterDNS {
		if net.ParseIP(ip) == nil {
			return bad("kubelet.clusterDNS", "%q is not an IP address", ip)
		}
	}
	if d := k.CrashLoopBackOff.MaxContainerRestartPeriod; d != nil && (d.Seconds() < 1 || d.Seconds() > 300) {
		return bad("kubelet.crashLoopBackOff.maxContainerRestartPeriod", "%s: want 1s to 300s", d.Duration)
	}
	if b := k.MemorySwap.SwapBehavior; b != "" && b != "NoSwap" && b != "LimitedSwap" {
		return bad("kubelet.memorySwap.swapBehavior", "%q: want NoSwap or LimitedSwap", b)
	}
	if f := k.MemoryThrottlingFactor; f != nil && (*f <= 0 || *f > 1) {
		return bad("kubelet.memoryThrottlingFactor", "%v: want more than 0 and at most 1", *f)
	}
	if m := k.MemoryReservationPolicy; m != "" && m != "None" && m != "TieredReservation" {
		return bad("kubelet.memoryReservationPolicy", "%q: want None or TieredReservation", m)
	}
	if n := c.UserIDsPerPod(); n < 0 || n%65536 != 0 {
		return bad("kubelet.userNamespaces.idsPerPod", "%d: want a multiple of 65536", n)
	}
	for _, ip := range p.NodeIPs {
		if net.ParseIP(ip) == nil {
			return bad("podd.nodeIPs", "%q is not an IP address", ip)
		}
	}
	if errs := validation.IsDNS1123Subdomain(p.NodeName); errs != nil {
		return bad("podd.nodeName", "%q: %s", p.NodeName, errs[0])
	}
	if !instanceName.MatchString(p.Instance) {
		return bad("podd.instance", "%q: want at most 8 small letters and digits", p.Instance)
	}
	for field, dir := range map[string]string{"podd.dataDir": p.DataDir, "podd.runDir": p.RunDir, "podd.rootDir": p.RootDir} {
		if dir == "/" || dir == "" {
			return bad(field, "%q cannot be the directory", dir)
		}
	}
	return nil
}
