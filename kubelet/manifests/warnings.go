package manifests

import (
	"context"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/api/persistentvolume"
	"k8s.io/kubernetes/pkg/api/persistentvolumeclaim"
	podutil "k8s.io/kubernetes/pkg/api/pod"
	"k8s.io/kubernetes/pkg/apis/core"

	"github.com/podd-runtime/podd/kubelet/limits"
	"github.com/podd-runtime/podd/kubelet/manifests/document"
)

// ReasonQuestionable is the reason of the event about a field of a pod that is
// valid and can hardly be meant as it is: what an apiserver answers with a
// Warning header, and limits with which nothing can run.
const ReasonQuestionable = "QuestionableField"

// warning is about a field of an object that is in force all the same.
type warning struct {
	Problem
	reason string // of the event
}

// warningsOf a pod: fields without effect, amounts that cannot be meant, and
// what an apiserver warns of.
func warningsOf(doc document.Document, at string, pod *v1.Pod, upstream []string) (found []warning) {
	found = unhonoured(pod)
	for _, f := range limits.Of(pod) {
		found = append(found, warning{Problem{Field: f.Field, Message: f.Message, Remedy: f.Remedy}, ReasonQuestionable})
	}
	return place(doc, at, append(found, upstreamWarnings(upstream)...))
}

// place gives warnings the lines of their fields.
func place(doc document.Document, at string, found []warning) []warning {
	found = found[:min(len(found), maxProblems)]
	for i := range found {
		w := &found[i]
		w.Warning = true
		w.Field = document.Join(at, w.Field)
		w.Line = doc.Locate(w.Field)
	}
	return found
}

// podWarnings are those of an apiserver about a pod.
func podWarnings(pod *core.Pod) []string {
	return podutil.GetWarningsForPod(context.Background(), pod, nil)
}

func volumeWarnings(doc document.Document, at string, v *core.PersistentVolume) []warning {
	found := upstreamWarnings(persistentvolume.GetWarningsForPersistentVolume(v))
	if q := v.Spec.Capacity[core.ResourceStorage]; limits.Fraction(q) {
		found = append(found, warning{Problem{Field: "spec.capacity[storage]", Message: limits.FractionMessage(q)}, ReasonQuestionable})
	}
	return place(doc, at, found)
}

func claimWarnings(doc document.Document, at string, c *core.PersistentVolumeClaim) []warning {
	found := upstreamWarnings(persistentvolumeclaim.GetWarningsForPersistentVolumeClaim(c))
	for name, list := range map[string]core.ResourceList{"requests": c.Spec.Resources.Requests, "limits": c.Spec.Resources.Limits} {
		if q := list[core.ResourceStorage]; limits.Fraction(q) {
			found = append(found, warning{Problem{Field: "spec.resources." + name + "[storage]", Message: limits.FractionMessage(q)}, ReasonQuestionable})
		}
	}
	return place(doc, at, found)
}

// upstreamWarnings reads the texts of an apiserver, "path: message". Those about
// fractions of bytes are package limits' to say, which knows more of them.
func upstreamWarnings(texts []string) (found []warning) {
	for _, text := range texts {
		path, message, ok := strings.Cut(text, ": ")
		if !ok || strings.ContainsAny(path, " ") {
			path, message = "", text
		}
		if !strings.HasPrefix(message, "fractional byte value ") {
			found = append(found, warning{Problem{Field: path, Message: message}, ReasonQuestionable})
		}
	}
	return found
}

// warn tells what is questionable in the document that has an object in force.
func (s *Source) warn(ref ObjectRef, now time.Time) {
	var found []Problem
	var c claim
	if all := s.claims[ref]; len(all) > 0 && all[0].obj.hash == s.hashInForce(ref) {
		c = all[0]
		for _, w := range c.obj.warnings {
			w.File, w.Document, w.Object = s.path(c.file.name), c.obj.doc, ref.String()
			found = append(found, w.Problem)
		}
	}
	if !put(&s.problems, s.problems.warnings, ref, found, now) {
		return
	}
	for i, w := range found {
		s.log.Warn("manifest has a warning", "file", w.File, "document", w.Document, "line", w.Line, "field", w.Field, "problem", w.Message, "remedy", w.Remedy)
		if s.cfg.Recorder != nil && c.obj.pod != nil {
			s.cfg.Recorder.Eventf(podRef(c.obj.pod), v1.EventTypeWarning, c.obj.warnings[i].reason, "%s", w.Error())
		}
	}
}

// NotInForce counts the problems that keep a document from being in force.
func NotInForce(all []Problem) (n int) {
	for _, p := range all {
		if !p.Warning {
			n++
		}
	}
	return n
}
