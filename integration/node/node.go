// Package node runs the real bin/podd with directories of its own, as a user
// would, for the integration tests.
package node

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
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/kubelet/server/api"
)

// Node is one podd with everything it keeps below Dir.
type Node struct {
	t         testing.TB
	Dir       string
	Bin       string
	name      string
	ownRunDir bool // the run directory is a mount of this node

	extra  []string
	client *http.Client
	super  *exec.Cmd
	orders io.WriteCloser
	// What the supervisor tells.
	started chan report
	exited  chan report
	left    chan report

	mu      sync.Mutex
	pid     int
	running bool
}

// Bin is where `make build` leaves the programs: $PODD_TEST_BIN or ../bin.
func bin() string {
	if b := os.Getenv("PODD_TEST_BIN"); b != "" {
		return b
	}
	b, err := filepath.Abs("../bin")
	if err != nil {
		panic(err)
	}
	return b
}

var counter atomic.Int64

// slowness is how many times slower than a quiet machine this one is taken to
// be: $PODD_TEST_SLOWNESS, 1 unless set (the emulated machine of integration/vm).
var slowness = sync.OnceValue(func() float64 {
	text := os.Getenv("PODD_TEST_SLOWNESS")
	if text == "" {
		return 1
	}
	f, err := strconv.ParseFloat(text, 64)
	if err != nil || f < 1 {
		panic(fmt.Sprintf("PODD_TEST_SLOWNESS=%q: want a factor of 1 or more", text))
	}
	return f
})

// Scale is how long something may take here that may take d on a quiet machine.
func Scale(d time.Duration) time.Duration { return time.Duration(float64(d) * slowness()) }

// CgroupDriver is what the daemons of the tests are told: $PODD_TEST_CGROUP_DRIVER
// or cgroupfs.
func CgroupDriver() string {
	if d := os.Getenv("PODD_TEST_CGROUP_DRIVER"); d != "" {
		return d
	}
	return "cgroupfs"
}

// New makes a node that is not started yet. It skips the test when pods cannot
// run here.
func New(t testing.TB, flags ...string) *Node {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("pods need root")
	}
	n := &Node{t: t, Bin: bin(), extra: flags, started: make(chan report, 1), exited: make(chan report, 16), left: make(chan report, 1)}
	for _, p := range []string{"podd", "podd-shim", "podd-cli"} {
		if _, err := os.Stat(filepath.Join(n.Bin, p)); err != nil {
			t.Fatalf("%s is missing: run make build first", filepath.Join(n.Bin, p))
		}
	}
	// Not t.TempDir: its removal would follow a mount that was left behind.
	dir, err := os.MkdirTemp("", "podd-it-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil { // as a run directory is: for users of pods' own
		t.Fatal(err)
	}
	n.Dir = dir
	n.name = fmt.Sprintf("podd-test-%d-%d", os.Getpid(), counter.Add(1))
	for _, d := range []string{"manifests", "cni", "certs.d"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	socket := filepath.Join(dir, "run", api.SocketName)
	n.client = &http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return api.Dial(ctx, socket) },
		DisableKeepAlives: true,
	}}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	n.super = exec.Command(self)
	n.super.Env = append(os.Environ(), supervisorEnv+"=1")
	n.super.Stderr = os.Stderr
	n.super.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if n.orders, err = n.super.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	reports, err := n.super.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.super.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for dec := json.NewDecoder(reports); ; {
			var r report
			if dec.Decode(&r) != nil {
				close(n.left)
				return
			}
			switch r.Event {
			case "started":
				n.started <- r
			case "exited":
				n.mu.Lock()
				if r.PID == n.pid {
					n.running = false
				}
				n.mu.Unlock()
				n.exited <- r
			case "left":
				n.left <- r
			}
		}
	}()
	t.Cleanup(n.cleanUp)
	return n
}

// Extra adds flags for the next start.
func (n *Node) Extra(flags ...string) { n.extra = append(n.extra, flags...) }

// Start makes a node and starts it.
func Start(t testing.TB, flags ...string) *Node {
	t.Helper()
	n := New(t, flags...)
	n.Start()
	return n
}

