package cgroups

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// hierarchy is one mounted cgroup tree.
type hierarchy struct {
	dir         string
	controllers []string // as libcontainer names them: "cpu", "name=systemd", "" for the v2 tree of a hybrid host
}

func (h hierarchy) has(controller string) bool {
	for _, c := range h.controllers {
		if c == controller {
			return true
		}
	}
	return false
}

// layout is how cgroups are mounted on this host.
type layout struct {
	unified     bool // cgroup v2 alone; hierarchies then has one element
	hierarchies []hierarchy
}

const mountRoot = "/sys/fs/cgroup"

// discover reads the host's layout: v2 when a cgroup2 file system is at
// /sys/fs/cgroup, v1 (maybe hybrid) otherwise.
func discover() (layout, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(mountRoot, &st); err != nil {
		return layout{}, fmt.Errorf("cgroup file system at %s: %w: mount it", mountRoot, err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return layout{unified: true, hierarchies: []hierarchy{{dir: mountRoot}}}, nil
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return layout{}, err
	}
	defer f.Close()
	l, err := parseMounts(f)
	if err != nil {
		return layout{}, err
	}
	if len(l.hierarchies) == 0 {
		return layout{}, fmt.Errorf("no cgroup file system is mounted below %s", mountRoot)
	}
	return l, nil
}

// parseMounts reads the v1 layout from a mountinfo file, see proc(5). Of
// several mounts of one hierarchy the shortest path wins, as in the kubelet.
func parseMounts(r io.Reader) (layout, error) {
	var l layout
	byKey := map[string]int{}
	s := bufio.NewScanner(r)
	for s.Scan() {
		head, tail, ok := strings.Cut(s.Text(), " - ")
		if !ok {
			continue
		}
		hf, tf := strings.Fields(head), strings.Fields(tail)
		if len(hf) < 5 || len(tf) < 3 {
			continue
		}
		root, dir := hf[3], hf[4]
		if root != "/" && !strings.HasPrefix(root, "/..") && root != "" && tf[0] == "cgroup2" {
			// A bind mount of a part of the tree is not the hierarchy.
			continue
		}
		var h hierarchy
		switch tf[0] {
		case "cgroup2":
			h = hierarchy{dir: dir, controllers: []string{""}}
		case "cgroup":
			h.dir = dir
			for _, o := range strings.Split(tf[2], ",") {
				switch o {
				case "rw", "ro", "noprefix", "xattr", "clone_children", "favordynmods", "nofavordynmods", "none", "cpuset_v2_mode":
				default:
					if !strings.HasPrefix(o, "release_agent=") {
						h.controllers = append(h.controllers, o)
					}
				}
			}
			// A named hierarchy without controllers is another program's,
			// except systemd's, which libcontainer joins.
			if len(h.controllers) == 0 || strings.HasPrefix(h.controllers[0], "name=") && h.controllers[0] != "name=systemd" {
				continue
			}
		default:
			continue
		}
		key := strings.Join(h.controllers, ",")
		if i, seen := byKey[key]; seen {
			if len(h.dir) < len(l.hierarchies[i].dir) {
				l.hierarchies[i] = h
			}
			continue
		}
		byKey[key] = len(l.hierarchies)
		l.hierarchies = append(l.hierarchies, h)
	}
	return l, s.Err()
}

// of returns the hierarchy's directory for a controller, "" when not mounted.
func (l layout) of(controller string) string {
	if l.unified {
		return l.hierarchies[0].dir
	}
	for _, h := range l.hierarchies {
		if h.has(controller) {
			return h.dir
		}
	}
	return ""
}

// paths maps every controller to the group's directory, as libcontainer's v1
// managers want it.
func (l layout) paths(group string) map[string]string {
	m := make(map[string]string, len(l.hierarchies))
	for _, h := range l.hierarchies {
		for _, c := range h.controllers {
			m[c] = h.dir + group
		}
	}
	return m
}

// mkdir creates one directory and, when its parents are missing, these too.
// It reports whether the directory is new.
func (l layout) mkdir(h hierarchy, group string) (bool, error) {
	dir := h.dir + group
	err := unix.Mkdir(dir, 0o755)
	if errors.Is(err, unix.ENOENT) && group != "/" && group != "" {
		parent := filepath.Dir(group)
		if _, perr := l.mkdir(h, parent); perr != nil {
			return false, perr
		}
		if l.unified {
			enablePath(h.dir, parent)
		}
		err = unix.Mkdir(dir, 0o755)
	}
	switch {
	case err == nil:
	case errors.Is(err, unix.EEXIST):
		return false, nil
	default:
		return false, &os.PathError{Op: "create cgroup", Path: dir, Err: err}
	}
	if h.has("cpuset") {
		if err := initCpuset(dir); err != nil {
			return true, err
		}
	}
	return true, nil
}

// initCpuset gives a new v1 cpuset its parent's CPUs and memory nodes: an
// empty one takes no process (Documentation/admin-guide/cgroup-v1/cpusets.rst).
// Where cgroup.clone_children is on the kernel has done it already.
func initCpuset(dir string) error {
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		have, err := os.ReadFile(dir + "/" + f)
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(have)) != "" {
			continue
		}
		want, err := os.ReadFile(filepath.Dir(dir) + "/" + f)
		if err != nil {
			return err
		}
		if err := writeFile(dir, f, strings.TrimSpace(string(want))); err != nil {
			return err
		}
	}
	return nil
}

// enablePath hands every controller down from the root to the group's children.
func enablePath(root, group string) {
	enableControllers(root)
	for i := 1; i <= len(group); i++ {
		if i == len(group) || group[i] == '/' {
			enableControllers(root + group[:i])
		}
	}
}

