// Package control runs a real control plane of upstream's programs on this
// machine, for tests and benchmarks: etcd, kube-apiserver and, where asked for,
// kube-controller-manager and kube-scheduler. Everything listens on 127.0.0.1
// and is gone when it is stopped, or when the process that started it ends.
package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	v1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Programs that a whole control plane is made of; kubectl is a client.
var (
	APIOnly  = []string{"etcd", "kube-apiserver"}
	Complete = []string{"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"}
	// WithServices is Complete and a kube-proxy for the one node of StartAt.
	WithServices = append(slices.Clone(Complete), "kube-proxy")
	// all that a Plane can run, in the order of their start.
	all = append(slices.Clone(WithServices), "metrics-server")
)

// ServiceIP is where pods find the apiserver, the first of the services' range.
const ServiceIP = "10.96.0.1"

// NodeName is that of the node whose services kube-proxy serves.
const NodeName = "node1"

// Plane is a control plane that runs.
type Plane struct {
	// Dir keeps everything: pki/, *.kubeconfig, *.log, etcd/, audit.log.
	Dir string
	// URL of the apiserver.
	URL string
	// Admin may do everything.
	Admin *rest.Config
	// Client of Admin's.
	Client kubernetes.Interface

	bin   string
	addr  string // where the apiserver is for pods; "": they cannot reach it
	ca    *Authority
	ports struct{ etcd, peer, api, metrics int }
	mu    sync.Mutex
	procs map[string]*process
	// signing is how long certificates live that the cluster signs; "": a year.
	signing string
}

// Start starts the programs named, from the directory bin, with their state in
// dir, and returns when the apiserver is ready.
func Start(ctx context.Context, bin, dir string, programs ...string) (*Plane, error) {
	return StartAt(ctx, bin, dir, "", programs...)
}

// StartAt is Start with an apiserver that pods reach, at addr, an address of
// this network namespace other than a loopback one, and by services. It is
// meant for a namespace that has nothing else.
func StartAt(ctx context.Context, bin, dir, addr string, programs ...string) (_ *Plane, err error) {
	p := &Plane{Dir: dir, bin: bin, addr: addr, procs: map[string]*process{}}
	defer func() {
		if err != nil {
			p.Stop()
		}
	}()
	if p.ca, err = NewAuthority(filepath.Join(dir, "pki")); err != nil {
		return nil, err
	}
	ports, err := freePorts(4)
	if err != nil {
		return nil, err
	}
	p.ports.etcd, p.ports.peer, p.ports.api, p.ports.metrics = ports[0], ports[1], ports[2], ports[3]
	p.URL = fmt.Sprintf("https://127.0.0.1:%d", p.ports.api)
	if err := p.credentials(); err != nil {
		return nil, err
	}
	p.Admin = p.restConfig("admin")
	if p.Client, err = kubernetes.NewForConfig(p.Admin); err != nil {
		return nil, err
	}
	for _, name := range programs {
		if err := p.StartProgram(name); err != nil {
			return nil, err
		}
		switch name {
		case "etcd":
			err = await(ctx, p, "etcd", func() error {
				return answers(ctx, fmt.Sprintf("http://127.0.0.1:%d/health", p.ports.etcd))
			})
		case "kube-apiserver":
			err = p.AwaitAPI(ctx)
			if err == nil {
				err = p.furnish(ctx)
			}
		}
		if err != nil {
			return nil, err
		}
	}
	return p, nil
}

// StartProgram starts one program, again after StopProgram.
func (p *Plane) StartProgram(name string) error {
	args, err := p.args(name)
	if err != nil {
		return err
	}
	proc, err := begin(filepath.Join(p.bin, name), args, filepath.Join(p.Dir, name+".log"))
	if err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	p.mu.Lock()
	p.procs[name] = proc
	p.mu.Unlock()
	return nil
}

// StopProgram ends one program by sig and waits for its end.
func (p *Plane) StopProgram(name string, sig syscall.Signal) {
	p.mu.Lock()
	proc := p.procs[name]
	delete(p.procs, name)
	p.mu.Unlock()
	if proc != nil {
		proc.stop(sig)
	}
}

// Stop ends everything, what was started last first.
func (p *Plane) Stop() {
	for i := len(all) - 1; i >= 0; i-- {
		p.StopProgram(all[i], syscall.SIGKILL)
	}
}

