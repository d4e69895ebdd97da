package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Volumes of one ConfigMap: so many pods with so many volumes each.
const (
	volumePods = 20
	volumesPer = 50
)

// measureVolumes changes a ConfigMap that 1,000 volumes of running pods show,
// and waits until all show the change. Upstream's static pods may not use
// ConfigMaps, and its volumes follow within its sync period of a minute, so
// there is no peer.
func measureVolumes(ctx context.Context, o options, n node, images *imageServer, out string, r *report) error {
	p, ok := n.(*poddNode)
	if !ok {
		return nil
	}
	var names []string
	for i := range volumePods {
		name := fmt.Sprintf("vols%d", i)
		names = append(names, name)
		var mounts, volumes strings.Builder
		for j := range volumesPer {
			fmt.Fprintf(&mounts, ", {name: v%[1]d, mountPath: /v%[1]d}", j)
			fmt.Fprintf(&volumes, ", {name: v%d, configMap: {name: conf}}", j)
		}
		text := fmt.Sprintf(manifest, name, images.payload(), out, "Unconfined")
		text = strings.Replace(text, "mountPath: /out}]", "mountPath: /out}"+mounts.String()+"]", 1)
		text = strings.Replace(text, "type: Directory}}]", "type: Directory}}"+volumes.String()+"]", 1)
		if err := place(n, name, text); err != nil {
			return err
		}
	}
	set := func(round int) error {
		return place(n, "conf", fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: conf}\ndata: {round: %q, motd: hello}\n", fmt.Sprint(round)))
	}
	if err := set(0); err != nil {
		return err
	}
	if _, err := stamps(ctx, out, 3*time.Minute, names...); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(dir(p.o, "podd", "root"), "pods/*/volumes/kubernetes.io~configmap/*"))
	if err != nil || len(files) != volumePods*volumesPer {
		return fmt.Errorf("%d volumes are there, want %d: %w", len(files), volumePods*volumesPer, err)
	}
	settle(ctx)
	var took []time.Duration
	before := cpu()
	rounds := max(o.rounds/4, 1)
	for round := 1; round <= rounds; round++ {
		begin := time.Now()
		if err := set(round); err != nil {
			return err
		}
		shown := 0 // all before this one
		if err := until(ctx, "volumes up to date", time.Minute, func() bool {
			for ; shown < len(files); shown++ {
				if data, _ := os.ReadFile(filepath.Join(files[shown], "round")); string(data) != fmt.Sprint(round) {
					return false
				}
			}
			return true
		}); err != nil {
			return err
		}
		took = append(took, time.Since(begin))
	}
	used := (cpu() - before) / time.Duration(rounds)
	row := fmt.Sprintf("%d configMap volumes updated at once: ", len(files))
	r.durations(row+"all show it after", n.name(), took)
	r.set(row+"CPU", n.name(), ms(used), float64(used))
	if err := os.Remove(filepath.Join(n.manifests(), "conf.yaml")); err != nil {
		return err
	}
	_, err = remove(ctx, n, names...)
	return err
}

// place writes one manifest by an atomic rename.
func place(n node, name, text string) error {
	tmp := filepath.Join(n.manifests()+".tmp", name)
	if err := os.MkdirAll(filepath.Dir(tmp), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(n.manifests(), name+".yaml"))
}
