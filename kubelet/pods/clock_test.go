package pods

import (
	"path/filepath"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const day = 24 * time.Hour

// edit the record of a pod between two runs of the daemon.
func (n *node) edit(uid string, f func(*record)) {
	n.t.Helper()
	r, err := readRecord(filepath.Join(n.dir, "records", uid+".json"))
	if err != nil {
		n.t.Fatal(err)
	}
	f(r)
	if err := n.table.records.write(r.Pod.UID, r); err != nil {
		n.t.Fatal(err)
	}
}

// A clock that was set back after a pod was told to end, while podd was away,
// gives it no more time than its grace period.
func TestClockSetBackProlongsNoEnd(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		n.rt.onTerm = func(*runtimeapi.ContainerConfig) time.Duration { return 10 * day }
		n.set(mkpod("web", "u1"))
		after(5 * time.Second)
		n.table.RemovePod("file", "u1")
		after(time.Second)
		n.crash()
		n.edit("u1", func(r *record) { r.Stop.Since = r.Stop.Since.Add(day) })
		n.start()
		n.table.Synced("file")
		after(30 * time.Second)
		n.empty()
	})
}

// Containers whose end lies in the future, by the clock as it was, are restarted
// when their back-off is over.
func TestClockSetBackProlongsNoBackOff(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		bubble(t, func(t *testing.T, n *node) {
			n.rt.skew = day
			n.set(mkpod("web", "u1"))
			after(5 * time.Second)
			for want := 2; want <= 4; want++ {
				n.rt.exit(n.rt.live("default/web")["a"].id, 1)
				if restarted {
					n.crash()
					n.start()
					n.set(mkpod("web", "u1"))
				}
				after(45 * time.Second)
				if k := n.rt.starts("default/web/a"); k != want {
					t.Fatalf("restarted %v: %d starts, want %d: %+v", restarted, k, want, n.get("web").Status.ContainerStatuses)
				}
			}
		})
	}
}

// The deadline of a pod that began later than now, by the clock as it was, is
// counted from now.
func TestClockSetBackProlongsNoDeadline(t *testing.T) {
	bubble(t, func(t *testing.T, n *node) {
		pod := mkpod("web", "u1", func(p *v1.Pod) { p.Spec.ActiveDeadlineSeconds = new(int64(60)) })
		n.set(pod)
		after(5 * time.Second)
		n.crash()
		n.edit("u1", func(r *record) { r.Started = r.Started.Add(day) })
		n.start()
		n.set(pod)
		after(90 * time.Second)
		if st := n.get("web").Status; st.Reason != "DeadlineExceeded" {
			t.Errorf("status %+v", st)
		}
	})
}

func TestPast(t *testing.T) {
	now := time.Now()
	for _, tc := range []struct{ in, want time.Time }{
		{time.Time{}, time.Time{}},
		{now.Add(-time.Hour).Round(0), now.Add(-time.Hour)},
		{now.Add(time.Hour).Round(0), now},
		{now, now},
	} {
		if got := past(tc.in, now); got.Round(0) != tc.want.Round(0) || got.Sub(now) != tc.want.Sub(now) {
			t.Errorf("past(%s) = %s, want %s", tc.in, got, tc.want)
		}
	}
}
