package kubeletapi

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	cliflag "k8s.io/component-base/cli/flag"
	kubeletv1beta1 "k8s.io/kubelet/config/v1beta1"
)

// Certificate gives the serving certificate of the moment.
type Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)

// TLS makes the server's TLS settings of the configuration's. askClients has
// clients asked for a certificate; whether it proves anything the gate decides,
// so that one that proves nothing is answered 401 instead of a broken handshake.
func TLS(k *kubeletv1beta1.KubeletConfiguration, cert Certificate, askClients bool) (*tls.Config, error) {
	least, err := cliflag.TLSVersion(k.TLSMinVersion)
	if err != nil {
		return nil, fmt.Errorf("tlsMinVersion (--tls-min-version): %w", err)
	}
	suites, err := cliflag.TLSCipherSuites(k.TLSCipherSuites)
	if err != nil {
		return nil, fmt.Errorf("tlsCipherSuites (--tls-cipher-suites): %w", err)
	}
	cfg := &tls.Config{MinVersion: least, CipherSuites: suites, GetCertificate: cert}
	if askClients {
		cfg.ClientAuth = tls.RequestClientCert
	}
	return cfg, nil
}

// certLook is the least time between two looks at a certificate's files.
const certLook = 10 * time.Second

// files is a certificate in two files that may be replaced at any time.
type files struct {
	cert, key string
	log       *slog.Logger
	// renew makes a new one when the one in force is about to end; nil: others do.
	renew func() error

	mu       sync.Mutex
	looked   time.Time
	contents [2][]byte
	current  *tls.Certificate
}

// FromFiles serves the certificate in two PEM files. They are looked at again
// and again; broken ones leave the last one in force.
func FromFiles(cert, key string, log *slog.Logger) (Certificate, error) {
	f := &files{cert: cert, key: key, log: log}
	if err := f.read(); err != nil {
		return nil, fmt.Errorf("serving certificate (tlsCertFile, tlsPrivateKeyFile): %w", err)
	}
	f.looked = time.Now()
	return f.get, nil
}

// Lifetime of certificates that sign themselves, and when they are renewed.
const (
	selfSignedLife  = 365 * 24 * time.Hour
	selfSignedRenew = 30 * 24 * time.Hour
)

// SelfSigned serves kubelet.crt and kubelet.key of dir and makes them when they
// are missing or about to end.
func SelfSigned(dir, node string, addresses []string, log *slog.Logger) (Certificate, error) {
	f := &files{cert: filepath.Join(dir, "kubelet.crt"), key: filepath.Join(dir, "kubelet.key"), log: log}
	f.renew = func() error { return selfSign(f.cert, f.key, node, addresses) }
	if err := f.read(); err != nil || f.ending() {
		if err != nil && !os.IsNotExist(err) {
			log.Warn("serving certificate cannot be used and is replaced", "error", err)
		}
		if err := f.renew(); err != nil {
			return nil, fmt.Errorf("serving certificate: %w", err)
		}
		if err := f.read(); err != nil {
			return nil, fmt.Errorf("serving certificate: %w", err)
		}
	}
	f.looked = time.Now()
	return f.get, nil
}

func (f *files) read() error {
	var contents [2][]byte
	for i, name := range []string{f.cert, f.key} {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		contents[i] = b
	}
	if f.current != nil && bytes.Equal(contents[0], f.contents[0]) && bytes.Equal(contents[1], f.contents[1]) {
		return nil
	}
	pair, err := tls.X509KeyPair(contents[0], contents[1])
	if err != nil {
		return fmt.Errorf("%s, %s: %w", f.cert, f.key, err)
	}
	if f.current != nil {
		f.log.Info("serving certificate replaced", "file", f.cert, "until", pair.Leaf.NotAfter)
	}
	f.contents, f.current = contents, &pair
	return nil
}

func (f *files) ending() bool { return time.Until(f.current.Leaf.NotAfter) < selfSignedRenew }

func (f *files) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); now.Sub(f.looked) >= certLook {
		f.looked = now
		err := f.read()
		if f.renew != nil && (err != nil || f.ending()) {
			if err = f.renew(); err == nil {
				err = f.read()
			}
		}
		if err != nil {
			f.log.Warn("serving certificate cannot be read, the last one stays in force", "error", err)
		}
	}
	return f.current, nil
}

// selfSign writes a certificate and its key, the key first: a certificate
// without its key would be taken for a broken one.
func selfSign(cert, key, node string, addresses []string) error {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: fmt.Sprintf("%s@%d", node, now.Unix())},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(selfSignedLife), // clocks differ
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true, IsCA: true, DNSNames: []string{node},
	}
	for _, a := range addresses {
		if ip := net.ParseIP(a); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(cert), 0o755); err != nil {
		return err
	}
	if err := replace(key, "PRIVATE KEY", pkcs8, 0o600); err != nil {
		return err
	}
	return replace(cert, "CERTIFICATE", der, 0o644)
}

// replace writes a PEM file by an atomic rename.
func replace(name, kind string, der []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	err = pem.Encode(f, &pem.Block{Type: kind, Bytes: der})
	if cerr := f.Chmod(mode); err == nil {
		err = cerr
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
