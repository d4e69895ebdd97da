package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"github.com/podd-runtime/podd/cri/images"
	"github.com/podd-runtime/podd/kubelet/manifests"
	"github.com/podd-runtime/podd/kubelet/server/api"
	"github.com/podd-runtime/podd/kubelet/status"
)

func (s *Server) ownRoutes(m *http.ServeMux) {
	m.HandleFunc("GET "+api.Prefix+"/version", short(s.version))
	m.HandleFunc("GET "+api.Prefix+"/status", short(s.status))
	m.HandleFunc("GET "+api.Prefix+"/problems", short(func(w http.ResponseWriter, r *http.Request) error {
		out := api.Problems{Items: []api.Problem{}}
		if s.cfg.Problems != nil {
			out.Items = problems(s.cfg.Problems())
		}
		writeJSON(w, http.StatusOK, &out)
		return nil
	}))
	m.HandleFunc("GET "+api.Prefix+"/why", short(s.why))
	m.HandleFunc("GET "+api.Prefix+"/images", short(s.images))
	m.HandleFunc("POST "+api.Prefix+"/images", long(s.pull))
	m.HandleFunc("PUT "+api.Prefix+"/images", long(s.load))
	m.HandleFunc("DELETE "+api.Prefix+"/images", short(s.removeImage))
	m.HandleFunc("POST "+api.Prefix+"/images/verify", long(s.verifyImages))

	const pod = api.Prefix + "/namespaces/{namespace}/pods/{name}"
	m.HandleFunc("POST "+pod+"/stop", long(func(w http.ResponseWriter, r *http.Request) error {
		p, err := s.pod(r)
		if err != nil {
			return err
		}
		grace, err := gracePeriod(r.URL.Query(), nil)
		if err != nil {
			return err
		}
		if err := s.cfg.Pods.Stop(r.Context(), p.Namespace, p.Name, grace); err != nil {
			return fmt.Errorf("stop pod %s/%s: %w", p.Namespace, p.Name, err)
		}
		return done(w)
	}))
	m.HandleFunc("POST "+pod+"/start", short(func(w http.ResponseWriter, r *http.Request) error {
		p, err := s.pod(r)
		if err != nil {
			return err
		}
		// What comes after a pod that goes is the table's to say.
		if name := runs(p); name != "" && p.DeletionTimestamp == nil {
			err := fmt.Errorf("its container %s runs", name)
			if p.Status.Reason == status.Stopping {
				err = fmt.Errorf("it is being stopped, and its container %s still runs; start it when it has ended, or use podd restart", name)
			}
			return apierrors.NewConflict(resource("pods"), p.Name, err)
		}
		if err := s.cfg.Pods.Restart(r.Context(), p.Namespace, p.Name, ""); err != nil {
			return fmt.Errorf("start pod %s/%s: %w", p.Namespace, p.Name, err)
		}
		return done(w)
	}))
	m.HandleFunc("POST "+pod+"/restart", long(func(w http.ResponseWriter, r *http.Request) error {
		p, err := s.pod(r)
		if err != nil {
			return err
		}
		if err := s.cfg.Pods.Restart(r.Context(), p.Namespace, p.Name, r.URL.Query().Get("container")); err != nil {
			return fmt.Errorf("restart pod %s/%s: %w", p.Namespace, p.Name, err)
		}
		return done(w)
	}))
	m.HandleFunc("POST "+api.Prefix+"/stop", long(func(w http.ResponseWriter, r *http.Request) error {
		grace, err := gracePeriod(r.URL.Query(), nil)
		if err != nil {
			return err
		}
		if err := s.cfg.Pods.StopAll(r.Context(), grace); err != nil {
			return fmt.Errorf("stop all pods: %w", err)
		}
		return done(w)
	}))
	m.HandleFunc("POST "+api.Prefix+"/shutdown", short(func(w http.ResponseWriter, r *http.Request) error {
		if s.cfg.Shutdown == nil {
			return apierrors.NewMethodNotSupported(resource("shutdown"), "create")
		}
		if err := done(w); err != nil {
			return err
		}
		http.NewResponseController(w).Flush() // before the socket goes
		s.cfg.Shutdown()
		return nil
	}))
}

// runs names a container of the pod that runs; "": none.
func runs(p *v1.Pod) string {
	for _, c := range p.Status.ContainerStatuses {
		if c.State.Running != nil {
			return c.Name
		}
	}
	return ""
}

