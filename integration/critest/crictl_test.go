package critest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/console"

	"github.com/podd-runtime/podd/integration/node"
)

const (
	busyboxImage = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
	nginxImage   = "registry.k8s.io/e2e-test-images/nginx:1.14-2"
)

// crictl of a node.
type crictl struct {
	t *testing.T
	n *node.Node
}

func (c crictl) command(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	c.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, filepath.Join(peers(), "crictl"), append([]string{"--runtime-endpoint", socket(c.n), "--timeout", "30s"}, args...)...)
	cmd.Env = append(os.Environ(), "NO_PROXY=*")
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// try runs a command line and returns its output.
func (c crictl) try(stdin string, args ...string) (stdout, stderr string, err error) {
	cmd := c.command(args...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errOut
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

// ok runs a command line that must succeed.
func (c crictl) ok(args ...string) string {
	c.t.Helper()
	out, errOut, err := c.try("", args...)
	if err != nil {
		c.t.Fatalf("crictl %s: %v\n%s%s", strings.Join(args, " "), err, out, errOut)
	}
	return strings.TrimSpace(out)
}

// json runs a command line that prints an object.
func (c crictl) json(into any, args ...string) {
	c.t.Helper()
	out := c.ok(args...)
	if err := json.Unmarshal([]byte(out), into); err != nil {
		c.t.Fatalf("crictl %s: %v in %s", strings.Join(args, " "), err, out)
	}
}

// file writes a configuration.
func (c crictl) file(name, text string) string {
	c.t.Helper()
	p := filepath.Join(c.n.Dir, name)
	if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
		c.t.Fatal(err)
	}
	return p
}

// TestCrictl holds what crictl shows of pods and containers made with it.
func TestCrictl(t *testing.T) {
	if !full() {
		t.Skip("builds crictl: set PODD_TEST_ALL=1")
	}
	n := node.New(t)
	prepared(t)
	all, err := builder().Critest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n.Mirror(serve(t, all).Addr)
	n.Start()
	c := crictl{t, n}

	var version struct{ RuntimeName, RuntimeApiVersion string }
	for line := range strings.Lines(c.ok("version")) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), ":")
		switch k {
		case "RuntimeName":
			version.RuntimeName = strings.TrimSpace(v)
		case "RuntimeApiVersion":
			version.RuntimeApiVersion = strings.TrimSpace(v)
		}
	}
	if version.RuntimeName != "podd" || version.RuntimeApiVersion != "v1" {
		t.Errorf("version: %+v", version)
	}
	var info struct {
		Status struct {
			Conditions []struct {
				Type   string
				Status bool
			}
		}
	}
	c.json(&info, "info")
	ready := 0
	for _, cond := range info.Status.Conditions {
		if (cond.Type == "RuntimeReady" || cond.Type == "NetworkReady") && cond.Status {
			ready++
		}
	}
	if ready != 2 {
		t.Errorf("info: conditions %+v", info.Status.Conditions)
	}
	if out := c.ok("runtime-config"); !strings.Contains(strings.ToLower(out), "cgroup") {
		t.Errorf("runtime-config: %s", out)
	}

	images := c.images()
	events := c.events()
	pod := c.ok("runp", c.file("pod.json", fmt.Sprintf(`{
		"metadata": {"name": "web", "namespace": "crictl", "uid": "web-uid"}, "labels": {"app": "web"},
		"log_directory": %q, "linux": {"cgroup_parent": %q}}`, filepath.Join(n.Dir, "log"), n.Cgroup())))
	podFile := filepath.Join(n.Dir, "pod.json")
	create := func(name, image, rest string) string {
		t.Helper()
		id := c.ok("create", pod, c.file(name+".json", fmt.Sprintf(`{"metadata": {"name": %q}, "image": {"image": %q}, "log_path": "%s.log", %s}`, name, image, name, rest)), podFile)
		if out := c.ok("start", id); out != id {
			t.Errorf("start %s: %s", id, out)
		}
		return id
	}
	web := create("web", nginxImage, `"labels": {"tier": "front"}, "linux": {"resources": {"memory_limit_in_bytes": 67108864}}`)
	cat := create("cat", busyboxImage, `"command": ["cat"], "stdin": true, "stdin_once": true`)
	count := create("count", busyboxImage, `"command": ["sh", "-c", "echo one; echo two >&2; echo three; exec sleep 1000"]`)

	t.Run("pods and ps", func(t *testing.T) { crictl{t, n}.lists(pod, web, images) })
	t.Run("inspect", func(t *testing.T) { crictl{t, n}.inspects(pod, web) })
	t.Run("exec", func(t *testing.T) { crictl{t, n}.execs(count) })
	t.Run("terminal", func(t *testing.T) { crictl{t, n}.terminal(count) })
	t.Run("logs", func(t *testing.T) { crictl{t, n}.logs(count) })
	talk := create("talk", busyboxImage, `"command": ["sh", "-c", "echo said; read line; echo heard $line"], "stdin": true, "stdin_once": true`)
	t.Run("logs -f", func(t *testing.T) { crictl{t, n}.follow(talk) })
	t.Run("attach", func(t *testing.T) { crictl{t, n}.attach(cat) })
	for _, transport := range []string{"spdy", "websocket"} {
		t.Run("port-forward "+transport, func(t *testing.T) { crictl{t, n}.portForward(pod, transport) })
	}
	t.Run("stats", func(t *testing.T) { crictl{t, n}.stats(pod, web) })
	t.Run("update", func(t *testing.T) { crictl{t, n}.update(web) })
	if _, errOut, err := c.try("", "checkpoint", "--export", filepath.Join(n.Dir, "checkpoint.tar"), web); err == nil || !strings.Contains(errOut, "Unimplemented") {
		t.Errorf("checkpoint: %v, %s; want Unimplemented with the reason", err, errOut)
	}
	// As a user takes them away: one by one, then the rest by force.
	if out := c.ok("stop", web); out != web {
		t.Errorf("stop: %s", out)
	}
	if out := c.ok("ps", "-a", "--id", web, "--state", "exited", "-q"); out != web {
		t.Errorf("a stopped container is not listed as exited: %q", out)
	}
	if out := c.ok("rm", web); out != web {
		t.Errorf("rm: %s", out)
	}
	if out := c.ok("rmp", "-f", pod); !strings.Contains(out, pod) {
		t.Errorf("rmp -f: %s", out)
	}
	if out := c.ok("pods", "-q") + c.ok("ps", "-aq"); out != "" {
		t.Errorf("left after rmp -f: %s", out)
	}
	want := []string{"CONTAINER_CREATED_EVENT", "CONTAINER_STARTED_EVENT", "CONTAINER_STOPPED_EVENT", "CONTAINER_DELETED_EVENT"}
	events.wait(t, web, want)
	events.wait(t, count, want)
	if out := c.ok("rmi", nginxImage); !strings.Contains(out, nginxImage) {
		t.Errorf("rmi: %s", out)
	}
	if out := c.ok("images", "-q", nginxImage); out != "" {
		t.Errorf("the removed image is listed: %s", out)
	}
}

