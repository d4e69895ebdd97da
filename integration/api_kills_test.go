package integration

import (
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podd-runtime/podd/integration/node"
)

// planeNode starts a node of the plane's cluster.
func planeNode(t *testing.T, p *plane) *node.Node {
	t.Helper()
	n := node.New(t)
	mirror(t, n, "testserver")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.Certificate().Raw})
	kubeconfig := filepath.Join(n.Dir, "kubeconfig")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c, user: u}}]\n"+
		"users: [{name: u, user: {token: t}}]\nclusters: [{name: c, cluster: {server: %q, certificate-authority-data: %s}}]\n",
		p.URL, base64.StdEncoding.EncodeToString(ca))
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	n.Extra("--kubeconfig", kubeconfig)
	n.Start()
	return n
}

// apiPod is a pod as an apiserver has it, with the defaults filled in.
func apiPod(name, nodeName string) *v1.Pod {
	grace, no := int64(1), false
	return &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Generation: 1, Labels: map[string]string{"version": "0"}},
		Spec: v1.PodSpec{
			NodeName: nodeName, RestartPolicy: v1.RestartPolicyAlways, DNSPolicy: v1.DNSDefault, TerminationGracePeriodSeconds: &grace,
			EnableServiceLinks: &no, AutomountServiceAccountToken: &no, SecurityContext: &v1.PodSecurityContext{}, SchedulerName: "default-scheduler",
			Containers: []v1.Container{{
				Name: "main", Image: testserver, Args: []string{"pause"}, ImagePullPolicy: v1.PullIfNotPresent,
				TerminationMessagePath: "/dev/termination-log", TerminationMessagePolicy: v1.TerminationMessageReadFile,
			}},
		},
		Status: v1.PodStatus{Phase: v1.PodPending, QOSClass: v1.PodQOSBestEffort},
	}
}

// controller does to pods what users and controllers do.
type controller struct {
	*plane
	names int
	done  map[string]int
}

// act does one thing to one pod, all drawn at random.
func (c *controller) act() {
	c.mu.Lock()
	defer c.mu.Unlock()
	name := fmt.Sprintf("p%d", c.die.IntN(c.names))
	was := c.pod(name)
	die := c.die.IntN(10)
	count := func(what string) { c.done[what]++ }
	if was == nil {
		count("made")
		where := "node1"
		if die < 3 {
			where = ""
		}
		c.put("pods", apiPod(name, where))
		return
	}
	is := was.DeepCopy()
	switch {
	case is.Spec.NodeName == "" && die < 8:
		count("bound")
		is.Spec.NodeName = "node1"
	case is.Spec.NodeName == "":
		count("deleted unbound")
		c.drop("pods", was)
		return
	case is.DeletionTimestamp != nil && die < 1, is.DeletionTimestamp == nil && die < 2:
		count("forced")
		c.drop("pods", was)
		return
	case is.DeletionTimestamp == nil && die < 6:
		count("deleted")
		markDeleted(is)
	default:
		count("labelled")
		n, _ := strconv.Atoi(is.Labels["version"])
		is.Labels["version"] = fmt.Sprint(n + 1)
	}
	c.put("pods", is)
}

func markDeleted(pod *v1.Pod) {
	now, grace := metav1.NewTime(time.Now().Add(time.Second)).Rfc3339Copy(), int64(1)
	pod.DeletionTimestamp, pod.DeletionGracePeriodSeconds, pod.Generation = &now, &grace, pod.Generation+1
}

// work until stop is closed.
func (c *controller) work(stop <-chan struct{}) {
	for {
		c.mu.Lock()
		pause := time.Duration(c.die.IntN(60)) * time.Millisecond
		c.mu.Unlock()
		select {
		case <-stop:
			return
		case <-time.After(pause):
			c.act()
		}
	}
}

// calm ends all trouble and binds what is not bound yet.
func (c *controller) calm() {
	c.change(func() {
		c.rough = false
		for _, o := range c.objects["pods"] {
			if pod := o.(*v1.Pod); pod.Spec.NodeName == "" {
				is := pod.DeepCopy()
				is.Spec.NodeName = "node1"
				c.put("pods", is)
			}
		}
	})
}

