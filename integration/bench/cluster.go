package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"

	"github.com/podd-runtime/podd/integration/cluster/control"
)

// measureCluster has each node join one control plane, alone, and measures what
// a user of the cluster sees of it and what the apiserver has to bear.
func measureCluster(ctx context.Context, o options, nodes []node, r *report) error {
	plane, err := control.Start(ctx, o.peers, dir(o, "plane"), control.Complete...)
	if err != nil {
		return err
	}
	defer plane.Stop()
	for _, n := range nodes {
		if err := measureJoined(ctx, o, plane, n, r); err != nil {
			return fmt.Errorf("%s: %w", n.name(), err)
		}
	}
	return nil
}

// member is what a node is in the cluster.
type member struct {
	name, kubeconfig, ca string
}

func (m *member) user() string { return "system:node:" + m.name }

func measureJoined(ctx context.Context, o options, plane *control.Plane, n node, r *report) (err error) {
	fmt.Fprintf(os.Stderr, "%s: joining a cluster\n", n.name())
	m := &member{name: strings.ReplaceAll(n.name(), "+", "-"), ca: plane.CA()}
	if m.kubeconfig, err = plane.Node(m.name); err != nil {
		return err
	}
	n.join(m)
	defer func() { // after its agent has ended: the next node is alone again
		_ = plane.Client.CoreV1().Nodes().Delete(context.WithoutCancel(ctx), m.name, metav1.DeleteOptions{})
	}()
	if err := n.start(ctx); err != nil {
		return err
	}
	defer n.stop()
	c := &clusterBench{client: plane.Client, plane: plane, member: m, node: n, o: o, report: r}
	if err := until(ctx, "the node is ready", 2*time.Minute, func() bool { return c.ready(ctx) }); err != nil {
		return err
	}
	// One pod first: its image is pulled, caches are warm.
	if _, err := c.burst(ctx, "warm", 1); err != nil {
		return err
	}
	if err := c.rest(ctx, "no pod"); err != nil {
		return err
	}
	mark, err := plane.Mark()
	if err != nil {
		return err
	}
	began := time.Now()
	waits, err := c.burst(ctx, "many", o.pods)
	if err != nil {
		return err
	}
	took := time.Since(began)
	r.durations(fmt.Sprintf("%d pods through the apiserver, scheduled → Ready", o.pods), n.name(), waits)
	r.set("… p99 alone", n.name(), ms(percentile(waits, 99)), float64(percentile(waits, 99)))
	r.set("… all Ready after", n.name(), fmt.Sprintf("%.2f s", took.Seconds()), took.Seconds())
	load, err := plane.Requests(m.user(), mark)
	if err != nil {
		return err
	}
	r.set("… requests to the apiserver until then, per pod", n.name(), fmt.Sprintf("%.1f", float64(load.Total())/float64(o.pods)), float64(load.Total()))
	r.set("… and a second", n.name(), fmt.Sprintf("%.1f", float64(load.Total())/took.Seconds()), 0)
	c.tell("while the pods start", load)
	settle(ctx)
	if err := c.rest(ctx, fmt.Sprintf("%d pods", o.pods)); err != nil {
		return err
	}
	return c.clear(ctx)
}

type clusterBench struct {
	client kubernetes.Interface
	plane  *control.Plane
	member *member
	node   node
	o      options
	report *report
}

const benchNamespace = "default"

func (c *clusterBench) ready(ctx context.Context) bool {
	n, err := c.client.CoreV1().Nodes().Get(ctx, c.member.name, metav1.GetOptions{})
	if err != nil || len(n.Spec.Taints) > 0 {
		return false
	}
	for _, cond := range n.Status.Conditions {
		if cond.Type == v1.NodeReady {
			return cond.Status == v1.ConditionTrue
		}
	}
	return false
}

// rest counts the node's requests while nothing happens.
func (c *clusterBench) rest(ctx context.Context, what string) error {
	if err := c.settled(ctx); err != nil {
		return err
	}
	mark, err := c.plane.Mark()
	if err != nil {
		return err
	}
	began := time.Now()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(2 * c.o.idle): // an observation needs its span; nothing is waited for
	}
	all, err := c.plane.Requests(c.member.user(), mark)
	if err != nil {
		return err
	}
	rate := float64(all.Total()) / time.Since(began).Minutes()
	c.report.set("requests to the apiserver a minute at rest, "+what, c.node.name(), fmt.Sprintf("%.1f", rate), rate)
	c.tell("at rest, "+what, all)
	return nil
}

// settled waits for ten seconds with at most the lease's request: what a start
// causes is over.
func (c *clusterBench) settled(ctx context.Context) error {
	for range 12 {
		mark, err := c.plane.Mark()
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Second): // an observation, again
		}
		all, err := c.plane.Requests(c.member.user(), mark)
		if err != nil {
			return err
		}
		if all.Total() <= 2 {
			return nil
		}
	}
	return nil // it never rests: that is its figure
}

