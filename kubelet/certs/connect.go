package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/client-go/transport"
	"k8s.io/client-go/util/connrotation"

	"github.com/podd-runtime/podd/kubelet/apiserver"
)

// Config of a Connection.
type Config struct {
	// Kubeconfig that the node is known by; Bootstrap is used to get one when it
	// is not there.
	Kubeconfig, Bootstrap string
	// Dir keeps certificates.
	Dir      string
	NodeName string
	// Rotate renews the client certificate.
	Rotate bool
	Log    *slog.Logger
}

// Connection is how the node reaches its apiserver, and as whom.
type Connection struct {
	cfg  Config
	pair *Pair // nil: the kubeconfig has other credentials than a certificate
	rest *rest.Config
	// bootstrap is used until there is a certificate; nil: there is one.
	bootstrap *rest.Config
}

// Connect reads the kubeconfigs. It asks nobody.
func Connect(cfg Config) (*Connection, error) {
	c := &Connection{cfg: cfg}
	_, err := os.Stat(cfg.Kubeconfig)
	if errors.Is(err, fs.ErrNotExist) && cfg.Bootstrap != "" {
		return c, c.viaBootstrap()
	}
	given, err := clientcmd.BuildConfigFromFlags("", cfg.Kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig (--kubeconfig): %w", err)
	}
	if !hasCertificate(given) {
		c.rest = given
		return c, nil
	}
	if c.pair, err = NewClient(cfg.Dir, cfg.NodeName, cfg.Log); err != nil {
		return nil, err
	}
	mine := given.CertFile == c.pair.Path()
	if !mine && !cfg.Rotate {
		c.pair, c.rest = nil, given // client-go reads the files again when they change
		return c, nil
	}
	if mine && c.pair.Current() == nil && cfg.Bootstrap != "" {
		return c, c.viaBootstrap() // it has ended: join again
	}
	if !mine {
		if err := adopt(c.pair, given); err != nil {
			return nil, fmt.Errorf("kubeconfig %s: %w", cfg.Kubeconfig, err)
		}
	}
	if c.pair.Current() == nil {
		return nil, fmt.Errorf("kubeconfig %s: its certificate %s is missing or has ended: join again with --bootstrap-kubeconfig", cfg.Kubeconfig, given.CertFile)
	}
	c.rest, err = c.pair.transport(given)
	return c, err
}

func hasCertificate(c *rest.Config) bool { return c.CertFile != "" || len(c.CertData) > 0 }

func adopt(p *Pair, c *rest.Config) error {
	if err := rest.LoadTLSFiles(c); err != nil {
		return err
	}
	return p.Adopt(c.CertData, c.KeyData)
}

func (c *Connection) viaBootstrap() error {
	given, err := clientcmd.BuildConfigFromFlags("", c.cfg.Bootstrap)
	if err != nil {
		return fmt.Errorf("kubeconfig (--bootstrap-kubeconfig): %w", err)
	}
	if c.pair, err = NewClient(c.cfg.Dir, c.cfg.NodeName, c.cfg.Log); err != nil {
		return err
	}
	c.bootstrap = given
	if c.rest, err = c.pair.transport(rest.AnonymousClientConfig(given)); err != nil {
		return err
	}
	return nil
}

// transport shows the pair, whatever it is by then, and ends the connections of
// an old one.
func (p *Pair) transport(given *rest.Config) (*rest.Config, error) {
	if err := rest.LoadTLSFiles(given); err != nil {
		return nil, err
	}
	secure := &tls.Config{
		MinVersion: tls.VersionTLS12, ServerName: given.ServerName,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if c := p.Current(); c != nil {
				return c, nil
			}
			return &tls.Certificate{}, nil
		},
	}
	if len(given.CAData) > 0 {
		secure.RootCAs = x509.NewCertPool()
		if !secure.RootCAs.AppendCertsFromPEM(given.CAData) {
			return nil, fmt.Errorf("certificate authority of %s: no certificate in it", given.Host)
		}
	}
	if given.Insecure {
		secure.InsecureSkipVerify = true // as the kubeconfig asks for
	}
	dial := connrotation.NewDialer((&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext)
	p.OnNew(dial.CloseAll)
	t := utilnet.SetTransportDefaults(&http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSHandshakeTimeout: 10 * time.Second, TLSClientConfig: secure,
		MaxIdleConnsPerHost: 25, DialContext: dial.DialContext,
	})
	out := rest.AnonymousClientConfig(given)
	out.TLSClientConfig = rest.TLSClientConfig{}
	out.Transport = t
	return out, nil
}

