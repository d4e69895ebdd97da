package server

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
)

// object is what the API serves.
type object interface {
	metav1.Object
	runtime.Object
}

// kind is one resource of the core group.
type kind struct {
	name, singular, kind string
	namespaced           bool
	short, categories    []string
	list                 func() []object
	// version is that of the last change; nil: the newest of list.
	version func() string
	// watch delivers every change after a resourceVersion, and may deliver
	// older ones, too; nil: cannot be watched.
	watch func(ctx context.Context, resourceVersion string) <-chan watch.Event
	// fields that a fieldSelector may name, next to metadata.name and metadata.namespace.
	fields func(o object, into fields.Set)
}

func (s *Server) resources() []*kind {
	pods := &kind{
		name: "pods", singular: "pod", kind: "Pod", namespaced: true, short: []string{"po"}, categories: []string{"all"},
		list:    func() []object { return objects(s.cfg.Pods.List()) },
		version: s.cfg.Pods.ResourceVersion,
		watch:   s.cfg.Pods.Watch,
		fields:  podFields,
	}
	events := &kind{
		name: "events", singular: "event", kind: "Event", namespaced: true, short: []string{"ev"},
		list: func() []object {
			all := s.cfg.Events.List("")
			out := make([]object, len(all))
			for i := range all {
				out[i] = &all[i]
			}
			return out
		},
		watch:  func(ctx context.Context, _ string) <-chan watch.Event { return s.cfg.Events.Watch(ctx) },
		fields: eventFields,
	}
	nodes := &kind{
		name: "nodes", singular: "node", kind: "Node", short: []string{"no"},
		list: func() []object { return []object{s.node()} },
	}
	namespaces := &kind{
		name: "namespaces", singular: "namespace", kind: "Namespace", short: []string{"ns"},
		list: s.namespaces,
	}
	all := []*kind{pods, events, nodes, namespaces}
	if s.cfg.Objects != nil {
		all = append(all,
			&kind{
				name: "configmaps", singular: "configmap", kind: "ConfigMap", namespaced: true, short: []string{"cm"},
				list: func() []object { return objects(s.cfg.Objects.ConfigMaps()) },
			},
			&kind{
				name: "secrets", singular: "secret", kind: "Secret", namespaced: true,
				list: func() []object { return objects(s.cfg.Objects.Secrets()) },
			})
	}
	return all
}

func objects[T object](in []T) []object {
	out := make([]object, len(in))
	for i := range in {
		out[i] = in[i]
	}
	return out
}

// podFields are those of upstream's pod registry (ToSelectableFields).
func podFields(o object, f fields.Set) {
	p := o.(*v1.Pod)
	f["spec.nodeName"] = p.Spec.NodeName
	f["spec.restartPolicy"] = string(p.Spec.RestartPolicy)
	f["spec.schedulerName"] = p.Spec.SchedulerName
	f["spec.serviceAccountName"] = p.Spec.ServiceAccountName
	f["spec.hostNetwork"] = strconv.FormatBool(p.Spec.HostNetwork)
	f["status.phase"] = string(p.Status.Phase)
	f["status.podIP"] = p.Status.PodIP
	f["status.nominatedNodeName"] = p.Status.NominatedNodeName
}

// eventFields are those of upstream's event registry.
func eventFields(o object, f fields.Set) {
	e := o.(*v1.Event)
	f["involvedObject.kind"] = e.InvolvedObject.Kind
	f["involvedObject.namespace"] = e.InvolvedObject.Namespace
	f["involvedObject.name"] = e.InvolvedObject.Name
	f["involvedObject.uid"] = string(e.InvolvedObject.UID)
	f["involvedObject.apiVersion"] = e.InvolvedObject.APIVersion
	f["involvedObject.resourceVersion"] = e.InvolvedObject.ResourceVersion
	f["involvedObject.fieldPath"] = e.InvolvedObject.FieldPath
	f["reason"] = e.Reason
	f["reportingComponent"] = e.ReportingController
	f["source"] = e.Source.Component
	f["type"] = e.Type
}

