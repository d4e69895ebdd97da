package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// hierarchies of cgroup v1, or the one of v2.
func hierarchies() []string {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return []string{"/sys/fs/cgroup"}
	}
	all, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	for i := range all {
		all[i] = filepath.Dir(all[i])
	}
	return all
}

// makeCgroup makes an empty group in every hierarchy: upstream's kubelet wants
// its root to exist.
func makeCgroup(name string) error {
	for _, h := range hierarchies() {
		path := filepath.Join(h, name)
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			if value, err := os.ReadFile(filepath.Join(h, file)); err == nil {
				os.WriteFile(filepath.Join(path, file), value, 0o644)
			}
		}
	}
	return nil
}

// removeCgroup removes the emptied group with all below it.
func removeCgroup(name string) {
	for _, h := range hierarchies() {
		var dirs []string
		filepath.WalkDir(filepath.Join(h, name), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		slices.Reverse(dirs)
		for _, dir := range dirs {
			os.Remove(dir)
		}
	}
}
