package kubelet

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"time"

	"golang.org/x/sync/errgroup"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/cgroups"
	"github.com/podd-runtime/podd/kubelet/admission"
	"github.com/podd-runtime/podd/kubelet/apiserver"
	"github.com/podd-runtime/podd/kubelet/certs"
	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/node"
	"github.com/podd-runtime/podd/kubelet/pods"
)

// Cluster says which cluster this machine is a node of, and as what.
type Cluster struct {
	Certs certs.Config
	// ServingByCluster has the certificate of the node's API signed by the
	// cluster (serverTLSBootstrap).
	ServingByCluster bool
	// QPS and Burst limit the requests to the apiserver, EventQPS and EventBurst
	// those about events.
	QPS, EventQPS     float32
	Burst, EventBurst int
	// Node is what is registered; its client, status and log are filled in.
	Node node.Config
	// Machine's runtime is filled in.
	Machine node.Machine
	// Enforce the allocatable resources on all pods together.
	Enforce bool
}

// cluster is the part of the agent that speaks with an apiserver. Nothing else
// waits for it: static pods start and all pods keep running without.
type cluster struct {
	log        *slog.Logger
	connection *certs.Connection
	contact    apiserver.Contact
	server     string // its address
	client     *apiserver.Client
	pods       *apiserver.Pods
	objects    *apiserver.Objects
	services   *apiserver.Services
	events     *apiserver.Events
	node       *node.Node
	// serving certificate by the cluster; nil: of the node's own.
	serving *certs.Pair
}

// join gives the parts of the agent what a cluster adds to them. It asks nobody.
func (a *agent) join(cfg *Cluster, tree *cgroups.Tree, deps *pods.Deps, o *objects) error {
	c, err := a.openCluster(cfg)
	if err != nil {
		return err
	}
	if cfg.Enforce {
		if err := enforce(tree, cfg.Machine.Allocatable); err != nil {
			a.log.Warn("pods are not limited together", "error", err)
		}
	}
	deps.Admit, deps.Services, deps.RuntimeClass = c.admit, c.env, c.client.RuntimeClass
	o.cluster, o.client = c.objects, c.client
	a.cluster = c
	return nil
}

