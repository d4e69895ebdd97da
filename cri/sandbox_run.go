package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/shim"
)

// sandboxOOMScoreAdj is the pause process' score: upstream's, so that a pod's
// namespaces are among the last things that the OOM killer takes.
const sandboxOOMScoreAdj = -998

// sandboxCPUShares of the pause process, the kernel's minimum.
const sandboxCPUShares = 2

// RunPodSandbox makes a pod's namespaces and its network. A repeated request
// joins the one that runs, or returns the ready sandbox it made.
func (s *Service) RunPodSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	if err := validateSandbox(r); err != nil {
		return nil, err
	}
	s.warm.WarmFor(joinsNear)
	name := sandboxName(r.GetConfig().GetMetadata())
	id, err := s.creates.do(ctx, name, func(ctx context.Context, a *attempt) (string, error) {
		if id, done, err := s.madeSandbox(name, r); done {
			return id, err
		}
		return s.runSandbox(ctx, a, r)
	})
	if err != nil {
		return nil, fmt.Errorf("run pod sandbox %s: %w", clip(name), err)
	}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// madeSandbox answers a request whose sandbox is already there: its client
// did not get the first answer.
func (s *Service) madeSandbox(name string, r *runtimeapi.RunPodSandboxRequest) (id string, done bool, err error) {
	id, ok := s.objects.named(name)
	if !ok {
		return "", false, nil
	}
	sb, err := s.objects.sandbox(id)
	if err != nil {
		return "", false, nil // removed meanwhile
	}
	_, ready := sb.isReady()
	if ready && proto.Equal(sb.config, r.GetConfig()) && sb.handler == r.GetRuntimeHandler() {
		return id, true, nil
	}
	state := "not ready"
	if ready {
		state = "ready with another config"
	}
	return "", true, fmt.Errorf("sandbox %s of this attempt is %s since %s: remove it, or raise metadata.attempt: %w",
		id, state, age(sb.createdAt), errdefs.ErrAlreadyExists)
}

// runSandbox is the list of what makes a sandbox. The files and the process
// need nothing of each other and are made at the same time.
func (s *Service) runSandbox(ctx context.Context, a *attempt, r *runtimeapi.RunPodSandboxRequest) (_ string, err error) {
	sb := newSandbox(newID(), proto.CloneOf(r.GetConfig()), r.GetRuntimeHandler(), now())
	var u undo
	defer func() { s.left.add(u.run(ctx, s.log)) }()

	a.stage("prepare sandbox files and process")
	u.push("sandbox files", func(context.Context) error { return s.dropSandboxFiles(sb.id) })
	files := make(chan error, 1)
	go func() { files <- s.makeSandboxFiles(sb) }()
	u.push("sandbox process", func(ctx context.Context) error { return s.procs.DeleteSandbox(ctx, sb.id) })
	p, err := s.startPause(ctx, sb)
	if ferr := <-files; err == nil && ferr != nil {
		err = ferr
	}
	if err != nil {
		return "", err
	}
	sb.pid = p.PID
	sb.startedAt = p.StartedAt.UnixNano()

	if !sb.hostNetwork() {
		a.stage("pin network namespace")
		u.push("network namespace", func(context.Context) error { return unpin(s.netnsPath(sb.id)) })
		if err := pin(fmt.Sprintf("/proc/%d/ns/net", p.PID), s.netnsPath(sb.id)); err != nil {
			return "", err
		}
		a.stage("attach network")
		pod := s.netPod(sb)
		u.push("network", func(ctx context.Context) error { return s.network.Detach(ctx, pod) })
		if sb.network, err = s.network.Attach(ctx, pod); err != nil {
			return "", err
		}
	}

	a.stage("record sandbox")
	if err := ctx.Err(); err != nil {
		return "", err
	}
	sb.ready = true
	if err := s.saveSandbox(sb); err != nil {
		return "", err
	}
	u.release()
	s.objects.addSandbox(sb)
	s.events.emit(event{id: sb.id, sandboxID: sb.id, kind: runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT})
	s.events.emit(event{id: sb.id, sandboxID: sb.id, kind: runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT})
	s.log.Info("sandbox ready", "sandbox", sb.id, "pod", sb.config.GetMetadata().GetName(),
		"namespace", sb.config.GetMetadata().GetNamespace(), "pid", sb.pid)
	return sb.id, nil
}

