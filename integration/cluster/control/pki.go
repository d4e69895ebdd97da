package control

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// Authority signs certificates.
type Authority struct {
	// Dir has NAME.crt and NAME.key of all that it has signed, and its own, ca.
	Dir  string
	cert *x509.Certificate
	key  crypto.Signer
}

// NewAuthority makes one, and the keys for tokens of service accounts (sa.key, sa.pub).
func NewAuthority(dir string) (*Authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kubernetes"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	a := &Authority{Dir: dir, cert: template, key: key}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	if err := a.write("ca", der, key); err != nil {
		return nil, err
	}
	return a, a.tokenKey()
}

func (a *Authority) write(name string, der []byte, key crypto.Signer) error {
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := writePEM(filepath.Join(a.Dir, name+".key"), "PRIVATE KEY", raw); err != nil {
		return err
	}
	return writePEM(filepath.Join(a.Dir, name+".crt"), "CERTIFICATE", der)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

func (a *Authority) tokenKey() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	if err := writePEM(filepath.Join(a.Dir, "sa.key"), "EC PRIVATE KEY", private); err != nil {
		return err
	}
	return writePEM(filepath.Join(a.Dir, "sa.pub"), "PUBLIC KEY", public)
}

// Issue a certificate for client and server use; name is that of its files.
func (a *Authority) Issue(name, user string, groups []string, lifetime time.Duration, ips ...net.IP) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 62))
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: user, Organization: groups},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(lifetime),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		IPAddresses: ips, DNSNames: []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return err
	}
	return a.write(name, der, key)
}

// credentials of the programs, and their kubeconfigs.
func (p *Plane) credentials() error {
	const day = 24 * time.Hour
	local := []net.IP{net.IPv4(127, 0, 0, 1), net.ParseIP(ServiceIP)}
	if p.addr != "" {
		local = append(local, net.ParseIP(p.addr))
	}
	if err := p.ca.Issue("apiserver", "kube-apiserver", nil, day, local...); err != nil {
		return err
	}
	if err := p.ca.Issue("kubelet-client", "kube-apiserver-kubelet-client", nil, day); err != nil {
		return err
	}
	if err := p.ca.Issue("front-proxy", "front-proxy", nil, day); err != nil {
		return err
	}
	for name, who := range map[string]struct {
		user   string
		groups []string
	}{
		"admin":                   {"kubernetes-admin", []string{"system:masters"}},
		"kube-controller-manager": {"system:kube-controller-manager", nil},
		"kube-scheduler":          {"system:kube-scheduler", nil},
		"kube-proxy":              {"system:kube-proxy", nil},
	} {
		if _, err := p.User(name, who.user, who.groups, day); err != nil {
			return err
		}
	}
	const policy = "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived, ResponseStarted]\nrules: [{level: Metadata}]\n"
	return os.WriteFile(filepath.Join(p.Dir, "audit.yaml"), []byte(policy), 0o600)
}

// CA is the cluster's certificate, in a file.
func (p *Plane) CA() string { return filepath.Join(p.Dir, "pki", "ca.crt") }

// Certificate and key files of a user made by User.
func (p *Plane) Certificate(name string) (cert, key string) {
	return filepath.Join(p.ca.Dir, name+".crt"), filepath.Join(p.ca.Dir, name+".key")
}

// User makes a certificate of that life and returns its kubeconfig; name is
// that of its files.
func (p *Plane) User(name, user string, groups []string, lifetime time.Duration) (string, error) {
	if err := p.ca.Issue(name, user, groups, lifetime); err != nil {
		return "", err
	}
	cert, key := p.Certificate(name)
	return p.writeKubeconfig(name, &clientcmdapi.AuthInfo{ClientCertificate: cert, ClientKey: key})
}

// ClientOf makes a certificate of a user and returns a client of theirs; name
// is that of its files.
func (p *Plane) ClientOf(name, user string, groups ...string) (kubernetes.Interface, error) {
	if _, err := p.User(name, user, groups, time.Hour); err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(p.restConfig(name))
}

// Node makes the kubeconfig of a node.
func (p *Plane) Node(name string) (string, error) {
	return p.User(name, "system:node:"+name, []string{"system:nodes"}, 24*time.Hour)
}

// TokenKubeconfig is one with a bearer token, as a node joins with.
func (p *Plane) TokenKubeconfig(name, token string) (string, error) {
	return p.writeKubeconfig(name, &clientcmdapi.AuthInfo{Token: token})
}

// Kubeconfig of a user or a program, by the name it was made with.
func (p *Plane) Kubeconfig(name string) string { return filepath.Join(p.Dir, name+".kubeconfig") }

func (p *Plane) writeKubeconfig(name string, who *clientcmdapi.AuthInfo) (string, error) {
	c := clientcmdapi.NewConfig()
	c.Clusters["cluster"] = &clientcmdapi.Cluster{Server: p.URL, CertificateAuthority: p.CA()}
	c.AuthInfos[name] = who
	c.Contexts["context"] = &clientcmdapi.Context{Cluster: "cluster", AuthInfo: name}
	c.CurrentContext = "context"
	path := p.Kubeconfig(name)
	return path, clientcmd.WriteToFile(*c, path)
}

// restConfig of a user; what it asks is not held back.
func (p *Plane) restConfig(name string) *rest.Config {
	cert, key := p.Certificate(name)
	return &rest.Config{
		Host: p.URL, QPS: -1,
		TLSClientConfig: rest.TLSClientConfig{CAFile: p.CA(), CertFile: cert, KeyFile: key},
	}
}

// randomText of small letters and digits, as bootstrap tokens have it.
func randomText(n int) string {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789"
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		panic(fmt.Sprintf("no random numbers: %v", err))
	}
	for i := range b {
		b[i] = letters[int(b[i])%len(letters)]
	}
	return string(b)
}
