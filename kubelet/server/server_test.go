package server_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/gorilla/websocket"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"github.com/podd-runtime/podd/cri/images"
	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/server"
	"github.com/podd-runtime/podd/kubelet/server/api"
	"github.com/podd-runtime/podd/kubelet/server/servertest"
)

type fixture struct {
	pods       *servertest.Pods
	events     *servertest.Events
	containers *servertest.Containers
	images     *servertest.Images
	objects    *servertest.Objects
	dir        string
	client     *http.Client
	down       chan struct{}
}

// serve runs a server on a socket until the test ends.
func serve(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{
		pods: &servertest.Pods{}, events: &servertest.Events{}, containers: &servertest.Containers{},
		images: &servertest.Images{}, objects: &servertest.Objects{}, dir: t.TempDir(), down: make(chan struct{}),
	}
	socket := filepath.Join(f.dir, api.SocketName)
	l, err := api.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	s := server.New(server.Config{
		NodeName: "node1", Version: "v0-test", Pods: f.pods, Events: f.events, Objects: f.objects,
		Containers: f.containers, Images: f.images, Shutdown: func() { close(f.down) },
		Problems: func() []manifests.Problem {
			return []manifests.Problem{{File: "a.yaml", Document: 2, Line: 7, Field: "spec", Message: "is wrong", Kept: true},
				{File: "b.yaml", Line: 9, Field: "spec.x", Message: "is odd", Object: "Pod default/web", Warning: true}}
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	f.client = &http.Client{Transport: &http.Transport{DialContext: f.dial, DisableKeepAlives: true}}
	return f
}

func (f *fixture) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	return api.Dial(ctx, filepath.Join(f.dir, api.SocketName))
}

func (f *fixture) do(t *testing.T, method, path, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://podd"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := f.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return resp.StatusCode, string(b)
}

func (f *fixture) get(t *testing.T, path string, into any) {
	t.Helper()
	code, body := f.do(t, "GET", path, "")
	if code != http.StatusOK {
		t.Fatalf("GET %s: %d %s", path, code, body)
	}
	if err := json.Unmarshal([]byte(body), into); err != nil {
		t.Fatalf("GET %s: %v in %s", path, err, body)
	}
}

func TestList(t *testing.T) {
	f := serve(t)
	f.pods.Set(servertest.Pod("default", "web", "nginx"))
	f.pods.Set(servertest.Pod("default", "db", "redis"))
	f.pods.Set(servertest.Pod("other", "web", "nginx"))
	p := servertest.Pod("default", "done", "job")
	p.Status.Phase = v1.PodSucceeded
	f.pods.Set(p)
	f.objects.Maps = []*v1.ConfigMap{{ObjectMeta: metav1.ObjectMeta{Namespace: "conf", Name: "c"}}}
	for _, tt := range []struct{ path, want string }{
		{"/api/v1/pods", "default/db default/done default/web other/web"},
		{"/api/v1/namespaces/default/pods", "default/db default/done default/web"},
		{"/api/v1/namespaces/nowhere/pods", ""},
		{"/api/v1/pods?labelSelector=app%3Dweb", "default/web other/web"},
		{"/api/v1/pods?labelSelector=app+in+(db,x)", "default/db"},
		{"/api/v1/pods?fieldSelector=metadata.name%3Dweb,metadata.namespace%3Dother", "other/web"},
		{"/api/v1/pods?fieldSelector=status.phase!%3DRunning", "default/done"},
		{"/api/v1/pods?fieldSelector=spec.nodeName%3Dnode1&limit=1", "default/db default/done default/web other/web"},
		{"/api/v1/namespaces", "/conf /default /other"},
		{"/api/v1/nodes", "/node1"},
		{"/api/v1/configmaps", "conf/c"},
		{"/api/v1/secrets", ""},
	} {
		t.Run(tt.path, func(t *testing.T) {
			var list struct {
				Kind     string
				Metadata metav1.ListMeta
				Items    []struct{ Metadata metav1.ObjectMeta }
			}
			f.get(t, tt.path, &list)
			var got []string
			for _, i := range list.Items {
				got = append(got, i.Metadata.Namespace+"/"+i.Metadata.Name)
			}
			if s := strings.Join(got, " "); s != tt.want {
				t.Errorf("got %q, want %q", s, tt.want)
			}
			if !strings.HasSuffix(list.Kind, "List") || list.Metadata.ResourceVersion == "" {
				t.Errorf("kind %q, resourceVersion %q", list.Kind, list.Metadata.ResourceVersion)
			}
		})
	}
}

func TestGetAndErrors(t *testing.T) {
	f := serve(t)
	f.pods.Set(servertest.Pod("default", "web-node1", "nginx", "side"))
	var p v1.Pod
	f.get(t, "/api/v1/namespaces/default/pods/web-node1", &p)
	if p.Kind != "Pod" || p.APIVersion != "v1" || p.Name != "web-node1" {
		t.Errorf("got %s/%s %s", p.APIVersion, p.Kind, p.Name)
	}
	for _, tt := range []struct {
		method, path, body string
		code               int
		want               string
	}{
		{"GET", "/api/v1/namespaces/default/pods/web", "", 404, `pods \"web\" not found (did you mean \"web-node1\"?)`},
		{"GET", "/api/v1/namespaces/default/pods/zzz", "", 404, `pods \"zzz\" not found`},
		{"GET", "/api/v1/namespaces/default/pods/web/log", "", 404, `did you mean`},
		{"GET", "/apis/apps/v1/deployments", "", 404, `the local API has no /apis/apps/v1/deployments`},
		{"GET", "/api/v1/pods?labelSelector=a+b", "", 400, "labelSelector: "},
		{"GET", "/api/v1/pods?fieldSelector=spec.colour%3Dred", "", 400, "field label not supported: spec.colour"},
		{"GET", "/api/v1/nodes?watch=true", "", 405, "watch"},
		{"GET", "/api/v1/pods?watch=true&timeoutSeconds=x", "", 400, "timeoutSeconds"},
		{"GET", "/api/v1/pods?watch=true&resourceVersion=9999", "", 410, "not known here"},
		{"GET", "/api/v1/namespaces/default/pods/web-node1/log", "", 400, "a container name must be specified for pod web-node1, choose one of: [nginx side]"},
		{"GET", "/api/v1/namespaces/default/pods/web-node1/log?container=x", "", 400, "container x is not valid"},
		{"GET", "/api/v1/namespaces/default/pods/web-node1/log?container=side&tailLines=-1", "", 400, "tailLines"},
		{"GET", "/api/v1/namespaces/default/pods/web-node1/log?container=side&previous=true", "", 400, `previous terminated container \"side\" in pod \"web-node1\" not found`},
		{"GET", "/api/v1/namespaces/default/pods/web-node1/log?container=side", "", 404, "container uid-web-node1-side"},
		{"POST", "/api/v1/namespaces/default/pods/web-node1/exec?container=side", "", 400, "at least one command"},
		{"POST", "/api/v1/namespaces/default/pods/web-node1/exec?container=side&command=ls", "", 400, "at least 1 of stdin, stdout, stderr"},
		{"POST", "/api/v1/namespaces/default/pods/web-node1/exec?container=side&command=ls&stdout=true", "", 400, "pgrade"},
		{"POST", "/api/v1/namespaces/default/pods/web-node1/portforward?ports=70000", "", 400, "is not a port"},
		{"POST", "/api/v1/namespaces/default/pods", "{}", 405, ""},
		{"DELETE", "/podd/v1/images", "", 400, "ref is required"},
		{"DELETE", "/podd/v1/images?ref=none", "", 404, "image none"},
		{"POST", "/podd/v1/images", "{", 400, "pull"},
		{"POST", "/podd/v1/images", `{"ref":""}`, 400, "ref is required"},
		{"POST", "/podd/v1/images", `{"ref":"` + strings.Repeat("x", 2<<20) + `"}`, 400, "too large"},
		{"PUT", "/podd/v1/images", "bad tar", 400, "no image in the archive"},
	} {
		code, body := f.do(t, tt.method, tt.path, tt.body)
		if code != tt.code || !strings.Contains(body, tt.want) {
			t.Errorf("%s %.100s: got %d %s, want %d %s", tt.method, tt.path, code, body, tt.code, tt.want)
		}
	}
}

type watchEvent struct {
	Type   string
	Object struct{ Metadata metav1.ObjectMeta }
}

// watching reads a watch as "TYPE name" strings.
func (f *fixture) watching(t *testing.T, query string) (next func() string, stop func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	req, err := http.NewRequestWithContext(ctx, "GET", "http://podd/api/v1/pods?watch=true"+query, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := f.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(resp.Body)
	return func() string {
		var ev watchEvent
		if err := dec.Decode(&ev); err != nil {
			return err.Error()
		}
		name := ev.Object.Metadata.Name
		if ev.Object.Metadata.Annotations[metav1.InitialEventsAnnotationKey] == "true" {
			name = "initial"
		}
		return ev.Type + " " + name
	}, func() { cancel(); resp.Body.Close() }
}

func expect(t *testing.T, next func() string, want ...string) {
	t.Helper()
	for _, w := range want {
		if got := next(); got != w {
			t.Fatalf("got %q, want %q", got, w)
		}
	}
}

func TestWatch(t *testing.T) {
	f := serve(t)
	web := servertest.Pod("default", "web", "nginx")
	f.pods.Set(web)
	all, stop := f.watching(t, "")
	defer stop()
	expect(t, all, "ADDED web")
	initial, stop2 := f.watching(t, "&sendInitialEvents=true&resourceVersionMatch=NotOlderThan")
	defer stop2()
	expect(t, initial, "ADDED web", "BOOKMARK initial")
	ready, stop3 := f.watching(t, "&labelSelector=ready")
	defer stop3()

	f.pods.Set(servertest.Pod("default", "db", "redis"))
	expect(t, all, "ADDED db")
	web.Labels["ready"] = ""
	f.pods.Set(web)
	expect(t, all, "MODIFIED web")
	expect(t, initial, "ADDED db", "MODIFIED web")
	f.pods.Set(web)
	delete(web.Labels, "ready")
	f.pods.Set(web)
	expect(t, ready, "ADDED web", "MODIFIED web", "DELETED web")
	f.pods.Delete("default", "web")
	f.pods.Delete("default", "db")
	expect(t, all, "MODIFIED web", "MODIFIED web", "DELETED web", "DELETED db")
}

func TestWatchAfterListMissesNothing(t *testing.T) {
	f := serve(t)
	f.pods.Set(servertest.Pod("default", "a", "c"))
	f.pods.Set(servertest.Pod("default", "b", "c"))
	var list struct{ Metadata metav1.ListMeta }
	f.get(t, "/api/v1/pods", &list)
	f.pods.Delete("default", "a")
	f.pods.Set(servertest.Pod("default", "b", "c"))
	f.pods.Set(servertest.Pod("default", "new", "c"))
	next, stop := f.watching(t, "&resourceVersion="+list.Metadata.ResourceVersion)
	defer stop()
	expect(t, next, "DELETED a", "MODIFIED b", "ADDED new")
}

func TestWatchEndsWithItsClient(t *testing.T) {
	f := serve(t)
	next, stop := f.watching(t, "")
	f.pods.Set(servertest.Pod("default", "a", "c"))
	expect(t, next, "ADDED a")
	if n := f.pods.Watchers(); n != 1 {
		t.Fatalf("%d watchers", n)
	}
	stop()
	wait(t, func() bool { return f.pods.Watchers() == 0 })
	next, stop = f.watching(t, "&timeoutSeconds=1")
	defer stop()
	expect(t, next, "ADDED a", "EOF")
}

// wait looks until cond holds.
func wait(t *testing.T, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	deadline := time.After(10 * time.Second)
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("condition does not come true")
		}
	}
}

func entries(from, to int) string {
	var b strings.Builder
	for i := from; i < to; i++ {
		fmt.Fprintf(&b, "%s stdout F line %d\n", time.Unix(int64(i), 0).UTC().Format(time.RFC3339Nano), i)
	}
	return b.String()
}

func TestLog(t *testing.T) {
	f := serve(t)
	log := filepath.Join(f.dir, "0.log")
	if err := os.WriteFile(log, []byte(entries(0, 5)), 0o600); err != nil {
		t.Fatal(err)
	}
	prev := filepath.Join(f.dir, "prev.log")
	if err := os.WriteFile(prev, []byte(entries(90, 91)), 0o600); err != nil {
		t.Fatal(err)
	}
	p := servertest.Pod("default", "web", "nginx")
	p.Status.ContainerStatuses[0].LastTerminationState.Terminated = &v1.ContainerStateTerminated{ContainerID: "podd://before"}
	f.pods.Set(p)
	f.containers.Set("uid-web-nginx", log, runtimeapi.ContainerState_CONTAINER_RUNNING)
	f.containers.Set("before", prev, runtimeapi.ContainerState_CONTAINER_EXITED)
	const path = "/api/v1/namespaces/default/pods/web/log"
	for _, tt := range []struct{ query, want string }{
		{"?tailLines=2", "line 3\nline 4\n"},
		{"?previous=true", "line 90\n"},
		{"?tailLines=1&timestamps=true", "1970-01-01T00:00:04Z line 4\n"},
		{"?sinceTime=1970-01-01T00:00:03Z", "line 3\nline 4\n"},
		{"?sinceSeconds=10", ""},
		{"?limitBytes=4", "line"},
		{"?previous=true&follow=true", "line 90\n"},
	} {
		if code, body := f.do(t, "GET", path+tt.query, ""); code != 200 || body != tt.want {
			t.Errorf("%s: got %d %q, want %q", tt.query, code, body, tt.want)
		}
	}

	resp, err := f.client.Get("http://podd" + path + "?follow=true&tailLines=1")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewReader(resp.Body)
	line := func() string {
		s, err := lines.ReadString('\n')
		if err != nil {
			return err.Error()
		}
		return strings.TrimSpace(s)
	}
	expect(t, line, "line 4")
	w, err := os.OpenFile(log, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	io.WriteString(w, entries(5, 6))
	expect(t, line, "line 5")
	io.WriteString(w, entries(6, 7))
	f.containers.Set("uid-web-nginx", log, runtimeapi.ContainerState_CONTAINER_EXITED)
	expect(t, line, "line 6", "EOF")
}

func TestLogOfWaitingContainer(t *testing.T) {
	f := serve(t)
	p := servertest.Pod("default", "web", "nginx")
	p.Status.ContainerStatuses[0].State = v1.ContainerState{Waiting: &v1.ContainerStateWaiting{Reason: "ImagePullBackOff"}}
	f.pods.Set(p)
	code, body := f.do(t, "GET", "/api/v1/namespaces/default/pods/web/log", "")
	if code != 400 || !strings.Contains(body, `is waiting to start: trying and failing to pull image`) {
		t.Errorf("got %d %s", code, body)
	}
}

func TestExecOverWebSocket(t *testing.T) {
	f := serve(t)
	f.pods.Set(servertest.Pod("default", "web", "nginx"))
	gone := make(chan struct{})
	f.containers.Run = func(ctx context.Context, id string, cmd []string, in io.Reader, out, stderr io.Writer, tty bool, resize <-chan remotecommand.TerminalSize) error {
		switch cmd[0] {
		case "fail":
			fmt.Fprintf(out, "%s %v", id, cmd)
			return servertest.Exit(3)
		case "hang":
			io.WriteString(out, "hanging")
			<-ctx.Done()
			close(gone)
		}
		return nil
	}
	dial := func(cmd string) *websocket.Conn {
		d := websocket.Dialer{NetDialContext: f.dial, Subprotocols: []string{"v4.channel.k8s.io"}}
		q := url.Values{"command": {cmd, "arg"}, "stdout": {"true"}, "stderr": {"1"}}
		c, _, err := d.Dial("ws://podd/api/v1/namespaces/default/pods/web/exec?"+q.Encode(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := dial("fail")
	got := map[byte]string{}
	for {
		_, b, err := c.ReadMessage()
		if err != nil {
			break
		}
		got[b[0]] += string(b[1:])
	}
	c.Close()
	if got[1] != "uid-web-nginx [fail arg]" {
		t.Errorf("stdout: %q", got[1])
	}
	if !strings.Contains(got[3], `"reason":"NonZeroExitCode"`) || !strings.Contains(got[3], `"message":"3"`) {
		t.Errorf("status: %q", got[3])
	}

	c = dial("hang")
	for {
		_, b, err := c.ReadMessage()
		if err != nil {
			t.Fatal(err)
		}
		if string(b[1:]) == "hanging" {
			break
		}
	}
	c.Close()
	select {
	case <-gone:
	case <-time.After(10 * time.Second):
		t.Fatal("the command goes on although its client has gone")
	}
}

func TestOwn(t *testing.T) {
	f := serve(t)
	p := servertest.Pod("default", "web", "nginx")
	f.pods.Set(p)
	var v api.Versions
	f.get(t, "/podd/v1/version", &v)
	if v.Daemon.Version != "v0-test" || v.Shim != nil {
		t.Errorf("version: %+v", v)
	}
	var st api.Status
	f.get(t, "/podd/v1/status", &st)
	if st.Pods["Running"] != 1 || st.Problems != 1 || st.NodeName != "node1" {
		t.Errorf("status: %+v", st)
	}
	var probs api.Problems
	f.get(t, "/podd/v1/problems", &probs)
	if len(probs.Items) != 2 || !probs.Items[1].Warning || probs.Items[0].Line != 7 || !probs.Items[0].Kept {
		t.Errorf("problems: %+v", probs)
	}

	if code, body := f.do(t, "POST", "/podd/v1/namespaces/default/pods/web/start", ""); code != 409 || !strings.Contains(body, "its container nginx runs") {
		t.Errorf("start of a pod that runs: %d %s", code, body)
	}
	p.Status.ContainerStatuses[0].State = v1.ContainerState{Terminated: &v1.ContainerStateTerminated{}}
	f.pods.Set(p)
	for _, path := range []string{"/podd/v1/namespaces/default/pods/web/stop?gracePeriodSeconds=7", "/podd/v1/namespaces/default/pods/web/start", "/podd/v1/namespaces/default/pods/web/restart?container=nginx", "/podd/v1/stop"} {
		if code, body := f.do(t, "POST", path, ""); code != 200 {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	if code, _ := f.do(t, "POST", "/podd/v1/namespaces/default/pods/none/stop", ""); code != 404 {
		t.Errorf("stop of no pod: %d", code)
	}
	if got := fmt.Sprint(f.pods.Stopped, f.pods.Started); got != "[default/web */*] [default/web/ default/web/nginx]" {
		t.Errorf("asked for %s", got)
	}
	if code, _ := f.do(t, "DELETE", "/api/v1/namespaces/default/pods/web", `{"gracePeriodSeconds":4}`); code != 200 || f.pods.Grace == nil || *f.pods.Grace != 4 {
		t.Errorf("delete: %d, grace %v", code, f.pods.Grace)
	}
	if code, _ := f.do(t, "DELETE", "/api/v1/namespaces/default/pods/web", `{"preconditions":{"uid":"other"}}`); code != 409 {
		t.Errorf("delete of another UID: %d", code)
	}
	if code, _ := f.do(t, "POST", "/podd/v1/shutdown", ""); code != 200 {
		t.Errorf("shutdown: %d", code)
	}
	<-f.down
}

func TestImages(t *testing.T) {
	f := serve(t)
	f.images.Gate = make(chan struct{})
	resp, err := f.client.Post("http://podd/podd/v1/images", "application/json", strings.NewReader(`{"ref":"example/a:1"}`))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	dec := json.NewDecoder(resp.Body)
	var line api.Progress
	if err := dec.Decode(&line); err != nil || line.Stage != "downloading" || line.Bytes != 5 {
		t.Fatalf("progress while pulling: %+v, %v", line, err)
	}
	close(f.images.Gate)
	line = api.Progress{}
	if err := dec.Decode(&line); err != nil || line.Image == nil || line.Image.Tags[0] != "example/a:1" {
		t.Fatalf("end of the pull: %+v, %v", line, err)
	}
	_, body := f.do(t, "POST", "/podd/v1/images", `{"ref":"example/b:1","username":"u","password":"wrong"}`)
	if !strings.Contains(body, `"error":"pull example/b:1: `) {
		t.Errorf("refused pull: %s", body)
	}
	if code, body := f.do(t, "PUT", "/podd/v1/images", "example/loaded:2"); code != 200 || strings.Count(body, `"example/loaded:2"`) != 1 {
		t.Errorf("load: %d %s", code, body)
	}

	p := servertest.Pod("default", "web", "nginx")
	p.Status.ContainerStatuses[0].ImageID = line.Image.ID
	f.pods.Set(p)
	if code, body := f.do(t, "DELETE", "/podd/v1/images?ref=example/a:1", ""); code != 409 || !strings.Contains(body, "pod default/web uses it") {
		t.Errorf("remove a used image: %d %s", code, body)
	}
	if code, body := f.do(t, "DELETE", "/podd/v1/images?force=true&ref=example/a:1", ""); code != 200 {
		t.Errorf("remove by force: %d %s", code, body)
	}
	var list api.Images
	f.get(t, "/podd/v1/images", &list)
	if len(list.Items) != 1 || list.Items[0].Tags[0] != "example/loaded:2" {
		t.Errorf("images: %+v", list)
	}
}

func TestPullEndsWithItsClient(t *testing.T) {
	f := serve(t)
	f.images.Gate = make(chan struct{}) // never opened
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, "POST", "http://podd/podd/v1/images", strings.NewReader(`{"ref":"example/a:1"}`))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := f.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	resp.Body.Close()
	// The server of this test only ends once no request is left.
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{
		filepath.Join(dir, api.SocketName),
		filepath.Join(dir, strings.Repeat("long/", 30), api.SocketName),
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		l, err := api.Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		st, err := os.Lstat(path)
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("socket: %v, %v", st.Mode(), err)
		}
		if _, err := api.Listen(path); !errdefs.IsAlreadyExists(err) {
			t.Errorf("second daemon: %v", err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("socket is left behind: %v", err)
		}
		// A daemon that was killed leaves its socket.
		dead, err := net.Listen("unix", "@podd-test")
		if err == nil {
			dead.Close()
		}
		l, err = api.Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		if ul, ok := l.(*net.UnixListener); ok {
			ul.SetUnlinkOnClose(false)
			ul.Close()
			if l, err = api.Listen(path); err != nil {
				t.Fatalf("in place of a dead socket: %v", err)
			}
		}
		l.Close()
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := api.Listen(path); !errdefs.IsAlreadyExists(err) {
			t.Errorf("file in the way: %v", err)
		}
	}
}

var _ server.Images = (*servertest.Images)(nil)
var _ = images.Progress{}