// differences between what the apiserver wants and what the node shows, and what
// the node has told.
func (c *controller) differences(here []v1.Pod) (out []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	local := map[string]*v1.Pod{}
	for i := range here {
		local[string(here[i].UID)] = &here[i]
	}
	for _, o := range c.objects["pods"] {
		pod := o.(*v1.Pod)
		mine := local[string(pod.UID)]
		delete(local, string(pod.UID))
		switch s := status(pod); {
		case pod.DeletionTimestamp != nil:
			out = append(out, pod.Name+" is still being deleted")
		case mine == nil:
			out = append(out, pod.Name+" is not on the node")
		case mine.Labels["version"] != pod.Labels["version"]:
			out = append(out, fmt.Sprintf("%s has label %s, the node knows %s", pod.Name, pod.Labels["version"], mine.Labels["version"]))
		case !node.Running(mine):
			out = append(out, pod.Name+" does not run: "+fmt.Sprint(mine.Status))
		case pod.Status.Phase != v1.PodRunning || !s.Ready || s.ContainerID != status(mine).ContainerID || pod.Status.PodIP != mine.Status.PodIP:
			out = append(out, pod.Name+" is told otherwise than it is")
		}
	}
	for _, p := range local {
		out = append(out, fmt.Sprintf("%s (%s) is on the node only", p.Name, p.UID))
	}
	return out
}

// apiKillsWanted is how often the test kills.
func apiKillsWanted() int {
	if n, err := strconv.Atoi(os.Getenv("PODD_TEST_KILLS")); err == nil {
		return n
	}
	if os.Getenv("PODD_TEST_ALL") != "" {
		return 1000
	}
	return 12
}

// TestKillsLoseNoPodsChange kills podd, at times with its shim, while pods are
// bound, labelled and deleted at an apiserver to which requests get lost and whose
// watches are cut. What it wants is what runs in the end, and it has been told so;
// no pod's program has ended that was not asked to.
func TestKillsLoseNoPodsChange(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	c := &controller{plane: newPlane(seed), names: 6, done: map[string]int{}}
	t.Cleanup(c.Close) // after the node has ended: it watches
	n := planeNode(t, c.plane)
	node.Await(t, "the node is registered", 30*second, func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.objects["nodes"]) == 1 && len(c.objects["leases"]) == 1
	})
	before := settled(n)
	c.change(func() { c.rough = true })
	stop := make(chan struct{})
	var working sync.WaitGroup
	working.Go(func() { c.work(stop) })
	die, begin := rand.New(rand.NewPCG(seed, 2)), time.Now()
	for i := range apiKillsWanted() {
		time.Sleep(time.Duration(die.IntN(500)) * time.Millisecond) // somewhere in what goes on
		if i%4 == 3 {
			if shim := n.ShimPID(); shim != 0 {
				_ = syscall.Kill(shim, syscall.SIGKILL)
			}
		}
		n.Signal(syscall.SIGKILL)
		n.Launch()
		// A start waits for what podd-shim was asked by the one that was killed.
		node.Await(t, "podd and podd-shim answer", 90*second, func() bool { return n.ShimPID() != 0 })
	}
	close(stop)
	working.Wait()
	t.Logf("%d kills in %v, pods %v", apiKillsWanted(), time.Since(begin).Round(second), c.done)
	c.calm()
	agree := func() {
		t.Helper()
		var off []string
		node.Await(t, "node and apiserver agree", time.Minute, func() bool {
			off = c.differences(n.Pods())
			return len(off) == 0
		}, func() string { return strings.Join(off, "\n") })
	}
	agree()
	c.mu.Lock()
	want := len(c.objects["pods"])
	c.mu.Unlock()
	if got := n.Processes("/testserver pause"); len(got) != want {
		t.Errorf("%d programs run, of %d pods: %v", len(got), want, got)
	}
	c.change(func() {
		for _, o := range c.objects["pods"] {
			is := o.(*v1.Pod).DeepCopy()
			markDeleted(is)
			c.put("pods", is)
		}
	})
	agree()
	n.WaitGone(30 * second)
	n.NoLeaks(t, before, 30*second)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, w := range c.wrong {
		t.Error(w)
	}
}
