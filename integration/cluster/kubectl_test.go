package cluster

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/node"
)

// TestKubectl is everything that a user of the cluster does with kubectl to
// pods of the node.
func TestKubectl(t *testing.T) {
	join(t, "kubectl")
	s := enter(t, "kubectl")
	counter := podOf("counter", "sh", "-c", `i=0; while :; do echo line $i; i=$((i+1)); sleep 0.05; done`)
	counter.Spec.Containers = append(counter.Spec.Containers, podOf("", "sh", "-c", "echo from the side; sleep 100000").Spec.Containers...)
	counter.Spec.Containers[1].Name = "side"
	reader := podOf("reader", "cat")
	reader.Spec.Containers[0].Stdin = true
	s.create(counter, reader, serverOf("web"))
	s.awaitReady("counter", "reader", "web")
	for _, test := range []struct {
		name string
		run  func(*testing.T, *space)
	}{
		{"get", testGet}, {"logs", testLogs}, {"exec", testExec}, {"terminal", testTerminal}, {"cp", testCopy}, {"attach", testAttach},
		{"port-forward", testPortForward}, {"describe", testDescribe}, {"debug", testDebug}, {"previous", testPrevious},
		{"sessions end", testSessionsEnd}, {"sessions end with their container", testContainerEnds},
	} {
		t.Run(test.name, func(t *testing.T) {
			sub := *s
			sub.TB = t
			test.run(t, &sub)
		})
	}
}

