package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer/configs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

// A container whose PID namespace is its pod's or another container's is set
// up by libcontainer's init inside of it, for some ten milliseconds with all
// the node's privileges. Who is in there already and has CAP_SYS_PTRACE could
// attach to init, use its privileges and take its descriptors; not being
// dumpable does not help against that capability. (In a user namespace it
// does: init's memory belongs to the node's.) So nobody who could is running
// meanwhile: tracers of the pod are frozen from before init is made until it
// has executed the container's program.
//
//	create   lock of the pod's starts ── freeze tracers ── libcontainer ── init waits
//	start    init is released ── execve: its command socket closes ── thaw ── unlock
//
// Whatever ends init ends the passage, too. After the death of a shim the next
// one ends such an init before it thaws anybody. Containers with a PID
// namespace of their own have nobody in it, and execs are born confined (see
// cmd/enter).

// startPatience bounds the time from creation to the end of the start: until
// then the pod's tracers stand still and its other containers wait.
const startPatience = 20 * time.Second

// freezePatience is how long processes may take to stop. One that is throttled
// needs a turn for it.
const freezePatience = 10 * time.Second

// passage is the way of one container into a PID namespace that others share.
type passage struct {
	c     *container
	box   *sandbox
	held  []*container
	timer *time.Timer
	once  sync.Once
}

// sharesPIDs: the container joins a PID namespace of a pod or a container. The
// node's own is nobody's in particular: who may trace there is root there.
func sharesPIDs(spec *specs.Spec) bool {
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace {
			return ns.Path != ""
		}
	}
	return false
}

// tracingSpec: processes of it may come to have CAP_SYS_PTRACE.
func tracingSpec(p *specs.Process) bool {
	return p.Capabilities == nil || slices.Contains(p.Capabilities.Bounding, tracing)
}

const tracing = "CAP_SYS_PTRACE"

// tracer says whether processes of the container may trace others. What an
// earlier release has recorded does not tell; its configuration does.
func (c *container) tracer() bool {
	c.mu.Lock()
	known := c.rec.Tracer
	c.mu.Unlock()
	if known != nil {
		return *known
	}
	b, err := c.base()
	return err != nil || b.tracing()
}

func (b *execBase) tracing() bool {
	return b.caps == nil || slices.Contains(b.caps.Bounding, tracing)
}

// privileged: the container has every capability, so nothing is to be gained.
func (b *execBase) privileged() bool {
	all, err := capabilityNumbers()
	return err == nil && b.caps != nil && len(b.caps.Bounding) >= len(all)
}

// enterPassage freezes the pod's tracers. The passage must be ended.
func (c *container) enterPassage(ctx context.Context) (_ *passage, err error) {
	box, err := c.s.sandbox(c.rec.Process.SandboxID)
	if err != nil {
		return nil, err
	}
	if err := box.starts.lock(ctx); err != nil {
		return nil, fmt.Errorf("start of another container in the same PID namespace: %w", err)
	}
	p := &passage{c: c, box: box}
	for _, other := range c.s.containersOf(box.rec.Process.ID) {
		if other == c || !other.tracer() {
			continue
		}
		p.held = append(p.held, other)
		if err := other.hold.begin(other); err != nil {
			p.end()
			return nil, fmt.Errorf("stop container %s, which may trace this one, while it starts: %w", other.rec.Process.ID, err)
		}
	}
	return p, nil
}

// arm ends an init that nobody starts.
func (p *passage) arm() {
	p.timer = time.AfterFunc(startPatience, func() {
		p.c.s.log.Warn("container was created and not started in time: ending it, because others of its pod stand still",
			"id", p.c.rec.Process.ID, "patience", startPatience)
		p.c.killInit()
	})
}

// end lets the tracers go on. There must be no init any more.
func (p *passage) end() {
	if p == nil {
		return
	}
	p.once.Do(func() {
		if p.timer != nil {
			p.timer.Stop()
		}
		for _, other := range p.held {
			other.hold.end(other)
		}
		p.box.starts.unlock()
	})
}

