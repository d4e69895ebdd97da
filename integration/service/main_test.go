// Package service runs podd as users do: systemd's units in the usual places of
// a stock machine. The tests change the machine and reboot it, so they run only
// on one that was made for them (make node-test).
package service

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/podd-runtime/podd/integration/node"
	"github.com/podd-runtime/podd/kubelet/server/api"
)

const (
	runDir    = "/run/podd"
	manifests = "/etc/kubernetes/manifests"
	second    = time.Second
)

// disposable skips the test where podd is not to be installed.
func disposable(t *testing.T) {
	t.Helper()
	if os.Getenv("PODD_TEST_DISPOSABLE") != "1" {
		t.Skip("changes the machine: make node-test runs it on one made for that")
	}
}

// long says that the tests run in their long form.
func long() bool { return os.Getenv("PODD_TEST_ALL") != "" }

// sh runs a command line that must succeed and returns its output.
func sh(t *testing.T, line string) string {
	t.Helper()
	out, err := try(line)
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return out
}

func try(line string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), node.Scale(time.Minute))
	defer cancel()
	out, err := exec.CommandContext(ctx, "sh", "-c", line).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// installed makes podd a running service.
func installed(t *testing.T) {
	t.Helper()
	disposable(t)
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := try("systemctl status --no-pager -n 60 podd podd-shim")
			t.Log(out)
		}
	})
	if _, err := try("systemctl is-active podd"); err != nil {
		sh(t, "dpkg --force-unsafe-io -i /payload/podd.deb")
	}
	have := sh(t, "podd images")
	for _, name := range []string{"testserver", "busybox"} {
		if !strings.Contains(have, "podd.test/"+name) {
			sh(t, "podd load /payload/images/"+name+".tar")
		}
	}
}

var local = &http.Client{Transport: &http.Transport{
	DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return api.Dial(ctx, filepath.Join(runDir, api.SocketName))
	},
	DisableKeepAlives: true,
}}

// read asks podd; false while it does not answer.
func read(path string, into any) bool {
	ctx, cancel := context.WithTimeout(context.Background(), node.Scale(10*second))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://podd"+path, nil)
	if err != nil {
		return false
	}
	resp, err := local.Do(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	return resp.StatusCode == http.StatusOK && json.NewDecoder(resp.Body).Decode(into) == nil
}

// versions of podd and podd-shim that run; of neither while podd does not answer.
func versions() (v api.Versions) {
	read(api.Prefix+"/version", &v)
	return v
}

// pods by the names in their manifests; nil while podd does not answer.
func pods() map[string]*v1.Pod {
	var list v1.PodList
	if !read("/api/v1/pods", &list) {
		return nil
	}
	found := map[string]*v1.Pod{}
	for i := range list.Items {
		p := &list.Items[i]
		found[strings.TrimSuffix(p.Name, "-"+p.Spec.NodeName)] = p
	}
	return found
}

// ready says that the pod is, and that its containers run.
func ready(p *v1.Pod) bool {
	if p == nil || !node.Running(p) {
		return false
	}
	for _, c := range p.Status.Conditions {
		if c.Type == v1.PodReady {
			return c.Status == v1.ConditionTrue
		}
	}
	return false
}

func waitReady(t *testing.T, timeout time.Duration, names ...string) map[string]*v1.Pod {
	t.Helper()
	var all map[string]*v1.Pod
	deadline := time.Now().Add(node.Scale(timeout))
	for {
		all = pods()
		missing := ""
		for _, name := range names {
			if !ready(all[name]) {
				missing = name
			}
		}
		if missing == "" {
			return all
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %s is not ready: %+v", node.Scale(timeout), missing, all[missing])
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// write puts a manifest into the static pods' directory by an atomic rename.
func write(t *testing.T, name, text string) {
	t.Helper()
	tmp := filepath.Join(manifests, "."+name)
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(manifests, name+".yaml")); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := os.Remove(filepath.Join(manifests, name+".yaml")); err != nil {
			t.Fatal(err)
		}
	}
}

// program is a process of a pod.
type program struct {
	pid     int
	started string // clock ticks after boot: a PID may come again
	cgroup  string
}

// programs are the pods' processes whose command line begins with text.
func programs(text string) (found []program) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		b, err := os.ReadFile(filepath.Join(d, "cmdline"))
		if err != nil || !strings.HasPrefix(strings.ReplaceAll(string(b), "\x00", " "), text) {
			continue
		}
		group, err := os.ReadFile(filepath.Join(d, "cgroup"))
		stat, serr := os.ReadFile(filepath.Join(d, "stat"))
		if err != nil || serr != nil || !strings.Contains(string(group), "kubepods") {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(d))
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		found = append(found, program{pid, fields[19], strings.TrimPrefix(strings.TrimSpace(string(group)), "0::")})
	}
	sort.Slice(found, func(i, j int) bool { return found[i].pid < found[j].pid })
	return found
}

// podGroups are the cgroups of pods.
func podGroups() (found []string) {
	filepath.WalkDir("/sys/fs/cgroup", func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.Contains(filepath.Base(path), "kubepods") && strings.Contains(filepath.Base(path), "-pod") {
			found = append(found, path)
		}
		return nil
	})
	return found
}

// nothingLeft waits until no pod has left anything on the machine.
func nothingLeft(t *testing.T) {
	t.Helper()
	var left []string
	deadline := time.Now().Add(node.Scale(30 * second))
	for {
		left = left[:0]
		for name := range pods() {
			left = append(left, "pod "+name)
		}
		left = append(left, podGroups()...)
		for _, p := range programs("/") {
			left = append(left, fmt.Sprintf("process %d in %s", p.pid, p.cgroup))
		}
		for _, line := range []string{"ip -br link show type veth", "systemctl list-units --plain --no-legend '*.scope' | grep -e cri-containerd -e podd-"} {
			if out, _ := try(line); out != "" {
				left = append(left, out)
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// web is a pod that answers on a port of the node.
func web(name string, port int, spec string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 1
%s  containers:
  - name: main
    image: podd.test/testserver:1
    args: [serve, ":8080"]
    resources: {limits: {cpu: 500m, memory: 64Mi}}
    ports: [{containerPort: 8080, hostPort: %d}]
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
`, name, spec, port)
}

// asker asks a pod all the time.
type asker struct {
	answered, lost atomic.Int64
	first          atomic.Pointer[error]
	stop           chan struct{}
	done           chan struct{}
}

func ask(url string) *asker {
	a := &asker{stop: make(chan struct{}), done: make(chan struct{})}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: node.Scale(5 * second)}
	go func() {
		defer close(a.done)
		for {
			select {
			case <-a.stop:
				return
			default:
			}
			err := get(client, url)
			if err != nil {
				a.lost.Add(1)
				a.first.CompareAndSwap(nil, &err)
			} else {
				a.answered.Add(1)
			}
		}
	}()
	return a
}

func get(client *http.Client, url string) error {
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	return nil
}

// end stops asking and fails the test for each request that was lost.
func (a *asker) end(t *testing.T) {
	t.Helper()
	close(a.stop)
	<-a.done
	t.Logf("%d requests answered, %d lost", a.answered.Load(), a.lost.Load())
	if a.lost.Load() > 0 {
		t.Errorf("%d requests lost, the first: %v", a.lost.Load(), *a.first.Load())
	}
	if a.answered.Load() == 0 {
		t.Error("no request answered")
	}
}
