package credentials

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// plugin writes a provider that counts its questions in a file and answers with
// script, and a configuration with more lines of it.
func plugin(t *testing.T, script, more string) (cfg Config, asked func() []string) {
	t.Helper()
	dir := t.TempDir()
	log := filepath.Join(dir, "asked")
	write(t, filepath.Join(dir, "one"), "#!/bin/sh\n{ cat; echo; } >> "+log+"\n"+script, 0o755)
	write(t, filepath.Join(dir, "config.yaml"), `
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: one
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  matchImages: ["*.example.com", "other.example.org:5000/team"]
  defaultCacheDuration: 1m
`+more, 0o644)
	return Config{File: filepath.Join(dir, "config.yaml"), BinDir: dir, Log: slog.New(slog.DiscardHandler)}, func() []string {
		b, err := os.ReadFile(log)
		if err != nil {
			return nil
		}
		return strings.Split(strings.TrimSpace(string(b)), "\n")
	}
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func response(fields string) string {
	return `echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1",` + fields + `}'` + "\n"
}

const auth = `"auth":{"a.example.com":{"username":"u","password":"p"}}`

func open(t *testing.T, cfg Config) *Providers {
	t.Helper()
	p, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestAnswersAreKeptAsTold(t *testing.T) {
	pod := &v1.Pod{}
	for _, test := range []struct {
		name, fields string
		images       []string
		want         int
	}{
		{"by image", `"cacheKeyType":"Image",` + auth, []string{"a.example.com/x", "a.example.com/x", "a.example.com/y"}, 2},
		{"by registry", `"cacheKeyType":"Registry",` + auth, []string{"a.example.com/x", "a.example.com/y", "b.example.com/x"}, 2},
		{"for all", `"cacheKeyType":"Global",` + auth, []string{"a.example.com/x", "b.example.com/y"}, 1},
		{"not at all", `"cacheKeyType":"Image","cacheDuration":"0s",` + auth, []string{"a.example.com/x", "a.example.com/x"}, 2},
		{"other images", `"cacheKeyType":"Image",` + auth, []string{"example.net/x", "other.example.org:5000/else/x"}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			cfg, asked := plugin(t, response(test.fields), "")
			p := open(t, cfg)
			for _, image := range test.images {
				found := p.Config(t.Context(), pod, image)
				if test.want > 0 && found["a.example.com"].Password != "p" {
					t.Errorf("credentials for %s: %v", image, found)
				}
			}
			if got := asked(); len(got) != test.want {
				t.Errorf("asked %q, want %d questions", got, test.want)
			}
		})
	}
}

func TestAnswersEnd(t *testing.T) {
	cfg, asked := plugin(t, response(`"cacheKeyType":"Image","cacheDuration":"5m",`+auth), "")
	p := open(t, cfg)
	now := time.Now()
	p.all[0].now = func() time.Time { return now }
	ask := func() { p.Config(t.Context(), &v1.Pod{}, "a.example.com/x") }
	ask()
	now = now.Add(4 * time.Minute)
	ask()
	if got := asked(); len(got) != 1 {
		t.Errorf("asked %q", got)
	}
	now = now.Add(time.Minute)
	ask()
	if got := asked(); len(got) != 2 {
		t.Errorf("asked %q", got)
	}
}

func TestOneQuestionForAllWhoWait(t *testing.T) {
	cfg, asked := plugin(t, "sleep 0.3\n"+response(`"cacheKeyType":"Image","cacheDuration":"0s",`+auth), "")
	p := open(t, cfg)
	var all sync.WaitGroup
	for range 5 {
		all.Go(func() {
			if found := p.Config(t.Context(), &v1.Pod{}, "a.example.com/x"); len(found) != 1 {
				t.Errorf("credentials: %v", found)
			}
		})
	}
	all.Wait()
	// A late one may ask again: nothing is kept.
	if got := asked(); len(got) > 2 {
		t.Errorf("asked %q", got)
	}
}

func TestAPluginThatFailsGivesNothing(t *testing.T) {
	for name, script := range map[string]string{
		"ends with an error": "exit 1\n", "no JSON": "echo no\n", "another version": strings.ReplaceAll(response(`"cacheKeyType":"Image",`+auth), "/v1", "/v1beta1"),
	} {
		cfg, _ := plugin(t, script, "")
		if found := open(t, cfg).Config(t.Context(), &v1.Pod{}, "a.example.com/x"); len(found) != 0 {
			t.Errorf("%s: %v", name, found)
		}
	}
}

// accounts that give a token a number each time.
type accounts struct {
	annotations map[string]string
	tokens      int
}

func (a *accounts) ServiceAccount(_ context.Context, namespace, name string) (*v1.ServiceAccount, error) {
	return &v1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: "uid", Annotations: a.annotations}}, nil
}

