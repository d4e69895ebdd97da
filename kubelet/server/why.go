package server

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/podd-runtime/podd/kubelet/server/api"
	"github.com/podd-runtime/podd/kubelet/why"
)

// Explainer says why a pod is as it is. It is bounded in time by itself.
type Explainer func(ctx context.Context, pod *v1.Pod) api.Diagnosis

// why explains one pod (?namespace=…&name=…), or those that are not fine, of
// one namespace or of all, and the manifests that gave no pod.
func (s *Server) why(w http.ResponseWriter, r *http.Request) error {
	if s.cfg.Explain == nil {
		return apierrors.NewMethodNotSupported(resource("why"), "get")
	}
	q := r.URL.Query()
	namespace, name := q.Get("namespace"), q.Get("name")
	out := api.Diagnoses{Items: []api.Diagnosis{}}
	if s.cfg.Troubles != nil {
		out.Node = s.cfg.Troubles(r.Context())
	}
	if name != "" {
		p, ok := s.cfg.Pods.Get(namespace, name)
		if !ok { // people know their pods by the name in the manifest
			p, ok = s.cfg.Pods.Get(namespace, name+"-"+s.cfg.NodeName)
		}
		if ok {
			out.Items = append(out.Items, s.cfg.Explain(r.Context(), p))
			writeJSON(w, http.StatusOK, &out)
			return nil
		}
		out.Problems = s.manifestProblems(strings.TrimSuffix(name, "-"+s.cfg.NodeName))
		if len(out.Problems) == 0 {
			_, err := s.kinds[0].get(namespace, name) // with its hint
			if err == nil {
				err = fmt.Errorf("pod %s/%s is just going", namespace, name)
			}
			return err
		}
		writeJSON(w, http.StatusOK, &out)
		return nil
	}
	for _, p := range s.cfg.Pods.List() {
		if namespace != "" && p.Namespace != namespace {
			continue
		}
		if d := s.cfg.Explain(r.Context(), p); len(d.Findings) > 0 {
			out.Items = append(out.Items, d)
		}
	}
	out.Items = append(out.Items, s.departed(namespace)...)
	out.Problems = s.manifestProblems("")
	writeJSON(w, http.StatusOK, &out)
	return nil
}

// recent is how long what happened to a pod that is gone is worth telling.
const recent = 10 * time.Minute

// departed are pods that are gone, of which something is worth knowing: a
// preStop hook that failed, which is there to save something.
func (s *Server) departed(namespace string) (out []api.Diagnosis) {
	if s.cfg.Events == nil {
		return nil
	}
	all := s.cfg.Events.List(namespace)
	for i := range all {
		e, o := &all[i], &all[i].InvolvedObject
		if e.Reason != "FailedPreStopHook" || time.Since(e.LastTimestamp.Time) > recent {
			continue
		}
		if p, ok := s.cfg.Pods.Get(o.Namespace, o.Name); ok && p.UID == o.UID {
			continue // its own diagnosis tells
		}
		f := why.PreStopFailed(e, time.Now())
		out = append(out, api.Diagnosis{Namespace: o.Namespace, Name: o.Name, UID: string(o.UID), Phase: "gone", Fine: true, Summary: "The pod is gone.", Findings: []api.Finding{f}})
	}
	return out
}

// manifestProblems are diagnoses of manifests that are not in force. With a
// name, those of files that speak of it come alone, if there are any.
func (s *Server) manifestProblems(name string) (out []api.Diagnosis) {
	if s.cfg.Problems == nil {
		return nil
	}
	var others []api.Diagnosis
	for _, p := range problems(s.cfg.Problems()) {
		if p.Warning { // told with its pod, where something is wrong
			continue
		}
		d := api.Diagnosis{Name: p.File, Findings: []api.Finding{p.Finding()}}
		d.Summary = d.Findings[0].Message
		if name == "" || strings.Contains(p.File[strings.LastIndex(p.File, "/")+1:], name) || strings.Contains(p.Message, name) {
			out = append(out, d)
		} else {
			others = append(others, d)
		}
	}
	if len(out) == 0 {
		return others
	}
	return out
}
