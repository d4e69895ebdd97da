package model

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podd-runtime/podd/kubelet/manifests"
)

// history draws what happens to a world.
type history struct {
	*world
	r *rand.Rand
	// gone pods of the apiserver's, which somebody may put back.
	gone []*v1.Pod
}

// operation is one thing that may happen, as often as its weight says.
type operation struct {
	weight int
	name   string
	do     func(*history)
}

var operations = []operation{
	{14, "create", (*history).create},
	{4, "bind", (*history).bind},
	{5, "label", (*history).label},
	{4, "another image", (*history).image},
	{3, "resize", (*history).resize},
	{2, "ephemeral container", (*history).ephemeral},
	{12, "delete", (*history).delete},
	{4, "recreate", (*history).recreate},
	{5, "same uid", (*history).again},
	{4, "comes back and goes", (*history).comeAndGo},
	{3, "failed by others", (*history).fail},
	{3, "release finalizers", (*history).unfinalize},
	{4, "back up", func(h *history) { h.api.backUp() }},
	{3, "restore", (*history).restore},
	{3, "watch cut", func(h *history) { h.api.cutWatches() }},
	{2, "410", func(h *history) { h.api.compact(); h.api.cutWatches() }},
	{2, "connection lost", func(h *history) { h.api.goAway(h.seconds(90)) }},
	{1, "node deleted", (*history).nodeDeleted},
	{6, "exit", (*history).exit},
	{2, "out of memory", (*history).oom},
	{3, "probes", (*history).probes},
	{2, "podd-shim away", func(h *history) { h.rt.goAway(h.seconds(60)) }},
	{3, "restart", func(h *history) { h.end(); h.begin() }},
	{6, "kill", (*history).killed},
	{1, "power cut", (*history).powerCut},
	{3, "records age", func(h *history) { h.disk.age() }},
	{2, "clock", (*history).clock},
	{3, "shutdown", func(h *history) { h.machine.set(true) }},
	{4, "shutdown called off", (*history).callOff},
	{1, "logind lost", func(h *history) { h.machine.lose() }},
	{4, "manifest", (*history).manifest},
	{2, "no manifest", (*history).noManifest},
	{3, "mirror deleted", (*history).unmirror},
}

var allWeights = func() (n int) {
	for _, o := range operations {
		n += o.weight
	}
	return n
}()

// step does one operation at random and lets some time pass.
func (h *history) step() {
	n := h.r.IntN(allWeights)
	for _, o := range operations {
		if n -= o.weight; n < 0 {
			h.note("--- %s", o.name)
			o.do(h)
			break
		}
	}
	time.Sleep(h.pause())
}

// pause between two operations: many come at once, or while things are under way.
func (h *history) pause() time.Duration {
	switch h.r.IntN(6) {
	case 0:
		return 0
	case 1:
		return time.Duration(h.r.IntN(2_000_000))
	case 2:
		return time.Duration(h.r.IntN(50_000_000))
	case 3:
		return time.Duration(h.r.IntN(1_500_000_000))
	case 4:
		return time.Duration(h.r.IntN(12_000_000_000))
	}
	return h.seconds(60)
}

func (h *history) seconds(most int) time.Duration {
	return time.Duration(h.r.IntN(most*1000)) * time.Millisecond
}

// any of the apiserver's pods that are; nil: there is none.
func (h *history) any(are func(*v1.Pod) bool) *v1.Pod {
	var list []*v1.Pod
	for _, p := range h.api.list() {
		if are(p) {
			list = append(list, p)
		}
	}
	if len(list) == 0 {
		return nil
	}
	return list[h.r.IntN(len(list))]
}

func isMirror(p *v1.Pod) bool { return p.Annotations[mirrorAnnotation] != "" }
func isOwn(p *v1.Pod) bool    { return !isMirror(p) }

func (h *history) create() {
	pod := makePod(fmt.Sprint("p", h.r.IntN(3)), h.r)
	h.post(pod, "")
}

