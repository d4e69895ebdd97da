package cluster

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// TestTop has upstream's metrics-server read the node with a token of its service
// account, and compares what kubectl top says with what runs.
func TestTop(t *testing.T) {
	long(t)
	if err := build(t.Context(), "metrics-server"); err != nil {
		t.Fatal(err)
	}
	join(t, "top")
	s := enter(t, "top")
	s.kubectl("create", "serviceaccount", "metrics-server")
	if _, err := s.TokenKubeconfig("metrics-server", s.token("metrics-server")); err != nil {
		t.Fatal(err)
	}
	manifest := fmt.Sprintf(metricsServer, s.name, s.MetricsPort())
	s.apply(manifest)
	s.kubectl("create", "rolebinding", "test:metrics-server", "--namespace=kube-system",
		"--role=extension-apiserver-authentication-reader", "--serviceaccount="+s.name+":metrics-server")
	t.Cleanup(func() {
		for _, args := range [][]string{{"delete", "--ignore-not-found", "-f", "-"}, {"delete", "rolebinding", "test:metrics-server", "--namespace=kube-system"}} {
			if _, errs, err := s.run(context.Background(), strings.NewReader(manifest), args...); err != nil {
				t.Errorf("kubectl %q: %v: %s", args, err, errs)
			}
		}
	})
	if err := s.StartProgram("metrics-server"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.StopProgram("metrics-server", syscall.SIGTERM) })

	hog, busy := podOf("hog"), podOf("busy", "sh", "-c", "while :; do :; done")
	hog.Spec.Containers[0].Image, hog.Spec.Containers[0].Args = testserver, []string{"hog", "100"}
	busy.Spec.Containers[0].Resources.Limits = v1.ResourceList{v1.ResourceCPU: resource.MustParse("200m")}
	s.create(hog, busy)
	s.awaitReady("hog", "busy")
	s.await("kubectl top pods with true figures", 3*time.Minute, func(ctx context.Context) error {
		out, errs, err := s.run(ctx, nil, "top", "pods", "--containers", "--no-headers")
		if err != nil {
			return fmt.Errorf("%w: %s", err, errs)
		}
		found := map[string][2]int{}
		for _, m := range regexp.MustCompile(`(?m)^(\S+) +main +(\d+)m +(\d+)Mi`).FindAllStringSubmatch(out, -1) {
			cpu, _ := strconv.Atoi(m[2])
			mem, _ := strconv.Atoi(m[3])
			found[m[1]] = [2]int{cpu, mem}
		}
		if f := found["hog"]; f[1] < 95 || f[1] > 125 {
			return fmt.Errorf("the pod that holds 100 MiB: %s", out)
		}
		if f := found["busy"]; f[0] < 120 || f[0] > 230 {
			return fmt.Errorf("the pod that is held at 200m: %s", out)
		}
		return nil
	})
	s.await("kubectl top nodes", time.Minute, func(ctx context.Context) error {
		out, errs, err := s.run(ctx, nil, "top", "nodes", "--no-headers")
		if err != nil {
			return fmt.Errorf("%w: %s", err, errs)
		}
		if m := regexp.MustCompile(`(?m)^(\S+) +(\d+)m +\d+% +(\d+)Mi`).FindStringSubmatch(out); m == nil || m[1] != "top" || m[2] == "0" || m[3] == "0" {
			return errors.New(out)
		}
		return nil
	})
}

// metricsServer is what its release installs, at a port of this machine.
const metricsServer = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: test:metrics-server}
rules:
- {apiGroups: [""], resources: [nodes/metrics], verbs: [get]}
- {apiGroups: [""], resources: [pods, nodes], verbs: [get, list, watch]}
- {apiGroups: [authentication.k8s.io], resources: [tokenreviews], verbs: [create]}
- {apiGroups: [authorization.k8s.io], resources: [subjectaccessreviews], verbs: [create]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: test:metrics-server}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: test:metrics-server}
subjects: [{kind: ServiceAccount, name: metrics-server, namespace: %[1]s}]
---
apiVersion: v1
kind: Service
metadata: {name: metrics-server, namespace: %[1]s}
spec: {type: ExternalName, externalName: localhost}
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1beta1.metrics.k8s.io}
spec:
  service: {name: metrics-server, namespace: %[1]s, port: %[2]d}
  group: metrics.k8s.io
  version: v1beta1
  insecureSkipTLSVerify: true
  groupPriorityMinimum: 100
  versionPriority: 100
`
