package node

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/podd-runtime/podd/kubelet/server/api"
)

// Counts is what a node holds of the machine.
type Counts struct {
	FDs        int // of podd
	ShimFDs    int
	Goroutines int
	Mounts     []string // below the node's directory
	Cgroups    []string
	Links      []string // network interfaces of the host
	Files      []string // all that the node keeps but images, logs and events
}

// Count takes stock.
func (n *Node) Count() Counts {
	n.t.Helper()
	var st api.Status
	if err := n.Get(api.Prefix+"/status", &st); err != nil {
		n.t.Fatal(err)
	}
	c := Counts{
		Goroutines: st.Goroutines,
		FDs:        fds(n.PID()),
		Mounts:     mountsBelow(fmt.Sprintf("/proc/%d/mountinfo", n.PID()), n.Dir),
		Cgroups:    cgroups(n.CgroupDir()),
	}
	if st.Shim != nil {
		c.ShimFDs = fds(st.Shim.PID)
		c.Mounts = append(c.Mounts, mountsBelow(fmt.Sprintf("/proc/%d/mountinfo", st.Shim.PID), n.Dir)...)
	}
	links, err := netlink.LinkList()
	for errors.Is(err, netlink.ErrDumpInterrupted) { // somebody made or removed a link meanwhile
		links, err = netlink.LinkList()
	}
	if err != nil {
		n.t.Fatal(err)
	}
	for _, l := range links {
		if l.Type() == "veth" && !n.othersBridge(links, l.Attrs().MasterIndex) {
			c.Links = append(c.Links, l.Attrs().Name)
		}
	}
	filepath.WalkDir(n.Dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil // gone meanwhile
		}
		rel, _ := filepath.Rel(n.Dir, path)
		switch {
		case strings.HasPrefix(rel, "data/images/"), strings.HasPrefix(rel, "log/"), strings.HasPrefix(rel, "manifests/"), rel == "podd.log",
			strings.Contains(filepath.Base(rel), "events"):
			if e.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if !e.IsDir() {
			c.Files = append(c.Files, rel)
		}
		return nil
	})
	sort.Strings(c.Files)
	return c
}

// othersBridge says whether a bridge of that index belongs to another node on
// this machine, whose pods come and go as they like.
func (n *Node) othersBridge(links []netlink.Link, index int) bool {
	for _, l := range links {
		if l.Type() == "bridge" && l.Attrs().Index == index {
			return l.Attrs().Name != n.bridge()
		}
	}
	return false
}

// bridge is the name of this node's bridge: the instance is a checksum of the
// run directory where nothing else is said, and the bridge a digest of that.
func (n *Node) bridge() string {
	instance := fmt.Sprintf("%08x", crc32.ChecksumIEEE([]byte(n.RunDir())))
	h := sha256.Sum256([]byte(instance))
	return "podd-" + hex.EncodeToString(h[:5])
}

// NoLeaks compares with an earlier count and waits a moment for what is on
// its way out.
func (n *Node) NoLeaks(t testing.TB, before Counts, within time.Duration) {
	t.Helper()
	if leaks := n.Leaks(before, within); len(leaks) > 0 {
		t.Errorf("left behind:\n  %s", strings.Join(leaks, "\n  "))
	}
}

// Leaks tells what NoLeaks fails for.
func (n *Node) Leaks(before Counts, within time.Duration) []string {
	n.t.Helper()
	deadline := time.Now().Add(Scale(within))
	for {
		now := n.Count()
		leaks := now.beyond(before)
		if len(leaks) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			if now.ShimFDs > before.ShimFDs {
				leaks = append(leaks, "podd-shim has open: "+strings.Join(open(n.ShimPID()), " "))
			}
			if now.FDs > before.FDs+2 {
				leaks = append(leaks, "podd has open: "+strings.Join(open(n.PID()), " "))
			}
			return leaks
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// beyond tells what there is more than before.
func (c Counts) beyond(before Counts) (leaks []string) {
	number := func(what string, before, now, slack int) {
		if now > before+slack {
			leaks = append(leaks, fmt.Sprintf("%s: %d, before %d", what, now, before))
		}
	}
	// The count itself holds a connection and its goroutines.
	number("file descriptors of podd", before.FDs, c.FDs, 2)
	// Some of the shim's wait for Go's garbage collector; a hundred pods
	// would show a real leak.
	number("file descriptors of podd-shim", before.ShimFDs, c.ShimFDs, 8)
	number("goroutines", before.Goroutines, c.Goroutines, 4)
	added := func(what string, before, now []string) {
		var more []string
		for _, x := range now {
			if !slices.Contains(before, x) {
				more = append(more, x)
			}
		}
		if len(more) > 0 {
			leaks = append(leaks, fmt.Sprintf("%d %s: %s", len(more), what, strings.Join(more[:min(len(more), 20)], " ")))
		}
	}
	added("mounts", before.Mounts, c.Mounts)
	added("cgroups", before.Cgroups, c.Cgroups)
	added("veths", before.Links, c.Links)
	added("files", before.Files, c.Files)
	return leaks
}

func fds(pid int) int {
	d, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return 0
	}
	return len(d)
}

// open names what a process has open.
func open(pid int) (names []string) {
	found, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, f := range found {
		if to, err := os.Readlink(f); err == nil {
			names = append(names, to)
		}
	}
	sort.Strings(names)
	return names
}

// mountsBelow lists the mount points below dir.
func mountsBelow(mountinfo, dir string) (points []string) {
	b, err := os.ReadFile(mountinfo)
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			points = append(points, f[4])
		}
	}
	return points
}

func hierarchies() []string {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return []string{"/sys/fs/cgroup"}
	}
	found, _ := filepath.Glob("/sys/fs/cgroup/*")
	return found
}

// cgroups below root in every hierarchy.
func cgroups(root string) (dirs []string) {
	for _, h := range hierarchies() {
		filepath.WalkDir(filepath.Join(h, root), func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
	}
	return dirs
}

// removeCgroups takes the node's own cgroups away, the innermost first.
func removeCgroups(root string) {
	dirs := cgroups(root)
	sort.Slice(dirs, func(i, j int) bool { return len(dirs[i]) > len(dirs[j]) })
	for _, d := range dirs {
		os.Remove(d)
	}
}
