package cgroups

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/cgroups/systemd"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// The systemd driver: slices that systemd knows, with limits that it keeps over
// its own reload.
func TestSystemdDriver(t *testing.T) {
	if os.Getuid() != 0 || !systemd.IsRunningSystemd() {
		t.Skip("needs root and systemd as the host's init")
	}
	l, err := discover()
	if err != nil {
		t.Skip(err)
	}
	root := fmt.Sprintf("/poddtest%d", os.Getpid())
	tree, err := newTree(Config{Root: root, Driver: DriverSystemd}, l)
	if err != nil {
		t.Fatal(err)
	}
	show := func(unit, property string) string {
		out, err := exec.Command("systemctl", "show", "--value", "-p", property, unit).CombinedOutput()
		if err != nil {
			t.Fatalf("systemctl show %s: %v: %s", unit, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	t.Cleanup(func() {
		if err := tree.stopSlice(tree.names.root); err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := l.remove(ctx, tree.names.path(tree.names.root)); err != nil {
			t.Error(err)
		}
	})
	const uid = types.UID("12-34")
	unit := tree.Parent(uid, v1.PodQOSBurstable)
	start := time.Now()
	lap := func(what string) {
		t.Logf("%s: %s", what, time.Since(start))
		start = time.Now()
	}
	for _, memory := range []int64{64 << 20, 32 << 20} {
		start = time.Now()
		if err := tree.Ensure(t.Context(), uid, v1.PodQOSBurstable, resources(memory, 512)); err != nil {
			t.Fatal(err)
		}
		lap("ensure")
		if got := show(unit, "MemoryMax"); l.unified && got != fmt.Sprint(memory) {
			t.Errorf("systemd's MemoryMax of %s: %s, want %d", unit, got, memory)
		}
		if out, err := exec.Command("systemctl", "daemon-reload").CombinedOutput(); err != nil {
			t.Fatalf("daemon-reload: %v: %s", err, out)
		}
		if s, err := tree.Stats(uid); err != nil || s.MemoryLimit == nil || *s.MemoryLimit != uint64(memory) {
			t.Errorf("after a reload: %+v, %v; want the limit %d", s, err, memory)
		}
	}
	if got := show(unit, "ActiveState"); got != "active" {
		t.Errorf("unit %s is %s", unit, got)
	}
	if got := show(unit, "ControlGroup"); got != tree.Path(uid, v1.PodQOSBurstable) {
		t.Errorf("unit's group is %s, want %s", got, tree.Path(uid, v1.PodQOSBurstable))
	}
	if err := tree.Ensure(t.Context(), uid, v1.PodQOSBurstable, nil); err != nil {
		t.Fatal(err)
	}
	if s, err := tree.Stats(uid); err != nil || s.MemoryLimit != nil {
		t.Errorf("limit not lifted: %+v, %v", s, err)
	}
	if got, err := tree.List(); err != nil || !slices.Equal(got, []types.UID{uid}) {
		t.Errorf("list: %v, %v", got, err)
	}
	// A process in a group below, as a container's scope is.
	group := tree.Path(uid, v1.PodQOSBurstable) + "/ctr"
	for _, h := range l.hierarchies {
		if _, err := l.mkdir(h, group); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/bin/sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	if err := writeFile(l.hierarchies[0].dir+group, "cgroup.procs", fmt.Sprint(cmd.Process.Pid)); err != nil {
		t.Fatal(err)
	}
	start = time.Now()
	for range 2 {
		if err := tree.Remove(t.Context(), uid); err != nil {
			t.Fatal(err)
		}
		lap("remove")
	}
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Error("the process survived")
	}
	if _, err := os.Stat(l.hierarchies[0].dir + tree.Path(uid, v1.PodQOSBurstable)); !os.IsNotExist(err) {
		t.Errorf("group left: %v", err)
	}
	deadline := time.Now().Add(5 * time.Second)
	for show(unit, "ActiveState") != "inactive" {
		if time.Now().After(deadline) {
			t.Errorf("unit %s is %s, want inactive", unit, show(unit, "ActiveState"))
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	// A second start finds its slices.
	if _, err := newTree(Config{Root: root, Driver: DriverSystemd}, l); err != nil {
		t.Error(err)
	}
}