// TinyRunDir puts the run directory on a file system of its own, of so many
// bytes. It must be called before the node is started.
func (n *Node) TinyRunDir(size int) {
	n.t.Helper()
	if err := os.Mkdir(n.RunDir(), 0o711); err != nil {
		n.t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", n.RunDir(), "tmpfs", 0, fmt.Sprintf("mode=0711,size=%d", size)); err != nil {
		n.t.Fatal(err)
	}
	n.ownRunDir = true
}

// FillRunDir takes all the room of the run directory's file system; empty gives
// it back, also that of fillings before.
func (n *Node) FillRunDir() (empty func()) {
	n.t.Helper()
	path := filepath.Join(n.RunDir(), "filler")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	defer f.Close()
	for buf := make([]byte, 64<<10); len(buf) > 0; {
		if _, err := f.Write(buf); errors.Is(err, syscall.ENOSPC) {
			buf = buf[:len(buf)/2]
		} else if err != nil {
			n.t.Fatal(err)
		}
	}
	return func() { _ = os.Remove(path) }
}

// RunDir is what --run-dir says.
func (n *Node) RunDir() string { return filepath.Join(n.Dir, "run") }

// LogDir is what --pod-logs-dir says.
func (n *Node) LogDir() string { return filepath.Join(n.Dir, "log", "pods") }

// Cgroup is what --cgroup-root says.
func (n *Node) Cgroup() string { return "/" + n.name }

// CgroupDir is where that is below the mount points of the hierarchies.
func (n *Node) CgroupDir() string {
	if CgroupDriver() == "systemd" { // a dash would be a level of its own
		return "/" + strings.ReplaceAll(n.name, "-", "_") + ".slice"
	}
	return n.Cgroup()
}

func (n *Node) at(p string) string { return filepath.Join(n.Dir, p) }

// Args are the daemon's flags.
func (n *Node) Args() []string {
	return append([]string{
		"--data-dir", n.at("data"), "--run-dir", n.RunDir(), "--root-dir", n.at("kubelet"),
		"--pod-manifest-path", n.at("manifests"), "--pod-logs-dir", n.LogDir(),
		"--cni-conf-dir", n.at("cni"), "--registry-config-path", n.at("certs.d"),
		"--cgroup-root", n.Cgroup(), "--cgroup-driver", CgroupDriver(), "--hostname-override", "node1",
		"--healthz-port", "0", // tests share the machine
	}, n.extra...)
}

// Start starts the daemon and waits until it answers.
func (n *Node) Start() {
	n.t.Helper()
	n.Launch()
	n.WaitAnswers()
}

// Launch starts the daemon.
func (n *Node) Launch() {
	n.t.Helper()
	pid := n.order(order{Args: append([]string{filepath.Join(n.Bin, "podd"), "run"}, n.Args()...), Log: n.at("podd.log"), Env: os.Environ()})
	n.mu.Lock()
	n.pid, n.running = pid, true
	n.mu.Unlock()
}

// LaunchStopped launches the daemon, which stands still before its first
// instruction until SIGCONT.
func (n *Node) LaunchStopped() {
	n.t.Helper()
	pid := n.stopped(order{Args: append([]string{filepath.Join(n.Bin, "podd"), "run"}, n.Args()...), Log: n.at("podd.log")})
	n.mu.Lock()
	n.pid, n.running = pid, true
	n.mu.Unlock()
}

// LaunchShimStopped does so with podd-shim, in podd's place, and returns its PID.
func (n *Node) LaunchShimStopped() int {
	n.t.Helper()
	return n.stopped(order{Args: []string{filepath.Join(n.Bin, "podd-shim"), "--run-dir", n.RunDir()}, Log: n.at("podd.log"), Untold: true})
}

func (n *Node) stopped(o order) (pid int) {
	n.t.Helper()
	o.Args = append([]string{"/bin/sh", "-c", `kill -STOP $$; exec "$@"`, "sh"}, o.Args...)
	o.Env = os.Environ()
	pid = n.order(o)
	Await(n.t, o.Args[4]+" standing still", 20*time.Second, func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err == nil && strings.Contains(string(b), ") T ")
	})
	return pid
}

// Run runs a program that starts daemons of this node itself, in the daemon's
// place: what these leave behind is reaped. It returns the exit status.
func (n *Node) Run(log string, env []string, args ...string) int {
	n.t.Helper()
	n.order(order{Args: args, Log: log, Env: env})
	r := <-n.exited
	return r.Status
}

