package apiserver

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// TestSentEventsAreForgotten: a node that runs for months keeps no list of all
// events that it has ever told.
func TestSentEventsAreForgotten(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, `{"kind":"Event","apiVersion":"v1"}`)
	}))
	defer srv.Close()
	c, err := NewClient(&rest.Config{Host: srv.URL, QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	e := NewEvents(c, nil, 0, 0, slog.New(slog.DiscardHandler))
	for i := range maxSent { // as after months
		e.sent[name(&v1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: fmt.Sprint(i)}})] = true
	}
	one := &v1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "new"}}
	e.send(t.Context(), one)
	if len(e.sent) != 1 || !e.sent[name(one)] {
		t.Errorf("%d events are remembered", len(e.sent))
	}
}

// TestEventsOutliveAnApiserverThatIsNotReady: its 503, or a 401 while the node's
// certificate changes, is no answer to an event. A refusal is, and answers that
// contradict each other come to an end.
func TestEventsOutliveAnApiserverThatIsNotReady(t *testing.T) {
	for _, test := range []struct {
		name    string
		answers []int // the last one for all that follow
		sent    bool
		asked   int // at least, and the most
		most    int
	}{
		{"503 first", []int{503, 201}, true, 2, 2},
		{"401 first", []int{401, 201}, true, 2, 2},
		{"forbidden", []int{403}, false, 1, 1},
		{"unknown namespace", []int{404}, false, 1, 1},
		{"there already", []int{409, 200}, true, 2, 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var asked atomic.Int32
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				n := int(asked.Add(1))
				code := test.answers[min(n, len(test.answers))-1]
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(code)
				reason := map[int]string{409: "AlreadyExists", 404: "NotFound", 403: "Forbidden", 401: "Unauthorized", 503: "ServiceUnavailable"}[code]
				if reason == "" {
					_, _ = io.WriteString(w, `{"kind":"Event","apiVersion":"v1"}`)
					return
				}
				_, _ = fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","code":%d,"reason":%q}`, code, reason)
			}))
			defer srv.Close()
			c, err := NewClient(&rest.Config{Host: srv.URL, QPS: -1})
			if err != nil {
				t.Fatal(err)
			}
			e := NewEvents(c, nil, 0, 0, slog.New(slog.DiscardHandler))
			one := &v1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "one"}}
			e.send(t.Context(), one)
			if e.sent[name(one)] != test.sent {
				t.Errorf("sent: %v", !test.sent)
			}
			if n := int(asked.Load()); n < test.asked || n > test.most {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

// TestEventsWhoseAnswersContradictComeToAnEnd: neither made nor patched for ever.
func TestEventsWhoseAnswersContradictComeToAnEnd(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		code, reason := 409, "AlreadyExists"
		if r.Method == http.MethodPatch {
			code, reason = 404, "NotFound"
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_, _ = fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","code":%d,"reason":%q}`, code, reason)
	}))
	defer srv.Close()
	c, err := NewClient(&rest.Config{Host: srv.URL, QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		NewEvents(c, nil, 0, 0, slog.New(slog.DiscardHandler)).send(t.Context(), &v1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "one"}})
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Error("it goes on for ever")
	}
}

// TestEventsOfThisRun are those since it began, also by a clock that was set back.
func TestEventsOfThisRun(t *testing.T) {
	began := time.Date(2026, 1, 1, 12, 0, 0, 700, time.UTC)
	for name, test := range map[string]struct{ now, want time.Time }{
		"as ever":     {began.Add(time.Hour), began},
		"set back":    {began.Add(-2 * time.Hour), began.Add(-3 * time.Hour)},
		"set forward": {began.Add(5 * time.Hour), began},
	} {
		if got := earliest(began, test.now, time.Hour); !got.Equal(test.want.Truncate(time.Second)) {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}
