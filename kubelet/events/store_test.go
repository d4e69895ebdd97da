package events

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/watch"
)

var ref = &v1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: "default", Name: "web", UID: "1", FieldPath: "spec.containers{a}"}

type clock struct{ t time.Time }

func (c *clock) now() time.Time { c.t = c.t.Add(time.Second); return c.t }

func open(t *testing.T, path string, max int, c *clock) *Store {
	t.Helper()
	s, err := Open(Config{Path: path, Max: max, Component: "kubelet", Host: "n1", Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestEqualEventsAreCounted(t *testing.T) {
	c := &clock{t: time.Unix(1000, 0)}
	s := open(t, "", 0, c)
	for i := 0; i < 3; i++ {
		s.Eventf(ref, v1.EventTypeWarning, "BackOff", "Back-off %d", 1)
	}
	got := s.List("default")
	if len(got) != 1 || got[0].Count != 3 {
		t.Fatalf("%d events, want one of count 3: %+v", len(got), got)
	}
	e := got[0]
	if !e.LastTimestamp.After(e.FirstTimestamp.Time) || e.InvolvedObject.FieldPath != ref.FieldPath ||
		e.Source.Component != "kubelet" || !strings.HasPrefix(e.Name, "web.") {
		t.Fatalf("event not as upstream shapes it: %+v", e)
	}
	if n := len(s.List("other")); n != 0 {
		t.Fatalf("%d events in another namespace", n)
	}
}

func TestSimilarEventsAreCombined(t *testing.T) {
	c := &clock{t: time.Unix(1000, 0)}
	s := open(t, "", 0, c)
	for i := 0; i < 25; i++ {
		s.Eventf(ref, v1.EventTypeWarning, "Unhealthy", "probe failed: %d", i)
	}
	got := s.List("")
	if len(got) != similarMax {
		t.Fatalf("%d events, want %d", len(got), similarMax)
	}
	last := got[len(got)-1]
	if last.Message != combinedPrefix+"probe failed: 24" || last.Count != 16 {
		t.Fatalf("combined event is %q ×%d", last.Message, last.Count)
	}
}

func TestBounded(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "e"), 50, &clock{})
	for i := 0; i < 500; i++ {
		r := *ref
		r.Name = fmt.Sprint("p", i)
		s.Eventf(&r, v1.EventTypeNormal, "Started", "x")
	}
	got := s.List("")
	if len(got) > 50 || got[len(got)-1].InvolvedObject.Name != "p499" {
		t.Fatalf("%d events, last %s", len(got), got[len(got)-1].InvolvedObject.Name)
	}
}

func TestSurvivesRestartAndTornLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events")
	c := &clock{t: time.Unix(1000, 0)}
	s := open(t, path, 20, c)
	for i := 0; i < 100; i++ { // past the point of rewriting
		s.Eventf(ref, v1.EventTypeNormal, "Pulled", "same")
		if err := s.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if st, _ := os.Stat(path); st.Size() > 20*1024 {
		t.Fatalf("file has %d bytes for one event", st.Size())
	}
	f, _ := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	fmt.Fprint(f, `{"n":"torn`)
	f.Close()

	s = open(t, path, 20, c)
	s.Eventf(ref, v1.EventTypeNormal, "Pulled", "same")
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	s = open(t, path, 20, c)
	got := s.List("")
	if len(got) != 1 || got[0].Count != 101 {
		t.Fatalf("after restart: %+v", got)
	}
}

func TestForeignFileIsSetAside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events")
	os.WriteFile(path, []byte("\x00garbage"), 0o600)
	s := open(t, path, 0, &clock{})
	s.Eventf(ref, v1.EventTypeNormal, "Pulled", "x")
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	m, _ := filepath.Glob(path + ".broken-*")
	if len(m) != 1 {
		t.Fatalf("set aside: %v", m)
	}
}

func TestWatch(t *testing.T) {
	s := open(t, "", 0, &clock{})
	s.Eventf(ref, v1.EventTypeNormal, "Pulled", "x")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	ch := s.Watch(ctx)
	if e := <-ch; e.Type != watch.Added {
		t.Fatalf("first is %s", e.Type)
	}
	s.Eventf(ref, v1.EventTypeNormal, "Pulled", "x")
	if e := <-ch; e.Type != watch.Modified || e.Object.(*v1.Event).Count != 2 {
		t.Fatalf("second is %+v", e)
	}
}

func TestLongMessageIsCut(t *testing.T) {
	s := open(t, "", 0, &clock{})
	s.Eventf(ref, v1.EventTypeWarning, "Unhealthy", "%s", strings.Repeat("é", 2000))
	if m := s.List("")[0].Message; len(m) > maxMessage || !strings.HasSuffix(m, "é...") {
		t.Fatalf("%d bytes, ends %q", len(m), m[len(m)-8:])
	}
}

// TestEventsAreTold: where that is asked for, a new event of a pod is logged
// once, with what a journal finds it by.
func TestEventsAreTold(t *testing.T) {
	var out bytes.Buffer
	s, err := Open(Config{Tell: true, Log: slog.New(slog.NewTextHandler(&out, nil))})
	if err != nil {
		t.Fatal(err)
	}
	ref := &v1.ObjectReference{Kind: "Pod", Namespace: "default", Name: "web-n", UID: "u1", FieldPath: "spec.containers{main}"}
	for range 3 {
		s.Eventf(ref, v1.EventTypeWarning, "BackOff", "Back-off %s", "main")
	}
	s.Eventf(&v1.ObjectReference{Kind: "Node", Name: "n"}, v1.EventTypeNormal, "NodeShutdown", "bye")
	const want = `level=WARN msg=event reason=BackOff message="Back-off main" pod=default/web-n uid=u1 container=main` + "\n"
	if _, got, _ := strings.Cut(out.String(), " "); got != want {
		t.Errorf("got  %swant %s", got, want)
	}
}

// TestADiskThatHangsHoldsUpNoEvent: events are recorded on the way of every pod.
func TestADiskThatHangsHoldsUpNoEvent(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "e"), 0, &clock{t: time.Unix(1000, 0)})
	s.Eventf(ref, v1.EventTypeNormal, "Pulled", "x")
	s.file.mu.Lock() // a write is under way and does not come back
	flushed := make(chan error, 1)
	go func() { flushed <- s.Flush() }()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 1000 {
			s.Eventf(ref, v1.EventTypeNormal, "Pulled", "%d", i)
		}
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Error("events wait for the disk")
	}
	s.file.mu.Unlock()
	if err := <-flushed; err != nil {
		t.Error(err)
	}
}

// TestNobodyTakesEvents: what waits for an apiserver that is away is no more
// than the store keeps.
func TestNobodyTakesEvents(t *testing.T) {
	s := open(t, "", 50, &clock{t: time.Unix(1000, 0)})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	ch := s.Watch(ctx)
	for i := range 5000 {
		r := *ref
		r.Name = fmt.Sprint("p", i)
		s.Eventf(&r, v1.EventTypeNormal, "Started", "x")
	}
	n, last := 0, ""
	for last != "p4999" {
		e, ok := <-ch
		if !ok {
			t.Fatalf("ended after %d, %s", n, last)
		}
		n, last = n+1, e.Object.(*v1.Event).InvolvedObject.Name
	}
	if n > 52 {
		t.Errorf("%d events waited", n)
	}
}
