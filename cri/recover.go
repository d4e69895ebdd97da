package cri

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/cri/state"
)

// recoverTimeout bounds the whole of it.
const recoverTimeout = 2 * time.Minute

// recover makes the records, the shim and the kernel agree after a restart of
// podd, of the shim or of the machine. Its rules:
//
//  1. Records say what there should be; the shim says what runs. Nothing is
//     taken from memory and nothing is invented.
//  2. A record that cannot be read is quarantined; the rest goes on.
//  3. A sandbox whose pause the shim has is ready if the record says so. All
//     others are not ready: after a reboot, all of them.
//  4. A container the shim has is what the shim says, with its exit. One the
//     shim does not have is exited with code 255 and reason Unknown if it ran,
//     and still created if it never did and its sandbox is ready.
//  5. A container record without its sandbox' record is removed: nobody can
//     name it in a pod.
//  6. What has no record (processes, network, namespaces, root file systems,
//     snapshots) was in the making, or its record is lost, and is undone, below
//     our own directories and under keys of our own only.
//
// Events after the last applied one follow when the service runs; applying
// them again changes nothing.
func (s *Service) recover(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, recoverTimeout)
	defer cancel()
	list, err := s.procs.List(ctx)
	if err != nil {
		return fmt.Errorf("list the shim's processes: %w", err)
	}
	procs := make(map[string]shim.Process, len(list))
	for _, p := range list {
		procs[p.ID] = p
	}
	if err := s.recoverSandboxes(procs); err != nil {
		return err
	}
	if err := s.recoverContainers(procs); err != nil {
		return err
	}
	s.sweep(ctx, procs)
	return nil
}

func (s *Service) recoverSandboxes(procs map[string]shim.Process) error {
	load := func(id string, r *sandboxRecord) error {
		if r.Config.Message.GetMetadata() == nil {
			return errors.New("config without metadata")
		}
		sb := newSandbox(id, r.Config.Message, r.Handler, r.CreatedAt)
		sb.startedAt, sb.pid, sb.network, sb.detached = r.StartedAt, r.PID, r.Network, r.Detached
		sb.label = r.Label
		reserveLabel(r.Label)
		sb.resources, sb.overhead = r.Resources.Message, r.Overhead.Message
		p, known := procs[id]
		sb.ready = r.Ready && known && p.State == shim.Running && p.PID == r.PID
		if sb.ready && !sb.hostNetwork() && !exists(s.netnsPath(id)) {
			sb.ready = false
		}
		if sb.ready != r.Ready {
			s.log.Warn("sandbox is gone", "sandbox", id, "known_to_shim", known)
			if err := s.saveSandbox(sb); err != nil {
				// The record is not broken, and what it says is found out again.
				s.log.Error("sandbox record not written", "sandbox", id, "error", err)
			}
		}
		s.objects.addSandbox(sb)
		return nil
	}
	return state.Load(s.store, kindSandbox, load)
}

func (s *Service) recoverContainers(procs map[string]shim.Process) error {
	load := func(id string, r *containerRecord) error {
		if r.Config.Message.GetMetadata() == nil || r.Process == nil {
			return errors.New("record without metadata or process")
		}
		state, ok := runtimeapi.ContainerState_value[r.State]
		if !ok {
			return fmt.Errorf("state %q", clip(r.State))
		}
		c := &container{
			id: id, sandboxID: r.SandboxID, config: r.Config.Message, createdAt: r.CreatedAt,
			name:  containerName(r.SandboxName, r.Config.Message.GetMetadata()),
			image: r.Image, logPath: r.LogPath, privatePID: r.PrivatePID, process: r.Process,
			imageMounts: r.ImageMounts, gate: newGate(), exited: make(chan struct{}),
			state: runtimeapi.ContainerState(state), status: r.Status, resources: r.Resources.Message,
		}
		c.announced = c.state != runtimeapi.ContainerState_CONTAINER_CREATED
		if c.state == runtimeapi.ContainerState_CONTAINER_EXITED {
			close(c.exited)
		}
		s.objects.addContainer(c)
		p, known := procs[id]
		s.reconcile(c, p, known)
		return nil
	}
	return state.Load(s.store, kindContainer, load)
}

// reconcile applies what the shim says of a container, rules 4.
func (s *Service) reconcile(c *container, p shim.Process, known bool) {
	switch {
	case c.state == runtimeapi.ContainerState_CONTAINER_EXITED:
	case known && p.Exit != nil && !p.StartedAt.IsZero():
		c.status.StartedAt = p.StartedAt.UnixNano()
		s.markExited(c, p.Exit, p.PID)
	case known && (p.State == shim.Running || p.State == shim.Paused):
		s.markRunning(c, &p)
	case known && c.state == runtimeapi.ContainerState_CONTAINER_CREATED:
		// It was caught between create and start: the payload never ran, and
		// the client has seen no answer. The sweep removes the process.
	case c.state == runtimeapi.ContainerState_CONTAINER_RUNNING:
		s.lost(c)
	case !s.sandboxReady(c.sandboxID):
		s.lostCreated(c)
	}
}

func (s *Service) sandboxReady(id string) bool {
	sb, err := s.objects.sandbox(id)
	if err != nil {
		return false
	}
	_, ready := sb.isReady()
	return ready
}

// lostCreated ends a container that was never started and cannot be any more.
func (s *Service) lostCreated(c *container) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state = runtimeapi.ContainerState_CONTAINER_EXITED
	c.status = containerStatus{
		FinishedAt: now(), ExitCode: exitUnknown, Reason: reasonUnknown,
		Message: "its sandbox was lost before it was started",
	}
	s.persist(c)
	close(c.exited)
}