// startPause starts the process that holds the namespaces.
func (s *Service) startPause(ctx context.Context, sb *sandbox) (*shim.Process, error) {
	spec, err := s.pauseSpec(sb)
	if err != nil {
		return nil, err
	}
	return s.procs.CreateSandbox(ctx, spec)
}

// pauseSpec says which namespaces the pod has. The UTS namespace goes with the
// network: a pod on the node's network has the node's name, as upstream has it.
func (s *Service) pauseSpec(sb *sandbox) (*shim.SandboxSpec, error) {
	ns := sb.namespaces()
	sec := sb.config.GetLinux().GetSecurityContext()
	shares := uint64(sandboxCPUShares)
	spec := &shim.SandboxSpec{
		ID:            sb.id,
		CgroupPath:    s.cgroupPath(sb.config, sb.id),
		SystemdCgroup: s.cfg.SystemdCgroup,
		Resources:     &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &shares}},
		Sysctls:       sb.config.GetLinux().GetSysctls(),
		OOMScoreAdj:   sandboxOOMScoreAdj,
	}
	if !sb.hostNetwork() {
		spec.Namespaces = append(spec.Namespaces, specs.NetworkNamespace, specs.UTSNamespace)
		spec.Hostname = sb.config.GetHostname()
		if spec.Hostname == "" {
			spec.Hostname, _ = os.Hostname()
		}
	}
	if ns.GetIpc() != runtimeapi.NamespaceMode_NODE {
		spec.Namespaces = append(spec.Namespaces, specs.IPCNamespace)
	}
	// With pid CONTAINER every container gets a namespace of its own; the
	// pause has one too, which nothing joins: it then cannot see the node's.
	if ns.GetPid() != runtimeapi.NamespaceMode_NODE {
		spec.Namespaces = append(spec.Namespaces, specs.PIDNamespace)
	}
	uids, gids, err := userMappings(ns.GetUsernsOptions())
	if err != nil {
		return nil, err
	}
	if uids != nil {
		spec.Namespaces = append(spec.Namespaces, specs.UserNamespace)
		spec.UIDMappings, spec.GIDMappings = uids, gids
	}
	if sb.label, _, err = s.selinuxLabels(sec.GetSelinuxOptions(), ""); err != nil {
		return nil, err
	}
	if !sec.GetPrivileged() {
		spec.SELinuxLabel = sb.label
	}
	slices.Sort(spec.Namespaces)
	return spec, nil
}

// pin keeps a namespace alive by a bind mount at path.
func pin(ns, path string) error {
	fd, err := unix.Open(path, unix.O_CREAT|unix.O_EXCL|unix.O_RDONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("create %s: %w", path, err)
	}
	_ = unix.Close(fd)
	if err := unix.Mount(ns, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s to %s: %w", ns, path, err)
	}
	return nil
}

// unpin removes what pin made, or what is there of it.
func unpin(path string) error {
	if err := unmount(path); err != nil {
		return err
	}
	if err := unix.Unlink(path); err != nil && err != unix.ENOENT {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}

// unmount detaches the mount at path; nothing mounted there is fine.
func unmount(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}

// dropSandboxFiles removes a sandbox' directories with its shared memory. They
// are the service's own and containers see files of them, never a directory,
// so there is nothing in them that a container could have made.
func (s *Service) dropSandboxFiles(id string) error {
	dir := s.sandboxDir(id)
	if err := unmount(filepath.Join(dir, "shm")); err != nil {
		return err
	}
	return errors.Join(removeFlat(dir), removeFlat(s.etcDir(id)))
}

// removeFlat removes a directory of ours with its files and empty directories.
// It does not descend, so a mount left below it makes it fail instead of being
// emptied.
func removeFlat(dir string) error {
	entries, err := os.ReadDir(dir)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	if err := os.Remove(dir); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}
