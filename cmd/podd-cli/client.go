package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/podd-runtime/podd/kubelet/server/api"
)

// defaultRunDir is the daemon's default, too.
const defaultRunDir = "/run/podd"

// client reaches the daemon of one run directory. It is the RESTClientGetter
// of kubectl's commands: there is no kubeconfig here.
type client struct {
	runDir    string
	namespace string
	timeout   string
	streams   bool      // the command upgrades connections, see bridge
	say       io.Writer // what is being waited for; nil: nobody is told

	discovery sync.Once
	cached    discovery.CachedDiscoveryInterface
	cachedErr error
	bridge    sync.Once
	bridged   *bridge
	bridgeErr error
}

func (c *client) addFlags(f *pflag.FlagSet) {
	dir := os.Getenv("PODD_RUN_DIR")
	if dir == "" {
		dir = defaultRunDir
	}
	f.StringVar(&c.runDir, "run-dir", dir, "Run directory of the daemon to talk to; $PODD_RUN_DIR sets the default")
	f.StringVarP(&c.namespace, "namespace", "n", "", "Namespace of the pods; default: default")
	f.StringVar(&c.timeout, "request-timeout", "0", "How long to wait for an answer, such as 1s or 2m; 0: as long as it takes")
}

func (c *client) socket() string { return filepath.Join(c.runDir, api.SocketName) }

func (c *client) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	return api.Dial(ctx, c.socket())
}

// reach says in plain words when no daemon answers.
func (c *client) reach(ctx context.Context) error {
	err := c.ping(ctx, c.say)
	var e *silent
	switch {
	case err == nil, errors.As(err, &e):
		return err
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("may not open %s: run this as the user the daemon runs as (root)", c.socket())
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("no podd daemon at %s: there is no such socket\nStart one with: podd run --run-dir %s\nIf it runs with another run directory, say --run-dir DIR or set PODD_RUN_DIR", c.socket(), c.runDir)
	}
	return fmt.Errorf("no podd daemon answers at %s: %v\nPods go on without it. Start it again with: podd run --run-dir %s", c.socket(), unwrapOp(err), c.runDir)
}

// unwrapOp drops the address of a dial error, which may be a short form nobody knows.
func unwrapOp(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// ToRESTConfig dials the socket whatever the address says. For commands that
// stream, the address is that of the bridge: their transport does not dial by
// the config.
func (c *client) ToRESTConfig() (*rest.Config, error) {
	cfg := &rest.Config{
		Host:      "http://podd",
		Dial:      c.dial,
		Proxy:     func(*http.Request) (*url.URL, error) { return nil, nil },
		UserAgent: "podd/" + version,
		QPS:       -1, // the socket needs no client-side rate limit
		ContentConfig: rest.ContentConfig{
			ContentType:        "application/json",
			AcceptContentTypes: "application/json",
		},
	}
	if c.streams {
		c.bridge.Do(func() { c.bridged, c.bridgeErr = newBridge(c) })
		if c.bridgeErr != nil {
			return nil, c.bridgeErr
		}
		cfg.Host, cfg.BearerToken = c.bridged.url(), c.bridged.token
	}
	if c.timeout != "" && c.timeout != "0" {
		d, err := clientcmd.ParseTimeout(c.timeout)
		if err != nil {
			return nil, fmt.Errorf("--request-timeout: %w", err)
		}
		cfg.Timeout = d
	}
	cfg.Wrap(func(rt http.RoundTripper) http.RoundTripper { return &asking{rt, c} })
	cfg.Wrap(func(rt http.RoundTripper) http.RoundTripper { return &tables{next: rt} })
	return cfg, nil
}

func (c *client) ToDiscoveryClient() (discovery.CachedDiscoveryInterface, error) {
	c.discovery.Do(func() {
		cfg, err := c.ToRESTConfig()
		if err != nil {
			c.cachedErr = err
			return
		}
		d, err := discovery.NewDiscoveryClientForConfig(cfg)
		if err != nil {
			c.cachedErr = err
			return
		}
		c.cached = memory.NewMemCacheClient(d)
	})
	return c.cached, c.cachedErr
}

func (c *client) ToRESTMapper() (meta.RESTMapper, error) {
	d, err := c.ToDiscoveryClient()
	if err != nil {
		return nil, err
	}
	return restmapper.NewShortcutExpander(restmapper.NewDeferredDiscoveryRESTMapper(d), d, nil), nil
}

func (c *client) ToRawKubeConfigLoader() clientcmd.ClientConfig {
	cfg := clientcmdapi.NewConfig()
	cfg.Clusters["podd"] = &clientcmdapi.Cluster{Server: "http://podd"}
	cfg.Contexts["podd"] = &clientcmdapi.Context{Cluster: "podd"}
	cfg.CurrentContext = "podd"
	overrides := &clientcmd.ConfigOverrides{}
	overrides.Context.Namespace = c.namespace
	return clientcmd.NewDefaultClientConfig(*cfg, overrides)
}

// do sends a request to podd's own part of the API and decodes the answer
// into out (nil: dropped).
func (c *client) do(ctx context.Context, method, path string, query url.Values, body io.Reader, out any) error {
	resp, err := c.open(ctx, method, path, query, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		_, err = io.Copy(io.Discard, resp.Body)
		return err
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("answer to %s %s: %w", method, path, err)
	}
	return nil
}

// open sends a request and returns the answer to read, or the error it tells.
func (c *client) open(ctx context.Context, method, path string, query url.Values, body io.Reader) (*http.Response, error) {
	u := url.URL{Scheme: "http", Host: "podd", Path: api.Prefix + path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	t := &asking{&http.Transport{DialContext: c.dial, DisableKeepAlives: true}, c}
	resp, err := t.RoundTrip(req)
	var e *silent
	if errors.As(err, &e) {
		return nil, e
	}
	if err != nil {
		return nil, fmt.Errorf("ask the daemon at %s: %w", c.socket(), err)
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	var st metav1.Status
	if json.Unmarshal(text, &st) == nil && st.Message != "" {
		return nil, errors.New(st.Message)
	}
	return nil, fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(text))
}

// bridge carries the upgraded connections of exec, attach, cp and port-forward
// from an address of the loopback interface to the socket: client-go's SPDY
// transport can dial TCP only. It lets nobody in without this process' own
// random token, and goes with the process.
type bridge struct {
	token string
	l     net.Listener
}

func newBridge(c *client) (*bridge, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for streams: %w", err)
	}
	b := &bridge{token: rand.Text(), l: l}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", "podd"
			r.Out.Header.Del("Authorization")
		},
		Transport:     &asking{&http.Transport{DialContext: c.dial, DisableKeepAlives: true, DisableCompression: true}, c},
		FlushInterval: -1,
		// kubectl shows it as the reason why it could not upgrade.
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, err.Error(), http.StatusBadGateway)
		},
	}
	want := []byte("Bearer " + b.token)
	srv := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if subtle.ConstantTimeCompare([]byte(r.Header.Get("Authorization")), want) != 1 {
				http.Error(w, "not yours", http.StatusUnauthorized)
				return
			}
			proxy.ServeHTTP(w, r)
		}),
	}
	go srv.Serve(l) // until the process ends
	return b, nil
}

func (b *bridge) url() string { return "http://" + b.l.Addr().String() }
