package apiserver

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"

	"github.com/podd-runtime/podd/kubelet/manifests"
)

// parts are Pods with an apiserver that answers as the test says, and a table
// that writes down what it is told.
type parts struct {
	*Pods
	t     *testing.T
	table chan watch.Event

	mu    sync.Mutex
	told  []string // "set UID ..." and "remove UID"
	uses  map[types.UID]bool
	asked []string // METHOD path
	serve func(r *http.Request) (int, any)
}

func (f *parts) Watch(context.Context, string) <-chan watch.Event { return f.table }

func (f *parts) SetPod(_ string, pod *v1.Pod) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = append(f.told, fmt.Sprintf("set %s g%d deleted=%v %s%s", pod.UID, pod.Generation, pod.DeletionTimestamp != nil, pod.Status.Phase, pod.Labels["l"]))
}

func (f *parts) RemovePod(_ string, uid types.UID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = append(f.told, "remove "+string(uid))
}

func (f *parts) Synced(string) {}

func (f *parts) Use(uid types.UID, pod *v1.Pod) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.uses[uid] = pod != nil; pod == nil {
		delete(f.uses, uid)
	}
}

func (f *parts) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.asked = append(f.asked, r.Method+" "+r.URL.Path)
	serve := f.serve
	f.mu.Unlock()
	code, obj := serve(r)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(obj)
}

func newParts(t *testing.T) *parts {
	f := &parts{t: t, table: make(chan watch.Event), uses: map[types.UID]bool{}}
	f.serve = func(*http.Request) (int, any) { return refusal(http.StatusServiceUnavailable, "") }
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	c, err := NewClient(&rest.Config{Host: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	f.Pods = New(Config{Client: c, NodeName: "n", Sink: f, Table: f, Uses: []Uses{f}, Log: slog.New(slog.DiscardHandler)})
	return f
}

// run follows the table; the watch is the test's.
func (f *parts) run() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	f.Pods.ctx = ctx
	f.work.Go(func() { f.report(ctx) })
	f.t.Cleanup(func() { cancel(); close(f.table); f.work.Wait() })
	return ctx
}

func refusal(code int, reason metav1.StatusReason) (int, any) {
	return code, &metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Code: int32(code), Reason: reason}
}

// expect that the table was told this, in this order, and nothing else.
func (f *parts) expect(want ...string) {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Equal(f.told, want) {
		f.t.Errorf("the table was told\n%s\nwant\n%s", strings.Join(f.told, "\n"), strings.Join(want, "\n"))
	}
}

func (f *parts) eventually(what string, is func() bool) {
	f.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		f.mu.Lock()
		ok := is()
		f.mu.Unlock()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("not seen: %s; asked: %v", what, f.asked)
		}
	}
}

func (f *parts) requests(what string) (n int) {
	for _, a := range f.asked {
		if a == what {
			n++
		}
	}
	return n
}

func apiPod(version string, change ...func(*v1.Pod)) *v1.Pod {
	p := &v1.Pod{
		TypeMeta:   metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "u", ResourceVersion: version, Generation: 1},
		Spec:       v1.PodSpec{NodeName: "n"},
	}
	for _, c := range change {
		c(p)
	}
	return p
}

func deleted(p *v1.Pod) {
	now := metav1.Now().Rfc3339Copy()
	p.DeletionTimestamp, p.Generation = &now, 2
}

func label(text string) func(*v1.Pod) {
	return func(p *v1.Pod) { p.Labels = map[string]string{"l": text} }
}

// A deletion reaches the apiserver between two status patches of the node: the
// answer to the second is the first that tells of it, and the watch's own event
// is old by then.
func TestWhatAnAnswerBringsIsToldOnce(t *testing.T) {
	f := newParts(t)
	ctx := t.Context()
	f.hear(ctx, apiPod("1"), listed)
	f.serve = func(*http.Request) (int, any) { return http.StatusOK, apiPod("5", deleted) }
	shown := apiPod("1")
	shown.Status.Phase = v1.PodRunning
	if err := f.patch(ctx, f.version("u"), shown); err != nil {
		t.Fatal(err)
	}
	f.hear(ctx, apiPod("4", deleted), event)
	f.hear(ctx, apiPod("5", deleted), event)
	f.expect("set u g1 deleted=false ", "set u g2 deleted=true ")
}

