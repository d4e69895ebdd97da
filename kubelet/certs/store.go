// Package certs keeps the node's certificates: the one it shows to the
// apiserver, got with a bootstrap token and renewed in time, and the one it
// serves its own API with. Files are where upstream's kubelet has them, so that
// either finds what the other has left:
//
//	<cert-dir>/kubelet-client-<time>.pem, kubelet-client-current.pem → it
//	<cert-dir>/kubelet-server-<time>.pem, kubelet-server-current.pem → it
package certs

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"

	"github.com/podd-runtime/podd/kubelet/apiserver"
)

// Signer signs requests, *apiserver.Client.
type Signer interface {
	Certificate(ctx context.Context, signer string, csr []byte, usages []certificatesv1.KeyUsage) ([]byte, error)
}

// Pair is a certificate with its key that is renewed before it ends.
type Pair struct {
	dir, prefix string
	signer      string
	usage       certificatesv1.KeyUsage
	subject     pkix.Name
	names       []string
	ips         []net.IP
	log         *slog.Logger
	now         func() time.Time // the wall clock

	mu      sync.Mutex
	current *tls.Certificate
	onNew   []func()
}

// NewClient is the pair that a node shows to the apiserver.
func NewClient(dir, node string, log *slog.Logger) (*Pair, error) {
	p := &Pair{
		dir: dir, prefix: "kubelet-client", signer: certificatesv1.KubeAPIServerClientKubeletSignerName,
		usage: certificatesv1.UsageClientAuth, log: log, now: time.Now, subject: nodeName(node),
	}
	return p, p.load()
}

// NewServing is the pair that a node serves its API with, signed by the cluster.
func NewServing(dir, node string, names []string, ips []net.IP, log *slog.Logger) (*Pair, error) {
	p := &Pair{
		dir: dir, prefix: "kubelet-server", signer: certificatesv1.KubeletServingSignerName,
		usage: certificatesv1.UsageServerAuth, log: log, now: time.Now, subject: nodeName(node), names: names, ips: ips,
	}
	return p, p.load()
}

func nodeName(node string) pkix.Name {
	return pkix.Name{CommonName: "system:node:" + node, Organization: []string{"system:nodes"}}
}

// Path of the file that always has the current pair.
func (p *Pair) Path() string { return filepath.Join(p.dir, p.prefix+"-current.pem") }

// load what an earlier run has left. A file that cannot be read, or of another
// node, is as good as none.
func (p *Pair) load() error {
	data, err := os.ReadFile(p.Path())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("certificate (--cert-dir): %w", err)
	}
	cert, err := parse(data, data)
	if err != nil {
		p.log.Warn("certificate is not usable, another one will be requested", "path", p.Path(), "error", err)
		return nil
	}
	p.current = cert
	return nil
}

// Adopt a pair that was given in files, when there is none yet.
func (p *Pair) Adopt(cert, key []byte) error {
	c, err := parse(cert, key)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.current == nil || p.now().After(p.current.Leaf.NotAfter) {
		p.current = c
	}
	return nil
}

func parse(cert, key []byte) (*tls.Certificate, error) {
	c, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	if c.Leaf == nil {
		if c.Leaf, err = x509.ParseCertificate(c.Certificate[0]); err != nil {
			return nil, err
		}
	}
	return &c, nil
}

// Current pair that has not ended; nil when there is none.
func (p *Pair) Current() *tls.Certificate {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.current == nil || p.now().After(p.current.Leaf.NotAfter) {
		return nil
	}
	return p.current
}

// GetCertificate is for tls.Config of a server.
func (p *Pair) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if c := p.Current(); c != nil {
		return c, nil
	}
	return nil, errors.New("no serving certificate available for the kubelet: its request waits to be approved")
}

// OnNew is called after each renewal.
func (p *Pair) OnNew(f func()) {
	p.mu.Lock()
	p.onNew = append(p.onNew, f)
	p.mu.Unlock()
}

