package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const peerName = "kubelet+containerd"

// node is an agent with its runtime that runs static pods from a directory.
type node interface {
	name() string
	// start brings it up; it returns when it takes pods.
	start(ctx context.Context) error
	// stop ends the agent and the runtime; pods are gone before.
	stop()
	manifests() string
	criSocket() string
	// runtimeOnly keeps the agent off pods that were made through the CRI,
	// which upstream's kubelet ends as unknown to it.
	runtimeOnly() (end func())
	// join a cluster at the next start.
	join(m *member)
}

// dirs of one node, below the scratch directory.
func dir(o options, parts ...string) string {
	path := filepath.Join(append([]string{o.work}, parts...)...)
	if err := os.MkdirAll(path, 0o755); err != nil {
		panic(err) // the scratch directory is ours
	}
	return path
}

func launch(logPath, program string, args ...string) (*exec.Cmd, error) {
	log, err := os.Create(logPath)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	started.Store(cmd.Process.Pid, true)
	return cmd, nil
}

func terminate(cmd *exec.Cmd) {
	if cmd == nil {
		return
	}
	cmd.Process.Signal(syscall.SIGTERM)
	done := make(chan struct{})
	go func() { cmd.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		cmd.Process.Kill()
		<-done
	}
}

// until polls a condition of another process, which has no event to offer.
func until(ctx context.Context, what string, limit time.Duration, ok func() bool) error {
	deadline := time.Now().Add(limit)
	for !ok() {
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: not within %s", what, limit)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
	return nil
}

type poddNode struct {
	o      options
	images *imageServer
	cmd    *exec.Cmd
	member *member // nil: of no cluster
}

func newPodd(o options, images *imageServer) node { return &poddNode{o: o, images: images} }

func (p *poddNode) name() string      { return "podd" }
func (p *poddNode) manifests() string { return dir(p.o, "podd", "manifests") }
func (p *poddNode) criSocket() string { return filepath.Join(p.o.work, "podd", "run", "podd.sock") }

func (p *poddNode) runtimeOnly() func() { return func() {} }

func (p *poddNode) start(ctx context.Context) error {
	d := func(s string) string { return dir(p.o, "podd", s) }
	args := []string{"run",
		"--data-dir", d("data"), "--run-dir", d("run"), "--root-dir", d("root"),
		"--pod-manifest-path", p.manifests(), "--pod-logs-dir", d("logs/pods"),
		"--cni-conf-dir", d("cni"), "--registry-config-path", d("certs.d"),
		"--cri-socket", p.criSocket(), "--cgroup-root", "/podd-bench-podd",
		"--container-log-max-size", "100Gi", // containerd alone does not rotate either
		"--hostname-override", "bench"}
	if p.member != nil {
		args = append(args, p.member.flags(p.o)...)
	}
	cmd, err := launch(filepath.Join(p.o.work, "podd.log"), filepath.Join(p.o.bin, "podd"), args...)
	if err != nil {
		return err
	}
	p.cmd = cmd
	return until(ctx, "podd's CRI socket", time.Minute, func() bool { return answers(ctx, p.criSocket()) })
}

func (p *poddNode) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stop := exec.CommandContext(ctx, filepath.Join(p.o.bin, "podd"), "stop", "--all")
	stop.Env = append(os.Environ(), "PODD_RUN_DIR="+filepath.Join(p.o.work, "podd", "run"))
	stop.Run()
	terminate(p.cmd)
	for _, child := range descendants(os.Getpid()) { // the shim goes with the last of the bench
		if strings.HasPrefix(child.comm, "podd-shim") {
			syscall.Kill(child.pid, syscall.SIGTERM)
		}
	}
	removeCgroup("podd-bench-podd")
	removeCgroup("podd-bench-cri")
}

type peerNode struct {
	o                   options
	images              *imageServer
	containerd, kubelet *exec.Cmd
	member              *member // nil: of no cluster
}

func newPeer(o options, images *imageServer) node { return &peerNode{o: o, images: images} }

func (p *peerNode) name() string      { return peerName }
func (p *peerNode) manifests() string { return dir(p.o, "peer", "manifests") }
func (p *peerNode) criSocket() string { return filepath.Join(p.o.work, "peer", "c.sock") }

