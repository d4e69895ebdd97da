package cluster

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/podd-runtime/podd/integration/cluster/control"
	"github.com/podd-runtime/podd/integration/node"
)

// kubelet is a client of a node's API that goes past the apiserver.
type kubelet struct {
	base string
	http *http.Client
}

// kubeletClient shows a certificate from files; "": none.
func kubeletClient(t testing.TB, port int, cert, key string) *kubelet {
	t.Helper()
	// What the node shows is looked at by the tests of certificates.
	secure := &tls.Config{InsecureSkipVerify: true}
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		secure.Certificates = []tls.Certificate{pair}
	}
	return &kubelet{fmt.Sprintf("https://127.0.0.1:%d", port), &http.Client{
		Timeout:       node.Scale(30 * time.Second),
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport:     &http.Transport{DisableKeepAlives: true, TLSClientConfig: secure},
	}}
}

func (k *kubelet) do(method, path, token string) (int, string, error) {
	req, err := http.NewRequest(method, k.base+path, nil)
	if err != nil {
		return 0, "", err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := k.http.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	return resp.StatusCode, string(b), err
}

// apiPaths is every endpoint of the kubelet's API for a pod, and paths that
// would lead out of it.
func apiPaths(namespace, pod string) []string {
	in := namespace + "/" + pod
	return []string{
		"GET /", "GET /pods", "GET /pods/", "GET /runningpods/", "GET /healthz", "GET /healthz/ping", "GET /healthz/log", "GET /healthz/syncloop", "GET /configz",
		"GET /containerLogs/" + in + "/main", "GET /containerLogs/" + in + "/main?follow=true",
		"GET /exec/" + in + "/main?command=id&output=1", "POST /exec/" + in + "/main?command=id&output=1", "POST /exec/" + in + "/uid/main?command=id&output=1",
		"GET /attach/" + in + "/main", "POST /attach/" + in + "/main?output=1", "POST /attach/" + in + "/uid/main?output=1",
		"GET /portForward/" + in, "POST /portForward/" + in, "POST /portForward/" + in + "/uid",
		"POST /run/" + in + "/main?cmd=id", "POST /run/" + in + "/uid/main?cmd=id", "POST /checkpoint/" + in + "/main",
		"GET /stats/summary", "POST /stats/summary", "GET /metrics", "GET /metrics/cadvisor", "GET /metrics/resource", "GET /metrics/probes", "GET /metrics/slis",
		"GET /logs", "GET /logs/", "GET /logs/syslog", "GET /logs/../../etc/passwd", "GET /logs/..%2f..%2fetc%2fpasswd", "GET /logs/?query=podd",
		"GET /debug/pprof/", "GET /debug/pprof/heap", "GET /debug/pprof/profile?seconds=1", "PUT /debug/flags/v",
		"GET /statusz", "GET /flagz", "GET /nosuch", "DELETE /pods", "PATCH /pods", "OPTIONS /pods", "PUT /exec/" + in + "/main",
	}
}

// direct is a new node of the cluster whose API is asked past the apiserver, at
// the port.
func direct(t *testing.T, name string) (s *space, port int) {
	t.Helper()
	p := plane(t)
	port = control.FreePort(t)
	kubeconfig, err := p.Node(name)
	if err != nil {
		t.Fatal(err)
	}
	n := p.NewNodeWith(t, name, "--kubeconfig", kubeconfig, "--client-ca-file", p.CA(), "--port", strconv.Itoa(port))
	mirror(t, n)
	n.Start()
	return enter(t, name), port
}

// TestStrangersAtTheNode walks the node's API as everybody who may not use it,
// with a cluster that is asked about tokens and rights.
func TestStrangersAtTheNode(t *testing.T) {
	p := plane(t)
	s, port := direct(t, "guarded")
	s.create(serverOf("web"))
	s.awaitReady("web")
	foreign, err := control.NewAuthority(filepath.Join(t.TempDir(), "pki"))
	if err != nil {
		t.Fatal(err)
	}
	if err := foreign.Issue("admin", "kubernetes-admin", []string{"system:masters"}, time.Hour); err != nil {
		t.Fatal(err)
	}
	if _, err := p.User("nobody", "somebody", []string{"somewhere"}, time.Hour); err != nil {
		t.Fatal(err)
	}
	nobodyCert, nobodyKey := p.Certificate("nobody")
	token := s.token("default")
	stranger := kubeletClient(t, port, "", "")
	for _, who := range []struct {
		name   string
		client *kubelet
		token  string
		want   int
	}{
		{"nobody", stranger, "", http.StatusUnauthorized},
		{"a foreign certificate", kubeletClient(t, port, filepath.Join(foreign.Dir, "admin.crt"), filepath.Join(foreign.Dir, "admin.key")), "", http.StatusUnauthorized},
		{"a made-up token", stranger, "eyJhbGciOiJub25lIn0.e30.", http.StatusUnauthorized},
		{"a token without rights", stranger, token, http.StatusForbidden},
		{"a certificate without rights", kubeletClient(t, port, nobodyCert, nobodyKey), "", http.StatusForbidden},
	} {
		for _, e := range apiPaths(s.name, "web") {
			method, path, _ := strings.Cut(e, " ")
			code, body, err := who.client.do(method, path, who.token)
			if err != nil || code != who.want || strings.Contains(body, "root:") {
				t.Errorf("%s by %s: %d %.100q, %v", e, who.name, code, body, err)
			}
		}
	}

	// Who may see metrics sees those, and nothing else.
	s.grant("default", []string{"get", "list"}, "nodes/metrics", "nodes/stats")
	s.await("metrics with a token", time.Minute, func(context.Context) error {
		code, body, err := stranger.do("GET", "/metrics/resource", token)
		if err != nil || code != http.StatusOK || !strings.Contains(body, "node_cpu_usage_seconds_total") {
			return fmt.Errorf("%d %.100q, %v", code, body, err)
		}
		return nil
	})
	for _, path := range []string{"/pods", "/containerLogs/" + s.name + "/web/main", "/logs/", "/debug/pprof/"} {
		if code, body, err := stranger.do("GET", path, token); err != nil || code != http.StatusForbidden {
			t.Errorf("%s by who may see metrics: %d %.100q, %v", path, code, body, err)
		}
	}

	// Who may do everything gets no file from outside of what is served.
	cert, key := p.Certificate("admin")
	admin := kubeletClient(t, port, cert, key)
	for _, path := range []string{
		"/logs/../../etc/passwd", "/logs/..%2f..%2fetc%2fpasswd", "/logs/%2e%2e/%2e%2e/etc/passwd", "/logs//../../../../etc/passwd",
		"/containerLogs/" + s.name + "/web/..%2f..%2f..%2fetc%2fpasswd", "/containerLogs/..%2f..%2fetc/passwd/main", "/containerLogs/%2e%2e/%2e%2e/main",
	} {
		if code, body, err := admin.do("GET", path, ""); err != nil || code == http.StatusOK || strings.Contains(body, "root:") {
			t.Errorf("%s: %d %.100q, %v", path, code, body, err)
		}
	}
}

// TestSessionsEndWithTheirCredential has a pod's token begin an exec at the node
// itself: it ends with the pod that the token is bound to.
func TestSessionsEndWithTheirCredential(t *testing.T) {
	long(t)
	s, port := direct(t, "bound")
	s.create(podOf("web", "sleep", "100000"), podOf("bearer", "sleep", "100000"))
	s.awaitReady("web", "bearer")
	bearer, err := s.pod(t.Context(), "bearer")
	if err != nil {
		t.Fatal(err)
	}
	s.grant("default", []string{"get", "create"}, "nodes/proxy")
	r, err := s.Client.CoreV1().ServiceAccounts(s.name).CreateToken(t.Context(), "default", &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: bearer.Name, UID: bearer.UID}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	stranger := kubeletClient(t, port, "", "")
	s.await("the right to exec", time.Minute, func(context.Context) error {
		if code, body, err := stranger.do("GET", "/pods", r.Status.Token); err != nil || code != http.StatusOK {
			return fmt.Errorf("%d %.100q, %v", code, body, err)
		}
		return nil
	})
	config := &rest.Config{Host: stranger.base, BearerToken: r.Status.Token, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
	session, err := remotecommand.NewWebSocketExecutor(config, "GET", stranger.base+"/exec/"+s.name+"/web/main?output=1&command=sleep&command=100000")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		ended <- session.StreamWithContext(t.Context(), remotecommand.StreamOptions{Stdout: io.Discard})
	}()
	select {
	case err := <-ended:
		t.Fatalf("the session ended though its bearer runs: %v", err)
	case <-time.After(3 * time.Second): // longer than an ended session is let go on
	}
	s.kubectl("delete", "pod", "bearer", "--wait=false")
	select {
	case err := <-ended:
		if err == nil {
			t.Error("the session ended as if its command had")
		}
	case <-time.After(node.Scale(time.Minute)):
		t.Error("the session outlives the pod whose token began it")
	}
	if got := s.kubectl("get", "pod", "web", "-o", "jsonpath={.status.phase}"); got != "Running" {
		t.Errorf("web is %s", got)
	}
}

// token of a service account of the namespace.
func (s *space) token(account string) string {
	s.Helper()
	r, err := s.Client.CoreV1().ServiceAccounts(s.name).CreateToken(s.Context(), account, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		s.Fatal(err)
	}
	return r.Status.Token
}

// grant a service account of the namespace rights to resources of nodes.
func (s *space) grant(account string, verbs []string, resources ...string) {
	s.Helper()
	name := "test:" + s.name
	roles, bindings := s.Client.RbacV1().ClusterRoles(), s.Client.RbacV1().ClusterRoleBindings()
	_, err := roles.Create(s.Context(), &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Rules:      []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: resources, Verbs: verbs}},
	}, metav1.CreateOptions{})
	if err == nil {
		_, err = bindings.Create(s.Context(), &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: s.name, Name: account}},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
		}, metav1.CreateOptions{})
	}
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_ = roles.Delete(ctx, name, metav1.DeleteOptions{})
		_ = bindings.Delete(ctx, name, metav1.DeleteOptions{})
	})
}