// renewal is when a certificate is renewed: when between 70 and 90 percent of
// its life are over, so that the nodes of a cluster do not all come at once.
// Its life begins when it was signed, if that is known: signers date it back by
// minutes, and one that lives for minutes would be renewed at once.
func renewal(c *x509.Certificate, signed time.Time, part float64) time.Time {
	from := c.NotBefore
	if signed.After(from) && signed.Before(c.NotAfter) { // else our clock was wrong
		from = signed
	}
	return from.Add(time.Duration(float64(c.NotAfter.Sub(from)) * (0.7 + 0.2*part)))
}

// Run renews the pair until ctx ends.
func (p *Pair) Run(ctx context.Context, by Signer) error {
	failures, signed := 0, time.Time{}
	for ctx.Err() == nil {
		if c := p.Current(); c != nil && failures == 0 {
			at := renewal(c.Leaf, signed, mathrand.Float64())
			p.log.Info("certificate will be renewed", "file", p.prefix, "at", at, "ends", c.Leaf.NotAfter)
			if !p.await(ctx, at, c.Leaf) {
				return nil
			}
		}
		if err := p.Renew(ctx, by); err != nil {
			failures++
			if ctx.Err() == nil {
				p.log.Warn("certificate is not renewed", "file", p.prefix, "failures", failures, "error", err)
			}
			if !sleep(ctx, apiserver.Backoff(failures, 2*time.Second, 2*time.Minute)) {
				return nil
			}
			continue
		}
		// Without its monotonic reading: that does not count while the machine is
		// suspended, and a certificate ends by the wall clock.
		failures, signed = 0, p.now().Round(0)
	}
	return nil
}

// look is how long the clock is left alone at most: it is set, and machines are
// suspended.
const look = time.Hour

// await a time by the wall clock; false when ctx has ended. A twentieth of the
// certificate's life passes unseen at most: a tenth is left when it is renewed
// last.
func (p *Pair) await(ctx context.Context, at time.Time, c *x509.Certificate) bool {
	step := min(look, max(c.NotAfter.Sub(c.NotBefore)/20, time.Second))
	for {
		left := at.Sub(p.now())
		if left <= 0 {
			return ctx.Err() == nil
		}
		if !sleep(ctx, min(left, step)) {
			return false
		}
	}
}

// Renew the pair now: a new key, and a certificate for it.
func (p *Pair) Renew(ctx context.Context, by Signer) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: p.subject, DNSNames: p.names, IPAddresses: p.ips}, key)
	if err != nil {
		return fmt.Errorf("certificate request: %w", err)
	}
	csr := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	cert, err := by.Certificate(ctx, p.signer, csr, []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, p.usage})
	if err != nil {
		return err
	}
	raw, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	private := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: raw})
	parsed, err := parse(cert, private)
	if err != nil {
		return fmt.Errorf("certificate of %s: %w", p.signer, err)
	}
	if err := p.write(append(bytes.TrimRight(cert, "\n"), append([]byte("\n"), private...)...)); err != nil {
		return err
	}
	p.mu.Lock()
	p.current = parsed
	tell := p.onNew
	p.mu.Unlock()
	p.log.Info("certificate renewed", "file", p.prefix, "ends", parsed.Leaf.NotAfter)
	for _, f := range tell {
		f()
	}
	return nil
}

// write the file of a new pair, and turn the link to it.
func (p *Pair) write(data []byte) error {
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return fmt.Errorf("certificate (--cert-dir): %w", err)
	}
	name := fmt.Sprintf("%s-%s.pem", p.prefix, time.Now().Format("2006-01-02-15-04-05"))
	f, err := os.OpenFile(filepath.Join(p.dir, name), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("certificate (--cert-dir): %w", err)
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close()) // it cannot be had again for nothing
	if err != nil {
		return fmt.Errorf("certificate (--cert-dir): %w", err)
	}
	tmp := p.Path() + ".tmp"
	_ = os.Remove(tmp) // of a run that was killed
	if err := os.Symlink(name, tmp); err != nil {
		return fmt.Errorf("certificate (--cert-dir): %w", err)
	}
	if err := os.Rename(tmp, p.Path()); err != nil {
		return fmt.Errorf("certificate (--cert-dir): %w", err)
	}
	return nil
}

// sleep is false when ctx has ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(max(d, 0))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
