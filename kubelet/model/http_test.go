package model

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

var codecs = func() serializer.CodecFactory {
	s := runtime.NewScheme()
	if err := v1.AddToScheme(s); err != nil {
		panic(err)
	}
	metav1.AddToGroupVersion(s, v1.SchemeGroupVersion)
	return serializer.NewCodecFactory(s)
}()

// line of one podd to the apiserver. Requests take their time, get lost before
// or after they have had their effect, and are refused.
type conn struct {
	s    *server
	dead <-chan struct{} // closed when podd is killed
	// listed is the restore after which it has listed last.
	listed atomic.Int64
}

var errReset = errors.New("connection reset by peer")

func (c *conn) RoundTrip(req *http.Request) (*http.Response, error) {
	var body []byte
	if req.Body != nil {
		body, _ = io.ReadAll(req.Body)
		req.Body.Close()
	}
	die := c.s.w.roll(req.Method, req.URL.Path)
	asked := time.Now()
	c.s.w.note("  ask %s %s", req.Method, req.URL)
	first, second, fate, late := c.s.w.latency(die), c.s.w.latency(die), die.IntN(100), die.IntN(2) == 0
	if c.s.w.isCalm() {
		fate = 99
	}
	if err := c.pass(req.Context(), first); err != nil || c.s.isAway() || fate < 2 {
		if err != nil && late { // it was on its way already
			c.serve(req, body, asked)
		}
		return nil, errors.Join(err, errReset)
	}
	var resp *http.Response
	switch fate {
	case 2, 3:
		resp = refusal(apierrors.NewTooManyRequests("slow down", 1))
	case 4:
		resp = refusal(apierrors.NewInternalError(errors.New("etcdserver: request timed out")))
	case 5:
		resp = refusal(apierrors.NewServiceUnavailable("not ready"))
	case 6, 7: // others write at the same time, until the apiserver gives up
		if name := podName(req); req.Method == http.MethodPatch && name != "" {
			c.s.change(name, false, func(p *v1.Pod) { setLabel(p, "raced", fmt.Sprint(die.IntN(1000))) })
			resp = refusal(apierrors.NewConflict(v1.Resource("pods"), name, errors.New("the object has been modified")))
		}
	}
	if resp == nil {
		resp = c.serve(req, body, asked)
	}
	if watching(req) {
		return resp, nil
	}
	if f := c.s.w.take(req.Method + "!"); f != nil {
		f()
	}
	if err := c.pass(req.Context(), second); err != nil || fate == 8 || c.s.isAway() {
		return nil, errors.Join(err, errReset)
	}
	return resp, nil
}

// pass time, as long as podd lives and wants to wait.
func (c *conn) pass(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-c.dead:
		return errReset
	}
}

func setLabel(p *v1.Pod, key, value string) {
	labels := map[string]string{key: value}
	for k, v := range p.Labels {
		if k != key {
			labels[k] = v
		}
	}
	p.Labels = labels
}

const podsPath = "/api/v1/namespaces/default/pods"

func podName(req *http.Request) string {
	name, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(req.URL.Path, podsPath), "/"), "/")
	return name
}

func watching(req *http.Request) bool { return req.URL.Query().Get("watch") == "true" }

// serve a request: its effect, and what is answered.
func (c *conn) serve(req *http.Request, body []byte, asked time.Time) *http.Response {
	s, name := c.s, podName(req)
	switch {
	case req.Method == http.MethodGet && req.URL.Path == "/api/v1/pods":
		if watching(req) {
			return c.serveWatch(req)
		}
		return c.serveList(req)
	case req.Method == http.MethodGet:
		if p := s.get(name); p != nil {
			return answer(http.StatusOK, p)
		}
		return refusal(apierrors.NewNotFound(v1.Resource("pods"), name))
	case req.Method == http.MethodPatch:
		return outcome(s.patchStatus(name, body, asked, c.listed.Load() == s.restored()))
	case req.Method == http.MethodPost:
		return s.serveCreate(body)
	case req.Method == http.MethodDelete:
		return s.serveDelete(name, body)
	}
	panic("no such request: " + req.Method + " " + req.URL.String())
}

