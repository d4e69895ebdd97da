package cluster

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/podd-runtime/podd/integration/cluster/control"
	"github.com/podd-runtime/podd/integration/node"
)

// space is a namespace of the cluster that a test has for itself, and the
// cluster's clients as its admin has them.
type space struct {
	testing.TB
	*control.Plane
	name string
	// Env is added to kubectl's.
	Env []string
}

// enter makes a namespace, which is deleted with all that is in it when the
// test ends. Nodes must be joined before: what is in it goes first.
func enter(t testing.TB, name string) *space {
	t.Helper()
	p := plane(t)
	s := &space{TB: t, Plane: p, name: name}
	_, err := p.Client.CoreV1().Namespaces().Create(t.Context(), &v1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.leave)
	s.await("the namespace's service account and CA", time.Minute, func(ctx context.Context) error {
		if _, err := p.Client.CoreV1().ConfigMaps(name).Get(ctx, "kube-root-ca.crt", metav1.GetOptions{}); err != nil {
			return err
		}
		_, err := p.Client.CoreV1().ServiceAccounts(name).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	return s
}

func (s *space) leave() {
	ctx, cancel := context.WithTimeout(context.Background(), node.Scale(2*time.Minute))
	defer cancel()
	if s.Failed() {
		s.evidence(ctx)
	}
	for ctx.Err() == nil {
		err := s.Client.CoreV1().Namespaces().Delete(ctx, s.name, metav1.DeleteOptions{})
		if apierrors.IsNotFound(err) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.Errorf("namespace %s is not gone", s.name)
}

// evidence of a failed test.
func (s *space) evidence(ctx context.Context) {
	for _, what := range [][]string{{"get", "nodes,all", "-o", "wide"}, {"get", "events"}} {
		out, _, _ := s.run(ctx, nil, what...)
		s.Logf("kubectl %s:\n%s", strings.Join(what, " "), out)
	}
}

// command is a kubectl of the admin's in the namespace.
func (s *space) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(peers(), "kubectl"), append([]string{
		"--kubeconfig", s.Kubeconfig("admin"), "--namespace", s.name, "--cache-dir", filepath.Join(s.Dir, "kubectl"),
	}, args...)...)
	cmd.Env = append(append(os.Environ(), "NO_PROXY=*"), s.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func (s *space) run(ctx context.Context, in io.Reader, args ...string) (stdout, stderr string, err error) {
	ctx, cancel := context.WithTimeout(ctx, node.Scale(3*time.Minute))
	defer cancel()
	var out, errs bytes.Buffer
	cmd := s.command(ctx, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// kubectl must succeed; it returns its output.
func (s *space) kubectl(args ...string) string {
	s.Helper()
	return s.kubectlIn(nil, args...)
}

func (s *space) kubectlIn(in io.Reader, args ...string) string {
	s.Helper()
	out, errs, err := s.run(s.Context(), in, args...)
	if err != nil {
		s.Fatalf("kubectl %s: %v\n%s%s", strings.Join(args, " "), err, out, errs)
	}
	return out
}

// apply a manifest in the namespace.
func (s *space) apply(manifest string) {
	s.Helper()
	s.kubectlIn(strings.NewReader(manifest), "apply", "-f", "-")
}

// await what may fail for a while; the last error is told when it is too late.
func (s *space) await(what string, timeout time.Duration, try func(ctx context.Context) error) {
	s.Helper()
	last := fmt.Errorf("not tried")
	node.Await(s, what, timeout, func() bool {
		ctx, cancel := context.WithTimeout(s.Context(), 30*time.Second)
		defer cancel()
		last = try(ctx)
		return last == nil
	}, func() string { return last.Error() })
}

// pod of the namespace.
func (s *space) pod(ctx context.Context, name string) (*v1.Pod, error) {
	return s.Client.CoreV1().Pods(s.name).Get(ctx, name, metav1.GetOptions{})
}

// pods with a label.
func (s *space) pods(ctx context.Context, selector string) ([]v1.Pod, error) {
	list, err := s.Client.CoreV1().Pods(s.name).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, err
	}
	return list.Items, nil
}

// awaitReady waits until the pods of these names are ready.
func (s *space) awaitReady(names ...string) {
	s.Helper()
	for _, name := range names {
		s.awaitPod(name, "ready", func(p *v1.Pod) bool { return ready(p) })
	}
}

func (s *space) awaitPod(name, what string, cond func(*v1.Pod) bool) *v1.Pod {
	s.Helper()
	var pod *v1.Pod
	s.await("pod "+name+": "+what, 2*time.Minute, func(ctx context.Context) error {
		var err error
		if pod, err = s.pod(ctx, name); err != nil {
			return err
		}
		if !cond(pod) {
			return fmt.Errorf("it is %s", tellPod(pod))
		}
		return nil
	})
	return pod
}

func (s *space) awaitGone(name string) {
	s.Helper()
	s.await("pod "+name+" gone", 2*time.Minute, func(ctx context.Context) error {
		pod, err := s.pod(ctx, name)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("it is there: %v %w", tellPod(pod), err)
	})
}

func tellPod(p *v1.Pod) string {
	if p == nil {
		return "none"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %q", p.Status.Phase, p.Status.Reason, p.Status.Message)
	for _, c := range p.Status.ContainerStatuses {
		fmt.Fprintf(&b, " %s ready=%v restarts=%d %+v", c.Name, c.Ready, c.RestartCount, c.State)
	}
	return b.String()
}

func ready(p *v1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == v1.PodReady {
			return c.Status == v1.ConditionTrue && p.DeletionTimestamp == nil
		}
	}
	return false
}

// awaitNode until its Ready condition is that.
func (s *space) awaitNode(name string, want v1.ConditionStatus) *v1.Node {
	s.Helper()
	var is *v1.Node
	s.await("node "+name+" Ready="+string(want), 2*time.Minute, func(ctx context.Context) error {
		var err error
		if is, err = s.Client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{}); err != nil {
			return err
		}
		if got := readyOf(is); got != want {
			return fmt.Errorf("it is %q", got)
		}
		for _, taint := range is.Spec.Taints {
			if want == v1.ConditionTrue && taint.Key == v1.TaintNodeNotReady {
				return fmt.Errorf("it has the taint %s", taint.Key)
			}
		}
		return nil
	})
	return is
}

func readyOf(n *v1.Node) v1.ConditionStatus {
	for _, c := range n.Status.Conditions {
		if c.Type == v1.NodeReady {
			return c.Status
		}
	}
	return ""
}

// podOf is a pod with one container that runs a command in busybox.
func podOf(name string, command ...string) *v1.Pod {
	short := int64(1)
	return &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
		Spec: v1.PodSpec{
			TerminationGracePeriodSeconds: &short,
			Containers: []v1.Container{{
				Name: "main", Image: busybox, Command: command,
				Resources: v1.ResourceRequirements{Requests: v1.ResourceList{v1.ResourceCPU: resource.MustParse("1m")}},
			}},
		},
	}
}

// serverOf is a pod that serves HTTP on port 8080.
func serverOf(name string) *v1.Pod {
	p := podOf(name)
	p.Spec.Containers[0].Image, p.Spec.Containers[0].Args = testserver, []string{"serve", ":8080"}
	return p
}

func (s *space) create(pods ...*v1.Pod) {
	s.Helper()
	for _, p := range pods {
		if _, err := s.Client.CoreV1().Pods(s.name).Create(s.Context(), p, metav1.CreateOptions{}); err != nil {
			s.Fatalf("create pod %s: %v", p.Name, err)
		}
	}
}

// as is a client of somebody else's.
func (s *space) as(name, user string, groups ...string) kubernetes.Interface {
	s.Helper()
	c, err := s.ClientOf(name, user, groups...)
	if err != nil {
		s.Fatal(err)
	}
	return c
}

// text is a buffer that may be read while it is written.
type text struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *text) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *text) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// running is a kubectl in the background.
type running struct {
	out, err text
	in       io.WriteCloser
	cmd      *exec.Cmd
	done     chan error
}

// background starts a kubectl that is killed with the test at the latest.
func (s *space) background(args ...string) *running {
	s.Helper()
	r := &running{cmd: s.command(s.Context(), args...), done: make(chan error, 1)}
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.err
	var err error
	if r.in, err = r.cmd.StdinPipe(); err != nil {
		s.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		s.Fatal(err)
	}
	go func() { r.done <- r.cmd.Wait() }()
	s.Cleanup(func() { _ = r.cmd.Cancel() })
	return r
}

// awaitEnd of a kubectl in the background.
func (s *space) awaitEnd(r *running, what string) error {
	s.Helper()
	select {
	case err := <-r.done:
		return err
	case <-time.After(node.Scale(time.Minute)):
		s.Fatalf("%s: kubectl runs on\n%s%s", what, r.out.String(), r.err.String())
		return nil
	}
}
