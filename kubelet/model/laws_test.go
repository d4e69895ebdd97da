package model

import (
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/status"
)

// bound is the time within which everything must be as it is wanted once
// nothing fails any more: the longest back-off there is, of a container, is
// five minutes and ends after ten.
const bound = 11 * time.Minute

// settle: nothing fails any more, and what was begun by others they finish.
func (w *world) settle(wait time.Duration) {
	w.setCalm(true)
	w.rt.goAway(0)
	w.api.goAway(0)
	if w.machine.going() {
		w.machine.set(false)
	}
	w.rt.mu.Lock()
	clear(w.rt.unfit)
	w.rt.mu.Unlock()
	for _, p := range w.api.list() {
		if isMirror(p) && p.OwnerReferences[0].UID != w.nodeUID {
			w.api.remove(p.Name, new(int64(0)), "") // the garbage collector
		}
		if p.Spec.NodeName == "" {
			w.api.change(p.Name, false, func(p *v1.Pod) { p.Spec.NodeName = nodeName })
		}
	}
	w.podd.pods.Registered(w.nodeUID)
	time.Sleep(wait)
	synctest.Wait()
	w.note("--- settled")
}

// check all laws on a world that has settled.
func (w *world) check() {
	listed := map[types.UID]*v1.Pod{}
	for _, p := range w.podd.table.Pods() {
		listed[p.UID] = p
	}
	wanted := map[types.UID]bool{}
	for _, p := range w.api.list() {
		if isMirror(p) {
			w.checkMirror(p)
			continue
		}
		wanted[p.UID] = true
		w.checkPod(p, listed[p.UID])
	}
	for _, name := range slices.Sorted(maps.Keys(w.statics)) {
		p := w.statics[name]
		wanted[p.UID] = true
		w.checkStatic(p, listed[p.UID])
	}
	for uid := range listed {
		if !wanted[uid] {
			w.breach("pod %s is listed, and nobody wants it", uid)
		}
	}
	w.checkRuntime(wanted)
	w.checkMemory(listed)
}

// checkPod of the apiserver's; shown is what podd has of it.
func (w *world) checkPod(p, shown *v1.Pod) {
	bad := func(format string, args ...any) {
		w.breach("%s (%s, %s): %s", p.Name, p.UID, p.Status.Phase, fmt.Sprintf(format, args...))
	}
	live := w.rt.running(p.UID)
	switch {
	case p.DeletionTimestamp != nil && len(p.Finalizers) == 0:
		bad("it is still being deleted")
		return
	case p.DeletionTimestamp != nil || status.Over(p.Status.Phase):
		if len(live) > 0 {
			bad("%d containers run", len(live))
		}
		return
	case shown == nil:
		bad("podd does not list it")
		return
	}
	w.checkContainers(p, &p.Status, live, bad)
	w.checkTold(p, shown, bad)
}

// checkTold: the apiserver knows what the table shows, and the other way.
func (w *world) checkTold(p, shown *v1.Pod, bad func(string, ...any)) {
	if a, b := (brief{&p.Status}).String(), (brief{&shown.Status}).String(); a != b {
		bad("the apiserver knows\n  %s, podd shows\n  %s", a, b)
	}
	if p.Status.ObservedGeneration != p.Generation {
		bad("generation %d is observed of %d", p.Status.ObservedGeneration, p.Generation)
	}
	if !maps.Equal(p.Labels, shown.Labels) {
		bad("its labels are %v, podd has %v", p.Labels, shown.Labels)
	}
	if shown.DeletionTimestamp != nil {
		bad("podd shows it as Terminating")
	}
}

// checkContainers: all that should run does, of the right image, and is ready.
func (w *world) checkContainers(p *v1.Pod, st *v1.PodStatus, live map[string]*container, bad func(string, ...any)) {
	for i := range p.Spec.Containers {
		c := &p.Spec.Containers[i]
		cs := find(st.ContainerStatuses, c.Name)
		k := live[c.Name]
		if k == nil {
			if p.Spec.RestartPolicy == v1.RestartPolicyAlways || cs.State.Terminated == nil {
				bad("container %s does not run: %s", c.Name, brief{st})
			}
			continue
		}
		if k.cfg.Image.Image != c.Image {
			bad("container %s runs %s instead of %s", c.Name, k.cfg.Image.Image, c.Image)
		}
		if cs.ContainerID != idPrefix+k.id || cs.State.Running == nil || !cs.Ready {
			bad("container %s runs as %s: %s", c.Name, k.id, brief{st})
		}
		if want := c.Resources.Requests.Cpu(); cs.Resources != nil && cs.Resources.Requests.Cpu().Cmp(*want) != 0 {
			bad("container %s has %s of CPU instead of %s", c.Name, cs.Resources.Requests.Cpu(), want)
		}
	}
	_, ready := podutil.GetPodCondition(st, v1.PodReady)
	if p.Spec.RestartPolicy == v1.RestartPolicyAlways && (ready == nil || ready.Status != v1.ConditionTrue) {
		bad("it is not ready: %+v", ready)
	}
}

func (w *world) checkStatic(p, shown *v1.Pod) {
	bad := func(format string, args ...any) {
		w.breach("static pod %s (%s): %s", p.Name, p.UID, fmt.Sprintf(format, args...))
	}
	if shown == nil {
		bad("podd does not list it")
		return
	}
	w.checkContainers(p, &shown.Status, w.rt.running(p.UID), bad)
	m := w.api.get(p.Name)
	switch {
	case m == nil || !isMirror(m):
		bad("it has no mirror pod")
	case m.DeletionTimestamp != nil:
		bad("its mirror pod is being deleted")
	case m.Annotations[mirrorAnnotation] != p.Annotations[manifests.ConfigHashAnnotation]:
		bad("its mirror pod is of another revision")
	case (brief{&m.Status}).String() != (brief{&shown.Status}).String():
		bad("its mirror pod shows\n  %s, podd shows\n  %s", brief{&m.Status}, brief{&shown.Status})
	}
}

