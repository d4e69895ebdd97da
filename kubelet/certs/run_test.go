package certs

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
)

// signer signs what it is asked for, for a time that begins now.
type signer struct {
	key   *ecdsa.PrivateKey
	life  time.Duration
	now   func() time.Time
	asked atomic.Int32
	fault error
}

func newSigner(t *testing.T, life time.Duration, now func() time.Time) *signer {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &signer{key: key, life: life, now: now}
}

func (s *signer) Certificate(_ context.Context, _ string, csr []byte, _ []certificatesv1.KeyUsage) ([]byte, error) {
	s.asked.Add(1)
	if s.fault != nil {
		return nil, s.fault
	}
	block, _ := pem.Decode(csr)
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	is := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: req.Subject, NotBefore: s.now(), NotAfter: s.now().Add(s.life)}
	der, err := x509.CreateCertificate(rand.Reader, is, is, req.PublicKey, s.key)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), err
}

// TestRenewalGoesByTheWallClock: whatever the clock does, and however long the
// machine is suspended, a certificate that can still be renewed is.
func TestRenewalGoesByTheWallClock(t *testing.T) {
	for name, tc := range map[string]struct {
		life, jump, within time.Duration
	}{
		"suspended for most of its life":         {100 * 24 * time.Hour, 95 * 24 * time.Hour, time.Hour + time.Minute},
		"the clock was behind by a month":        {40 * 24 * time.Hour, 39 * 24 * time.Hour, time.Hour + time.Minute},
		"a short one, suspended for most of it":  {10 * time.Minute, 9*time.Minute + 10*time.Second, 40 * time.Second},
		"the clock was ahead, and is set back":   {10 * time.Hour, -5 * time.Hour, 15 * time.Hour},
		"nothing happens, as long as nothing is": {10 * time.Hour, 0, 9*time.Hour + time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var skew time.Duration // of the wall clock against the monotonic one
				now := func() time.Time { return time.Now().Round(0).Add(skew) }
				p, err := NewClient(t.TempDir(), "n1", slog.New(slog.DiscardHandler))
				if err != nil {
					t.Fatal(err)
				}
				p.now = func() time.Time { // as time.Now is, with a monotonic reading
					if skew == 0 {
						return time.Now()
					}
					return now()
				}
				s := newSigner(t, tc.life, now)
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan struct{})
				go func() { defer close(done); p.Run(ctx, s) }()
				synctest.Wait()
				if s.asked.Load() != 1 {
					t.Fatalf("asked %d times at first", s.asked.Load())
				}
				skew = tc.jump
				time.Sleep(tc.within)
				synctest.Wait()
				if s.asked.Load() < 2 || p.Current() == nil {
					t.Errorf("asked %d times within %s", s.asked.Load(), tc.within)
				}
				cancel()
				<-done
			})
		})
	}
}

// A node whose certificate has ended joins again, as soon as there is something
// to join with; until then it says what to do.
func TestNodeWhoseCertificateHasEndedJoinsAgain(t *testing.T) {
	p, err := NewClient(t.TempDir(), "n1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	bootstrap := filepath.Join(t.TempDir(), "bootstrap")
	for _, path := range []string{"", bootstrap} {
		c := &Connection{cfg: Config{Bootstrap: path}, pair: p}
		_, err := (&rejoining{p, &signer{fault: errors.New("forbidden")}, c.joiner}).Certificate(t.Context(), "", nil, nil)
		if err == nil || !strings.Contains(err.Error(), "--bootstrap-kubeconfig") {
			t.Errorf("bootstrap %q: %v", path, err)
		}
	}
	config := `{"apiVersion":"v1","kind":"Config","clusters":[{"name":"c","cluster":{"server":"https://127.0.0.1:1"}}],
"users":[{"name":"u","user":{"token":"token"}}],"contexts":[{"name":"x","context":{"cluster":"c","user":"u"}}],"current-context":"x"}`
	if err := os.WriteFile(bootstrap, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if by, err := (&Connection{cfg: Config{Bootstrap: bootstrap}}).joiner(); err != nil || by == nil {
		t.Errorf("a new bootstrap file is not taken: %v", err)
	}
	node, token := newSigner(t, time.Hour, time.Now), newSigner(t, time.Hour, time.Now)
	r := &rejoining{p, node, func() (Signer, error) { return token, nil }}
	for range 2 {
		if err := p.Renew(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if token.asked.Load() != 1 || node.asked.Load() != 1 {
		t.Errorf("asked with the token %d times, as the node %d times", token.asked.Load(), node.asked.Load())
	}
}
