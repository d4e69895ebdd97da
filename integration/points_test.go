package integration

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/podd-runtime/podd/integration/killpoint"
	"github.com/podd-runtime/podd/integration/node"
)

// operation is something that podd does, and in the middle of which a daemon is
// killed.
type operation struct {
	name    string
	daemons []string // of podd and shim: who has a part in it
	long    bool     // too slow for an ordinary run
	// begin begins it. ended says that it is over, as far as the outside shows:
	// podd is asked nothing meanwhile, as its answers would be points.
	begin func(s *stage) (ended func() bool)
	// trace starts the trace of the daemon with that PID, after what has to be
	// done before; nil: nothing has to.
	trace func(s *stage, pid int, aim killpoint.Aim) (*killpoint.Trace, error)
	// resume lets the other daemon go on when the trace has ended; nil: it did.
	resume func(s *stage)
	// holds waits, once the daemons are back, until the laws of the operation
	// hold, and tells the one that does not.
	holds func(s *stage) error
	undo  func(s *stage) error
}

// stage is a node with what stands by while daemons are killed.
type stage struct {
	*node.Node
	t      *testing.T
	counts string // directory in which programs note that they run
	round  int
	before node.Counts
	images []string
	pids   map[int]bool // of the bystanders

	container string // of the bystander that commands run in
	told      error  // what the operation's own caller was told
	done      chan struct{}
}

// quiet is how long a daemon that has nothing to do any more makes no call: the
// slowest of what follows an end, podd's records, is written within 100 ms.
const quiet = 250 * time.Millisecond

// settling is how long a node may take to be as it has to be: a kill in the
// middle of a pod's start ends in its second try, one of a pull in a back-off of
// 10 s at the most.
const settling = 60 * second

func newStage(t *testing.T) *stage {
	s := &stage{Node: node.New(t), t: t, counts: t.TempDir()}
	mirror(t, s.Node, "testserver")
	for _, name := range []string{"by", "settle"} {
		s.notes(name)
	}
	s.Write("conf.yaml", pointConf(0))
	s.Start()
	s.Write("by.yaml", fmt.Sprintf(pointPod, "by", s.counts))
	s.Write("writer.yaml", pod("writer", "", "lines", "1s"))
	s.WaitRunning("by", "writer")
	node.Await(t, "the bystanders' programs", 20*second, func() bool {
		s.pids = s.bystanders()
		return len(s.pids) == 2
	})
	by, err := s.Pod("by")
	if err != nil {
		t.Fatal(err)
	}
	_, s.container, _ = strings.Cut(status(by).ContainerID, "://")
	s.Write("settle.yaml", fmt.Sprintf(pointPod, "settle", s.counts))
	s.WaitRunning("settle")
	s.Remove("settle.yaml")
	awaitGone(t, s.Node, 20*second, "settle")
	node.Await(t, "what was removed being gone", 20*second, func() bool {
		found, err := filepath.Glob(filepath.Join(s.Dir, "data", "images", "trash", "*"))
		return err == nil && len(found) == 0
	})
	s.before, s.images = s.Count(), s.imageFiles()
	return s
}

// bystanders are the processes that nothing may happen to.
func (s *stage) bystanders() map[int]bool {
	all := s.Processes("/testserver lines 1s")
	for pid := range s.Processes("counted /counts/by/") {
		all[pid] = true
	}
	return all
}

// forGood is a law's breach that no waiting heals.
type forGood struct{ error }

func broken(format string, args ...any) error { return forGood{fmt.Errorf(format, args...)} }