// post a pod, mostly bound at once.
func (h *history) post(pod *v1.Pod, uid types.UID) {
	if h.r.IntN(4) > 0 {
		pod.Spec.NodeName = nodeName
	}
	if is, err := h.api.create(pod, uid); err == nil {
		h.note("apiserver: %s (%s) made", is.pod.Name, is.pod.UID)
	}
}

func makePod(name string, r *rand.Rand) *v1.Pod {
	grace := int64(r.IntN(8))
	p := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"},
		Spec: v1.PodSpec{
			RestartPolicy: v1.RestartPolicyAlways, TerminationGracePeriodSeconds: &grace, DNSPolicy: v1.DNSDefault,
			Containers: []v1.Container{makeContainer("a")},
		},
	}
	if r.IntN(4) == 0 {
		p.Spec.RestartPolicy = v1.RestartPolicyNever
	}
	if r.IntN(3) == 0 {
		p.Spec.Containers = append(p.Spec.Containers, makeContainer("b"))
	}
	if r.IntN(5) == 0 {
		p.Spec.InitContainers = append(p.Spec.InitContainers, makeContainer("init"))
	}
	if r.IntN(6) == 0 {
		side := makeContainer("side")
		side.RestartPolicy = new(v1.ContainerRestartPolicyAlways)
		p.Spec.InitContainers = append(p.Spec.InitContainers, side)
	}
	if r.IntN(4) == 0 {
		probe := &v1.Probe{
			ProbeHandler:  v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{"x"}}},
			PeriodSeconds: 20, TimeoutSeconds: 2, SuccessThreshold: 1, FailureThreshold: 2,
		}
		if r.IntN(2) == 0 {
			p.Spec.Containers[0].ReadinessProbe = probe
		} else {
			p.Spec.Containers[0].LivenessProbe = probe
		}
	}
	if r.IntN(6) == 0 {
		p.Finalizers = []string{"example.com/wait"}
	}
	return p
}

func makeContainer(name string) v1.Container {
	return v1.Container{
		Name: name, Image: "img:1", ImagePullPolicy: v1.PullIfNotPresent, TerminationMessagePath: "/dev/termination-log",
		Resources: v1.ResourceRequirements{Requests: v1.ResourceList{v1.ResourceCPU: resource.MustParse("100m")}},
	}
}

func (h *history) bind() {
	if p := h.any(func(p *v1.Pod) bool { return p.Spec.NodeName == "" }); p != nil {
		h.api.change(p.Name, false, func(p *v1.Pod) { p.Spec.NodeName = nodeName })
	}
}

func (h *history) label() {
	if p := h.any(isOwn); p != nil {
		h.api.change(p.Name, false, func(p *v1.Pod) { setLabel(p, "l", fmt.Sprint(h.r.IntN(100))) })
	}
}

func (h *history) image() {
	if p := h.any(isOwn); p != nil {
		h.api.change(p.Name, true, func(p *v1.Pod) { p.Spec.Containers[0].Image = fmt.Sprint("img:", 1+h.r.IntN(3)) })
	}
}

func (h *history) resize() {
	if p := h.any(isOwn); p != nil {
		h.api.change(p.Name, true, func(p *v1.Pod) {
			p.Spec.Containers[0].Resources.Requests = v1.ResourceList{v1.ResourceCPU: *resource.NewMilliQuantity(int64(50*(1+h.r.IntN(6))), resource.DecimalSI)}
		})
	}
}

func (h *history) ephemeral() {
	if p := h.any(isOwn); p != nil && len(p.Spec.EphemeralContainers) == 0 {
		h.api.change(p.Name, true, func(p *v1.Pod) {
			p.Spec.EphemeralContainers = []v1.EphemeralContainer{{EphemeralContainerCommon: v1.EphemeralContainerCommon{
				Name: "debug", Image: "img:1", ImagePullPolicy: v1.PullIfNotPresent,
			}}}
		})
	}
}