// sweep undoes what has no record, rules 5 and 6. Nothing of it may keep the
// service from starting.
func (s *Service) sweep(ctx context.Context, procs map[string]shim.Process) {
	warn := func(what, id string, err error) {
		if err != nil {
			s.log.Warn("sweep incomplete", "what", what, "id", id, "error", err)
		}
	}
	for _, c := range s.objects.allContainers() {
		if _, err := s.objects.sandbox(c.sandboxID); errdefs.IsNotFound(err) {
			s.log.Warn("container without sandbox", "container", c.id, "sandbox", c.sandboxID)
			warn("container", c.id, s.removeContainer(ctx, c))
		}
	}
	s.sweepProcesses(ctx, procs, warn)
	for _, name := range names(filepath.Join(s.cfg.RunDir, "netns")) {
		if _, err := s.objects.sandbox(name); errdefs.IsNotFound(err) && validSwept(name) {
			warn("network", name, s.network.Detach(ctx, s.netPod(newSandbox(name, &runtimeapi.PodSandboxConfig{}, "", 0))))
			warn("network namespace", name, unpin(s.netnsPath(name)))
		}
	}
	keep := make([]string, 0)
	for _, sb := range s.objects.allSandboxes() {
		if !sb.detached {
			keep = append(keep, sb.id)
		}
	}
	warn("network", "all", s.network.Sweep(ctx, keep))
	for _, name := range names(filepath.Join(s.cfg.RunDir, "sandboxes"), filepath.Join(s.cfg.DataDir, "cri", "etc")) {
		if _, err := s.objects.sandbox(name); errdefs.IsNotFound(err) && validSwept(name) {
			warn("sandbox files", name, s.dropSandboxFiles(name))
		}
	}
	for _, name := range names(filepath.Join(s.cfg.RunDir, "containers"), filepath.Join(s.cfg.DataDir, "cri", "volumes")) {
		if _, err := s.objects.container(name); errdefs.IsNotFound(err) && validSwept(name) {
			warn("container files", name, s.dropContainerFiles(ctx, name, s.strayImageMounts(name)))
		}
	}
	s.sweepSnapshots(ctx, warn)
	for _, name := range names(filepath.Join(s.cfg.DataDir, "cri", kindSpec)) {
		id := name[:len(name)-len(filepath.Ext(name))]
		if _, err := s.objects.container(id); errdefs.IsNotFound(err) {
			warn("specification", id, s.store.Delete(kindSpec, id))
		}
	}
}

// sweepSnapshots drops those of no container. A power cut takes the run
// directory, and may take a record that was not on disk yet: of such a container
// the snapshots alone are left, and nothing in the run directory tells of them.
func (s *Service) sweepSnapshots(ctx context.Context, warn func(string, string, error)) {
	keys, err := s.images.Snapshots(ctx)
	warn("snapshots", "all", err)
	for _, key := range keys {
		id, target := s.snapshotOf(key)
		if id == "" {
			continue
		}
		if _, err := s.objects.container(id); errdefs.IsNotFound(err) {
			s.log.Info("snapshot without a container dropped", "snapshot", key)
			warn("snapshot", key, s.images.UnmountRootfs(ctx, key, target))
		}
	}
}

// snapshotOf says whose a snapshot is by its key, and where it is mounted if it
// is; empty: not a key that this service gives.
func (s *Service) snapshotOf(key string) (id, target string) {
	id, volume, isVolume := strings.Cut(key, volumeKey)
	if !validSwept(id) {
		return "", ""
	}
	if !isVolume {
		return id, s.rootfsPath(id)
	}
	n, err := strconv.Atoi(volume)
	if err != nil {
		return "", ""
	}
	return id, s.imageMount(id, n).Target
}

func (s *Service) sweepProcesses(ctx context.Context, procs map[string]shim.Process, warn func(string, string, error)) {
	ids := slices.Collect(maps.Keys(procs))
	for _, id := range ids {
		p := procs[id]
		if p.SandboxID == "" {
			continue
		}
		c, err := s.objects.container(id)
		if err == nil && c.current() != runtimeapi.ContainerState_CONTAINER_CREATED {
			continue
		}
		s.log.Warn("process without a started container", "container", id, "pid", p.PID)
		warn("container process", id, s.procs.Delete(ctx, id))
	}
	for _, id := range ids {
		if procs[id].SandboxID != "" {
			continue
		}
		if _, err := s.objects.sandbox(id); err == nil {
			continue
		}
		s.log.Warn("sandbox process without a record", "sandbox", id, "pid", procs[id].PID)
		warn("sandbox process", id, s.procs.DeleteSandbox(ctx, id))
	}
}

// strayImageMounts are image volumes of a container whose record is gone.
func (s *Service) strayImageMounts(id string) []imageMount {
	var out []imageMount
	for _, n := range names(s.containerDir(id)) {
		var i int
		if _, err := fmt.Sscanf(n, "image-%d", &i); err == nil {
			out = append(out, s.imageMount(id, i))
		}
	}
	return out
}

// validSwept keeps the sweep to names that this service gives.
func validSwept(name string) bool {
	if len(name) != 64 {
		return false
	}
	for _, c := range name {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

func names(dirs ...string) []string {
	seen := make(map[string]bool)
	for _, d := range dirs {
		entries, _ := os.ReadDir(d)
		for _, e := range entries {
			seen[e.Name()] = true
		}
	}
	return slices.Sorted(maps.Keys(seen))
}
