package cri

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/images"
)

// CreateContainer prepares a container: root file system, volumes and
// specification. Nothing runs before StartContainer. A repeated request joins
// the one that runs, or returns the container it made.
func (s *Service) CreateContainer(ctx context.Context, r *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	if err := validContainer(r); err != nil {
		return nil, err
	}
	sb, err := s.objects.sandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	s.warm.WarmFor(joinsNear)
	name := containerName(sb.name, r.GetConfig().GetMetadata())
	id, err := s.creates.do(ctx, name, func(ctx context.Context, a *attempt) (string, error) {
		if id, done, err := s.madeContainer(name, r); done {
			return id, err
		}
		return s.createContainer(ctx, a, sb, r)
	})
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", clip(name), err)
	}
	return &runtimeapi.CreateContainerResponse{ContainerId: id}, nil
}

// madeContainer answers a request whose container is already there and has
// not been started: its client did not get the first answer.
func (s *Service) madeContainer(name string, r *runtimeapi.CreateContainerRequest) (id string, done bool, err error) {
	id, ok := s.objects.named(name)
	if !ok {
		return "", false, nil
	}
	c, err := s.objects.container(id)
	if err != nil {
		return "", false, nil // removed meanwhile
	}
	state := c.current()
	if state == runtimeapi.ContainerState_CONTAINER_CREATED && proto.Equal(c.config, r.GetConfig()) {
		return id, true, nil
	}
	return "", true, fmt.Errorf("container %s of this attempt is %v since %s: remove it, or raise metadata.attempt: %w",
		id, state, age(c.createdAt), errdefs.ErrAlreadyExists)
}

// createContainer is the list of what makes a container.
func (s *Service) createContainer(ctx context.Context, a *attempt, sb *sandbox, r *runtimeapi.CreateContainerRequest) (_ string, err error) {
	pid, ready := sb.isReady()
	if !ready {
		return "", fmt.Errorf("sandbox %s is not ready: %w", sb.id, errdefs.ErrFailedPrecondition)
	}
	in := &specInput{id: newID(), sandbox: sb, pausePID: pid, config: proto.CloneOf(r.GetConfig())}
	if err := s.checkPod(in); err != nil {
		return "", err
	}
	var u undo
	defer func() { s.left.add(u.run(ctx, s.log)) }()

	a.stage("resolve image")
	if in.image, err = s.images.Get(ctx, in.config.GetImage().GetImage()); err != nil {
		return "", fmt.Errorf("image %q: %w", clip(in.config.GetImage().GetImage()), err)
	}

	a.stage("mount root file system")
	if err := s.mountRootfs(ctx, in, &u); err != nil {
		return "", err
	}

	a.stage("prepare volumes")
	var imageMounts []imageMount
	if in.mounts, imageMounts, err = s.prepareImageVolumes(ctx, in.id, in.config.GetMounts(), &u); err != nil {
		return "", err
	}
	if err := s.prepareImageDeclared(in, &u); err != nil {
		return "", err
	}

	a.stage("build specification")
	spec, err := s.buildSpec(ctx, in)
	if err != nil {
		return "", err
	}

	a.stage("record container")
	c := s.newContainer(in, spec, imageMounts)
	u.push("records", func(context.Context) error {
		return errors.Join(s.store.Delete(kindContainer, c.id), s.store.Delete(kindSpec, c.id))
	})
	if err := s.store.Put(kindSpec, c.id, spec); err != nil {
		return "", err
	}
	if err := s.saveContainer(c, sb.name); err != nil {
		return "", err
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	// A StopPodSandbox that began meanwhile has not seen this container.
	if err := s.admit(sb, c); err != nil {
		return "", err
	}
	u.release()
	s.events.emit(event{id: c.id, sandboxID: sb.id, kind: runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT})
	s.log.Info("container created", "container", c.id, "name", c.config.GetMetadata().GetName(), "sandbox", sb.id)
	return c.id, nil
}

// admit adds the container unless its sandbox is being stopped. The sandbox'
// lock makes the two exclude each other.
func (s *Service) admit(sb *sandbox, c *container) error {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if !sb.ready || sb.removing {
		return fmt.Errorf("sandbox %s was stopped meanwhile: %w", sb.id, errdefs.ErrFailedPrecondition)
	}
	s.objects.addContainer(c)
	return nil
}

// checkPod checks what the container wants against what its pod is.
func (s *Service) checkPod(in *specInput) error {
	pod := in.sandbox.config.GetLinux().GetSecurityContext()
	if in.privileged() && !pod.GetPrivileged() {
		return invalid("config.linux.security_context.privileged: the sandbox is not privileged")
	}
	ns := in.security().GetNamespaceOptions()
	if ns != nil && !sameUserns(ns.GetUsernsOptions(), in.sandbox.namespaces().GetUsernsOptions()) {
		return invalid("config.linux.security_context.namespace_options.userns_options differ from the sandbox'")
	}
	if ns.GetPid() != runtimeapi.NamespaceMode_TARGET {
		return nil
	}
	target, err := s.objects.container(ns.GetTargetId())
	if err != nil {
		return fmt.Errorf("namespace_options.target_id: %w", err)
	}
	if target.sandboxID != in.sandbox.id {
		return invalid("namespace_options.target_id %s is in another sandbox", target.id)
	}
	target.mu.Lock()
	defer target.mu.Unlock()
	if target.state != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return fmt.Errorf("namespace_options.target_id %s is not running: %w", target.id, errdefs.ErrFailedPrecondition)
	}
	in.targetPID = target.status.PID
	return nil
}

