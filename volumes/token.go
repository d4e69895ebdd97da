package volumes

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// maxTokenAge is when a token that lives longer is renewed all the same, and
// renewAfter the part of its life after which any is (upstream: pkg/kubelet/token).
const (
	maxTokenAge = 24 * time.Hour
	renewAfter  = 0.8
)

// tokens are the service account tokens that pods have in their volumes. They
// are kept in memory alone, and on the pods' own tmpfs.
type tokens struct {
	mu     sync.Mutex
	have   map[tokenKey]token
	asking singleflight.Group // by tokenKey: a volume may be set up and renewed at once
}

type tokenKey struct {
	pod      types.UID
	account  string
	audience string
	seconds  int64
}

type token struct {
	text            string
	issued, expires time.Time
}

func (t *tokens) get(key tokenKey) (token, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	have, known := t.have[key]
	return have, known
}

// fresh says that a token need not be renewed yet.
func (t token) fresh(now time.Time) bool {
	age := now.Sub(t.issued)
	return now.Before(t.expires) && age < maxTokenAge && float64(age) < renewAfter*float64(t.expires.Sub(t.issued))
}

// token of a pod for one projected source: the one it has, or a new one. While
// none can be had, one that has not ended is used on; in the volume's file is
// the one of the last run of the agent.
func (v *Volumes) token(ctx context.Context, pod *v1.Pod, source *v1.ServiceAccountTokenProjection, inFile func() string) (string, error) {
	if v.cfg.Tokens == nil {
		return "", fmt.Errorf("serviceAccountToken: a token needs a cluster, and this node has none: remove the source: %w", errdefs.ErrNotImplemented)
	}
	seconds := int64(3600) // the API's default
	if source.ExpirationSeconds != nil {
		seconds = *source.ExpirationSeconds
	}
	key := tokenKey{pod.UID, pod.Spec.ServiceAccountName, source.Audience, seconds}
	now := time.Now()
	have, known := v.tokens.get(key)
	if known && have.fresh(now) {
		return have.text, nil
	}
	asked, err, _ := v.tokens.asking.Do(fmt.Sprint(key), func() (any, error) {
		if have, _ := v.tokens.get(key); have.fresh(now) { // come meanwhile
			return have.text, nil
		}
		text, expires, err := v.cfg.Tokens.Token(ctx, pod, source.Audience, time.Duration(seconds)*time.Second)
		if err != nil {
			return "", err
		}
		v.tokens.mu.Lock()
		defer v.tokens.mu.Unlock()
		if v.tokens.have == nil {
			v.tokens.have = map[tokenKey]token{}
		}
		v.tokens.have[key] = token{text: text, issued: now, expires: expires}
		return text, nil
	})
	if err == nil {
		return asked.(string), nil
	}
	err = fmt.Errorf("serviceAccountToken for service account %s/%s, audience %q: %w", pod.Namespace, pod.Spec.ServiceAccountName, source.Audience, err)
	if !errors.Is(err, errdefs.ErrUnavailable) {
		return "", err
	}
	if !known {
		have.text = inFile()
		have.expires = expiry(have.text)
	}
	if now.Before(have.expires) {
		v.log.Debug("token is not renewed yet", "pod", pod.Name, "expires", have.expires, "error", err)
		return have.text, nil
	}
	return "", err
}

// forgetTokens of a pod.
func (v *Volumes) forgetTokens(uid types.UID) {
	v.tokens.mu.Lock()
	defer v.tokens.mu.Unlock()
	for key := range v.tokens.have {
		if key.pod == uid {
			delete(v.tokens.have, key)
		}
	}
}

// expiry reads the end of a token's life out of it (RFC 7519, claim exp); zero
// when there is none. The token is not verified: who issued it will.
func expiry(text string) time.Time {
	parts := strings.Split(text, ".")
	if len(parts) != 3 {
		return time.Time{}
	}
	data, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		Exp int64 `json:"exp"`
	}
	if err != nil || json.Unmarshal(data, &claims) != nil || claims.Exp == 0 {
		return time.Time{}
	}
	return time.Unix(claims.Exp, 0)
}

// hasToken says whether a volume holds tokens, which are renewed in time.
func hasToken(vol *v1.Volume) bool {
	if vol.Projected == nil {
		return false
	}
	for i := range vol.Projected.Sources {
		if vol.Projected.Sources[i].ServiceAccountToken != nil {
			return true
		}
	}
	return false
}

// writtenFile reads a file that podd wrote into a volume of a pod; "": none.
func (v *Volumes) writtenFile(uid types.UID, vol *v1.Volume, path string) string {
	p, err := v.openPod(uid, false)
	if err != nil {
		return ""
	}
	defer p.close()
	root, err := p.walk(volumesDir, plugin(vol), vol.Name)
	if err != nil {
		return ""
	}
	defer root.close()
	fd, err := openBeneath(root, dataLink+"/"+path, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return ""
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return ""
	}
	return string(data)
}
