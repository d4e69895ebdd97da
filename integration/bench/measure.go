package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const manifest = `apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {seccompProfile: {type: %[4]s}}
  containers:
  - name: c
    image: %[2]s
    imagePullPolicy: IfNotPresent
    args: [%[1]s]
    volumeMounts: [{name: out, mountPath: /out}]
  volumes: [{name: out, hostPath: {path: %[3]s, type: Directory}}]
`

// drop writes pods' manifests as an editor or a deployment tool does: whole
// file elsewhere, then rename. It returns the time before the first rename.
func drop(n node, images *imageServer, out, seccomp string, names ...string) (time.Time, error) {
	if err := os.MkdirAll(n.manifests()+".tmp", 0o755); err != nil {
		return time.Time{}, err
	}
	for _, name := range names {
		text := fmt.Sprintf(manifest, name, images.payload(), out, seccomp)
		if err := os.WriteFile(filepath.Join(n.manifests()+".tmp", name), []byte(text), 0o644); err != nil {
			return time.Time{}, err
		}
	}
	t0 := time.Now()
	for _, name := range names {
		if err := os.Rename(filepath.Join(n.manifests()+".tmp", name), filepath.Join(n.manifests(), name+".yaml")); err != nil {
			return t0, err
		}
	}
	return t0, nil
}

// stamps waits for the payloads' first acts.
func stamps(ctx context.Context, out string, limit time.Duration, names ...string) ([]time.Time, error) {
	times := make([]time.Time, len(names))
	for i, name := range names {
		err := until(ctx, "pod "+name, limit, func() bool {
			data, _ := os.ReadFile(filepath.Join(out, name))
			ns, _ := strconv.ParseInt(string(data), 10, 64)
			times[i] = time.Unix(0, ns)
			return ns > 0
		})
		if err != nil {
			return nil, err
		}
	}
	return times, nil
}

func remove(ctx context.Context, n node, names ...string) (time.Duration, error) {
	t0 := time.Now()
	for _, name := range names {
		if err := os.Remove(filepath.Join(n.manifests(), name+".yaml")); err != nil {
			return 0, err
		}
	}
	err := until(ctx, "pods gone", 3*time.Minute, func() bool {
		for _, p := range descendants(os.Getpid()) {
			if p.comm == "payload" || p.comm == "pause" {
				return false
			}
		}
		return true
	})
	return time.Since(t0), err
}

// plumbing is every process of the node that is not a payload.
func plumbing() (all []process) {
	for _, p := range descendants(os.Getpid()) {
		if p.comm != "payload" || p.exe != "/payload" {
			all = append(all, p)
		}
	}
	return all
}

func memory() (total int64) {
	for _, p := range plumbing() {
		total += pss(p.pid)
	}
	return total
}

func cpu() (total time.Duration) {
	for _, p := range plumbing() {
		total += p.cpu
	}
	return total
}

func mib(bytes int64) string { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }

