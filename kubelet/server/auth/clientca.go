package auth

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
)

// caLook is the least time between two looks at the CA file.
const caLook = time.Second

// clientCA knows the CAs that sign client certificates, from a file that may
// be replaced at any time. A file that is broken leaves the old ones in force.
type clientCA struct {
	path string
	log  *slog.Logger

	mu      sync.Mutex
	looked  time.Time
	content []byte
	pool    *x509.CertPool
	told    string // the error that was logged last
}

func openClientCA(path string, log *slog.Logger) (*clientCA, error) {
	c := &clientCA{path: path, log: log}
	if err := c.read(); err != nil {
		return nil, fmt.Errorf("client CA (authentication.x509.clientCAFile, --client-ca-file): %w", err)
	}
	c.looked = time.Now()
	return c, nil
}

func (c *clientCA) read() error {
	b, err := os.ReadFile(c.path)
	if err != nil {
		return err
	}
	if bytes.Equal(b, c.content) {
		return nil
	}
	pool, n := x509.NewCertPool(), 0
	for rest := b; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return fmt.Errorf("%s: %w", c.path, err)
		}
		pool.AddCert(cert)
		n++
	}
	if n == 0 {
		return fmt.Errorf("%s: holds no certificate", c.path)
	}
	if c.content != nil {
		c.log.Info("client CA replaced", "file", c.path, "certificates", n)
	}
	c.content, c.pool = b, pool
	return nil
}

// roots are the CAs as the file has them now.
func (c *clientCA) roots() *x509.CertPool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := time.Now(); now.Sub(c.looked) >= caLook {
		c.looked = now
		told := ""
		if err := c.read(); err != nil {
			if told = err.Error(); told != c.told {
				c.log.Warn("client CA cannot be read, the last one stays in force", "error", err)
			}
		}
		c.told = told
	}
	return c.pool
}

// uidAttribute is the X.520 attribute that carries a user's UID in a client
// certificate (KEP-4193's sibling in apiserver's x509 request authenticator).
var uidAttribute = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57683, 2}

// credentialID is the extra attribute that identifies the credential.
const credentialID = "authentication.kubernetes.io/credential-id"

// user that the first certificate names: common name and organizations, as
// kube-apiserver reads them.
func (c *clientCA) user(chain []*x509.Certificate) (*User, error) {
	intermediates := x509.NewCertPool()
	for _, cert := range chain[1:] {
		intermediates.AddCert(cert)
	}
	cert := chain[0]
	if _, err := cert.Verify(x509.VerifyOptions{
		Roots: c.roots(), Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}); err != nil {
		return nil, fmt.Errorf("client certificate %q: %w", cert.Subject, err)
	}
	if cert.Subject.CommonName == "" {
		return nil, errors.New("client certificate without a common name")
	}
	sum := sha256.Sum256(cert.Raw)
	u := &User{
		Username: cert.Subject.CommonName, Groups: cert.Subject.Organization,
		Extra: map[string]authenticationv1.ExtraValue{credentialID: {"X509SHA256=" + hex.EncodeToString(sum[:])}},
	}
	for _, name := range cert.Subject.Names {
		if name.Type.Equal(uidAttribute) {
			u.UID, _ = name.Value.(string)
		}
	}
	return u, nil
}
