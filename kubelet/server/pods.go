package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"github.com/podd-runtime/podd/kubelet/server/logs"
)

func (s *Server) podRoutes(m *http.ServeMux) {
	const pod = "/api/v1/namespaces/{namespace}/pods/{name}"
	m.HandleFunc("GET "+pod+"/log", long(s.podLog))
	m.HandleFunc("DELETE "+pod, long(s.deletePod))
	for _, method := range []string{"GET ", "POST "} { // WebSocket and SPDY
		m.HandleFunc(method+pod+"/exec", long(s.podExec))
		m.HandleFunc(method+pod+"/attach", long(s.podAttach))
		m.HandleFunc(method+pod+"/portforward", long(s.podPortForward))
	}
}

func (s *Server) pod(r *http.Request) (*v1.Pod, error) {
	namespace, name := r.PathValue("namespace"), r.PathValue("name")
	if p, ok := s.cfg.Pods.Get(namespace, name); ok {
		return p, nil
	}
	_, err := s.kinds[0].get(namespace, name) // with its hint
	if err == nil {
		err = apierrors.NewNotFound(schema.GroupResource{Resource: "pods"}, name)
	}
	return nil, err
}

// containerNames of a pod, in the order kubectl tells them: init, regular, ephemeral.
func containerNames(p *v1.Pod) (all, regular []string) {
	for _, c := range p.Spec.InitContainers {
		all = append(all, c.Name)
	}
	for _, c := range p.Spec.Containers {
		all = append(all, c.Name)
		regular = append(regular, c.Name)
	}
	for _, c := range p.Spec.EphemeralContainers {
		all = append(all, c.Name)
	}
	return all, regular
}

// containerName checks the container that a request names, or finds the only
// one, as kube-apiserver does.
func containerName(p *v1.Pod, name string) (string, error) {
	all, regular := containerNames(p)
	if name == "" {
		if len(regular) == 1 {
			return regular[0], nil
		}
		return "", apierrors.NewBadRequest(fmt.Sprintf("a container name must be specified for pod %s, choose one of: [%s]", p.Name, strings.Join(all, " ")))
	}
	if !slices.Contains(all, name) {
		return "", apierrors.NewBadRequest(fmt.Sprintf("container %s is not valid for pod %s, choose one of: [%s]", name, p.Name, strings.Join(all, " ")))
	}
	return name, nil
}

func containerStatus(p *v1.Pod, name string) (v1.ContainerStatus, bool) {
	for _, list := range [][]v1.ContainerStatus{p.Status.ContainerStatuses, p.Status.InitContainerStatuses, p.Status.EphemeralContainerStatuses} {
		for _, c := range list {
			if c.Name == name {
				return c, true
			}
		}
	}
	return v1.ContainerStatus{}, false
}

// runtimeID is the id within "<runtime>://<id>".
func runtimeID(id string) string {
	if _, after, ok := strings.Cut(id, "://"); ok {
		return after
	}
	return id
}

// LogContainer is the id of the container whose log is asked for: the one
// that runs or ran last, or the one before. Wording and rules are the
// kubelet's (validateContainerLogStatus).
func LogContainer(p *v1.Pod, name string, previous bool) (string, error) {
	bad := func(format string, args ...any) (string, error) {
		return "", apierrors.NewBadRequest(fmt.Sprintf(format, args...))
	}
	st, ok := containerStatus(p, name)
	if !ok {
		return bad("container %q in pod %q is not available", name, p.Name)
	}
	last := ""
	if st.LastTerminationState.Terminated != nil {
		last = st.LastTerminationState.Terminated.ContainerID
	}
	id := ""
	switch {
	case previous:
		if last == "" {
			return bad("previous terminated container %q in pod %q not found", name, p.Name)
		}
		id = last
	case st.State.Running != nil:
		id = st.ContainerID
	case st.State.Terminated != nil && st.State.Terminated.ContainerID != "":
		id = st.State.Terminated.ContainerID
	case last != "":
		id = last
	case st.State.Terminated != nil:
		return bad("container %q in pod %q is terminated", name, p.Name)
	case st.State.Waiting != nil:
		switch reason := st.State.Waiting.Reason; reason {
		case "ErrImagePull", "ImagePullBackOff":
			return bad("container %q in pod %q is waiting to start: trying and failing to pull image", name, p.Name)
		default:
			return bad("container %q in pod %q is waiting to start: %s", name, p.Name, reason)
		}
	default:
		return bad("container %q in pod %q is waiting to start - no logs yet", name, p.Name)
	}
	return runtimeID(id), nil
}

func (s *Server) podLog(w http.ResponseWriter, r *http.Request) error {
	p, err := s.pod(r)
	if err != nil {
		return err
	}
	q := r.URL.Query()
	name, err := containerName(p, q.Get("container"))
	if err != nil {
		return err
	}
	o, previous, err := LogOptions(q, time.Now())
	if err != nil {
		return err
	}
	id, err := LogContainer(p, name, previous)
	if err != nil {
		return err
	}
	return s.streams.Logs(w, r, id, o)
}

