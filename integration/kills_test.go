package integration

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/node"
)

// killsWanted is how often TestKills kills: 1,000 times with PODD_TEST_ALL=1, as
// PODD_TEST_KILLS says, a few dozen times otherwise.
func killsWanted(t *testing.T) int {
	if text := os.Getenv("PODD_TEST_KILLS"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatalf("PODD_TEST_KILLS: %v", err)
		}
		return n
	}
	if os.Getenv("PODD_TEST_ALL") != "" {
		return 1000
	}
	return 27
}

// kills is a node whose daemons die all the time.
type kills struct {
	*node.Node
	t       *testing.T
	counts  string
	members []*soakMember
	churn   []*soakMember
	writers []string
	pids    map[int]bool // of the writers
}

func newKills(t *testing.T) *kills {
	k := &kills{Node: node.New(t), t: t, counts: t.TempDir()}
	k.TinyRunDir(6 << 20)
	t.Cleanup(func() { // before the node's own end
		if !t.Failed() {
			return
		}
		keep, err := os.MkdirTemp("", "podd-kills-logs-")
		if err != nil {
			return
		}
		found, _ := filepath.Glob(filepath.Join(k.RunDir(), "shim", "*.log*"))
		for _, f := range append(found, filepath.Join(k.Dir, "podd.log")) {
			if b, err := os.ReadFile(f); err == nil {
				os.WriteFile(filepath.Join(keep, filepath.Base(f)), b, 0o600)
			}
		}
		t.Log("the daemons' logs are in", keep)
	})
	mirror(t, k.Node, "testserver")
	k.Start()
	// A shim's last words are kept beside those of the next one; here they may be.
	if err := os.WriteFile(filepath.Join(k.RunDir(), "shim", "start.log.last"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return k
}

// begin starts pods that stay, with and without probes, and pods to be replaced.
func (k *kills) begin() {
	k.t.Helper()
	for i, kind := range []string{"steady", "probed", "replaced", "replaced", "rewritten"} {
		for _, s := range soakKinds {
			if s.name != kind {
				continue
			}
			m := &soakMember{soakKind: s, name: fmt.Sprintf("%s%d", kind, i)}
			m.write(k.Node, k.counts)
			k.members = append(k.members, m)
			if s.replaced {
				k.churn = append(k.churn, m)
			}
		}
	}
	for i := range 3 {
		name := fmt.Sprintf("writer%d", i)
		k.writers = append(k.writers, name)
		k.Write(name+".yaml", pod(name, "", "lines", "5ms"))
	}
	names := slices.Clone(k.writers)
	for _, m := range k.members {
		names = append(names, m.name)
	}
	k.WaitRunning(names...) // a first start without room would fail, which counts
	node.Await(k.t, "the writers' programs", 20*second, func() bool {
		k.pids = k.Processes("/testserver lines 5ms")
		return len(k.pids) == len(k.writers)
	})
}

// round kills podd (0), podd-shim (1) or both (2); starting: while a pod starts;
// full: while there is no room in the run directory.
func (k *kills) round(which int, starting, full bool) {
	k.t.Helper()
	if starting {
		m := k.churn[rand.IntN(len(k.churn))]
		m.version++
		m.write(k.Node, k.counts)
		time.Sleep(rand.N(150 * time.Millisecond)) // somewhere in its start
	}
	shim := 0
	if which != 0 {
		node.Await(k.t, "podd-shim answering", 30*second, func() bool { shim = k.ShimPID(); return shim != 0 })
	}
	empty := func() {}
	if full {
		empty = k.FillRunDir()
	}
	if which != 0 {
		if err := syscall.Kill(shim, syscall.SIGKILL); err != nil {
			k.t.Fatal(err)
		}
	}
	if which != 1 {
		k.Signal(syscall.SIGKILL)
		k.Start()
	}
	node.Await(k.t, "podd and podd-shim answering", 30*second, func() bool { now := k.ShimPID(); return now != 0 && now != shim })
	empty()
}

// undisturbed checks that the writers' programs are those of the beginning.
func (k *kills) undisturbed(after int) {
	k.t.Helper()
	now := k.Processes("/testserver lines 5ms")
	for pid := range k.pids {
		if !now[pid] {
			k.t.Fatalf("after %d kills: writers %v, they were %v", after, now, k.pids)
		}
	}
	if len(now) != len(k.pids) {
		k.t.Fatalf("after %d kills: writers %v, they were %v", after, now, k.pids)
	}
}

// settled waits for what the manifests say, and wants each program started once.
func (k *kills) settled() {
	k.t.Helper()
	byKey := map[string]*soakMember{}
	for _, m := range k.members {
		byKey["default/"+node.PodName(m.name)] = m
	}
	k.WaitPods("all as their manifests say", 2*time.Minute, func(pods map[string]*v1.Pod) bool {
		right := 0
		for key, p := range pods {
			m := byKey[key]
			if m != nil && p.DeletionTimestamp == nil && m.settled(p) && p.Spec.Containers[0].Env[0].Value == fmt.Sprint(m.version) {
				right++
			}
		}
		return right == len(k.members) && len(pods) == right+len(k.writers)
	})
	for _, m := range k.members {
		if m.replaced {
			continue // a start without room fails, which counts
		}
		p, err := k.Pod(m.name)
		if err != nil {
			k.t.Fatal(err)
		}
		if got := status(p).RestartCount; got != 0 {
			k.t.Errorf("%s was restarted %d times: %+v", m.name, got, status(p))
		}
	}
	found, _ := filepath.Glob(filepath.Join(k.counts, "start.*"))
	for _, f := range found {
		b, err := os.ReadFile(f)
		if err != nil {
			k.t.Fatal(err)
		}
		if lines := bytes.Count(b, []byte("\n")); lines > 1 {
			k.t.Errorf("%s was started %d times in one life:\n%s", strings.Fields(string(b))[0], lines, b)
		}
	}
	if b, err := os.ReadFile(filepath.Join(k.counts, "double")); err == nil {
		k.t.Errorf("two ran at once under one name:\n%s", b)
	}
}

// TestKills kills podd, podd-shim and both, a third of the times while pods
// start, on a run directory that fills up and is emptied now and then: no
// program notices, none starts twice, no line is lost, no probe fails for it,
// and nothing is left.
func TestKills(t *testing.T) {
	k := newKills(t)
	before := settled(k.Node)
	k.begin()
	want, begin := killsWanted(t), time.Now()
	for i := range want {
		k.round(i%3, i/3%3 == 0, i%5 == 4)
		if i%20 == 19 || i == want-1 {
			k.undisturbed(i + 1)
		}
		if i%100 == 99 {
			t.Logf("%d kills in %v", i+1, time.Since(begin).Round(second))
		}
	}
	t.Logf("%d kills in %v", want, time.Since(begin).Round(second))
	k.settled()
	k.undisturbed(want)
	for _, name := range k.writers {
		p, err := k.Pod(name)
		if err != nil {
			t.Fatal(err)
		}
		if status(p).RestartCount != 0 {
			t.Errorf("%s: %+v", name, status(p))
		}
		unbroken(t, name, lines(t, k.Node, name), false)
	}
	for _, m := range k.members {
		k.Remove(m.name + ".yaml")
	}
	for _, name := range k.writers {
		k.Remove(name + ".yaml")
	}
	k.WaitGone(time.Minute)
	k.NoLeaks(t, before, 30*second)
	if log, err := os.ReadFile(filepath.Join(k.Dir, "podd.log")); err == nil && bytes.Contains(log, []byte("panic")) {
		t.Error("podd's log tells of a panic")
	}
}
