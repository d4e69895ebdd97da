package integration

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/integration/node"
)

func TestCommandLineShowsAndEntersPods(t *testing.T) {
	n := start(t)
	n.Write("web.yaml", pod("web", "", "serve"))
	n.Write("short.yaml", pod("short", "restartPolicy: Never", "exit", "3"))
	n.WaitRunning("web")
	short := n.WaitPod("short", "ended", 30*second, func(p *v1.Pod) bool { return terminated(p) != nil })
	if st := terminated(short); st.ExitCode != 3 || st.Reason != "Error" || short.Status.Phase != "Failed" {
		t.Errorf("ended pod: %s, %+v", short.Status.Phase, st)
	}
	web := node.PodName("web")

	out := n.OK("get", "pods")
	if !strings.Contains(out, "NAME") || !strings.Contains(out, web) || !strings.Contains(out, "1/1") || !strings.Contains(out, "Error") {
		t.Errorf("get pods:\n%s", out)
	}
	if out := n.OK("get", "pod", web, "-o", "jsonpath={.status.phase}"); out != "Running" {
		t.Errorf("get -o jsonpath: %q", out)
	}
	if out := n.OK("get", "pods", "-A", "-o", "wide"); !strings.Contains(out, "NAMESPACE") || !strings.Contains(out, "node1") {
		t.Errorf("get -o wide:\n%s", out)
	}
	out = n.OK("describe", "pod", web)
	for _, want := range []string{"Name:", "Container ID:", "Pulled", "Created", "Started"} {
		if !strings.Contains(out, want) {
			t.Errorf("describe lacks %q:\n%s", want, out)
		}
	}
	if out := n.OK("events"); !strings.Contains(out, "Started") || !strings.Contains(out, "Pod/"+web) {
		t.Errorf("events:\n%s", out)
	}
	if out := n.OK("logs", web); !strings.Contains(out, "serving on :8080") {
		t.Errorf("logs: %q", out)
	}
	if out := n.OK("logs", "--tail=1", node.PodName("short")); out != "exiting with 3\n" {
		t.Errorf("logs of an ended container: %q", out)
	}
	if out := n.OK("logs", "-f", node.PodName("short")); out != "exiting with 3\n" {
		t.Errorf("logs -f of an ended container: %q", out)
	}
	if out := n.OK("exec", web, "--", "/testserver", "env"); !strings.Contains(out, "FROM_IMAGE=yes") || !strings.Contains(out, "HOSTNAME="+web) {
		t.Errorf("exec: %q", out)
	}
	_, errOut, err := n.Podd("exec", web, "--", "/testserver", "exit", "7")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("exit code of exec: %v, %s", err, errOut)
	}
	if _, errOut, err := n.Podd("exec", web, "--", "/nothing"); err == nil || !strings.Contains(errOut, "/nothing") {
		t.Errorf("exec of nothing: %v, %q", err, errOut)
	}
	if out := n.OK("images"); !strings.Contains(out, "podd.test/testserver") || !strings.Contains(out, "IMAGE ID") {
		t.Errorf("images:\n%s", out)
	}
	if out := n.OK("version"); !strings.Contains(out, "Daemon:") || !strings.Contains(out, "Shim:") {
		t.Errorf("version:\n%s", out)
	}
}

func TestExecCarriesInput(t *testing.T) {
	n := start(t)
	n.Write("box.yaml", box("box"))
	n.WaitRunning("box")
	in := strings.Repeat("0123456789abcdef\n", 1<<16)
	out, errOut, err := n.PoddIn(strings.NewReader(in), "exec", "-i", node.PodName("box"), "--", "cat")
	if err != nil || out != in {
		t.Errorf("%d of %d bytes came back: %v, %s", len(out), len(in), err, errOut)
	}
}

func TestStoppedPodStaysStoppedUntilStart(t *testing.T) {
	n := start(t)
	n.Write("web.yaml", pod("web", "", "serve"))
	n.WaitRunning("web")
	n.OK("stop", node.PodName("web"))
	p, err := n.Pod("web")
	if err != nil {
		t.Fatal(err)
	}
	if node.Running(p) {
		t.Errorf("it still runs: %+v", p.Status)
	}
	if out := n.OK("get", "pods"); strings.Contains(out, "Error") || !strings.Contains(out, "Completed") && !strings.Contains(out, "Terminated") {
		t.Errorf("its end is shown as one it was not asked for: %s", out)
	}
	n.OK("start", node.PodName("web"))
	n.WaitRunning("web")
	n.OK("stop", "--all")
	if p, err := n.Pod("web"); err != nil || node.Running(p) {
		t.Errorf("it runs after stop --all: %v", err)
	}
}

// TestStopAllWorksWithoutADaemon: what the README says for the end of `make run`.
func TestStopAllWorksWithoutADaemon(t *testing.T) {
	n := start(t)
	n.Write("one.yaml", pod("one", "", "serve"))
	n.Write("two.yaml", pod("two", "", "serve"))
	n.WaitRunning("one", "two")
	shim := n.ShimPID()
	n.Signal(syscall.SIGKILL)
	if out := n.OK("stop", "--all"); !strings.Contains(out, "all pods stopped") {
		t.Errorf("it says: %s", out)
	}
	if err := syscall.Kill(shim, 0); err == nil {
		t.Errorf("podd-shim %d still runs", shim)
	}
	n.Start() // the manifests are still there
	n.WaitRunning("one", "two")
	n.Write("stubborn.yaml", strings.Replace(pod("stubborn", "", "stubborn"), "terminationGracePeriodSeconds: 1", "terminationGracePeriodSeconds: 600", 1))
	n.WaitRunning("stubborn")
	n.Signal(syscall.SIGKILL)
	n.OK("stop", "--all", "--grace-period=1") // in the two minutes of a command
	n.Remove("stubborn.yaml")                 // it would not end for its ten minutes
	n.Start()
}

