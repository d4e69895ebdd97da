package kubelet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/systemd"
)

// health is what the service manager is told.
type health struct {
	ill   atomic.Pointer[string] // what the last check found; nil: nothing
	write chan error             // a probe of the disk that is under way
}

// Check says whether the agent does what it is for: its workers take what they
// are given, podd-shim answers, the disk takes records. A disk that is full or
// read-only is no reason to end the agent, which could not begin again: it is
// told in the status, as a nil error.
func (a *agent) check(ctx context.Context) error {
	if err := a.works(ctx); err != nil {
		return err
	}
	err := a.probeDisk(ctx)
	if err != nil {
		text := err.Error()
		a.health.ill.Store(&text)
	}
	for _, full := range []error{unix.ENOSPC, unix.EDQUOT, unix.EROFS} {
		if errors.Is(err, full) {
			return nil
		}
	}
	if err == nil {
		a.health.ill.Store(nil)
	}
	return err
}

// works is what of the check anybody may ask for, and many at once.
func (a *agent) works(ctx context.Context) error {
	if err := a.table.Alive(ctx); err != nil {
		return err
	}
	if _, err := a.shim.Info(ctx); err != nil {
		return fmt.Errorf("podd-shim: %w", err)
	}
	return nil
}

// probeDisk writes a file into the data directory. A disk that hangs takes the
// probe with it, and no second one is sent after it.
func (a *agent) probeDisk(ctx context.Context) error {
	if a.health.write == nil {
		done := make(chan error, 1)
		a.health.write = done
		go func() { done <- touch(filepath.Join(a.cfg.DataDir, ".alive")) }()
	}
	select {
	case err := <-a.health.write:
		a.health.write = nil
		return err
	case <-ctx.Done():
		return fmt.Errorf("write to %s (--data-dir): %w", a.cfg.DataDir, ctx.Err())
	}
}

func touch(path string) error {
	if err := os.WriteFile(path+".tmp", []byte("podd writes here while it is well\n"), 0o600); err != nil {
		os.Remove(path + ".tmp")
		return err
	}
	return os.Rename(path+".tmp", path)
}

// keepAlive feeds the service manager's watchdog as long as the checks pass.
// There are three to each of its times, so that one that fails is no end.
func (a *agent) keepAlive(ctx context.Context) error {
	limit, err := systemd.WatchdogTime()
	if err != nil {
		a.log.Warn("watchdog of the service manager not understood", "error", err)
	}
	if limit == 0 {
		return nil
	}
	tick := time.NewTicker(limit / 3)
	defer tick.Stop()
	for {
		check, cancel := context.WithTimeout(ctx, limit/4)
		err := a.check(check)
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			text := err.Error()
			a.health.ill.Store(&text)
			a.log.Error("health check failed; the service manager will end podd unless one passes in time", "error", err, "limit", limit)
		default:
			systemd.Alive(a.log)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// A line of status tells changes of pods within statusEvery together, and what
// is no change of a pod after statusSlow.
const (
	statusEvery = time.Second
	statusSlow  = 30 * time.Second
)

// tellStatus keeps the line of `systemctl status` true.
func (a *agent) tellStatus(ctx context.Context) error {
	if !systemd.Managed() {
		return nil
	}
	last := ""
	slow := time.NewTicker(statusSlow)
	defer slow.Stop()
	changes := a.table.Watch(ctx, "")
	for {
		var ill string
		if p := a.health.ill.Load(); p != nil {
			ill = *p
		}
		if text := statusLine(a.table.Pods(), manifests.NotInForce(a.source.Problems()), ill); text != last {
			systemd.Status(a.log, text)
			last = text
		}
		select {
		case <-changes:
		case <-slow.C:
		case <-ctx.Done():
			return nil
		}
		for gather := time.After(statusEvery); gather != nil; {
			select {
			case <-changes:
			case <-gather:
				gather = nil
			case <-ctx.Done():
				return nil
			}
		}
	}
}

// statusLine is the node in a line.
func statusLine(pods []*v1.Pod, problems int, ill string) string {
	count := map[string]int{}
	for _, p := range pods {
		count[state(p)]++
	}
	parts := make([]string, 0, 6)
	for _, name := range []string{"running", "starting", "not ready", "failed", "completed", "stopping"} {
		if n := count[name]; n > 0 || name == "running" || name == "failed" {
			parts = append(parts, fmt.Sprintf("%d %s", n, name))
		}
	}
	line := fmt.Sprintf("%d pods: %s", len(pods), strings.Join(parts, ", "))
	if problems > 0 {
		line += fmt.Sprintf("; %d manifests not in force, see podd status", problems)
	}
	if ill != "" {
		line += "; ill: " + ill
	}
	return line
}

// state of a pod, as an administrator would say it.
func state(p *v1.Pod) string {
	switch {
	case p.DeletionTimestamp != nil:
		return "stopping"
	case p.Status.Phase == v1.PodFailed:
		return "failed"
	case p.Status.Phase == v1.PodSucceeded:
		return "completed"
	case p.Status.Phase != v1.PodRunning:
		return "starting"
	}
	for _, c := range p.Status.Conditions {
		if c.Type == v1.PodReady && c.Status != v1.ConditionTrue {
			return "not ready"
		}
	}
	return "running"
}
