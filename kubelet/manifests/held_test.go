package manifests

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func confYAML(kind, value string) string {
	switch kind {
	case "ConfigMap":
		return fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata: {v: %s}\n", value)
	case "Secret":
		return fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: x}\nstringData: {v: %s}\n", value)
	case "PersistentVolume":
		return fmt.Sprintf("apiVersion: v1\nkind: PersistentVolume\nmetadata: {name: x, labels: {v: %s}}\nspec: {capacity: {storage: 1Gi}, accessModes: [ReadWriteOnce], hostPath: {path: /x}}\n", value)
	default:
		return fmt.Sprintf("apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: x, labels: {v: %s}}\nspec: {resources: {requests: {storage: 1Gi}}, accessModes: [ReadWriteOnce]}\n", value)
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

// loser waits until one document is told as the one that is not in force.
func loser(t *testing.T, s *Source, tab *table, file, winner string) {
	t.Helper()
	tab.wait(t, file+" is told", func() bool {
		p := s.Problems()
		return len(p) == 1 && p[0].File == file && strings.Contains(p[0].Message, winner+", which is in force") && p[0].Object != ""
	})
}

// A copy beside a manifest, whatever its name and content, changes nothing and
// is told; the one in force is followed, also by its editor, and when it goes
// the copy takes over.
func TestCopyOfAManifestDoesNotTakeOver(t *testing.T) {
	for _, name := range []string{"a-web.yaml", "web-copy.yaml", "web-old.yaml", "zz.yaml"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s, tab, _ := start(t, dir)
			web, other := filepath.Join(dir, "web.yaml"), filepath.Join(dir, name)
			write(t, web, podYAML("web", "one"))
			tab.wait(t, "first file", tab.has("set default/web-node1 one"))
			write(t, other, podYAML("web", "one")) // cp
			loser(t, s, tab, other, web)
			write(t, other, podYAML("web", "old"))
			write(t, web, podYAML("web", "two")) // in place
			tab.wait(t, "written in place", tab.has("set default/web-node1 two"))
			write(t, web+".tmp", podYAML("web", "three"))
			rename(t, web+".tmp", web) // as editors and tools save
			tab.wait(t, "renamed over", tab.has("set default/web-node1 three"))
			rename(t, web, web+"~") // vim with backupcopy=no
			write(t, web, podYAML("web", "four"))
			tab.wait(t, "renamed away and written", tab.has("set default/web-node1 four"))
			loser(t, s, tab, other, web)
			if n := tab.count(""); n != 5 || tab.count("remove") != 0 { // four and synced
				t.Errorf("the copy disturbed the pod: %q", tab.log)
			}
			if err := os.Remove(web); err != nil {
				t.Fatal(err)
			}
			tab.wait(t, "the copy takes over", tab.has("set default/web-node1 old"))
			if len(s.Problems()) != 0 || tab.count("remove") != 0 {
				t.Errorf("problems %v, log %q", s.Problems(), tab.log)
			}
		})
	}
}

// A file that is deleted and written again restarts its pod, and is before a copy.
func TestDeletedAndWrittenAgainBesideACopy(t *testing.T) {
	dir := t.TempDir()
	s, tab, _ := start(t, dir)
	web, other := filepath.Join(dir, "web.yaml"), filepath.Join(dir, "a.yaml")
	write(t, web, podYAML("web", "one"))
	tab.wait(t, "first file", tab.has("set default/web-node1 one"))
	write(t, other, podYAML("web", "old"))
	loser(t, s, tab, other, web)
	if err := os.Remove(web); err != nil {
		t.Fatal(err)
	}
	write(t, web, podYAML("web", "one"))
	tab.wait(t, "again", func() bool { return len(tab.log) == 4 })
	loser(t, s, tab, other, web)
	if tab.count("remove web-node1") != 1 || tab.count("set default/web-node1 one") != 2 {
		t.Errorf("log %q", tab.log)
	}
}