func testGet(t *testing.T, s *space) {
	pod, err := s.pod(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	if wide := s.kubectl("get", "pod", "web", "-o", "wide", "--no-headers"); !regexp.MustCompile(`^web +1/1 +Running +0 .* ` + regexp.QuoteMeta(pod.Status.PodIP) + ` +kubectl `).MatchString(wide) {
		t.Errorf("get pod: %s", wide)
	}
	if nodes := s.kubectl("get", "nodes", "-o", "wide", "--no-headers"); !regexp.MustCompile(`(?m)^kubectl +Ready +<none> +\S+ +v1\.36\.3 .* podd://`).MatchString(nodes) {
		t.Errorf("get nodes: %s", nodes)
	}
}

func lines(text string) []string { return strings.Split(strings.TrimRight(text, "\n"), "\n") }

func testLogs(t *testing.T, s *space) {
	s.await("forty lines", time.Minute, func(context.Context) error {
		if n := len(lines(s.kubectl("logs", "counter", "-c", "main"))); n < 40 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	whole := lines(s.kubectl("logs", "counter", "-c", "main"))
	for i, line := range whole {
		if line != fmt.Sprintf("line %d", i) {
			t.Fatalf("line %d is %q", i, line)
		}
	}
	if got := lines(s.kubectl("logs", "counter", "-c", "main", "--tail=3")); len(got) != 3 || !strings.HasPrefix(got[0], "line ") {
		t.Errorf("--tail=3: %q", got)
	}
	if got := lines(s.kubectl("logs", "counter", "-c", "main", "--since=1s")); len(got) == 0 || len(got) > len(whole) || got[0] == "line 0" {
		t.Errorf("--since=1s: %d lines from %q", len(got), got[0])
	}
	stamped := s.kubectl("logs", "counter", "-c", "main", "--timestamps", "--tail=1")
	when, line, _ := strings.Cut(strings.TrimSpace(stamped), " ")
	if at, err := time.Parse(time.RFC3339Nano, when); err != nil || time.Since(at) > time.Hour || !strings.HasPrefix(line, "line ") {
		t.Errorf("--timestamps: %q, %v", stamped, err)
	}
	// The API cuts that time off to whole seconds (metav1.Time): lines of the
	// same second come, too.
	second := lines(s.kubectl("logs", "counter", "-c", "main", "--since-time="+when))
	if !slices.Contains(second, line) || second[0] == "line 0" {
		t.Errorf("--since-time of %q begins with %q", line, second[0])
	}
	if got := s.kubectl("logs", "counter", "-c", "main", "--limit-bytes=10"); got != "line 0\nlin" {
		t.Errorf("--limit-bytes=10: %q", got)
	}
	all := s.kubectl("logs", "counter", "--all-containers", "--prefix", "--tail=2")
	if !strings.Contains(all, "[pod/counter/side] from the side\n") || strings.Count(all, "[pod/counter/main] line ") != 2 {
		t.Errorf("--all-containers --prefix: %q", all)
	}
	if out, errs, err := s.run(t.Context(), nil, "logs", "counter", "-c", "nosuch"); err == nil {
		t.Errorf("logs of no container: %s%s", out, errs)
	}
	// Following goes on with what comes, without a gap.
	follow := s.background("logs", "counter", "-c", "main", "-f", "--tail=5")
	s.await("twenty followed lines", time.Minute, func(context.Context) error {
		if n := strings.Count(follow.out.String(), "\n"); n < 20 {
			return fmt.Errorf("%d: %s", n, follow.err.String())
		}
		return nil
	})
	first, last := -1, -1
	for line := range strings.Lines(follow.out.String()) {
		n, err := strconv.Atoi(strings.TrimPrefix(strings.TrimSuffix(line, "\n"), "line "))
		if err != nil || last >= 0 && n != last+1 {
			t.Fatalf("%q follows line %d", line, last)
		}
		if last = n; first < 0 {
			first = n
		}
	}
	if first == 0 {
		t.Error("--tail=5 began at the first line")
	}
}

// protocols that kubectl may speak for exec, attach, cp and port-forward.
func protocols(t *testing.T, s *space, run func(t *testing.T, s *space)) {
	for name, on := range map[string]string{"WebSocket": "true", "SPDY": "false"} {
		t.Run(name, func(t *testing.T) {
			sub := *s
			sub.TB = t
			sub.Env = []string{"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=" + on, "KUBECTL_PORT_FORWARD_WEBSOCKETS=" + on}
			run(t, &sub)
		})
	}
}

func testExec(t *testing.T, s *space) {
	protocols(t, s, func(t *testing.T, s *space) {
		if got := s.kubectl("exec", "reader", "--", "echo", "a b", "c"); got != "a b c\n" {
			t.Errorf("echo: %q", got)
		}
		in := strings.Repeat("some input\n", 100_000)
		if got := s.kubectlIn(strings.NewReader(in), "exec", "-i", "reader", "--", "cat"); got != in {
			t.Errorf("cat gave %d bytes of %d", len(got), len(in))
		}
		out, errs, err := s.run(t.Context(), nil, "exec", "reader", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 7 || out != "out\n" || !strings.HasPrefix(errs, "err\n") {
			t.Errorf("exit 7: %v, %q, %q", err, out, errs)
		}
		if _, errs, err = s.run(t.Context(), nil, "exec", "reader", "--", "/no/such"); err == nil || !strings.Contains(errs, "no such file") {
			t.Errorf("no such program: %v, %q", err, errs)
		}
	})
}

// quoted for a shell.
func quoted(args []string) string {
	var out []string
	for _, a := range args {
		out = append(out, "'"+strings.ReplaceAll(a, "'", `'\''`)+"'")
	}
	return strings.Join(out, " ")
}

// testTerminal gives kubectl a terminal by script(1), as a user has one.
func testTerminal(t *testing.T, s *space) {
	protocols(t, s, func(t *testing.T, s *space) {
		k := s.command(t.Context(), "exec", "-it", "reader", "--", "sh", "-c", "tty; stty size; read x; echo got $x")
		cmd := exec.CommandContext(t.Context(), "script", "-qec", "stty rows 33 cols 101; "+quoted(k.Args), "/dev/null")
		cmd.Env = k.Env
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		var out text
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		s.await("the terminal's size", time.Minute, func(context.Context) error {
			if !strings.Contains(out.String(), "33 101") && !strings.Contains(out.String(), "0 0") {
				return fmt.Errorf("%q", out.String())
			}
			return nil
		})
		if _, err := io.WriteString(in, "word\n"); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), "/dev/pts/") || !strings.Contains(out.String(), "got word") {
			t.Errorf("terminal: %v, %q", err, out.String())
		}
	})
}

func testCopy(t *testing.T, s *space) {
	dir := t.TempDir()
	data := make([]byte, 3<<20)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "there"), data, 0o640); err != nil {
		t.Fatal(err)
	}
	protocols(t, s, func(t *testing.T, s *space) {
		s.kubectl("cp", filepath.Join(dir, "there"), "reader:/tmp/copied")
		back := filepath.Join(t.TempDir(), "back")
		s.kubectl("cp", "reader:/tmp/copied", back)
		if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, data) {
			t.Errorf("copied there and back: %d bytes of %d, %v", len(got), len(data), err)
		}
	})
}

func testAttach(t *testing.T, s *space) {
	protocols(t, s, func(t *testing.T, s *space) {
		a := s.background("attach", "-i", "reader")
		if _, err := io.WriteString(a.in, "hello "+t.Name()+"\n"); err != nil {
			t.Fatal(err)
		}
		s.await("an echo of what the container was told", time.Minute, func(context.Context) error {
			if !strings.Contains(a.out.String(), "hello "+t.Name()+"\n") {
				return fmt.Errorf("%q, %q", a.out.String(), a.err.String())
			}
			return nil
		})
	})
}

