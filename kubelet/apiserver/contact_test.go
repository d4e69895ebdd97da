package apiserver

import (
	"context"
	"crypto/tls"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// TestContactIsWhatTheLastRequestsCameTo: an apiserver that refuses, is away or
// is not trusted are three things, and users are told which.
func TestContactIsWhatTheLastRequestsCameTo(t *testing.T) {
	code := http.StatusOK
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // of the client that does not trust it
	srv.StartTLS()
	defer srv.Close()
	trusting := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}
	c := &Contact{}
	if s := c.State(); s.Kind != Connecting {
		t.Errorf("at first: %+v", s)
	}
	ask := func(ctx context.Context, rt http.RoundTripper) ContactState {
		t.Helper()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp, err := c.Wrap(rt).RoundTrip(req); err == nil {
			resp.Body.Close()
		}
		return c.State()
	}
	want := func(s ContactState, kind ContactKind, message string) {
		t.Helper()
		if s.Kind != kind || !strings.Contains(s.Message, message) {
			t.Errorf("got %+v, want %s: %s", s, kind, message)
		}
	}
	want(ask(t.Context(), trusting), Connected, "")
	since := c.State().Since
	want(ask(t.Context(), trusting), Connected, "")
	if s := c.State(); !s.Since.Equal(since) {
		t.Errorf("since %v, then %v", since, s.Since)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	want(ask(gone, trusting), Connected, "") // called off by us
	code = http.StatusForbidden
	want(ask(t.Context(), trusting), Connected, "") // one, of something
	c.heard = c.heard.Add(-forbiddenFor)
	want(ask(t.Context(), trusting), Refused, "403")
	code = http.StatusUnauthorized
	want(ask(t.Context(), trusting), Refused, "401 Unauthorized")
	code = http.StatusServiceUnavailable
	want(ask(t.Context(), trusting), Away, "503")
	want(ask(t.Context(), &http.Transport{}), Untrusted, "certificate")
	srv.Close()
	want(ask(t.Context(), trusting), Away, "connection refused")
	late, stop := context.WithTimeout(t.Context(), time.Nanosecond)
	defer stop()
	<-late.Done()
	want(ask(late, trusting), Away, "in time")
}
