package integration

import (
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/node"
)

// TestAStoppedDaemonHangsNoClient: each says whom it waits for and ends.
func TestAStoppedDaemonHangsNoClient(t *testing.T) {
	n := start(t)
	n.Write("web.yaml", pod("web", "", "serve"))
	n.WaitRunning("web")
	n.Signal(syscall.SIGSTOP)
	defer n.Signal(syscall.SIGCONT)
	for _, args := range [][]string{{"get", "pods"}, {"exec", node.PodName("web"), "--", "/testserver", "env"}, {"stop", "--all"}} {
		begin := time.Now()
		_, said, err := n.Podd(args...)
		if err == nil || !strings.Contains(said, fmt.Sprintf("process %d, is stopped", n.PID())) || !strings.Contains(said, "kill -CONT") {
			t.Errorf("podd %v: %v\n%s", args, err, said)
		}
		if took := time.Since(begin); took > node.Scale(10*second) {
			t.Errorf("podd %v took %v", args, took)
		}
	}
}

func TestAShimThatIsStoppedIsTold(t *testing.T) {
	n := start(t)
	shim := n.ShimPID()
	if err := syscall.Kill(shim, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(shim, syscall.SIGCONT)
	want := fmt.Sprintf("process %d is stopped; kill -CONT %d", shim, shim)
	if out, _, err := n.Podd("status"); err == nil || !strings.Contains(out, want) {
		t.Errorf("status: %v\n%s", err, out)
	}
	if out := n.OK("why"); strings.Contains(out, "fine") || !strings.Contains(out, want) {
		t.Errorf("why: %s", out)
	}
}

// TestStopTellsWhatItWaitsFor: a container that ignores SIGTERM is not stopped
// before it has ended.
func TestStopTellsWhatItWaitsFor(t *testing.T) {
	n := start(t)
	n.Write("web.yaml", strings.Replace(pod("web", "", "stubborn"), "terminationGracePeriodSeconds: 1", "terminationGracePeriodSeconds: 4", 1))
	n.WaitRunning("web")
	node.Await(t, "SIGTERM ignored", 10*second, func() bool { return strings.Contains(n.OK("logs", node.PodName("web")), "ignoring") })
	type result struct {
		out, said string
		err       error
	}
	stopped := make(chan result, 1)
	go func() {
		out, said, err := n.Podd("stop", node.PodName("web"))
		stopped <- result{out, said, err}
	}()
	n.WaitPod("web", "being stopped", 10*second, func(p *v1.Pod) bool { return p.Status.Reason == "Stopping" })
	if out := n.OK("why", node.PodName("web")); !strings.Contains(out, "is being stopped and waits for container main to end, which is killed") || strings.Contains(out, "stays down") {
		t.Errorf("why: %s", out)
	}
	r := <-stopped
	if r.err != nil || !strings.Contains(r.said, "waits for container main to end, which is killed") || !strings.Contains(r.out, " stopped") {
		t.Errorf("stop: %v\n%s%s", r.err, r.out, r.said)
	}
	if out := n.OK("why", node.PodName("web")); !strings.Contains(out, "stays down") {
		t.Errorf("why: %s", out)
	}
}

func TestAFailedPreStopHookIsTold(t *testing.T) {
	n := start(t)
	n.Write("web.yaml", pod("web", "", "serve")+"    lifecycle: {preStop: {exec: {command: [/testserver, exit, \"3\"]}}}\n")
	n.WaitRunning("web")
	n.OK("restart", node.PodName("web"))
	const want = "The preStop hook of container main failed"
	n.WaitPod("web", "restarted", 30*second, func(p *v1.Pod) bool { return status(p).RestartCount == 1 && node.Running(p) })
	if out := n.OK("why"); strings.Contains(out, "fine") || !strings.Contains(out, want) || !strings.Contains(out, "its command exited with 3") {
		t.Errorf("after a restart: %s", out)
	}
	n.Remove("web.yaml")
	n.WaitGone(30 * second)
	if out := n.OK("why"); strings.Contains(out, "fine") || !strings.Contains(out, want) {
		t.Errorf("of a pod that is gone: %s", out)
	}
}

// TestTheLogTellsThatTheDaemonWasAskedToEnd: who finds a node without its daemon
// looks there first.
func TestTheLogTellsThatTheDaemonWasAskedToEnd(t *testing.T) {
	n := start(t)
	n.Signal(syscall.SIGTERM)
	log, err := os.ReadFile(filepath.Join(n.Dir, "podd.log"))
	if err != nil || !strings.Contains(string(log), "podd was asked to end") || !strings.Contains(string(log), "SIGTERM") {
		t.Errorf("%v: %s", err, log)
	}
}

// TestAnApiserverThatIsNotThereIsTold: refused, away and not trusted are three
// things to do something about.
func TestAnApiserverThatIsNotThereIsTold(t *testing.T) {
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnauthorized) }))
	defer srv.Close()
	n := node.New(t)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	kubeconfig := filepath.Join(n.Dir, "kubeconfig")
	write := func(trust string) {
		text := fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c, user: u}}]\nusers: [{name: u, user: {token: wrong}}]\nclusters: [{name: c, cluster: {server: %q%s}}]\n", srv.URL, trust)
		if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	told := func(status, why string) {
		t.Helper()
		var out string
		node.Await(t, "told by podd status: "+status, 30*second, func() bool {
			out = n.OK("status")
			return strings.Contains(out, status)
		}, func() string { return out })
		if out := n.OK("why"); strings.Contains(out, "fine") || !strings.Contains(out, why) {
			t.Errorf("why: %s", out)
		}
	}
	write(", certificate-authority-data: " + base64.StdEncoding.EncodeToString(ca))
	n.Extra("--kubeconfig", kubeconfig)
	n.Start()
	told("refuses this node since", "refuses this node")
	srv.CloseClientConnections()
	srv.Close()
	told("cannot be reached since", "cannot be reached")
	n.Signal(syscall.SIGTERM)
	srv = httptest.NewTLSServer(http.NotFoundHandler())
	write("")
	n.Start()
	told("not trusted since", "is not trusted")
}
