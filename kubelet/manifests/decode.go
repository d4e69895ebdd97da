package manifests

import (
	"crypto/md5"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/kubernetes/pkg/apis/core"
	corev1 "k8s.io/kubernetes/pkg/apis/core/v1"
	"k8s.io/kubernetes/pkg/apis/core/validation"
	sigsjson "sigs.k8s.io/json"

	"github.com/podd-runtime/podd/kubelet/manifests/document"
)

// object is one Pod, ConfigMap, Secret, PersistentVolume or claim of a file, defaulted and validated.
type object struct {
	doc  int // number of its document, from 1
	line int // first line of its document

	pod       *v1.Pod
	configMap *v1.ConfigMap
	secret    *v1.Secret
	volume    *v1.PersistentVolume
	claim     *v1.PersistentVolumeClaim

	// warnings are about fields that do not keep it from being in force.
	warnings []warning
	// references are images of the pod that nobody can pull; see Check.
	references []Problem

	// hash identifies the content as written: comments, key order and layout
	// of the YAML do not count.
	hash string
}

// decoder turns the bytes of a manifest into objects.
type decoder struct {
	nodeName string
	// noObjects forbids references to ConfigMaps and Secrets, as upstream does
	// for static pods of a node that has an apiserver.
	noObjects bool
}

const (
	// maxProblems bounds how many problems of one file, and how many warnings of
	// one document, are told: nobody reads more, and each is kept.
	maxProblems = 100
	// maxLists bounds how deep a List may lie in Lists: each is decoded with all
	// that it holds.
	maxLists = 8
)

// errSkipped marks a document that is well-formed but not for us; the other
// documents of its file count.
var errSkipped = errors.New("not a kind that podd reads from manifests")

// decodeFile returns the objects of a manifest, or the problems that keep it
// from being used. Problems whose document is only skipped come together with
// the objects of the other documents; fatal tells the two apart.
func (d *decoder) decodeFile(file string, data []byte) (objects []object, problems []Problem, fatal bool) {
	docs := document.Split(data)
	empty := true
	for i, doc := range docs {
		found, probs, skipped, null := d.decodeDocument(doc)
		empty = empty && null
		for _, p := range probs {
			p.File, p.Document = file, i+1
			problems = append(problems, p)
		}
		if len(probs) > 0 && !skipped {
			fatal = true
		}
		for _, o := range found {
			o.doc, o.line = i+1, doc.Line
			objects = append(objects, o)
		}
	}
	if empty {
		return nil, []Problem{{File: file, Message: "holds no object", Remedy: "write a Pod, ConfigMap, Secret, PersistentVolume or claim, or delete the file to stop what it started"}}, true
	}
	// The same object twice in one file is never meant.
	type key struct{ kind, ns, name string }
	seen := map[key]object{}
	for _, o := range objects {
		k := key{o.kind(), o.meta().Namespace, o.meta().Name}
		if first, ok := seen[k]; ok {
			problems = append(problems, Problem{File: file, Document: o.doc, Line: o.line, Field: "metadata.name",
				Message: fmt.Sprintf("%s %s/%s is already in document %d, line %d", k.kind, k.ns, k.name, first.doc, first.line),
				Remedy:  "give it another name or remove one of the two"})
			fatal = true
			continue
		}
		seen[k] = o
	}
	problems = atMost(problems, file)
	if fatal {
		return nil, problems, true
	}
	return objects, problems, false
}

// atMost so many problems as somebody may read.
func atMost(problems []Problem, file string) []Problem {
	if more := len(problems) - maxProblems; more > 0 {
		problems = append(problems[:maxProblems:maxProblems], Problem{File: file, Message: fmt.Sprintf("and %d more", more)})
	}
	return problems
}

func (o *object) meta() *metav1.ObjectMeta {
	switch {
	case o.pod != nil:
		return &o.pod.ObjectMeta
	case o.configMap != nil:
		return &o.configMap.ObjectMeta
	case o.volume != nil:
		return &o.volume.ObjectMeta
	case o.claim != nil:
		return &o.claim.ObjectMeta
	default:
		return &o.secret.ObjectMeta
	}
}

func (o *object) kind() string {
	switch {
	case o.pod != nil:
		return "Pod"
	case o.configMap != nil:
		return "ConfigMap"
	case o.volume != nil:
		return "PersistentVolume"
	case o.claim != nil:
		return "PersistentVolumeClaim"
	default:
		return "Secret"
	}
}

// decodeDocument decodes one document. skipped says that its problems do not
// concern the rest of the file, null that it holds nothing.
func (d *decoder) decodeDocument(doc document.Document) (objects []object, problems []Problem, skipped, null bool) {
	raw, found := doc.JSON()
	if found != nil {
		return nil, problemsOf(found), false, false
	}
	if string(raw) == "null" {
		return nil, nil, false, true
	}
	objects, problems, skipped = d.decodeObject(doc, raw, "", 0)
	return objects, problems, skipped, false
}

