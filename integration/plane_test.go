package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/apimachinery/pkg/watch"
)

// plane is an apiserver as far as a node sees one: what it needs to be given pods
// and to tell of them. While rough, requests get lost before or after they have had
// their effect, watches are cut, and versions are forgotten.
type plane struct {
	*httptest.Server

	mu      sync.Mutex
	version int
	uids    int
	objects map[string]map[string]object // by resource, by namespace and name
	history []happened
	changed chan struct{} // closed, and replaced, at each change
	rough   bool
	die     *rand.Rand
	// wrong is what the node has done against the rules.
	wrong []string
}

type object interface {
	runtime.Object
	metav1.Object
}

// happened is a change; was is nil for what was made, is for what was deleted.
type happened struct {
	version  int
	resource string
	was, is  object
}

// kinds that are kept, by resource; all others are unknown, but events, which are
// swallowed.
var kinds = map[string]struct {
	group, kind string
	new         func() object
}{
	"pods":       {"v1", "Pod", func() object { return &v1.Pod{} }},
	"nodes":      {"v1", "Node", func() object { return &v1.Node{} }},
	"services":   {"v1", "Service", func() object { return &v1.Service{} }},
	"configmaps": {"v1", "ConfigMap", func() object { return &v1.ConfigMap{} }},
	"leases":     {"coordination.k8s.io/v1", "Lease", func() object { return &coordinationv1.Lease{} }},
}

var planeCodecs = func() serializer.CodecFactory {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{v1.AddToScheme, coordinationv1.AddToScheme} {
		if err := add(s); err != nil {
			panic(err)
		}
	}
	metav1.AddToGroupVersion(s, v1.SchemeGroupVersion)
	return serializer.NewCodecFactory(s)
}()

func newPlane(seed uint64) *plane {
	p := &plane{objects: map[string]map[string]object{}, changed: make(chan struct{}), die: rand.New(rand.NewPCG(seed, 1))}
	for r := range kinds {
		p.objects[r] = map[string]object{}
	}
	p.Server = httptest.NewUnstartedServer(p)
	p.EnableHTTP2 = true // one connection, as with a real one
	p.StartTLS()
	return p
}

// change runs f, which may put and drop objects.
func (p *plane) change(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

func key(o metav1.Object) string { return o.GetNamespace() + "/" + o.GetName() }

// put a new version of an object; p.mu is held. What was put before is not changed.
func (p *plane) put(resource string, is object) object {
	p.version++
	was := p.objects[resource][key(is)]
	if was == nil {
		p.uids++
		is.SetUID(types.UID(fmt.Sprintf("00000000-0000-4000-8000-%012d", p.uids)))
		is.SetCreationTimestamp(metav1.Now())
	}
	is.SetResourceVersion(strconv.Itoa(p.version))
	k := kinds[resource]
	is.GetObjectKind().SetGroupVersionKind(schema.FromAPIVersionAndKind(k.group, k.kind))
	p.objects[resource][key(is)] = is
	p.happen(happened{p.version, resource, was, is})
	return is
}

// drop an object; p.mu is held.
func (p *plane) drop(resource string, was object) {
	p.version++
	delete(p.objects[resource], key(was))
	p.happen(happened{p.version, resource, was, nil})
}

func (p *plane) happen(h happened) {
	p.history = append(p.history, h)
	close(p.changed)
	p.changed = make(chan struct{})
}

// pod of that name; nil: none. p.mu is held.
func (p *plane) pod(name string) *v1.Pod {
	pod, _ := p.objects["pods"]["default/"+name].(*v1.Pod)
	return pod
}

// roll says yes so many times of a hundred while it is rough.
func (p *plane) roll(percent int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rough && p.die.IntN(100) < percent
}

func (p *plane) against(format string, args ...any) {
	p.wrong = append(p.wrong, fmt.Sprintf(format, args...))
}

// asked is what a request is about.
type asked struct{ resource, namespace, name, sub string }

func parse(path string) (a asked) {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	if parts[0] == "apis" {
		parts = parts[1:]
	}
	parts = parts[min(2, len(parts)):]
	if len(parts) > 2 && parts[0] == "namespaces" {
		a.namespace, parts = parts[1], parts[2:]
	}
	for i, into := range []*string{&a.resource, &a.name, &a.sub} {
		if i < len(parts) {
			*into = parts[i]
		}
	}
	return a
}

func (p *plane) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil || p.roll(4) {
		panic(http.ErrAbortHandler) // it never arrived
	}
	a := parse(r.URL.Path)
	if r.Method == http.MethodGet && r.URL.Query().Get("watch") != "" {
		p.watch(w, r, a)
		return
	}
	code, answer := http.StatusInternalServerError, any(refusal(http.StatusInternalServerError, "InternalError"))
	if !p.roll(4) {
		code, answer = p.serve(r, a, body)
	}
	if p.roll(4) {
		panic(http.ErrAbortHandler) // the answer is lost
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(answer)
}

func refusal(code int, reason metav1.StatusReason) *metav1.Status {
	return &metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Code: int32(code), Reason: reason}
}

