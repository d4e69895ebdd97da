package manifests

import (
	"context"
	"fmt"

	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// table is a Sink that keeps what it was told, in order.
type table struct {
	mu     sync.Mutex
	pods   map[types.UID]*v1.Pod
	log    []string
	synced int
	change chan struct{}
}

func newTable() *table { return &table{pods: map[types.UID]*v1.Pod{}, change: make(chan struct{})} }

func (t *table) note(format string, args ...any) {
	t.log = append(t.log, fmt.Sprintf(format, args...))
	close(t.change)
	t.change = make(chan struct{})
}

func (t *table) SetPod(source string, pod *v1.Pod) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for uid, p := range t.pods {
		if p.Namespace == pod.Namespace && p.Name == pod.Name {
			delete(t.pods, uid)
		}
	}
	t.pods[pod.UID] = pod
	t.note("set %s/%s %s", pod.Namespace, pod.Name, pod.Spec.Containers[0].Image)
}

func (t *table) RemovePod(source string, uid types.UID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	name := "unknown"
	if p := t.pods[uid]; p != nil {
		name = p.Name
	}
	delete(t.pods, uid)
	t.note("remove %s", name)
}

func (t *table) Synced(source string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.synced++
	t.note("synced %s", source)
}

// wait waits until cond holds.
func (t *table) wait(tb testing.TB, what string, cond func() bool) {
	tb.Helper()
	deadline := time.After(10 * time.Second)
	for {
		t.mu.Lock()
		ok, change := cond(), t.change
		t.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-change:
		case <-time.After(5 * time.Millisecond): // conditions outside the table
		case <-deadline:
			t.mu.Lock()
			defer t.mu.Unlock()
			tb.Fatalf("%s: not within the deadline; seen: %q", what, t.log)
		}
	}
}

func (t *table) has(entry string) func() bool {
	return func() bool {
		for _, l := range t.log {
			if l == entry {
				return true
			}
		}
		return false
	}
}

func (t *table) count(prefix string) (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range t.log {
		if strings.HasPrefix(l, prefix) {
			n++
		}
	}
	return n
}

type recorder struct {
	mu     sync.Mutex
	events []string
}

func (r *recorder) Eventf(ref *v1.ObjectReference, eventType, reason, format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, fmt.Sprintf("%s %s %s %s: %s", ref.Kind, ref.Name, eventType, reason, fmt.Sprintf(format, args...)))
}

func (r *recorder) count(sub string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if strings.Contains(e, sub) {
			n++
		}
	}
	return n
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func podYAML(name, image string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata:\n  name: %s\nspec:\n  containers:\n  - name: main\n    image: %s\n", name, image)
}

func write(tb testing.TB, path, content string) {
	tb.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		tb.Fatal(err)
	}
}

// start runs a source on dir until the test ends.
func start(tb testing.TB, dir string) (*Source, *table, *recorder) {
	tb.Helper()
	s, tab, rec, _ := startState(tb, dir, tb.TempDir())
	return s, tab, rec
}

// startState runs a source that keeps good versions in state, until stop.
func startState(tb testing.TB, dir, state string) (*Source, *table, *recorder, func()) {
	tb.Helper()
	tab, rec := newTable(), &recorder{}
	s := New(Config{Dir: dir, NodeName: "node1", Recorder: rec, Log: quiet(), Rescan: time.Hour, StateDir: state, Ledger: state + ".json"}, tab)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Error(err)
		}
	})
	tb.Cleanup(stop)
	tab.wait(tb, "first pass", func() bool { return tab.synced == 1 })
	return s, tab, rec, stop
}

