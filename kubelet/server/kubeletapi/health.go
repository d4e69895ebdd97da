package kubeletapi

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"time"
)

// checkTime bounds one check of the node's health: what takes longer hangs.
const checkTime = 5 * time.Second

func (s *Server) healthRoutes(m *http.ServeMux) {
	checks := append([]Check{
		{"ping", func(context.Context) error { return nil }},
		{"log", func(context.Context) error { return nil }},
	}, s.cfg.Checks...)
	m.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { s.health(w, r, checks) })
	m.HandleFunc("GET /healthz/{$}", func(w http.ResponseWriter, r *http.Request) { s.health(w, r, checks) })
	for _, c := range checks {
		m.HandleFunc("GET /healthz/"+c.Name, func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), checkTime)
			defer cancel()
			if err := c.Check(ctx); err != nil {
				http.Error(w, fmt.Sprintf("internal server error: %v", err), http.StatusInternalServerError)
				return
			}
			io.WriteString(w, "ok")
		})
	}
}

// health runs all checks. Why one fails is for the log: whoever asks may be
// anybody.
func (s *Server) health(w http.ResponseWriter, r *http.Request, checks []Check) {
	ctx, cancel := context.WithTimeout(r.Context(), checkTime)
	defer cancel()
	var out bytes.Buffer
	failed := false
	for _, c := range checks {
		if err := c.Check(ctx); err != nil {
			failed = true
			s.cfg.Log.Warn("health check failed", "check", c.Name, "error", err)
			fmt.Fprintf(&out, "[-]%s failed: reason withheld\n", c.Name)
			continue
		}
		fmt.Fprintf(&out, "[+]%s ok\n", c.Name)
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	switch {
	case failed:
		w.WriteHeader(http.StatusInternalServerError)
		fmt.Fprintf(w, "%shealthz check failed\n", out.Bytes())
	case r.URL.Query().Has("verbose"):
		fmt.Fprintf(w, "%shealthz check passed\n", out.Bytes())
	default:
		io.WriteString(w, "ok")
	}
}