func measureNode(ctx context.Context, o options, n node, r *report) error {
	fmt.Fprintf(os.Stderr, "%s: starting\n", n.name())
	if err := n.start(ctx); err != nil {
		return err
	}
	defer n.stop()
	out := dir(o, "out-"+strings.ReplaceAll(n.name(), "+", "-"))
	images := n.(interface{ imageServer() *imageServer }).imageServer()
	// One pod first: its image is pulled, caches are warm.
	if _, err := drop(n, images, out, "Unconfined", "warm"); err != nil {
		return err
	}
	if _, err := stamps(ctx, out, 2*time.Minute, "warm"); err != nil {
		return err
	}
	if _, err := remove(ctx, n, "warm"); err != nil {
		return err
	}
	if o.runs("start") {
		if err := measureStart(ctx, o, n, images, out, r); err != nil {
			return err
		}
	}
	if o.runs("burst") {
		if err := measureBurst(ctx, o, n, images, out, r); err != nil {
			return err
		}
	}
	for _, part := range []struct {
		name    string
		measure func(context.Context, options, node, *imageServer, string, *report) error
	}{
		{"cri", measureCRI}, {"exec", measureExec}, {"rest", measureRest}, {"probes", measureProbes}, {"flood", measureFlood}, {"lines", measureLines}, {"volumes", measureVolumes},
	} {
		if !o.runs(part.name) {
			continue
		}
		if err := part.measure(ctx, o, n, images, out, r); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	return nil
}

func measureStart(ctx context.Context, o options, n node, images *imageServer, out string, r *report) error {
	for _, seccomp := range []string{"Unconfined", "RuntimeDefault"} {
		var sample []time.Duration
		for i := range o.rounds {
			name := fmt.Sprintf("one-%s-%d", strings.ToLower(seccomp), i)
			t0, err := drop(n, images, out, seccomp, name)
			if err != nil {
				return err
			}
			at, err := stamps(ctx, out, time.Minute, name)
			if err != nil {
				return err
			}
			sample = append(sample, at[0].Sub(t0))
			if _, err := remove(ctx, n, name); err != nil {
				return err
			}
		}
		r.durations("file → first act, seccomp "+seccomp, n.name(), sample)
	}
	return nil
}

func measureBurst(ctx context.Context, o options, n node, images *imageServer, out string, r *report) error {
	base := memory()
	r.set("memory (PSS), no pod", n.name(), mib(base), float64(base))
	names := make([]string, o.pods)
	for i := range names {
		names[i] = fmt.Sprintf("many-%d", i)
	}
	c0 := cpu()
	t0, err := drop(n, images, out, "RuntimeDefault", names...)
	if err != nil {
		return err
	}
	at, err := stamps(ctx, out, 5*time.Minute, names...)
	if err != nil {
		return err
	}
	var last time.Time
	for _, t := range at {
		if t.After(last) {
			last = t
		}
	}
	burst := last.Sub(t0)
	r.set(fmt.Sprintf("%d pods at once, last first act", o.pods), n.name(), fmt.Sprintf("%.2f s", burst.Seconds()), burst.Seconds())
	// Let the dust settle, then look at rest.
	settle(ctx)
	r.set("… CPU of what lives on", n.name(), fmt.Sprintf("%.1f s", (cpu()-c0).Seconds()), (cpu() - c0).Seconds())
	full := memory()
	r.set(fmt.Sprintf("memory (PSS), %d pods", o.pods), n.name(), mib(full), float64(full))
	r.set("… per pod", n.name(), mib((full-base)/int64(o.pods)), float64(full-base)/float64(o.pods))
	c1, t1 := cpu(), time.Now()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(o.idle): // an observation needs its span; nothing is waited for
	}
	share := 100 * float64(cpu()-c1) / float64(time.Since(t1))
	r.set(fmt.Sprintf("idle CPU, %d pods", o.pods), n.name(), fmt.Sprintf("%.2f %% of a core", share), share)
	gone, err := remove(ctx, n, names...)
	if err != nil {
		return err
	}
	r.set(fmt.Sprintf("%d pods removed (grace 1 s)", o.pods), n.name(), fmt.Sprintf("%.2f s", gone.Seconds()), gone.Seconds())
	return nil
}

// settle returns when the node uses less than a tenth of a core, or after 30 s.
func settle(ctx context.Context) {
	last := cpu()
	for range 30 {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
		now := cpu()
		if now-last < 100*time.Millisecond {
			return
		}
		last = now
	}
}

func measureFloor(ctx context.Context, o options, r *report) error {
	images, err := filepath.Abs(filepath.Join(o.work, "payload-root"))
	if err != nil {
		return err
	}
	var sample []time.Duration
	for i := range o.rounds {
		name := fmt.Sprintf("floor-%d", i)
		cmd := exec.CommandContext(ctx, filepath.Join(o.work, "floor"), images, "/payload", name)
		pipe, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		lines := bufio.NewScanner(pipe)
		lines.Scan()
		t0, _ := strconv.ParseInt(lines.Text(), 10, 64)
		lines.Scan()
		pid, _ := strconv.Atoi(lines.Text())
		at, err := stamps(ctx, filepath.Join(images, "out"), 10*time.Second, name)
		if err != nil {
			return err
		}
		sample = append(sample, at[0].Sub(time.Unix(0, t0)))
		syscall.Kill(pid, syscall.SIGKILL)
		cmd.Wait()
	}
	r.durations("clone+mounts+pivot_root+exec in C", "floor", sample)
	return nil
}

func (p *poddNode) imageServer() *imageServer { return p.images }
func (p *peerNode) imageServer() *imageServer { return p.images }