// LogOptions reads the query of a log request: v1.PodLogOptions.
func LogOptions(q url.Values, now time.Time) (o logs.Options, previous bool, err error) {
	flag := func(name string) bool {
		if !q.Has(name) || err != nil {
			return false
		}
		v, perr := strconv.ParseBool(q.Get(name))
		if perr != nil && q.Get(name) != "" {
			err = apierrors.NewBadRequest(fmt.Sprintf("%s: %q is neither true nor false", name, q.Get(name)))
		}
		return v || q.Get(name) == ""
	}
	number := func(name string, least int64) (int64, bool) {
		if !q.Has(name) || err != nil {
			return 0, false
		}
		n, perr := strconv.ParseInt(q.Get(name), 10, 64)
		if perr != nil || n < least {
			err = apierrors.NewBadRequest(fmt.Sprintf("%s: %q is not a number from %d", name, q.Get(name), least))
		}
		return n, true
	}
	o.Tail = -1
	o.Follow, o.Timestamps = flag("follow"), flag("timestamps")
	previous = flag("previous")
	if n, ok := number("tailLines", 0); ok {
		o.Tail = n
	}
	o.LimitBytes, _ = number("limitBytes", 1)
	if n, ok := number("sinceSeconds", 1); ok {
		o.Since = now.Add(-time.Duration(n) * time.Second)
	}
	if v := q.Get("sinceTime"); v != "" && err == nil {
		if q.Has("sinceSeconds") {
			err = apierrors.NewBadRequest("at most one of sinceTime or sinceSeconds may be specified")
		} else if o.Since, err = time.Parse(time.RFC3339Nano, v); err != nil {
			err = apierrors.NewBadRequest(fmt.Sprintf("sinceTime: %q is not an RFC 3339 time", v))
		}
	}
	switch v := q.Get("stream"); v {
	case "", v1.LogStreamAll:
	case v1.LogStreamStdout, v1.LogStreamStderr:
		o.Stream = strings.ToLower(v)
	default:
		if err == nil {
			err = apierrors.NewBadRequest(fmt.Sprintf("stream: %q is none of All, Stdout, Stderr", v))
		}
	}
	return o, previous, err
}

// Logs writes a container's log. The local API and the kubelet's share it.
func (s Streams) Logs(w http.ResponseWriter, r *http.Request, containerID string, o logs.Options) error {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	var events <-chan *runtimeapi.ContainerEventResponse
	if o.Follow {
		events = s.Containers.Subscribe(ctx) // before the state is read: its end cannot be missed
	}
	st, err := s.Containers.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: containerID})
	if err != nil {
		return fmt.Errorf("container %s: %w", containerID, err)
	}
	done := make(chan struct{})
	followed := make(chan struct{})
	if o.Follow {
		go func() {
			defer close(followed)
			ended := st.GetStatus().GetState() == runtimeapi.ContainerState_CONTAINER_EXITED
			if ended {
				close(done)
			}
			for ev := range events { // to its end, or the sender holds it for us
				over := ev.GetContainerEventType() == runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT ||
					ev.GetContainerEventType() == runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT
				if !ended && over && ev.GetContainerId() == containerID {
					ended = true
					close(done)
				}
			}
		}()
		defer func() { cancel(); <-followed }()
	}
	w.Header().Set("Content-Type", "text/plain")
	out := &started{w: w}
	err = logs.Read(ctx, st.GetStatus().GetLogPath(), o, done, out)
	switch {
	case err == nil, out.started && ctx.Err() != nil:
		return nil
	case errdefs.IsNotFound(err) && !out.started && st.GetStatus().GetState() == runtimeapi.ContainerState_CONTAINER_CREATED:
		return nil // nothing written yet
	case out.started:
		// The answer is under way: cut it, so that the client sees it is not whole.
		s.Log.Warn("log was cut off", "container", containerID, "error", err)
		panic(http.ErrAbortHandler)
	}
	w.Header().Del("Content-Type")
	return err
}

// started notes the first byte: before it, an error can still be an answer.
type started struct {
	w       http.ResponseWriter
	started bool
}

func (s *started) Write(b []byte) (int, error) {
	s.started = true
	return s.w.Write(b)
}

func (s *started) Flush() {
	s.started = true
	http.NewResponseController(s.w).Flush()
}

// streamOptions reads v1.PodExecOptions' and v1.PodAttachOptions' switches.
func streamOptions(q url.Values, defaults remotecommand.Options) (*remotecommand.Options, error) {
	o := defaults
	for name, to := range map[string]*bool{"stdin": &o.Stdin, "stdout": &o.Stdout, "stderr": &o.Stderr, "tty": &o.TTY} {
		if !q.Has(name) {
			continue
		}
		v, err := strconv.ParseBool(q.Get(name))
		if err != nil {
			return nil, apierrors.NewBadRequest(fmt.Sprintf("%s: %q is neither true nor false", name, q.Get(name)))
		}
		*to = v
	}
	if o.TTY {
		o.Stderr = false // a terminal has one output
	}
	if !o.Stdin && !o.Stdout && !o.Stderr {
		return nil, apierrors.NewBadRequest("you must specify at least 1 of stdin, stdout, stderr")
	}
	return &o, nil
}

