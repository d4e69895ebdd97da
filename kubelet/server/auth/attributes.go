package auth

import (
	"net/http"
	"path"
	"strings"
)

// Subresources of nodes that allow a path, the finest first: one of them
// suffices. This is the kubelet's table of 1.36 with KEP-2862.
func Subresources(p string) []string {
	if clean := path.Clean(p); clean != p && clean+"/" != p {
		return []string{"proxy"} // what it leads to is not what it looks like
	}
	switch {
	case below(p, "/pods"), below(p, "/runningpods"):
		return []string{"pods", "proxy"}
	case below(p, "/healthz"):
		return []string{"healthz", "proxy"}
	case below(p, "/configz"):
		return []string{"configz", "proxy"}
	case below(p, "/flagz"):
		return []string{"configz"}
	case below(p, "/statusz"):
		return []string{"statusz"}
	case below(p, "/stats"):
		return []string{"stats"}
	case below(p, "/metrics"):
		return []string{"metrics"}
	case below(p, "/logs"):
		return []string{"log"}
	case below(p, "/checkpoint"):
		return []string{"checkpoint"}
	}
	return []string{"proxy"}
}

// below says whether p is root or lies below it.
func below(p, root string) bool {
	rest, ok := strings.CutPrefix(p, root)
	return ok && (rest == "" || rest[0] == '/')
}

// verb of the API that a request needs. Methods of no verb have none, which
// only a rule for all verbs allows.
//
// Streams into a container are "create" whatever their method: a WebSocket
// always comes by GET, and the right to read from a node must not be one to run
// commands on it (as kube-apiserver asks of pods/exec since 1.35).
func verb(r *http.Request) string {
	switch r.Method {
	case http.MethodPost:
		return "create"
	case http.MethodGet:
		for _, root := range []string{"/exec", "/attach", "/portForward", "/run"} {
			if below(r.URL.Path, root) {
				return "create"
			}
		}
		return "get"
	case http.MethodPut:
		return "update"
	case http.MethodPatch:
		return "patch"
	case http.MethodDelete:
		return "delete"
	}
	return ""
}
