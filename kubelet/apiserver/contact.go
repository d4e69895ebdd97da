package apiserver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"
)

// Contact is what the node's requests to its apiserver come to, for those who
// tell users: each answer and each failure of a request says it. A zero Contact
// has asked nothing yet.
type Contact struct {
	mu    sync.Mutex
	now   ContactState
	heard time.Time // the last answer that was no refusal
}

// ContactState is what the last requests came to.
type ContactState struct {
	Kind ContactKind
	// Since when it is so; zero: always.
	Since time.Time
	// Message says why, unless it is Connected.
	Message string
}

// ContactKind is one of a few words for programs.
type ContactKind string

const (
	// Connecting: no request has come to an end yet.
	Connecting ContactKind = "Connecting"
	Connected  ContactKind = "Connected"
	// Refused: the apiserver does not take the node for who it says it is, or
	// lets it do nothing.
	Refused ContactKind = "Refused"
	// Untrusted: its certificate is not one that the node may trust.
	Untrusted ContactKind = "Untrusted"
	// Away: nobody answers, or with an error of the server.
	Away ContactKind = "Away"
)

// forbiddenFor is how long a node may hear nothing but 403 before it counts as
// refused. Single ones are usual: the node authorizer learns late of what a
// node's pods use. A node that is let in renews its lease every 10 s.
const forbiddenFor = 30 * time.Second

// State is what the last requests came to.
func (c *Contact) State() ContactState {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.now.Kind == "" {
		return ContactState{Kind: Connecting}
	}
	return c.now
}

// Wrap a transport to listen to what becomes of its requests.
func (c *Contact) Wrap(next http.RoundTripper) http.RoundTripper { return listening{next, c} }

type listening struct {
	http.RoundTripper
	c *Contact
}

func (l listening) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := l.RoundTripper.RoundTrip(r)
	if err == nil || !errors.Is(r.Context().Err(), context.Canceled) { // one that is called off tells nothing
		l.c.hear(resp, err, time.Now())
	}
	return resp, err
}

func (c *Contact) hear(resp *http.Response, err error, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	kind, message := judge(resp, err)
	if kind == Connected {
		c.heard = at
	}
	if err == nil && resp.StatusCode == http.StatusForbidden {
		if c.heard.IsZero() {
			c.heard = at
		}
		if at.Sub(c.heard) < forbiddenFor {
			return
		}
	}
	if kind != c.now.Kind {
		c.now = ContactState{Kind: kind, Since: at}
	}
	c.now.Message = message
}

func judge(resp *http.Response, err error) (ContactKind, string) {
	if err != nil {
		return judgeError(err)
	}
	switch code := resp.StatusCode; {
	case code == http.StatusUnauthorized:
		return Refused, "it does not accept the node's credentials: 401 Unauthorized"
	case code == http.StatusForbidden:
		return Refused, "it lets the node do nothing: 403 Forbidden"
	case code >= 500:
		return Away, fmt.Sprintf("it answers with %d %s", code, http.StatusText(code))
	}
	return Connected, ""
}

func judgeError(err error) (ContactKind, string) {
	var (
		unknown *tls.CertificateVerificationError
		ca      x509.UnknownAuthorityError
		host    x509.HostnameError
		invalid x509.CertificateInvalidError
		alert   tls.AlertError
		op      *net.OpError
	)
	switch {
	case errors.As(err, &unknown), errors.As(err, &ca), errors.As(err, &host), errors.As(err, &invalid):
		return Untrusted, "its certificate is not trusted: " + err.Error()
	case errors.As(err, &alert), errors.As(err, &op) && op.Op == "remote error":
		return Refused, "it does not accept the node's certificate: " + err.Error()
	case errors.Is(err, context.DeadlineExceeded):
		return Away, "it does not answer in time"
	}
	return Away, err.Error()
}