// A rename restarts nothing, also while other files define the pod: the file
// with the content in force follows, not the first by name.
func TestRenameBesideACopyRestartsNothing(t *testing.T) {
	dir := t.TempDir()
	s, tab, _ := start(t, dir)
	web, other, renamed := filepath.Join(dir, "web.yaml"), filepath.Join(dir, "a.yaml"), filepath.Join(dir, "web2.yaml")
	write(t, web, podYAML("web", "one"))
	tab.wait(t, "first file", tab.has("set default/web-node1 one"))
	write(t, other, podYAML("web", "old"))
	loser(t, s, tab, other, web)
	rename(t, web, renamed)
	loser(t, s, tab, other, renamed)
	if n := tab.count("set"); n != 1 || tab.count("remove") != 0 {
		t.Errorf("log %q", tab.log)
	}
	// Of several that wait the first by name is next.
	write(t, filepath.Join(dir, "b.yaml"), podYAML("web", "b"))
	tab.wait(t, "both are told", func() bool { return len(s.Problems()) == 2 })
	if err := os.Remove(renamed); err != nil {
		t.Fatal(err)
	}
	tab.wait(t, "first by name", tab.has("set default/web-node1 old"))
	loser(t, s, tab, filepath.Join(dir, "b.yaml"), other)
}

// What is in force stays across restarts of podd, whatever is copied or renamed
// while it is down, and a record that is broken only costs the order.
func TestManifestInForceStaysAcrossRestarts(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	web, other := filepath.Join(dir, "web.yaml"), filepath.Join(dir, "a.yaml")
	restarted := func(want string) (*Source, *table, func()) {
		t.Helper()
		s, tab, _, stop := startState(t, dir, state)
		tab.wait(t, "synced", func() bool { return tab.synced == 1 })
		if tab.count("set") != 1 || !tab.has("set default/web-node1 "+want)() {
			t.Errorf("log %q, want %s in force", tab.log, want)
		}
		return s, tab, stop
	}
	write(t, web, podYAML("web", "one"))
	_, _, stop := restarted("one")
	stop()
	write(t, other, podYAML("web", "old")) // a copy while podd is down
	s, tab, stop := restarted("one")
	loser(t, s, tab, other, web)
	stop()
	write(t, web, podYAML("web", "two")) // and a change
	_, _, stop = restarted("two")
	stop()
	rename(t, web, filepath.Join(dir, "web2.yaml"))
	s, tab, stop = restarted("two")
	loser(t, s, tab, other, filepath.Join(dir, "web2.yaml"))
	stop()
	if err := os.Truncate(state+".json", 20); err != nil {
		t.Fatal(err)
	}
	_, _, stop = restarted("old") // the first by name
	stop()
	if _, err := os.Stat(state + ".json.broken"); err != nil {
		t.Errorf("the broken record is not put aside: %v", err)
	}
	_, _, stop = restarted("old")
	stop()
}

// Of two pods with one UID the one in force stays, across restarts, too.
func TestPodInForceKeepsItsUIDAcrossRestarts(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	y := func(name string) string {
		return strings.Replace(podYAML(name, "i"), "metadata:\n", "metadata:\n  uid: fixed\n", 1)
	}
	s, tab, _, stop := startState(t, dir, state)
	write(t, filepath.Join(dir, "m.yaml"), y("m"))
	tab.wait(t, "first", tab.has("set default/m-node1 i"))
	write(t, filepath.Join(dir, "a.yaml"), y("a"))
	tab.wait(t, "the other is told", func() bool { return len(s.Problems()) == 1 })
	stop()
	for range 2 {
		s, tab, _, stop = startState(t, dir, state)
		tab.wait(t, "synced", func() bool { return tab.synced == 1 })
		if tab.count("set") != 1 || !tab.has("set default/m-node1 i")() || len(s.Problems()) != 1 {
			t.Errorf("log %q, problems %v", tab.log, s.Problems())
		}
		stop()
	}
}