// sameUserns compares user namespace options; none and NODE are the same.
func sameUserns(a, b *runtimeapi.UserNamespace) bool {
	node := func(u *runtimeapi.UserNamespace) bool {
		return u == nil || u.GetMode() == runtimeapi.NamespaceMode_NODE
	}
	if node(a) || node(b) {
		return node(a) == node(b)
	}
	return proto.Equal(a, b)
}

func (s *Service) mountRootfs(ctx context.Context, in *specInput, u *undo) error {
	dir := s.containerDir(in.id)
	in.rootfs = s.rootfsPath(in.id)
	u.push("container directory", func(context.Context) error { return removeFlat(dir) })
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := os.Mkdir(in.rootfs, 0o700); err != nil {
		return err
	}
	uids, gids, err := userMappings(in.sandbox.namespaces().GetUsernsOptions())
	if err != nil {
		return err
	}
	u.push("root file system", func(ctx context.Context) error { return s.images.UnmountRootfs(ctx, in.id, in.rootfs) })
	return s.images.MountRootfs(ctx, in.id, in.image.ID, in.rootfs, uids, gids)
}

// maxVolumes an image may declare. Each is a copy of a part of the image, so an
// image could fill the disk with no more than a long list.
const maxVolumes = 64

// prepareImageDeclared makes a directory for each VOLUME of the image that the
// request does not mount itself, filled with what the image has there. The root
// file system shows the pod's own ids, so the copies have them on disk and need
// no id-mapped mount.
func (s *Service) prepareImageDeclared(in *specInput, u *undo) error {
	declared := slices.Sorted(maps.Keys(in.image.Config.Config.Volumes))
	if len(declared) == 0 {
		return nil
	}
	if len(declared) > maxVolumes {
		return invalid("image %s: %d VOLUMEs, at most %d", in.image.ID, len(declared), maxVolumes)
	}
	dir := s.volumeDir(in.id)
	ids := in.sandbox.namespaces().GetUsernsOptions()
	for i, v := range declared {
		dst := filepath.Join("/", v)
		if badPath(v) || dst == "/" {
			return invalid("image %s: VOLUME %q", in.image.ID, clip(v))
		}
		if mountsAt(in.config.GetMounts(), dst) || mountsAt(in.volumes, dst) {
			continue
		}
		if len(in.volumes) == 0 {
			u.push("image-declared volumes", func(ctx context.Context) error { return s.dropVolumes(ctx, in.id) })
		}
		src := filepath.Join(dir, fmt.Sprint(i))
		if err := os.MkdirAll(src, 0o755); err != nil {
			return err
		}
		if err := os.Chown(src, rootOf(ids.GetUids()), rootOf(ids.GetGids())); err != nil {
			return err
		}
		if err := copyVolume(in.rootfs, dst, src); err != nil {
			return fmt.Errorf("copy VOLUME %q of the image: %w", clip(v), err)
		}
		in.volumes = append(in.volumes, &runtimeapi.Mount{
			ContainerPath: dst, HostPath: src, SelinuxRelabel: true,
		})
	}
	return nil
}

// rootOf is the node's id of a pod's root.
func rootOf(ids []*runtimeapi.IDMapping) int {
	for _, m := range ids {
		if m.GetContainerId() == 0 {
			return int(m.GetHostId())
		}
	}
	return 0
}

// copyVolume fills dst from a directory of the root file system, resolved
// below its root.
func copyVolume(rootfs, volume, dst string) error {
	src, err := imageSubPath(rootfs, strings.TrimPrefix(volume, "/"))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	if st, err := os.Lstat(src); err != nil || !st.IsDir() {
		return err
	}
	return fs.CopyDir(dst, src, fs.WithXAttrExclude("security.selinux"))
}

// newContainer is the object of a prepared container.
func (s *Service) newContainer(in *specInput, spec *specs.Spec, mounts []imageMount) *container {
	process := *spec.Process
	process.Args = nil
	process.OOMScoreAdj = nil
	ns := in.security().GetNamespaceOptions()
	c := &container{
		id: in.id, sandboxID: in.sandbox.id, config: in.config, createdAt: now(),
		name:    containerName(in.sandbox.name, in.config.GetMetadata()),
		image:   imageRef(in.image, in.config.GetImage()),
		logPath: logPath(in.sandbox.config, in.config),
		process: &process, imageMounts: mounts,
		privatePID: ns.GetPid() == runtimeapi.NamespaceMode_CONTAINER,
		gate:       newGate(), exited: make(chan struct{}),
		state: runtimeapi.ContainerState_CONTAINER_CREATED, spec: spec,
		resources: in.config.GetLinux().GetResources(),
	}
	return c
}

func imageRef(img *images.Image, spec *runtimeapi.ImageSpec) imageOf {
	ref := imageOf{ID: img.ID, Spec: spec.GetImage(), User: spec.GetUserSpecifiedImage(), StopSignal: img.Config.Config.StopSignal}
	if len(img.RepoTags) > 0 {
		ref.Tag = img.RepoTags[0]
		if slices.Contains(img.RepoTags, ref.Spec) {
			ref.Tag = ref.Spec
		}
	}
	return ref
}

// logPath joins the pod's log directory and the container's path in it.
func logPath(pod *runtimeapi.PodSandboxConfig, c *runtimeapi.ContainerConfig) string {
	if pod.GetLogDirectory() == "" || c.GetLogPath() == "" {
		return ""
	}
	return filepath.Join(pod.GetLogDirectory(), c.GetLogPath())
}
