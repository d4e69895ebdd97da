package apiserver

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

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
