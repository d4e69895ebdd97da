package server

import (
	"runtime"
	"testing"
	"time"
)

// TestPace: who was quiet has its burst, who is not has its share, and all who
// wait have no more than theirs together.
func TestPace(t *testing.T) {
	p := newPace()
	p.spend(paceBurst / 2)
	if d := p.wait(); d != 0 {
		t.Errorf("held for %v within the burst", d)
	}
	p.spend(paceBurst/2 + 40*time.Millisecond)
	if d := p.wait(); d > 100*time.Millisecond || d < 50*time.Millisecond { // 40 ms at 0.4, less what this took
		t.Errorf("held for %v, want 100 ms", d)
	}
	begin := time.Now()
	p.await()
	if d := time.Since(begin); d < 40*time.Millisecond {
		t.Errorf("was held for %v", d)
	}
	held.Add(1000)
	defer held.Add(-1000)
	if total := share() * 1000; total > paceAll*float64(runtime.NumCPU()) {
		t.Errorf("a thousand have %.1f CPUs", total)
	}
	if share() >= paceShare {
		t.Error("the share does not shrink")
	}
}
