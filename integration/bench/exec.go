package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// criPod is a pod of one container, made through the CRI.
type criPod struct {
	rt            runtimeapi.RuntimeServiceClient
	sandbox, id   string
	sandboxConfig *runtimeapi.PodSandboxConfig
	logPath       string
}

// newCRIPod runs the payload with args; out is mounted at /out.
func newCRIPod(ctx context.Context, conn *grpc.ClientConn, name, image, out, logs string, args ...string) (*criPod, error) {
	profile := &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	namespaces := &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_POD, Pid: runtimeapi.NamespaceMode_CONTAINER, Ipc: runtimeapi.NamespaceMode_POD}
	p := &criPod{rt: runtimeapi.NewRuntimeServiceClient(conn), logPath: filepath.Join(logs, name+".log")}
	p.sandboxConfig = &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: name},
		LogDirectory: logs,
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    "/podd-bench-cri",
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{Seccomp: profile, NamespaceOptions: namespaces},
		},
	}
	sandbox, err := p.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.sandboxConfig})
	if err != nil {
		return nil, fmt.Errorf("pod %s: %w", name, err)
	}
	p.sandbox = sandbox.PodSandboxId
	container, err := p.rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: p.sandbox, SandboxConfig: p.sandboxConfig,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "c"}, Image: &runtimeapi.ImageSpec{Image: image}, Args: args,
			LogPath: name + ".log",
			Mounts:  []*runtimeapi.Mount{{HostPath: out, ContainerPath: "/out"}},
			Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				Seccomp: profile, NamespaceOptions: namespaces}},
		},
	})
	if err != nil {
		return p, fmt.Errorf("container of %s: %w", name, err)
	}
	p.id = container.ContainerId
	return p, nil
}

func (p *criPod) start(ctx context.Context) error {
	_, err := p.rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: p.id})
	return err
}

func (p *criPod) remove(ctx context.Context) error {
	if _, err := p.rt.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		return err
	}
	_, err := p.rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
	return err
}

// measureExec times ExecSync of a program that is over at once, and what all
// processes of the node spend on it, the program's own included.
func measureExec(ctx context.Context, o options, n node, images *imageServer, out string, r *report) error {
	defer n.runtimeOnly()()
	conn, err := dial(n.criSocket())
	if err != nil {
		return err
	}
	defer conn.Close()
	p, err := newCRIPod(ctx, conn, "exec", images.payload(), out, dir(o, "logs"), "exec-up")
	if err != nil {
		return err
	}
	defer p.remove(ctx)
	if err := p.start(ctx); err != nil {
		return err
	}
	if _, err := stamps(ctx, out, 10*time.Second, "exec-up"); err != nil {
		return err
	}
	settle(ctx)
	sample := make([]time.Duration, 10*o.rounds)
	c0 := cpuOfAll()
	for i := range sample {
		t0 := time.Now()
		resp, err := p.rt.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: p.id, Cmd: []string{"/payload"}, Timeout: 10})
		if err != nil {
			return err
		}
		if resp.ExitCode != 0 {
			return fmt.Errorf("exec: exit code %d: %s", resp.ExitCode, resp.Stderr)
		}
		sample[i] = time.Since(t0)
	}
	each := (cpuOfAll() - c0) / time.Duration(len(sample))
	r.durations("ExecSync, seccomp RuntimeDefault", n.name(), sample)
	r.set("… CPU per call", n.name(), ms(each), float64(each))
	return nil
}

const probed = `apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: c
    image: %[2]s
    imagePullPolicy: IfNotPresent
    args: [%[1]s]
    volumeMounts: [{name: out, mountPath: /out}]
%[4]s  volumes: [{name: out, hostPath: {path: %[3]s, type: Directory}}]
`

// probe is one of such a pod; nothing that a benchmark does lets it fail.
func probe(kind string, period time.Duration) string {
	return fmt.Sprintf("    %s: {exec: {command: [/payload, =probe]}, periodSeconds: %d, timeoutSeconds: 60, failureThreshold: 1000}\n", kind, max(1, int(period.Seconds())))
}

// measureProbes runs pods with two exec probes each, as often as they can be
// had, and counts what became of them.
func measureProbes(ctx context.Context, o options, n node, images *imageServer, out string, r *report) error {
	row := fmt.Sprintf("%d pods, two exec probes each per %s: CPU", o.pods, o.probePeriod)
	return measureProbed(ctx, o, n, images, out, r, row, probe("livenessProbe", o.probePeriod), probe("readinessProbe", o.probePeriod))
}

// measureRest runs pods that do nothing but answer a probe now and then, as
// most pods of most nodes.
func measureRest(ctx context.Context, o options, n node, images *imageServer, out string, r *report) error {
	const period = 10 * time.Second
	o.idle = max(o.idle, 3*period)
	row := fmt.Sprintf("at rest, %d pods, one exec probe each per %s: CPU", o.pods, period)
	return measureProbed(ctx, o, n, images, out, r, row, probe("readinessProbe", period))
}

func measureProbed(ctx context.Context, o options, n node, images *imageServer, out string, r *report, row string, probes ...string) error {
	names := make([]string, o.pods)
	for i := range names {
		names[i] = fmt.Sprintf("probed-%d", i)
		text := fmt.Sprintf(probed, names[i], images.payload(), out, strings.Join(probes, ""))
		if err := os.WriteFile(filepath.Join(n.manifests(), names[i]+".yaml"), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if _, err := stamps(ctx, out, 5*time.Minute, names...); err != nil {
		return err
	}
	count := filepath.Join(out, "probes")
	size := func() int64 {
		st, err := os.Stat(count)
		if err != nil {
			return 0
		}
		return st.Size()
	}
	begin := size()
	if err := until(ctx, "probes", time.Minute, func() bool { return size()-begin > int64(len(probes)*o.pods) }); err != nil {
		return err
	}
	settle(ctx)
	c0, s0, t0 := cpuOfAll(), size(), time.Now()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(o.idle): // an observation needs its span; nothing is waited for
	}
	span, done := time.Since(t0), size()-s0
	spent := cpuOfAll() - c0
	share := 100 * float64(spent) / float64(span)
	r.set(row, n.name(), fmt.Sprintf("%.1f %% of a core", share), share)
	r.set("… probes run", n.name(), fmt.Sprintf("%.0f / s", float64(done)/span.Seconds()), 0)
	each := spent / time.Duration(max(done, 1))
	r.set("… CPU per probe", n.name(), ms(each), float64(each))
	_, err := remove(ctx, n, names...)
	return err
}

// cpuOfAll is what the node's processes have used, and those they have waited
// for: everything but the payloads that still run.
func cpuOfAll() (total time.Duration) {
	for _, p := range plumbing() {
		if !strings.HasPrefix(p.comm, "podd-enter") { // on its way to a payload: counted when it ends
			total += p.cpu + p.children
		}
	}
	return total + orphansCPU()
}
