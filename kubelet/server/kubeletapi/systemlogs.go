package kubeletapi

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// systemLogRoutes show the files of the node's log directory.
func (s *Server) systemLogRoutes(m *http.ServeMux) {
	if !on(s.cfg.Kubelet.EnableSystemLogHandler) {
		m.HandleFunc("/logs/", disabled("logs endpoint is disabled."))
		return
	}
	m.HandleFunc("GET /logs/", func(w http.ResponseWriter, r *http.Request) {
		if q := r.URL.Query(); q.Has("query") {
			http.Error(w, "query: reading logs of services (NodeLogQuery) is not supported", http.StatusBadRequest)
			return
		}
		root, err := os.OpenRoot(s.cfg.SystemLogs)
		if err != nil {
			fail(w, err)
			return
		}
		defer root.Close()
		http.StripPrefix("/logs/", http.FileServerFS(logFS{root})).ServeHTTP(w, r)
	})
}

// logFS is the log directory without a way out of it: links lead only to what
// is inside, however they are written, and nothing but files and directories
// is opened. Whoever may write to the directory, as pods with a hostPath on it
// may, cannot have other files of the node shown (CVE-2017-1002101's kind).
type logFS struct{ root *os.Root }

// maxLinks on the way to a file.
const maxLinks = 8

// Open implements fs.FS.
func (f logFS) Open(name string) (fs.File, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	}
	for range maxLinks {
		// A FIFO would block, and a device may do anything.
		file, err := f.root.OpenFile(filepath.FromSlash(name), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if err == nil {
			st, err := file.Stat()
			if err == nil && !st.Mode().IsRegular() && !st.IsDir() {
				err = fs.ErrPermission
			}
			if err != nil {
				file.Close()
				return nil, &fs.PathError{Op: "open", Path: name, Err: err}
			}
			return file, nil
		}
		// Container logs are linked to by absolute paths, which a root does not
		// follow: those that stay inside are followed here.
		inside, ok := f.follow(name)
		if !ok {
			if !errors.Is(err, fs.ErrNotExist) {
				err = fs.ErrPermission
			}
			return nil, &fs.PathError{Op: "open", Path: name, Err: err}
		}
		name = inside
	}
	return nil, &fs.PathError{Op: "open", Path: name, Err: fmt.Errorf("too many links: %w", fs.ErrPermission)}
}

// follow returns where an absolute link points to, below the root.
func (f logFS) follow(name string) (string, bool) {
	target, err := f.root.Readlink(name)
	if err != nil || !path.IsAbs(target) {
		return "", false
	}
	rest, ok := strings.CutPrefix(path.Clean(target), path.Clean(f.root.Name())+"/")
	return rest, ok
}