func TestLifeOfAFile(t *testing.T) {
	dir := t.TempDir()
	_, tab, _ := start(t, dir)
	f := filepath.Join(dir, "web.yaml")
	write(t, f, podYAML("web", "nginx:1"))
	tab.wait(t, "new file", tab.has("set default/web-node1 nginx:1"))
	var first *v1.Pod
	for _, p := range tab.pods {
		first = p
	}
	if first.Annotations[ConfigSourceAnnotation] != "file" || first.Annotations[ConfigHashAnnotation] != string(first.UID) ||
		first.Annotations[ConfigSeenAnnotation] == "" || first.Spec.NodeName != "node1" || first.Status.Phase != v1.PodPending {
		t.Errorf("identity of a static pod: %+v", first)
	}
	if len(first.Spec.Tolerations) != 1 || first.Spec.Tolerations[0].Effect != v1.TaintEffectNoExecute {
		t.Errorf("tolerations: %v", first.Spec.Tolerations)
	}
	if first.Spec.RestartPolicy != v1.RestartPolicyAlways || first.Spec.TerminationGracePeriodSeconds == nil {
		t.Error("pod is not defaulted")
	}

	write(t, f, podYAML("web", "nginx:2"))
	tab.wait(t, "changed file", tab.has("set default/web-node1 nginx:2"))
	for uid := range tab.pods {
		if uid == first.UID {
			t.Error("changed content kept its UID")
		}
	}
	// Neither a touch nor a comment is a change.
	if err := os.Chtimes(f, time.Now(), time.Now()); err != nil {
		t.Fatal(err)
	}
	write(t, f, "# a comment\n"+podYAML("web", "nginx:2"))
	write(t, filepath.Join(dir, "other.yaml"), podYAML("other", "b"))
	tab.wait(t, "other file", tab.has("set default/other-node1 b"))
	if n := tab.count("set default/web"); n != 2 {
		t.Errorf("pod was set %d times, want 2", n)
	}
	// A rename restarts nothing.
	if err := os.Rename(f, filepath.Join(dir, "renamed.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "other.yaml")); err != nil {
		t.Fatal(err)
	}
	tab.wait(t, "removed file", tab.has("remove other-node1"))
	if tab.count("set default/web") != 2 || tab.count("remove web") != 0 {
		t.Errorf("rename disturbed the pod: %q", tab.log)
	}
	if err := os.Remove(filepath.Join(dir, "renamed.yaml")); err != nil {
		t.Fatal(err)
	}
	tab.wait(t, "removed file", tab.has("remove web-node1"))
}

func TestBrokenFileKeepsLastGood(t *testing.T) {
	dir := t.TempDir()
	s, tab, rec := start(t, dir)
	f := filepath.Join(dir, "web.yaml")
	write(t, f, podYAML("web", "a"))
	tab.wait(t, "new file", tab.has("set default/web-node1 a"))
	write(t, f, podYAML("web", "a")+"    imagePullPolice: Always\n")
	tab.wait(t, "problem", func() bool { return len(s.Problems()) == 1 })
	p := s.Problems()[0]
	if p.File != f || p.Document != 1 || p.Line != 9 || p.Field != "spec.containers[0].imagePullPolice" || !p.Kept ||
		!strings.Contains(p.Remedy, "imagePullPolicy") {
		t.Errorf("problem: %+v", p)
	}
	if rec.count("Manifest web.yaml Warning InvalidManifest") != 1 || rec.count("Pod web-node1 Warning InvalidManifest") != 1 {
		t.Errorf("events: %q", rec.events)
	}
	if tab.count("remove") != 0 {
		t.Error("the last good version was stopped")
	}
	write(t, f, podYAML("web", "c"))
	tab.wait(t, "repaired", tab.has("set default/web-node1 c"))
	if p := s.Problems(); len(p) != 0 {
		t.Errorf("problems after repair: %v", p)
	}
}

// A file that is written slowly is never taken or reported in between.
func TestHalfWrittenFile(t *testing.T) {
	dir := t.TempDir()
	s, tab, rec := start(t, dir)
	whole := podYAML("slow", "a") + "  - name: second\n    image: b\n"
	f, err := os.Create(filepath.Join(dir, "slow.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range len(whole) {
		if _, err := f.WriteString(whole[i : i+1]); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(dir, "other.yaml"), podYAML("other", "b"))
	tab.wait(t, "other file meanwhile", tab.has("set default/other-node1 b"))
	if tab.count("set default/slow") != 0 {
		t.Error("a file was taken before its writer closed it")
	}
	f.Close()
	tab.wait(t, "whole file", tab.has("set default/slow-node1 a"))
	if tab.count("set default/slow") != 1 || len(s.Problems()) != 0 || len(rec.events) != 0 {
		t.Errorf("log %q, problems %v", tab.log, s.Problems())
	}
}

func TestEditorsAndAtomicRename(t *testing.T) {
	dir := t.TempDir()
	s, tab, _ := start(t, dir)
	f := filepath.Join(dir, "web.yaml")
	for _, n := range []string{".web.yaml.swp", "4913", "web.yaml~", "#web.yaml#", ".#web.yaml", "web.tmp", ".hidden.yaml", "README.md"} {
		write(t, filepath.Join(dir, n), "not: [yaml")
	}
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "web.tmp"), podYAML("web", "a"))
	if err := os.Rename(filepath.Join(dir, "web.tmp"), f); err != nil {
		t.Fatal(err)
	}
	tab.wait(t, "renamed in", tab.has("set default/web-node1 a"))
	// vim with backupcopy=no: away, new, old removed.
	if err := os.Rename(f, f+"~"); err != nil {
		t.Fatal(err)
	}
	write(t, f, podYAML("web", "b"))
	if err := os.Remove(f + "~"); err != nil {
		t.Fatal(err)
	}
	tab.wait(t, "edited", tab.has("set default/web-node1 b"))
	if tab.count("remove") != 0 || len(s.Problems()) != 0 {
		t.Errorf("log %q, problems %v", tab.log, s.Problems())
	}
}