// The same for everything else that a document can define.
func TestCopyOfAnObjectDoesNotTakeOver(t *testing.T) {
	for _, kind := range []string{"ConfigMap", "Secret", "PersistentVolume", "PersistentVolumeClaim"} {
		t.Run(kind, func(t *testing.T) {
			dir := t.TempDir()
			s, tab, _ := start(t, dir)
			first, other := filepath.Join(dir, "m.yaml"), filepath.Join(dir, "a.yaml")
			ref := ObjectRef{kind, "default", "x"}
			if kind == "PersistentVolume" {
				ref.Namespace = ""
			}
			hash := func() string { o, _ := s.objects.get(ref); return o.hash }
			write(t, first, confYAML(kind, "one"))
			tab.wait(t, "first", func() bool { return hash() != "" })
			one := hash()
			write(t, other, confYAML(kind, "old"))
			loser(t, s, tab, other, first)
			if hash() != one {
				t.Error("the copy is in force")
			}
			write(t, first, confYAML(kind, "two"))
			tab.wait(t, "a change of the first", func() bool { return hash() != one })
			two := hash()
			if err := os.Remove(first); err != nil {
				t.Fatal(err)
			}
			tab.wait(t, "the copy takes over", func() bool { return hash() != two && len(s.Problems()) == 0 })
			if hash() == "" {
				t.Error("nothing is in force")
			}
		})
	}
}

// An immutable object whose document is deleted gives way to another document.
func TestImmutableObjectGoesWithItsDocument(t *testing.T) {
	dir := t.TempDir()
	s, tab, _ := start(t, dir)
	first, other := filepath.Join(dir, "m.yaml"), filepath.Join(dir, "a.yaml")
	write(t, first, confYAML("ConfigMap", "one")+"immutable: true\n")
	value := func() string {
		m, err := s.ConfigMap("default", "x")
		if err != nil {
			return ""
		}
		return m.Data["v"]
	}
	tab.wait(t, "first", func() bool { return value() == "one" })
	write(t, other, confYAML("ConfigMap", "old"))
	loser(t, s, tab, other, first)
	if err := os.Remove(first); err != nil {
		t.Fatal(err)
	}
	tab.wait(t, "the other", func() bool { return value() == "old" && len(s.Problems()) == 0 })
}

// The record of a release loads for ever.
func TestLedgerOfV1Loads(t *testing.T) {
	h := held{path: filepath.Join("testdata", "ledger-v1.json"), have: map[ObjectRef]holding{}}
	if err := h.load(); err != nil {
		t.Fatal(err)
	}
	want := map[ObjectRef]holding{
		{"Pod", "default", "web-node1"}: {"web.yaml", "151f64394fdb4fd808b7d93d64d22ab3"},
		{"PersistentVolume", "", "pv"}:  {"volumes.yaml", "00"},
	}
	if len(h.have) != len(want) || h.have[ObjectRef{"Pod", "default", "web-node1"}] != want[ObjectRef{"Pod", "default", "web-node1"}] || h.have[ObjectRef{"PersistentVolume", "", "pv"}].file != "volumes.yaml" {
		t.Errorf("got %v, want %v", h.have, want)
	}
}

// The choice is a function of what is there: every order of arrival ends the same.
func TestPrecedence(t *testing.T) {
	h := held{have: map[ObjectRef]holding{{Kind: "Pod"}: {"m.yaml", "h1"}}}
	gone := time.Now()
	c := func(name, hash string, since time.Time) claim {
		return claim{file: &file{name: name, goneSince: since}, obj: &object{hash: hash}}
	}
	for _, tt := range []struct {
		name string
		all  []claim
		want string
	}{
		{"in force", []claim{c("a.yaml", "h2", time.Time{}), c("m.yaml", "h3", time.Time{})}, "m.yaml"},
		{"in force, away for a moment", []claim{c("a.yaml", "h1", time.Time{}), c("m.yaml", "h1", gone)}, "m.yaml"},
		{"renamed", []claim{c("a.yaml", "h2", time.Time{}), c("z.yaml", "h1", time.Time{})}, "z.yaml"},
		{"by name", []claim{c("b.yaml", "h3", time.Time{}), c("a.yaml", "h2", time.Time{})}, "a.yaml"},
		{"there before away", []claim{c("a.yaml", "h1", gone), c("b.yaml", "h2", time.Time{})}, "b.yaml"},
	} {
		slices.SortFunc(tt.all, h.precedence(ObjectRef{Kind: "Pod"}))
		if got := tt.all[0].file.name; got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}
