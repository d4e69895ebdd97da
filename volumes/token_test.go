package volumes

import (
	"context"
	"encoding/base64"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
)

// fakeTokens are numbered, in the form of a JWT.
type fakeTokens struct {
	made  int
	valid time.Duration
	down  bool
}

func (f *fakeTokens) Token(_ context.Context, pod *v1.Pod, audience string, valid time.Duration) (string, time.Time, error) {
	if f.down {
		return "", time.Time{}, fmt.Errorf("no answer: %w", errdefs.ErrUnavailable)
	}
	f.made++
	end := time.Now().Add(f.valid)
	payload := fmt.Sprintf(`{"exp":%d,"n":%d,"aud":%q}`, end.Unix(), f.made, audience)
	return "h." + base64.RawURLEncoding.EncodeToString([]byte(payload)) + ".s", end, nil
}

func tokenPod() *v1.Pod {
	seconds := int64(600)
	user := int64(1234)
	p := pod("u1", v1.Volume{Name: "token", VolumeSource: v1.VolumeSource{Projected: &v1.ProjectedVolumeSource{Sources: []v1.VolumeProjection{
		{ServiceAccountToken: &v1.ServiceAccountTokenProjection{Path: "token", Audience: "vault", ExpirationSeconds: &seconds}},
	}}}})
	p.Spec.SecurityContext = &v1.PodSecurityContext{RunAsUser: &user}
	return p
}

// TestTokenIsAskedForOnce: a volume may be set up and renewed at the same time.
func TestTokenIsAskedForOnce(t *testing.T) {
	v, _ := testVolumes(t)
	source := &fakeTokens{valid: 10 * time.Minute}
	v.cfg.Tokens = source
	p := tokenPod()
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			_, err := v.token(t.Context(), p, p.Spec.Volumes[0].Projected.Sources[0].ServiceAccountToken, func() string { return "" })
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if source.made != 1 {
		t.Errorf("%d tokens were asked for", source.made)
	}
}

func TestTokenIsRenewedInTime(t *testing.T) {
	needRoot(t)
	v, _ := testVolumes(t)
	source := &fakeTokens{valid: 10 * time.Minute}
	v.cfg.Tokens = source
	p := tokenPod()
	setup(t, v, p)
	file := v.path(p, &p.Spec.Volumes[0]) + "/token"
	read := func() string {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	first := read()
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil || st.Uid != 1234 || st.Mode&0o777 != 0o600 {
		t.Errorf("owner %d, mode %o: %v", st.Uid, st.Mode, err)
	}
	v.renew(context.Background(), []*v1.Pod{p})
	if read() != first || source.made != 1 {
		t.Error("a fresh token was renewed")
	}
	for key, have := range v.tokens.have { // as after 85 % of its life
		have.issued = have.issued.Add(-57 * time.Minute)
		v.tokens.have[key] = have
	}
	source.down = true
	v.renew(context.Background(), []*v1.Pod{p})
	if read() != first {
		t.Error("a token that still holds was lost while nobody answers")
	}
	source.down = false
	v.renew(context.Background(), []*v1.Pod{p})
	if read() == first || source.made != 2 {
		t.Errorf("not renewed, %d made", source.made)
	}

	// After a restart the file is what is known.
	again := New(v.cfg)
	source.down = true
	if err := again.Setup(context.Background(), p); err != nil {
		t.Errorf("a pod with a token that holds cannot be restarted: %v", err)
	}
	if err := v.Teardown(context.Background(), p.UID); err != nil {
		t.Fatal(err)
	}
	if err := again.Setup(context.Background(), p); !errdefs.IsUnavailable(err) {
		t.Errorf("without any token: %v", err)
	}
}

func TestTokenFreshness(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct {
		age, left time.Duration
		want      bool
	}{
		"new": {0, time.Hour, true}, "at three quarters": {45 * time.Minute, 15 * time.Minute, true}, "at nine tenths": {54 * time.Minute, 6 * time.Minute, false},
		"a day old": {25 * time.Hour, 1000 * time.Hour, false}, "ended": {time.Hour, -time.Second, false},
	} {
		if got := (token{issued: now.Add(-c.age), expires: now.Add(c.left)}).fresh(now); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if !expiry("a.b").IsZero() || !expiry("a.e30.c").IsZero() {
		t.Error("an end was read out of nothing")
	}
}
