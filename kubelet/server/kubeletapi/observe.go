package kubeletapi

import (
	"bufio"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"
)

// roots that requests are counted by; the rest is "other".
var roots = []string{
	"healthz", "pods", "stats", "metrics", "metrics/cadvisor", "metrics/probes", "metrics/resource", "metrics/slis",
	"run", "exec", "attach", "portForward", "containerLogs", "configz", "runningpods", "checkpoint", "debug", "logs", "flagz", "statusz",
}

var methods = []string{"OPTIONS", "GET", "HEAD", "POST", "PUT", "DELETE", "TRACE", "CONNECT"}

// bucket is the label for a path.
func bucket(path string) string {
	first, rest, more := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	if first == "metrics" && more {
		second, _, _ := strings.Cut(rest, "/")
		first += "/" + second
	}
	if slices.Contains(roots, first) {
		return first
	}
	return "other"
}

func (s *Server) observed(kind string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.cfg.Observe != nil {
			begin, path := time.Now(), bucket(r.URL.Path)
			method := r.Method
			if !slices.Contains(methods, method) {
				method = "other"
			}
			defer func() {
				// Upstream compares with "portforward", which no path is.
				long := path == "exec" || path == "attach" || path == "portForward" || path == "debug"
				s.cfg.Observe(Request{Method: method, Path: path, ServerType: kind, LongRunning: long, Duration: time.Since(begin)})
			}()
		}
		next.ServeHTTP(w, r)
	})
}

// taken remembers the connection that a stream takes over.
type taken struct {
	http.ResponseWriter
	took func(net.Conn)
}

func (t *taken) Unwrap() http.ResponseWriter { return t.ResponseWriter }

func (t *taken) Flush() { _ = http.NewResponseController(t.ResponseWriter).Flush() }

func (t *taken) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(t.ResponseWriter).Hijack()
	if err == nil {
		t.took(conn)
	}
	return conn, rw, err
}