func (n *Node) order(o order) (pid int) {
	n.t.Helper()
	b, err := json.Marshal(o)
	if err != nil {
		n.t.Fatal(err)
	}
	if _, err := n.orders.Write(append(b, '\n')); err != nil {
		n.t.Fatal(err)
	}
	r := <-n.started
	if r.Error != "" {
		n.t.Fatalf("start %s: %s", o.Args[0], r.Error)
	}
	return r.PID
}

// WaitAnswers waits until a daemon that was launched answers.
func (n *Node) WaitAnswers() {
	n.t.Helper()
	deadline := time.Now().Add(Scale(30 * time.Second))
	for {
		conn, err := api.Dial(context.Background(), filepath.Join(n.RunDir(), api.SocketName))
		if err == nil {
			conn.Close()
			return
		}
		select {
		case r := <-n.exited:
			n.t.Fatalf("podd ended at its start with %d", r.Status)
		case <-time.After(2 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("podd does not answer: %v", err)
		}
	}
}

// PID of the daemon.
func (n *Node) PID() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pid
}

// ShimPID of the node's podd-shim; 0 when it does not answer.
func (n *Node) ShimPID() int {
	var v api.Versions
	if err := n.Get(api.Prefix+"/version", &v); err != nil || v.Shim == nil {
		return 0
	}
	return v.Shim.PID
}

// Signal sends a signal to the daemon and, if it is one that ends it, waits
// for its end and returns its exit status.
func (n *Node) Signal(sig syscall.Signal) int {
	n.t.Helper()
	if err := syscall.Kill(n.PID(), sig); err != nil {
		n.t.Fatalf("kill podd: %v", err)
	}
	if sig != syscall.SIGKILL && sig != syscall.SIGTERM && sig != syscall.SIGINT {
		return -1
	}
	return n.Ended()
}

// Ended waits for the end of a daemon that was sent a signal, and returns its
// exit status.
func (n *Node) Ended() int {
	n.t.Helper()
	select {
	case r := <-n.exited:
		return r.Status
	case <-time.After(Scale(20 * time.Second)):
		n.t.Fatal("podd does not end")
	}
	return -1
}

// Write puts a manifest into the directory by an atomic rename.
func (n *Node) Write(name, text string) {
	n.t.Helper()
	tmp := n.at("manifests/." + name + ".tmp")
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Rename(tmp, n.at("manifests/"+name)); err != nil {
		n.t.Fatal(err)
	}
}

// Remove takes manifests away.
func (n *Node) Remove(names ...string) {
	n.t.Helper()
	for _, name := range names {
		if err := os.Remove(n.at("manifests/" + name)); err != nil {
			n.t.Fatal(err)
		}
	}
}

// Mirror makes every image come from the plain-HTTP registry at addr.
func (n *Node) Mirror(addr string) {
	n.t.Helper()
	n.Hosts("_default", fmt.Sprintf("[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", "http://"+addr))
}

// Hosts writes certs.d/<host>/hosts.toml.
func (n *Node) Hosts(host, text string) {
	n.t.Helper()
	dir := n.at(filepath.Join("certs.d", host))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

// Get asks the local API.
func (n *Node) Get(path string, into any) error {
	ctx, cancel := context.WithTimeout(context.Background(), Scale(10*time.Second))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://podd"+path, nil)
	if err != nil {
		return err
	}
	resp, err := n.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s: %s", path, resp.Status, b)
	}
	return json.Unmarshal(b, into)
}

// Pods lists the pods of all namespaces.
func (n *Node) Pods() []v1.Pod {
	var list v1.PodList
	if err := n.Get("/api/v1/pods", &list); err != nil {
		n.t.Logf("list pods: %v", err)
	}
	return list.Items
}

// PodName is what a static pod of this node is called.
func PodName(name string) string { return name + "-node1" }

// Pod returns a pod of namespace default by the name in its manifest.
func (n *Node) Pod(name string) (*v1.Pod, error) {
	var p v1.Pod
	if err := n.Get("/api/v1/namespaces/default/pods/"+PodName(name), &p); err != nil {
		return nil, err
	}
	return &p, nil
}

