package cluster

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podd-runtime/podd/integration/images"
	"github.com/podd-runtime/podd/integration/node"
)

// TestNodeStatus is what the control plane and upstream's suites read of a node.
func TestNodeStatus(t *testing.T) {
	long(t)
	p := plane(t)
	n := p.NewNode(t, "status", "--node-labels", "example.com/rack=seven", "--register-with-taints", "example.com/new=yes:PreferNoSchedule", "--max-pods", "77")
	mirror(t, n)
	n.Start()
	s := enter(t, "status")
	s.create(serverOf("web"))
	s.awaitReady("web")
	is := s.awaitNode("status", v1.ConditionTrue)
	for k, want := range map[string]string{
		"kubernetes.io/hostname": "status", "kubernetes.io/os": "linux", "example.com/rack": "seven",
	} {
		if is.Labels[k] != want {
			t.Errorf("label %s is %q, want %q", k, is.Labels[k], want)
		}
	}
	if !slices.ContainsFunc(is.Spec.Taints, func(x v1.Taint) bool { return x.Key == "example.com/new" && x.Value == "yes" }) {
		t.Errorf("taints: %+v", is.Spec.Taints)
	}
	if ip := internalIP(is); ip == "" || strings.HasPrefix(ip, "127.") || ip == "::1" {
		t.Errorf("InternalIP %q", ip)
	}
	if !slices.Contains(is.Status.Addresses, v1.NodeAddress{Type: v1.NodeHostName, Address: "status"}) {
		t.Errorf("addresses: %+v", is.Status.Addresses)
	}
	if is.Status.DaemonEndpoints.KubeletEndpoint.Port == 0 {
		t.Error("no port of the kubelet")
	}
	info := is.Status.NodeInfo
	if info.KubeletVersion != "v1.36.3" || !strings.HasPrefix(info.ContainerRuntimeVersion, "podd://") || info.OperatingSystem != "linux" ||
		info.KernelVersion == "" || info.BootID == "" || info.OSImage == "" || info.Architecture == "" {
		t.Errorf("system info: %+v", info)
	}
	if len(is.Status.RuntimeHandlers) == 0 || is.Status.Features == nil || is.Status.Features.SupplementalGroupsPolicy == nil || !*is.Status.Features.SupplementalGroupsPolicy {
		t.Errorf("handlers %+v, features %+v", is.Status.RuntimeHandlers, is.Status.Features)
	}
	reasons := map[v1.NodeConditionType]string{
		v1.NodeReady: "KubeletReady", v1.NodeMemoryPressure: "KubeletHasSufficientMemory",
		v1.NodeDiskPressure: "KubeletHasNoDiskPressure", v1.NodePIDPressure: "KubeletHasSufficientPID",
	}
	for _, c := range is.Status.Conditions {
		if want := reasons[c.Type]; want != c.Reason || c.LastHeartbeatTime.IsZero() || c.LastTransitionTime.IsZero() {
			t.Errorf("condition %+v, want reason %q", c, want)
		}
		delete(reasons, c.Type)
	}
	if len(reasons) > 0 {
		t.Errorf("missing conditions: %v", reasons)
	}
	for _, name := range []v1.ResourceName{v1.ResourceCPU, v1.ResourceMemory, v1.ResourceEphemeralStorage, v1.ResourcePods} {
		has, may := is.Status.Capacity[name], is.Status.Allocatable[name]
		if has.Sign() <= 0 || may.Sign() <= 0 || may.Cmp(has) > 0 {
			t.Errorf("%s: capacity %s, allocatable %s", name, has.String(), may.String())
		}
	}
	if is.Status.Capacity.Pods().Value() != 77 {
		t.Errorf("pods: %s", is.Status.Capacity.Pods())
	}
	s.await("the image in the node's list", time.Minute, func(ctx context.Context) error {
		is, err := s.Client.CoreV1().Nodes().Get(ctx, "status", metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, img := range is.Status.Images {
			if slices.Contains(img.Names, testserver) && img.SizeBytes > 0 {
				return nil
			}
		}
		return fmt.Errorf("%+v", is.Status.Images)
	})
	lease, err := s.Client.CoordinationV1().Leases("kube-node-lease").Get(t.Context(), "status", metav1.GetOptions{})
	if err != nil || len(lease.OwnerReferences) != 1 || lease.OwnerReferences[0].UID != is.UID || *lease.Spec.LeaseDurationSeconds != 40 {
		t.Errorf("lease: %+v, %v", lease, err)
	}
}

// TestEnvironment has the variables of services, the cluster's DNS and the
// downward API in a container.
func TestEnvironment(t *testing.T) {
	long(t)
	join(t, "environment", "--cluster-dns", "10.96.0.10", "--cluster-domain", "cluster.local")
	s := enter(t, "environment")
	s.apply("{apiVersion: v1, kind: Service, metadata: {name: some-web}, spec: {selector: {app: web}, ports: [{name: http, port: 80}, {name: more, port: 81}]}}")
	service, err := s.Client.CoreV1().Services(s.name).Get(t.Context(), "some-web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	without, no := podOf("without", "sleep", "100000"), false
	without.Spec.EnableServiceLinks = &no
	with := podOf("with", "sleep", "100000")
	with.Spec.Containers[0].Env = []v1.EnvVar{
		{Name: "NODE", ValueFrom: &v1.EnvVarSource{FieldRef: &v1.ObjectFieldSelector{FieldPath: "spec.nodeName"}}},
		{Name: "IP", ValueFrom: &v1.EnvVarSource{FieldRef: &v1.ObjectFieldSelector{FieldPath: "status.podIP"}}},
		{Name: "BOTH", Value: "$(SOME_WEB_SERVICE_HOST):$(SOME_WEB_SERVICE_PORT_MORE)"},
	}
	node0 := podOf("node-dns", "sleep", "100000")
	node0.Spec.DNSPolicy = v1.DNSDefault
	s.create(with, without, node0)
	s.awaitReady("with", "without", "node-dns")
	pod, err := s.pod(t.Context(), "with")
	if err != nil {
		t.Fatal(err)
	}
	env := lines(s.kubectl("exec", "with", "--", "env"))
	for _, want := range []string{
		"KUBERNETES_SERVICE_HOST=10.96.0.1", "KUBERNETES_SERVICE_PORT=443", "KUBERNETES_SERVICE_PORT_HTTPS=443", "KUBERNETES_PORT=tcp://10.96.0.1:443",
		"SOME_WEB_SERVICE_HOST=" + service.Spec.ClusterIP, "SOME_WEB_SERVICE_PORT=80", "SOME_WEB_SERVICE_PORT_MORE=81",
		"SOME_WEB_PORT_80_TCP=tcp://" + service.Spec.ClusterIP + ":80", "BOTH=" + service.Spec.ClusterIP + ":81",
		"NODE=environment", "IP=" + pod.Status.PodIP, "HOSTNAME=with",
	} {
		if !slices.Contains(env, want) {
			t.Errorf("no %s in %q", want, env)
		}
	}
	env = lines(s.kubectl("exec", "without", "--", "env"))
	if !slices.Contains(env, "KUBERNETES_SERVICE_HOST=10.96.0.1") || slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, "SOME_WEB") }) {
		t.Errorf("without enableServiceLinks: %q", env)
	}
	want := []string{"search " + s.name + ".svc.cluster.local svc.cluster.local cluster.local", "nameserver 10.96.0.10", "options ndots:5"}
	got := lines(s.kubectl("exec", "with", "--", "cat", "/etc/resolv.conf"))
	for _, line := range want {
		if !slices.ContainsFunc(got, func(l string) bool { return strings.HasPrefix(l, line) }) {
			t.Errorf("resolv.conf: no %q in %q", line, got)
		}
	}
	if got := s.kubectl("exec", "node-dns", "--", "cat", "/etc/resolv.conf"); strings.Contains(got, "10.96.0.10") {
		t.Errorf("resolv.conf of dnsPolicy Default: %q", got)
	}
	if got := s.kubectl("exec", "with", "--", "cat", "/etc/hosts"); !strings.Contains(got, "# Kubernetes-managed hosts file") || !strings.Contains(got, pod.Status.PodIP+"\twith") {
		t.Errorf("hosts: %q", got)
	}
}

