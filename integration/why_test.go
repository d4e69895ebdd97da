package integration

import (
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/podd-runtime/podd/integration/images"
	"github.com/podd-runtime/podd/integration/node"
)

// failure is one way in which a pod can fail, and what podd why must say of it.
type failure struct {
	name string
	// manifest of the pod; pod() or box() with changes.
	manifest string
	// want are parts of what podd why prints.
	want []string
}

// shell is a pod of busybox that runs a script.
func shell(name, spec, script string) string {
	return strings.NewReplacer(testserver, busybox, "args: []", fmt.Sprintf("command: [sh, -c, %q]", script)).Replace(pod(name, spec))
}

// failures of every kind that can be provoked on any machine.
func failures(t *testing.T, n *node.Node) []failure {
	t.Helper()
	nobody := freePort(t) // connection refused
	private, err := images.Serve("127.0.0.1:0", "user", "secret")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { private.Close() })
	unverified := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(unverified.Close)
	r, err := registry()
	if err != nil {
		t.Fatal(err)
	}
	n.Hosts("absent.test", fmt.Sprintf("server = \"http://%s\"\n", r.Addr))
	n.Hosts("nobody.test", fmt.Sprintf("server = \"http://127.0.0.1:%d\"\n", nobody))
	n.Hosts("private.test", fmt.Sprintf("server = \"http://%s\"\n", private.Addr))
	n.Hosts("unverified.test", fmt.Sprintf("server = %q\n", unverified.URL))
	taken, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { taken.Close() })
	port := taken.Addr().(*net.TCPAddr).Port
	shared := freePort(t)

	from := func(name, image string) string { return strings.Replace(pod(name, ""), testserver, image, 1) }
	with := func(manifest string, more ...string) string {
		for _, m := range more {
			manifest += indent(m, 4)
		}
		return manifest
	}
	return []failure{
		{name: "crash", want: []string{"exited with code 3", "no database at db:5432", "next try is at"}, manifest: shell("crash", "", "echo one; echo no database at db:5432; exit 3")},
		{name: "once", want: []string{"exited with code 4", "broken"}, manifest: shell("once", "restartPolicy: Never", "echo broken; exit 4")},
		{name: "code137", want: []string{"exited with code 137", "By convention of shells"}, manifest: shell("code137", "restartPolicy: Never", "exit 137")},
		{name: "killed", want: []string{"was ended by SIGKILL (exit code 137)"}, manifest: shell("killed", "restartPolicy: Never", "sleep 0.1; exec sleep 4715")},
		{name: "oomchild", want: []string{"exited with code 0", "because the container used more memory than its limit"}, manifest: with(shell("oomchild", "restartPolicy: Never", "head -c 200m /dev/zero | tail; true"), "resources: {limits: {memory: 32Mi}}")},
		{name: "oomgoeson", want: []string{"of container main was killed", "the container goes on", "Its limit is 32Mi"}, manifest: with(shell("oomgoeson", "", "head -c 200m /dev/zero | tail; sleep 1000"), "resources: {limits: {memory: 32Mi}}")},
		{name: "segv", want: []string{"SIGSEGV"}, manifest: shell("segv", "", "sh -c 'kill -SEGV $$$$'; exit $?")},
		{name: "oom", want: []string{"used more memory than its limit", "Its limit is 32Mi, at its peak it used"}, manifest: with(pod("oom", "restartPolicy: Never", "hog", "200"), "resources: {limits: {memory: 32Mi}}")},
		{name: "noimage", want: []string{"absent.test/nothing:1 cannot be pulled: the registry does not have it", "404 Not Found"}, manifest: from("noimage", "absent.test/nothing:1")},
		{name: "noregistry", want: []string{"the registry does not answer", "connection refused"}, manifest: from("noregistry", "nobody.test/app:1")},
		{name: "private", want: []string{"the registry does not let this node have it", "401 Unauthorized", "imagePullSecrets"}, manifest: from("private", "private.test/app:1")},
		{name: "badtls", want: []string{"cannot be trusted", "x509"}, manifest: from("badtls", "unverified.test/app:1")},
		{name: "never", want: []string{"imagePullPolicy: Never forbids to pull it"}, manifest: with(from("never", "podd.test/other:1"), "imagePullPolicy: Never")},
		{name: "badname", want: []string{"is not the name of an image", "must be lowercase"}, manifest: from("badname", "podd.test/UPPER:1")},
		{name: "nomap", want: []string{"the ConfigMap settings is not there"}, manifest: with(pod("nomap", "", "pause"), "env: [{name: A, valueFrom: {configMapKeyRef: {name: settings, key: a}}}]")},
		{name: "nosecretkey", want: []string{"the Secret creds has no key password"}, manifest: "apiVersion: v1\nkind: Secret\nmetadata: {name: creds}\nstringData: {user: x}\n---\n" +
			with(pod("nosecretkey", "", "pause"), "env: [{name: A, valueFrom: {secretKeyRef: {name: creds, key: password}}}]")},
		{name: "novolume", want: []string{"Volume conf is not ready: the ConfigMap absent is not there"}, manifest: with(pod("novolume", "volumes: [{name: conf, configMap: {name: absent}}]", "pause"), "volumeMounts: [{name: conf, mountPath: /conf}]")},
		{name: "nopath", want: []string{"Volume data is not ready: hostPath type check failed: /nothing/here is not a directory: it does not exist"}, manifest: with(pod("nopath", "volumes: [{name: data, hostPath: {path: /nothing/here, type: Directory}}]", "pause"), "volumeMounts: [{name: data, mountPath: /data}]")},
		{name: "noserver", manifest: with(pod("noserver", "volumes: [{name: share, nfs: {server: 127.0.0.1, path: /export}}]", "pause"), "volumeMounts: [{name: share, mountPath: /share}]")},
		{name: "noprogram", want: []string{"has no program /opt/app/server"}, manifest: with(pod("noprogram", ""), "command: [/opt/app/server]")},
		{name: "noexec", want: []string{"its program /etc/hosts may not be executed"}, manifest: with(pod("noexec", ""), "command: [/etc/hosts]")},
		{name: "badformat", want: []string{"not one for this machine"}, manifest: "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: script}\ndata: {run: \"hello\"}\n---\n" +
			with(pod("badformat", "volumes: [{name: s, configMap: {name: script, defaultMode: 0755}}]"), "command: [/s/run]\nvolumeMounts: [{name: s, mountPath: /s}]")},
		{name: "nonroot", want: []string{"runAsNonRoot forbids"}, manifest: pod("nonroot", "securityContext: {runAsNonRoot: true}", "pause")},
		{name: "hostport", want: []string{"is also that of process"}, manifest: with(pod("hostport", "", "serve"), fmt.Sprintf("ports: [{containerPort: 8080, hostPort: %d}]", port))},
		{name: "port1", manifest: with(pod("port1", "", "serve"), fmt.Sprintf("ports: [{containerPort: 8080, hostPort: %d}]", shared))},
		{name: "port2", manifest: with(pod("port2", "", "serve"), fmt.Sprintf("ports: [{containerPort: 8080, hostPort: %d}]", shared))},
		{name: "hostnet", want: []string{"of the host, which process"}, manifest: with(pod("hostnet", "hostNetwork: true", "serve", fmt.Sprintf(":%d", port)), fmt.Sprintf("ports: [{containerPort: %d}]", port))},
		{name: "live", want: []string{"livenessProbe", "the queue is stuck"}, manifest: with(shell("live", "", "sleep 1000"), `livenessProbe: {exec: {command: [sh, -c, "echo the queue is stuck; exit 1"]}, periodSeconds: 1, failureThreshold: 2}`)},
		{name: "ready", want: []string{"its readiness probe (httpGet /file?path=/nothing on port 8080) fails", "statuscode: 500"}, manifest: with(pod("ready", "", "serve"), "readinessProbe: {httpGet: {port: 8080, path: \"/file?path=/nothing\"}, periodSeconds: 1, failureThreshold: 1}")},
		{name: "closed", want: []string{"tcpSocket port 9999", "connection refused"}, manifest: with(pod("closed", "", "serve"), "readinessProbe: {tcpSocket: {port: 9999}, periodSeconds: 1, failureThreshold: 1}")},
		{name: "startup", want: []string{"has not started up yet", "/tmp/started"}, manifest: with(shell("startup", "", "sleep 1000"), "startupProbe: {exec: {command: [cat, /tmp/started]}, periodSeconds: 1, failureThreshold: 1000}")},
		{name: "init", want: []string{"waits for init container wait to finish", "waiting for db"}, manifest: shell("init", "initContainers: [{name: wait, image: "+busybox+", command: [sh, -c, \"echo waiting for db; sleep 1000\"]}]", "sleep 1000")},
		{name: "initfail", want: []string{"Init container migrate exited with code 5", "no such table"}, manifest: shell("initfail", "initContainers: [{name: migrate, image: "+busybox+", command: [sh, -c, \"echo no such table; exit 5\"]}]", "sleep 1000")},
		{name: "poststart", want: []string{"postStart hook failed"}, manifest: with(shell("poststart", "", "sleep 1000"), "lifecycle: {postStart: {exec: {command: [sh, -c, \"exit 6\"]}}}")},
		{name: "readonly", want: []string{"root file system, which is read-only"}, manifest: with(shell("readonly", "", "echo x >/data && sleep 1000"), "securityContext: {readOnlyRootFilesystem: true}")},
		{name: "full", want: []string{"volume tmp holds 1Mi at most"}, manifest: with(shell("full", "volumes: [{name: tmp, emptyDir: {medium: Memory, sizeLimit: 1Mi}}]", "dd if=/dev/zero of=/t/x bs=1M count=4 && sleep 1000"), "volumeMounts: [{name: tmp, mountPath: /t}]")},
		{name: "gate", want: []string{"example.com/balanced"}, manifest: pod("gate", "readinessGates: [{conditionType: example.com/balanced}]", "pause")},
		{name: "deadline", want: []string{"activeDeadlineSeconds (1 s)"}, manifest: pod("deadline", "activeDeadlineSeconds: 1", "pause")},
		{name: "stopped", want: []string{"stopped by a user", "podd start"}, manifest: pod("stopped", "", "pause")},
		{name: "stubborn", want: []string{"is being removed", "which is killed at"}, manifest: strings.Replace(pod("stubborn", "", "stubborn"), "terminationGracePeriodSeconds: 1", "terminationGracePeriodSeconds: 600", 1)},
		{name: "tiny", want: []string{"(1Mi) is too small"}, manifest: with(pod("tiny", "", "pause"), "resources: {limits: {memory: 1Mi}}")},
		{name: "fraction", want: []string{"memory limit (128m) is too small even to start a process: it is a fraction of a byte", "write Mi for mebibytes"}, manifest: with(pod("fraction", "", "pause"), "resources: {limits: {memory: 128m}}")},
		{name: "invalid", want: []string{"manifest is not in force", "invalid.yaml:9", "imagee", "did you mean image"}, manifest: strings.Replace(pod("invalid", "", "pause"), "image:", "imagee:", 1)},
		{name: "fine", want: []string{"runs and is ready"}, manifest: pod("fine", "", "pause")},
	}
}

