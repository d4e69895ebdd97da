package cri

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// age words a time in the past.
func age(ns int64) string {
	return fmt.Sprintf("%s (%s ago)", time.Unix(0, ns).UTC().Format(time.RFC3339), time.Since(time.Unix(0, ns)).Round(time.Second))
}

func (sb *sandbox) criState() runtimeapi.PodSandboxState {
	if sb.ready {
		return runtimeapi.PodSandboxState_SANDBOX_READY
	}
	return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
}

// criStatus is the sandbox as PodSandboxStatus shows it.
func (sb *sandbox) criStatus() *runtimeapi.PodSandboxStatus {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	ns := sb.namespaces()
	st := &runtimeapi.PodSandboxStatus{
		Id: sb.id, Metadata: sb.config.GetMetadata(), State: sb.criState(), CreatedAt: sb.createdAt,
		Network: &runtimeapi.PodSandboxNetworkStatus{},
		Linux: &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: &runtimeapi.NamespaceOption{
			Network: ns.GetNetwork(), Pid: ns.GetPid(), Ipc: ns.GetIpc(), UsernsOptions: ns.GetUsernsOptions(),
		}}},
		Labels: sb.config.GetLabels(), Annotations: sb.config.GetAnnotations(), RuntimeHandler: sb.handler,
	}
	if sb.network != nil && len(sb.network.IPs) > 0 && !sb.detached {
		st.Network.Ip = sb.network.IPs[0]
		for _, ip := range sb.network.IPs[1:] {
			st.Network.AdditionalIps = append(st.Network.AdditionalIps, &runtimeapi.PodIP{Ip: ip})
		}
	}
	return st
}

// PodSandboxStatus returns one sandbox with the statuses of its containers.
func (s *Service) PodSandboxStatus(_ context.Context, r *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	sb, err := s.objects.sandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.PodSandboxStatusResponse{
		Status: sb.criStatus(), ContainersStatuses: s.containerStatuses(sb.id), Timestamp: now(),
	}
	if r.GetVerbose() {
		if resp.Info, err = s.sandboxInfo(sb); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// sandboxInfo is what crictl inspectp shows beyond the status.
func (s *Service) sandboxInfo(sb *sandbox) (map[string]string, error) {
	sb.mu.Lock()
	info := struct {
		PID            int                          `json:"pid"`
		ProcessStatus  string                       `json:"processStatus"`
		NetnsPath      string                       `json:"netNamespacePath,omitempty"`
		NetnsClosed    bool                         `json:"netNamespaceClosed"`
		RuntimeHandler string                       `json:"runtimeHandler"`
		CgroupPath     string                       `json:"cgroupPath"`
		Config         *runtimeapi.PodSandboxConfig `json:"config"`
		Interfaces     map[string]string            `json:"interfaces,omitempty"`
	}{
		PID: sb.pid, ProcessStatus: "stopped", NetnsClosed: sb.detached, RuntimeHandler: sb.handler,
		CgroupPath: s.cgroupPath(sb.config, sb.id), Config: sb.config,
	}
	if sb.ready {
		info.ProcessStatus = "running"
	}
	if !sb.hostNetwork() {
		info.NetnsPath = s.netnsPath(sb.id)
	}
	if sb.network != nil {
		info.Interfaces = sb.network.Interfaces
	}
	sb.mu.Unlock()
	return infoMap(info)
}

func infoMap(v any) (map[string]string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode verbose info: %w", err)
	}
	return map[string]string{"info": string(b)}, nil
}

// ListPodSandbox returns the sandboxes that match the filter.
func (s *Service) ListPodSandbox(_ context.Context, r *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{Items: s.listSandboxes(r.GetFilter())}, nil
}

func (s *Service) listSandboxes(f *runtimeapi.PodSandboxFilter) []*runtimeapi.PodSandbox {
	all := s.objects.allSandboxes()
	items := make([]*runtimeapi.PodSandbox, 0, len(all))
	for _, sb := range all {
		if !strings.HasPrefix(sb.id, f.GetId()) || !matches(f.GetLabelSelector(), sb.config.GetLabels()) {
			continue
		}
		sb.mu.Lock()
		state := sb.criState()
		sb.mu.Unlock()
		if f.GetState() != nil && f.GetState().GetState() != state {
			continue
		}
		items = append(items, &runtimeapi.PodSandbox{
			Id: sb.id, Metadata: sb.config.GetMetadata(), State: state, CreatedAt: sb.createdAt,
			Labels: sb.config.GetLabels(), Annotations: sb.config.GetAnnotations(), RuntimeHandler: sb.handler,
		})
	}
	slices.SortFunc(items, func(a, b *runtimeapi.PodSandbox) int {
		return cmp.Or(cmp.Compare(b.CreatedAt, a.CreatedAt), strings.Compare(a.Id, b.Id))
	})
	return items
}

// matches says whether labels have every pair of selector.
func matches(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}
