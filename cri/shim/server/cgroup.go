package server

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // lets the managers set device rules
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer/specconv"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"
	"golang.org/x/sys/unix"
)

// newCgroup makes the manager of a cgroup that libcontainer does not manage.
func newCgroup(id, path string, systemd bool, r *specs.LinuxResources) (cgroups.Manager, error) {
	spec := &specs.Spec{Linux: &specs.Linux{CgroupsPath: path, Resources: r}}
	cg, err := specconv.CreateCgroupConfig(&specconv.CreateOpts{CgroupName: id, UseSystemdCgroup: systemd, Spec: spec}, nil)
	if err != nil {
		return nil, fmt.Errorf("cgroup %q: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	m, err := manager.New(cg)
	if err != nil {
		return nil, fmt.Errorf("cgroup %q: %w", path, err)
	}
	return m, nil
}

func cgroupResources(m cgroups.Manager) *cgroups.Resources {
	cg, err := m.GetCgroups()
	if err != nil || cg.Resources == nil {
		return nil
	}
	r := *cg.Resources
	r.SkipDevices = len(r.Devices) == 0
	return &r
}

// startIn starts cmd as a member of the cgroup.
//
// Writing a pid to cgroup.procs waits for an RCU grace period (9 ms) when no
// other attach has just done so. Being born in the cgroup costs nothing: on v2
// by clone3(CLONE_INTO_CGROUP); on v1 children inherit the groups of the
// thread that forks, and a thread may move itself (alone, through tasks)
// without that wait.
func startIn(m cgroups.Manager, h *host, cmd *exec.Cmd, label string) error {
	cg, err := m.GetCgroups()
	if err != nil {
		return err
	}
	if cg.Systemd { // the scope is made around a living process
		if err := startLabelled(cmd, label); err != nil {
			return err
		}
		if err := m.Apply(cmd.Process.Pid); err != nil {
			_ = cmd.Process.Kill()
			return fmt.Errorf("cgroup %q: %w", cg.Path, err)
		}
		return nil
	}
	if err := m.Apply(-1); err != nil {
		return fmt.Errorf("make cgroup %q: %w", cg.Path, err)
	}
	paths := m.GetPaths()
	if unified := paths[""]; unified != "" {
		dir, err := unix.Open(unified, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open cgroup %s: %w", unified, err)
		}
		defer unix.Close(dir)
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, dir
	}
	if h.unified {
		return startLabelled(cmd, label)
	}
	result := make(chan error, 1)
	go func() {
		// The thread ends with this goroutine, being locked to it. (The main
		// thread, which would not end, is kept occupied by main.)
		runtime.LockOSThread()
		for controller, path := range paths {
			if controller == "" {
				continue
			}
			if err := os.WriteFile(filepath.Join(path, "tasks"), []byte("0"), 0); err != nil {
				result <- fmt.Errorf("enter cgroup %s: %w", path, err)
				return
			}
		}
		result <- startLabelled(cmd, label)
	}()
	return <-result
}

// startLabelled starts cmd with an SELinux label where the host has SELinux.
func startLabelled(cmd *exec.Cmd, label string) error {
	if label == "" || !selinux.GetEnabled() {
		return cmd.Start()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := selinux.SetExecLabel(label); err != nil {
		return fmt.Errorf("SELinux label %q: %w", label, err)
	}
	err := cmd.Start()
	if e := selinux.SetExecLabel(""); e != nil && err == nil {
		err = fmt.Errorf("reset SELinux label: %w", e)
	}
	return err
}

// removeCgroup removes a cgroup that is known by its record. Processes that
// are left in it are killed.
func removeCgroup(path string, systemd bool, paths map[string]string) error {
	if len(paths) == 0 {
		return nil
	}
	m, err := recordedCgroup(path, systemd, paths)
	if err != nil {
		return err
	}
	if m.Exists() {
		if err := killAll(m, unix.SIGKILL); err != nil {
			return err
		}
	}
	return m.Destroy()
}

// recordedCgroup is the manager of a cgroup whose paths are known.
func recordedCgroup(path string, systemd bool, paths map[string]string) (cgroups.Manager, error) {
	cg := &cgroups.Cgroup{Resources: &cgroups.Resources{}, Path: path}
	if systemd {
		parent, prefix, name := systemdParts(path)
		cg = &cgroups.Cgroup{Systemd: true, Resources: &cgroups.Resources{}, Parent: parent, ScopePrefix: prefix, Name: name}
	}
	return manager.NewWithPaths(cg, maps.Clone(paths))
}

// systemdParts splits "slice:prefix:name" as runc does.
func systemdParts(path string) (parent, prefix, name string) {
	parts := strings.SplitN(path, ":", 3)
	if len(parts) != 3 {
		return "system.slice", "", path
	}
	if parts[0] == "" {
		parts[0] = "system.slice"
	}
	return parts[0], parts[1], parts[2]
}

// killPatience bounds how long killAll chases processes that fork.
const killPatience = 10 * time.Second

// killAll signals every process of the cgroup and of those below it. SIGKILL
// leaves none: on v2 by cgroup.kill, on v1 by repeating it, because a process
// may fork while the list is read.
func killAll(m cgroups.Manager, sig unix.Signal) error {
	if sig == unix.SIGKILL {
		if path := m.Path(""); path != "" && cgroups.IsCgroup2UnifiedMode() {
			err := os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0)
			if err == nil || errors.Is(err, unix.ENODEV) || !m.Exists() {
				return nil
			} // before Linux 5.14: the loop below
		}
	}
	pause := time.Millisecond
	for deadline := time.Now().Add(killPatience); ; {
		pids, err := m.GetAllPids()
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("list processes: %w", err)
		}
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes do not end: %w", len(pids), errdefs.ErrUnavailable)
		}
		alive := false
		for _, pid := range pids {
			// The pid may have been given to a process elsewhere meanwhile: the
			// pidfd is opened first, and membership is checked after that.
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				continue
			}
			if !zombie(pid) && inCgroup(m, pid) {
				alive = true
				_ = unix.PidfdSendSignal(fd, sig, nil, 0)
			}
			unix.Close(fd)
		}
		if sig != unix.SIGKILL || !alive {
			return nil
		}
		if m.Path("freezer") != "" {
			// A frozen process does not die before it goes on.
			if st, err := m.GetFreezerState(); err == nil && st == cgroups.Frozen {
				_ = m.Freeze(cgroups.Thawed)
			}
		}
		time.Sleep(pause)
		pause = min(2*pause, 50*time.Millisecond)
	}
}

func zombie(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	state, _, ok := statFields(string(stat))
	return ok && (state == "Z" || state == "X")
}

// inCgroup asks the process itself whether it belongs to m's cgroup.
func inCgroup(m cgroups.Manager, pid int) bool {
	of, err := cgroups.ParseCgroupFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false
	}
	for controller, path := range m.GetPaths() {
		if own, ok := of[controller]; ok && own != "" && own != "/" {
			return strings.HasSuffix(path, own) || strings.Contains(own+"/", "/"+filepath.Base(path)+"/")
		}
	}
	return false
}