const containerdConfig = `version = 3
root = %q
state = %q
[grpc]
  address = %q
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = [%q]
    conf_dir = %q
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      BinaryName = %q
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '%s/pause:1'
`

const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
staticPodPath: %[1]s
containerRuntimeEndpoint: unix://%[2]s
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /podd-bench-peer
cgroupsPerQOS: true
enforceNodeAllocatable: []
podLogsDir: %[3]s
maxPods: 250
port: 10250
address: 127.0.0.1
healthzPort: 10248
readOnlyPort: 0
failSwapOn: false
imageGCHighThresholdPercent: 100
authentication: {anonymous: {enabled: false}, webhook: {enabled: %[4]t}}
authorization: {mode: %[5]s}
evictionHard: {memory.available: "1Mi", nodefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.available: "0%%", imagefs.inodesFree: "0%%"}
`

const cniConfig = `{"cniVersion":"1.0.0","name":"bench","plugins":[
{"type":"bridge","bridge":"bench0","isGateway":true,"ipMasq":false,"hairpinMode":true,
 "ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.99.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
{"type":"portmap","capabilities":{"portMappings":true}}]}`

func (p *peerNode) runtimeOnly() func() {
	p.kubelet.Process.Signal(syscall.SIGSTOP)
	return func() { p.kubelet.Process.Signal(syscall.SIGCONT) }
}

func (p *peerNode) start(ctx context.Context) error {
	d := func(s string) string { return dir(p.o, "peer", s) }
	conf := filepath.Join(p.o.work, "peer", "containerd.toml")
	kconf := filepath.Join(p.o.work, "peer", "kubelet.yaml")
	webhook, mode := false, "AlwaysAllow"
	args := []string{"--config", kconf, "--root-dir", d("kubelet"), "--node-ip", "10.98.0.1", "--cert-dir", d("pki"), "--hostname-override"}
	if m := p.member; m != nil {
		webhook, mode = true, "Webhook" // its defaults
		args = append(args, m.name, "--kubeconfig", m.kubeconfig)
	} else {
		args = append(args, "bench")
	}
	if err := writeFiles(map[string]string{
		conf: fmt.Sprintf(containerdConfig, d("root"), d("state"), p.criSocket(), p.o.peers, d("cni"),
			filepath.Join(p.o.peers, "runc"), p.images.host),
		kconf: fmt.Sprintf(kubeletConfig, p.manifests(), p.criSocket(), d("logs"), webhook, mode),
		filepath.Join(d("cni"), "10-bench.conflist"): fmt.Sprintf(cniConfig, d("ipam")),
	}); err != nil {
		return err
	}
	err := makeCgroup("podd-bench-peer")
	if err != nil {
		return err
	}
	if p.containerd, err = launchEnv(filepath.Join(p.o.work, "containerd.log"), "PATH="+p.o.peers+":"+os.Getenv("PATH"),
		filepath.Join(p.o.peers, "containerd"), "-c", conf); err != nil {
		return err
	}
	if err := until(ctx, "containerd's CRI socket", time.Minute, func() bool { return answers(ctx, p.criSocket()) }); err != nil {
		return err
	}
	if p.kubelet, err = launch(filepath.Join(p.o.work, "kubelet.log"), filepath.Join(p.o.peers, "kubelet"), args...); err != nil {
		return err
	}
	return until(ctx, "kubelet's /healthz", 2*time.Minute, func() bool {
		r, err := http.Get("http://127.0.0.1:10248/healthz")
		if err != nil {
			return false
		}
		r.Body.Close()
		return r.StatusCode == http.StatusOK
	})
}

func (p *peerNode) stop() {
	terminate(p.kubelet)
	terminate(p.containerd)
	removeCgroup("podd-bench-peer")
	removeCgroup("podd-bench-cri")
}

func writeFiles(files map[string]string) error {
	for path, text := range files {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func launchEnv(logPath, env, program string, args ...string) (*exec.Cmd, error) {
	old := os.Getenv("PATH")
	os.Setenv("PATH", strings.TrimPrefix(env, "PATH="))
	defer os.Setenv("PATH", old)
	return launch(logPath, program, args...)
}
