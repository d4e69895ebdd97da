package integration

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/integration/node"
)

// soak is how long and how hard TestSoak works.
type soak struct {
	pods     int
	duration time.Duration
	kill     time.Duration // podd is killed this often
	backoff  string        // longest of crash loops
}

// soakParameters: ten minutes with PODD_TEST_SOAK=10m (make soak), a few
// seconds otherwise.
func soakParameters(t *testing.T) soak {
	text := os.Getenv("PODD_TEST_SOAK")
	if text == "" {
		return soak{pods: 18, duration: 8 * second, kill: 2 * second, backoff: "1s"}
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("PODD_TEST_SOAK: %v", err)
	}
	return soak{pods: 200, duration: d, kill: 20 * second, backoff: "10s"}
}

// soakKind is what a pod of the soak does and what must be true of it at the
// end.
type soakKind struct {
	name     string
	manifest string // restart policy | arguments | field of the container
	// replaced all the time by another version of itself.
	replaced bool
	settled  func(p *v1.Pod) bool
	// starts says whether so many starts of one UID can be right.
	starts func(p *v1.Pod, starts int) bool
}

const soakPod = `apiVersion: v1
kind: Pod
metadata: {name: %[1]s}
spec:
  terminationGracePeriodSeconds: 1
  restartPolicy: %[5]s
  volumes: [{name: counts, hostPath: {path: %[2]s}}]
  containers:
  - name: main
    image: ` + testserver + `
    args: [counted, /counts, %[4]s]
    env:
    - {name: VERSION, value: "%[3]d"}
    - {name: POD_UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
    - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    volumeMounts: [{name: counts, mountPath: /counts}]
`

// once: whatever became of podd meanwhile.
func once(p *v1.Pod, starts int) bool { return starts == 1 && status(p).RestartCount == 0 }

// asOftenAsItSays: the status tells of every start, and of none that was not.
func asOftenAsItSays(p *v1.Pod, starts int) bool {
	return starts > 1 && starts == int(status(p).RestartCount)+1
}
func ready(p *v1.Pod) bool     { return node.Running(p) && status(p).Ready }
func restarted(p *v1.Pod) bool { return status(p).RestartCount > 0 }

// soakKinds come in turn: a third each of steady, troubled and replaced pods.
var soakKinds = []soakKind{
	{name: "steady", manifest: "Always|serve|readinessProbe: {httpGet: {port: 8080, path: /healthz}, periodSeconds: 2}", settled: ready, starts: once},
	{name: "crashing", manifest: "Always|exit, 1, 200ms|", settled: restarted, starts: asOftenAsItSays},
	{name: "replaced", manifest: "Always|pause|", replaced: true, settled: node.Running, starts: once},
	{name: "probed", manifest: "Always|pause|livenessProbe: {exec: {command: [/testserver, env]}, periodSeconds: 2, timeoutSeconds: 30, failureThreshold: 10}", settled: node.Running, starts: once},
	// Started before it fails: an overloaded machine may take long until its
	// program has counted itself.
	{name: "failing", manifest: "Always|serve|startupProbe: {httpGet: {port: 8080, path: /healthz}, periodSeconds: 1, failureThreshold: 300}\n" +
		"    livenessProbe: {exec: {command: [/testserver, exit, \"1\"]}, periodSeconds: 1, failureThreshold: 2}", settled: restarted, starts: asOftenAsItSays},
	{name: "rewritten", manifest: "Always|serve|readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}", replaced: true, settled: ready, starts: once},
	{name: "done", manifest: "OnFailure|exit, 0, 100ms|", settled: func(p *v1.Pod) bool { return p.Status.Phase == v1.PodSucceeded }, starts: once},
	{name: "refused", manifest: "Never|exit, 3, 50ms|", settled: func(p *v1.Pod) bool { return p.Status.Phase == v1.PodFailed }, starts: once},
	{name: "stubborn", manifest: "Always|stubborn|", replaced: true, settled: node.Running, starts: once},
}

// soakMember is one pod of the soak.
type soakMember struct {
	soakKind
	name    string
	version int
	away    bool // its manifest is removed for the moment
}

func (m *soakMember) write(n *node.Node, counts string) {
	f := strings.SplitN(m.manifest, "|", 3)
	text := fmt.Sprintf(soakPod, m.name, counts, m.version, f[1], f[0])
	for _, word := range []string{"1,", "0,", "3,"} { // arguments are strings
		text = strings.Replace(text, "exit, "+word, fmt.Sprintf("exit, %q,", word[:1]), 1)
	}
	if f[2] != "" {
		text += "    " + f[2] + "\n"
	}
	n.Write(m.name+".yaml", text)
	m.away = false
}