// images pulls two and returns their ids by name.
func (c crictl) images() map[string]string {
	ids := map[string]string{}
	for _, name := range []string{nginxImage, busyboxImage} {
		if out := c.ok("pull", name); !strings.Contains(out, "Image is up to date for sha256:") {
			c.t.Errorf("pull %s: %s", name, out)
		}
		var st struct {
			Status struct {
				ID                    string
				RepoTags, RepoDigests []string
				Size                  string
			}
		}
		c.json(&st, "inspecti", name)
		if !strings.HasPrefix(st.Status.ID, "sha256:") || fmt.Sprint(st.Status.RepoTags) != "["+name+"]" || len(st.Status.RepoDigests) != 1 || st.Status.Size == "0" {
			c.t.Errorf("inspecti %s: %+v", name, st)
		}
		ids[name] = st.Status.ID
	}
	if out := c.ok("images"); !strings.Contains(out, "e2e-test-images/nginx") || !strings.Contains(out, "e2e-test-images/busybox") {
		c.t.Errorf("images:\n%s", out)
	}
	var fs struct {
		Status struct {
			ImageFilesystems []struct {
				FsID      struct{ Mountpoint string }
				UsedBytes struct{ Value string }
			}
		}
	}
	c.json(&fs, "imagefsinfo")
	if l := fs.Status.ImageFilesystems; len(l) != 1 || !strings.HasPrefix(l[0].FsID.Mountpoint, c.n.Dir) || l[0].UsedBytes.Value == "" {
		c.t.Errorf("imagefsinfo: %+v", fs)
	}
	return ids
}

