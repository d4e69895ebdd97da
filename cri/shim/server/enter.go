package server

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/sys/capability"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/podd-runtime/podd/cri/shim"
	"github.com/podd-runtime/podd/cri/shim/internal/enter"
	"github.com/podd-runtime/podd/cri/shim/internal/wire"
)

// execBase is what all execs of a container share, out of libcontainer's
// state, which is too large to be read for each.
type execBase struct {
	unable string // why enter cannot do it; ""
	ns     uint32
	// What a process has that asks for nothing else.
	caps        *configs.Capabilities
	appArmor    string
	label       string
	rlimits     []configs.Rlimit
	scheduler   *configs.Scheduler
	ioPriority  *configs.IOPriority
	affinity    *configs.CPUAffinity
	oomScoreAdj *int
	umask       *uint32
	personality *uint32
	// cgroups to enter by file, or the v2 one to be born in.
	tasks  []string
	cgroup string
}

// base reads the container's configuration once.
func (c *container) base() (*execBase, error) {
	if b := c.shared.Load(); b != nil {
		return b, nil
	}
	lc, err := libcontainer.Load(c.s.path("lc"), c.rec.Process.ID)
	if err != nil {
		return nil, lcError(err)
	}
	state, err := lc.State()
	if err != nil {
		return nil, lcError(err)
	}
	config := lc.Config()
	b := &execBase{
		caps: config.Capabilities, appArmor: config.AppArmorProfile, label: config.ProcessLabel,
		rlimits: config.Rlimits, scheduler: config.Scheduler, ioPriority: config.IOPriority,
		affinity: config.ExecCPUAffinity, oomScoreAdj: config.OomScoreAdj, umask: config.Umask,
	}
	if config.Personality != nil {
		domain := uint32(config.Personality.Domain)
		b.personality = &domain
	}
	for _, ns := range config.Namespaces {
		b.ns |= uint32(ns.Syscall())
	}
	switch {
	case b.ns&unix.CLONE_NEWNS == 0:
		b.unable = "enter a container without a mount namespace"
	case b.ns&unix.CLONE_NEWTIME != 0:
		b.unable = "join a time namespace"
	case config.Seccomp != nil:
		b.unable = "apply a seccomp profile of libcontainer's"
	case config.IntelRdt != nil:
		b.unable = "join a resctrl group"
	case config.MemoryPolicy != nil:
		b.unable = "set a memory policy"
	case config.ParentDeathSignal != 0:
		b.unable = "set a parent death signal"
	}
	if c.s.host.unified {
		b.cgroup = state.CgroupPaths[""]
	} else {
		for controller, path := range state.CgroupPaths {
			file := "tasks" // a thread enters without waiting for RCU, see startIn
			if controller == "" {
				file = "cgroup.procs"
			}
			if file = filepath.Join(path, file); !slices.Contains(b.tasks, file) {
				b.tasks = append(b.tasks, file)
			}
		}
	}
	c.shared.Store(b)
	return b, nil
}

// running is nil for a container that takes execs.
func (c *container) running() error {
	if st := c.state(); st != shim.Running {
		return fmt.Errorf("container is %s: %w", st, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// enter starts the process by package enter.
func (c *container) enter(p *libcontainer.Process, tty bool, files [3]*os.File, conn *wire.Conn) (*enter.Process, error) {
	s := c.s
	b, err := c.base()
	if err != nil {
		return nil, err
	}
	if b.unable != "" {
		return nil, &enter.Unable{What: b.unable, Err: errdefs.ErrNotImplemented}
	}
	plan, err := c.plan(b, p, tty)
	if err != nil {
		return nil, err
	}
	if b.frozen() {
		return nil, fmt.Errorf("container is paused: %w", errdefs.ErrFailedPrecondition)
	}
	c.mu.Lock()
	init, err := unix.FcntlInt(uintptr(c.pidfd), unix.F_DUPFD_CLOEXEC, 0)
	c.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("container has ended: %w", errdefs.ErrFailedPrecondition)
	}
	defer unix.Close(init)
	d := enter.Descriptors{Program: s.enter, Init: init, Cgroup: -1, Client: rawConn(conn)}
	for i, f := range files {
		if f == nil {
			// Opened for each: flags and locks belong to the open file.
			mode := os.O_WRONLY
			if i == 0 {
				mode = os.O_RDONLY
			}
			if f, err = os.OpenFile(os.DevNull, mode, 0); err != nil {
				return nil, err
			}
			defer f.Close()
		}
		d.Streams[i] = f.Fd()
	}
	started, err := c.enterIn(b.cgroup, plan, d)
	if err == nil {
		return started, nil
	}
	var unable *enter.Unable
	if errors.As(err, &unable) {
		return nil, err
	}
	// What has failed may have done so because the container went away.
	patience := time.Duration(0)
	if errors.Is(err, enter.ErrGone) {
		patience = time.Second // init is a zombie only when the last of its threads has gone
	}
	if ended(init, patience) {
		return nil, fmt.Errorf("container has ended: %w", errdefs.ErrFailedPrecondition)
	}
	return nil, fmt.Errorf("unable to start container process: %w", err)
}

// ended waits at most so long for the end of the process behind pidfd.
func ended(pidfd int, patience time.Duration) bool {
	for deadline := time.Now().Add(patience); ; {
		fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(max(time.Until(deadline), 0).Milliseconds()))
		if err != unix.EINTR || time.Now().After(deadline) {
			return n == 1
		}
	}
}

// enterIn starts the process in the v2 cgroup at path, if any. A container
// that may write to its cgroup may have moved its processes further down, and
// then nothing else can enter the upper one: init's own is used.
func (c *container) enterIn(path string, plan *enter.Plan, d enter.Descriptors) (*enter.Process, error) {
	if path == "" {
		return enter.Start(plan, d)
	}
	try := func(path string) (*enter.Process, error) {
		dir, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, &enter.Unable{What: "open cgroup " + path, Err: err}
		}
		defer unix.Close(dir)
		d.Cgroup = dir
		return enter.Start(plan, d)
	}
	started, err := try(path)
	var unable *enter.Unable
	if !errors.As(err, &unable) {
		return started, err
	}
	of, perr := cgroups.ParseCgroupFile("/proc/" + strconv.Itoa(c.rec.Process.PID) + "/cgroup")
	own := filepath.Join("/sys/fs/cgroup", of[""])
	if perr != nil || of[""] == "" || own == path {
		return nil, err
	}
	c.s.log.Debug("exec joins the cgroup of init", "id", c.rec.Process.ID, "cgroup", own, "because", err)
	return try(own)
}