func decode[T runtime.Object](body []byte, into T) T {
	obj, _, err := codecs.UniversalDeserializer().Decode(body, nil, into)
	if err != nil {
		panic(err)
	}
	return obj.(T)
}

// serveCreate makes a mirror pod. Now and then somebody deletes it at once.
func (s *server) serveCreate(body []byte) *http.Response {
	pod := decode(body, &v1.Pod{})
	is, err := s.create(pod, "")
	if err != nil {
		return outcome(nil, err)
	}
	s.w.note("apiserver: mirror pod %s (%s) made", is.pod.Name, is.pod.UID)
	if die := s.w.roll("mirror made", is.pod.Name); !s.w.isCalm() && die.IntN(8) == 0 {
		none := int64(0)
		s.remove(is.pod.Name, &none, "")
	}
	return outcome(is, nil)
}

func (s *server) serveDelete(name string, body []byte) *http.Response {
	opts := decode(body, &metav1.DeleteOptions{})
	var uid types.UID
	if opts.Preconditions != nil {
		uid = *opts.Preconditions.UID
	}
	s.w.note("podd deletes %s (%s) at the apiserver", name, uid)
	return outcome(s.remove(name, opts.GracePeriodSeconds, uid))
}

func outcome(is *stored, err error) *http.Response {
	if err != nil {
		return refusal(err)
	}
	return response(http.StatusOK, is.raw)
}

func refusal(err error) *http.Response {
	st := apierrors.APIStatus(nil)
	if !errors.As(err, &st) {
		panic(err)
	}
	code := st.Status()
	code.Kind, code.APIVersion = "Status", "v1"
	resp := answer(int(code.Code), &code)
	if d := code.Details; d != nil && d.RetryAfterSeconds > 0 {
		resp.Header.Set("Retry-After", strconv.Itoa(int(d.RetryAfterSeconds)))
	}
	return resp
}

func answer(code int, obj any) *http.Response {
	raw, err := json.Marshal(obj)
	if err != nil {
		panic(err)
	}
	return response(code, raw)
}

func response(code int, raw []byte) *http.Response {
	return &http.Response{
		StatusCode: code, Status: http.StatusText(code), Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(bytes.NewReader(raw)), ContentLength: int64(len(raw)),
	}
}

// tooLarge is the answer to who has seen versions that there are not.
func tooLarge() error {
	err := apierrors.NewTimeoutError("Too large resource version", 1)
	err.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: metav1.CauseTypeResourceVersionTooLarge, Message: "Too large resource version"}}
	return err
}

func since(req *http.Request) uint64 {
	n, _ := strconv.ParseUint(req.URL.Query().Get("resourceVersion"), 10, 64)
	return n
}

func (c *conn) serveList(req *http.Request) *http.Response {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if since(req) > s.rv {
		return refusal(tooLarge())
	}
	c.listed.Store(s.restores)
	var b bytes.Buffer
	fmt.Fprintf(&b, `{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"%d"},"items":[`, s.rv)
	sep := ""
	for _, p := range s.sorted() {
		if one := s.pods[p.Name]; here(one) {
			b.WriteString(sep)
			b.Write(one.raw)
			sep = ","
		}
	}
	b.WriteString("]}")
	return response(http.StatusOK, b.Bytes())
}

// watcher is one watch. What it is told arrives in order, each event some time
// after it happened.
type watcher struct {
	s   *server
	n   uint64
	out *io.PipeWriter

	mu    sync.Mutex
	queue []change
	first [][]byte // frames ahead of all changes
	last  []byte   // after which it ends; nil: go on
	over  bool
	wake  chan struct{}
}

func (w *watcher) add(c change) {
	w.mu.Lock()
	w.queue = append(w.queue, c)
	w.mu.Unlock()
	w.poke()
}

func (w *watcher) end() {
	w.mu.Lock()
	w.over = true
	w.mu.Unlock()
	w.poke()
}

func (w *watcher) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func frame(typ watch.EventType, raw []byte) []byte {
	return fmt.Appendf(nil, "{\"type\":%q,\"object\":%s}\n", typ, raw)
}

