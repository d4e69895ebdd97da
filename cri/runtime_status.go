package cri

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	runtimeName = "podd"
	handlerName = "podd" // the RuntimeClass handler that means the same as ""
	apiVersion  = "v1"
	// readyTimeout bounds what Status asks of others; the kubelet calls it
	// every few seconds and must not wait for a stuck part.
	readyTimeout = 5 * time.Second
)

// Version names the runtime.
func (s *Service) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version:     "0.1.0", // of the kubelet's own client API, fixed since dockershim
		RuntimeName: runtimeName, RuntimeVersion: s.cfg.Version, RuntimeApiVersion: apiVersion,
	}, nil
}

// Status says whether pods can be run now, and what the handlers can do.
func (s *Service) Status(ctx context.Context, r *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	runtimeReady := &runtimeapi.RuntimeCondition{Type: runtimeapi.RuntimeReady, Status: true}
	info, err := s.procs.Info(ctx)
	if err != nil {
		runtimeReady.Status, runtimeReady.Reason, runtimeReady.Message = false, "ShimNotReady", "podd-shim does not answer: "+err.Error()
	}
	networkReady := &runtimeapi.RuntimeCondition{Type: runtimeapi.NetworkReady, Status: true}
	if err := s.network.Ready(ctx); err != nil {
		networkReady.Status, networkReady.Reason, networkReady.Message = false, "NetworkPluginNotReady", err.Error()
	}
	features := &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: s.host.rro, UserNamespaces: s.host.userns}
	resp := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{runtimeReady, networkReady}},
		RuntimeHandlers: []*runtimeapi.RuntimeHandler{
			{Name: "", Features: features}, {Name: handlerName, Features: features},
		},
		Features: &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true, UserNamespacesHostNetwork: true},
	}
	if !r.GetVerbose() {
		return resp, nil
	}
	config, err := infoMap(map[string]any{
		"dataDir": s.cfg.DataDir, "runDir": s.cfg.RunDir, "systemdCgroup": s.cfg.SystemdCgroup,
		"cgroupParent": s.cfg.CgroupParent, "cdiSpecDirs": s.cfg.CDIDirs, "logMaxSize": s.cfg.LogMaxSize, "logMaxFiles": s.cfg.LogMaxFiles,
	})
	if err != nil {
		return nil, err
	}
	resp.Info = map[string]string{"config": config["info"]}
	if info != nil {
		shimInfo, err := infoMap(info)
		if err != nil {
			return nil, err
		}
		resp.Info["shim"] = shimInfo["info"]
	}
	return resp, nil
}

// RuntimeConfig tells the kubelet which cgroup driver to use.
func (s *Service) RuntimeConfig(context.Context, *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	driver := runtimeapi.CgroupDriver_CGROUPFS
	if s.cfg.SystemdCgroup {
		driver = runtimeapi.CgroupDriver_SYSTEMD
	}
	return &runtimeapi.RuntimeConfigResponse{Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: driver}}, nil
}

// UpdateRuntimeConfig takes the pod address range that the cluster gave this node.
func (s *Service) UpdateRuntimeConfig(ctx context.Context, r *runtimeapi.UpdateRuntimeConfigRequest) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	cidr := r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr()
	if cidr == "" {
		return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
	}
	if len(cidr) > maxName {
		return nil, invalid("runtime_config.network_config.pod_cidr: %d bytes", len(cidr))
	}
	for _, c := range splitComma(cidr) {
		if _, _, err := net.ParseCIDR(c); err != nil {
			return nil, invalid("runtime_config.network_config.pod_cidr: %v", err)
		}
	}
	if err := s.network.SetPodCIDR(ctx, cidr); err != nil {
		return nil, fmt.Errorf("set pod CIDR %s: %w", cidr, err)
	}
	return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
}

func splitComma(s string) []string {
	var out []string
	for start, i := 0, 0; i <= len(s); i++ {
		if i == len(s) || s[i] == ',' {
			out = append(out, s[start:i])
			start = i + 1
		}
	}
	return out
}

// CheckpointContainer is not there: checkpoint archives are untrusted input to
// a program that runs as root (see CVE-2026-53492), and CRIU is not a part of
// podd.
func (s *Service) CheckpointContainer(context.Context, *runtimeapi.CheckpointContainerRequest) (*runtimeapi.CheckpointContainerResponse, error) {
	return nil, fmt.Errorf("checkpoint: CRIU is not supported by this runtime: %w", errdefs.ErrNotImplemented)
}