// box is a pod of busybox that waits.
func box(name string) string {
	return strings.NewReplacer(testserver, busybox, "    args: []\n", "    command: [sleep, \"1000\"]\n").Replace(pod(name, ""))
}

func TestExecGivesATerminal(t *testing.T) {
	if _, err := exec.LookPath("script"); err != nil {
		t.Skip("script(1) is not installed")
	}
	n := start(t)
	n.Write("box.yaml", box("box"))
	n.WaitRunning("box")
	// script gives podd a terminal of its own, 24 rows high and 80 wide unless told.
	line := fmt.Sprintf("stty rows 33 cols 77; %s/podd --run-dir %s exec -it %s -- sh -c 'test -t 0 && test -t 1 && echo is a terminal; until stty size | grep -v \"^0 0\"; do sleep 0.1; done; exit 9'", n.Bin, n.RunDir(), node.PodName("box"))
	cmd := exec.Command("script", "-qec", line, "/dev/null")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 9 {
		t.Errorf("exit: %v", err)
	}
	if !strings.Contains(string(out), "is a terminal") || !strings.Contains(string(out), "33 77") {
		t.Errorf("got %q", out)
	}
}

func TestCopyAndPortForward(t *testing.T) {
	n := start(t)
	n.Write("box.yaml", box("box"))
	n.Write("web.yaml", pod("web", "", "serve"))
	n.WaitRunning("box", "web")
	from := filepath.Join(t.TempDir(), "from")
	text := strings.Repeat("some text\n", 100000)
	if err := os.WriteFile(from, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	n.OK("cp", from, node.PodName("box")+":/tmp/file")
	back := filepath.Join(t.TempDir(), "back")
	n.OK("cp", node.PodName("box")+":/tmp/file", back)
	if got, err := os.ReadFile(back); err != nil || string(got) != text {
		t.Errorf("%d of %d bytes came back: %v", len(got), len(text), err)
	}

	port := freePort(t)
	cmd := exec.Command(filepath.Join(n.Bin, "podd"), "--run-dir", n.RunDir(), "port-forward", node.PodName("web"), fmt.Sprintf("%d:8080", port))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	node.Await(t, "the forwarded port answering", 10*second, func() bool {
		return fetch(fmt.Sprintf("http://127.0.0.1:%d/hostname", port)) == node.PodName("web")
	})
}

// TestOneBrokenConnectionEndsNoForward: PostgreSQL with TLS resets each of its
// connections at the end.
func TestOneBrokenConnectionEndsNoForward(t *testing.T) {
	n := start(t)
	// A refused connection ends kubectl's forward: not before the server listens.
	n.Write("web.yaml", pod("web", "", "serve")+"    readinessProbe: {periodSeconds: 1, httpGet: {port: 8080, path: /healthz}}\n")
	n.WaitPod("web", "ready", 60*second, podutil.IsPodReady)
	port := freePort(t)
	var log bytes.Buffer
	cmd := exec.Command(filepath.Join(n.Bin, "podd"), "--run-dir", n.RunDir(), "port-forward", node.PodName("web"), fmt.Sprintf("%d:8080", port))
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	url := fmt.Sprintf("http://127.0.0.1:%d", port)
	node.Await(t, "the forwarded port answering", 10*second, func() bool { return fetch(url+"/hostname") == node.PodName("web") })
	for range 5 {
		if fetch(url+"/reset") != "" {
			t.Error("a reset connection brought something")
		}
		// The other end: a client that resets while the pod has more to say.
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			break
		}
		fmt.Fprintf(conn, "GET /file?path=/testserver HTTP/1.1\r\nHost: web\r\n\r\n")
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
		_ = conn.(*net.TCPConn).SetLinger(0)
		conn.Close()
		if got := fetch(url + "/hostname"); got != node.PodName("web") {
			t.Errorf("the next connection: %q", got)
		}
	}
	select {
	case err := <-ended:
		t.Errorf("the forward has ended: %v\n%s", err, log.String())
	default:
		cmd.Process.Kill()
		<-ended
	}
}

func TestLogsFollowUntilTheContainerEnds(t *testing.T) {
	n := start(t)
	n.Write("writer.yaml", pod("writer", "restartPolicy: Never", "lines", "1ms", "2000"))
	n.WaitPod("writer", "begun", 30*second, func(p *v1.Pod) bool { return status(p).State.Running != nil || terminated(p) != nil })
	got := numbers(n.OK("logs", "-f", node.PodName("writer")))
	unbroken(t, "logs -f", got, false)
	if len(got) != 2000 {
		t.Errorf("%d lines, want 2000", len(got))
	}
	if got := numbers(n.OK("logs", "--tail=3", node.PodName("writer"))); len(got) != 3 || got[2] != 1999 {
		t.Errorf("--tail=3: %v", got)
	}
}
