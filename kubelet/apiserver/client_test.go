package apiserver

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	authenticationv1 "k8s.io/api/authentication/v1"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

// late is an apiserver whose authorizer does not know the node's pods during
// the first requests of each kind.
type late struct {
	behind int

	mu    sync.Mutex
	asked map[string]int
}

func (l *late) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	watch := r.URL.Query().Get("watch") != ""
	what := r.Method + " " + r.URL.Path
	if watch {
		what += " watch"
	}
	l.mu.Lock()
	l.asked[what]++
	n := l.asked[what]
	l.mu.Unlock()
	answer := func(code int, obj any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(obj)
	}
	status := func(code int, reason metav1.StatusReason, text string) {
		answer(code, &metav1.Status{
			TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
			Status:   metav1.StatusFailure, Code: int32(code), Reason: reason, Message: text,
		})
	}
	switch {
	case n <= l.behind:
		status(http.StatusForbidden, metav1.StatusReasonForbidden, "no relationship found between node 'n' and this object")
	case watch && r.URL.Query().Get("sendInitialEvents") != "":
		status(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "sendInitialEvents is not supported")
	case watch:
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	case strings.HasSuffix(r.URL.Path, "/token"):
		answer(http.StatusCreated, &authenticationv1.TokenRequest{
			TypeMeta: metav1.TypeMeta{Kind: "TokenRequest", APIVersion: "authentication.k8s.io/v1"},
			Status:   authenticationv1.TokenRequestStatus{Token: "text", ExpirationTimestamp: metav1.NewTime(time.Now().Add(time.Hour))},
		})
	default:
		answer(http.StatusOK, &v1.ConfigMapList{
			TypeMeta: metav1.TypeMeta{Kind: "ConfigMapList", APIVersion: "v1"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"},
			Items: []v1.ConfigMap{{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "settings", ResourceVersion: "1"}, Data: map[string]string{"a": "b"}}},
		})
	}
}

func lateServer(t *testing.T, behind int) (*late, *Client) {
	l := &late{behind: behind, asked: map[string]int{}}
	srv := httptest.NewServer(l)
	t.Cleanup(srv.Close)
	c, err := NewClient(&rest.Config{Host: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	return l, c
}

// An authorizer that is behind is waited for, where the objects of pods are
// asked for; one that goes on to refuse is believed.
func TestAuthorizerIsBehind(t *testing.T) {
	pod := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "u"},
		Spec: v1.PodSpec{
			ServiceAccountName: "default",
			Volumes:            []v1.Volume{{Name: "v", VolumeSource: v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{LocalObjectReference: v1.LocalObjectReference{Name: "settings"}}}}},
		},
	}
	_, c := lateServer(t, 4)
	if text, _, err := c.Token(t.Context(), pod, "", time.Hour); err != nil || text != "text" {
		t.Errorf("token: %q, %v", text, err)
	}

	began := time.Now()
	o := NewObjects(c, func(string, string) {}, slog.New(slog.DiscardHandler))
	go o.Run(t.Context())
	o.Use(types.UID("u"), pod)
	m, err := o.ConfigMap("ns", "settings")
	for errors.Is(err, errdefs.ErrUnavailable) && time.Since(began) < time.Minute {
		m, err = o.ConfigMap("ns", "settings")
	}
	if err != nil || m.Data["a"] != "b" {
		t.Errorf("config map: %v, %v after %v", m, err, time.Since(began))
	}

	l, c := lateServer(t, 1<<30)
	if _, _, err := c.Token(t.Context(), pod, "", time.Hour); !errors.Is(err, errdefs.ErrPermissionDenied) || !strings.Contains(err.Error(), "no relationship found") {
		t.Errorf("token that is refused for good: %v", err)
	}
	if n := l.asked["POST /api/v1/namespaces/ns/serviceaccounts/default/token"]; n < 2 || n > 10 {
		t.Errorf("it was asked for %d times", n)
	}
}