func fail(code int, reason metav1.StatusReason) (int, any) { return code, refusal(code, reason) }

// serve a request that is no watch.
func (p *plane) serve(r *http.Request, a asked, body []byte) (int, any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k, kept := kinds[a.resource]
	switch {
	case a.resource == "events":
		return http.StatusCreated, &v1.Event{TypeMeta: metav1.TypeMeta{Kind: "Event", APIVersion: "v1"}}
	case !kept:
		return fail(http.StatusNotFound, metav1.StatusReasonNotFound)
	case r.Method == http.MethodGet && a.name == "":
		return http.StatusOK, p.list(k.group, k.kind, a, r)
	}
	was := p.objects[a.resource][a.namespace+"/"+a.name]
	switch {
	case r.Method == http.MethodPost:
		return p.create(a.resource, k.new(), body)
	case was == nil:
		return fail(http.StatusNotFound, metav1.StatusReasonNotFound)
	case r.Method == http.MethodGet:
		return http.StatusOK, was
	case r.Method == http.MethodPut:
		is := decoded(body, k.new()).(object)
		if is.GetResourceVersion() != was.GetResourceVersion() {
			return fail(http.StatusConflict, metav1.StatusReasonConflict)
		}
		return http.StatusOK, p.put(a.resource, is)
	case r.Method == http.MethodPatch:
		return p.patch(a.resource, was, k.new(), body)
	case r.Method == http.MethodDelete:
		return p.delete(a.resource, was, body)
	}
	return fail(http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed)
}

func decoded(body []byte, into runtime.Object) runtime.Object {
	is, _, err := planeCodecs.UniversalDeserializer().Decode(body, nil, into)
	if err != nil {
		panic(err)
	}
	return is
}

func (p *plane) create(resource string, into object, body []byte) (int, any) {
	is := decoded(body, into).(object)
	if p.objects[resource][key(is)] != nil {
		return fail(http.StatusConflict, metav1.StatusReasonAlreadyExists)
	}
	return http.StatusCreated, p.put(resource, is)
}

func (p *plane) patch(resource string, was, into object, body []byte) (int, any) {
	old, err := json.Marshal(was)
	if err != nil {
		panic(err)
	}
	merged, err := strategicpatch.StrategicMergePatch(old, body, into)
	if err != nil {
		panic(err)
	}
	if err := json.Unmarshal(merged, into); err != nil {
		panic(err)
	}
	if into.GetUID() != was.GetUID() {
		return fail(http.StatusConflict, metav1.StatusReasonConflict)
	}
	if is, ok := into.(*v1.Pod); ok {
		p.judge(was.(*v1.Pod), is)
	}
	return http.StatusOK, p.put(resource, into)
}