// podWatch is one event of a watch.
type podWatch struct {
	Type   string
	Object v1.Pod
}

// WaitPods follows the pods until cond holds for all there are, at most timeout
// on a quiet machine.
func (n *Node) WaitPods(what string, timeout time.Duration, cond func(pods map[string]*v1.Pod) bool) map[string]*v1.Pod {
	n.t.Helper()
	timeout = Scale(timeout)
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	pods := map[string]*v1.Pod{}
	var last error
	for ctx.Err() == nil {
		last = func() error {
			var list v1.PodList
			if err := n.Get("/api/v1/pods", &list); err != nil {
				return err
			}
			clear(pods)
			for i := range list.Items {
				p := &list.Items[i]
				pods[p.Namespace+"/"+p.Name] = p
			}
			if cond(pods) {
				return nil
			}
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://podd/api/v1/pods?watch=true&resourceVersion="+list.ResourceVersion, nil)
			if err != nil {
				return err
			}
			resp, err := n.client.Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			for dec := json.NewDecoder(resp.Body); ; {
				var ev podWatch
				if err := dec.Decode(&ev); err != nil {
					return err
				}
				if ev.Type == "ERROR" { // too much has happened meanwhile
					return errors.New("the watch broke off")
				}
				key := ev.Object.Namespace + "/" + ev.Object.Name
				if ev.Type == "DELETED" {
					delete(pods, key)
				} else {
					pods[key] = &ev.Object
				}
				if cond(pods) {
					return nil
				}
			}
		}()
		if last == nil {
			return pods
		}
		select {
		case <-time.After(5 * time.Millisecond): // the daemon is being restarted
		case <-ctx.Done():
		}
	}
	n.t.Fatalf("after %v: not %s: %v\npods: %s", timeout, what, last, describe(pods))
	return nil
}

func describe(pods map[string]*v1.Pod) string {
	var b strings.Builder
	for key, p := range pods {
		fmt.Fprintf(&b, "\n  %s %s %s %s", key, p.UID, p.Status.Phase, p.Status.Message)
		for _, c := range append(append([]v1.ContainerStatus{}, p.Status.InitContainerStatuses...), p.Status.ContainerStatuses...) {
			st, _ := json.Marshal(c.State)
			last, _ := json.Marshal(c.LastTerminationState)
			fmt.Fprintf(&b, "\n    %s restarts=%d %s last=%s", c.Name, c.RestartCount, st, last)
		}
	}
	return b.String()
}

// WaitPod follows one pod until cond holds.
func (n *Node) WaitPod(name, what string, timeout time.Duration, cond func(*v1.Pod) bool) *v1.Pod {
	n.t.Helper()
	key := "default/" + PodName(name)
	pods := n.WaitPods(name+" "+what, timeout, func(pods map[string]*v1.Pod) bool {
		p, ok := pods[key]
		return ok && cond(p)
	})
	return pods[key]
}

// Running says that every container of the pod runs.
func Running(p *v1.Pod) bool {
	if p.Status.Phase != v1.PodRunning || len(p.Status.ContainerStatuses) != len(p.Spec.Containers) {
		return false
	}
	for _, c := range p.Status.ContainerStatuses {
		if c.State.Running == nil {
			return false
		}
	}
	return true
}

// WaitRunning waits until the pods run.
func (n *Node) WaitRunning(names ...string) {
	n.t.Helper()
	for _, name := range names {
		n.WaitPod(name, "running", 60*time.Second, Running)
	}
}

// WaitGone waits until there is no pod left.
func (n *Node) WaitGone(timeout time.Duration) {
	n.t.Helper()
	n.WaitPods("all gone", timeout, func(pods map[string]*v1.Pod) bool { return len(pods) == 0 })
}

// Podd runs a command line of bin/podd against this node.
func (n *Node) Podd(args ...string) (stdout, stderr string, err error) {
	return n.PoddIn(nil, args...)
}

// PoddIn does so with an input.
func (n *Node) PoddIn(in io.Reader, args ...string) (stdout, stderr string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), Scale(2*time.Minute))
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(n.Bin, "podd"), args...)
	cmd.Env = append(os.Environ(), "PODD_RUN_DIR="+n.RunDir(), "NO_PROXY=*")
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &out, &errOut
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