// decodeObject decodes an object, or the items of a list; at is the path of the
// object inside its document, lists how many Lists it lies in.
func (d *decoder) decodeObject(doc document.Document, raw []byte, at string, lists int) (objects []object, problems []Problem, skipped bool) {
	fail := func(path, message, remedy string) ([]object, []Problem, bool) {
		return nil, []Problem{{Line: doc.Locate(document.Join(at, path)), Field: document.Join(at, path), Message: message, Remedy: remedy}}, false
	}
	var head metav1.TypeMeta
	if err := sigsjson.UnmarshalCaseSensitivePreserveInts(raw, &head); err != nil {
		return fail("", "is not an object with apiVersion and kind", "start the document with apiVersion: v1 and kind: Pod")
	}
	switch {
	case head.Kind == "":
		return fail("kind", "is missing", "add kind: Pod, ConfigMap, Secret, PersistentVolume, PersistentVolumeClaim or List")
	case head.APIVersion == "":
		return fail("apiVersion", "is missing", "add apiVersion: v1")
	}
	if head.APIVersion == "v1" {
		switch head.Kind {
		case "Pod":
			pod := &v1.Pod{}
			if probs := strict(doc, raw, at, pod); probs != nil {
				return nil, probs, false
			}
			hash := contentHash(d.nodeName, raw)
			pod, warned, probs := d.finishPod(doc, at, pod, hash)
			if probs != nil {
				return nil, probs, false
			}
			return []object{{pod: pod, hash: hash, warnings: warningsOf(doc, at, pod, warned), references: wrongReferences(doc, at, pod)}}, nil, false
		case "ConfigMap":
			m := &v1.ConfigMap{}
			if probs := strict(doc, raw, at, m); probs != nil {
				return nil, probs, false
			}
			return d.finishConfigMap(doc, at, m, contentHash("", raw))
		case "Secret":
			s := &v1.Secret{}
			if probs := strict(doc, raw, at, s); probs != nil {
				return nil, probs, false
			}
			return d.finishSecret(doc, at, s, contentHash("", raw))
		case "PersistentVolume":
			v := &v1.PersistentVolume{}
			if probs := strict(doc, raw, at, v); probs != nil {
				return nil, probs, false
			}
			return d.finishVolume(doc, at, v, contentHash("", raw))
		case "PersistentVolumeClaim":
			c := &v1.PersistentVolumeClaim{}
			if probs := strict(doc, raw, at, c); probs != nil {
				return nil, probs, false
			}
			return d.finishClaim(doc, at, c, contentHash("", raw))
		case "List", "PodList", "ConfigMapList", "SecretList", "PersistentVolumeList", "PersistentVolumeClaimList":
			if lists == maxLists {
				return fail("kind", fmt.Sprintf("lies in more than %d Lists", maxLists), "write its items one List up")
			}
			return d.decodeList(doc, raw, at, strings.TrimSuffix(head.Kind, "List"), lists+1)
		}
	}
	_, probs, _ := fail("kind", fmt.Sprintf("%s %s is %s", head.APIVersion, head.Kind, errSkipped), "keep only v1 Pod, ConfigMap, Secret, PersistentVolume, PersistentVolumeClaim and List here")
	return nil, probs, true
}

// decodeList decodes the items of a v1 List or of a list of one kind, whose
// items need no kind of their own.
func (d *decoder) decodeList(doc document.Document, raw []byte, at, kind string, lists int) (objects []object, problems []Problem, skipped bool) {
	var list struct {
		metav1.TypeMeta `json:",inline"`
		Metadata        metav1.ListMeta        `json:"metadata"`
		Items           []runtime.RawExtension `json:"items"`
	}
	if probs := strict(doc, raw, at, &list); probs != nil {
		return nil, probs, false
	}
	skipped = true
	for i, item := range list.Items {
		path := document.Join(at, fmt.Sprintf("items[%d]", i))
		body := item.Raw
		if kind != "" {
			var m map[string]json.RawMessage
			if err := json.Unmarshal(body, &m); err == nil && m["kind"] == nil && m["apiVersion"] == nil {
				m["kind"], m["apiVersion"] = json.RawMessage(strconv.Quote(kind)), json.RawMessage(`"v1"`)
				body, _ = json.Marshal(m)
			}
		}
		found, probs, skip := d.decodeObject(doc, body, path, lists)
		objects = append(objects, found...)
		problems = append(problems, probs...)
		if len(probs) > 0 && !skip {
			skipped = false
		}
	}
	return objects, problems, skipped
}

// contentHash is what identifies a document: md5 as long as upstream's UIDs
// (32 hex digits), over the document as JSON with sorted keys. It is taken from
// what the user wrote and not, as upstream does, from the defaulted Go struct,
// so that an upgrade of podd never changes the UID of a running pod.
func contentHash(nodeName string, raw []byte) string {
	h := md5.New()
	fmt.Fprintf(h, "host:%s\n", nodeName)
	h.Write(raw)
	return hex.EncodeToString(h.Sum(nil))
}

