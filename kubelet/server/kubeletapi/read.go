package kubeletapi

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// readRoutes are what upstream serves on the read-only port, too.
func (s *Server) readRoutes(m *http.ServeMux) {
	for _, path := range []string{"GET /pods", "GET /pods/{$}"} {
		m.HandleFunc(path, short(func(w http.ResponseWriter, _ *http.Request) error { return writePods(w, s.cfg.Pods.List()) }))
	}
	for _, method := range []string{"GET ", "POST "} {
		m.HandleFunc(method+"/stats/summary", short(s.summary))
	}
	for name, h := range s.cfg.Metrics {
		path := "/metrics"
		if name != "" {
			path += "/" + name
		}
		m.Handle("GET "+path, h)
	}
}

func writeJSON(w http.ResponseWriter, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(b)
	return nil
}

func writePods(w http.ResponseWriter, pods []*v1.Pod) error {
	list := v1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, Items: make([]v1.Pod, 0, len(pods))}
	for _, p := range pods {
		list.Items = append(list.Items, *p)
	}
	return writeJSON(w, &list)
}

func (s *Server) summary(w http.ResponseWriter, r *http.Request) error {
	r.Body = http.MaxBytesReader(w, r.Body, maxHeader)
	only := r.FormValue("only_cpu_and_memory") == "true"
	sum, err := s.cfg.Stats.Summary(r.Context(), only)
	if err != nil {
		http.Error(w, fmt.Sprintf("Internal Error: %v", err), http.StatusInternalServerError) // upstream's words
		return nil
	}
	return writeJSON(w, sum)
}

// runningPods are those of the runtime, whoever wants them.
func (s *Server) runningPods(w http.ResponseWriter, r *http.Request) error {
	sandboxes, err := s.cfg.Runtime.ListPodSandbox(r.Context(), &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
		State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY},
	}})
	if err != nil {
		return err
	}
	containers, err := s.cfg.Runtime.ListContainers(r.Context(), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
		State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
	}})
	if err != nil {
		return err
	}
	byID := map[string]*v1.Pod{}
	var pods []*v1.Pod
	for _, sb := range sandboxes.GetItems() {
		m := sb.GetMetadata()
		p := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: m.GetName(), Namespace: m.GetNamespace(), UID: types.UID(m.GetUid())}}
		byID[sb.GetId()] = p
		pods = append(pods, p)
	}
	for _, c := range containers.GetContainers() {
		if p := byID[c.GetPodSandboxId()]; p != nil {
			image := c.GetImage().GetUserSpecifiedImage()
			if image == "" {
				image = c.GetImage().GetImage()
			}
			p.Spec.Containers = append(p.Spec.Containers, v1.Container{Name: c.GetMetadata().GetName(), Image: image})
		}
	}
	pods = slices.DeleteFunc(pods, func(p *v1.Pod) bool { return len(p.Spec.Containers) == 0 })
	slices.SortFunc(pods, func(a, b *v1.Pod) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return writePods(w, pods)
}
