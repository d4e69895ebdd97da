package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/node"
)

// TestKilledDaemonsDisturbNoContainer kills podd, podd-shim and both while
// containers write numbered lines.
func TestKilledDaemonsDisturbNoContainer(t *testing.T) {
	for _, tt := range []struct {
		name       string
		podd, shim bool
		down       time.Duration // how long podd stays down
	}{
		{"podd", true, false, 0},
		{"podd-for-three-seconds", true, false, 3 * second},
		{"shim", false, true, 0},
		{"both", true, true, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := start(t)
			const pods = 3
			var names []string
			for i := range pods {
				name := fmt.Sprintf("writer%d", i)
				names = append(names, name)
				n.Write(name+".yaml", pod(name, "", "lines", "1ms"))
			}
			n.WaitRunning(names...)
			before := map[string]*v1.Pod{}
			for _, name := range names {
				node.Await(t, name+" writing", 10*second, func() bool { return len(lines(t, n, name)) > 50 })
				p, err := n.Pod(name)
				if err != nil {
					t.Fatal(err)
				}
				before[name] = p
			}
			pids := n.Processes("/testserver lines 1ms")
			if len(pids) != pods { // they have written lines, so their programs run
				t.Fatalf("%d writers run, want %d", len(pids), pods)
			}

			for round := range 3 {
				if tt.shim {
					shim := n.ShimPID()
					if shim == 0 {
						t.Fatal("podd-shim does not answer")
					}
					if err := syscall.Kill(shim, syscall.SIGKILL); err != nil {
						t.Fatal(err)
					}
				}
				if tt.podd {
					n.Signal(syscall.SIGKILL)
					if tt.down > 0 && round == 0 {
						time.Sleep(tt.down) // the time that this test is about
					}
					n.Start()
				}
				begin := time.Now()
				node.Await(t, "podd and podd-shim answering", 15*second, func() bool { return n.ShimPID() != 0 })
				for _, name := range names {
					n.WaitPod(name, "running", 15*second, node.Running)
				}
				if took := time.Since(begin); took > node.Scale(2*second) {
					t.Errorf("round %d: back after %v, want within a second or so", round, took)
				}
			}

			if now := n.Processes("/testserver lines 1ms"); len(now) != pods {
				t.Errorf("writers now: %v, before: %v", now, pids)
			} else {
				for pid := range now {
					if !pids[pid] {
						t.Errorf("writers now: %v, before: %v", now, pids)
					}
				}
			}
			for _, name := range names {
				p, err := n.Pod(name)
				if err != nil {
					t.Fatal(err)
				}
				was := before[name]
				if p.UID != was.UID || status(p).ContainerID != status(was).ContainerID || status(p).RestartCount != 0 || !status(p).State.Running.StartedAt.Equal(&status(was).State.Running.StartedAt) {
					t.Errorf("%s: before %+v, now %+v", name, status(was), status(p))
				}
				far := slices.Max(lines(t, n, name))
				node.Await(t, name+" going on", 10*second, func() bool { return slices.Max(lines(t, n, name)) > far+20 })
				unbroken(t, name, lines(t, n, name), tt.shim)
				if out := n.OK("exec", node.PodName(name), "--", "/testserver", "env"); out == "" {
					t.Errorf("%s: exec says nothing", name)
				}
			}
			for _, name := range names {
				n.Remove(name + ".yaml")
			}
			n.WaitGone(15 * second)
		})
	}
}

func TestExitsWhilePoddIsDownAreKnown(t *testing.T) {
	n := start(t)
	n.Write("seven.yaml", pod("seven", "restartPolicy: Never", "exit", "7", "1500ms"))
	n.Write("always.yaml", pod("always", "", "exit", "5", "1500ms"))
	n.WaitRunning("seven", "always")
	n.Signal(syscall.SIGKILL)
	node.Await(t, "the containers ended", 15*second, func() bool { return len(n.Processes("/testserver exit")) == 0 })
	n.Start()
	p := n.WaitPod("seven", "failed", 15*second, func(p *v1.Pod) bool { return p.Status.Phase == v1.PodFailed })
	if st := terminated(p); st == nil || st.ExitCode != 7 {
		t.Errorf("got %+v", status(p))
	}
	n.WaitPod("always", "restarted", 15*second, func(p *v1.Pod) bool {
		last := status(p).LastTerminationState.Terminated
		return status(p).RestartCount == 1 && last != nil && last.ExitCode == 5
	})
}

func TestExitsWhileTheShimIsDownAreNeverInvented(t *testing.T) {
	n := start(t)
	n.Write("seven.yaml", pod("seven", "restartPolicy: Never", "exit", "7", "1s"))
	n.WaitRunning("seven")
	shim := n.ShimPID()
	n.Signal(syscall.SIGKILL)
	if err := syscall.Kill(shim, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	node.Await(t, "the container ended", 15*second, func() bool { return len(n.Processes("/testserver exit 7")) == 0 })
	n.Start()
	p := n.WaitPod("seven", "ended", 15*second, func(p *v1.Pod) bool { return terminated(p) != nil })
	switch st := terminated(p); {
	case st.ExitCode == 7:
	case st.ExitCode == 255 && st.Reason == "Unknown": // before Linux 6.15; the words are containerd's
	default:
		t.Errorf("got %+v, want 7 or 255 and Unknown", st)
	}
}

func TestManifestChangesWhileDownAreCaughtUp(t *testing.T) {
	n := start(t)
	n.Write("goes.yaml", pod("goes", "", "pause"))
	n.Write("stays.yaml", pod("stays", "", "pause"))
	n.WaitRunning("goes", "stays")
	stays, err := n.Pod("stays")
	if err != nil {
		t.Fatal(err)
	}
	n.Signal(syscall.SIGKILL)
	n.Remove("goes.yaml")
	n.Write("comes.yaml", pod("comes", "", "pause"))
	n.Start()
	n.WaitRunning("comes", "stays")
	n.WaitPods("goes gone", 15*second, func(pods map[string]*v1.Pod) bool { return pods["default/"+node.PodName("goes")] == nil })
	p, err := n.Pod("stays")
	if err != nil || p.UID != stays.UID || status(p).ContainerID != status(stays).ContainerID {
		t.Errorf("stays was disturbed: %v", err)
	}
}

func TestBrokenRecordIsSetAside(t *testing.T) {
	n := start(t)
	n.Write("a.yaml", pod("a", "", "pause"))
	n.Write("b.yaml", pod("b", "", "pause"))
	n.WaitRunning("a", "b")
	n.Signal(syscall.SIGTERM)
	// Whatever the records are: one file cut off must not keep podd down.
	var broken string
	filepath.WalkDir(filepath.Join(n.Dir, "data"), func(path string, e os.DirEntry, err error) error {
		if err == nil && broken == "" && e.Type().IsRegular() && filepath.Ext(path) == ".json" {
			broken = path
		}
		return nil
	})
	if broken == "" {
		t.Skip("no record in a file of its own below the data directory")
	}
	if err := os.Truncate(broken, 3); err != nil {
		t.Fatal(err)
	}
	n.Start()
	n.WaitRunning("a", "b")
}
