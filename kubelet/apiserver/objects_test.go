package apiserver

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

// shelf is an apiserver with one ConfigMap, settings, and no Services. It counts
// who watches.
type shelf struct {
	mu      sync.Mutex
	away    bool
	is      *v1.ConfigMap
	lists   map[string]int // by path
	watches map[string]int // open now
	closed  chan struct{}
}

func newShelf(t *testing.T) (*shelf, *Client) {
	s := &shelf{lists: map[string]int{}, watches: map[string]int{}, closed: make(chan struct{})}
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	t.Cleanup(func() { close(s.closed) }) // first: Close waits for requests
	c, err := NewClient(&rest.Config{Host: srv.URL, QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	return s, c
}

func (s *shelf) set(m *v1.ConfigMap) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.is = m
}

func (s *shelf) count(of map[string]int, path string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return of[path]
}

func (s *shelf) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	q := r.URL.Query()
	switch {
	case s.away, q.Get("sendInitialEvents") != "":
		code, status := refusal(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid)
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(status)
	case q.Get("watch") != "":
		s.watches[r.URL.Path]++
		s.mu.Unlock()
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
		case <-s.closed:
		}
		s.mu.Lock()
		s.watches[r.URL.Path]--
	case strings.HasSuffix(r.URL.Path, "/services"):
		s.lists[r.URL.Path]++
		_, _ = io.WriteString(w, `{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[]}`)
	default:
		s.lists[r.URL.Path]++
		list := &v1.ConfigMapList{TypeMeta: metav1.TypeMeta{Kind: "ConfigMapList", APIVersion: "v1"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"}}
		if s.is != nil {
			list.Items = append(list.Items, *s.is)
		}
		_ = json.NewEncoder(w).Encode(list)
	}
}

func settings(uid types.UID, text string) *v1.ConfigMap {
	yes := true
	return &v1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "settings", UID: uid, ResourceVersion: "1"},
		Data:       map[string]string{"a": text}, Immutable: &yes,
	}
}

func usesSettings(uid types.UID) *v1.Pod {
	return &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: string(uid), UID: uid},
		Spec: v1.PodSpec{Volumes: []v1.Volume{{Name: "v", VolumeSource: v1.VolumeSource{
			ConfigMap: &v1.ConfigMapVolumeSource{LocalObjectReference: v1.LocalObjectReference{Name: "settings"}},
		}}}},
	}
}

func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// An immutable object cannot change, but one of its name can take its place. The
// pod of before keeps what it has until somebody new asks.
func TestAnImmutableObjectThatWasMadeAnewIsSeenByNewPods(t *testing.T) {
	s, c := newShelf(t)
	s.set(settings("1", "old"))
	o := NewObjects(c, func(string, string) {}, slog.New(slog.DiscardHandler))
	go o.Run(t.Context())
	await(t, "it runs", func() bool { o.mu.Lock(); defer o.mu.Unlock(); return o.ctx != nil })
	text := func() (got string) {
		t.Helper()
		await(t, "an answer", func() bool {
			m, err := o.ConfigMap("ns", "settings")
			if err == nil {
				got = m.Data["a"]
			}
			return !errors.Is(err, errdefs.ErrUnavailable)
		})
		return got
	}
	o.Use("one", usesSettings("one"))
	if got := text(); got != "old" {
		t.Fatalf("%q", got)
	}
	s.set(settings("2", "new"))
	o.Use("one", usesSettings("one")) // nothing is new about it
	if got := text(); got != "old" {
		t.Errorf("%q after no change", got)
	}
	o.Use("two", usesSettings("two"))
	if got := text(); got != "new" {
		t.Errorf("%q for a new pod", got)
	}
	// While the apiserver is away, what is known is what there is.
	s.mu.Lock()
	s.away = true
	s.mu.Unlock()
	o.Use("three", usesSettings("three"))
	if got := text(); got != "new" {
		t.Errorf("%q while the apiserver is away", got)
	}
	for _, uid := range []types.UID{"one", "two", "three"} {
		o.Use(uid, nil)
	}
	await(t, "no watch is left", func() bool { return s.count(s.watches, "/api/v1/namespaces/ns/configmaps") == 0 })
	if len(o.have) != 0 || len(o.users) != 0 {
		t.Errorf("left: %v, %v", o.have, o.users)
	}
}

// A pod that has ended needs no Services, as it needs no ConfigMaps: Jobs' pods
// stay at the apiserver for long.
func TestServicesAreNotWatchedForPodsThatHaveEnded(t *testing.T) {
	s, c := newShelf(t)
	services := NewServices(c, slog.New(slog.DiscardHandler))
	go services.Run(t.Context())
	pod := usesSettings("one")
	services.Use("one", pod)
	const path = "/api/v1/namespaces/ns/services"
	await(t, "a watch", func() bool { return s.count(s.watches, path) == 1 })
	if _, err := services.Env(t.Context(), pod); err != nil {
		t.Error(err)
	}
	over := pod.DeepCopy()
	over.Status.Phase = v1.PodSucceeded
	services.Use("one", over)
	await(t, "no watch", func() bool { return s.count(s.watches, path) == 0 })
	services.Use("one", over)
	services.Use("one", nil)
	if len(services.users) != 0 || services.namespaces["ns"] != nil {
		t.Errorf("left: %v", services.users)
	}
}

// After a restore of etcd a watch goes on from a version that is still to come,
// and is told nothing.
func TestARestoredApiserverIsListedAnew(t *testing.T) {
	s, c := newShelf(t)
	old := settings("1", "old")
	old.Immutable = nil
	s.set(old)
	o := NewObjects(c, func(string, string) {}, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = o.Run(ctx) }()
	o.Use("one", usesSettings("one"))
	const path = "/api/v1/namespaces/ns/configmaps"
	await(t, "a watch", func() bool { return s.count(s.watches, path) == 1 })
	for _, version := range []string{"900", "900", "1000"} {
		if c.Wrote(version) {
			t.Errorf("version %s is taken for one from before", version)
		}
	}
	restored := settings("1", "restored")
	restored.Immutable = nil
	s.set(restored)
	if !c.Wrote("5") {
		t.Error("version 5 after 1000 is taken for a later one")
	}
	await(t, "the list is taken", func() bool {
		m, err := o.ConfigMap("ns", "settings")
		return err == nil && m.Data["a"] == "restored"
	})
	await(t, "one watch", func() bool { return s.count(s.watches, path) == 1 })
	if c.Wrote("6") {
		t.Error("told twice")
	}
	cancel()
	<-done
	await(t, "no watch is left", func() bool { return s.count(s.watches, path) == 0 })
}
