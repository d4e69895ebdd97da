package cgroups

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
)

// join measures the median of cold joins: each after a pause in which the
// kernel's state settles.
func join(t *testing.T, tree *Tree) time.Duration {
	t.Helper()
	l := tree.layout
	if err := tree.Ensure(t.Context(), "j", v1.PodQOSBestEffort, nil); err != nil {
		t.Fatal(err)
	}
	dir := l.hierarchies[0].dir + tree.Path("j", v1.PodQOSBestEffort)
	for _, sub := range []string{"/a", "/b"} {
		if err := os.Mkdir(dir+sub, 0o755); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/bin/sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	var all []time.Duration
	for i := range 7 {
		time.Sleep(100 * time.Millisecond) // the pause that is measured
		start := time.Now()
		if err := writeFile(dir+[]string{"/a", "/b"}[i%2], "cgroup.procs", fmt.Sprint(cmd.Process.Pid)); err != nil {
			t.Fatal(err)
		}
		all = append(all, time.Since(start))
	}
	slices.Sort(all)
	return all[len(all)/2]
}

func TestFavorDynMods(t *testing.T) {
	if os.Getenv("PODD_TEST_HOST_WIDE") == "" {
		t.Skip("changes a setting of the whole host, since Linux 6.18 until its reboot: set PODD_TEST_HOST_WIDE=1")
	}
	l, err := discover()
	if err != nil {
		t.Skip(err)
	}
	tree := testTree(t, l)
	dir := filepath.Join(t.TempDir(), "favordynmods")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	mounted := func() bool { return strings.Contains(readString(t, "/proc/self/mountinfo"), ",favordynmods") }
	before := join(t, tree)
	for range 2 {
		if err := FavorDynMods(t.Context(), true, dir); err != nil {
			t.Fatal(err)
		}
	}
	if !mounted() {
		t.Error("the option is not on")
	}
	t.Logf("cold join: %s before, %s with favordynmods", before, join(t, tree))
	for range 2 {
		if err := FavorDynMods(t.Context(), false, dir); err != nil {
			t.Fatal(err)
		}
	}
	if mounted() {
		t.Error("the option is still on")
	}
	after := join(t, tree)
	var w Warmer
	done := w.Warm()
	time.Sleep(60 * time.Millisecond)
	warm := join(t, tree)
	done()
	t.Logf("cold join after: %s, warmed: %s", after, warm)
}
