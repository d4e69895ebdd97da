// Package docs holds the documentation; its tests keep it true.
package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

var (
	cited    = regexp.MustCompile("`([a-z/]+)\\.(Test[A-Za-z0-9]+)`")
	declared = regexp.MustCompile(`(?m)^func (Test[A-Za-z0-9]+)\(`)
)

// TestLifecycleNamesTestsThatExist: the page cites no test that was renamed or
// removed, and every line of its tables cites one.
func TestLifecycleNamesTestsThatExist(t *testing.T) {
	page, err := os.ReadFile("lifecycle.md")
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, m := range cited.FindAllSubmatch(page, -1) {
		pkg := string(m[1])
		if have[pkg] {
			continue
		}
		have[pkg] = true
		files, err := filepath.Glob(filepath.Join("..", pkg, "*_test.go"))
		if err != nil || len(files) == 0 {
			t.Errorf("%s has no tests: %v", pkg, err)
		}
		for _, f := range files {
			source, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range declared.FindAllSubmatch(source, -1) {
				have[pkg+"."+string(d[1])] = true
			}
		}
	}
	tests := cited.FindAllSubmatch(page, -1)
	if len(tests) < 100 {
		t.Errorf("the page cites %d tests only", len(tests))
	}
	for _, m := range tests {
		if name := string(m[1]) + "." + string(m[2]); !have[name] {
			t.Errorf("there is no test %s", name)
		}
	}
	for _, row := range regexp.MustCompile(`(?m)^\| .*$`).FindAll(page, -1) {
		if string(row) != "| Behaviour | Held by |" && !cited.Match(row) {
			t.Errorf("no test holds %s", row)
		}
	}
}