// openCluster makes the parts; a.table is made afterwards.
func (a *agent) openCluster(cfg *Cluster) (*cluster, error) {
	c := &cluster{log: a.log.With("part", "cluster")}
	var err error
	if c.connection, err = certs.Connect(cfg.Certs); err != nil {
		return nil, err
	}
	c.connection.Listen(c.contact.Wrap)
	rest := c.connection.REST()
	c.server = rest.Host
	rest.QPS, rest.Burst, rest.UserAgent = cfg.QPS, cfg.Burst, "podd/"+a.cfg.Version
	if c.client, err = apiserver.NewClient(rest); err != nil {
		return nil, err
	}
	c.objects = apiserver.NewObjects(c.client, func(ns, name string) { a.table.ObjectChanged(ns, name) }, c.log)
	c.services = apiserver.NewServices(c.client, c.log)
	c.events = apiserver.NewEvents(c.client, a.events, cfg.EventQPS, cfg.EventBurst, c.log)
	machine := cfg.Machine
	machine.Runtime = a.cri
	n := cfg.Node
	n.Client, n.Status, n.Fixed, n.Log = c.client, machine.Status, machine.Fixed, c.log
	n.Registered = func(uid types.UID) { c.pods.Registered(uid) }
	// Upstream names the Node so, too: its UID may not be known.
	self := &v1.ObjectReference{Kind: "Node", Name: n.Name, UID: types.UID(n.Name)}
	n.Event = func(eventType, reason, message string) { a.events.Eventf(self, eventType, reason, "%s", message) }
	c.node = node.New(n)
	if cfg.ServingByCluster {
		var ips []net.IP
		for _, ip := range machine.IPs {
			ips = append(ips, net.ParseIP(ip))
		}
		if c.serving, err = certs.NewServing(cfg.Certs.Dir, n.Name, []string{n.Name}, ips, c.log); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// follow the apiserver's pods and the table; it returns the sink for static
// pods, which need mirrors.
func (c *cluster) follow(node string, table *pods.Table) manifests.Sink {
	c.pods = apiserver.New(apiserver.Config{
		Client: c.client, NodeName: node, Sink: table, Table: table,
		Uses: []apiserver.Uses{c.objects, c.services}, Log: c.log,
	})
	return c.pods.Static(table)
}

// env of a pod for the cluster's services; static pods have none: they start
// before there is an apiserver.
func (c *cluster) env(ctx context.Context, pod *v1.Pod) (map[string]string, error) {
	if pod.Annotations[manifests.ConfigSourceAnnotation] != apiserver.SourceName {
		return nil, nil
	}
	return c.services.Env(ctx, pod)
}

// admit is the table's question whether a pod has a place here. It asks nobody:
// see pods.Deps.
func (c *cluster) admit(pod *v1.Pod, others []*v1.Pod) admission.Verdict {
	static := pod.Annotations[manifests.ConfigSourceAnnotation] != apiserver.SourceName
	return admission.Admit(c.node.Current(), pod, static, others)
}

// run until ctx ends; the node joins first, if it has not yet.
func (c *cluster) run(ctx context.Context) error {
	if err := c.connection.Join(ctx); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return c.connection.Run(ctx, c.client) })
	group.Go(func() error { return c.objects.Run(ctx) })
	group.Go(func() error { return c.services.Run(ctx) })
	group.Go(func() error { return c.pods.Run(ctx) })
	group.Go(func() error { return c.events.Run(ctx) })
	group.Go(func() error { return c.node.Run(ctx) })
	if c.serving != nil {
		group.Go(func() error { return c.serving.Run(ctx, c.client) })
	}
	return group.Wait()
}

// objects of the node: those of the apiserver when it is part of a cluster, and
// otherwise those of the manifests. It breaks the circle source → table →
// volumes → objects: it is filled before anything runs.
type objects struct {
	*manifests.Source
	cluster *apiserver.Objects
	client  *apiserver.Client
}

// Token of a pod's service account; see volumes.Tokens.
func (o *objects) Token(ctx context.Context, pod *v1.Pod, audience string, valid time.Duration) (string, time.Time, error) {
	return o.client.Token(ctx, pod, audience, valid)
}

// ServiceAccount of the cluster; see credentials.Accounts.
func (o *objects) ServiceAccount(ctx context.Context, namespace, name string) (*v1.ServiceAccount, error) {
	return o.client.ServiceAccount(ctx, namespace, name)
}

// PersistentVolume of a claim; see volumes.Claims.
func (o *objects) PersistentVolume(ctx context.Context, namespace, claim string) (*v1.PersistentVolumeClaim, *v1.PersistentVolume, error) {
	if o.cluster == nil {
		return o.Source.PersistentVolume(ctx, namespace, claim)
	}
	return o.client.PersistentVolume(ctx, namespace, claim)
}

func (o *objects) ConfigMap(namespace, name string) (*v1.ConfigMap, error) {
	if o.cluster != nil {
		return o.cluster.ConfigMap(namespace, name)
	}
	return o.Source.ConfigMap(namespace, name)
}

func (o *objects) Secret(namespace, name string) (*v1.Secret, error) {
	if o.cluster != nil {
		return o.cluster.Secret(namespace, name)
	}
	return o.Source.Secret(namespace, name)
}

// enforce what pods may have together on their common cgroup.
func enforce(tree *cgroups.Tree, have v1.ResourceList) error {
	err := tree.SetNodeAllocatable(cgroups.NodeAllocatable(have.Cpu().MilliValue(), have.Memory().Value(), 0))
	if err != nil {
		return fmt.Errorf("limit all pods to what is allocatable: %w", err)
	}
	return nil
}