func (s *Server) node() *v1.Node {
	if s.cfg.Node != nil {
		if n := s.cfg.Node(); n != nil {
			return n
		}
	}
	ready := v1.NodeCondition{Type: v1.NodeReady, Status: v1.ConditionTrue, Reason: "KubeletReady", Message: "podd answers"}
	return &v1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: s.cfg.NodeName, ResourceVersion: "1", CreationTimestamp: metav1.NewTime(s.started)},
		Status: v1.NodeStatus{
			Addresses:  []v1.NodeAddress{{Type: v1.NodeHostName, Address: s.cfg.NodeName}},
			Conditions: []v1.NodeCondition{ready},
			NodeInfo:   v1.NodeSystemInfo{KubeletVersion: s.cfg.Version},
		},
	}
}

// namespaces are default and those that objects of this node are in.
func (s *Server) namespaces() []object {
	names := []string{metav1.NamespaceDefault}
	for _, p := range s.cfg.Pods.List() {
		names = append(names, p.Namespace)
	}
	if s.cfg.Objects != nil {
		for _, o := range s.cfg.Objects.ConfigMaps() {
			names = append(names, o.Namespace)
		}
		for _, o := range s.cfg.Objects.Secrets() {
			names = append(names, o.Namespace)
		}
	}
	slices.Sort(names)
	var out []object
	for _, n := range slices.Compact(names) {
		out = append(out, &v1.Namespace{
			ObjectMeta: metav1.ObjectMeta{Name: n, ResourceVersion: "1", CreationTimestamp: metav1.NewTime(s.started)},
			Status:     v1.NamespaceStatus{Phase: v1.NamespaceActive},
		})
	}
	return out
}

func (s *Server) resourceRoutes(m *http.ServeMux) {
	for _, k := range s.kinds {
		collection := func(w http.ResponseWriter, r *http.Request) {
			k.serveCollection(w, r, r.PathValue("namespace"), "")
		}
		item := long(func(w http.ResponseWriter, r *http.Request) error {
			namespace, name := r.PathValue("namespace"), r.PathValue("name")
			if r.FormValue("watch") == "true" || r.FormValue("watch") == "1" {
				k.serveCollection(w, r, namespace, name)
				return nil
			}
			o, err := k.get(namespace, name)
			if err != nil {
				return err
			}
			writeJSON(w, http.StatusOK, k.typed(o))
			return nil
		})
		m.HandleFunc("GET /api/v1/"+k.name, collection)
		if k.namespaced {
			m.HandleFunc("GET /api/v1/namespaces/{namespace}/"+k.name, collection)
			m.HandleFunc("GET /api/v1/namespaces/{namespace}/"+k.name+"/{name}", item)
		} else {
			m.HandleFunc("GET /api/v1/"+k.name+"/{name}", item)
		}
	}
}

// typed fills in what only a single object carries in its JSON.
func (k *kind) typed(o object) object {
	o = o.DeepCopyObject().(object)
	o.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{Version: "v1", Kind: k.kind})
	return o
}

func (k *kind) get(namespace, name string) (object, error) {
	near := ""
	for _, o := range k.list() {
		if o.GetNamespace() != namespace {
			continue
		}
		if o.GetName() == name {
			return o, nil
		}
		// A static pod is known by the name in its manifest and called
		// <name>-<node>: say so.
		if strings.HasPrefix(o.GetName(), name+"-") && (near == "" || len(o.GetName()) < len(near)) {
			near = o.GetName()
		}
	}
	err := apierrors.NewNotFound(schema.GroupResource{Resource: k.name}, name)
	if near != "" {
		err.ErrStatus.Message += fmt.Sprintf(" (did you mean %q?)", near)
	}
	return nil, err
}

// selection is what a list or watch asks for.
type selection struct {
	namespace string
	labels    labels.Selector
	fields    fields.Selector
}

func (k *kind) selection(r *http.Request, namespace, name string) (selection, error) {
	sel := selection{namespace: namespace, labels: labels.Everything(), fields: fields.Everything()}
	var err error
	if v := r.FormValue("labelSelector"); v != "" {
		if sel.labels, err = labels.Parse(v); err != nil {
			return sel, apierrors.NewBadRequest("labelSelector: " + err.Error())
		}
	}
	if v := r.FormValue("fieldSelector"); v != "" {
		if sel.fields, err = fields.ParseSelector(v); err != nil {
			return sel, apierrors.NewBadRequest("fieldSelector: " + err.Error())
		}
		known := fields.Set{"metadata.name": "", "metadata.namespace": ""}
		if k.fields != nil {
			known = k.set(emptyOf(k))
		}
		for _, req := range sel.fields.Requirements() {
			if !known.Has(req.Field) {
				return sel, apierrors.NewBadRequest(fmt.Sprintf("fieldSelector: field label not supported: %s", req.Field))
			}
		}
	}
	if name != "" {
		sel.fields = fields.AndSelectors(sel.fields, fields.OneTermEqualSelector("metadata.name", name))
	}
	return sel, nil
}

