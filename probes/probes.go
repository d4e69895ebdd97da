// Package probes runs the liveness, readiness and startup probes of the
// node's containers: one heap of times, one timer, a bounded number of probes
// at once. A node that is behind probes later; it never calls a probe failed
// because it had no time for it.
package probes

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"time"

	v1 "k8s.io/api/core/v1"
)

// Kind of a probe.
type Kind uint8

const (
	Startup Kind = iota
	Liveness
	Readiness
)

// String is upstream's word in events: "Liveness probe failed: …".
func (k Kind) String() string { return [...]string{"Startup", "Liveness", "Readiness"}[k] }

// Target is one running container instance.
type Target struct {
	ID        string // of the container
	Pod       *v1.Pod
	Container *v1.Container
	Ref       *v1.ObjectReference // for events
	PodIP     string
	Started   time.Time // when the container started
	// Restored is what was known before a restart of the daemon; nil for a
	// container that has just started.
	Restored *State
	// Ending: only the readiness probe is run; see Scheduler.Ending.
	Ending bool
}

// State of a container as its probes see it.
type State struct {
	Started bool `json:"started,omitempty"` // past its startup probe
	Ready   bool `json:"ready,omitempty"`
}

// Result is a change: OK after successThreshold successes, not OK after
// failureThreshold failures. A failed startup or liveness probe is the last
// one of its container.
type Result struct {
	ID     string
	Kind   Kind
	OK     bool
	Output string
}

// Execer runs a command in a container. DeadlineExceeded, also as a gRPC
// status, says that the command ran for its whole timeout; it is dead then. One
// that could not be begun, or whose end is not known, is any other error.
type Execer interface {
	Exec(ctx context.Context, id string, cmd []string, timeout time.Duration) (output []byte, exitCode int32, err error)
}

// Recorder of events.
type Recorder interface {
	Eventf(ref *v1.ObjectReference, eventType, reason, format string, args ...any)
}

// Config of a Scheduler.
type Config struct {
	Exec   Execer
	Events Recorder
	// Parallel probes at once; 0: 32. Exec probes start processes, so that
	// they have a limit of their own: ParallelExec, 0: twice the CPUs.
	Parallel, ParallelExec int
	// Report takes results; it must not block.
	Report func(Result)
	// Observe hears of each probe that was made: result is what its metrics
	// call it. Nil: nobody does.
	Observe func(t Target, k Kind, result string, d time.Duration)
	Log     *slog.Logger
}

// New returns a Scheduler; Run drives it.
func New(cfg Config) *Scheduler {
	if cfg.Parallel == 0 {
		cfg.Parallel = 32
	}
	if cfg.ParallelExec == 0 {
		cfg.ParallelExec = 2 * runtime.GOMAXPROCS(0)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Scheduler{
		cfg: cfg, probers: newProbers(cfg.Exec), targets: map[string]*target{},
		wake: make(chan struct{}, 1), jitter: rand.Float64,
		slots: make(chan struct{}, cfg.Parallel), execSlots: make(chan struct{}, cfg.ParallelExec),
	}
}
