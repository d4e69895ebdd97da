package pods

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
)

func TestRecordsOfEveryReleaseLoad(t *testing.T) {
	r, err := readRecord("testdata/records/v1.json")
	if err != nil {
		t.Fatal(err)
	}
	if r.Pod.Name != "web-n1" || !r.Stopped || r.Stop.Grace != 5*time.Second || r.Stop.Reason != "Stopped" || r.Attempts["a"] != 3 ||
		r.Backoffs["a"].Delay != 20*time.Second || !r.Probes["c2"].Ready || r.Applied["a"].Image != "img:0" ||
		r.Status.ContainerStatuses[0].RestartCount != 2 || r.Build != "v0.1.0" {
		t.Fatalf("%+v", r)
	}
	// What is written now has all fields of what is read.
	data, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	golden, _ := os.ReadFile("testdata/records/v1.json")
	var a, b any
	json.Unmarshal(golden, &a)
	json.Unmarshal(data, &b)
	if !contains(dropNull(a), dropNull(b)) {
		t.Fatalf("a field is lost:\n%s", data)
	}
}

// dropNull removes nulls, which say nothing.
func dropNull(v any) any {
	if m, ok := v.(map[string]any); ok {
		for k, x := range m {
			if x == nil {
				delete(m, k)
			} else {
				dropNull(x)
			}
		}
	}
	if l, ok := v.([]any); ok {
		for _, x := range l {
			dropNull(x)
		}
	}
	return v
}

func TestBrokenRecordsAreSetAside(t *testing.T) {
	dir := t.TempDir()
	good, _ := os.ReadFile("testdata/records/v1.json")
	files := map[string]string{
		"v1.json": string(good), "torn.json": string(good[:100]), "empty.json": "", "future.json": `{"version":99,"pod":{"metadata":{"uid":"future","name":"x","namespace":"y"}}}`,
		"nopod.json": `{"version":1}`, "other.json": string(good), "x.json.tmp": "half", "note.txt": "mine",
	}
	for name, data := range files {
		os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600)
	}
	s := newRecords(dir, slog.New(slog.DiscardHandler))
	recs, err := s.load()
	if err != nil || len(recs) != 1 || recs["v1"] == nil {
		t.Fatalf("%v %v", recs, err)
	}
	broken, _ := filepath.Glob(filepath.Join(dir, "*.broken"))
	if len(broken) != 5 {
		t.Errorf("set aside: %v", broken)
	}
	if _, err := os.Stat(filepath.Join(dir, "x.json.tmp")); err == nil {
		t.Error("a half-written record is left")
	}
	s.save("v1", nil)
	s.flush()
	if _, err := os.Stat(filepath.Join(dir, "v1.json")); err == nil {
		t.Error("a deleted record is left")
	}
}

// A record that cannot be written is tried again, the newest of each pod: a
// stop that was ordered while the disk was full must outlive the daemon.
func TestUnwritableRecordIsTriedAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "not", "there")
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s := newRecords(dir, slog.New(slog.DiscardHandler))
		go s.run(ctx)
		s.save("u", &record{Version: 1, Source: "old", Pod: mkpod("a", "u")})
		s.save("gone", nil) // nothing to delete: done
		time.Sleep(time.Second)
		s.save("u", &record{Version: 1, Source: "new", Pod: mkpod("a", "u")})
		time.Sleep(time.Minute)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * retryWrites)
		r, err := readRecord(s.path("u"))
		if err != nil || r.Source != "new" {
			t.Fatalf("record %+v, error %v", r, err)
		}
		if len(s.dirty) != 0 {
			t.Errorf("%d records are still to be written", len(s.dirty))
		}
	})
}

func TestDiffer(t *testing.T) {
	base := container("a")
	base.Env = []v1.EnvVar{{Name: "X", Value: "1"}}
	for _, tc := range []struct {
		name            string
		mod             func(*v1.Container)
		strict, lenient bool
	}{
		{"same", func(*v1.Container) {}, false, false},
		{"image", func(c *v1.Container) { c.Image = "img:2" }, true, true},
		{"variable", func(c *v1.Container) { c.Env = []v1.EnvVar{{Name: "X", Value: "2"}} }, true, true},
		{"one variable more", func(c *v1.Container) { c.Env = append(c.Env, v1.EnvVar{Name: "Y"}) }, true, true},
		{"variable gone", func(c *v1.Container) { c.Env = nil }, true, true},
		{"a new default", func(c *v1.Container) { c.TerminationMessagePath = "/dev/termination-log" }, true, false},
		{"probe", func(c *v1.Container) { c.LivenessProbe = &v1.Probe{PeriodSeconds: 1} }, false, false},
		{"pull policy", func(c *v1.Container) { c.ImagePullPolicy = v1.PullAlways }, false, false},
		{"preStop", func(c *v1.Container) { c.Lifecycle = &v1.Lifecycle{PreStop: &v1.LifecycleHandler{}} }, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := *base.DeepCopy()
			tc.mod(&c)
			if got := differ(containerView(&base), containerView(&c), false); got != tc.strict {
				t.Errorf("strictly %v", got)
			}
			if got := differ(containerView(&base), containerView(&c), true); got != tc.lenient {
				t.Errorf("leniently %v", got)
			}
		})
	}
}

func TestPodsAreListedBeforeTheyAreSeen(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.table.SetPod("file", mkpod("p", "u1"))
		n.table.Synced("file")
		after(time.Second)
		n.stop()
		// The runtime says what there is, and nothing about how it is.
		n.rt.setFault(func(ctx context.Context, call, _ string) error {
			if call == "PodSandboxStatus" || call == "ContainerStatus" {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		})
		n.start()
		synctest.Wait()
		if p, ok := n.table.Get("default", "p"); !ok || p.Status.Phase != v1.PodRunning {
			t.Errorf("listed: %v, %+v", ok, p)
		}
		n.rt.setFault(nil)
	})
}
