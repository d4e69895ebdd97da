package shutdown

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/kubelet/status"
)

// Upstream's words for a pod that ended so.
const (
	reason  = "Terminated"
	message = "Pod was terminated in response to imminent node shutdown."
)

// Pods of the node.
type Pods interface {
	Pods() []*v1.Pod
	// Hold keeps pods from beginning until it is told false. When it returns,
	// Pods has all that have begun, unless ctx has ended.
	Hold(ctx context.Context, on bool)
	// Terminate ends a pod and returns when it is down.
	Terminate(ctx context.Context, namespace, name string, grace time.Duration, cause status.Cause) error
}

// Machine is who takes the machine down and can be held up.
type Machine interface {
	DelayMax(context.Context) (time.Duration, error)
	SetDelayMax(context.Context, time.Duration) error
	// Delay holds a shutdown up until the lock is closed.
	Delay(ctx context.Context, why string) (io.Closer, error)
	// Preparing says whether the machine is about to go down now.
	Preparing(context.Context) (bool, error)
	// Shutdowns tells true when the machine is about to go down and false when
	// that was called off; it closes when the connection is lost.
	Shutdowns(context.Context) (<-chan bool, error)
	Close() error
}

// Config of Run.
type Config struct {
	Steps []Step
	// Connect to the machine's manager.
	Connect func(context.Context) (Machine, error)
	Pods    Pods
	// Event records what happens to the node.
	Event func(reason, message string)
	Log   *slog.Logger
}

const (
	// reconnect is the pause after the connection is lost; upstream's.
	reconnect = time.Second
	// reconnectMax where nothing answers: a host without D-Bus is no fault.
	reconnectMax = 5 * time.Minute
	// settle is how long logind may take to answer, and to heed its new
	// configuration: one that hangs is asked again on another connection. The
	// pods have as long to say which of them run.
	settle = 10 * time.Second
	// slack is what the end of a step takes beyond the grace of its pods.
	slack = time.Second
)

// Run holds shutdowns up, ends the pods when one comes, and lets it go on. It
// returns when ctx ends.
func Run(ctx context.Context, cfg Config) error {
	pause, told := reconnect, false
	f := &follower{Config: cfg}
	for ctx.Err() == nil {
		begin := time.Now()
		err := f.follow(ctx)
		if ctx.Err() != nil {
			break
		}
		if time.Since(begin) > reconnectMax {
			pause, told = reconnect, false
		}
		if !told {
			cfg.Log.Warn("pods will not be waited for at a shutdown until logind answers", "error", err)
			told = true
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, reconnectMax)
	}
	return nil
}

var errLost = errors.New("connection lost")

// follower of the machine, over any number of connections.
type follower struct {
	Config
	held bool      // pods are kept from beginning, as far as we have told
	lock io.Closer // that holds a shutdown up; nil: none
}

// follow one connection until it is lost.
func (f *follower) follow(ctx context.Context) error {
	m, err := f.Connect(ctx)
	if err != nil {
		return err
	}
	defer m.Close()
	defer f.unlock()
	if err := raise(ctx, f.Config, m); err != nil {
		// What there is of time is used.
		f.Log.Warn("a shutdown will not wait for pods as long as configured", "error", err)
	}
	// First to listen, then to look, then the lock: a shutdown that begins, or is
	// called off, is seen by one of them. logind grants no lock during a shutdown.
	shutdowns, err := m.Shutdowns(ctx)
	if err != nil {
		return err
	}
	down, err := preparing(ctx, m)
	if err != nil {
		return err
	}
	if down || f.held {
		err = f.turn(ctx, m, down)
	} else {
		err = f.delay(ctx, m)
	}
	if err != nil {
		return err
	}
	f.Log.Info("shutdowns wait for pods", "most", Total(f.Steps))
	for down := range shutdowns {
		if err := f.turn(ctx, m, down); err != nil {
			return err
		}
	}
	return errLost
}

// turn to a shutdown that begins or, with down false, is called off: then pods
// begin again, whatever comes of the lock.
func (f *follower) turn(ctx context.Context, m Machine, down bool) error {
	if !down {
		f.Event("NodeShutdown", "Shutdown manager detected shutdown cancellation")
		f.Log.Info("shutdown called off, pods begin again")
		f.Pods.Hold(ctx, false)
		f.held = false
		return f.delay(ctx, m)
	}
	f.Event("NodeShutdown", "Shutdown manager detected shutdown event")
	f.held = true
	Down(ctx, f.Config)
	f.unlock()
	return nil
}

// preparing is what the machine is about to do.
func preparing(ctx context.Context, m Machine) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	return m.Preparing(ctx)
}

// delay a shutdown that may come.
func (f *follower) delay(ctx context.Context, m Machine) (err error) {
	ctx, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	if f.lock == nil {
		f.lock, err = m.Delay(ctx, "Pods need to be shut down first")
	}
	return err
}

// unlock lets the shutdown go on.
func (f *follower) unlock() {
	if f.lock != nil {
		f.lock.Close()
		f.lock = nil
	}
}

// raise how long the machine waits to what the steps need.
func raise(ctx context.Context, cfg Config, m Machine) error {
	ctx, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	have, err := m.DelayMax(ctx)
	if err != nil {
		return err
	}
	if want := Total(cfg.Steps) + time.Duration(len(cfg.Steps))*slack; have < want {
		return m.SetDelayMax(ctx, want)
	}
	return nil
}

// Down ends the pods, step by step; a step without pods takes no time, and one
// whose pods do not end is left after its own.
//
// Pods have ended when their processes, mounts and network are gone.
func Down(ctx context.Context, cfg Config) {
	begin := time.Now()
	within, cancel := context.WithTimeout(ctx, settle)
	cfg.Pods.Hold(within, true)
	cancel()
	groups := Group(cfg.Steps, cfg.Pods.Pods())
	for i, step := range cfg.Steps {
		group := groups[i]
		if len(group) == 0 {
			continue
		}
		cfg.Log.Info("machine goes down, pods end", "priority", step.Priority, "pods", len(group), "grace", step.Grace)
		within, cancel := context.WithTimeout(ctx, step.Grace+slack)
		var ending sync.WaitGroup
		for _, pod := range group {
			ending.Go(func() {
				err := cfg.Pods.Terminate(within, pod.Namespace, pod.Name, step.grace(pod), status.Cause{Reason: reason, Message: message})
				if err != nil {
					cfg.Log.Warn("pod has not ended in its step of the shutdown", "pod", pod.Namespace+"/"+pod.Name, "error", err)
				}
			})
		}
		ending.Wait()
		cancel()
	}
	cfg.Log.Info("pods have ended, the machine may go down", "took", time.Since(begin).Round(time.Millisecond))
}