func (c *container) killInit() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pidfd >= 0 {
		_ = unix.PidfdSendSignal(c.pidfd, unix.SIGKILL, nil, 0)
	}
}

// hold keeps a container frozen while anybody needs it to be.
type hold struct {
	mu      sync.Mutex
	holders int
	over    chan struct{} // closed when the last one has gone
}

func (h *hold) begin(c *container) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.holders++
	if h.holders > 1 {
		return nil
	}
	h.over = make(chan struct{})
	return c.freeze(cgroups.Frozen)
}

func (h *hold) end(c *container) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.holders--; h.holders > 0 {
		return
	}
	close(h.over)
	h.over = nil
	if err := c.freeze(cgroups.Thawed); err != nil {
		c.s.log.Error("container stays frozen", "id", c.rec.Process.ID, "error", err)
	}
}

// wait returns when nobody holds the container, so that an exec does not take
// it for one that a user has paused. Holds are short, see startPatience.
func (h *hold) wait() {
	for {
		h.mu.Lock()
		over := h.over
		h.mu.Unlock()
		if over == nil {
			return
		}
		<-over
	}
}

// freeze changes the state of the container's cgroup. One that has ended, or
// has no cgroup yet, has no process that would have to stop.
func (c *container) freeze(state cgroups.FreezerState) error {
	m, err := c.cgroup()
	if err != nil || m == nil {
		return err
	}
	for deadline := time.Now().Add(freezePatience); ; time.Sleep(10 * time.Millisecond) {
		err = m.Freeze(state)
		if err == nil || !m.Exists() || errors.Is(err, os.ErrNotExist) && c.pidfdClosed() {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("cgroup to be %s: %w: %w", state, err, errdefs.ErrUnavailable)
		}
	}
}

func (c *container) pidfdClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pidfd < 0
}

// thawLeft undoes what a dead shim has frozen. Inits for whose sake it was end
// first: nobody waits for them any more that knew of it.
func (s *Server) thawLeft() {
	s.mu.RLock()
	all := slices.Collect(maps.Values(s.byID))
	s.mu.RUnlock()
	tracers := map[string]bool{} // sandboxes with one that may be frozen
	for _, c := range all {
		if !c.pidfdClosed() && c.tracer() {
			tracers[c.rec.Process.SandboxID] = true
		}
	}
	for _, c := range all {
		if c.rec.SharesPIDs && c.state() == shim.Created && tracers[c.rec.Process.SandboxID] {
			s.log.Info("ending an init that was not started", "id", c.rec.Process.ID)
			c.killInit()
			select {
			case <-c.exited:
			case <-time.After(startPatience):
			}
		}
	}
	for _, c := range all {
		if !tracers[c.rec.Process.SandboxID] || c.pidfdClosed() || !c.tracer() {
			continue
		}
		if err := c.freeze(cgroups.Thawed); err != nil {
			s.log.Error("container stays frozen", "id", c.rec.Process.ID, "error", err)
		}
	}
}

// refuseTraced: libcontainer's way of an exec brings a process with all the
// node's privileges into the PID namespace, where the container's own processes
// could trace it, and those cannot be stopped for it.
func (c *container) refuseTraced(config *configs.Config, because error) error {
	if config.Namespaces.Contains(configs.NEWUSER) || !config.Namespaces.Contains(configs.NEWPID) {
		return nil // see above
	}
	b, err := c.base()
	if err != nil {
		return err
	}
	for _, other := range c.s.containersOf(c.rec.Process.SandboxID) {
		if !other.tracer() || other == c && b.privileged() {
			continue
		}
		return fmt.Errorf("exec would need libcontainer (%w), whose process container %s of this pod could take over with %s: "+
			"remove that capability, or the reason: %w", because, other.rec.Process.ID, tracing, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// containersOf a sandbox.
func (s *Server) containersOf(sandbox string) []*container {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var list []*container
	for _, c := range s.byID {
		if c.rec.Process.SandboxID == sandbox {
			list = append(list, c)
		}
	}
	return list
}