func emptyOf(k *kind) object {
	if k.kind == "Event" {
		return &v1.Event{}
	}
	return &v1.Pod{}
}

func (k *kind) set(o object) fields.Set {
	f := fields.Set{"metadata.name": o.GetName(), "metadata.namespace": o.GetNamespace()}
	if k.fields != nil {
		k.fields(o, f)
	}
	return f
}

func (k *kind) matches(sel selection, o object) bool {
	return (sel.namespace == "" || o.GetNamespace() == sel.namespace) &&
		sel.labels.Matches(labels.Set(o.GetLabels())) &&
		(sel.fields.Empty() || sel.fields.Matches(k.set(o)))
}

func versionOf(o object) uint64 {
	rv, _ := strconv.ParseUint(o.GetResourceVersion(), 10, 64)
	return rv
}

// snapshot is all there is and a version that a watch can go on from: read
// first, so that a change in between comes twice rather than never.
func (k *kind) snapshot() (all []object, last uint64) {
	if k.version != nil {
		last, _ = strconv.ParseUint(k.version(), 10, 64)
		return k.list(), last
	}
	all, last = k.list(), 1
	for _, o := range all {
		last = max(last, versionOf(o))
	}
	return all, last
}

// list is the JSON of a typed list: the items carry no kind of their own.
type list struct {
	metav1.TypeMeta `json:",inline"`
	Metadata        metav1.ListMeta `json:"metadata"`
	Items           []object        `json:"items"`
}

func (k *kind) serveCollection(w http.ResponseWriter, r *http.Request, namespace, name string) {
	if !acceptsJSON(r) {
		writeError(w, &apierrors.StatusError{ErrStatus: metav1.Status{
			Status: metav1.StatusFailure, Code: http.StatusNotAcceptable, Reason: metav1.StatusReasonNotAcceptable,
			Message: "the local API speaks application/json only",
		}})
		return
	}
	sel, err := k.selection(r, namespace, name)
	if err != nil {
		writeError(w, err)
		return
	}
	if v := r.FormValue("watch"); v == "true" || v == "1" {
		if k.watch == nil {
			writeError(w, apierrors.NewMethodNotSupported(schema.GroupResource{Resource: k.name}, "watch"))
			return
		}
		if err := k.serveWatch(w, r, sel); err != nil {
			writeError(w, err)
		}
		return
	}
	all, last := k.snapshot()
	out := list{TypeMeta: metav1.TypeMeta{Kind: k.kind + "List", APIVersion: "v1"}, Items: []object{}}
	for _, o := range all {
		if k.matches(sel, o) {
			out.Items = append(out.Items, o)
		}
	}
	// By namespace and name, as etcd keeps them.
	slices.SortFunc(out.Items, func(a, b object) int {
		return cmp.Or(cmp.Compare(a.GetNamespace(), b.GetNamespace()), cmp.Compare(a.GetName(), b.GetName()))
	})
	out.Metadata.ResourceVersion = strconv.FormatUint(last, 10)
	writeJSON(w, http.StatusOK, &out)
}

// acceptsJSON: a missing header, */* and every preference list that names JSON
// somewhere (kubectl asks for tables and protobuf first).
func acceptsJSON(r *http.Request) bool {
	accept := r.Header.Get("Accept")
	return accept == "" || strings.Contains(accept, "application/json") || strings.Contains(accept, "*/*") || strings.Contains(accept, "application/*")
}

// readOptions reads the body of a DELETE; none is an empty one.
func readBody(r *http.Request) ([]byte, error) {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	if len(b) > 0 {
		if ct := r.Header.Get("Content-Type"); ct != "" && !strings.HasPrefix(ct, "application/json") {
			return nil, &apierrors.StatusError{ErrStatus: metav1.Status{
				Status: metav1.StatusFailure, Code: http.StatusUnsupportedMediaType, Reason: metav1.StatusReasonUnsupportedMediaType,
				Message: fmt.Sprintf("body of type %s: the local API reads application/json only", ct),
			}}
		}
	}
	return b, nil
}