// REST is for clients of the node's own.
func (c *Connection) REST() *rest.Config { return rest.CopyConfig(c.rest) }

// Listen has listen wrapped around the transports of all clients that are made
// from now on, the one that joins included.
func (c *Connection) Listen(listen transport.WrapperFunc) {
	c.rest.Wrap(listen)
	if c.bootstrap != nil {
		c.bootstrap.Wrap(listen)
	}
}

// Join returns when the node has credentials: at once, or when its first
// certificate was signed. It tries until ctx ends.
func (c *Connection) Join(ctx context.Context) error {
	if c.bootstrap == nil {
		return nil
	}
	client, err := apiserver.NewClient(c.bootstrap)
	if err != nil {
		return fmt.Errorf("kubeconfig (--bootstrap-kubeconfig): %w", err)
	}
	for failures := 0; c.pair.Current() == nil; {
		if err := c.pair.Renew(ctx, client); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			failures++
			c.cfg.Log.Warn("the node cannot join yet", "server", c.bootstrap.Host, "failures", failures, "error", err)
			sleep(ctx, apiserver.Backoff(failures, time.Second, 30*time.Second))
		}
	}
	if err := c.writeKubeconfig(); err != nil {
		return err
	}
	c.cfg.Log.Info("the node has joined", "server", c.bootstrap.Host, "kubeconfig", c.cfg.Kubeconfig)
	return nil
}

// writeKubeconfig for the next start, and for upstream's kubelet.
func (c *Connection) writeKubeconfig() error {
	if c.cfg.Kubeconfig == "" {
		return nil
	}
	b := c.bootstrap
	cluster := &clientcmdapi.Cluster{
		Server: b.Host, InsecureSkipTLSVerify: b.Insecure, TLSServerName: b.ServerName,
		CertificateAuthority: b.CAFile, CertificateAuthorityData: b.CAData,
	}
	if b.CAFile != "" {
		cluster.CertificateAuthorityData = nil
	}
	out := clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"default-cluster": cluster},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"default-auth": {ClientCertificate: c.pair.Path(), ClientKey: c.pair.Path()}},
		Contexts:       map[string]*clientcmdapi.Context{"default-context": {Cluster: "default-cluster", AuthInfo: "default-auth", Namespace: "default"}},
		CurrentContext: "default-context",
	}
	if err := os.MkdirAll(filepath.Dir(c.cfg.Kubeconfig), 0o755); err != nil {
		return fmt.Errorf("kubeconfig (--kubeconfig): %w", err)
	}
	if err := clientcmd.WriteToFile(out, c.cfg.Kubeconfig); err != nil {
		return fmt.Errorf("kubeconfig (--kubeconfig): %w", err)
	}
	return nil
}

// Run renews the client certificate until ctx ends, if that is asked for.
func (c *Connection) Run(ctx context.Context, by Signer) error {
	if c.pair == nil || !c.cfg.Rotate && c.bootstrap == nil {
		<-ctx.Done()
		return nil
	}
	return c.pair.Run(ctx, &rejoining{c.pair, by, c.joiner})
}

// rejoining signs as the node or, when its certificate has ended, because the
// machine was suspended or its clock was wrong, as one that joins.
type rejoining struct {
	pair *Pair
	node Signer
	join func() (Signer, error)
}

// Certificate implements Signer.
func (r *rejoining) Certificate(ctx context.Context, signer string, csr []byte, usages []certificatesv1.KeyUsage) ([]byte, error) {
	by := r.node
	if r.pair.Current() == nil {
		var err error
		if by, err = r.join(); err != nil {
			return nil, fmt.Errorf("the node's certificate has ended, see that its clock is right: %w", err)
		}
	}
	return by.Certificate(ctx, signer, csr, usages)
}

// joiner signs for who has the bootstrap token. Its file is read each time: one
// with a new token is all that it takes.
func (c *Connection) joiner() (Signer, error) {
	if c.cfg.Bootstrap == "" {
		return nil, errors.New("it can join again with --bootstrap-kubeconfig")
	}
	given, err := clientcmd.BuildConfigFromFlags("", c.cfg.Bootstrap)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig (--bootstrap-kubeconfig): %w", err)
	}
	client, err := apiserver.NewClient(given)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig (--bootstrap-kubeconfig): %w", err)
	}
	return client, nil
}