// TestSoak lets pods run, crash, fail their probes and be replaced while podd
// is killed again and again. At the end each pod is what its manifest says,
// every start has been counted from inside, and nothing is left.
func TestSoak(t *testing.T) {
	p := soakParameters(t)
	n := node.New(t)
	n.Extra(configured(t, n, "crashLoopBackOff: {maxContainerRestartPeriod: "+p.backoff+"}")...)
	counts := t.TempDir()
	mirror(t, n, "testserver")
	t.Cleanup(func() { // before the node's own end
		if !t.Failed() {
			return
		}
		keep, err := os.MkdirTemp("", "podd-soak-logs-")
		if err != nil {
			return
		}
		found, _ := filepath.Glob(filepath.Join(n.RunDir(), "shim", "*.log*"))
		for _, f := range append(found, filepath.Join(n.Dir, "podd.log")) {
			if b, err := os.ReadFile(f); err == nil {
				os.WriteFile(filepath.Join(keep, filepath.Base(f)), b, 0o600)
			}
		}
		t.Log("the daemons' logs are in", keep)
	})
	n.Start()
	before := settled(n)

	var members, changing []*soakMember
	for i := range p.pods {
		k := soakKinds[i%len(soakKinds)]
		m := &soakMember{soakKind: k, name: fmt.Sprintf("%s%d", k.name, i)}
		m.write(n, counts)
		members = append(members, m)
		if k.replaced {
			changing = append(changing, m)
		}
	}
	begin := time.Now()
	lastKill, kills, changes := begin, 0, 0
	for pause := 100 * time.Millisecond; time.Since(begin) < p.duration; time.Sleep(pause) { // the pace of the changes
		m := changing[rand.IntN(len(changing))]
		changes++
		switch {
		case m.away || rand.IntN(4) > 0:
			m.version++
			m.write(n, counts)
		default:
			n.Remove(m.name + ".yaml")
			m.away = true
		}
		if time.Since(lastKill) >= p.kill {
			n.Signal(syscall.SIGKILL)
			n.Start()
			lastKill = time.Now()
			kills++
		}
	}
	for _, m := range changing {
		if m.away {
			m.version++
			m.write(n, counts)
		}
	}
	t.Logf("%d pods, %d changes, podd killed %d times in %v", p.pods, changes, kills, time.Since(begin).Round(second))

	byKey := map[string]*soakMember{}
	for _, m := range members {
		byKey["default/"+node.PodName(m.name)] = m
	}
	n.WaitPods("all as their manifests say", 5*time.Minute, func(pods map[string]*v1.Pod) bool {
		right := 0
		for key, p := range pods {
			m := byKey[key]
			if m != nil && p.DeletionTimestamp == nil && m.settled(p) && p.Spec.Containers[0].Env[0].Value == fmt.Sprint(m.version) {
				right++
			}
		}
		return right == len(members) && len(pods) == right
	})
	for _, m := range members {
		var last string
		node.Await(t, m.name+"'s starts being those that its status tells", 60*second, func() bool {
			pod, err := n.Pod(m.name)
			if err != nil {
				last = err.Error()
				return false
			}
			got, versions := soakStarts(counts, pod.UID)
			if m.starts(pod, got) && (len(versions) == 1 && versions[0] == fmt.Sprint(m.version)) {
				return true
			}
			last = fmt.Sprintf("%d starts, versions %v, want version %d, %+v", got, versions, m.version, status(pod))
			return false
		}, func() string { return last })
	}
	// Steady programs of versions long gone must have been started once, too.
	found, _ := filepath.Glob(filepath.Join(counts, "start.*"))
	for _, f := range found {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) == 0 {
			continue // ended before it could write
		}
		name := strings.TrimSuffix(strings.Fields(string(b))[0], "-node1")
		m := byKey["default/"+node.PodName(name)]
		if m == nil {
			t.Errorf("%s: start of no pod of this test: %s", f, b)
		} else if lines := bytes.Count(b, []byte("\n")); m.replaced && lines != 1 {
			t.Errorf("%s was started %d times in one life:\n%s", name, lines, b)
		}
	}
	if b, err := os.ReadFile(filepath.Join(counts, "double")); err == nil {
		t.Errorf("two ran at once under one name:\n%s", b)
	}
	for _, m := range members {
		n.Remove(m.name + ".yaml")
	}
	n.WaitGone(2 * time.Minute)
	n.NoLeaks(t, before, 30*second)
	if log, err := os.ReadFile(filepath.Join(n.Dir, "podd.log")); err == nil && bytes.Contains(log, []byte("panic")) {
		t.Error("podd's log tells of a panic")
	}
}

// soakStarts of a pod as counted from inside, and the versions that started.
func soakStarts(dir string, uid types.UID) (starts int, versions []string) {
	b, err := os.ReadFile(filepath.Join(dir, "start."+string(uid)))
	if err != nil {
		return 0, nil
	}
	for line := range strings.Lines(string(b)) {
		starts++
		if f := strings.Fields(line); len(f) == 3 && (len(versions) == 0 || versions[len(versions)-1] != f[1]) {
			versions = append(versions, f[1])
		}
	}
	return starts, versions
}