// grace of a deletion; nil is the pod's own.
func (h *history) grace() *int64 {
	switch h.r.IntN(5) {
	case 0:
		return new(int64(0))
	case 1:
		return new(int64(1))
	case 2:
		return new(int64(30))
	}
	return nil
}

func (h *history) delete() {
	if p := h.any(isOwn); p != nil {
		h.expel(p, h.grace())
	}
}

func (h *history) expel(p *v1.Pod, grace *int64) {
	g := int64(-1)
	if grace != nil {
		g = *grace
	}
	h.note("apiserver: %s (%s) is deleted, grace %d", p.Name, p.UID, g)
	h.gone = append(h.gone, p)
	h.api.remove(p.Name, grace, "")
}

// recreate a pod under its name: at once, when it can be.
func (h *history) recreate() {
	if p := h.any(isOwn); p != nil {
		h.expel(p, new(int64(0)))
		h.post(makePod(p.Name, h.r), "")
	}
}

// again: a pod that has gone, or goes now, is put back with its UID.
func (h *history) again() {
	if p := h.any(isOwn); p != nil && h.r.IntN(2) == 0 {
		h.expel(p, new(int64(0)))
		time.Sleep(h.pause())
	}
	if len(h.gone) == 0 {
		return
	}
	was := h.gone[h.r.IntN(len(h.gone))]
	if h.api.byUID(was.UID) != nil {
		return
	}
	h.mayForget()
	pod := was.DeepCopy()
	pod.DeletionTimestamp, pod.DeletionGracePeriodSeconds, pod.Finalizers = nil, nil, nil
	h.post(pod, was.UID)
}

// comeAndGo is a pod that goes, at times as one that is over, is put back before it
// is gone, and goes again.
func (h *history) comeAndGo() {
	p := h.any(func(p *v1.Pod) bool { return isOwn(p) && p.Spec.NodeName != "" && len(p.Finalizers) == 0 })
	if p == nil {
		return
	}
	if h.r.IntN(2) == 0 {
		h.api.change(p.Name, false, func(p *v1.Pod) { p.Status.Phase, p.Status.Reason = v1.PodFailed, lostByOthers })
		time.Sleep(h.seconds(2))
	}
	h.expel(p, new(int64(0)))
	time.Sleep(h.seconds(2))
	h.mayForget()
	pod := p.DeepCopy()
	pod.DeletionTimestamp, pod.DeletionGracePeriodSeconds = nil, nil
	if _, err := h.api.create(pod, p.UID); err != nil {
		return
	}
	h.note("apiserver: %s (%s) is back", pod.Name, pod.UID)
	time.Sleep(h.seconds(4))
	h.expel(pod, nil)
}

// lostByOthers is the reason of a pod that others say has failed.
const lostByOthers = "NodeLost"

// fail a pod as the garbage collector does of a node that is lost.
func (h *history) fail() {
	if p := h.any(isOwn); p != nil && p.Spec.NodeName != "" && p.Status.Phase != v1.PodSucceeded {
		h.api.change(p.Name, false, func(p *v1.Pod) { p.Status.Phase, p.Status.Reason = v1.PodFailed, lostByOthers })
	}
}

func (h *history) unfinalize() {
	if p := h.any(func(p *v1.Pod) bool { return len(p.Finalizers) > 0 }); p != nil {
		h.api.release(p.Name)
	}
}

func (h *history) restore() {
	if n := len(h.api.backups); n > 0 {
		h.api.restore(h.r.IntN(n))
	}
}

// nodeDeleted and registered again: the garbage collectors take what was its.
func (h *history) nodeDeleted() {
	for _, p := range h.api.list() {
		if isMirror(p) || p.Spec.NodeName != "" && h.r.IntN(2) == 0 {
			h.api.remove(p.Name, new(int64(0)), "")
		}
	}
	h.nodeUID = types.UID(fmt.Sprint("node-", h.r.IntN(1000)))
	time.Sleep(h.seconds(2))
	h.podd.pods.Registered(h.nodeUID)
}