// running is the id of the container that a request means.
func (s *Server) running(r *http.Request) (string, error) {
	p, err := s.pod(r)
	if err != nil {
		return "", err
	}
	name, err := containerName(p, r.URL.Query().Get("container"))
	if err != nil {
		return "", err
	}
	if p.Status.Phase == v1.PodSucceeded || p.Status.Phase == v1.PodFailed {
		return "", apierrors.NewBadRequest(fmt.Sprintf("cannot exec into a container in a completed pod; current phase is %s", p.Status.Phase))
	}
	id, err := s.cfg.Pods.Container(p.Namespace, p.Name, name)
	if err != nil {
		return "", fmt.Errorf("container %s of pod %s: %w", name, p.Name, err)
	}
	if id == "" {
		return "", apierrors.NewBadRequest(fmt.Sprintf("container %q of pod %q has not started", name, p.Name))
	}
	return runtimeID(id), nil
}

func (s *Server) podExec(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	if len(q["command"]) == 0 {
		return apierrors.NewBadRequest("command: you must specify at least one command for the container")
	}
	// kubectl names them all; the API's defaults are stdout and stderr on.
	o, err := streamOptions(q, remotecommand.Options{})
	if err != nil {
		return err
	}
	id, err := s.running(r)
	if err != nil {
		return err
	}
	s.streams.Exec(w, r, id, q["command"], o)
	return nil
}

func (s *Server) podAttach(w http.ResponseWriter, r *http.Request) error {
	o, err := streamOptions(r.URL.Query(), remotecommand.Options{Stdout: true, Stderr: true})
	if err != nil {
		return err
	}
	id, err := s.running(r)
	if err != nil {
		return err
	}
	s.streams.Attach(w, r, id, o)
	return nil
}

func (s *Server) podPortForward(w http.ResponseWriter, r *http.Request) error {
	p, err := s.pod(r)
	if err != nil {
		return err
	}
	var ports []int32
	for _, v := range r.URL.Query()["ports"] {
		for _, one := range strings.Split(v, ",") {
			n, err := strconv.ParseUint(one, 10, 16)
			if err != nil || n == 0 {
				return apierrors.NewBadRequest(fmt.Sprintf("ports: %q is not a port", one))
			}
			ports = append(ports, int32(n))
		}
	}
	id, err := s.sandbox(r.Context(), p)
	if err != nil {
		return err
	}
	s.streams.PortForward(w, r, id, ports)
	return nil
}

// sandbox is the id of the pod's newest running sandbox.
func (s *Server) sandbox(ctx context.Context, p *v1.Pod) (string, error) {
	resp, err := s.cfg.Containers.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
		State:         &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY},
		LabelSelector: map[string]string{"io.kubernetes.pod.uid": string(p.UID)},
	}})
	if err != nil {
		return "", fmt.Errorf("sandbox of pod %s: %w", p.Name, err)
	}
	var newest *runtimeapi.PodSandbox
	for _, sb := range resp.GetItems() {
		if newest == nil || sb.GetCreatedAt() > newest.GetCreatedAt() {
			newest = sb
		}
	}
	if newest == nil {
		return "", apierrors.NewBadRequest(fmt.Sprintf("unable to forward port because pod is not running. Current status=%s", p.Status.Phase))
	}
	return newest.GetId(), nil
}

// deletePod stops the pod. Its manifest brings it back when the file changes
// or the pod is started again.
func (s *Server) deletePod(w http.ResponseWriter, r *http.Request) error {
	p, err := s.pod(r)
	if err != nil {
		return err
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	body, err := readBody(r)
	if err != nil {
		return err
	}
	var o metav1.DeleteOptions
	if len(body) > 0 {
		if err := json.Unmarshal(body, &o); err != nil {
			return apierrors.NewBadRequest("DeleteOptions: " + err.Error())
		}
	}
	grace, err := gracePeriod(r.URL.Query(), o.GracePeriodSeconds)
	if err != nil {
		return err
	}
	if o.Preconditions != nil && o.Preconditions.UID != nil && *o.Preconditions.UID != p.UID {
		return apierrors.NewConflict(schema.GroupResource{Resource: "pods"}, p.Name, errors.New("the UID is another one"))
	}
	if err := s.cfg.Pods.Stop(r.Context(), p.Namespace, p.Name, grace); err != nil {
		return fmt.Errorf("stop pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	if now, ok := s.cfg.Pods.Get(p.Namespace, p.Name); ok {
		p = now
	}
	writeJSON(w, http.StatusOK, s.kinds[0].typed(p))
	return nil
}

func gracePeriod(q url.Values, fallback *int64) (*int64, error) {
	v := q.Get("gracePeriodSeconds")
	if v == "" {
		return fallback, nil
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("gracePeriodSeconds: %q is not a number of seconds", v))
	}
	if n < 0 {
		return nil, nil // as kubectl's --grace-period=-1
	}
	return &n, nil
}

var _ io.Writer = (*started)(nil)
