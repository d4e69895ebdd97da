package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podd-runtime/podd/integration/node"
)

// deployment of servers that are ready when they answer.
func deployment(name string, replicas int, version string) string {
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s}
spec:
  replicas: %[2]d
  selector: {matchLabels: {app: %[1]s}}
  strategy: {rollingUpdate: {maxSurge: 4, maxUnavailable: 0}}
  template:
    metadata: {labels: {app: %[1]s, version: %[3]q}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: %[4]s
        args: [serve, ":8080"]
        resources: {requests: {cpu: 1m, memory: 1Mi}}
        readinessProbe: {httpGet: {port: 8080, path: /healthz}, periodSeconds: 1, timeoutSeconds: 10}
`, name, replicas, version, testserver)
}

// awaitRollout of a workload, as kubectl waits for it.
func (s *space) awaitRollout(what string) {
	s.Helper()
	s.kubectl("rollout", "status", what, "--timeout="+node.Scale(4*time.Minute).String())
}

// awaitVersion until exactly that many pods are there, all ready and of that version.
func (s *space) awaitVersion(app, version string, replicas int) {
	s.Helper()
	s.await(fmt.Sprintf("%d pods of version %s and no other", replicas, version), 3*time.Minute, func(ctx context.Context) error {
		pods, err := s.pods(ctx, "app="+app)
		if err != nil {
			return err
		}
		for i := range pods {
			if pods[i].Labels["version"] != version || !ready(&pods[i]) {
				return fmt.Errorf("%s of version %s is %s", pods[i].Name, pods[i].Labels["version"], tellPod(&pods[i]))
			}
		}
		if len(pods) != replicas {
			return fmt.Errorf("%d pods", len(pods))
		}
		return nil
	})
}

// TestRollout scales a Deployment and rolls out another version of it, without
// a moment in which fewer pods are ready than were asked for.
func TestRollout(t *testing.T) {
	replicas := 6
	if testingAll() {
		replicas = 50
	}
	join(t, "rollout")
	s := enter(t, "rollout")
	s.apply(deployment("web", 1, "one"))
	s.awaitRollout("deployment/web")
	s.kubectl("scale", "deployment/web", fmt.Sprint("--replicas=", replicas))
	s.awaitRollout("deployment/web")
	s.awaitVersion("web", "one", replicas)

	ctx, stop := context.WithCancel(t.Context())
	fewest := make(chan int, 1)
	go func() { fewest <- s.fewestReady(ctx, "app=web", replicas) }()
	s.apply(deployment("web", replicas, "two"))
	s.awaitRollout("deployment/web")
	s.awaitVersion("web", "two", replicas)
	stop()
	if n := <-fewest; n < replicas {
		t.Errorf("only %d of %d pods were ready during the update", n, replicas)
	}
	s.kubectl("rollout", "undo", "deployment/web")
	s.awaitRollout("deployment/web")
	s.awaitVersion("web", "one", replicas)
}

// fewestReady follows the pods until ctx ends.
func (s *space) fewestReady(ctx context.Context, selector string, from int) int {
	fewest := from
	for ctx.Err() == nil {
		pods, err := s.pods(ctx, selector)
		if err != nil {
			continue
		}
		n := 0
		for i := range pods {
			if ready(&pods[i]) {
				n++
			}
		}
		fewest = min(fewest, n)
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond): // a look, not a wait
		}
	}
	return fewest
}

// TestJobs runs a Job with several pods, one that fails too often, and a
// CronJob's Jobs.
func TestJobs(t *testing.T) {
	long(t)
	join(t, "jobs")
	s := enter(t, "jobs")
	s.apply(`
apiVersion: batch/v1
kind: Job
metadata: {name: five}
spec:
  completions: 5
  parallelism: 3
  completionMode: Indexed
  template:
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: ` + busybox + `, command: [sh, -c, "echo index $JOB_COMPLETION_INDEX"]}]
---
apiVersion: batch/v1
kind: Job
metadata: {name: bad}
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: ` + busybox + `, command: [sh, -c, exit 5]}]
`)
	s.kubectl("wait", "--for=condition=Complete", "job/five", "--timeout="+node.Scale(2*time.Minute).String())
	s.kubectl("wait", "--for=condition=Failed", "job/bad", "--timeout="+node.Scale(2*time.Minute).String())
	out := lines(s.kubectl("logs", "-l", "job-name=five", "--tail=-1"))
	slices.Sort(out)
	if want := "index 0,index 1,index 2,index 3,index 4"; strings.Join(out, ",") != want {
		t.Errorf("the job's output: %q", out)
	}
	s.apply(`