// An answer that was overtaken by the watch changes nothing.
func TestOvertakenAnswerIsOld(t *testing.T) {
	f := newParts(t)
	ctx := t.Context()
	f.hear(ctx, apiPod("1"), listed)
	f.hear(ctx, apiPod("9", deleted), event)
	f.hear(ctx, apiPod("3"), answer)
	f.expect("set u g1 deleted=false ", "set u g2 deleted=true ")
	if v := f.version("u").ResourceVersion; v != "9" {
		t.Errorf("version %s is known", v)
	}
}

// After a restore of etcd versions begin below those that were known.
func TestRestoredApiserverIsBelieved(t *testing.T) {
	f := newParts(t)
	ctx := t.Context()
	f.hear(ctx, apiPod("1000", label("old")), listed)
	f.hear(ctx, apiPod("1001", label("old")), answer)
	f.replace(ctx, []*v1.Pod{apiPod("5", label("restored"))})
	f.hear(ctx, apiPod("6", label("later")), event)
	f.replace(ctx, nil)
	f.expect("set u g1 deleted=false old", "set u g1 deleted=false restored", "set u g1 deleted=false later", "remove u")
}

// A phase that somebody else ends the pod with is told.
func TestTerminalPhaseOfOthersIsTold(t *testing.T) {
	f := newParts(t)
	f.hear(t.Context(), apiPod("1"), listed)
	f.hear(t.Context(), apiPod("2", func(p *v1.Pod) { p.Status.Phase = v1.PodRunning }), event) // our own
	f.hear(t.Context(), apiPod("3", func(p *v1.Pod) { p.Status.Phase = v1.PodFailed }), event)
	f.expect("set u g1 deleted=false ", "set u g1 deleted=false Failed")
}

// DELETED, then ADDED of one UID in the table: what comes then is told again.
func TestEndedIsTakenBack(t *testing.T) {
	f := newParts(t)
	ctx := f.run()
	f.hear(ctx, apiPod("1"), listed)
	ended := func() bool { return f.Pods.known["u"].ended }
	locked := func(is func() bool) func() bool {
		return func() bool { f.Pods.mu.Lock(); defer f.Pods.mu.Unlock(); return is() }
	}
	shown := apiPod("1")
	shown.Annotations = map[string]string{manifests.ConfigSourceAnnotation: SourceName}
	f.table <- watch.Event{Type: watch.Deleted, Object: shown}
	f.eventually("the end", locked(ended))
	f.table <- watch.Event{Type: watch.Added, Object: shown}
	f.eventually("the new life", locked(func() bool { return !ended() }))
	f.hear(ctx, apiPod("2", deleted), event)
	f.expect("set u g1 deleted=false ", "set u g2 deleted=true ")
}

// A pod that went before the table had anything of it leaves no watches.
func TestPodThatNeverBeganLeavesNoWatch(t *testing.T) {
	f := newParts(t)
	ctx := f.run()
	f.hear(ctx, apiPod("1"), listed)
	f.removed(ctx, "u")
	f.expect("set u g1 deleted=false ", "remove u")
	if len(f.uses) != 0 {
		t.Errorf("used: %v", f.uses)
	}
}

func staticPod() *v1.Pod {
	return &v1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "s-n", UID: "static", Annotations: map[string]string{
		manifests.ConfigSourceAnnotation: "file", manifests.ConfigHashAnnotation: "h"}}}
}

func mirrorPod(uid, version string) *v1.Pod {
	return apiPod(version, func(p *v1.Pod) {
		p.Name, p.UID = "s-n", types.UID(uid)
		p.Annotations = map[string]string{mirrorAnnotation: "h"}
	})
}

const (
	post = "POST /api/v1/namespaces/ns/pods"
	del  = "DELETE /api/v1/namespaces/ns/pods/s-n"
)

// withStatic is a node whose static pod is in the table.
func withStatic(t *testing.T) (*parts, context.Context) {
	f := newParts(t)
	ctx := f.run()
	sink := f.Static(f)
	sink.SetPod("file", staticPod())
	sink.Synced("file")
	f.replace(ctx, nil)
	f.Registered("node")
	return f, ctx
}