// AwaitAPI waits until the apiserver is ready.
func (p *Plane) AwaitAPI(ctx context.Context) error {
	return await(ctx, p, "kube-apiserver", func() error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		return p.Client.CoreV1().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
}

func (p *Plane) args(name string) ([]string, error) {
	pki := func(f string) string { return filepath.Join(p.Dir, "pki", f) }
	switch name {
	case "etcd":
		peer := fmt.Sprintf("http://127.0.0.1:%d", p.ports.peer)
		client := fmt.Sprintf("http://127.0.0.1:%d", p.ports.etcd)
		return []string{
			"--name=one", "--data-dir=" + filepath.Join(p.Dir, "etcd"), "--unsafe-no-fsync",
			"--listen-client-urls=" + client, "--advertise-client-urls=" + client,
			"--listen-peer-urls=" + peer, "--initial-advertise-peer-urls=" + peer, "--initial-cluster=one=" + peer,
			"--log-level=warn",
		}, nil
	case "kube-apiserver":
		listen := []string{"--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none"}
		if p.addr != "" {
			listen = []string{"--bind-address=0.0.0.0", "--advertise-address=" + p.addr}
		}
		return append(listen,
			fmt.Sprintf("--secure-port=%d", p.ports.api),
			fmt.Sprintf("--etcd-servers=http://127.0.0.1:%d", p.ports.etcd),
			"--service-cluster-ip-range=10.96.0.0/16",
			"--allow-privileged", "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
			"--enable-bootstrap-token-auth", "--anonymous-auth=false",
			"--tls-cert-file="+pki("apiserver.crt"), "--tls-private-key-file="+pki("apiserver.key"),
			"--client-ca-file="+pki("ca.crt"),
			"--kubelet-client-certificate="+pki("kubelet-client.crt"), "--kubelet-client-key="+pki("kubelet-client.key"),
			"--kubelet-preferred-address-types=InternalIP",
			"--service-account-key-file="+pki("sa.pub"), "--service-account-signing-key-file="+pki("sa.key"),
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			// Tokens live as long as they were asked for, not a year.
			"--service-account-extend-token-expiration=false",
			// Other apiservers are told by this certificate who asks them.
			"--proxy-client-cert-file="+pki("front-proxy.crt"), "--proxy-client-key-file="+pki("front-proxy.key"),
			"--requestheader-client-ca-file="+pki("ca.crt"), "--requestheader-allowed-names=front-proxy",
			"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group", "--requestheader-extra-headers-prefix=X-Remote-Extra-",
			"--audit-log-path="+p.AuditLog(), "--audit-policy-file="+filepath.Join(p.Dir, "audit.yaml"),
			"--audit-log-mode=blocking",
			"--shutdown-delay-duration=0s",
		), nil
	case "kube-controller-manager":
		port, err := freePorts(1)
		if err != nil {
			return nil, err
		}
		kc := p.Kubeconfig(name)
		return []string{
			"--kubeconfig=" + kc, "--authentication-kubeconfig=" + kc, "--authorization-kubeconfig=" + kc,
			"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", port[0]), "--leader-elect=false",
			"--cert-dir=" + filepath.Join(p.Dir, name),
			"--use-service-account-credentials", "--controllers=*,bootstrapsigner,tokencleaner",
			"--service-account-private-key-file=" + pki("sa.key"), "--root-ca-file=" + pki("ca.crt"),
			"--cluster-signing-cert-file=" + pki("ca.crt"), "--cluster-signing-key-file=" + pki("ca.key"),
			"--kube-api-qps=200", "--kube-api-burst=400", "--concurrent-deployment-syncs=10", "--concurrent-replicaset-syncs=10",
			"--cluster-signing-duration=" + cmp.Or(p.signing, "8760h"),
		}, nil
	case "kube-scheduler":
		port, err := freePorts(1)
		if err != nil {
			return nil, err
		}
		kc := p.Kubeconfig(name)
		return []string{
			"--kubeconfig=" + kc, "--authentication-kubeconfig=" + kc, "--authorization-kubeconfig=" + kc,
			"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", port[0]), "--leader-elect=false",
			"--cert-dir=" + filepath.Join(p.Dir, name),
			"--kube-api-qps=500", "--kube-api-burst=1000",
		}, nil
	case "metrics-server":
		kc := p.Kubeconfig(name)
		return []string{
			"--kubeconfig=" + kc, "--authentication-kubeconfig=" + kc, "--authorization-kubeconfig=" + kc,
			"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", p.ports.metrics), "--cert-dir=" + filepath.Join(p.Dir, name),
			"--kubelet-preferred-address-types=InternalIP", "--kubelet-use-node-status-port", "--kubelet-insecure-tls", "--metric-resolution=10s", "--kubelet-request-timeout=5s",
		}, nil
	case "kube-proxy":
		ports, err := freePorts(2)
		if err != nil {
			return nil, err
		}
		return []string{
			"--kubeconfig=" + p.Kubeconfig(name), "--proxy-mode=nftables", "--hostname-override=" + NodeName,
			"--bind-address=" + p.addr, "--conntrack-max-per-core=0",
			fmt.Sprintf("--metrics-bind-address=127.0.0.1:%d", ports[0]), fmt.Sprintf("--healthz-bind-address=127.0.0.1:%d", ports[1]),
		}, nil
	}
	return nil, fmt.Errorf("no program %q in a control plane", name)
}