apiVersion: batch/v1
kind: CronJob
metadata: {name: often}
spec:
  schedule: "* * * * *"
  jobTemplate:
    spec:
      template:
        spec:
          restartPolicy: OnFailure
          terminationGracePeriodSeconds: 1
          containers: [{name: main, image: ` + busybox + `, command: [echo, tick]}]
`)
	s.await("a Job of the CronJob", 3*time.Minute, func(ctx context.Context) error {
		jobs, err := s.Client.BatchV1().Jobs(s.name).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for i := range jobs.Items {
			if strings.HasPrefix(jobs.Items[i].Name, "often-") && jobs.Items[i].Status.Succeeded == 1 {
				return nil
			}
		}
		return fmt.Errorf("%d jobs", len(jobs.Items))
	})
}

// TestWorkloads are the other controllers' pods.
func TestWorkloads(t *testing.T) {
	long(t)
	n := join(t, "workloads", "--cluster-domain", "cluster.local")
	s := enter(t, "workloads")
	t.Run("ReplicationController", func(t *testing.T) { s := *s; s.TB = t; testReplicationController(&s) })
	t.Run("DaemonSet", func(t *testing.T) { s := *s; s.TB = t; testDaemonSet(&s) })
	t.Run("StatefulSet", func(t *testing.T) { s := *s; s.TB = t; testStatefulSet(&s, n) })
}

func testReplicationController(s *space) {
	s.apply(`
apiVersion: v1
kind: ReplicationController
metadata: {name: three}
spec:
  replicas: 3
  selector: {app: three}
  template:
    metadata: {labels: {app: three, version: one}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: ` + testserver + `, args: [serve, ":8080"]}]
`)
	s.awaitVersion("three", "one", 3)
	pods, err := s.pods(s.Context(), "app=three")
	if err != nil {
		s.Fatal(err)
	}
	s.kubectl("delete", "pod", pods[0].Name)
	s.awaitVersion("three", "one", 3)
	s.kubectl("delete", "rc", "three")
}

func testDaemonSet(s *space) {
	daemon := func(version string) string {
		return `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: each}
spec:
  selector: {matchLabels: {app: each}}
  template:
    metadata: {labels: {app: each, version: ` + version + `}}
    spec:
      hostNetwork: true
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: ` + busybox + `, command: [sleep, "100000"], env: [{name: IP, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}]}]
`
	}
	s.apply(daemon("one"))
	s.awaitVersion("each", "one", 1)
	s.apply(daemon("two"))
	s.awaitRollout("daemonset/each")
	s.awaitVersion("each", "two", 1)
	s.kubectl("delete", "ds", "each")
}

// testStatefulSet keeps the data of each of its pods in a PersistentVolume on
// the host, whatever becomes of the pod.
func testStatefulSet(s *space, n *node.Node) {
	for i := range 2 {
		dir := filepath.Join(n.Dir, fmt.Sprint("pv-", i))
		if err := os.Mkdir(dir, 0o777); err != nil {
			s.Fatal(err)
		}
		s.apply(fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolume
metadata: {name: %s-%d}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  storageClassName: by-hand
  persistentVolumeReclaimPolicy: Retain
  hostPath: {path: %s, type: Directory}
`, s.name, i, dir))
		s.Cleanup(func() {
			_ = s.Client.CoreV1().PersistentVolumes().Delete(context.Background(), fmt.Sprintf("%s-%d", s.name, i), metav1.DeleteOptions{})
		})
	}
	s.apply(`
apiVersion: v1
kind: Service
metadata: {name: store}
spec: {clusterIP: None, selector: {app: store}, ports: [{port: 8080}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: store}
spec:
  serviceName: store
  replicas: 2
  selector: {matchLabels: {app: store}}
  template:
    metadata: {labels: {app: store, version: one}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: ` + busybox + `
        command: [sh, -c, "hostname >> /data/starts; sleep 100000"]
        readinessProbe: {exec: {command: [test, -s, /data/starts]}, periodSeconds: 1, timeoutSeconds: 10}
        volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
  - metadata: {name: data}
    spec: {accessModes: [ReadWriteOnce], storageClassName: by-hand, resources: {requests: {storage: 1Gi}}}
`)
	s.awaitVersion("store", "one", 2)
	s.kubectl("delete", "pod", "store-0")
	s.awaitVersion("store", "one", 2)
	if got := s.kubectl("exec", "store-0", "--", "cat", "/data/starts"); got != "store-0\nstore-0\n" {
		s.Errorf("the volume of store-0 holds %q", got)
	}
	if got := s.kubectl("exec", "store-1", "--", "cat", "/data/starts"); got != "store-1\n" {
		s.Errorf("the volume of store-1 holds %q", got)
	}
	if got := s.kubectl("exec", "store-1", "--", "hostname", "-f"); got != "store-1.store."+s.name+".svc.cluster.local\n" {
		s.Errorf("hostname -f: %q", got)
	}
	s.kubectl("delete", "statefulset", "store")
	s.kubectl("delete", "pvc", "--all")
}