func done(w http.ResponseWriter) error {
	writeJSON(w, http.StatusOK, &metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess})
	return nil
}

// versions also says why podd-shim does not answer; "": it does.
func (s *Server) versions(ctx context.Context) (out api.Versions, shimProblem string) {
	out.Daemon = api.Version{Version: s.cfg.Version, Go: runtime.Version(), PID: os.Getpid()}
	if s.cfg.Shim == nil {
		return out, ""
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	info, err := s.cfg.Shim(ctx)
	if err != nil {
		return out, StatusOf(err).Message
	}
	out.Shim = &api.Version{Version: info.BuildID, PID: info.PID}
	return out, ""
}

func (s *Server) version(w http.ResponseWriter, r *http.Request) error {
	v, _ := s.versions(r.Context())
	writeJSON(w, http.StatusOK, &v)
	return nil
}

func (s *Server) status(w http.ResponseWriter, r *http.Request) error {
	out := api.Status{NodeName: s.cfg.NodeName, StartedAt: s.started, Pods: map[string]int{}, Goroutines: runtime.NumGoroutine()}
	out.Versions, out.ShimProblem = s.versions(r.Context())
	if s.cfg.Cluster != nil {
		out.Cluster = s.cfg.Cluster()
	}
	for _, p := range s.cfg.Pods.List() {
		phase := string(p.Status.Phase)
		out.Pods[phase]++
		if t := trouble(p); t != "" {
			if out.Troubled == nil {
				out.Troubled = map[string]map[string]int{}
			}
			if out.Troubled[phase] == nil {
				out.Troubled[phase] = map[string]int{}
			}
			out.Troubled[phase][t]++
		}
	}
	for _, p := range s.cfg.Images.Pulling() {
		out.Pulls = append(out.Pulls, progress(p))
	}
	if s.cfg.Problems != nil {
		out.Problems = manifests.NotInForce(s.cfg.Problems())
	}
	if s.cfg.Disk != nil {
		out.Disk = s.cfg.Disk(r.Context())
	}
	writeJSON(w, http.StatusOK, &out)
	return nil
}

// trouble is one word for what keeps a pod from being what its phase promises;
// "": nothing does.
func trouble(p *v1.Pod) string {
	switch {
	case p.DeletionTimestamp != nil:
		return "Terminating"
	case p.Status.Reason != "":
		return p.Status.Reason
	}
	for _, list := range [][]v1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses} {
		for i := range list {
			if w := list[i].State.Waiting; w != nil && w.Reason != "" && w.Reason != status.ContainerCreating && w.Reason != status.PodInitializing {
				return w.Reason
			}
		}
	}
	if _, ready := podutil.GetPodCondition(&p.Status, v1.PodReady); p.Status.Phase == v1.PodRunning && (ready == nil || ready.Status != v1.ConditionTrue) {
		return "NotReady"
	}
	return ""
}

func image(i *images.Image) api.Image {
	return api.Image{ID: i.ID, Tags: i.RepoTags, Digests: i.RepoDigests, Size: i.Size, Pinned: i.Pinned}
}

func imageList(in []*images.Image) api.Images {
	out := api.Images{Items: make([]api.Image, 0, len(in))}
	for _, i := range in {
		out.Items = append(out.Items, image(i))
	}
	return out
}

func progress(p images.Progress) api.Progress {
	return api.Progress{Ref: p.Ref, Stage: p.Stage, Layers: p.Layers, LayersDone: p.LayersDone, Bytes: p.Bytes, Total: p.Total}
}

func (s *Server) images(w http.ResponseWriter, r *http.Request) error {
	all, err := s.cfg.Images.List(r.Context())
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	out := imageList(all)
	writeJSON(w, http.StatusOK, &out)
	return nil
}

