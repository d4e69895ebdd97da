package kubeletapi

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	kubelettypes "k8s.io/kubelet/pkg/types"

	"github.com/podd-runtime/podd/kubelet/server"
	"github.com/podd-runtime/podd/kubelet/server/auth"
)

// containerRoutes reach into containers.
func (s *Server) containerRoutes(m *http.ServeMux) {
	m.HandleFunc("GET /runningpods/{$}", short(s.runningPods))
	m.HandleFunc("GET /runningpods", short(s.runningPods))
	m.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", answer(s.containerLogs))
	m.HandleFunc("POST /checkpoint/{namespace}/{pod}/{container}", answer(s.checkpoint))
	for _, uid := range []string{"", "/{uid}"} {
		m.HandleFunc("POST /run/{namespace}/{pod}"+uid+"/{container}", answer(s.run))
		for _, method := range []string{"GET ", "POST "} { // WebSocket and SPDY
			m.HandleFunc(method+"/exec/{namespace}/{pod}"+uid+"/{container}", answer(s.exec))
			m.HandleFunc(method+"/attach/{namespace}/{pod}"+uid+"/{container}", answer(s.attach))
			m.HandleFunc(method+"/portForward/{namespace}/{pod}"+uid, answer(s.portForward))
		}
	}
}

// pod that the path names, by name and, where it is given, by UID: the pod's,
// or that of the manifest it stands for.
func (s *Server) pod(r *http.Request) (*v1.Pod, error) {
	p, ok := s.cfg.Pods.Get(r.PathValue("namespace"), r.PathValue("pod"))
	uid := r.PathValue("uid")
	if !ok || uid != "" && uid != string(p.UID) {
		return nil, fmt.Errorf("pod does not exist: %s/%s: %w", r.PathValue("namespace"), r.PathValue("pod"), errdefs.ErrNotFound)
	}
	return p, nil
}

// has says whether the pod has a container of that name.
func has(p *v1.Pod, name string) bool {
	return slices.ContainsFunc(p.Spec.Containers, func(c v1.Container) bool { return c.Name == name }) ||
		slices.ContainsFunc(p.Spec.InitContainers, func(c v1.Container) bool { return c.Name == name }) ||
		slices.ContainsFunc(p.Spec.EphemeralContainers, func(c v1.EphemeralContainer) bool { return c.Name == name })
}

func (s *Server) podAndContainer(r *http.Request) (*v1.Pod, string, error) {
	p, err := s.pod(r)
	if err != nil {
		return nil, "", err
	}
	name := r.PathValue("container")
	if !has(p, name) {
		return nil, "", fmt.Errorf("container %q not found in pod %q: %w", name, p.Name, errdefs.ErrNotFound)
	}
	return p, name, nil
}

func (s *Server) containerLogs(w http.ResponseWriter, r *http.Request) error {
	p, name, err := s.podAndContainer(r)
	if err != nil {
		return err
	}
	q := r.URL.Query()
	if tail := q.Get("tail"); tail != "" { // older clients'
		q.Set("tailLines", tail)
		if tail == "all" {
			q.Del("tailLines")
		}
	}
	o, previous, err := server.LogOptions(q, time.Now())
	if err != nil {
		return err
	}
	id, err := server.LogContainer(p, name, previous)
	if err != nil {
		return err
	}
	return s.streams.Logs(w, r, id, o)
}

// running is the id of the container's instance that runs now.
func running(p *v1.Pod, name string) (string, error) {
	for _, list := range [][]v1.ContainerStatus{p.Status.ContainerStatuses, p.Status.InitContainerStatuses, p.Status.EphemeralContainerStatuses} {
		for _, c := range list {
			if c.Name != name {
				continue
			}
			if c.State.Running == nil {
				return "", apierrors.NewBadRequest(fmt.Sprintf("container %q in pod %q is not running", name, p.Name))
			}
			_, id, _ := strings.Cut(c.ContainerID, "://")
			return id, nil
		}
	}
	return "", apierrors.NewBadRequest(fmt.Sprintf("container %q in pod %q has not been created", name, p.Name))
}

func (s *Server) runningContainer(r *http.Request) (*v1.Pod, string, error) {
	p, name, err := s.podAndContainer(r)
	if err != nil {
		return nil, "", err
	}
	id, err := running(p, name)
	return p, id, err
}

func (s *Server) exec(w http.ResponseWriter, r *http.Request) error {
	o, err := remotecommand.NewOptions(r)
	if err != nil {
		return apierrors.NewBadRequest(err.Error())
	}
	cmd := r.URL.Query()["command"]
	if len(cmd) == 0 {
		return apierrors.NewBadRequest("command: you must specify at least one command for the container")
	}
	p, id, err := s.runningContainer(r)
	if err != nil {
		return err
	}
	s.session(w, r, p, id, func(w http.ResponseWriter, r *http.Request) { s.streams.Exec(w, r, id, cmd, o) })
	return nil
}

func (s *Server) attach(w http.ResponseWriter, r *http.Request) error {
	o, err := remotecommand.NewOptions(r)
	if err != nil {
		return apierrors.NewBadRequest(err.Error())
	}
	p, id, err := s.runningContainer(r)
	if err != nil {
		return err
	}
	s.session(w, r, p, id, func(w http.ResponseWriter, r *http.Request) { s.streams.Attach(w, r, id, o) })
	return nil
}