var forwarding = regexp.MustCompile(`Forwarding from 127\.0\.0\.1:(\d+) -> 8080`)

// forward a port of something in the background; it returns the local address.
func (s *space) forward(what string) (*running, string) {
	s.Helper()
	f := s.background("port-forward", what, ":8080")
	addr := ""
	s.await("forwarding to "+what, time.Minute, func(context.Context) error {
		m := forwarding.FindStringSubmatch(f.out.String())
		if m == nil {
			return fmt.Errorf("%q, %q", f.out.String(), f.err.String())
		}
		addr = "127.0.0.1:" + m[1]
		return nil
	})
	return f, addr
}

func httpGet(url string) (string, error) {
	c := http.Client{Timeout: node.Scale(20 * time.Second), Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return strings.TrimSpace(string(b)), err
}

func testPortForward(t *testing.T, s *space) {
	s.apply("{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, ports: [{port: 8080}]}}")
	protocols(t, s, func(t *testing.T, s *space) {
		for _, what := range []string{"pod/web", "service/web"} {
			_, addr := s.forward(what)
			for range 3 {
				if got, err := httpGet("http://" + addr + "/hostname"); err != nil || got != "web" {
					t.Errorf("%s: %q, %v", what, got, err)
				}
			}
		}
	})
}

func testDescribe(t *testing.T, s *space) {
	s.await("events of the pod", time.Minute, func(context.Context) error {
		got := s.kubectl("describe", "pod", "web")
		for _, want := range []string{"Scheduled ", "Pulled ", "Created ", "Started ", "PodReadyToStartContainers", "QoS Class:", "Container ID:  podd://"} {
			if !strings.Contains(got, want) {
				return fmt.Errorf("no %q in:\n%s", want, got)
			}
		}
		return nil
	})
	got := s.kubectl("describe", "node", "kubectl")
	for _, want := range []string{"MemoryPressure", "KubeletHasSufficientMemory", "KubeletHasNoDiskPressure", "KubeletHasSufficientPID", "KubeletReady",
		"Container Runtime Version:  podd://", "Kubelet Version:            v1.36.3", "InternalIP:", "Non-terminated Pods:", " web ", "Starting "} {
		if !strings.Contains(got, want) {
			t.Errorf("describe node: no %q in:\n%s", want, got)
			break
		}
	}
}

func testDebug(t *testing.T, s *space) {
	// A container into a running pod, in the namespaces of one of its containers.
	s.kubectl("debug", "web", "--image="+busybox, "--target=main", "--container=look", "--attach=false", "--profile=general", "--", "sh", "-c", "ps; echo looked; sleep 100000")
	pod := s.awaitPod("web", "the ephemeral container runs", func(p *v1.Pod) bool {
		return len(p.Status.EphemeralContainerStatuses) == 1 && p.Status.EphemeralContainerStatuses[0].State.Running != nil
	})
	if pod.Status.ContainerStatuses[0].RestartCount != 0 || !ready(pod) {
		t.Errorf("the pod was disturbed: %s", tellPod(pod))
	}
	s.await("what the ephemeral container saw", time.Minute, func(context.Context) error {
		if got := s.kubectl("logs", "web", "-c", "look"); !strings.Contains(got, "testserver serve") || !strings.Contains(got, "looked") {
			return fmt.Errorf("%q", got)
		}
		return nil
	})
	// A copy of a pod, and a pod on the node's own namespaces and file system.
	s.kubectl("debug", "web", "--copy-to=copied", "--image="+busybox, "--share-processes", "--attach=false", "--", "sleep", "100000")
	s.awaitReady("copied")
	made := s.kubectl("debug", "node/kubectl", "--image="+busybox, "--attach=false", "--profile=sysadmin", "--", "sh", "-c", "ls /host/proc/1/comm && sleep 100000")
	m := regexp.MustCompile(`pod (node-debugger-\S+) `).FindStringSubmatch(made)
	if m == nil {
		t.Fatalf("debug node: %q", made)
	}
	s.awaitReady(m[1])
	if got := s.kubectl("exec", m[1], "--", "cat", "/host/etc/os-release"); !strings.Contains(got, "NAME=") {
		t.Errorf("the node's files: %q", got)
	}
}

func testPrevious(t *testing.T, s *space) {
	crash := podOf("crash", "sh", "-c", "echo run of $(date +%s%N); echo crashed > /dev/termination-log; exit 3")
	s.create(crash)
	pod := s.awaitPod("crash", "restarted", func(p *v1.Pod) bool {
		return len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].RestartCount == 1 && p.Status.ContainerStatuses[0].State.Waiting != nil
	})
	c := pod.Status.ContainerStatuses[0]
	if c.State.Waiting.Reason != "CrashLoopBackOff" || c.LastTerminationState.Terminated == nil || c.LastTerminationState.Terminated.ExitCode != 3 ||
		c.LastTerminationState.Terminated.Message != "crashed\n" {
		t.Errorf("status: %+v", c)
	}
	if got := s.kubectl("logs", "crash", "-p"); !strings.HasPrefix(got, "run of ") || strings.Count(got, "\n") != 1 {
		t.Errorf("logs -p: %q", got)
	}
	if out, errs, err := s.run(t.Context(), nil, "logs", "counter", "-c", "main", "-p"); err == nil || !strings.Contains(errs, "previous terminated container") {
		t.Errorf("logs -p of one that was never restarted: %v, %q, %q", err, out, errs)
	}
}

