package kubeletapi

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/klog/v2"
	kubeletv1beta1 "k8s.io/kubelet/config/v1beta1"
	statsv1alpha1 "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podd-runtime/podd/kubelet/server/auth"
	"github.com/podd-runtime/podd/kubelet/server/servertest"
)

// secret is what nobody shall read who may not.
const secret = "s3cret-of-the-node"

// reviews know admin, who may do all, and guest, who may do nothing.
type reviews struct{}

func (reviews) TokenReview(_ context.Context, r *authenticationv1.TokenReview) (*authenticationv1.TokenReview, error) {
	if r.Spec.Token == "admin" || r.Spec.Token == "guest" {
		r.Status = authenticationv1.TokenReviewStatus{Authenticated: true, User: authenticationv1.UserInfo{Username: r.Spec.Token}}
	}
	return r, nil
}

func (reviews) SubjectAccessReview(_ context.Context, r *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReview, error) {
	r.Status.Allowed = r.Spec.User == "admin"
	return r, nil
}

// node is servertest's with what this API needs besides.
type node struct{ *servertest.Containers }

func (node) ExecSync(_ context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	return &runtimeapi.ExecSyncResponse{Stdout: []byte(secret), ExitCode: int32(len(r.Cmd) % 3)}, nil
}

func (node) ListContainers(context.Context, *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{}, nil
}

func (node) CheckpointContainer(context.Context, *runtimeapi.CheckpointContainerRequest) (*runtimeapi.CheckpointContainerResponse, error) {
	return nil, errors.ErrUnsupported
}

type summary struct{}

func (summary) Summary(context.Context, bool) (*statsv1alpha1.Summary, error) {
	return &statsv1alpha1.Summary{Node: statsv1alpha1.NodeStats{NodeName: secret}}, nil
}

// newAPI has one pod with a log, a log directory with a secret beside it, and
// what an administrator may switch on.
func newAPI(tb testing.TB) *Server {
	tb.Helper()
	dir := tb.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "logs", "sub"), 0o700); err != nil {
		tb.Fatal(err)
	}
	for path, text := range map[string]string{
		"outside": secret + " outside", "logs/syslog": "a line\n", "logs/sub/x.log": "another\n",
		"0.log": "2024-01-02T03:04:05.000000006Z stdout F hello\n2024-01-02T03:04:06Z stderr P par\n2024-01-02T03:04:07Z stderr F tial\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, path), []byte(text), 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	for name, target := range map[string]string{"link0": "../outside", "link1": filepath.Join(dir, "outside")} {
		if err := os.Symlink(target, filepath.Join(dir, "logs", name)); err != nil {
			tb.Fatal(err)
		}
	}
	pods, containers := &servertest.Pods{}, &servertest.Containers{}
	p := servertest.Pod("default", "web", "main")
	p.Annotations = map[string]string{"x": secret}
	pods.Set(p)
	containers.Set("uid-web-main", filepath.Join(dir, "0.log"), runtimeapi.ContainerState_CONTAINER_EXITED)
	containers.Run = func(_ context.Context, _ string, _ []string, _ io.Reader, out, _ io.Writer, _ bool, _ <-chan remotecommand.TerminalSize) error {
		_, err := io.WriteString(out, secret)
		return err
	}
	containers.Ports = func(_ context.Context, _ string, _ int32, stream io.ReadWriteCloser) error { return stream.Close() }
	on := true
	text := func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, secret) }
	return New(Config{
		Kubelet: &kubeletv1beta1.KubeletConfiguration{EnableDebuggingHandlers: &on, EnableSystemLogHandler: &on, EnableProfilingHandler: &on, EnableDebugFlagsHandler: &on},
		Flags:   map[string]string{"x": secret}, Version: "1", Pods: pods, Runtime: node{containers}, Stats: summary{},
		Metrics:      map[string]http.Handler{"": http.HandlerFunc(text), "cadvisor": http.HandlerFunc(text)},
		Checks:       []Check{{Name: "syncloop", Check: func(context.Context) error { return nil }}},
		SystemLogs:   filepath.Join(dir, "logs"),
		SetVerbosity: func(level string) error { return nil },
	})
}

