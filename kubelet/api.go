package kubelet

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	kubeletv1beta1 "k8s.io/kubelet/config/v1beta1"

	"github.com/podd-runtime/podd/kubelet/metrics"
	"github.com/podd-runtime/podd/kubelet/pods"
	"github.com/podd-runtime/podd/kubelet/server/auth"
	"github.com/podd-runtime/podd/kubelet/server/kubeletapi"
)

// APIConfig is about the kubelet's HTTP API.
type APIConfig struct {
	// Kubelet is the whole configuration; the API shows it, too.
	Kubelet *kubeletv1beta1.KubeletConfiguration
	// Said tells whether a field of it was set, or is a default.
	Said func(field string) bool
	// Flags that were given.
	Flags map[string]string
	// CertDir keeps the certificate that the API signs itself.
	CertDir string
	// Addresses of the node, for that certificate.
	Addresses []string
	// Certificate that a cluster signed; nil: there is none.
	Certificate kubeletapi.Certificate
	// Reviews of the cluster; nil: there is none.
	Reviews auth.Reviews
	// SetVerbosity changes the level of the log.
	SetVerbosity func(level string) error
}

// nodeAPI is the kubelet API on its ports, as it is held between start and stop.
type nodeAPI struct {
	a       *agent
	cfg     APIConfig
	server  *kubeletapi.Server
	metrics *metrics.Metrics
	serve   []func(ctx context.Context) error
	undo    []func()
}

// livePods are the table's pods without copies, for those who only read.
type livePods struct{ *pods.Table }

func (p livePods) List() []*v1.Pod { return p.Pods() }

// openAPI takes the ports: that one of them is taken shows at the start.
func (a *agent) openAPI() (_ *nodeAPI, err error) {
	cfg := a.cfg.API
	k := cfg.Kubelet
	if k == nil {
		return nil, nil
	}
	if c := a.cluster; c != nil {
		cfg.Reviews = c.client
		if c.serving != nil {
			cfg.Certificate = c.serving.GetCertificate
		}
	}
	n := &nodeAPI{a: a, cfg: cfg, metrics: a.metrics}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	table := livePods{a.table}
	n.server = kubeletapi.New(kubeletapi.Config{
		Kubelet: k, Flags: cfg.Flags, Version: a.cfg.Version,
		Pods: table, Runtime: a.cri, Stats: a.stats,
		Metrics: n.metrics.Handlers(table, a.cri, a.stats), Observe: n.metrics.Request,
		Checks:       []kubeletapi.Check{{Name: "syncloop", Check: a.healthy}},
		SetVerbosity: cfg.SetVerbosity, Log: a.log.With("part", "kubelet API"),
	})
	if k.EnableServer == nil || *k.EnableServer {
		if err := n.openSecure(); err != nil {
			return nil, err
		}
		if k.ReadOnlyPort != 0 {
			l, err := listen(k.Address, k.ReadOnlyPort)
			if err != nil {
				return nil, fmt.Errorf("readOnlyPort (--read-only-port): %w", err)
			}
			n.add(l, func(ctx context.Context) error { return kubeletapi.Serve(ctx, l, n.server.ReadOnly(), nil, a.log) })
		}
	}
	return n, nil
}