func (a *accounts) Token(_ context.Context, pod *v1.Pod, audience string, _ time.Duration) (string, time.Time, error) {
	a.tokens++
	return fmt.Sprintf("%s-%s-%d", pod.Name, audience, a.tokens), time.Now().Add(time.Hour), nil
}

func TestTokensOfServiceAccounts(t *testing.T) {
	const attributes = `
  tokenAttributes:
    serviceAccountTokenAudience: reg
    cacheType: ServiceAccount
    requireServiceAccount: true
    requiredServiceAccountAnnotationKeys: [example.com/id]
`
	pod := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "ns"}, Spec: v1.PodSpec{ServiceAccountName: "sa"}}
	cfg, asked := plugin(t, response(`"cacheKeyType":"Image",`+auth), attributes)
	have := &accounts{annotations: map[string]string{"example.com/id": "7", "other": "x"}}
	cfg.Accounts = have
	p := open(t, cfg)
	for range 2 { // the second by what is kept for the account
		if found := p.Config(t.Context(), pod, "a.example.com/x"); len(found) != 1 {
			t.Errorf("credentials: %v", found)
		}
	}
	want := `"serviceAccountToken":"p-reg-1","serviceAccountAnnotations":{"example.com/id":"7"}`
	if got := asked(); len(got) != 1 || !strings.Contains(got[0], want) {
		t.Errorf("asked %q, want %s", got, want)
	}
	have.annotations = nil
	if found := p.Config(t.Context(), pod, "a.example.com/y"); len(found) != 0 {
		t.Errorf("without the annotation: %v", found)
	}
	if found := p.Config(t.Context(), &v1.Pod{}, "a.example.com/y"); len(found) != 0 || len(asked()) != 1 {
		t.Errorf("without an account: %v", found)
	}
	// The token itself as password may not be kept for others.
	cfg, _ = plugin(t, response(`"cacheKeyType":"Image","auth":{"a.example.com":{"username":"u","password":"p-reg-1"}}`), attributes)
	cfg.Accounts = &accounts{annotations: map[string]string{"example.com/id": "7"}}
	if found := open(t, cfg).Config(t.Context(), pod, "a.example.com/x"); len(found) != 0 {
		t.Errorf("the token as password: %v", found)
	}
}

func TestMistakesAreNamed(t *testing.T) {
	good, _ := plugin(t, "", "")
	raw, err := os.ReadFile(good.File)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]struct{ from, to, want string }{
		"no such program":    {"name: one", "name: two", `provider "two": name: `},
		"a path":             {"name: one", "name: ../one", `provider "../one": name: write the name of a program`},
		"plugin's version":   {"credentialprovider.kubelet.k8s.io/v1", "credentialprovider.kubelet.k8s.io/v7", `provider "one": apiVersion: "credentialprovider.kubelet.k8s.io/v7": want one of`},
		"no images":          {`matchImages: ["*.example.com", "other.example.org:5000/team"]`, "", `provider "one": matchImages: write`},
		"no duration":        {"defaultCacheDuration: 1m", "", `provider "one": defaultCacheDuration: write`},
		"a field's name":     {"defaultCacheDuration", "defaultCacheDurations", "defaultCacheDurations"},
		"file's version":     {"kubelet.config.k8s.io/v1", "v1", "want a CredentialProviderConfig of kubelet.config.k8s.io/v1"},
		"no providers":       {"providers:", "providers: []\n#", ""},
		"token without rest": {"defaultCacheDuration: 1m", "defaultCacheDuration: 1m\n  tokenAttributes: {serviceAccountTokenAudience: x}", "tokenAttributes.requireServiceAccount: write true or false"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good
			cfg.File = filepath.Join(t.TempDir(), "c.yaml")
			write(t, cfg.File, strings.Replace(string(raw), change.from, change.to, 1), 0o644)
			_, err := Open(cfg)
			if err == nil || !strings.Contains(err.Error(), change.want) || !strings.Contains(err.Error(), "--image-credential-provider-config") {
				t.Errorf("error %v, want %s", err, change.want)
			}
		})
	}
}

// A plugin that writes without end is not kept in memory.
func TestOutputOfAPluginIsBounded(t *testing.T) {
	cfg, _ := plugin(t, "head -c 20000000 /dev/zero; head -c 20000000 /dev/zero >&2\n", "")
	p := open(t, cfg)
	_, err := p.all[0].ask(t.Context(), "a.example.com/x", identity{})
	if err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("err = %.200v", err)
	}
	b := &bounded{left: 3}
	for _, part := range []string{"ab", "", "cd", "ef"} {
		if n, err := b.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatal(n, err)
		}
	}
	if string(b.kept) != "abc" || b.left >= 0 {
		t.Errorf("kept %q, left %d", b.kept, b.left)
	}
}