// within waits until there is no error, and returns the last one.
func within(d time.Duration, f func() error) error {
	deadline := time.Now().Add(node.Scale(d))
	for {
		err := f()
		if err == nil || errors.As(err, &forGood{}) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// pid of a daemon.
func (s *stage) pid(daemon string) int {
	if daemon == "podd" {
		return s.PID()
	}
	shim := 0
	node.Await(s.t, "podd-shim answering", 30*second, func() bool { shim = s.ShimPID(); return shim != 0 })
	return shim
}

// kill lets an operation begin and kills the daemon at a point of it. It returns
// the points that there were, and the last of them when that was the end.
func (s *stage) kill(op operation, daemon string, aim killpoint.Aim) (points []killpoint.Point, struck *killpoint.Point) {
	s.t.Helper()
	s.round++
	s.told, s.done = nil, nil
	pid := s.pid(daemon)
	begin := op.trace
	if begin == nil {
		begin = func(_ *stage, pid int, aim killpoint.Aim) (*killpoint.Trace, error) { return killpoint.Start(pid, aim) }
	}
	trace, err := begin(s, pid, aim)
	if err != nil {
		s.t.Fatal(err)
	}
	follow(trace, op.begin(s))
	points, struck = trace.Stop(), trace.Struck()
	if op.resume != nil {
		op.resume(s)
	}
	switch {
	case struck == nil:
	case daemon == "podd":
		s.Ended()
		s.Start()
	default:
		node.Await(s.t, "another podd-shim answering", 30*second, func() bool { now := s.ShimPID(); return now != 0 && now != pid })
	}
	return points, struck
}

// follow waits until the traced daemon is killed or has nothing more to do for
// the operation.
func follow(trace *killpoint.Trace, ended func() bool) {
	var over time.Time
	for deadline := time.Now().Add(node.Scale(settling)); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if over.IsZero() && ended() {
			over = time.Now()
		}
		// A daemon may have other things to do and never be quiet for long.
		if trace.Struck() != nil || !over.IsZero() && (trace.Quiet(quiet) || time.Since(over) > 8*quiet) {
			return
		}
	}
}

// lawful checks all that must hold after a kill, and brings the node back to
// where it was.
func (s *stage) lawful(op operation) error {
	if s.done != nil {
		select {
		case <-s.done:
		case <-time.After(node.Scale(settling)):
			return errors.New("who asked for it is told nothing")
		}
	}
	if err := op.holds(s); err != nil {
		return err
	}
	if err := s.undisturbed(); err != nil {
		return err
	}
	if err := op.undo(s); err != nil {
		return fmt.Errorf("when it is undone: %w", err)
	}
	if leaks := s.Leaks(s.before, 15*second); len(leaks) > 0 {
		return fmt.Errorf("left behind: %s", strings.Join(leaks, "; "))
	}
	return within(15*second, func() error {
		for _, f := range s.imageFiles() {
			if !slices.Contains(s.images, f) {
				return fmt.Errorf("left of images: %s", f)
			}
		}
		return nil
	})
}

// undisturbed: nothing happened to the bystanders, and no two ran at once under
// one name.
func (s *stage) undisturbed() error {
	now := s.bystanders()
	for pid := range s.pids {
		if !now[pid] {
			return fmt.Errorf("bystanders are %v, they were %v", now, s.pids)
		}
	}
	if len(now) != len(s.pids) {
		return fmt.Errorf("bystanders are %v, they were %v", now, s.pids)
	}
	for _, name := range []string{"by", "writer"} {
		p, err := s.Pod(name)
		if err != nil {
			return err
		}
		if !node.Running(p) || status(p).RestartCount != 0 {
			return fmt.Errorf("%s is told to be %+v", name, status(p))
		}
	}
	if b, err := os.ReadFile(filepath.Join(s.counts, "double")); err == nil {
		return fmt.Errorf("two ran at once under one name: %s", b)
	}
	if set, _ := filepath.Glob(filepath.Join(s.Dir, "*", "*", "quarantine", "*")); len(set) > 0 {
		return fmt.Errorf("records in quarantine: %v", set)
	}
	return nil
}

// imageFiles is what the image store keeps, by the names of its directories.
func (s *stage) imageFiles() (names []string) {
	root := filepath.Join(s.Dir, "data", "images")
	for _, depth := range []string{"*/*", "content/*/*", "content/*/*/*"} {
		found, _ := filepath.Glob(filepath.Join(root, depth))
		for _, f := range found {
			rel, _ := filepath.Rel(root, f)
			names = append(names, rel)
		}
	}
	return names
}

// target is a point of a daemon in an operation.
type target struct {
	op     operation
	daemon string
	aim    killpoint.Aim
}

func (g target) String() string {
	side := "before"
	if g.aim.After {
		side = "after"
	}
	return fmt.Sprintf("%s/%s/%d/%s", g.op.name, g.daemon, g.aim.Point, side)
}

// sweep kills at the targets, on a new node after each violation.
type sweep struct {
	t                         *testing.T
	s                         *stage
	kills, missed, violations int
}

func (w *sweep) stage() *stage {
	if w.s == nil {
		w.s = newStage(w.t)
	}
	return w.s
}

// at kills at one point and checks the laws.
func (w *sweep) at(g target) (points []killpoint.Point) {
	s := w.stage()
	points, struck := s.kill(g.op, g.daemon, g.aim)
	if struck != nil {
		w.kills++
	} else if g.aim.Point != 0 {
		w.missed++
	}
	err := s.lawful(g.op)
	if s.told != nil && g.aim.Point == 0 {
		err = errors.Join(err, fmt.Errorf("told, though nothing was killed: %w", s.told))
	}
	if err == nil {
		return points
	}
	w.violations++
	where := "not killed"
	if struck != nil {
		where = struck.String()
	}
	trail := ""
	for _, p := range points[max(0, len(points)-6):] {
		trail += "\n\t" + p.String()
	}
	w.t.Errorf("%v (%s): %v; the last points:%s\nagain by PODD_TEST_POINT=%v", g, where, err, trail, g)
	w.keep(g)
	w.s = nil
	return points
}

// keep saves the daemons' logs of a violation.
func (w *sweep) keep(g target) {
	dir, err := os.MkdirTemp("", "podd-points-logs-")
	if err != nil {
		return
	}
	found, _ := filepath.Glob(filepath.Join(w.s.RunDir(), "shim", "*.log*"))
	for _, f := range append(found, filepath.Join(w.s.Dir, "podd.log")) {
		if b, err := os.ReadFile(f); err == nil {
			os.WriteFile(filepath.Join(dir, filepath.Base(f)), b, 0o600)
		}
	}
	w.t.Logf("%v: the daemons' logs are in %s", g, dir)
}

// count runs an operation through and returns the number of its points. Where
// PODD_TEST_POINTS_LIST is set they are told.
func (w *sweep) count(op operation, daemon string) int {
	points := w.at(target{op, daemon, killpoint.Aim{}})
	w.t.Logf("%s: %d points of %s", op.name, len(points), daemon)
	if os.Getenv("PODD_TEST_POINTS_LIST") != "" {
		for _, p := range points {
			w.t.Log(p)
		}
	}
	return len(points)
}

// sampled is how many points an ordinary run takes: as many as fit into half a
// minute.
const sampled = 25

// TestNothingIsLostAtAnyPoint kills podd or podd-shim before or after a system
// call with an effect, by its number, in the middle of each operation: what runs
// is what the manifests say, no program starts twice, pods beside notice
// nothing, and nothing is left. It takes a sample;
//
//	PODD_TEST_ALL=1                     all points
//	PODD_TEST_POINTS=start/shim         all of the operations that begin so
//	PODD_TEST_POINT=start/podd/7/after  this one
//	PODD_TEST_SEED=n                    the sample of that run
func TestNothingIsLostAtAnyPoint(t *testing.T) {
	w := &sweep{t: t}
	defer func() {
		t.Logf("%d kills, %d points not reached, %d violations", w.kills, w.missed, w.violations)
	}()
	ops := operations(t)
	if one := os.Getenv("PODD_TEST_POINT"); one != "" {
		w.at(parseTarget(t, ops, one))
		return
	}
	draw := pointSource(t)
	only := os.Getenv("PODD_TEST_POINTS")
	all := os.Getenv("PODD_TEST_ALL") != "" || only != ""
	var parts []target
	for _, op := range ops {
		for _, daemon := range op.daemons {
			if strings.HasPrefix(op.name+"/"+daemon, only) && (all || !op.long) {
				parts = append(parts, target{op: op, daemon: daemon})
			}
		}
	}
	for i, g := range parts {
		n := w.count(g.op, g.daemon)
		if n == 0 {
			t.Fatalf("%s: no points of %s", g.op.name, g.daemon)
		}
		points := draw.Perm(n)
		if all {
			slices.Sort(points)
		} else {
			points = points[:min(n, sampled*(i+1)/len(parts)-sampled*i/len(parts))]
		}
		begin := time.Now()
		for _, point := range points {
			g.aim = killpoint.Aim{Point: point + 1, After: draw.IntN(2) == 1}
			w.at(g)
		}
		t.Logf("%s, %s: killed at %d of %d points in %v", g.op.name, g.daemon, len(points), n, time.Since(begin).Round(second))
	}
	w.end()
}

// pointSource draws points, those of another run with its seed.
func pointSource(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("PODD_TEST_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("PODD_TEST_SEED: %v", err)
		}
	}
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// end takes the bystanders away: their output was not interrupted.
func (w *sweep) end() {
	if w.s == nil {
		return
	}
	unbroken(w.t, "writer", lines(w.t, w.s.Node, "writer"), true)
	if log, err := os.ReadFile(filepath.Join(w.s.Dir, "podd.log")); err == nil && strings.Contains(string(log), "panic") {
		w.t.Error("podd's log tells of a panic")
	}
}

func parseTarget(t *testing.T, ops []operation, text string) target {
	t.Helper()
	f := strings.Split(text, "/")
	for _, op := range ops {
		if len(f) != 4 || op.name != f[0] || !slices.Contains(op.daemons, f[1]) {
			continue
		}
		point, err := strconv.Atoi(f[2])
		if err == nil {
			return target{op, f[1], killpoint.Aim{Point: point, After: f[3] == "after"}}
		}
	}
	t.Fatalf("PODD_TEST_POINT=%s: want operation/daemon/number/before or after", text)
	return target{}
}