func (w *world) checkMirror(m *v1.Pod) {
	if w.statics[m.Name] == nil {
		w.breach("mirror pod %s (%s) is of nothing", m.Name, m.UID)
	}
}

// checkRuntime: nothing is there that nobody wants.
func (w *world) checkRuntime(wanted map[types.UID]bool) {
	w.rt.mu.Lock()
	defer w.rt.mu.Unlock()
	over := func(uid types.UID) bool {
		p := w.api.byUID(uid)
		return p != nil && (status.Over(p.Status.Phase) || p.DeletionTimestamp != nil)
	}
	for id, s := range w.rt.sandboxes {
		if !wanted[s.uid] || s.ready && over(s.uid) {
			w.breach("sandbox %s is left, ready %v", id, s.ready)
		}
	}
	for id, k := range w.rt.containers {
		if !wanted[k.uid] {
			w.breach("container %s is left", id)
		}
	}
	for what, set := range map[string]map[types.UID]bool{"volumes": w.rt.volumes, "cgroup": w.rt.groups} {
		for uid := range set {
			if !wanted[uid] || over(uid) {
				w.breach("%s of %s left", what, uid)
			}
		}
	}
	files, _ := filepath.Glob(filepath.Join(w.disk.dir, "*"))
	for _, f := range files {
		if !wanted[types.UID(strings.TrimSuffix(filepath.Base(f), ".json"))] {
			w.breach("record %s is left", filepath.Base(f))
		}
	}
	for _, uid := range w.logs() {
		if !wanted[uid] && !w.stray[uid] {
			w.breach("logs of %s are left", uid)
		}
	}
}

// checkMemory of podd: it holds what is there, and no more.
func (w *world) checkMemory(listed map[types.UID]*v1.Pod) {
	api := reflect.ValueOf(w.podd.pods).Elem()
	there, mirrors := map[string]bool{}, 0
	for _, p := range w.api.list() {
		there[string(p.UID)] = true
		if isMirror(p) {
			mirrors++
		}
	}
	known := keys(api.FieldByName("known"))
	for _, uid := range known {
		if !there[uid] {
			w.breach("podd knows of %s, which the apiserver has no more", uid)
		}
	}
	if len(known) < len(there) {
		w.breach("podd knows of %v, the apiserver has %v", known, slices.Sorted(maps.Keys(there)))
	}
	for _, uid := range keys(api.FieldByName("reports")) {
		if listed[types.UID(uid)] == nil && !there[uid] {
			w.breach("a report of %s is left", uid)
		}
	}
	for field, want := range map[string]int{"mirrors": mirrors, "buried": 0, "orphans": 0, "static": len(w.statics)} {
		if n := api.FieldByName(field).Len(); n != want {
			w.breach("apiserver.Pods.%s holds %d of %d", field, n, want)
		}
	}
	for _, uid := range w.podd.uses.all() {
		if !there[string(uid)] {
			w.breach("objects of %s are watched, which is gone", uid)
		}
	}
	for uid, p := range listed {
		if p.Annotations[manifests.ConfigSourceAnnotation] != "file" && !slices.Contains(w.podd.uses.all(), uid) {
			w.breach("objects of %s are not watched", uid)
		}
	}
	w.checkTable(len(listed))
}

// checkTable: one worker, and what it needs, for each pod.
func (w *world) checkTable(pods int) {
	table := reflect.ValueOf(w.podd.table).Elem()
	index := table.FieldByName("index")
	for field, most := range map[string]int{"workers": pods, "uids": pods, "told": pods, "blocked": 0} {
		if n := index.FieldByName(field).Len(); n > most {
			w.breach("pods.Table.%s holds %d of %d: %v", field, n, most, keys(index.FieldByName(field)))
		}
	}
	w.rt.mu.Lock()
	ids := len(w.rt.sandboxes) + len(w.rt.containers)
	w.rt.mu.Unlock()
	if n := index.FieldByName("ids").Len(); n > ids {
		w.breach("pods.Table.ids holds %d of %d: %v", n, ids, keys(index.FieldByName("ids")))
	}
	admitted := table.FieldByName("admitted")
	for field, most := range map[string]int{"pods": pods, "deferred": 0} {
		if n := admitted.FieldByName(field).Len(); n > most {
			w.breach("pods.Table.admitted.%s holds %d of %d", field, n, most)
		}
	}
	if n := table.FieldByName("records").Elem().FieldByName("dirty").Len(); n > 0 {
		w.breach("%d records are not written", n)
	}
}

func keys(m reflect.Value) (out []string) {
	for _, k := range m.MapKeys() {
		out = append(out, fmt.Sprint(k))
	}
	slices.Sort(out)
	return out
}

// empty the world: everybody takes away what he has made.
func (w *world) empty() {
	w.note("--- all goes")
	for _, name := range slices.Sorted(maps.Keys(w.statics)) {
		w.dropStatic(name)
	}
	for _, p := range w.api.list() {
		if isOwn(p) {
			w.api.remove(p.Name, nil, "")
			w.api.release(p.Name)
		}
	}
	w.settle(3 * time.Minute)
	w.check()
	if left := w.api.list(); len(left) > 0 {
		w.breach("the apiserver still has %d pods", len(left))
	}
}