// TestServiceAccountToken is in the pod, is good for the apiserver, is bound to
// the pod, and is renewed before it ends.
func TestServiceAccountToken(t *testing.T) {
	long(t)
	join(t, "tokens")
	s := enter(t, "tokens")
	seconds := int64(600) // the least that the API allows
	p := podOf("holder", "sleep", "100000")
	p.Spec.Volumes = []v1.Volume{{Name: "own", VolumeSource: v1.VolumeSource{Projected: &v1.ProjectedVolumeSource{Sources: []v1.VolumeProjection{
		{ServiceAccountToken: &v1.ServiceAccountTokenProjection{Audience: "somebody", ExpirationSeconds: &seconds, Path: "token"}},
	}}}}}
	p.Spec.Containers[0].VolumeMounts = []v1.VolumeMount{{Name: "own", MountPath: "/own"}}
	s.create(p)
	s.awaitReady("holder")
	const account = "/var/run/secrets/kubernetes.io/serviceaccount/"
	if got := s.kubectl("exec", "holder", "--", "cat", account+"namespace"); got != s.name {
		t.Errorf("namespace %q", got)
	}
	if got := s.kubectl("exec", "holder", "--", "cat", account+"ca.crt"); !strings.HasPrefix(got, "-----BEGIN CERTIFICATE-----") {
		t.Errorf("CA %q", got)
	}
	token := s.kubectl("exec", "holder", "--", "cat", account+"token")
	pod, err := s.pod(t.Context(), "holder")
	if err != nil {
		t.Fatal(err)
	}
	review := func(token string, audiences ...string) authenticationv1.TokenReviewStatus {
		t.Helper()
		r, err := s.Client.AuthenticationV1().TokenReviews().Create(t.Context(), &authenticationv1.TokenReview{
			Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: audiences}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return r.Status
	}
	st := review(token)
	if !st.Authenticated || st.User.Username != "system:serviceaccount:"+s.name+":default" ||
		!slices.Equal(st.User.Extra["authentication.kubernetes.io/pod-uid"], authenticationv1.ExtraValue{string(pod.UID)}) ||
		!slices.Equal(st.User.Extra["authentication.kubernetes.io/node-name"], authenticationv1.ExtraValue{"tokens"}) {
		t.Errorf("review of the token: %+v", st)
	}
	other := s.kubectl("exec", "holder", "--", "cat", "/own/token")
	if st := review(other); st.Authenticated {
		t.Error("a token for somebody else is good for the apiserver")
	}
	if st := review(other, "somebody"); !st.Authenticated {
		t.Errorf("a token for somebody: %+v", st)
	}
	var claims struct{ Exp, Iat int64 }
	if raw, err := base64.RawURLEncoding.DecodeString(strings.Split(other, ".")[1]); err != nil || json.Unmarshal(raw, &claims) != nil || claims.Exp-claims.Iat != seconds {
		t.Errorf("claims %+v, %v", claims, err)
	}
	// Renewed when 80 % of its life are over: after eight minutes of ten.
	s.await("another token", 12*time.Minute, func(context.Context) error {
		if s.kubectl("exec", "holder", "--", "cat", "/own/token") == other {
			time.Sleep(time.Second) // each look is an exec
			return fmt.Errorf("the same, which ends at %v", time.Unix(claims.Exp, 0))
		}
		return nil
	})
	if time.Now().Unix() >= claims.Exp {
		t.Error("the token had ended when it was renewed")
	}
	s.kubectl("delete", "pod", "holder")
	if st := review(token); st.Authenticated {
		t.Error("the token outlives its pod")
	}
}

// TestPullSecrets pulls from a registry that wants credentials: with those of
// the pod, and of its service account; without, the pod waits.
func TestPullSecrets(t *testing.T) {
	long(t)
	n := join(t, "pull")
	s := enter(t, "pull")
	addr := privateRegistry(t, n)
	secret := func(name, password string) {
		s.kubectl("create", "secret", "docker-registry", name, "--docker-server="+addr, "--docker-username=user", "--docker-password="+password)
	}
	secret("good", "word")
	secret("bad", "wrong")
	with := func(name string, secrets ...string) *v1.Pod {
		p := podOf(name, "sleep", "100000")
		p.Spec.Containers[0].Image, p.Spec.Containers[0].ImagePullPolicy = addr+"/private/busybox:1", v1.PullAlways
		for _, s := range secrets {
			p.Spec.ImagePullSecrets = append(p.Spec.ImagePullSecrets, v1.LocalObjectReference{Name: s})
		}
		return p
	}
	s.create(with("none"), with("wrong", "bad"), with("both", "bad", "good"))
	s.awaitReady("both")
	for _, name := range []string{"none", "wrong"} {
		s.awaitPod(name, "is refused its image", func(p *v1.Pod) bool {
			if len(p.Status.ContainerStatuses) == 0 {
				return false
			}
			w := p.Status.ContainerStatuses[0].State.Waiting
			return w != nil && (w.Reason == "ErrImagePull" || w.Reason == "ImagePullBackOff")
		})
	}
	s.kubectl("patch", "serviceaccount", "default", "-p", `{"imagePullSecrets":[{"name":"good"}]}`)
	s.await("a pod with the service account's secret", time.Minute, func(ctx context.Context) error {
		p := with("account")
		made, err := s.Client.CoreV1().Pods(s.name).Create(ctx, p, metav1.CreateOptions{DryRun: []string{"All"}})
		if err == nil && len(made.Spec.ImagePullSecrets) == 0 {
			err = fmt.Errorf("not given yet")
		}
		return err
	})
	s.create(with("account"))
	s.awaitReady("account")
}

// privateRegistry serves busybox to user with password word only.
func privateRegistry(t testing.TB, n *node.Node) string {
	t.Helper()
	r, err := images.Serve("127.0.0.1:0", "user", "word")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	box, err := (&images.Builder{Dir: imageCache()}).Busybox(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Push(t.Context(), "private/busybox:1", box); err != nil {
		t.Fatal(err)
	}
	n.Hosts(r.Addr, fmt.Sprintf("[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", "http://"+r.Addr))
	return r.Addr
}

// TestRuntimeClass gives a pod its handler, overhead and place.
func TestRuntimeClass(t *testing.T) {
	long(t)
	join(t, "classes")
	s := enter(t, "classes")
	s.apply(`
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: known}
handler: podd
overhead: {podFixed: {memory: 8Mi}}
---
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: unknown}
handler: nosuch
`)
	t.Cleanup(func() {
		for _, name := range []string{"known", "unknown"} {
			_ = s.Client.NodeV1().RuntimeClasses().Delete(context.Background(), name, metav1.DeleteOptions{})
		}
	})
	known, unknown := "known", "unknown"
	good, bad := podOf("good", "sleep", "100000"), podOf("bad", "sleep", "100000")
	good.Spec.RuntimeClassName, bad.Spec.RuntimeClassName = &known, &unknown
	s.await("the apiserver knows the classes", time.Minute, func(ctx context.Context) error {
		_, err := s.Client.CoreV1().Pods(s.name).Create(ctx, good, metav1.CreateOptions{})
		return err
	})
	s.create(bad)
	s.awaitReady("good")
	if pod, err := s.pod(t.Context(), "good"); err != nil || pod.Spec.Overhead.Memory().Value() != 8<<20 {
		t.Errorf("overhead: %v, %v", pod.Spec.Overhead, err)
	}
	s.await("an event of the unknown handler", time.Minute, func(context.Context) error {
		if got := s.kubectl("events", "--for", "pod/bad"); !strings.Contains(got, "FailedCreatePodSandBox") || !strings.Contains(got, "nosuch") {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
}

// TestEvents have upstream's reasons; what repeats is one event with a count.
func TestEvents(t *testing.T) {
	long(t)
	join(t, "events")
	s := enter(t, "events")
	bad := podOf("bad", "sleep", "100000")
	bad.Spec.Containers[0].LivenessProbe = &v1.Probe{
		ProbeHandler:  v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{"sh", "-c", "echo not well; exit 1"}}},
		PeriodSeconds: 1, TimeoutSeconds: 10, FailureThreshold: 100,
	}
	lost := podOf("lost", "sleep", "100000")
	lost.Spec.Containers[0].Image = "podd.test/nosuch:1"
	s.create(bad, lost)
	want := map[string]string{"Unhealthy": "Liveness probe failed: not well", "Pulled": "", "Created": "", "Started": "", "Pulling": "", "Failed": "Failed to pull image", "BackOff": "Back-off pulling image"}
	s.await("events of both pods", 2*time.Minute, func(ctx context.Context) error {
		list, err := s.Client.CoreV1().Events(s.name).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		missing := []string{}
		for reason, words := range want {
			if !slices.ContainsFunc(list.Items, func(e v1.Event) bool {
				return e.Reason == reason && strings.Contains(e.Message, words) && e.Source.Component == "kubelet" && e.Source.Host == "events"
			}) {
				missing = append(missing, reason)
			}
		}
		for i := range list.Items {
			if e := &list.Items[i]; e.Reason == "Unhealthy" && e.Count < 3 {
				missing = append(missing, fmt.Sprintf("Unhealthy three times (%d)", e.Count))
			}
		}
		if len(missing) > 0 {
			return fmt.Errorf("missing %q of %d", missing, len(list.Items))
		}
		return nil
	})
	list, err := s.Client.CoreV1().Events(s.name).List(t.Context(), metav1.ListOptions{FieldSelector: "reason=Unhealthy"})
	if err != nil || len(list.Items) != 1 {
		t.Errorf("%d events for one failing probe, %v", len(list.Items), err)
	}
	for _, e := range list.Items {
		if e.InvolvedObject.FieldPath != "spec.containers{main}" || e.ReportingController != "kubelet" || e.ReportingInstance != "events" {
			t.Errorf("event %+v", e)
		}
	}
}

// TestCredentialProvider asks a plugin for the credentials of an image, and uses
// its answer as long as the plugin allows.
func TestCredentialProvider(t *testing.T) {
	long(t)
	p := plane(t)
	n := p.NewNode(t, "provider")
	mirror(t, n)
	addr := privateRegistry(t, n)
	bin, config, asked := filepath.Join(n.Dir, "plugins"), filepath.Join(n.Dir, "providers.yaml"), filepath.Join(n.Dir, "asked")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	script := `#!/bin/sh
cat >> ` + asked + `; echo >> ` + asked + `
echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Registry","cacheDuration":"10m","auth":{"` + addr + `":{"username":"user","password":"word"}}}'
`
	if err := os.WriteFile(filepath.Join(bin, "test-provider"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(config, []byte(`
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: test-provider
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  matchImages: ["`+addr+`"]
  defaultCacheDuration: 1m
`), 0o644); err != nil {
		t.Fatal(err)
	}
	n.Extra("--image-credential-provider-config", config, "--image-credential-provider-bin-dir", bin)
	n.Start()
	s := enter(t, "provider")
	for _, name := range []string{"one", "two"} {
		pod := podOf(name, "sleep", "100000")
		pod.Spec.Containers[0].Image, pod.Spec.Containers[0].ImagePullPolicy = addr+"/private/busybox:1", v1.PullAlways
		s.create(pod)
		s.awaitReady(name)
	}
	requests, err := os.ReadFile(asked)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(requests, []byte("CredentialProviderRequest")); n != 1 || !bytes.Contains(requests, []byte(`"image":"`+addr+`/private/busybox`)) {
		t.Errorf("the plugin was asked %d times: %s", n, requests)
	}
}