// serveWatch of the node's pods. An apiserver whose database was restored cannot
// tell versions of before from its own, and nor can we: one that has been
// restored since the list is taken to notice, as it does when it begins anew.
func (c *conn) serveWatch(req *http.Request) *http.Response {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	q := req.URL.Query()
	from := since(req)
	initial := q.Get("sendInitialEvents") == "true"
	if initial && s.listsOnly {
		return refusal(apierrors.NewInvalid(v1.SchemeGroupVersion.WithKind("ListOptions").GroupKind(), "", nil))
	}
	if initial && from > s.rv {
		return refusal(tooLarge())
	}
	r, out := io.Pipe()
	w := &watcher{s: s, n: s.rv, out: out, wake: make(chan struct{}, 1)}
	switch {
	case initial:
		c.listed.Store(s.restores)
		w.first = s.initial()
	case from < s.oldest || from > s.rv || c.listed.Load() != s.restores:
		gone := apierrors.NewResourceExpired(fmt.Sprintf("too old resource version: %d (%d)", from, s.oldest)).Status()
		gone.Kind, gone.APIVersion = "Status", "v1"
		raw, _ := json.Marshal(gone)
		w.last = frame(watch.Error, raw)
	default:
		for _, c := range s.history {
			if c.rv > from {
				w.queue = append(w.queue, c)
			}
		}
	}
	if w.last == nil {
		s.watches[w] = true
	}
	seconds, _ := strconv.Atoi(q.Get("timeoutSeconds"))
	go w.run(req.Context(), time.Duration(seconds)*time.Second, c.dead)
	resp := response(http.StatusOK, nil)
	resp.Body, resp.ContentLength = r, -1
	return resp
}

// initial events, and the bookmark that ends them; s.mu is held.
func (s *server) initial() (frames [][]byte) {
	for _, p := range s.sorted() {
		if one := s.pods[p.Name]; here(one) {
			frames = append(frames, frame(watch.Added, one.raw))
		}
	}
	return append(frames, frame(watch.Bookmark, fmt.Appendf(nil,
		`{"kind":"Pod","apiVersion":"v1","metadata":{"resourceVersion":"%d","annotations":{"k8s.io/initial-events-end":"true"}},"spec":{"containers":null}}`, s.rv)))
}

func (w *watcher) run(ctx context.Context, most time.Duration, dead <-chan struct{}) {
	defer func() {
		w.s.mu.Lock()
		delete(w.s.watches, w)
		w.s.mu.Unlock()
		w.out.Close()
	}()
	stop := context.AfterFunc(ctx, func() { w.out.CloseWithError(context.Canceled) })
	defer stop()
	limit := time.NewTimer(most)
	defer limit.Stop()
	for _, f := range w.first {
		if _, err := w.out.Write(f); err != nil {
			return
		}
	}
	if w.last != nil {
		w.out.Write(w.last)
		return
	}
	for {
		w.mu.Lock()
		queue, over := w.queue, w.over
		w.queue = nil
		w.mu.Unlock()
		if over {
			return // what has not been told is lost
		}
		for _, c := range queue {
			if !w.deliver(ctx, c, dead) {
				return
			}
		}
		if len(queue) > 0 {
			continue
		}
		select {
		case <-w.wake:
		case <-limit.C:
			return
		case <-ctx.Done():
			return
		case <-dead:
			return
		}
	}
}

// deliver one event when its time has come; false: the watch has ended.
func (w *watcher) deliver(ctx context.Context, c change, dead <-chan struct{}) bool {
	typ, is := c.event()
	if typ == "" {
		return true
	}
	t := time.NewTimer(w.s.w.delay() + w.s.w.latency(w.s.w.roll("event", fmt.Sprintf("%s %s", is.pod.UID, is.pod.ResourceVersion))))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return false
	case <-dead:
		return false
	}
	w.mu.Lock()
	over := w.over
	w.mu.Unlock()
	if over {
		return false
	}
	_, err := w.out.Write(frame(typ, is.raw))
	return err == nil
}