func (d *decoder) finishConfigMap(doc document.Document, at string, m *v1.ConfigMap, hash string) ([]object, []Problem, bool) {
	if m.Namespace == "" {
		m.Namespace = metav1.NamespaceDefault
	}
	corev1.SetObjectDefaults_ConfigMap(m)
	var internal core.ConfigMap
	if err := corev1.Convert_v1_ConfigMap_To_core_ConfigMap(m, &internal, nil); err != nil {
		return nil, []Problem{{Line: doc.Line, Field: at, Message: err.Error()}}, false
	}
	if probs := invalid(doc, at, validation.ValidateConfigMap(&internal)); probs != nil {
		return nil, probs, false
	}
	m.ResourceVersion, m.UID = hash, uidOf(m.UID, hash)
	return []object{{configMap: m, hash: hash}}, nil, false
}

func (d *decoder) finishSecret(doc document.Document, at string, s *v1.Secret, hash string) ([]object, []Problem, bool) {
	if s.Namespace == "" {
		s.Namespace = metav1.NamespaceDefault
	}
	corev1.SetObjectDefaults_Secret(s)
	var internal core.Secret
	if err := corev1.Convert_v1_Secret_To_core_Secret(s, &internal, nil); err != nil {
		return nil, []Problem{{Line: doc.Line, Field: at, Message: err.Error()}}, false
	}
	if probs := invalid(doc, at, validation.ValidateSecret(&internal)); probs != nil {
		return nil, probs, false
	}
	out := &v1.Secret{}
	if err := corev1.Convert_core_Secret_To_v1_Secret(&internal, out, nil); err != nil { // stringData is merged now
		return nil, []Problem{{Line: doc.Line, Field: at, Message: err.Error()}}, false
	}
	out.ResourceVersion, out.UID = hash, uidOf(s.UID, hash)
	return []object{{secret: out, hash: hash}}, nil, false
}

func (d *decoder) finishVolume(doc document.Document, at string, v *v1.PersistentVolume, hash string) ([]object, []Problem, bool) {
	v.Status = v1.PersistentVolumeStatus{}
	corev1.SetObjectDefaults_PersistentVolume(v)
	var internal core.PersistentVolume
	if err := corev1.Convert_v1_PersistentVolume_To_core_PersistentVolume(v, &internal, nil); err != nil {
		return nil, []Problem{{Line: doc.Line, Field: at, Message: err.Error()}}, false
	}
	if probs := invalid(doc, at, validation.ValidatePersistentVolume(&internal, validation.ValidationOptionsForPersistentVolume(&internal, nil))); probs != nil {
		return nil, probs, false
	}
	v.ResourceVersion, v.UID = hash, uidOf(v.UID, hash)
	return []object{{volume: v, hash: hash, warnings: volumeWarnings(doc, at, &internal)}}, nil, false
}

func (d *decoder) finishClaim(doc document.Document, at string, c *v1.PersistentVolumeClaim, hash string) ([]object, []Problem, bool) {
	if c.Namespace == "" {
		c.Namespace = metav1.NamespaceDefault
	}
	c.Status = v1.PersistentVolumeClaimStatus{}
	corev1.SetObjectDefaults_PersistentVolumeClaim(c)
	var internal core.PersistentVolumeClaim
	if err := corev1.Convert_v1_PersistentVolumeClaim_To_core_PersistentVolumeClaim(c, &internal, nil); err != nil {
		return nil, []Problem{{Line: doc.Line, Field: at, Message: err.Error()}}, false
	}
	if probs := invalid(doc, at, validation.ValidatePersistentVolumeClaim(&internal, validation.ValidationOptionsForPersistentVolumeClaimCreate())); probs != nil {
		return nil, probs, false
	}
	c.ResourceVersion, c.UID = hash, uidOf(c.UID, hash)
	return []object{{claim: c, hash: hash, warnings: claimWarnings(doc, at, &internal)}}, nil, false
}

// invalid turns upstream's validation errors into problems.
func invalid(doc document.Document, at string, errs field.ErrorList) []Problem {
	var problems []Problem
	for _, e := range errs {
		problems = append(problems, Problem{
			Line:    doc.Locate(document.Join(at, e.Field)),
			Field:   document.Join(at, e.Field),
			Message: e.ErrorBody(),
			Remedy:  "correct the field",
		})
	}
	return problems
}

// strict is document.Strict with our problems.
func strict(doc document.Document, raw []byte, at string, into any) []Problem {
	return problemsOf(doc.Strict(raw, at, into))
}

func problemsOf(found []document.Problem) []Problem {
	var problems []Problem
	for _, p := range found {
		problems = append(problems, Problem{Line: p.Line, Field: p.Field, Message: p.Message, Remedy: p.Remedy})
	}
	return problems
}