// A mirror pod whose ADDED and DELETED overtake the answer to its POST is made
// anew.
func TestMirrorPodThatWentBeforeItsAnswerIsMadeAnew(t *testing.T) {
	f, ctx := withStatic(t)
	f.serve = func(r *http.Request) (int, any) {
		if r.Method != http.MethodPost {
			return refusal(http.StatusServiceUnavailable, "")
		}
		f.mu.Lock()
		n := f.requests(post)
		f.mu.Unlock()
		m := mirrorPod(fmt.Sprint("m", n), fmt.Sprint(n))
		if n == 1 {
			f.hear(ctx, mirrorPod("m1", "1"), event)
			f.removed(ctx, "m1")
		}
		return http.StatusCreated, m
	}
	f.table <- watch.Event{Type: watch.Added, Object: staticPod()}
	f.eventually("a second mirror pod", func() bool { return f.requests(post) == 2 })
	f.eventually("it is known", func() bool { return f.version("m2") != nil })
	if f.version("m1") != nil {
		t.Error("the mirror pod that is gone is known")
	}
}

// A pod on another node that has the mirror pod's name is no success.
func TestNameOfAMirrorPodIsTakenElsewhere(t *testing.T) {
	f, _ := withStatic(t)
	elsewhere := true
	f.serve = func(r *http.Request) (int, any) {
		f.mu.Lock()
		defer f.mu.Unlock()
		m := mirrorPod("m", "7")
		if elsewhere {
			m.Spec.NodeName = "other"
		}
		switch r.Method {
		case http.MethodPost:
			return refusal(http.StatusConflict, metav1.StatusReasonAlreadyExists)
		case http.MethodGet:
			return http.StatusOK, m
		}
		return http.StatusOK, m
	}
	f.table <- watch.Event{Type: watch.Added, Object: staticPod()}
	f.eventually("it is tried again", func() bool { return f.requests(post) > 1 })
	if f.version("m") != nil {
		t.Error("a pod of another node is known")
	}
	f.mu.Lock()
	elsewhere = false
	f.mu.Unlock()
	f.eventually("its own is known", func() bool { return f.version("m") != nil })
}

// A mirror pod of no static pod goes, though its DELETE fails at first.
func TestMirrorPodOfNothingGoes(t *testing.T) {
	f := newParts(t)
	ctx := f.run()
	f.serve = func(r *http.Request) (int, any) {
		f.mu.Lock()
		defer f.mu.Unlock()
		switch {
		case r.Method == http.MethodDelete && f.requests(del) < 3:
			return refusal(http.StatusInternalServerError, metav1.StatusReasonInternalError)
		case r.Method == http.MethodDelete:
			return refusal(http.StatusNotFound, metav1.StatusReasonNotFound) // the event was lost
		}
		return refusal(http.StatusServiceUnavailable, "")
	}
	f.Static(f).Synced("file")
	f.replace(ctx, []*v1.Pod{mirrorPod("m", "1")})
	f.eventually("deleted", func() bool { return f.requests(del) == 3 && f.version("m") == nil })
	f.hear(ctx, mirrorPod("late", "2"), event) // one that comes afterwards goes, too
	f.eventually("deleted", func() bool { return f.version("late") == nil })
}

// A pod that was being deleted when podd was killed may end before the apiserver
// is heard again. It does not begin once more to be told wrongly of: its last
// status is told, and it is deleted.
func TestAPodThatEndsBeforeTheListDoesNotBeginAgain(t *testing.T) {
	f := newParts(t)
	ctx := f.run()
	ended := apiPod("1", deleted, func(p *v1.Pod) {
		p.Annotations = map[string]string{manifests.ConfigSourceAnnotation: SourceName}
		p.Status.Phase = v1.PodSucceeded
	})
	f.table <- watch.Event{Type: watch.Deleted, Object: ended}
	other := apiPod("1")
	other.UID = "other"
	f.table <- watch.Event{Type: watch.Added, Object: other} // the first has been looked at
	f.serve = func(r *http.Request) (int, any) {
		return http.StatusOK, apiPod("8", deleted, func(p *v1.Pod) { p.Status.Phase = v1.PodSucceeded })
	}
	await(t, "nothing is under way", func() bool {
		f.Pods.mu.Lock()
		defer f.Pods.mu.Unlock()
		r := f.reports["u"]
		return r == nil || !r.busy
	})
	f.replace(ctx, []*v1.Pod{apiPod("7", deleted, func(p *v1.Pod) { p.Status.Phase = v1.PodRunning })})
	f.eventually("status and deletion", func() bool {
		return f.requests("PATCH /api/v1/namespaces/ns/pods/p/status") > 0 && f.requests("DELETE /api/v1/namespaces/ns/pods/p") > 0
	})
	f.expect()
	f.removed(ctx, "u")
	await(t, "its report is forgotten", func() bool {
		f.Pods.mu.Lock()
		defer f.Pods.mu.Unlock()
		return f.reports["u"] == nil
	})
}