// testSessionsEnd has exec, logs -f, attach and port-forward end with their pod.
func testSessionsEnd(t *testing.T, s *space) {
	p := serverOf("short")
	box := podOf("", "sleep", "100000").Spec.Containers[0]
	box.Name = "box"
	p.Spec.Containers = append(p.Spec.Containers, box)
	s.create(p)
	s.awaitReady("short")
	forward, addr := s.forward("pod/short")
	if _, err := httpGet("http://" + addr + "/hostname"); err != nil {
		t.Fatal(err)
	}
	sessions := map[string]*running{
		"exec":    s.background("exec", "short", "-c", "box", "--", "sh", "-c", "echo began; sleep 100000"),
		"logs -f": s.background("logs", "short", "-c", "box", "-f"),
		"attach":  s.background("attach", "short", "-c", "box"),
	}
	s.await("the exec", time.Minute, func(context.Context) error {
		if sessions["exec"].out.String() != "began\n" {
			return fmt.Errorf("%q %q", sessions["exec"].out.String(), sessions["exec"].err.String())
		}
		return nil
	})
	s.kubectl("delete", "pod", "short", "--wait=false")
	for what, r := range sessions {
		_ = s.awaitEnd(r, what) // with an error or without: it ends
	}
	s.awaitGone("short")
	// kubectl itself notices at the next connection that the pod is gone.
	s.await("port-forward ends", time.Minute, func(context.Context) error {
		if got, err := httpGet("http://" + addr + "/hostname"); err == nil {
			return fmt.Errorf("it answers %q", got)
		}
		select {
		case <-forward.done:
			return nil
		default:
			return errors.New("kubectl runs on")
		}
	})
}

// testContainerEnds has sessions with a container end when it does, though its
// pod goes on, and those with the rest of the pod go on. In a pod whose
// containers share their processes the kernel does not end an exec with its
// container.
func testContainerEnds(t *testing.T, s *space) {
	for name, share := range map[string]bool{"apart": false, "shared": true} {
		t.Run(name, func(t *testing.T) {
			s := *s
			s.TB = t
			p := serverOf(name)
			box := podOf("", "sh", "-c", "while [ ! -e /end ]; do sleep 0.1; done").Spec.Containers[0]
			box.Name = "box"
			p.Spec.Containers = append(p.Spec.Containers, box)
			p.Spec.ShareProcessNamespace = &share
			s.create(p)
			s.awaitReady(name)
			forward, addr := s.forward("pod/" + name)
			began := s.background("exec", name, "-c", "box", "--", "sh", "-c", "echo began; sleep 100000")
			logs, attach := s.background("logs", name, "-c", "box", "-f"), s.background("attach", name, "-c", "box")
			s.await("the exec", time.Minute, func(context.Context) error {
				if began.out.String() != "began\n" {
					return fmt.Errorf("%q %q", began.out.String(), began.err.String())
				}
				return nil
			})
			s.kubectl("exec", name, "-c", "box", "--", "touch", "/end")
			if err := s.awaitEnd(began, "exec"); err == nil {
				t.Error("an exec that was killed with its container succeeded")
			}
			_, _ = s.awaitEnd(logs, "logs -f"), s.awaitEnd(attach, "attach") // they end, however
			s.awaitPod(name, "box was restarted, main was not", func(p *v1.Pod) bool {
				restarts := map[string]int32{}
				for _, c := range p.Status.ContainerStatuses {
					restarts[c.Name] = c.RestartCount
				}
				return restarts["box"] == 1 && restarts["main"] == 0 && ready(p)
			})
			if got := s.kubectl("exec", name, "-c", "box", "--", "echo", "again"); got != "again\n" {
				t.Errorf("exec in the new container: %q", got)
			}
			if got, err := httpGet("http://" + addr + "/hostname"); err != nil || got != name {
				t.Errorf("port-forward to the pod that stayed: %q, %v; %s", got, err, forward.err.String())
			}
		})
	}
}
