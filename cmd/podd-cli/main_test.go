package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"

	"github.com/podd-runtime/podd/cri/images"
	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/server"
	"github.com/podd-runtime/podd/kubelet/server/api"
	"github.com/podd-runtime/podd/kubelet/server/servertest"
)

type daemon struct {
	dir        string
	pods       *servertest.Pods
	events     *servertest.Events
	containers *servertest.Containers
	images     *servertest.Images
}

func start(t *testing.T) *daemon {
	t.Helper()
	d := &daemon{dir: t.TempDir(), pods: &servertest.Pods{}, events: &servertest.Events{}, containers: &servertest.Containers{}, images: &servertest.Images{}}
	l, err := api.Listen(filepath.Join(d.dir, api.SocketName))
	if err != nil {
		t.Fatal(err)
	}
	s := server.New(server.Config{
		NodeName: "node1", Version: "v0-test", Pods: d.pods, Events: d.events, Containers: d.containers, Images: d.images,
		Objects: &servertest.Objects{Maps: []*v1.ConfigMap{{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "settings"}, Data: map[string]string{"a": "b"}}}},
		Problems: func() []manifests.Problem {
			return []manifests.Problem{{File: "a.yaml", Document: 2, Line: 7, Field: "spec", Message: "is wrong"}}
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() { cancel(); <-ended })
	return d
}

// buffer is written by commands and read by tests at the same time.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) { b.mu.Lock(); defer b.mu.Unlock(); return b.b.Write(p) }
func (b *buffer) String() string              { b.mu.Lock(); defer b.mu.Unlock(); return b.b.String() }

type fatal struct {
	msg  string
	code int
}

// run runs one command line as main does.
func (d *daemon) run(ctx context.Context, in io.Reader, out, errOut io.Writer, args ...string) (err error) {
	cmdutil.BehaviorOnFatal(func(msg string, code int) { panic(fatal{msg, code}) })
	defer func() {
		if r := recover(); r != nil {
			f, ok := r.(fatal)
			if !ok {
				panic(r)
			}
			err = fmt.Errorf("exit %d: %s", f.code, f.msg)
		}
	}()
	root := newRoot(genericiooptions.IOStreams{In: in, Out: out, ErrOut: errOut})
	root.SetArgs(append([]string{"--run-dir", d.dir}, args...))
	return root.ExecuteContext(ctx)
}

func (d *daemon) ok(t *testing.T, args ...string) string {
	t.Helper()
	var out, errOut buffer
	if err := d.run(t.Context(), strings.NewReader(""), &out, &errOut, args...); err != nil {
		t.Fatalf("podd %s: %v\n%s%s", strings.Join(args, " "), err, out.String(), errOut.String())
	}
	return out.String() + errOut.String()
}

// columns is text with single spaces.
func columns(s string) string {
	var lines []string
	for _, l := range strings.Split(strings.TrimSpace(s), "\n") {
		lines = append(lines, strings.Join(strings.Fields(l), " "))
	}
	return strings.Join(lines, "\n")
}

func TestGet(t *testing.T) {
	d := start(t)
	web := servertest.Pod("default", "web", "nginx", "side")
	web.Status.ContainerStatuses[1].Ready = false
	web.Status.ContainerStatuses[1].RestartCount = 3
	web.Status.ContainerStatuses[1].State = v1.ContainerState{Waiting: &v1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
	web.CreationTimestamp = metav1.NewTime(time.Now().Add(-3 * time.Minute))
	d.pods.Set(web)
	d.pods.Set(servertest.Pod("other", "db", "redis"))
	for _, tt := range []struct {
		args string
		want string
	}{
		{"get pods", "NAME READY STATUS RESTARTS AGE\nweb 1/2 CrashLoopBackOff 3 3m"},
		{"get po -o wide", "NAME READY STATUS RESTARTS AGE IP NODE NOMINATED NODE READINESS GATES\nweb 1/2 CrashLoopBackOff 3 3m 10.1.2.3 node1 <none> <none>"},
		{"get pods -n nowhere", "No resources found in nowhere namespace."},
		{"get pod db -n other --no-headers -o custom-columns=N:.metadata.name,P:.status.phase", "db Running"},
		{"get pods -A -o jsonpath={.items[*].metadata.name}", "web db"},
		{"get pods -o name", "pod/web"},
		{"get pods -l app=none", "No resources found in default namespace."},
		{"get cm", "NAME DATA AGE\nsettings 1 <unknown>"},
		{"get nodes -o name", "node/node1"},
		{"get pods -A --sort-by=.metadata.name -o name", "pod/db\npod/web"},
	} {
		if got := columns(d.ok(t, strings.Fields(tt.args)...)); !strings.HasPrefix(got, tt.want) {
			t.Errorf("podd %s:\n%s\nwant\n%s", tt.args, got, tt.want)
		}
	}
	if got := columns(d.ok(t, "get", "pods", "-A")); !strings.HasPrefix(got, "NAMESPACE NAME READY STATUS RESTARTS AGE\ndefault web 1/2") || !strings.Contains(got, "\nother db 1/1 Running 0") {
		t.Errorf("get pods -A:\n%s", got)
	}
	var p v1.Pod
	if err := json.Unmarshal([]byte(d.ok(t, "get", "pod", "web", "-o", "json")), &p); err != nil || p.Name != "web" || p.Kind != "Pod" {
		t.Errorf("get -o json: %v, %+v", err, p.TypeMeta)
	}
	err := d.run(t.Context(), nil, io.Discard, io.Discard, "get", "pod", "we")
	if err == nil || !strings.Contains(err.Error(), `exit 1: Error from server (NotFound): pods "we" not found`) {
		t.Errorf("get of no pod: %v", err)
	}
}

func TestGetWatch(t *testing.T) {
	d := start(t)
	d.pods.Set(servertest.Pod("default", "web", "nginx"))
	var out buffer
	go d.run(t.Context(), nil, &out, io.Discard, "get", "pods", "-w", "-o", "wide")
	await(t, func() bool { return strings.Contains(out.String(), "web ") })
	p := servertest.Pod("default", "db", "redis")
	d.pods.Set(p)
	await(t, func() bool { return strings.Contains(out.String(), "db ") })
	p.Status.ContainerStatuses[0].RestartCount = 7
	d.pods.Set(p)
	await(t, func() bool { return strings.Count(out.String(), "db ") == 2 })
	if got := out.String(); strings.Count(got, "READINESS") != 1 || !strings.Contains(columns(got), "db 1/1 Running 7") {
		t.Errorf("got\n%s", got)
	}
}

func await(t *testing.T, cond func() bool) {
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

func TestDescribeAndEvents(t *testing.T) {
	d := start(t)
	p := servertest.Pod("default", "web", "nginx")
	d.pods.Set(p)
	d.pods.Set(servertest.Pod("default", "other", "x"))
	d.events.Add(p, "Pulled", "Container image is present")
	d.events.Add(servertest.Pod("default", "other", "x"), "Killing", "Stopping")
	got := d.ok(t, "describe", "pod", "web")
	for _, want := range []string{"Name:", "nginx:\n", "Pulled", "Container image is present"} {
		if !strings.Contains(got, want) {
			t.Errorf("describe lacks %q:\n%s", want, got)
		}
	}
	if strings.Contains(got, "Killing") {
		t.Errorf("describe tells another pod's events:\n%s", got)
	}
	if got := columns(d.ok(t, "events")); !strings.HasPrefix(got, "LAST SEEN TYPE REASON OBJECT MESSAGE\n") || !strings.Contains(got, "Normal Pulled Pod/web Container image is present") {
		t.Errorf("events:\n%s", got)
	}
	if got := d.ok(t, "events", "--for", "pod/other"); !strings.Contains(got, "Killing") || strings.Contains(got, "Pulled") {
		t.Errorf("events --for:\n%s", got)
	}
	if got := columns(d.ok(t, "get", "events")); !strings.HasPrefix(got, "LAST SEEN TYPE REASON OBJECT MESSAGE\n") {
		t.Errorf("get events:\n%s", got)
	}
}

func TestLogs(t *testing.T) {
	d := start(t)
	log := filepath.Join(d.dir, "0.log")
	if err := os.WriteFile(log, []byte("2026-01-02T03:04:05Z stdout F one\n2026-01-02T03:04:06Z stderr F two\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.pods.Set(servertest.Pod("default", "web", "nginx", "side"))
	d.containers.Set("uid-web-side", log, runtimeapi.ContainerState_CONTAINER_EXITED)
	if got := d.ok(t, "logs", "web", "-c", "side", "--tail", "1", "--timestamps"); got != "2026-01-02T03:04:06Z two\n" {
		t.Errorf("got %q", got)
	}
	if got := d.ok(t, "logs", "-f", "pod/web", "-c", "side"); got != "one\ntwo\n" {
		t.Errorf("follow: got %q", got)
	}
}

func TestExec(t *testing.T) {
	d := start(t)
	d.pods.Set(servertest.Pod("default", "web", "nginx"))
	d.containers.Run = func(_ context.Context, id string, cmd []string, in io.Reader, out, stderr io.Writer, tty bool, _ <-chan remotecommand.TerminalSize) error {
		switch {
		case cmd == nil:
			io.WriteString(out, "attached to "+id)
		case cmd[0] == "cat":
			_, err := io.Copy(out, in)
			return err
		case cmd[0] == "fail":
			io.WriteString(stderr, "no\n")
			return servertest.Exit(42)
		case cmd[0] == "broken":
			return errors.New("no such program")
		}
		return nil
	}
	big := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB both ways
	var out, errOut buffer
	if err := d.run(t.Context(), strings.NewReader(big), &out, &errOut, "exec", "-i", "web", "--", "cat"); err != nil || out.String() != big {
		t.Errorf("cat: %d bytes, %v, %s", len(out.String()), err, errOut.String())
	}
	err := d.run(t.Context(), nil, io.Discard, &errOut, "exec", "web", "--", "fail")
	if err == nil || !strings.HasPrefix(err.Error(), "exit 42: ") || !strings.Contains(errOut.String(), "no\n") {
		t.Errorf("fail: %v, %q", err, errOut.String())
	}
	err = d.run(t.Context(), nil, io.Discard, io.Discard, "exec", "web", "--", "broken")
	if err == nil || !strings.Contains(err.Error(), "no such program") {
		t.Errorf("broken: %v", err)
	}
	if got := d.ok(t, "attach", "web"); !strings.Contains(got, "attached to uid-web-nginx") {
		t.Errorf("attach: %q", got)
	}
}

func TestBridgeLetsNobodyElseIn(t *testing.T) {
	d := start(t)
	c := &client{runDir: d.dir, streams: true}
	cfg, err := c.ToRESTConfig()
	if err != nil {
		t.Fatal(err)
	}
	for token, want := range map[string]int{"": 401, "Bearer guess": 401, "Bearer " + cfg.BearerToken: 200} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, cfg.Host+"/version", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("token %.12q: %d, want %d", token, resp.StatusCode, want)
		}
	}
	c = &client{runDir: d.dir}
	if cfg, err := c.ToRESTConfig(); err != nil || cfg.BearerToken != "" || c.bridged != nil {
		t.Error("a bridge for a command that needs none")
	}
}

func TestPortForward(t *testing.T) {
	d := start(t)
	d.pods.Set(servertest.Pod("default", "web", "nginx"))
	d.containers.Ports = func(_ context.Context, sandbox string, port int32, stream io.ReadWriteCloser) error {
		defer stream.Close()
		b := make([]byte, 4)
		if _, err := io.ReadFull(stream, b); err != nil {
			return err
		}
		_, err := fmt.Fprintf(stream, "%s %s:%d", b, sandbox, port)
		return err
	}
	var out buffer
	go d.run(t.Context(), nil, &out, &out, "port-forward", "--address", "127.0.0.1", "web", ":8080")
	await(t, func() bool { return strings.Contains(out.String(), "-> 8080") })
	addr := strings.Fields(out.String())[2]
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "ping")
	got, err := io.ReadAll(c)
	if err != nil || string(got) != "ping sandbox-uid-web:8080" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestImageCommands(t *testing.T) {
	d := start(t)
	tar := filepath.Join(d.dir, "image.tar")
	if err := os.WriteFile(tar, []byte("localhost:5000/loaded:2"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := d.ok(t, "load", tar); got != "loaded localhost:5000/loaded:2\n" {
		t.Errorf("load: %q", got)
	}
	if got := d.ok(t, "pull", "example/a:1"); !strings.Contains(got, "example/a:1 downloading\n") || !strings.Contains(got, "sha256:") {
		t.Errorf("pull: %q", got)
	}
	if got := d.ok(t, "images", "--verify"); got != "all images are as they were stored\n" {
		t.Errorf("verify: %q", got)
	}
	d.images.Broken = []images.Problem{{ID: "sha256:" + strings.Repeat("a", 64), Names: []string{"example/a:1"}, Err: errors.New("blob b is not what it was")}}
	var damaged buffer
	if err := d.run(t.Context(), nil, &damaged, &damaged, "images", "--verify"); err == nil || !strings.Contains(err.Error(), "1 image is damaged") || !strings.Contains(damaged.String(), "example/a:1: blob b is not what it was\n") {
		t.Errorf("verify of a damaged store: %v\n%s", err, damaged.String())
	}
	if got := columns(d.ok(t, "images")); got != "IMAGE TAG IMAGE ID SIZE\nexample/a 1 0000000000000 10B\nlocalhost:5000/loaded 2 0000000000000 10B" {
		t.Errorf("images:\n%s", got)
	}
	if got := d.ok(t, "rmi", "example/a:1"); got != "removed example/a:1\n" {
		t.Errorf("rmi: %q", got)
	}
	err := d.run(t.Context(), nil, io.Discard, io.Discard, "pull", "--creds", "u:wrong", "example/a:1")
	if err == nil || strings.Count(err.Error(), "pull example/a:1: ") != 1 {
		t.Errorf("refused pull: %v", err)
	}
}

// Of several archives all that can be loaded is; what cannot be is listed.
func TestLoadTakesWhatItCan(t *testing.T) {
	d := start(t)
	var args []string
	for i, text := range []string{"bad", "half a.io/one:1", "a.io/two:1"} {
		args = append(args, filepath.Join(d.dir, fmt.Sprint(i, ".tar")))
		if err := os.WriteFile(args[i], []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var out buffer
	err := d.run(t.Context(), nil, &out, io.Discard, append([]string{"load", filepath.Join(d.dir, "none.tar")}, args...)...)
	if got := out.String(); got != "loaded a.io/one:1\nloaded a.io/two:1\n" {
		t.Errorf("load: %q", got)
	}
	for _, want := range []string{"none.tar: no such file", "0.tar: no image in the archive", "1.tar: image a.io/other:1: lacks blob x"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not told: %v", want, err)
		}
	}
}

func TestStopStartVersionStatus(t *testing.T) {
	d := start(t)
	d.pods.Set(servertest.Pod("default", "web", "nginx"))
	d.pods.Set(servertest.Pod("default", "db", "redis"))
	got := d.ok(t, "stop", "web", "pod/db", "--grace-period=3")
	if !strings.Contains(got, "pod/web stopped\n") || !strings.Contains(got, "pod/db stopped\n") || *d.pods.Grace != 3 {
		t.Errorf("stop: %q", got)
	}
	d.ok(t, "stop", "--all")
	if len(d.pods.Stopped) != 3 || d.pods.Stopped[2] != "*/*" || d.pods.Grace != nil {
		t.Errorf("stop --all: %v", d.pods.Stopped)
	}
	if err := d.run(t.Context(), nil, io.Discard, io.Discard, "stop"); err == nil {
		t.Error("stop of nothing")
	}
	if err := d.run(t.Context(), nil, io.Discard, io.Discard, "stop", "none"); err == nil || !strings.Contains(err.Error(), `pods "none" not found`) {
		t.Errorf("stop of no pod: %v", err)
	}
	p := servertest.Pod("default", "web", "nginx")
	p.Status.ContainerStatuses = nil
	d.pods.Set(p)
	if got := d.ok(t, "start", "web"); got != "pod/web started\n" {
		t.Errorf("start: %q", got)
	}
	if got := d.ok(t, "version"); !strings.Contains(got, "Daemon: v0-test") || !strings.Contains(got, "Shim: does not answer") {
		t.Errorf("version: %q", got)
	}
	if got := d.ok(t, "status"); !strings.Contains(got, "a.yaml:7: document 2: spec: is wrong") || !strings.Contains(got, "2 Running") {
		t.Errorf("status: %q", got)
	}
}

func TestNoDaemon(t *testing.T) {
	d := &daemon{dir: filepath.Join(t.TempDir(), "none")}
	err := d.run(t.Context(), nil, io.Discard, io.Discard, "get", "pods")
	for _, want := range []string{d.dir + "/api.sock", "podd run --run-dir " + d.dir, "PODD_RUN_DIR"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to say %q", err, want)
		}
	}
	var out buffer
	if err := d.run(t.Context(), nil, &out, io.Discard, "version"); err == nil || !strings.Contains(out.String(), "Client: ") {
		t.Errorf("version without a daemon: %v, %q", err, out.String())
	}
}

func TestStopAllWithoutADaemon(t *testing.T) {
	d := &daemon{dir: t.TempDir()}
	if err := d.run(t.Context(), nil, io.Discard, io.Discard, "stop", "--all"); err == nil || !strings.Contains(err.Error(), "podd run --run-dir") {
		t.Errorf("nothing ever ran: %v", err)
	}
	out := filepath.Join(d.dir, "out")
	program := filepath.Join(d.dir, "podd")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho \"$PWD $*\" > "+out+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := (api.Last{Program: program, Dir: "/usr", Args: []string{"--run-dir", d.dir}}).Save(d.dir); err != nil {
		t.Fatal(err)
	}
	if got := d.ok(t, "stop", "--all", "--grace-period=5"); !strings.Contains(got, "all pods stopped") {
		t.Errorf("got %q", got)
	}
	if got, _ := os.ReadFile(out); string(got) != "/usr run --run-dir "+d.dir+" --drain --drain-grace-period=5\n" {
		t.Errorf("ran %q", got)
	}
	if err := d.run(t.Context(), nil, io.Discard, io.Discard, "stop", "web"); err == nil {
		t.Error("stopped one pod without a daemon")
	}
}

func TestCheck(t *testing.T) {
	d := &daemon{dir: t.TempDir()}
	good, bad := filepath.Join(d.dir, "good.yaml"), filepath.Join(d.dir, "bad.yaml")
	os.WriteFile(good, []byte("apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nspec:\n  containers:\n  - name: c\n    image: x\n"), 0o600)
	os.WriteFile(bad, []byte("apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nspec:\n  containers:\n  - name: c\n    imag: x\n"), 0o600)
	odd := filepath.Join(t.TempDir(), "odd.yaml")
	os.WriteFile(odd, []byte("apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nspec:\n  containers:\n  - name: c\n    image: x\n    resources: {limits: {memory: 128m}}\n"), 0o600)
	if got := d.ok(t, "check", odd); !strings.Contains(got, `warning: `+odd) || !strings.Contains(got, `fractional byte value "128m"`) || strings.Contains(got, "no problems") {
		t.Errorf("check of a warning: %q", got)
	}
	if got := d.ok(t, "check", good); got != "1 file, no problems\n" {
		t.Errorf("good: %q", got)
	}
	var out buffer
	if err := d.run(t.Context(), nil, &out, io.Discard, "check", d.dir); err == nil || !strings.Contains(out.String(), "bad.yaml:8: document 1: spec.containers[0].imag") {
		t.Errorf("bad: %v, %q", err, out.String())
	}
}

// TestCheckFindsImagesThatNobodyCanPull, and counts as people do.
func TestCheckFindsImagesThatNobodyCanPull(t *testing.T) {
	d := &daemon{dir: t.TempDir()}
	file := filepath.Join(d.dir, "web.yaml")
	for image, right := range map[string]bool{
		"nginx": true, "nginx:latest": true, "localhost:5000/a/b:1": true, "nginx@sha256:" + strings.Repeat("a", 64): true,
		"nginx:latest:1": false, "Nginx": false, "nginx@sha256:1": false, "nginx:": false, "http://r.test/nginx": false,
	} {
		os.WriteFile(file, []byte("apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nspec:\n  containers:\n  - name: c\n    image: \""+image+"\"\n"), 0o600)
		var out buffer
		err := d.run(t.Context(), nil, &out, io.Discard, "check", file)
		if right && err != nil {
			t.Errorf("%s: %v, %s", image, err, out.String())
		}
		if !right && (err == nil || !strings.Contains(err.Error(), "1 problem in 1 file") || !strings.Contains(out.String(), "web.yaml:8: document 1: spec.containers[0].image: ")) {
			t.Errorf("%s: %v, %s", image, err, out.String())
		}
	}
}

func TestNamesItselfPodd(t *testing.T) {
	d := &daemon{dir: t.TempDir()}
	for _, args := range [][]string{{"--help"}, {"get", "--help"}, {"logs", "--help"}, {"exec", "--help"}, {"wait", "--help"}, {"completion", "bash"}} {
		if got := d.ok(t, args...); strings.Contains(got, "kubectl ") || !strings.Contains(got, "podd") {
			t.Errorf("podd %s:\n%s", strings.Join(args, " "), got)
		}
	}
}

func TestHumanSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0B", 999: "999B", 4500: "4.5kB", 45_600_000: "45.6MB", 1_234_000_000: "1.23GB"} {
		if got := humanSize(n); got != want {
			t.Errorf("%d: got %s, want %s", n, got, want)
		}
	}
}