func (c crictl) lists(pod, web string, images map[string]string) {
	var pods struct {
		Items []struct {
			ID, State string
			Metadata  struct{ Name, Namespace, UID string }
			Labels    map[string]string
		}
	}
	c.json(&pods, "pods", "--label", "app=web", "-o", "json")
	if l := pods.Items; len(l) != 1 || l[0].ID != pod || l[0].State != "SANDBOX_READY" || l[0].Metadata.Name != "web" || l[0].Metadata.Namespace != "crictl" || l[0].Labels["app"] != "web" {
		c.t.Errorf("pods: %+v", l)
	}
	var ps struct {
		Containers []struct {
			ID, PodSandboxID, State, ImageID string
			Metadata                         struct{ Name string }
		}
	}
	c.json(&ps, "ps", "--pod", pod, "-o", "json")
	if len(ps.Containers) != 3 {
		c.t.Errorf("ps: %+v", ps)
	}
	for _, l := range ps.Containers {
		if l.State != "CONTAINER_RUNNING" || l.PodSandboxID != pod || (l.ID == web && l.ImageID != images[nginxImage]) {
			c.t.Errorf("ps: %+v", l)
		}
	}
	if out := c.ok("ps", "--label", "tier=front", "-q"); out != web {
		c.t.Errorf("ps by label: %s", out)
	}
	if out := c.ok("ps"); !strings.Contains(out, "Running") || !strings.Contains(out, web[:13]) {
		c.t.Errorf("ps:\n%s", out)
	}
}

func (c crictl) inspects(pod, web string) {
	var in struct {
		Status struct {
			State, StartedAt, LogPath string
			Image                     struct{ Image string }
			Resources                 struct {
				Linux struct{ MemoryLimitInBytes string }
			}
		}
		Info struct{ Pid int }
	}
	c.json(&in, "inspect", web)
	if in.Status.State != "CONTAINER_RUNNING" || in.Status.LogPath != filepath.Join(c.n.Dir, "log", "web.log") ||
		in.Status.Resources.Linux.MemoryLimitInBytes != "67108864" {
		c.t.Errorf("inspect: %+v", in)
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", in.Info.Pid)); err != nil || !strings.Contains(string(b), "nginx: master process") {
		c.t.Errorf("inspect says pid %d: %q %v", in.Info.Pid, b, err)
	}
	var inp struct {
		Status struct {
			State   string
			Network struct{ IP string }
		}
	}
	c.json(&inp, "inspectp", pod)
	if inp.Status.State != "SANDBOX_READY" || page("http://"+inp.Status.Network.IP) == "" {
		c.t.Errorf("inspectp: %+v; no page at that address", inp)
	}
}

func (c crictl) execs(id string) {
	for _, how := range [][]string{{"-s"}, {"--transport", "spdy"}, {"--transport", "websocket"}} {
		args := append(append([]string{"exec"}, how...), id, "sh", "-c")
		out, errOut, err := c.try("", append(args, "echo out; echo err >&2")...)
		if how[0] == "-s" { // both go to its output, a line feed after each
			out, errOut, _ = strings.Cut(out, "\n\n")
			out += "\n"
		}
		if err != nil || out != "out\n" || !strings.Contains(errOut, "err\n") {
			c.t.Errorf("exec %v: %q, %q, %v", how, out, errOut, err)
		}
		_, errOut, err = c.try("", append(args, "exit 7")...)
		if err == nil || !strings.Contains(errOut+err.Error(), "7") {
			c.t.Errorf("exec %v of exit 7: %v, %s", how, err, errOut)
		}
	}
	in := strings.Repeat("podd ", 1<<18) // far more than any buffer on the way
	out, errOut, err := c.try(in, "exec", "-i", id, "sh", "-c", "cat; echo end")
	if err != nil || out != in+"end\n" {
		c.t.Errorf("exec -i of %d bytes: %d back, %s, %v", len(in), len(out), errOut, err)
	}
}