// pull answers with JSON lines: progress while it lasts, then the image or the error.
func (s *Server) pull(w http.ResponseWriter, r *http.Request) error {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	var req api.Pull
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		return apierrors.NewBadRequest("pull: " + err.Error())
	}
	if req.Ref == "" {
		return apierrors.NewBadRequest("pull: ref is required")
	}
	var auth *runtimeapi.AuthConfig
	if req.Username != "" {
		auth = &runtimeapi.AuthConfig{Username: req.Username, Password: req.Password}
	}
	w.Header().Set("Content-Type", "application/json")
	enc, flusher := json.NewEncoder(w), http.NewResponseController(w)
	// The puller must not wait for a slow client: it leaves the newest state
	// and this handler sends what it finds.
	var mu sync.Mutex
	var latest *images.Progress
	more := make(chan struct{}, 1)
	type result struct {
		image *images.Image
		err   error
	}
	finished := make(chan result, 1)
	ctx := r.Context()
	go func() {
		i, err := s.cfg.Images.Pull(ctx, req.Ref, auth, func(p images.Progress) {
			mu.Lock()
			latest = &p
			mu.Unlock()
			select {
			case more <- struct{}{}:
			default:
			}
		})
		finished <- result{i, err}
	}()
	for {
		select {
		case <-more:
			mu.Lock()
			p := *latest
			mu.Unlock()
			if err := enc.Encode(progress(p)); err == nil {
				flusher.Flush()
			}
		case res := <-finished:
			last := api.Progress{Ref: req.Ref}
			if res.err != nil {
				last.Error = StatusOf(res.err).Message
			} else {
				i := image(res.image)
				last.Stage, last.Image = "done", &i
			}
			enc.Encode(&last)
			return nil
		}
	}
}

func (s *Server) load(w http.ResponseWriter, r *http.Request) error {
	all, err := s.cfg.Images.Load(r.Context(), r.Body, images.LoadOptions{Name: r.URL.Query().Get("name")})
	var not *images.LoadError
	if err != nil && (!errors.As(err, &not) || len(all) == 0) {
		return err
	}
	out := imageList(distinct(all))
	if not != nil {
		for _, u := range not.Images {
			out.Failed = append(out.Failed, api.ImageProblem{Names: []string{u.Name}, Message: u.Err.Error()})
		}
	}
	writeJSON(w, http.StatusOK, &out)
	return nil
}

// distinct keeps of each image the last that is said of it: an archive names
// an image once for each of its tags.
func distinct(list []*images.Image) []*images.Image {
	last := map[string]int{}
	for i, img := range list {
		last[img.ID] = i
	}
	var out []*images.Image
	for i, img := range list {
		if last[img.ID] == i {
			out = append(out, img)
		}
	}
	return out
}

// verifyImages answers when every image has been read.
func (s *Server) verifyImages(w http.ResponseWriter, r *http.Request) error {
	found, err := s.cfg.Images.Verify(r.Context())
	if err != nil {
		return fmt.Errorf("verify images: %w", err)
	}
	out := api.ImageProblems{Items: make([]api.ImageProblem, 0, len(found))}
	for _, p := range found {
		out.Items = append(out.Items, api.ImageProblem{ID: p.ID, Names: p.Names, Message: p.Err.Error()})
	}
	writeJSON(w, http.StatusOK, &out)
	return nil
}

func (s *Server) removeImage(w http.ResponseWriter, r *http.Request) error {
	ref := r.URL.Query().Get("ref")
	if ref == "" {
		return apierrors.NewBadRequest("ref is required")
	}
	i, err := s.cfg.Images.Get(r.Context(), ref)
	if err != nil {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	if r.URL.Query().Get("force") != "true" {
		if user := s.imageUser(i); user != "" {
			return apierrors.NewConflict(resource("images"), ref, fmt.Errorf("pod %s uses it; stop the pod first or use --force", user))
		}
	}
	if err := s.cfg.Images.Remove(r.Context(), ref); err != nil {
		return fmt.Errorf("remove image %s: %w", ref, err)
	}
	out := imageList([]*images.Image{i})
	writeJSON(w, http.StatusOK, &out)
	return nil
}

// imageUser names a pod with a container on the image that runs or may start again; "": none.
func (s *Server) imageUser(i *images.Image) string {
	for _, p := range s.cfg.Pods.List() {
		for _, list := range [][]v1.ContainerStatus{p.Status.ContainerStatuses, p.Status.InitContainerStatuses} {
			for _, c := range list {
				id := c.ImageID
				if c.State.Terminated == nil && (strings.HasSuffix(id, i.ID) || slices.Contains(i.RepoDigests, id)) {
					return p.Namespace + "/" + p.Name
				}
			}
		}
	}
	return ""
}

func resource(name string) schema.GroupResource { return schema.GroupResource{Resource: name} }