// enableControllers hands every controller of a v2 group down to its children.
// One that cannot be enabled (cpu with real-time processes about) must not keep
// the others from it; a limit that then cannot be set is an error there.
func enableControllers(dir string) {
	data, err := os.ReadFile(dir + "/cgroup.controllers")
	if err != nil {
		return
	}
	have, _ := os.ReadFile(dir + "/cgroup.subtree_control")
	on := " " + strings.TrimSpace(string(have)) + " "
	var want []string
	for _, c := range strings.Fields(string(data)) {
		if !strings.Contains(on, " "+c+" ") {
			want = append(want, "+"+c)
		}
	}
	if len(want) == 0 {
		return
	}
	if writeFile(dir, "cgroup.subtree_control", strings.Join(want, " ")) == nil {
		return
	}
	for _, c := range want {
		_ = writeFile(dir, "cgroup.subtree_control", c)
	}
}

func writeFile(dir, name, value string) error {
	path := dir + "/" + name
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	for {
		_, err = unix.Write(fd, []byte(value))
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("write %q to %s: %w", value, path, err)
	}
	return nil
}

// Removal. The shim has removed the containers' groups before, so one rmdir
// per hierarchy usually is all. What is left is killed first.

// remove kills what is in dir and removes it with everything below.
func (l layout) remove(ctx context.Context, group string) error {
	var left []hierarchy
	for _, h := range l.hierarchies {
		switch err := unix.Rmdir(h.dir + group); {
		case err == nil, errors.Is(err, unix.ENOENT):
		default:
			left = append(left, h)
		}
	}
	if len(left) == 0 {
		return nil
	}
	// Processes die asynchronously (a task in D state for as long as it likes):
	// look again after 1, 2, 4 … 50 ms until ctx ends.
	for delay := time.Millisecond; ; delay = min(2*delay, 50*time.Millisecond) {
		l.kill(group)
		var err error
		rest := left[:0]
		for _, h := range left {
			if e := rmTree(h.dir + group); e != nil {
				rest, err = append(rest, h), e
			}
		}
		if left = rest; len(left) == 0 {
			return nil
		}
		t := time.NewTimer(delay)
		select {
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("remove cgroup %s: %w (%w)", group, err, ctx.Err())
		case <-t.C:
		}
	}
}

// kill sends SIGKILL to every process of the group and below it: by
// cgroup.kill (v2, Linux 5.14), else frozen meanwhile so that nothing forks
// away from under the loop.
func (l layout) kill(group string) {
	if l.unified {
		dir := l.hierarchies[0].dir + group
		if writeFile(dir, "cgroup.kill", "1") == nil {
			return
		}
		if writeFile(dir, "cgroup.freeze", "1") == nil {
			defer func() { _ = writeFile(dir, "cgroup.freeze", "0") }()
		}
		killTree(dir, group)
		return
	}
	if f := l.of("freezer"); f != "" {
		thaw := func() {
			_ = filepath.WalkDir(f+group, func(p string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					_ = writeFile(p, "freezer.state", "THAWED")
				}
				return nil
			})
		}
		if writeFile(f+group, "freezer.state", "FROZEN") == nil {
			// A container of the pod may be frozen itself.
			defer thaw()
		}
	}
	for _, h := range l.hierarchies {
		killTree(h.dir+group, group)
	}
}

// killTree kills the processes of the cgroup dir, which is group below its
// hierarchy's root, and of those below.
func killTree(dir, group string) {
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		data, err := os.ReadFile(p + "/cgroup.procs")
		if err != nil {
			return nil
		}
		for _, s := range strings.Fields(string(data)) {
			// 0 is a process of another PID namespace: kill(0) would be us.
			if pid, err := strconv.Atoi(s); err == nil && pid > 1 {
				killMember(pid, group)
			}
		}
		return nil
	})
}

// killMember kills a process if it belongs to the group itself. On v1
// cgroup.procs lists a process already when one of its threads is in the group,
// as podd-shim's is for the moment in which it starts a pod's first process.
// The pidfd comes first: the number may be another process' by now.
func killMember(pid int, group string) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return // gone
	}
	defer unix.Close(fd)
	own, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid)) // of the main thread
	if err != nil {
		return
	}
	for line := range strings.Lines(string(own)) {
		// hierarchy-ID:controllers:path, see cgroups(7). The path may be told from
		// a root above the mount's.
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) == 3 && strings.Contains(f[2]+"/", group+"/") {
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			return
		}
	}
}

// rmTree removes a group and all below it, deepest first.
func rmTree(dir string) error {
	err := unix.Rmdir(dir)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	entries, rerr := os.ReadDir(dir)
	if rerr != nil {
		if errors.Is(rerr, fs.ErrNotExist) {
			return nil
		}
		return rerr
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := rmTree(dir + "/" + e.Name()); err != nil {
				return err
			}
		}
	}
	if err = unix.Rmdir(dir); err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return &os.PathError{Op: "rmdir", Path: dir, Err: err}
}

// SwapControlled says whether this host accounts swap by group: on v2 the own
// group has memory.swap.max (all but the root have it), on v1 there is
// memory.memsw.limit_in_bytes.
func SwapControlled() bool {
	l, err := discover()
	if err != nil {
		return false
	}
	if !l.unified {
		dir := l.of("memory")
		return dir != "" && unix.Access(dir+"/memory.memsw.limit_in_bytes", unix.F_OK) == nil
	}
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return false
	}
	group := strings.TrimPrefix(strings.TrimSpace(string(data)), "0::")
	if group == "/" { // not below any: as good as the kernel's default says
		cmdline, _ := os.ReadFile("/proc/cmdline")
		return !strings.Contains(string(cmdline), "swapaccount=0")
	}
	return unix.Access(l.hierarchies[0].dir+group+"/memory.swap.max", unix.F_OK) == nil
}
