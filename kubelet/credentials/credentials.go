// Package credentials gets credentials for images from plugins: programs of a
// registry's vendor that are told an image and answer with user and password
// (KEP-2133), where asked for with a token of the pod's service account
// (KEP-4412). Protocol and configuration are upstream's.
package credentials

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	kubeletv1 "k8s.io/kubelet/config/v1"
	pluginapi "k8s.io/kubelet/pkg/apis/credentialprovider/v1"
	"k8s.io/kubernetes/pkg/credentialprovider"
)

// Accounts are the service accounts of a cluster.
type Accounts interface {
	ServiceAccount(ctx context.Context, namespace, name string) (*v1.ServiceAccount, error)
	// Token of a pod's service account, for an audience, and when it ends.
	Token(ctx context.Context, pod *v1.Pod, audience string, valid time.Duration) (string, time.Time, error)
}

// Config of Providers.
type Config struct {
	// File of the CredentialProviderConfig, or a directory of such; BinDir has
	// the plugins.
	File, BinDir string
	// Accounts for plugins that want tokens; nil: there is no cluster.
	Accounts Accounts
	Log      *slog.Logger
}

// Providers of credentials.
type Providers struct {
	all []*provider
	log *slog.Logger
}

// Open reads the configuration and looks for the plugins. A mistake in it is an
// error that names provider and field.
func Open(cfg Config) (*Providers, error) {
	if cfg.BinDir == "" {
		return nil, fmt.Errorf("image credential providers (--image-credential-provider-config): name the directory of the plugins with --image-credential-provider-bin-dir: %w", errdefs.ErrInvalidArgument)
	}
	configured, err := read(cfg.File)
	if err != nil {
		return nil, fmt.Errorf("image credential providers (--image-credential-provider-config): %w", err)
	}
	p := &Providers{log: cfg.Log}
	seen := map[string]bool{}
	for i := range configured {
		c := &configured[i]
		err := check(c, cfg.BinDir)
		if err == nil && seen[c.Name] {
			err = fmt.Errorf("provider %q: it is named twice: %w", c.Name, errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return nil, fmt.Errorf("image credential providers (--image-credential-provider-config): %w", err)
		}
		seen[c.Name] = true
		p.all = append(p.all, &provider{
			cfg: *c, program: filepath.Join(cfg.BinDir, c.Name), accounts: cfg.Accounts,
			now: time.Now, kept: map[string]answer{}, asking: map[string]*question{},
		})
	}
	return p, nil
}

// Config that the plugins have for an image of a pod, by registry. A plugin
// that fails is logged, as if it had none: the image may be public. nil has none.
func (p *Providers) Config(ctx context.Context, pod *v1.Pod, image string) credentialprovider.DockerConfig {
	out := credentialprovider.DockerConfig{}
	if p == nil {
		return out
	}
	for _, one := range p.all {
		found, err := one.get(ctx, pod, image)
		if err != nil {
			p.log.Warn("plugin gives no credentials", "plugin", one.cfg.Name, "image", image, "pod", pod.Namespace+"/"+pod.Name, "error", err)
		}
		for registry, auth := range found {
			out[registry] = credentialprovider.DockerConfigEntry{Username: auth.Username, Password: auth.Password}
		}
	}
	return out
}

// provider is one plugin and what it has answered.
type provider struct {
	cfg      kubeletv1.CredentialProvider
	program  string
	accounts Accounts
	now      func() time.Time

	mu     sync.Mutex
	kept   map[string]answer
	asking map[string]*question
}

type answer struct {
	auth map[string]pluginapi.AuthConfig
	ends time.Time
}

// question that is being put to the plugin; who comes later waits for it.
type question struct {
	done chan struct{}
	auth map[string]pluginapi.AuthConfig
	err  error
}

// identity that a plugin is told of the pod; key tells apart what is kept.
type identity struct {
	token       string
	annotations map[string]string
	key         string
}

const everyImage = "<global>"

func (p *provider) get(ctx context.Context, pod *v1.Pod, image string) (map[string]pluginapi.AuthConfig, error) {
	if !p.matches(image) {
		return nil, nil
	}
	who, ok, err := p.identity(ctx, pod)
	if err != nil || !ok {
		return nil, err
	}
	p.mu.Lock()
	p.forget()
	for _, scope := range []string{image, registry(image), everyImage} {
		if a, ok := p.kept[scope+"\x00"+who.key]; ok {
			p.mu.Unlock()
			return a.auth, nil
		}
	}
	key := image + "\x00" + who.key + "\x00" + who.token
	q := p.asking[key]
	if q == nil {
		q = &question{done: make(chan struct{})}
		p.asking[key] = q
		// It is put for all who wait for it: none of them may end it.
		go p.answer(context.WithoutCancel(ctx), q, key, image, who)
	}
	p.mu.Unlock()
	select {
	case <-q.done:
		return q.auth, q.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *provider) answer(ctx context.Context, q *question, key, image string, who identity) {
	resp, err := p.ask(ctx, image, who)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil {
		q.auth = resp.Auth
		err = p.keep(resp, image, who)
	}
	q.err = err
	delete(p.asking, key)
	close(q.done)
}

// keep an answer as long as it may be; p.mu is held.
func (p *provider) keep(resp *pluginapi.CredentialProviderResponse, image string, who identity) error {
	scope := ""
	switch resp.CacheKeyType {
	case pluginapi.ImagePluginCacheKeyType:
		scope = image
	case pluginapi.RegistryPluginCacheKeyType:
		scope = registry(image)
	case pluginapi.GlobalPluginCacheKeyType:
		scope = everyImage
	default:
		return fmt.Errorf("its answer has cacheKeyType %q: want Image, Registry or Global", resp.CacheKeyType)
	}
	valid := p.cfg.DefaultCacheDuration.Duration
	if resp.CacheDuration != nil {
		valid = resp.CacheDuration.Duration
	}
	if valid > 0 {
		p.kept[scope+"\x00"+who.key] = answer{resp.Auth, p.now().Add(valid)}
	}
	return nil
}

// forget what has ended; p.mu is held.
func (p *provider) forget() {
	now := p.now()
	for k, a := range p.kept {
		if !now.Before(a.ends) {
			delete(p.kept, k)
		}
	}
}

func (p *provider) matches(image string) bool {
	return slices.ContainsFunc(p.cfg.MatchImages, func(m string) bool {
		ok, err := credentialprovider.URLsMatchStr(m, image)
		return err == nil && ok
	})
}

// registry of an image's name.
func registry(image string) string {
	host, _, _ := strings.Cut(image, "/")
	return host
}

// identity of the pod for the plugin; false: it is not to be asked for this pod.
func (p *provider) identity(ctx context.Context, pod *v1.Pod) (identity, bool, error) {
	a := p.cfg.TokenAttributes
	if a == nil {
		return identity{}, true, nil
	}
	name := pod.Spec.ServiceAccountName
	if name == "" || p.accounts == nil { // a static pod, which has no account
		return identity{}, !*a.RequireServiceAccount, nil
	}
	account, err := p.accounts.ServiceAccount(ctx, pod.Namespace, name)
	if err != nil {
		return identity{}, false, err
	}
	who := identity{annotations: map[string]string{}}
	for _, k := range a.RequiredServiceAccountAnnotationKeys {
		v, ok := account.Annotations[k]
		if !ok {
			return identity{}, false, nil // the account has not asked for it
		}
		who.annotations[k] = v
	}
	for _, k := range a.OptionalServiceAccountAnnotationKeys {
		if v, ok := account.Annotations[k]; ok {
			who.annotations[k] = v
		}
	}
	// The API's own default of an hour.
	if who.token, _, err = p.accounts.Token(ctx, pod, a.ServiceAccountTokenAudience, time.Hour); err != nil {
		return identity{}, false, err
	}
	told, err := json.Marshal(who.annotations)
	if err != nil {
		return identity{}, false, err
	}
	who.key = strings.Join([]string{pod.Namespace, name, string(account.UID), string(told)}, "\x00")
	if a.CacheType == kubeletv1.TokenServiceAccountTokenCacheType {
		sum := sha256.Sum256([]byte(who.token))
		who.key += "\x00" + string(pod.UID) + "\x00" + hex.EncodeToString(sum[:])
	}
	return who, true, nil
}

// askTimeout of one question, upstream's.
const askTimeout = time.Minute

// maxOutput of a plugin: an answer has some kilobytes.
const maxOutput = 1 << 20

// bounded keeps the first bytes that are written to it. Its left is negative
// when there were more.
type bounded struct {
	kept []byte
	left int
}

func (b *bounded) Write(p []byte) (int, error) {
	if keep := min(len(p), max(b.left, 0)); keep > 0 {
		b.kept = append(b.kept, p[:keep]...)
	}
	if b.left -= len(p); b.left < -1 {
		b.left = -1
	}
	return len(p), nil
}

// ask the plugin. Neither its answer nor the token is part of any error.
func (p *provider) ask(ctx context.Context, image string, who identity) (*pluginapi.CredentialProviderResponse, error) {
	req := &pluginapi.CredentialProviderRequest{Image: image, ServiceAccountToken: who.token, ServiceAccountAnnotations: who.annotations}
	req.Kind, req.APIVersion = "CredentialProviderRequest", p.cfg.APIVersion
	in, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.program, p.cfg.Args...)
	cmd.Env = os.Environ()
	for _, e := range p.cfg.Env {
		cmd.Env = append(cmd.Env, e.Name+"="+e.Value)
	}
	cmd.WaitDelay = time.Second
	out, errs := &bounded{left: maxOutput}, &bounded{left: maxOutput}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), out, errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%w: %s", cmp.Or(ctx.Err(), err), strings.TrimSpace(string(errs.kept)))
	}
	if out.left < 0 {
		return nil, fmt.Errorf("its answer has more than %d bytes", maxOutput)
	}
	resp := &pluginapi.CredentialProviderResponse{}
	if json.Unmarshal(out.kept, resp) != nil {
		return nil, errors.New("its answer is no JSON of a CredentialProviderResponse")
	}
	if resp.Kind != "CredentialProviderResponse" || resp.APIVersion != p.cfg.APIVersion {
		return nil, fmt.Errorf("its answer is a %s of %s: want a CredentialProviderResponse of %s", resp.Kind, resp.APIVersion, p.cfg.APIVersion)
	}
	if a := p.cfg.TokenAttributes; a != nil && a.CacheType != kubeletv1.TokenServiceAccountTokenCacheType {
		for _, auth := range resp.Auth {
			if who.token != "" && auth.Password == who.token {
				return nil, errors.New("it answers with the pod's own token, which may be kept for that pod only: set tokenAttributes.cacheType: Token")
			}
		}
	}
	return resp, nil
}
