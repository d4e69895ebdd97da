package manifests

import (
	"path/filepath"
	"strings"
	"testing"
)

// Valid manifests that can hardly be meant load, and are warned about wherever
// one looks: when they are checked, in the status, and in the pod's events.
func TestAmountsThatCannotBeMeantAreWarnedAbout(t *testing.T) {
	limits := func(text string) string { return podYAML("web", "a") + "    resources: {limits: {" + text + "}}\n" }
	for name, c := range map[string]struct {
		yaml, field, text string
		line              int
	}{
		"fraction of memory":  {limits("memory: 128m"), "spec.containers[0].resources.limits[memory]", `fractional byte value "128m" is invalid, must be an integer`, 9},
		"too little memory":   {limits("memory: 2Mi"), "spec.containers[0].resources.limits[memory]", "2Mi is too small even to start a process", 9},
		"fraction of storage": {limits("ephemeral-storage: 500m"), "spec.containers[0].resources.limits[ephemeral-storage]", `"500m"`, 9},
		"emptyDir": {podYAML("web", "a") + "  volumes:\n  - name: v\n    emptyDir:\n      medium: Memory\n      sizeLimit: 500m\n",
			"spec.volumes[0].emptyDir.sizeLimit", `"500m"`, 13},
		"claim": {"apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: c}\nspec:\n  accessModes: [ReadWriteOnce]\n  resources: {requests: {storage: 1500m}}\n",
			"spec.resources.requests[storage]", `"1500m"`, 6},
		"volume": {"apiVersion: v1\nkind: PersistentVolume\nmetadata: {name: v}\nspec:\n  accessModes: [ReadWriteOnce]\n  capacity: {storage: 1500m}\n  hostPath: {path: /x}\n",
			"spec.capacity[storage]", `"1500m"`, 6},
		"as an apiserver warns": {podYAML("web", "a") + "    env:\n    - {name: A, value: b}\n    - {name: A, value: c}\n",
			"spec.containers[0].env[1]", "hides previous definition", 11},
		"no effect": {podYAML("web", "a") + "  nodeSelector: {a: b}\n", "spec.nodeSelector", "has no effect", 9},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s, tab, rec := start(t, dir)
			path := filepath.Join(dir, "web.yaml")
			write(t, path, c.yaml)
			tab.wait(t, "warned", func() bool { return len(s.Problems()) == 1 })
			p := s.Problems()[0]
			if !p.Warning || p.File != path || p.Field != c.field || p.Line != c.line || !strings.Contains(p.Message, c.text) || p.Object == "" || p.Since.IsZero() {
				t.Errorf("got %+v", p)
			}
			if NotInForce(s.Problems()) != 0 {
				t.Error("a warning counts as a manifest that is not in force")
			}
			if isPod := strings.HasPrefix(p.Object, "Pod "); isPod && (!tab.has("set default/web-node1 a")() || rec.count(c.text) != 1) {
				t.Errorf("log %q, events %q", tab.log, rec.events)
			}
			files, found, err := Check(path)
			if err != nil || files != 1 || len(found) != 1 || !found[0].Warning || found[0].Message != p.Message {
				t.Errorf("check: %d files, %v, %v", files, found, err)
			}
			write(t, path, podYAML("other", "b"))
			tab.wait(t, "corrected", func() bool { return len(s.Problems()) == 0 })
		})
	}
}

// A warning is about the document in force, not about its copies.
func TestWarningFollowsTheFileInForce(t *testing.T) {
	dir := t.TempDir()
	s, tab, rec := start(t, dir)
	text := podYAML("web", "a") + "    resources: {limits: {memory: 128m}}\n"
	write(t, filepath.Join(dir, "b.yaml"), text)
	tab.wait(t, "warned", func() bool { return len(s.Problems()) == 1 })
	write(t, filepath.Join(dir, "a.yaml"), podYAML("web", "old"))
	tab.wait(t, "copy told", func() bool { return len(s.Problems()) == 2 && NotInForce(s.Problems()) == 1 })
	rename(t, filepath.Join(dir, "b.yaml"), filepath.Join(dir, "c.yaml"))
	tab.wait(t, "renamed", func() bool {
		p := s.Problems()
		return len(p) == 2 && p[1].Warning && p[1].File == filepath.Join(dir, "c.yaml")
	})
	if n := rec.count("Pod web-node1 Warning " + ReasonQuestionable); n < 1 || n > 2 {
		t.Errorf("%d events: %q", n, rec.events)
	}
}
