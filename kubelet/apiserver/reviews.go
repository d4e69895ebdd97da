package apiserver

import (
	"context"
	"fmt"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
)

// TokenReview asks the apiserver whose a bearer token is.
func (c *Client) TokenReview(ctx context.Context, r *authenticationv1.TokenReview) (*authenticationv1.TokenReview, error) {
	out := &authenticationv1.TokenReview{}
	if err := c.Create(ctx, Ref{Group: authenticationv1.GroupName, Resource: "tokenreviews"}, r, out); err != nil {
		return nil, fmt.Errorf("review a token: %w", kindOf(err))
	}
	return out, nil
}

// SubjectAccessReview asks the apiserver whether somebody may do something.
func (c *Client) SubjectAccessReview(ctx context.Context, r *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReview, error) {
	out := &authorizationv1.SubjectAccessReview{}
	if err := c.Create(ctx, Ref{Group: authorizationv1.GroupName, Resource: "subjectaccessreviews"}, r, out); err != nil {
		return nil, fmt.Errorf("review an access: %w", kindOf(err))
	}
	return out, nil
}

// certificateWait is how long somebody may take to approve a request, as
// upstream has it; then another one is made.
const certificateWait = 15 * time.Minute

// Certificate has a request signed: csr and what is returned are PEM. It waits
// until the request is approved and signed.
func (c *Client) Certificate(ctx context.Context, signer string, csr []byte, usages []certificatesv1.KeyUsage) ([]byte, error) {
	made := &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "csr-"},
		Spec:       certificatesv1.CertificateSigningRequestSpec{Request: csr, SignerName: signer, Usages: usages},
	}
	ref := Ref{Group: certificatesv1.GroupName, Resource: "certificatesigningrequests"}
	if err := c.Create(ctx, ref, made, made); err != nil {
		return nil, fmt.Errorf("request a certificate of %s: %w", signer, kindOf(err))
	}
	ctx, cancel := context.WithTimeout(ctx, certificateWait)
	defer cancel()
	type answer struct {
		cert []byte
		err  error
	}
	answers := make(chan answer, 1)
	say := func(r *certificatesv1.CertificateSigningRequest) {
		a := answer{cert: r.Status.Certificate}
		for _, cond := range r.Status.Conditions {
			if cond.Status != v1.ConditionFalse && (cond.Type == certificatesv1.CertificateDenied || cond.Type == certificatesv1.CertificateFailed) {
				a.err = fmt.Errorf("certificate request %s: %s: %s %s", r.Name, cond.Type, cond.Reason, cond.Message)
			}
		}
		if a.err == nil && len(a.cert) == 0 {
			return
		}
		select {
		case answers <- a:
		default:
		}
		cancel()
	}
	c.follow(ctx, ref, fields.OneTermEqualSelector("metadata.name", made.Name), made, changes[*certificatesv1.CertificateSigningRequest]{
		set: say, remove: func(r *certificatesv1.CertificateSigningRequest) {
			select {
			case answers <- answer{err: fmt.Errorf("certificate request %s was deleted", r.Name)}:
			default:
			}
			cancel()
		},
		replace: func(all []*certificatesv1.CertificateSigningRequest) {
			for _, r := range all {
				say(r)
			}
		},
	})
	select {
	case a := <-answers:
		return a.cert, a.err
	default:
		return nil, fmt.Errorf("certificate request %s of %s is not signed yet: %w", made.Name, signer, ctx.Err())
	}
}
