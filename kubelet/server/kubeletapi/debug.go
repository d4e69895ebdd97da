package kubeletapi

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/pprof"
	"runtime"
	"slices"
	"strings"
	"time"

	kubeletv1beta1 "k8s.io/kubelet/config/v1beta1"
)

// on is a switch's value; unset is on.
func on(b *bool) bool { return b == nil || *b }

func (s *Server) debugRoutes(m *http.ServeMux) {
	k := s.cfg.Kubelet
	if on(k.EnableProfilingHandler) {
		m.HandleFunc("GET /debug/pprof/", func(w http.ResponseWriter, r *http.Request) {
			switch strings.TrimPrefix(r.URL.Path, "/debug/pprof/") {
			case "profile":
				pprof.Profile(w, r)
			case "symbol":
				pprof.Symbol(w, r)
			case "cmdline":
				pprof.Cmdline(w, r)
			case "trace":
				pprof.Trace(w, r)
			default:
				pprof.Index(w, r)
			}
		})
		if k.EnableContentionProfiling {
			runtime.SetBlockProfileRate(1)
		}
	} else {
		m.HandleFunc("/debug/pprof/", disabled("profiling endpoint is disabled."))
	}
	if !on(k.EnableDebugFlagsHandler) || s.cfg.SetVerbosity == nil {
		m.HandleFunc("/debug/flags/v", disabled("flags endpoint is disabled."))
		return
	}
	m.HandleFunc("PUT /debug/flags/v", func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 64))
		if err == nil {
			err = s.cfg.SetVerbosity(strings.TrimSpace(string(b)))
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprintf(w, "successfully set klog.logging.verbosity to %s", b)
	})
}

// configz shows the configuration under the name that upstream's tools look for.
func (s *Server) configz(w http.ResponseWriter, _ *http.Request) error {
	k := *s.cfg.Kubelet
	k.Kind, k.APIVersion = "KubeletConfiguration", kubeletv1beta1.SchemeGroupVersion.String()
	w.Header().Set("X-Content-Type-Options", "nosniff")
	return writeJSON(w, map[string]any{"kubeletconfig": &k})
}

// zpageRoutes are configz, and the pages of KEP-4827 and KEP-4828 for people.
func (s *Server) zpageRoutes(m *http.ServeMux) {
	m.HandleFunc("GET /configz", short(s.configz))
	m.HandleFunc("GET /statusz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprintf(w, "\nkubelet statusz\nWarning: This endpoint is not meant to be machine parseable, has no formatting compatibility guarantees and is for debugging purposes only.\n\n")
		fmt.Fprintf(w, "Started: %s\nUp: %s\nGo version: %s\nBinary version: %s\n\nPaths: %s\n", s.started.UTC().Format(time.RFC1123),
			time.Since(s.started).Round(time.Second), runtime.Version(), s.cfg.Version, "/configz /flagz /healthz /metrics")
	})
	m.HandleFunc("GET /flagz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprintf(w, "\nkubelet flagz\nWarning: This endpoint is not meant to be machine parseable, has no formatting compatibility guarantees and is for debugging purposes only.\n\n")
		for _, name := range slices.Sorted(maps.Keys(s.cfg.Flags)) {
			fmt.Fprintf(w, "%s=%s\n", name, s.cfg.Flags[name])
		}
	})
}