// FuzzRequest: whatever is asked for, and however, nobody gets an answer who
// may not have one, and the answer of one is that of all: it does not tell what
// is there. Whoever may ask gets an answer with a status, from inside what the
// API shows.
func FuzzRequest(f *testing.F) {
	for _, target := range []string{
		"/", "/pods", "/pods/", "/runningpods/", "/healthz", "/healthz/ping?verbose", "/configz", "/flagz", "/statusz", "/metrics", "/metrics/cadvisor",
		"/stats/summary?only_cpu_and_memory=true", "/logs/", "/logs/syslog", "/logs/../outside", "/logs/link1", "/logs/link0", "/logs/%2e%2e/outside", "/logs/sub/", "/logs/?query=x",
		"/containerLogs/default/web/main?tailLines=1&timestamps=true", "/containerLogs/default/web/main?sinceTime=2024-01-02T03:04:05Z&limitBytes=7&stream=Stderr",
		"/containerLogs/default/web/main?sinceSeconds=99999999999999&tail=all&previous=1", "/containerLogs/default/web/nobody", "//containerLogs/default/web/main",
		"/exec/default/web/main?command=sh&output=1", "/exec/default/web/uid-web/main?command=sh&input=1&tty=1&output=1", "/attach/default/web/main?output=1",
		"/portForward/default/web?port=80,81", "/portForward/default/web/uid-web?port=70000", "/run/default/web/main?cmd=ls%20-l", "/checkpoint/default/web/main",
		"/debug/pprof/", "/debug/pprof/cmdline", "/debug/pprof/profile?seconds=1", "/debug/pprof/trace?seconds=-1", "/debug/pprof/symbol?0x1", "/debug/flags/v", "*", "http://other/pods",
		"/healthz/../pods", "/%70ods", "/pods?x=%zz", "/metrics/%2e%2e/pods",
	} {
		f.Add("GET", target, "")
		f.Add("POST", target, "Upgrade: SPDY/3.1\r\nConnection: Upgrade\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n")
	}
	f.Add("HEAD", "/pods", "X-Remote-User: admin\r\nX-Forwarded-For: 127.0.0.1\r\n")
	f.Add("OPTIONS", "/exec/default/web/main", "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: base64url.bearer.authorization.k8s.io.YWRtaW4\r\n")
	f.Add("PUT", "/debug/flags/v", "Content-Length: 1\r\n\r\n5")

	klog.LogToStderr(false) // the streaming library says there what it was asked
	klog.SetOutput(io.Discard)
	api := newAPI(f)
	gate, err := auth.New(auth.Config{NodeName: "node1", Tokens: true, Mode: auth.Webhook, Reviews: reviews{}})
	if err != nil {
		f.Fatal(err)
	}
	handlers := map[string]http.Handler{"secure": api.Secure(gate), "read-only": api.ReadOnly(), "health": api.Health()}
	f.Fuzz(func(t *testing.T, method, target, headers string) {
		raw := method + " " + target + " HTTP/1.1\r\nHost: node1\r\n" + headers + "\r\n"
		ask := func(server, token string) *httptest.ResponseRecorder {
			r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(raw)))
			if err != nil {
				return nil // net/http answers that itself
			}
			r.Header.Del("Authorization") // what a token may do is not the question here
			if token != "" {
				r.Header.Set("Authorization", "Bearer "+token)
			}
			// Whoever may not ask is refused at once; profiles and logs that are
			// followed have no end.
			limit := 100 * time.Millisecond
			if token != "admin" {
				limit = time.Minute
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			w := httptest.NewRecorder()
			defer func() {
				if p := recover(); p != nil && p != http.ErrAbortHandler {
					panic(p)
				}
			}()
			handlers[server].ServeHTTP(w, r.WithContext(ctx))
			return w
		}
		for token, want := range map[string]int{"": http.StatusUnauthorized, "wrong": http.StatusUnauthorized, "guest": http.StatusForbidden} {
			w := ask("secure", token)
			if w == nil {
				return
			}
			if w.Code != want || bytes.Contains(w.Body.Bytes(), []byte(secret)) || w.Body.Len() > 512 {
				t.Fatalf("token %q: %d, want %d: %.200q", token, w.Code, want, w.Body)
			}
		}
		for _, server := range []string{"secure", "read-only", "health"} {
			w := ask(server, "admin")
			if (w.Code < 200 && w.Code != http.StatusSwitchingProtocols) || w.Code > 599 {
				t.Fatalf("%s: status %d", server, w.Code)
			}
			if bytes.Contains(w.Body.Bytes(), []byte(secret+" outside")) {
				t.Fatalf("%s shows a file outside of what it may show", server)
			}
			if server == "health" && bytes.Contains(w.Body.Bytes(), []byte(secret)) {
				t.Fatalf("the health port tells more than health: %.200q", w.Body)
			}
		}
	})
}