// OK runs a command line that must succeed and returns its output.
func (n *Node) OK(args ...string) string {
	n.t.Helper()
	out, errOut, err := n.Podd(args...)
	if err != nil {
		n.t.Fatalf("podd %s: %v\n%s%s", strings.Join(args, " "), err, out, errOut)
	}
	return out
}

// Processes are the PIDs of the node's containers whose command line holds text.
func (n *Node) Processes(text string) map[int]bool {
	pids := map[int]bool{}
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range found {
		dir := filepath.Dir(f)
		b, err := os.ReadFile(f)
		if err != nil || !strings.Contains(strings.ReplaceAll(string(b), "\x00", " "), text) {
			continue
		}
		// Other nodes may run on this machine at the same time.
		if c, err := os.ReadFile(filepath.Join(dir, "cgroup")); err != nil || !strings.Contains(string(c), n.CgroupDir()+"/") {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil {
			pids[pid] = true
		}
	}
	return pids
}

// Await looks until cond holds, at most timeout on a quiet machine. last tells
// what was seen instead.
func Await(t testing.TB, what string, timeout time.Duration, cond func() bool, last ...func() string) {
	t.Helper()
	timeout = Scale(timeout)
	deadline := time.Now().Add(timeout)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		if time.Now().After(deadline) {
			seen := ""
			for _, f := range last {
				seen += ": " + f()
			}
			t.Fatalf("after %v: not %s%s", timeout, what, seen)
		}
		<-tick.C
	}
}

// cleanUp ends everything and fails the test when something had been left.
func (n *Node) cleanUp() {
	logged := n.t.Failed()
	tail := func() {
		log, _ := os.ReadFile(n.at("podd.log"))
		lines := bytes.Split(log, []byte("\n"))
		n.t.Logf("last of podd's log:\n%s", bytes.Join(lines[max(0, len(lines)-80):], []byte("\n")))
	}
	if logged {
		tail()
	}
	n.mu.Lock()
	running, pid := n.running, n.pid
	n.mu.Unlock()
	shim := 0
	if running {
		// As a user takes a node down: no manifests, then no pods, then no daemon.
		found, _ := filepath.Glob(n.at("manifests/*"))
		for _, f := range found {
			os.Remove(f)
		}
		deadline := time.Now().Add(Scale(20 * time.Second))
		gone := func() bool { // no answer does not mean no pods
			var list v1.PodList
			return n.Get("/api/v1/pods", &list) == nil && len(list.Items) == 0
		}
		for !gone() && time.Now().Before(deadline) {
			time.Sleep(10 * time.Millisecond)
		}
		shim = n.ShimPID()
		syscall.Kill(pid, syscall.SIGTERM)
		select {
		case <-n.exited:
		case <-time.After(Scale(10 * time.Second)):
			n.t.Errorf("podd does not end on SIGTERM")
		}
	}
	if shim > 0 { // it outlives podd on purpose
		syscall.Kill(shim, syscall.SIGKILL)
	}
	n.orders.Close()
	r := <-n.left
	var left []string
	for _, l := range r.Left {
		if !strings.Contains(l, "podd-shim") {
			left = append(left, l)
		}
	}
	if len(left) > 0 && !n.t.Failed() {
		n.t.Errorf("processes left behind:\n%s", strings.Join(left, "\n"))
	}
	if n.t.Failed() && !logged {
		tail()
	}
	n.super.Wait()
	if n.ownRunDir {
		if err := syscall.Unmount(n.RunDir(), 0); err != nil && !n.t.Failed() {
			n.t.Errorf("the run directory is held: %v", err)
		}
	}
	if m := mountsBelow("/proc/self/mountinfo", n.Dir); len(m) > 0 {
		if !n.t.Failed() {
			n.t.Errorf("mounts left behind:\n%s", strings.Join(m, "\n"))
		}
		for i := len(m) - 1; i >= 0; i-- {
			syscall.Unmount(m[i], syscall.MNT_DETACH)
		}
	}
	removeCgroups(n.CgroupDir())
	if len(mountsBelow("/proc/self/mountinfo", n.Dir)) == 0 {
		if err := os.RemoveAll(n.Dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			n.t.Logf("remove %s: %v", n.Dir, err)
		}
	}
}