// TestWhySaysWhatIsWrong provokes each failure with the real daemon and checks
// the sentence that podd why has for it.
func TestWhySaysWhatIsWrong(t *testing.T) {
	n := node.New(t)
	mirror(t, n, "testserver", "busybox")
	list := failures(t, n)
	if os.Getenv("PODD_TEST_ALL") == "" { // those that show at once
		quick := []string{"crash", "once", "noimage", "nomap", "nosecretkey", "novolume", "nopath", "noprogram", "port1", "port2", "fraction", "invalid", "stopped", "stubborn", "fine", "code137", "killed", "oomchild", "oomgoeson"}
		list = slices.DeleteFunc(list, func(f failure) bool { return !slices.Contains(quick, f.name) })
	}
	n.Start()
	for _, f := range list {
		n.Write(f.name+".yaml", f.manifest)
	}
	n.WaitRunning("fine", "stubborn", "stopped")
	n.OK("stop", node.PodName("stopped"))
	n.Remove("stubborn.yaml")
	node.Await(t, "its program running", 30*second, func() bool { return len(n.Processes("sleep 4715")) == 1 })
	for pid := range n.Processes("sleep 4715") {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	// All at once: what has been said right once need not be asked again.
	said, last := map[string]bool{}, map[string]string{}
	defer func() {
		for _, f := range list {
			if !said[f.name] {
				t.Errorf("podd why %s: want %q, got:\n%s", f.name, f.want, last[f.name])
			}
		}
	}()
	node.Await(t, "podd why saying all it should", 60*second, func() bool {
		for _, f := range list {
			if said[f.name] {
				continue
			}
			out, _, err := n.Podd("why", node.PodName(f.name))
			last[f.name] = out
			said[f.name] = err == nil
			for _, w := range f.want {
				said[f.name] = said[f.name] && strings.Contains(out, w)
			}
		}
		return len(said) == len(list) && !slices.Contains(slices.Collect(maps.Values(said)), false)
	})
	both := n.OK("why", node.PodName("port1")) + n.OK("why", node.PodName("port2"))
	if !strings.Contains(both, "is taken by pod default/port") {
		t.Errorf("two pods of one host port:\n%s", both)
	}
	all := n.OK("why")
	if !strings.Contains(all, "pod default/"+node.PodName("crash")) || !strings.Contains(all, "manifest ") || strings.Contains(all, node.PodName("fine")) {
		t.Errorf("podd why without a name:\n%s", all)
	}
	if out := n.OK("why", "-o", "json"); !strings.Contains(out, `"reason": "ImageNotFound"`) {
		t.Errorf("podd why -o json:\n%s", out)
	}
	if out := n.OK("describe", "pod", node.PodName("crash")); !strings.Contains(out, "Why:") || !strings.Contains(out, "no database at db:5432") {
		t.Errorf("podd describe:\n%s", out)
	}
	n.OK("stop", "--grace-period=0", node.PodName("stubborn"))
	n.Signal(syscall.SIGKILL)
	if _, errOut, err := n.Podd("why"); err == nil || !strings.Contains(errOut, "no podd daemon") || !strings.Contains(errOut, "It was started last in") {
		t.Errorf("with the daemon down: %v, %s", err, errOut)
	}
	n.Start()
	n.WaitRunning("fine")
}