// frozen: who enters a frozen cgroup stops there.
func (b *execBase) frozen() bool {
	if b.cgroup != "" {
		text, err := os.ReadFile(filepath.Join(b.cgroup, "cgroup.events"))
		return err == nil && strings.Contains(string(text), "frozen 1")
	}
	for _, file := range b.tasks {
		if text, err := os.ReadFile(filepath.Join(filepath.Dir(file), "freezer.state")); err == nil {
			return strings.HasPrefix(string(text), "FR") // FREEZING, FROZEN
		}
	}
	return false
}

// rawConn is the number of the connection's descriptor, which stays open
// while its request is served; -1 without a connection.
func rawConn(conn *wire.Conn) int {
	fd := -1
	if conn == nil {
		return fd
	}
	if raw, err := conn.SyscallConn(); err == nil {
		_ = raw.Control(func(n uintptr) { fd = int(n) })
	}
	return fd
}

// plan merges the process with the container's configuration, as libcontainer
// does: what a process does not say is the container's.
func (c *container) plan(b *execBase, p *libcontainer.Process, tty bool) (*enter.Plan, error) {
	f, err := c.s.filters.named(c.rec.Filter)
	if err != nil {
		return nil, err // never without the filter the container has
	}
	plan := &enter.Plan{
		Namespaces: b.ns, Args: p.Args, Cwd: p.Cwd, UID: uint32(p.UID), GID: uint32(p.GID),
		NoNewPrivs: *p.NoNewPrivileges, OOMScoreAdj: b.oomScoreAdj, Umask: b.umask, Personality: b.personality,
		CgroupFiles: b.tasks, Keyring: "_ses." + c.rec.Process.ID, Filter: f.Program, FilterFlags: f.Flags,
		Terminal: tty, Width: p.ConsoleWidth, Height: p.ConsoleHeight,
	}
	if plan.Env, plan.Path, plan.Home, err = environ(p.Env); err != nil {
		return nil, err
	}
	for _, s := range append([]string{p.Cwd}, p.Args...) {
		if strings.IndexByte(s, 0) >= 0 {
			return nil, fmt.Errorf("%q contains a NUL byte: %w", s, errdefs.ErrInvalidArgument)
		}
	}
	for _, g := range p.AdditionalGroups {
		plan.Groups = append(plan.Groups, uint32(g))
	}
	caps := b.caps
	if p.Capabilities != nil {
		caps = p.Capabilities
	}
	if plan.Caps, err = capabilitySets(caps); err != nil {
		return nil, err
	}
	limits := b.rlimits
	if len(p.Rlimits) > 0 {
		limits = p.Rlimits
	}
	for _, l := range limits {
		plan.Rlimits = append(plan.Rlimits, enter.Rlimit{Resource: uint64(l.Type), Soft: l.Soft, Hard: l.Hard})
	}
	scheduler := b.scheduler
	if p.Scheduler != nil {
		scheduler = p.Scheduler
	}
	if scheduler != nil {
		if plan.Scheduler, err = configs.ToSchedAttr(scheduler); err != nil {
			return nil, fmt.Errorf("scheduler: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if plan.Scheduler.Flags&unix.SCHED_FLAG_RESET_ON_FORK != 0 {
			return nil, &enter.Unable{What: "keep a scheduler that a fork resets", Err: errdefs.ErrNotImplemented}
		}
	}
	priority := b.ioPriority
	if p.IOPriority != nil {
		priority = p.IOPriority
	}
	if priority != nil {
		n, err := ioPriority(priority)
		if err != nil {
			return nil, err
		}
		plan.IOPriority = &n
	}
	affinity := b.affinity
	if p.CPUAffinity != nil {
		affinity = p.CPUAffinity
	}
	if affinity != nil {
		plan.InitialCPUs, plan.FinalCPUs = affinity.Initial, affinity.Final
	}
	label, profile := b.label, b.appArmor
	if p.Label != "" {
		label = p.Label
	}
	if p.AppArmorProfile != "" {
		profile = p.AppArmorProfile
	}
	plan.Attributes = attributes(label, profile)
	return plan, nil
}

// attributes are what security modules get told for the next execve.
func attributes(label, profile string) []enter.Attribute {
	var list []enter.Attribute
	if label != "" {
		list = append(list, enter.Attribute{File: "/proc/self/attr/exec", Text: label})
		if _, err := os.Stat("/proc/self/attr/keycreate"); err == nil {
			list = append(list, enter.Attribute{File: "/proc/self/attr/keycreate", Text: label})
		}
	}
	if profile != "" {
		file := "/proc/self/attr/apparmor/exec"
		if _, err := os.Stat(file); err != nil {
			file = "/proc/self/attr/exec"
		}
		list = append(list, enter.Attribute{File: file, Text: "exec " + profile})
	}
	return list
}

// environ keeps the last of each name, in the order of the first list, and
// leaves out an empty HOME, which is looked up then.
func environ(env []string) (list []string, path string, home bool, err error) {
	home = true
	saw := make(map[string]bool, len(env))
	list = make([]string, 0, len(env))
	for _, kv := range slices.Backward(env) {
		key, val, ok := strings.Cut(kv, "=")
		switch {
		case !ok:
			return nil, "", false, fmt.Errorf("invalid environment variable: missing '=': %w", errdefs.ErrInvalidArgument)
		case key == "":
			return nil, "", false, fmt.Errorf("invalid environment variable: name cannot be empty: %w", errdefs.ErrInvalidArgument)
		case saw[key]:
			continue
		case strings.IndexByte(kv, 0) >= 0:
			return nil, "", false, fmt.Errorf("invalid environment variable %q: contains nul byte (\\x00): %w", key, errdefs.ErrInvalidArgument)
		}
		saw[key] = true
		if key == "PATH" {
			path = val
		}
		if key == "HOME" {
			if val == "" {
				continue
			}
			home = false
		}
		list = append(list, kv)
	}
	slices.Reverse(list)
	return list, path, home, nil
}

// capabilityNumbers by name, of those that this kernel has.
var capabilityNumbers = sync.OnceValues(func() (map[string]uint64, error) {
	list, err := capability.ListSupported()
	if err != nil {
		return nil, fmt.Errorf("capabilities of this kernel: %w", err)
	}
	numbers := make(map[string]uint64, len(list))
	for _, n := range list {
		numbers["CAP_"+strings.ToUpper(n.String())] = 1 << n
	}
	return numbers, nil
})

// capabilitySets leaves out what this kernel does not know, as libcontainer does.
func capabilitySets(c *configs.Capabilities) (*enter.Capabilities, error) {
	if c == nil {
		return nil, nil
	}
	numbers, err := capabilityNumbers()
	if err != nil {
		return nil, err
	}
	set := func(names []string) (bits uint64) {
		for _, n := range names {
			bits |= numbers[n]
		}
		return bits
	}
	return &enter.Capabilities{
		Bounding: set(c.Bounding), Effective: set(c.Effective), Permitted: set(c.Permitted),
		Inheritable: set(c.Inheritable), Ambient: set(c.Ambient),
	}, nil
}

// ioPriority is ioprio_set(2)'s value: the class above 13 bits of priority.
func ioPriority(p *configs.IOPriority) (uint32, error) {
	classes := map[specs.IOPriorityClass]uint32{specs.IOPRIO_CLASS_RT: 1, specs.IOPRIO_CLASS_BE: 2, specs.IOPRIO_CLASS_IDLE: 3}
	class, ok := classes[p.Class]
	if !ok {
		return 0, fmt.Errorf("invalid io priority class %q (of %v): %w", p.Class, slices.Sorted(maps.Keys(classes)), errdefs.ErrInvalidArgument)
	}
	return class<<13 | uint32(p.Priority), nil
}