// TestDeletedAndWrittenAgain: what is deleted goes, also when the same comes back
// at once (upstream's MirrorPod, recreate).
func TestDeletedAndWrittenAgain(t *testing.T) {
	dir := t.TempDir()
	_, tab, _ := start(t, dir)
	f := filepath.Join(dir, "web.yaml")
	write(t, f, podYAML("web", "v1"))
	tab.wait(t, "there", tab.has("set default/web-node1 v1"))
	if err := os.Remove(f); err != nil {
		t.Fatal(err)
	}
	write(t, f, podYAML("web", "v1"))
	tab.wait(t, "set again", func() bool { return len(tab.log) == 4 })
	if tab.count("remove web-node1") != 1 || tab.count("set default/web-node1 v1") != 2 {
		t.Fatalf("log %q", tab.log)
	}
}

func TestDirectoryComesGoesAndIsExchanged(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "etc", "kubernetes", "manifests")
	_, tab, _ := start(t, dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "a.yaml"), podYAML("a", "v1"))
	tab.wait(t, "directory came", tab.has("set default/a-node1 v1"))

	next := dir + ".new"
	if err := os.Mkdir(next, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(next, "a.yaml"), podYAML("a", "v1"))
	write(t, filepath.Join(next, "b.yaml"), podYAML("b", "v1"))
	if err := os.Rename(dir, dir+".old"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, dir); err != nil {
		t.Fatal(err)
	}
	tab.wait(t, "directory exchanged", tab.has("set default/b-node1 v1"))
	if tab.count("remove") != 0 || tab.count("set default/a") != 1 {
		t.Errorf("exchange disturbed a pod: %q", tab.log)
	}
	write(t, filepath.Join(dir, "c.yaml"), podYAML("c", "v1"))
	tab.wait(t, "new directory is watched", tab.has("set default/c-node1 v1"))
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	tab.wait(t, "directory gone", func() bool { return len(tab.pods) == 0 })
}

// The directory may be a link that a deployment tool points elsewhere.
func TestDirectoryIsALink(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "manifests")
	point := func(to string) {
		if err := os.Symlink(to, dir+".new"); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(dir+".new", dir); err != nil {
			t.Fatal(err)
		}
	}
	for _, v := range []string{"one", "two"} {
		if err := os.Mkdir(filepath.Join(root, v), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(root, v, "web.yaml"), podYAML("web", v))
	}
	point("one")
	_, tab, _ := start(t, dir)
	tab.wait(t, "first", tab.has("set default/web-node1 one"))
	point("two")
	tab.wait(t, "pointed elsewhere", tab.has("set default/web-node1 two"))
	write(t, filepath.Join(root, "two", "b.yaml"), podYAML("b", "v1"))
	tab.wait(t, "followed there", tab.has("set default/b-node1 v1"))
}

// The directory, or one on the way to it, comes as a link made in place.
func TestDirectoryComesAsALink(t *testing.T) {
	for _, link := range []string{"manifests", "kubernetes"} {
		t.Run(link, func(t *testing.T) {
			root := t.TempDir()
			real := filepath.Join(root, "real", "kubernetes", "manifests")
			if err := os.MkdirAll(real, 0o755); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(real, "web.yaml"), podYAML("web", "one"))
			dir, from, to := filepath.Join(root, "manifests"), "manifests", real
			if link == "kubernetes" {
				dir, from, to = filepath.Join(root, "kubernetes", "manifests"), "kubernetes", filepath.Dir(real)
			}
			_, tab, _ := start(t, dir)
			if err := os.Symlink(to, filepath.Join(root, from)); err != nil {
				t.Fatal(err)
			}
			tab.wait(t, "link came", tab.has("set default/web-node1 one"))
			write(t, filepath.Join(real, "b.yaml"), podYAML("b", "v1"))
			tab.wait(t, "followed there", tab.has("set default/b-node1 v1"))
		})
	}
}