// run is exec for simple clients: no streams, the command split at spaces.
func (s *Server) run(w http.ResponseWriter, r *http.Request) error {
	_, id, err := s.runningContainer(r)
	if err != nil {
		return err
	}
	resp, err := s.cfg.Runtime.ExecSync(r.Context(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: strings.Split(r.URL.Query().Get("cmd"), " ")})
	if err != nil {
		return err
	}
	out := append(resp.GetStdout(), resp.GetStderr()...)
	if code := resp.GetExitCode(); code != 0 {
		return fmt.Errorf("command '%s' exited with %d: %s", r.URL.Query().Get("cmd"), code, out)
	}
	w.Header().Set("Content-Type", "application/json") // upstream's, whatever it is
	w.Write(out)
	return nil
}

func (s *Server) portForward(w http.ResponseWriter, r *http.Request) error {
	p, err := s.pod(r)
	if err != nil {
		return err
	}
	var ports []int32
	for _, text := range r.URL.Query()[portforward.PortHeader] {
		for one := range strings.SplitSeq(text, ",") {
			n, err := strconv.ParseUint(one, 10, 16)
			if err != nil || n == 0 {
				return apierrors.NewBadRequest(fmt.Sprintf("port: %q is not a port", one))
			}
			ports = append(ports, int32(n))
		}
	}
	sandbox, err := s.sandbox(r, string(p.UID))
	if err != nil {
		return err
	}
	if sandbox == "" {
		return apierrors.NewBadRequest(fmt.Sprintf("unable to forward port because pod is not running. Current status=%s", p.Status.Phase))
	}
	s.session(w, r, p, sandbox, func(w http.ResponseWriter, r *http.Request) { s.streams.PortForward(w, r, sandbox, ports) })
	return nil
}

// sandbox is the id of a pod's newest running sandbox; "": it has none.
func (s *Server) sandbox(r *http.Request, uid string) (string, error) {
	resp, err := s.cfg.Runtime.ListPodSandbox(r.Context(), &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
		State:         &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY},
		LabelSelector: map[string]string{kubelettypes.KubernetesPodUIDLabel: uid},
	}})
	if err != nil {
		return "", fmt.Errorf("sandbox of pod %s: %w", uid, err)
	}
	var newest *runtimeapi.PodSandbox
	for _, sb := range resp.GetItems() {
		if newest == nil || sb.GetCreatedAt() > newest.GetCreatedAt() {
			newest = sb
		}
	}
	return newest.GetId(), nil
}

// endGrace is how long a session may go on after what it is about has ended:
// the exit status and the last output are still to be delivered.
const endGrace = 2 * time.Second

// podUID is what a token that is bound to a pod says about it.
const podUID = "authentication.kubernetes.io/pod-uid"

// session serves a stream for as long as the container or sandbox called id
// runs, and the pod that the caller's token is bound to where that is one of
// this node's.
func (s *Server) session(w http.ResponseWriter, r *http.Request, p *v1.Pod, id string, serve http.HandlerFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	events := s.cfg.Runtime.Subscribe(ctx) // before anything is looked up: no end is missed
	watched := []string{id}
	if u := auth.From(r.Context()); u != nil {
		if uid := u.Extra[podUID]; len(uid) == 1 {
			if sb, err := s.sandbox(r, uid[0]); err == nil && sb != "" {
				watched = append(watched, sb)
			}
		}
	}
	var (
		mu    sync.Mutex
		conn  net.Conn
		ended bool
	)
	end := func() {
		mu.Lock()
		defer mu.Unlock()
		ended = true
		if conn != nil {
			conn.Close()
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		var timer <-chan time.Time
		for {
			select {
			case ev, ok := <-events:
				if !ok { // with ctx
					return
				}
				kind := ev.GetContainerEventType()
				if timer == nil && slices.Contains(watched, ev.GetContainerId()) &&
					(kind == runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT || kind == runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT) {
					timer = time.After(endGrace)
				}
			case <-timer:
				s.cfg.Log.Debug("stream ended with its container", "pod", p.Namespace+"/"+p.Name, "id", id)
				end()
			}
		}
	}()
	serve(&taken{ResponseWriter: w, took: func(c net.Conn) {
		mu.Lock()
		defer mu.Unlock()
		if conn = c; ended {
			c.Close()
		}
	}}, r)
	cancel()
	<-done
}

// checkpoint asks the runtime for one. As long as it has none to give the
// answer is the one that upstream's clients take for that.
func (s *Server) checkpoint(w http.ResponseWriter, r *http.Request) error {
	p, name, err := s.podAndContainer(r)
	if err != nil {
		return err
	}
	id, err := running(p, name)
	if err != nil {
		return err
	}
	if _, err := s.cfg.Runtime.CheckpointContainer(r.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: id}); err != nil {
		http.Error(w, fmt.Sprintf("checkpointing of %s/%s/%s failed (%v)", p.Namespace, p.Name, name, err), http.StatusInternalServerError)
	}
	return nil
}