// tell what the requests were, beside the report.
func (c *clusterBench) tell(when string, all control.Requests) {
	var words []string
	for _, what := range slices.SortedFunc(maps.Keys(all), func(a, b string) int { return all[b] - all[a] }) {
		words = append(words, fmt.Sprintf("%d %s", all[what], what))
	}
	fmt.Fprintf(os.Stderr, "%s %s: %s\n", c.node.name(), when, strings.Join(words, ", "))
}

// burst creates pods at once and returns, for each, the time from its binding to
// its readiness as a client's watch shows them.
func (c *clusterBench) burst(ctx context.Context, prefix string, n int) ([]time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	if err := until(ctx, "a service account", time.Minute, func() bool {
		_, err := c.client.CoreV1().ServiceAccounts(benchNamespace).Get(ctx, "default", metav1.GetOptions{})
		return err == nil
	}); err != nil {
		return nil, err
	}
	// Without a version a watch begins with all that is there.
	begin := func() (watch.Interface, error) {
		return c.client.CoreV1().Pods(benchNamespace).Watch(ctx, metav1.ListOptions{LabelSelector: "burst=" + prefix})
	}
	w, err := begin()
	if err != nil {
		return nil, err
	}
	out := dir(c.o, "out-cluster-"+c.member.name)
	errs := make(chan error, n)
	var creating sync.WaitGroup
	for i := range n {
		creating.Go(func() {
			_, err := c.client.CoreV1().Pods(benchNamespace).Create(ctx, c.pod(prefix, i, out), metav1.CreateOptions{})
			errs <- err
		})
	}
	waits, err := readiness(ctx, w, begin, n)
	creating.Wait()
	close(errs)
	for e := range errs {
		err = errors.Join(e, err)
	}
	return waits, err
}

func (c *clusterBench) pod(prefix string, i int, out string) *v1.Pod {
	short, there := int64(1), v1.HostPathDirectory
	images := c.node.(interface{ imageServer() *imageServer }).imageServer()
	name := fmt.Sprintf("%s-%d", prefix, i)
	return &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"burst": prefix}},
		Spec: v1.PodSpec{
			TerminationGracePeriodSeconds: &short,
			SecurityContext:               &v1.PodSecurityContext{SeccompProfile: &v1.SeccompProfile{Type: v1.SeccompProfileTypeRuntimeDefault}},
			Containers: []v1.Container{{
				Name: "c", Image: images.payload(), ImagePullPolicy: v1.PullIfNotPresent, Args: []string{name},
				VolumeMounts: []v1.VolumeMount{{Name: "out", MountPath: "/out"}},
			}},
			Volumes: []v1.Volume{{Name: "out", VolumeSource: v1.VolumeSource{HostPath: &v1.HostPathVolumeSource{Path: out, Type: &there}}}},
		},
	}
}

// readiness of n pods that a watch shows; begin makes another one when the
// apiserver has ended it, as it does where it is short of CPU.
func readiness(ctx context.Context, w watch.Interface, begin func() (watch.Interface, error), n int) ([]time.Duration, error) {
	defer func() { w.Stop() }()
	bound, waits := map[string]time.Time{}, map[string]time.Duration{}
	for len(waits) < n {
		select {
		case ev, ok := <-w.ResultChan():
			if !ok {
				next, err := begin()
				if err != nil {
					return nil, err
				}
				w = next
				continue
			}
			pod, ok := ev.Object.(*v1.Pod)
			if !ok || pod.Spec.NodeName == "" {
				continue
			}
			if _, have := bound[pod.Name]; !have {
				bound[pod.Name] = time.Now()
			}
			if _, have := waits[pod.Name]; !have && podReady(pod) {
				waits[pod.Name] = time.Since(bound[pod.Name])
			}
		case <-ctx.Done():
			return nil, fmt.Errorf("%d of %d pods are ready: %w", len(waits), n, ctx.Err())
		}
	}
	return slices.Collect(maps.Values(waits)), nil
}

func podReady(p *v1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == v1.PodReady {
			return c.Status == v1.ConditionTrue
		}
	}
	return false
}

// clear away all pods, and measures how long that takes.
func (c *clusterBench) clear(ctx context.Context) error {
	pods := c.client.CoreV1().Pods(benchNamespace)
	began := time.Now()
	if err := pods.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	err := until(ctx, "pods deleted", 10*time.Minute, func() bool {
		list, err := pods.List(ctx, metav1.ListOptions{ResourceVersion: "0"})
		return err == nil && len(list.Items) == 0
	})
	took := time.Since(began)
	c.report.set(fmt.Sprintf("%d pods deleted (grace 1 s)", c.o.pods+1), c.node.name(), fmt.Sprintf("%.2f s", took.Seconds()), took.Seconds())
	return err
}

// join makes the next start that of a member of a cluster.
func (p *poddNode) join(m *member) { p.member = m }
func (p *peerNode) join(m *member) { p.member = m }

// flags of podd as a member of a cluster.
func (m *member) flags(o options) []string {
	return []string{
		"--kubeconfig", m.kubeconfig, "--client-ca-file", m.ca, "--hostname-override", m.name, "--max-pods", "250",
		"--cert-dir", filepath.Join(o.work, "podd", "pki"),
	}
}