// MetricsPort is where metrics-server listens on 127.0.0.1.
func (p *Plane) MetricsPort() int { return p.ports.metrics }

// AuditLog has a line for each request to the apiserver.
func (p *Plane) AuditLog() string { return filepath.Join(p.Dir, "audit.log") }

// furnish makes what kubeadm makes on a new cluster: the rights of the
// apiserver's own certificate at kubelets, and those of nodes that join.
func (p *Plane) furnish(ctx context.Context) error {
	group := func(name string) []rbacv1.Subject {
		return []rbacv1.Subject{{Kind: "Group", APIGroup: rbacv1.GroupName, Name: name}}
	}
	for name, b := range map[string]struct {
		role string
		to   []rbacv1.Subject
	}{
		"kubeadm:kubelet-api-admin": {"system:kubelet-api-admin",
			[]rbacv1.Subject{{Kind: "User", APIGroup: rbacv1.GroupName, Name: "kube-apiserver-kubelet-client"}}},
		"kubeadm:kubelet-bootstrap":                     {"system:node-bootstrapper", group("system:bootstrappers")},
		"kubeadm:node-autoapprove-bootstrap":            {"system:certificates.k8s.io:certificatesigningrequests:nodeclient", group("system:bootstrappers")},
		"kubeadm:node-autoapprove-certificate-rotation": {"system:certificates.k8s.io:certificatesigningrequests:selfnodeclient", group("system:nodes")},
	} {
		binding := &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Subjects: b.to,
			RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: b.role},
		}
		_, err := p.Client.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("bind %s: %w", b.role, err)
		}
	}
	// The apiserver makes these itself, some time after it is ready.
	return await(ctx, p, "namespaces", func() error {
		for _, ns := range []string{"default", "kube-system", "kube-node-lease"} {
			if _, err := p.Client.CoreV1().Namespaces().Get(ctx, ns, metav1.GetOptions{}); err != nil {
				return err
			}
		}
		return nil
	})
}

// BootstrapToken makes a token that a node may join with.
func (p *Plane) BootstrapToken(ctx context.Context) (string, error) {
	id, secret := randomText(6), randomText(16)
	_, err := p.Client.CoreV1().Secrets("kube-system").Create(ctx, &v1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "bootstrap-token-" + id, Namespace: "kube-system"},
		Type:       "bootstrap.kubernetes.io/token",
		StringData: map[string]string{
			"token-id": id, "token-secret": secret, "usage-bootstrap-authentication": "true",
			"expiration": time.Now().Add(time.Hour).UTC().Format(time.RFC3339),
		},
	}, metav1.CreateOptions{})
	return id + "." + secret, err
}

// await tries until it succeeds. A program that has ended is not waited for.
func await(ctx context.Context, p *Plane, what string, try func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		p.mu.Lock()
		proc := p.procs[what]
		p.mu.Unlock()
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w: %w", what, err, ctx.Err())
		case <-proc.ended():
			return fmt.Errorf("%s has ended:\n%s", what, tail(filepath.Join(p.Dir, what+".log")))
		case <-tick.C:
		}
	}
}

func tail(path string) string {
	b, _ := os.ReadFile(path)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

func answers(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

// freePorts are ports that nobody listens on.
func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

// process is a program that ends with its parent.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

// parents runs its functions on a thread that never ends: the kernel ends a
// child with PDEATHSIG when the thread that made it does.
var parents = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})

func begin(path string, args []string, log string) (*process, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := &process{cmd: exec.Command(path, args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = f, f
	p.cmd.Env = append(os.Environ(), "NO_PROXY=*")
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	parents() <- func() { started <- p.cmd.Start() }
	if err := <-started; err != nil {
		return nil, err
	}
	go func() {
		_ = p.cmd.Wait() // how it ended is in its log
		close(p.done)
	}()
	return p, nil
}

// ended is closed when the process has ended; nil: there is none.
func (p *process) ended() <-chan struct{} {
	if p == nil {
		return nil
	}
	return p.done
}

func (p *process) stop(sig syscall.Signal) {
	_ = p.cmd.Process.Signal(sig) // it may have ended
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}
