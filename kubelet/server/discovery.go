package server

import (
	"net/http"
	"runtime"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/version"
)

func (s *Server) discoveryRoutes(m *http.ServeMux) {
	answer := func(v any) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { writeJSON(w, http.StatusOK, v) }
	}
	m.HandleFunc("GET /version", answer(&version.Info{
		Major: kubernetesVersion.major, Minor: kubernetesVersion.minor, GitVersion: kubernetesVersion.git,
		GoVersion: runtime.Version(), Compiler: runtime.Compiler, Platform: runtime.GOOS + "/" + runtime.GOARCH,
	}))
	m.HandleFunc("GET /api", answer(&metav1.APIVersions{
		TypeMeta: metav1.TypeMeta{Kind: "APIVersions"}, Versions: []string{"v1"},
	}))
	m.HandleFunc("GET /apis", answer(&metav1.APIGroupList{
		TypeMeta: metav1.TypeMeta{Kind: "APIGroupList", APIVersion: "v1"}, Groups: []metav1.APIGroup{},
	}))
	list := &metav1.APIResourceList{TypeMeta: metav1.TypeMeta{Kind: "APIResourceList", APIVersion: "v1"}, GroupVersion: "v1"}
	for _, k := range s.kinds {
		verbs := metav1.Verbs{"get", "list"}
		if k.watch != nil {
			verbs = append(verbs, "watch")
		}
		if k.name == "pods" {
			verbs = append(verbs, "delete")
		}
		list.APIResources = append(list.APIResources, metav1.APIResource{
			Name: k.name, SingularName: k.singular, Kind: k.kind, Namespaced: k.namespaced,
			Verbs: verbs, ShortNames: k.short, Categories: k.categories,
		})
	}
	for _, sub := range []struct{ name, kind string }{
		{"attach", "PodAttachOptions"}, {"exec", "PodExecOptions"}, {"log", "Pod"}, {"portforward", "PodPortForwardOptions"},
	} {
		verbs := metav1.Verbs{"create", "get"}
		if sub.name == "log" {
			verbs = metav1.Verbs{"get"}
		}
		list.APIResources = append(list.APIResources, metav1.APIResource{Name: "pods/" + sub.name, Kind: sub.kind, Namespaced: true, Verbs: verbs})
	}
	m.HandleFunc("GET /api/v1", answer(list))
	// No schema: clients then skip their own validation.
	m.HandleFunc("GET /openapi/v3", answer(map[string]any{"paths": map[string]any{}}))
}
