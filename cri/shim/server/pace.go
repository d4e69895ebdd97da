package server

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// What a container's output costs the shim is charged to nobody: moving it,
// formatting it (an empty line becomes a record of 45 bytes) and compressing old
// logs. So a container has paceShare of one CPU for all of that, and paceBurst
// of CPU time on top after it was quiet. Beyond that its pipes are left alone
// until the time is worked off: they fill up and hold the writer. The share is
// what 200 MB/s of ordinary lines take. All containers that are held so have
// half of the machine together.
const (
	paceShare = 0.4
	paceBurst = 200 * time.Millisecond
	paceAll   = 0.5
)

// held counts the containers whose output waits.
var held atomic.Int64

// share of one CPU that each of them has.
func share() float64 {
	return min(paceShare, paceAll*float64(runtime.NumCPU())/float64(max(held.Load(), 1)))
}

// pace measures what one container's output costs.
type pace struct {
	mu   sync.Mutex
	debt time.Duration // CPU time used and not worked off, from -paceBurst
	at   time.Time     // when debt was right
}

func newPace() *pace { return &pace{debt: -paceBurst, at: time.Now()} }

// charge runs f and notes the CPU time that it takes.
func (p *pace) charge(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := threadTime()
	err := f()
	p.spend(threadTime() - before)
	return err
}

// threadTime is the CPU time of the calling thread.
func threadTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

func (p *pace) spend(cpu time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.settle(time.Now())
	p.debt += cpu
}

// settle works off what has gone by since.
func (p *pace) settle(now time.Time) {
	p.debt = max(p.debt-time.Duration(float64(now.Sub(p.at))*share()), -paceBurst)
	p.at = now
}

// await returns when the container may go on.
func (p *pace) await() {
	if p.wait() == 0 {
		return
	}
	held.Add(1)
	defer held.Add(-1)
	for d := p.wait(); d > 0; d = p.wait() {
		time.Sleep(min(d, paceLook))
	}
}

// paceLook is how often who waits looks whether its share has changed.
const paceLook = 100 * time.Millisecond

// wait is how long the container has to be left alone; 0: not at all.
func (p *pace) wait() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.settle(time.Now())
	return max(0, time.Duration(float64(p.debt)/share()))
}