// A directory that is a mounted ConfigMap: links through ..data.
func TestConfigMapDirectory(t *testing.T) {
	dir := t.TempDir()
	set := func(version, image string) {
		gen := filepath.Join(dir, "..gen"+version)
		if err := os.Mkdir(gen, 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(gen, "web.yaml"), podYAML("web", image))
		if err := os.Symlink("..gen"+version, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	set("1", "one")
	if err := os.Symlink("..data/web.yaml", filepath.Join(dir, "web.yaml")); err != nil {
		t.Fatal(err)
	}
	_, tab, _ := start(t, dir)
	tab.wait(t, "first", tab.has("set default/web-node1 one"))
	set("2", "two")
	tab.wait(t, "swapped", tab.has("set default/web-node1 two"))
}

func TestSingleFile(t *testing.T) {
	f := filepath.Join(t.TempDir(), "only-this")
	_, tab, _ := start(t, f)
	write(t, filepath.Join(filepath.Dir(f), "not.yaml"), podYAML("not", "v1"))
	write(t, f, podYAML("one", "v1"))
	tab.wait(t, "file came", tab.has("set default/one-node1 v1"))
	write(t, f+".tmp", podYAML("one", "v2"))
	if err := os.Rename(f+".tmp", f); err != nil {
		t.Fatal(err)
	}
	tab.wait(t, "file exchanged", tab.has("set default/one-node1 v2"))
	if tab.count("set default/not") != 0 {
		t.Error("a file beside was read")
	}
	if err := os.Remove(f); err != nil {
		t.Fatal(err)
	}
	tab.wait(t, "file gone", func() bool { return len(tab.pods) == 0 })
}

func TestObjects(t *testing.T) {
	dir := t.TempDir()
	s, tab, _ := start(t, dir)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	changes := s.Subscribe(ctx)
	f := filepath.Join(dir, "all.yaml")
	doc := func(value string) string {
		return "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: ConfigMap\n  metadata: {name: conf}\n  immutable: " + value +
			"\n  data: {a: x" + value + "}\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: sec, namespace: ns}\nstringData: {p: " + value + "x}\n---\n" + podYAML("p", "i")
	}
	write(t, f, doc("false"))
	tab.wait(t, "pod", tab.has("set default/p-node1 i"))
	m, err := s.ConfigMap("default", "conf")
	if err != nil || m.Data["a"] != "xfalse" {
		t.Fatalf("%v %v", m, err)
	}
	sec, err := s.Secret("ns", "sec")
	if err != nil || string(sec.Data["p"]) != "falsex" || sec.Type != v1.SecretTypeOpaque {
		t.Fatalf("%v %v", sec, err)
	}
	got := map[ObjectRef]bool{<-changes: true, <-changes: true}
	if !got[ObjectRef{"ConfigMap", "default", "conf"}] || !got[ObjectRef{"Secret", "ns", "sec"}] {
		t.Errorf("changes: %v", got)
	}
	write(t, f, doc("true"))
	<-changes
	tab.wait(t, "becomes immutable", func() bool { m, _ := s.ConfigMap("default", "conf"); return m.Data["a"] == "xtrue" })
	write(t, f, strings.ReplaceAll(doc("true"), "xtrue", "other"))
	tab.wait(t, "problem", func() bool { return len(s.Problems()) == 1 })
	if m, _ := s.ConfigMap("default", "conf"); m.Data["a"] != "xtrue" {
		t.Errorf("immutable object changed: %v", m.Data)
	}
	if err := os.Remove(f); err != nil {
		t.Fatal(err)
	}
	tab.wait(t, "objects gone", func() bool { _, err := s.Secret("ns", "sec"); return err != nil })
}

func TestFixedUID(t *testing.T) {
	dir := t.TempDir()
	_, tab, _ := start(t, dir)
	f := filepath.Join(dir, "web.yaml")
	y := func(image string) string {
		return strings.Replace(podYAML("web", image), "  name: web\n", "  name: web\n  uid: 1234-fixed\n", 1)
	}
	write(t, f, y("a"))
	tab.wait(t, "new", tab.has("set default/web-node1 a"))
	hash, seen := tab.pods["1234-fixed"].Annotations[ConfigHashAnnotation], tab.pods["1234-fixed"].Annotations[ConfigSeenAnnotation]
	write(t, f, y("b"))
	tab.wait(t, "changed", tab.has("set default/web-node1 b"))
	p := tab.pods["1234-fixed"]
	if p == nil || p.Annotations[ConfigHashAnnotation] == hash || p.Annotations[ConfigSeenAnnotation] != seen {
		t.Errorf("update in place: %+v", p)
	}
}

func TestTwoPodsOneUID(t *testing.T) {
	dir := t.TempDir()
	s, tab, _ := start(t, dir)
	y := func(name string) string {
		return strings.Replace(podYAML(name, "i"), "metadata:\n", "metadata:\n  uid: fixed\n", 1)
	}
	write(t, filepath.Join(dir, "a.yaml"), y("a"))
	tab.wait(t, "first", tab.has("set default/a-node1 i"))
	write(t, filepath.Join(dir, "b.yaml"), y("b"))
	tab.wait(t, "problem", func() bool { return len(s.Problems()) == 1 })
	if p := s.Problems()[0]; p.Field != "metadata.uid" || !strings.Contains(p.Message, "default/a-node1") {
		t.Errorf("problem: %v", p)
	}
	if tab.count("set default/b") != 0 {
		t.Error("two pods with one UID")
	}
	if err := os.Remove(filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	tab.wait(t, "the UID is free", tab.has("set default/b-node1 i"))
	if len(s.Problems()) != 0 {
		t.Errorf("problems: %v", s.Problems())
	}
}

// A manifest that is broken when podd starts does not stop its pod: the source
// would otherwise be complete without it.
func TestBrokenAtStart(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	_, tab, _, stop := startState(t, dir, state)
	for _, n := range []string{"kept", "torn", "gone"} {
		write(t, filepath.Join(dir, n+".yaml"), podYAML(n, "good"))
		tab.wait(t, n, tab.has("set default/"+n+"-node1 good"))
	}
	var uid types.UID
	for u, p := range tab.pods {
		if p.Name == "kept-node1" {
			uid = u
		}
	}
	tab.wait(t, "kept on disk", func() bool { entries, _ := os.ReadDir(state); return len(entries) == 3 })
	stop()
	old := time.Now().Add(-time.Hour)
	for _, n := range []string{"kept", "torn"} {
		write(t, filepath.Join(dir, n+".yaml"), podYAML(n, "good")+"  broken: true\n")
		os.Chtimes(filepath.Join(dir, n+".yaml"), old, old)
	}
	if err := os.Remove(filepath.Join(dir, "gone.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(state, "torn.yaml"), 100); err != nil {
		t.Fatal(err)
	}

	s, tab, _, stop := startState(t, dir, state)
	if tab.log[0] != "set default/kept-node1 good" || tab.log[1] != "synced file" || tab.pods[uid] == nil {
		t.Errorf("log %q, pods %v", tab.log, tab.pods)
	}
	tab.wait(t, "problems", func() bool { return len(s.Problems()) == 2 })
	if p := s.Problems(); !p[0].Kept || p[1].Kept {
		t.Errorf("problems: %v", p)
	}
	if entries, _ := os.ReadDir(state); len(entries) != 1 {
		t.Errorf("records left: %v", entries)
	}
	stop()
}

// Until the directory can be read nothing is an orphan.
func TestUnreadableDirectoryIsNotEmpty(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "loop")
	if err := os.Symlink(dir, dir); err != nil {
		t.Fatal(err)
	}
	tab := newTable()
	s := New(Config{Dir: dir, NodeName: "node1", Log: quiet(), Rescan: 10 * time.Millisecond}, tab)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	select {
	case <-tab.change:
		t.Errorf("log: %q", tab.log)
	case <-time.After(100 * time.Millisecond): // several rescans
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "a.yaml"), podYAML("a", "i"))
	tab.wait(t, "readable", tab.has("set default/a-node1 i"))
	tab.wait(t, "synced", func() bool { return tab.synced == 1 })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestThousandFiles(t *testing.T) {
	dir := t.TempDir()
	_, tab, _ := start(t, dir)
	began := time.Now()
	for i := range 1000 {
		write(t, filepath.Join(dir, fmt.Sprintf("p%d.yaml", i)), podYAML(fmt.Sprintf("p%d", i), "a"))
	}
	tab.wait(t, "all", func() bool { return len(tab.pods) == 1000 })
	t.Logf("1000 files: %v", time.Since(began))
	for i := range 1000 {
		os.Remove(filepath.Join(dir, fmt.Sprintf("p%d.yaml", i)))
	}
	tab.wait(t, "none", func() bool { return len(tab.pods) == 0 })
}

// BenchmarkFileToSink is the part of the start of a pod that is ours.
func BenchmarkFileToSink(b *testing.B) {
	dir := b.TempDir()
	_, tab, _ := start(b, dir)
	f := filepath.Join(dir, "web.yaml")
	for i := range b.N {
		image := fmt.Sprintf("i:%d", i)
		write(b, f+".tmp", podYAML("web", image))
		os.Rename(f+".tmp", f)
		tab.wait(b, "set", tab.has("set default/web-node1 "+image))
		tab.mu.Lock()
		tab.log = tab.log[:0]
		tab.mu.Unlock()
	}
}