// victim is a container that runs; "": there is none.
func (h *history) victim() string {
	h.rt.mu.Lock()
	defer h.rt.mu.Unlock()
	var ids []string
	for _, id := range slices.Sorted(maps.Keys(h.rt.containers)) {
		if !h.rt.containers[id].start.IsZero() && h.rt.containers[id].end.IsZero() {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return ""
	}
	return ids[h.r.IntN(len(ids))]
}

func (h *history) exit() {
	if id := h.victim(); id != "" {
		code := int32(h.r.IntN(2))
		h.rt.exit(id, code, []string{"Completed", "Error"}[code])
	}
}

func (h *history) oom() {
	if id := h.victim(); id != "" {
		h.rt.exit(id, 137, "OOMKilled")
	}
}

// probes of a pod fail from now on, or no longer.
func (h *history) probes() {
	if p := h.any(isOwn); p != nil {
		h.rt.keep(h.rt.unfit, p.UID, !slices.Contains(h.rt.kept(h.rt.unfit), p.UID))
	}
}

// killed is podd, and at times a record is lost with it.
func (h *history) killed() {
	h.kill()
	h.loseRecords(12)
	h.begin()
}

// loseRecords: one of so many is not there, or could not be read.
func (h *history) loseRecords(of int) {
	for _, name := range slices.Sorted(maps.Keys(h.disk.read())) {
		if h.r.IntN(of) == 0 {
			h.note("disk: %s is lost", name)
			h.disk.lose(name)
			h.recordLost(types.UID(strings.TrimSuffix(name, ".json")))
		}
	}
	h.mayForget()
	h.strayLogs()
}

// powerCut ends all; of the records some are old.
func (h *history) powerCut() {
	h.kill()
	h.rt.reboot()
	h.machine.set(false)
	h.machine.lose()
	for _, name := range slices.Sorted(maps.Keys(h.disk.old)) {
		if h.r.IntN(3) == 0 {
			h.note("disk: %s is old", name)
			h.disk.revert(name)
		}
	}
	h.loseRecords(6)
	h.begin()
}

func (h *history) clock() {
	by := time.Duration(h.r.IntN(48*3600)-24*3600) * time.Second
	h.note("clock: %s", by)
	h.disk.setClock(by)
}

// callOff a shutdown, or let it come.
func (h *history) callOff() {
	if !h.machine.going() {
		return
	}
	if h.r.IntN(3) == 0 {
		time.Sleep(30 * time.Second)
		h.powerCut()
		return
	}
	if h.r.IntN(3) == 0 {
		h.machine.lose() // and what is told meanwhile
	}
	h.machine.set(false)
}

// manifest of a static pod, a new one or another revision.
func (h *history) manifest() {
	name := fmt.Sprint("s", h.r.IntN(2), "-", nodeName)
	pod := makePod(name, h.r)
	pod.Finalizers = nil
	pod.Spec.RestartPolicy, pod.Spec.NodeName = v1.RestartPolicyAlways, nodeName
	rev := fmt.Sprint(name, "-", h.r.IntN(10000))
	pod.UID = types.UID(rev)
	pod.Annotations = map[string]string{manifests.ConfigSourceAnnotation: "file", manifests.ConfigHashAnnotation: rev}
	h.note("manifest %s", rev)
	h.statics[name] = pod
	h.podd.static.SetPod("file", pod)
}

func (h *history) noManifest() {
	names := slices.Sorted(maps.Keys(h.statics))
	if len(names) == 0 {
		return
	}
	name := names[h.r.IntN(len(names))]
	h.dropStatic(name)
}

func (w *world) dropStatic(name string) {
	pod := w.statics[name]
	w.note("no manifest %s", pod.UID)
	delete(w.statics, name)
	w.podd.static.RemovePod("file", pod.UID)
}

func (h *history) unmirror() {
	if p := h.any(isMirror); p != nil {
		h.api.remove(p.Name, h.grace(), "")
	}
}
