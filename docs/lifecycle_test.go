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
	heads    = map[string]bool{"| Behaviour | Held by |": true, "| id | who | what | what holds it | test |": true}
	declared = regexp.MustCompile(`(?m)^func (Test[A-Za-z0-9]+)\(`)
)

// TestLifecycleNamesTestsThatExist: the page cites no test that was renamed or
// removed.
func TestLifecycleNamesTestsThatExist(t *testing.T) { citesTests(t, "lifecycle.md", 100) }

// TestThreatsNameTestsThatExist: what is held against an attack is held by one.
func TestThreatsNameTestsThatExist(t *testing.T) { citesTests(t, "threats.md", 25) }

func citesTests(t *testing.T, name string, least int) {
	t.Helper()
	page, err := os.ReadFile(name)
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
	if len(tests) < least {
		t.Errorf("the page cites %d tests only", len(tests))
	}
	for _, m := range tests {
		if name := string(m[1]) + "." + string(m[2]); !have[name] {
			t.Errorf("there is no test %s", name)
		}
	}
	for _, row := range regexp.MustCompile(`(?m)^\| .*$`).FindAll(page, -1) {
		if !heads[string(row)] && !cited.Match(row) {
			t.Errorf("no test holds %s", row)
		}
	}
}