// terminal of a container has the size of the user's window, and follows it.
func (c crictl) terminal(id string) {
	window, name, err := console.NewPty()
	if err != nil {
		c.t.Fatal(err)
	}
	defer window.Close()
	tty, err := os.OpenFile(name, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	defer tty.Close()
	resize := func(h, w uint16) {
		if err := window.Resize(console.WinSize{Height: h, Width: w}); err != nil {
			c.t.Fatal(err)
		}
	}
	resize(33, 91)
	cmd := c.command("exec", "-it", id, "sh")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	tty.Close()
	var mu sync.Mutex
	var screen strings.Builder
	read := make(chan struct{})
	go func() {
		defer close(read)
		for b := make([]byte, 4096); ; {
			n, err := window.Read(b) // fails when crictl has gone
			mu.Lock()
			screen.Write(b[:n])
			mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	says := func(what string) bool {
		// The size comes after the start: ask until it is there.
		if _, err := window.Write([]byte("stty size\n")); err != nil {
			c.t.Fatal(err)
		}
		mu.Lock()
		defer mu.Unlock()
		return strings.Contains(screen.String(), what)
	}
	node.Await(c.t, "size of the window, 33 91", 20*time.Second, func() bool { return says("\n33 91\r") })
	resize(44, 120)
	node.Await(c.t, "size of the larger window, 44 120", 20*time.Second, func() bool { return says("\n44 120\r") })
	if _, err := window.Write([]byte("exit\n")); err != nil {
		c.t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		c.t.Errorf("exec -it: %v\n%s", err, &screen)
	}
	<-read
}

// follow a log from its first line to the end of its container.
func (c crictl) follow(id string) {
	cmd := c.command("logs", "-f", id)
	out, err := cmd.StdoutPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	var lines []string
	for s := bufio.NewScanner(out); s.Scan(); {
		if lines = append(lines, s.Text()); s.Text() == "said" {
			if _, errOut, err := c.try("well\n", "attach", "-i", id); err != nil {
				c.t.Errorf("attach: %v, %s", err, errOut)
			}
		}
	}
	if err := cmd.Wait(); err != nil || fmt.Sprint(lines) != "[said heard well]" {
		c.t.Errorf("logs -f: %q, %v", lines, err)
	}
}

func (c crictl) logs(id string) {
	out, errOut, err := c.try("", "logs", id)
	if err != nil || out != "one\nthree\n" || !strings.Contains(errOut, "two\n") {
		c.t.Errorf("logs: %q, %q, %v", out, errOut, err)
	}
	// Which of two streams is written last is not known, only each one's order.
	if out, errOut, err := c.try("", "logs", "--tail", "1", id); err != nil || (out != "three\n") == (!strings.Contains(errOut, "two\n")) {
		c.t.Errorf("logs --tail 1: %q, %q, %v", out, errOut, err)
	}
}

func (c crictl) attach(id string) {
	out, errOut, err := c.try("through the cat\n", "attach", "-i", id)
	if err != nil || !strings.Contains(out, "through the cat\n") {
		c.t.Errorf("attach: %q, %q, %v", out, errOut, err)
	}
	// Its input was to be open once.
	node.Await(c.t, "ended with its input", 10*time.Second, func() bool { return c.ok("ps", "-aq", "--id", id, "--state", "exited") == id })
}

var forwarding = regexp.MustCompile(`Forwarding from 127\.0\.0\.1:([0-9]+) -> 80`)

func (c crictl) portForward(pod, transport string) {
	cmd := c.command("port-forward", "--transport", transport, pod, ":80")
	out, err := cmd.StdoutPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	defer func() {
		cmd.Process.Signal(syscall.SIGINT)
		io.Copy(io.Discard, out)
		cmd.Wait()
	}()
	for s := bufio.NewScanner(out); s.Scan(); {
		if m := forwarding.FindStringSubmatch(s.Text()); m != nil {
			for range 3 {
				if got := page("http://127.0.0.1:" + m[1]); !strings.Contains(got, "It works") {
					c.t.Errorf("page through the forwarded port: %q", got)
				}
			}
			return
		}
	}
	c.t.Error("crictl port-forward ended without a port")
}

func (c crictl) stats(pod, web string) {
	type value struct{ Value string }
	var st struct {
		Stats []struct {
			Attributes struct{ ID string }
			CPU        struct{ UsageCoreNanoSeconds value }
			Memory     struct{ WorkingSetBytes value }
			// Of a container that has written nothing 0 is right; absent is not.
			WritableLayer *struct{ UsedBytes *value }
		}
	}
	c.json(&st, "stats", "--id", web, "-o", "json")
	if l := st.Stats; len(l) != 1 || l[0].Attributes.ID != web || number(l[0].CPU.UsageCoreNanoSeconds.Value) <= 0 ||
		number(l[0].Memory.WorkingSetBytes.Value) <= 0 || l[0].WritableLayer == nil || l[0].WritableLayer.UsedBytes == nil {
		c.t.Errorf("stats: %s", c.ok("stats", "--id", web, "-o", "json"))
	}
	var sp struct {
		Stats []struct {
			Attributes struct{ ID string }
			Linux      struct {
				CPU        struct{ UsageCoreNanoSeconds value }
				Memory     struct{ WorkingSetBytes value }
				Network    struct{ DefaultInterface struct{ RxBytes value } }
				Process    struct{ ProcessCount value }
				Containers []struct{ Attributes struct{ ID string } }
			}
		}
	}
	c.json(&sp, "statsp", "--id", pod, "-o", "json")
	if l := sp.Stats; len(l) != 1 || l[0].Attributes.ID != pod || number(l[0].Linux.CPU.UsageCoreNanoSeconds.Value) <= 0 ||
		number(l[0].Linux.Memory.WorkingSetBytes.Value) <= 0 || number(l[0].Linux.Network.DefaultInterface.RxBytes.Value) <= 0 ||
		number(l[0].Linux.Process.ProcessCount.Value) < 2 || len(l[0].Linux.Containers) < 2 {
		c.t.Errorf("statsp: %s", c.ok("statsp", "--id", pod, "-o", "json"))
	}
	var descs struct {
		Descriptors []struct{ Name, Help string }
	}
	c.json(&descs, "metricdescs")
	var metrics struct {
		PodMetrics []struct {
			PodSandboxID     string
			ContainerMetrics []struct {
				ContainerID string
				Metrics     []struct{ Name string }
			}
		}
	}
	c.json(&metrics, "metricsp")
	described := map[string]bool{}
	for _, d := range descs.Descriptors {
		described[d.Name] = d.Help != ""
	}
	found := 0
	for _, p := range metrics.PodMetrics {
		for _, m := range p.ContainerMetrics {
			for _, m := range m.Metrics {
				if !described[m.Name] {
					c.t.Errorf("metricsp: %s is not among metricdescs", m.Name)
				}
				found++
			}
		}
	}
	if found == 0 || len(metrics.PodMetrics) != 1 || metrics.PodMetrics[0].PodSandboxID != pod {
		c.t.Errorf("metricsp: %d metrics, %s", found, c.ok("metricsp"))
	}
	if out := c.ok("stats"); !strings.Contains(out, web[:13]) {
		c.t.Errorf("stats:\n%s", out)
	}
}

func number(s string) (n int64) {
	fmt.Sscan(s, &n)
	return n
}

func (c crictl) update(web string) {
	c.ok("update", "--memory", "100663296", "--cpu-share", "512", "--cpuset-cpus", "0", web)
	var in struct {
		Status struct {
			Resources struct {
				Linux struct{ MemoryLimitInBytes, CPUShares, CpusetCpus string }
			}
		}
	}
	c.json(&in, "inspect", web)
	if r := in.Status.Resources.Linux; r.MemoryLimitInBytes != "100663296" || r.CPUShares != "512" || r.CpusetCpus != "0" {
		c.t.Errorf("inspect after update: %+v", r)
	}
	if out := c.ok("exec", web, "cat", "/proc/self/status"); !strings.Contains(out, "Cpus_allowed_list:\t0\n") {
		c.t.Errorf("status of a process after update: %s", out)
	}
	if _, errOut, err := c.try("", "update", "--memory", "-5", web); err == nil || !strings.Contains(errOut, "InvalidArgument") || !strings.Contains(errOut, "memory_limit_in_bytes") {
		c.t.Errorf("update to a negative limit: %v, %s", err, errOut)
	}
}

// page is what a URL serves; "" when nothing does.
func page(url string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return ""
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return ""
	}
	return string(b)
}

// eventLog is what crictl events has printed.
type eventLog struct {
	mu   sync.Mutex
	seen map[string][]string // container id → types, in order
}

// events starts crictl events, to be ended with the test.
func (c crictl) events() *eventLog {
	l := &eventLog{seen: map[string][]string{}}
	cmd := c.command("events")
	out, err := cmd.StdoutPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for dec := json.NewDecoder(out); ; {
			var e struct{ ContainerID, ContainerEventType string }
			if err := dec.Decode(&e); err != nil {
				if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrClosed) {
					c.t.Logf("crictl events: %v", err)
				}
				return
			}
			l.mu.Lock()
			l.seen[e.ContainerID] = append(l.seen[e.ContainerID], e.ContainerEventType)
			l.mu.Unlock()
		}
	}()
	c.t.Cleanup(func() {
		cmd.Process.Kill()
		<-done
		cmd.Wait()
	})
	// The subscription has no answer of its own: a pod's events tell that it is there.
	probe := c.file("probe.json", `{"metadata": {"name": "probe", "namespace": "crictl", "uid": "probe"}}`)
	node.Await(c.t, "subscribed to events", 20*time.Second, func() bool {
		id := c.ok("runp", probe)
		c.ok("rmp", "-f", id)
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.seen) > 0
	})
	return l
}

// wait for exactly these events of a container.
func (l *eventLog) wait(t *testing.T, id string, want []string) {
	t.Helper()
	var got []string
	node.Await(t, "told of the container's end", 10*time.Second, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		got = append([]string{}, l.seen[id]...)
		return len(got) >= len(want)
	})
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("events of %s: %v, want %v", id, got, want)
	}
}
