package critest

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/podd-runtime/podd/integration/node"
)

// specs of critest 1.36.0 that a machine can run: 117, nine of them about
// AppArmor.
const specs = 117

// TestCritest runs upstream's validation suite of the CRI, each spec a subtest:
// all of it four at a time, and what streams once more over WebSockets. In the
// long form (PODD_TEST_ALL) all of it one by one, three times.
func TestCritest(t *testing.T) {
	n := node.New(t)
	prepared(t)
	r := serve(t, critestImages(t))
	// One spec wants a pull to take longer than a millisecond.
	r.Delay(5 * time.Millisecond)
	n.Mirror(r.Addr)
	n.Start()

	procs := 4
	if node.Scale(1) > 1 { // critest's own time-outs are for a machine that is not emulated
		procs = 2
	}
	t.Run("parallel", func(t *testing.T) { suite{socket: socket(n), procs: procs, want: specs}.run(t) })
	before := n.Count() // what is made once is made
	t.Run("websocket", func(t *testing.T) {
		suite{
			socket: socket(n), procs: procs, focus: "Streaming|attach", want: 5,
			flags: []string{"-websocket-exec", "-websocket-attach", "-websocket-portforward"},
		}.run(t)
	})
	if full() {
		for i := range 3 {
			t.Run(fmt.Sprintf("serial%d", i+1), func(t *testing.T) { suite{socket: socket(n), procs: 1, want: specs}.run(t) })
		}
		t.Run("parallel again", func(t *testing.T) { suite{socket: socket(n), procs: procs, want: specs}.run(t) })
	}
	n.NoLeaks(t, before, 15*time.Second)
}

// suite is one run of critest.
type suite struct {
	socket string
	procs  int
	focus  string
	want   int // specs that pass, or skip themselves for want of AppArmor; at least
	flags  []string
}

// report is the part of ginkgo's JSON report (types.Report) that is read.
type report struct {
	SpecialSuiteFailureReasons []string
	RunTime                    time.Duration
	SpecReports                []spec

	err    error  // of the run
	output string // of critest
}

type spec struct {
	ContainerHierarchyTexts []string
	LeafNodeType            string
	LeafNodeText            string
	State                   string
	RunTime                 time.Duration
	Failure                 struct {
		Message  string
		Location struct {
			FileName   string
			LineNumber int
		}
	}
	CapturedGinkgoWriterOutput string
	CapturedStdOutErr          string
}

func (s spec) name() string {
	return strings.TrimPrefix(strings.Join(append(s.ContainerHierarchyTexts, s.LeafNodeText), " "), "[k8s.io] ")
}

// report runs it and returns what critest says, not yet judged.
func (s suite) report(t *testing.T) report {
	t.Helper()
	tmp := scratch(t)
	// As critest's own -parallel does, which can say nothing about the report.
	program := filepath.Join(tmp, "critest.test")
	if err := os.Symlink(filepath.Join(peers(), "critest"), program); err != nil {
		t.Fatal(err)
	}
	args := []string{
		"run", "--no-color", "--silence-skips", "--timeout=" + node.Scale(5*time.Minute).String(), "--output-dir=" + tmp, "--json-report=report.json",
		fmt.Sprintf("--procs=%d", s.procs), "--skip=benchmark",
	}
	if s.focus != "" {
		args = append(args, "--focus="+s.focus)
	}
	args = append(args, program, "--", "-runtime-endpoint="+s.socket, "-image-endpoint="+s.socket)
	ctx, cancel := context.WithTimeout(t.Context(), node.Scale(6*time.Minute))
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(peers(), "ginkgo"), append(args, s.flags...)...)
	cmd.Dir = tmp
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "CONTAINER_RUNTIME_ENDPOINT=", "IMAGE_SERVICE_ENDPOINT=")
	cmd.WaitDelay = 10 * time.Second
	out, runErr := cmd.CombinedOutput()

	b, err := os.ReadFile(filepath.Join(tmp, "report.json"))
	if err != nil {
		t.Fatalf("critest left no report: %v, %v\n%s", runErr, err, out)
	}
	var reports []report
	if err := json.Unmarshal(b, &reports); err != nil {
		t.Fatalf("critest's report: %v", err)
	}
	if len(reports) != 1 {
		t.Fatalf("critest made %d reports\n%s", len(reports), out)
	}
	r := reports[0]
	r.err, r.output = runErr, string(out)
	return r
}

// run has each spec be a subtest.
func (s suite) run(t *testing.T) {
	r := s.report(t)
	ok, failed := 0, 0
	for _, reason := range r.SpecialSuiteFailureReasons {
		t.Errorf("critest: %s", reason)
	}
	for _, s := range r.SpecReports {
		switch s.State {
		case "passed":
			if s.LeafNodeType != "It" {
				continue
			}
			ok++
		case "skipped":
			if s.Failure.Message == "" { // filtered out
				continue
			}
			ok++
		default:
			failed++
		}
		t.Run(s.name(), s.result)
	}
	t.Logf("critest: %.1f s", r.RunTime.Seconds())
	if r.err != nil && failed == 0 {
		t.Errorf("critest: %v\n%s", r.err, r.output)
	}
	if ok+failed < s.want {
		t.Errorf("critest ran %d specs, want %d\n%s", ok+failed, s.want, r.output)
	}
}

// appArmor says whether this machine has it, so that no spec may do without.
func appArmor() bool {
	b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	return err == nil && strings.TrimSpace(string(b)) == "Y"
}

// scratch is a temporary directory whose removal follows no mount: specs mount
// things there and share them with containers.
func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "podd-critest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil || strings.Contains(string(mounts), " "+dir+"/") {
			t.Errorf("mounts left behind in %s (%v):\n%s", dir, err, mounts)
			return
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// result is a spec's, told as a test's.
func (s spec) result(t *testing.T) {
	switch {
	case s.State == "passed":
		t.Logf("%.2f s", s.RunTime.Seconds())
	case s.State == "skipped" && strings.Contains(s.Failure.Message, "AppArmor") && !appArmor():
		t.Skip(s.Failure.Message)
	case s.State == "skipped":
		t.Errorf("the spec skips itself: %s", s.Failure.Message)
	default:
		t.Errorf("%s at %s:%d after %.1f s: %s\n%s\n%s", s.State, s.Failure.Location.FileName, s.Failure.Location.LineNumber,
			s.RunTime.Seconds(), s.Failure.Message, s.CapturedGinkgoWriterOutput, s.CapturedStdOutErr)
	}
}