// judge what the node says of a pod: its program never fails and is never asked
// to end but by a deletion. Of one that is being deleted nothing may be left to
// look at: podd was killed between its end and the word of it.
func (p *plane) judge(was, is *v1.Pod) {
	what := fmt.Sprintf("pod %s (%s):", is.Name, is.UID)
	if was.Status.Phase == v1.PodRunning && is.Status.Phase == v1.PodPending && is.DeletionTimestamp == nil {
		p.against("%s it was Running and is Pending: %+v", what, is.Status.ContainerStatuses)
	}
	for _, c := range is.Status.ContainerStatuses {
		last := c.LastTerminationState.Terminated // nil after a start that podd-shim's end undid
		if last != nil && !last.StartedAt.IsZero() && is.DeletionTimestamp == nil {
			p.against("%s container %s was restarted: %+v", what, c.Name, last)
		}
		if c.State.Terminated != nil && is.DeletionTimestamp == nil && !isMirror(is) {
			p.against("%s container %s has ended: %+v", what, c.Name, c.State.Terminated)
		}
	}
}

func isMirror(pod *v1.Pod) bool { return pod.Annotations["kubernetes.io/config.mirror"] != "" }

func (p *plane) delete(resource string, was object, body []byte) (int, any) {
	opts := decoded(body, &metav1.DeleteOptions{}).(*metav1.DeleteOptions)
	if c := opts.Preconditions; c != nil && c.UID != nil && *c.UID != was.GetUID() {
		return fail(http.StatusConflict, metav1.StatusReasonConflict)
	}
	if pod, ok := was.(*v1.Pod); ok && pod.DeletionTimestamp == nil && !isMirror(pod) {
		p.against("pod %s (%s): the node deletes it and nobody asked for it", pod.Name, pod.UID)
	}
	p.drop(resource, was)
	return http.StatusOK, was
}

// selects says whether a list or watch is about an object; nil is in none.
func selects(a asked, r *http.Request, o object) bool {
	if o == nil || a.namespace != "" && o.GetNamespace() != a.namespace {
		return false
	}
	field, want, _ := strings.Cut(r.URL.Query().Get("fieldSelector"), "=")
	switch field {
	case "metadata.name":
		return o.GetName() == want
	case "spec.nodeName":
		return o.(*v1.Pod).Spec.NodeName == want
	}
	return true
}

func (p *plane) list(group, kind string, a asked, r *http.Request) any {
	items := []object{}
	for _, o := range p.objects[a.resource] {
		if selects(a, r, o) {
			items = append(items, o)
		}
	}
	return map[string]any{
		"apiVersion": group, "kind": kind + "List",
		"metadata": map[string]any{"resourceVersion": strconv.Itoa(p.version)}, "items": items,
	}
}

// watch tells what happens after a version, until it is cut.
func (p *plane) watch(w http.ResponseWriter, r *http.Request, a asked) {
	w.Header().Set("Content-Type", "application/json")
	if r.URL.Query().Get("sendInitialEvents") != "" {
		w.WriteHeader(http.StatusUnprocessableEntity)
		_ = json.NewEncoder(w).Encode(refusal(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid))
		return
	}
	after, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	out := json.NewEncoder(w)
	if p.roll(20) {
		_ = out.Encode(map[string]any{"type": watch.Error, "object": refusal(http.StatusGone, metav1.StatusReasonExpired)})
		return
	}
	p.mu.Lock()
	cut := time.NewTimer(time.Duration(200+p.die.IntN(3000)) * time.Millisecond)
	p.mu.Unlock()
	defer cut.Stop()
	for {
		w.(http.Flusher).Flush()
		p.mu.Lock()
		news, changed := p.history, p.changed
		p.mu.Unlock()
		for _, h := range news[min(after, len(news)):] { // versions count changes
			after = h.version
			if e := seen(a, r, h); e != nil && out.Encode(e) != nil {
				return
			}
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		case <-cut.C:
			if p.roll(100) {
				return
			}
			cut.Reset(time.Minute)
		}
	}
}

// seen is a change as a watch shows it; nil: not at all.
func seen(a asked, r *http.Request, h happened) any {
	if h.resource != a.resource {
		return nil
	}
	was, is := h.was != nil && selects(a, r, h.was), h.is != nil && selects(a, r, h.is)
	switch {
	case was && is:
		return map[string]any{"type": watch.Modified, "object": h.is}
	case is:
		return map[string]any{"type": watch.Added, "object": h.is}
	case was:
		last := h.was.DeepCopyObject().(object)
		last.SetResourceVersion(strconv.Itoa(h.version))
		return map[string]any{"type": watch.Deleted, "object": last}
	}
	return nil
}
