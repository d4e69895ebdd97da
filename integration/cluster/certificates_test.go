package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podd-runtime/podd/integration/cluster/control"
)

// TestBootstrap has a node join with a token: its first certificate is requested,
// approved and signed by the cluster's controllers, its serving certificate is
// signed when an administrator approves it, and both are renewed.
func TestBootstrap(t *testing.T) {
	p := plane(t)
	token, err := p.BootstrapToken(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	bootstrap, err := p.TokenKubeconfig("joiner-bootstrap", token)
	if err != nil {
		t.Fatal(err)
	}
	port := control.FreePort(t)
	n := p.NewNodeWith(t, "joiner", "--bootstrap-kubeconfig", bootstrap, "--client-ca-file", p.CA(), "--port", strconv.Itoa(port),
		"--rotate-certificates", "--rotate-server-certificates")
	pki, kubeconfig := filepath.Join(n.Dir, "pki"), filepath.Join(n.Dir, "kubeconfig")
	n.Extra("--kubeconfig", kubeconfig, "--cert-dir", pki)
	mirror(t, n)
	n.Start()
	s := enter(t, "joiner")
	is := s.awaitNode("joiner", v1.ConditionTrue)

	if b, err := os.ReadFile(kubeconfig); err != nil || !strings.Contains(string(b), "kubelet-client-current.pem") {
		t.Errorf("the kubeconfig that was written: %v\n%s", err, b)
	}
	first := certificate(t, filepath.Join(pki, "kubelet-client-current.pem"))
	if first.Subject.CommonName != "system:node:joiner" || len(first.Subject.Organization) != 1 || first.Subject.Organization[0] != "system:nodes" {
		t.Errorf("the client certificate is of %s", first.Subject)
	}

	// Nothing is served before the certificate for it is there.
	address := net.JoinHostPort(internalIP(is), strconv.Itoa(port))
	if _, err := served(address, p.CA()); err == nil {
		t.Error("a serving certificate without an approval")
	}
	s.approveServing("joiner", time.Minute)
	var serving *x509.Certificate
	s.await("a serving certificate of the cluster's", time.Minute, func(context.Context) error {
		var err error
		serving, err = served(address, p.CA())
		return err
	})
	if serving.Subject.CommonName != "system:node:joiner" {
		t.Errorf("the serving certificate is of %s", serving.Subject)
	}
	s.create(serverOf("web"))
	s.awaitReady("web")
	s.kubectl("logs", "web")

	// The next start needs no bootstrap token.
	n.Signal(15)
	if err := os.Remove(bootstrap); err != nil {
		t.Fatal(err)
	}
	n.Start()
	s.awaitReady("web")
	s.await("the serving certificate after a restart", time.Minute, func(context.Context) error {
		again, err := served(address, p.CA())
		if err == nil && !again.Equal(serving) {
			err = errors.New("it is another one")
		}
		return err
	})
}

// approveServing certificate requests of a node, as an administrator does.
func (s *space) approveServing(name string, timeout time.Duration) {
	s.Helper()
	s.await("a request for a serving certificate", timeout, func(ctx context.Context) error {
		list, err := s.Client.CertificatesV1().CertificateSigningRequests().List(ctx, metav1.ListOptions{FieldSelector: "spec.signerName=" + certificatesv1.KubeletServingSignerName})
		if err != nil {
			return err
		}
		approved := 0
		for i := range list.Items {
			csr := &list.Items[i]
			if csr.Spec.Username == "system:node:"+name && len(csr.Status.Conditions) == 0 {
				s.kubectl("certificate", "approve", csr.Name)
				approved++
			}
		}
		if approved == 0 {
			return fmt.Errorf("%d requests, none to approve", len(list.Items))
		}
		return nil
	})
}

// TestCertificatesRotate has the cluster sign certificates that end soon: the
// node renews them in time, and its connections go on with the new ones.
func TestCertificatesRotate(t *testing.T) {
	long(t)
	p := plane(t)
	s := enter(t, "rotation")
	s.SigningDuration(t, 90*time.Second)
	token, err := p.BootstrapToken(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	bootstrap, err := p.TokenKubeconfig("rotation-bootstrap", token)
	if err != nil {
		t.Fatal(err)
	}
	port := control.FreePort(t)
	n := p.NewNodeWith(t, "rotation", "--bootstrap-kubeconfig", bootstrap, "--client-ca-file", p.CA(), "--port", strconv.Itoa(port),
		"--rotate-certificates", "--rotate-server-certificates")
	pki := filepath.Join(n.Dir, "pki")
	n.Extra("--kubeconfig", filepath.Join(n.Dir, "kubeconfig"), "--cert-dir", pki)
	mirror(t, n)
	n.Start()
	is := s.awaitNode("rotation", v1.ConditionTrue)
	address := net.JoinHostPort(internalIP(is), strconv.Itoa(port))
	s.approveServing("rotation", time.Minute)
	var serving *x509.Certificate
	s.await("a serving certificate", time.Minute, func(context.Context) (err error) {
		serving, err = served(address, p.CA())
		return err
	})
	current := filepath.Join(pki, "kubelet-client-current.pem")
	first := certificate(t, current)
	if life := time.Until(first.NotAfter); life > 2*time.Minute {
		t.Fatalf("the first certificate lives for %v", life)
	}
	// An administrator approves the next one for serving before this one ends.
	s.approveServing("rotation", 3*time.Minute)
	s.await("another serving certificate", time.Minute, func(context.Context) error {
		now, err := served(address, p.CA())
		if err == nil && now.Equal(serving) {
			err = errors.New("it is the first one")
		}
		return err
	})
	if left := time.Until(serving.NotAfter); left < 0 {
		t.Errorf("the first serving certificate had ended %v before another one was served", -left)
	}
	s.await("another certificate", 3*time.Minute, func(context.Context) error {
		if certificate(t, current).Equal(first) {
			return fmt.Errorf("it ends at %v", first.NotAfter)
		}
		return nil
	})
	s.await("the first one has ended", 3*time.Minute, func(context.Context) error {
		if left := time.Until(first.NotAfter); left > 0 {
			return fmt.Errorf("%v are left", left)
		}
		return nil
	})
	s.create(serverOf("web"))
	s.awaitReady("web")
	s.approveServing("rotation", 3*time.Minute)
	s.await("logs over the next serving certificate", time.Minute, func(ctx context.Context) error {
		if _, errOut, err := s.run(ctx, nil, "logs", "web"); err != nil {
			return fmt.Errorf("%w: %s", err, errOut)
		}
		return nil
	})
}

// TestClientCAIsReloaded has another authority's clients let in when the file
// says so, and the old one's no more.
func TestClientCAIsReloaded(t *testing.T) {
	long(t)
	p := plane(t)
	other, err := control.NewAuthority(filepath.Join(t.TempDir(), "pki"))
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Issue("admin", "kubernetes-admin", []string{"system:masters"}, time.Hour); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ca.crt")
	ours, err := os.ReadFile(p.CA())
	if err != nil {
		t.Fatal(err)
	}
	write := func(pem ...[]byte) {
		t.Helper()
		var all []byte
		for _, b := range pem {
			all = append(all, b...)
		}
		if err := os.WriteFile(file+".tmp", all, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".tmp", file); err != nil {
			t.Fatal(err)
		}
	}
	write(ours)
	port := control.FreePort(t)
	kubeconfig, err := p.Node("reload")
	if err != nil {
		t.Fatal(err)
	}
	n := p.NewNodeWith(t, "reload", "--kubeconfig", kubeconfig, "--client-ca-file", file, "--port", strconv.Itoa(port))
	mirror(t, n)
	n.Start()
	s := enter(t, "reload")
	s.awaitNode("reload", v1.ConditionTrue)
	cert, key := p.Certificate("admin")
	mine, theirs := kubeletClient(t, port, cert, key), kubeletClient(t, port, filepath.Join(other.Dir, "admin.crt"), filepath.Join(other.Dir, "admin.key"))
	expect := func(what string, c *kubelet, want int) {
		t.Helper()
		s.await(what, time.Minute, func(context.Context) error {
			code, body, err := c.do(http.MethodGet, "/pods", "")
			if err != nil || code != want {
				return fmt.Errorf("%d, %v: %.100s", code, err, body)
			}
			return nil
		})
	}
	expect("ours let in", mine, http.StatusOK)
	expect("theirs kept out", theirs, http.StatusUnauthorized)
	foreign, err := os.ReadFile(filepath.Join(other.Dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	write(ours, foreign)
	expect("both let in: theirs", theirs, http.StatusOK)
	expect("both let in: ours", mine, http.StatusOK)
	write(foreign)
	expect("ours kept out", mine, http.StatusUnauthorized)
	write([]byte("no certificate"))
	expect("a broken file changes nothing", theirs, http.StatusOK)
	write(ours)
	expect("ours let in again", mine, http.StatusOK)
}

func certificate(t testing.TB, path string) *x509.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(path, path)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

// served is the certificate that a server shows, if it is signed by ca and for
// the address.
func served(address, ca string) (*x509.Certificate, error) {
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", address, &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0], nil
}

func internalIP(n *v1.Node) string {
	for _, a := range n.Status.Addresses {
		if a.Type == v1.NodeInternalIP {
			return a.Address
		}
	}
	return ""
}
