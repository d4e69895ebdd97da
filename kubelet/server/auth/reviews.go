package auth

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
)

// maxToken is more than any service account token has; longer ones are not
// worth a question.
const maxToken = 64 << 10

// bearer is the token of a request: from its header or, for browsers' WebSocket
// clients, which cannot set one, from its list of subprotocols.
func bearer(r *http.Request) (string, bool) {
	if kind, token, ok := strings.Cut(strings.TrimSpace(r.Header.Get("Authorization")), " "); ok && strings.EqualFold(kind, "bearer") {
		token = strings.TrimSpace(token)
		return token, token != "" && len(token) <= maxToken
	}
	if !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		return "", false
	}
	const prefix = "base64url.bearer.authorization.k8s.io."
	token, others := "", []string(nil)
	for _, h := range r.Header.Values("Sec-WebSocket-Protocol") {
		for p := range strings.SplitSeq(h, ",") {
			p = strings.TrimSpace(p)
			encoded, ok := strings.CutPrefix(p, prefix)
			if !ok {
				others = append(others, p)
				continue
			}
			b, err := base64.RawURLEncoding.DecodeString(encoded)
			if err != nil || !utf8.Valid(b) || token != "" {
				return "", false
			}
			token = string(b)
		}
	}
	if token == "" || len(others) == 0 || len(token) > maxToken {
		return "", false
	}
	// It must not come back as the protocol that was agreed on.
	r.Header.Set("Sec-WebSocket-Protocol", strings.Join(others, ","))
	return token, true
}

// tokens has tokens reviewed. Only keyed hashes of them are kept.
type tokens struct {
	reviews Reviews
	ttl     time.Duration
	key     [32]byte
	cache   *cache[*User]
}

func newTokens(r Reviews, ttl time.Duration) *tokens {
	t := &tokens{reviews: r, ttl: ttl, cache: newCache[*User]()}
	_, _ = rand.Read(t.key[:]) // never fails (crypto/rand)
	return t
}

var errUnknownToken = errors.New("bearer token is not valid")

// user that a token stands for.
func (t *tokens) user(ctx context.Context, token string) (*User, error) {
	mac := hmac.New(sha256.New, t.key[:])
	mac.Write([]byte(token))
	u, err := t.cache.get(ctx, string(mac.Sum(nil)), func(ctx context.Context) (*User, time.Duration, error) {
		r, err := t.reviews.TokenReview(ctx, &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}})
		switch {
		case err != nil:
			return nil, 0, err
		case !r.Status.Authenticated && r.Status.Error != "":
			return nil, 0, errors.New(r.Status.Error)
		case !r.Status.Authenticated:
			return nil, t.ttl, nil
		}
		return &r.Status.User, t.ttl, nil
	})
	if err == nil && u == nil {
		err = errUnknownToken
	}
	return u, err
}

// access has requests reviewed.
type access struct {
	reviews         Reviews
	allowedT, deniT time.Duration
	cache           *cache[bool]
}

func newAccess(r Reviews, allowed, denied time.Duration) *access {
	return &access{reviews: r, allowedT: allowed, deniT: denied, cache: newCache[bool]()}
}

// maxAttributes of a user that are worth a place in the cache, as upstream.
const maxAttributes = 10000

func (a *access) allowed(ctx context.Context, u *User, attr *authorizationv1.ResourceAttributes) (bool, error) {
	spec := authorizationv1.SubjectAccessReviewSpec{ResourceAttributes: attr, User: u.Username, Groups: u.Groups, UID: u.UID}
	if len(u.Extra) > 0 {
		spec.Extra = make(map[string]authorizationv1.ExtraValue, len(u.Extra))
		for k, v := range u.Extra {
			spec.Extra[k] = authorizationv1.ExtraValue(v)
		}
	}
	key, err := json.Marshal(&spec) // with sorted keys: equal for what is equal
	if err != nil {
		return false, err
	}
	ask := func(ctx context.Context) (bool, time.Duration, error) {
		r, err := a.reviews.SubjectAccessReview(ctx, &authorizationv1.SubjectAccessReview{Spec: spec})
		switch {
		case err != nil:
			return false, 0, err
		case r.Status.Denied && r.Status.Allowed:
			return false, 0, errors.New("the review both allows and denies")
		case r.Status.Allowed:
			return true, a.allowedT, nil
		}
		return false, a.deniT, nil
	}
	if len(key) > maxAttributes {
		ok, _, err := ask(ctx)
		return ok, err
	}
	sum := sha256.Sum256(key)
	return a.cache.get(ctx, string(sum[:]), ask)
}
