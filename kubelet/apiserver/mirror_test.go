package apiserver

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/podd-runtime/podd/kubelet/manifests"
)

// TestMirrorPodsWaitForPriorityClassesQuietly: an apiserver that has just begun
// makes its priority classes in its first seconds.
func TestMirrorPodsWaitForPriorityClassesQuietly(t *testing.T) {
	var tries atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.Method != http.MethodPost {
			st := apierrors.NewNotFound(v1.Resource("pods"), "web-node1").Status()
			st.Kind, st.APIVersion = "Status", "v1"
			w.WriteHeader(int(st.Code))
			json.NewEncoder(w).Encode(st)
			return
		}
		body, _ := io.ReadAll(r.Body)
		obj, _, err := codecs.UniversalDeserializer().Decode(body, nil, nil)
		if err != nil {
			t.Error(err)
			return
		}
		pod := obj.(*v1.Pod)
		if tries.Add(1) < 3 {
			st := apierrors.NewForbidden(v1.Resource("pods"), pod.Name, errNoClass{}).Status()
			st.Kind, st.APIVersion = "Status", "v1"
			w.WriteHeader(int(st.Code))
			json.NewEncoder(w).Encode(st)
			return
		}
		pod.APIVersion, pod.Kind, pod.UID, pod.ResourceVersion = "v1", "Pod", "mirror", "1"
		w.WriteHeader(http.StatusCreated)
		json.NewEncoder(w).Encode(pod)
	}))
	defer srv.Close()
	client, err := NewClient(&rest.Config{Host: srv.URL, QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	p := New(Config{Client: client, NodeName: "node1", Log: slog.New(slog.NewTextHandler(&log, nil))})
	static := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "web-node1", UID: "u", Annotations: map[string]string{manifests.ConfigHashAnnotation: "h"}}}
	p.synced, p.nodeUID = true, "node"
	p.static[name(static)] = static.UID
	p.reports[static.UID] = &report{shown: static, news: make(chan struct{}, 1)}
	p.kick(t.Context(), static.UID)
	deadline := time.Now().Add(20 * time.Second)
	for made := false; !made; {
		p.mu.Lock()
		made = p.mirrors[name(static)] != nil
		p.mu.Unlock()
		if time.Now().After(deadline) {
			t.Fatalf("no mirror pod after %d tries: %s", tries.Load(), log.String())
		}
		time.Sleep(time.Millisecond)
	}
	p.work.Wait()
	if strings.Contains(log.String(), "WARN") {
		t.Errorf("it warns:\n%s", log.String())
	}
}

type errNoClass struct{}

func (errNoClass) Error() string { return "no PriorityClass with name system-node-critical was found" }