// TestEndpoints follows a pod's readiness into and out of its Service.
func TestEndpoints(t *testing.T) {
	long(t)
	join(t, "endpoints")
	s := enter(t, "endpoints")
	s.apply("{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, ports: [{port: 8080}]}}")
	web := podOf("web", "sh", "-c", "touch /tmp/ready; sleep 100000")
	web.Spec.Containers[0].ReadinessProbe = &v1.Probe{
		ProbeHandler:  v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{"test", "-e", "/tmp/ready"}}},
		PeriodSeconds: 1, TimeoutSeconds: 10, FailureThreshold: 1,
	}
	s.create(web)
	s.awaitReady("web")
	endpoint := func(want string) {
		t.Helper()
		s.await("an endpoint that is "+want, time.Minute, func(ctx context.Context) error {
			list, err := s.Client.DiscoveryV1().EndpointSlices(s.name).List(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=web"})
			if err != nil {
				return err
			}
			got := "gone"
			for _, slice := range list.Items {
				for _, e := range slice.Endpoints {
					got = "not ready"
					if e.Conditions.Ready != nil && *e.Conditions.Ready {
						got = "ready"
					}
				}
			}
			if got != want {
				return errors.New(got)
			}
			return nil
		})
	}
	endpoint("ready")
	s.kubectl("exec", "web", "--", "rm", "/tmp/ready")
	endpoint("not ready")
	s.kubectl("exec", "web", "--", "touch", "/tmp/ready")
	endpoint("ready")
	s.kubectl("delete", "pod", "web")
	endpoint("gone")
}

// TestConfigMapUpdate is seen in a volume without a restart, within seconds.
func TestConfigMapUpdate(t *testing.T) {
	long(t)
	join(t, "configmaps")
	s := enter(t, "configmaps")
	s.kubectl("create", "configmap", "words", "--from-literal=word=one")
	s.kubectl("create", "secret", "generic", "hidden", "--from-literal=word=one")
	p := podOf("reader", "sleep", "100000")
	p.Spec.Volumes = []v1.Volume{
		{Name: "words", VolumeSource: v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{LocalObjectReference: v1.LocalObjectReference{Name: "words"}}}},
		{Name: "hidden", VolumeSource: v1.VolumeSource{Secret: &v1.SecretVolumeSource{SecretName: "hidden"}}},
	}
	p.Spec.Containers[0].VolumeMounts = []v1.VolumeMount{{Name: "words", MountPath: "/words"}, {Name: "hidden", MountPath: "/hidden"}}
	s.create(p)
	s.awaitReady("reader")
	read := func(want string) {
		t.Helper()
		for _, file := range []string{"/words/word", "/hidden/word"} {
			s.await(file+" says "+want, time.Minute, func(context.Context) error {
				if got := s.kubectl("exec", "reader", "--", "cat", file); got != want {
					return fmt.Errorf("%q", got)
				}
				return nil
			})
		}
	}
	read("one")
	s.kubectl("patch", "configmap", "words", "-p", `{"data":{"word":"two"}}`)
	s.kubectl("patch", "secret", "hidden", "-p", `{"stringData":{"word":"two"}}`)
	read("two")
	pod, err := s.pod(t.Context(), "reader")
	if err != nil || pod.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("%v, %s", err, tellPod(pod))
	}
	// A pod that was bound before its ConfigMap is there starts when it comes.
	late := podOf("late", "sleep", "100000")
	late.Spec.Containers[0].EnvFrom = []v1.EnvFromSource{{ConfigMapRef: &v1.ConfigMapEnvSource{LocalObjectReference: v1.LocalObjectReference{Name: "later"}}}}
	s.create(late)
	s.awaitPod("late", "waits for its ConfigMap", func(p *v1.Pod) bool {
		return len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].State.Waiting != nil &&
			p.Status.ContainerStatuses[0].State.Waiting.Reason == "CreateContainerConfigError"
	})
	s.kubectl("create", "configmap", "later", "--from-literal=WORD=there")
	s.awaitReady("late")
	if got := s.kubectl("exec", "late", "--", "sh", "-c", "echo $WORD"); got != "there\n" {
		t.Errorf("WORD=%q", got)
	}
}