// checkReviews refuses what was asked for and cannot be: a cluster's verdict
// without a cluster. As a default it only means that nobody is let in.
func checkReviews(cfg APIConfig) error {
	k := cfg.Kubelet
	if k == nil {
		return nil
	}
	if on := k.Authentication.Webhook.Enabled; on != nil && *on && cfg.Said("authentication.webhook.enabled") {
		return fmt.Errorf("authentication.webhook.enabled (--authentication-token-webhook): there is no cluster to ask: set it to false, or give --kubeconfig: %w", errdefs.ErrInvalidArgument)
	}
	if k.Authorization.Mode == auth.Webhook && cfg.Said("authorization.mode") {
		return fmt.Errorf("authorization.mode (--authorization-mode): there is no cluster to ask: set it to AlwaysAllow, or give --kubeconfig: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func (n *nodeAPI) openSecure() error {
	k, cfg, log := n.cfg.Kubelet, n.cfg, n.a.log
	tokens := k.Authentication.Webhook.Enabled != nil && *k.Authentication.Webhook.Enabled && cfg.Reviews != nil
	anonymous := k.Authentication.Anonymous.Enabled != nil && *k.Authentication.Anonymous.Enabled
	if !tokens && !anonymous && k.Authentication.X509.ClientCAFile == "" {
		// A port on which everybody is refused serves nobody.
		log.Info("kubelet API is not served: nobody could log in", "remedy", "set authentication.x509.clientCAFile and authorization.mode: AlwaysAllow, or join a cluster")
		return nil
	}
	gate, err := auth.New(auth.Config{
		NodeName: n.a.cfg.NodeName, ClientCAFile: k.Authentication.X509.ClientCAFile, Anonymous: anonymous,
		Tokens: tokens, TokenTTL: k.Authentication.Webhook.CacheTTL.Duration,
		Mode:       string(k.Authorization.Mode),
		AllowedTTL: k.Authorization.Webhook.CacheAuthorizedTTL.Duration, DeniedTTL: k.Authorization.Webhook.CacheUnauthorizedTTL.Duration,
		Reviews: cfg.Reviews, Log: log.With("part", "kubelet API"),
	})
	if err != nil {
		return err
	}
	if k.Authorization.Mode == auth.Webhook && cfg.Reviews == nil {
		log.Warn("kubelet API refuses everybody: without a cluster nobody decides who may do what", "remedy", "authorization.mode: AlwaysAllow")
	}
	cert := cfg.Certificate
	switch {
	case k.TLSCertFile != "" || k.TLSPrivateKeyFile != "":
		cert, err = kubeletapi.FromFiles(k.TLSCertFile, k.TLSPrivateKeyFile, log)
	case cert == nil:
		cert, err = kubeletapi.SelfSigned(cfg.CertDir, n.a.cfg.NodeName, cfg.Addresses, log)
	}
	if err != nil {
		return err
	}
	n.metrics.ServerCertificate(cert)
	secure, err := kubeletapi.TLS(k, cert, gate.ClientCertificates())
	if err != nil {
		return err
	}
	l, err := listen(k.Address, k.Port)
	if err != nil {
		return fmt.Errorf("kubelet API (address, port; --port): %w", err)
	}
	log.Info("kubelet API is served", "address", l.Addr().String(), "authorization", k.Authorization.Mode)
	n.add(l, func(ctx context.Context) error { return kubeletapi.Serve(ctx, l, n.server.Secure(gate), secure, log) })
	return nil
}

func listen(address string, port int32) (net.Listener, error) {
	return (&net.ListenConfig{}).Listen(context.Background(), "tcp", net.JoinHostPort(address, strconv.Itoa(int(port))))
}

func (n *nodeAPI) add(l net.Listener, serve func(ctx context.Context) error) {
	n.serve = append(n.serve, serve)
	n.undo = append(n.undo, func() { l.Close() })
}

// close gives the ports back that were taken.
func (n *nodeAPI) close() {
	if n == nil {
		return
	}
	for _, f := range n.undo {
		f()
	}
}

// healthzRetry is how often a taken port of /healthz is tried again (upstream's).
const healthzRetry = 5 * time.Second

// run serves until ctx ends.
func (n *nodeAPI) run(ctx context.Context) error {
	if n == nil {
		<-ctx.Done()
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, serve := range n.serve {
		group.Go(func() error {
			select { // as of the local API: no list without the pods of the last run
			case <-n.a.table.Recovered():
				return serve(ctx)
			case <-ctx.Done():
				return nil
			}
		})
	}
	group.Go(func() error { return n.metrics.Watch(ctx, n.a.table) })
	if port := n.cfg.Kubelet.HealthzPort; port != nil && *port > 0 {
		group.Go(func() error { return n.serveHealth(ctx, *port) })
	}
	return group.Wait()
}

// serveHealth waits for the port where it is taken, by another podd perhaps:
// pods do not depend on it.
func (n *nodeAPI) serveHealth(ctx context.Context, port int32) error {
	for told := false; ctx.Err() == nil; {
		l, err := listen(n.cfg.Kubelet.HealthzBindAddress, port)
		if err == nil {
			if told {
				n.a.log.Info("health is served", "address", l.Addr().String())
			}
			return kubeletapi.Serve(ctx, l, n.server.Health(), nil, n.a.log)
		}
		if !told {
			n.a.log.Warn("health is not served yet, and tried again", "port", "healthzPort (--healthz-port)", "error", err)
			told = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(healthzRetry):
		}
	}
	return nil
}

// healthy says whether the node works, for /healthz.
func (a *agent) healthy(ctx context.Context) error {
	if err := a.works(ctx); err != nil {
		return err
	}
	st, err := a.cri.Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return fmt.Errorf("runtime: %w", err)
	}
	for _, c := range st.GetStatus().GetConditions() {
		if c.GetType() == runtimeapi.RuntimeReady && !c.GetStatus() {
			return fmt.Errorf("runtime is not ready: %s: %s", c.GetReason(), c.GetMessage())
		}
	}
	return nil
}
