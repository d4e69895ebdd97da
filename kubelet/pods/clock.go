package pods

import (
	"time"

	"github.com/podd-runtime/podd/kubelet/status"
)

// past is a time that was stored, or told by somebody else, on this process' own
// clock: with a monotonic reading, so that setting the wall clock from now on
// changes nothing that is counted from it, and never later than now, since the
// clock may have been set back already. Zero stays zero.
func past(t, now time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	return now.Add(-max(now.Sub(t), 0))
}

// ended is when an instance ended, for what is counted from there.
func ended(c *status.Container) time.Time {
	if c.EndedAt.IsZero() {
		return c.FinishedAt
	}
	return c.EndedAt
}
