package pods

import (
	"fmt"
	"runtime"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
)

// cpu time of this process so far.
func cpu() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// allReady waits until n pods are ready, by watching.
func (n *node) allReady(t testing.TB, want int) {
	deadline := time.Now().Add(30 * time.Second)
	for {
		ready := 0
		for _, p := range n.table.Pods() {
			for i := range p.Status.Conditions {
				if c := &p.Status.Conditions[i]; c.Type == v1.PodReady && c.Status == v1.ConditionTrue {
					ready++
				}
			}
		}
		if ready == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d pods are ready", ready, want)
		}
		time.Sleep(time.Millisecond)
	}
}

// BenchmarkHundredPods is our own part of starting 100 pods: the runtime
// answers at once. The budget is 1 ms of CPU a pod and 0.15 MiB of memory.
func BenchmarkHundredPods(b *testing.B) {
	for b.Loop() {
		n := newNode(b)
		n.start()
		n.table.Synced("file")
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		began, used := time.Now(), cpu()
		for i := range 100 {
			n.table.SetPod("file", mkpod(fmt.Sprint("web", i), fmt.Sprint("u", i)))
		}
		n.allReady(b, 100)
		wall, spent := time.Since(began), cpu()-used
		time.Sleep(2 * gather)
		total := cpu() - used
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(wall.Microseconds())/1e3, "ms-to-ready")
		b.ReportMetric(float64(spent.Microseconds())/100, "cpu-us/pod")
		b.ReportMetric(float64(total.Microseconds())/100, "cpu-us/pod-with-records")
		b.ReportMetric(float64(after.HeapAlloc+after.StackInuse-before.HeapAlloc-before.StackInuse)/100/1024, "KiB/pod")
		b.ReportMetric(float64(runtime.NumGoroutine()), "goroutines")
		n.stop()
	}
}
