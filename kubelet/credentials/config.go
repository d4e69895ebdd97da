package credentials

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	kubeletv1 "k8s.io/kubelet/config/v1"
	"k8s.io/kubernetes/pkg/credentialprovider"
	"sigs.k8s.io/yaml"
)

// configVersions of the file and pluginVersions of what plugins speak. The
// older ones have the same fields, or fewer.
var (
	configVersions = []string{"kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v1beta1", "kubelet.config.k8s.io/v1alpha1"}
	pluginVersions = []string{pluginV1, "credentialprovider.kubelet.k8s.io/v1beta1", "credentialprovider.kubelet.k8s.io/v1alpha1"}
)

const pluginV1 = "credentialprovider.kubelet.k8s.io/v1"

// read the configuration: a file, or a directory of files by their names' order.
func read(path string) ([]kubeletv1.CredentialProvider, error) {
	files := []string{path}
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.IsDir() {
		entries, err := os.ReadDir(path)
		if err != nil {
			return nil, err
		}
		files = nil
		for _, e := range entries {
			if ext := filepath.Ext(e.Name()); !e.IsDir() && slices.Contains([]string{".yaml", ".yml", ".json"}, ext) {
				files = append(files, filepath.Join(path, e.Name()))
			}
		}
	}
	var all []kubeletv1.CredentialProvider
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		var cfg kubeletv1.CredentialProviderConfig
		if err := yaml.UnmarshalStrict(raw, &cfg); err != nil {
			return nil, fmt.Errorf("%s: %w: %w", file, err, errdefs.ErrInvalidArgument)
		}
		if cfg.Kind != "CredentialProviderConfig" || !slices.Contains(configVersions, cfg.APIVersion) {
			return nil, fmt.Errorf("%s: it is a %s of %s: want a CredentialProviderConfig of %s: %w", file, cfg.Kind, cfg.APIVersion, configVersions[0], errdefs.ErrInvalidArgument)
		}
		all = append(all, cfg.Providers...)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s: it names no provider: %w", path, errdefs.ErrInvalidArgument)
	}
	return all, nil
}

// check one provider of the configuration.
func check(p *kubeletv1.CredentialProvider, bin string) error {
	var errs []error
	bad := func(field, format string, args ...any) {
		errs = append(errs, fmt.Errorf("provider %q: %s: "+format, append([]any{p.Name, field}, args...)...))
	}
	if p.Name == "" || p.Name == "." || p.Name == ".." || strings.ContainsAny(p.Name, "/ ") {
		bad("name", "write the name of a program in %s", bin)
	} else if _, err := exec.LookPath(filepath.Join(bin, p.Name)); err != nil {
		bad("name", "%w", err)
	}
	if !slices.Contains(pluginVersions, p.APIVersion) {
		bad("apiVersion", "%q: want one of %s", p.APIVersion, strings.Join(pluginVersions, ", "))
	}
	if len(p.MatchImages) == 0 {
		bad("matchImages", "write which images it has credentials for")
	}
	for _, m := range p.MatchImages {
		if _, err := credentialprovider.ParseSchemelessURL(m); err != nil {
			bad("matchImages", "%q: %w", m, err)
		}
	}
	if d := p.DefaultCacheDuration; d == nil || d.Duration < 0 {
		bad("defaultCacheDuration", "write a duration of 0s or more")
	}
	if a := p.TokenAttributes; a != nil {
		if p.APIVersion != pluginV1 {
			bad("tokenAttributes", "only with apiVersion %s", pluginV1)
		}
		if a.ServiceAccountTokenAudience == "" {
			bad("tokenAttributes.serviceAccountTokenAudience", "write whom the token is for")
		}
		if a.RequireServiceAccount == nil {
			bad("tokenAttributes.requireServiceAccount", "write true or false")
		} else if !*a.RequireServiceAccount && len(a.RequiredServiceAccountAnnotationKeys) > 0 {
			bad("tokenAttributes.requiredServiceAccountAnnotationKeys", "needs requireServiceAccount: true")
		}
		if a.CacheType != kubeletv1.ServiceAccountServiceAccountTokenCacheType && a.CacheType != kubeletv1.TokenServiceAccountTokenCacheType {
			bad("tokenAttributes.cacheType", "%q: want ServiceAccount or Token", a.CacheType)
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("%w: %w", errors.Join(errs...), errdefs.ErrInvalidArgument)
	}
	return nil
}
