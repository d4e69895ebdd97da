package pods

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

func noHostUsers(p *v1.Pod) { no := false; p.Spec.HostUsers = &no }

func testUserns(t *testing.T, count uint64) *userns {
	dir := t.TempDir()
	return &userns{
		ids:    userIDs{first: 65536, count: count * 65536, perPod: 65536},
		podDir: func(uid types.UID) string { return filepath.Join(dir, string(uid)) },
		used:   map[uint64]types.UID{},
	}
}

func TestUserIDsOfPodsNeverOverlap(t *testing.T) {
	u := testUserns(t, 2)
	first := func(uid string) uint32 {
		t.Helper()
		m, err := u.get(mkpod("p", uid, noHostUsers))
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Uids) != 1 || len(m.Gids) != 1 || m.Uids[0].Length != 65536 || m.Uids[0].ContainerId != 0 {
			t.Fatalf("mapping %v", m)
		}
		return m.Uids[0].HostId
	}
	if m, err := u.get(mkpod("p", "host")); m != nil || err != nil {
		t.Errorf("a pod with the host's users has %v, %v", m, err)
	}
	a, b := first("a"), first("b")
	if a != 65536 || b != 2*65536 || first("a") != a {
		t.Errorf("first ids: %d, %d", a, b)
	}
	if _, err := u.get(mkpod("p", "c", noHostUsers)); !errdefs.IsUnavailable(err) {
		t.Errorf("a third of two: %v", err)
	}
	// Another run of the daemon knows them by their files alone.
	u.used = map[uint64]types.UID{}
	if problems := u.recover([]types.UID{"a", "b", "none"}); problems != nil {
		t.Fatal(problems)
	}
	if _, err := u.get(mkpod("p", "c", noHostUsers)); err == nil {
		t.Error("ids in use are given away after a restart")
	}
	os.RemoveAll(u.podDir("a"))
	u.release("a")
	if c := first("c"); c != a {
		t.Errorf("released ids are not used again: %d", c)
	}
	// A file that somebody has changed gives no pod another's ids, nor root's.
	for _, content := range []string{
		`{"uidMappings":[{"hostId":131072,"containerId":0,"length":65536}],"gidMappings":[{"hostId":131072,"containerId":0,"length":65536}]}`,
		`{"uidMappings":[{"hostId":0,"containerId":0,"length":65536}],"gidMappings":[{"hostId":0,"containerId":0,"length":65536}]}`,
		`{`,
	} {
		os.MkdirAll(u.podDir("evil"), 0o700)
		os.WriteFile(filepath.Join(u.podDir("evil"), "userns"), []byte(content), 0o600)
		if m, err := u.get(mkpod("p", "evil", noHostUsers)); err == nil {
			t.Errorf("%s gives %v", content, m)
		}
	}
}

func TestSubordinateIDs(t *testing.T) {
	for _, tc := range []struct {
		out  string
		want userIDs
		bad  bool
	}{
		{out: "0: kubelet 65536 7208960\n", want: userIDs{first: 65536, count: 7208960, perPod: 65536}},
		{out: "0: kubelet 65536 7208960\n1: kubelet 7274496 65536\n", bad: true},
		{out: "0: kubelet 65537 65536\n", bad: true},
		{out: "0: kubelet 65536 100\n", bad: true},
		{out: "0: kubelet 0 65536\n", bad: true},
		{out: "0: kubelet 4294901760 131072\n", bad: true},
		{out: "", bad: true},
	} {
		got, err := parseSubIDs(tc.out, 65536)
		if (err != nil) != tc.bad || !tc.bad && got != tc.want {
			t.Errorf("%q: %+v, %v", tc.out, got, err)
		}
	}
	for _, n := range []int64{-65536, 1, 65537} {
		if _, err := hostUserIDs(n); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%d ids per pod: %v", n, err)
		}
	}
}

func TestUserNamespaceOfAPod(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.table.SetPod("file", mkpod("web", "u1", noHostUsers))
		n.table.SetPod("file", mkpod("other", "u2", noHostUsers))
		n.table.Synced("file")
		after(time.Second)
		first := map[uint32]bool{}
		for _, pod := range []string{"web", "other"} {
			c := n.rt.live("default/" + pod)["a"]
			ids := c.cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions
			sandbox := n.rt.sandboxes[c.sandbox].cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions
			if ids.GetUids()[0].HostId != sandbox.GetUids()[0].HostId {
				t.Error("container and sandbox differ")
			}
			for _, m := range c.cfg.Mounts {
				if len(m.UidMappings) != 1 || len(m.GidMappings) != 1 {
					t.Errorf("mount %s is not mapped", m.ContainerPath)
				}
			}
			first[ids.GetUids()[0].HostId] = true
		}
		if len(first) != 2 {
			t.Errorf("ranges: %v", first)
		}
		n.table.RemovePod("file", "u1")
		n.table.RemovePod("file", "u2")
		after(time.Minute)
		if len(n.table.userns.used) != 0 {
			t.Errorf("ids are still in use: %v", n.table.userns.used)
		}
	})
}

// TestASlowDiskHoldsUpOnePodsIDs and nobody else's.
func TestASlowDiskHoldsUpOnePodsIDs(t *testing.T) {
	u := testUserns(t, 4)
	dir, answers := u.podDir, make(chan struct{})
	u.podDir = func(uid types.UID) string {
		if uid == "slow" {
			<-answers
		}
		return dir(uid)
	}
	slow := make(chan error, 1)
	go func() { _, err := u.get(mkpod("p", "slow", noHostUsers)); slow <- err }()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if _, err := u.get(mkpod("p", "quick", noHostUsers)); err != nil {
			t.Error(err)
		}
		u.release("quick")
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Error("another pod waits for the file of the first")
	}
	close(answers)
	if err := <-slow; err != nil {
		t.Error(err)
	}
}
