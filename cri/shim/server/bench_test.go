package server_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podd-runtime/podd/cri/shim"
)

func monotonic() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}

// BenchmarkStart measures from Create to the payload's first instruction, with
// the parts as extra metrics.
func BenchmarkStart(b *testing.B) {
	for _, profile := range []string{"unconfined", "seccomp"} {
		b.Run(profile, func(b *testing.B) {
			n := newNode(b)
			box := n.sandbox()
			var create, start, first, del time.Duration
			b.ResetTimer()
			for b.Loop() {
				b.StopTimer()
				spec := n.containerSpec(box, "")
				spec.Spec.Process.Args = []string{"/bin/probe", "now"}
				if profile == "seccomp" {
					spec.Spec.Linux.Seccomp = seccomp.DefaultProfile(spec.Spec)
				}
				t0 := monotonic()
				b.StartTimer()
				if _, err := n.Create(n.ctx(), spec); err != nil {
					b.Fatal(err)
				}
				t1 := monotonic()
				if _, err := n.Start(n.ctx(), spec.ID); err != nil {
					b.Fatal(err)
				}
				t2 := monotonic()
				b.StopTimer()
				n.until(shim.EventExited, spec.ID)
				out, _ := logged(b, spec.LogPath)
				at, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
				if err != nil {
					b.Fatal(err)
				}
				t3 := monotonic()
				if err := n.Delete(n.ctx(), spec.ID); err != nil {
					b.Fatal(err)
				}
				del += time.Duration(monotonic() - t3)
				create += time.Duration(t1 - t0)
				start += time.Duration(t2 - t1)
				first += time.Duration(at - t0)
				b.StartTimer()
			}
			report := func(d time.Duration, name string) {
				b.ReportMetric(float64(d.Microseconds())/float64(b.N), name)
			}
			report(create, "create-µs")
			report(start, "start-µs")
			report(first, "first-instruction-µs")
			report(del, "delete-µs")
		})
	}
}

func BenchmarkSandbox(b *testing.B) {
	n := newNode(b)
	var del time.Duration
	for b.Loop() {
		box := n.sandbox()
		b.StopTimer()
		t := monotonic()
		if err := n.DeleteSandbox(n.ctx(), box.ID); err != nil {
			b.Fatal(err)
		}
		del += time.Duration(monotonic() - t)
		b.StartTimer()
	}
	b.ReportMetric(float64(del.Microseconds())/float64(b.N), "delete-µs")
}

func BenchmarkExec(b *testing.B) {
	for _, c := range []string{"enter", "enter, seccomp", "libcontainer", "libcontainer, seccomp"} {
		by, profile, _ := strings.Cut(c, ", ")
		b.Run(c, func(b *testing.B) {
			n := newNode(b)
			spec := n.containerSpec(n.sandbox(), "sleep 1000")
			if profile == "seccomp" {
				spec.Spec.Linux.Seccomp = seccomp.DefaultProfile(spec.Spec)
			}
			n.run(spec)
			info, err := n.Info(n.ctx())
			if err != nil {
				b.Fatal(err)
			}
			var first time.Duration
			before := cpuOf(b, info.PID)
			b.ResetTimer()
			for b.Loop() {
				t0 := monotonic()
				out, _ := n.execSpec(&shim.ExecSpec{ContainerID: spec.ID, Libcontainer: by == "libcontainer",
					Process: &specs.Process{Args: []string{"/bin/probe", "now"}, Cwd: "/", Env: []string{"PATH=/bin"}}})
				at, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
				if err != nil {
					b.Fatal(err)
				}
				first += time.Duration(at - t0)
			}
			b.ReportMetric(float64(first.Microseconds())/float64(b.N), "first-instruction-µs")
			b.ReportMetric(float64((cpuOf(b, info.PID)-before).Microseconds())/float64(b.N), "shim-cpu-µs")
		})
	}
}

// cpuOf a process and of its children that have ended.
func cpuOf(b testing.TB, pid int) time.Duration {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	var ticks int64 // utime, stime, cutime, cstime
	for _, f := range strings.Fields(rest)[11:15] {
		n, _ := strconv.ParseInt(f, 10, 64)
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100
}

// BenchmarkPod is a lone pod on an idle node: sandbox, container, start, each
// time after a pause that lets the kernel's RCU state go cold.
func BenchmarkPod(b *testing.B) {
	n := newNode(b)
	var sandbox, create, start time.Duration
	for b.Loop() {
		b.StopTimer()
		time.Sleep(100 * time.Millisecond)
		b.StartTimer()
		t0 := monotonic()
		box := n.sandbox()
		t1 := monotonic()
		b.StopTimer()
		spec := n.containerSpec(box, "")
		spec.Spec.Process.Args = []string{"/bin/probe", "now"}
		b.StartTimer()
		t2 := monotonic()
		if _, err := n.Create(n.ctx(), spec); err != nil {
			b.Fatal(err)
		}
		t3 := monotonic()
		if _, err := n.Start(n.ctx(), spec.ID); err != nil {
			b.Fatal(err)
		}
		t4 := monotonic()
		b.StopTimer()
		n.until(shim.EventExited, spec.ID)
		if err := n.Delete(n.ctx(), spec.ID); err != nil {
			b.Fatal(err)
		}
		if err := n.DeleteSandbox(n.ctx(), box.ID); err != nil {
			b.Fatal(err)
		}
		sandbox += time.Duration(t1 - t0)
		create += time.Duration(t3 - t2)
		start += time.Duration(t4 - t3)
		b.StartTimer()
	}
	for name, d := range map[string]time.Duration{"sandbox-µs": sandbox, "create-µs": create, "start-µs": start} {
		b.ReportMetric(float64(d.Microseconds())/float64(b.N), name)
	}
}

// BenchmarkBurst starts pods from several clients at once.
func BenchmarkBurst(b *testing.B) {
	n := newNode(b)
	const pods = 50
	for b.Loop() {
		var specs []*shim.ContainerSpec
		var boxes []*shim.SandboxSpec
		for range pods {
			boxes = append(boxes, n.sandboxSpec())
		}
		work := make(chan int)
		var wg sync.WaitGroup
		var mu sync.Mutex
		for range 8 {
			wg.Go(func() {
				for i := range work {
					box, err := n.CreateSandbox(n.ctx(), boxes[i])
					if err != nil {
						b.Error(err)
						return
					}
					mu.Lock()
					spec := n.containerSpec(box, "")
					spec.Spec.Process.Args = []string{"/bin/sleep", "1000"}
					specs = append(specs, spec)
					mu.Unlock()
					if _, err := n.Create(n.ctx(), spec); err != nil {
						b.Error(err)
						return
					}
					if _, err := n.Start(n.ctx(), spec.ID); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		for i := range pods {
			work <- i
		}
		close(work)
		wg.Wait()
		b.StopTimer()
		info, _ := n.Info(n.ctx())
		status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", info.PID))
		threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", info.PID))
		fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", info.PID))
		for line := range strings.Lines(string(status)) {
			if strings.HasPrefix(line, "Rss") || strings.HasPrefix(line, "Pss:") || strings.HasPrefix(line, "Private_Dirty") {
				b.Log(strings.TrimSpace(line))
			}
		}
		b.Logf("%d containers: %d threads, %d descriptors", pods, len(threads), len(fds))
		for i := range pods {
			if err := n.Delete(n.ctx(), specs[i].ID); err != nil {
				b.Fatal(err)
			}
			if err := n.DeleteSandbox(n.ctx(), boxes[i].ID); err != nil {
				b.Fatal(err)
			}
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N)/pods, "ms/pod")
}
