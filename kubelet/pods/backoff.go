package pods

import "time"

// BackoffPolicy is how a failing container is tried again: at once the first
// time, then after Initial, doubled each time up to Max. A container that ran
// for twice Max without failing begins anew (upstream's flowcontrol.Backoff).
type BackoffPolicy struct {
	Initial, Max time.Duration
}

// Backoff of one container.
type Backoff struct {
	Delay   time.Duration `json:"delay"`
	Updated time.Time     `json:"updated"`
}

// Until is when a container that ended at finished may be started again.
func (p BackoffPolicy) Until(b Backoff, finished time.Time) time.Time {
	if b.Delay == 0 || p.expired(b, finished) {
		return finished
	}
	return finished.Add(b.Delay)
}

// Next is the state after one more restart, at now, of a container that ended
// at finished.
func (p BackoffPolicy) Next(b Backoff, finished, now time.Time) Backoff {
	if b.Delay == 0 || p.expired(b, finished) {
		return Backoff{Delay: p.Initial, Updated: now}
	}
	return Backoff{Delay: min(2*b.Delay, p.Max), Updated: now}
}

func (p BackoffPolicy) expired(b Backoff, finished time.Time) bool {
	return finished.Sub(b.Updated) > 2*p.Max
}

// retryDelay of a step that failed n times in a row, n ≥ 1: 1, 2, 4 … 60 s.
func retryDelay(n int) time.Duration {
	if n > 6 {
		return time.Minute
	}
	return time.Second << (n - 1)
}
